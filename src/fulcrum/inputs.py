"""What a certificate rests on beside its outcomes: settings and data, hashed row by row, and whether they are still so."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulcrum import config, ingest, sections, store, tables
from fulcrum.errors import FulcrumError
from fulcrum.records import Example


def row_hash(example: Example) -> str:
    """A short hash of a row's texts and its content group."""
    return store.fingerprint([[message.role, message.content] for message in example.messages] + [example.group])[:16]


def describe(settings: config.Settings, task: str, rows: Iterable[Example]) -> dict[str, Any]:
    """Settings, a hash of every task row by its place, of every local file of task and general data by its path (those of arms'
    own pools too), and of every file in the run folder that holds rows which a model made or answered.
    """
    own = next(item for item in settings.tasks if item.name == task)
    pools = [source for arm in settings.compare.arms if not isinstance(arm, str) for source in arm.pool]
    sources = [*own.train, *own.dev, *own.test, *own.unlabeled, *settings.general, *pools]
    files = dict(pair for source in sources for pair in tables.files(source.path) or ())
    return {
        "settings": settings.described(),
        "rows": {row.origin: row_hash(row) for row in sorted(rows, key=lambda row: row.origin)},
        "files": {name: store.file_sha256(path) for name, path in sorted(files.items())},
        "made": {file.name: store.file_sha256(file) for file in sorted(Path(settings.output_dir, store.MADE).glob("*.json"))},
    }


def check(known: Mapping[str, Any], task: str, folder: Path) -> tuple[list[str], list[str]]:
    """Compare what `describe` told with the run folder and with the files as they are now: what differs, and what could not be
    checked, in words. Nothing is known of outcomes that another trainer made.
    """
    if "settings" not in known:
        return [], ["the outcomes came from elsewhere: settings and data are not known"]
    wrong: list[str] = []
    open_questions: list[str] = []
    manifest = next((place for place in (folder, *folder.parents[:2]) if (place / store.MANIFEST).exists()), None)
    if manifest is None:
        open_questions.append(f"settings: no {store.MANIFEST} of the run beside the certificate")
    else:
        run = store.read_json(manifest / store.MANIFEST)
        changed = store.changes(run.get("settings"), known["settings"])
        wrong += [f"settings.{name}: the run's {store.MANIFEST} and the certificate differ" for name in changed]
    for name, stated in known.get("made", {}).items():
        file = (manifest or folder) / store.MADE / name
        if not file.exists():
            open_questions.append(f"made rows {store.MADE}/{name}: not here")
        elif store.file_sha256(file) != stated:
            wrong.append(f"made rows {store.MADE}/{name}: changed")
    try:
        settings = config.Settings.model_validate({**known["settings"], "output_dir": str(folder)})
        found = _rows(next(item for item in settings.tasks if item.name == task), settings.seed)
    except (FulcrumError, ValueError, StopIteration) as error:
        open_questions.append(f"data rows: {error or f'no task {task!r} in the settings'}")
    else:
        for origin, stated in known["rows"].items():
            if origin not in found:
                wrong.append(f"data row {origin}: no longer there, or a duplicate of another now")
            elif row_hash(found[origin]) != stated:
                wrong.append(f"data row {origin}: changed")
    for name, stated in known["files"].items():
        try:
            ((_, path),) = tables.files(name) or ((name, Path(name)),)
        except FulcrumError:
            open_questions.append(f"data file {name}: not here (paths are as they were given to the run)")
            continue
        if store.file_sha256(path) != stated:
            wrong.append(f"data file {name}: changed")
    return wrong, open_questions


def _rows(task: config.TaskSettings, seed: int) -> dict[str, Example]:
    parts: Sequence[tuple[sections.DataSource, ...]] = (task.train, task.dev, task.test)
    examples = [row for sources in parts if sources for row in ingest.read(sources, group=task.group, seed=seed)[0]]
    return {row.origin: row for row in examples}
