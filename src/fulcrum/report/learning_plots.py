"""Draw learning curves: scores over task rows, with intervals, seeds and the row saving.

Arms with the same number of rows are drawn side by side. A phone gets a plot of its own, not a
smaller one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fulcrum.report.plots import (
    DASHES,
    INK,
    LETTER,
    MARKERS,
    PAGE,
    PANEL,
    PAPER,
    arm_colours,
    draw_svg,
    grid,
    legend,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Mark:
    """An arm's score with one number of task rows, in the metric's own direction."""

    size: int  # task rows; 0: untrained
    value: float
    low: float | None  # 95% interval; None: unknown
    high: float | None
    seeds: tuple[float, ...]  # the values of single seeds
    title: str  # shown when the mouse rests on the mark
    ringed: bool = False  # whether the arm is the reference at this size


@dataclass(frozen=True)
class Line:
    """One arm's learning curve."""

    arm: str
    label: str
    marks: tuple[Mark, ...]  # ascending by size
    strong: bool = False  # strong lines set the scale and have a band; others have whiskers

    @property
    def untrained(self) -> bool:
        """Return whether the arm has no task rows at all, so that its score holds at every size."""
        return self.marks[-1].size == 0


@dataclass(frozen=True)
class Reading:
    """The row saving: where the arm's curve reaches the reference's score."""

    value: float  # the reference's score with `n` rows
    n: int
    rows: float  # with which the arm is as good
    fewest: float | None  # end of the interval of `rows`; None: beyond the measured sizes
    most: float | None  # the other end
    smallest: int  # the arm's smallest measured size
    text: str


def learning_curves(lines: Sequence[Line], reading: Reading | None, *, narrow: bool = False) -> str:
    """Draw scores over task rows, as wide as a page or as a phone, and return one ``<svg>``."""
    width = PANEL if narrow else PAGE
    draw = partial(_draw_learning_curves, lines=lines, reading=reading, points=0.85 * 72 * width)
    return draw_svg(3.8 if narrow else 4.4, draw, width=width)


def _draw_learning_curves(
    figure: "Figure", lines: Sequence[Line], reading: Reading | None, points: float
) -> None:
    """Draw learning curves on an axis that is about `points` points wide."""
    from matplotlib.lines import Line2D

    axis = figure.subplots()
    columns = _columns(lines)
    first, last = min(columns.values()), max(columns.values())
    point = ((last - first) or 1.0) / points  # in the unit of the axis
    shifts = _shifts(lines, columns, 5.5 * point)
    axis.set_xlim(first - 30 * point, last + 30 * point)
    axis.set_ylim(*_values_shown(lines, [] if reading is None else [reading.value]))
    colours = arm_colours(line.arm for line in lines)
    handles = []
    for place, line in enumerate(lines):
        style: dict[str, Any] = {
            "color": colours[line.arm],
            "linestyle": DASHES[place % len(DASHES)],
            "linewidth": 2.4 if line.strong else 1.5,
            "zorder": 3 - place / len(lines),
        }
        marker = MARKERS[place % len(MARKERS)]
        shift = shifts.get(line.arm, 0.0)
        xs = {mark.size: columns[mark.size] + shift for mark in line.marks}
        _draw_line(axis, line, xs, style)
        _draw_marks(axis, line, xs, marker, colours[line.arm])
        handles.append(Line2D([], [], **style, marker=marker, markersize=6))
    if reading is not None:
        _draw_reading(axis, reading, colours[lines[0].arm])
    _label_columns(axis, columns, point)
    grid(axis, "y")
    axis.set_xlabel("task rows, log scale", labelpad=4 if reading is None else 18)
    legend(figure, handles, (line.label for line in lines))


def _columns(lines: Sequence[Line]) -> dict[int, float]:
    """Return the place of each size: its logarithm; untrained arms are left of all others."""
    sizes = sorted({mark.size for mark in _all_marks(lines)})
    trained = [size for size in sizes if size] or [1]
    columns = {size: math.log2(size) for size in trained}
    if sizes[0] == 0:
        width = columns[trained[-1]] - columns[trained[0]]
        columns[0] = columns[trained[0]] - (0.12 * width or 1.0)
    return columns


def _all_marks(lines: Sequence[Line]) -> list[Mark]:
    return [mark for line in lines for mark in line.marks]


def _shifts(lines: Sequence[Line], columns: Mapping[int, float], most: float) -> dict[str, float]:
    """Return how far each trained arm is from its column: strong ones are in the middle."""
    trained = [line for line in lines if not line.untrained]
    trained.sort(key=lambda line: not line.strong)
    gaps = [right - left for left, right in pairwise(sorted(columns.values()))]
    gap = min(gaps, default=math.inf)
    step = min(most, 0.5 * gap / max(1, len(trained)))
    shifts = {}
    for place, line in enumerate(trained):  # 0, 1, -1, 2, -2 ... steps
        side = 1 if place % 2 else -1
        shifts[line.arm] = step * side * ((place + 1) // 2)
    return shifts


def _values_shown(lines: Sequence[Line], also: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the scale: it shows strong lines, and the parts of others near to them.

    An untrained model is often so much worse that it would flatten all other curves; it is then
    drawn at the edge.
    """
    leading = [line for line in lines if line.strong and not line.untrained] or lines
    values = list(also)
    widths = []
    for mark in _all_marks(leading):
        values.append(mark.value)
        if mark.low is not None and mark.high is not None:
            widths.append(mark.high - mark.low)
    low, high = min(values), max(values)
    span = max(high - low, min(widths, default=0.0), 1e-3 * max(abs(low), abs(high)), 1e-6)

    near_low, near_high = low - 1.2 * span, high + 1.2 * span
    ends: list[float] = []
    for mark in _all_marks(lines):
        if near_low <= mark.value <= near_high:
            low = min(low, mark.value)
            high = max(high, mark.value)
            ends += mark.seeds
            if mark.low is not None:
                ends.append(mark.low)
            if mark.high is not None:
                ends.append(mark.high)
    # Intervals and seeds widen the scale, but by no more than this.
    low = max(min([low, *ends]), low - 0.6 * span)
    high = min(max([high, *ends]), high + 0.6 * span)
    room = 0.04 * (high - low) or 0.5 * span
    return low - room, high + room


def _draw_line(
    axis: "Axes", line: Line, columns: Mapping[int, float], style: Mapping[str, Any]
) -> None:
    """Draw the line through the marks on the scale, with a band if it is strong, else whiskers."""
    bottom, top = axis.get_ylim()
    xs: list[float] = []
    values: list[float] = []
    spans: list[tuple[float, float, float]] = []
    for mark in line.marks:
        if bottom <= mark.value <= top:
            x = columns[mark.size]
            xs.append(x)
            values.append(mark.value)
            if mark.low is not None and mark.high is not None:
                spans.append((x, mark.low, mark.high))
    if line.untrained and xs:  # its score holds at every size
        axis.axhline(values[0], **style)
    else:
        axis.plot(xs, values, **style)
    if line.strong and len(spans) == len(xs) > 1:
        places, lows, highs = zip(*spans, strict=True)
        axis.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        return
    for x, low, high in spans:
        axis.plot([x, x], [low, high], color=style["color"], linewidth=1.3, zorder=style["zorder"])


def _draw_marks(
    axis: "Axes", line: Line, columns: Mapping[int, float], marker: str, colour: str
) -> None:
    """Draw marks with their titles and seeds; a triangle at the edge marks a value beyond it."""
    bottom, top = axis.get_ylim()
    for mark in line.marks:
        x = columns[mark.size]
        y = min(max(mark.value, bottom), top)
        seeds = [value for value in mark.seeds if bottom <= value <= top]
        if len(mark.seeds) > 1:
            axis.plot(
                [x] * len(seeds), seeds, "o", markersize=2.8, color=colour, alpha=0.5, zorder=3.1
            )
        shape = marker
        if mark.value > top:
            shape = "^"
        elif mark.value < bottom:
            shape = "v"
        axis.plot(
            [x],
            [y],
            shape,
            color=colour,
            markersize=8 if line.strong else 7,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
            zorder=3.4 if line.strong else 3.2,
            clip_on=False,
            gid=titled(mark.title),
        )
        if mark.ringed:
            axis.plot(
                [x],
                [y],
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=1.2,
                zorder=3.5,
                clip_on=False,
            )


def _draw_reading(axis: "Axes", reading: Reading, colour: str) -> None:
    """Draw a path from the reference to where the arm is as good, and the interval of its rows."""
    bottom = axis.get_ylim()[0]
    start, at = math.log2(reading.n), math.log2(reading.rows)
    fewest = math.log2(reading.smallest if reading.fewest is None else reading.fewest)
    most = math.log2(reading.n if reading.most is None else reading.most)
    span: dict[str, Any] = {"color": colour, "alpha": 0.55, "clip_on": False, "zorder": 2.9}
    axis.plot(
        [start, at, at], [reading.value, reading.value, bottom], ":", color=INK, linewidth=1.5
    )
    axis.plot([fewest, most], [bottom, bottom], linewidth=5, solid_capstyle="butt", **span)
    if reading.fewest is None:
        axis.plot([fewest], [bottom], "<", markersize=9, markeredgewidth=0, **span)
    if reading.most is None:
        axis.plot([most], [bottom], ">", markersize=9, markeredgewidth=0, **span)
    left, right = axis.get_xlim()
    share = (at - left) / (right - left)
    side = "center"
    if share < 0.3:
        side = "left"
    elif share > 0.7:
        side = "right"
    axis.annotate(
        reading.text,
        (at, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -20),
        textcoords="offset points",
        ha=side,
        va="top",
        weight="bold",
    )


def _label_columns(axis: "Axes", columns: Mapping[int, float], point: float) -> None:
    """Write the sizes under their columns; skip any that would touch the one before."""
    places: list[float] = []
    texts: list[str] = []
    end = -math.inf
    for size, x in sorted(columns.items()):
        half = 0.5 * LETTER * len(f"{size:,}") * point
        if x - half > end:
            places.append(x)
            texts.append(f"{size:,}")
            end = x + half + 4 * point
    axis.set_xticks(places, texts)
