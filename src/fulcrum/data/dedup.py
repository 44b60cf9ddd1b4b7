"""Find rows of general data that repeat an earlier one, exactly or nearly.

Rows are numbered over all shards of a set of sources, laid end to end. What is found is kept in the
cache next to the shards, and is not computed again for the same set.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fulcrum.core import processes, store
from fulcrum.core.errors import StoreError
from fulcrum.core.progress import LabelledCount
from fulcrum.core.types import BoolArray, IntArray, Reject
from fulcrum.data import filters, shards
from fulcrum.data.shards import NamedShard, Shard

HashArray = npt.NDArray[np.uint64]

_ROWS = "rows.npy"  # the files that are kept of a set of sources
_COUNTS = "left_out.json"
_BLOCK = 2**20  # keys that are compared at a time


class _Repeat(NamedTuple):
    row: int
    earlier: int  # the row that stays
    similarity: float


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of a set of sources."""

    ids: IntArray  # (rows that stay,) ascending
    described: dict[str, Any]  # reason -> [count, some of the repeats (see `_describe`)]


def without_repeats(
    named: Sequence[NamedShard],
    folders: Sequence[str],
    drawn: BoolArray,
    near: float,
    jobs: int,
    progress: LabelledCount,
) -> tuple[IntArray, dict[str, int], list[Reject]]:
    """Return the `drawn` rows that repeat no earlier drawn row, ascending.

    Also returns counts of the others by reason, and some of them. With `near` above 0, rows of at
    least that Jaccard similarity are repeats too. Raises StoreError if the disk refuses.
    """
    total = int(drawn.sum())
    if total > filters.NEAR_ROWS:
        near = 0.0
    subset = None if drawn.all() else hashlib.sha256(np.packbits(drawn).tobytes()).hexdigest()
    identity = [shards.VERSION, list(folders), subset, near]
    folder = store.cache_dir() / "pools" / "sets" / store.fingerprint(identity)[:32]

    def report_waiting(done: int) -> None:
        progress("waiting for another process that looks for duplicates", done, 1)

    try:
        known = _load(folder, total)
        if known is None:  # the lock comes second: a cache may be read-only
            with store.locked(folder, report_waiting):
                known = _load(folder, total)
                if known is None:
                    known = _find_repeats(named, drawn, near, jobs, progress)
                    store.write_array(folder / _ROWS, known.ids)
                    store.write_json(folder / _COUNTS, known.described)
    except OSError as error:
        raise shards.unwritable(folder, error) from error

    counts: dict[str, int] = {}
    shown: list[Reject] = []
    for reason, (count, some) in known.described.items():
        if count:
            counts[reason] = count
        for place, line, earlier_place, earlier_line, similarity in some:
            how = "same as" if similarity == 1 else f"{similarity:.0%} like"
            detail = f"{how} {named[earlier_place][0]}:{earlier_line}"
            shown.append(Reject(f"{named[place][0]}:{line}", reason, detail))
    return known.ids, counts, shown


def _load(folder: Path, total: int) -> _Known | None:
    """Load what was found before; None if it is missing, damaged, or not of `total` rows."""
    described = store.recalled(folder / _COUNTS)
    if not described:
        return None
    ids = np.empty(0, dtype=np.int64)
    if total:
        try:
            ids = np.load(folder / _ROWS, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # missing, damaged, empty
            return None
    repeats = sum(count for count, _ in described.values())
    if len(ids) + repeats != total:
        return None
    return _Known(ids, described)


def _find_repeats(
    named: Sequence[NamedShard], drawn: BoolArray, near: float, jobs: int, progress: LabelledCount
) -> _Known:
    stays, some_exact = _find_exact(named, drawn, progress)
    nearly: list[_Repeat] = []
    if near:
        nearly = _find_near(named, stays, near, jobs, progress)
        stays[[row for row, _, _ in nearly]] = False
    ids = np.flatnonzero(stays)
    exact_count = int(drawn.sum()) - len(ids) - len(nearly)
    described = {
        "duplicate": [exact_count, _describe(named, some_exact)],
        "near-duplicate": [len(nearly), _describe(named, nearly)],
    }
    return _Known(ids, described)


def _describe(
    named: Sequence[NamedShard], repeats: Iterable[_Repeat]
) -> list[tuple[int, int, int, int, float]]:
    """Describe some repeats as (shard, line, earlier row's shard, its line, similarity).

    Shards are numbers, since a file's name may change.
    """
    rows = shards.Rows(named)
    described = []
    for row, earlier, similarity in sorted(repeats)[: shards.SHOWN]:
        described.append((*rows.line(row), *rows.line(earlier), similarity))
    return described


def _find_exact(
    named: Sequence[NamedShard], drawn: BoolArray, progress: LabelledCount
) -> tuple[BoolArray, list[_Repeat]]:
    """Return which drawn rows have a content that no earlier one has, and some of the others.

    The first array is as long as `drawn`. At its peak this takes some 32 bytes a row.
    """
    keys = _drawn_keys(named, drawn, progress)
    order = np.lexsort(keys)  # stable: equal keys stay in the order of their rows
    same = _same_as_previous(keys, order)
    del keys
    rows = np.flatnonzero(drawn)
    stays = drawn.copy()
    stays[rows[order[1:][same]]] = False
    some = []
    for place in np.flatnonzero(same)[: shards.SHOWN]:
        first = int(place)
        while first and same[first - 1]:
            first -= 1
        some.append(_Repeat(int(rows[order[place + 1]]), int(rows[order[first]]), 1.0))
    return stays, some


def _drawn_keys(
    named: Sequence[NamedShard], drawn: BoolArray, progress: LabelledCount
) -> HashArray:
    """Return the drawn rows' content keys, 128 bits of SHA-256 each: (2, drawn rows)."""
    keys = np.empty((2, int(drawn.sum())), dtype=np.uint64)
    filled = 0
    seen = 0
    for done, (_, shard) in enumerate(named, 1):
        for batch in shards.batches(shard):
            is_drawn = drawn[seen : seen + batch.num_rows]
            column = batch.column("key")
            flat = np.frombuffer(column.buffers()[1], dtype=np.uint64, count=2 * len(column))
            own = flat.reshape(-1, 2)[is_drawn]
            keys[:, filled : filled + len(own)] = own.T
            filled += len(own)
            seen += batch.num_rows
        progress("looking for duplicates", done, len(named))
    return keys


def _same_as_previous(keys: HashArray, order: IntArray) -> BoolArray:
    """Tell which keys, in this order, equal the one before: (keys - 1,)."""
    same = np.empty(max(len(order) - 1, 0), dtype=np.bool_)
    for start in range(0, len(same), _BLOCK):  # in blocks: a sorted copy of all keys is large
        ordered = keys[:, order[start : start + _BLOCK + 1]]
        same[start : start + _BLOCK] = (ordered[:, 1:] == ordered[:, :-1]).all(axis=0)
    return same


def _find_near(
    named: Sequence[NamedShard], stays: BoolArray, near: float, jobs: int, progress: LabelledCount
) -> list[_Repeat]:
    """Return the rows that are nearly the same as an earlier one that stays."""
    keys = _all_bands(named, stays, near, jobs, progress)
    rows = shards.Rows(named)
    ids = np.flatnonzero(stays)

    def views(place: int) -> tuple[set[str], ...]:
        # The smaller similarity of both views counts: a long system text that all rows share makes
        # no row a repeat of another, nor does a short question about different system texts.
        row = rows[int(ids[place])]
        everything = filters.shingles(message.content for message in row.messages)
        if row.messages[0].role == "system":
            return everything, filters.shingles(filters.spoken(row))
        return everything, everything

    def report(done: int, total: int) -> None:
        progress("comparing rows that may be near-duplicates", done, total)

    repeats = []
    for place, earlier, similarity in filters.near_duplicates(keys, views, near, report):
        repeats.append(_Repeat(int(ids[place]), int(ids[earlier]), similarity))
    return repeats


def _all_bands(
    named: Sequence[NamedShard], stays: BoolArray, near: float, jobs: int, progress: LabelledCount
) -> HashArray:
    """Return the MinHash bands of the rows that stay: (rows, bands)."""
    label = "looking for near-duplicates"
    own_shards = [shard for _, shard in named]
    ends = accumulate((shard.kept for shard in own_shards), initial=0)
    wanted = [stays[start:stop] for start, stop in pairwise(ends)]

    def collect(results: Iterable[HashArray]) -> HashArray:
        parts = [np.empty((0, 1), dtype=np.uint64)]
        for done, part in enumerate(results, 1):
            parts.append(part)
            progress(label, done, len(own_shards))
        return np.concatenate(parts[1:] or parts)

    if jobs == 1 or len(own_shards) < 2:
        return collect(map(partial(_bands, near), own_shards, wanted))
    try:
        with processes.start(min(jobs, len(own_shards))) as workers:
            return collect(workers.map(_bands, repeat(near), own_shards, wanted))
    except BrokenProcessPool as error:
        raise StoreError(
            f"{label}: a process died (killed, or out of memory); run again, with --jobs 1"
        ) from error


def _bands(near: float, shard: Shard, wanted: BoolArray) -> HashArray:
    """Return the bands of a shard's wanted rows. System texts do not count."""

    def shingles() -> Iterable[set[str]]:
        for row, is_wanted in zip(shards.table(shard)["messages"], wanted.tolist(), strict=True):
            if is_wanted:
                messages = json.loads(row.as_py())
                yield filters.shingles(text for role, text, _ in messages if role != "system")

    return filters.bands(shingles(), near)
