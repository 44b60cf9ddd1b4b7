"""A comparison's results -> one certificate a task: outcomes, the question that they answer, hashes of what they rest on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum import certificate, encode, inputs, leverage, metrics, outcomes, scoring, store, words
from fulcrum.arms import arm_of
from fulcrum.cell import DRIFT, GENERAL_PROMPTS, OTHER_ANCHORS, Session
from fulcrum.certificate import Question
from fulcrum.config import Settings
from fulcrum.identity import environment
from fulcrum.material import RunData
from fulcrum.model import LoadedModel
from fulcrum.outcomes import Cell, Outcomes
from fulcrum.records import ArmResult, Prediction, Task

LEAKAGE = "leakage"
TEMPERED = "nll_tempered"  # the loss at a temperature fitted inside the task rows: is a gain more than calibration?


def folder_of(folder: Path, settings: Settings, task: str) -> Path:
    """Where a task's certificate is: in the run folder, or, of several tasks, in one of its own."""
    return folder if len(settings.tasks) == 1 else folder / "certificates" / task


def certificates(
    session: Session,
    rows: Mapping[int, RunData],
    results: Sequence[ArmResult],
    more_notes: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Write a certificate for every task, and return them by task; none if no arm, or every arm, has general rows."""
    settings, loaded = session.settings, session.model
    folder = Path(settings.output_dir)
    asked = asked_of(settings, results)
    if asked is None:
        return {}
    arm, references = asked
    plain = encode.make_format(loaded.tokenizer, None)
    told = (*notes(settings, rows, results), *more_notes)
    asked_by: dict[str, tuple[Question, Outcomes]] = {}
    for task in next(iter(rows.values())).tasks:
        if names := tuple(name for name in task.metrics if metrics.HAS_OUTCOMES[name]):
            names += (TEMPERED,) if "nll" in names else ()
            lower = tuple(name for name in names if not metrics.HIGHER_IS_BETTER.get(name))
            folded = _folded(settings, rows, results, task.name)
            question = Question(arm, references, names, lower, task.name, notes=(*told, *folded))
            asked_by[task.name] = question, outcomes_of(results, rows, task.name, names, plain)
    over_tasks = _holm(asked_by)
    return {
        name: certificate.write(
            folder_of(folder, settings, name), found, question,
            {**inputs_of(settings, rows, results, name, loaded), "p over all tasks (Holm)": over_tasks},
        )
        for name, (question, found) in asked_by.items()
    }  # fmt: skip


def _holm(asked_by: Mapping[str, tuple[Question, Outcomes]]) -> dict[str, float]:
    """Of several tasks, the p-values of the deciding metrics' differences, adjusted for the number of those that are known."""
    if len(asked_by) < 2:
        return {}
    answers = {name: certificate.certify(found, question)["answers"][0] for name, (question, found) in asked_by.items()}
    known = {name: answer["difference"]["p"] for name, answer in answers.items() if answer["difference"]["p"] is not None}
    return dict(zip(known, leverage.holm(list(known.values())), strict=True))


def asked_of(settings: Settings, results: Sequence[ArmResult]) -> tuple[str, tuple[str, ...]] | None:
    """The arm whose gain is asked for, and its references: what has no general rows and chose its own settings."""
    names = [
        name for name in dict.fromkeys(result.arm for result in results) if arm_of(settings, name).hyperparameters_of is None
    ]
    mixed = [name for name in names if arm_of(settings, name).uses_general_data]
    references = tuple(name for name in names if name not in mixed)
    from_pool = [name for name in mixed if arm_of(settings, name).uses_pool]  # a placebo is asked for last
    first = next((name for name in ("tell", "mix", *from_pool, *mixed) if name in mixed), "")
    return (first, references) if mixed and references else None


def outcomes_of(
    results: Sequence[ArmResult], rows: Mapping[int, RunData], task: str, names: Sequence[str], plain: encode.Format
) -> Outcomes:
    """All outcomes of a task; tokens are those of task rows without anchor, weights the first arm's answer tokens.

    No dev scores: a cross-validated loss is one of fewer rows, and which arm is best with these (often k-shot) need not be best
    with all. Among arms without general data the best on test is the reference, which favours it.
    """
    counted = {seed: _tokens(material.tasks, task, plain) for seed, material in rows.items()}
    tokens = {cell: counted[cell[2]][cell[1]] for result in results if (cell := cell_of(result, rows, task))[1]}
    measured = [
        (name, cell_of(result, rows, task), _values(result, task, name), shown)
        for name in names for result in results for shown in (result.predictions[task],)
    ]  # fmt: skip
    lengths: dict[tuple[bool, str], int] = {}  # drift is measured on texts of its own

    def lines() -> Iterator[dict[str, Any]]:
        for metric, cell, found, shown in (*measured, *side_effects(results, rows, task)):
            in_nats = metric not in names or metric in ("nll", TEMPERED)
            for row, value in zip(shown, found, strict=True):
                weight = lengths.setdefault((metric == DRIFT, row.origin), row.n_tokens) if in_nats and metric != LEAKAGE else 1
                line = {"metric": metric, "row": row.origin, "group": row.group, "outcome": value, "weight": weight}
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
                yield f"dependency: {what} anchor", cell, [new.nll_sum - own.nll_sum for new, own in pairs], changed
        if texts := result.probes.get(DRIFT):
            yield DRIFT, cell, [row.nll_sum for row in texts], texts
        if answers := result.probes.get(GENERAL_PROMPTS):
            material = rows[result.seed]
            gold = [row.answer for own in material.tasks if own.name == task for row in own.train]
            general = [row.answer for part in material.held_out.values() for row in part]
            alike = words.in_form_of(gold, general, [row.output or "" for row in answers])
            yield LEAKAGE, cell, [float(flag) for flag in alike], answers


def _tokens(tasks: Sequence[Task], name: str, plain: encode.Format) -> list[int]:
    """Tokens of the first n training rows, by n."""
    own = next(task for task in tasks if task.name == name)
    return [0, *np.cumsum([len(encode.encode(row, plain)) for row in own.train]).tolist()]


def notes(settings: Settings, rows: Mapping[int, RunData], results: Sequence[ArmResult]) -> list[str]:
    """What a reader has to know of the design."""
    compare, first = settings.compare, next(iter(rows.values()))
    found = [
        f"Settings were chosen by {compare.folds}-fold cross-validation inside the task rows "
        + ("of the first seed, for all seeds" if compare.tune == "first" else "of each seed")
        + f", so on {compare.folds - 1}/{compare.folds} of the rows; test rows were scored once."
    ]
    found.append(
        "The reference is the best arm without general data by its test scores, selected anew in each draw: that favours it, "
        "and intervals allow for it."
    )
    own = [result for result in results if arm_of(settings, result.arm).hyperparameters_of is None]
    tried = {result.arm: len(result.tried) for result in own}
    found.append(
        f"{TEMPERED} is the loss once each arm's logits are divided by a temperature, fitted where its settings were chosen: a "
        "gain by nll that it does not show is one of calibration. (An arm that takes another's settings takes its temperature; "
        "word counts have none.)"
    )
    found.append("Settings tried: " + ", ".join(f"{arm} {number}" for arm, number in tried.items()) + ".")
    trained = {result.arm: len(result.tried) for result in own if result.training is not None}
    if trained and min(trained.values()) < max(trained.values()):
        more = [arm for arm, number in trained.items() if number == max(trained.values())]
        found.append(f"More settings were tried for {', '.join(more)} than for other trained arms, which favours them.")
    if ends := at_an_end(own):
        found.append(f"What was chosen is an end of what was tried, beyond which may be better: {'; '.join(ends)}.")
    for result in results:
        best = min(result.tried, key=lambda one: one.dev_nll, default=None)
        if best is not None and result.setting != best.setting:
            found.append(
                f"{result.arm} at {result.size} rows, seed {result.seed}: the training on all rows diverged with "
                f"{best.setting.name}, which was best; the next best setting was used."
            )
    largest = max(result.size for result in results)
    if not settings.outer_folds and all(largest >= len(task.train) for task in first.tasks):
        found.append(f"{largest} rows are all that there are: at this size intervals hold given these rows.")
    if (number := len({result.seed for result in results})) < 5:
        found.append(f"{number} seed{'s' if number > 1 else ''}: fewer than the 5 that intervals need to be narrow.")
    return [*found, *first.notes]


def at_an_end(results: Sequence[ArmResult]) -> list[str]:
    """Where the passes or the learning rate that were chosen are the least or the most that were tried; a single pass is the
    least that there is."""
    found = []
    for result in results:
        for what, unit in (("repeats", "passes"), ("learning_rate", "learning rate")):
            tried = sorted({getattr(one.setting, what) for one in result.tried} - {None})
            chosen = getattr(result.setting, what, None)
            if len(tried) > 1 and chosen in (tried[0], tried[-1]) and (what, chosen) != ("repeats", 1):
                found.append(f"{result.arm} at {result.size} rows, {unit} {chosen:g} of {tried[0]:g} to {tried[-1]:g}")
    return list(dict.fromkeys(found))


def _folded(settings: Settings, rows: Mapping[int, RunData], results: Sequence[ArmResult], name: str) -> list[str]:
    """What a reader has to know of a task without a test file."""
    if next(task for task in settings.tasks if task.name == name).test:
        return []
    seeds = {result.seed for result in results}
    tested = {row.origin for seed in seeds for task in rows[seed].tasks if task.name == name for row in task.test}
    each = "each of them at one seed, where nothing was trained on it" if len(seeds) > 1 else "apart from training"
    return [f"No test file: {len(tested)} of the rows were test rows, {each}."]


def inputs_of(
    settings: Settings, rows: Mapping[int, RunData], results: Sequence[ArmResult], task: str, loaded: LoadedModel
) -> dict[str, Any]:
    """Settings, environment and hashes of every row, so that what was changed can be named."""
    own = [part for each in rows.values() for part in each.tasks if part.name == task]
    kept = {row.origin: row for part in own for row in (*part.train, *part.test)}
    return {
        **inputs.describe(settings, task, kept.values()),
        "environment": environment(loaded),
        "general rows": {str(seed): each.fingerprints["general"] for seed, each in rows.items()},
        "settings chosen": {f"{r.arm} at {r.size} rows, seed {r.seed}": store.plain(r.setting) for r in results},
    }
