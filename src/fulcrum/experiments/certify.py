"""Turn the results of a comparison into one certificate per task.

A certificate holds the outcomes of every test row, the question that they answer, and hashes of the
settings, data and model that they depend on. `stats.certification` computes it; this module says
which numbers of a run are outcomes, and of which cell.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
# The loss at a temperature fitted on task rows: it shows if a gain is more than calibration.
TEMPERED = "nll_tempered"


def write_certificates(
    session: Session,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    budget: Budget | None = None,
) -> dict[str, Certificate]:
    """Write a certificate for every task, and return them by task.

    There are none if no arm, or every arm, has general rows. `rows` are by seed; `budget` says what
    a time limit cost.
    """
    settings = session.settings
    arm, references = arms_in_question(settings, results)
    if arm is None or not references:
        return {}
    plain = encode.make_format(session.model.tokenizer, None)
    measured: dict[str, tuple[Question, Outcomes]] = {}
    for task in next(iter(rows.values())).tasks:
        names = _certified_metrics(task)
        if not names:
            continue
        design = describe_design(settings, rows, results, task.name, budget)
        lower = tuple(name for name in names if not metrics.HIGHER_IS_BETTER.get(name))
        question = Question(arm, references, names, lower, task.name, design=design)
        measured[task.name] = question, collect_outcomes(results, rows, task.name, names, plain)
    adjusted_p = _adjust_p_values(measured)
    written = {}
    for name, (question, found) in measured.items():
        inputs = describe_inputs(settings, rows, results, name, session.model)
        inputs = replace(inputs, adjusted_p=adjusted_p)
        folder = certificate_folder(Path(settings.output_dir), settings, name)
        written[name] = certification.write(folder, found, question, inputs)
    return written


def certificate_folder(run_folder: Path, settings: Settings, task: str) -> Path:
    """Return the folder of a task's certificate: the run folder itself if there is one task."""
    if len(settings.tasks) == 1:
        return run_folder
    return run_folder / "certificates" / task


def _certified_metrics(task: Task) -> tuple[str, ...]:
    """Return the task's metrics that score each row, and the tempered loss if the loss is one."""
    names = tuple(name for name in task.metrics if metrics.HAS_OUTCOMES[name])
    if "nll" in names:
        names += (TEMPERED,)
    return names


def _adjust_p_values(measured: Mapping[str, tuple[Question, Outcomes]]) -> dict[str, float]:
    """Return the p-values of the deciding metrics by task, adjusted for their number (Holm).

    A task without a p-value is skipped; there are none if only one task is certified.
    """
    if len(measured) < 2:
        return {}
    p_values = {}
    for name, (question, found) in measured.items():
        p = certification.certify(found, question).answer.p
        if p is not None:
            p_values[name] = p
    adjusted = row_savings.holm(list(p_values.values()))
    return dict(zip(p_values, adjusted, strict=True))


def arms_in_question(
    settings: Settings, results: Sequence[ArmResult]
) -> tuple[str | None, tuple[str, ...]]:
    """Return the arm whose gain is certified (None if no arm has general rows), and its references.

    References are the arms without general rows. Arms that take another arm's hyperparameters are
    neither. A placebo is certified only if there is nothing else.
    """
    mixed = []
    references = []
    for name in dict.fromkeys(result.arm for result in results):
        arm = arm_of(settings, name)
        if arm.hyperparameters_of is not None:
            continue
        if arm.uses_general_data:
            mixed.append(name)
        else:
            references.append(name)
    from_pool = [name for name in mixed if arm_of(settings, name).uses_pool]
    for name in ("tell", "mix", *from_pool, *mixed):
        if name in mixed:
            return name, tuple(references)
    return None, tuple(references)


# Outcomes.


@dataclass(frozen=True)
class Measurement:
    """The outcomes of one cell by one metric."""

    metric: str
    cell: Cell
    values: Sequence[float]  # by row
    rows: Sequence[Prediction]
    in_nats: bool  # summed over a row's tokens, which are its weight; else every row weighs 1


def collect_outcomes(
    results: Sequence[ArmResult],
    rows: Mapping[int, RunData],
    task: str,
    names: Sequence[str],
    plain: encode.PromptFormat,
) -> Outcomes:
    """Return all outcomes of a task, by the metrics `names` and by side effects.

    A cell's tokens are those of its task rows without an anchor. A row's weight is its number of
    answer tokens in the first arm. There are no dev scores: a cross-validated loss is one of fewer
    rows, and the arm that is best with these (often k-shot) need not be best with all. Among arms
    without general data the best on test is the reference, which favours it.
    """
    measurements = itertools.chain(
        _task_measurements(results, rows, task, names), side_effects(results, rows, task)
    )
    lines = itertools.chain(_outcome_lines(measurements), _token_lines(results, rows, task, plain))
    return outcomes.collect(lines, task)


def cell_of(result: ArmResult, rows: Mapping[int, RunData], task: str) -> Cell:
    """Return the cell of a result: its size is at most the number of the task's rows."""
    own = _task_named(rows[result.seed].tasks, task)
    return result.arm, min(result.size, len(own.train)), result.seed


def _task_measurements(
    results: Sequence[ArmResult], rows: Mapping[int, RunData], task: str, names: Sequence[str]
) -> Iterator[Measurement]:
    for name in names:
        for result in results:
            cell = cell_of(result, rows, task)
            predictions = result.predictions[task]
            if name == TEMPERED:
                values: Sequence[float] = _tempered_losses(predictions)
            else:
                values = scoring.outcomes(predictions, result.scores[task], name)
            in_nats = name in ("nll", TEMPERED)
            yield Measurement(name, cell, values, predictions, in_nats)


def side_effects(
    results: Sequence[ArmResult], rows: Mapping[int, RunData], task: str
) -> Iterator[Measurement]:
    """Give the outcomes that show what training changed apart from the task.

    Forgetting: the loss on held-out general rows. Dependency: how much a test row's loss rises
    without the anchor, with another one, or with the same one in other words. Drift: KL(base ||
    adapted) on texts of the base model. Leakage: whether the answer to a general prompt, asked
    without an anchor, has the form of the task's answers.
    """
    for result in results:
        cell = cell_of(result, rows, task)
        for source, predictions in result.general.items():
            yield Measurement(
                f"forgetting: {source}", cell, _losses(predictions), predictions, True
            )
        for name in OTHER_ANCHORS:
            changed = result.probes.get(f"{task}: {name} anchor")
            if changed:
                rises = _rises(changed, result.predictions[task])
                yield Measurement(f"dependency: {name} anchor", cell, rises, changed, True)
        texts = result.probes.get(DRIFT)
        if texts:
            yield Measurement(DRIFT, cell, _losses(texts), texts, True)
        answers = result.probes.get(GENERAL_PROMPTS)
        if answers:
            leaks = _leaks(answers, rows[result.seed], task)
            yield Measurement(LEAKAGE, cell, leaks, answers, False)


def _losses(predictions: Sequence[Prediction]) -> list[float]:
    return [row.nll_sum for row in predictions]


def _tempered_losses(predictions: Sequence[Prediction]) -> list[float]:
    """Return the losses at the fitted temperature; word counts have none, and keep their loss."""
    losses = []
    for row in predictions:
        losses.append(row.nll_sum if row.tempered is None else row.tempered)
    return losses


def _rises(changed: Sequence[Prediction], own: Sequence[Prediction]) -> list[float]:
    pairs = zip(changed, own, strict=True)
    return [after.nll_sum - before.nll_sum for after, before in pairs]


def _leaks(answers: Sequence[Prediction], data: RunData, task: str) -> list[float]:
    """Return 1 for each answer that has the form of the task's answers, else 0."""
    gold = [row.answer for row in _task_named(data.tasks, task).train]
    general: list[str] = []
    for part in data.held_out.values():
        general += [row.answer for row in part]
    outputs = [row.output or "" for row in answers]
    return [float(flag) for flag in baselines.look_like_task(gold, general, outputs)]


def _outcome_lines(measurements: Iterator[Measurement]) -> Iterator[dict[str, Any]]:
    """Give a line for each row of each measurement, with the weight that the row had first."""
    # Drift is measured on texts of its own, so that its rows have other weights.
    weights: dict[tuple[bool, str], int] = {}
    for measurement in measurements:
        is_drift = measurement.metric == DRIFT
        for row, value in zip(measurement.rows, measurement.values, strict=True):
            weight = 1
            if measurement.in_nats:
                weight = weights.setdefault((is_drift, row.origin), row.n_tokens)
            yield _cell_keys(measurement.cell) | {
                "metric": measurement.metric,
                "row": row.origin,
                "group": row.group,
                "outcome": value,
                "weight": weight,
            }


def _token_lines(
    results: Sequence[ArmResult], rows: Mapping[int, RunData], task: str, plain: encode.PromptFormat
) -> Iterator[dict[str, Any]]:
    """Give a line for each cell with the tokens of its task rows; none if it has no rows."""
    tokens = {}
    for seed, data in rows.items():
        tokens[seed] = _cumulated_tokens(_task_named(data.tasks, task), plain)
    for cell in dict.fromkeys(cell_of(result, rows, task) for result in results):
        _, size, seed = cell
        if size:
            yield _cell_keys(cell) | {"tokens": tokens[seed][size]}


def _cumulated_tokens(task: Task, plain: encode.PromptFormat) -> list[int]:
    """Return the number of tokens of the first n training rows, at place n."""
    lengths = [len(encode.encode(row, plain)) for row in task.train]
    return [0, *np.cumsum(lengths).tolist()]


def _cell_keys(cell: Cell) -> dict[str, Any]:
    arm, size, seed = cell
    return {"arm": arm, "size": size, "seed": seed}


def _task_named(tasks: Sequence[Task], name: str) -> Task:
    return next(task for task in tasks if task.name == name)


# How the outcomes were made.


def describe_design(
    settings: Settings,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    task: str,
    budget: Budget | None,
) -> Design:
    """Return what a reader has to know about how a task's outcomes were made."""
    own = [result for result in results if arm_of(settings, result.arm).hyperparameters_of is None]
    trained = [result.arm for result in own if result.training is not None]
    largest = max(result.size for result in results)
    tasks = next(iter(rows.values())).tasks
    has_all = not settings.outer_folds and all(largest >= len(each.train) for each in tasks)
    return Design(
        folds=settings.compare.folds,
        tune=settings.compare.tune,
        trials={result.arm: len(result.tried) for result in own},
        trained=tuple(dict.fromkeys(trained)),
        at_end=at_an_end(own),
        diverged=_diverged(results),
        all_rows=largest if has_all else None,
        test_rows=_held_out_test_rows(settings, rows, results, task),
        budget=budget,
    )


def at_an_end(results: Sequence[ArmResult]) -> tuple[AtEnd, ...]:
    """Return the epochs and learning rates whose chosen value is the least or the most tried.

    A single epoch does not count: fewer are not possible.
    """
    ends: list[AtEnd] = []
    names: tuple[Literal["repeats", "learning_rate"], ...] = ("repeats", "learning_rate")
    for result in results:
        for name in names:
            tried = sorted({getattr(trial.setting, name) for trial in result.tried} - {None})
            chosen = getattr(result.setting, name, None)
            if chosen is None or len(tried) < 2 or (name, chosen) == ("repeats", 1):
                continue
            if chosen in (tried[0], tried[-1]):
                ends.append(AtEnd(result.arm, result.size, name, chosen, tried[0], tried[-1]))
    return tuple(dict.fromkeys(ends))


def _diverged(results: Sequence[ArmResult]) -> tuple[Diverged, ...]:
    """Return the final trainings that did not use their best trial, as it diverged on all rows."""
    diverged = []
    for result in results:
        best = min(result.tried, key=lambda trial: trial.dev_nll, default=None)
        if best is not None and result.setting != best.setting:
            diverged.append(Diverged(result.arm, result.size, result.seed, best.setting.name))
    return tuple(diverged)


def _held_out_test_rows(
    settings: Settings, rows: Mapping[int, RunData], results: Sequence[ArmResult], name: str
) -> int | None:
    """Return how many rows were held out as test rows; None if the task has a test file."""
    if next(task for task in settings.tasks if task.name == name).test:
        return None
    tested: set[str] = set()
    for seed in {result.seed for result in results}:
        own = _task_named(rows[seed].tasks, name)
        tested.update(row.origin for row in own.test)
    return len(tested)


def describe_inputs(
    settings: Settings,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    task: str,
    loaded: LoadedModel,
) -> Inputs:
    """Return settings, environment and the hash of every row, so that changes can be named."""
    examples: dict[str, Example] = {}
    for data in rows.values():
        own = _task_named(data.tasks, task)
        examples.update((row.origin, row) for row in (*own.train, *own.test))
    chosen = []
    for result in results:
        setting = store.plain(result.setting)
        chosen.append(Chosen(result.arm, result.size, result.seed, setting))
    return replace(
        verify.describe_inputs(settings, task, examples.values()),
        environment=environment(loaded),
        general_rows={str(seed): data.fingerprints["general"] for seed, data in rows.items()},
        hyperparameters=tuple(chosen),
    )
