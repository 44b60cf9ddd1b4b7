"""Whether the loss before training told the loss after it: correlations, permutations, the
verdict."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from fulcrum.core.errors import StoreError
from fulcrum.report import anchor_validity
from fulcrum.report.anchor_validity import Group, TrainedAnchor


def group(losses: list[float], outcomes: list[float], task: str = "t") -> Group:
    pairs = enumerate(zip(losses, outcomes, strict=True))
    return Group(
        "run", task, 3, tuple(TrainedAnchor(f"a{k}", f"text {k}", 9, x, y) for k, (x, y) in pairs)
    )


def test_one_groups_correlation_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=8).tolist(), rng.normal(size=8).tolist()
    found = anchor_validity.correlation([group(x, y)])
    assert found is not None
    assert found.estimate == pytest.approx(spearmanr(x, y).statistic)
    r = found.estimate
    half = 1.959964 * np.sqrt((1 + r * r / 2) / 5)  # Bonett and Wright's variance of Fisher's z
    assert np.arctanh([found.low, found.high]) == pytest.approx(
        [np.arctanh(r) - half, np.arctanh(r) + half], abs=1e-5
    )


def test_groups_are_ranked_apart() -> None:
    """Tasks differ in their losses; that must not look like a correlation."""
    apart = [
        group([1, 2, 3, 4], [1.2, 1.1, 1.4, 1.3]),
        group([11, 12, 13, 14], [9.2, 9.1, 9.4, 9.3]),
    ]
    found = anchor_validity.correlation(apart)
    assert found is not None
    assert found.estimate == pytest.approx(0.6)


def test_permutations_are_exact_where_they_are_few() -> None:
    p = anchor_validity.permutation_p([group([1, 2, 3, 4], [1, 2, 3, 4])])
    assert p == pytest.approx(2 / 24)  # this order and its reverse
    both = [group([1, 2, 3, 4], [1, 2, 3, 4]), group([5, 6, 7, 8], [5, 6, 7, 8])]
    assert anchor_validity.permutation_p(both) == pytest.approx(2 / 24**2)
    x, y = [3.0, 1.0, 4.0, 2.0, 5.0], [1.0, 2.0, 5.0, 3.0, 4.0]
    observed = abs(spearmanr(x, y).statistic)
    expected = np.mean(
        [abs(spearmanr(x, z).statistic) >= observed - 1e-9 for z in itertools.permutations(y)]
    )
    assert anchor_validity.permutation_p([group(x, y)]) == pytest.approx(expected)


def test_many_permutations_are_drawn() -> None:
    rng = np.random.default_rng(1)
    chance = group(rng.normal(size=12).tolist(), rng.normal(size=12).tolist())
    p = anchor_validity.permutation_p([chance])
    assert p is not None
    assert p == anchor_validity.permutation_p([chance])  # equal seeds, equal draws
    x, y = anchor_validity.losses_and_outcomes(chance)
    assert p == pytest.approx(spearmanr(x, y).pvalue, abs=0.05)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], "Selection supported"),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], "Selection refuted"),
        ([5, 1, 8, 3, 9, 2, 7, 4, 6], "Selection unproven"),
    ],
)
def test_the_verdict_says_what_the_interval_allows(outcomes: list[float], said: str) -> None:
    assert anchor_validity.verdict([group(list(range(9)), outcomes)]).startswith(said)


def test_too_few_anchors_prove_nothing() -> None:
    text = anchor_validity.verdict([group([1, 2, 3], [1, 2, 3])])
    assert (
        text == "Selection unproven: 3 trained anchors, and 4 of one task are needed to rank them."
    )
    assert anchor_validity.correlation([group([1, 1, 1, 1], [1, 2, 3, 4])]) is None


def results(arms: list[dict], losses: dict[str, list[float]]) -> dict:
    cells = [
        {
            "arm": name,
            "size": 8,
            "seed": seed,
            "training": {"steps": 1},
            "scores": {"t": [{"metric": "nll", "value": value}]},
        }
        for name, values in losses.items()
        for seed, value in enumerate(values)
    ]
    task = {"name": "t", "anchor": {"text": "Name it.", "placement": "user_prefix"}}
    return {
        "settings": {"tasks": [task], "compare": {"arms": ["base", "tell", *arms]}},
        "arms": cells,
        "size": 8,
    }


def scores(*texts: str) -> list[dict]:
    one = {"placement": "user_prefix", "source": "given", "tokens": 3}
    return [
        {"task": "t", "scores": [{**one, "text": text, "loss": k} for k, text in enumerate(texts)]}
    ]


def test_arms_that_differ_in_more_than_their_anchor_are_not_compared(tmp_path: Path) -> None:
    own = {"anchored": True, "general": "pool"}
    arms = [
        {**own, "name": "one", "anchor": {"text": "One.", "placement": "user_prefix"}},
        {
            **own,
            "name": "few",
            "anchor": {"text": "One.", "placement": "user_prefix"},
            "general_rows": 5,
        },
        {**own, "name": "unscored", "anchor": {"text": "Two.", "placement": "user_prefix"}},
    ]
    losses = {"tell": [1.0, 2.0], "one": [3.0, 5.0], "few": [0.0, 0.0], "unscored": [7.0, 7.0]}
    (found,) = anchor_validity.find_groups(results(arms, losses), scores("Name it.", "One."), "run")
    assert [(one.arm, one.text, one.loss, one.outcome) for one in found.anchors] == [
        ("tell", "Name it.", 0, 1.5),
        ("one", "One.", 1, 4.0),
    ]
    assert found.seeds == 2
    (tmp_path / "results.json").write_text(json.dumps(results(arms, losses)))
    assert anchor_validity.read_groups(tmp_path) == []  # anchors were not scored
    (tmp_path / "anchors.json").write_text(json.dumps(scores("Name it.", "One.")))
    assert [one.task for one in anchor_validity.read_groups(tmp_path)] == ["t"]
    with pytest.raises(StoreError, match="no finished run"):
        anchor_validity.read_groups(tmp_path / "nowhere")
