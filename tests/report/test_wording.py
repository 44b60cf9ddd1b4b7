"""What a certificate's codes and numbers read as: every text of a number, a verdict, a note."""

import math
from dataclasses import replace

import pytest

from fulcrum.report import wording
from fulcrum.stats.certificate import (
    Answer,
    AtEnd,
    Budget,
    Certificate,
    Contradiction,
    Design,
    Diverged,
    MoreRows,
    Question,
    Selection,
    Verdict,
    Worth,
)
from fulcrum.stats.intervals import Interval
from fulcrum.stats.row_savings import Factor

NAN, INF = math.nan, math.inf
UNKNOWN = Interval(NAN, NAN, NAN)


def factor(estimate: float, low: float, high: float) -> Factor:
    return Factor(estimate, low, high, least=1.0, most=4.0)


def answer(
    verdict: Verdict = "gain",
    slope: tuple[float, ...] = (-0.2, -0.3, -0.1),
    difference: tuple[float, ...] = (-0.1, -0.15, -0.05),
    seeds: int = 5,
    identifiable: bool = True,
    metric: str = "nll",
) -> Answer:
    """The answer of a loss at 64 rows."""
    return Answer(
        metric=metric,
        lower_is_better=metric == "nll",
        rows=64,
        seeds=seeds,
        test_groups=60.0,
        points=(),
        references=(Selection(64, "sft", {"sft": 1.0}),),
        selected_on="test",
        difference=Interval(*difference),
        p=0.01,
        slope=Interval(*slope),
        slope_towards_rows=Interval(*slope),
        saving=Worth(64, identifiable, factor(1.6, 1.2, 2.3), None),
        gains=(),
        verdict=verdict,
        more_rows=MoreRows(50, "unmeasured", (), UNKNOWN, UNKNOWN),
        attribution=(),
    )


def certificate(
    first: Answer, contradiction: Contradiction | None = None, design: Design | None = None
) -> Certificate:
    question = Question("tell", ("sft",), ("nll",), ("nll",), design=design)
    return Certificate(question, contradiction, (first,), ())


# ---- numbers


@pytest.mark.parametrize(
    ("found", "texts", "rows", "worth"),
    [
        (
            factor(1.6, 1.2, 2.3),
            ("1.6×", "[1.2, 2.3]"),
            "40 of 64 rows would have sufficed (28 to 53)",
            "102 (77 to 147)",
        ),
        (
            factor(INF, 2.0, INF),
            ("at least 4.0×", "[2.0, at least 4.0]"),
            "16 of 64 rows or fewer would have sufficed (≤16 to 32)",
            "at least 256 (128 to at least 256)",
        ),
        (
            factor(INF, INF, INF),
            ("at least 4.0×", "(as is its whole interval)"),
            "16 of 64 rows or fewer would have sufficed",
            "at least 256",
        ),
        (
            factor(0, 0, 1.2),
            ("below 1.0×", "[below 1.0, 1.2]"),
            "not even all 64 rows suffice (53 to more than 64)",
            "fewer than 64 (fewer than 64 to 77)",
        ),
        (
            factor(2.0, NAN, NAN),
            ("2.0×", "(no interval)"),
            "32 of 64 rows would have sufficed",
            "128",
        ),
    ],
)
def test_factors(found: Factor, texts: tuple[str, str], rows: str, worth: str) -> None:
    assert wording.factor_parts(found) == texts
    assert wording.saved_rows(found, 64) == rows
    short = rows.replace(" would have sufficed", "")
    assert wording.saved_rows(found, 64, short=True) == short
    said = f"64 rows of tell were worth {worth} rows without general data"
    assert wording.gained_rows(found, 64, "tell") == said


def test_a_factor_that_is_not_identifiable_has_no_number() -> None:
    assert wording.factor(Worth(64, False, factor(1.6, 1.2, 2.3), None)) == "not identifiable"
    assert wording.factor(Worth(64, True, factor(1.6, 1.2, 2.3), None)) == "1.6× [1.2, 2.3]"
    assert wording.factor(Worth(64, True, factor(1.6, 1.2, 2.3), None), "tokens") == ""


def test_numbers() -> None:
    assert wording.with_interval(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert wording.with_interval(Interval(0.5, NAN, NAN)) == "0.500 (no interval)"
    assert wording.with_interval(UNKNOWN) == "unknown (no interval)"
    share = wording.with_interval(Interval(0.02, -0.03, 0.07), percents=True)
    assert share == "2% [0%, 7%]"
    assert wording.difference(Interval(0.5, -0.25, 1.0)) == "+0.500 [−0.250, +1.000]"
    assert wording.parts_of(Interval(0.0, NAN, NAN), signed=True) == ("0.000", "(no interval)")
    shares = [wording.percent(share) for share in (0, 0.001, 0.5, 0.999, 1)]
    assert shares == ["0%", "<1%", "50%", ">99%", "100%"]


# ---- verdicts


def test_headlines() -> None:
    moved = "NLL −0.100 [−0.150, −0.050] at 64 rows against sft"
    saved = "40 of your 64 rows would have sufficed: row saving 1.6× [1.2, 2.3]"
    assert wording.headline(certificate(answer())) == f"{saved}; {moved}."
    one_seed = "intervals are given this one seed and say nothing of another training run"
    assert wording.headline(certificate(answer(seeds=1))) == f"{saved}; {moved}; {one_seed}."
    gain = Worth(64, True, factor(2.0, 1.5, INF), None)
    gained = replace(answer(identifiable=False), gains=(gain,))
    assert wording.headline(certificate(gained)) == (
        "Your 64 rows were worth 128 without general data: row gain 2.0× [1.5, at least 4.0]; "
        f"{moved}."
    )
    mixed = Contradiction("verdicts", ("nll", "json_fields"))
    assert wording.headline(certificate(answer(), mixed)) == (
        "Mixed: NLL is better, and json fields is worse. We therefore state no row saving. "
        f"tell: {moved}."
    )
    assert wording.headline(certificate(answer(identifiable=False))) == (
        "Better than sft, but we can't say how many rows that is worth: more rows improve the "
        "reference as a whole (NLL −0.200 [−0.300, −0.100] with each doubling), but not clearly "
        f"towards 64 rows. tell: {moved}."
    )
    none = answer("no_gain", difference=(0.0, -0.1, 0.1))
    assert wording.headline(certificate(none)) == (
        "No gain shown: use sft. tell: NLL 0.000 [−0.100, +0.100] at 64 rows against sft."
    )
    assert wording.headline(certificate(answer("loss"))).startswith("Worse: use sft. tell: ")


@pytest.mark.parametrize(
    ("slope", "why"),
    [
        ((NAN, NAN, NAN), "the reference was measured with one number of rows only"),
        (
            (-0.1, -0.3, 0.1),
            "more rows do not clearly improve the reference (NLL −0.100 [−0.300, +0.100] with "
            "each doubling)",
        ),
        (
            (-0.1, NAN, NAN),
            "nothing is known of other seeds and test groups (NLL −0.100 (no interval) with "
            "each doubling)",
        ),
        (
            (-0.2, -0.3, -0.1),
            "more rows improve the reference as a whole (NLL −0.200 [−0.300, −0.100] with each "
            "doubling), but not clearly towards 64 rows",
        ),
    ],
)
def test_why_no_factor_is_stated(slope: tuple[float, ...], why: str) -> None:
    assert wording.not_identifiable(answer(slope=slope)) == why


# ---- notes


def test_outcomes_that_no_run_made_have_no_notes() -> None:
    assert wording.notes(certificate(answer())) == []


def test_notes_say_what_favours_an_arm_and_what_was_left_out() -> None:
    design = Design(
        folds=3,
        tune="first",
        trials={"base": 1, "sft": 8, "tell": 4},
        trained=("sft", "tell"),
        at_end=(
            AtEnd("sft", 64, "repeats", 8, 1, 8),
            AtEnd("tell", 64, "learning_rate", 1e-4, 1e-4, 1e-3),
        ),
        diverged=(Diverged("sft", 64, 2, "repeats8-learning_rate0.01"),),
        all_rows=64,
        test_rows=22,
        budget=Budget(600.0, ("mix", "seeds after 1")),
    )
    assert wording.notes(certificate(answer(seeds=2), design=design)) == [
        "Settings were chosen by 3-fold cross-validation inside the task rows of the first seed, "
        "for all seeds, so on 2/3 of the rows; test rows were scored once.",
        "The reference is the best arm without general data by its test scores, selected anew in "
        "each draw: that favours it, and intervals allow for it.",
        "Settings tried: base 1, sft 8, tell 4.",
        "More settings were tried for sft than for other trained arms, which favours them.",
        "sft at 64 rows was best with the most epochs tried (8, of 1 to 8); more might be better.",
        "tell at 64 rows was best with the lowest learning rate tried (0.0001, of 0.0001 to "
        "0.001); a lower one might be better.",
        "sft at 64 rows, seed 2: the training on all rows diverged with "
        "repeats8-learning_rate0.01, which was best; the next best setting was used.",
        "64 rows are all that there are: at this size intervals hold given these rows.",
        "2 seeds: fewer than the 5 that make intervals narrow.",
        "To fit 10 minutes: mix, seeds after 1.",
        "No test file: 22 of the rows were test rows, each of them at one seed, where nothing "
        "was trained on it.",
    ]


# ---- a quick look

BETTER, NONE = (-0.1, -0.15, -0.05), (0.0, -0.1, 0.1)
RISES, FLAT, FALLS = (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1), (0.1, 0.01, 0.2)


@pytest.mark.parametrize(
    ("verdict", "slope", "difference", "start"),
    [
        ("gain", RISES, BETTER, "Go. General data changed NLL by −0.100 [−0.150, −0.050] at 64"),
        ("gain", FLAT, BETTER, "Go for the gain, though not for its worth in rows. "),
        ("loss", RISES, (0.1, 0.05, 0.2), "No go. "),
        ("no_gain", RISES, NONE, "Can't tell yet. "),
        ("no_gain", FLAT, NONE, "Can't tell yet, nor whether more rows help. "),
        ("no_gain", FALLS, NONE, "No go: more rows bring nothing here, so that none can be saved."),
        ("unknown", (NAN, NAN, NAN), (0.0, NAN, NAN), "Can't tell. "),
    ],
)
def test_what_a_quick_look_says(
    verdict: Verdict, slope: tuple[float, ...], difference: tuple[float, ...], start: str
) -> None:
    assert wording.quick_answer(answer(verdict, slope, difference, 2)).startswith(start)


def test_a_quick_look_says_how_sure_it_is() -> None:
    """Half width 0.1 with 2 seeds (t 12.706) is 0.1 * sqrt(2 / 5) * 2.776 / 12.706 with 5."""
    text = wording.quick_answer(answer(difference=(-0.1, -0.2, 0.0), seeds=2))
    assert text.endswith("2 seeds leave ±0.100; 5 would leave about ±0.014, at best.")
    assert wording.quick_answer(answer(seeds=1)).endswith("One seed says nothing of other seeds.")


@pytest.mark.parametrize(
    ("difference", "sure"),
    [(NONE, "2 seeds leave ±0.100"), ((0.0, NAN, NAN), "2 seeds give no interval here.")],
)
def test_a_quick_look_at_one_size_gives_no_numbers_that_are_none(
    difference: tuple[float, ...], sure: str
) -> None:
    text = wording.quick_answer(answer("unknown", (NAN, NAN, NAN), difference, 2))
    assert text.startswith("Can't tell. General data changed NLL by 0.000")
    assert "one number of rows alone does not show what more rows bring" in text
    assert sure in text
    assert "nan" not in text
