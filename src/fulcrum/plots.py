"""Plots of the report, drawn by matplotlib as SVG text that is put straight into the page.

Dots with intervals, one line an arm (`dots`); curves over optimizer steps (`curves`); a value over amounts of general data
(`amounts`, `scaling`); counts (`bars`); clusters by what they have in common with general data (`spots`). Colours are
the Okabe-Ito palette, which people with colour-blindness can tell apart; arms also differ by label, marker or dashes.

Invariant: the same values give the same bytes, and no text of the caller's is read as markup or mathematics.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulcrum.arms import ARMS
from fulcrum.stats import Interval, seed_interval

# Okabe & Ito 2008, "Color Universal Design"; its yellow is missing, as it cannot be seen on white.
COLOURS = {arm.name: arm.colour for arm in ARMS.values() if arm.colour}
OTHERS = ("#009E73", "#CC79A7", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT, _WIDTH = "#222222", "#e4e4e4", 9.2  # inches; the page scales the picture
_STYLE = {
    "svg.hashsalt": "fulcrum",  # else the ids in the file are random
    "svg.fonttype": "none",  # text stays text: small, selectable, searchable
    "text.parse_math": False,  # an arm or a task called `$x` is no formula
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Dots:
    """One panel: a value with its interval for each arm, the single seeds' values, and a value to compare with."""

    title: str
    x_label: str
    rows: Sequence[tuple[str, Interval, Sequence[float]]]
    reference: float | None = None


@dataclass(frozen=True)
class Curve:
    """One arm's values over optimizer steps; `best` is the step whose weights were kept."""

    arm: str
    points: Sequence[tuple[float, float]]
    best: int | None = None


@dataclass(frozen=True)
class Curves:
    """One panel of curves."""

    title: str
    y_label: str
    lines: Sequence[Curve]


def dots(panels: Sequence[Dots]) -> str:
    """Draw the panels side by side, two in a line, arms from top to bottom, and return one ``<svg>`` element."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    height = lines * (0.95 + 0.3 * max(len(panel.rows) for panel in panels))

    def draw(figure: Any) -> None:
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            _draw_dots(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)

    return _svg(height, draw)


def _draw_dots(axis: Any, panel: Dots) -> None:
    names = [arm for arm, _, _ in panel.rows]
    for place, (arm, interval, seeds) in enumerate(panel.rows):
        colour = _colour(arm, names)
        axis.axhline(place, color=_FAINT, linewidth=0.8, zorder=0)
        axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.4, solid_capstyle="round")
        if len(seeds) > 1:
            axis.plot(seeds, [place + 0.3] * len(seeds), "o", markersize=3.5, color=colour)  # below, else the mean hides them
        axis.plot([interval.estimate], [place], "o", markersize=7.5, color=colour)
    if panel.reference is not None and math.isfinite(panel.reference):
        axis.axvline(panel.reference, color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel(panel.x_label)


def curves(panels: Sequence[Curves]) -> str:
    """Draw the panels side by side with one legend below, and return one ``<svg>`` element."""
    names = list(dict.fromkeys(line.arm for panel in panels for line in panel.lines))

    def draw(figure: Any) -> None:
        handles: dict[str, Any] = {}
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for line in panel.lines:
                handles[line.arm] = _draw_curve(axis, line, names)
            axis.locator_params(axis="x", nbins=5, integer=True)
            axis.grid(axis="y", color=_FAINT, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.set_title(panel.title, loc="left")
            axis.set_xlabel("optimizer step")
            axis.set_ylabel(panel.y_label)
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False)

    return _svg(3.3, draw)


def amounts(ratios: Sequence[float], losses: Sequence[float], errors: Sequence[float], chosen: float) -> str:
    """Draw a pilot's losses over general rows for each shown task row, with the parabola that was fitted and what was chosen,
    and return one ``<svg>`` element. `errors` are standard errors of the differences to the first.
    """
    import numpy as np

    places = np.log2(1 + np.array(ratios))

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        fine = np.linspace(places[0], places[-1], 65)
        axis.plot(fine, np.polyval(np.polyfit(places, losses, 2), fine), color=COLOURS["base_anchor"], linewidth=1.4)
        axis.errorbar(places, losses, errors, fmt="o", color=COLOURS["tell"], markersize=6.5, linewidth=2)
        axis.axhline(losses[0], color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axis.axvline(math.log2(1 + chosen), color=COLOURS["sft_anchor"], linewidth=1.7, linestyle="-.")
        axis.annotate(
            f" chosen: {chosen:g} ", (math.log2(1 + chosen), 1), xycoords=("data", "axes fraction"), va="top",
            ha="right" if chosen == ratios[-1] else "left", color=COLOURS["sft_anchor"],
        )  # fmt: skip
        axis.set_xticks(places, [f"{ratio:g}" for ratio in ratios])
        axis.grid(axis="y", color=_FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel("general rows for each shown task row")
        axis.set_ylabel("nats per answer token")

    return _svg(3.0, draw)


@dataclass(frozen=True)
class Amounts:
    """One panel: a metric by general rows for each shown task row, one line of values for each seed, and fitted curves by name
    over `fine` ratios."""

    title: str
    y_label: str
    ratios: Sequence[float]
    by_seed: Sequence[Sequence[float]]
    fine: Sequence[float]
    fitted: Mapping[str, Sequence[float]]
    jump: float | None = None


def scaling(panels: Sequence[Amounts]) -> str:
    """Draw a metric over the amount of general data, two panels in a line, and return one ``<svg>`` element.

    Small dots are seeds, large ones their means with t intervals.
    """
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.fitted))

    def draw(figure: Any) -> None:
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=False):
            handles |= _draw_amounts(axis, panel, names)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False)

    return _svg(0.4 + 2.9 * lines, draw)


def _draw_amounts(axis: Any, panel: Amounts, names: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    places, values = np.log2(1 + np.array(panel.ratios)), np.array(panel.by_seed, dtype=float)
    found = [seed_interval(column) for column in values.T]
    handles: dict[str, Any] = {}
    for name, curve in panel.fitted.items():
        place = names.index(name)
        line = {"color": (COLOURS["sft"], COLOURS["sft_anchor"], *OTHERS)[place % 5], "linestyle": _DASHES[place % 4]}
        (handles[name],) = axis.plot(np.log2(1 + np.array(panel.fine)), curve, linewidth=1.6, **line)
    for place, column in zip(places, values.T, strict=True):
        if len(column) > 1:
            axis.plot([place] * len(column), column, "o", markersize=3.2, color=COLOURS["mix"], zorder=3)
    ends = np.array([[i.estimate - i.low, i.high - i.estimate] for i in found]).T
    means = [i.estimate for i in found]
    style: dict[str, Any] = {"fmt": "o", "color": COLOURS["tell"], "markersize": 6.5, "linewidth": 1.8, "zorder": 4}
    axis.errorbar(places, means, None if np.isnan(ends).any() else ends, **style)
    if panel.jump is not None:
        axis.axvline(math.log2(1 + panel.jump), color="#8a8a8a", linewidth=1.2, linestyle=(0, (4, 3)), zorder=0.5)
        axis.annotate(
            f" jump at {panel.jump:.3g} ", (math.log2(1 + panel.jump), 1), xycoords=("data", "axes fraction"), va="top"
        )
    axis.set_xticks(places, [f"{ratio:.2g}" for ratio in panel.ratios])
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel("general rows for each shown task row")
    axis.set_ylabel(panel.y_label)
    return handles


def bars(labels: Sequence[str], counts: Sequence[int], x_label: str, y_label: str) -> str:
    """Draw counts as bars, and return one ``<svg>`` element."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.bar(range(len(labels)), counts, color=COLOURS["tell"], width=0.7)
        for place, count in enumerate(counts):
            axis.annotate(f"{count}", (place, count), ha="center", va="bottom")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.locator_params(axis="y", integer=True)

    return _svg(2.4, draw)


@dataclass(frozen=True)
class Spot:
    """A cluster in a plot of gain by density, with its number of items and its name."""

    x: float
    y: float
    size: int
    name: str


def spots(points: Sequence[Spot], x_label: str, y_label: str) -> str:
    """Draw clusters as circles, their areas by their sizes, with a line at no gain, and return one ``<svg>`` element."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.axhline(0, color="#8a8a8a", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        most = max((point.size for point in points), default=1)
        axis.scatter(
            [p.x for p in points], [p.y for p in points], s=[40 + 360 * p.size / most for p in points],
            color=COLOURS["tell"], alpha=0.45, edgecolor=COLOURS["tell"],
        )  # fmt: skip
        for point in points:
            axis.annotate(point.name, (point.x, point.y), ha="center", va="center", fontsize=8)
        axis.grid(color=_FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)

    return _svg(3.4, draw)


def eigenvalues(values: Sequence[float], chosen: int) -> str:
    """Draw descending eigenvalues, with a line after the `chosen` ones (0: none), and return one ``<svg>`` element."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.plot(range(1, len(values) + 1), values, "o-", markersize=4, linewidth=1, color=COLOURS["tell"])
        if chosen:
            axis.axvline(chosen + 0.5, color=COLOURS["sft_anchor"], linewidth=1.7, linestyle="-.")
        axis.grid(axis="y", color=_FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel("number")
        axis.set_ylabel("eigenvalue")
        axis.locator_params(axis="x", integer=True)

    return _svg(2.5, draw)


def _draw_curve(axis: Any, line: Curve, names: Sequence[str]) -> Any:
    place = names.index(line.arm)
    colour = _colour(line.arm, names)
    xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
    marker = _MARKERS[place % len(_MARKERS)]
    style = {"color": colour, "linewidth": 1.7, "linestyle": _DASHES[place % len(_DASHES)], "marker": marker}
    # Hollow markers on some points tell the arms apart without colour; the filled one is the checkpoint that was kept.
    (handle,) = axis.plot(xs, ys, markersize=4, markerfacecolor="white", markevery=max(1, len(xs) // 8), **style)
    for x, y in line.points:
        if x == line.best:
            axis.plot([x], [y], marker, markersize=8, color=colour)
    return handle


def _colour(arm: str, names: Sequence[str]) -> str:
    unknown = [name for name in names if name not in COLOURS]
    return COLOURS.get(arm) or OTHERS[unknown.index(arm) % len(OTHERS)]


def _svg(height: float, draw: Any) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no date, so that equal runs give equal files
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prolog inside HTML
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to these, and a second plot would repeat them
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
