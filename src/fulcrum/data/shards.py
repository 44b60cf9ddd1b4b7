"""General data -> Arrow shards in the cache: streamed, by several processes, and gone on with after a kill.

Every origin (a file or hub data set) has a folder, named by a hash of its content and of what decides which of its rows are
used: another weight, or another source beside it, converts nothing anew. Each part of it becomes one shard: an Arrow file of
usable rows, and a JSON file that counts the others by reason. Both are renamed into place when whole, the JSON file last, so
that a killed conversion goes on with the parts that lack it; a shard that is missing or cut short is converted again.

Invariant: rows of an origin = rows of its shards + rows that are counted with a reason.
"""

import json
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
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
from fulcrum.core.types import Example, IntArray, Message, Reject
from fulcrum.data import filters, sources
from fulcrum.data.formats import Layout, content_key, convert
from fulcrum.data.readers import Row, require_some, suffix
from fulcrum.data.sources import Origin, Part

VERSION = 5  # raise it where the same file would give other shards
SHOWN = 5  # rows left out that are kept as examples, of each reason

_BATCH_ROWS, _BATCH_CHARACTERS = 10_000, 2**26  # of a shard's batches

_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("group", pa.string()),
        ("messages", pa.string()),
        ("key", pa.binary(16)),
        ("words", pa.int32()),
    ]
)

Progress = Callable[[str, int, int], None]  # (label, done, total)


def silent(label: str, done: int, total: int) -> None:
    """The progress that says nothing."""


@dataclass(frozen=True)
class Shard:
    """What became of a part: an Arrow file of `kept` rows and `size` bytes, and rows left out by reason, of which some are
    shown."""

    path: str
    size: int
    kept: int
    left_out: Mapping[str, int]
    shown: Sequence[Reject]

    @property
    def read(self) -> int:
        """Rows of the part."""
        return self.kept + sum(self.left_out.values())


def folder(origin: Origin) -> Path:
    """Where the shards of this content stand, as the source's settings use it."""
    settings = {"columns", "include", "exclude", "languages", "min_words", "max_words"}
    used = origin.source.model_dump(mode="json", include=settings)
    kind = suffix(Path(origin.path)) if origin.path else None
    return (
        store.cache_dir()
        / "pools"
        / "files"
        / store.fingerprint([VERSION, origin.content, kind, used])[:32]
    )


def build(origin: Origin, *, jobs: int = 1, progress: Progress = silent) -> list[Shard]:
    """The shards of an origin, converting what is not converted yet in `jobs` processes.

    Raises DataError for what is empty or broken, changes meanwhile, or has columns that fit no format; StoreError where the
    disk refuses or a process dies.
    """
    where = folder(origin)
    if (found := _whole(where, origin)) is not None:  # before any lock: a cache may be read-only
        return found
    label = f"converting {origin.name}"
    try:
        with store.locked(
            where, lambda done: progress(f"waiting for another process that is {label}", done, 1)
        ):
            if (found := _whole(where, origin)) is None:
                for left in where.glob(".*.partial"):
                    left.unlink(missing_ok=True)
                started = time.time()
                shards = _convert(origin, where, jobs, label, progress)
                described = [
                    store.plain(shard) | {"path": Path(shard.path).name} for shard in shards
                ]
                about = {
                    "name": origin.name,
                    "commit": origin.commit,
                    "seconds": time.time() - started,
                }
                store.write_json(where / "whole.json", {**about, "shards": described})
                found = [_named(shard, origin) for shard in shards]
    except OSError as error:
        raise unwritable(where, error) from error
    except BrokenProcessPool as error:
        raise StoreError(
            f"{origin.name}: a process that converts it died (killed, or out of memory); what is converted is kept: run again, "
            "with --jobs 1 where memory is short"
        ) from error
    return found


def _whole(where: Path, origin: Origin) -> list[Shard] | None:
    """All shards, where they are there."""
    known = store.recalled(where / "whole.json")
    shards = [_described(where, own) for own in known.get("shards", ())]
    return (
        [_named(shard, origin) for shard in shards] if known and all(map(_sound, shards)) else None
    )


def _described(where: Path, own: Mapping[str, Any]) -> Shard:
    shown = [Reject(**reject) for reject in own["shown"]]
    return Shard(str(where / own["path"]), own["size"], own["kept"], own["left_out"], shown)


def _named(shard: Shard, origin: Origin) -> Shard:
    """With the name that the file has now."""
    shown = [replace(reject, origin=f"{origin.name}:{reject.origin}") for reject in shard.shown]
    return replace(shard, shown=shown)


def _sound(shard: Shard) -> bool:
    path = Path(shard.path)
    return path.exists() and path.stat().st_size == shard.size


def _convert(origin: Origin, where: Path, jobs: int, label: str, progress: Progress) -> list[Shard]:
    if origin.kind == "sequence":
        return list(_in_order(origin, where, label, progress))
    parts = list(sources.parts(origin))
    require_some(origin.name, len(parts))
    if jobs == 1 or len(parts) == 1 or origin.kind == "hub":
        shape = sources.layout(origin, map(partial(sources.shapes, origin), parts))
        return list(
            _told(
                (_shard_of(origin, where, shape, part) for part in parts),
                label,
                len(parts),
                progress,
            )
        )
    with processes.start(min(jobs, len(parts))) as pool:
        try:
            shape = sources.layout(origin, pool.map(partial(sources.shapes, origin), parts))
            found = pool.map(partial(_shard_of, origin, where, shape), parts)
            return list(_told(found, label, len(parts), progress))
        except BaseException:  # Ctrl-C too: parts that are not begun are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _told(shards: Iterable[Shard], label: str, total: int, progress: Progress) -> Iterator[Shard]:
    progress(label, 0, total)
    for done, shard in enumerate(shards, 1):
        progress(label, done, total)
        yield shard


def _in_order(origin: Origin, where: Path, label: str, progress: Progress) -> Iterator[Shard]:
    """Convert what cannot be cut: read once for its columns (a stream's first rows say them), then again. Of a stream so many
    usable rows are taken as its source's limit says. Rows of parts that are converted already are read and passed over."""
    seen, size = sources.shapes_in_order(origin)
    shape = sources.layout(origin, [seen])
    most = origin.source.limit if size is None else None
    raw, done, kept, place = sources.sequence(origin), 0, 0, 0
    while (most is None or kept < most) and (head := next(raw, None)) is not None:
        progress(label, done if most is None else kept, size or most or 0)
        own = chain([head], islice(raw, sources.PART_ROWS - 1))
        part = Part(place, done, done + sources.PART_ROWS, done + 1)
        if (shard := _stored(where, part)) is not None and sum(
            1 for _ in islice(own, shard.read)
        ) < shard.read:
            for stale in (*where.glob("*.json"), *where.glob("*.arrow")):
                stale.unlink()
            raise DataError(
                f"{origin.name}: gives fewer rows than when its conversion began; run again, it begins anew then"
            )
        if shard is None:
            shard = _write(origin, where, shape, part, own, None if most is None else most - kept)
        done, kept, place = done + shard.read, kept + shard.kept, place + 1
        yield shard
    progress(label, done if most is None else kept, done if most is None else kept)


def _stored(where: Path, part: Part) -> Shard | None:
    """The shard of a part, where a conversion before this one finished it."""
    known = store.recalled(where / f"{part.place:05}.json")
    shard = _described(where, known) if known else None
    return shard if shard is not None and _sound(shard) else None


def _shard_of(origin: Origin, where: Path, shape: Layout, part: Part) -> Shard:
    return _stored(where, part) or _write(
        origin, where, shape, part, sources.rows(origin, shape, part)
    )


def _write(
    origin: Origin, where: Path, shape: Layout, part: Part, rows: Iterable[Row], most: int | None = None
) -> Shard:  # fmt: skip
    """Convert rows into a shard, `most` usable ones."""
    file = where / f"{part.place:05}.arrow"
    # By process: what a killed conversion's workers still write must not be another's.
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    left_out, kept = Counter[str](), 0
    shown: dict[str, list[Reject]] = {}
    try:
        with partial_file.open("wb") as stream:
            with pa.ipc.new_file(stream, _SCHEMA) as writer:
                for batch in _batched(islice(_usable(origin, shape, rows, left_out, shown), most)):
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
    shard = Shard(str(file), size, kept, dict(left_out), list(chain.from_iterable(shown.values())))
    store.write_json(file.with_suffix(".json"), store.plain(shard) | {"path": file.name})
    return shard


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most `_BATCH_ROWS` rows, and of one row or less than `_BATCH_CHARACTERS`: an Arrow column ends at 2 GiB."""
    batch: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        own = len(row["messages"])
        if batch and (len(batch) == _BATCH_ROWS or characters + own > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += own
    if batch:
        yield batch


def _usable(
    origin: Origin,
    shape: Layout,
    rows: Iterable[Row],
    left_out: Counter[str],
    shown: dict[str, list[Reject]],
) -> Iterator[dict[str, Any]]:
    """Rows as shards hold them; the others are counted."""
    for line, row in rows:
        found = _excluded(origin.source, line, row) or convert(row, shape, str(line))
        if not isinstance(found, Reject):
            found = filters.unfit(found, origin.source) or found
        if isinstance(found, Reject):
            left_out[found.reason] += 1
            if left_out[found.reason] <= SHOWN:
                shown.setdefault(found.reason, []).append(found)
            continue
        yield {
            "line": line, "group": found.group,
            "messages": json.dumps([[m.role, m.content, m.train] for m in found.messages], ensure_ascii=False),
            "key": bytes.fromhex(content_key(found)),
            "words": sum(len(filters.words(m.content)) for m in found.messages),
        }  # fmt: skip


def _excluded(source: GeneralSource, line: int, row: Mapping[str, Any]) -> Reject | None:
    for option, column in (
        (name, column) for name in ("include", "exclude") for column in getattr(source, name)
    ):
        if isinstance(row.get(column), Mapping):
            raise DataError(
                f"{option}: {column}: its values are objects, of which no pattern can be true; take a text column"
            )
    for column, patterns in source.include.items():
        if not _fits(row.get(column), patterns):
            return Reject(str(line), f"not among include: {column}", f"{row.get(column)!r:.60}")
    for column, patterns in source.exclude.items():
        if _fits(row.get(column), patterns):
            return Reject(str(line), f"among exclude: {column}", f"{row.get(column)!r:.60}")
    return None


def _fits(value: Any, patterns: Sequence[str]) -> bool:
    """Whether a value, or one of a list's, is like a pattern, in which * and ? stand for others."""
    if isinstance(value, list | tuple):
        return any(_fits(own, patterns) for own in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers that misses some is one of floats in Parquet
    text = str(value).lower() if isinstance(value, bool) else str(value)  # as JSON writes it
    return value is not None and any(
        fnmatchcase(text, pattern.replace("[", "[[]")) for pattern in patterns
    )


class Rows:
    """Rows of shards (with their origins' names) end to end, memory-mapped. `rows[i]` reads one."""

    def __init__(self, found: Sequence[tuple[str, Shard]]) -> None:
        self._found, self._ends = found, list(accumulate(shard.kept for _, shard in found))
        self._open: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Example:
        place, own = self._at(row)
        found = own.to_pylist()[0]
        messages = tuple(
            Message(role, content, train) for role, content, train in json.loads(found["messages"])
        )
        return Example(messages, found["group"], f"{self._found[place][0]}:{found['line']}")

    def line(self, row: int) -> tuple[int, int]:
        """The number of a row's shard, and its line."""
        place, own = self._at(row)
        return place, own["line"][0].as_py()

    def _at(self, row: int) -> tuple[int, pa.Table]:
        place = bisect_right(self._ends, row)
        if place not in self._open:
            self._open[place] = table(self._found[place][1]).select(["line", "group", "messages"])
        return place, self._open[place].slice(
            row - (self._ends[place] - self._found[place][1].kept), 1
        )

    def words(self) -> IntArray:
        """Words of every row: (len,)."""
        counts = [table(shard)["words"].to_numpy() for _, shard in self._found]
        return np.concatenate(counts).astype(np.int64) if counts else np.empty(0, dtype=np.int64)


def table(shard: Shard) -> pa.Table:
    """The rows of a shard, memory-mapped. Raises StoreError where it is damaged."""
    return pa.Table.from_batches(batches(shard), _SCHEMA)


def batches(shard: Shard) -> Iterator[pa.RecordBatch]:
    """The same in batches."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(shard.path))
        yield from map(reader.get_batch, range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        path = Path(shard.path)
        for known in (path.with_suffix(".json"), path.with_name("whole.json")):
            with suppress(OSError):  # a cache may be read-only
                known.unlink()
        raise StoreError(
            f"{path}: damaged ({error}); run again, it is converted anew then"
        ) from error


def unwritable(folder: Path, error: OSError) -> StoreError:
    """What to say where the pools' cache refuses."""
    remedies = dict.fromkeys((EROFS, EPERM, ENOTDIR), "") | {EACCES: "mend its permissions, or "}
    remedies |= dict.fromkeys((ENOSPC, EDQUOT), "free some space, or ")
    what = f"{folder}: the pool's cache cannot be used: {error.strerror or error}"
    known = remedies.get(error.errno or 0)
    return StoreError(
        what if known is None else f"{what}; {known}set FULCRUM_CACHE to another folder"
    )
