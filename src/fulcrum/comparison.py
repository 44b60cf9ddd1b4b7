"""Arms x sizes x seeds on the same rows: settings tuned inside the task rows, refitted on all of them, scored once on test.

All trials come first, for a final training takes the best of them. A killed comparison goes on without redoing a finished unit.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fulcrum import candidates, cell, pilot, probe, pseudo, scoring, selfmade, store, workers
from fulcrum.arms import arm_of, by_task_rows, chosen_arms, sizes_of, trials
from fulcrum.cell import Silent, Watcher
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError
from fulcrum.launched import writes
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.proof import certificates
from fulcrum.records import ArmResult, Difference, Results, Setting, Tried
from fulcrum.run import begin, claimed, finish, shown_size
from fulcrum.units import Study, Unit, keep, read

# Which pairs answer a question: what did TELL bring over X, mixing alone, the anchor alone, training at all?
_REFERENCES = ("sft_anchor", "sft", "sft_kl", "soup", "kshot", "tfidf", "base_anchor", "base")  # without general data
_RIVALS = (  # with general data, or at TELL's settings
    "sft_matched", "mix", "general_then_task", "placebo_permuted", "placebo_own_answers", "selfgen", "unlabeled",
    "pseudo_self", "pseudo_teacher",
)  # fmt: skip
_PAIRS = (
    *(("tell", name) for name in _REFERENCES), *(("tell", name) for name in _RIVALS), *(("mix", name) for name in _REFERENCES),
    ("sft_anchor", "sft"), ("sft", "kshot"), ("sft", "base"), ("kshot", "base"), ("base_anchor", "base"),
)  # fmt: skip


def compare(
    settings: Settings, *, resume: bool = False, watcher: Watcher | None = None, jobs: int = 1, on: str = "local",
    budget: float | None = None, left_out: Sequence[str] = (),
) -> Results:  # fmt: skip
    """Run every arm at every size and seed, and fill the run folder with results, certificate, predictions and report.

    Fairness (rules a to i of a fair comparison): the same nested task rows in all arms, dev rows among them; settings chosen by
    cross-validation inside these (as many as there are repeats to try; arms without general data try at least three numbers of
    epochs); no arm may use more optimizer steps than TELL; learning rates decay fully within them; the last step counts; test
    is scored once per arm, size and seed.
    `jobs` units run at once, in local processes or (`on` "ray") on a Ray cluster, each with its part of the threads. With a
    `budget` in seconds whole seeds are left out (at least two remain) rather than overrun it; that, and what was `left_out` of
    the design before, stands in the certificate.
    Raises ConfigError, DataError, ModelError or StoreError.
    """
    workers.share_threads(jobs, on)
    watcher, started = watcher or Silent(), time.perf_counter()
    with claimed(settings, resume=resume):
        asked = settings
        settings, anchors = candidates.resolve(settings, compared=True, resume=resume, watcher=watcher)
        settings, found = pilot.resolve(settings, compared=True, resume=resume, watcher=watcher)
        arms = chosen_arms(settings)
        if settings.compare.tune == "first":
            settings.refuse_choosing_by("compare.tune: first", "settings", "use `tune: each`")
        _require_common_size(settings, arms)
        loaded, rows, folder = begin("compare", settings, arms, settings.seeds, resume, watcher)
        gone = pilot.dropped(asked) if found is not None and found.chosen == 0 else ()
        kept_in = folder if writes() else None
        notes = [*candidates.keep(anchors, kept_in), *pilot.keep(found, kept_in, gone)]
        if writes() and budget is not None and not (folder / store.PLAN).exists():
            planned = {"seconds": budget, "left_out": list(left_out), "settings": settings.described()}
            store.write_json(folder / store.PLAN, planned)
        by_seed = selfmade.with_made_rows(
            dict(zip(settings.seeds, rows, strict=True)), loaded, arms, settings, kept_in,
            partial(watcher.count, "general rows that the model makes itself"),
        )  # fmt: skip
        for seed, material in by_seed.items():
            views = _views(material, arms, settings)
            chosen = probe.with_gradients(material, loaded, views, settings, kept_in, partial(watcher.count, probe.LABEL))
            by_seed[seed] = pseudo.with_answers(chosen, loaded, views, arms, settings, kept_in, watcher)
        rows = list(by_seed.values())
        study = Study(settings, by_seed, folder)
        with workers.runner(study, loaded, jobs=jobs, on=on, watcher=watcher) as runner:
            tries = list(plan_trials(study, arms, loaded))
            watcher.stage(f"{len(tries)} trials, by cross-validation inside the task rows")
            tuning = Progress(study, tries, watcher, jobs)
            finals = list(plan_finals(study, arms, list(zip(tries, tuning.run(tries, runner), strict=True))))
            watcher.stage(f"{len(finals)} trainings on all task rows, each with its test")
            left = None if budget is None else budget - tuning.seconds
            results, unrun = by_seeds(study, finals, Progress(study, finals, watcher, jobs), runner, left)
            left_out = [*left_out, *unrun]
        if budget and left_out:
            notes.append(f"Left out for the time budget of {budget / 60:.0f} minutes: {'; '.join(left_out)}.")
        at = shown_size(results, settings)
        shown = [result for result in results if result.size in (0, at)]
        differences = paired_differences(shown, settings)
        if writes():
            certificates(folder, settings, study.rows, results, loaded, notes)
        return finish("compare", settings, folder, loaded, rows, results, differences, started, notes)


def by_seeds(
    study: Study, units: Sequence[Unit], progress: "Progress", runner: workers.Runner, budget: float | None
) -> tuple[list[ArmResult], list[str]]:
    """The results of final trainings, seed by seed, and what was left out, in words: of a `budget` in seconds whole seeds (two
    remain at least) rather than overrun it."""
    results: list[ArmResult] = []
    for number, seed in enumerate(study.seeds, 1):
        before = progress.seconds
        results += progress.run([unit for unit in units if unit.seed == seed], runner)
        next_end = progress.seconds + (progress.seconds - before)
        left = [unit for unit in units if unit.seed not in study.seeds[:number] and read(study, unit) is None]
        if budget is not None and next_end > budget and number >= 2 and left:
            return results, [f"seeds after {seed}, for which there was no time"]
    return results, []


def _require_common_size(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError where arms with general rows and trained ones without share no size: nothing could be said of them."""
    with_general, without = ({s for arm in arms if arm.seeded and arm.mixes == mixes for s in sizes_of(settings, arm, 0)}
                             for mixes in (True, False))  # fmt: skip
    if with_general and without and 0 not in with_general | without and not with_general & without:
        raise ConfigError(
            f"compare.sizes_of: arms with general rows stand at {sorted(with_general)} rows, the others at {sorted(without)}; "
            "a difference needs a size that is in both"
        )


class Progress:
    """How far some units are, and the time that all of them took so far, in earlier sittings too."""

    def __init__(self, study: Study, units: Sequence[Unit], watcher: Watcher, jobs: int) -> None:
        self.jobs = jobs
        self.study, self.watcher, self.total = study, watcher, len(units)
        self.done, self.left, self.paid = 0, sum(study.cost(unit) for unit in units), 0.0
        self.stored_seconds, self.begun = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds spent on the units; of those stored before, as if they had been run by as many workers."""
        return self.stored_seconds / self.jobs + time.monotonic() - self.begun

    def finished(self, unit: Unit, result: Tried | ArmResult, *, stored: bool) -> None:
        """Count a unit, and tell the watcher."""
        cost = self.study.cost(unit)
        self.done, self.left = self.done + 1, self.left - cost
        if stored:
            self.stored_seconds += result.seconds
            return
        self.paid += cost
        rest = (time.monotonic() - self.begun) * max(0.0, self.left) / self.paid
        self.watcher.overall(self.done, self.total, rest)

    def run(self, units: Sequence[Unit], runner: workers.Runner) -> list[Any]:
        """The results of some of the units, in their order: those that are stored, and the others once run and stored."""
        found: dict[str, Tried | ArmResult] = {}
        for unit in units:
            if (known := read(self.study, unit)) is not None:
                found[unit.name] = known
                self.finished(unit, known, stored=True)
        for unit, result in runner([unit for unit in units if unit.name not in found]):
            if writes():
                keep(self.study, unit, result)
            found[unit.name] = result
            self.finished(unit, result, stored=False)
        return [found[unit.name] for unit in units]


def _views(rows: Material, arms: Sequence[Arm], settings: Settings) -> list[tuple[Material, Arm]]:
    """The task rows by which arms choose or answer general rows: every size, and where settings are tried every fold of it."""
    found = []
    tuned = settings.compare.tune == "each" or rows.seed == settings.seeds[0]
    for arm in (arm for arm in arms if by_task_rows(arm, settings)):
        for size in sizes_of(settings, arm, rows.longest):
            own = rows.at(size)
            folds = own.folds(settings.compare.folds, store.seed_for(rows.seed, "folds")) if tuned else []
            found += [(view, arm) for view in (own, *folds)]
    return found


def plan_trials(study: Study, arms: Iterable[Arm], loaded: LoadedModel) -> Iterable[Unit]:
    """Every setting of every arm and size: at each seed, or at the first for all."""
    for seed in study.seeds[:1] if study.settings.compare.tune == "first" else study.seeds:
        for arm in (arm for arm in arms if arm.settings_of is None):
            for size in study.sizes(arm) if seed in study.seeds_of(arm) else ():
                rows = study.at(Unit(arm, size, seed))
                settings: Sequence[Setting] = (Setting(),)
                if arm.shots:
                    settings = cell.numbers_of_shots(rows, loaded, study.settings, seed)
                elif arm.trained:
                    settings = trials(rows, arm, study.settings)
                for setting in settings:
                    yield Unit(arm, size, seed, setting)


def plan_finals(study: Study, arms: Sequence[Arm], tried: Sequence[tuple[Unit, Tried]]) -> Iterable[Unit]:
    """Every arm, size and seed with what was tried for it. What does not depend on the seed is run at the first."""
    first = study.seeds[0]
    for seed in study.seeds:
        for arm in arms:
            for size in study.sizes(arm) if seed in study.seeds_of(arm) else ():
                own = seed if study.settings.compare.tune == "each" else first
                source = (arm.settings_of or arm.name, size, own)
                found = [result for unit, result in tried if (unit.arm.name, unit.size, unit.seed) == source]
                if arm.settings_of is not None:  # the trials were another arm's
                    found = [replace(min(found, key=lambda one: one.dev_nll), train_tokens=0, seconds=0.0)]
                yield Unit(arm, size, seed, None, tuple(found))


def paired_differences(results: Sequence[ArmResult], settings: Settings) -> list[Difference]:
    """Paired test differences of the telling pairs, for every task and every metric that is a mean over rows."""
    by_arm: dict[str, list[ArmResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    own = [name for name in by_arm if name not in {*_REFERENCES, *_RIVALS, "tell"}]
    mixed = [("tell", name) for name in own if arm_of(settings, name).mixes]
    found = []
    for arm, reference in (*_PAIRS, *mixed, *((name, "sft") for name in own)):
        for task in settings.tasks if arm in by_arm and reference in by_arm else ():
            for metric in task.metrics:
                own, other = (
                    [
                        scoring.outcomes(result.predictions[task.name], result.scores[task.name], metric)
                        for result in by_arm[name]
                    ]
                    for name in (arm, reference)
                )
                rows = [result.predictions[task.name] for result in by_arm[arm]]
                found.append(scoring.paired(task.name, metric, arm, reference, own, other, rows))
    return [difference for difference in found if difference is not None]
