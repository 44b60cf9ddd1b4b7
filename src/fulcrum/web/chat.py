"""Chats with the models of a run, by `fulcrum serve`.

It is started when somebody asks, called with a key of its own, and ended when idle. One run is
served at a time, since each server holds a whole model. The page never calls it directly.
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
# In the server's environment: only the process that started it may ask.
KEY_VARIABLE = "FULCRUM_CHAT_KEY"
IDLE_SECONDS = 600.0
_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_END_SECONDS = 20.0  # seconds that a server may take to end, with answers under way
_READ_SECONDS = 300.0  # seconds without a word, of an answer under way


def words(folder: Path) -> list[str]:
    """Return the command that serves a run folder; its first line of output is its address."""
    return ["serve", str(folder), "--port", "0", "--key-variable", KEY_VARIABLE]


class Talks:
    """The chat server of a workspace.

    One that an earlier page left running is ended: its key is lost.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.run: Run | None = None
        self.key = ""
        self.address = ""  # "" until the server has said it
        self.used = time.monotonic()
        self._lock = threading.Lock()
        for run in workspace.runs():
            jobs.stop(run.job(CHAT))

    def begin(self, run: Run) -> None:
        """Serve a run, in place of another.

        Raise StoreError if that cannot be started, ConfigError as `check_trusted`.
        """
        with self._lock:
            self.used = time.monotonic()
            if self._is_served(run):
                return
            self.workspace.check_trusted(run)
            self._end()
            if not jobs.wait(run.job(CHAT), _END_SECONDS):
                raise StoreError("the chat before is still ending; begin again in a moment")
            key = secrets.token_urlsafe(32)
            jobs.start(
                run.job(CHAT), words(run.folder), self.workspace.place(run), {KEY_VARIABLE: key}
            )
            self.key = key
            self.address = ""
            self.run = run

    def _is_served(self, run: Run) -> bool:
        return self._is_current(run) and jobs.is_running(run.job(CHAT))

    def _is_current(self, run: Run) -> bool:
        return self.run is not None and self.run.id == run.id

    def state(self, run: Run) -> dict[str, Any]:
        """Return whether a run is served (off, starting, ready, failed), and by which models.

        `why`: what the server said last, if it failed or is starting.
        """
        job = run.job(CHAT)
        if not self._is_current(run):
            return {"state": "off", "models": [], "why": ""}
        if not jobs.is_running(job):
            kind, line = jobs.last_word(job)
            state = "off" if kind == "stopped" else "failed"
            return {"state": state, "models": [], "why": line or " ".join(jobs.tail(job, 1))}
        self.address = self.address or _address(job)
        if not self.address:
            return {"state": "starting", "models": [], "why": " ".join(jobs.tail(job, 1))}
        answer = self._call("GET", f"{self.address}/v1/models")
        names = [str(model["id"]) for model in json.loads(answer.data)["data"]]
        return {"state": "ready", "models": names, "why": ""}

    def ask(self, run: Run, model: str, messages: Sequence[dict[str, str]]) -> Iterator[bytes]:
        """Return the model's answer, piece by piece, as server-sent events.

        Raise StoreError if the run is not served.
        """
        if not self.address or not self._is_served(run):
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
                method,
                address,
                json=body,
                headers=headers,
                retries=False,
                preload_content=body is None,
                timeout=urllib3.Timeout(connect=5.0, read=_READ_SECONDS),
            )
        except urllib3.exceptions.HTTPError as error:
            raise ModelError(
                f"the chat does not answer ({type(error).__name__}); begin it again"
            ) from None
        if answer.status != 200:
            raise ModelError(f"not answered: {_reason(answer.data)}")
        return answer

    def end_if_idle(self) -> None:
        """End the chat that nobody has used for long."""
        if time.monotonic() - self.used > IDLE_SECONDS:
            self.end()

    def end(self, run: Run | None = None) -> None:
        """End the chat, or only that of a run."""
        with self._lock:
            if run is None or self._is_current(run):
                self._end()

    def _end(self) -> None:
        if self.run is not None:
            jobs.stop(self.run.job(CHAT))
            self.run = None


def _reason(body: bytes) -> str:
    """Return the reason that the server gave."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def _address(job: Job) -> str:
    """Return the address in what the server said; "" if it is not there yet."""
    for line in jobs.tail(job):
        match = _LISTENING.search(line)
        if match:
            return match[1]
    return ""
