"""Worker processes on this machine, and how signals stop them.

Ctrl-C and SIGTERM stop at once, or right after a step that is under way if it can be saved.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT = b"\nstopping after this step, which is then saved; once more: at once\n"


class Stopped(KeyboardInterrupt):
    """A signal asked to stop: SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def at_once() -> None:
    """Make SIGTERM raise Stopped from now on, as Ctrl-C raises KeyboardInterrupt.

    Outside the main thread, which alone may set this, nothing changes.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Inside, note the first signal instead of stopping; a second one raises `Stopped` at once.

    The yielded function returns the noted signal's number, or 0; the caller saves and then raises
    `Stopped`. Outside the main thread, which alone may set this, nothing changes.
    """
    noted = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise Stopped(number)
        noted = number
        os.write(2, _WAIT)  # printing is not safe in a handler

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(
    jobs: int, initializer: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> "ProcessPoolExecutor":
    """Return a pool of `jobs` processes, each of which first calls `initializer(*given)`.

    They are spawned, since a forked copy of this process's threads would hang. They end when this
    process does, even if it is killed.
    """
    # Imported here since every command imports this module, and most start no process.
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(initializer, given)
    )


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _begin(initializer: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*given)


def _end_with_parent() -> None:
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
