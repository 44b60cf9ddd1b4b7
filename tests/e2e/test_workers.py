"""Units in other processes and on a Ray cluster of two nodes: the same results, also where a worker
is killed in mid-cell."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, StoreError
from fulcrum.core.processes import Stopped
from fulcrum.core.progress import Silent
from fulcrum.core.types import TrainPoint
from fulcrum.experiments import workers
from fulcrum.experiments.compare import run_comparison
from helpers.runs import timeless
from helpers.tiny import comparison_settings, save_task, tiny_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("workers"), 8, 4)


def settings(place: Path, output: Path) -> Settings:
    compare = {
        "arms": ["base", "sft", "tell"],
        "seeds": [0, 1],
        "sizes": [4, 8],
        "folds": 2,
        "sft_epochs": [1, 2],
        "tune": "first",
    }
    train = tiny_settings(save_every=1).model_dump()
    return comparison_settings(
        place, output, compare=compare, train=train, mix={"general_per_task": 2, "repeats": 2}
    )


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The comparison in one process."""
    run_comparison(settings(place, place / "alone"))
    return place / "alone"


def same(folder: Path, alone: Path) -> None:
    """Equal certificates (thread counts, of which the environment tells, were equal too), results,
    adapters and cells."""
    for name in (
        "certificate.json",
        "outcomes.jsonl",
        "predictions.jsonl",
        "adapters/tell/adapter_model.safetensors",
    ):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    results = [
        timeless(json.loads((place / "results.json").read_text())) for place in (folder, alone)
    ]
    assert results[0] == results[1]
    cells = [{path.name for path in (place / "cells").iterdir()} for place in (folder, alone)]
    assert cells[0] == cells[1]
    assert not [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]


class Told(Silent):
    """Remembers what it was told, and at the first training step of some cell kills whatever `kill`
    finds, once."""

    def __init__(self, kill: Any = None) -> None:
        self.kill, self.labels, self.shares = kill, set[str](), list[tuple[int, int]]()

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.labels.add(label)
        if self.kill is not None and label.startswith("tell-8-seed1"):
            kill, self.kill = self.kill, None
            kill()

    def overall(self, done: int, total: int, seconds: float) -> None:
        assert seconds >= 0
        self.shares.append((done, total))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "cpu_count", lambda: 1
    )  # as in the process alone: results repeat for a number of threads


def test_a_killed_process_is_said_and_the_comparison_goes_on(
    place: Path, alone: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)

    out = tmp_path / "out"
    with pytest.raises(StoreError, match=r"a worker process died .*continue with --resume"):
        run_comparison(settings(place, out), jobs=2, progress=Told(kill))
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(before) >= 7
    told = Told()
    run_comparison(settings(place, out), jobs=2, resume=True, progress=told)
    assert told.labels  # steps in workers are told here
    assert told.shares[-1] == (9, 9)  # 1 + 2 x 2 x 2 trainings, with those that were kept
    assert (
        before.items()
        <= {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}.items()
    )
    same(out, alone)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A real Ray cluster of two nodes on this machine, one processor each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_worker_niceness="0")  # else workers starve beside anything else that runs
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    found.shutdown()


def test_a_ray_cluster_gives_the_same_with_a_worker_killed_in_mid_cell(
    place: Path, alone: Path, tmp_path: Path, cluster: Any
) -> None:
    assert len([node for node in cluster.nodes() if node["Alive"]]) == 2
    killed = []

    def kill() -> None:
        for process in psutil.process_iter(["cmdline"]):
            if any("ray::_on_node" in part for part in process.info["cmdline"] or ()):
                killed.append(process.pid)
                process.kill()

    run_comparison(settings(place, tmp_path / "out"), jobs=2, on="ray", progress=Told(kill))
    assert killed
    same(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("stopped", "code"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)]
)
def test_a_stopped_worker_ends_and_waits_for_no_other_job(
    monkeypatch: pytest.MonkeyPatch, stopped: KeyboardInterrupt, code: int
) -> None:
    """A pool would take it for a failed job; its worker then waited for ever where another had died
    with the queue's lock."""

    def stops(*_: Any) -> None:
        raise stopped

    def ended(status: int) -> None:
        raise SystemExit(status)

    comparison_plan = SimpleNamespace(folder=None)
    monkeypatch.setattr(
        workers, "_worker", SimpleNamespace(comparison=comparison_plan, perform=stops)
    )
    monkeypatch.setattr(os, "_exit", ended)
    no_job: Any = None
    with pytest.raises(SystemExit, match=str(code)):
        workers._in_process(no_job)


@pytest.mark.parametrize(
    ("jobs", "on", "message"),
    [(1, "slurm", "jobs run on `local` or on `ray`"), (0, "local", "--jobs 0: at least 1")],
)
def test_what_cannot_be_is_refused(
    place: Path, tmp_path: Path, jobs: int, on: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_comparison(settings(place, tmp_path / "out"), jobs=jobs, on=on)


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'fulcrum-llm\[ray\]', on every node"):
        workers.share_threads(1, "ray")
