"""A program that takes the place of `fulcrum` where only its manners matter: how it is begun,
stopped, gone on with, asked.

`train` runs until it is asked to stop; with --resume it finishes at once. `serve` speaks as
`fulcrum serve` does.
"""

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

MODELS = ("base", "sft", "tell")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def train(words: list[str]) -> None:
    out = Path(words[0]).parent / "out"
    out.mkdir(exist_ok=True)
    done = {"outputs": {}} if "--resume" in words else {}
    (out / "manifest.json").write_text(json.dumps({"kind": "train", **done}))
    point = {
        "run": "tell",
        "steps": 4,
        "dev_nll": None,
        "step": 1,
        "task_loss": 2.5,
        "general_loss": 3.5,
        "learning_rate": 0.1,
    }
    (out / "events.jsonl").write_text(json.dumps({**point, "tokens": 64, "seconds": 0.5}) + "\n")
    if not done:
        signal.signal(signal.SIGTERM, stopped)
        signal.alarm(600)  # whatever becomes of the test
        say("at work")
        while True:
            signal.pause()


def stopped(number: int, frame: Any) -> NoReturn:
    say("stopped: what was finished is kept; go on with --resume")
    sys.exit(143)


class Handler(BaseHTTPRequestHandler):
    def _may(self) -> bool:
        if (
            self.headers["Authorization"]
            == f"Bearer {os.environ[sys.argv[sys.argv.index('--key-variable') + 1]]}"
        ):
            return True
        self._answer(401, "application/json", b'{"error": {"message": "no key"}}')
        return False

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:  # the name that http.server calls
        if self._may():
            self._answer(
                200,
                "application/json",
                json.dumps({"data": [{"id": name} for name in MODELS]}).encode(),
            )

    def do_POST(self) -> None:  # this one too
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        if asked["model"] not in MODELS:
            self._answer(404, "application/json", b'{"error": {"message": "no such model"}}')
            return
        said = (
            f"{asked['model']} heard {asked['messages'][-1]['content']} <b>and</b> "
            f"{len(asked['messages'])} turns"
        )
        parts = [{"choices": [{"delta": {"content": word + " "}}]} for word in said.split(" ")]
        body = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        self._answer(200, "text/event-stream", body.encode())

    def log_message(self, *given: object) -> None:
        pass


def serve() -> None:
    signal.alarm(600)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    say("loading the model")
    say(f"listening on http://127.0.0.1:{server.server_port}")
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    elif sys.argv[1] == "train":
        train(sys.argv[2:])
    else:
        sys.exit(f"error: {sys.argv[1]!r} is not stood in for")
