"""Draw the plots of reports and certificates with matplotlib, as SVG text that goes into the page.

`dots` draws values with intervals, `curves` losses over optimizer steps, `amounts` a pilot's losses over amounts of
general data, `learning_curves` scores over task rows. Each panel is an ``<svg>`` of its own, so that a page can set
panels side by side and a phone one below the other, with text of a readable size.

Colours are the Okabe-Ito palette, which people with colour-blindness can tell apart; arms also differ by label, marker
or dashes. Each colour has a counterpart for dark pages, and the browser chooses.

Invariant: the same values give the same bytes, and no text of the caller's is read as markup or mathematics.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fulcrum.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, "Color Universal Design", without its yellow, which cannot be seen on white.
COLOURS = {
    "base": "#5f5f5f",
    "base_anchor": "#999999",
    "sft": "#e69f00",
    "sft_anchor": "#d55e00",
    "mix": "#56b4e9",
    "tell": "#0072b2",
}
OTHERS = ("#009e73", "#cc79a7", "#000000")
INK = "#222222"
PAPER = "#ffffff"
GREY = "#8a8a8a"
FAINT = "#e4e4e4"
DARK = {  # for each colour, the one that a dark page shows
    "#5f5f5f": "#a9b0b8",
    "#999999": "#79828c",
    "#e69f00": "#e69f00",
    "#d55e00": "#f0894a",
    "#56b4e9": "#7ccdf8",
    "#0072b2": "#2f86d6",
    "#009e73": "#2fc79a",
    "#cc79a7": "#e39ac0",
    "#000000": "#f2f3f4",
    INK: "#e6e8ea",
    PAPER: "#1d2125",
    GREY: "#98a1ac",
    FAINT: "#363c43",
}
DASHES = ("-", "--", "-.", ":")
DASHED = (0, (4, 3))  # of lines to compare with
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_PANEL = 4.2  # inches: the width of a phone, or of half a page
_PAGE = 9.2  # inches
_LETTER = 0.55 * 10  # points that a letter takes, on average
_LONGEST = 40  # letters of a label; longer ones are cut
_TITLE = (
    "title of the mark: "  # begins the id of an artist whose SVG group gets the rest as its title
)
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
    """Return the colour of each arm: its own, or one of three in turn for arms that have none."""
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
    """One line of a panel: a value with its interval, and the values of single seeds."""

    label: str
    interval: Interval
    seeds: Sequence[float] = ()
    colour: str = INK


@dataclass(frozen=True)
class Dots:
    """One panel: values with intervals on one axis, and a value to compare them with."""

    title: str
    x_label: str
    rows: Sequence[Dot]
    reference: float | None = None


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


def curves(panels: Sequence[Curves]) -> str:
    """Draw each panel with a legend, and return an ``<svg>`` for each; arms look alike in all."""
    arms = list(dict.fromkeys(line.arm for panel in panels for line in panel.lines))
    drawn = []
    for panel in panels:
        drawn.append(draw_svg(3.4, partial(_draw_curves, panel=panel, arms=arms)))
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

    Hollow markers on some points tell arms apart without colour; the filled one is the step whose weights were kept.
    """
    xs = [x for x, _ in line.points]
    ys = [y for _, y in line.points]
    marker = _MARKERS[place % len(_MARKERS)]
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

    The curve is the parabola that was fitted, the upright line what was chosen; `errors` are standard errors of the
    differences to the first.
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


# ---- learning curves


@dataclass(frozen=True)
class Mark:
    """An arm's score with one number of task rows, in the metric's own direction."""

    size: int  # task rows; 0: untrained
    value: float
    low: float | None  # 95% interval; None: unknown
    high: float | None
    seeds: tuple[float, ...]
    title: str  # shown when the mouse rests on the mark
    ringed: bool = False  # it is the reference at this size


@dataclass(frozen=True)
class Line:
    """One arm's learning curve; strong ones set the scale and have a band, others whiskers."""

    arm: str
    label: str
    marks: tuple[Mark, ...]  # ascending by size
    strong: bool = False

    @property
    def untrained(self) -> bool:
        """Whether the arm has no task rows at all, so that its score holds at every size."""
        return self.marks[-1].size == 0


@dataclass(frozen=True)
class Reading:
    """The row saving, read off at the height of the reference's score: the arm gets there with `rows` of `n`."""

    value: float
    n: int
    rows: float
    fewest: float | None  # end of the interval of `rows`; None: beyond the measured sizes
    most: float | None
    smallest: int
    text: str


def learning_curves(lines: Sequence[Line], reading: Reading | None, *, narrow: bool = False) -> str:
    """Draw scores over task rows, as wide as a page or as a phone, and return one ``<svg>``."""
    width = _PANEL if narrow else _PAGE
    draw = partial(_draw_learning_curves, lines=lines, reading=reading, points=0.85 * 72 * width)
    return draw_svg(4.2 if narrow else 4.6, draw, width=width)


def _draw_learning_curves(
    figure: "Figure", lines: Sequence[Line], reading: Reading | None, points: float
) -> None:
    """`points` is about how wide the axis is."""
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
        style = {
            "color": colours[line.arm],
            "linestyle": DASHES[place % len(DASHES)],
            "linewidth": 2.4 if line.strong else 1.5,
            "zorder": 3 - place / len(lines),
        }
        marker = _MARKERS[place % len(_MARKERS)]
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
    """Return where each size lies: at its logarithm, and untrained arms left of all."""
    sizes = sorted({mark.size for line in lines for mark in line.marks})
    trained = [size for size in sizes if size] or [1]
    columns = {size: math.log2(size) for size in trained}
    if sizes[0] == 0:
        width = columns[trained[-1]] - columns[trained[0]]
        columns[0] = columns[trained[0]] - (0.12 * width or 1.0)
    return columns


def _shifts(lines: Sequence[Line], columns: Mapping[int, float], most: float) -> dict[str, float]:
    """Return by how much each trained arm stands beside its column: strong ones in the middle."""
    trained = sorted(
        (line for line in lines if not line.untrained), key=lambda line: not line.strong
    )
    places = sorted(columns.values())
    gap = min((b - a for a, b in pairwise(places)), default=math.inf)
    step = min(most, 0.5 * gap / max(1, len(trained)))
    shifts = {}
    for place, line in enumerate(trained):  # 0, 1, -1, 2, -2 ... steps
        side = 1 if place % 2 else -1
        shifts[line.arm] = step * side * ((place + 1) // 2)
    return shifts


def _values_shown(lines: Sequence[Line], also: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the scale: it shows all values of strong lines, and of others what is near to these.

    An untrained model is often so much worse that it would squash all that is learned; it then stands at the edge.
    """
    leading = [line for line in lines if line.strong and not line.untrained] or lines
    leading_marks = [mark for line in leading for mark in line.marks]
    values = [*(mark.value for mark in leading_marks), *also]
    low, high = min(values), max(values)
    widths = []
    for mark in leading_marks:
        if mark.low is not None and mark.high is not None:
            widths.append(mark.high - mark.low)
    span = max(high - low, min(widths, default=0.0), 1e-3 * max(abs(low), abs(high)), 1e-6)

    marks = [mark for line in lines for mark in line.marks]
    near = [mark for mark in marks if low - 1.2 * span <= mark.value <= high + 1.2 * span]
    low = min([low, *(mark.value for mark in near)])
    high = max([high, *(mark.value for mark in near)])

    # Intervals and seeds widen the scale, though not without limit.
    ends: list[float] = []
    for mark in near:
        ends.extend(mark.seeds)
        ends.extend(end for end in (mark.low, mark.high) if end is not None)
    low, high = max(min([low, *ends]), low - 0.6 * span), min(max([high, *ends]), high + 0.6 * span)
    room = 0.04 * (high - low) or 0.5 * span
    return low - room, high + room


def _draw_line(
    axis: "Axes", line: Line, columns: Mapping[int, float], style: Mapping[str, Any]
) -> None:
    """Draw the line through the marks that are on the scale, with its band, or whiskers if it has none."""
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
    """Draw an arm's marks with their titles and seeds; a triangle at the edge is beyond the scale."""
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
            markersize=8 if line.strong else 6.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.8,
            zorder=3.4 if line.strong else 3.2,
            clip_on=False,
            gid=f"{_TITLE}{mark.title}",
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
    """Draw the way from the reference to where the arm is as good, and the interval of its rows on the axis."""
    bottom = axis.get_ylim()[0]
    start, at = math.log2(reading.n), math.log2(reading.rows)
    fewest = math.log2(reading.smallest if reading.fewest is None else reading.fewest)
    most = math.log2(reading.n if reading.most is None else reading.most)
    span = {"color": colour, "alpha": 0.55, "clip_on": False, "zorder": 2.9}
    axis.plot(
        [start, at, at], [reading.value, reading.value, bottom], ":", color=INK, linewidth=1.5
    )
    axis.plot([fewest, most], [bottom, bottom], linewidth=5, solid_capstyle="butt", **span)
    if reading.fewest is None:
        axis.plot([fewest], [bottom], "<", markersize=9, markeredgewidth=0, **span)
    if reading.most is None:
        axis.plot([most], [bottom], ">", markersize=9, markeredgewidth=0, **span)
    left, right = axis.get_xlim()
    part = (at - left) / (right - left)
    side = "left" if part < 0.3 else "right" if part > 0.7 else "center"
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
    """Write the sizes under their columns, without those that would touch the one before."""
    places: list[float] = []
    texts: list[str] = []
    end = -math.inf
    for size, x in sorted(columns.items()):
        half = 0.5 * _LETTER * len(f"{size:,}") * point
        if x - half > end:
            places.append(x)
            texts.append(f"{size:,}")
            end = x + half + 4 * point
    axis.set_xticks(places, texts)


# ---- what all plots share


def cut(text: str) -> str:
    """Return a label of at most 40 letters."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def grid(axis: "Axes", which: str) -> None:
    """Draw faint lines at the ticks of "x", "y" or "both", behind everything."""
    axis.grid(axis=which, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]
    axis.set_axisbelow(True)


def legend(figure: "Figure", handles: Iterable[Any], labels: Iterable[str]) -> None:
    """Write what the lines are below the plot, in as many columns as there is room for."""
    texts = [cut(label) for label in labels]
    column = 45 + _LETTER * max(map(len, texts), default=0)  # points
    figure.legend(
        list(handles),
        texts,
        loc="outside lower center",
        ncols=max(1, int(72 * figure.get_figwidth() / column)),
        frameon=False,
        handlelength=2.6,
        columnspacing=1.2,
    )


def draw_svg(height: float, draw: Callable[["Figure"], None], *, width: float = _PANEL) -> str:
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
    svg = svg[svg.index("<svg") :]  # no XML prolog inside HTML
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(rf'<g id="{_TITLE}([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(
        r'<g id="[^"]*"', "<g", svg
    )  # nothing refers to these, and a second plot repeats them
    svg = re.sub(r"<[^>]*>", _colour_for_both, svg)  # tags only: text may hold anything
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _colour_for_both(tag: re.Match[str]) -> str:
    """Return a tag whose colours are each given for light and for dark pages."""
    return re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda found: f"{found[1]}: light-dark({found[2]}, {DARK[found[2]]})",
        tag[0],
    )
