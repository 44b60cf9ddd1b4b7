"""A comparison's results -> one certificate a task: outcomes, the question that they answer, hashes of what they rest on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum import certificate, encode, inputs, metrics, scoring, store, words
from fulcrum.arms import arm_of
from fulcrum.cell import GENERAL_PROMPTS
from fulcrum.certificate import Question
from fulcrum.config import Settings
from fulcrum.identity import environment
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.outcomes import Cell, Outcomes
from fulcrum.records import ArmResult, FloatArray, Prediction, Task

LEAKAGE = "leakage"


def folder_of(folder: Path, settings: Settings, task: str) -> Path:
    """Where a task's certificate is: in the run folder, or, of several tasks, in one of its own."""
    return folder if len(settings.tasks) == 1 else folder / "certificates" / task


def certificates(
    folder: Path, settings: Settings, rows: Mapping[int, Material], results: Sequence[ArmResult], loaded: LoadedModel,
    more_notes: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write a certificate for every task, and return them by task; none where no arm, or every arm, has general rows."""
    asked = asked_of(settings, results)
    if asked is None:
        return {}
    arm, references = asked
    found = {}
    for task in next(iter(rows.values())).tasks:
        names = [name for name in task.metrics if metrics.HAS_OUTCOMES[name]]
        if not names:
            continue
        question = Question(
            arm, references, tuple(names), tuple(name for name in names if not metrics.HIGHER_IS_BETTER[name]), task.name,
            notes=(*notes(settings, rows, results), *more_notes),
        )  # fmt: skip
        about = inputs_of(settings, rows, results, task.name, loaded)
        plain = encode.make_format(loaded.tokenizer, None)
        sealed = certificate.write(
            folder_of(folder, settings, task.name), outcomes_of(results, rows, task.name, names, plain), question, about
        )
        found[task.name] = sealed
    return found


def asked_of(settings: Settings, results: Sequence[ArmResult]) -> tuple[str, tuple[str, ...]] | None:
    """The arm whose gain is asked for, and its references: what has no general rows."""
    names = list(dict.fromkeys(result.arm for result in results))
    mixed = [name for name in names if arm_of(settings, name).mixes]
    references = tuple(name for name in names if name not in mixed)
    return ("tell" if "tell" in mixed else mixed[0], references) if mixed and references else None


def outcomes_of(
    results: Sequence[ArmResult], rows: Mapping[int, Material], task: str, names: Sequence[str], plain: encode.Format
) -> Outcomes:
    """All outcomes of a task. Dev scores are turned (higher is better); tokens are those of task rows without anchor."""
    shown = results[0].predictions[task]
    origins, groups = tuple(row.origin for row in shown), tuple(row.group for row in shown)
    lengths = np.array([row.n_tokens for row in shown], dtype=np.float64)
    values: dict[str, dict[Cell, FloatArray]] = {name: {} for name in names}
    dev, tokens = {}, {}
    counted = {seed: _tokens(material.tasks, task, plain) for seed, material in rows.items()}
    for result in results:
        cell = cell_of(result, rows, task)
        for name in names:
            found = scoring.outcomes(result.predictions[task], result.scores[task], name)
            values[name][cell] = np.array(found, dtype=np.float64)
        if result.chosen is not None:
            dev[cell] = -result.tried[result.chosen].dev_nll
        if cell[1]:
            tokens[cell] = float(counted[result.seed][cell[1]])
    all_rows, all_groups = dict.fromkeys(names, origins), dict.fromkeys(names, groups)
    weights = {name: lengths if name == "nll" else np.ones(len(shown)) for name in names}
    for metric, cell, measured, about in side_effects(results, rows, task):
        all_rows[metric] = tuple(row.origin for row in about)
        all_groups[metric] = tuple(row.group for row in about)
        weights[metric] = np.array([1 if metric == LEAKAGE else row.n_tokens for row in about], dtype=np.float64)
        values.setdefault(metric, {})[cell] = np.array(measured, dtype=np.float64)
    return Outcomes(all_rows, all_groups, weights, values, dev, tokens)


def cell_of(result: ArmResult, rows: Mapping[int, Material], task: str) -> Cell:
    """The cell of a result: with as many rows as the task has, where it has fewer than the size."""
    most = next(len(own.train) for own in rows[result.seed].tasks if own.name == task)
    return result.arm, min(result.size, most), result.seed


def side_effects(
    results: Sequence[ArmResult], rows: Mapping[int, Material], task: str
) -> Iterator[tuple[str, Cell, list[float], Sequence[Prediction]]]:
    """Outcomes beside the task: metric, cell, an outcome a row, and these rows.

    Forgetting: nats on held-out general rows. Dependency: the rise of a test row's nats without the anchor, or with another.
    Leakage: whether the answer to a general prompt, asked without anchor, has the form of the task's answers.
    """
    for result in results:
        cell = cell_of(result, rows, task)
        for source, found in result.general.items():
            yield f"forgetting: {source}", cell, [row.nll_sum for row in found], found
        for what in ("without", "wrong"):
            if changed := result.probes.get(f"{task}: {what} anchor"):
                pairs = zip(changed, result.predictions[task], strict=True)
                yield f"dependency: {what} anchor", cell, [new.nll_sum - own.nll_sum for new, own in pairs], changed
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


def notes(settings: Settings, rows: Mapping[int, Material], results: Sequence[ArmResult]) -> list[str]:
    """What a reader has to know of the design."""
    compare, first = settings.compare, next(iter(rows.values()))
    found = [
        f"Settings were chosen by {compare.folds}-fold cross-validation inside the task rows "
        + ("of the first seed, for all seeds" if compare.tune == "first" else "of each seed")
        + "; test rows were scored once."
    ]
    tried = {result.arm: len(result.tried) for result in results}
    found.append("Settings tried: " + ", ".join(f"{arm} {number}" for arm, number in tried.items()) + ".")
    largest = max(result.size for result in results)
    if all(largest >= len(task.train) for task in first.tasks):
        found.append(f"{largest} rows are all that there are: at this size intervals hold given these rows.")
    if len(rows) < 5:
        found.append(f"{len(rows)} seed{'s' if len(rows) > 1 else ''}: fewer than the 5 that intervals need to be narrow.")
    return [*found, *first.notes]


def inputs_of(
    settings: Settings, rows: Mapping[int, Material], results: Sequence[ArmResult], task: str, loaded: LoadedModel
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
