"""Worker processes on this machine.

Ctrl-C and SIGTERM: at once, or, where a step that can be finished and kept is under way, right after it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT = b"\nstopping after this step, which is then saved; once more: at once\n"


class Stopped(KeyboardInterrupt):
    """A signal asked to stop: SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def at_once() -> None:
    """From now on SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt. Only the main thread may ask for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Inside, the first signal is only noted: the yielded function returns its number (0: none came), and whoever asks then
    saves and raises `Stopped`. A second signal raises it at once. Outside the main thread, which alone may, nothing is changed.
    """
    noted = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise Stopped(number)
        noted = number
        os.write(2, _WAIT)  # printing is not safe in a handler

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(
    jobs: int, initializer: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """`jobs` processes, each begun with `initializer(*given)`. They are started afresh, since a forked copy of this process's
    threads would hang, and end when this process does, even where it is killed.
    """
    return ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(initializer, given)
    )


def _begin(initializer: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*given)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
