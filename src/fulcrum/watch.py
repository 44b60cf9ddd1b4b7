"""How a run goes on, told in a terminal as one live bar, in a pipe as a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from fulcrum.records import TrainPoint
from fulcrum.terminal import say, visible

QUIET_SECONDS = 10.0  # between two lines of one stage where no bar can be drawn


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Watch:
    """Tells how a run goes on (`run.Watcher`): one live bar, or where output is piped a line at most every ten seconds.

    Use it as a context manager: leaving it ends the bar. What ends always leaves its last line.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        wrapped = TextColumn("{task.fields[status]}", table_column=Column())  # a narrow terminal shows all losses too
        columns = (TextColumn("{task.description}", markup=False), BarColumn(10), wrapped)
        self.progress = Progress(*columns, console=out, refresh_per_second=2, disable=not out.is_terminal)
        self.bar: TaskID | None = None
        self.label = self.line = ""
        self.losses: dict[str, float] = {}
        self.since = self.said = time.monotonic()

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Print the stage as a line."""
        self._end()
        say(self.out, text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Show step, speed, time left and the newest loss on task, general and dev rows (nats per supervised token)."""
        self._begin(label, steps)
        newest = {"task loss": point.task_loss, "general loss": point.general_loss, "dev loss": dev}
        self.losses |= {name: loss for name, loss in newest.items() if loss is not None}
        left = (steps - point.step) * point.seconds / point.step
        speed = f"{point.tokens / max(point.seconds, 1e-9):,.0f} tokens/s"
        losses = [f"{name} {loss:.3f}" for name in newest if (loss := self.losses.get(name)) is not None]
        self._show(point.step, f"step {point.step:,}/{steps:,}", ", ".join([speed, f"{clock(left)} left", *losses]))

    def count(self, label: str, done: int, total: int) -> None:
        """Show how many are done, and the time left."""
        self._begin(label, total)
        left = (total - done) * (time.monotonic() - self.since) / max(done, 1)
        self._show(done, f"{done:,}/{total:,}", f"{clock(left)} left")

    def _begin(self, label: str, total: int) -> None:
        if label != self.label:
            self._end()
            self.label, self.losses = label, {}
            self.bar = self.progress.add_task(visible(label), total=total, status="")

    def _show(self, done: int, place: str, status: str) -> None:
        self.line = f"{self.label}: {place}, {status}"
        if self.bar is not None:
            self.progress.update(self.bar, completed=done, status=f"{place}, {status}")
        if not self.out.is_terminal and time.monotonic() - self.said >= QUIET_SECONDS:
            self._say()

    def _say(self) -> None:
        say(self.out, self.line)
        self.line, self.said = "", time.monotonic()

    def _end(self) -> None:
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        if self.line:
            self._say()
        self.bar, self.label, self.since = None, "", time.monotonic()
