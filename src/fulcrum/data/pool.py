"""General data: a pool that stays on disk, and the selection of rows from it that may stand beside a task.

A `Pool` holds memory-mapped shards (`shards`) and one array: which of their rows are left once repeats are removed, which is
computed once for a set of sources and kept beside the shards. A row is read when asked for. `select` walks a seeded permutation
of the pool, or one of each source where these have weights, so a smaller selection is the beginning of a larger one.

Invariants: rows of the sources = rows of the pool + rows left out with a reason. Rows looked at = kept + rejected. No row of a
pool repeats another, and no kept one shares an n-gram with task data, or holds an anchor.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from fulcrum.config.base import GeneralSource
from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import Anchor, BoolArray, Example, IntArray, Reject
from fulcrum.data import dedup, filters, readers, shards
from fulcrum.data import sources as origins
from fulcrum.data.formats import normalise
from fulcrum.data.shards import Progress, Shard, silent

_TOLD = 1000  # rows between two tellings


@dataclass(frozen=True)
class Stretch:
    """The rows `start` to `stop` (not included) of a pool: those of one source."""

    source: GeneralSource
    start: int
    stop: int


class Pool:
    """Rows of several sources end to end. `len(pool)` counts them; `pool[i]` reads one.

    `stretches` are the sources' rows; `left_out` counts the rows that are not here by reason, `shown` are some of them;
    `notes` say what else the user should know, as that there are too many rows to look for near-duplicates.
    """

    def __init__(
        self, found: Sequence[tuple[str, Shard]], ids: npt.NDArray[np.int64], stretches: Sequence[Stretch],
        left_out: Mapping[str, int], shown: Sequence[Reject], notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Of the shards (with their origins' names), end to end, the rows `ids`, ascending."""
        self._rows, self._ids = shards.Rows(found), ids
        self.stretches, self.left_out, self.shown, self.notes = (
            stretches,
            left_out,
            shown,
            tuple(notes),
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Example:
        """Read row `index`, 0 <= index < len; IndexError beyond."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)}")
        return self._rows[int(self._ids[index])]

    def words(self) -> IntArray:
        """Words of every row: (len,)."""
        return self._rows.words()[self._ids]


def open_pool(
    sources: Sequence[GeneralSource],
    seed: int,
    *,
    near: float = 0.0,
    jobs: int = 1,
    progress: Progress = silent,
) -> Pool:
    """Open general data without reading their texts into memory; a source's `limit` draws rows by `seed`.

    What was not opened before is converted first, in `jobs` processes, and cleaned: damaged rows and repeats go (and, with
    `near` above 0, rows of at least so much Jaccard similarity to an earlier one, in pools of up to `clean.NEAR_ROWS` rows).
    Rows that a limit leaves undrawn make no other row a repeat. Raises DataError for missing, empty or broken files, and for
    columns that fit no format; StoreError where the disk refuses.
    """
    found: list[tuple[str, Shard]] = []
    bounds: list[tuple[int, int]] = []  # of each source, in rows of all shards
    folders: list[str] = []
    notes: list[str] = []
    for source in sources:
        if unknown := sorted(
            {*source.languages} - {*filters.languages()} if source.languages else ()
        ):
            raise DataError(
                f"{source.path}: languages: {unknown[0]!r} is no code that can be told"
                f"{nearest(unknown[0], filters.languages())}; codes are those of ISO 639-1, as en"
            )
        start = sum(shard.kept for _, shard in found)
        for origin in origins.origins(source):
            folders.append(str(shards.folder(origin)))
            notes += [origin.note] if origin.note else []
            found += [
                (origin.name, shard) for shard in shards.build(origin, jobs=jobs, progress=progress)
            ]
        if unread := readers.passed_over(source.path):
            more = f" and {len(unread) - 5:,} more" if len(unread) > 5 else ""
            notes.append(
                f"{source.path}: not read, being no data files: {', '.join(unread[:5])}{more}"
            )
        bounds.append((start, sum(shard.kept for _, shard in found)))
    left_out = Counter[str]()
    for _, shard in found:
        left_out.update(shard.left_out)
    shown = list(chain.from_iterable(shard.shown for _, shard in found))
    drawn = _drawn(sources, bounds, seed)
    count = int(drawn.sum())
    left_out["not drawn (limit)"] = len(drawn) - count
    ids, again, repeated = dedup.without_repeats(found, folders, drawn, near, jobs, progress)
    ends = [0, *(int(np.searchsorted(ids, stop)) for _, stop in bounds)]
    stretches = [Stretch(source, *own) for source, own in zip(sources, pairwise(ends), strict=True)]
    if near > 0 and count > filters.NEAR_ROWS:
        notes.append(
            f"near-duplicates are sought in pools of up to {filters.NEAR_ROWS:,} rows; this one has {count:,}: exact ones only"
        )
    return Pool(found, ids, stretches, dict(+left_out + Counter(again)), [*shown, *repeated], notes)


def _drawn(
    sources: Sequence[GeneralSource], bounds: Sequence[tuple[int, int]], seed: int
) -> BoolArray:
    """Which rows the sources' limits let in, drawn by the seed and the source's place: nested in the limit."""
    drawn = np.ones(bounds[-1][1] if bounds else 0, dtype=np.bool_)
    for place, (source, (start, stop)) in enumerate(zip(sources, bounds, strict=True)):
        if source.limit is not None:
            order = np.random.default_rng((seed, place)).permutation(stop - start)
            drawn[start + order[source.limit :]] = False
    return drawn


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
    tasks: Sequence[Sequence[Example]],
    anchors: Sequence[Anchor],
    apart: Sequence[Example] = (),
    near: float = 0.0,
    size: Callable[[Example], int] = lambda _: 1,
) -> Selection:
    """Keep the first `count` rows of a seeded permutation of the pool that may stand beside the tasks.

    Where sources have weights, each next row is of the source that is furthest behind its part, counted in `size` (1 a row, or
    its tokens). A row looked at and not kept is a Reject: sharing text with a row of `tasks` (all rows of each, dev and test
    among them) or of `apart` (general rows that are held out), at least `near` (above 0) like one, or whatever
    reason `fits` returns (None: it fits). Words are those of `clean.words`. Raises DataError where a row holds an anchor's
    text: that would teach the task's behaviour on general data, so it is refused rather than skipped.
    """
    examples: list[Example] = []
    ids: list[int] = []
    rejects: list[Reject] = []
    walk = _Walk(pool, seed)
    judge = _judge(tasks, anchors, near, apart)
    while len(examples) < count and (index := walk.next()) is not None:
        row = pool[index]
        refused = judge(row)
        if refused is None and (reason := fits(row)) is not None:
            refused = Reject(row.origin, reason)
        if refused is not None:
            rejects.append(refused)
            continue
        walk.took(size(row))
        examples.append(row)
        ids.append(index)
    exhausted = len(examples) < count
    # Where all sources ended, those that did so before the last one broke the weights.
    dry = tuple(filter(None, walk.dry[:-1] if exhausted else walk.dry))
    return Selection(examples, np.array(ids, dtype=np.int64), rejects, exhausted, dry)


def check(
    pool: Pool,
    rows: int,
    *,
    seed: int,
    tasks: Sequence[Sequence[Example]],
    anchors: Sequence[Anchor],
    near: float = 0.0,
    shown: int = 3,
    progress: Progress = silent,
) -> tuple[int, dict[str, int], list[Reject]]:
    """Look at up to `rows` rows of the pool in the order in which `select` does (weights count rows), keeping none in memory:
    how many may stand beside the tasks, how many may not by reason, and up to `shown` of each reason. Raises DataError as
    `select` does.
    """
    judge = _judge(tasks, anchors, near)
    counts, some, rows = Counter[str](), list[Reject](), min(rows, len(pool))
    walk, done = _Walk(pool, seed), 0
    while done < rows and (index := walk.next()) is not None:
        if done % _TOLD == 0:
            progress("comparing with the task's rows", done, rows)
        done += 1
        if (refused := judge(pool[index])) is not None:
            counts[refused.reason] += 1
            some += [refused] if counts[refused.reason] <= shown else []
        else:
            walk.took(1)
    progress("comparing with the task's rows", done, done)
    return done - counts.total(), dict(counts), some


def _judge(
    tasks: Sequence[Sequence[Example]],
    anchors: Sequence[Anchor],
    near: float,
    apart: Sequence[Example] = (),
) -> Callable[[Example], Reject | None]:
    """What says why a row may not stand beside the tasks; None: it may."""
    task_text, held_out = (
        filters.TaskText(tasks, near),
        filters.TaskText([apart], near, sampled=True),
    )
    anchor_texts = [text for text in (normalise(anchor.text) for anchor in anchors) if text]

    def judge(row: Example) -> Reject | None:
        _refuse_anchors(row, anchor_texts)
        return task_text.shared(row) or held_out.shared(row)

    return judge


class _Walk:
    """The order in which a pool's rows are looked at: a seeded permutation of all, or of each source with a weight."""

    def __init__(self, pool: Pool, seed: int) -> None:
        weighted = [part for part in pool.stretches if part.source.weight is not None]
        bounds = [(part.start, part.stop) for part in weighted] or [(0, len(pool))]
        self._weights = [part.source.weight or 1.0 for part in weighted] or [1.0]
        self._names = [part.source.path for part in weighted] or [""]
        self._used = [0.0] * len(bounds)
        self._rows = [
            iter(
                start
                + np.random.default_rng((seed, place) if place else seed).permutation(stop - start)
            )
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
