"""The jobs of a comparison: run, stored and read back one at a time, here or in another process.

A job is a trial (cross-validation of some hyperparameters) or a final training with its test. It is
a value, and so is the plan of the comparison that it belongs to: both travel to workers.

Invariant: the result of a job depends on these two alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fulcrum.config.arms import sizes_of
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import ArmResult, Example, Hyperparameters, Trial
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Cell, Session
from fulcrum.model import save
from fulcrum.stats import metrics

Result = Trial | ArmResult


@dataclass(frozen=True)
class Job:
    """A trial, which cross-validates hyperparameters, or a final training on all rows."""

    cell: Cell
    hyperparameters: Hyperparameters | None = None  # of a trial; None: a final training
    tried: tuple[Trial, ...] = ()  # from which a final training takes the best

    @property
    def name(self) -> str:
        """Return the stem of its file's name."""
        if self.hyperparameters is None:
            return self.cell.name
        return f"{self.cell.name}-{self.hyperparameters.name}"


@dataclass(frozen=True)
class Speed:
    """Seconds that each part of a job takes.

    The defaults are a guess: only their proportions matter.
    """

    task: float = 1.0  # training on a task row
    general: float = 1.0  # training on a general row
    scored: float = 0.3  # scoring a row
    answered: float = 1.0  # generating an answer
    start: float = 1.0  # beginning a training


@dataclass(frozen=True)
class ComparisonPlan:
    """What every job of a comparison needs: plain values, so that other processes can run it."""

    settings: Settings
    rows: Mapping[int, RunData]  # by seed
    folder: Path
    speed: Speed = Speed()
    probed: bool = True  # whether side effects are looked for, and adapters kept

    def sizes(self, arm: Arm) -> tuple[int, ...]:
        """Return the sizes of an arm; 0, all rows, for one that does not depend on them."""
        if not arm.depends_on_seed:
            return (0,)
        return sizes_of(self.settings, arm, self.rows[self.seeds[0]].longest)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return every seed, in the order in which they run."""
        return tuple(self.rows)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Return the seeds of an arm: the first, if neither it nor the test rows depend on them."""
        return self.seeds if arm.depends_on_seed or self.settings.outer_folds else self.seeds[:1]

    def cells(self, arms: Sequence[Arm], seeds: Sequence[int] | None = None) -> list[Cell]:
        """Return every cell of these arms, seed by seed (all seeds if none are given)."""
        cells = []
        for seed in self.seeds if seeds is None else seeds:
            for arm in arms:
                if seed in self.seeds_of(arm):
                    cells += [Cell(arm, size, seed) for size in self.sizes(arm)]
        return cells

    def resolve(self, cell: Cell) -> ArmPlan:
        """Return the plan of a cell's arm on the cell's rows.

        An arm that does not depend on the number of rows gets the most that any arm is given.
        """
        compare = self.settings.compare
        rows = self.rows[cell.seed]
        sizes = list(compare.sizes or (rows.longest,))
        for own in compare.sizes_of.values():
            sizes += own
        return resolve(cell.arm, rows.at(cell.size or max(sizes)), self.settings)

    def cost(self, job: Job) -> float:
        """Return about how many seconds a job takes at this speed."""
        plan = self.resolve(job.cell)
        speed = self.speed
        chosen = job.hyperparameters
        if chosen is None:
            choices = cell.best_first(plan.arm, job.tried)
            chosen = choices[0].hyperparameters if choices else Hyperparameters()
        training = len(plan.task_rows) * chosen.repeats * speed.task
        training += plan.general_count(chosen.repeats) * speed.general
        if job.hyperparameters is not None:
            folds = self.settings.compare.folds
            trainings = plan.members * (training * (folds - 1) + folds * speed.start)
            return trainings + plan.rows.n_task * speed.scored
        scored, answered = self._test_counts(plan, is_probed=self.is_probed(job.cell))
        trainings = plan.members * (training + speed.start)
        return trainings + scored * speed.scored + answered * speed.answered

    def _test_counts(self, plan: ArmPlan, *, is_probed: bool) -> tuple[int, int]:
        """Return how many rows the test of a final training scores, and how many it answers."""
        tests = 0
        answered = 0
        for task in plan.rows.tasks:
            tests += len(task.test)
            if metrics.needs_generation(task.metrics):
                answered += len(task.test)
        held_out = [len(part) for part in plan.rows.held_out.values()]
        scored = tests + sum(held_out)
        if is_probed:
            scored += 3 * tests * plan.arm.anchored
            prompts = min(max(held_out, default=0), cell.PROBED)
            answered += prompts * (2 if plan.arm.trained else 1)
        return scored, answered

    def is_probed(self, cell: Cell) -> bool:
        """Return whether a cell is the one of its arm whose side effects and adapter are wanted.

        That is the first seed's, at the largest size.
        """
        return self.probed and cell.seed == self.seeds[0] and cell.size == max(self.sizes(cell.arm))


def perform(comparison: ComparisonPlan, session: Session, job: Job) -> Result:
    """Run a job.

    The session's folder gets its checkpoints and, if it is to be kept, its adapter.
    """
    plan = comparison.resolve(job.cell)
    if job.hyperparameters is not None:
        return cell.tune(session, plan, job.cell, job.hyperparameters)
    is_probed = comparison.is_probed(job.cell)
    result = cell.final(session, plan, job.cell, job.tried, probed=is_probed)
    if session.kept is not None and _keeps_adapter(comparison, job):
        save.save_adapter(session.model, _adapter_folder(session.kept, job), plan.ask_anchors)
    return result


def keep(comparison: ComparisonPlan, job: Job, result: Result) -> None:
    """Store a finished job, atomically, and drop its checkpoints: it is never trained again."""
    content = _without_texts(result)
    sealed = {"sha256": store.fingerprint(content), **content}
    store.write_json(_file(comparison, job), sealed, indent=None)
    checkpoints = comparison.folder / "checkpoints"
    # Only these endings: another job's name may begin like this one's.
    for part in ("fold", "member", "attempt"):
        for training in checkpoints.glob(f"{job.name}-{part}*"):
            store.drop_folder(training)
    store.drop_folder(checkpoints / job.name)


def read(comparison: ComparisonPlan, job: Job) -> Result | None:
    """Return a stored result; None if there is none, or if its adapter is no longer whole.

    Raises StoreError if the file is damaged.
    """
    file = _file(comparison, job)
    if not file.exists():
        return None
    if _keeps_adapter(comparison, job) and store.damaged(_adapter_folder(comparison.folder, job)):
        return None
    content = store.read_json(file)
    try:
        if content.pop("sha256") != store.fingerprint(content):
            raise KeyError("sha256")
        is_trial = job.hyperparameters is not None
        for trial in [content] if is_trial else content["tried"]:
            if trial["dev_nll"] is None:  # JSON has no infinity
                trial["dev_nll"] = math.inf
        if is_trial:
            return TypeAdapter(Trial).validate_python(content)
        _put_texts_back(content, comparison.rows[job.cell.seed])
        return TypeAdapter(ArmResult).validate_python(content)
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{file}: not a finished cell, the file was changed or damaged; delete it to run it "
            "anew"
        ) from error


def _keeps_adapter(comparison: ComparisonPlan, job: Job) -> bool:
    return job.hyperparameters is None and job.cell.arm.trained and comparison.is_probed(job.cell)


def _adapter_folder(folder: Path, job: Job) -> Path:
    return folder / "adapters" / job.cell.arm.name


def _file(comparison: ComparisonPlan, job: Job) -> Path:
    return comparison.folder / "cells" / f"{job.name}.json"


def _without_texts(result: Result) -> dict[str, Any]:
    """Return a result as it is stored: without the texts of test rows, which the data hold."""
    content: dict[str, Any] = store.plain(result)
    for part in ("predictions", "general", "probes"):
        for predictions in content.get(part, {}).values():
            for prediction in predictions:
                for name in ("prompt", "gold", "group"):
                    del prediction[name]
    return content


def _put_texts_back(content: dict[str, Any], rows: RunData) -> None:
    """Give the predictions of a stored result the texts of their rows.

    Raises KeyError for an unknown row.
    """
    tests = {task.name: task.test for task in rows.tasks}
    general = next((part for part in rows.held_out.values() if part), ())
    probed: dict[str, Sequence[Example]] = {cell.GENERAL_PROMPTS: general, cell.DRIFT: general}
    for name, examples in tests.items():
        for anchor in cell.OTHER_ANCHORS:
            probed[f"{name}: {anchor} anchor"] = examples
    rows_of_part: dict[str, Mapping[str, Sequence[Example]]] = {
        "predictions": tests,
        "general": rows.held_out,
        "probes": probed,
    }
    for part, rows_of in rows_of_part.items():
        for name, predictions in content[part].items():
            by_origin = {example.origin: example for example in rows_of[name]}
            for prediction in predictions:
                row = by_origin[prediction["origin"]]
                prediction |= {"prompt": row.question, "gold": row.answer, "group": row.group}
