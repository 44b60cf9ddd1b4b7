"""The loss at a temperature that is fitted inside the task rows: a gain that it does not show is
one of calibration."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from scipy.special import log_softmax

from fulcrum.config.settings import settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import ArmResult, Hyperparameters, Tokens, Trial
from fulcrum.experiments import cell, certify
from fulcrum.experiments.compare import run_comparison
from fulcrum.model import adapter, generate
from fulcrum.report import verify, wording
from fulcrum.stats import certificate, outcomes
from fulcrum.stats.certificate import AtEnd, Certificate
from helpers.tiny import comparison_settings, load_tiny, save_task


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_nats_at_a_temperature_are_those_of_divided_logits(tmp_path: Path, kind: str):
    loaded = load_tiny(tmp_path, kind)
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(5, 100, n), np.arange(n) >= 4) for n in (9, 14, 7)]
    found, counts = generate.losses_at(loaded, examples, (1.0, 0.5, 3.0))
    for k, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        with torch.no_grad():
            logits = loaded.causal(input_ids=ids[None]).logits[0, 3:-1].float()
        for place, temperature in enumerate((1.0, 0.5, 3.0)):
            expected = functional.cross_entropy(logits / temperature, ids[4:], reduction="sum")
            assert found[k, place] == pytest.approx(float(expected), rel=1e-4)
    assert counts.tolist() == [5, 10, 3]
    assert generate.nats(loaded, examples)[0].tolist() == found[:, 0].tolist()
    adapter.drop_adapter(loaded)


@pytest.mark.parametrize("planted", [0.8, 1.0, 1.7, 2.6])
def test_a_planted_overconfidence_is_found(planted: float):
    """Labels drawn from a softmax whose logits are then multiplied: dividing by the same number
    gives the least loss."""
    rng = np.random.default_rng(1)
    true = rng.normal(size=(20_000, 8)) * 2
    labels = (true + rng.gumbel(size=true.shape)).argmax(axis=1)
    stated = [
        log_softmax(true * planted / t, axis=1)[np.arange(len(labels)), labels]
        for t in cell.TEMPERATURES
    ]
    assert cell.best_temperature(-np.mean(stated, axis=1)) == pytest.approx(planted, rel=0.05)


def test_the_best_temperature_lies_between_tried_ones_or_at_an_end():
    logs = np.log2(cell.TEMPERATURES)
    assert cell.best_temperature((logs - 0.9) ** 2) == pytest.approx(
        2**0.9
    )  # a parabola in the logarithm
    assert cell.best_temperature(logs) == 0.5
    assert cell.best_temperature(-logs) == 4.0
    assert cell.best_temperature(np.where(logs > 0, np.nan, 1.0)) == 1.0


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """SFT that overfits 9 rows, TELL, and SFT with as many passes as TELL chose."""
    place = save_task(tmp_path_factory.mktemp("tempered"), 9, 8)
    compare = {
        "arms": ["base", "sft", "sft_matched", "tell"],
        "seeds": [0, 1],
        "folds": 3,
        "sft_epochs": [6],
    }
    settings = comparison_settings(
        place, place / "run", compare=compare, mix={"general_per_task": 2, "repeats": "auto"}
    )
    return place / "run", settings, run_comparison(settings)


@pytest.mark.e2e
def test_the_temperature_is_fitted_in_trials_and_used_on_test(done):
    folder, _, results = done
    found = outcomes.read(folder / outcomes.FILE)
    assert all(0.5 <= tried.temperature <= 4 for arm in results.arms for tried in arm.tried)
    for arm in results.arms:
        fitted = arm.tried[arm.chosen].temperature
        raw, tempered = (
            found.values[metric][arm.arm, arm.size, arm.seed] for metric in ("nll", "nll_tempered")
        )
        assert (raw == tempered).all() == (fitted == 1.0)
    cells = [json.loads(file.read_text()) for file in (folder / "cells").glob("sft-*repeats6.json")]
    assert (
        max(one["temperature"] for one in cells) > 1
    )  # six epochs of nine rows: too sure of itself
    known = Certificate.read(folder / certificate.FILE)
    drift = next(effect for effect in known.side_effects if effect.metric == "drift")
    assert {arm.arm for arm in drift.arms} == {"sft", "sft_matched", "tell"}
    assert all(arm.score.estimate > 0 for arm in drift.arms)
    assert [answer.metric for answer in known.answers] == ["nll", "nll_tempered"]
    assert known.question.lower_is_better == ("nll", "nll_tempered")
    assert not verify.verify(folder / certificate.FILE).wrong
    assert "NLL at its best temperature" in (folder / "report.html").read_text()


# SFT at TELL's exposures.


@pytest.mark.e2e
def test_the_matched_arm_takes_what_tell_chose_and_tries_nothing(done):
    folder, _, results = done
    by_arm = {(arm.arm, arm.seed): arm for arm in results.arms}
    for seed in (0, 1):
        assert by_arm["sft_matched", seed].setting == by_arm["tell", seed].setting
        assert (
            by_arm["sft_matched", seed].training.share.task_examples
            == by_arm["tell", seed].training.share.task_examples
        )
        assert by_arm["sft_matched", seed].training.share.general_examples == 0
        assert by_arm["sft_matched", seed].tried[0].train_tokens == 0
    assert not list((folder / "cells").glob("sft_matched-*repeats*"))
    known = Certificate.read(folder / certificate.FILE)
    assert known.question.references == ("base", "sft")
    part = next(part for part in known.answer.attribution if part.code == "equal_exposures")
    points = {point.arm: np.mean(point.by_seed) for point in known.answer.points}
    assert part.difference.estimate == pytest.approx(points["tell"] - points["sft_matched"])
    notes = wording.notes(known)
    assert "Settings tried: base 1, sft 1, tell 4." in notes
    assert notes[0] == (
        "Settings were chosen by 3-fold cross-validation inside the task rows of each seed, so "
        "on 2/3 of the rows; test rows "
        "were scored once."
    )


def chosen(
    arm: str,
    size: int,
    repeats: int,
    rate: float | None = None,
    *,
    of: Sequence[tuple[int, float | None]],
) -> ArmResult:
    tried = tuple(Trial(Hyperparameters(passes, own), 0.0, 0, 0.0) for passes, own in of)
    return ArmResult(
        arm,
        size,
        0,
        tried,
        [one.setting for one in tried].index(Hyperparameters(repeats, rate)),
        None,
        {},
        {},
        {},
        {},
        0.0,
    )


def test_settings_chosen_at_an_end_of_those_tried_are_said():
    passes = [(n, None) for n in (2, 4, 8)]
    rates = [(1, rate) for rate in (1e-4, 5e-4, 1e-3)]
    found = certify.at_an_end(
        [
            chosen("sft", 32, 2, of=passes),
            chosen("sft", 32, 2, of=passes),  # another seed
            chosen("sft", 64, 4, of=passes),
            chosen("tell", 32, 8, of=passes),
            chosen("mix", 32, 1, of=[(1, None), (2, None)]),
            chosen("sft", 128, 1, 1e-3, of=rates),
            chosen("base", 0, 1, of=[(1, None)]),
        ]
    )
    assert found == (
        AtEnd("sft", 32, "repeats", 2, 2, 8),
        AtEnd("tell", 32, "repeats", 8, 2, 8),
        AtEnd("sft", 128, "learning_rate", 1e-3, 1e-4, 1e-3),
    )


@pytest.mark.parametrize(
    ("arms", "more", "message"),
    [
        (
            ["sft", "sft_matched"],
            {},
            "sft_matched takes the hyperparameters of 'tell', which is not among the arms",
        ),
        (
            ["tell", {"name": "mine", "hyperparameters_of": "base"}, "base"],
            {},
            "mine takes the hyperparameters of 'base', which chooses none",
        ),
        (
            ["tell", "sft_matched", {"name": "mine", "hyperparameters_of": "sft_matched"}],
            {},
            "'sft_matched', which chooses none itself",
        ),
        (
            ["tell", "sft_matched"],
            {"sizes": [4], "sizes_of": {"sft_matched": [4, 8]}},
            r"not run at its sizes \(8 rows\)",
        ),
    ],
)
def test_settings_of_an_arm_that_has_none_are_refused(
    tmp_path: Path, arms: list, more: dict, message: str
):
    place = save_task(tmp_path, 9, 4)
    settings = comparison_settings(
        place, tmp_path / "run", compare={"arms": arms, "seeds": [0], **more}
    )
    with pytest.raises(ConfigError, match=message):
        run_comparison(settings)


@pytest.mark.parametrize(
    "more", [{"kl": True}, {"members": 2}, {"general": "pool"}, {"train": {"batch_size": 1}}]
)
def test_settings_of_another_arm_stand_alone(more: dict):
    with pytest.raises(ConfigError, match="takes another arm's hyperparameters"):
        settings_from_dict(
            {
                "task": {"train": "x"},
                "compare": {"arms": ["tell", {"name": "a", "hyperparameters_of": "tell", **more}]},
            }
        )


def test_an_untrained_arm_takes_no_settings():
    with pytest.raises(ConfigError, match="is not trained"):
        settings_from_dict(
            {
                "task": {"train": "x"},
                "compare": {
                    "arms": [{"name": "a", "trained": False, "hyperparameters_of": "tell"}]
                },
            }
        )
