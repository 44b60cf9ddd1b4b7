"""Convert general data to Arrow shards in the cache: streamed, by several processes, resumable.

Every origin (a file or hub data set) has a folder, named by a hash of its content and of the
settings that decide which of its rows are used: changing a weight or adding a source converts
nothing again. Each part of an origin becomes one shard: an Arrow file of usable rows, and a JSON
file that counts the others by reason. Both are renamed into place when they are whole, the JSON
file last, so that a killed conversion resumes with the parts that have none. A shard that is
missing or cut short is converted again.

Invariant: rows of an origin = rows of its shards + rows that are counted with a reason.
"""

import json
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from errno import EACCES, EDQUOT, ENOSPC, ENOTDIR, EPERM, EROFS
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fulcrum.config.base import GeneralSource
from fulcrum.core import processes, store
from fulcrum.core.errors import DataError, StoreError
from fulcrum.core.progress import LabelledCount
from fulcrum.core.types import Example, IntArray, Message, Reject
from fulcrum.data import filters, sources
from fulcrum.data.formats import Layout, Unread, content_key, convert, unread_column
from fulcrum.data.readers import Row, require_some, suffix
from fulcrum.data.sources import Origin, Part

VERSION = 6  # raise it if the same file would give other shards
SHOWN = 5  # rows left out that are kept as examples, of each reason

_BATCH_ROWS = 10_000  # of a shard's batches
_BATCH_CHARACTERS = 2**26

# What helps if the cache refuses, before "set FULCRUM_CACHE to another folder".
_REMEDIES = {
    EROFS: "",
    EPERM: "",
    ENOTDIR: "",
    EACCES: "mend its permissions, or ",
    ENOSPC: "free some space, or ",
    EDQUOT: "free some space, or ",
}

_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("group", pa.string()),
        ("messages", pa.string()),  # JSON: [[role, content, train], ...]
        ("key", pa.binary(16)),  # hash of the content
        ("words", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """What became of one part of an origin."""

    path: str  # of the Arrow file
    size: int  # of the file, in bytes
    kept: int  # rows in the file
    left_out: Mapping[str, int]  # rows that are not, by reason
    shown: Sequence[Reject]  # some of these
    unread: Mapping[str, int]  # rows that hold what is not read, by its name

    @property
    def read(self) -> int:
        """Return rows of the part."""
        return self.kept + sum(self.left_out.values())


NamedShard = tuple[str, Shard]  # (name of its origin, shard)


def silent(label: str, done: int, total: int) -> None:
    """Report no progress."""


def folder(origin: Origin) -> Path:
    """Return the folder for the shards of this content, as the source's settings use it."""
    settings = {"columns", "include", "exclude", "languages", "min_words", "max_words"}
    used = origin.source.model_dump(mode="json", include=settings)
    kind = suffix(Path(origin.path)) if origin.path else None
    identity = store.fingerprint([VERSION, origin.content, kind, used])
    return store.cache_dir() / "pools" / "files" / identity[:32]


def build(origin: Origin, *, jobs: int = 1, progress: LabelledCount = silent) -> list[Shard]:
    """Return the shards of an origin; convert in `jobs` processes what is not converted yet.

    Raises DataError if the origin is empty, broken, changes meanwhile, or has columns that fit no
    format; StoreError if the disk refuses or a process dies.
    """
    directory = folder(origin)
    label = f"converting {origin.name}"

    def report_waiting(done: int) -> None:
        progress(f"waiting for another process that is {label}", done, 1)

    shards = _load_all(directory, origin)
    if shards is not None:  # the lock comes second: a cache may be read-only
        return shards
    try:
        with store.locked(directory, report_waiting):
            shards = _load_all(directory, origin)
            if shards is None:
                shards = _convert_all(origin, directory, jobs, label, progress)
    except OSError as error:
        raise unwritable(directory, error) from error
    except BrokenProcessPool as error:
        raise StoreError(
            f"{origin.name}: a process that converts it died (killed, or out of memory); what is "
            "converted is kept: run again, with --jobs 1 where memory is short"
        ) from error
    return shards


class Rows:
    """The rows of shards laid end to end, memory-mapped: `rows[i]` reads one."""

    def __init__(self, named: Sequence[NamedShard]) -> None:
        self._named = named
        self._ends = list(accumulate(shard.kept for _, shard in named))
        self._open: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Example:
        place, table_row = self._find(row)
        values = table_row.to_pylist()[0]
        messages = tuple(Message(*message) for message in json.loads(values["messages"]))
        name = self._named[place][0]
        return Example(messages, values["group"], f"{name}:{values['line']}")

    def line(self, row: int) -> tuple[int, int]:
        """Return the number of a row's shard, and its line in the origin."""
        place, table_row = self._find(row)
        return place, table_row["line"][0].as_py()

    def words(self) -> IntArray:
        """Return the number of words of every row: (len,)."""
        counts = [np.empty(0, dtype=np.int64)]
        for _, shard in self._named:
            counts.append(table(shard)["words"].to_numpy().astype(np.int64))
        return np.concatenate(counts)

    def _find(self, row: int) -> tuple[int, pa.Table]:
        """Return the number of a row's shard, and a table of this row alone."""
        place = bisect_right(self._ends, row)
        shard = self._named[place][1]
        if place not in self._open:
            self._open[place] = table(shard).select(["line", "group", "messages"])
        start = self._ends[place] - shard.kept
        return place, self._open[place].slice(row - start, 1)


def table(shard: Shard) -> pa.Table:
    """Return the rows of a shard, memory-mapped. Raises StoreError if it is damaged."""
    return pa.Table.from_batches(batches(shard), _SCHEMA)


def batches(shard: Shard) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a shard in batches, memory-mapped. Raises StoreError if it is damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(shard.path))
        yield from map(reader.get_batch, range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        path = Path(shard.path)
        for description in (path.with_suffix(".json"), path.with_name("whole.json")):
            with suppress(OSError):  # a cache may be read-only
                description.unlink()
        raise StoreError(
            f"{path}: damaged ({error}); run again, it is converted anew then"
        ) from error


def unwritable(folder: Path, error: OSError) -> StoreError:
    """Return the error to raise if the pools' cache refuses."""
    message = f"{folder}: the pool's cache cannot be used: {error.strerror or error}"
    if error.errno in _REMEDIES:
        message += f"; {_REMEDIES[error.errno]}set FULCRUM_CACHE to another folder"
    return StoreError(message)


def _load_all(directory: Path, origin: Origin) -> list[Shard] | None:
    """Load all shards of a finished conversion; None if it is not finished or damaged."""
    known = store.recalled(directory / "whole.json")
    if not known:
        return None
    shards = [_load_shard(directory, described) for described in known.get("shards", ())]
    if not all(map(_is_sound, shards)):
        return None
    return [_with_name(shard, origin) for shard in shards]


def _load_shard(directory: Path, described: Mapping[str, Any]) -> Shard:
    shown = [Reject(**reject) for reject in described["shown"]]
    path = str(directory / described["path"])
    return Shard(
        path,
        described["size"],
        described["kept"],
        described["left_out"],
        shown,
        described["unread"],
    )


def _describe(shard: Shard) -> dict[str, Any]:
    """Return what `_load_shard` reads: the shard as JSON, by its file's name alone."""
    described: dict[str, Any] = store.plain(shard)
    return described | {"path": Path(shard.path).name}


def _is_sound(shard: Shard) -> bool:
    path = Path(shard.path)
    return path.exists() and path.stat().st_size == shard.size


def _with_name(shard: Shard, origin: Origin) -> Shard:
    """Return the shard with the name that the file has now in the rows it shows."""
    shown = [replace(reject, origin=f"{origin.name}:{reject.origin}") for reject in shard.shown]
    return replace(shard, shown=shown)


def _convert_all(
    origin: Origin, directory: Path, jobs: int, label: str, progress: LabelledCount
) -> list[Shard]:
    """Convert an origin, and write down that it is whole. The folder must be locked."""
    for left in directory.glob(".*.partial"):
        left.unlink(missing_ok=True)
    started = time.time()
    if origin.kind == "sequence":
        shards = _convert_sequence(origin, directory, label, progress)
    else:
        shards = _convert_parts(origin, directory, jobs, label, progress)
    whole = {
        "name": origin.name,
        "commit": origin.commit,
        "seconds": time.time() - started,
        "shards": [_describe(shard) for shard in shards],
    }
    store.write_json(directory / "whole.json", whole)
    return [_with_name(shard, origin) for shard in shards]


def _convert_parts(
    origin: Origin, directory: Path, jobs: int, label: str, progress: LabelledCount
) -> list[Shard]:
    parts = list(sources.parts(origin))
    require_some(origin.name, len(parts))
    shapes_of = partial(sources.shapes, origin)

    def collect(shards: Iterable[Shard]) -> list[Shard]:
        progress(label, 0, len(parts))
        converted = []
        for shard in shards:
            converted.append(shard)
            progress(label, len(converted), len(parts))
        return converted

    if jobs == 1 or len(parts) == 1 or origin.kind == "hub":
        layout = sources.layout(origin, map(shapes_of, parts))
        return collect(map(partial(_convert_part, origin, directory, layout), parts))
    with processes.start(min(jobs, len(parts))) as workers:
        try:
            layout = sources.layout(origin, workers.map(shapes_of, parts))
            convert_part = partial(_convert_part, origin, directory, layout)
            return collect(workers.map(convert_part, parts))
        except BaseException:  # Ctrl-C too: do not wait for parts that have not begun
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _convert_part(origin: Origin, directory: Path, layout: Layout, part: Part) -> Shard:
    shard = _load_part(directory, part)
    if shard is None:
        rows = sources.rows(origin, layout, part)
        shard = _write(origin, directory, layout, part, rows)
    return shard


def _convert_sequence(
    origin: Origin, directory: Path, label: str, progress: LabelledCount
) -> list[Shard]:
    """Convert an origin that cannot be cut: read it once for its columns, then again.

    Of a stream only the first rows are read for the columns, and its source's limit says how many
    usable rows are taken. Rows of parts that were converted before are read and skipped.
    """
    shapes, size = sources.shapes_in_order(origin)
    layout = sources.layout(origin, [shapes])
    limit = origin.source.limit if size is None else None  # usable rows
    raw = sources.sequence(origin)
    shards: list[Shard] = []
    read = 0
    kept = 0
    while limit is None or kept < limit:
        head = next(raw, None)
        if head is None:
            break
        if limit is None:
            progress(label, read, size or 0)
        else:
            progress(label, kept, limit)
        rows = chain([head], islice(raw, sources.PART_ROWS - 1))
        part = Part(len(shards), read, read + sources.PART_ROWS, read + 1)
        shard = _load_part(directory, part)
        if shard is None:
            wanted = None if limit is None else limit - kept
            shard = _write(origin, directory, layout, part, rows, wanted)
        else:
            _skip(rows, shard, origin, directory)
        shards.append(shard)
        read += shard.read
        kept += shard.kept
    done = read if limit is None else kept
    progress(label, done, done)
    return shards


def _skip(rows: Iterator[Row], shard: Shard, origin: Origin, directory: Path) -> None:
    """Skip the rows that a shard holds. If there are fewer, drop all shards and raise DataError."""
    skipped = sum(1 for _ in islice(rows, shard.read))
    if skipped < shard.read:
        for stale in (*directory.glob("*.json"), *directory.glob("*.arrow")):
            stale.unlink()
        raise DataError(
            f"{origin.name}: gives fewer rows than when its conversion began; "
            "run again, it begins anew then"
        )


def _load_part(directory: Path, part: Part) -> Shard | None:
    """Load the shard of a part if an earlier conversion finished it."""
    described = store.recalled(directory / f"{part.place:05}.json")
    if not described:
        return None
    shard = _load_shard(directory, described)
    return shard if _is_sound(shard) else None


def _write(
    origin: Origin,
    directory: Path,
    layout: Layout,
    part: Part,
    rows: Iterable[Row],
    limit: int | None = None,
) -> Shard:
    """Convert rows into a shard, up to `limit` usable ones."""
    file = directory / f"{part.place:05}.arrow"
    # Named by process: workers of a killed conversion may still write theirs.
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    left_out = _LeftOut()
    unread: Unread = Counter()
    kept = 0
    try:
        with partial_file.open("wb") as stream:
            with pa.ipc.new_file(stream, _SCHEMA) as writer:
                usable = islice(_usable(origin, layout, rows, left_out, unread), limit)
                for batch in _in_batches(usable):
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
                    kept += len(batch)
            stream.flush()
            os.fsync(stream.fileno())
        size = partial_file.stat().st_size
        sources.check_unchanged(origin)
        partial_file.replace(file)
    except BaseException:  # Ctrl-C too: no half-written shard stays
        partial_file.unlink(missing_ok=True)
        raise
    shown = list(chain.from_iterable(left_out.shown.values()))
    read = kept + sum(left_out.counts.values())
    not_read = _all_unread(origin, layout, part, unread, read)
    shard = Shard(str(file), size, kept, dict(left_out.counts), shown, dict(not_read))
    store.write_json(file.with_suffix(".json"), _describe(shard))
    return shard


def _all_unread(origin: Origin, layout: Layout, part: Part, unread: Unread, rows: int) -> Unread:
    """Add the columns of a table that were not even loaded; drop those that sources choose by."""
    found = Counter(unread)
    if origin.kind in ("parquet", "arrow", "hub"):
        for columns in sources.shapes(origin, part):
            for column in layout.unread(columns):
                found[unread_column(column, layout)] = rows
    for column in (*origin.source.include, *origin.source.exclude):
        found.pop(unread_column(column, layout), None)
    return found


@dataclass
class _LeftOut:
    """Rows of a part that are not used, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[Reject]] = field(default_factory=dict)  # up to `SHOWN` of each reason

    def add(self, reject: Reject) -> None:
        self.counts[reject.reason] += 1
        if self.counts[reject.reason] <= SHOWN:
            self.shown.setdefault(reject.reason, []).append(reject)


def _usable(
    origin: Origin, layout: Layout, rows: Iterable[Row], left_out: _LeftOut, unread: Unread
) -> Iterator[dict[str, Any]]:
    """Yield rows as shards hold them; count the others in `left_out`, and what is not read."""
    for line, row in rows:
        refused = _excluded(origin.source, line, row)
        converted = refused or convert(row, layout, str(line), unread)
        if not isinstance(converted, Reject):
            converted = filters.unfit(converted, origin.source) or converted
        if isinstance(converted, Reject):
            left_out.add(converted)
            continue
        messages = [[m.role, m.content, m.train] for m in converted.messages]
        yield {
            "line": line,
            "group": converted.group,
            "messages": json.dumps(messages, ensure_ascii=False),
            "key": bytes.fromhex(content_key(converted)),
            "words": sum(len(filters.words(m.content)) for m in converted.messages),
        }


def _in_batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of at most `_BATCH_ROWS` rows, and of at most `_BATCH_CHARACTERS` or one row.

    An Arrow column ends at 2 GiB.
    """
    batch: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        own = len(row["messages"])
        if batch and (len(batch) == _BATCH_ROWS or characters + own > _BATCH_CHARACTERS):
            yield batch
            batch = []
            characters = 0
        batch.append(row)
        characters += own
    if batch:
        yield batch


def _excluded(source: GeneralSource, line: int, row: Mapping[str, Any]) -> Reject | None:
    """Return why the source's `include` or `exclude` leave a row out, or None."""
    for option in ("include", "exclude"):
        for column in getattr(source, option):
            if isinstance(row.get(column), Mapping):
                raise DataError(
                    f"{option}: {column}: its values are objects, of which no pattern can be "
                    "true; take a text column"
                )
    for column, patterns in source.include.items():
        if not _matches(row.get(column), patterns):
            return Reject(str(line), f"not among include: {column}", f"{row.get(column)!r:.60}")
    for column, patterns in source.exclude.items():
        if _matches(row.get(column), patterns):
            return Reject(str(line), f"among exclude: {column}", f"{row.get(column)!r:.60}")
    return None


def _matches(value: Any, patterns: Sequence[str]) -> bool:
    """Tell whether a value, or one of a list's, matches a pattern with the wildcards * and ?."""
    if value is None:
        return False
    if isinstance(value, list | tuple):
        return any(_matches(item, patterns) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Parquet holds whole numbers as floats if some are missing
    text = str(value)
    if isinstance(value, bool):
        text = text.lower()  # as JSON writes it
    return any(fnmatchcase(text, pattern.replace("[", "[[]")) for pattern in patterns)
