"""How a run goes on, told in a terminal as live bars, in a pipe as a line now and then."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from fulcrum.records import TrainPoint
from fulcrum.terminal import say, visible

OVERALL = "comparison"  # the bar of all units
QUIET_SECONDS = 10.0  # between two lines of one stage where no bar can be drawn


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Watch:
    """A `ProgressListener` with a live bar for each thing under way, or, if output is piped, a line at most every ten seconds.

    Use it as a context manager: leaving it ends the bars. What ends always leaves its last line.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        wrapped = TextColumn("{task.fields[status]}", table_column=Column())  # a narrow terminal shows all losses too
        columns = (TextColumn("{task.description}", markup=False), BarColumn(10), wrapped)
        self.progress = Progress(*columns, console=out, refresh_per_second=2, disable=not out.is_terminal)
        self.bars: dict[str, TaskID] = {}  # by label, in the order of their beginning
        self.lines: dict[str, str] = {}
        self.losses: dict[str, dict[str, float]] = {}
        self.since: dict[str, float] = {}
        self.first: dict[str, int] = {}
        self.said = time.monotonic()

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for label in list(self.bars):
            self._end(label)
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Print the stage as a line."""
        say(self.out, text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Show step, speed, time left and the newest loss on task, general and dev rows (nats per supervised token)."""
        self._begin(label, steps)
        newest = {"task loss": point.task_loss, "general loss": point.general_loss, "dev loss": dev}
        known = self.losses[label]
        known |= {name: loss for name, loss in newest.items() if loss is not None}
        left = (steps - point.step) * point.seconds / point.step
        speed = f"{point.tokens / max(point.seconds, 1e-9):,.0f} tokens/s"
        losses = [f"{name} {loss:.3f}" for name in newest if (loss := known.get(name)) is not None]
        self._show(label, point.step, steps, f"step {point.step:,}/{steps:,}", [speed, f"{clock(left)} left", *losses])

    def count(self, label: str, done: int, total: int) -> None:
        """Show how many are done, and the time left."""
        self._begin(label, total)
        first = self.first.setdefault(label, done)  # what came before anyone watched took no time that is known
        passed = time.monotonic() - self.since[label]
        left = [f"{clock((total - done) * passed / (done - first))} left"] if done > first else []
        self._show(label, done, total, f"{done:,}/{total:,}", left)

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Show how far a comparison is, and about how long the rest takes."""
        self._begin(OVERALL, total)
        self._show(OVERALL, done, total, f"{done:,}/{total:,}", [f"{clock(seconds)} left"])

    def _begin(self, label: str, total: int) -> None:
        if label not in self.bars:
            self.bars[label] = self.progress.add_task(visible(label), total=total, status="")
            self.losses[label], self.since[label] = {}, time.monotonic()

    def _show(self, label: str, done: int, total: int, place: str, status: Sequence[str]) -> None:
        text = ", ".join([place, *status])
        self.lines[label] = f"{label}: {text}"
        self.progress.update(self.bars[label], completed=done, status=text)
        if done >= total:
            self._end(label)
        elif not self.out.is_terminal and time.monotonic() - self.said >= QUIET_SECONDS:
            self._say(label)

    def _say(self, label: str) -> None:
        say(self.out, self.lines.pop(label))
        self.said = time.monotonic()

    def _end(self, label: str) -> None:
        self.first.pop(label, None)
        self.progress.remove_task(self.bars.pop(label))
        if label in self.lines:
            self._say(label)
