"""Run a comparison: arms x sizes x seeds, tuned inside the task rows, scored once on test.

All trials run before the final trainings, which use the best of them. A job that is finished is
stored, so that a killed comparison resumes without running it again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fulcrum.anchors import choose
from fulcrum.config.arms import ARMS, arm_of, by_task_rows, chosen_arms, sizes_of
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.types import ArmResult, Difference, Hyperparameters, Results, Trial
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell, made_rows, pilot, scoring, workers
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Session
from fulcrum.experiments.certify import write_certificates
from fulcrum.experiments.lifecycle import begin, claimed, finish, shown_size
from fulcrum.experiments.units import ComparisonPlan, Job, keep, read
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.distributed import writes
from fulcrum.report import wording
from fulcrum.report.run_kinds import COMPARE
from fulcrum.stats.certificate import Budget

# What the anchor alone changed, and what training changed. TELL and mixing are compared with every
# reference.
_PLAIN_PAIRS = (
    ("sft_anchor", "sft"),
    ("sft", "kshot"),
    ("sft", "base"),
    ("kshot", "base"),
    ("base_anchor", "base"),
)


def run_comparison(
    settings: Settings,
    *,
    resume: bool = False,
    progress: ProgressListener | None = None,
    jobs: int = 1,
    on: str = "local",
    budget: Budget | None = None,
) -> Results:
    """Run every arm at every size and seed, and fill the run folder.

    Fairness (rules a to i of a fair comparison): the same nested task rows in all arms, dev rows
    among them; hyperparameters chosen by cross-validation inside these (as many trials as there are
    repeats to try; arms without general data try at least three numbers of epochs); no arm may use
    more optimizer steps than TELL; learning rates decay fully within them; the last step counts;
    test is scored once per arm, size and seed.

    `jobs` of the comparison run at once, in local processes or (`on` "ray") on a Ray cluster, each
    with its part of the threads. With a `budget`, whole seeds are dropped (at least two remain)
    rather than exceed its time, and the certificate says so.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    workers.share_threads(jobs, on)
    progress = progress or Silent()
    started = time.perf_counter()
    with claimed(settings, resume=resume):
        asked = settings
        settings, anchors = choose.resolve(settings, compared=True, progress=progress)
        settings, found = pilot.resolve(settings, compared=True, progress=progress)
        arms = chosen_arms(settings)
        if settings.compare.tune == "first":
            settings.refuse_choosing_by("compare.tune: first", "settings", "use `tune: each`")
        _require_common_size(settings, arms)
        session, data = begin(COMPARE, settings, arms, settings.seeds, resume, progress)
        gone = pilot.dropped(asked) if found is not None and found.chosen == 0 else ()
        notes = [*choose.keep(anchors, session.kept), *pilot.keep(found, session.kept, gone)]
        if budget is not None and session.kept is not None:
            keep_plan(budget, session.kept, settings)
        rows = _with_general_rows(session, dict(zip(settings.seeds, data, strict=True)), arms)
        plan = ComparisonPlan(settings, rows, Path(settings.output_dir))
        with workers.runner(plan, session, jobs=jobs, on=on) as runner:
            results, dropped = _run_jobs(plan, session, arms, runner, jobs, budget)
        skipped = add_dropped(budget, dropped)
        if skipped is not None:
            notes.append(wording.left_out(skipped))
        if writes():
            write_certificates(session, rows, results, skipped)
        size = shown_size(results, settings)
        compared = [result for result in results if result.size in (0, size)]
        differences = paired_differences(compared, settings)
        return finish(COMPARE, session, list(rows.values()), results, started, differences, notes)


def keep_plan(budget: Budget, folder: Path, settings: Settings) -> None:
    """Write the agreed budget and the planned settings to a new run's folder, for `--resume`."""
    if (folder / store.PLAN).exists():
        return
    planned = {
        "seconds": budget.seconds,
        "left_out": budget.left_out,
        "settings": settings.described(),
    }
    store.write_json(folder / store.PLAN, planned)


def add_dropped(budget: Budget | None, dropped: Sequence[str]) -> Budget | None:
    """Return the budget with what was dropped as time ran out; None if nothing was skipped."""
    if budget is None or not (budget.left_out or dropped):
        return None
    return replace(budget, left_out=(*budget.left_out, *dropped))


def _require_common_size(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError if arms with general rows and those without have no size in common."""
    mixed: set[int] = set()
    plain: set[int] = set()
    for arm in arms:
        if arm.depends_on_seed:
            own = mixed if arm.uses_general_data else plain
            own.update(sizes_of(settings, arm, 0))
    if mixed and plain and 0 not in mixed | plain and not mixed & plain:
        raise ConfigError(
            f"compare.sizes_of: arms with general rows have sizes {sorted(mixed)}, the others "
            f"{sorted(plain)}; a difference needs a size that is in both"
        )


# General rows that a model makes, chooses or answers.


def _with_general_rows(
    session: Session, rows: dict[int, RunData], arms: Sequence[Arm]
) -> dict[int, RunData]:
    """Return the rows of every seed with the general rows that are made, chosen or answered."""
    by_seed = made_rows.with_made_rows(session, rows, arms)
    for seed, data in by_seed.items():
        plans = _plans_by_task_rows(data, arms, session.settings)
        chosen = made_rows.with_gradients(session, data, plans)
        answering = [plan for plan in plans if plan.arm.asks_adapters]
        for arm in arms:
            if arm.asks_teacher:
                answering.append(resolve(arm, data, session.settings))
        by_seed[seed] = made_rows.with_answers(session, chosen, answering)
    return by_seed


def _plans_by_task_rows(rows: RunData, arms: Sequence[Arm], settings: Settings) -> list[ArmPlan]:
    """Return the plans of arms whose general rows depend on task rows: by size, and by fold."""
    plans = []
    is_tuned = settings.compare.tune == "each" or rows.seed == settings.seeds[0]
    for arm in arms:
        if not by_task_rows(arm, settings):
            continue
        for size in sizes_of(settings, arm, rows.longest):
            plan = resolve(arm, rows.at(size), settings)
            plans.append(plan)
            if is_tuned:
                plans += plan.folds(settings.compare.folds, store.seed_for(rows.seed, "folds"))
    return plans


# Jobs.


def plan_trials(plan: ComparisonPlan, arms: Sequence[Arm], model: LoadedModel) -> Iterator[Job]:
    """Give every trial of every arm and size: at each seed, or at the first for all."""
    seeds = plan.seeds[:1] if plan.settings.compare.tune == "first" else plan.seeds
    tuned = [arm for arm in arms if arm.hyperparameters_of is None]
    for one in plan.cells(tuned, seeds):
        if one.arm.few_shot:
            trials = cell.few_shot_trials(model, plan.resolve(one), one.seed)
        elif one.arm.trained:
            trials = plan.resolve(one).trials
        else:
            trials = (Hyperparameters(),)
        for hyperparameters in trials:
            yield Job(one, hyperparameters)


def plan_finals(
    plan: ComparisonPlan, arms: Sequence[Arm], tried: Sequence[tuple[Job, Trial]]
) -> Iterator[Job]:
    """Give the final training of every cell, with what was tried for it.

    An arm that does not depend on the seed has one cell, at the first.
    """
    trials_of: dict[tuple[str, int, int], list[Trial]] = {}
    for job, trial in tried:
        key = (job.cell.arm.name, job.cell.size, job.cell.seed)
        trials_of.setdefault(key, []).append(trial)
    for one in plan.cells(arms):
        tuned_at = one.seed if plan.settings.compare.tune == "each" else plan.seeds[0]
        source = one.arm.hyperparameters_of
        trials = trials_of.get((source or one.arm.name, one.size, tuned_at), [])
        if source is not None:  # another arm ran the trials, and has their cost
            best = min(trials, key=lambda trial: trial.dev_nll)
            trials = [replace(best, train_tokens=0, seconds=0.0)]
        yield Job(one, None, tuple(trials))


def _run_jobs(
    plan: ComparisonPlan,
    session: Session,
    arms: Sequence[Arm],
    runner: workers.Runner,
    parallel: int,
    budget: Budget | None,
) -> tuple[list[ArmResult], list[str]]:
    """Run the trials, then the final trainings; return their results, and what was dropped."""
    progress = session.progress
    trials = list(plan_trials(plan, arms, session.model))
    progress.stage(f"{len(trials)} trials, by cross-validation inside the task rows")
    tuning = JobTracker(plan, trials, progress, parallel)
    tried = list(zip(trials, tuning.run(trials, runner), strict=True))
    finals = list(plan_finals(plan, arms, tried))
    progress.stage(f"{len(finals)} trainings on all task rows, each with its test")
    seconds = None
    if budget is not None and budget.seconds is not None:
        seconds = budget.seconds - tuning.seconds
    return by_seeds(plan, finals, JobTracker(plan, finals, progress, parallel), runner, seconds)


def by_seeds(
    plan: ComparisonPlan,
    work: Sequence[Job],
    tracker: "JobTracker",
    runner: workers.Runner,
    budget: float | None,
) -> tuple[list[ArmResult], list[str]]:
    """Run final trainings seed by seed; return their results, and what was dropped, in words.

    Whole seeds are dropped (at least two remain) rather than exceed a `budget` in seconds.
    """
    results: list[ArmResult] = []
    for number, seed in enumerate(plan.seeds, 1):
        before = tracker.seconds
        results += tracker.run([job for job in work if job.cell.seed == seed], runner)
        next_end = tracker.seconds + (tracker.seconds - before)
        if budget is None or next_end <= budget or number < 2:
            continue
        done = plan.seeds[:number]
        if any(job.cell.seed not in done and read(plan, job) is None for job in work):
            return results, [f"no seeds after {seed}"]
    return results, []


class JobTracker:
    """Run jobs, and report how many are done and how long the others will take.

    Time counts from the first sitting: what a resumed comparison finds stored is included.
    """

    def __init__(
        self, plan: ComparisonPlan, work: Sequence[Job], progress: ProgressListener, parallel: int
    ) -> None:
        self.plan = plan
        self.progress = progress
        self.parallel = parallel  # jobs that run at once
        self.total = len(work)
        self.done = 0
        self.left = sum(plan.cost(job) for job in work)  # cost of the jobs not yet done
        self.paid = 0.0  # cost of those done in this sitting
        self.stored_seconds = 0.0
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds spent on the jobs; stored ones count as if run by as many workers as now."""
        return self.stored_seconds / self.parallel + time.monotonic() - self.begun

    def run(self, work: Sequence[Job], runner: workers.Runner) -> list[Any]:
        """Return the results of some of the jobs, in order; those not stored are run first."""
        results: dict[str, Trial | ArmResult] = {}
        for job in work:
            stored = read(self.plan, job)
            if stored is not None:
                results[job.name] = stored
                self._count(job, stored, is_stored=True)
        missing = [job for job in work if job.name not in results]
        for job, result in runner(missing):
            if writes():
                keep(self.plan, job, result)
            results[job.name] = result
            self._count(job, result, is_stored=False)
        return [results[job.name] for job in work]

    def _count(self, job: Job, result: Trial | ArmResult, *, is_stored: bool) -> None:
        """Count a finished job, and report a new one to the listener."""
        cost = self.plan.cost(job)
        self.done += 1
        self.left -= cost
        if is_stored:
            self.stored_seconds += result.seconds
            return
        self.paid += cost
        rest = (time.monotonic() - self.begun) * max(0.0, self.left) / self.paid
        self.progress.overall(self.done, self.total, rest)


# Differences.


def paired_differences(results: Sequence[ArmResult], settings: Settings) -> list[Difference]:
    """Return paired test differences of the telling pairs of arms, by task and metric.

    Metrics of a whole corpus have none.
    """
    by_arm: dict[str, list[ArmResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    arms = [arm_of(settings, name) for name in by_arm]
    differences = []
    for arm, reference in _pairs(arms):
        for task in settings.tasks:
            rows = [result.predictions[task.name] for result in by_arm[arm]]
            for metric in task.metrics:
                own = _outcomes(by_arm[arm], task.name, metric)
                other = _outcomes(by_arm[reference], task.name, metric)
                difference = scoring.paired(task.name, metric, arm, reference, own, other, rows)
                if difference is not None:
                    differences.append(difference)
    return differences


def _outcomes(results: Sequence[ArmResult], task: str, metric: str) -> list[tuple[float, ...]]:
    """Return each result's outcomes by a metric, one tuple per seed."""
    return [scoring.outcomes(one.predictions[task], one.scores[task], metric) for one in results]


def _pairs(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    """Give the pairs of arms whose difference answers a question."""
    names = {arm.name for arm in arms}
    built_in = [arm for arm in ARMS.values() if arm.name in names]
    own = [arm for arm in arms if arm.name not in ARMS]
    references = [arm.name for arm in built_in if arm.is_reference]
    rivals = [arm.name for arm in built_in if not arm.is_reference and arm.name != "tell"]
    rivals += [arm.name for arm in own if arm.uses_general_data]
    pairs = [("tell", name) for name in (*references, *rivals)]
    pairs += [("mix", name) for name in references]
    pairs += _PLAIN_PAIRS
    pairs += [(arm.name, "sft") for arm in own]
    for arm, reference in pairs:
        if arm in names and reference in names:
            yield arm, reference
