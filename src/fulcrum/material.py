"""Files -> the rows of one run at one seed: split by content, cleaned against each other, short enough, counted.

Needs a tokenizer (to know how long a row is) and no model. Dev and test rows are set apart, checked for overlap and used to
clean the general rows before anything is mixed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from fulcrum import encode, general_rows, labelled, metrics
from fulcrum.anchor import last_answer_only
from fulcrum.config import Arm, Settings
from fulcrum.errors import DataError
from fulcrum.records import Example, FloatArray, Reject, Task, TaskFacts
from fulcrum.store import fingerprint


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
        return replace(self, tasks=tuple(replace(task, train=task.train[:size]) for task in self.tasks))

    def folds(self, count: int, seed: int) -> list["RunData"]:
        """Cut the training rows `count` times into rows to train on and dev rows, by content group; each is a dev row once.

        A task with fewer groups has fewer folds; in those beyond, none of its rows is a dev row. Raises DataError where a task
        has a single group.
        """
        cuts = [labelled.folds(task, count, seed) for task in self.tasks]
        whole = self.n_task
        found = [
            replace(self, tasks=tuple(own or replace(task, dev=()) for task, own in zip(self.tasks, fold, strict=True)))
            for fold in zip_longest(*cuts)
        ]
        return [replace(fold, kept=fold.n_task / whole) for fold in found]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """A hash over every row of each part, by the part's name, so that a refusal can say which data changed."""
        parts: dict[str, object] = {"general": self.general, "candidates": self.candidates[len(self.general) :]}
        parts |= {f"general of {name}": rows for name, rows in self.own_general.items()}
        parts |= {f"{task.name} unlabeled": task.unlabeled for task in self.tasks if task.unlabeled}
        parts |= {f"held out: {name}": rows for name, rows in self.held_out.items()}
        parts |= {f"{task.name} {part}": getattr(task, part) for task in self.tasks for part in ("train", "dev", "test")}
        return {name: fingerprint(rows) for name, rows in parts.items()}

    def general_count(self, repeats: int) -> int:
        """General rows of a plan with `repeats`, whether there are so many or not: in proportion to the longest candidate's."""
        return round(len(self.general) * repeats * self.n_task / (max(self.repeats) * self.general_for))


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
    outer = (place, settings.outer_folds) if (not dev_apart if by_fold is None else by_fold) else None
    whole = [labelled.read(task, settings.seed, outer, settings.clean.near_duplicates) for task in settings.tasks]
    labelled.check_between([task for task, _ in whole])
    for task_settings, (task, refused) in zip(settings.tasks, whole, strict=True):
        chosen, too_long = labelled.limited(task, task_settings, settings, tokenizer, context, seed)
        metrics.check_gold(task.metrics, chosen.test)
        tasks.append(chosen)
        rejects += refused + too_long
    own = [(f"compare.arms: {arm.name}: anchor", arm.anchor.value) for arm in _arms(settings, dev_apart) if arm.anchor]
    notes = [
        note for task in tasks for where, anchor in ((f"{task.name}: anchor", task.anchor), *own) if anchor is not None
        for note in labelled.check_anchor(anchor, task, settings, tokenizer, where)
    ]  # fmt: skip
    if any(map(last_answer_only, (*(task.anchor for task in tasks), *(anchor for _, anchor in own)))):
        # Where some anchor lets only last answers be trained, no arm and no task trains on others.
        tasks = [replace(task, train=tuple(map(labelled.last_trained, task.train))) for task in tasks]
    n_task = sum(len(task.train) for task in tasks)
    if not dev_apart:
        tasks = [labelled.joined(task, seed) for task in tasks]
        for task in tasks:
            _check_sizes(settings, task)
        n_task = sum(len(task.train[:mixed_rows]) for task in tasks)
    drawn = general_rows.draw(
        settings, tokenizer, context, tasks, seed,
        whole=[task for task, _ in whole], once=n_task, choose_from=choose_from, arms=_arms(settings, dev_apart),
    )  # fmt: skip
    notes = [*drawn.notes, *dict.fromkeys(notes), *(text for task in tasks for text in labelled.check_answers(task, tokenizer))]
    notes += [
        f"{task.name}: anchor: auto is chosen by a run; here rows stand without one"
        for task in settings.tasks if task.anchor is not None and task.anchor.is_auto
    ]  # fmt: skip
    if settings.mix.general_per_task == "auto":
        notes.insert(
            0, f"mix.general_per_task: auto is settled by a pilot; this is the most that it tries, {settings.mix.per_task:g}"
        )
    counts = Counter(reject.reason for reject in (*rejects, *drawn.rejects)) + Counter(drawn.left_out)
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
        prepare(settings, tokenizer, context, seed, dev_apart=False, mixed_rows=mixed_rows, choose_from=choose_from)
        for seed in seeds
    ]
    most = [max(map(len, parts)) for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)]
    fewest = [min(map(len, parts)) for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)]
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
