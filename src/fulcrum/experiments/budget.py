"""Estimate how long a run takes on this machine, and choose the preset that fits a time budget.

The model's speed is measured on a few rows of the run, and the jobs of each preset are counted.
This is only an estimate: a run with a budget drops whole seeds rather than exceed it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fulcrum.config.arms import ARMS, choose_from, chosen_arms, largest_mixture, own_arm, sizes_of
from fulcrum.config.settings import MIN_FOLDS, Settings
from fulcrum.core.errors import ConfigError, FulcrumError
from fulcrum.core.types import Hyperparameters, Trial
from fulcrum.data import encode, pool, run_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Cell
from fulcrum.experiments.compare import plan_trials
from fulcrum.experiments.presets import (
    FULL,
    PRESETS,
    Preset,
    apply,
    preset_named,
    reductions,
    seeds_from,
)
from fulcrum.experiments.units import ComparisonPlan, Job, Speed
from fulcrum.model import adapter, base_model, generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import metrics
from fulcrum.training import loop

PLANNED = 0.92  # of a budget; the rest is for loading, writing and the unforeseen
_SAMPLE = 32  # rows of each kind by which speed is measured
_FEWEST = 8  # task rows to which a design is reduced


# Which preset.


@dataclass(frozen=True)
class Design:
    """A preset on the rows of this run.

    preset: its name
    settings: the run's settings with this design
    rows: task rows of each task that it may use
    jobs: number of trials and trainings
    seconds: expected; infinite if the design cannot be run here
    why_not: the reason why it cannot
    """

    preset: str
    settings: Settings
    rows: int
    jobs: int
    seconds: float
    why_not: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be run.

    design: the chosen one
    designs: every preset with all task rows, for the user to compare
    left_out: what the chosen one has less of than `full`, in a few words each
    """

    design: Design
    designs: tuple[Design, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Measured:
    """What the designs are computed from.

    settings: as the file has them
    rows: all rows of the first seed
    loaded: the model
    speed: of the model on this machine
    pool: number of general rows
    """

    settings: Settings
    rows: RunData
    loaded: LoadedModel
    speed: Speed
    pool: int

    @property
    def every(self) -> int:
        """Task rows of the smallest task."""
        return min(len(task.train) for task in self.rows.tasks)


def plan(settings: Settings, *, preset: str | None = None, seconds: float | None = None) -> Plan:
    """Choose the given preset, or else the largest that `seconds` allow on this machine.

    If none fits, the smallest gets fewer task rows, unless the file sets their number. Raises
    ConfigError if that does not fit either, or cannot be run.
    """
    if settings.mix.general_per_task == "auto":
        raise ConfigError(
            "a preset or budget needs a known number of general rows, and mix.general_per_task is "
            "auto; set a number, or run without --preset, --budget and --quick"
        )
    started = time.perf_counter()
    wanted = [preset_named(preset)] if preset else list(PRESETS.values())
    measured = _measure_run(settings)
    every = measured.every
    candidates = [_design(one, measured, every) for one in reversed(wanted)]
    by_preset = {design.preset: design for design in candidates}
    limit = math.inf
    if seconds is not None:
        limit = PLANNED * seconds - (time.perf_counter() - started)
        if settings.compare.sizes is None:  # numbers of rows that the file sets are kept
            candidates += [_design(wanted[0], measured, rows) for rows in _fewer(every)]
    for design in candidates:
        if design.seconds <= limit and not design.why_not:
            for one in PRESETS.values():  # what the others would cost is shown
                if one.name not in by_preset:
                    by_preset[one.name] = _design(one, measured, every)
            designs = tuple(by_preset[name] for name in PRESETS)
            return Plan(design, designs, _left_out(design, measured))
    least = candidates[-1]
    if seconds is None or least.why_not:
        raise ConfigError(f"--preset {least.preset}: {least.why_not}")
    needed = math.ceil((least.seconds + PLANNED * seconds - limit) / PLANNED / 60)
    fewer = "" if least.rows == every else f" with {least.rows} of {every} task rows"
    raise ConfigError(
        f"--budget: the smallest design, {least.preset}{fewer}, takes about {needed} min with this "
        f"model on this machine, more than the {seconds / 60:.0f} min given; use --budget "
        f"{needed}m, or lower mix.general_per_task, train.max_length or task.test_limit"
    )


def _left_out(design: Design, measured: _Measured) -> tuple[str, ...]:
    full = apply(FULL, measured.settings, design.rows)
    test_rows = max(len(task.test) for task in measured.rows.tasks)
    reduced = reductions(design.settings, full, test_rows)
    if design.rows < measured.every:
        reduced.insert(0, f"{design.rows} of {measured.every} task rows")
    return tuple(reduced)


def _measure_run(settings: Settings) -> _Measured:
    loaded = base_model.load_for(settings)
    wide = _widest(settings)
    rows = run_data.of_seeds(
        wide, loaded.tokenizer, loaded.context, wide.seeds, mixed_rows=_SAMPLE
    )[0]
    general = 0
    if settings.general:
        general = len(
            pool.open_pool(settings.general, settings.seed, near=settings.clean.near_duplicates)
        )
    return _Measured(settings, rows, loaded, measure(rows, loaded, settings), general)


def _widest(settings: Settings) -> Settings:
    """Return the settings with all rows, so that every design can be counted from the same rows.

    If each seed holds out a fold of the rows, use the fewest folds: they are the largest, and leave
    the fewest rows.
    """
    seeds = seeds_from(settings, MIN_FOLDS if settings.outer_folds else 1)
    compare = settings.compare.model_copy(update={"sizes": None, "sizes_of": {}, "seeds": seeds})
    return settings.model_copy(update={"compare": compare})


def _design(preset: Preset, measured: _Measured, rows: int) -> Design:
    """Return a preset's design on `rows` task rows."""
    settings = apply(preset, measured.settings, rows)
    general = _general_rows(settings, rows)
    if general > measured.pool:
        lacks = (
            f"it needs about {general:,} general rows, the pool has {measured.pool:,}; add some, "
            "lower mix.general_per_task, or use fewer task rows"
        )
        return Design(preset.name, settings, rows, 0, math.inf, lacks)
    try:
        jobs, seconds = predict(settings, measured.rows, measured.loaded, measured.speed)
    except ConfigError as error:  # e.g. SFT may not use more steps than TELL
        return Design(preset.name, settings, rows, 0, math.inf, str(error))
    return Design(preset.name, settings, rows, jobs, seconds)


def _general_rows(settings: Settings, rows: int) -> int:
    """Return about how many general rows a design needs, held-out ones included."""
    largest = 0
    for arm in chosen_arms(settings):
        if arm.uses_general_data:
            largest = max(largest, *sizes_of(settings, arm, rows))
    shown = largest * max(settings.mix.candidates) * len(settings.tasks)
    return round(shown * settings.mix.per_task) + settings.eval.general_rows


def _fewer(every: int) -> list[int]:
    """Return ever fewer task rows, by a factor of √2, down to the fewest that say anything."""
    numbers = []
    rows = every / math.sqrt(2)
    while round(rows) >= _FEWEST:
        numbers.append(round(rows))
        rows /= math.sqrt(2)
    return numbers


# How long it takes.


def measure(rows: RunData, loaded: LoadedModel, settings: Settings) -> Speed:
    """Measure on a few rows of this run how long training, scoring and answering take."""
    few = rows.at(_SAMPLE)
    is_anchored = any(task.anchor for task in few.tasks)
    plain = ARMS["sft_anchor" if is_anchored else "sft"]
    task, start = _time_training(resolve(plain, few, settings), loaded, 0.0)
    mixed = [arm for arm in chosen_arms(settings) if arm.uses_general_data and arm.task_rows]
    general = 0.0
    if mixed:
        general, start = _time_training(resolve(mixed[0], few, settings), loaded, task)
    own = few.tasks[0]
    form = encode.make_format(loaded.tokenizer, own.anchor)
    test = own.test[:_SAMPLE]
    tokens = [encode.final_answer(row, form) for row in test]
    prompts = [encode.prompt_ids(row.prompt, form) for row in test]
    score = partial(generate.losses_at, loaded, tokens, cell.TEMPERATURES)
    answer = partial(
        generate.generate,
        loaded,
        prompts,
        form,
        max_new_tokens=own.max_new_tokens,
        batch_tokens=settings.eval.batch_tokens,
    )
    scored = _time(score) / len(tokens)
    answered = _time(answer) / len(prompts)
    adapter.drop_adapter(loaded)
    return Speed(task, general, scored, answered, start)


def _time_training(plan: ArmPlan, loaded: LoadedModel, task: float) -> tuple[float, float]:
    """Train an arm once; return the seconds per row, and those outside the training's steps.

    For an arm with general data the row is a general one, given `task` seconds per task row; for
    any other it is a task row.
    """
    part = plan.stream(loaded.tokenizer, 1, 0)
    began = time.perf_counter()
    _, result = loop.train(loaded, part, loop.Recipe(plan.settings.train, seed=0, repeats=1))
    start = time.perf_counter() - began - result.seconds
    first, last = result.history[0], result.history[-1]
    seconds = last.seconds
    if last.step > 1:  # the first step is slower
        seconds = (last.seconds - first.seconds) / (last.step - 1) * last.step
    if plan.arm.uses_general_data:
        general = seconds - task * part.plan.task_positions
        return max(0.0, general) / max(1, part.plan.general_used), start
    return seconds / part.plan.task_positions, start


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def predict(
    settings: Settings, rows: RunData, loaded: LoadedModel, speed: Speed
) -> tuple[int, float]:
    """Return the number of jobs of a comparison, and about how many seconds they take.

    Nobody knows yet which hyperparameters an arm's trials will choose: the mean over them is used.
    """
    by_seed = dict.fromkeys(settings.seeds, _rows_of(settings, rows))
    comparison = ComparisonPlan(settings, by_seed, Path(settings.output_dir), speed)
    arms = chosen_arms(settings)
    trials = list(plan_trials(comparison, arms, loaded))
    jobs = len(trials)
    seconds = sum(comparison.cost(trial) for trial in trials)
    for arm in arms:
        for size in comparison.sizes(arm):
            finals = _possible_finals(Cell(arm, size, comparison.seeds[0]), trials)
            mean = sum(comparison.cost(final) for final in finals) / len(finals)
            n_seeds = len(comparison.seeds_of(arm))
            jobs += n_seeds
            seconds += n_seeds * mean
    return jobs, seconds


def _rows_of(settings: Settings, rows: RunData) -> RunData:
    """Return the rows, with only as many test and general rows as these settings use."""
    tasks = []
    for task, own in zip(rows.tasks, settings.tasks, strict=True):
        tasks.append(replace(task, test=task.test[: own.test_limit], metrics=own.metrics))
    repeats = settings.mix.candidates
    general = rows.general[: round(len(rows.general) * max(repeats) / max(rows.repeats))]
    held_out = {name: part[: settings.eval.general_rows] for name, part in rows.held_out.items()}
    return replace(rows, repeats=repeats, general=general, tasks=tuple(tasks), held_out=held_out)


def _possible_finals(cell: Cell, trials: Sequence[Job]) -> list[Job]:
    """Return a cell's final training, once for the hyperparameters of each of its trials."""
    source = cell.arm.hyperparameters_of or cell.arm.name
    finals: dict[Hyperparameters, Job] = {}
    for trial in trials:
        chosen = trial.hyperparameters
        is_own = (trial.cell.arm.name, trial.cell.size) == (source, cell.size)
        if chosen is not None and is_own:
            finals[chosen] = Job(cell, None, (Trial(chosen, 0.0, 0, 0.0),))
    return list(finals.values())


@dataclass(frozen=True)
class Estimate:
    """About how long a verb takes on this machine.

    verb: train or compare
    seconds: None if it is unknown
    trainings: their number (of a comparison: trials, too)
    why_not: the reason why it is unknown
    """

    verb: str
    seconds: float | None
    trainings: int
    why_not: str = ""


def estimate(settings: Settings) -> list[Estimate]:
    """Estimate how long `train` and `compare` take, without the scoring of `anchor: auto`.

    Raises ConfigError, DataError or ModelError as these commands do.
    """
    loaded = base_model.load_for(settings)
    own = own_arm(settings)
    among = choose_from([own], settings)
    rows = run_data.prepare(
        settings, loaded.tokenizer, loaded.context, settings.seed, choose_from=among
    )
    speed = measure(rows, loaded, settings)
    train = estimate_training(resolve(own, rows, settings), speed)
    if settings.mix.general_per_task == "auto":
        why_not = "a pilot chooses how many general rows there will be"
        return [train, Estimate("compare", None, 0, why_not)]
    try:
        largest = largest_mixture(settings)
        wide = run_data.of_seeds(
            settings, loaded.tokenizer, loaded.context, settings.seeds, mixed_rows=largest
        )[0]
        jobs, seconds = predict(settings, wide, loaded, speed)
    except FulcrumError as error:  # e.g. too few rows for folds: `train` is possible even so
        return [train, Estimate("compare", None, 0, str(error))]
    return [train, Estimate("compare", seconds, jobs)]


def estimate_training(plan: ArmPlan, speed: Speed) -> Estimate:
    """Estimate `train`: its trials, which score dev rows, and test rows before and after them."""
    settings, rows = plan.settings, plan.rows
    n_dev = sum(len(task.dev) for task in rows.tasks)
    n_test = sum(len(task.test) for task in rows.tasks)
    seconds = 0.0
    for trial in plan.trials:
        trained = speed.task * trial.repeats * rows.n_task
        trained += speed.general * plan.general_count(trial.repeats)
        seconds += speed.start + trained + settings.train.evaluations * n_dev * speed.scored
    answered = 0
    for task, own in zip(rows.tasks, settings.tasks, strict=True):
        if metrics.needs_generation(own.metrics):
            answered += len(task.test)
    held_out = sum(len(part) for part in rows.held_out.values())
    seconds += 2 * ((n_test + held_out) * speed.scored + answered * speed.answered)
    return Estimate("train", seconds, len(plan.trials))
