"""Run the jobs of a comparison: here one by one, in local processes, or on a Ray cluster.

Every worker loads the model once, with the dtype, device and number of threads that were settled
before the first job; the run's manifest records these. Workers return values; the driver alone
stores them.

Invariant: results do not depend on where jobs run.
"""

import os
import queue
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from fulcrum.config.settings import load_settings
from fulcrum.core import processes, store
from fulcrum.core.errors import ConfigError, FulcrumError, StoreError
from fulcrum.core.processes import Stopped
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.types import TrainPoint
from fulcrum.experiments.cell import Session
from fulcrum.experiments.lifecycle import shortest
from fulcrum.experiments.units import ComparisonPlan, Job, Result, perform
from fulcrum.model import base_model
from fulcrum.training import compile

Runner = Callable[[Sequence[Job]], Iterator[tuple[Job, Result]]]
_RETRIES = 3  # of a job whose Ray worker or node died


def share_threads(jobs: int, on: str) -> None:
    """Give each of `jobs` workers its part of the machine's threads.

    Raises ConfigError for numbers and places that cannot be.
    """
    if on not in ("local", "ray"):
        raise ConfigError(f"--on {on}: jobs run on `local` or on `ray`")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1")
    if jobs > 1 and torch.cuda.is_available() and on == "local":
        raise ConfigError(
            f"--jobs {jobs}: workers would share one GPU; use --jobs 1, or --on ray with a GPU for "
            "each"
        )
    if on == "ray":
        cpus = []  # of each node
        for node in _connect().nodes():
            if node["Alive"]:
                cpus.append(int(node["Resources"].get("CPU", 0)))
        torch.set_num_threads(max(1, min(sum(cpus) // jobs, max(cpus))))  # a job runs on one node
    elif jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


@contextmanager
def runner(comparison: ComparisonPlan, session: Session, *, jobs: int, on: str) -> Iterator[Runner]:
    """Give a function that runs jobs and yields each result; workers live as long as the block."""
    if on == "local" and jobs == 1:
        yield lambda work: _here(comparison, session, work)
        return
    settled = replace(comparison, settings=load_settings(comparison.folder / "config.yaml"))
    workers = _ray(settled, session) if on == "ray" else _processes(settled, session, jobs)
    with workers as run:
        yield run


def _here(
    comparison: ComparisonPlan, session: Session, work: Sequence[Job]
) -> Iterator[tuple[Job, Result]]:
    for job in work:
        session.progress.stage(job.name)
        yield job, perform(comparison, session, job)


class _Forwarder(Silent):
    """A worker's listener, which sends everything to the driver through a queue."""

    def __init__(self, messages: Any) -> None:
        self.messages = messages

    def stage(self, text: str) -> None:
        self.messages.put(("stage", text))

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.messages.put(("step", label, point, steps, dev))

    def count(self, label: str, done: int, total: int) -> None:
        self.messages.put(("count", label, done, total))


@contextmanager
def _forwarding(
    messages: Any, progress: ProgressListener, empty: type[Exception]
) -> Iterator[None]:
    """Forward what workers put into the queue to the listener, on a thread."""
    is_over = threading.Event()

    def forward() -> None:
        while not is_over.is_set():
            try:
                name, *arguments = messages.get(timeout=0.2)
            except empty:
                continue
            getattr(progress, name)(*arguments)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class _Worker:
    """What a worker process holds: the comparison's plan, and the model."""

    def __init__(self, comparison: ComparisonPlan, threads: int) -> None:
        torch.set_num_threads(threads)
        self.comparison = comparison
        settings = comparison.settings
        self.loaded = base_model.load_for(settings)
        if settings.train.compile == "always":
            rows = comparison.rows[comparison.seeds[0]].tasks[0].train
            compile.switch_on(self.loaded, settings.train, shortest(rows))

    def perform(
        self, comparison: ComparisonPlan, job: Job, folder: Path | None, messages: Any
    ) -> Result:
        """Run a job, and tell the driver how it proceeds."""
        session = Session(self.loaded, comparison.settings, folder, _Forwarder(messages))
        return perform(comparison, session, job)


_worker: _Worker | None = None  # of this process
_messages: Any = None


def _open(comparison: ComparisonPlan, threads: int, messages: Any) -> None:
    global _worker, _messages
    _worker = _Worker(comparison, threads)
    _messages = messages


def _in_process(job: Job) -> Result:
    assert _worker is not None
    try:
        return _worker.perform(_worker.comparison, job, _worker.comparison.folder, _messages)
    except KeyboardInterrupt as error:  # Stopped too
        # A pool takes this for a failed job, and its worker would wait for the next one: for ever,
        # if the lock of the queue died with another worker. What was to be saved is saved.
        os._exit(128 + getattr(error, "number", signal.SIGINT))


@contextmanager
def _processes(comparison: ComparisonPlan, session: Session, jobs: int) -> Iterator[Runner]:
    """Run jobs in local processes."""
    messages = get_context("spawn").Queue()
    arguments = (comparison, torch.get_num_threads(), messages)
    with (
        processes.start(jobs, _open, arguments) as pool,
        _forwarding(messages, session.progress, queue.Empty),
    ):

        def run(work: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
            waiting = {pool.submit(_in_process, job): job for job in work}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except BrokenProcessPool:
                raise StoreError(
                    "a worker process died (killed, or out of memory); finished jobs are stored: "
                    f"continue with --resume and the same --jobs {jobs}; if memory is short, begin "
                    "anew with fewer"
                ) from None

        try:
            yield run
        except BaseException as error:  # Ctrl-C too: jobs that have not begun are not awaited
            pool.shutdown(wait=False, cancel_futures=True)
            # Ctrl-C reaches the workers by itself, SIGTERM does not.
            if isinstance(error, Stopped) and error.number == signal.SIGTERM:
                for worker in active_children():
                    worker.terminate()
            raise


def _connect() -> Any:
    """Return Ray, connected to RAY_ADDRESS, the cluster that runs here, or this machine alone."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--on ray: Ray is not installed; pip install 'fulcrum-llm[ray]', on every node"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray


def _on_node(
    comparison: ComparisonPlan, job: Job, threads: int, weights: str, messages: Any
) -> tuple[Result, dict[str, bytes]]:
    """Run a job on the node that Ray chose; return its result and the adapter's files, if kept."""
    global _worker
    if _worker is None or not _is_same(_worker.comparison, comparison):
        _worker = _Worker(comparison, threads)
    here = _worker.loaded.fingerprint()
    if here != weights:
        raise StoreError(
            f"{comparison.settings.model}: other weights ({here:.12}) on this node than with the "
            f"driver ({weights:.12})"
        )
    with tempfile.TemporaryDirectory() as name:
        result = _worker.perform(comparison, job, Path(name), messages)
        files = {}
        for path in (Path(name) / "adapters").rglob("*"):
            if path.is_file():
                files[str(path.relative_to(name))] = path.read_bytes()
        return result, files


def _is_same(one: ComparisonPlan, other: ComparisonPlan) -> bool:
    return one.folder == other.folder and one.settings == other.settings


@contextmanager
def _ray(comparison: ComparisonPlan, session: Session) -> Iterator[Runner]:
    """Run jobs on a Ray cluster whose nodes have Fulcrum and the model.

    A job whose worker dies is run again, from its beginning.
    """
    ray = _connect()
    from ray.util.queue import Empty, Queue

    threads = torch.get_num_threads()
    weights = session.model.fingerprint()
    gpus = 1 if comparison.settings.train.device == "cuda" else 0
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(_on_node)
    messages = Queue(actor_options={"num_cpus": 0})
    shared = ray.put(comparison)

    def run(work: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        waiting = {task.remote(shared, job, threads, weights, messages): job for job in work}
        try:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                result, files = ray.get(done)
                for name, data in files.items():
                    store.write_bytes(comparison.folder / name, data)
                yield waiting.pop(done), result
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FulcrumError):
                raise error.cause from None
            raise StoreError(f"on a Ray worker: {error}") from None
        except ray.exceptions.RayError as error:
            raise StoreError(
                f"Ray: {error}; finished jobs are stored: continue with --resume"
            ) from None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    with _forwarding(messages, session.progress, Empty):
        yield run
