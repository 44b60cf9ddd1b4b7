"""One folder holds one run, one process at a time works on it, and what a run made is sealed."""

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
_SEALED = (
    "adapter_model.safetensors",
    "predictions.jsonl",
    "results.json",
    "certificate.json",
    "outcomes.jsonl",
    store.QUANTA,
)
_COPIES = frozenset({"checkpoints", store.TRACKERS})  # folders with copies of what a run made
_LOCK = ".lock"
_OWNER = ".owner.json"


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise StoreError if `folder` cannot become a run's.

    That is if it is a file, holds another run or other things, or another process works on it.
    """
    if folder.is_file():
        raise StoreError(f"{folder}: is a file; set output_dir to a folder")
    if (folder / MANIFEST).exists():
        if not resume:
            # Before the advice to resume: the same command may still be running.
            _refuse_held(folder)
            raise StoreError(
                f"{folder}: already holds a run; resume it (--resume) or begin another next to it "
                "(--force-new)"
            )
    elif folder.exists() and not all(map(_is_ours, folder.iterdir())):
        raise StoreError(f"{folder}: not empty and not a run folder; choose another output_dir")


def open_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Path:
    """Make `folder` the place of the run that `identity` (settings, data hashes, versions) names.

    A new or empty folder is taken. A folder with a manifest is resumed only with `resume` and the
    same identity. Raises StoreError as `check_free` does, if the identity differs (naming what), or
    if there is no space.
    """
    check_free(folder, resume=resume)
    manifest = folder / MANIFEST
    if manifest.exists():
        before = store.read_as(manifest, dict[str, Any])
        before.pop(OUTPUTS, None)
        changed = store.changes(before, store.plain(identity))
        if changed:
            raise StoreError(
                f"{folder}: cannot resume, {', '.join(changed)} changed since it started; "
                "undo that, or begin another run next to it (--force-new)"
            )
        return folder
    store.require_space(folder, 64 * 2**20, "a run folder")
    write_json(manifest, identity)
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder, making it if it is missing: inside, no other process may take it.

    What killed processes left half written is dropped first. Raises StoreError if another process
    holds it, naming that, or if it cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    owner = folder / _OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise _held_by_another(folder) from None
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot write: {error.strerror or error}; {store.ELSEWHERE}"
        ) from error
    try:
        for path in list(folder.rglob(f".*{PARTIAL}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)  # it may have been inside another
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        write_json(owner, {"pid": os.getpid(), "host": platform.node(), "since": since})
        store.mend_log(folder / EVENTS)
        yield
    finally:
        owner.unlink(missing_ok=True)
        is_unused = folder.exists() and [path.name for path in folder.iterdir()] == [_LOCK]
        lock.release()
        if is_unused:
            shutil.rmtree(folder, ignore_errors=True)


def beside(folder: Path) -> Path:
    """Return the folder, or if it exists the first free one of `folder-2`, `folder-3` ..."""
    free = folder
    number = 1
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def made(folder: Path, name: str) -> list[Path]:
    """Return the files of this name that a run made, sorted, without the copies that others keep.

    Copies are in the folders of checkpoints and trackers.
    """
    return sorted(
        path for path in folder.rglob(name) if _COPIES.isdisjoint(path.relative_to(folder).parts)
    )


def seal(folder: Path) -> None:
    """Write the hashes of weights, predictions, results and certificates into the manifest."""
    paths: list[Path] = []
    for name in _SEALED:
        paths += made(folder, name)
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(paths)}
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), OUTPUTS: hashes})


def unsealed(folder: Path) -> list[str]:
    """Return, in words, what a finished run made and has changed since.

    Raises StoreError for an unfinished run.
    """
    sealed = store.read_as(folder / MANIFEST, dict[str, Any]).get(OUTPUTS)
    if not isinstance(sealed, dict):
        raise StoreError(
            f"{folder}: its manifest names no outputs: the run is not finished; "
            "resume it (--resume)"
        )
    words = []
    for name, sha256 in sealed.items():
        if not (folder / name).is_file():
            words.append(f"{name}: missing")
        elif file_sha256(folder / name) != sha256:
            words.append(f"{name}: changed")
    return words


def _refuse_held(folder: Path) -> None:
    """Raise StoreError if another process works on a folder."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _held_by_another(folder) from None
    except OSError:  # read-only: nobody works there
        return
    lock.release()


def _held_by_another(folder: Path) -> StoreError:
    owner = store.recalled(folder / _OWNER)
    return StoreError(
        f"{folder}: process {owner.get('pid', '?')} on {owner.get('host', '?')} has been working "
        f"on it since {owner.get('since', '?')}; wait for it or stop it, or choose another "
        "output_dir (--force-new)"
    )


def _is_ours(path: Path) -> bool:
    """Return whether a process that was killed before its run had a manifest left this file."""
    if path.name in (_LOCK, _OWNER):
        return True
    return path.name.startswith(".") and path.name.endswith(PARTIAL)
