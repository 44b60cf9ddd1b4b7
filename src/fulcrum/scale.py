"""How the loss on a task falls with the amount of general data: one training for each amount,
design and seed.

The machinery is a comparison's: same nested task rows, stored jobs, workers, resuming. Nothing is
tuned: along a curve only the amount of general data changes, and what a design holds fixed does
not.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fulcrum import budget as planning
from fulcrum import ladder, material, model, pool, workers
from fulcrum.arms import chosen_arms
from fulcrum.comparison import JobTracker, by_seeds, keep_budget, left_out_note
from fulcrum.config import Settings
from fulcrum.errors import ConfigError
from fulcrum.progress import ProgressListener, Silent
from fulcrum.records import Results
from fulcrum.run import begin, claimed, finish
from fulcrum.units import ComparisonPlan, Job

_FEWEST_LEVELS = 7  # with fewer the verdict is "not enough data" whatever comes


def scale(
    settings: Settings,
    *,
    resume: bool = False,
    progress: ProgressListener | None = None,
    jobs: int = 1,
    on: str = "local",
    budget: float | None = None,
    left_out: Sequence[str] = (),
) -> Results:
    """Train at every amount of general data of `settings.scale`, and fill the run folder.

    The arguments are those of `comparison.compare`. What the curves say is computed from results
    and predictions, here and whenever the report is written (`scaling.analyse`). Raises
    ConfigError, DataError, ModelError or StoreError.
    """
    workers.share_threads(jobs, on)
    progress, started = progress or Silent(), time.perf_counter()
    settings = ladder.prepared(settings)
    _require_general(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        session, rows = begin("scale", settings, arms, settings.seeds, resume, progress)
        keep_budget(settings, budget, left_out)
        by_seed = dict(zip(settings.seeds, rows, strict=True))
        comparison = ComparisonPlan(settings, by_seed, Path(settings.output_dir), probed=False)
        work = _jobs(comparison)
        progress.stage(f"{len(work)} trainings, each with its test")
        with workers.runner(comparison, session, jobs=jobs, on=on) as runner:
            tracker = JobTracker(comparison, work, progress, jobs)
            results, unrun = by_seeds(comparison, work, tracker, runner, budget)
        notes = left_out_note(budget, [*left_out, *unrun])
        return finish("scale", session, rows, results, started, notes=notes)


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
    """An experiment that a budget allows."""

    settings: Settings
    seconds: float  # that it is expected to take
    left_out: tuple[str, ...]  # in words
    trainings: int


def plan(settings: Settings, seconds: float) -> Plan:
    """Return the richest experiment that `seconds` buy on this machine.

    Left out, in this order: seeds beyond the third, test rows beyond 200 and 100, the design of
    fixed steps, the largest ratios down to seven, seeds beyond the second. Seeds, designs and
    ratios that the settings name are kept.

    Raises ConfigError if not even that fits.
    """
    began = time.perf_counter()
    loaded = model.load(
        settings.model, settings.train, trust_remote_code=settings.trust_remote_code
    )
    wide = ladder.prepared(settings)
    _require_general(wide)
    (rows,) = material.of_seeds(
        wide, loaded.tokenizer, loaded.context, wide.seeds[:1], mixed_rows=settings.scale.rows
    )
    speed = planning.measure(rows, loaded, wide)
    cost = 0.0
    for design, left_out in _designs(settings):
        ready = ladder.prepared(design)
        tasks = tuple(
            replace(task, test=task.test[: own.test_limit])
            for task, own in zip(rows.tasks, ready.tasks, strict=True)
        )
        shown = replace(rows, tasks=tasks)
        by_seed = dict.fromkeys(ready.seeds, shown)
        comparison = ComparisonPlan(ready, by_seed, Path(ready.output_dir), speed, probed=False)
        work = _jobs(comparison)
        cost = sum(comparison.cost(job) for job in work)
        if cost <= planning.PLANNED * seconds - (time.perf_counter() - began):
            return Plan(ready, cost, left_out, len(work))
    raise ConfigError(
        f"--budget: the least experiment takes about {cost / planning.PLANNED / 60:.0f} minutes "
        "with this model on this "
        f"machine, the budget has {seconds / 60:.0f}; raise it, or lower scale.rows, scale.repeats "
        "or train.max_length"
    )


def _designs(settings: Settings) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """Experiments from the richest to the least, each with what it leaves out."""
    left_out: dict[str, str] = {}  # by what is left out: the last word counts
    yield settings, ()

    def without(what: str, why: str, found: Settings) -> tuple[Settings, tuple[str, ...]]:
        left_out[what] = why
        return found, tuple(left_out.values())

    def seeds(number: int) -> Settings:
        chosen = tuple(range(settings.seed, settings.seed + number))
        return settings.model_copy(
            update={"compare": settings.compare.model_copy(update={"seeds": chosen})}
        )

    fixed = settings.compare.seeds is not None
    if not fixed:
        settings = seeds(3)
        yield without("seeds", "seeds beyond the third", settings)
    for limit in (200, 100):
        if any((task.test_limit or limit + 1) > limit for task in settings.tasks):
            settings = planning.few_rows(settings, limit)
            yield without("test", f"test rows beyond {limit}", settings)
    named = settings.scale.model_fields_set
    if len(settings.scale.designs) > 1 and "designs" not in named:
        only = settings.scale.model_copy(update={"designs": settings.scale.designs[:1]})
        settings = settings.model_copy(update={"scale": only})
        yield without("designs", "the design of fixed steps", settings)
    while len(settings.scale.ratios) > _FEWEST_LEVELS and "ratios" not in named:
        fewer = settings.scale.model_copy(update={"ratios": settings.scale.ratios[:-1]})
        settings = settings.model_copy(update={"scale": fewer})
        hard = (
            " (of seven amounts a jump can hardly be seen)"
            if len(fewer.ratios) == _FEWEST_LEVELS
            else ""
        )
        yield without("ratios", f"ratios beyond {fewer.ratios[-1]:g}{hard}", settings)
    if not fixed:
        settings = seeds(2)
        yield without("seeds", "seeds beyond the second", settings)
