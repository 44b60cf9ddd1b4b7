"""The amounts of general data of a scaling run, and what is held fixed along each curve: literal values."""

from pathlib import Path
from typing import Any

import pytest

from fulcrum.config.arms import chosen_arms
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.mechanism import scale_arms


def settings(**changes: Any) -> Settings:
    data: dict[str, Any] = {
        "task": {"train": "t.jsonl", "anchor": "Do it.", "metrics": ["exact_match"]},
        "general": "p.jsonl",
        **changes,
    }
    return settings_from_dict(data)


def of(design: str, found: tuple[scale_arms.Level, ...]) -> list[tuple[float, int, str]]:
    return [(level.ratio, level.repeats, level.arm) for level in found if level.design == design]


def test_exposures_are_fixed_and_ratios_are_what_was_asked_for() -> None:
    found = scale_arms.levels(settings(scale={"ratios": [0, 0.5, 2, 16], "repeats": 3}))
    assert of("exposures", found) == [
        (0, 3, "exposures_0"), (0.5, 3, "exposures_0_5"), (2, 3, "exposures_2"), (16, 3, "exposures_16"),
    ]  # fmt: skip


def test_where_steps_are_fixed_whole_repeats_make_the_ratios() -> None:
    found = of("steps", scale_arms.levels(settings(scale={"ratios": [0, 0.5, 1, 2, 4, 8, 16]})))
    assert [(round(ratio, 3), repeats) for ratio, repeats, _ in found] == [
        (0.0, 17), (0.545, 11), (1.125, 8), (1.833, 6), (4.667, 3), (7.5, 2), (16.0, 1),
    ]  # fmt: skip
    assert all(
        repeats * (1 + ratio) == pytest.approx(17) for ratio, repeats, _ in found
    )  # every training is as long


def test_two_amounts_that_come_to_the_same_are_one() -> None:
    found = of(
        "steps", scale_arms.levels(settings(scale={"ratios": [0, 1, 4, 8, 16, 32], "passes": 5}))
    )
    assert [(ratio, repeats) for ratio, repeats, _ in found] == [(0, 5), (1.5, 2), (4, 1)]


def test_a_length_at_which_hardly_anything_differs_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps: only 2 amounts differ at 2 passes"):
        scale_arms.levels(settings(scale={"ratios": [0, 4, 8], "passes": 2}))


def test_permuted_and_true_answers_have_the_training_without_general_rows_in_common() -> None:
    found = scale_arms.levels(
        settings(scale={"ratios": [0, 1, 2], "designs": ["exposures", "permuted"]})
    )
    assert [level.arm for level in found] == [
        "exposures_0", "exposures_1", "exposures_2", "exposures_0", "permuted_1", "permuted_2",
    ]  # fmt: skip
    kinds = {
        arm.name: arm.general
        for arm in chosen_arms(scale_arms.prepared(settings(scale={"designs": ["permuted"]})))
    }
    assert kinds["exposures_0"] == "none"
    assert kinds["permuted_64"] == "permuted"


def test_prepared_settings_name_an_arm_for_each_level_and_the_loss_first() -> None:
    found = scale_arms.prepared(
        settings(scale={"ratios": [0, 1, 4], "repeats": 2, "rows": 8}, seed=3)
    )
    assert [arm.name for arm in chosen_arms(found)] == [
        "exposures_0",
        "exposures_1",
        "exposures_4",
        "steps_0",
        "steps_1",
        "steps_4",
    ]
    assert found.compare.sizes == (8,)
    assert found.seeds == (3, 4, 5, 6, 7)
    assert found.tasks[0].metrics == ("nll", "exact_match")
    assert (found.mix.repeats, found.mix.general_per_task) == (
        1,
        9,
    )  # as long as the longest: 2 showings, 4 to each
    assert {arm.order for arm in chosen_arms(found) if arm.uses_general_data} == {
        "epoch_stratified"
    }  # one order along a curve
    assert scale_arms.prepared(found) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": {"unit": "tokens"}}, "counts general rows by examples"),
        ({"mix": {"select": "similar"}}, "drawn at random, nested"),
        ({"task": {"name": "t", "train": "x", "anchor": "auto"}}, "the anchor of t is auto"),
        ({"scale": {"ratios": [1, 2, 4]}}, "begin with 0"),
        ({"scale": {"ratios": [0, 2, 2]}}, "ascend, got 0, 2, 2"),
        ({"scale": {"designs": ["steps", "steps"]}}, "'steps' is listed twice"),
    ],
)
def test_what_cannot_be_scaled_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scale_arms.prepared(settings(**changes))


def test_quanta_compares_two_arms_at_equal_showings() -> None:
    found = scale_arms.paired(
        settings(quanta={"repeats": 3, "rows": 12, "items": 400}, compare={"seeds": [5, 6]}, seed=2)
    )
    assert (found.compare.arms, found.seeds, found.compare.sizes) == (
        ("sft_anchor", "tell"),
        (2,),
        (12,),
    )
    assert (found.mix.repeats, found.eval.general_rows) == (
        3,
        64,
    )  # 64 is more than an eighth of the items
    assert (
        scale_arms.paired(settings(quanta={"items": 400, "unit": "rows"})).eval.general_rows == 200
    )


@pytest.mark.parametrize("mix", [{"general_per_task": 0}, {"general_per_task": "auto"}])
def test_quanta_needs_a_mixture(mix: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="general_per_task"):
        scale_arms.paired(settings(mix=mix))


def test_quanta_refuses_what_it_would_not_do() -> None:
    with pytest.raises(ConfigError, match="the anchor of t is auto"):
        scale_arms.paired(settings(task={"name": "t", "train": "x", "anchor": "auto"}))
    with pytest.raises(ConfigError, match="select: gradient is of `train` and `compare`"):
        scale_arms.paired(settings(mix={"select": "gradient"}))


def test_an_arm_with_repeats_of_its_own_tries_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not trained"):
        settings(compare={"arms": ["base", {"name": "odd", "trained": False, "repeats": 2}]})
