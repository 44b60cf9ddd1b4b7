"""Curves, scores and certificates where people look at theirs: TensorBoard, Trackio, W&B, MLflow, through Accelerate's classes.

A listener that passes everything on, and sends the points that `events.jsonl` holds. Every training is a run of its own, for
these tools lay runs over each other by the names of their curves, and steps count from 1 in each; scores and files are one
more, `results`. Nothing leaves the machine unless the user's environment says so.

Invariant: no tracker ends a training or holds it up. Each run's trackers work on a thread of its own (MLflow and Trackio know
the active run by thread); a tool that fails is said once and switched off.
"""

import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking

from fulcrum.config.settings import Settings
from fulcrum.core import run_folder, store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.types import TrainPoint
from fulcrum.model.distributed import writes
from fulcrum.report import run_report, summary
from fulcrum.stats import certificate
from fulcrum.training import loop

RESULTS = "results"  # the run with scores and files, beside those of trainings
PROJECT = "fulcrum"  # where the environment names none
_RUNS = "runs.json"  # by what name tools know the runs, for a resumed training to go on with them
_FILES = ("config.yaml", store.MANIFEST)

Files = Mapping[str, Path]  # by the name within the run folder


@dataclass(frozen=True)
class _Run:
    """A training, or the results, as tools are told of it."""

    label: str
    folder: Path
    first: int  # the first step that is told
    known: str | None  # what the tool called it in an earlier sitting

    @property
    def place(self) -> Path:
        """Where tools may write."""
        return _place(self.folder)

    @property
    def name(self) -> str:
        """Names are the folder's and the training's: a project holds several run folders."""
        return f"{self.folder.name}/{self.label}"


def _place(folder: Path) -> Path:
    return folder.absolute() / store.TRACKERS


@dataclass(frozen=True)
class _Tool:
    """How one tracker begins a run, what it then calls it, and how files are given to it."""

    begin: Callable[[_Run], Any]
    known_as: Callable[[Any], str]
    attach: Callable[[Any, str, Files], None]


def _tensorboard(run: _Run) -> Any:
    # What an earlier sitting told from this step on is told again: the newer points take its place.
    return tracking.TensorBoardTracker(run.label, run.place / "tensorboard", purge_step=run.first)


def _texts(tracker: Any, name: str, files: Files) -> None:
    tracker.log(
        {file: f"```\n{path.read_text(encoding='utf-8')}\n```" for file, path in files.items()}
    )


def _trackio(run: _Run) -> Any:
    resume = "never" if run.known is None else "allow"
    return tracking.TrackioTracker(
        PROJECT, name=run.name, group=run.folder.name, resume=resume, embed=False
    )


def _trackio_files(tracker: Any, name: str, files: Files) -> None:
    from trackio import Artifact

    artifact = Artifact(name, type=RESULTS)
    for file, path in files.items():
        artifact.add_file(str(path), name=file)
    tracker.tracker.log_artifact(artifact)


def _wandb(run: _Run) -> Any:
    mode = os.environ.get("WANDB_MODE", "offline")
    return tracking.WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, group=run.folder.name, dir=str(run.place), mode=mode,
        id=run.known or uuid.uuid4().hex[:8], resume=None if mode == "offline" else "allow", reinit="create_new",
        settings={"console": "off", "silent": True},  # the terminal belongs to the bars
    )  # fmt: skip


def _wandb_files(tracker: Any, name: str, files: Files) -> None:
    from wandb import Artifact

    artifact = Artifact(name, type=RESULTS)
    for file, path in files.items():
        artifact.add_file(
            str(path), name=file, policy="immutable"
        )  # no copy under the home folder until it is synced
    tracker.tracker.log_artifact(artifact)


def _database(place: Path) -> str:
    return f"sqlite:///{place / 'mlflow.db'}"


def _mlflow(run: _Run) -> Any:
    here = os.environ.get("MLFLOW_TRACKING_URI") == _database(run.place)
    files = (
        (run.place / "mlflow").as_uri() if here else None
    )  # a server knows where its files belong
    return tracking.MLflowTracker(PROJECT, logging_dir=files, run_id=run.known, run_name=run.name)


def _mlflow_files(tracker: Any, name: str, files: Files) -> None:
    for file, path in files.items():
        tracker.log_artifact(
            str(path), artifact_path=str(Path(file).parent) if "/" in file else None
        )


TOOLS: Mapping[str, _Tool] = {
    "tensorboard": _Tool(_tensorboard, lambda tracker: str(tracker.run_name), _texts),
    "trackio": _Tool(_trackio, lambda tracker: str(tracker.tracker.name), _trackio_files),
    "wandb": _Tool(_wandb, lambda tracker: str(tracker.tracker.id), _wandb_files),
    "mlflow": _Tool(_mlflow, lambda tracker: str(tracker.tracker.info.run_id), _mlflow_files),
}


@contextmanager
def reporting(settings: Settings, progress: ProgressListener | None) -> Iterator[ProgressListener]:
    """Inside, who listens to a run with these settings: `progress` (None: nobody), and the trackers that they name. Leaving it
    without an error sends scores and files too.

    Raises ConfigError where a tracker is not installed.
    """
    for name in settings.report_to:
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to: {name} is not installed; pip install 'fulcrum-llm[{name}]', or leave it out"
            )
    if not settings.report_to or not writes():
        yield progress or Silent()
        return
    folder = Path(settings.output_dir)
    with _offline(_place(folder)):
        told = Trackers(progress, settings.report_to, folder)
        try:
            yield told
            told.conclude()
        finally:
            told.close()


@contextmanager
def _offline(place: Path) -> Iterator[None]:
    """Inside, tools keep to this machine and to `place`, except for what the environment says."""
    own = {
        "MLFLOW_TRACKING_URI": _database(place), "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"
    }  # fmt: skip
    own = {name: value for name, value in own.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


class Trackers:
    """Passes on to a listener what it is told, and sends curves to the tools named (`progress.ProgressListener`)."""

    def __init__(
        self, progress: ProgressListener | None, names: Sequence[str], folder: Path
    ) -> None:
        self.inner, self.names, self.folder = progress or Silent(), names, folder.absolute()
        self.warn: Callable[[str], None] = (
            warnings.warn if progress is None else lambda text: progress.stage(f"warning: {text}")
        )
        self.threads: dict[str, ThreadPoolExecutor] = {}  # by label, of runs that are open
        self.ended: list[ThreadPoolExecutor] = []
        self.opened: dict[tuple[str, str], Any] = {}  # by label and tool
        self.failed: set[str] = set()
        self.lock = threading.Lock()

    def stage(self, text: str) -> None:
        """Pass it on."""
        self.inner.stage(text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Pass it on, and send it where `events.jsonl` holds it: as there, none of a pilot's, which comes before the run's
        folder is begun."""
        self.inner.step(label, point, steps, dev)
        if (dev is None and not loop.is_shown(point.step, steps)) or not (
            self.folder / store.MANIFEST
        ).exists():
            return
        values = {
            "loss/task": point.task_loss, "loss/general": point.general_loss, "loss/dev": dev,
            "learning_rate": point.learning_rate, "tokens": point.tokens,
        }  # fmt: skip
        values = {name: value for name, value in values.items() if value is not None}
        self._do(label, point.step, lambda tool, tracker: tracker.log(values, step=point.step))
        if point.step == steps:
            self._end(label)

    def count(self, label: str, done: int, total: int) -> None:
        """Pass it on."""
        self.inner.count(label, done, total)

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Pass it on."""
        self.inner.overall(done, total, seconds)

    def conclude(self) -> None:
        """Send the scores, settings, manifest and certificates of the run folder, which is finished."""
        found = scores(run_report.load(self.folder))
        paths = [
            *(self.folder / name for name in _FILES),
            *run_folder.made(self.folder, certificate.FILE),
        ]
        files = {path.relative_to(self.folder).as_posix(): path for path in paths}
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.folder.name)
        self._do(RESULTS, 0, lambda tool, tracker: tracker.log(found, step=0))
        self._do(RESULTS, 0, lambda tool, tracker: tool.attach(tracker, name, files))

    def close(self) -> None:
        """End every run that is open, and wait until all is sent."""
        for label in list(self.threads):
            self._end(label)
        for thread in self.ended:
            thread.shutdown()

    def _do(self, label: str, step: int, act: Callable[[_Tool, Any], object]) -> None:
        if label not in self.threads:
            self.threads[label] = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracker")
        for name in self.names:
            self.threads[label].submit(self._try, label, step, name, act)

    def _end(self, label: str) -> None:
        self._do(label, 0, lambda tool, tracker: tracker.finish())
        thread = self.threads.pop(label)
        for name in self.names:
            thread.submit(self.opened.pop, (label, name), None)
        self.ended.append(thread)

    def _try(self, label: str, step: int, name: str, act: Callable[[_Tool, Any], object]) -> None:
        if name in self.failed:
            return
        try:
            act(TOOLS[name], self._open(label, step, name))
        except Exception as error:  # whatever it is, it is the tracker's
            with self.lock:
                first = name not in self.failed
                self.failed.add(name)
            if first:
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warn(
                    f"{name}: {reason:.300}; nothing more is reported to it, and the run goes on"
                )

    def _open(self, label: str, step: int, name: str) -> Any:
        """The tracker of a run, begun where it is not, or gone on with where an earlier sitting began it."""
        if (label, name) in self.opened:
            return self.opened[label, name]
        place = _place(self.folder)
        with self.lock:  # two that begin at once would both make MLflow's experiment
            place.mkdir(exist_ok=True)
            runs = store.recalled(place / _RUNS)
            own = runs.setdefault(name, {})
            tracker = TOOLS[name].begin(_Run(label, self.folder, step, own.get(label)))
            tracker.start()
            own[label] = TOOLS[name].known_as(tracker)
            store.write_json(place / _RUNS, runs)
        self.opened[label, name] = tracker
        return tracker


def scores(results: summary.Record) -> dict[str, float]:
    """The scores of results.json as numbers by name: `task/arm/metric`, at the size at which arms are set against each other,
    over seeds, each with the ends of its interval, its rows (n) and its seeds. What is no finite number is left out.
    """
    found: dict[str, float] = {}
    arms = summary.by_arm(results)
    for task in (facts["name"] for facts in results["tasks"]):
        for metric in (score["metric"] for score in summary.metrics_of(arms, task)):
            for arm, own in arms.items():
                if not (known := summary.scores_of(own, task, metric)):
                    continue
                interval, name = summary.interval_of(known), f"{task}/{arm}/{metric}"
                found |= {
                    name: interval.estimate,
                    f"{name} low": interval.low,
                    f"{name} high": interval.high,
                }
                found |= {f"{name} n": known[0]["n"], f"{name} seeds": len(known)}
    return {name: float(value) for name, value in found.items() if abs(value) < float("inf")}
