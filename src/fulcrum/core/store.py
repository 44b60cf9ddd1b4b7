"""Fingerprints, atomic writes of files and folders, tolerant and strict reading, locks.

A file is written next to its final place, flushed to disk and renamed, so that nobody ever reads a
half-written one. A fingerprint is the SHA-256 of canonical JSON; a value without a canonical form
is refused rather than guessed.
"""

import contextlib
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

from fulcrum.core.errors import StoreError
from fulcrum.core.user_paths import expanded

# Files and folders of a run.
MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
PILOT = "pilot.json"
ANCHORS = "anchors.json"
SCALING = "scaling.json"
QUANTA = "quanta.json"
PLAN = "budget.json"  # what a preset or budget planned, for `--resume`
TRACKERS = "trackers"  # what trackers keep of the run
MADE = "general"  # rows that a model wrote or answered, and what they were chosen by

SUMS = "SHA256SUMS"  # the hashes of a folder's files
PARTIAL = ".partial"  # how the names of half-written files end
ELSEWHERE = (
    "free some space or set output_dir (or FULCRUM_CACHE, for models and pools) to another disk"
)
# Files of these kinds are read only if their hash is in SUMS.
_SEALED_SUFFIXES = (".safetensors", ".pt", ".json", ".jinja")
_LONGEST_POINTER = 1024  # bytes, by Git LFS's own rule
_LOCK_WAIT = 1.0  # seconds between two tries to take a lock


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and paths as what JSON holds; NaN and infinities become None.

    Raises TypeError for anything that has no plain form.
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


def fingerprint(value: Any) -> str:
    """Return the SHA-256 (hex) of the value's canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 (hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache
def code() -> str:
    """Return a hash of this package's source.

    A development version changes without a new version number, and a run must not be resumed with
    other code.
    """
    return source_hash(Path(__file__).parent.parent)


def source_hash(package: Path) -> str:
    """Return a hash of all Python files below a folder, by relative path and content."""
    files = [
        (file.relative_to(package).as_posix(), file_sha256(file))
        for file in sorted(package.rglob("*.py"))
    ]
    return fingerprint(files)


def seed_for(root: int, purpose: str) -> int:
    """Return the seed of one purpose (data, mix, init ...), derived from the run's root seed."""
    return int.from_bytes(hashlib.sha256(f"{root}:{purpose}".encode()).digest()[:4], "big")


def changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Return the dotted names of what differs, each with both values if these are single ones."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = []
        for key in sorted({*before, *after}):
            names += changes(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
        return names
    if before == after:
        return []
    if isinstance(before, dict | list) or isinstance(after, dict | list):
        return [name or MANIFEST]
    return [f"{name} ({before!r:.40} -> {after!r:.40})"]


# Writing.


def write_bytes(path: Path, data: bytes) -> None:
    """Write all of `data` or leave the file as it was.

    Raises StoreError if it cannot be written.
    """
    _write(path, lambda stream: stream.write(data))


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a record or plain value as JSON, atomically."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write records as JSON lines, atomically."""
    lines = [_json_line(row) for row in rows]
    write_bytes(path, "".join(lines).encode())


def append_jsonl(path: Path, row: Any) -> None:
    """Add one line to a log. Raises StoreError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(_json_line(row))
    except OSError as error:
        raise _cannot_write(path, error) from error


def mend_log(path: Path) -> None:
    """Drop the last line of a log if a killed process or a full disk cut it short."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def write_array(path: Path, values: Any) -> None:
    """Write a NumPy array (.npy), atomically."""
    import numpy as np

    _write(path, lambda stream: np.save(stream, values))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write NumPy arrays by name (.npz), atomically."""
    import numpy as np

    _write(path, lambda stream: np.savez(stream, **arrays))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder atomically; it replaces one that is there.

    `fill` writes the files into a folder next to it. This gets their hashes (SHA256SUMS, as
    `sha256sum -c` reads them) and is renamed. Raises StoreError if the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = [f"{file_sha256(file)}  {file.relative_to(partial).as_posix()}\n" for file in files]
        (partial / SUMS).write_text("".join(sums), encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        drop_folder(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def drop_folder(folder: Path) -> bool:
    """Remove a folder if it is there, and return whether nothing of it is left.

    It is renamed first, so that a half-removed folder never has its name. What cannot be removed
    stays.
    """
    partial = folder.with_name(f".{folder.name}.dropped{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)
    return not (folder.exists() or partial.exists())


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise StoreError if the disk under `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise StoreError(
            f"{folder}: {purpose} needs {needed_bytes / 2**20:.0f} MiB, the disk has "
            f"{free_bytes / 2**20:.0f} MiB free; {ELSEWHERE}"
        )


def _json_line(row: Any) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL
        )
        try:
            with os.fdopen(descriptor, "wb") as stream:
                fill(stream)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
            _flush(path.parent)
        except BaseException:  # Ctrl-C too: no half-written file stays next to the whole one
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _flush(path: Path) -> None:
    """Make the disk write a file, or a folder's names, before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: cannot write: {error.strerror or error}; {ELSEWHERE}")


# Reading.


def read_json(path: Path) -> Any:
    """Read JSON. Raises StoreError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; is {path.parent} a finished run folder?") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable as JSON ({error}); the file was changed or damaged"
        ) from None


def read_as(path: Path, kind: Any) -> Any:
    """Read JSON as a type, such as a record or a list of records.

    Raises StoreError if the file is missing, broken or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise StoreError(
            f"{path}: holds something else than a run keeps there ({place}: {first['msg']}); "
            "the file was changed or damaged"
        ) from None


def recalled(path: Path) -> dict[str, Any]:
    """Read a JSON object that can be made anew: empty if it is missing or damaged."""
    try:
        content = read_json(path)
    except (StoreError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def strict_json(text: str) -> Any:
    """Parse JSON without NaN, Infinity, repeated keys or nesting that exhausts the stack.

    Raises ValueError for anything else.
    """
    try:
        return json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def damaged(folder: Path) -> list[str]:
    """Return the names of files that are missing or changed in a folder by `write_folder`.

    Files of other kinds may have been added since. A list of hashes that lacks a file it should
    vouch for was cut short, and counts as damaged itself.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [SUMS]
    expected = {}
    for line in lines:
        sha256, _, name = line.partition("  ")
        expected[name] = sha256
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in _SEALED_SUFFIXES
    }
    if not expected or present - expected.keys():
        return [SUMS]
    return [
        name
        for name, sha256 in expected.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256
    ]


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is what Git keeps in place of a large one."""
    if not file.is_file() or file.stat().st_size > _LONGEST_POINTER:
        return False
    return file.read_bytes().startswith(b"version https://git-lfs.github.com/spec/")


def cache_dir() -> Path:
    """Return the folder for downloaded models and converted pools.

    It is $FULCRUM_CACHE, else `fulcrum` in the user's (XDG) cache.
    """
    chosen = os.environ.get("FULCRUM_CACHE")
    if chosen:
        return Path(expanded(chosen)).absolute()
    return Path(user_cache_dir("fulcrum", appauthor=False))


@contextmanager
def locked(folder: Path, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold a folder's lock, making the folder if it is missing.

    While another process holds it, `waiting(0)` is called every second, and `waiting(1)` once it
    is free. Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    has_waited = False
    while True:
        try:
            lock.acquire(timeout=_LOCK_WAIT)
            break
        except Timeout:
            has_waited = True
            waiting(0)
    try:
        if has_waited:
            waiting(1)
        yield
    finally:
        lock.release()


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object holds the same key twice")
    return fields
