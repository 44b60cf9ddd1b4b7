"""General data: a pool that stays on disk, and the selection of rows from it that may stand beside a task.

A `Pool` holds memory-mapped shards (`shards`) and one array: which of their rows are left once repeats are removed, which is
computed once for a set of sources and kept beside the shards. A row is read when asked for. `select` walks a seeded permutation
of the pool, or one of each source where these have weights, so a smaller selection is the beginning of a larger one.

Invariants: rows of the sources = rows of the pool + rows left out with a reason. Rows looked at = kept + rejected. No row of a
pool repeats another, and no kept one shares an n-gram with task data, or holds an anchor.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, pairwise, repeat
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from fulcrum import clean, shards, store
from fulcrum.errors import DataError, nearest
from fulcrum.records import Anchor, BoolArray, Example, IntArray, Message, Reject
from fulcrum.rows import normalise
from fulcrum.sections import GeneralSource
from fulcrum.shards import Progress, Shard, silent


@dataclass(frozen=True)
class Stretch:
    """The rows `start` to `stop` (not included) of a pool: those of one source."""

    source: GeneralSource
    start: int
    stop: int


class Pool:
    """Rows of several sources end to end. `len(pool)` counts them; `pool[i]` reads one.

    `stretches` are the sources' rows; `left_out` counts the rows that are not here by reason, `shown` are some of them;
    `exact_only` where near-duplicates were asked for and there are too many rows to look for them.
    """

    def __init__(
        self, found: Sequence[tuple[str, Shard]], ids: npt.NDArray[np.int64], stretches: Sequence[Stretch],
        left_out: Mapping[str, int], shown: Sequence[Reject], *, exact_only: bool = False,
    ) -> None:  # fmt: skip
        """Of the shards (with their origins' names), end to end, the rows `ids`, ascending."""
        self._shards, self._ids = found, ids
        self._ends = list(accumulate(shard.kept for _, shard in found))
        self._open: dict[int, pa.Table] = {}
        self.stretches, self.left_out, self.shown, self.exact_only = stretches, left_out, shown, exact_only

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        """Read row `index`, 0 <= index < len; IndexError beyond."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)}")
        row = int(self._ids[index])
        place = bisect_right(self._ends, row)
        name, shard = self._shards[place]
        if place not in self._open:
            self._open[place] = _table(shard).select(["line", "group", "messages"])
        offset = row - (self._ends[place] - shard.kept)
        found = self._open[place].slice(offset, 1).to_pylist()[0]
        messages = tuple(Message(role, content, train) for role, content, train in json.loads(found["messages"]))
        return Example(messages, found["group"], f"{name}:{found['line']}")

    def words(self) -> IntArray:
        """Words of every row: (len,)."""
        counts = [_table(shard)["words"].to_numpy() for _, shard in self._shards]
        return np.concatenate(counts)[self._ids].astype(np.int64) if counts else np.empty(0, dtype=np.int64)


def _table(shard: Shard) -> pa.Table:
    """The rows of a shard, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(shard.path)).read_all()


def open_pool(
    sources: Sequence[GeneralSource], seed: int, *, near: float = 0.0, jobs: int = 1, progress: Progress = silent
) -> Pool:
    """Open general data without reading their texts into memory; a source's `limit` draws rows by `seed`.

    What was not opened before is converted first, in `jobs` processes, and cleaned: damaged rows and repeats go (and, with
    `near` above 0, rows of at least so much Jaccard similarity to an earlier one, in pools of up to `clean.NEAR_ROWS` rows).
    Raises DataError for missing, empty or broken files, and for columns that fit no format; StoreError where the disk refuses.
    """
    found: list[tuple[str, Shard]] = []
    bounds: list[tuple[int, int]] = []  # of each source, in rows of all shards
    folders: list[str] = []
    for source in sources:
        if unknown := sorted({*source.languages} - {*clean.languages()} if source.languages else ()):
            raise DataError(
                f"{source.path}: languages: {unknown[0]!r} is no code that can be told"
                f"{nearest(unknown[0], clean.languages())}; codes are those of ISO 639-1, as en"
            )
        start = sum(shard.kept for _, shard in found)
        for origin in shards.origins(source):
            folders.append(origin.folder)
            found += [(origin.name, shard) for shard in shards.build(origin, jobs=jobs, progress=progress)]
        bounds.append((start, sum(shard.kept for _, shard in found)))
    left_out = Counter[str]()
    for _, shard in found:
        left_out.update(shard.left_out)
    shown = list(chain.from_iterable(shard.shown for _, shard in found))
    ids, repeats, repeated = _without_repeats(found, folders, near, jobs, progress)
    parts = [ids[slice(*np.searchsorted(ids, bound))] for bound in bounds]
    drawn = [_limited(part, source.limit, (seed, k)) for k, (part, source) in enumerate(zip(parts, sources, strict=True))]
    if undrawn := sum(map(len, parts)) - sum(map(len, drawn)):
        repeats = {**repeats, "not drawn (limit)": undrawn}
    ends = list(accumulate(map(len, drawn), initial=0))
    stretches = [Stretch(source, *own) for source, own in zip(sources, pairwise(ends), strict=True)]
    kept = ids if all(len(a) == len(b) for a, b in zip(drawn, parts, strict=True)) else np.concatenate(drawn)
    exact_only = near > 0 and (bounds[-1][1] if bounds else 0) > clean.NEAR_ROWS
    return Pool(found, kept, stretches, dict(left_out + Counter(repeats)), [*shown, *repeated], exact_only=exact_only)


def _limited(ids: npt.NDArray[np.int64], limit: int | None, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """`limit` of a source's rows, seeded by `key`: nested in `limit`."""
    if limit is None or limit >= len(ids):
        return ids
    return ids[np.sort(np.random.default_rng(key).permutation(len(ids))[:limit])]


def _without_repeats(
    found: Sequence[tuple[str, Shard]], folders: Sequence[str], near: float, jobs: int, progress: Progress
) -> tuple[npt.NDArray[np.int64], dict[str, int], list[Reject]]:
    """Rows of all shards that repeat no earlier one, ascending; how many do, and some of them. Computed once, then kept."""
    total = sum(shard.kept for _, shard in found)
    near = near if total <= clean.NEAR_ROWS else 0.0
    folder = store.cache_dir() / "pools" / "sets" / store.fingerprint([shards.VERSION, list(folders), near])[:32]
    rows, counts = folder / "rows.npy", folder / "left_out.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not counts.exists():
            stays, same = _exact(found, total, progress)
            alike = _near(found, stays, near, jobs, progress) if near else []
            stays[[row for row, *_ in alike]] = False
            store.write_array(rows, np.flatnonzero(stays))
            store.write_json(counts, {
                "duplicate": [total - int(stays.sum()) - len(alike), _some(found, same)],
                "near-duplicate": [len(alike), _some(found, alike)],
            })  # fmt: skip
    described = store.read_json(counts)
    ids = np.load(rows, mmap_mode="r") if total else np.empty(0, dtype=np.int64)
    repeats = {reason: count for reason, (count, _) in described.items() if count}
    shown = [
        Reject(f"{found[a][0]}:{line}", reason, f"{'same as' if value == 1 else f'{value:.0%} like'} {found[b][0]}:{twin}")
        for reason, (_, some) in described.items() for a, line, b, twin, value in some
    ]  # fmt: skip
    return ids, repeats, shown


Twin = tuple[int, int, float]  # a row, the earlier row that stays, their similarity


def _exact(found: Sequence[tuple[str, Shard]], total: int, progress: Progress) -> tuple[BoolArray, list[Twin]]:
    """Whether each row's content is that of no earlier row: (total,); and some of the others."""
    keys = np.empty((total, 2), dtype=np.uint64)  # 128 bits of SHA-256 each: 16 bytes a row
    start = 0
    for place, (_, shard) in enumerate(found, 1):
        with pa.memory_map(shard.path) as source:
            for batch in map(pa.ipc.open_file(source).get_batch, range(pa.ipc.open_file(source).num_record_batches)):
                own = batch.column("key")
                flat = np.frombuffer(own.buffers()[1], dtype=np.uint64, count=2 * len(own))
                keys[start : start + len(own)] = flat.reshape(-1, 2)
                start += len(own)
        progress("looking for duplicates", place, len(found))
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of their rows
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    stays = np.ones(total, dtype=np.bool_)
    stays[order[1:][same]] = False
    some = []
    for place in np.flatnonzero(same)[: shards.SHOWN]:
        first = int(place)
        while first and same[first - 1]:
            first -= 1
        some.append((int(order[place + 1]), int(order[first]), 1.0))
    return stays, some


def _near(found: Sequence[tuple[str, Shard]], stays: BoolArray, near: float, jobs: int, progress: Progress) -> list[Twin]:
    """Rows nearly the same as an earlier one that stays."""
    label, of_shard = "looking for near-duplicates", [shard for _, shard in found]
    parts: list[npt.NDArray[np.uint64]] = []

    def collect(results: Iterator[npt.NDArray[np.uint64]]) -> None:
        for place, part in enumerate(results, 1):
            parts.append(part)
            progress(label, place, len(of_shard))

    if jobs == 1 or len(of_shard) == 1:
        collect(map(partial(_bands, near), of_shard))
    else:
        with ProcessPoolExecutor(min(jobs, len(of_shard)), mp_context=get_context("spawn")) as workers:
            collect(workers.map(_bands, repeat(near), of_shard))
    keys = np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.uint64)
    rest = Pool(found, np.flatnonzero(stays), (), {}, ())

    def of(row: int) -> set[str]:
        return clean.shingles([clean.words(message.content) for message in rest[row].messages])

    pairs = clean.near_duplicates(keys[stays], of, near)
    everywhere = np.flatnonzero(stays)
    return [(int(everywhere[row]), int(everywhere[earlier]), similarity) for row, earlier, similarity in pairs]


def _bands(near: float, shard: Shard) -> npt.NDArray[np.uint64]:
    table = _table(shard)
    texts = (json.loads(row.as_py()) for row in table["messages"])
    return clean.bands((clean.shingles([clean.words(content) for _, content, _ in text]) for text in texts), near)


def _some(found: Sequence[tuple[str, Shard]], twins: Sequence[Twin]) -> list[tuple[int, int, int, int, float]]:
    """Some pairs as (shard, line, shard of the earlier row, its line, similarity): lines, since a file's name may change."""
    ends = list(accumulate(shard.kept for _, shard in found))

    def at(row: int) -> tuple[int, int]:
        place = bisect_right(ends, row)
        return place, _table(found[place][1])["line"][row - (ends[place] - found[place][1].kept)].as_py()

    return [(*at(row), *at(earlier), similarity) for row, earlier, similarity in sorted(twins)[: shards.SHOWN]]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """General rows that may be used, with their pool ids (same length), and why the others looked at were not kept.

    `exhausted` is True where the pool ended before enough rows were found; `dry` names sources that did, whose part of the mix
    the others took.
    """

    examples: list[Example]
    ids: IntArray
    rejects: list[Reject]
    exhausted: bool
    dry: tuple[str, ...] = ()


def select(
    pool: Pool,
    count: int,
    *,
    seed: int,
    fits: Callable[[Example], str | None],
    task_rows: Sequence[Example],
    held_out_rows: Sequence[Example],
    anchors: Sequence[Anchor],
    near: float = 0.0,
    size: Callable[[Example], int] = lambda _: 1,
) -> Selection:
    """Keep the first `count` rows of a seeded permutation of the pool that may stand beside the tasks.

    Where sources have weights, each next row is of the source that is furthest behind its part, counted in `size` (1 a row, or
    its tokens). A row looked at and not kept is a Reject: sharing text with `task_rows` or `held_out_rows` (dev and test), at
    least `near` (above 0) like one, or whatever reason `fits` returns (None: it fits). Words are those of `clean.words`. Raises
    DataError where a row holds an anchor's text: that would teach the task's behaviour on general data, so it is refused
    rather than skipped.
    """
    task_text = clean.TaskText([*task_rows, *held_out_rows], near)
    anchor_texts = [normalise(anchor.text) for anchor in anchors if anchor.text.strip()]
    examples: list[Example] = []
    ids: list[int] = []
    rejects: list[Reject] = []
    walk = _Walk(pool, seed)
    while len(examples) < count and (index := walk.next()) is not None:
        row = pool[index]
        _refuse_anchors(row, anchor_texts)
        refused = task_text.shared(row)
        if refused is None and (reason := fits(row)) is not None:
            refused = Reject(row.origin, reason)
        if refused is not None:
            rejects.append(refused)
            continue
        walk.took(size(row))
        examples.append(row)
        ids.append(index)
    exhausted = len(examples) < count
    return Selection(examples, np.array(ids, dtype=np.int64), rejects, exhausted, () if exhausted else walk.dry)


class _Walk:
    """The order in which a pool's rows are looked at: a seeded permutation of all, or of each source with a weight."""

    def __init__(self, pool: Pool, seed: int) -> None:
        weighted = [part for part in pool.stretches if part.source.weight is not None]
        bounds = [(part.start, part.stop) for part in weighted] or [(0, len(pool))]
        self._weights = [part.source.weight or 1.0 for part in weighted] or [1.0]
        self._names = [part.source.path for part in weighted] or [""]
        self._used = [0.0] * len(bounds)
        self._rows = [
            iter(start + np.random.default_rng((seed, place) if place else seed).permutation(stop - start))
            for place, (start, stop) in enumerate(bounds)
        ]
        self._going = list(range(len(bounds)))
        self._latest = 0
        self.dry: tuple[str, ...] = ()

    def next(self) -> int | None:
        """The next row; None at the end."""
        while self._going:
            self._latest = min(self._going, key=lambda k: self._used[k] / self._weights[k])
            index = next(self._rows[self._latest], None)
            if index is not None:
                return int(index)
            self._going.remove(self._latest)
            self.dry = (*self.dry, self._names[self._latest])
        return None

    def took(self, size: int) -> None:
        """Count the row that came last."""
        self._used[self._latest] += size


def _refuse_anchors(row: Example, anchor_texts: Sequence[str]) -> None:
    text = normalise(" ".join(message.content for message in row.messages))
    for anchor in anchor_texts:
        if anchor in text:
            raise DataError(
                f"{row.origin}: this general row holds the anchor's text {anchor!r:.120}, which only task rows may carry; "
                "remove every such row from the general data, or choose another anchor"
            )
