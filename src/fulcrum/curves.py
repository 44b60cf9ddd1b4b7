"""Geometry of learning curves, as plain coordinates that a template draws.

No library draws what is wanted here: points that the mouse and the keyboard reach without a script, labels at the ends of
their lines that cover neither each other nor a line, and a plot that is laid out anew for a phone instead of being shrunk.

Invariant: the same values give the same coordinates; every name stays text until a template escapes it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fulcrum import plots
from fulcrum.axes import nice_ticks, tick_texts

COLOURS = (*plots.COLOURS.values(), *plots.OTHERS)
DARK = ("#a9b0b8", "#79828c", "#E69F00", "#f0894a", "#7ccdf8", "#2f86d6", "#2fc79a", "#e39ac0", "#f2f3f4")  # on a dark page
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2.5", "6 2 1 2 1 2")
_SHAPES = (
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0 -9.2 0Z", "M-4.2 -4.2h8.4v8.4h-8.4Z", "M0 -5.4L5.2 4H-5.2Z",
    "M0 -5.8L5 0L0 5.8L-5 0Z", "M0 5.4L5.2 -4H-5.2Z", "M-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3Z",
    "M-5 -5L5 5M-5 5L5 -5", "M0 -5.6L5.4 -1.4L3.3 4.8H-3.3L-5.4 -1.4Z",
)  # fmt: skip
_UP, _DOWN = "M0 -6L5 4H-5Z", "M0 6L5 -4H-5Z"  # a value beyond the scale


@dataclass(frozen=True)
class Mark:
    """An arm at a size: its score in the metric's own direction with its interval (None: unknown), its seeds' scores, and
    what is said of it on a hover. `ringed` marks the reference.
    """

    size: int
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    tip: tuple[str, ...]
    ringed: bool = False


@dataclass(frozen=True)
class Line:
    """One arm's marks by size; strong ones set the scale and have a band, others whiskers."""

    name: str
    marks: tuple[Mark, ...]
    slot: int  # of its colour
    place: int  # of its marker and dashes
    strong: bool = False
    ends_as: str = ""  # the label, where it is not the name


@dataclass(frozen=True)
class Reading:
    """The row saving, read off at the height of the reference's score with `n` rows: the arm gets there with `rows`.

    `fewest` to `most` is its interval; None where it goes on beyond the measured sizes.
    """

    value: float
    n: int
    rows: float
    fewest: float | None
    most: float | None
    smallest: int
    text: str


@dataclass(frozen=True)
class Shown:
    """A mark as drawn, in pixels; `left` and `top` in percent of the chart, for what lies above the drawing."""

    size: int
    x: float
    y: float
    left: float
    top: float
    path: str
    tip: tuple[str, ...]
    ringed: bool
    side: str
    whisker: tuple[float, float] | None
    seeds: tuple[float, ...]


@dataclass(frozen=True)
class Drawn:
    """A line as drawn: `band` and `path` are SVG coordinates; `leader` goes from the last mark to the label."""

    line: Line
    marks: tuple[Shown, ...]
    band: str
    path: str
    label: tuple[float, float, str] | None
    leader: tuple[float, float, float, float] | None

    @property
    def dashes(self) -> str:
        """The line's dashes, as SVG writes them."""
        return DASHES[self.line.place % len(DASHES)]


@dataclass(frozen=True)
class Chart:
    """Learning curves in pixels."""

    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom of the plot's field
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Drawn, ...]
    reading: dict[str, float | str | bool] | None


def shape(place: int) -> str:
    """The marker of the arm at this place, as an SVG path around 0."""
    return _SHAPES[place % len(_SHAPES)]


def scale(lines: Sequence[Line], also: Iterable[float] = ()) -> tuple[float, float]:
    """The values that the field shows: all of strong lines, and of others what is not far away.

    An untrained model is often so much worse that it would squash all that is learned; it is then shown at the edge.
    """
    strong = [line for line in lines if line.strong and any(mark.size for mark in line.marks)] or lines
    values = [mark.value for line in strong for mark in line.marks] + list(also)
    low, high = min(values), max(values)
    spread = [mark.high - mark.low for line in strong for mark in line.marks if mark.low is not None and mark.high is not None]
    span = max(high - low, min(spread, default=0.0), 1e-3 * max(abs(low), abs(high)), 1e-6)
    near = [m.value for line in lines for m in line.marks if low - 1.2 * span <= m.value <= high + 1.2 * span]
    low, high = min(low, *near), max(high, *near)
    reach = 0.6 * span
    ends = [
        e for line in lines for m in line.marks if low <= m.value <= high for e in (m.low, m.high, *m.seeds) if e is not None
    ]
    low, high = max(min([low, *ends]), low - reach), min(max([high, *ends]), high + reach)
    room = 0.04 * (high - low) or 0.5 * span
    return low - room, high + room


@dataclass
class _Field:
    """Where sizes and values lie."""

    width: int
    height: int
    box: tuple[float, float, float, float]
    sizes: list[int]
    values: tuple[float, float]
    step: float = 0.0  # between arms side by side
    zero: float = 0.0  # width of the column of untrained arms

    def x(self, size: float) -> float:
        """Pixels of a number of rows, on a log scale; 0 has a column of its own."""
        left, _, right, _ = self.box
        if size == 0:
            return left + self.zero / 2
        first, last = math.log(self.sizes[0]), math.log(self.sizes[-1])
        inner, outer = left + self.zero + 28, right - 16
        return (inner + outer) / 2 if first == last else inner + (math.log(size) - first) / (last - first) * (outer - inner)

    def y(self, value: float) -> float:
        """Pixels of a value; what is beyond the scale is at its edge."""
        _, top, _, bottom = self.box
        low, high = self.values
        return min(max(bottom - (value - low) / (high - low) * (bottom - top), top), bottom)

    def beyond(self, value: float) -> bool:
        """Whether a value is off the scale."""
        return not self.values[0] <= value <= self.values[1]


def learning(lines: Sequence[Line], reading: Reading | None, *, width: int, height: int, narrow: bool = False) -> Chart:
    """Lay out learning curves. A narrow one has names of strong and of untrained arms only, a legend those of all."""
    letter = 6.4 if narrow else 6.9  # width of a letter of a label, in pixels
    lines = [replace(line, ends_as="") for line in lines] if narrow else lines
    labelled = [line for line in lines if not narrow or line.strong or line.marks[-1].size == 0]
    sizes = sorted({mark.size for line in lines for mark in line.marks if mark.size}) or [1]
    values = scale(lines, () if reading is None else (reading.value,))
    ticks = nice_ticks(*values)
    texts = tick_texts(ticks)
    last = [line for line in labelled if line.marks[-1].size in (0, sizes[-1])]
    gutter = max((letter * len(line.ends_as or line.name) for line in last), default=0) + 26
    left = 14 + letter * max(map(len, texts), default=1)
    box = (left, 14.0, width - min(gutter, 0.36 * width), height - (66.0 if reading else 48.0))
    place = _Field(width, height, box, sizes, values, zero=44.0 if any(m.size == 0 for li in lines for m in li.marks) else 0.0)
    trained = sorted((line for line in lines if line.marks[-1].size), key=lambda line: not line.strong)
    gap = min((place.x(b) - place.x(a) for a, b in pairwise(sizes)), default=120.0)
    place.step = min(5.5, 0.5 * gap / max(1, len(trained)))
    # Side by side, strong arms in the middle: 0, 1, -1, 2, -2 ...
    offsets = {line.name: place.step * ((k + 1) // 2) * (1 if k % 2 else -1) for k, line in enumerate(trained)}
    shown = {line.name: tuple(_shown(place, line, mark, offsets.get(line.name, 0.0)) for mark in line.marks) for line in lines}
    labels = _labels(place, labelled, shown, letter, narrow)
    drawn = tuple(_drawn(place, line, shown[line.name], labels.get(line.name)) for line in lines)
    x_ticks = [(place.x(0), "0")] if place.zero else []
    for size in sizes:
        if not x_ticks or place.x(size) - x_ticks[-1][0] > 5 * (len(f"{size:,}") + len(x_ticks[-1][1])):
            x_ticks.append((place.x(size), f"{size:,}"))
    y_ticks = tuple((place.y(tick), text) for tick, text in zip(ticks, texts, strict=True))
    return Chart(width, height, box, tuple(x_ticks), y_ticks, drawn, _read_off(place, reading, letter) if reading else None)


def _shown(place: _Field, line: Line, mark: Mark, offset: float) -> Shown:
    x, y = place.x(mark.size) + offset, place.y(mark.value)
    path = shape(line.place) if not place.beyond(mark.value) else _UP if mark.value > place.values[1] else _DOWN
    whisker = None
    if mark.low is not None and mark.high is not None and not place.beyond(mark.value):
        whisker = (place.y(mark.low), place.y(mark.high))
    left, top = 100 * x / place.width, 100 * y / place.height
    side = ("start" if left < 34 else "end" if left > 66 else "middle") + (" below" if top < 30 else "")
    seeds = tuple(place.y(value) for value in mark.seeds if not place.beyond(value)) if len(mark.seeds) > 1 else ()
    return Shown(mark.size, x, y, left, top, path, mark.tip, mark.ringed, side, whisker, seeds)


def _drawn(place: _Field, line: Line, marks: tuple[Shown, ...], label: tuple[float, float, str] | None) -> Drawn:
    on = [(mark, shown) for mark, shown in zip(line.marks, marks, strict=True) if not place.beyond(mark.value)]
    xs = [shown.x for _, shown in on]
    ends = [shown.whisker for _, shown in on]
    ys = [shown.y for _, shown in on]
    if [mark.size for mark in line.marks] == [0]:  # an untrained arm stands at every size
        xs, ys, ends = [*xs, place.box[2]][: 2 * len(xs)], ys * 2, ends * 2
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True)) if len(xs) > 1 else ""
    band = ""
    if line.strong and len(xs) > 1 and all(ends):
        spans = [end for end in ends if end is not None]
        low, high = ([f"{x:.1f} {span[k]:.1f}" for x, span in zip(xs, spans, strict=True)] for k in (0, 1))
        band = "M" + "L".join([*low, *reversed(high)]) + "Z"
    last = marks[-1]
    start = place.box[2] if [mark.size for mark in line.marks] == [0] and on else last.x
    far = label is not None and (label[0] - start > 22 or abs(label[1] - last.y) > 5)
    leader = (start + 7, last.y, label[0] - 3, label[1]) if label and far else None
    return Drawn(line, marks, band, path, label, leader)


def _labels(
    place: _Field, lines: Sequence[Line], shown: dict[str, tuple[Shown, ...]], letter: float, narrow: bool
) -> dict[str, tuple[float, float, str]]:
    """A place for each label right of its line's end: as near to it as the labels beside allow, in the order of the ends."""
    columns: dict[tuple[float, float], list[Line]] = {}
    edge = max([place.box[2] + 10, *(13 + m.x for marks in shown.values() for m in marks if m.size == place.sizes[-1])])
    for line in lines:
        last = line.marks[-1]
        x, end = max(other.x for marks in shown.values() for other in marks if other.size == last.size) + 13, place.width - 6.0
        if last.size == place.sizes[-1] or (last.size == 0 and not place.beyond(last.value)):
            x = edge  # the line of an untrained arm goes through
        elif not narrow or not last.size:
            end = place.x(min((size for size in place.sizes if size > last.size > 0), default=place.sizes[-1])) - 8
        columns.setdefault((x, end), []).append(line)
    found: dict[str, tuple[float, float, str]] = {}
    for (x, end), column in columns.items():
        column.sort(key=lambda line: shown[line.name][-1].y)
        wanted = [(shown[line.name][-1].y, 3.0 if line.strong else 1.0) for line in column]
        for line, y in zip(column, _apart(wanted, 15.5, place.box[1], place.box[3] - 6), strict=True):
            most = int((end - x) / letter)
            full = line.ends_as or line.name
            found[line.name] = (x, y, full if len(full) <= most else _cut(line.name, max(most, 6)))
    return found


def _apart(wanted: Sequence[tuple[float, float]], gap: float, least: float, most: float) -> list[float]:
    """Places (in ascending order of what is wanted, each with a weight) at least `gap` apart, nearest to what is wanted."""
    blocks: list[tuple[float, float, int]] = []  # isotonic regression by pooling: mean, weight, number
    for k, (value, weight) in enumerate(wanted):
        mean, total, number = value - k * gap, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, own, count = blocks.pop()
            mean, total, number = (mean * total + before * own) / (total + own), total + own, number + count
        blocks.append((mean, total, number))
    fitted = [mean for mean, _, number in blocks for _ in range(number)]
    top = most - gap * (len(fitted) - 1)
    return [max(min(value, top), min(least, top)) + k * gap for k, value in enumerate(fitted)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _read_off(place: _Field, reading: Reading, letter: float) -> dict[str, float | str | bool]:
    """The horizontal from the reference to where the arm is as good, and the rows below it with their interval."""
    fewest = place.x(reading.smallest if reading.fewest is None else reading.fewest)
    x, half = place.x(reading.rows), letter * len(reading.text) / 2
    return {
        "y": place.y(reading.value), "from": place.x(reading.n), "x": x, "low": fewest,
        "high": place.x(reading.n if reading.most is None else reading.most), "low_open": reading.fewest is None,
        "high_open": reading.most is None, "text": reading.text, 
        "text_x": min(max(x, place.box[0] + half), place.width - half - 4),
    }  # fmt: skip
