"""General data -> Arrow shards in the cache: streamed, by several processes, and gone on with after a kill.

Every file (or hub data set) has a folder, named by a hash of its content and of what decides which of its rows are used:
another weight, or another source beside it, converts nothing anew. A file is cut into *parts*, each of which becomes one shard:
an Arrow file of usable rows, and a JSON file that counts the others by reason. Both are renamed into place when whole, the JSON
file last, so that a killed conversion goes on with the parts that lack it. What cannot be cut (.json, .csv, gzipped text, a
stream from the hub) is read in order, a part being so many rows.

Invariant: rows of a file = rows of its shards + rows that are counted with a reason.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from fulcrum import clean, store
from fulcrum.errors import DataError, StoreError, nearest
from fulcrum.records import Reject
from fulcrum.rows import Layout, content_key, convert
from fulcrum.sections import GeneralSource
from fulcrum.tables import Row, files, fitting_layout, hub, hub_commit, require_some, suffix, text_rows, unreadable

VERSION = 2  # raise it where the same file would give other shards
SHOWN = 5  # rows left out that are kept as examples, of each reason

_PART_BYTES = 16 * 2**20
_PART_ROWS = 50_000
_BATCH = 10_000  # rows in a record batch: what is in memory at a time
_SCOUTS = 100  # rows of a stream by which its columns are known
_BUFFER = 10_000  # rows among which a stream from the hub is shuffled
_SCHEMA = pa.schema(
    [("line", pa.int64()), ("group", pa.string()), ("messages", pa.string()), ("key", pa.binary(16)), ("words", pa.int32())]
)

Progress = Callable[[str, int, int], None]  # (label, done, total)


def silent(label: str, done: int, total: int) -> None:
    """The progress that says nothing."""


@dataclass(frozen=True)
class Origin:
    """One file or hub data set of a source, and the folder of its shards."""

    name: str
    path: str  # empty: on the hub
    source: GeneralSource
    folder: str

    @property
    def kind(self) -> str:
        """How it is read: lines, parquet, arrow, hub; or sequence, which cannot be cut."""
        if not self.path:
            return "sequence" if self.source.stream else "hub"
        ending = suffix(Path(self.path))
        return {".jsonl": "lines", ".parquet": "parquet", ".arrow": "arrow"}.get(str(ending), "sequence")


@dataclass(frozen=True)
class Part:
    """A stretch of an origin: bytes of lines, row groups, record batches or rows, `stop` not included; `first` is the number of
    its first line or row, counted from 1."""

    place: int
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Shard:
    """What became of a part: an Arrow file of `kept` rows, and rows left out by reason, of which some are shown."""

    path: str
    kept: int
    left_out: Mapping[str, int]
    shown: Sequence[Reject]


def origins(source: GeneralSource) -> list[Origin]:
    """The files of a source, or its hub data set, each with its folder. Raises DataError for what is not there."""
    found = files(source.path)
    if found is None:
        state = _state_on_hub(source)
        return [Origin(source.path, "", source, _folder(source, state))]
    if source.name or source.revision or source.split != "train" or source.stream:
        raise DataError(
            f"{source.path}: name, split, revision and stream belong to hub data sets, this is a file; use `limit:`"
        )
    return [Origin(name, str(path), source, _folder(source, _content(path), suffix(path))) for name, path in found]


def _folder(source: GeneralSource, content: str, kind: str | None = None) -> str:
    """Where the shards of this content stand, as these settings use it."""
    used = source.model_dump(mode="json", include={"columns", "include", "exclude", "languages", "min_words", "max_words"})
    return str(store.cache_dir() / "pools" / "files" / store.fingerprint([VERSION, content, kind, used])[:32])


def _content(path: Path) -> str:
    """The SHA-256 of a file, looked up where its size and time of change are those of when it was computed."""
    state = path.stat()
    known = store.cache_dir() / "pools" / "known" / f"{store.fingerprint(str(path.absolute()))[:32]}.json"
    now = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]  # copies may keep size and time
    if known.exists() and (memo := store.read_json(known)).get("state") == now:
        return str(memo["sha256"])
    content = store.file_sha256(path)
    store.write_json(known, {"state": now, "sha256": content, "path": str(path.absolute())})
    return content


def _state_on_hub(source: GeneralSource) -> str:
    """What a hub data set is now: of a stream its commit, and how much of it is read. What is known from earlier does where the
    hub is out of reach: what was converted stays usable."""
    asked = [source.path, source.name, source.split, source.revision, source.stream and source.limit]
    known = store.cache_dir() / "pools" / "known" / f"{store.fingerprint(asked)[:32]}.json"
    try:
        data = _hub(source)
    except DataError:
        if known.exists():
            return str(store.read_json(known)["state"])
        raise
    if source.stream:
        state = store.fingerprint([*asked, hub_commit(source.path, source.revision) or str(data.info)])
    else:
        state = str(data._fingerprint)
    store.write_json(known, {"state": state, "path": source.path})
    return state


def _hub(source: GeneralSource) -> Any:
    return hub(source.path, source.name, source.split, source.revision, stream=source.stream)


def build(origin: Origin, *, jobs: int = 1, progress: Progress = silent) -> list[Shard]:
    """The shards of an origin, converting what is not converted yet in `jobs` processes.

    Raises DataError for what is empty or broken, or has columns that fit no format; StoreError where the disk refuses.
    """
    folder = Path(origin.folder)
    whole = folder / "whole.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # another process may be at it
            if not whole.exists():
                started = time.time()
                shards = _convert(origin, jobs, progress)
                described = [store.plain(replace(shard, path=Path(shard.path).name)) for shard in shards]
                store.write_json(whole, {"seconds": time.time() - started, "shards": described})
    except OSError as error:
        raise StoreError(
            f"{folder}: the pool's cache cannot be written: {error.strerror or error}; free space, or set FULCRUM_CACHE to "
            "another disk"
        ) from error
    return [_shard(folder, origin, described) for described in store.read_json(whole)["shards"]]


def _shard(folder: Path, origin: Origin, described: Mapping[str, Any]) -> Shard:
    shown = [Reject(f"{origin.name}:{own['origin']}", own["reason"], own["detail"]) for own in described["shown"]]
    return Shard(str(folder / described["path"]), described["kept"], described["left_out"], shown)


def _convert(origin: Origin, jobs: int, progress: Progress) -> list[Shard]:
    if origin.kind == "sequence":
        return list(_in_order(origin, progress))
    parts = list(_parts(origin))
    require_some(origin.name, len(parts))
    label = f"converting {origin.name}"
    if jobs == 1 or len(parts) == 1 or origin.kind == "hub":
        shape = _layout(origin, map(partial(_shapes, origin), parts))
        return list(_told((_shard_of(origin, shape, part) for part in parts), label, len(parts), progress))
    # Started afresh: a forked copy of this process's threads would hang.
    with ProcessPoolExecutor(min(jobs, len(parts)), mp_context=get_context("spawn")) as pool:
        shape = _layout(origin, pool.map(partial(_shapes, origin), parts))
        found = pool.map(partial(_shard_of, origin, shape), parts)
        return list(_told(found, label, len(parts), progress))


def _told(shards: Iterable[Shard], label: str, total: int, progress: Progress) -> Iterator[Shard]:
    progress(label, 0, total)
    for done, shard in enumerate(shards, 1):
        progress(label, done, total)
        yield shard


def _parts(origin: Origin) -> Iterator[Part]:
    """Cut an origin that can be cut."""
    if origin.kind == "lines":
        start, first = 0, 1
        with Path(origin.path).open("rb") as stream:
            for place, block in enumerate(iter(lambda: stream.read(_PART_BYTES), b"")):
                rest = stream.readline() if not block.endswith(b"\n") else b""
                stop = start + len(block) + len(rest)
                yield Part(place, start, stop, first)
                start, first = stop, first + block.count(b"\n") + rest.count(b"\n")
        return
    if origin.kind == "hub":
        rows = len(_hub(origin.source))
        for place, start in enumerate(range(0, rows, _PART_ROWS)):
            yield Part(place, start, min(start + _PART_ROWS, rows), start + 1)
        return
    place, start, first, rows = 0, 0, 1, 0
    sizes = _group_sizes(origin)
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or (group == len(sizes) - 1 and rows):
            yield Part(place, start, group + 1, first)
            place, start, first, rows = place + 1, group + 1, first + rows, 0


def _group_sizes(origin: Origin) -> list[int]:
    """Rows of each row group (parquet) or record batch (arrow)."""
    with unreadable(origin.path):
        if origin.kind == "parquet":
            data = pq.ParquetFile(origin.path).metadata
            return [data.row_group(k).num_rows for k in range(data.num_row_groups)]
        return [batch.num_rows for batch in _batches(origin.path)]


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    """Record batches of an Arrow file of either form; memory-mapped."""
    source = pa.memory_map(path)
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        yield from pa.ipc.open_stream(source)
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


Shapes = Mapping[frozenset[str], int]  # sets of columns that occur -> the line of the first


def _shapes(origin: Origin, part: Part) -> Shapes:
    """Which columns the rows of a part have; of a table its schema says it."""
    if origin.kind == "hub":
        return {frozenset(_hub(origin.source).column_names): 1}
    if origin.kind == "lines":
        found: dict[frozenset[str], int] = {}
        for line, row in text_rows(Path(origin.path), part.start, part.stop, part.first):
            found.setdefault(frozenset(row), line)
        return found
    with unreadable(origin.path):
        schema = pq.read_schema(origin.path) if origin.kind == "parquet" else next(_batches(origin.path)).schema
    return {frozenset(schema.names): 1}


def _layout(origin: Origin, found: Iterable[Shapes]) -> Layout:
    """The layout of all rows. Raises DataError where columns fit none, or `include` or `exclude` names one that is missing."""
    shapes: dict[frozenset[str], int] = {}
    for part in found:
        for names, line in part.items():
            shapes.setdefault(names, line)
    require_some(origin.name, len(shapes))
    columns = frozenset().union(*shapes)
    for option in ("include", "exclude"):
        for column in getattr(origin.source, option):
            if column not in columns:
                raise DataError(f"{origin.name}: `{option}:` names {column!r}, which is no column{nearest(column, columns)}")
    return fitting_layout(origin.name, shapes, origin.source)


def _rows(origin: Origin, shape: Layout, part: Part) -> Iterator[Row]:
    """The raw rows of a part, with their numbers; of a table only the columns in use."""
    if origin.kind == "lines":
        yield from text_rows(Path(origin.path), part.start, part.stop, part.first)
        return
    used = sorted({*shape.columns.values(), *origin.source.include, *origin.source.exclude})
    if origin.kind == "hub":
        data = _hub(origin.source).select_columns(used)
        yield from enumerate((data[k] for k in range(part.start, part.stop)), part.first)
        return
    with unreadable(origin.path):
        if origin.kind == "parquet":
            groups = range(part.start, part.stop)
            batches = pq.ParquetFile(origin.path).iter_batches(_BATCH, row_groups=list(groups), columns=used)
        else:
            batches = (batch.select(used) for batch in islice(_batches(origin.path), part.start, part.stop))
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), part.first)


def _sequence(origin: Origin) -> Iterator[Row]:
    """All rows of what cannot be cut, in order."""
    if origin.path:
        return text_rows(Path(origin.path))
    # The first rows of a data set are rarely a fair sample of it.
    return enumerate(_hub(origin.source).shuffle(seed=0, buffer_size=_BUFFER).take(origin.source.limit), 1)


def _in_order(origin: Origin, progress: Progress) -> Iterator[Shard]:
    """Convert what cannot be cut: read once for its columns (a stream's first rows say them), then again."""
    seen: dict[frozenset[str], int] = {}
    total = 0
    for line, row in _sequence(origin) if origin.path else islice(_sequence(origin), _SCOUTS):
        seen.setdefault(frozenset(row), line)
        total += 1
    shape = _layout(origin, [seen])
    total = total if origin.path else origin.source.limit or total
    rows, label, done = _sequence(origin), f"converting {origin.name}", 0
    for place in range(-(-total // _PART_ROWS)):
        progress(label, done, total)
        part = Part(place, done, done + _PART_ROWS, done + 1)
        own = islice(rows, _PART_ROWS)
        if (known := _stored(origin, part)) is not None:
            done += sum(1 for _ in own)  # read and passed over
            yield known
        else:
            shard = _write(origin, shape, part, own)
            done += shard.kept + sum(shard.left_out.values())
            yield shard
    progress(label, total, total)


def _stored(origin: Origin, part: Part) -> Shard | None:
    """The shard of a part, where a conversion before this one finished it."""
    file = Path(origin.folder) / f"{part.place:05}.json"
    return _shard_at(file) if file.exists() else None


def _shard_at(file: Path) -> Shard:
    described = store.read_json(file)
    shown = [Reject(**own) for own in described["shown"]]
    return Shard(str(file.with_suffix(".arrow")), described["kept"], described["left_out"], shown)


def _shard_of(origin: Origin, shape: Layout, part: Part) -> Shard:
    return _stored(origin, part) or _write(origin, shape, part, _rows(origin, shape, part))


def _write(origin: Origin, shape: Layout, part: Part, rows: Iterable[Row]) -> Shard:
    """Convert rows into a shard."""
    file = Path(origin.folder) / f"{part.place:05}.arrow"
    # By process: what a killed conversion's workers still write must not be another's.
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    left_out, kept = Counter[str](), 0
    shown: dict[str, list[Reject]] = {}
    with partial_file.open("wb") as stream:
        with pa.ipc.new_file(stream, _SCHEMA) as writer:
            usable = _usable(origin, shape, rows, left_out, shown)
            while batch := list(islice(usable, _BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
                kept += len(batch)
        stream.flush()
        os.fsync(stream.fileno())
    partial_file.replace(file)
    shard = Shard(str(file), kept, dict(left_out), list(chain.from_iterable(shown.values())))
    store.write_json(file.with_suffix(".json"), shard)
    return shard


def _usable(
    origin: Origin, shape: Layout, rows: Iterable[Row], left_out: Counter[str], shown: dict[str, list[Reject]]
) -> Iterator[dict[str, Any]]:
    """Rows as shards hold them; the others are counted."""
    for line, row in rows:
        found = _excluded(origin.source, line, row) or convert(row, shape, str(line))
        if not isinstance(found, Reject):
            found = clean.unfit(found, origin.source) or found
        if isinstance(found, Reject):
            left_out[found.reason] += 1
            if left_out[found.reason] <= SHOWN:
                shown.setdefault(found.reason, []).append(found)
            continue
        yield {
            "line": line, "group": found.group,
            "messages": json.dumps([[m.role, m.content, m.train] for m in found.messages], ensure_ascii=False),
            "key": bytes.fromhex(content_key(found)),
            "words": sum(len(clean.words(m.content)) for m in found.messages),
        }  # fmt: skip


def _excluded(source: GeneralSource, line: int, row: Mapping[str, Any]) -> Reject | None:
    for column, patterns in source.include.items():
        if not _fits(row.get(column), patterns):
            return Reject(str(line), f"not among include: {column}", f"{row.get(column)!r:.60}")
    for column, patterns in source.exclude.items():
        if _fits(row.get(column), patterns):
            return Reject(str(line), f"among exclude: {column}", f"{row.get(column)!r:.60}")
    return None


def _fits(value: Any, patterns: Sequence[str]) -> bool:
    return value is not None and any(fnmatchcase(str(value), pattern) for pattern in patterns)
