"""Chats with the models of a run: `fulcrum serve`, started when somebody asks, spoken to with its own key, ended when idle.

One run is served at a time, since each server holds a whole model. The page never speaks to it directly.
"""

import json
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fulcrum.core.errors import ModelError, StoreError
from fulcrum.web import jobs
from fulcrum.web.jobs import Job
from fulcrum.web.workspace import Run, Workspace

CHAT = "chat"  # the name of the command
KEY_VARIABLE = (
    "FULCRUM_CHAT_KEY"  # of the server's environment: whoever started it, and nobody else, may ask
)
IDLE_SECONDS = 600.0
_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_ENDS = 20.0  # seconds that a server may take to end, with answers under way
_PATIENCE = 300.0  # seconds without a word, of an answer under way


def words(folder: Path) -> list[str]:
    """The command that serves a run folder. Its first line says where it listens; its key stands in the environment."""
    return ["serve", str(folder), "--port", "0", "--key-variable", KEY_VARIABLE]


class Talks:
    """The chat server of a workspace. What an earlier page left running is ended, for its key is lost."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.run: Run | None = None
        self.key, self.address, self.used = "", "", time.monotonic()
        self._lock = threading.Lock()
        for run in workspace.runs():
            jobs.stop(run.job(CHAT))

    def begin(self, run: Run) -> None:
        """Serve a run, in place of another. Raises StoreError where that cannot be started, ConfigError as `check_trusted`."""
        with self._lock:
            self.used = time.monotonic()
            if self.run is not None and self.run.id == run.id and jobs.is_running(run.job(CHAT)):
                return
            self.workspace.check_trusted(run)
            self._end()
            if not jobs.wait(run.job(CHAT), _ENDS):
                raise StoreError("the chat before is still ending; begin again in a moment")
            key = secrets.token_urlsafe(32)
            jobs.start(
                run.job(CHAT), words(run.folder), self.workspace.place(run), {KEY_VARIABLE: key}
            )
            self.key, self.address, self.run = key, "", run

    def state(self, run: Run) -> dict[str, Any]:
        """Whether a run is served (off, starting, ready, failed), and then by which models; what it said where it failed."""
        job = run.job(CHAT)
        if self.run is None or self.run.id != run.id:
            return {"state": "off", "models": [], "why": ""}
        if not jobs.is_running(job):
            kind, line = jobs.last_word(job)
            return {
                "state": "off" if kind == "stopped" else "failed",
                "models": [],
                "why": line or " ".join(jobs.tail(job, 1)),
            }
        self.address = self.address or _address(job)
        if not self.address:
            return {"state": "starting", "models": [], "why": " ".join(jobs.tail(job, 1))}
        answer = self._call("GET", f"{self.address}/v1/models")
        names = [str(model["id"]) for model in json.loads(answer.data)["data"]]
        return {"state": "ready", "models": names, "why": ""}

    def ask(self, run: Run, model: str, messages: Sequence[dict[str, str]]) -> Iterator[bytes]:
        """What the model answers, piece by piece, as server-sent events. Raises StoreError where the run is not served."""
        if (
            self.run is None
            or self.run.id != run.id
            or not self.address
            or not jobs.is_running(run.job(CHAT))
        ):
            raise StoreError("the chat has ended; begin it again")
        body = {"model": model, "messages": list(messages), "stream": True}
        answer = self._call("POST", f"{self.address}/v1/chat/completions", body)
        return self._pieces(answer)

    def _pieces(self, answer: Any) -> Iterator[bytes]:
        try:
            for piece in answer.stream(4096):
                self.used = time.monotonic()
                yield piece
        finally:
            answer.release_conn()

    def _call(self, method: str, address: str, body: dict[str, Any] | None = None) -> Any:
        import urllib3

        self.used = time.monotonic()
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            answer = urllib3.request(
                method, address, json=body, headers=headers, retries=False, preload_content=body is None,
                timeout=urllib3.Timeout(connect=5.0, read=_PATIENCE),
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            raise ModelError(
                f"the chat does not answer ({type(error).__name__}); begin it again"
            ) from None
        if answer.status != 200:
            raise ModelError(f"not answered: {_said(answer.data)}")
        return answer

    def end_if_idle(self) -> None:
        """End the chat that nobody has used for long."""
        if time.monotonic() - self.used > IDLE_SECONDS:
            self.end()

    def end(self, run: Run | None = None) -> None:
        """End the chat, or only that of a run."""
        with self._lock:
            if run is None or (self.run is not None and self.run.id == run.id):
                self._end()

    def _end(self) -> None:
        if self.run is not None:
            jobs.stop(self.run.job(CHAT))
            self.run = None


def _said(body: bytes) -> str:
    """What the server gave as its reason."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def _address(job: Job) -> str:
    return next((found[1] for line in jobs.tail(job) if (found := _LISTENING.search(line))), "")
