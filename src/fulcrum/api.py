"""The functions that Python code calls, and the kinds of runs that Fulcrum knows.

Torch and transformers are imported by the functions that need them, so that a report or a
verification starts at once.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fulcrum.config import parsing
from fulcrum.config.sections import MixSettings, TaskSettings
from fulcrum.config.settings import Settings, load_settings, settings_from_dict
from fulcrum.core import run_folder, store, user_paths
from fulcrum.core.errors import FulcrumError
from fulcrum.core.types import Prediction, Results, Score
from fulcrum.data.python_rows import as_source
from fulcrum.mechanism.quanta_report import QUANTA
from fulcrum.mechanism.scale_report import SCALE
from fulcrum.report import certificate_page, run_report
from fulcrum.report import verify as verification
from fulcrum.report.run_kinds import COMPARE, TRAIN, Kinds, RunKind, kind_of
from fulcrum.report.verify import Verification
from fulcrum.stats import certificate

if TYPE_CHECKING:
    from fulcrum.core.progress import ProgressListener
    from fulcrum.experiments.finished import Adapter

KINDS: Kinds = {kind.name: kind for kind in (TRAIN, COMPARE, SCALE, QUANTA)}

_ROWS = ("train", "dev", "test", "unlabeled")  # of a task
_IN_PYTHON = {"--resume": "resume=True", "--force-new": "another output_dir"}

# Files of a run that depend on its manifest alone; results.json holds seconds too.
_REPEATABLE = ("adapter_model.safetensors", "predictions.jsonl")


def train(*, resume: bool = False, **settings: Any) -> Results:
    """Train one adapter.

    The keywords are the keys of the YAML file (`model=`, `task=`, `general=`, `mix=` ...). With
    `resume` the run in `output_dir` is resumed. Raises ConfigError, DataError, ModelError or
    StoreError, each naming the remedy; all are FulcrumErrors.
    """
    return _run(TRAIN, settings, resume=resume)


def compare(*, resume: bool = False, **settings: Any) -> Results:
    """Compare arms.

    The keywords are the keys of the YAML file (`model=`, `task=`, `compare=` ...). With `resume`
    the comparison in `output_dir` is resumed: finished cells are read back. Raises ConfigError,
    DataError, ModelError or StoreError, each naming the remedy; all are FulcrumErrors.
    """
    return _run(COMPARE, settings, resume=resume)


def scale(*, resume: bool = False, **settings: Any) -> Results:
    """Train with more and more general data.

    The keywords are the keys of the YAML file (`model=`, `task=`, `scale=` ...). The results are
    written to `scaling.json` and the report of `output_dir`; `fulcrum.mechanism.jumps` and
    `row_jumps` have the same tests for your own arrays. With `resume` the run in `output_dir` is
    resumed. Raises ConfigError, DataError, ModelError or StoreError.
    """
    return _run(SCALE, settings, resume=resume)


def quanta(*, resume: bool = False, **settings: Any) -> Results:
    """Cluster answers by their gradients, and test if general data helped most in dense clusters.

    The keywords are the keys of the YAML file (`model=`, `task=`, `quanta=` ...). The results are
    written to `quanta.json` and `quanta.html` of `output_dir`; `fulcrum.mechanism.clusters`
    and `cluster_gains` have the same steps for your own arrays. With `resume` the run in
    `output_dir` is resumed. Raises ConfigError, DataError, ModelError or StoreError.
    """
    return _run(QUANTA, settings, resume=resume)


class Task(TaskSettings):
    """The user's few rows and how they are scored: the `task:` section of the settings.

    Rows may be paths, lists of dicts, data frames and data sets. Raises ConfigError for keywords
    and values that do not fit, naming the nearest.
    """

    def __init__(self, **settings: Any) -> None:
        with _explained(TaskSettings, "Task"):
            super().__init__(**_with_files(settings, _ROWS))


class Mix(MixSettings):
    """How general rows are mixed in: the `mix:` section of the settings.

    Raises ConfigError for keywords and values that do not fit, naming the nearest.
    """

    def __init__(self, **settings: Any) -> None:
        with _explained(MixSettings, "Mix"):
            super().__init__(**settings)


def launch(
    kind: RunKind,
    settings: Settings,
    *,
    resume: bool = False,
    progress: "ProgressListener | None" = None,
    **how: Any,
) -> Results:
    """Fill a run folder with a run of this kind, and report to the trackers in the settings.

    Raises what the experiment raises, and ConfigError if a tracker is not installed. A tracker that
    fails later does not stop the run.
    """
    from fulcrum.experiments import trackers

    with trackers.reporting(settings, progress) as listener:
        return _experiment(kind)(settings, resume=resume, progress=listener, **how)


def _run(kind: RunKind, given: Mapping[str, Any], *, resume: bool) -> Results:
    """Run an experiment for Python code: rows may be objects, remedies are Python's."""
    settings = _with_files(given, ("general",))
    for name in ("task", "tasks"):
        sections = settings.get(name)
        if isinstance(sections, Mapping):
            settings[name] = _with_files(sections, _ROWS)
        elif isinstance(sections, list | tuple):
            items = [_with_files(s, _ROWS) if isinstance(s, Mapping) else s for s in sections]
            settings[name] = items
    try:
        return launch(kind, settings_from_dict(settings), resume=resume)
    except FulcrumError as error:
        said = str(error)
        for flag, words in _IN_PYTHON.items():
            said = said.replace(flag, words)
        raise type(error)(said) from error


def _with_files(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return settings whose rows, under these names, are in files."""
    stored = dict(settings)
    for name in names:
        if name in stored:
            stored[name] = as_source(stored[name])
    return stored


@contextmanager
def _explained(section: type[BaseModel], name: str) -> Iterator[None]:
    """Turn what pydantic finds wrong with a section into the ConfigError of a settings file."""
    try:
        yield
    except ValidationError as error:
        raise parsing.explain(error, section, name, {}) from None


def _experiment(kind: RunKind) -> Callable[..., Results]:
    """Return the function that fills a run folder of this kind."""
    from fulcrum.experiments.compare import run_comparison
    from fulcrum.experiments.train import run_training
    from fulcrum.mechanism.quanta import run_quanta
    from fulcrum.mechanism.scale import run_scale

    experiments: dict[str, Callable[..., Results]] = {
        TRAIN.name: run_training,
        COMPARE.name: run_comparison,
        SCALE.name: run_scale,
        QUANTA.name: run_quanta,
    }
    return experiments[kind.name]


def load_adapter(folder: Path | str, *, arm: str | None = None) -> "Adapter":
    """Load the base model and the adapter of a run folder, on a GPU if there is one.

    For a comparison it is the adapter of `arm` (default: the first of tell, mix, sft_anchor, sft in
    it). Raises StoreError if the folder holds no finished run or no such arm, or if its files were
    changed.
    """
    from fulcrum.experiments import finished

    return finished.load_adapter(user_paths.expanded(folder), arm=arm)


def evaluate(
    folder: Path | str,
    *,
    data: str | None = None,
    arm: str | None = None,
    task: str | None = None,
    metric_names: Sequence[str] = (),
    out: Path | str | None = None,
) -> tuple[tuple[Score, ...], tuple[Prediction, ...]]:
    """Score an adapter on `data` (default: the task's own test rows), and store the predictions.

    They are written as JSON lines to `out` (default: a new file in the run folder's eval/). Python
    warnings name rejected rows, and rows that the run has seen. Raises DataError (also for rows
    that the adapter was trained on), ConfigError or StoreError.
    """
    from fulcrum.experiments import finished

    evaluation = finished.evaluate(
        user_paths.expanded(folder),
        data=data,
        arm=arm,
        task=task,
        metric_names=metric_names,
        out=None if out is None else user_paths.expanded(out),
    )
    for reason, number in evaluation.rejects.items():
        warnings.warn(f"{data}: {number} rows left out: {reason}", stacklevel=2)
    for note in evaluation.notes:
        warnings.warn(note, stacklevel=2)
    return evaluation.scores, evaluation.predictions


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` again for a finished run or a folder of `fulcrum certify`.

    Returns its path. Raises StoreError if the run or a certificate cannot be read.
    """
    folder = Path(user_paths.expanded(folder))
    if run_report.has_certificate_only(folder):
        return certificate_page.write(folder)
    return run_report.write(folder, kind_of(run_report.load(folder), KINDS))


def verify(path: Path | str) -> Verification:
    """Compare a finished run's files with its manifest, and recompute its certificates.

    Every number of a certificate is computed again from its outcomes. For one certificate, or for a
    folder that `fulcrum certify` wrote, only this is done. Raises StoreError if the run is not
    finished or a certificate cannot be read, DataError if its outcomes cannot.
    """
    path = Path(user_paths.expanded(path))
    if (path / store.MANIFEST).is_file():
        return verification.verify_run(path)
    return verification.verify(path / certificate.FILE if path.is_dir() else path)


def repeat(folder: Path | str, progress: "ProgressListener | None" = None) -> Verification:
    """Run a finished run again from its own settings, and compare weights and predictions.

    The same seed, machine type and number of threads give the same bits as its manifest says. If
    anything else differs (machine, versions, code), it is listed as unchecked: other bits are then
    no fault. The new run is made in a temporary folder. Raises StoreError if the run is not
    finished, and whatever the run itself raises.
    """
    import torch

    folder = Path(user_paths.expanded(folder))
    known = store.read_json(folder / store.MANIFEST)
    run_folder.unsealed(folder)  # it must be finished
    torch.set_num_threads(int(known["environment"]["threads"]))
    with tempfile.TemporaryDirectory() as name:
        new = Path(name) / "again"
        settings = load_settings(folder / "config.yaml").model_copy(update={"output_dir": str(new)})
        _experiment(kind_of(known, KINDS))(settings, progress=progress)
        made = store.read_json(new / store.MANIFEST)
    unchecked = []
    environment = store.changes(known["environment"], made["environment"])
    if environment:
        unchecked.append(f"made elsewhere, where the bits may be others: {', '.join(environment)}")
    data = store.changes(known["data"], made["data"])
    if data:
        unchecked.append(f"the data are no longer what they were: {', '.join(data)}")
    if (folder / store.PLAN).exists():
        unchecked.append("a time budget may have left seeds out, which were made now")
    before = known[run_folder.OUTPUTS]
    after = made[run_folder.OUTPUTS]
    wrong = []
    for file, sha256 in before.items():
        if Path(file).name in _REPEATABLE and sha256 != after.get(file):
            wrong.append(f"{file}: other bits than before")
    return Verification(wrong, unchecked)
