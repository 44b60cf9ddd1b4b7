"""The functions of Fulcrum that Python code calls, and the kinds of runs that it knows.

Models' libraries are loaded by the functions that need them, so that a report or a verification begins at once.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulcrum.config.settings import Settings, load_settings, settings_from_dict
from fulcrum.core import run_folder, store
from fulcrum.core.types import Prediction, Results, Score
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

# What a run gives that depends on nothing but its manifest; its results hold seconds too.
_REPEATABLE = ("adapter_model.safetensors", "predictions.jsonl")


def train(*, resume: bool = False, **settings: Any) -> Results:
    """Train one adapter; the keywords are the keys of the YAML file (`model=`, `task=`, `general=`, `mix=` ...).

    With `resume` the run in `output_dir` is resumed. Raises ConfigError, DataError, ModelError or StoreError, each naming the
    remedy; all are FulcrumErrors.
    """
    return launch(TRAIN, settings_from_dict(settings), resume=resume)


def compare(*, resume: bool = False, **settings: Any) -> Results:
    """Compare arms; the keywords are the keys of the YAML file (`model=`, `task=`, `compare=` ...).

    With `resume` the comparison in `output_dir` is resumed: finished cells are read back. Raises ConfigError, DataError,
    ModelError or StoreError, each naming the remedy; all are FulcrumErrors.
    """
    return launch(COMPARE, settings_from_dict(settings), resume=resume)


def scale(*, resume: bool = False, **settings: Any) -> Results:
    """Train with more and more general data; the keywords are the keys of the YAML file (`model=`, `task=`, `scale=` ...).

    What the curves say is written to `scaling.json` and the report of `output_dir`;
    `fulcrum.mechanism.jumps` and `row_jumps` have its tests for your own arrays.
    With `resume` the run in `output_dir` is resumed. Raises ConfigError, DataError, ModelError or StoreError.
    """
    return launch(SCALE, settings_from_dict(settings), resume=resume)


def quanta(*, resume: bool = False, **settings: Any) -> Results:
    """Cluster answers by their gradients and ask whether general data helped where they are dense; the keywords are the keys of
    the YAML file (`model=`, `task=`, `quanta=` ...).

    What was found is written to `quanta.json` and `quanta.html` of `output_dir`;
    `fulcrum.mechanism.clusters` and `cluster_gains` have its parts for your own arrays.
    With `resume` the run in `output_dir` is resumed. Raises ConfigError, DataError, ModelError or StoreError.
    """
    return launch(QUANTA, settings_from_dict(settings), resume=resume)


def launch(
    kind: RunKind,
    settings: Settings,
    *,
    resume: bool = False,
    progress: "ProgressListener | None" = None,
    **how: Any,
) -> Results:
    """Fill a run folder with a run of this kind, and report to the trackers that the settings name.

    Raises what the experiment raises, and ConfigError if a tracker is not installed; one that fails later ends nothing.
    """
    from fulcrum.experiments import trackers

    with trackers.reporting(settings, progress) as listener:
        return _experiment(kind)(settings, resume=resume, progress=listener, **how)


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
    """Load the base model and the adapter of a run folder; of a comparison, the adapter of `arm` (default: the first of tell,
    mix, sft_anchor, sft in it). The device is this machine's own: a GPU if there is one.

    Raises StoreError if the folder holds no finished run or no such arm, or if its files were changed.
    """
    from fulcrum.experiments import finished

    return finished.load_adapter(folder, arm=arm)


def evaluate(
    folder: Path | str,
    *,
    data: str | None = None,
    arm: str | None = None,
    task: str | None = None,
    metric_names: Sequence[str] = (),
    out: Path | str | None = None,
) -> tuple[tuple[Score, ...], tuple[Prediction, ...]]:
    """Score an adapter on `data` (default: the task's own test rows), and write the predictions to `out`, as JSON lines.

    `out` is a new file in the run folder's eval/ by default. Rejected rows and rows that the run knows are Python warnings.
    Raises DataError (also for rows that the adapter was trained on), ConfigError or StoreError.
    """
    from fulcrum.experiments import finished

    found = finished.evaluate(
        folder, data=data, arm=arm, task=task, metric_names=metric_names, out=out
    )
    rejected = [
        f"{data}: {number} rows left out: {reason}" for reason, number in found.rejects.items()
    ]
    for text in (*rejected, *found.notes):
        warnings.warn(text, stacklevel=2)
    return found.scores, found.predictions


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` of a finished run, or of a folder that `fulcrum certify` wrote, anew, and return its path.

    Raises StoreError if the run or a certificate cannot be read.
    """
    folder = Path(folder)
    if run_report.has_certificate_only(folder):
        return certificate_page.write(folder)
    return run_report.write(folder, kind_of(run_report.load(folder), KINDS))


def verify(path: Path | str) -> Verification:
    """Compare what a finished run made with its manifest, and compute every number of its certificates again from their
    outcomes; or do the latter for one certificate, or for a folder that `fulcrum certify` wrote.

    Raises StoreError if the run is not finished or a certificate cannot be read, DataError if its outcomes cannot.
    """
    path = Path(path)
    if (path / store.MANIFEST).is_file():
        return verification.verify_run(path)
    return verification.verify(path / certificate.FILE if path.is_dir() else path)


def repeat(folder: Path | str, progress: "ProgressListener | None" = None) -> Verification:
    """Make a finished run again from its own settings, in a folder that is then dropped, and compare weights and predictions
    with what its manifest says: the same seed, machine type and number of threads give the same bits.

    What else differs here (machine, versions, code) is named as unchecked: other bits are then no fault. Raises StoreError
    if the run is not finished, and what made it raises.
    """
    import torch

    folder = Path(folder)
    known = store.read_json(folder / store.MANIFEST)
    run_folder.unsealed(folder)  # it must be finished
    torch.set_num_threads(int(known["environment"]["threads"]))
    with tempfile.TemporaryDirectory() as name:
        new = Path(name) / "again"
        settings = load_settings(folder / "config.yaml").model_copy(update={"output_dir": str(new)})
        _experiment(kind_of(known, KINDS))(settings, progress=progress)
        made = store.read_json(new / store.MANIFEST)
    unchecked = []
    if differs := store.changes(known["environment"], made["environment"]):
        unchecked.append(f"made elsewhere, where the bits may be others: {', '.join(differs)}")
    if data := store.changes(known["data"], made["data"]):
        unchecked.append(f"the data are no longer what they were: {', '.join(data)}")
    if (folder / store.PLAN).exists():
        unchecked.append("a time budget may have left seeds out, which were made now")
    before, after = known[run_folder.OUTPUTS], made[run_folder.OUTPUTS]
    wrong = [
        f"{file}: other bits than before"
        for file in before
        if Path(file).name in _REPEATABLE and before[file] != after.get(file)
    ]
    return Verification(wrong, unchecked)
