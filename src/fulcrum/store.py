"""The run folder: fingerprints, atomic writes, and the rule that one folder holds one run.

A file is written beside its final place, flushed to disk and renamed, so that a half-written file is never read as whole. A
fingerprint is the SHA-256 of canonical JSON; a value without a canonical form is refused rather than guessed.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NoReturn

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from fulcrum.errors import StoreError

MANIFEST = "manifest.json"
PILOT = "pilot.json"
ANCHORS = "anchors.json"
MADE = "general"  # folder of a run with the rows that a model made or answered, and what they were chosen by
_PATIENCE = 1.0  # seconds between two looks at a lock
_ELSEWHERE = "free some space or set output_dir (or FULCRUM_CACHE, for models and pools) to another disk"


def plain(value: Any) -> Any:
    """Turn records (dataclasses), tuples and paths into what JSON holds. NaN and infinities become None, raises TypeError
    for anything that has no plain form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no plain form for {type(value).__name__}: {value!r:.80}")


def strict_json(text: str) -> Any:
    """Parse JSON: no NaN or Infinity, no key twice, no nesting that exhausts the stack; else `ValueError`."""
    try:
        return json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object holds the same key twice")
    return fields


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (hex) of the value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seed_for(root: int, purpose: str) -> int:
    """A seed for one purpose (data, mix, init ...), split from the run's root seed by name."""
    return int.from_bytes(hashlib.sha256(f"{root}:{purpose}".encode()).digest()[:4], "big")


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 (hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache
def code() -> str:
    """A hash over this package's source: a development version changes without a new number."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return fingerprint([(file.name, file_sha256(file)) for file in files])


def cache_dir() -> Path:
    """Return the folder for fetched models and converted pools: $FULCRUM_CACHE, else `fulcrum` under the user's (XDG) cache."""
    chosen = os.environ.get("FULCRUM_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path(user_cache_dir("fulcrum", appauthor=False))


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise StoreError where the disk under `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StoreError(
            f"{folder}: {purpose} needs {needed_bytes / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free; {_ELSEWHERE}"
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: all of `data` or the file as it was. Raises StoreError where the disk or folder refuses."""
    _write(path, lambda stream: stream.write(data))


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                fill(stream)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
        except BaseException:  # Ctrl-C too: no half-written file stays beside the whole one
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}; {_ELSEWHERE}") from error


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a record or plain value as JSON, atomically."""
    write_bytes(path, (json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_array(path: Path, values: Any) -> None:
    """Write a NumPy array, atomically."""
    import numpy as np

    _write(path, lambda stream: np.save(stream, values))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write NumPy arrays by name (.npz), atomically."""
    import numpy as np

    _write(path, lambda stream: np.savez(stream, **arrays))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write records as JSON lines, atomically."""
    write_bytes(path, "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode())


def append_jsonl(path: Path, row: Any) -> None:
    """Add one line to a log. Raises StoreError where the disk refuses."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}; {_ELSEWHERE}") from error


def read_json(path: Path) -> Any:
    """Read JSON. Raises StoreError where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; is {path.parent} a finished run folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); the file was changed or damaged") from None


def recalled(path: Path) -> dict[str, Any]:
    """Read an object of the cache that can be made anew: empty where it is missing or damaged."""
    try:
        found = read_json(path)
    except (StoreError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def locked(folder: Path, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold a folder's lock, making the folder where it is missing. While another process holds it `waiting(0)` is called every
    second, and `waiting(1)` when it does no more. Raises OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(folder / ".lock"), False
    while True:
        try:
            lock.acquire(timeout=_PATIENCE)
            break
        except Timeout:
            waited = True
            waiting(0)
    try:
        if waited:
            waiting(1)
        yield
    finally:
        lock.release()


def changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Dotted names of what differs, with both values where they are single ones."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [found for key in keys for found in changes(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))]
    if before == after:
        return []
    single = not isinstance(before, dict | list) and not isinstance(after, dict | list)
    return [f"{name} ({before!r:.40} -> {after!r:.40})" if single else name or MANIFEST]


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise StoreError where `folder` cannot become a run's: a file, another run's, or full of other things."""
    if folder.is_file():
        raise StoreError(f"{folder}: is a file; set output_dir to a folder")
    if (folder / MANIFEST).exists():
        if not resume:
            raise StoreError(f"{folder}: already holds a run; go on with it (--resume) or choose another output_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder}: not empty and not a run folder; choose another output_dir")


def open_run(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Path:
    """Make `folder` the place of the run that `identity` (settings, data hashes, versions) describes.

    A new or empty folder is taken. A folder with a manifest goes on only with `resume` and the same identity. Raises
    StoreError as `check_free` does, where the identity differs (naming what), or where there is no space.
    """
    check_free(folder, resume=resume)
    manifest = folder / MANIFEST
    if manifest.exists():
        changed = changes(read_json(manifest), plain(identity))
        if changed:
            raise StoreError(
                f"{folder}: cannot resume, {', '.join(changed)} changed since it started; choose another output_dir"
            )
        return folder
    require_space(folder, 64 * 2**20, "a run folder")
    write_json(manifest, identity)
    return folder
