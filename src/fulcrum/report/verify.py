"""Verify a certificate: its numbers, its outcomes, the run's settings and data.

Every number is computed again from the outcomes next to the certificate. Settings and data are
compared with the hashes that the run wrote into it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core import run_folder, store
from fulcrum.core.errors import FulcrumError
from fulcrum.core.types import Example
from fulcrum.data import readers, task_data
from fulcrum.stats import certificate, certification, outcomes
from fulcrum.stats.certificate import CellHash, Certificate, Inputs


class Verification(NamedTuple):
    """The result of a verification, in words."""

    wrong: list[str]  # what does not match
    unchecked: list[str]  # what could not be checked


def verify_run(folder: Path) -> Verification:
    """Compare the files of a finished run with its manifest, and verify its certificates.

    Raises StoreError if the run is not finished or a certificate cannot be read.
    """
    wrong = [f"{folder / text}" for text in run_folder.unsealed(folder)]
    unchecked: list[str] = []
    for file in run_folder.made(folder, certificate.FILE):
        result = verify(file)
        wrong += result.wrong
        unchecked += result.unchecked
    return Verification(wrong, unchecked)


def verify(file: Path) -> Verification:
    """Compute every number of a certificate again, and check its outcomes, settings and data.

    Raises StoreError if the certificate cannot be read, DataError if its outcomes cannot.
    """
    stated = Certificate.read(file)
    wrong = [] if stated.sha256 == stated.seal else [f"{file}: changed since it was sealed"]
    outcomes_file = outcomes.file_in(file.parent)
    measured = outcomes.read(outcomes_file)
    for text in _changed_cells(stated.outcomes, certification.hashes(measured)):
        wrong.append(f"{outcomes_file.name}: outcomes of {text}")
    computed = certification.certify(measured, stated.question).plain()
    plain = stated.plain()
    for key in ("contradiction", "answers", "side_effects"):
        wrong += _unequal(plain[key], computed[key], key)
    inputs = check_inputs(stated.inputs, stated.question.task, file.parent)
    return Verification(wrong + inputs.wrong, inputs.unchecked)


def _changed_cells(stated: Sequence[CellHash], present: Sequence[CellHash]) -> list[str]:
    """Return the cells whose outcomes are not those that the certificate was made from."""
    before = {_name_of(cell): cell.sha256 for cell in stated}
    after = {_name_of(cell): cell.sha256 for cell in present}
    changed = []
    for name in sorted({*before, *after}):
        if name not in after:
            changed.append(f"{name}: missing")
        elif name not in before:
            changed.append(f"{name}: not in the certificate")
        elif before[name] != after[name]:
            changed.append(f"{name}: changed")
    return changed


def _name_of(cell: CellHash) -> str:
    name = f"{cell.arm} at {cell.size} rows, seed {cell.seed}"
    return name if cell.metric is None else f"{name}, {cell.metric}"


def _unequal(stated: Any, computed: Any, key: str) -> list[str]:
    """Return where two plain values differ: numbers by more than rounding."""
    if isinstance(stated, dict) and isinstance(computed, dict):
        texts = []
        for name in dict.fromkeys([*stated, *computed]):
            texts += _unequal(stated.get(name), computed.get(name), f"{key}.{name}")
        return texts
    if isinstance(stated, list) and isinstance(computed, list) and len(stated) == len(computed):
        texts = []
        for place, (one, other) in enumerate(zip(stated, computed, strict=True)):
            texts += _unequal(one, other, f"{key}[{place}]")
        return texts
    if _is_number(stated) and _is_number(computed):
        is_equal = bool(np.isclose(stated, computed, rtol=1e-6, atol=1e-9))
    else:
        is_equal = type(stated) is type(computed) and stated == computed
    if is_equal:
        return []
    return [f"{key}: the certificate says {stated!r:.80}, the outcomes give {computed!r:.80}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


# ---- settings and data


def row_hash(example: Example) -> str:
    """Return a short hash of a row's texts and its content group."""
    texts = [[message.role, message.content] for message in example.messages]
    return store.fingerprint([*texts, example.group])[:16]


def describe_inputs(settings: Settings, task: str, rows: Iterable[Example]) -> Inputs:
    """Return the settings and data of a run's task, each row and each file by its hash.

    Files are those of the task, of the general data and of arms' own pools, by their path, and
    those in the run folder with rows that a model made.
    """
    own = _find_task(settings, task)
    sources = [*own.train, *own.dev, *own.test, *own.unlabeled, *settings.general]
    for arm in settings.compare.arms:
        if not isinstance(arm, str):
            sources += arm.pool
    files: dict[str, Path] = {}
    for source in sources:
        files.update(readers.files(source.path) or ())
    made = sorted(Path(settings.output_dir, store.MADE).glob("*.json"))
    by_origin = sorted(rows, key=lambda row: row.origin)
    return Inputs(
        settings=settings.described(),
        rows={row.origin: row_hash(row) for row in by_origin},
        files={name: store.file_sha256(path) for name, path in sorted(files.items())},
        made={file.name: store.file_sha256(file) for file in made},
    )


def _find_task(settings: Settings, name: str) -> TaskSettings:
    return next(task for task in settings.tasks if task.name == name)


def check_inputs(stated: Inputs, task: str, folder: Path) -> Verification:
    """Compare settings and data with the run folder and with the files as they are now."""
    if not stated.settings:
        return Verification([], ["the outcomes came from elsewhere: settings and data are unknown"])
    run = _find_run(folder)
    checks = (
        _check_settings(stated, run),
        _check_made(stated, run or folder),
        _check_rows(stated, task, folder),
        _check_files(stated),
    )
    wrong: list[str] = []
    unchecked: list[str] = []
    for check in checks:
        wrong += check.wrong
        unchecked += check.unchecked
    return Verification(wrong, unchecked)


def _find_run(folder: Path) -> Path | None:
    """Return the run folder that a certificate's folder is in."""
    for place in (folder, *folder.parents[:2]):
        if (place / store.MANIFEST).exists():
            return place
    return None


def _check_settings(stated: Inputs, run: Path | None) -> Verification:
    if run is None:
        missing = f"settings: no {store.MANIFEST} of the run next to the certificate"
        return Verification([], [missing])
    manifest = store.read_json(run / store.MANIFEST)
    wrong = []
    for name in store.changes(manifest.get("settings"), stated.settings):
        wrong.append(f"settings.{name}: the run's {store.MANIFEST} and the certificate differ")
    return Verification(wrong, [])


def _check_made(stated: Inputs, run: Path) -> Verification:
    """Check the files with rows that a model made."""
    wrong: list[str] = []
    unchecked: list[str] = []
    for name, sha256 in stated.made.items():
        file = run / store.MADE / name
        if not file.exists():
            unchecked.append(f"made rows {store.MADE}/{name}: not here")
        elif store.file_sha256(file) != sha256:
            wrong.append(f"made rows {store.MADE}/{name}: changed")
    return Verification(wrong, unchecked)


def _check_rows(stated: Inputs, task: str, folder: Path) -> Verification:
    try:
        where = "its settings"
        settings = settings_from_dict({**stated.settings, "output_dir": str(folder)}, where)
        rows = _read_rows(_find_task(settings, task), settings.seed)
    except (FulcrumError, ValueError, StopIteration) as error:
        why = str(error).partition("\n")[0] or f"no task {task!r} in the settings"
        return Verification([], [f"data rows: {why}"])
    wrong = []
    for origin, stated_hash in stated.rows.items():
        if origin not in rows:
            wrong.append(f"data row {origin}: no longer there, or a duplicate of another now")
        elif row_hash(rows[origin]) != stated_hash:
            wrong.append(f"data row {origin}: changed")
    return Verification(wrong, [])


def _read_rows(task: TaskSettings, seed: int) -> dict[str, Example]:
    """Return the rows of a task's files, by origin."""
    rows: dict[str, Example] = {}
    for sources in (task.train, task.dev, task.test):
        if sources:
            examples = task_data.read_rows(sources, group=task.group, seed=seed).examples
            for example in examples:
                rows[example.origin] = example
    return rows


def _check_files(stated: Inputs) -> Verification:
    wrong: list[str] = []
    unchecked: list[str] = []
    for name, sha256 in stated.files.items():
        try:
            ((_, path),) = readers.files(name) or ((name, Path(name)),)
        except FulcrumError:
            unchecked.append(
                f"data file {name}: not here (paths are as they were given to the run)"
            )
            continue
        if store.file_sha256(path) != sha256:
            wrong.append(f"data file {name}: changed")
    return Verification(wrong, unchecked)
