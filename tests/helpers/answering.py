"""An OpenAI-compatible endpoint on loopback, for tests of what asks one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

Asked = list[dict[str, Any]]
Said = Callable[[dict[str, Any], int], tuple[int, str]]


@contextmanager
def endpoint(said: Said) -> Iterator[tuple[str, Asked]]:
    """Its address and what it was asked so far, each with `path` and `key`; `said` gives status and
    answer to a question, the how-manieth (from 1) is told too."""
    asked: Asked = []
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server calls
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
                status, text = said(body, len(asked))
            answer = json.dumps(
                {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}
            ).encode()
            with suppress(ConnectionError):  # whoever asked may have been killed since
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *given: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
