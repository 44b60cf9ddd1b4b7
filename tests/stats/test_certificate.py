"""Certificates: outcomes that any trainer made in, one honest sentence out; every number is checked
against the outcomes."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fulcrum.cli import terminal
from fulcrum.core.errors import DataError, StoreError
from fulcrum.report import verify, wording
from fulcrum.stats import certificate, certification, outcomes
from fulcrum.stats.certificate import Answer, Certificate, Inputs, Question
from helpers.certificates import QUESTION, ROWS, SIZES, lines, save
from helpers.commands import done, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate of a gain of one doubling."""
    folder = tmp_path_factory.mktemp("certificate")
    found = outcomes.read(save(folder / "in.jsonl", lines()))
    certification.write(folder, found, QUESTION, Inputs(outcomes_file="ab12"))
    return folder


def test_the_order_of_the_lines_does_not_matter(made: Path, tmp_path: Path) -> None:
    shuffled = list(lines())
    np.random.default_rng(1).shuffle(shuffled)
    found = outcomes.read(save(tmp_path / "in.jsonl", iter(shuffled)))
    certification.write(tmp_path, found, QUESTION, Inputs())
    assert verify.verify(tmp_path / "certificate.json").wrong == []
    known = [Certificate.read(folder / "certificate.json") for folder in (made, tmp_path)]
    assert wording.headline(known[0]) == wording.headline(known[1])


def test_one_size_alone_has_a_difference_and_no_factor(tmp_path: Path) -> None:
    one = outcomes.read(
        save(tmp_path / "in.jsonl", (line for line in lines() if line["size"] == 64))
    )
    found = certification.certify(one, QUESTION)
    assert wording.headline(found).startswith(
        "Better than sft, but we can't say how many rows that is worth"
    )
    assert found.answer.difference.estimate == pytest.approx(1.0, abs=0.1)


def flat(arms: dict[str, float], *, metric: str = "score") -> Iterator[dict[str, object]]:
    for arm, value in arms.items():
        for size in SIZES:
            for row in range(6):
                yield {
                    "arm": arm,
                    "size": size,
                    "seed": 0,
                    "row": f"r{row}",
                    "metric": metric,
                    "outcome": value,
                }


def test_nothing_that_varies_is_not_called_no_gain(tmp_path: Path) -> None:
    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", flat({"sft": 0, "tell": 1}))),
        Question("tell", ("sft",), ("score",)),
    )
    assert wording.headline(found).startswith("Can't tell: nothing varied")
    assert found.answer.p is None


def test_untrained_references_alone_have_no_curve_and_no_factor(tmp_path: Path) -> None:
    """They cost no rows, so nothing can be worth so many of them; the difference is said all the
    same."""

    def against_base() -> Iterator[dict[str, object]]:
        yield from (
            {**line, "arm": "base", "size": 0}
            for line in lines()
            if line["arm"] == "sft" and line["size"] == 16
        )
        yield from (line for line in lines() if line["arm"] == "tell")

    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", against_base())),
        Question("tell", ("base",), ("quality",)),
    )
    (answer,) = found.answers
    assert wording.headline(found).startswith(
        "Better than base, but we can't say how many rows that is worth"
    )
    assert answer.difference.estimate == pytest.approx(
        3.0, abs=0.1
    )  # two doublings more rows, and one ahead
    assert not answer.saving.identifiable
    assert answer.reference.arm == "base"


def test_a_metric_that_is_worse_contradicts_one_that_is_better(tmp_path: Path) -> None:
    def both() -> Iterator[dict[str, object]]:
        yield from lines(1.0)
        yield from ({**line, "metric": "taste"} for line in lines(-9.0) if "row" in line)

    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", both())),
        Question("tell", ("sft",), ("quality", "taste")),
    )
    assert (found.contradiction.code, found.contradiction.metrics) == (
        "verdicts",
        ("quality", "taste"),
    )
    assert wording.headline(found).startswith(
        "Mixed: quality is better, and taste is worse. We therefore state no row saving."
    )
    assert found.answers[1].saving.rows.low == found.answers[1].saving.rows.high == 0


@pytest.mark.parametrize(("ahead", "headline"), [(-1.0, "Worse"), (0.0, "No gain shown")])
def test_references_picked_by_the_scores_they_are_judged_by_are_each_asked_for_a_loss(
    tmp_path: Path, ahead: float, headline: str
) -> None:
    def two() -> Iterator[dict[str, object]]:
        yield from lines(ahead, dev=False)
        yield from (
            {**line, "arm": "sft_anchor"}
            for line in lines(ahead, dev=False)
            if line["arm"] == "sft"
        )

    found = outcomes.read(save(tmp_path / "in.jsonl", two()))
    for arms in (("sft", "sft_anchor"), ("sft",)):
        certified = certification.certify(found, Question("tell", arms, ("quality",)))
        assert wording.headline(certified).startswith(headline)


def test_tokens_that_do_not_rise_with_rows_give_no_factors(tmp_path: Path) -> None:
    odd = ({**line, "tokens": 500} if "tokens" in line else line for line in lines())
    found = certification.certify(outcomes.read(save(tmp_path / "in.jsonl", odd)), QUESTION)
    assert found.answer.saving.tokens is None
    assert found.answer.points[0].tokens is None


def test_more_rows_are_weighed_against_general_data(tmp_path: Path) -> None:
    more = {"sft": (16, 32, 64, 128), "tell": (16, 64)}
    for ahead, choice in ((3.0, "general_data"), (0.1, "labelling")):

        def wide(ahead: float = ahead) -> Iterator[dict[str, object]]:
            rng = np.random.default_rng(0)
            for arm, sizes in more.items():
                for size in sizes:
                    for seed in range(5):
                        for row in range(ROWS):
                            value = np.log2(size) + ahead * (arm == "tell") + rng.normal(0, 0.1)
                            yield {
                                "arm": arm,
                                "size": size,
                                "seed": seed,
                                "row": f"r{row}",
                                "outcome": value,
                            }

        wide_outcomes = outcomes.read(save(tmp_path / "in.jsonl", wide()))
        found = certification.certify(wide_outcomes, Question("tell", ("sft",), ("score",)))
        answer = found.answer.more_rows
        assert answer.choice == choice
        assert answer.labelling.estimate == pytest.approx(np.log2(114 / 64), abs=0.1)
        assert answer.advantage.estimate == pytest.approx(ahead - np.log2(114 / 64), abs=0.1)
        assert answer.references == ("sft",)


def chosen(answer: Answer) -> dict[int, str]:
    return {selection.size: selection.arm for selection in answer.references}


def test_more_rows_are_those_of_the_arms_that_were_measured_with_so_many(tmp_path: Path) -> None:
    """kshot is the best at 16 rows and sft at 64, so that their curve ends there; sft alone goes on
    to 256."""
    sizes = {"sft": (16, 32, 64, 128, 256), "kshot": (16, 64), "tell": (16, 64)}

    def wide() -> Iterator[dict[str, object]]:
        rng = np.random.default_rng(0)
        for arm, own in sizes.items():
            for size, seed, row in itertools.product(own, range(5), range(ROWS)):
                level = {
                    "sft": np.log2(size),
                    "kshot": 4.5 + 0.1 * np.log2(size),
                    "tell": np.log2(size) + 0.5,
                }[arm]
                yield {
                    "arm": arm,
                    "size": size,
                    "seed": seed,
                    "row": f"r{row}",
                    "outcome": level + rng.normal(0, 0.1),
                }

    question = Question("tell", ("kshot", "sft"), ("score",))
    answer = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", wide())), question
    ).answer
    assert chosen(answer) == {16: "kshot", 32: "sft", 64: "sft"}
    more = answer.more_rows
    assert (more.references, more.choice) == (("sft",), "labelling")
    assert more.labelling.estimate == pytest.approx(np.log2(114 / 64), abs=0.1)
    assert more.advantage.estimate == pytest.approx(0.5 - np.log2(114 / 64), abs=0.1)
    assert "50 more labelled rows without it (sft) +0.8" in wording.more_rows(answer)[2]


def test_slope_is_of_all_sizes_and_tokens_are_means_over_seeds(tmp_path: Path) -> None:
    def bent() -> Iterator[dict[str, object]]:
        levels = {16: 0.0, 32: 1.0, 64: 2.0, 128: 6.0}
        for arm, size in [*(("sft", size) for size in levels), ("tell", 16), ("tell", 64)]:
            for seed in (0, 1):
                yield {"arm": arm, "size": size, "seed": seed, "tokens": size * (10 + 4 * seed)}
                for row in "ab":
                    yield {
                        "arm": arm,
                        "size": size,
                        "seed": seed,
                        "row": row,
                        "outcome": levels[size] + seed / 10,
                    }

    found = outcomes.read(save(tmp_path / "in.jsonl", bent()))
    answer = certification.certify(found, Question("tell", ("sft",), ("score",))).answer
    assert answer.slope.estimate == pytest.approx(
        1.9
    )  # of 0, 1, 2, 6; of 0, 1, 2 alone it would be 1
    assert {point.size: point.tokens for point in answer.points} == {
        16: 192,
        32: 384,
        64: 768,
        128: 1536,
    }


def test_groups_and_weights_count(tmp_path: Path) -> None:
    def weighted(group: bool) -> Iterator[dict[str, object]]:
        for arm in ("sft", "tell"):
            for size in (16, 64):
                for row in range(8):
                    likes = (row // 4) * (arm == "tell")
                    line = {
                        "arm": arm,
                        "size": size,
                        "seed": 0,
                        "row": f"r{row}",
                        "outcome": 3.0 * likes,
                        "weight": 1 + row % 2,
                    }
                    yield line | ({"group": f"g{row // 4}"} if group else {})

    spans = []
    for group in (True, False):
        found = certification.certify(
            outcomes.read(save(tmp_path / "in.jsonl", weighted(group))),
            Question("tell", ("sft",), ("score",)),
        )
        difference = found.answer.difference
        assert difference.estimate == pytest.approx(1.0)  # 12 over 12
        spans.append(difference.high - difference.low)
    assert spans[0] > 3 * spans[1]


def test_a_planted_gain_is_said_in_rows(made: Path) -> None:
    known = Certificate.read(made / "certificate.json")
    answer = known.answer
    saving = answer.saving
    assert saving.rows.estimate == pytest.approx(2.0, rel=0.1)
    assert saving.tokens == pytest.approx(saving.rows)
    assert [gain.size for gain in answer.gains] == [16, 32]
    assert answer.gains[0].rows.estimate == pytest.approx(2.0, rel=0.1)
    assert answer.difference.estimate == pytest.approx(1.0, abs=0.1)
    assert (answer.verdict, saving.identifiable, answer.selected_on) == ("gain", True, "dev")
    sufficed = f"{64 / saving.rows.estimate:.0f} of your 64 rows would have sufficed: row saving"
    assert wording.headline(known).startswith(sufficed)
    assert known.sha256 == known.seal


def test_a_certificate_holds_codes_and_numbers_and_no_sentence(made: Path) -> None:
    """Words can be mended without breaking a stored certificate: none holds more than one."""

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from (key, *texts(item))
        elif isinstance(value, list):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    content = json.loads((made / "certificate.json").read_text())
    assert content["format"] == 3
    assert [text for text in texts(content) if " " in text] == []


@pytest.mark.parametrize(
    ("tell", "sft", "beginning", "verdict"),
    [
        (0.0, 1.0, "No gain shown: use sft.", "no_gain"),
        (-1.0, 1.0, "Worse: use sft.", "loss"),
        (1.0, 0.0, "Better than sft, but we can't say how many rows that is worth", "gain"),
        (
            9.0,
            1.0,
            "16 of your 64 rows or fewer would have sufficed: row saving at least 4.0×",
            "gain",
        ),
    ],
)
def test_the_headline_says_what_was_planted(
    tmp_path: Path, tell: float, sft: float, beginning: str, verdict: str
) -> None:
    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", lines(tell, sft))), QUESTION
    )
    assert wording.headline(found).startswith(beginning)
    assert found.answer.verdict == verdict


def test_metrics_where_lower_is_better_keep_their_sign(tmp_path: Path) -> None:
    def turned() -> Iterator[dict[str, object]]:
        for line in lines():
            yield {**line, "outcome": -line["outcome"]} if "outcome" in line else line

    found = outcomes.read(save(tmp_path / "in.jsonl", turned()))
    same = certification.certify(
        found, Question("tell", ("sft",), ("quality",), lower_is_better=("quality",))
    )
    plain = certification.certify(outcomes.read(save(tmp_path / "plain.jsonl", lines())), QUESTION)
    one, other = same.answer, plain.answer
    assert (one.saving, one.gains, one.verdict, one.p) == (
        other.saving,
        other.gains,
        other.verdict,
        other.p,
    )
    for lower, higher in ((one.difference, other.difference), (one.slope, other.slope)):
        assert lower == (-higher.estimate, -higher.high, -higher.low)
    for point, turned_point in zip(one.points, other.points, strict=True):
        assert point.by_seed == tuple(-score for score in turned_point.by_seed)
    assert one.improvement(one.difference) == other.difference
    assert "quality −1." in wording.headline(same)


def test_metrics_that_contradict_each_other_have_no_headline_factor(tmp_path: Path) -> None:
    def both() -> Iterator[dict[str, object]]:
        yield from lines(2.0)
        yield from ({**line, "metric": "taste"} for line in lines(0.2) if "row" in line)

    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", both())),
        Question("tell", ("sft",), ("quality", "taste")),
    )
    assert (found.contradiction.code, found.contradiction.metrics) == (
        "savings",
        ("quality", "taste"),
    )
    assert wording.headline(found).startswith(
        "Mixed: the row savings by quality and by taste contradict each other."
    )


def test_without_dev_scores_the_reference_is_chosen_on_test_and_that_is_said(
    tmp_path: Path,
) -> None:
    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", lines(dev=False))), QUESTION
    )
    assert found.answer.selected_on == "test"
    assert found.answer.saving.tokens is None


def test_attribution_takes_differences_at_all_rows(tmp_path: Path) -> None:
    def exact() -> Iterator[dict[str, object]]:
        for arm, score in (("sft", 1.0), ("sft_anchor", 1.5), ("mix", 2.0), ("tell", 4.0)):
            for size in (32, 64):
                for row in ("a", "b"):
                    yield {
                        "arm": arm,
                        "size": size,
                        "seed": 0,
                        "row": row,
                        "outcome": score + size / 64,
                    }

    found = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", exact())),
        Question("tell", ("sft", "sft_anchor"), ("score",)),
    )
    parts = {part.code: part.difference.estimate for part in found.answer.attribution}
    assert parts == {"mixing": 1.0, "anchor_within_mix": 2.0, "interaction": 1.5}


def test_a_reference_that_knows_larger_sizes_shows_what_rows_were_worth(tmp_path: Path) -> None:
    fewer = (line for line in lines() if line["arm"] == "sft" or line["size"] != 64)
    answer = certification.certify(
        outcomes.read(save(tmp_path / "in.jsonl", fewer)), QUESTION
    ).answer
    assert answer.rows == 32
    assert [gain.size for gain in answer.gains] == [16, 32]
    assert answer.gains[1].rows.estimate == pytest.approx(2.0, rel=0.1)  # 32 rows were worth 64
    assert answer.saving.rows.most == 2.0


def test_rows_whose_worth_is_read_above_them_need_no_smaller_size(tmp_path: Path) -> None:
    """The arm at 16 rows alone, the reference from 16 rows on: no saving can be known, the gain
    can."""
    fewer = (line for line in lines() if line["arm"] == "sft" or line["size"] == 16)
    found = certification.certify(outcomes.read(save(tmp_path / "in.jsonl", fewer)), QUESTION)
    (answer,) = found.answers
    assert (answer.rows, answer.saving.identifiable) == (16, False)
    assert [(gain.size, gain.identifiable) for gain in answer.gains] == [(16, True)]
    assert re.match(
        r"Your 16 rows were worth 3\d without general data: row gain [12]\.\d× \[1\.\d, 2\.\d\]; "
        r"quality \+[01]\.\d{3} ",
        wording.headline(found),
    )
    assert wording.badge(answer) == ("▲", "gain", "Gain")
    saving, gain = map(str, terminal.certificate_tables(answer)[1].columns[2].cells)
    assert saving == "not identifiable"
    assert re.match(r"[12]\.\d× \[1\.", gain)


def test_row_gains_that_lie_apart_contradict_each_other(tmp_path: Path) -> None:
    def both() -> Iterator[dict[str, object]]:
        for metric, ahead in (("quality", 0.5), ("taste", 1.8)):
            for line in lines(ahead):
                if "row" in line and (line["arm"] == "sft" or line["size"] == 16):
                    yield {**line, "metric": metric}

    asked = Question("tell", ("sft",), ("quality", "taste"))
    found = certification.certify(outcomes.read(save(tmp_path / "in.jsonl", both())), asked)
    assert (found.contradiction.code, found.contradiction.metrics) == (
        "gains",
        ("quality", "taste"),
    )
    assert wording.headline(found).startswith(
        "Mixed: the row gains by quality and by taste contradict each other."
    )


def test_verify_is_silent_about_an_untouched_certificate(made: Path) -> None:
    assert verify.verify(made / "certificate.json").wrong == []


def tampered(made: Path, tmp_path: Path) -> Path:
    for name in ("certificate.json", "outcomes.jsonl"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


def test_verify_names_a_changed_outcome(made: Path, tmp_path: Path) -> None:
    folder = tampered(made, tmp_path)
    kept = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    place = next(
        k
        for k, line in enumerate(kept)
        if line["arm"] == "tell" and line["size"] == 64 and line["seed"] == 3
    )
    kept[place]["outcome"] += 0.5
    save(folder / "outcomes.jsonl", iter(kept))
    wrong = verify.verify(folder / "certificate.json").wrong
    assert wrong[0] == "outcomes.jsonl: outcomes of tell at 64 rows, seed 3, quality: changed"
    assert any(
        text.startswith("answers[0].difference.estimate: the certificate says") for text in wrong
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda known: known["answers"][0]["saving"]["rows"].update(estimate=9.9),
            "answers[0].saving.rows.estimate",
        ),
        (lambda known: known["answers"][0].update(verdict="loss"), "answers[0].verdict"),
        (lambda known: known["question"].update(seed=7), "answers[0]"),
    ],
)
def test_verify_names_a_changed_number_even_where_the_seal_was_renewed(
    made: Path, tmp_path: Path, change, expected
) -> None:
    folder = tampered(made, tmp_path)
    file = folder / "certificate.json"
    known = json.loads(file.read_text())
    change(known)
    file.write_text(json.dumps(known))
    assert verify.verify(file).wrong[0] == f"{file}: changed since it was sealed"
    certificate.save(file, certificate.sealed(Certificate.read(file)))
    wrong = verify.verify(file).wrong
    assert any(text.startswith(expected) for text in wrong)
    assert not any("sealed" in text for text in wrong)


def test_verify_refuses_what_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text("{}")
    with pytest.raises(
        StoreError,
        match="not a certificate of format 3 \\(found None\\); certify its outcomes again",
    ):
        verify.verify(tmp_path / "certificate.json")


def test_outcomes_come_back_as_they_were_written(made: Path, tmp_path: Path) -> None:
    found = outcomes.read(made / "outcomes.jsonl")
    outcomes.write(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_bytes() == (made / "outcomes.jsonl").read_bytes()


GOOD = {"arm": "sft", "size": 16, "seed": 0, "row": "a", "outcome": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{**GOOD, "outcom": 1}], r"in.jsonl:1: unknown key 'outcom'; did you mean 'outcome'\?"),
        ([{**GOOD, "size": "16"}], "in.jsonl:1: size must be a whole number, got '16'"),
        ([{**GOOD, "outcome": None}], "in.jsonl:1: outcome must be a finite number, got None"),
        ([{**GOOD, "weight": 0}], "in.jsonl:1: weight must be a number above 0, got 0"),
        ([GOOD, GOOD], "in.jsonl:2: row 'a' of sft at 16 rows, seed 0 is there twice"),
        ([GOOD, {**GOOD, "seed": 1, "group": "x"}], "in.jsonl:2: row 'a' has group and weight"),
        (
            [GOOD, {**GOOD, "row": "b"}, {**GOOD, "arm": "mix"}],
            "mix at 16 rows, seed 0 lacks 1 of 2 rows .*'b'",
        ),
        (
            [GOOD, {**GOOD, "row": "b", "seed": 1}, {**GOOD, "arm": "base", "size": 0}],
            "base at 0 rows, seed 0 lacks 1 of 2",
        ),
        (
            [
                GOOD,
                {**GOOD, "arm": "mix"},
                {**GOOD, "arm": "mix", "row": "b", "seed": 1},
                {**GOOD, "row": "b", "seed": 1},
                {**GOOD, "seed": 1},
            ],
            "mix at 16 rows, seed 1 lacks 1 of 2 rows .*'a'",
        ),
        (
            [
                GOOD,
                {**GOOD, "row": "b"},
                {**GOOD, "arm": "x", "seed": 1},
                {**GOOD, "row": "b", "seed": 1},
                {**GOOD, "seed": 1},
            ],
            "x at 16 rows, seed 1 lacks 1 of 2 rows .*'b'",
        ),
        (
            [{"arm": "sft", "size": 16, "seed": 0}],
            "in.jsonl:1: a line has a row and its outcome, or dev or tokens",
        ),
        (
            [{**GOOD, "dev": 1}, {**GOOD, "row": "b", "dev": 2}],
            "in.jsonl:2: dev of sft at 16 rows, seed 0 is 2, an earlier line said 1",
        ),
        ([[1]], "in.jsonl:1: expected an object"),
        ([], "holds no outcomes"),
        ([{**GOOD, "row": 3}], "in.jsonl:1: row must be a text, got 3"),
        ([{**GOOD, "outcome": 10**400}], "in.jsonl:1: outcome must be a finite number"),
        (
            [{"arm": "sft", "size": 16, "seed": 0, "dev": 1, "outcome": 1}],
            "in.jsonl:1: an outcome without a row",
        ),
    ],
)
def test_outcomes_that_do_not_fit_together_are_refused_with_their_line(
    tmp_path: Path, bad: list[object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        outcomes.read(save(tmp_path / "in.jsonl", bad))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            Question("tel", ("sft",), ("quality",)),
            "no outcomes of the arm 'tel' by quality; did you mean 'tell'",
        ),
        (
            Question("tell", ("sft",), ("qualty",)),
            "no outcomes of the metric 'qualty'; did you mean 'quality'",
        ),
        (Question("tell", ("tell",), ("quality",)), "tell cannot be its own reference"),
    ],
)
def test_questions_that_do_not_fit_are_refused(
    made: Path, question: Question, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        certification.certify(outcomes.read(made / "outcomes.jsonl"), question)


def test_seeds_must_be_the_same_everywhere(tmp_path: Path) -> None:
    kept = (
        line
        for line in lines()
        if not (line["arm"] == "tell" and line["size"] == 32 and line["seed"] == 4)
    )
    with pytest.raises(
        DataError, match="tell at 32 rows has the seeds 0, 1, 2, 3, other cells have 0, 1, 2, 3, 4"
    ):
        certification.certify(outcomes.read(save(tmp_path / "in.jsonl", kept)), QUESTION)


def test_certify_and_verify_from_the_command_line(tmp_path: Path) -> None:
    file = save(tmp_path / "in.jsonl", lines())
    out = tmp_path / "out"
    said = done("certify", file, "--out", out, "--reference", "sft")
    assert "of your 64 rows would have sufficed: row saving" in said
    assert "every number follows from the outcomes next to it" in done(
        "verify", out / "certificate.json"
    )
    assert "exists already and is not overwritten" in refused("certify", file, "--out", out)
    text = (out / "outcomes.jsonl").read_text()
    (out / "outcomes.jsonl").write_text(text.replace('"seed": 2', '"seed": 9'))
    assert "that do not match" in refused("verify", out)
    unknown = save(
        tmp_path / "unknown.jsonl",
        ({**line, "arm": "mine"} for line in lines() if line["arm"] == "sft"),
    )
    assert (
        "none of the arms (mine) is known to use no general data; name it with --reference"
        in refused("certify", unknown)
    )


def test_a_group_that_is_null_is_no_group(tmp_path: Path) -> None:
    nulls = [{**GOOD, "row": name, "group": None} for name in "abc"]
    assert outcomes.read(save(tmp_path / "in.jsonl", iter(nulls))).groups["score"] == (
        "a",
        "b",
        "c",
    )
    (tmp_path / "twice.jsonl").write_text(
        '{"arm": "sft", "arm": "tell", "size": 1, "seed": 0, "row": "a", "outcome": 1}'
    )
    with pytest.raises(
        DataError, match=r"twice\.jsonl:1: broken JSON: an object holds the same key twice"
    ):
        outcomes.read(tmp_path / "twice.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda known: known.pop("outcomes"),
        lambda known: known.update(outcomes=None),
        lambda known: known.update(winner="10x!"),
        lambda known: known["question"].update(draws=0),
        lambda known: known["question"].update(seed=None),
        lambda known: known["question"].update(draws=10**12),
        lambda known: known.update(question=[]),
        lambda known: known["question"].pop("task"),
        lambda known: known.pop("inputs"),
        lambda known: known.pop("answers"),
        lambda known: known.update(answers=[]),
        lambda known: known["answers"][0].pop("points"),
        lambda known: known["answers"][0].update(verdict="won"),
        lambda known: known["answers"][0]["saving"]["rows"].update(low="far"),
        lambda known: known["answers"][0]["difference"].update(low=True),
    ],
)
def test_verify_refuses_odd_certificates_in_one_line(made: Path, tmp_path: Path, change) -> None:
    folder = tampered(made, tmp_path)
    known = json.loads((folder / "certificate.json").read_text())
    change(known)
    (folder / "certificate.json").write_text(json.dumps(known))
    with pytest.raises(StoreError, match=r"certificate\.json"):
        verify.verify(folder / "certificate.json")


def test_directions_of_metrics(tmp_path: Path) -> None:
    named = {"NLL": True, "eval_loss": True, "accuracy": False, "brier": True, "quality": False}
    for metric, lower in named.items():
        file = save(
            tmp_path / "in.jsonl",
            ({**line, "metric": metric} if "row" in line else line for line in lines(-1.0)),
        )
        said = done("certify", file, "--out", tmp_path / metric)
        assert f"({'lower' if lower else 'higher'} is better)" in said
        assert said.startswith(("Worse", "computing intervals\nWorse")) != lower
    assert "(higher is better)" in done(
        "certify",
        file,
        "--out",
        tmp_path / "other",
        "--lower-is-better",
        "else",
        "--metric",
        "quality",
    )
    assert "outcomes.jsonl: exists already and is not overwritten" in refused(
        "certify", _moved(tmp_path), "--out", tmp_path / "new"
    )


def _moved(folder: Path) -> Path:
    (folder / "new").mkdir()
    return save(folder / "new" / "outcomes.jsonl", lines())


def arms_at_16(scores: dict[str, float], seeds: int = 5) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(3)
    for arm, score in scores.items():
        for seed in range(seeds):
            moved = score + rng.normal(0, 0.05)
            for row in range(ROWS):
                outcome = moved + rng.normal(0, 0.1)
                yield {
                    "arm": arm,
                    "size": 16,
                    "seed": seed,
                    "row": f"r{row}",
                    "metric": "score",
                    "outcome": outcome,
                }


@pytest.mark.parametrize(("tell", "verdict"), [(1.5, "loss"), (2.0, "no_gain"), (2.5, "gain")])
def test_a_weak_reference_makes_no_gain(tmp_path: Path, tell: float, verdict: str) -> None:
    """kshot at 1, sft at 2: beside the better one counts, and being worse than it is a loss, though
    it was selected on test."""
    found = outcomes.read(
        save(tmp_path / "in.jsonl", arms_at_16({"kshot": 1.0, "sft": 2.0, "tell": tell}))
    )
    content = certification.certify(found, Question("tell", ("kshot", "sft"), ("score",)))
    (answer,) = content.answers
    assert answer.verdict == verdict
    assert chosen(answer) == {16: "sft"}
    assert answer.difference.estimate == pytest.approx(tell - 2, abs=0.1)
    assert answer.selected_on == "test"
    assert " at 16 rows against sft" in wording.headline(content)
