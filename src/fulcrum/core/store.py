"""What is kept: fingerprints, atomic writes of files and folders, locks.

A file is written beside its final place, flushed to disk and renamed, so that a half-written file is never read as whole. A
fingerprint is the SHA-256 of canonical JSON; a value without a canonical form is refused rather than guessed.
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

MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
PILOT = "pilot.json"
ANCHORS = "anchors.json"
SCALING = "scaling.json"
QUANTA = "quanta.json"
PLAN = "budget.json"  # what a preset or budget planned, for `--resume`
SUMS = "SHA256SUMS"
PARTIAL = ".partial"  # how the names of half-written files end
TRACKERS = "trackers"  # folder of a run with what trackers keep of it
MADE = "general"  # folder of a run with the rows that a model made or answered, and what they were chosen by
_SEALED = (
    ".safetensors",
    ".pt",
    ".json",
    ".jinja",
)  # kinds of files that are not read unless their hash is known
_PATIENCE = 1.0  # seconds between two looks at a lock
ELSEWHERE = (
    "free some space or set output_dir (or FULCRUM_CACHE, for models and pools) to another disk"
)


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
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
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
    package = Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    return fingerprint(
        [(file.relative_to(package).as_posix(), file_sha256(file)) for file in files]
    )


def cache_dir() -> Path:
    """Return the folder for fetched models and converted pools: $FULCRUM_CACHE, else `fulcrum` under the user's (XDG) cache."""
    chosen = os.environ.get("FULCRUM_CACHE")
    return (
        Path(chosen).expanduser().absolute()
        if chosen
        else Path(user_cache_dir("fulcrum", appauthor=False))
    )


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise StoreError where the disk under `folder` has less than `needed_bytes` free."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StoreError(
            f"{folder}: {purpose} needs {needed_bytes / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free; {ELSEWHERE}"
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: all of `data` or the file as it was. Raises StoreError where the disk or folder refuses."""
    _write(path, lambda stream: stream.write(data))


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
        except BaseException:  # Ctrl-C too: no half-written file stays beside the whole one
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}; {ELSEWHERE}") from error


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder atomically, in place of one that is there: `fill` writes files into one beside it, which gets their hashes
    (SHA256SUMS, as `sha256sum -c` reads them) and is renamed. Raises StoreError where the disk or folder refuses.
    """
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = "".join(
            f"{file_sha256(file)}  {file.relative_to(partial).as_posix()}\n" for file in files
        )
        (partial / SUMS).write_text(sums, encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        drop_folder(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot write: {error.strerror or error}; {ELSEWHERE}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def drop_folder(folder: Path) -> bool:
    """Remove a folder, if it is there: renamed first, so that none that is half removed ever has its name. What cannot be
    removed stays; returns whether nothing does."""
    partial = folder.with_name(f".{folder.name}.dropped{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)
    return not (folder.exists() or partial.exists())


def damaged(folder: Path) -> list[str]:
    """The names of what is missing or changed in a folder that `write_folder` wrote. A list of hashes that was cut short, which
    would vouch for what it no longer names, is damaged; other kinds of files may have been put there since.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [SUMS]
    pairs = [line.partition("  ") for line in lines]
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _SEALED
    }
    if not pairs or there - {name for _, _, name in pairs}:
        return [SUMS]
    return [
        name
        for sha256, _, name in pairs
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256
    ]


def _flush(path: Path) -> None:
    """Have the disk write a file, or a folder's names, before anything hangs on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a record or plain value as JSON, atomically."""
    write_bytes(
        path,
        (
            json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
        ).encode(),
    )


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
    write_bytes(
        path,
        "".join(
            json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        ).encode(),
    )


def append_jsonl(path: Path, row: Any) -> None:
    """Add one line to a log. Raises StoreError where the disk refuses."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}; {ELSEWHERE}") from error


def read_json(path: Path) -> Any:
    """Read JSON. Raises StoreError where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; is {path.parent} a finished run folder?") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable as JSON ({error}); the file was changed or damaged"
        ) from None


def read_as(path: Path, kind: Any) -> Any:
    """Read JSON as a record, or records, of a kind. Raises StoreError where the file is missing, broken or of another kind."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        at = error.errors()[0]
        where = ".".join(map(str, at["loc"])) or "the whole"
        raise StoreError(
            f"{path}: holds something else than a run keeps there ({where}: {at['msg']}); the file was changed or damaged"
        ) from None


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
        return [
            found
            for key in keys
            for found in changes(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
        ]
    if before == after:
        return []
    single = not isinstance(before, dict | list) and not isinstance(after, dict | list)
    return [f"{name} ({before!r:.40} -> {after!r:.40})" if single else name or MANIFEST]


def mend_log(path: Path) -> None:
    """Drop the last line of a log where a killed process, or a full disk, left it without its end."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
