"""Find the files and hub data sets of general data, know them by their content, and read raw rows.

A file is cut into *parts*: stretches of whole lines, or of a number of rows. What cannot be cut
(.json, .csv, gzipped text, a stream from the hub) is a *sequence*, which is read in order. Nothing
is converted here; `shards` does that.

Invariant: every row that is read belongs to the content that the origin's `content` names; a file
that changes while it is read is refused.
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
    label_names,
    named_labels,
    refuse_unreadable,
    require_some,
    suffix,
    text_rows,
)

PART_ROWS = 20_000

_PART_BYTES = 4 * 2**20
_BATCH = 1000  # rows in memory at a time, of whatever length
_SCOUTS = 100  # rows of a stream that tell its columns
_BUFFER = 10_000  # rows among which a stream from the hub is shuffled

Shapes = Mapping[frozenset[str], int]  # sets of columns that occur -> line of the first row


@dataclass(frozen=True)
class Origin:
    """One file or hub data set of a source."""

    name: str
    path: str  # empty: on the hub
    source: GeneralSource
    # Hash of a file, fingerprint of a hub data set, or hash of a stream's identity.
    content: str
    state: tuple[int, ...] = ()  # of the file when it was hashed, see `_state`
    commit: str | None = None  # the hub's, if it says one
    note: str = ""  # for the user
    data: Any = field(default=None, repr=False, compare=False)  # a hub data set, loaded once

    @property
    def kind(self) -> str:
        """Return how it is read: lines, parquet, arrow, hub; or sequence, which cannot be cut."""
        if not self.path:
            return "sequence" if self.source.stream else "hub"
        kinds = {".jsonl": "lines", ".parquet": "parquet", ".arrow": "arrow"}
        return kinds.get(str(suffix(Path(self.path))), "sequence")


@dataclass(frozen=True)
class Part:
    """A stretch of an origin."""

    place: int
    start: int  # in bytes of lines, or rows
    stop: int  # not included
    first: int  # number of its first line or row, counted from 1


def origins(source: GeneralSource) -> list[Origin]:
    """Return the files of a source, or its hub data set. Raises DataError for what is missing."""
    named = files(source.path)
    if named is None:
        return [_hub_origin(source)]
    if source.name or source.revision or source.split != "train" or source.stream:
        raise DataError(
            f"{source.path}: name, split, revision and stream belong to hub data sets, this is a "
            "file; use `limit:`"
        )
    return [_file_origin(name, path, source) for name, path in named]


def check_unchanged(origin: Origin) -> None:
    """Raise DataError if a file is no longer the one that was hashed."""
    if not origin.path:
        return
    try:
        same = _state(Path(origin.path)) == origin.state
    except OSError:
        same = False
    if not same:
        raise DataError(
            f"{origin.name}: changed or vanished while it was converted; "
            "run again once it is written"
        )


def parts(origin: Origin) -> Iterator[Part]:
    """Cut an origin that can be cut."""
    if origin.kind == "lines":
        yield from _parts_of_lines(origin)
        return
    count = _count_rows(origin)
    for place, start in enumerate(range(0, count, PART_ROWS)):
        yield Part(place, start, min(start + PART_ROWS, count), start + 1)


def shapes(origin: Origin, part: Part) -> Shapes:
    """Return which columns the rows of a part have; a table's schema says it for all its rows."""
    if origin.kind == "hub":
        return {frozenset(_load(origin).column_names): 1}
    if origin.kind == "lines":
        return _shapes_of_rows(_part_lines(origin, part))[0]
    with refuse_unreadable(origin.path):
        if origin.kind == "parquet":
            return {frozenset(pq.read_schema(origin.path).names): 1}
        return {frozenset(next(_arrow_batches(origin.path)).schema.names): 1}


def shapes_in_order(origin: Origin) -> tuple[Shapes, int | None]:
    """Return which columns the rows of a sequence have, and how many rows there are.

    Of a stream only the first rows are read, and its size is None.
    """
    if origin.path:
        return _shapes_of_rows(sequence(origin))
    return _shapes_of_rows(islice(sequence(origin), _SCOUTS))[0], None


def layout(origin: Origin, shapes_of_parts: Iterable[Shapes]) -> Layout:
    """Return the layout of all rows.

    Raises DataError if the columns fit no format, or if `include` or `exclude` names a column that
    is missing.
    """
    merged: dict[frozenset[str], int] = {}
    for part_shapes in shapes_of_parts:
        for names, line in part_shapes.items():
            merged.setdefault(names, line)
    require_some(origin.name, len(merged))
    columns = frozenset().union(*merged)
    for option in ("include", "exclude"):
        for column in getattr(origin.source, option):
            if column not in columns:
                raise DataError(
                    f"{origin.name}: `{option}:` names {column!r}, which is no column"
                    f"{nearest(column, columns)}"
                )
    return fitting_layout(origin.name, merged, origin.source)


def rows(origin: Origin, shape: Layout, part: Part) -> Iterator[Row]:
    """Yield the raw rows of a part with their numbers.

    Of a table only the columns in use are read, a batch in memory at a time.
    """
    if origin.kind == "lines":
        yield from _part_lines(origin, part)
        return
    used = sorted({*shape.columns.values(), *origin.source.include, *origin.source.exclude})
    labels = _class_names(origin)
    batches = _part_batches(origin, used, part)
    for number, row in enumerate(chain.from_iterable(batches), part.first):
        yield number, named_labels(row, labels)


def sequence(origin: Origin) -> Iterator[Row]:
    """Yield all rows of an origin that cannot be cut, in order.

    A stream is shuffled in a buffer, since its first rows are rarely a fair sample.
    """
    if origin.path:
        yield from text_rows(Path(origin.path))
        return
    try:
        stream = _load(origin)
        labels = label_names(stream.features or {})
        for number, row in enumerate(stream.shuffle(seed=0, buffer_size=_BUFFER), 1):
            yield number, named_labels(row, labels)
    except DataError:
        raise
    except Exception as error:  # any error of the hub's client or the network
        raise DataError(
            f"{origin.name}: the stream broke off: {cause_of(error)}; run again: what was "
            "converted is kept"
        ) from error


def _class_names(origin: Origin) -> dict[str, list[str]]:
    """Return the names of the classes of a table's columns of class numbers."""
    import datasets

    if origin.kind == "hub":
        return label_names(_load(origin).features)
    with refuse_unreadable(origin.path):
        if origin.kind == "parquet":
            schema = pq.read_schema(origin.path)
        else:
            schema = next(_arrow_batches(origin.path)).schema
        return label_names(datasets.Features.from_arrow_schema(schema))


def _file_origin(name: str, path: Path, source: GeneralSource) -> Origin:
    """Describe a file; its SHA-256 is looked up if the file did not change since it was hashed."""
    memo_file = _memo_file(str(path.absolute()))
    try:
        state = _state(path)
        memo = store.recalled(memo_file)
        content = memo.get("sha256") if memo.get("state") == list(state) else None
        if content is None:
            content = store.file_sha256(path)
            if _state(path) != state:
                raise DataError(
                    f"{name}: changed while it was read; wait until it is written, then run again"
                )
            memo = {"state": list(state), "sha256": content, "path": str(path.absolute())}
            _remember(memo_file, memo)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read: {error.strerror or error}; check its permissions and its disk"
        ) from error
    return Origin(name, str(path), source, str(content), state)


def _hub_origin(source: GeneralSource) -> Origin:
    """Describe a hub data set as it is now; a stream is pinned to the current commit.

    If the hub cannot be reached, or does not say the commit, what was last known of the data set is
    used, so that what was converted stays usable.
    """
    identity = [
        source.path,
        source.name,
        source.split,
        source.revision,
        source.stream and source.limit,
    ]
    memo_file = _memo_file(identity)
    memo = store.recalled(memo_file)
    last = memo.get("commit")
    commit = hub_commit(source.path, source.revision) if source.stream else None
    note = ""
    if last and not commit:
        note = (
            f"{source.path}: the hub does not say its commit; the last one known is read, "
            f"{last:.12}"
        )
    commit = commit or last
    try:
        data = _load_hub(source, commit)
    except UnreachableError:
        if "state" not in memo:
            raise
        at = f" (commit {last:.12})" if last else ""
        note = f"{source.path}: the hub cannot be reached; what was last read of it{at} is used"
        return Origin(source.path, "", source, str(memo["state"]), commit=last, note=note)
    content = (
        store.fingerprint([*identity, commit or str(data.info)])
        if source.stream
        else str(data._fingerprint)
    )
    _remember(memo_file, {"state": content, "path": source.path, "commit": commit})
    return Origin(source.path, "", source, content, commit=commit, note=note, data=data)


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes if a file does; size and time alone may be those of a copy."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def _memo_file(identity: object) -> Path:
    name = store.fingerprint(identity)[:32]
    return store.cache_dir() / "pools" / "known" / f"{name}.json"


def _remember(memo_file: Path, memo: Mapping[str, Any]) -> None:
    """Write down what is known of an origin. A cache that refuses is reported by who needs it."""
    try:
        store.write_json(memo_file, memo)
    except StoreError:
        return


def _load(origin: Origin) -> Any:
    """Return a hub data set; load it if the hub could not be reached before."""
    if origin.data is not None:
        return origin.data
    return _load_hub(origin.source, origin.commit)


def _load_hub(source: GeneralSource, commit: str | None) -> Any:
    revision = commit or source.revision
    return hub(source.path, source.name, source.split, revision, stream=source.stream)


def _parts_of_lines(origin: Origin) -> Iterator[Part]:
    """Cut a file into stretches of about `_PART_BYTES`, each to the end of its last line."""
    start = 0
    first = 1
    try:
        with Path(origin.path).open("rb") as stream:
            for place, block in enumerate(iter(lambda: stream.read(_PART_BYTES), b"")):
                rest = b"" if block.endswith(b"\n") else stream.readline()
                stop = start + len(block) + len(rest)
                yield Part(place, start, stop, first)
                start = stop
                first += block.count(b"\n") + rest.count(b"\n")
    except OSError as error:
        raise DataError(
            f"{origin.name}: cannot be read: {error.strerror or error}; check its disk"
        ) from error


def _part_lines(origin: Origin, part: Part) -> Iterator[Row]:
    return text_rows(Path(origin.path), part.start, part.stop, part.first)


def _shapes_of_rows(rows: Iterable[Row]) -> tuple[Shapes, int]:
    """Return the sets of columns that occur in rows, and the number of rows."""
    first_line: dict[frozenset[str], int] = {}
    count = 0
    for line, row in rows:
        first_line.setdefault(frozenset(row), line)
        count += 1
    return first_line, count


def _count_rows(origin: Origin) -> int:
    """Return the number of rows of a table."""
    if origin.kind == "hub":
        return len(_load(origin))
    with refuse_unreadable(origin.path):
        if origin.kind == "parquet":
            return int(pq.read_metadata(origin.path).num_rows)
        return sum(batch.num_rows for batch in _arrow_batches(origin.path))


def _part_batches(
    origin: Origin, columns: list[str], part: Part
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the rows of a part of a table, at most `_BATCH` at a time."""
    if origin.kind == "hub":
        data = _load(origin).select_columns(columns).with_format("arrow")
        for start in range(part.start, part.stop, _BATCH):
            yield data[start : min(start + _BATCH, part.stop)].to_pylist()
        return
    with refuse_unreadable(origin.path):
        before = 0
        batches: Iterable[pa.RecordBatch]
        if origin.kind == "parquet":
            batches, before = _row_groups(origin.path, columns, part)
        else:
            batches = (batch.select(columns) for batch in _arrow_batches(origin.path))
        for batch in _slices(batches, part.start - before, part.stop - before):
            yield batch.to_pylist()


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file of either form, memory-mapped."""
    source = pa.memory_map(path)
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        yield from pa.ipc.open_stream(source)
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _row_groups(path: str, columns: list[str], part: Part) -> tuple[Iterator[pa.RecordBatch], int]:
    """Return the batches of the row groups that hold a part, and the number of rows before them."""
    file = pq.ParquetFile(path)
    metadata = file.metadata
    sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    ends = list(accumulate(sizes))
    first = bisect_right(ends, part.start)
    last = bisect_left(ends, part.stop)
    before = ends[first - 1] if first else 0
    groups = list(range(first, last + 1))
    return file.iter_batches(_BATCH, row_groups=groups, columns=columns), before


def _slices(batches: Iterable[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows `start` to `stop` (not included) of batches, at most `_BATCH` at a time."""
    place = 0
    for batch in batches:
        for low in range(max(start, place), min(stop, place + batch.num_rows), _BATCH):
            high = min(low + _BATCH, stop, place + batch.num_rows)
            yield batch.slice(low - place, high - low)
        place += batch.num_rows
        if place >= stop:
            return
