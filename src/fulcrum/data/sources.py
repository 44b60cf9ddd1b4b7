"""What general data consist of: files and hub data sets, known by their content, cut into parts, read as raw rows.

A file is cut into *parts*: stretches of whole lines, or of so many rows. What cannot be (.json, .csv, gzipped text, a stream
from the hub) is a sequence, which is read in order. Nothing here converts; `shards` does.

Invariant: a row that was read is one of the content that the origin's `content` names: a file that changes while it is read is
refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fulcrum.config.base import GeneralSource
from fulcrum.core import store
from fulcrum.core.errors import DataError, StoreError, UnreachableError, nearest
from fulcrum.data.formats import Layout
from fulcrum.data.readers import (
    Row,
    cause_of,
    files,
    fitting_layout,
    hub,
    hub_commit,
    require_some,
    suffix,
    text_rows,
    unreadable,
)

PART_ROWS = 20_000
_BATCH = 1000  # rows in memory at a time, of whatever length

_PART_BYTES = 4 * 2**20
_SCOUTS = 100  # rows of a stream by which its columns are known
_BUFFER = 10_000  # rows among which a stream from the hub is shuffled


@dataclass(frozen=True)
class Origin:
    """One file or hub data set of a source.

    `content` is the hash of a file, the fingerprint of a hub data set, or of a stream what it is of; `state` tells whether the
    file is the one that was hashed. `commit` is the hub's, where it says one; `note` is for the user.
    """

    name: str
    path: str  # empty: on the hub
    source: GeneralSource
    content: str
    state: tuple[int, ...] = ()
    commit: str | None = None
    note: str = ""
    data: Any = field(default=None, repr=False, compare=False)  # a hub data set, loaded once

    @property
    def kind(self) -> str:
        """How it is read: lines, parquet, arrow, hub; or sequence, which cannot be cut."""
        if not self.path:
            return "sequence" if self.source.stream else "hub"
        ending = suffix(Path(self.path))
        return {".jsonl": "lines", ".parquet": "parquet", ".arrow": "arrow"}.get(
            str(ending), "sequence"
        )


@dataclass(frozen=True)
class Part:
    """A stretch of an origin: bytes of lines, or rows, `stop` not included; `first` is the number of its first line or row,
    counted from 1."""

    place: int
    start: int
    stop: int
    first: int


def origins(source: GeneralSource) -> list[Origin]:
    """The files of a source, or its hub data set. Raises DataError for what is not there."""
    found = files(source.path)
    if found is None:
        return [_on_hub(source)]
    if source.name or source.revision or source.split != "train" or source.stream:
        raise DataError(
            f"{source.path}: name, split, revision and stream belong to hub data sets, this is a file; use `limit:`"
        )
    return [_file(name, path, source) for name, path in found]


def _file(name: str, path: Path, source: GeneralSource) -> Origin:
    """Its SHA-256 is looked up where its state is that of when it was computed."""
    known = _memo(str(path.absolute()))
    try:
        state = _state(path)
        memo = store.recalled(known)
        content = memo.get("sha256") if memo.get("state") == list(state) else None
        if content is None:
            content = store.file_sha256(path)
            if _state(path) != state:
                raise DataError(
                    f"{name}: changed while it was read; wait until it is written, then run again"
                )
            _remember(
                known, {"state": list(state), "sha256": content, "path": str(path.absolute())}
            )
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read: {error.strerror or error}; check its permissions and its disk"
        ) from error
    return Origin(name, str(path), source, str(content), state)


def _state(path: Path) -> tuple[int, ...]:
    """A copy may keep size and time, so more than these tell a file from another."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def check_unchanged(origin: Origin) -> None:
    """Raise DataError where a file is not the one any more that was hashed."""
    try:
        same = not origin.path or _state(Path(origin.path)) == origin.state
    except OSError:
        same = False
    if not same:
        raise DataError(
            f"{origin.name}: changed or vanished while it was converted; run again once it is written"
        )


def _memo(asked: object) -> Path:
    return store.cache_dir() / "pools" / "known" / f"{store.fingerprint(asked)[:32]}.json"


def _remember(known: Path, what: Mapping[str, Any]) -> None:
    """A cache that cannot be written is said by who needs it."""
    try:
        store.write_json(known, what)
    except StoreError:
        return


def _on_hub(source: GeneralSource) -> Origin:
    """A hub data set as it is now; a stream is pinned to the commit of now. Where the hub is out of reach, or does not say the
    commit, what was known of it last does: what was converted stays usable."""
    asked = [
        source.path,
        source.name,
        source.split,
        source.revision,
        source.stream and source.limit,
    ]
    known = _memo(asked)
    before = store.recalled(known)
    last = before.get("commit")
    commit = hub_commit(source.path, source.revision) if source.stream else None
    note = (
        f"{source.path}: the hub does not say its commit; the last one known is read, {last:.12}"
        if last and not commit
        else ""
    )
    commit = commit or last
    try:
        data = hub(
            source.path, source.name, source.split, commit or source.revision, stream=source.stream
        )
    except UnreachableError:
        if "state" not in before:
            raise
        at = f" (commit {last:.12})" if last else ""
        note = f"{source.path}: the hub cannot be reached; what was last read of it{at} is used"
        return Origin(source.path, "", source, str(before["state"]), commit=last, note=note)
    content = (
        store.fingerprint([*asked, commit or str(data.info)])
        if source.stream
        else str(data._fingerprint)
    )
    _remember(known, {"state": content, "path": source.path, "commit": commit})
    return Origin(source.path, "", source, content, commit=commit, note=note, data=data)


def _loaded(origin: Origin) -> Any:
    """A hub data set; where it could not be reached this says so."""
    if origin.data is not None:
        return origin.data
    source = origin.source
    return hub(
        source.path,
        source.name,
        source.split,
        origin.commit or source.revision,
        stream=source.stream,
    )


def parts(origin: Origin) -> Iterator[Part]:
    """Cut an origin that can be cut."""
    if origin.kind == "lines":
        yield from _stretches_of_lines(origin)
        return
    rows = _count(origin)
    for place, start in enumerate(range(0, rows, PART_ROWS)):
        yield Part(place, start, min(start + PART_ROWS, rows), start + 1)


def _stretches_of_lines(origin: Origin) -> Iterator[Part]:
    start, first = 0, 1
    try:
        with Path(origin.path).open("rb") as stream:
            for place, block in enumerate(iter(lambda: stream.read(_PART_BYTES), b"")):
                rest = stream.readline() if not block.endswith(b"\n") else b""
                stop = start + len(block) + len(rest)
                yield Part(place, start, stop, first)
                start, first = stop, first + block.count(b"\n") + rest.count(b"\n")
    except OSError as error:
        raise DataError(
            f"{origin.name}: cannot be read: {error.strerror or error}; check its disk"
        ) from error


def _count(origin: Origin) -> int:
    """Rows of a table."""
    if origin.kind == "hub":
        return len(_loaded(origin))
    with unreadable(origin.path):
        if origin.kind == "parquet":
            return int(pq.read_metadata(origin.path).num_rows)
        return sum(batch.num_rows for batch in _batches(origin.path))


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


def shapes(origin: Origin, part: Part) -> Shapes:
    """Which columns the rows of a part have; of a table its schema says it."""
    if origin.kind == "hub":
        return {frozenset(_loaded(origin).column_names): 1}
    if origin.kind == "lines":
        found: dict[frozenset[str], int] = {}
        for line, row in text_rows(Path(origin.path), part.start, part.stop, part.first):
            found.setdefault(frozenset(row), line)
        return found
    with unreadable(origin.path):
        schema = (
            pq.read_schema(origin.path)
            if origin.kind == "parquet"
            else next(_batches(origin.path)).schema
        )
    return {frozenset(schema.names): 1}


def shapes_in_order(origin: Origin) -> tuple[Shapes, int | None]:
    """The same of a sequence, and how many rows it has; of a stream its first rows say the columns, and None its size."""
    seen: dict[frozenset[str], int] = {}
    total = 0
    for line, row in sequence(origin) if origin.path else islice(sequence(origin), _SCOUTS):
        seen.setdefault(frozenset(row), line)
        total += 1
    return seen, total if origin.path else None


def layout(origin: Origin, found: Iterable[Shapes]) -> Layout:
    """The layout of all rows. Raises DataError where columns fit none, or `include` or `exclude` names one that is missing."""
    first: dict[frozenset[str], int] = {}
    for part in found:
        for names, line in part.items():
            first.setdefault(names, line)
    require_some(origin.name, len(first))
    columns = frozenset().union(*first)
    for option in ("include", "exclude"):
        for column in getattr(origin.source, option):
            if column not in columns:
                raise DataError(
                    f"{origin.name}: `{option}:` names {column!r}, which is no column{nearest(column, columns)}"
                )
    return fitting_layout(origin.name, first, origin.source)


def rows(origin: Origin, shape: Layout, part: Part) -> Iterator[Row]:
    """The raw rows of a part, with their numbers; of a table only the columns in use, a batch in memory at a time."""
    if origin.kind == "lines":
        yield from text_rows(Path(origin.path), part.start, part.stop, part.first)
        return
    used = sorted({*shape.columns.values(), *origin.source.include, *origin.source.exclude})
    if origin.kind == "hub":
        data = _loaded(origin).select_columns(used).with_format("arrow")
        bounds = range(part.start, part.stop, _BATCH)
        tables = (data[start : min(start + _BATCH, part.stop)] for start in bounds)
        yield from enumerate(chain.from_iterable(table.to_pylist() for table in tables), part.first)
        return
    with unreadable(origin.path):
        if origin.kind == "parquet":
            batches, before = _of_groups(origin.path, used, part)
        else:
            batches, before = (batch.select(used) for batch in _batches(origin.path)), 0
        own = _between(batches, part.start - before, part.stop - before)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in own), part.first)


def _of_groups(path: str, used: list[str], part: Part) -> tuple[Iterator[pa.RecordBatch], int]:
    """Batches of the row groups that hold a part's rows, and how many rows come before these."""
    file = pq.ParquetFile(path)
    ends = list(
        accumulate(file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups))
    )
    first, last = bisect_right(ends, part.start), bisect_left(ends, part.stop)
    before = ends[first - 1] if first else 0
    return file.iter_batches(_BATCH, row_groups=list(range(first, last + 1)), columns=used), before


def _between(batches: Iterable[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """The rows `start` to `stop` (not included) of batches, in slices of at most `_BATCH`."""
    place = 0
    for batch in batches:
        for low in range(max(start, place), min(stop, place + batch.num_rows), _BATCH):
            high = min(low + _BATCH, stop, place + batch.num_rows)
            yield batch.slice(low - place, high - low)
        place += batch.num_rows
        if place >= stop:
            return


def sequence(origin: Origin) -> Iterator[Row]:
    """All rows of what cannot be cut, in order; a stream is shuffled in a buffer: its first rows are rarely a fair sample."""
    if origin.path:
        yield from text_rows(Path(origin.path))
        return
    try:
        yield from enumerate(_loaded(origin).shuffle(seed=0, buffer_size=_BUFFER), 1)
    except DataError:
        raise
    except Exception as error:  # those of the hub's client and of what it connects by
        raise DataError(
            f"{origin.name}: the stream broke off: {cause_of(error)}; run again: what was converted is kept"
        ) from error
