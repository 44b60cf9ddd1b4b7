"""A comparison without test rows of its own: every seed holds out another fold of the rows (outer
cross-validation)."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fulcrum import api
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Example, Message
from fulcrum.data import task_data
from fulcrum.experiments import finished
from fulcrum.experiments.compare import run_comparison
from fulcrum.report import verify, wording
from fulcrum.stats import certificate, outcomes, row_savings
from fulcrum.stats.certificate import Certificate
from helpers.tiny import comparison_settings, save_task

ROWS = 22
SEEDS = (3, 1, 2, 0, 4)


def rows(groups: str) -> list[Example]:
    return [
        Example((Message("user", g), Message("assistant", "a")), g, f"x:{k}")
        for k, g in enumerate(groups)
    ]


def test_a_large_group_is_a_fold_alone_and_the_others_share_the_rest():
    parts = [task_data.fold(rows("a" * 9 + "bcdefgh"), number, 4)[1] for number in range(4)]
    assert sorted(len(part) for part in parts) == [2, 2, 3, 9]


def test_more_seeds_than_groups_are_refused():
    with pytest.raises(
        DataError,
        match=r"5 rows in 3 group\(s\): without a test file each of 8 seeds .* use at most 3 seeds",
    ):
        task_data.fold(rows("aabbc"), 3, 8)


def test_settings_are_not_chosen_by_other_seeds_test_rows(tmp_path: Path):
    place = save_task(tmp_path, ROWS, 0)
    task = {"train": str(place / "train.jsonl"), "anchor": "Name it.", "metrics": ["nll"]}
    settings = comparison_settings(
        place,
        tmp_path / "run",
        task=task,
        compare={"arms": ["sft", "tell"], "seeds": [0, 1], "tune": "first"},
    )
    with pytest.raises(ConfigError, match="which must not choose settings; use `tune: each`"):
        run_comparison(settings)


@pytest.mark.parametrize("groups", ["abcdefghijk", "aabbbcdeeefgh", "abc"])
def test_folds_hold_out_every_group_once(groups: str):
    held = [task_data.fold(rows(groups), number, 4) for number in range(min(4, len(set(groups))))]
    assert sorted(row.origin for _, part in held for row in part) == sorted(
        row.origin for row in rows(groups)
    )
    for rest, part in held:
        assert not {row.group for row in rest} & {row.group for row in part}
        assert len(rest) + len(part) == len(groups)


def test_one_group_has_no_folds():
    with pytest.raises(DataError, match="two groups are needed"):
        task_data.fold(rows("aaa"), 0, 4)


# Statistics where each seed has rows of its own.


def by_seed(values: np.ndarray) -> np.ndarray:
    """Values (seeds, rows a seed) as outcomes (seeds, all rows), nan where a row was no test
    row."""
    n_seeds, width = values.shape
    found = np.full((n_seeds, n_seeds * width), np.nan)
    for seed in range(n_seeds):
        found[seed, seed * width : (seed + 1) * width] = values[seed]
    return found


def widened(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The paired t interval of K folds with Nadeau and Bengio's factor: variance times 1/K +
    test/train instead of 1/K."""
    folds, plain = len(a), scipy_stats.ttest_rel(a, b).confidence_interval()
    factor = np.sqrt((1 / folds + 1 / (folds - 1)) * folds)
    middle = float(np.mean(a - b))
    return middle + factor * (plain.low - middle), middle + factor * (plain.high - middle)


def test_folds_that_differ_equally_say_nothing_of_others():
    """Two folds of four rows, in each of which one row more is right: no spread, so no interval,
    whatever rounding leaves."""
    sft, tell = (
        by_seed(np.array([[1, 1, 0, 0], [0, 1, 1, 0]])),
        by_seed(np.array([[1, 1, 1, 0], [1, 1, 1, 0]])),
    )
    drawn = row_savings.draw(
        row_savings.measure({("sft", 8): sft, ("tell", 8): tell}, [f"g{k}" for k in range(8)])
    )
    found = row_savings.interval(
        row_savings.contrast((1, drawn.of("tell", 8)), (-1, drawn.of("sft", 8)))
    )
    assert found.estimate == pytest.approx(0.25)
    assert np.isnan([found.low, found.high]).all()


def test_a_difference_over_folds_has_the_widened_paired_t_interval_of_the_folds():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(6, 1)) * 3  # what a fold's rows do to both arms
    sft, tell = (hard + rng.normal(size=(6, 9)) + gain for gain in (0, 0.4))
    names = [f"g{k}" for k in range(54)]
    measured = row_savings.measure({("sft", 8): by_seed(sft), ("tell", 8): by_seed(tell)}, names)
    drawn = row_savings.draw(measured, draws=60_000)
    found = row_savings.interval(
        row_savings.contrast((1, drawn.of("tell", 8)), (-1, drawn.of("sft", 8)))
    )
    expected = widened(tell.mean(axis=1), sft.mean(axis=1))
    assert found.estimate == pytest.approx(tell.mean() - sft.mean())
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)


def test_an_untrained_arm_measured_once_on_all_rows_is_paired_with_each_fold():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 5))
    outcome = {("base", 0): values.reshape(1, -1), ("sft", 8): by_seed(values + 1.0)}
    measured = row_savings.measure(outcome, [f"g{k}" for k in range(20)])
    assert measured.by_seed[1] - measured.by_seed[0] == pytest.approx([1.0] * 4)
    assert measured.by_seed[0] == pytest.approx(values.mean(axis=1))


def test_points_with_other_rows_at_a_seed_are_refused():
    a, b = by_seed(np.zeros((2, 2))), by_seed(np.zeros((2, 2)))[::-1]
    with pytest.raises(DataError, match="sft at 8 and tell at 8 have other test rows at a seed"):
        row_savings.measure({("sft", 8): a, ("tell", 8): b}, list("abcd"))


def test_rows_tested_at_two_of_four_seeds_count_as_they_would_by_independent_folds():
    """Half of the variance that groups bring stands between seeds then, half between groups:
    none is lost or counted twice."""
    rng = np.random.default_rng(2)
    total, expected = [], []
    for _ in range(400):
        level = rng.normal(size=(2, 30))  # two folds, each tested at two seeds, the same at both
        values = np.full((4, 60), np.nan)
        values[:2, :30], values[2:, 30:] = level[0], level[1]
        measured = row_savings.measure({("sft", 8): values}, [f"g{k}" for k in range(60)])
        total.append(measured.by_group[0, 0] + measured.by_seed[0].var(ddof=1) / 4)
        expected.append(1 / 60)  # the variance of the mean of 60 independent rows
    assert np.mean(total) == pytest.approx(np.mean(expected), rel=0.08)


# A whole comparison.


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A run folder and its results; the task has no test file."""
    place = save_task(tmp_path_factory.mktemp("outer"), ROWS, 0)
    task = {
        "train": str(place / "train.jsonl"),
        "anchor": "Name it.",
        "metrics": ["nll", "exact_match"],
        "max_new_tokens": 4,
    }
    compare = {
        "arms": ["base", "sft", "sft_anchor", "tell"],
        "seeds": list(SEEDS),
        "sizes": [6, 12],
        "folds": 2,
        "tune": "each",
        "sft_epochs": [1],
    }
    settings = comparison_settings(place, place / "run", task=task, compare=compare)
    return place / "run", settings, run_comparison(settings)


def test_every_row_is_a_test_row_at_one_seed_and_never_trained_on_there(done):
    folder, _, results = done
    found = outcomes.read(folder / outcomes.FILE)
    assert len(found.rows["nll"]) == ROWS
    for arm, size in found.points("nll"):
        assert found.seeds("nll", arm, size) == sorted(SEEDS)
        tested = ~np.isnan(found.matrix("nll", arm, size))
        assert (tested.sum(axis=0) == 1).all()  # each row once
        assert tested.sum(axis=1).min() >= ROWS // len(SEEDS)
    assert {(arm.arm, arm.size) for arm in results.arms if arm.seed == 4} == {
        ("base", 0),
        *((arm, size) for arm in ("sft", "sft_anchor", "tell") for size in (6, 12)),
    }


def test_the_certificate_says_so_and_holds(done):
    folder, _, results = done
    known = Certificate.read(folder / certificate.FILE)
    said = f"No test file: {ROWS} of the rows were test rows, each of them at one seed"
    assert any(said in note for note in wording.notes(known))
    assert not verify.verify(folder / certificate.FILE).wrong
    difference = next(
        d for d in results.differences if (d.arm, d.reference, d.metric) == ("tell", "sft", "nll")
    )
    scores = {p.arm: np.array(p.by_seed) for p in known.answer.points if p.size == 12}
    # 22 rows, 4.4 at a seed: as the average fold.
    assert (difference.low, difference.high) == pytest.approx(
        widened(scores["tell"], scores["sft"])
    )
    assert (folder / "report.html").stat().st_size > 1000


def test_a_resumed_one_gives_the_same_certificate(done):
    folder, settings, _ = done
    before = (folder / certificate.FILE).read_bytes()
    (folder / "cells" / "tell-12-seed2.json").unlink()
    (folder / "cells" / "base-0-seed1.json").unlink()
    run_comparison(settings, resume=True)
    assert (folder / certificate.FILE).read_bytes() == before


def test_the_kept_adapter_is_checked_against_the_first_seeds_rows(done):
    folder, _, results = done
    scores, _ = api.evaluate(folder, arm="tell", metric_names=["nll"])
    assert finished.evaluate(folder, arm="tell", metric_names=["nll"]).notes == ()
    first = next(
        arm for arm in results.arms if (arm.arm, arm.size, arm.seed) == ("tell", 12, SEEDS[0])
    )
    assert scores[0].value == pytest.approx(first.scores["task"][0].value, rel=1e-4)


def test_all_rows_mean_as_many_at_each_seed(tmp_path: Path):
    """22 rows in five folds of 4 or 5: 17 are left to train on at every seed."""
    place = save_task(tmp_path, ROWS, 0)
    task = {"train": str(place / "train.jsonl"), "anchor": "Name it.", "metrics": ["nll"]}
    compare = {"arms": ["sft", "tell"], "seeds": list(SEEDS), "folds": 2, "sft_epochs": [1]}
    results = run_comparison(
        comparison_settings(place, tmp_path / "run", task=task, compare=compare)
    )
    assert {arm.size for arm in results.arms} == {17}
    assert len(Certificate.read(tmp_path / "run" / certificate.FILE).answer.points) == 2
