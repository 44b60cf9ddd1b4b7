"""Scores of anchors on the frozen model: each against what it is by definition, controls, the rule, and the cache."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fulcrum import anchor_scores, encode, generate, probe
from fulcrum.anchor_scores import Candidate
from fulcrum.model import LoadedModel
from fulcrum.records import Anchor, AnchorScore, Example, Message
from tiny import WORDS, load_tiny, tiny_settings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


def row(question: str, answer: str, k: int) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"g{k}", f"o:{k}")


TASK = [row(f"colour {word}", ("red", "blue")[k % 2], k) for k, word in enumerate(WORDS)]
GENERAL = [row(f"say {word} and more", f"{word} more", 100 + k) for k, word in enumerate(WORDS)]
NAME, SORT = Anchor("Name the colour of the animal."), Anchor("Sort the ticket below now.", "system")
NONE = Candidate(None, "control: none")


def scored(loaded: LoadedModel, *candidates: Candidate, counted: list[tuple[int, int]] | None = None) -> list[AnchorScore]:
    told = [] if counted is None else counted
    return anchor_scores.score(
        candidates, TASK, GENERAL, loaded, tiny_settings(), seed=0, count=lambda done, total: told.append((done, total))
    )


def test_the_loss_is_that_of_answers_asked_with_the_anchor(loaded: LoadedModel) -> None:
    found = scored(loaded, NONE, Candidate(NAME, "given"), Candidate(SORT, "template"))
    for score, anchor in zip(found, (None, NAME, SORT), strict=True):
        form = encode.make_format(loaded.tokenizer, anchor)
        nats, counts = generate.nats(loaded, [encode.final_answer(one, form) for one in TASK])
        assert score.loss == pytest.approx(nats.sum() / counts.sum())
    none, name, sort = found
    assert (none.low, none.percentile, none.separates) == (None, None, False)
    assert name.low is not None
    assert name.high is not None
    assert name.low < name.loss - none.loss < name.high
    assert (sort.placement, sort.source, sort.text) == ("system", "template", SORT.text)
    assert name.percentile is not None
    assert (20 * name.percentile) % 1 == pytest.approx(0)


def test_a_response_prefix_is_no_part_of_the_loss(loaded: LoadedModel) -> None:
    prefix = Anchor("Here it is: ", "response_prefix")
    score = scored(loaded, NONE, Candidate(prefix, "given"))[1]
    form = encode.make_format(loaded.tokenizer, prefix)
    nats = generate.nats(loaded, [encode.final_answer(one, form) for one in TASK])[0]
    plain = encode.make_format(loaded.tokenizer, None)
    assert score.loss == pytest.approx(nats.sum() / sum(encode.answer_length(one, plain) for one in TASK))


def test_the_agreement_is_the_cosine_of_mean_gradients(loaded: LoadedModel) -> None:
    from fulcrum import adapter, store

    score = scored(loaded, NONE, Candidate(NAME, "given"))[1]
    adapter.new_adapter(loaded, tiny_settings(), store.seed_for(0, "gradients"))
    means = []
    for rows, anchor in ((TASK, NAME), (GENERAL, None)):
        form = encode.make_format(loaded.tokenizer, anchor)
        means.append(probe.gradients(loaded, [encode.encode(one, form) for one in rows]).mean(axis=0))
    adapter.drop_adapter(loaded)
    expected = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert score.agreement == pytest.approx(expected, abs=1e-4)


def test_states_are_those_of_a_whole_forward_pass(loaded: LoadedModel) -> None:
    import torch

    form = encode.make_format(loaded.tokenizer, NAME)
    prompts = [encode.prompt_ids(one.prompt, form) for one in TASK]
    found = generate.states(loaded, prompts)
    for prompt, states in zip(prompts, found, strict=True):
        with torch.no_grad():
            layers = loaded.body(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        middle, last = layers[len(layers) // 2][0, -1].numpy(), layers[-1][0, -1].numpy()
        assert states == pytest.approx(np.stack([middle, last]), abs=1e-4)


def test_what_lies_apart_separates_and_what_does_not_does_not() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{k // 2}" for k in range(60)]
    near = anchor_scores.projections(rng.normal(size=(60, 40)), rng.normal(size=(80, 40)), groups, 0)
    far = anchor_scores.projections(rng.normal(size=(60, 40)) + 2, rng.normal(size=(80, 40)), groups, 0)
    assert anchor_scores._fisher(*near) < 0.3
    assert anchor_scores._fisher(*far) > 5
    assert anchor_scores._fisher(np.ones(4), np.ones(5)) == 0  # nothing varies
    # One content group cannot be split: nothing is known.
    own, other = anchor_scores.projections(rng.normal(size=(6, 4)) + 9, rng.normal(size=(8, 4)), ["g"] * 6, 0)
    assert not own.any()
    assert not other.any()


def test_random_strings_have_the_length_asked_for(loaded: LoadedModel) -> None:
    for length in (8, 24):
        texts = anchor_scores.random_strings(loaded, length, 5, 0)
        lengths = [anchor_scores.tokens_of(Anchor(text), loaded) for text in texts]
        assert all(abs(own - length) <= 0.25 * length for own in lengths), lengths
        assert texts == anchor_scores.random_strings(loaded, length, 5, 0)
    assert len({*anchor_scores.random_strings(loaded, 12, 20, 1)}) == 20


def test_controls_are_none_random_tokens_and_another_tasks(loaded: LoadedModel) -> None:
    found = anchor_scores.controls([Candidate(SORT, "given")], loaded, None, 0)
    assert [one.source for one in found] == ["control: none", "control: random tokens", "control: another task's"]
    assert found[0].anchor is None
    assert found[1].anchor is not None
    assert found[1].anchor.placement == "system"
    assert found[2].anchor == Anchor("Name the river that flows through the city below.", "system")
    assert anchor_scores.controls([Candidate(SORT, "given")], loaded, "Translate.", 0)[2].anchor == Anchor(
        "Translate.", "system"
    )


def test_what_was_scored_before_is_not_scored_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    first = scored(loaded, NONE, Candidate(NAME, "given"), counted=counted)
    assert counted == [(1, 3), (2, 3), (3, 3)]  # two anchors, and random strings of one length
    for name in ("nats", "states"):
        monkeypatch.setattr(generate, name, lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(probe, "gradients", lambda *_, **__: pytest.fail("measured again"))
    assert scored(loaded, NONE, Candidate(NAME, "given")) == first
    with pytest.raises(BaseException, match="measured again"):
        scored(loaded, NONE, Candidate(SORT, "given"))


SCORE = AnchorScore("a", "user_prefix", "given", 10, 2.0, None, None, 5.0, 0.5, True, 0.1)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ([{"loss": 2.0}, {"loss": 1.9}, {"loss": 2.1}], 1),
        ([{"loss": 2.0}, {"loss": 1.0, "separates": False}, {"loss": 2.1}], 0),  # the floor
        ([{"loss": 2.0, "separates": False}, {"loss": 1.0, "separates": False}], 1),  # nothing is above it
        ([{"loss": 2.001}, {"loss": 2.003, "agreement": 0.2}], 1),  # a tie to 0.01 nats
        ([{"loss": 2.001}, {"loss": 2.003, "tokens": 9}], 1),
        ([{"loss": 2.0}, {"loss": 2.0}], 0),
        ([{"loss": 2.0}, {"loss": 1.0, "source": "control: random tokens"}], 0),  # never a control
        ([{"loss": 2.0, "agreement": None}, {"loss": 2.0, "agreement": None, "tokens": 9}], 1),
    ],
)
def test_the_rule(changes: list[dict], place: int) -> None:
    assert anchor_scores.choose([replace(SCORE, **change) for change in changes]) == place


def test_the_chosen_is_marked_and_controls_stand_last() -> None:
    given = [replace(SCORE, loss=2.0), replace(SCORE, loss=1.0, source="control: none", text=""), replace(SCORE, loss=1.5)]
    found = anchor_scores.chosen_first(given, 2)
    assert [(one.loss, one.chosen) for one in found] == [(1.5, True), (2.0, False), (1.0, False)]
