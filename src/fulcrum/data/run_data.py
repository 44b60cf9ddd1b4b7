"""Files -> the rows of one run at one seed: split by content, cleaned against each other, short enough, counted.

Needs a tokenizer (to know how long a row is) and no model. Dev and test rows are set apart, checked for overlap and used to
clean the general rows before anything is mixed.

General rows: those of pools that may stand beside a run's tasks, as many as its longest mixture needs.

Needs a tokenizer (to know how long a row is) and no model.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np

from fulcrum.config.base import DataSource, GeneralSource
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core.errors import DataError
from fulcrum.core.store import fingerprint, seed_for
from fulcrum.core.types import Anchor, Example, FloatArray, Reject, Task, TaskFacts
from fulcrum.data import encode, pool, selection, task_data
from fulcrum.data.anchor_template import last_answer_only
from fulcrum.data.formats import content_key
from fulcrum.stats import metrics

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
            f"{name}: {source}: too few usable rows for its weight; the others gave the rest"
            for source in found.dry
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
        own, _ = task_data.read([DataSource(path="builtin_eval")])
        drawn.held_out["builtin"] = tuple(own[: settings.eval.general_rows])
    if not settings.general or (settings.mix.per_task == 0 and settings.eval.general_rows == 0):
        return drawn
    anchors = [own.value for own in (arm.anchor for arm in arms) if own is not None]
    drawer = _Drawer(settings, tokenizer, context, whole, anchors)
    outside = {content_key(example) for example in drawn.held_out.get("builtin", ())}
    apart = tuple(
        drawer.take(
            settings.eval.general_rows, seed_for(settings.seed, "held out"), outside
        ).examples
    )
    drawn.held_out["pool"] = apart
    outside |= {content_key(example) for example in apart}
    wanted = drawer.wanted(tasks, once)
    # Where rows are chosen there are always several times as many candidates.
    most = (
        max(choose_from, selection.SCORED * max(wanted.values()))
        if choose_from
        else max(wanted.values())
    )
    found = drawer.take(most, seed_for(seed, "general"), outside, apart)
    drawn.count("general", found, drawer.pool)
    left = len(found.examples)
    drawn.repeats = tuple(number for number in wanted if wanted[number] <= left)
    if not drawn.repeats:
        raise DataError(
            _too_small(settings, min(wanted.values()), left, len(apart), len(drawer.pool))
        )
    if len(drawn.repeats) < len(wanted):
        tried, all_of = (", ".join(map(str, numbers)) for numbers in (drawn.repeats, wanted))
        drawn.notes.append(
            f"mix.repeats: auto tries {tried} instead of {all_of}: the general data have {left:,} usable rows"
        )
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
    if any(
        isinstance(arm, Arm) and arm.repeats for arm in settings.compare.arms
    ):  # amounts that arms name, not the mix
        remedies = [
            "lower the arms' general_per_task or repeats (of `scale`: scale.ratios, scale.repeats or scale.rows)"
        ]
    remedies += ["lower mix.repeats"] if min(settings.mix.candidates) > 1 else []
    remedies += [f"lower eval.general_rows ({settings.eval.general_rows})"] if held_out else []
    remedies += (
        []
        if any(source.path == "builtin" for source in settings.general)
        else ["use `general: builtin`"]
    )
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
        self.limit = task_data.max_row_tokens(settings, context)
        self.plain = encode.make_format(tokenizer, None)
        near = settings.clean.near_duplicates
        self.pool = pool.open_pool(sources or settings.general, seed=settings.seed, near=near)

    def take(
        self, count: int, seed: int, outside: Collection[str] = (), apart: Sequence[Example] = ()
    ) -> pool.Selection:
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
            self.pool,
            count,
            pool.Exclusions(
                tasks=[(*task.train, *task.dev, *task.test) for task in self.tasks],
                anchors=self.anchors,
                held_out=apart,
                near=self.settings.clean.near_duplicates,
            ),
            seed=seed,
            fits=fits,
            size=self._size,
        )

    def _size(self, row: Example) -> int:
        """What a source's weight counts."""
        return len(encode.encode(row, self.plain)) if self.settings.mix.unit == "tokens" else 1

    def wanted(self, tasks: Sequence[Task], once: int) -> dict[int, int]:
        """General rows for `once` task rows, by the number of repeats. In `unit: tokens` the mean lengths of task rows and of a
        sample decide."""
        per_task = self.settings.mix.per_task
        if self.settings.mix.unit == "tokens":
            sample = self.take(_LENGTH_SAMPLE, seed_for(self.settings.seed, "lengths")).examples
            forms = [
                (task, encode.make_format(self.plain.tokenizer, task.anchor)) for task in tasks
            ]
            own = np.mean(
                [len(encode.encode(row, form)) for task, form in forms for row in task.train]
            )
            per_task *= (
                float(own / np.mean([len(encode.encode(row, self.plain)) for row in sample]))
                if sample
                else 1
            )
        return {
            repeats: round(per_task * repeats * once) for repeats in self.settings.mix.candidates
        }


@dataclass(frozen=True)
class RunData:
    """All rows of one run at one seed.

    `general` are the rows that the longest plan of `general_for` task rows needs, `own_general` those of arms with a pool (or
    rows made) of their own; `candidates` are the pool's rows among which arms choose, which begin with `general`, and
    `gradients` what some of them and of the task rows would teach, by origin; `held_out` are general rows that no arm trains
    on, by source name (forgetting is measured on them); `repeats` are the numbers of repeats that mixed arms try; `kept` is
    the part of the training rows that a fold trains on; `rejects` counts the rows not used, by reason.
    """

    tasks: tuple[Task, ...]
    general: tuple[Example, ...]
    held_out: Mapping[str, tuple[Example, ...]]
    rejects: Mapping[str, int]
    repeats: tuple[int, ...]
    general_for: int
    batch_size: int
    notes: tuple[str, ...] = ()
    own_general: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    candidates: tuple[Example, ...] = ()
    gradients: Mapping[str, FloatArray] = field(default_factory=dict)
    seed: int = 0
    kept: float = 1.0

    @property
    def n_task(self) -> int:
        """Training rows of all tasks together."""
        return sum(len(task.train) for task in self.tasks)

    @property
    def longest(self) -> int:
        """Training rows of the task that has most."""
        return max(len(task.train) for task in self.tasks)

    @property
    def step_cap(self) -> int:
        """Optimizer steps of the longest plan, the most that any arm may use."""
        rows = max(self.repeats) * self.n_task + self.general_count(max(self.repeats))
        return -(-rows // self.batch_size)

    def at(self, size: int) -> "RunData":
        """The same with the first `size` rows of every task: nested subsets, since their order is the seed's."""
        return replace(
            self, tasks=tuple(replace(task, train=task.train[:size]) for task in self.tasks)
        )

    def folds(self, count: int, seed: int) -> list["RunData"]:
        """Cut the training rows `count` times into rows to train on and dev rows, by content group; each is a dev row once.

        A task with fewer groups has fewer folds; in those beyond, none of its rows is a dev row. Raises DataError where a task
        has a single group.
        """
        cuts = [task_data.folds(task, count, seed) for task in self.tasks]
        whole = self.n_task
        found = [
            replace(
                self,
                tasks=tuple(
                    own or replace(task, dev=()) for task, own in zip(self.tasks, fold, strict=True)
                ),
            )
            for fold in zip_longest(*cuts)
        ]
        return [replace(fold, kept=fold.n_task / whole) for fold in found]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """A hash over every row of each part, by the part's name, so that a refusal can say which data changed."""
        parts: dict[str, object] = {
            "general": self.general,
            "candidates": self.candidates[len(self.general) :],
        }
        parts |= {f"general of {name}": rows for name, rows in self.own_general.items()}
        parts |= {f"{task.name} unlabeled": task.unlabeled for task in self.tasks if task.unlabeled}
        parts |= {f"held out: {name}": rows for name, rows in self.held_out.items()}
        parts |= {
            f"{task.name} {part}": getattr(task, part)
            for task in self.tasks
            for part in ("train", "dev", "test")
        }
        return {name: fingerprint(rows) for name, rows in parts.items()}

    def general_count(self, repeats: int) -> int:
        """General rows of a plan with `repeats`, whether there are so many or not: in proportion to the longest candidate's."""
        return round(
            len(self.general) * repeats * self.n_task / (max(self.repeats) * self.general_for)
        )


def prepare(
    settings: Settings, tokenizer: encode.Tokenizer, context: int | None, seed: int, *, dev_apart: bool = True,
    by_fold: bool | None = None, mixed_rows: int | None = None, choose_from: int = 0,
) -> RunData:  # fmt: skip
    """Read everything, drop what cannot be trained (counted), and choose the general rows that the longest plan needs.

    `context` is the model's longest row in tokens (None: no limit). In a comparison dev rows are task rows like others
    (`dev_apart` False): they join the training rows, in an order drawn by seed; `mixed_rows` of each task (none: all) are in
    the largest mixture. `choose_from` rows of the pool are candidates for arms that choose theirs. Where a comparison has no
    test rows of its own each seed holds out another fold of the rows, so that no row is a test row twice (`by_fold`; None: in a
    comparison only). Raises DataError and ConfigError for what cannot be used.
    """
    tasks: list[Task] = []
    rejects: list[Reject] = []
    place = settings.seeds.index(seed) if seed in settings.seeds else 0
    outer = (
        (place, settings.outer_folds) if (not dev_apart if by_fold is None else by_fold) else None
    )
    whole = [
        task_data.read_tasks(task, settings.seed, outer, settings.clean.near_duplicates)
        for task in settings.tasks
    ]
    task_data.check_between([task for task, _ in whole])
    for task_settings, (task, refused) in zip(settings.tasks, whole, strict=True):
        chosen, too_long = task_data.apply_limits(
            task, task_settings, settings, tokenizer, context, seed
        )
        metrics.check_gold(task.metrics, chosen.test)
        tasks.append(chosen)
        rejects += refused + too_long
    own = [
        (f"compare.arms: {arm.name}: anchor", arm.anchor.value)
        for arm in _arms(settings, dev_apart)
        if arm.anchor
    ]
    notes = [
        note for task in tasks for where, anchor in ((f"{task.name}: anchor", task.anchor), *own) if anchor is not None
        for note in task_data.check_anchor(anchor, task, settings, tokenizer, where)
    ]  # fmt: skip
    if any(
        map(last_answer_only, (*(task.anchor for task in tasks), *(anchor for _, anchor in own)))
    ):
        # Where some anchor lets only last answers be trained, no arm and no task trains on others.
        tasks = [
            replace(task, train=tuple(map(task_data.last_trained, task.train))) for task in tasks
        ]
    n_task = sum(len(task.train) for task in tasks)
    if not dev_apart:
        tasks = [task_data.join_dev_rows(task, seed) for task in tasks]
        for task in tasks:
            _check_sizes(settings, task)
        n_task = sum(len(task.train[:mixed_rows]) for task in tasks)
    drawn = draw(
        settings, tokenizer, context, tasks, seed,
        whole=[task for task, _ in whole], once=n_task, choose_from=choose_from, arms=_arms(settings, dev_apart),
    )  # fmt: skip
    notes = [
        *drawn.notes,
        *dict.fromkeys(notes),
        *(text for task in tasks for text in task_data.check_answers(task, tokenizer)),
    ]
    notes += [
        f"{task.name}: anchor: auto is chosen by a run; here rows stand without one"
        for task in settings.tasks if task.anchor is not None and task.anchor.is_auto
    ]  # fmt: skip
    if settings.mix.general_per_task == "auto":
        notes.insert(
            0,
            f"mix.general_per_task: auto is settled by a pilot; this is the most that it tries, {settings.mix.per_task:g}",
        )
    counts = Counter(reject.reason for reject in (*rejects, *drawn.rejects)) + Counter(
        drawn.left_out
    )
    return RunData(
        tuple(tasks), drawn.general, drawn.held_out, dict(counts), drawn.repeats, n_task, settings.train.batch_size,
        tuple(notes), drawn.own, drawn.candidates, seed=seed,
    )  # fmt: skip


def _arms(settings: Settings, dev_apart: bool) -> list[Arm]:
    """The arms that a file describes itself, in a comparison."""
    return [] if dev_apart else [arm for arm in settings.compare.arms if isinstance(arm, Arm)]


def of_seeds(
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seeds: Sequence[int],
    *,
    mixed_rows: int | None,
    choose_from: int = 0,
) -> list[RunData]:
    """The rows of a comparison at every seed (`prepare`): of each task as many training rows, since folds differ in size."""
    rows = [
        prepare(
            settings,
            tokenizer,
            context,
            seed,
            dev_apart=False,
            mixed_rows=mixed_rows,
            choose_from=choose_from,
        )
        for seed in seeds
    ]
    most = [
        max(map(len, parts))
        for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)
    ]
    fewest = [
        min(map(len, parts))
        for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)
    ]
    cut = [
        f"{task.name}: every seed trains on {few} rows, the fewest that a fold leaves (another leaves {many}): its content "
        "groups differ much in size"
        for task, few, many in zip(rows[0].tasks, fewest, most, strict=True) if few < 0.9 * many
    ]  # fmt: skip
    return [
        replace(
            each, notes=(*each.notes, *cut),
            tasks=tuple(replace(task, train=task.train[:n]) for task, n in zip(each.tasks, fewest, strict=True)),
        )
        for each in rows
    ]  # fmt: skip


def _check_sizes(settings: Settings, task: Task) -> None:
    every = [settings.compare.sizes or (), *settings.compare.sizes_of.values()]
    largest = max((size for sizes in every for size in sizes), default=0)
    if largest > len(task.train):
        raise DataError(
            f"compare.sizes: {largest} rows are asked for, {task.name} has {len(task.train)} (train "
            "and dev together); lower the sizes (of scale and quanta: `rows`) or add rows"
        )


def facts(material: RunData, tokenizer: encode.Tokenizer) -> tuple[TaskFacts, ...]:
    """What the report says about each task's data; tokens are counted once per row, with the anchor."""
    described: list[TaskFacts] = []
    for task in material.tasks:
        form = encode.make_format(tokenizer, task.anchor)
        described.append(
            TaskFacts(
                task.name, task.anchor.text if task.anchor else None, task.anchor.placement if task.anchor else None,
                len(task.train), len(task.dev), len(task.test), len({row.group for row in task.test}),
                sum(len(encode.encode(row, form)) for row in task.train),
            )
        )  # fmt: skip
    return tuple(described)
