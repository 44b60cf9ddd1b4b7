"""Arms x sizes x seeds on the same rows: settings tuned inside the task rows, refitted on all of them, scored once on test.

A *unit* is what is run and stored at once: a trial (cross-validation of one setting) or a final training with its test. All
trials come first, for a final one takes the best of them. A killed comparison goes on without redoing a finished unit.
"""

import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fulcrum import cell, export, scoring, selfmade, store
from fulcrum.arms import chosen_arms, sizes_of, trials
from fulcrum.cell import Silent, Watcher
from fulcrum.config import Arm, Settings
from fulcrum.errors import StoreError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.proof import certificates
from fulcrum.records import ArmResult, Difference, Example, Results, Setting, Tried
from fulcrum.run import begin, finish, shown_size, writes

# Which pairs answer a question: what did TELL bring over X, mixing alone, the anchor alone, training at all?
_REFERENCES = ("sft_anchor", "sft", "sft_kl", "soup", "kshot", "tfidf", "base_anchor", "base")  # without general data
_RIVALS = (  # with general data
    "mix", "general_then_task", "task_then_general", "replay_10", "placebo_permuted", "placebo_own_answers", "selfgen",
    "general_only",
)  # fmt: skip
_PAIRS = (
    *(("tell", name) for name in _REFERENCES), *(("tell", name) for name in _RIVALS), *(("mix", name) for name in _REFERENCES),
    ("sft_anchor", "sft"), ("sft", "kshot"), ("sft", "base"), ("kshot", "base"), ("base_anchor", "base"),
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One arm at a size and a seed: a trial of `setting`, or (without one) the training on all rows after these `tried`."""

    arm: Arm
    size: int
    seed: int
    setting: Setting | None = None
    tried: tuple[Tried, ...] = ()

    @property
    def name(self) -> str:
        """What its file is called."""
        cell = f"{self.arm.name}-{self.size}-seed{self.seed}"
        return cell if self.setting is None else f"{cell}-{self.setting.name}"


@dataclass(frozen=True)
class Study:
    """What every unit of a comparison needs to know: plain values, so that another process can run it."""

    settings: Settings
    rows: Mapping[int, Material]  # by seed
    folder: Path

    def sizes(self, arm: Arm) -> tuple[int, ...]:
        """The sizes of an arm; 0, all rows, for one that does not depend on them."""
        return sizes_of(self.settings, arm, self.rows[self.seeds[0]].longest) if arm.seeded else (0,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the chains."""
        return tuple(self.rows)

    def at(self, unit: Unit) -> Material:
        """The rows of a unit: what does not depend on their number is measured on the most that any arm is given."""
        compare, rows = self.settings.compare, self.rows[unit.seed]
        every = [*(compare.sizes or (rows.longest,)), *(size for sizes in compare.sizes_of.values() for size in sizes)]
        return rows.at(unit.size or max(every))


def compare(settings: Settings, *, resume: bool = False, watcher: Watcher | None = None) -> Results:
    """Run every arm at every size and seed, and fill the run folder with results, certificate, predictions and report.

    Fairness (rules a to i of a fair comparison): the same nested task rows in all arms, dev rows among them; settings chosen by
    cross-validation inside these, as many for each arm; no arm may use more optimizer steps than TELL; learning rates decay
    fully within them; the last step counts; test is scored once per arm, size and seed.
    Raises ConfigError, DataError, ModelError or StoreError.
    """
    watcher, started = watcher or Silent(), time.perf_counter()
    arms = chosen_arms(settings)
    loaded, rows, folder = begin("compare", settings, arms, settings.seeds, resume, watcher)
    by_seed = selfmade.with_made_rows(
        dict(zip(settings.seeds, rows, strict=True)), loaded, arms, settings, folder if writes() else None,
        partial(watcher.count, "general rows that the model makes itself"),
    )  # fmt: skip
    study = Study(settings, by_seed, folder)

    def run(units: Sequence[Unit]) -> list[Any]:
        places = [f"{place} of {len(units)}" for place in range(1, len(units) + 1)]
        return [_stored(study, loaded, unit, watcher, place) for unit, place in zip(units, places, strict=True)]

    tries = list(plan_trials(study, arms, loaded))
    watcher.stage(f"{len(tries)} trials, by cross-validation inside the task rows")
    finals = list(plan_finals(study, arms, list(zip(tries, run(tries), strict=True))))
    watcher.stage(f"{len(finals)} trainings on all task rows, each with its test")
    results = run(finals)
    at = shown_size(results, settings)
    shown = [result for result in results if result.size in (0, at)]
    differences = paired_differences(shown, settings)
    if writes():
        certificates(folder, settings, study.rows, results, loaded)
    return finish("compare", settings, folder, loaded, rows, results, differences, started)


def plan_trials(study: Study, arms: Iterable[Arm], loaded: LoadedModel) -> Iterable[Unit]:
    """Every setting of every arm and size: at each seed, or at the first for all."""
    for seed in study.seeds[:1] if study.settings.compare.tune == "first" else study.seeds:
        for arm in arms:
            for size in study.sizes(arm) if arm.seeded or seed == study.seeds[0] else ():
                rows = study.at(Unit(arm, size, seed))
                settings: Sequence[Setting] = (Setting(),)
                if arm.shots:
                    settings = cell.numbers_of_shots(rows, loaded, study.settings)
                elif arm.trained:
                    settings = trials(rows, arm, study.settings)
                for setting in settings:
                    yield Unit(arm, size, seed, setting)


def plan_finals(study: Study, arms: Sequence[Arm], tried: Sequence[tuple[Unit, Tried]]) -> Iterable[Unit]:
    """Every arm, size and seed with what was tried for it. What does not depend on the seed is run at the first."""
    first = study.seeds[0]
    for seed in study.seeds:
        for arm in arms:
            for size in study.sizes(arm) if arm.seeded or seed == first else ():
                own = seed if study.settings.compare.tune == "each" else first
                found = [result for unit, result in tried if (unit.arm.name, unit.size, unit.seed) == (arm.name, size, own)]
                yield Unit(arm, size, seed, None, tuple(found))


def perform(study: Study, loaded: LoadedModel, unit: Unit, watcher: Watcher) -> Tried | ArmResult:
    """Run a unit. The adapters of the first seed's largest sizes are kept."""
    rows, settings = study.at(unit), study.settings
    place = study.folder if writes() else None
    if unit.setting is not None:
        return cell.tune(rows, loaded, unit.arm, settings, unit.setting, unit.seed, unit.name, place, watcher)
    first = unit.seed == study.seeds[0] and unit.size == max(study.sizes(unit.arm))
    result = cell.final(
        rows, loaded, unit.arm, settings, unit.tried, unit.seed, unit.name, place, watcher, probed=first
    )  # fmt: skip
    if writes() and unit.arm.trained and first:
        anchors = {task.name: task.anchor if unit.arm.anchored else None for task in rows.tasks}
        export.save_adapter(loaded, study.folder / "adapters" / unit.arm.name, anchors)
    return replace(result, size=unit.size)


def _stored(study: Study, loaded: LoadedModel, unit: Unit, watcher: Watcher, place: str) -> Tried | ArmResult:
    """Read a unit back if it is finished, else run and store it."""
    file = study.folder / "cells" / f"{unit.name}.json"
    if file.exists():
        return read_unit(study, unit, file)
    watcher.stage(f"{unit.name} ({place})")
    result = perform(study, loaded, unit, watcher)
    if writes():
        store.write_json(file, _shortened(result), indent=None)
        for training in (study.folder / "checkpoints").glob(f"{unit.name}-*"):
            shutil.rmtree(training)  # a finished unit is never trained again
        shutil.rmtree(study.folder / "checkpoints" / unit.name, ignore_errors=True)
    return result


def _shortened(result: Tried | ArmResult) -> dict[str, Any]:
    """A result as it is stored: without the texts of test rows, which are known."""
    found: dict[str, Any] = store.plain(result)
    for part in ("predictions", "general", "probes"):
        for predictions in found.get(part, {}).values():
            for prediction in predictions:
                for name in ("prompt", "gold", "group"):
                    del prediction[name]
    return found


def read_unit(study: Study, unit: Unit, file: Path) -> Tried | ArmResult:
    """A stored result, its predictions with the texts of their rows again. Raises StoreError for anything else."""
    rows = study.rows[unit.seed]
    tests = {task.name: task.test for task in rows.tasks}
    general = next((part for part in rows.held_out.values() if part), ())
    probed = {f"{name}: {what} anchor": own for name, own in tests.items() for what in ("without", "wrong")}
    known: dict[str, Mapping[str, Sequence[Example]]] = {
        "predictions": tests, "general": rows.held_out, "probes": {**probed, cell.GENERAL_PROMPTS: general}
    }  # fmt: skip
    content = store.read_json(file)
    try:
        for tried in content["tried"] if unit.setting is None else [content]:
            tried["dev_nll"] = math.inf if tried["dev_nll"] is None else tried["dev_nll"]  # JSON has no infinity
        if unit.setting is not None:
            return TypeAdapter(Tried).validate_python(content)
        for part, examples in known.items():
            for name, predictions in content[part].items():
                by_origin = {example.origin: example for example in examples[name]}
                for prediction in predictions:
                    row = by_origin[prediction["origin"]]
                    prediction |= {"prompt": row.question, "gold": row.answer, "group": row.group}
        return TypeAdapter(ArmResult).validate_python(content)
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{file}: not a finished cell, the file was changed or damaged; delete it to run it anew") from error


def paired_differences(results: Sequence[ArmResult], settings: Settings) -> list[Difference]:
    """Paired test differences of the telling pairs, for every task and every metric that is a mean over rows."""
    by_arm: dict[str, list[ArmResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    own_pairs = [(name, "sft") for name in by_arm if name not in {*_REFERENCES, *_RIVALS, "tell"}]
    found = []
    for arm, reference in (*_PAIRS, *own_pairs):
        for task in settings.tasks if arm in by_arm and reference in by_arm else ():
            for metric in task.metrics:
                own, other = (
                    [
                        scoring.outcomes(result.predictions[task.name], result.scores[task.name], metric)
                        for result in by_arm[name]
                    ]
                    for name in (arm, reference)
                )
                rows = by_arm[arm][0].predictions[task.name]
                found.append(scoring.paired(task.name, metric, arm, reference, own, other, rows))
    return [difference for difference in found if difference is not None]
