"""Draw the plots of the mechanism runs with the means of `plots`.

`scaling` draws a metric over amounts of general data, `bars` counts, `spots` clusters by gain and
share of general data, `eigenvalues` how many clusters there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fulcrum.report.plots import COLOURS, DASHED, DASHES, GREY, OTHERS, draw_svg, grid, legend
from fulcrum.stats.intervals import seed_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FITTED = (COLOURS["sft"], COLOURS["sft_anchor"], *OTHERS)


@dataclass(frozen=True)
class Amounts:
    """One panel: a metric by general rows for each shown task row, with fitted curves."""

    title: str
    y_label: str
    ratios: Sequence[float]
    by_seed: Sequence[Sequence[float]]  # seeds x ratios
    fine: Sequence[float]  # the ratios of the fitted curves
    fitted: Mapping[str, Sequence[float]]  # name -> values at `fine`
    jump: float | None = None  # the ratio of a jump


def scaling(panels: Sequence[Amounts]) -> str:
    """Draw a metric over the amount of general data, and return an ``<svg>`` for each panel.

    Small dots are seeds, large ones their means with t intervals.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.fitted))
    drawn = []
    for panel in panels:
        drawn.append(draw_svg(2.9, partial(_draw_amounts, panel=panel, names=names)))
    return "".join(drawn)


def _draw_amounts(figure: "Figure", panel: Amounts, names: Sequence[str]) -> None:
    import numpy as np

    axis = figure.subplots()
    fine = np.log2(1 + np.array(panel.fine))
    handles: dict[str, Any] = {}
    for name, curve in panel.fitted.items():
        place = names.index(name)
        (handles[name],) = axis.plot(
            fine,
            curve,
            linewidth=1.6,
            color=_FITTED[place % len(_FITTED)],
            linestyle=DASHES[place % len(DASHES)],
        )
    _draw_seeds(axis, panel)
    if panel.jump is not None:
        at = math.log2(1 + panel.jump)
        axis.axvline(at, color=GREY, linewidth=1.2, linestyle=DASHED, zorder=0.5)
        text = f" jump at {panel.jump:.3g} "
        axis.annotate(text, (at, 1), xycoords=("data", "axes fraction"), va="top")
    places = np.log2(1 + np.array(panel.ratios))
    axis.set_xticks(places, [f"{ratio:.2g}" for ratio in panel.ratios])
    grid(axis, "y")
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel("general rows for each shown task row")
    axis.set_ylabel(panel.y_label)
    legend(figure, handles.values(), handles)


def _draw_seeds(axis: "Axes", panel: Amounts) -> None:
    """Draw the values of single seeds, and their means with intervals."""
    import numpy as np

    intervals = []
    places = np.log2(1 + np.array(panel.ratios))
    for place, column in zip(places, np.array(panel.by_seed, dtype=float).T, strict=True):
        intervals.append(seed_interval(column))
        if len(column) > 1:
            style: dict[str, Any] = {"markersize": 3.2, "color": COLOURS["mix"], "zorder": 3}
            axis.plot([place] * len(column), column, "o", **style)
    means, lows, highs = np.array(intervals).T
    below_and_above = np.array([means - lows, highs - means])
    axis.errorbar(
        places,
        means,
        None if np.isnan(below_and_above).any() else below_and_above,
        fmt="o",
        color=COLOURS["tell"],
        markersize=6.5,
        linewidth=1.8,
        zorder=4,
    )


def bars(labels: Sequence[str], counts: Sequence[int], x_label: str, y_label: str) -> str:
    """Draw counts as bars, and return one ``<svg>``."""

    def draw(figure: "Figure") -> None:
        axis = figure.subplots()
        axis.bar(range(len(labels)), counts, color=COLOURS["tell"], width=0.7)
        for place, count in enumerate(counts):
            axis.annotate(f"{count}", (place, count), ha="center", va="bottom")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.locator_params(axis="y", integer=True)

    return draw_svg(2.4, draw)


@dataclass(frozen=True)
class Spot:
    """A cluster in a plot of gain by density."""

    x: float
    y: float
    size: int  # its number of items
    name: str


def spots(points: Sequence[Spot], x_label: str, y_label: str) -> str:
    """Draw clusters as circles whose areas are their sizes, and return one ``<svg>``."""

    def draw(figure: "Figure") -> None:
        axis = figure.subplots()
        axis.axhline(0, color=GREY, linewidth=1, linestyle=DASHED, zorder=0.5)
        largest = max((point.size for point in points), default=1)
        axis.scatter(
            [point.x for point in points],
            [point.y for point in points],
            s=[40 + 360 * point.size / largest for point in points],
            color=COLOURS["tell"],
            alpha=0.45,
            edgecolor=COLOURS["tell"],
        )
        for point in points:
            axis.annotate(point.name, (point.x, point.y), ha="center", va="center", fontsize=8)
        grid(axis, "both")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)

    return draw_svg(3.6, draw)


def eigenvalues(values: Sequence[float], chosen: int) -> str:
    """Draw descending eigenvalues with a line after the `chosen` ones, and return one ``<svg>``."""

    def draw(figure: "Figure") -> None:
        axis = figure.subplots()
        numbers = range(1, len(values) + 1)
        axis.plot(numbers, values, "o-", markersize=4, linewidth=1, color=COLOURS["tell"])
        if chosen:
            axis.axvline(chosen + 0.5, color=COLOURS["sft_anchor"], linewidth=1.7, linestyle="-.")
        grid(axis, "y")
        axis.set_xlabel("number")
        axis.set_ylabel("eigenvalue")
        axis.locator_params(axis="x", integer=True)

    return draw_svg(2.5, draw)
