"""Everything that is drawn in a terminal: lines, bars, tables, rows with their trained tokens.

If the output is piped it is plain text, and progress is a line now and then instead of bars.

Invariant: text of the user's rows is never read as markup and cannot control the terminal
(`visible`).
"""

import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from fulcrum.core.progress import Count
from fulcrum.core.types import IntArray, Score, TrainPoint

if TYPE_CHECKING:
    from fulcrum.experiments.preview import PlannedTraining, Span
    from fulcrum.stats.certificate import Answer

PLAIN_WIDTH = 200  # characters of a piped table: nobody wants it folded at 80
OVERALL = "comparison"  # the bar of all units
QUIET_SECONDS = 10.0  # between two lines of one stage if no bar can be drawn
STYLES = {
    "prompt": "dim",
    "anchor": "bold magenta",
    "trained": "green",
    "end": "bold black on green",
}


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr as they are now."""
    out = Console(stderr=stderr, highlight=False)
    if out.is_terminal:
        return out
    return Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def visible(text: str) -> str:
    """Write control and format characters as escapes, except line breaks and tabs."""
    shown = []
    for character in text:
        is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        if is_hidden and character not in "\n\t":
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


def say(out: Console, text: str, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping."""
    out.print(Text(visible(text), style=style), soft_wrap=True)


def say_rejects(out: Console, counts: Mapping[str, int]) -> None:
    """Print why rows were left out, the most frequent reason first."""
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        say(out, f"  {count:,} × {reason}", "yellow")
    if not counts:
        say(out, "  none was left out")


@contextmanager
def working(out: Console, text: str) -> Iterator[None]:
    """Show that something of unknown length is under way: a spinner, or a line if piped."""
    if not out.is_terminal:
        say(out, text)
        yield
        return
    with out.status(Text(text)):
        yield


def explain(error: OSError) -> str:
    """Return what the operating system refused, and where."""
    what = error.strerror or str(error)
    if not error.filename:
        return what
    return f"{error.filename}: {what}; check the path, its permissions and the disk"


def fail(text: str, kind: str = "error") -> None:
    """Print one line on stderr."""
    line = Text(f"{kind}: ", style="bold red")
    line += Text(visible(" ".join(text.splitlines())), style="default")
    console(stderr=True).print(line, soft_wrap=True)


def silence_data_libraries() -> None:
    """Switch off what `datasets` and the hub's client print (retries, broken files).

    Our errors say it.
    """
    import logging
    import os

    for name, variable in (
        ("datasets", "DATASETS_VERBOSITY"),
        ("huggingface_hub", "HF_HUB_VERBOSITY"),
    ):
        os.environ[variable] = "critical"  # read on the library's first import, maybe later
        logging.getLogger(name).setLevel(logging.CRITICAL)


def silence_libraries() -> None:
    """Switch off what Transformers prints (warnings, "Loading weights").

    Downloads from the hub keep their bars.
    """
    import warnings

    silence_data_libraries()

    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


def grid(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True
) -> Table:
    """Return a table: its first column names the row, the others are numbers, or texts."""
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for place, name in enumerate(head):
        table.add_column(
            Text(name), justify="right" if place and numbers else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def length_table(lengths: Mapping[str, IntArray]) -> Table:
    """Return rows and quantiles of tokens a row, by source."""
    import numpy as np

    rows = []
    for name, tokens in lengths.items():
        quantiles = np.quantile(tokens, (0, 0.5, 0.9, 1), method="inverted_cdf")
        numbers = [len(tokens), *quantiles, tokens.sum()]
        rows.append([name, *(f"{int(number):,}" for number in numbers)])
    head = ("source", "rows", "shortest", "median", "90%", "longest", "all tokens")
    return grid("Tokens a row", head, rows)


def trial_table(trials: Sequence["PlannedTraining"]) -> Table:
    """Return the training runs to come, with the task's part counted three ways."""
    rows = []
    for trial in trials:
        share = trial.share
        rows.append(
            (
                trial.arm,
                f"{trial.size:,}",
                f"{trial.repeats}",
                f"{share.task_examples:,}",
                f"{share.general_examples:,}",
                f"{share.examples:.1%}",
                f"{share.tokens:.1%}",
                f"{share.loss_tokens:.1%}",
                f"{share.total_tokens:,}",
                f"{trial.steps:,}",
            )
        )
    head = (
        "arm",
        "rows",
        "repeats",
        "task rows shown",
        "general rows",
        "task share: examples",
        "tokens",
        "loss tokens",
        "tokens in all",
        "steps",
    )
    return grid("Training runs", head, rows)


def score_table(title: str, scores: Sequence[Score]) -> Table:
    """Return scores with their intervals and how many rows and groups they rest on."""
    from fulcrum.report.summary import decimal, label_of, value_of

    rows = []
    for score in scores:
        low = decimal(value_of({"x": score.low}, "x"))
        high = decimal(value_of({"x": score.high}, "x"))
        arrow = "↑" if score.higher_is_better else "↓"
        name = f"{label_of(score.metric)} {arrow}"
        interval = f"[{low}, {high}]"
        rows.append((name, decimal(score.value), interval, f"{score.n:,}", f"{score.n_groups:,}"))
    return grid(title, ("metric", "value", "95% interval", "test rows", "groups"), rows)


def row_text(spans: Sequence["Span"], *, colour: bool) -> Text:
    """Return what the model sees of a row: coloured, or with marks around all but the plain prompt.

    Marks are `[[trained]]` … `[[/trained]]`, and the like.
    """
    row = Text()
    for kind, part in spans:
        text = visible(part)
        if colour:
            row.append(text, style=STYLES[kind])
        elif kind == "prompt":
            row.append(text)
        else:
            row.append(f"[[{kind}]]{text}[[/{kind}]]")
    return row


@contextmanager
def download(out: Console, name: str) -> Iterator[Count]:
    """Yield a callback (bytes done, bytes in all) that shows a download.

    Nothing is drawn until it is called.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    started: list[TaskID] = []
    with Progress(
        *columns, console=out, refresh_per_second=4, disable=not out.is_terminal
    ) as progress:

        def show(done: int, total: int) -> None:
            if not started:
                started.append(progress.add_task(f"fetching {name}", total=total))
                if not out.is_terminal:
                    say(out, f"fetching {name} ({total / 1e6:.0f} MB)")
            text = f"fetching {name}" if done < total else f"fetched {name}; converting it once"
            progress.update(started[0], completed=done, description=text)

        yield show


def warn(out: Console, trials: Sequence["PlannedTraining"], notes: Sequence[str]) -> None:
    """Print notes on the data and the advice on each training run's plan."""
    for text in notes:
        say(out, f"note: {text}", "yellow")
    for trial in trials:
        for text in trial.warnings:
            say(out, f"warning: {trial.arm}, {trial.repeats} repeats: {text}", "yellow")


def certificate_tables(answer: "Answer") -> list[Table]:
    """Return one metric of a certificate as tables for a terminal."""
    from fulcrum.report import wording

    sizes = sorted({point.size for point in answer.points})
    scores: dict[str, dict[int, str]] = {}  # by arm and size
    for point in answer.points:
        scores.setdefault(point.arm, {})[point.size] = wording.with_interval(point.score)
    by_arm = []
    for arm, of_arm in scores.items():
        by_arm.append([arm, *(of_arm.get(size, "") for size in sizes)])
    title = f"{answer.metric} by task rows ({wording.direction(answer)}), 95% intervals"
    units = ["rows"] if answer.saving.tokens is None else ["rows", "tokens"]
    factors = []
    named = [("row saving", answer.saving)]
    named += [("row gain", gain) for gain in answer.gains]
    for name, worth in named:
        factors.append([name, str(worth.size), *(wording.factor(worth, unit) for unit in units)])
    parts = [["difference to the reference", wording.difference(answer.difference)]]
    for part in answer.attribution:
        what, compared, _ = wording.PARTS[part.code]
        label = f"{what} ({compared})" if compared else what
        parts.append([label, wording.difference(part.difference)])
    return [
        grid(title, ["arm", *map(str, sizes)], by_arm),
        grid("How far the rows went", ["factor", "at", *(f"in {unit}" for unit in units)], factors),
        grid(f"What it comes from, at {answer.rows} rows", ["part", "difference"], parts),
    ]


def conclude(out: Console, folder: Path) -> None:
    """Print what a folder says: tables of a run and its certificates, one sentence, its files."""
    from fulcrum import api
    from fulcrum.report import certificate_page, run_report, wording
    from fulcrum.report.run_kinds import kind_of

    certificates = certificate_page.find(folder)
    pages: tuple[str, ...] = ()
    if not run_report.has_certificate_only(folder):
        results = run_report.load(folder)
        kind = kind_of(results, api.KINDS)
        pages = kind.pages
        for table in run_report.tables(results, certified=bool(certificates)):
            out.print(table)
        if not certificates:
            for text in kind.sentences(folder, results):
                say(out, text, "bold")
    for certificate in certificates.values():
        for table in certificate_tables(certificate.answer):
            out.print(table)
    for certificate in certificates.values():
        task = f"{certificate.question.task}: " if len(certificates) > 1 else ""
        say(out, f"{task}{wording.headline(certificate)}", "bold")
    # Every certificate of a run holds the values of all its tasks.
    p_values = next((one.inputs.adjusted_p for one in certificates.values()), None)
    if p_values:
        adjusted = ", ".join(f"{task} {p:.3g}" for task, p in p_values.items())
        say(out, f"p of the differences, adjusted for several tasks (Holm): {adjusted}")
    for place in (certificate_page.REPORT, *pages, "adapter", "adapters"):
        if (folder / place).exists():
            say(out, f"{place.partition('.')[0]}: {folder / place}")


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Watch:
    """A `ProgressListener` with a live bar for each thing under way.

    If output is piped, it prints a line at most every ten seconds. Use it as a context manager:
    leaving it ends the bars. What ends always leaves its last line.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        # A column of its own wraps, so that a narrow terminal shows all losses too.
        status = TextColumn("{task.fields[status]}", table_column=Column())
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            status,
            console=out,
            refresh_per_second=2,
            disable=not out.is_terminal,
        )
        # All by label.
        self.bars: dict[str, TaskID] = {}  # in the order of their beginning
        self.lines: dict[str, str] = {}  # not printed yet
        self.losses: dict[str, dict[str, float]] = {}  # the newest, by kind
        self.since: dict[str, float] = {}  # when it began, in seconds
        self.first: dict[str, int] = {}  # how many were done when it began
        self.last_line = time.monotonic()

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for label in list(self.bars):
            self._end(label)
        self.progress.stop()

    def stage(self, text: str) -> None:
        """Print the stage as a line."""
        say(self.out, text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Show step, speed, time left and the newest losses (nats per supervised token)."""
        self._begin(label, steps)
        newest = {"task loss": point.task_loss, "general loss": point.general_loss, "dev loss": dev}
        losses = self.losses[label]
        for name, loss in newest.items():
            if loss is not None:
                losses[name] = loss
        left = (steps - point.step) * point.seconds / point.step
        status = [f"{point.tokens / max(point.seconds, 1e-9):,.0f} tokens/s", f"{clock(left)} left"]
        for name in newest:
            if name in losses:
                status.append(f"{name} {losses[name]:.3f}")
        self._show(label, point.step, steps, f"step {point.step:,}/{steps:,}", status)

    def count(self, label: str, done: int, total: int) -> None:
        """Show how many are done, and the time left."""
        self._begin(label, total)
        # How long the ones before the first call took is not known.
        first = self.first.setdefault(label, done)
        passed = time.monotonic() - self.since[label]
        left = []
        if done > first:
            left.append(f"{clock((total - done) * passed / (done - first))} left")
        self._show(label, done, total, f"{done:,}/{total:,}", left)

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Show how far a comparison is, and about how long the rest takes."""
        self._begin(OVERALL, total)
        self._show(OVERALL, done, total, f"{done:,}/{total:,}", [f"{clock(seconds)} left"])

    def _begin(self, label: str, total: int) -> None:
        if label not in self.bars:
            self.bars[label] = self.progress.add_task(visible(label), total=total, status="")
            self.losses[label] = {}
            self.since[label] = time.monotonic()

    def _show(self, label: str, done: int, total: int, place: str, status: Sequence[str]) -> None:
        text = ", ".join([place, *status])
        self.lines[label] = f"{label}: {text}"
        self.progress.update(self.bars[label], completed=done, status=text)
        if done >= total:
            self._end(label)
        elif not self.out.is_terminal and time.monotonic() - self.last_line >= QUIET_SECONDS:
            self._say(label)

    def _say(self, label: str) -> None:
        say(self.out, self.lines.pop(label))
        self.last_line = time.monotonic()

    def _end(self, label: str) -> None:
        self.first.pop(label, None)
        self.progress.remove_task(self.bars.pop(label))
        if label in self.lines:
            self._say(label)
