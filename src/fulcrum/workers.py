"""Where the units of a comparison run: here one by one, in local processes, or on a Ray cluster. The results are equal.

Every worker loads the model once, with the dtype, device and number of threads that were settled before the first unit; these
stand in the run's manifest. Workers return values; the driver alone stores them.
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

from fulcrum import compiled, config, model, processes, store
from fulcrum.cell import Silent, Watcher
from fulcrum.errors import ConfigError, FulcrumError, StoreError
from fulcrum.launched import writes
from fulcrum.model import LoadedModel
from fulcrum.records import ArmResult, TrainPoint, Tried
from fulcrum.stopping import Stopped
from fulcrum.units import Study, Unit, perform

Result = Tried | ArmResult
Runner = Callable[[Sequence[Unit]], Iterator[tuple[Unit, Result]]]
_RETRIES = 3  # of a unit whose Ray worker or node died


def share_threads(jobs: int, on: str) -> None:
    """Give each of `jobs` workers of this machine its part of the threads. Raises ConfigError for what cannot be."""
    if on not in ("local", "ray"):
        raise ConfigError(f"--on {on}: units run on `local` or on `ray`")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1")
    if jobs > 1 and torch.cuda.is_available() and on == "local":
        raise ConfigError(f"--jobs {jobs}: workers would share one GPU; use --jobs 1, or --on ray with a GPU for each")
    if on == "ray":
        nodes = [int(node["Resources"].get("CPU", 0)) for node in _connect().nodes() if node["Alive"]]
        torch.set_num_threads(max(1, min(sum(nodes) // jobs, max(nodes))))  # a unit runs on one node
    elif jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


@contextmanager
def runner(study: Study, loaded: LoadedModel, *, jobs: int, on: str, watcher: Watcher) -> Iterator[Runner]:
    """What runs units and yields each with its result as it is finished; workers live as long as the context."""
    if on == "local" and jobs == 1:
        yield lambda units: _here(study, loaded, units, watcher)
        return
    settled = replace(study, settings=config.load(study.folder / "config.yaml"))
    with (_ray if on == "ray" else _processes)(settled, loaded, jobs, watcher) as run:
        yield run


def _here(study: Study, loaded: LoadedModel, units: Sequence[Unit], watcher: Watcher) -> Iterator[tuple[Unit, Result]]:
    for unit in units:
        watcher.stage(unit.name)
        yield unit, perform(study, loaded, unit, watcher, study.folder if writes() else None)


class _Told(Silent):
    """A worker's watcher: what it is told goes to the driver through a queue."""

    def __init__(self, messages: Any) -> None:
        self.messages = messages

    def stage(self, text: str) -> None:
        self.messages.put(("stage", text))

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.messages.put(("step", label, point, steps, dev))

    def count(self, label: str, done: int, total: int) -> None:
        self.messages.put(("count", label, done, total))


@contextmanager
def _passing_on(messages: Any, watcher: Watcher, empty: type[Exception]) -> Iterator[None]:
    """Inside, a thread tells the watcher what workers put into the queue."""
    over = threading.Event()

    def pass_on() -> None:
        while not over.is_set():
            try:
                name, *about = messages.get(timeout=0.2)
            except empty:
                continue
            getattr(watcher, name)(*about)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Worker:
    """The model of a worker process, loaded when its first unit comes, and the study."""

    def __init__(self, study: Study, threads: int) -> None:
        torch.set_num_threads(threads)
        self.study, train = study, study.settings.train
        self.loaded = model.load(study.settings.model, train, trust_remote_code=study.settings.trust_remote_code)
        rows = study.rows[study.seeds[0]].tasks[0].train
        if train.compile == "always":
            compiled.switch_on(self.loaded, train, min(rows, key=lambda row: sum(len(m.content) for m in row.messages)))


_worker: _Worker | None = None  # of this process
_messages: Any = None


def _open(study: Study, threads: int, messages: Any) -> None:
    global _worker, _messages
    _worker, _messages = _Worker(study, threads), messages


def _in_process(unit: Unit) -> Result:
    assert _worker is not None
    try:
        return perform(_worker.study, _worker.loaded, unit, _Told(_messages), _worker.study.folder)
    except KeyboardInterrupt as error:  # Stopped too
        # A pool takes this for a failed unit, and its worker would wait for the next one: for ever, where the lock of the queue
        # died with another worker. What was to be saved is saved.
        os._exit(128 + getattr(error, "number", signal.SIGINT))


@contextmanager
def _processes(study: Study, loaded: LoadedModel, jobs: int, watcher: Watcher) -> Iterator[Runner]:
    """Local processes."""
    messages = get_context("spawn").Queue()
    given = (study, torch.get_num_threads(), messages)
    with (
        processes.start(jobs, _open, given) as pool,
        _passing_on(messages, watcher, queue.Empty),
    ):

        def run(units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
            waiting = {pool.submit(_in_process, unit): unit for unit in units}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except BrokenProcessPool:
                raise StoreError(
                    "a worker process died (killed, or out of memory); finished units are stored: go on with --resume and the "
                    f"same --jobs {jobs}; if memory is short, begin anew with fewer"
                ) from None

        try:
            yield run
        except BaseException as error:  # Ctrl-C too: what has not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Stopped) and error.number == signal.SIGTERM:  # Ctrl-C reaches the workers by itself
                for worker in active_children():
                    worker.terminate()
            raise


def _connect() -> Any:
    """Ray, connected to the cluster that RAY_ADDRESS names or that runs here, else to one of this machine alone."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--on ray: Ray is not installed; pip install 'fulcrum-llm[ray]', on every node") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray


def _on_node(study: Study, unit: Unit, threads: int, weights: str, messages: Any) -> tuple[Result, dict[str, bytes]]:
    """Run a unit on whatever node Ray chose; returns its result and the files of its adapter, if it is kept."""
    global _worker
    if _worker is None or _worker.study.folder != study.folder or _worker.study.settings != study.settings:
        _worker = _Worker(study, threads)
    if (found := _worker.loaded.fingerprint()) != weights:
        raise StoreError(
            f"{study.settings.model}: other weights ({found:.12}) on this node than with the driver ({weights:.12})"
        )
    with tempfile.TemporaryDirectory() as name:
        result = perform(study, _worker.loaded, unit, _Told(messages), Path(name))
        kept = [path for path in (Path(name) / "adapters").rglob("*") if path.is_file()]
        return result, {str(path.relative_to(name)): path.read_bytes() for path in kept}


@contextmanager
def _ray(study: Study, loaded: LoadedModel, jobs: int, watcher: Watcher) -> Iterator[Runner]:
    """A Ray cluster whose nodes have Fulcrum and the model. A unit whose worker dies is run again, from its beginning."""
    ray = _connect()
    from ray.util.queue import Empty, Queue

    threads, weights, settings = torch.get_num_threads(), loaded.fingerprint(), study.settings
    gpus = 1 if settings.train.device == "cuda" else 0
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(_on_node)
    messages = Queue(actor_options={"num_cpus": 0})
    shared = ray.put(study)

    def run(units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
        waiting = {task.remote(shared, unit, threads, weights, messages): unit for unit in units}
        try:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                result, files = ray.get(done)
                for name, data in files.items():
                    store.write_bytes(study.folder / name, data)
                yield waiting.pop(done), result
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, FulcrumError) else StoreError(f"on a Ray worker: {error}") from None
        except ray.exceptions.RayError as error:
            raise StoreError(f"Ray: {error}; finished units are stored: go on with --resume") from None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    with _passing_on(messages, watcher, Empty):
        yield run
