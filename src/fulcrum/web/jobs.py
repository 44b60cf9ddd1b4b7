"""Background `fulcrum` processes started by the web page; they outlive the server.

A job is two files of one name in a folder: what was started (`NAME.process.json`) and what it said
(`NAME.log`); its results are the command's own affair. Invariant: a job is running only while its
process lives *and* began when the job did, since process numbers are reused. So a restarted server
finds its jobs, and signals reach no other process.
"""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulcrum.core import store
from fulcrum.core.errors import ConfigError, StoreError

# What a job says is parsed: no colours, whatever the user's shell asks of commands in a terminal.
_COLOURS = frozenset({"FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"})
# -P: never import what lies in the working folder.
COMMAND = (sys.executable, "-P", "-m", "fulcrum")
_RECORD = ".process.json"
_TAIL_BYTES = 65_536
# Two requests for the same command must not both find that it does not run.
_starting = threading.Lock()
# By process number: the children of this process, which has to wait for them.
_children: dict[int, "subprocess.Popen[bytes]"] = {}


@dataclass(frozen=True)
class Job:
    """A command of a folder, by name."""

    folder: Path
    name: str

    @property
    def record(self) -> Path:
        """Return the file that says what was started."""
        return self.folder / f"{self.name}{_RECORD}"

    @property
    def log(self) -> Path:
        """Return the file with what it said, on both streams."""
        return self.folder / f"{self.name}.log"


def start(
    job: Job, words: Sequence[str], place: Path, more: Mapping[str, str] | None = None
) -> None:
    """Run `fulcrum WORDS` in the folder `place`, detached from this process and its terminal.

    `more` is added to its environment. Raise StoreError if the job runs already or the disk
    refuses, ConfigError for words that no process can be given.
    """
    with _starting:
        if is_running(job):
            raise StoreError(f"{job.name}: runs already; wait for it or stop it")
        _start(job, words, place, more or {})


def _start(job: Job, words: Sequence[str], place: Path, more: Mapping[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in _COLOURS}
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            process = subprocess.Popen(
                [*COMMAND, *words],
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**inherited, "NO_COLOR": "1", **more},
            )
    except OSError as error:
        raise StoreError(
            f"{job.folder}: cannot start a command: {error.strerror or error}; {store.ELSEWHERE}"
        ) from error
    except ValueError as error:  # a NUL among its words
        raise ConfigError(f"{job.name}: cannot start with {words[-1]!r}: {error}") from error
    _children[process.pid] = process
    record = {
        "pid": process.pid,
        "began": began(process.pid),
        "host": platform.node(),
        "words": list(words),
    }
    store.write_json(job.record, record)


def none_begins() -> AbstractContextManager[Any]:
    """Return a context in which this process starts no command."""
    return _starting


def started_in(folder: Path) -> list[Job]:
    """Return every job of a folder that was ever started, by name."""
    records = sorted(folder.glob(f"*{_RECORD}"))
    return [Job(folder, path.name.removesuffix(_RECORD)) for path in records]


def is_running(job: Job) -> bool:
    """Return whether the job's process, and no other of its number, is at work."""
    record = store.recalled(job.record)
    return lives(record.get("pid"), record.get("began")) and record.get("host") == platform.node()


def was_started(job: Job) -> bool:
    """Return whether a job was ever started."""
    return job.record.exists()


def stop(job: Job) -> None:
    """Ask the job to end as Ctrl-C would (SIGTERM): a training finishes its step and saves.

    Asking again changes nothing: a second signal would mean "at once", and lose the steps since the
    last checkpoint.
    """
    if is_running(job) and not was_asked(job):
        record = store.recalled(job.record)
        store.write_json(job.record, {**record, "asked": True})
        os.kill(int(record["pid"]), signal.SIGTERM)


def was_asked(job: Job) -> bool:
    """Return whether the job was asked to end."""
    return bool(store.recalled(job.record).get("asked"))


def wait(job: Job, seconds: float) -> bool:
    """Wait for a job's end, at most so long; return whether it ended."""
    until = time.monotonic() + seconds
    while is_running(job) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(job)


def lives(pid: Any, since: Any) -> bool:
    """Return whether a process of this number, begun then, is at work.

    A child that ended is not, even before this process has waited for it.
    """
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
    return since is not None and began(pid) == since


def began(pid: int) -> str | None:
    """Return when a living process began, as this system counts; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        return listed.stdout.strip() or None
    # The name in parentheses may hold anything; after it come the state and, twentieth, the time.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def tail(job: Job, lines: int = 200) -> list[str]:
    """Return the last lines of what a job said."""
    try:
        with job.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def last_word(job: Job) -> tuple[str, str]:
    """Return how an ended job says it ended: ("error" or "stopped", why), or ("", "").

    One that was asked to stop before it could listen says nothing, and was stopped nonetheless.
    """
    for line in reversed(tail(job)):
        for kind in ("error", "stopped"):
            if line.startswith(f"{kind}: "):
                return kind, line.removeprefix(f"{kind}: ")
    return ("stopped", "before it had begun to work") if was_asked(job) else ("", "")
