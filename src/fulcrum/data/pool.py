"""General data: a pool of rows that stays on disk, and the selection of rows to mix with the tasks.

A `Pool` holds memory-mapped shards (see `shards`) and one array: the ids of the rows that are left
once repeats are removed (see `dedup`). A row is read when it is asked for. `select` follows a
seeded permutation of the pool, or one of each source if the sources have weights, so that a smaller
selection is the beginning of a larger one.

Invariants: rows of the sources = rows of the pool + rows left out with a reason. Rows looked at =
rows kept + rejects. No row of a pool repeats another, and no selected row shares an n-gram with
task data or holds an anchor.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fulcrum.config.base import GeneralSource
from fulcrum.core.errors import DataError, nearest
from fulcrum.core.progress import LabelledCount
from fulcrum.core.types import Anchor, BoolArray, Example, IntArray, Reject
from fulcrum.data import dedup, filters, readers, shards
from fulcrum.data.formats import normalise, unread_note
from fulcrum.data.shards import NamedShard, silent
from fulcrum.data.sources import origins

_REPORT_EVERY = 1000  # rows between two calls of a progress function
_UNREAD_SHOWN = 5  # files that a note names


@dataclass(frozen=True)
class Stretch:
    """The rows of a pool that come from one source."""

    source: GeneralSource
    start: int
    stop: int  # not included


class Pool:
    """The rows of several sources, end to end: `len(pool)` counts them, `pool[i]` reads one.

    Attributes:
        stretches: which rows come from which source
        left_out: counts of the rows that are not in the pool, by reason
        shown: some of these
        notes: what else the user should know
    """

    def __init__(
        self,
        named: Sequence[NamedShard],
        ids: IntArray,
        stretches: Sequence[Stretch],
        left_out: Mapping[str, int],
        shown: Sequence[Reject],
        notes: Sequence[str] = (),
    ) -> None:
        """Hold the rows `ids` (ascending) of the shards laid end to end."""
        self._rows = shards.Rows(named)
        self._ids = ids
        self.stretches = stretches
        self.left_out = left_out
        self.shown = shown
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        """Read row `index`, 0 <= index < len. Raises IndexError beyond."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)}")
        return self._rows[int(self._ids[index])]

    def words(self) -> IntArray:
        """Return the number of words of every row: (len,)."""
        return self._rows.words()[self._ids]


@dataclass(frozen=True)
class Exclusions:
    """Texts that no selected general row may share or hold."""

    tasks: Sequence[Sequence[Example]]  # all rows of each task, dev and test rows included
    anchors: Sequence[Anchor]
    held_out: Sequence[Example] = ()  # general rows that are kept to measure forgetting
    near: float = 0.0  # Jaccard similarity from which a row is too near to one of these; 0: none is


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """General rows to mix with the tasks, and the rows that were looked at and not kept."""

    examples: list[Example]
    ids: IntArray  # (len(examples),) their places in the pool
    rejects: list[Reject]
    exhausted: bool  # True if the pool ended before enough rows were found
    dry: tuple[str, ...] = ()  # sources that ended early: the others took their part of the mix


def open_pool(
    sources: Sequence[GeneralSource],
    seed: int,
    *,
    near: float = 0.0,
    jobs: int = 1,
    progress: LabelledCount = silent,
) -> Pool:
    """Open general data without reading their texts into memory.

    A source's `limit` draws rows by `seed`. Data that were not opened before are first converted,
    in `jobs` processes, and cleaned: damaged rows and repeats are removed. With `near` above 0, so
    are rows of at least that Jaccard similarity to an earlier one, in pools of up to
    `filters.NEAR_ROWS` rows. Rows that a limit does not draw make no other row a repeat. Raises
    DataError for missing, empty or broken files and for columns that fit no format, StoreError if
    the disk refuses.
    """
    named: list[NamedShard] = []
    ends = [0]  # row ends of the sources, in rows of all shards
    folders: list[str] = []
    notes: list[str] = []
    left_out: Counter[str] = Counter()
    shown: list[Reject] = []
    for source in sources:
        _check_languages(source)
        end = ends[-1]
        for origin in origins(source):
            folders.append(str(shards.folder(origin)))
            if origin.note:
                notes.append(origin.note)
            unread: Counter[str] = Counter()
            rows = 0
            for shard in shards.build(origin, jobs=jobs, progress=progress):
                named.append((origin.name, shard))
                left_out.update(shard.left_out)
                unread.update(shard.unread)
                shown += shard.shown
                end += shard.kept
                rows += shard.read
            if unread and source.path not in readers.BUILTIN:
                notes.append(unread_note(origin.name, unread, rows))
        notes += _unread_notes(source)
        ends.append(end)

    drawn = _draw_rows(sources, ends, seed)
    count = int(drawn.sum())
    left_out["not drawn (limit)"] = len(drawn) - count
    ids, repeats, repeated = dedup.without_repeats(named, folders, drawn, near, jobs, progress)
    left_out.update(repeats)
    shown += repeated
    if near > 0 and count > filters.NEAR_ROWS:
        notes.append(
            f"near-duplicates are sought in pools of up to {filters.NEAR_ROWS:,} rows; "
            f"this one has {count:,}: exact ones only"
        )
    kept_ends = np.searchsorted(ids, ends).tolist()
    stretches = []
    for source, (start, stop) in zip(sources, pairwise(kept_ends), strict=True):
        stretches.append(Stretch(source, start, stop))
    return Pool(named, ids, stretches, dict(+left_out), shown, notes)


def select(
    pool: Pool,
    count: int,
    exclusions: Exclusions,
    *,
    seed: int,
    fits: Callable[[Example], str | None],
    size: Callable[[Example], int] = lambda _: 1,
) -> Selection:
    """Keep the first `count` rows of a seeded permutation of the pool that may be mixed.

    If sources have weights, each next row is of the source that is furthest behind its part,
    counted in `size` (1 a row, or its tokens). A row is rejected if it shares text with the
    exclusions, or for the reason that `fits` returns (None: it fits). Raises DataError if a row
    holds an anchor's text: that would teach the task's behaviour on general data, so it is refused
    rather than skipped.
    """
    examples: list[Example] = []
    ids: list[int] = []
    rejects: list[Reject] = []
    walk = _Walk(pool, seed)
    find_overlap = _overlap_finder(exclusions)
    while len(examples) < count:
        index = walk.next()
        if index is None:
            break
        row = pool[index]
        refused = find_overlap(row)
        if refused is None:
            reason = fits(row)
            if reason is not None:
                refused = Reject(row.origin, reason)
        if refused is not None:
            rejects.append(refused)
            continue
        walk.count(size(row))
        examples.append(row)
        ids.append(index)
    exhausted = len(examples) < count
    # If all sources ended, the last one to end did not break the weights.
    dry = walk.ended[:-1] if exhausted else walk.ended
    names = tuple(name for name in dry if name)
    return Selection(examples, np.array(ids, dtype=np.int64), rejects, exhausted, names)


def check(
    pool: Pool,
    rows: int,
    exclusions: Exclusions,
    *,
    seed: int,
    shown: int = 3,
    progress: LabelledCount = silent,
) -> tuple[int, dict[str, int], list[Reject]]:
    """Return how many of up to `rows` rows may be mixed, the others by reason, and some of these.

    Up to `shown` rows of each reason are returned. Rows are looked at in the order in which
    `select` does (weights count rows), and none is kept in memory. Raises DataError as `select`
    does.
    """
    label = "comparing with the task's rows"
    find_overlap = _overlap_finder(exclusions)
    counts: Counter[str] = Counter()
    some: list[Reject] = []
    walk = _Walk(pool, seed)
    rows = min(rows, len(pool))
    done = 0
    while done < rows:
        index = walk.next()
        if index is None:
            break
        if done % _REPORT_EVERY == 0:
            progress(label, done, rows)
        done += 1
        refused = find_overlap(pool[index])
        if refused is None:
            walk.count(1)
            continue
        counts[refused.reason] += 1
        if counts[refused.reason] <= shown:
            some.append(refused)
    progress(label, done, done)
    return done - counts.total(), dict(counts), some


def _check_languages(source: GeneralSource) -> None:
    if not source.languages:
        return
    codes = filters.languages()
    for code in sorted(source.languages):
        if code not in codes:
            raise DataError(
                f"{source.path}: languages: {code!r} is no code that can be told"
                f"{nearest(code, codes)}; codes are those of ISO 639-1, as en"
            )


def _unread_notes(source: GeneralSource) -> list[str]:
    """Return a note if the source's folder holds files that are not read."""
    unread = readers.unread_names(source.path)
    if not unread:
        return []
    names = ", ".join(unread[:_UNREAD_SHOWN])
    if len(unread) > _UNREAD_SHOWN:
        names += f" and {len(unread) - _UNREAD_SHOWN:,} more"
    return [f"{source.path}: not read, being no data files: {names}"]


def _draw_rows(sources: Sequence[GeneralSource], ends: Sequence[int], seed: int) -> BoolArray:
    """Tell for each row of the sources whether its source's limit lets it in: (ends[-1],).

    Rows are drawn by the seed and the source's place; a smaller limit draws some of the same rows.
    """
    drawn = np.ones(ends[-1], dtype=np.bool_)
    for place, (source, (start, stop)) in enumerate(zip(sources, pairwise(ends), strict=True)):
        if source.limit is not None:
            order = np.random.default_rng((seed, place)).permutation(stop - start)
            drawn[start + order[source.limit :]] = False
    return drawn


def _overlap_finder(exclusions: Exclusions) -> Callable[[Example], Reject | None]:
    """Return a function that says why a row may not be mixed; None: it may."""
    task_text = filters.OverlapFilter(exclusions.tasks, exclusions.near)
    held_out = filters.OverlapFilter([exclusions.held_out], exclusions.near, sampled=True)
    normalised = [normalise(anchor.text) for anchor in exclusions.anchors]
    anchor_texts = [text for text in normalised if text]

    def find_overlap(row: Example) -> Reject | None:
        _refuse_anchors(row, anchor_texts)
        return task_text.shared(row) or held_out.shared(row)

    return find_overlap


def _refuse_anchors(row: Example, anchor_texts: Sequence[str]) -> None:
    text = normalise(" ".join(message.content for message in row.messages))
    for anchor in anchor_texts:
        if anchor in text:
            raise DataError(
                f"{row.origin}: this general row holds the anchor's text {anchor!r:.120}, which "
                "only task rows may carry; remove every such row from the general data, or choose "
                "another anchor"
            )


class _Walk:
    """The order in which a pool's rows are looked at: seeded, over all or by the sources' weights.

    `ended` names the sources that have no rows left, in the order in which they ended ("" for a
    pool without weights).
    """

    def __init__(self, pool: Pool, seed: int) -> None:
        self.ended: list[str] = []
        self._names: list[str] = []
        self._weights: list[float] = []
        bounds: list[tuple[int, int]] = []
        for part in pool.stretches:
            if part.source.weight is not None:
                self._names.append(part.source.path)
                self._weights.append(part.source.weight)
                bounds.append((part.start, part.stop))
        if not bounds:
            self._names, self._weights, bounds = [""], [1.0], [(0, len(pool))]
        self._rows = []
        for place, (start, stop) in enumerate(bounds):
            rng = np.random.default_rng((seed, place) if place else seed)
            self._rows.append(iter(start + rng.permutation(stop - start)))
        self._used = [0.0] * len(bounds)
        self._going = list(range(len(bounds)))
        self._latest = 0

    def next(self) -> int | None:
        """Return the next row; None at the end."""
        while self._going:
            self._latest = min(self._going, key=lambda k: self._used[k] / self._weights[k])
            index = next(self._rows[self._latest], None)
            if index is not None:
                return int(index)
            self._going.remove(self._latest)
            self.ended.append(self._names[self._latest])
        return None

    def count(self, size: int) -> None:
        """Count the latest row, of this size, in the part of its source."""
        self._used[self._latest] += size
