"""Commands that are run for a page: the same command line, each in a process of its own that nobody's end takes along.

A job is two files of one name in a folder: what was started (`NAME.process.json`) and what it said (`NAME.log`); what it makes
is the command's own affair. Invariant: a job is running only while its process lives *and* began when the job did, since
numbers of processes come again; so a server that is started anew finds its jobs, and signals go to nobody else.
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

# Words of a job are read again: no colours, whatever the user's shell asks of commands in a terminal.
_COLOURS = frozenset({"FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"})
COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "fulcrum",
)  # -P: nothing that lies in the working folder is ever imported
_RECORD = ".process.json"
_TAIL_BYTES = 65_536
_starting = (
    threading.Lock()
)  # two requests for the same command must not both find that it does not run
_children: dict[
    int, "subprocess.Popen[bytes]"
] = {}  # of this process, which has to ask for their end


@dataclass(frozen=True)
class Job:
    """A command of a folder, by name."""

    folder: Path
    name: str

    @property
    def record(self) -> Path:
        """Where it stands what was started."""
        return self.folder / f"{self.name}{_RECORD}"

    @property
    def log(self) -> Path:
        """What it said, on both streams."""
        return self.folder / f"{self.name}.log"


def start(
    job: Job, words: Sequence[str], place: Path, more: Mapping[str, str] | None = None
) -> None:
    """Run `fulcrum WORDS` in the folder `place`, detached from this process and its terminal; `more` joins its environment.

    Raises StoreError where the job runs already, or where the disk refuses, ConfigError for words that no process can be given.
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
                [*COMMAND, *words], cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**inherited, "NO_COLOR": "1", **more},
            )  # fmt: skip
    except OSError as error:
        raise StoreError(
            f"{job.folder}: cannot start a command: {error.strerror or error}; {store.ELSEWHERE}"
        ) from error
    except ValueError as error:  # a NUL among its words
        raise ConfigError(f"{job.name}: cannot start with {words[-1]!r}: {error}") from error
    _children[process.pid] = process
    known = {
        "pid": process.pid,
        "began": began(process.pid),
        "host": platform.node(),
        "words": list(words),
    }
    store.write_json(job.record, known)


def none_begins() -> AbstractContextManager[Any]:
    """Inside, this process starts no command."""
    return _starting


def started_in(folder: Path) -> list[Job]:
    """Every job of a folder that was ever started, by name."""
    return [
        Job(folder, path.name.removesuffix(_RECORD)) for path in sorted(folder.glob(f"*{_RECORD}"))
    ]


def is_running(job: Job) -> bool:
    """Whether the job's process, and no other of its number, is at work."""
    known = store.recalled(job.record)
    return lives(known.get("pid"), known.get("began")) and known.get("host") == platform.node()


def was_started(job: Job) -> bool:
    """Whether it ever was."""
    return job.record.exists()


def stop(job: Job) -> None:
    """Ask the job to end as Ctrl-C would (SIGTERM): a training finishes its step and saves. One that has ended stays so.

    Asking again changes nothing: a second signal would mean "at once", and lose the steps since the last checkpoint.
    """
    if is_running(job) and not was_asked(job):
        known = store.recalled(job.record)
        store.write_json(job.record, {**known, "asked": True})
        os.kill(int(known["pid"]), signal.SIGTERM)


def was_asked(job: Job) -> bool:
    """Whether the job was asked to end."""
    return bool(store.recalled(job.record).get("asked"))


def wait(job: Job, seconds: float) -> bool:
    """Wait for a job's end, at most so long; returns whether it ended."""
    until = time.monotonic() + seconds
    while is_running(job) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(job)


def lives(pid: Any, since: Any) -> bool:
    """Whether a process of this number, begun then, is at work; one that ended and was not asked for its end is not."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    if (child := _children.get(pid)) is not None and child.poll() is not None:
        del _children[pid]
    return since is not None and began(pid) == since


def began(pid: int) -> str | None:
    """When a living process began, as this system counts; None where there is none."""
    try:
        # The name in parentheses may hold anything; after it stand the state and, as the twentieth, the time.
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    asked = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def tail(job: Job, lines: int = 200) -> list[str]:
    """The last lines of what it said; none where it said nothing."""
    try:
        with job.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def last_word(job: Job) -> tuple[str, str]:
    """How a job that has ended took its leave: ("error" or "stopped", the line after that word), or ("", "").

    One that was asked to stop before it could listen says nothing, and was stopped nonetheless.
    """
    for line in reversed(tail(job)):
        for kind in ("error", "stopped"):
            if line.startswith(f"{kind}: "):
                return kind, line.removeprefix(f"{kind}: ")
    return ("stopped", "before it had begun to work") if was_asked(job) else ("", "")
