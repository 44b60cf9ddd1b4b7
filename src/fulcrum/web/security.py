"""Who may ask the page's server: this machine's browser, in which the address was opened that stood in the terminal.

Against other web pages that the same browser shows: the Host must be ours (no rebinding of names), changes need an Origin that
is ours and a header that no form can send, and everything but the empty page needs a cookie that other sites' requests do not
carry. The cookie is given once for each token; a token that was used opens nothing.
"""

import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

HEADER = "x-fulcrum"  # any value: its presence shows that a script of our own page asks
UPLOAD = "/api/data"  # the one place that takes more than a short text
MOST_BODY = 2**20  # bytes of any other request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Of a report: text, styles and pictures in one file. It runs nothing, sends nothing, and counts as another site.
SHOWN_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)
_ALWAYS = (
    ("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"), ("cache-control", "no-store"),
    ("cross-origin-resource-policy", "same-origin"), ("cross-origin-opener-policy", "same-origin"),
)  # fmt: skip

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """The server's outermost layer, listening on `port`; `told` is given each new address to open, the first one at once."""

    def __init__(self, app: App, port: int, most_upload: int, told: Callable[[str], None]) -> None:
        self.app, self.port, self.most_upload, self.told = app, port, most_upload, told
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self.cookie, self.session = f"fulcrum_{port}", secrets.token_urlsafe(32)
        self.token = ""
        self._new_token()

    def _new_token(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self.told(f"http://127.0.0.1:{self.port}/?token={self.token}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope.get("headers", ())
        }
        if scope["type"] != "http" or headers.get("host", "") not in self.hosts:
            await _refuse(send, 403, "this address is not the page's")
            return
        if scope["path"] == "/" and (
            asked := parse_qs(scope["query_string"].decode("latin-1")).get("token")
        ):
            await self._open(asked[0], send)
            return
        if (why := self._why_not(scope, headers)) is not None:
            await _refuse(send, *why)
            return
        await self.app(scope, receive, _with_headers(send))

    async def _open(self, token: str, send: Send) -> None:
        """Take a token for the session's cookie, and go on to the page without it in the address."""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            await _refuse(
                send,
                403,
                "this address was opened before; the terminal shows the one that counts now",
            )
            return
        self._new_token()
        cookie = f"{self.cookie}={self.session}; Path=/; HttpOnly; SameSite=Strict"
        await _respond(send, 303, b"", (("location", "/"), ("set-cookie", cookie)))

    def _why_not(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Why a request is refused, if it is."""
        path, method = scope["path"], scope["method"]
        if method not in ("GET", "HEAD"):
            if headers.get("origin") != f"http://{headers['host']}" or HEADER not in headers:
                return 403, "only the page itself may change anything"
            if headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return 403, "only the page itself may change anything"
            most = self.most_upload if path == UPLOAD else MOST_BODY
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "say how long the request is"
            if int(length) > most:
                return (
                    413,
                    f"more than {most // 2**20} MiB; give the file to `fulcrum init` in a terminal instead",
                )
        if path == "/" or path.startswith("/static/"):
            return None
        given = [part.strip().partition("=") for part in headers.get("cookie", "").split(";")]
        session = next((value for name, _, value in given if name == self.cookie), "")
        if not hmac.compare_digest(session.encode(), self.session.encode()):
            return (
                401,
                "open the address that stands in the terminal: this browser was not let in since the page was started",
            )
        return None


def _with_headers(send: Send) -> Send:
    """Every answer says what may be done with it; one that has a policy of its own keeps that."""

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            known = {name.lower() for name, _ in message.get("headers", ())}
            more = (*_ALWAYS, ("content-security-policy", POLICY))
            extra = [
                (name.encode(), value.encode())
                for name, value in more
                if name.encode() not in known
            ]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return sent


async def _refuse(send: Send, status: int, why: str) -> None:
    await _respond(
        send, status, json.dumps({"error": why}).encode(), (("content-type", "application/json"),)
    )


async def _respond(
    send: Send, status: int, body: bytes, headers: tuple[tuple[str, str], ...]
) -> None:
    every = (
        *headers,
        *_ALWAYS,
        ("content-security-policy", POLICY),
        ("content-length", str(len(body))),
    )
    pairs = [(name.encode(), value.encode()) for name, value in every]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
