"""A comparison's results -> one certificate a task: outcomes, the question that they answer, hashes of what they rest on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fulcrum.config.arms import arm_of
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.types import ArmResult, Example, Prediction, Task
from fulcrum.data import encode
from fulcrum.data.run_data import RunData
from fulcrum.experiments import baselines, scoring
from fulcrum.experiments.cell import DRIFT, GENERAL_PROMPTS, OTHER_ANCHORS, Session
from fulcrum.experiments.lifecycle import environment
from fulcrum.model.base_model import LoadedModel
from fulcrum.report import verify
from fulcrum.stats import certification, metrics, outcomes, row_savings
from fulcrum.stats.certificate import (
    AtEnd,
    Budget,
    Certificate,
    Chosen,
    Design,
    Diverged,
    Inputs,
    Question,
)
from fulcrum.stats.outcomes import Cell, Outcomes

LEAKAGE = "leakage"
TEMPERED = "nll_tempered"  # the loss at a temperature fitted inside the task rows: is a gain more than calibration?


def folder_of(folder: Path, settings: Settings, task: str) -> Path:
    """Where a task's certificate is: in the run folder, or, of several tasks, in one of its own."""
    return folder if len(settings.tasks) == 1 else folder / "certificates" / task


def certificates(
    session: Session,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    budget: Budget | None = None,
) -> dict[str, Certificate]:
    """Write a certificate for every task, and return them by task.

    There are none if no arm, or every arm, has general rows. `budget` is what a time limit cost.
    """
    settings, loaded = session.settings, session.model
    folder = Path(settings.output_dir)
    asked = asked_of(settings, results)
    if asked is None:
        return {}
    arm, references = asked
    plain = encode.make_format(loaded.tokenizer, None)
    asked_by: dict[str, tuple[Question, Outcomes]] = {}
    for task in next(iter(rows.values())).tasks:
        if names := tuple(name for name in task.metrics if metrics.HAS_OUTCOMES[name]):
            names += (TEMPERED,) if "nll" in names else ()
            lower = tuple(name for name in names if not metrics.HIGHER_IS_BETTER.get(name))
            design = design_of(settings, rows, results, task.name, budget)
            question = Question(arm, references, names, lower, task.name, design=design)
            asked_by[task.name] = question, outcomes_of(results, rows, task.name, names, plain)
    adjusted_p = _holm(asked_by)
    written = {}
    for name, (question, found) in asked_by.items():
        inputs = replace(inputs_of(settings, rows, results, name, loaded), adjusted_p=adjusted_p)
        own_folder = folder_of(folder, settings, name)
        written[name] = certification.write(own_folder, found, question, inputs)
    return written


def _holm(asked_by: Mapping[str, tuple[Question, Outcomes]]) -> dict[str, float]:
    """Adjust the p-values of several tasks' deciding metrics for the number of those that are known."""
    if len(asked_by) < 2:
        return {}
    known = {}
    for name, (question, found) in asked_by.items():
        p = certification.certify(found, question).answer.p
        if p is not None:
            known[name] = p
    return dict(zip(known, row_savings.holm(list(known.values())), strict=True))


def asked_of(
    settings: Settings, results: Sequence[ArmResult]
) -> tuple[str, tuple[str, ...]] | None:
    """The arm whose gain is asked for, and its references: what has no general rows and chose its own settings."""
    names = [
        name
        for name in dict.fromkeys(result.arm for result in results)
        if arm_of(settings, name).hyperparameters_of is None
    ]
    mixed = [name for name in names if arm_of(settings, name).uses_general_data]
    references = tuple(name for name in names if name not in mixed)
    from_pool = [
        name for name in mixed if arm_of(settings, name).uses_pool
    ]  # a placebo is asked for last
    first = next((name for name in ("tell", "mix", *from_pool, *mixed) if name in mixed), "")
    return (first, references) if mixed and references else None


def outcomes_of(
    results: Sequence[ArmResult],
    rows: Mapping[int, RunData],
    task: str,
    names: Sequence[str],
    plain: encode.Format,
) -> Outcomes:
    """All outcomes of a task; tokens are those of task rows without anchor, weights the first arm's answer tokens.

    No dev scores: a cross-validated loss is one of fewer rows, and which arm is best with these (often k-shot) need not be best
    with all. Among arms without general data the best on test is the reference, which favours it.
    """
    counted = {seed: _tokens(material.tasks, task, plain) for seed, material in rows.items()}
    tokens = {
        cell: counted[cell[2]][cell[1]]
        for result in results
        if (cell := cell_of(result, rows, task))[1]
    }
    measured = [
        (name, cell_of(result, rows, task), _values(result, task, name), shown)
        for name in names for result in results for shown in (result.predictions[task],)
    ]  # fmt: skip
    lengths: dict[tuple[bool, str], int] = {}  # drift is measured on texts of its own

    def lines() -> Iterator[dict[str, Any]]:
        for metric, cell, found, shown in (*measured, *side_effects(results, rows, task)):
            in_nats = metric not in names or metric in ("nll", TEMPERED)
            for row, value in zip(shown, found, strict=True):
                weight = (
                    lengths.setdefault((metric == DRIFT, row.origin), row.n_tokens)
                    if in_nats and metric != LEAKAGE
                    else 1
                )
                line = {
                    "metric": metric,
                    "row": row.origin,
                    "group": row.group,
                    "outcome": value,
                    "weight": weight,
                }
                yield _named(cell) | line
        for cell, number in tokens.items():
            yield _named(cell) | {"tokens": number}

    return outcomes.collect(lines(), task)


def _values(result: ArmResult, task: str, metric: str) -> Sequence[float]:
    shown = result.predictions[task]
    if metric == TEMPERED:  # word counts have no temperature
        return [row.nll_sum if row.tempered is None else row.tempered for row in shown]
    return scoring.outcomes(shown, result.scores[task], metric)


def _named(cell: Cell) -> dict[str, Any]:
    return dict(zip(("arm", "size", "seed"), cell, strict=True))


def cell_of(result: ArmResult, rows: Mapping[int, RunData], task: str) -> Cell:
    """The cell of a result: with as many rows as the task has, where it has fewer than the size."""
    most = next(len(own.train) for own in rows[result.seed].tasks if own.name == task)
    return result.arm, min(result.size, most), result.seed


def side_effects(
    results: Sequence[ArmResult], rows: Mapping[int, RunData], task: str
) -> Iterator[tuple[str, Cell, list[float], Sequence[Prediction]]]:
    """Outcomes beside the task: metric, cell, an outcome a row, and these rows.

    Forgetting: nats on held-out general rows. Dependency: the rise of a test row's nats without the anchor, with another, or
    with the same in other words.
    Drift: KL(base || adapted) on texts of the base model. Leakage: whether the answer to a general prompt, asked without
    anchor, has the form of the task's answers.
    """
    for result in results:
        cell = cell_of(result, rows, task)
        for source, found in result.general.items():
            yield f"forgetting: {source}", cell, [row.nll_sum for row in found], found
        for what in OTHER_ANCHORS:
            if changed := result.probes.get(f"{task}: {what} anchor"):
                pairs = zip(changed, result.predictions[task], strict=True)
                yield (
                    f"dependency: {what} anchor",
                    cell,
                    [new.nll_sum - own.nll_sum for new, own in pairs],
                    changed,
                )
        if texts := result.probes.get(DRIFT):
            yield DRIFT, cell, [row.nll_sum for row in texts], texts
        if answers := result.probes.get(GENERAL_PROMPTS):
            material = rows[result.seed]
            gold = [row.answer for own in material.tasks if own.name == task for row in own.train]
            general = [row.answer for part in material.held_out.values() for row in part]
            alike = baselines.in_form_of(gold, general, [row.output or "" for row in answers])
            yield LEAKAGE, cell, [float(flag) for flag in alike], answers


def _tokens(tasks: Sequence[Task], name: str, plain: encode.Format) -> list[int]:
    """Tokens of the first n training rows, by n."""
    own = next(task for task in tasks if task.name == name)
    return [0, *np.cumsum([len(encode.encode(row, plain)) for row in own.train]).tolist()]


def design_of(
    settings: Settings,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    task: str,
    budget: Budget | None,
) -> Design:
    """Return what a reader has to know of how a task's outcomes were made."""
    own = [result for result in results if arm_of(settings, result.arm).hyperparameters_of is None]
    largest = max(result.size for result in results)
    tasks = next(iter(rows.values())).tasks
    has_all = not settings.outer_folds and all(largest >= len(each.train) for each in tasks)
    return Design(
        folds=settings.compare.folds,
        tune=settings.compare.tune,
        trials={result.arm: len(result.tried) for result in own},
        trained=tuple(dict.fromkeys(result.arm for result in own if result.training is not None)),
        at_end=at_an_end(own),
        diverged=_diverged(results),
        all_rows=largest if has_all else None,
        test_rows=_test_rows(settings, rows, results, task),
        budget=budget,
    )


def at_an_end(results: Sequence[ArmResult]) -> tuple[AtEnd, ...]:
    """Find epochs and learning rates whose chosen value is the least or the most that was tried.

    A single epoch is the least that there is.
    """
    found: list[AtEnd] = []
    names: tuple[Literal["repeats", "learning_rate"], ...] = ("repeats", "learning_rate")
    for result in results:
        for name in names:
            tried = sorted({getattr(one.setting, name) for one in result.tried} - {None})
            chosen = getattr(result.setting, name, None)
            if chosen is None or len(tried) < 2 or (name, chosen) == ("repeats", 1):
                continue
            if chosen in (tried[0], tried[-1]):
                found.append(AtEnd(result.arm, result.size, name, chosen, tried[0], tried[-1]))
    return tuple(dict.fromkeys(found))


def _diverged(results: Sequence[ArmResult]) -> tuple[Diverged, ...]:
    found = []
    for result in results:
        best = min(result.tried, key=lambda one: one.dev_nll, default=None)
        if best is not None and result.setting != best.setting:
            found.append(Diverged(result.arm, result.size, result.seed, best.setting.name))
    return tuple(found)


def _test_rows(
    settings: Settings, rows: Mapping[int, RunData], results: Sequence[ArmResult], name: str
) -> int | None:
    """Count the rows that were held out as test rows; None if the task has a test file."""
    if next(task for task in settings.tasks if task.name == name).test:
        return None
    tested: set[str] = set()
    for seed in {result.seed for result in results}:
        own = next(task for task in rows[seed].tasks if task.name == name)
        tested.update(row.origin for row in own.test)
    return len(tested)


def inputs_of(
    settings: Settings,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    task: str,
    loaded: LoadedModel,
) -> Inputs:
    """Describe settings, environment and every row, so that what was changed can be named."""
    kept: dict[str, Example] = {}
    for data in rows.values():
        own = next(part for part in data.tasks if part.name == task)
        kept.update((row.origin, row) for row in (*own.train, *own.test))
    chosen = [Chosen(one.arm, one.size, one.seed, store.plain(one.setting)) for one in results]
    return replace(
        verify.describe_inputs(settings, task, kept.values()),
        environment=environment(loaded),
        general_rows={str(seed): each.fingerprints["general"] for seed, each in rows.items()},
        hyperparameters=tuple(chosen),
    )
