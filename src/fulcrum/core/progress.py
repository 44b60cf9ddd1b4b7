"""How a run tells others what it is doing: the terminal, a notebook, trackers, or nobody."""

from collections.abc import Callable
from typing import Protocol

from fulcrum.core.types import TrainPoint

Count = Callable[[int, int], None]  # called with how many are done, and how many there are
LabelledCount = Callable[[str, int, int], None]  # the same after a label


def after(before: int, total: int, count: Count) -> Callable[[int], None]:
    """Return a function that reports to `count` how many of `total` are done after `before`."""
    return lambda done: count(before + done, total)


class ProgressListener(Protocol):
    """What a run calls as it proceeds."""

    def stage(self, text: str) -> None:
        """Hear that something began, or a warning."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Hear that an optimizer step of `steps` ended; `dev` is the newest loss on dev rows."""

    def count(self, label: str, done: int, total: int) -> None:
        """Hear that `done` of `total` are finished."""

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Hear that `done` of `total` jobs are finished; the others take about `seconds`."""


class Silent:
    """The listener that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Say nothing."""

    def count(self, label: str, done: int, total: int) -> None:
        """Say nothing."""

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Say nothing."""
