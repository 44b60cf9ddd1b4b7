"""Draw the plots of reports and certificates with matplotlib, as SVG text for the page.

`dots` draws values with intervals, `curves` losses over optimizer steps, `amounts` a pilot's losses
over amounts of general data; `learning_plots` and `research_plots` have more. Each panel is an
``<svg>`` of its own: a wide page sets panels side by side, a phone one below the other, and text
stays readable.

Colours are the Okabe-Ito palette, which people with colour-blindness can tell apart; arms also
differ by label, marker or dashes. Each colour has a counterpart for dark pages, and the browser
chooses.

Invariant: equal values give equal bytes, and no text of the caller is read as markup or formula.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fulcrum.config.arms import ARMS
from fulcrum.stats.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, "Color Universal Design", without its yellow, which cannot be seen on white.
COLOURS = {arm.name: arm.colour for arm in ARMS.values() if arm.colour}
# For arms without a colour. Not pure black: matplotlib omits it from the SVG, as the default.
OTHERS = ("#009e73", "#cc79a7", "#111111")
INK = "#222222"
PAPER = "#ffffff"
GREY = "#8a8a8a"
FAINT = "#e4e4e4"
DARK = {  # colour -> the one that a dark page shows
    "#5f5f5f": "#a9b0b8",
    "#999999": "#79828c",
    "#e69f00": "#e69f00",
    "#d55e00": "#f0894a",
    "#56b4e9": "#7ccdf8",
    "#0072b2": "#2f86d6",
    "#009e73": "#2fc79a",
    "#cc79a7": "#e39ac0",
    "#111111": "#f2f3f4",
    INK: "#e6e8ea",
    PAPER: "#1d2125",
    GREY: "#98a1ac",
    FAINT: "#363c43",
}
DASHES = ("-", "--", "-.", ":")
DASHED = (0, (4, 3))  # for lines to compare with
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
PANEL = 4.2  # inches: the width of a phone, or of half a page
PAGE = 9.2  # inches
LETTER = 0.55 * 10  # mean width of a letter, in points
_LONGEST = 40  # letters of a label
_TITLE = "title of the mark: "
_STYLE = {
    "svg.hashsalt": "fulcrum",  # without it the ids in the file are random
    "svg.fonttype": "none",  # text stays text: small, selectable, searchable
    "text.parse_math": False,  # an arm or a task called `$x` is no formula
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """Return the colour of each arm: its own, or in turn one of three if it has none."""
    colours: dict[str, str] = {}
    others = 0
    for arm in dict.fromkeys(arms):
        if arm in COLOURS:
            colours[arm] = COLOURS[arm]
        else:
            colours[arm] = OTHERS[others % len(OTHERS)]
            others += 1
    return colours


# ---- values with intervals


@dataclass(frozen=True)
class Dot:
    """One line of a panel."""

    label: str
    interval: Interval
    seeds: Sequence[float] = ()  # the values of single seeds
    colour: str = INK


@dataclass(frozen=True)
class Dots:
    """One panel: values with intervals on one axis."""

    title: str
    x_label: str
    rows: Sequence[Dot]
    reference: float | None = None  # a value to compare them with


def dots(panels: Sequence[Dots]) -> str:
    """Draw each panel, its rows from top to bottom, and return an ``<svg>`` for each."""
    drawn = []
    for panel in panels:
        height = 0.8 + 0.4 * len(panel.rows)
        drawn.append(draw_svg(height, partial(_draw_dots, panel=panel)))
    return "".join(drawn)


def _draw_dots(figure: "Figure", panel: Dots) -> None:
    axis = figure.subplots()
    for place, row in enumerate(panel.rows):
        low, high = row.interval.low, row.interval.high
        axis.axhline(place, color=FAINT, linewidth=0.8, zorder=0)
        axis.plot(
            [low, high], [place, place], color=row.colour, linewidth=2.4, solid_capstyle="round"
        )
        if len(row.seeds) > 1:
            below = [place + 0.25] * len(row.seeds)  # on the line the estimate would hide them
            axis.plot(row.seeds, below, "o", markersize=3.2, color=row.colour)
        axis.plot([row.interval.estimate], [place], "o", markersize=7.5, color=row.colour)
        # Above the line, not left of it: a long name takes no room from the axis.
        axis.annotate(
            cut(row.label),
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(0, 6),
            textcoords="offset points",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
            zorder=1,  # above the lines to compare with, below the values
        )
    if panel.reference is not None and math.isfinite(panel.reference):
        axis.axvline(panel.reference, color=GREY, linewidth=1, linestyle=DASHED, zorder=0.5)
    axis.set_ylim(len(panel.rows) - 0.5, -0.75)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel(panel.x_label)


# ---- losses over steps


@dataclass(frozen=True)
class Curve:
    """One arm's values over optimizer steps."""

    arm: str
    points: Sequence[tuple[float, float]]  # (step, value)
    best: int | None = None  # the step whose weights were kept


@dataclass(frozen=True)
class Curves:
    """One panel of curves."""

    title: str
    y_label: str
    lines: Sequence[Curve]


def curves(panels: Sequence[Curves]) -> str:
    """Draw each panel with a legend, and return an ``<svg>`` for each; arms look alike in all."""
    arms = list(dict.fromkeys(line.arm for panel in panels for line in panel.lines))
    drawn = []
    for panel in panels:
        drawn.append(draw_svg(2.8, partial(_draw_curves, panel=panel, arms=arms)))
    return "".join(drawn)


def _draw_curves(figure: "Figure", panel: Curves, arms: Sequence[str]) -> None:
    axis = figure.subplots()
    colours = arm_colours(arms)
    handles = {}
    for line in panel.lines:
        handles[line.arm] = _draw_curve(axis, line, colours[line.arm], arms.index(line.arm))
    axis.locator_params(axis="x", nbins=5, integer=True)
    grid(axis, "y")
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(panel.y_label)
    legend(figure, handles.values(), handles)


def _draw_curve(axis: "Axes", line: Curve, colour: str, place: int) -> Any:
    """Draw a curve, and return its handle for the legend.

    Hollow markers on some points tell arms apart without colour; the filled one is the step whose
    weights were kept.
    """
    xs = [x for x, _ in line.points]
    ys = [y for _, y in line.points]
    marker = MARKERS[place % len(MARKERS)]
    (handle,) = axis.plot(
        xs,
        ys,
        color=colour,
        linewidth=1.7,
        linestyle=DASHES[place % len(DASHES)],
        marker=marker,
        markersize=4,
        markerfacecolor=PAPER,
        markevery=max(1, len(xs) // 8),
    )
    for x, y in line.points:
        if x == line.best:
            axis.plot([x], [y], marker, markersize=8, color=colour)
    return handle


# ---- a pilot


def amounts(
    ratios: Sequence[float], losses: Sequence[float], errors: Sequence[float], chosen: float
) -> str:
    """Draw a pilot's losses over general rows for each shown task row, and return one ``<svg>``.

    The curve is the fitted parabola, the upright line the chosen ratio; `errors` are standard
    errors of the differences to the first loss.
    """
    import numpy as np

    places = np.log2(1 + np.array(ratios))

    def draw(figure: "Figure") -> None:
        axis = figure.subplots()
        fine = np.linspace(places[0], places[-1], 65)
        fitted = np.polyval(np.polyfit(places, losses, 2), fine)
        axis.plot(fine, fitted, color=COLOURS["base_anchor"], linewidth=1.4)
        axis.errorbar(
            places, losses, errors, fmt="o", color=COLOURS["tell"], markersize=6.5, linewidth=2
        )
        axis.axhline(losses[0], color=GREY, linewidth=1, linestyle=DASHED, zorder=0.5)
        at = math.log2(1 + chosen)
        axis.axvline(at, color=COLOURS["sft_anchor"], linewidth=1.7, linestyle="-.")
        axis.annotate(
            f" chosen: {chosen:g} ",
            (at, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            ha="right" if chosen == ratios[-1] else "left",
            color=COLOURS["sft_anchor"],
        )
        axis.set_xticks(places, [f"{ratio:g}" for ratio in ratios])
        grid(axis, "y")
        axis.set_xlabel("general rows for each shown task row")
        axis.set_ylabel("nats per answer token")

    return draw_svg(3.0, draw)


# ---- what all plots share


def cut(text: str) -> str:
    """Return a label of at most 40 letters."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def titled(text: str) -> str:
    """Return an id that gives an artist's SVG group this title, shown on a hover."""
    return _TITLE + text


def grid(axis: "Axes", which: Literal["x", "y", "both"]) -> None:
    """Draw faint lines at the ticks of one axis or both, behind everything."""
    axis.grid(axis=which, color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


def legend(figure: "Figure", handles: Iterable[Any], labels: Iterable[str]) -> None:
    """Add room below the plot, and write the legend there, in columns."""
    texts = [cut(label) for label in labels]
    column = 45 + LETTER * max(map(len, texts), default=0)  # points
    columns = max(1, int(72 * figure.get_figwidth() / column))
    figure.set_figheight(figure.get_figheight() + 0.21 * math.ceil(len(texts) / columns))
    figure.legend(
        list(handles),
        texts,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def draw_svg(height: float, draw: Callable[["Figure"], None], *, width: float = PANEL) -> str:
    """Return what `draw` puts on a figure of this size, in inches, as one ``<svg>``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        # No date, so that equal runs give equal files.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prolog inside HTML, and no namespaces
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(rf"<g id=([\"']){_TITLE}(.*?)\1>", r"<g><title>\2</title>", svg, flags=re.DOTALL)
    # Nothing refers to these ids, and other plots repeat them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<[^>]*>", _colour_for_both, svg)  # tags only: text may hold anything
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _colour_for_both(tag: re.Match[str]) -> str:
    """Return a tag whose colours are each given for light and for dark pages."""
    return re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _light_and_dark, tag[0])


def _light_and_dark(style: re.Match[str]) -> str:
    name, colour = style.groups()
    return f"{name}: light-dark({colour}, {DARK[colour]})"
