"""Start the page's server, and ask it as a browser would."""

import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any

import uvicorn

from fulcrum import api
from fulcrum.web import app as web_app
from fulcrum.web import chat, security
from fulcrum.web.workspace import Workspace

STANDING_IN = (sys.executable, str(Path(__file__).parents[1] / "helpers" / "standing_in.py"))
PATIENCE = 120.0  # seconds until something that must happen is said not to


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds once it finds something."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
    return found


@dataclass
class Client:
    """A browser's manners, any of which a test may change."""

    port: int
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str | None
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers; a header that is None is left out."""
        own = f"127.0.0.1:{self.port}"
        usual = {
            "Host": own,
            "Cookie": self.cookie,
            "Origin": f"http://{own}",
            "X-Fulcrum": "page",
            **self.headers,
        }
        sent = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        if body is not None and "Content-Length" not in sent and "Transfer-Encoding" not in sent:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        found = (
            answer.status,
            answer.read(),
            {name.lower(): value for name, value in answer.getheaders()},
        )
        connection.close()
        return found

    def json(self, method: str, path: str, value: Any = None) -> Any:
        """The answer to a request that must succeed."""
        status, body, _ = self.ask(
            method,
            path,
            json.dumps(value).encode() if method != "GET" else None,
            Content_Type="application/json",
        )
        assert status == 200, body
        return json.loads(body)

    def refused(self, method: str, path: str, value: Any = None) -> dict[str, Any]:
        """The answer to a request that must not."""
        status, body, _ = self.ask(
            method,
            path,
            json.dumps(value).encode() if method != "GET" else None,
            Content_Type="application/json",
        )
        assert status >= 400, body
        return {"status": status, **json.loads(body)}


@contextmanager
def served(space: Workspace, most_upload: int = 10_000) -> Iterator[tuple[Client, list[str]]]:
    """The server at work, a client that was let in, and the addresses that were told."""
    told: list[str] = []
    with create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        talks = chat.Talks(space)
        app = security.Guard(
            web_app.make_app(space, talks, api.KINDS), port, most_upload, told.append
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        client = Client(port)
        _, _, headers = client.ask("GET", told[0].partition(str(port))[2])
        client.cookie = headers["set-cookie"].partition(";")[0]
        try:
            yield client, told
        finally:
            server.should_exit = True
            thread.join()
