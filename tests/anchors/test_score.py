"""Scores of anchors on the frozen model: the loss by its definition, controls, the rule, the
cache."""

from dataclasses import replace
from pathlib import Path

import pytest

from fulcrum.anchors import score as scoring
from fulcrum.anchors.score import Candidate
from fulcrum.core import store
from fulcrum.core.types import Anchor, AnchorScore, AnchorScores, Example, Message
from fulcrum.data import encode
from fulcrum.model import generate
from fulcrum.model.base_model import LoadedModel
from helpers.tiny import WORDS, load_tiny


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


def row(question: str, answer: str, k: int) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"g{k}", f"o:{k}")


TASK = [row(f"colour {word}", ("red", "blue")[k % 2], k) for k, word in enumerate(WORDS)]
NAME, SORT = (
    Anchor("Name the colour of the animal."),
    Anchor("Sort the ticket below now.", "system"),
)
NONE = Candidate(None, "control: none")


def score(
    loaded: LoadedModel,
    *candidates: Candidate,
    counted: list[tuple[int, int]] | None = None,
) -> list[AnchorScore]:
    told = [] if counted is None else counted
    return scoring.score(
        candidates, TASK, loaded, seed=0, count=lambda done, total: told.append((done, total))
    )


def test_the_loss_is_that_of_answers_asked_with_the_anchor(loaded: LoadedModel) -> None:
    found = score(loaded, NONE, Candidate(NAME, "given"), Candidate(SORT, "template"))
    for one, anchor in zip(found, (None, NAME, SORT), strict=True):
        form = encode.make_format(loaded.tokenizer, anchor)
        nats, counts = generate.nats(loaded, [encode.final_answer(row, form) for row in TASK])
        assert one.loss == pytest.approx(nats.sum() / counts.sum())
    none, name, sort = found
    assert (none.text, none.low, none.high) == ("", None, None)
    assert name.low is not None
    assert name.high is not None
    assert name.low < name.loss - none.loss < name.high
    assert (sort.placement, sort.source, sort.text) == ("system", "template", SORT.text)


def test_a_response_prefix_is_no_part_of_the_loss(loaded: LoadedModel) -> None:
    prefix = Anchor("Here it is: ", "response_prefix")
    _, found = score(loaded, NONE, Candidate(prefix, "given"))
    form = encode.make_format(loaded.tokenizer, prefix)
    nats = generate.nats(loaded, [encode.final_answer(one, form) for one in TASK])[0]
    plain = encode.make_format(loaded.tokenizer, None)
    assert found.loss == pytest.approx(
        nats.sum() / sum(encode.answer_length(one, plain) for one in TASK)
    )


def test_a_random_text_has_the_length_asked_for(loaded: LoadedModel) -> None:
    for length in (8, 24):
        texts = [scoring.random_text(loaded, length, seed) for seed in range(5)]
        lengths = [scoring.count_tokens(Anchor(text), loaded) for text in texts]
        assert all(abs(own - length) <= 0.25 * length for own in lengths), lengths
        assert len({*texts}) == 5
        assert texts[0] == scoring.random_text(loaded, length, 0)


def test_controls_are_none_random_tokens_and_another_tasks(loaded: LoadedModel) -> None:
    found = scoring.controls([Candidate(SORT, "given")], loaded, None, 0)
    assert [one.source for one in found] == [
        "control: none",
        "control: random tokens",
        "control: another task's",
    ]
    assert found[0].anchor is None
    assert found[1].anchor is not None
    assert found[1].anchor.placement == "system"
    assert found[2].anchor == Anchor("Name the river that flows through the city below.", "system")
    assert scoring.controls([Candidate(SORT, "given")], loaded, "Translate.", 0)[
        2
    ].anchor == Anchor("Translate.", "system")


def test_what_was_scored_before_is_not_scored_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int]] = []
    first = score(loaded, NONE, Candidate(NAME, "given"), counted=counted)
    assert counted == [(1, 2), (2, 2)]
    monkeypatch.setattr(generate, "nats", lambda *_: pytest.fail("measured again"))
    assert score(loaded, NONE, Candidate(NAME, "given")) == first
    with pytest.raises(BaseException, match="measured again"):
        score(loaded, NONE, Candidate(SORT, "given"))


def test_scores_that_an_older_version_kept_are_read(tmp_path: Path) -> None:
    """Files of runs with more scores than S_loss; those are passed over."""
    old = {
        "text": "a",
        "placement": "user_prefix",
        "source": "given",
        "tokens": 10,
        "loss": 2.0,
        "low": None,
        "high": None,
        "separation": 5.0,
        "percentile": 0.5,
        "separates": True,
        "agreement": 0.1,
        "chosen": False,
    }
    kept = {"task": "t", "scores": [old], "rows": 8, "general": 52, "left_out": {}, "seconds": 1}
    store.write_json(tmp_path / store.ANCHORS, [kept])
    (found,) = store.read_as(tmp_path / store.ANCHORS, tuple[AnchorScores, ...])
    assert found == AnchorScores("t", (SCORE,), 8, {}, 1)


SCORE = AnchorScore("a", "user_prefix", "given", 10, 2.0, None, None)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ([{"loss": 2.0}, {"loss": 1.9}, {"loss": 2.1}], 1),
        ([{"loss": 2.001}, {"loss": 2.003, "tokens": 9}], 1),  # a tie to 0.01 nats
        ([{"loss": 2.0}, {"loss": 2.0}], 0),
        ([{"loss": 2.0}, {"loss": 1.0, "source": "control: random tokens"}], 0),  # never a control
    ],
)
def test_the_rule(changes: list[dict], place: int) -> None:
    assert scoring.choose([replace(SCORE, **change) for change in changes]) == place


def test_the_chosen_is_marked_and_controls_stand_last() -> None:
    given = [
        replace(SCORE, loss=2.0),
        replace(SCORE, loss=1.0, source="control: none", text=""),
        replace(SCORE, loss=1.5),
    ]
    found = scoring.sort_scores(given, 2)
    assert [(one.loss, one.chosen) for one in found] == [(1.5, True), (2.0, False), (1.0, False)]
