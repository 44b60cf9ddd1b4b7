"""The rule that one folder holds one run, and that one process at a time works on it; and the seal of what a run made."""

import itertools
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.store import EVENTS, MANIFEST, PARTIAL, file_sha256, read_json, write_json

OUTPUTS = "outputs"  # in a finished run's manifest: the hashes of what it made
_MADE = (
    "adapter_model.safetensors",
    "predictions.jsonl",
    "results.json",
    "certificate.json",
    "outcomes.jsonl",
    store.QUANTA,
)
_COPIES = frozenset({"checkpoints", store.TRACKERS})  # folders of a run with copies of what it made
_LOCK, _OWNER = ".lock", ".owner.json"


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise StoreError where `folder` cannot become a run's: a file, another run's or process's, or full of other things."""
    if folder.is_file():
        raise StoreError(f"{folder}: is a file; set output_dir to a folder")
    if (folder / MANIFEST).exists():
        if not resume:
            _refuse_held(
                folder
            )  # who starts the same command twice is told so, and not to go on with it
            raise StoreError(
                f"{folder}: already holds a run; go on with it (--resume) or begin another beside it (--force-new)"
            )
    elif folder.exists() and not all(map(_is_ours, folder.iterdir())):
        raise StoreError(f"{folder}: not empty and not a run folder; choose another output_dir")


def _refuse_held(folder: Path) -> None:
    """Raise StoreError where another process works on a folder."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _taken(folder) from None
    except OSError:  # it may only be read: nobody works there
        return
    lock.release()


def _taken(folder: Path) -> StoreError:
    known = store.recalled(folder / _OWNER)
    return StoreError(
        f"{folder}: process {known.get('pid', '?')} on {known.get('host', '?')} has been at work on it since "
        f"{known.get('since', '?')}; wait for it or stop it, or choose another output_dir (--force-new)"
    )


def _is_ours(path: Path) -> bool:
    """Whether a file is one that a process leaves which is killed before its run has a manifest."""
    return path.name in (_LOCK, _OWNER) or (
        path.name.startswith(".") and path.name.endswith(PARTIAL)
    )


def open_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Path:
    """Make `folder` the place of the run that `identity` (settings, data hashes, versions) describes.

    A new or empty folder is taken. A folder with a manifest goes on only with `resume` and the same identity. Raises
    StoreError as `check_free` does, where the identity differs (naming what), or where there is no space.
    """
    check_free(folder, resume=resume)
    manifest = folder / MANIFEST
    if manifest.exists():
        known = store.read_as(manifest, dict[str, Any])
        known.pop(OUTPUTS, None)
        changed = store.changes(known, store.plain(identity))
        if changed:
            raise StoreError(
                f"{folder}: cannot resume, {', '.join(changed)} changed since it started; undo that, or begin another run "
                "beside it (--force-new)"
            )
        return folder
    store.require_space(folder, 64 * 2**20, "a run folder")
    write_json(manifest, identity)
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder, making it where it is missing: inside, no other process may take it. What killed processes left half
    written is dropped first. Raises StoreError, naming the process that holds it, or where the disk refuses.
    """
    lock, owner = FileLock(folder / _LOCK), folder / _OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise _taken(folder) from None
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot write: {error.strerror or error}; {store.ELSEWHERE}"
        ) from error
    try:
        for left in [*folder.rglob(f".*{PARTIAL}")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(
                missing_ok=True
            )  # it may have been inside of another
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        write_json(owner, {"pid": os.getpid(), "host": platform.node(), "since": since})
        store.mend_log(folder / EVENTS)
        yield
    finally:
        owner.unlink(missing_ok=True)
        only = folder.exists() and [path.name for path in folder.iterdir()] == [_LOCK]
        lock.release()
        if only:  # no run came of it
            shutil.rmtree(folder, ignore_errors=True)


def beside(folder: Path) -> Path:
    """The folder, or where something stands there already, the first of `folder-2`, `folder-3` ... that is free."""
    names = (
        folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        for number in itertools.count(1)
    )
    return next(name for name in names if not name.exists())


def made(folder: Path, name: str) -> list[Path]:
    """The files of a name that a run made, sorted: no copies that checkpoints or trackers keep."""
    return sorted(
        path for path in folder.rglob(name) if _COPIES.isdisjoint(path.relative_to(folder).parts)
    )


def seal(folder: Path) -> None:
    """Write the hashes of what a finished run made into its manifest: weights, predictions, results, certificates."""
    paths = sorted(path for name in _MADE for path in made(folder, name))
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), OUTPUTS: hashes})


def unsealed(folder: Path) -> list[str]:
    """What a finished run made and is no longer as it was, in words. Raises StoreError for an unfinished run."""
    known = store.read_as(folder / MANIFEST, dict[str, Any]).get(OUTPUTS)
    if not isinstance(known, dict):
        raise StoreError(
            f"{folder}: its manifest names no outputs: the run is not finished; go on with it (--resume)"
        )
    found = {
        name: file_sha256(folder / name) if (folder / name).is_file() else "" for name in known
    }
    return [
        f"{name}: {'changed' if sha256 else 'missing'}"
        for name, sha256 in found.items()
        if sha256 != known[name]
    ]
