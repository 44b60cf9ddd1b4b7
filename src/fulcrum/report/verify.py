"""Say what no longer matches a certificate: its numbers, its outcomes, settings, data.

Every number is computed again from the outcomes next to the certificate. Settings and data are
compared with the hashes that the run put into it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulcrum.config import base
from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings
from fulcrum.core import run_folder, store
from fulcrum.core.errors import FulcrumError
from fulcrum.core.types import Example
from fulcrum.data import readers, task_data
from fulcrum.stats import certificate, certification, outcomes
from fulcrum.stats.certificate import CellHash, Certificate, Inputs


class Verification(NamedTuple):
    """What does not match, and what could not be checked, in words."""

    wrong: list[str]
    unchecked: list[str]


def verify_run(folder: Path) -> Verification:
    """Compare what a finished run made with its manifest, and verify its certificates.

    Raises StoreError if the run is not finished or a certificate cannot be read.
    """
    wrong = [f"{folder / text}" for text in run_folder.unsealed(folder)]
    unchecked: list[str] = []
    for file in run_folder.made(folder, certificate.FILE):
        found = verify(file)
        wrong += found.wrong
        unchecked += found.unchecked
    return Verification(wrong, unchecked)


def verify(file: Path) -> Verification:
    """Compute every number of a certificate again, and check its outcomes, settings and data.

    Raises StoreError if the certificate cannot be read, DataError if its outcomes cannot.
    """
    stated = Certificate.read(file)
    wrong = [] if stated.sha256 == stated.seal else [f"{file}: changed since it was sealed"]
    outcomes_file = outcomes.file_in(file.parent)
    found = outcomes.read(outcomes_file)
    changed_cells = _changed_cells(stated.outcomes, certification.hashes(found))
    wrong += [f"{outcomes_file.name}: outcomes of {text}" for text in changed_cells]
    computed = certification.certify(found, stated.question).plain()
    plain = stated.plain()
    for key in ("contradiction", "answers", "side_effects"):
        wrong += _unequal(plain[key], computed[key], key)
    changed, unchecked = check_inputs(stated.inputs, stated.question.task, file.parent)
    return Verification(wrong + changed, unchecked)


def _changed_cells(stated: Sequence[CellHash], found: Sequence[CellHash]) -> list[str]:
    """Name the cells whose outcomes are not those that the certificate was made of."""
    before = {_name_of(cell): cell.sha256 for cell in stated}
    after = {_name_of(cell): cell.sha256 for cell in found}
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


def _unequal(stated: Any, found: Any, where: str) -> list[str]:
    """Say where two plain values differ: numbers by more than rounding."""
    if isinstance(stated, dict) and isinstance(found, dict):
        texts = []
        for key in dict.fromkeys([*stated, *found]):
            texts += _unequal(stated.get(key), found.get(key), f"{where}.{key}")
        return texts
    if isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        texts = []
        for place, (one, other) in enumerate(zip(stated, found, strict=True)):
            texts += _unequal(one, other, f"{where}[{place}]")
        return texts
    if _is_number(stated) and _is_number(found):
        is_equal = bool(np.isclose(stated, found, rtol=1e-6, atol=1e-9))
    else:
        is_equal = type(stated) is type(found) and stated == found
    if is_equal:
        return []
    return [f"{where}: the certificate says {stated!r:.80}, the outcomes give {found!r:.80}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


# ---- settings and data


def row_hash(example: Example) -> str:
    """Return a short hash of a row's texts and its content group."""
    texts = [[message.role, message.content] for message in example.messages]
    return store.fingerprint([*texts, example.group])[:16]


def describe_inputs(settings: Settings, task: str, rows: Iterable[Example]) -> Inputs:
    """Describe the settings and data of a run's task, each row and each file by its hash.

    Files are those of the task, of the general data and of arms' own pools, by their path, and
    those in the run folder that hold rows which a model made.
    """
    own = next(item for item in settings.tasks if item.name == task)
    pools = [
        source for arm in settings.compare.arms if not isinstance(arm, str) for source in arm.pool
    ]
    sources = [*own.train, *own.dev, *own.test, *own.unlabeled, *settings.general, *pools]
    files: dict[str, Path] = {}
    for source in sources:
        files.update(readers.files(source.path) or ())
    made = sorted(Path(settings.output_dir, store.MADE).glob("*.json"))
    by_place = sorted(rows, key=lambda row: row.origin)
    return Inputs(
        settings=settings.described(),
        rows={row.origin: row_hash(row) for row in by_place},
        files={name: store.file_sha256(path) for name, path in sorted(files.items())},
        made={file.name: store.file_sha256(file) for file in made},
    )


def check_inputs(stated: Inputs, task: str, folder: Path) -> Verification:
    """Compare settings and data with the run folder and with the files as they are now."""
    if not stated.settings:
        return Verification([], ["the outcomes came from elsewhere: settings and data are unknown"])
    wrong: list[str] = []
    unchecked: list[str] = []
    places = [place for place in (folder, *folder.parents[:2]) if (place / store.MANIFEST).exists()]
    run = places[0] if places else None
    if run is None:
        unchecked.append(f"settings: no {store.MANIFEST} of the run next to the certificate")
    else:
        manifest = store.read_json(run / store.MANIFEST)
        changed = store.changes(manifest.get("settings"), stated.settings)
        text = f"the run's {store.MANIFEST} and the certificate differ"
        wrong += [f"settings.{name}: {text}" for name in changed]
    for name, sha256 in stated.made.items():
        file = (run or folder) / store.MADE / name
        if not file.exists():
            unchecked.append(f"made rows {store.MADE}/{name}: not here")
        elif store.file_sha256(file) != sha256:
            wrong.append(f"made rows {store.MADE}/{name}: changed")
    rows = _check_rows(stated, task, folder)
    files = _check_files(stated)
    return Verification(
        [*wrong, *rows.wrong, *files.wrong], [*unchecked, *rows.unchecked, *files.unchecked]
    )


def _check_rows(stated: Inputs, task: str, folder: Path) -> Verification:
    try:
        settings = Settings.model_validate({**stated.settings, "output_dir": str(folder)})
        own = next(item for item in settings.tasks if item.name == task)
        found = _rows(own, settings.seed)
    except (FulcrumError, ValueError, StopIteration) as error:
        why = str(error).partition("\n")[0] or f"no task {task!r} in the settings"
        return Verification([], [f"data rows: {why}"])
    wrong = []
    for origin, hashed in stated.rows.items():
        if origin not in found:
            wrong.append(f"data row {origin}: no longer there, or a duplicate of another now")
        elif row_hash(found[origin]) != hashed:
            wrong.append(f"data row {origin}: changed")
    return Verification(wrong, [])


def _rows(task: TaskSettings, seed: int) -> dict[str, Example]:
    parts: Sequence[tuple[base.DataSource, ...]] = (task.train, task.dev, task.test)
    rows: dict[str, Example] = {}
    for sources in parts:
        if sources:
            examples, _ = task_data.read(sources, group=task.group, seed=seed)
            rows.update((row.origin, row) for row in examples)
    return rows


def _check_files(stated: Inputs) -> Verification:
    wrong: list[str] = []
    unchecked: list[str] = []
    for name, sha256 in stated.files.items():
        try:
            ((_, path),) = readers.files(name) or ((name, Path(name)),)
        except FulcrumError:
            paths = "paths are as they were given to the run"
            unchecked.append(f"data file {name}: not here ({paths})")
            continue
        if store.file_sha256(path) != sha256:
            wrong.append(f"data file {name}: changed")
    return Verification(wrong, unchecked)
