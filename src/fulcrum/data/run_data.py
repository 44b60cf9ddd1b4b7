"""Read the files of a run into its rows at one seed: split by content, short enough, counted.

Task rows are split into train, dev and test rows and checked for overlap first. General rows are
then drawn from the pools, as many as the longest mixture needs. A tokenizer is needed (to measure
rows), a model is not.

Invariant: no general row shares text with any row of a task, including rows that a limit drops.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
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

_LENGTH_SAMPLE = 256  # general rows whose mean length counts for all, if a mix counts tokens


@dataclass(frozen=True)
class RunData:
    """All rows of one run at one seed."""

    tasks: tuple[Task, ...]
    general: tuple[Example, ...]  # for the longest mixture of `general_for` task rows
    held_out: Mapping[str, tuple[Example, ...]]  # source -> rows to measure forgetting on
    rejects: Mapping[str, int]  # reason -> rows not used
    repeats: tuple[int, ...]  # how often mixed arms try to show each task row
    general_for: int
    batch_size: int  # rows
    notes: tuple[str, ...] = ()  # what the user should know
    own_general: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)  # by arm
    candidates: tuple[Example, ...] = ()  # rows that arms choose from; begin with `general`
    gradients: Mapping[str, FloatArray] = field(default_factory=dict)  # row's origin -> sketch
    seed: int = 0
    kept: float = 1.0  # share of the training rows that a fold trains on

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
        repeats = max(self.repeats)
        rows = repeats * self.n_task + self.general_count(repeats)
        return -(-rows // self.batch_size)

    def general_count(self, repeats: int) -> int:
        """Return how many general rows a plan with `repeats` has, in proportion to the longest.

        There may be fewer rows than that.
        """
        task_rows = repeats * self.n_task
        return round(len(self.general) * task_rows / (max(self.repeats) * self.general_for))

    def at(self, size: int) -> "RunData":
        """Return the data with the first `size` training rows of every task.

        Their order is the seed's, so a smaller size is a subset of a larger one.
        """
        return self.cut([size] * len(self.tasks))

    def cut(self, sizes: Sequence[int]) -> "RunData":
        """Return the data with as many training rows of each task as `sizes` says."""
        tasks = []
        for task, size in zip(self.tasks, sizes, strict=True):
            tasks.append(replace(task, train=task.train[:size]))
        return replace(self, tasks=tuple(tasks))

    def folds(self, count: int, seed: int) -> list["RunData"]:
        """Cut the training rows `count` times into training and dev rows, by content group.

        Each row is a dev row once. A task with fewer groups has fewer folds; in the others it has
        no dev rows. Raises DataError if a task has a single group.
        """
        cuts = [task_data.folds(task, count, seed) for task in self.tasks]
        folds = []
        for parts in zip_longest(*cuts):
            tasks = []
            for task, part in zip(self.tasks, parts, strict=True):
                tasks.append(replace(task, dev=()) if part is None else part)
            fold = replace(self, tasks=tuple(tasks))
            folds.append(replace(fold, kept=fold.n_task / self.n_task))
        return folds

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Return a hash over the rows of each part, by name, to say which data changed."""
        parts: dict[str, Sequence[Example]] = {
            "general": self.general,
            "candidates": self.candidates[len(self.general) :],
        }
        for arm, rows in self.own_general.items():
            parts[f"general of {arm}"] = rows
        for task in self.tasks:
            if task.unlabeled:
                parts[f"{task.name} unlabeled"] = task.unlabeled
        for source, rows in self.held_out.items():
            parts[f"held out: {source}"] = rows
        for task in self.tasks:
            parts[f"{task.name} train"] = task.train
            parts[f"{task.name} dev"] = task.dev
            parts[f"{task.name} test"] = task.test
        return {name: fingerprint(rows) for name, rows in parts.items()}


def prepare(
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seed: int,
    *,
    dev_apart: bool = True,
    choose_from: int = 0,
) -> RunData:
    """Read all rows, drop those that cannot be trained (counted), and draw the general rows.

    `context` is the model's longest row in tokens (None: no limit). `dev_apart` is False in a
    comparison: there dev rows join the training rows, and if a task has no test file each seed
    holds out another fold. `choose_from` rows of the pool are candidates for arms that choose
    theirs. Raises DataError and ConfigError for what cannot be used.
    """
    request = _Request(settings, tokenizer, context, seed, dev_apart, by_fold=not dev_apart)
    return _prepare(replace(request, choose_from=choose_from))


def prepare_for_pilot(
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seed: int,
    *,
    compared: bool,
    mixed_rows: int,
) -> RunData:
    """Prepare the rows of a pilot: dev rows join the training rows, as in a comparison.

    `compared` says whether a comparison follows, whose seeds hold out folds. Each task has up to
    `mixed_rows` rows in the largest mixture. Raises as `prepare` does.
    """
    request = _Request(settings, tokenizer, context, seed, dev_apart=False, by_fold=compared)
    return _prepare(replace(request, mixed_rows=mixed_rows))


def of_seeds(
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seeds: Sequence[int],
    *,
    mixed_rows: int | None,
    choose_from: int = 0,
) -> list[RunData]:
    """Prepare the rows of a comparison at every seed, with equally many training rows of a task.

    Folds differ in size, so the smallest decides. Each task has up to `mixed_rows` rows (None: all)
    in the largest mixture; `choose_from` and the errors are those of `prepare`.
    """
    every_seed = []
    for seed in seeds:
        request = _Request(
            settings,
            tokenizer,
            context,
            seed,
            dev_apart=False,
            by_fold=True,
            mixed_rows=mixed_rows,
            choose_from=choose_from,
        )
        every_seed.append(_prepare(request))
    sizes = []
    notes = []
    for place, task in enumerate(every_seed[0].tasks):
        counts = [len(rows.tasks[place].train) for rows in every_seed]
        fewest = min(counts)
        largest = max(counts)
        sizes.append(fewest)
        if fewest < 0.9 * largest:
            notes.append(
                f"{task.name}: every seed trains on {fewest} rows, the fewest that a fold leaves "
                f"(another leaves {largest}): its content groups differ much in size"
            )
    cut = [rows.cut(sizes) for rows in every_seed]
    return [replace(rows, notes=(*rows.notes, *notes)) for rows in cut]


def facts(rows: RunData, tokenizer: encode.Tokenizer) -> tuple[TaskFacts, ...]:
    """Describe each task's data for the report; its tokens include the anchor."""
    described = []
    for task in rows.tasks:
        form = encode.make_format(tokenizer, task.anchor)
        described.append(
            TaskFacts(
                task.name,
                anchor=task.anchor.text if task.anchor else None,
                placement=task.anchor.placement if task.anchor else None,
                train=len(task.train),
                dev=len(task.dev),
                test=len(task.test),
                test_groups=len({row.group for row in task.test}),
                train_tokens=sum(len(encode.encode(row, form)) for row in task.train),
            )
        )
    return tuple(described)


@dataclass(frozen=True)
class _Request:
    """What rows to prepare."""

    settings: Settings
    tokenizer: encode.Tokenizer
    context: int | None  # the model's longest row in tokens; None: no limit
    seed: int
    dev_apart: bool  # False: dev rows join the training rows
    by_fold: bool  # each seed holds out another fold, if a task has no test file
    mixed_rows: int | None = None  # rows of each task in the largest mixture; None: all
    choose_from: int = 0  # candidates for arms that choose their general rows; 0: no arm does

    @property
    def outer(self) -> tuple[int, int] | None:
        """Return the number of the fold to hold out and how many there are; None: no folds."""
        if not self.by_fold:
            return None
        seeds = self.settings.seeds
        number = seeds.index(self.seed) if self.seed in seeds else 0
        return number, self.settings.outer_folds

    @property
    def own_arms(self) -> list[Arm]:
        """Return the arms that the settings file itself describes; none outside a comparison."""
        if self.dev_apart:
            return []
        return [arm for arm in self.settings.compare.arms if isinstance(arm, Arm)]

    @property
    def own_anchors(self) -> dict[str, Anchor]:
        """Return the anchors of these arms, by the setting that gives them."""
        anchors = {}
        for arm in self.own_arms:
            if arm.anchor is not None:
                anchors[f"compare.arms: {arm.name}: anchor"] = arm.anchor.value
        return anchors


def _prepare(request: _Request) -> RunData:
    settings = request.settings
    whole, tasks, rejects, unread = _read_tasks(request)
    anchor_notes = _check_anchors(request, tasks)
    tasks = _train_last_answers(request, tasks)
    if not request.dev_apart:
        tasks = [task_data.join_dev_rows(task, request.seed) for task in tasks]
        for task in tasks:
            _check_sizes(settings, task)
    n_task = sum(len(task.train[: request.mixed_rows]) for task in tasks)
    drawn = _draw_general(request, tasks, whole, n_task)
    notes = [*unread, *drawn.notes, *dict.fromkeys(anchor_notes)]
    for task in tasks:
        notes += task_data.check_answers(task, request.tokenizer)
        notes += task_data.check_turns(task, request.tokenizer)
    for own in settings.tasks:
        if own.anchor is not None and own.anchor.is_auto:
            notes.append(f"{own.name}: anchor: auto is chosen by a run; the rows here have none")
    if settings.mix.general_per_task == "auto":
        most = f"{settings.mix.per_task:g}"
        notes.insert(
            0,
            f"mix.general_per_task: auto: a pilot chooses; this is the most that it tries, {most}",
        )
    reasons = Counter(reject.reason for reject in (*rejects, *drawn.rejects))
    return RunData(
        tasks=tuple(tasks),
        general=drawn.general,
        held_out=drawn.held_out,
        rejects=dict(reasons + Counter(drawn.left_out)),
        repeats=drawn.repeats,
        general_for=n_task,
        batch_size=settings.train.batch_size,
        notes=tuple(notes),
        own_general=drawn.own,
        candidates=drawn.candidates,
        seed=request.seed,
    )


def _read_tasks(
    request: _Request,
) -> tuple[list[Task], list[Task], list[Reject], list[str]]:
    """Read every task.

    Return the tasks with all their rows, the tasks within their limits, the rejects, and notes on
    what is not read.
    """
    settings = request.settings
    whole = []
    unusable = []
    notes: list[str] = []
    for limits in settings.tasks:
        near = settings.clean.near_duplicates
        task, refused, unread = task_data.read_task(limits, settings.seed, request.outer, near)
        whole.append(task)
        unusable.append(refused)
        notes += unread
    task_data.check_between(whole)
    tasks = []
    rejects = []
    for limits, task, refused in zip(settings.tasks, whole, unusable, strict=True):
        limited, too_long = task_data.apply_limits(
            task, limits, settings, request.tokenizer, request.context, request.seed
        )
        metrics.check_gold(task.metrics, limited.test)
        tasks.append(limited)
        rejects += refused + too_long
    return whole, tasks, rejects, notes


def _check_anchors(request: _Request, tasks: Sequence[Task]) -> list[str]:
    """Check every anchor on every task's rows; return what the user should know."""
    notes = []
    for task in tasks:
        anchors = request.own_anchors
        if task.anchor is not None:
            anchors = {f"{task.name}: anchor": task.anchor, **anchors}
        for where, anchor in anchors.items():
            notes += task_data.check_anchor(
                anchor, task, request.settings, request.tokenizer, where
            )
    return notes


def _train_last_answers(request: _Request, tasks: list[Task]) -> list[Task]:
    """Train on last answers only, in every arm and task, if some anchor allows no others."""
    anchors = [*(task.anchor for task in tasks), *request.own_anchors.values()]
    if not any(map(last_answer_only, anchors)):
        return tasks
    changed = []
    for task in tasks:
        train = tuple(map(task_data.last_trained, task.train))
        changed.append(replace(task, train=train))
    return changed


def _check_sizes(settings: Settings, task: Task) -> None:
    sizes = list(settings.compare.sizes or ())
    for own in settings.compare.sizes_of.values():
        sizes += own
    largest = max(sizes, default=0)
    if largest > len(task.train):
        raise DataError(
            f"compare.sizes: {largest} rows are asked for, {task.name} has {len(task.train)} "
            "(train and dev together); lower the sizes (of scale and quanta: `rows`) or add rows"
        )


@dataclass
class _Drawn:
    """The general rows of a run, as they are drawn; the parts are those of `RunData`."""

    repeats: tuple[int, ...]
    general: tuple[Example, ...] = ()
    candidates: tuple[Example, ...] = ()
    own: dict[str, tuple[Example, ...]] = field(default_factory=dict)  # by arm
    held_out: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)  # rows looked at and not kept
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows never looked at
    notes: list[str] = field(default_factory=list)

    def count(self, name: str, selected: pool.Selection, opened: pool.Pool) -> None:
        """Record what was not taken from a pool, and why."""
        for reason, count in opened.left_out.items():
            self.left_out[f"{name}: {reason}"] = count
        for reject in selected.rejects:
            self.rejects.append(replace(reject, reason=f"{name}: {reject.reason}"))
        for source in selected.dry:
            self.notes.append(
                f"{name}: {source}: too few usable rows for its weight; the others gave the rest"
            )
        self.notes += [f"{name}: {note}" for note in opened.notes]


def _draw_general(
    request: _Request, tasks: Sequence[Task], whole: Sequence[Task], n_task: int
) -> _Drawn:
    """Draw the rows for mixtures of `n_task` task rows, and those that measure forgetting.

    Numbers of repeats for which the pool has too few rows are dropped. No row shares text with
    the `whole` tasks. Raises DataError if there are too few rows.
    """
    settings = request.settings
    wanted_apart = settings.eval.general_rows
    drawn = _Drawn(settings.mix.candidates)
    if wanted_apart > 0:
        builtin, _ = task_data.read([DataSource(path="builtin_eval")])
        drawn.held_out["builtin"] = tuple(builtin[:wanted_apart])
    if not settings.general or (settings.mix.per_task == 0 and wanted_apart == 0):
        return drawn
    sampler = _Sampler(request, whole, settings.general)
    apart = sampler.draw(wanted_apart, seed_for(settings.seed, "held out"), drawn.held_out)
    drawn.held_out["pool"] = tuple(apart.examples)
    _draw_mixtures(request, drawn, sampler, sampler.rows_needed(tasks, n_task))
    for arm in request.own_arms:
        if arm.pool:
            _draw_own(request, drawn, _Sampler(request, whole, arm.pool), arm.name)
    return drawn


def _draw_mixtures(
    request: _Request, drawn: _Drawn, sampler: "_Sampler", needed: Mapping[int, int]
) -> None:
    """Draw the rows of the longest mixture that the pool has rows for, and the candidates.

    `needed`: how many rows each number of repeats needs.
    """
    wanted = max(needed.values())
    if request.choose_from:
        # There are always several times as many candidates as rows to choose.
        wanted = max(request.choose_from, selection.SCORED * wanted)
    selected = sampler.draw(wanted, seed_for(request.seed, "general"), drawn.held_out)
    drawn.count("general", selected, sampler.pool)
    usable = len(selected.examples)
    drawn.repeats = tuple(repeats for repeats in needed if needed[repeats] <= usable)
    if not drawn.repeats:
        held_out = len(drawn.held_out["pool"])
        fewest = min(needed.values())
        raise DataError(
            _too_few_rows(request.settings, fewest, usable, held_out, len(sampler.pool))
        )
    if len(drawn.repeats) < len(needed):
        tried = ", ".join(map(str, drawn.repeats))
        all_of = ", ".join(map(str, needed))
        drawn.notes.append(
            f"mix.repeats: auto tries {tried} instead of {all_of}: the general data have "
            f"{usable:,} usable rows"
        )
    drawn.general = tuple(selected.examples[: needed[max(drawn.repeats)]])
    if not request.choose_from:
        return
    drawn.candidates = tuple(selected.examples)
    if usable < 2 * len(drawn.general):
        drawn.notes.append(
            f"general: rows were chosen among {usable:,} that are usable, for mixtures of up to "
            f"{len(drawn.general):,}: that is hardly a choice"
        )


def _draw_own(request: _Request, drawn: _Drawn, sampler: "_Sampler", arm: str) -> None:
    """Draw as many rows of an arm's own pool as the other arms have."""
    wanted = len(drawn.general)
    selected = sampler.draw(wanted, seed_for(request.seed, "general"), drawn.held_out)
    usable = len(selected.examples)
    if usable < wanted:
        raise DataError(
            f"compare.arms: {arm}: the mix needs {wanted} general rows, its pool has {usable} "
            f"usable (of {len(sampler.pool)}); lower mix.general_per_task, or add rows"
        )
    drawn.own[arm] = tuple(selected.examples)
    drawn.count(f"general of {arm}", selected, sampler.pool)


def _too_few_rows(settings: Settings, wanted: int, usable: int, held_out: int, size: int) -> str:
    """Say that the pool has too few rows, and what can be done about it with these settings."""
    remedies = []
    if any(isinstance(arm, Arm) and arm.repeats for arm in settings.compare.arms):
        # The arms say how many rows they need, not the mix.
        remedies.append(
            "lower the arms' general_per_task or repeats (of `scale`: scale.ratios, scale.repeats "
            "or scale.rows)"
        )
    else:
        possible = np.floor(settings.mix.per_task * usable / wanted * 100) / 100
        if possible > 0:
            remedies.append(f"set mix.general_per_task to {possible:g} or less")
    if min(settings.mix.candidates) > 1:
        remedies.append("lower mix.repeats")
    apart = ""
    if held_out:
        remedies.append(f"lower eval.general_rows ({settings.eval.general_rows})")
        apart = f", and {held_out} of these are held out for measuring forgetting"
    if not any(source.path == "builtin" for source in settings.general):
        remedies.append("use `general: builtin`")
    remedies.append("or add rows")
    return (
        f"general: the mix needs {wanted} general rows, the pool has {usable + held_out} usable "
        f"(of {size}){apart}; {', '.join(remedies)}"
    )


class _Sampler:
    """Draws rows of a pool: not too long, no text of a task, no anchor, none held out."""

    def __init__(
        self, request: _Request, whole: Sequence[Task], sources: Sequence[GeneralSource]
    ) -> None:
        self._settings = settings = request.settings
        self._tokenizer = request.tokenizer
        # All rows of the tasks, also those beyond a limit: an arm must not meet them in the pool.
        self._tasks = []
        self._anchors = []
        for task in whole:
            self._tasks.append((*task.train, *task.dev, *task.test))
            if task.anchor is not None:
                self._anchors.append(task.anchor)
        self._anchors += request.own_anchors.values()
        self._limit = task_data.max_row_tokens(settings, request.context)
        self._form = encode.make_format(request.tokenizer, None)
        self._near = settings.clean.near_duplicates
        self.pool = pool.open_pool(sources, seed=settings.seed, near=self._near)

    def draw(
        self, count: int, seed: int, held_out: Mapping[str, Sequence[Example]]
    ) -> pool.Selection:
        """Draw up to `count` rows in seeded order.

        None has the content of a row of `held_out`, or shares text with those of its "pool".
        """
        excluded = set[str]()
        for rows in held_out.values():
            excluded.update(map(content_key, rows))

        def misfit(row: Example) -> str | None:
            if content_key(row) in excluded:
                return "held out for measuring forgetting"
            try:
                length = self._length(row)
            except DataError:
                return "refused by the model's chat template"
            return f"over {self._limit} tokens" if length > self._limit else None

        return pool.select(
            self.pool,
            count,
            pool.Exclusions(
                tasks=self._tasks,
                anchors=self._anchors,
                held_out=held_out.get("pool", ()),
                near=self._near,
            ),
            seed=seed,
            fits=misfit,
            size=self._size,
        )

    def rows_needed(self, tasks: Sequence[Task], n_task: int) -> dict[int, int]:
        """Return how many general rows a mixture of `n_task` rows needs, by number of repeats."""
        mix = self._settings.mix
        per_task = mix.per_task
        if mix.unit == "tokens":
            per_task *= self._relative_length(tasks)
        return {repeats: round(per_task * repeats * n_task) for repeats in mix.candidates}

    def _relative_length(self, tasks: Sequence[Task]) -> float:
        """Return the mean length of task rows divided by that of a sample of general rows."""
        sample = self.draw(_LENGTH_SAMPLE, seed_for(self._settings.seed, "lengths"), {}).examples
        if not sample:
            return 1
        lengths = []
        for task in tasks:
            form = encode.make_format(self._tokenizer, task.anchor)
            lengths += [len(encode.encode(row, form)) for row in task.train]
        return float(np.mean(lengths) / np.mean([self._length(row) for row in sample]))

    def _size(self, row: Example) -> int:
        """Return how much a row counts towards its source's weight."""
        return self._length(row) if self._settings.mix.unit == "tokens" else 1

    def _length(self, row: Example) -> int:
        return len(encode.encode(row, self._form))
