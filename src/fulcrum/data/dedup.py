"""Rows of general data that repeat an earlier one, exactly or nearly: looked for once in a set of sources, then kept beside
their shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulcrum.core import processes, store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import BoolArray, Reject
from fulcrum.data import filters, shards
from fulcrum.data.shards import Progress, Shard

_ROWS, _COUNTS = "rows.npy", "left_out.json"  # what is kept of a set of sources
_BLOCK = 2**20  # keys that are compared at a time


def without_repeats(
    found: Sequence[tuple[str, Shard]],
    folders: Sequence[str],
    drawn: BoolArray,
    near: float,
    jobs: int,
    progress: Progress,
) -> tuple[npt.NDArray[np.int64], dict[str, int], list[Reject]]:
    """The `drawn` ones (of all shards' rows end to end) that repeat no earlier one of these, ascending; how many do, and some
    of them. Computed once, then kept. Raises StoreError where the disk refuses."""
    total = int(drawn.sum())
    near = near if total <= filters.NEAR_ROWS else 0.0
    some_only = None if drawn.all() else hashlib.sha256(np.packbits(drawn).tobytes()).hexdigest()
    known_by = [shards.VERSION, list(folders), some_only, near]
    folder = store.cache_dir() / "pools" / "sets" / store.fingerprint(known_by)[:32]
    known = _kept(folder, total)
    try:
        if known is None:  # before any lock: a cache may be read-only
            label = "waiting for another process that looks for duplicates"
            with store.locked(folder, lambda done: progress(label, done, 1)):
                known = _kept(folder, total)
                if known is None:
                    known = _look(found, folder, drawn, near, jobs, progress)
    except OSError as error:
        raise shards.unwritable(folder, error) from error
    ids, described = known
    repeats = {reason: count for reason, (count, _) in described.items() if count}
    shown = [
        Reject(f"{found[a][0]}:{line}", reason, f"{'same as' if value == 1 else f'{value:.0%} like'} {found[b][0]}:{twin}")
        for reason, (_, some) in described.items() for a, line, b, twin, value in some
    ]  # fmt: skip
    return ids, repeats, shown


Known = tuple[
    npt.NDArray[np.int64], dict[str, Any]
]  # rows that stay; the others by reason, with some of them


def _kept(folder: Path, total: int) -> Known | None:
    """What was found of these rows before, where it is whole."""
    described = store.recalled(folder / _COUNTS)
    try:
        ids = (
            np.load(folder / _ROWS, mmap_mode="r")
            if total and described
            else np.empty(0, dtype=np.int64)
        )
    except (OSError, ValueError, EOFError):  # missing, damaged, empty
        return None
    return (
        (ids, described)
        if described and len(ids) + sum(count for count, _ in described.values()) == total
        else None
    )


def _look(
    found: Sequence[tuple[str, Shard]], folder: Path, drawn: BoolArray, near: float, jobs: int, progress: Progress
) -> Known:  # fmt: skip
    """Look for repeats, and keep what is found."""
    stays, same = _exact(found, drawn, progress)
    alike = _near(found, stays, near, jobs, progress) if near else []
    stays[[row for row, *_ in alike]] = False
    ids = np.flatnonzero(stays)
    described = {
        "duplicate": [int(drawn.sum()) - len(ids) - len(alike), _some(found, same)],
        "near-duplicate": [len(alike), _some(found, alike)],
    }
    store.write_array(folder / _ROWS, ids)
    store.write_json(folder / _COUNTS, described)
    return ids, described


Twin = tuple[int, int, float]  # a row, the earlier row that stays, their similarity


def _exact(
    found: Sequence[tuple[str, Shard]], drawn: BoolArray, progress: Progress
) -> tuple[BoolArray, list[Twin]]:
    """Which of the drawn rows have a content that no earlier one has: as long as `drawn`; and some of the others."""
    total = int(drawn.sum())
    keys = np.empty((2, total), dtype=np.uint64)  # 128 bits of SHA-256 a row
    start = seen = 0
    for place, (_, shard) in enumerate(found, 1):
        for batch in shards.batches(shard):
            own, taken = batch.column("key"), drawn[seen : seen + batch.num_rows]
            flat = np.frombuffer(own.buffers()[1], dtype=np.uint64, count=2 * len(own)).reshape(
                -1, 2
            )[taken]
            keys[:, start : start + len(flat)] = flat.T
            start, seen = start + len(flat), seen + batch.num_rows
        progress("looking for duplicates", place, len(found))
    order = np.lexsort(keys)  # stable: equal keys stay in the order of their rows
    same = np.empty(max(total - 1, 0), dtype=np.bool_)
    for start in range(
        0, len(same), _BLOCK
    ):  # in blocks: at its peak all this takes some 32 bytes a row
        ordered = keys[:, order[start : start + _BLOCK + 1]]
        same[start : start + _BLOCK] = (ordered[:, 1:] == ordered[:, :-1]).all(axis=0)
    del keys
    rows, stays = np.flatnonzero(drawn), drawn.copy()
    stays[rows[order[1:][same]]] = False
    some = []
    for place in np.flatnonzero(same)[: shards.SHOWN]:
        first = int(place)
        while first and same[first - 1]:
            first -= 1
        some.append((int(rows[order[place + 1]]), int(rows[order[first]]), 1.0))
    return stays, some


def _near(
    found: Sequence[tuple[str, Shard]], stays: BoolArray, near: float, jobs: int, progress: Progress
) -> list[Twin]:
    """Rows nearly the same as an earlier one that stays."""
    label, of_shard = "looking for near-duplicates", [shard for _, shard in found]
    ends = [0, *accumulate(shard.kept for shard in of_shard)]
    wanted = [
        stays[start:stop] for start, stop in pairwise(ends)
    ]  # others are not drawn, or gone: a limit saves their time
    parts: list[npt.NDArray[np.uint64]] = []

    def collect(results: Iterator[npt.NDArray[np.uint64]]) -> None:
        for place, part in enumerate(results, 1):
            parts.append(part)
            progress(label, place, len(of_shard))

    if jobs == 1 or len(of_shard) < 2:
        collect(map(partial(_bands, near), of_shard, wanted))
    else:
        try:
            with processes.start(min(jobs, len(of_shard))) as workers:
                collect(workers.map(_bands, repeat(near), of_shard, wanted))
        except BrokenProcessPool as error:
            raise StoreError(
                f"{label}: a process died (killed, or out of memory); run again, with --jobs 1"
            ) from error
    keys = np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.uint64)
    rest, everywhere = shards.Rows(found), np.flatnonzero(stays)

    def of(row: int) -> tuple[set[str], ...]:
        found = rest[int(everywhere[row])]
        everything = filters.shingles(message.content for message in found.messages)
        # The less like of both: a long system text that all rows share makes none a repeat of another, nor does the same short
        # question about another text in the system's place.
        return everything, filters.shingles(filters.spoken(found)) if found.messages[
            0
        ].role == "system" else everything

    def told(done: int, total: int) -> None:
        progress("comparing rows that may be near-duplicates", done, total)

    pairs = filters.near_duplicates(keys, of, near, told)
    return [
        (int(everywhere[row]), int(everywhere[earlier]), similarity)
        for row, earlier, similarity in pairs
    ]


def _bands(near: float, shard: Shard, wanted: BoolArray) -> npt.NDArray[np.uint64]:
    """The bands of a shard's rows that are wanted."""
    rows = zip(shards.table(shard)["messages"], wanted.tolist(), strict=True)
    texts = (json.loads(row.as_py()) for row, is_wanted in rows if is_wanted)
    return filters.bands(
        (filters.shingles(text for role, text, _ in row if role != "system") for row in texts), near
    )


def _some(
    found: Sequence[tuple[str, Shard]], twins: Sequence[Twin]
) -> list[tuple[int, int, int, int, float]]:
    """Some pairs as (shard, line, shard of the earlier row, its line, similarity): lines, since a file's name may change."""
    rows = shards.Rows(found)
    return [
        (*rows.line(row), *rows.line(earlier), similarity)
        for row, earlier, similarity in sorted(twins)[: shards.SHOWN]
    ]
