"""Plots: what is drawn stands at the right place and is named, and no text in it is markup."""

import math
import re
from itertools import pairwise

import pytest

from fulcrum.report import plots, research_plots
from fulcrum.report.learning_plots import Line, Mark, Reading, learning_curves
from fulcrum.stats.intervals import Interval

EVIL = '<script>alert("1")</script>'


def texts(svg: str) -> list[str]:
    """Return the texts of an SVG in their order."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def circles(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return where the markers of a colour are, in points from the upper left."""
    use = rf'<use [^>]*x="([0-9.]+)" y="([0-9.]+)" style="fill: light-dark\({colour}'
    return [(float(x), float(y)) for x, y in re.findall(use, svg)]


def line(arm: str, values: dict[int, float], *, strong: bool = True, ringed: int = -1) -> Line:
    """Return a line whose marks reach 0.05 to both sides and are titled with arm and size."""
    marks = []
    for size, value in values.items():
        title = f"{arm} {size}"
        marks.append(Mark(size, value, value - 0.05, value + 0.05, (), title, size == ringed))
    return Line(arm, f"label of {arm}", tuple(marks), strong)


def marks_of(svg: str) -> dict[str, tuple[float, float]]:
    """Return where each mark with a title is, in points from the upper left."""
    found = re.findall(
        r"<title>([^<]*)</title>.*?<use [^>]*x=\"([0-9.]+)\" y=\"([0-9.]+)\"", svg, re.DOTALL
    )
    return {title: (float(x), float(y)) for title, x, y in found}


class TestDots:
    def test_a_value_stands_where_an_axis_that_holds_the_reference_has_it(self) -> None:
        colour = plots.COLOURS["tell"]
        rows = [
            plots.Dot("a", Interval(1.0, 0.5, 1.5), (), colour),
            plots.Dot("b", Interval(-0.5, math.nan, math.nan), (), colour),
        ]
        svg = plots.dots([plots.Dots("", "worse →", rows, 0.0)])
        (a, upper), (b, lower) = circles(svg, colour)
        assert upper < lower
        dashed = re.search(r'<path d="M ([0-9.]+) [^"]*"[^>]*stroke-dasharray', svg)
        assert dashed is not None
        zero = float(dashed[1])
        assert b < zero < a
        assert a - zero == pytest.approx(2 * (zero - b), rel=1e-3)
        assert {"a", "b", "worse →"} <= set(texts(svg))

    def test_each_panel_is_a_picture_of_its_own_with_its_title(self) -> None:
        rows = [plots.Dot("tell", Interval(1.0, 0.5, 1.5), (0.9, 1.1), plots.COLOURS["tell"])]
        svg = plots.dots([plots.Dots("NLL", "nats", rows), plots.Dots("match", "share", rows)])
        assert svg.count("<svg ") == svg.count('aria-hidden="true"') == 2
        assert {"NLL", "nats", "match", "share"} <= set(texts(svg))
        assert len(circles(svg, plots.COLOURS["tell"])) == 2 * 3

    def test_a_long_label_is_cut(self) -> None:
        svg = plots.dots([plots.Dots("", "", [plots.Dot("x" * 100, Interval(1, 0, 2))])])
        assert "x" * 39 + "…" in texts(svg)


class TestLearningCurves:
    @pytest.mark.parametrize("narrow", [False, True])
    def test_sizes_lie_on_a_log_scale_and_higher_scores_higher_up(self, narrow: bool) -> None:
        both = [line("tell", {16: 0.5, 32: 0.6, 64: 0.7}), line("sft", {16: 0.4, 64: 0.6})]
        marks = marks_of(learning_curves(both, None, narrow=narrow))
        xs = [marks[f"tell {size}"][0] for size in (16, 32, 64)]
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
        ys = [marks[f"tell {size}"][1] for size in (16, 32, 64)]
        assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])
        assert marks["sft 64"][1] == pytest.approx(marks["tell 32"][1])

    def test_every_arm_is_in_the_legend_and_every_size_below_its_column(self) -> None:
        both = [line("tell", {16: 0.5, 1024: 0.6}), line("base", {0: 0.5}, strong=False)]
        found = texts(learning_curves(both, None))
        assert {
            "0",
            "16",
            "1,024",
            "label of tell",
            "label of base",
            "task rows, log scale",
        } <= set(found)

    def test_sizes_that_would_touch_the_one_before_are_not_written(self) -> None:
        svg = learning_curves(
            [line("tell", {10_000: 0.5, 10_001: 0.55, 10_240_000: 0.6})], None, narrow=True
        )
        assert "10,000" in texts(svg)
        assert "10,001" not in texts(svg)

    def test_arms_of_one_size_stand_side_by_side(self) -> None:
        many = [line(f"arm{place}", {16: 0.5, 64: 0.6}) for place in range(8)]
        xs = sorted(
            x
            for title, (x, _) in marks_of(learning_curves(many, None)).items()
            if title.endswith("64")
        )
        assert len(xs) == 8
        assert all(b - a > 3 for a, b in pairwise(xs))

    def test_an_untrained_arm_far_away_stands_at_the_edge_and_squashes_nothing(self) -> None:
        svg = learning_curves(
            [line("sft", {16: 0.5, 64: 0.6}), line("base", {0: 9.0}, strong=False)], None
        )
        marks = marks_of(svg)
        assert marks["base 0"][1] < marks["sft 64"][1] - 20
        assert marks["sft 16"][1] - marks["sft 64"][1] > 100

    def test_the_reference_is_ringed(self) -> None:
        svg = learning_curves([line("sft", {16: 0.5, 64: 0.6}, ringed=64)], None)
        rings = re.findall(r'<use [^>]*x="([0-9.]+)" y="([0-9.]+)" style="fill-opacity: 0', svg)
        assert [(float(x), float(y)) for x, y in rings] == [marks_of(svg)["sft 64"]]

    def test_the_reading_goes_from_the_reference_down_to_the_rows(self) -> None:
        lines = [line("tell", {16: 0.5, 32: 0.6, 64: 0.7}), line("sft", {16: 0.4, 64: 0.6})]
        svg = learning_curves(lines, Reading(0.6, 64, 32, 16.0, 64.0, 16, "32 of 64 rows"))
        assert "32 of 64 rows" in texts(svg)
        point = r"([0-9.]+) ([0-9.]+) \n"
        way = re.search(rf'd="M {point}L {point}L {point}"[^>]*dasharray: 1.5', svg)
        assert way is not None
        start_x, start_y, at, y, below, bottom = map(float, way.groups())
        marks = marks_of(svg)
        assert (at, y) == pytest.approx(marks["tell 32"], abs=0.01)
        assert start_y == y == pytest.approx(marks["sft 64"][1], abs=0.01)
        assert start_x > at == below
        assert bottom > y

    def test_an_arm_without_intervals_is_drawn(self) -> None:
        mark = Mark(16, 0.5, None, None, (), "alone")
        assert "alone" in marks_of(
            learning_curves([Line("tell", "tell", (mark,), strong=True)], None)
        )


class TestColours:
    def test_an_arm_keeps_its_colour_and_others_share_three(self) -> None:
        colours = plots.arm_colours(["mine", "tell", "yours", "theirs", "ours", "mine"])
        assert colours["tell"] == plots.COLOURS["tell"]
        assert [colours[arm] for arm in ("mine", "yours", "theirs", "ours")] == [
            *plots.OTHERS,
            plots.OTHERS[0],
        ]

    def test_every_colour_has_one_for_dark_pages(self) -> None:
        arms = [*plots.COLOURS, "a", "b", "c"]
        lines = [plots.Curve(arm, [(0, 1.0), (1, 2.0)], 1) for arm in arms]
        svg = plots.curves([plots.Curves("", "", lines)]) + plots.amounts(
            [0, 1, 2], [3, 2, 2.5], [0, 1, 1], 1
        )
        assert not re.search(r"(fill|stroke): #", svg)
        for arm, colour in plots.arm_colours(arms).items():
            assert f"light-dark({colour}, {plots.DARK[colour]})" in svg, arm


class TestText:
    def test_it_is_escaped_and_no_formula(self) -> None:
        odd = f"$x${EVIL}"
        drawn = (
            plots.dots([plots.Dots(odd, odd, [plots.Dot(odd, Interval(1, 0, 2))])]),
            plots.curves([plots.Curves(odd, odd, [plots.Curve(odd, [(0, 1.0)])])]),
            learning_curves([Line(odd, odd, (Mark(16, 0.5, 0.4, 0.6, (), odd),))], None),
            research_plots.spots([research_plots.Spot(1, 1, 1, odd)], odd, odd),
        )
        for svg in drawn:
            assert "<script" not in svg
            assert "$x$&lt;script&gt;" in svg
        assert '<title>$x$&lt;script&gt;alert("1")&lt;/script&gt;</title>' in drawn[2]

    def test_a_label_that_reads_like_a_style_stays_as_it_is(self) -> None:
        odd = 'fill: #222222; style="stroke: #222222"'
        svg = plots.dots([plots.Dots(odd, "", [plots.Dot("a", Interval(1, 0, 2))])])
        assert odd in texts(svg)

    def test_a_label_that_begins_with_an_underscore_is_in_the_legend(self) -> None:
        svg = plots.curves([plots.Curves("", "", [plots.Curve("_mine", [(0, 1.0)])])])
        assert "_mine" in texts(svg)


def test_equal_values_give_equal_bytes() -> None:
    lines = [line("tell", {16: 0.5, 64: 0.7}), line("base", {0: 0.5}, strong=False)]
    assert learning_curves(lines, None) == learning_curves(lines, None)
