"""Who may ask the page's server: only the browser in which the terminal's address was opened.

Against other web pages that the same browser shows: the Host must be ours (no DNS rebinding),
changes need our Origin and a header that no form can send, and everything but the empty page needs
a cookie that other sites' requests do not carry. The cookie is given once for each token; a used
token opens nothing.
"""

import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

HEADER = "x-fulcrum"  # any value: its presence shows that a script of our own page asks
UPLOAD = "/api/data"  # the one place that takes more than a short text
MAX_BODY = 2**20  # bytes of any other request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# For a report: text, styles and pictures in one file. It runs and sends nothing, and counts as
# another site.
SHOWN_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)
_HEADERS = (  # of every answer
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-store"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("content-security-policy", POLICY),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """The server's outermost layer.

    `show` is called with each new address to open, the first one at once.
    """

    def __init__(self, app: App, port: int, max_upload: int, show: Callable[[str], None]) -> None:
        self.app = app
        self.port = port  # that it listens on
        self.max_upload = max_upload  # bytes
        self.show = show
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self.cookie = f"fulcrum_{port}"  # its name
        self.session = secrets.token_urlsafe(32)  # its value
        self.token = ""
        self._new_token()

    def _new_token(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self.show(f"http://127.0.0.1:{self.port}/?token={self.token}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {}
        for name, value in scope.get("headers", ()):
            headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        if scope["type"] != "http" or headers.get("host", "") not in self.hosts:
            await _refuse(send, 403, "this address is not the page's")
            return
        if scope["path"] == "/":
            tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token")
            if tokens:
                await self._open(tokens[0], send)
                return
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        await self.app(scope, receive, _with_headers(send))

    async def _open(self, token: str, send: Send) -> None:
        """Exchange a token for the session's cookie, and redirect to the page without it."""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            text = "this address was opened before; the terminal shows the one that counts now"
            await _refuse(send, 403, text)
            return
        self._new_token()
        cookie = f"{self.cookie}={self.session}; Path=/; HttpOnly; SameSite=Strict"
        await _respond(send, 303, b"", (("location", "/"), ("set-cookie", cookie)))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and reason if a request is refused."""
        path = scope["path"]
        if scope["method"] not in ("GET", "HEAD"):
            is_ours = headers.get("origin") == f"http://{headers['host']}" and HEADER in headers
            if not is_ours or headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return 403, "only the page itself may change anything"
            limit = self.max_upload if path == UPLOAD else MAX_BODY
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "say how long the request is"
            if int(length) > limit:
                size = limit // 2**20
                text = (
                    f"more than {size} MiB; give the file to `fulcrum init` in a terminal instead"
                )
                return 413, text
        if path == "/" or path.startswith("/static/"):
            return None
        session = _cookie(headers.get("cookie", ""), self.cookie)
        if not hmac.compare_digest(session.encode(), self.session.encode()):
            return 401, (
                "open the address that stands in the terminal: "
                "this browser was not let in since the page was started"
            )
        return None


def _cookie(header: str, name: str) -> str:
    """Return a cookie's value; "" if it is not there."""
    for part in header.split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return ""


def _with_headers(send: Send) -> Send:
    """Add headers that say what may be done with an answer, unless it has its own."""

    async def extended(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            names = {name.lower() for name, _ in headers}
            for name, value in _HEADERS:
                if name.encode() not in names:
                    headers.append((name.encode(), value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return extended


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    await _respond(send, status, body, (("content-type", "application/json"),))


async def _respond(
    send: Send, status: int, body: bytes, headers: tuple[tuple[str, str], ...]
) -> None:
    pairs = []
    for name, value in (*headers, *_HEADERS, ("content-length", str(len(body)))):
        pairs.append((name.encode(), value.encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
