"""The units of a comparison: what is run, stored and read back at once, here or in another process.

A unit is a trial (cross-validation of one setting) or a final training with its test. It is a value, and so is the study that
it belongs to: both travel to workers. What a unit gives depends on these alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fulcrum import cell, export, metrics, store
from fulcrum.arms import asked_anchor, general_count, sizes_of
from fulcrum.cell import Watcher
from fulcrum.config import Arm, Settings
from fulcrum.errors import StoreError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import ArmResult, Example, Setting, Tried


@dataclass(frozen=True)
class Unit:
    """One arm at a size and a seed: a trial of `setting`, or (without one) the training on all rows after these `tried`; after
    none, as the arm itself says."""

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
class Speed:
    """Seconds a row: of training on a task row and on a general row, of scoring one, of an answer; and what each training takes
    to begin. As it stands: a guess whose proportions alone matter.
    """

    task: float = 1.0
    general: float = 1.0
    scored: float = 0.3
    answered: float = 1.0
    start: float = 1.0  # of each training


@dataclass(frozen=True)
class Study:
    """What every unit of a comparison needs to know: plain values, so that another process can run it."""

    settings: Settings
    rows: Mapping[int, Material]  # by seed
    folder: Path
    speed: Speed = Speed()
    probed: bool = True  # whether side effects are looked for, and adapters kept

    def sizes(self, arm: Arm) -> tuple[int, ...]:
        """The sizes of an arm; 0, all rows, for one that does not depend on them."""
        return sizes_of(self.settings, arm, self.rows[self.seeds[0]].longest) if arm.seeded else (0,)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the chains."""
        return tuple(self.rows)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The seeds at which an arm is run: the first, where neither it nor the test rows depend on them."""
        return self.seeds if arm.seeded or self.settings.outer_folds else self.seeds[:1]

    def cost(self, unit: Unit) -> float:
        """About how many seconds a unit takes at the study's speed."""
        rows, speed = self.at(unit), self.speed
        setting = unit.setting or next((found for _, found, _ in cell.best_first(unit.arm, unit.tried)), Setting())
        task = rows.n_task * unit.arm.task_rows * setting.repeats
        trained = task * speed.task + general_count(rows, unit.arm, setting.repeats) * speed.general
        folds, trainings = self.settings.compare.folds, unit.arm.members if unit.arm.trained else 0
        if unit.setting is not None:
            return trainings * (trained * (folds - 1) + folds * speed.start) + rows.n_task * speed.scored
        tests = [(task, len(task.test)) for task in rows.tasks]
        answers = sum(number for task, number in tests if metrics.needs_generation(task.metrics))
        scored = sum(number for _, number in tests) + sum(map(len, rows.held_out.values()))
        if self.is_probed(unit):
            scored += 3 * sum(number for _, number in tests) * unit.arm.anchored
            prompts = max((min(len(part), cell.PROBED) for part in rows.held_out.values()), default=0)
            answers += prompts * (2 if unit.arm.trained else 1)
        return trainings * (trained + speed.start) + scored * speed.scored + answers * speed.answered

    def is_probed(self, unit: Unit) -> bool:
        """Whether its side effects are looked for, and its adapter kept: the first seed's largest sizes."""
        return self.probed and unit.seed == self.seeds[0] and unit.size == max(self.sizes(unit.arm))

    def at(self, unit: Unit) -> Material:
        """The rows of a unit: what does not depend on their number is measured on the most that any arm is given."""
        compare, rows = self.settings.compare, self.rows[unit.seed]
        every = [*(compare.sizes or (rows.longest,)), *(size for sizes in compare.sizes_of.values() for size in sizes)]
        return rows.at(unit.size or max(every))


def perform(study: Study, loaded: LoadedModel, unit: Unit, watcher: Watcher, folder: Path | None) -> Tried | ArmResult:
    """Run a unit. In `folder` are its checkpoints, and the adapters of the first seed's largest sizes (none: kept nowhere)."""
    rows, settings = study.at(unit), study.settings
    if unit.setting is not None:
        return cell.tune(rows, loaded, unit.arm, settings, unit.setting, unit.seed, unit.name, folder, watcher)
    kept = study.is_probed(unit)
    result = cell.final(rows, loaded, unit.arm, settings, unit.tried, unit.seed, unit.name, folder, watcher, probed=kept)
    if folder is not None and _keeps_adapter(study, unit):
        anchors = {task.name: asked_anchor(unit.arm, task, settings) for task in rows.tasks}
        export.save_adapter(loaded, _adapter(folder, unit), anchors)
    return result


def _keeps_adapter(study: Study, unit: Unit) -> bool:
    return unit.setting is None and unit.arm.trained and study.is_probed(unit)


def _adapter(folder: Path, unit: Unit) -> Path:
    return folder / "adapters" / unit.arm.name


def keep(study: Study, unit: Unit, result: Tried | ArmResult) -> None:
    """Store a finished unit, atomically, and drop its checkpoints: it is never trained again."""
    content = _shortened(result)
    store.write_json(_file(study, unit), {"sha256": store.fingerprint(content), **content}, indent=None)
    for part in ("fold", "member", "attempt"):  # no more: another unit's name may begin like this one's
        for training in (study.folder / "checkpoints").glob(f"{unit.name}-{part}*"):
            store.drop_folder(training)
    store.drop_folder(study.folder / "checkpoints" / unit.name)


def _file(study: Study, unit: Unit) -> Path:
    return study.folder / "cells" / f"{unit.name}.json"


def _shortened(result: Tried | ArmResult) -> dict[str, Any]:
    """A result as it is stored: without the texts of test rows, which are known."""
    found: dict[str, Any] = store.plain(result)
    for part in ("predictions", "general", "probes"):
        for predictions in found.get(part, {}).values():
            for prediction in predictions:
                for name in ("prompt", "gold", "group"):
                    del prediction[name]
    return found


def read(study: Study, unit: Unit) -> Tried | ArmResult | None:
    """A stored result, its predictions with the texts of their rows again; None where there is none, or where the adapter that
    it kept is no longer whole.

    Raises StoreError for anything else.
    """
    file = _file(study, unit)
    if not file.exists() or (_keeps_adapter(study, unit) and store.damaged(_adapter(study.folder, unit))):
        return None
    rows = study.rows[unit.seed]
    tests = {task.name: task.test for task in rows.tasks}
    general = next((part for part in rows.held_out.values() if part), ())
    probed = {f"{name}: {what} anchor": own for name, own in tests.items() for what in cell.OTHER_ANCHORS}
    known: dict[str, Mapping[str, Sequence[Example]]] = {
        "predictions": tests, "general": rows.held_out, "probes": {**probed, cell.GENERAL_PROMPTS: general, cell.DRIFT: general}
    }  # fmt: skip
    content = store.read_json(file)
    try:
        if content.pop("sha256") != store.fingerprint(content):
            raise KeyError("sha256")
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
