"""General rows: those of pools that may stand beside a run's tasks, as many as its longest mixture needs.

Needs a tokenizer (to know how long a row is) and no model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from fulcrum import choose, encode, ingest, labelled, pool
from fulcrum.config import Arm, Settings
from fulcrum.errors import DataError
from fulcrum.records import Anchor, Example, Reject, Task
from fulcrum.rows import content_key
from fulcrum.sections import DataSource, GeneralSource
from fulcrum.store import seed_for

_LENGTH_SAMPLE = 256  # general rows whose mean length stands for all, where a mix counts tokens


@dataclass
class Drawn:
    """What the pools give a run: see `RunData` for the parts; `rejects` are rows looked at and not kept, `left_out` counts
    those that never were."""

    repeats: tuple[int, ...]
    general: tuple[Example, ...] = ()
    candidates: tuple[Example, ...] = ()
    own: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    held_out: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, name: str, found: pool.Selection, opened: pool.Pool) -> None:
        """Keep account of what was not taken."""
        self.left_out |= {f"{name}: {reason}": count for reason, count in opened.left_out.items()}
        self.rejects += [Reject(r.origin, f"{name}: {r.reason}", r.detail) for r in found.rejects]
        self.notes += [
            f"{name}: {source}: too few usable rows for its weight; the others gave the rest" for source in found.dry
        ]
        self.notes += [f"{name}: {note}" for note in opened.notes]


def draw(
    settings: Settings, tokenizer: encode.Tokenizer, context: int | None, tasks: Sequence[Task], seed: int,
    *, whole: Sequence[Task], once: int, choose_from: int = 0, arms: Sequence[Arm] = (),
) -> Drawn:  # fmt: skip
    """Draw the rows for mixtures of `once` task rows, for each number of repeats that the pool has rows enough for, and rows
    on which forgetting is measured.

    No row shares text with those of `whole`, the tasks with all rows that a limit leaves out of `tasks`. `choose_from` rows or
    more are candidates, where arms choose; of a file's own `arms` those with a pool get as many rows of it. Raises
    DataError where there are too few.
    """
    drawn = Drawn(settings.mix.candidates)
    if settings.eval.general_rows > 0:
        own, _ = ingest.read([DataSource(path="builtin_eval")])
        drawn.held_out["builtin"] = tuple(own[: settings.eval.general_rows])
    if not settings.general or (settings.mix.per_task == 0 and settings.eval.general_rows == 0):
        return drawn
    anchors = [own.value for own in (arm.anchor for arm in arms) if own is not None]
    drawer = _Drawer(settings, tokenizer, context, whole, anchors)
    outside = {content_key(example) for example in drawn.held_out.get("builtin", ())}
    apart = tuple(drawer.take(settings.eval.general_rows, seed_for(settings.seed, "held out"), outside).examples)
    drawn.held_out["pool"] = apart
    outside |= {content_key(example) for example in apart}
    wanted = drawer.wanted(tasks, once)
    # Where rows are chosen there are always several times as many candidates.
    most = max(choose_from, choose.SCORED * max(wanted.values())) if choose_from else max(wanted.values())
    found = drawer.take(most, seed_for(seed, "general"), outside, apart)
    drawn.count("general", found, drawer.pool)
    left = len(found.examples)
    drawn.repeats = tuple(number for number in wanted if wanted[number] <= left)
    if not drawn.repeats:
        raise DataError(_too_small(settings, min(wanted.values()), left, len(apart), len(drawer.pool)))
    if len(drawn.repeats) < len(wanted):
        tried, all_of = (", ".join(map(str, numbers)) for numbers in (drawn.repeats, wanted))
        drawn.notes.append(f"mix.repeats: auto tries {tried} instead of {all_of}: the general data have {left:,} usable rows")
    drawn.general = tuple(found.examples[: wanted[max(drawn.repeats)]])
    drawn.candidates = tuple(found.examples) if choose_from else ()
    if choose_from and left < 2 * len(drawn.general):
        drawn.notes.append(
            f"general: rows were chosen among {left:,} that are usable, for mixtures of up to {len(drawn.general):,}: that is "
            "hardly a choice"
        )
    for arm in (arm for arm in arms if arm.pool):
        other = _Drawer(settings, tokenizer, context, whole, anchors, arm.pool)
        found = other.take(len(drawn.general), seed_for(seed, "general"), outside, apart)
        if len(found.examples) < len(drawn.general):
            raise DataError(
                f"compare.arms: {arm.name}: the mix needs {len(drawn.general)} general rows, its pool has "
                f"{len(found.examples)} usable (of {len(other.pool)}); lower mix.general_per_task, or add rows"
            )
        drawn.own[arm.name] = tuple(found.examples)
        drawn.count(f"general of {arm.name}", found, other.pool)
    return drawn


def _too_small(settings: Settings, wanted: int, left: int, held_out: int, size: int) -> str:
    """Say that the pool has too few rows, and what can be done about it with these settings."""
    fewer = np.floor(settings.mix.per_task * left / wanted * 100) / 100
    remedies = [f"set mix.general_per_task to {fewer:g} or less"] if fewer > 0 else []
    if any(isinstance(arm, Arm) and arm.repeats for arm in settings.compare.arms):  # amounts that arms name, not the mix
        remedies = ["lower the arms' general_per_task or repeats (of `scale`: scale.ratios, scale.repeats or scale.rows)"]
    remedies += ["lower mix.repeats"] if min(settings.mix.candidates) > 1 else []
    remedies += [f"lower eval.general_rows ({settings.eval.general_rows})"] if held_out else []
    remedies += [] if any(source.path == "builtin" for source in settings.general) else ["use `general: builtin`"]
    kept = f", and {held_out} of these are held out for measuring forgetting" if held_out else ""
    return (
        f"general: the mix needs {wanted} general rows, the pool has {left + held_out} usable (of {size}){kept}; "
        f"{', '.join([*remedies, 'or add rows'])}"
    )


class _Drawer:
    """Draws general rows that are not too long, overlap no task's rows and hold no anchor's text."""

    def __init__(
        self, settings: Settings, tokenizer: encode.Tokenizer, context: int | None, tasks: Sequence[Task],
        anchors: Sequence[Anchor] = (), sources: Sequence[GeneralSource] = (),
    ) -> None:  # fmt: skip
        # All rows of the tasks, also those that a limit leaves out: an arm must not meet them in the pool.
        self.settings, self.tasks = settings, tasks
        self.anchors = [*(task.anchor for task in tasks if task.anchor is not None), *anchors]
        self.limit = labelled.longest(settings, context)
        self.plain = encode.make_format(tokenizer, None)
        near = settings.clean.near_duplicates
        self.pool = pool.open_pool(sources or settings.general, seed=settings.seed, near=near)

    def take(self, count: int, seed: int, outside: Collection[str] = (), apart: Sequence[Example] = ()) -> pool.Selection:
        """Up to `count` rows in seeded order, none whose content is in `outside`, or that shares text with rows of `apart`."""

        def fits(example: Example) -> str | None:
            if content_key(example) in outside:
                return "held out for measuring forgetting"
            try:
                tokens = encode.encode(example, self.plain)
                return f"over {self.limit} tokens" if len(tokens) > self.limit else None
            except DataError:
                return "refused by the model's chat template"

        return pool.select(
            self.pool, count, seed=seed, fits=fits,
            tasks=[(*task.train, *task.dev, *task.test) for task in self.tasks], anchors=self.anchors, apart=apart,
            near=self.settings.clean.near_duplicates, size=self._size,
        )  # fmt: skip

    def _size(self, row: Example) -> int:
        """What a source's weight counts."""
        return len(encode.encode(row, self.plain)) if self.settings.mix.unit == "tokens" else 1

    def wanted(self, tasks: Sequence[Task], once: int) -> dict[int, int]:
        """General rows for `once` task rows, by the number of repeats. In `unit: tokens` the mean lengths of task rows and of a
        sample decide."""
        per_task = self.settings.mix.per_task
        if self.settings.mix.unit == "tokens":
            sample = self.take(_LENGTH_SAMPLE, seed_for(self.settings.seed, "lengths")).examples
            forms = [(task, encode.make_format(self.plain.tokenizer, task.anchor)) for task in tasks]
            own = np.mean([len(encode.encode(row, form)) for task, form in forms for row in task.train])
            per_task *= float(own / np.mean([len(encode.encode(row, self.plain)) for row in sample])) if sample else 1
        return {repeats: round(per_task * repeats * once) for repeats in self.settings.mix.candidates}
