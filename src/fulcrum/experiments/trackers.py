"""Report runs to TensorBoard, Trackio, Weights & Biases and MLflow, through Accelerate's classes.

Each training is a run of its own there: these tools overlay runs whose curves have the same names,
and steps count from 1 in each. Scores and files are one more run, `results`. Nothing leaves the
machine unless the user's environment says so.

Invariant: no tracker ends a training or delays it. Each run's trackers work on a thread of its own
(MLflow and Trackio know the active run by thread); a tool that fails is reported once and switched
off.
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

RESULTS = "results"  # the run with scores and files, next to those of trainings
PROJECT = "fulcrum"  # if the environment names none
_RUNS = "runs.json"  # the tools' own names of runs, by which a resumed training continues them
_FILES = ("config.yaml", store.MANIFEST)

Files = Mapping[str, Path]  # by the name within the run folder


@dataclass(frozen=True)
class _Run:
    """A training, or the results, as a tool sees it."""

    label: str
    folder: Path
    first: int  # the first step that is sent
    known: str | None  # the tool's name for it, if an earlier process began it

    @property
    def place(self) -> Path:
        """Return where tools may write."""
        return _place(self.folder)

    @property
    def name(self) -> str:
        """Return its name in a project, which holds several run folders."""
        return f"{self.folder.name}/{self.label}"


@dataclass(frozen=True)
class _Tool:
    """How one tracker is used."""

    begin: Callable[[_Run], Any]  # returns Accelerate's tracker of a run
    known_as: Callable[[Any], str]  # the tool's name for the run of a tracker
    attach: Callable[[Any, str, Files], None]  # sends files under a name


_Action = Callable[[_Tool, Any], object]  # with a tool and its tracker


@contextmanager
def reporting(settings: Settings, progress: ProgressListener | None) -> Iterator[ProgressListener]:
    """Give the listener of a run: it forwards to `progress`, and to the trackers of `report_to`.

    If the block ends without an error, scores and files are sent too. Raises ConfigError if a
    tracker is not installed.
    """
    for name in settings.report_to:
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to: {name} is not installed; pip install 'fulcrum-llm[{name}]', or leave "
                "it out"
            )
    if not settings.report_to or not writes():
        yield progress or Silent()
        return
    folder = Path(settings.output_dir)
    with _offline(_place(folder)):
        trackers = Trackers(progress, settings.report_to, folder)
        try:
            yield trackers
            trackers.conclude()
        finally:
            trackers.close()


class Trackers:
    """A listener that forwards to another, and sends curves to the tools named."""

    def __init__(
        self, progress: ProgressListener | None, names: Sequence[str], folder: Path
    ) -> None:
        self.inner = progress or Silent()
        self.has_listener = progress is not None
        self.names = names
        self.folder = folder.absolute()
        self.threads: dict[str, ThreadPoolExecutor] = {}  # by label, of runs that are open
        self.ended: list[ThreadPoolExecutor] = []
        self.opened: dict[tuple[str, str], Any] = {}  # by label and tool
        self.failed: set[str] = set()
        self.lock = threading.Lock()

    def stage(self, text: str) -> None:
        """Forward the text."""
        self.inner.stage(text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Forward the step; send it if it is one of those in `events.jsonl`.

        Pilot steps are not sent: a pilot comes before the run's folder is begun.
        """
        self.inner.step(label, point, steps, dev)
        is_shown = dev is not None or loop.is_shown(point.step, steps)
        if not is_shown or not (self.folder / store.MANIFEST).exists():
            return
        curves = {
            "loss/task": point.task_loss,
            "loss/general": point.general_loss,
            "loss/dev": dev,
            "learning_rate": point.learning_rate,
            "tokens": point.tokens,
        }
        values = {name: value for name, value in curves.items() if value is not None}
        self._do(label, point.step, lambda tool, tracker: tracker.log(values, step=point.step))
        if point.step == steps:
            self._end(label)

    def count(self, label: str, done: int, total: int) -> None:
        """Forward the count."""
        self.inner.count(label, done, total)

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Forward how far the run is."""
        self.inner.overall(done, total, seconds)

    def conclude(self) -> None:
        """Send the finished run folder's scores, settings, manifest and certificates."""
        values = scores(run_report.load(self.folder))
        paths = [self.folder / name for name in _FILES]
        paths += run_folder.made(self.folder, certificate.FILE)
        files = {path.relative_to(self.folder).as_posix(): path for path in paths}
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.folder.name)
        self._do(RESULTS, 0, lambda tool, tracker: tracker.log(values, step=0))
        self._do(RESULTS, 0, lambda tool, tracker: tool.attach(tracker, name, files))

    def close(self) -> None:
        """End every run that is open, and wait until all is sent."""
        for label in list(self.threads):
            self._end(label)
        for thread in self.ended:
            thread.shutdown()

    def _do(self, label: str, step: int, act: _Action) -> None:
        """Have every tool act on the run with this label, on its thread."""
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

    def _try(self, label: str, step: int, name: str, act: _Action) -> None:
        if name in self.failed:
            return
        try:
            act(TOOLS[name], self._open(label, step, name))
        except Exception as error:  # whatever it is, it is the tracker's
            with self.lock:
                is_first = name not in self.failed
                self.failed.add(name)
            if is_first:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._warn(
                    f"{name}: {reason:.300}; nothing more is reported to it, and the run goes on"
                )

    def _warn(self, text: str) -> None:
        if self.has_listener:
            self.inner.stage(f"warning: {text}")
        else:
            warnings.warn(text, stacklevel=2)

    def _open(self, label: str, step: int, name: str) -> Any:
        """Return the tracker of a run; begin it, or continue it if an earlier process began it."""
        if (label, name) in self.opened:
            return self.opened[label, name]
        place = _place(self.folder)
        with self.lock:  # two that begin at once would both make MLflow's experiment
            place.mkdir(exist_ok=True)
            runs = store.recalled(place / _RUNS)
            known = runs.setdefault(name, {})
            tracker = TOOLS[name].begin(_Run(label, self.folder, step, known.get(label)))
            tracker.start()
            known[label] = TOOLS[name].known_as(tracker)
            store.write_json(place / _RUNS, runs)
        self.opened[label, name] = tracker
        return tracker


def scores(results: summary.Record) -> dict[str, float]:
    """Return the scores of results.json as numbers by name, `task/arm/metric`, over seeds.

    They are at the size at which arms are compared, each with the ends of its interval, its rows
    (n) and its seeds. Numbers that are not finite are missing.
    """
    values: dict[str, float] = {}
    arms = summary.by_arm(results)
    for facts in results["tasks"]:
        task = facts["name"]
        for score in summary.metrics_of(arms, task):
            metric = score["metric"]
            for arm, own in arms.items():
                by_seed = summary.scores_of(own, task, metric)
                if not by_seed:
                    continue
                name = f"{task}/{arm}/{metric}"
                interval = summary.interval_of(by_seed)
                values[name] = interval.estimate
                values[f"{name} low"] = interval.low
                values[f"{name} high"] = interval.high
                values[f"{name} n"] = by_seed[0]["n"]
                values[f"{name} seeds"] = len(by_seed)
    return {name: float(value) for name, value in values.items() if abs(value) < float("inf")}


@contextmanager
def _offline(place: Path) -> Iterator[None]:
    """Keep tools to this machine and to `place`, except for what the environment sets."""
    defaults = {
        "MLFLOW_TRACKING_URI": _database(place),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _place(folder: Path) -> Path:
    return folder.absolute() / store.TRACKERS


# The tools.


def _tensorboard(run: _Run) -> Any:
    # Steps from this one on are sent again, and replace those of an earlier process.
    return tracking.TensorBoardTracker(run.label, run.place / "tensorboard", purge_step=run.first)


def _texts(tracker: Any, name: str, files: Files) -> None:
    texts = {}
    for file, path in files.items():
        texts[file] = f"```\n{path.read_text(encoding='utf-8')}\n```"
    tracker.log(texts)


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
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        group=run.folder.name,
        dir=str(run.place),
        mode=mode,
        id=run.known or uuid.uuid4().hex[:8],
        resume=None if mode == "offline" else "allow",
        reinit="create_new",
        settings={"console": "off", "silent": True},  # the terminal belongs to the progress bars
    )


def _wandb_files(tracker: Any, name: str, files: Files) -> None:
    from wandb import Artifact

    artifact = Artifact(name, type=RESULTS)
    for file, path in files.items():
        # "immutable": no copy under the home folder until it is synced.
        artifact.add_file(str(path), name=file, policy="immutable")
    tracker.tracker.log_artifact(artifact)


def _mlflow(run: _Run) -> Any:
    files = None  # a server knows where its files belong
    if os.environ.get("MLFLOW_TRACKING_URI") == _database(run.place):
        files = (run.place / "mlflow").as_uri()
    return tracking.MLflowTracker(PROJECT, logging_dir=files, run_id=run.known, run_name=run.name)


def _mlflow_files(tracker: Any, name: str, files: Files) -> None:
    for file, path in files.items():
        folder = str(Path(file).parent) if "/" in file else None
        tracker.log_artifact(str(path), artifact_path=folder)


def _database(place: Path) -> str:
    return f"sqlite:///{place / 'mlflow.db'}"


TOOLS: Mapping[str, _Tool] = {
    "tensorboard": _Tool(_tensorboard, lambda tracker: str(tracker.run_name), _texts),
    "trackio": _Tool(_trackio, lambda tracker: str(tracker.tracker.name), _trackio_files),
    "wandb": _Tool(_wandb, lambda tracker: str(tracker.tracker.id), _wandb_files),
    "mlflow": _Tool(_mlflow, lambda tracker: str(tracker.tracker.info.run_id), _mlflow_files),
}
