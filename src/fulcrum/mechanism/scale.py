"""Run `scale`: measure how the loss on a task falls with the amount of general data.

There is one training for each amount, design and seed. The machinery is a comparison's: the same
nested task rows, stored jobs, workers and resuming. Nothing is tuned: along a curve only the amount
of general data changes, and what a design holds fixed does not.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fulcrum.config.arms import chosen_arms
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.types import Results
from fulcrum.data import pool, run_data
from fulcrum.experiments import budget, workers
from fulcrum.experiments.compare import JobTracker, add_dropped, by_seeds, keep_plan
from fulcrum.experiments.lifecycle import begin, claimed, finish
from fulcrum.experiments.presets import limit_test_rows, seeds_from
from fulcrum.experiments.units import ComparisonPlan, Job
from fulcrum.mechanism import scale_arms
from fulcrum.mechanism.scale_report import SCALE
from fulcrum.model import base_model
from fulcrum.report import wording
from fulcrum.stats.certificate import Budget

_FEWEST_LEVELS = 7  # with fewer the verdict is always "not enough data"


def run_scale(
    settings: Settings,
    *,
    resume: bool = False,
    progress: ProgressListener | None = None,
    jobs: int = 1,
    on: str = "local",
    budget: Budget | None = None,
) -> Results:
    """Train at every amount of general data of `settings.scale`, and fill the run folder.

    The arguments are those of `experiments.compare.compare`. What the curves say is computed from
    results and predictions, here and whenever the report is written (`scale_report.analyse`).
    Raises ConfigError, DataError, ModelError or StoreError.
    """
    workers.share_threads(jobs, on)
    progress = progress or Silent()
    started = time.perf_counter()
    settings = scale_arms.prepared(settings)
    _require_general(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        session, rows = begin(SCALE, settings, arms, settings.seeds, resume, progress)
        if budget is not None and session.kept is not None:
            keep_plan(budget, session.kept, settings)
        by_seed = dict(zip(settings.seeds, rows, strict=True))
        comparison = ComparisonPlan(settings, by_seed, Path(settings.output_dir), probed=False)
        work = _jobs(comparison)
        progress.stage(f"{len(work)} trainings, each with its test")
        with workers.runner(comparison, session, jobs=jobs, on=on) as runner:
            seconds = None if budget is None else budget.seconds
            tracker = JobTracker(comparison, work, progress, jobs)
            results, dropped = by_seeds(comparison, work, tracker, runner, seconds)
        skipped = add_dropped(budget, dropped)
        notes = [] if skipped is None else [wording.left_out(skipped)]
        return finish(SCALE, session, rows, results, started, notes=notes)


def _require_general(settings: Settings) -> None:
    """Raise ConfigError if the pool cannot feed the longest training, once its rows are known."""
    size = len(pool.open_pool(settings.general, settings.seed, near=settings.clean.near_duplicates))
    wanted = round(settings.mix.per_task * (settings.scale.rows or 0) * len(settings.tasks))
    if wanted > size - settings.eval.general_rows:
        raise ConfigError(
            f"scale: the longest training takes {wanted:,} general rows, and the pool has "
            f"{size:,}, of which "
            f"{settings.eval.general_rows} are held out; lower scale.ratios, scale.repeats or "
            "scale.rows, or add rows"
        )


def _jobs(comparison: ComparisonPlan) -> list[Job]:
    """Return a training for each arm and seed."""
    return [Job(cell) for cell in comparison.cells(chosen_arms(comparison.settings))]


@dataclass(frozen=True)
class Plan:
    """A scaling run that a budget allows."""

    settings: Settings  # the run's, with this design
    seconds: float  # that it is expected to take
    left_out: tuple[str, ...]  # what was reduced from the settings, in a few words each
    trainings: int  # their number


def plan(settings: Settings, seconds: float) -> Plan:
    """Return the richest scaling run that `seconds` allow on this machine.

    What is reduced, in this order: seeds to three, test rows to 200 and 100, the design of fixed
    steps, ratios to the seven smallest, seeds to two. Seeds, designs and ratios that the settings
    name are kept. Raises ConfigError if not even that fits.
    """
    began = time.perf_counter()
    loaded = base_model.load_for(settings)
    wide = scale_arms.prepared(settings)
    _require_general(wide)
    (rows,) = run_data.of_seeds(
        wide, loaded.tokenizer, loaded.context, wide.seeds[:1], mixed_rows=settings.scale.rows
    )
    speed = budget.measure(rows, loaded, wide)
    cost = 0.0
    for design, left_out in _designs(settings):
        ready = scale_arms.prepared(design)
        tasks = []
        for task, own in zip(rows.tasks, ready.tasks, strict=True):
            tasks.append(replace(task, test=task.test[: own.test_limit]))
        shown = dict.fromkeys(ready.seeds, replace(rows, tasks=tuple(tasks)))
        comparison = ComparisonPlan(ready, shown, Path(ready.output_dir), speed, probed=False)
        work = _jobs(comparison)
        cost = sum(comparison.cost(job) for job in work)
        if cost <= budget.PLANNED * seconds - (time.perf_counter() - began):
            return Plan(ready, cost, left_out, len(work))
    needed = math.ceil((cost + time.perf_counter() - began) / budget.PLANNED / 60)
    raise ConfigError(
        f"--budget: the smallest scaling run takes about {needed} min with this model on this "
        f"machine, more than the {seconds / 60:.0f} min given; use --budget {needed}m, or lower "
        "scale.rows, scale.repeats or train.max_length"
    )


def _designs(settings: Settings) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """Yield scaling runs from the richest to the smallest, each with what was reduced."""
    left_out: dict[str, str] = {}  # by what is reduced: a later text replaces an earlier one
    yield settings, ()
    named = settings.scale.model_fields_set
    free_seeds = settings.compare.seeds is None
    if free_seeds:
        settings = _with_seeds(settings, 3)
        left_out["seeds"] = "3 seeds"
        yield settings, tuple(left_out.values())
    for limit in (200, 100):
        if any(task.test_limit is None or task.test_limit > limit for task in settings.tasks):
            settings = limit_test_rows(settings, limit)
            left_out["test"] = f"at most {limit} test rows"
            yield settings, tuple(left_out.values())
    if len(settings.scale.designs) > 1 and "designs" not in named:
        settings = _with_scale(settings, designs=settings.scale.designs[:1])
        left_out["designs"] = "no trainings at fixed steps"
        yield settings, tuple(left_out.values())
    while len(settings.scale.ratios) > _FEWEST_LEVELS and "ratios" not in named:
        ratios = settings.scale.ratios[:-1]
        settings = _with_scale(settings, ratios=ratios)
        left_out["ratios"] = f"ratios up to {ratios[-1]:g}"
        if len(ratios) == _FEWEST_LEVELS:
            left_out["ratios"] += " (seven amounts hardly show a jump)"
        yield settings, tuple(left_out.values())
    if free_seeds:
        settings = _with_seeds(settings, 2)
        left_out["seeds"] = "2 seeds"
        yield settings, tuple(left_out.values())


def _with_seeds(settings: Settings, number: int) -> Settings:
    compare = settings.compare.model_copy(update={"seeds": seeds_from(settings, number)})
    return settings.model_copy(update={"compare": compare})


def _with_scale(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"scale": settings.scale.model_copy(update=changes)})
