import numpy as np
import pytest
import scipy.stats
from scipy.stats import binomtest

from fulcrum.core.errors import DataError
from fulcrum.stats import intervals


def names(n: int, per_group: int = 1) -> list[str]:
    return [f"g{i // per_group}" for i in range(n)]


def mean_interval(values, groups, denominators=None, **options) -> intervals.Interval:
    sizes = np.ones(len(values)) if denominators is None else denominators
    return intervals.bootstrap(np.column_stack([values, sizes]), groups, intervals.ratio, **options)


def test_mean_agrees_with_scipy_when_every_row_is_its_own_group():
    values = np.random.default_rng(0).exponential(size=200)
    ours = mean_interval(values, names(200), draws=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_ratio_is_sum_over_sum_and_weighs_rows_by_their_denominator():
    interval = mean_interval(np.array([2.0, 30.0]), ["a", "b"], denominators=np.array([1.0, 9.0]))
    assert interval == (3.2, 2.0, 30 / 9)  # two groups: the interval is all there is


def test_few_groups_still_cover_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for experiment in range(300):
        group_effect = np.repeat(rng.normal(size=12), 3)
        low, high = mean_interval(
            group_effect + rng.normal(size=36), names(36, 3), draws=400, seed=experiment
        )[1:]
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_clusters_duplicated_rows_add_no_certainty():
    values = np.random.default_rng(1).normal(size=40)
    once = mean_interval(values, names(40))
    twice = mean_interval(np.repeat(values, 2), names(80, 2))
    assert twice == pytest.approx(once)
    as_if_independent = mean_interval(np.repeat(values, 2), names(80))
    assert as_if_independent.high - as_if_independent.low < 0.8 * (once.high - once.low)


def test_row_order_does_not_matter_and_the_seed_alone_decides():
    rng = np.random.default_rng(2)
    values, groups = rng.normal(size=50), np.array(names(50, 5))
    order = rng.permutation(50)
    first = mean_interval(values, list(groups), seed=7)
    assert mean_interval(values[order], list(groups[order]), seed=7) == pytest.approx(first)
    assert mean_interval(values, list(groups), seed=7) == first
    assert mean_interval(values, list(groups), seed=8).low != first.low


def test_chunks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(2).normal(size=30)
    whole = mean_interval(values, names(30))
    monkeypatch.setattr(intervals, "MAX_CELLS", 100)
    assert mean_interval(values, names(30)) == pytest.approx(whole)


def test_one_group_gives_an_estimate_and_no_interval():
    interval = mean_interval(np.array([1.0, 3.0]), ["same", "same"])
    assert interval.estimate == 2.0
    assert np.isnan(interval.low)
    assert np.isnan(interval.high)


def test_paired_difference_finds_a_small_planted_one_under_large_row_effects():
    rng = np.random.default_rng(5)
    hardness = rng.normal(scale=5, size=300)
    a = hardness + 0.3 + rng.normal(scale=0.5, size=300)
    b = hardness + rng.normal(scale=0.5, size=300)
    difference = intervals.paired_over_seeds((a - b)[None, :], names(300))
    assert 0.1 < difference.low < 0.3 < difference.high < 0.5
    unpaired_width = np.diff(mean_interval(a, names(300))[1:])[0]
    assert difference.high - difference.low < unpaired_width / 5


def test_paired_difference_covers_zero_where_there_is_none():
    rng = np.random.default_rng(6)
    nats, tokens = rng.gamma(3, size=(2, 200)), rng.integers(1, 30, size=200).astype(float)
    low, high = intervals.paired_over_seeds(
        nats[:1] - nats[1:], names(200, 2), denominators=tokens
    )[1:]
    assert low < 0 < high


def test_seed_interval_literal_values():
    # mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    assert intervals.seed_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, -0.484138, 4.484138), abs=1e-6
    )
    # mean 0.5, standard error 0.5, t(0.95, 1) = 6.313752
    assert intervals.seed_interval([0.0, 1.0], level=0.9) == pytest.approx(
        (0.5, -2.656876, 3.656876), abs=1e-6
    )
    alone = intervals.seed_interval([4.0])
    assert alone.estimate == 4.0
    assert np.isnan([alone.low, alone.high]).all()
    agreed = intervals.seed_interval([1.0, 1.0, 1.0])  # three equal scores are no certainty
    assert agreed.estimate == 1.0
    assert np.isnan([agreed.low, agreed.high]).all()


def test_over_seeds_with_one_seed_is_the_t_interval_over_groups():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    interval = intervals.paired_over_seeds(values[None, :], names(4))
    low, high = scipy.stats.t.interval(0.95, 3, loc=3.0, scale=scipy.stats.sem(values))
    assert interval == pytest.approx((3.0, low, high))


def test_over_seeds_with_equal_rows_is_the_seed_interval():
    means = np.array([0.1, 0.4, 0.2, 0.5])
    interval = intervals.paired_over_seeds(np.repeat(means[:, None], 10, axis=1), names(10))
    assert interval == pytest.approx(intervals.seed_interval(means))


def test_over_seeds_group_part_is_what_the_group_bootstrap_estimates():
    rng = np.random.default_rng(8)
    nats, tokens = rng.normal(1, 1, size=240), rng.integers(5, 10, size=240).astype(float)
    linear = intervals.paired_over_seeds(nats[None, :], names(240, 3), denominators=tokens)
    drawn = mean_interval(nats, names(240, 3), denominators=tokens, draws=20_000)
    assert linear == pytest.approx(drawn, abs=0.003)


def test_over_seeds_covers_where_seeds_and_groups_both_vary():
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(400):
        seeds, groups = (
            rng.normal(scale=0.3, size=(5, 1)),
            np.repeat(rng.normal(scale=0.5, size=20), 2),
        )
        low, high = intervals.paired_over_seeds(
            seeds + groups + rng.normal(size=(5, 40)), names(40, 2)
        )[1:]
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_one_group_is_nan():
    assert np.isnan(intervals.paired_over_seeds(np.ones((3, 2)), ["a", "a"]).low)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(DataError, match="1 of 3 values are not finite, the first at index 1"):
        intervals.seed_interval([1.0, np.nan, 2.0])
    with pytest.raises(DataError, match="not finite"):
        intervals.paired_over_seeds(np.array([[1.0, np.inf]]), names(2))
    with pytest.raises(DataError, match="no rows"):
        mean_interval(np.empty(0), [])
    with pytest.raises(DataError, match="row 1: a denominator must be above 0, got 0"):
        intervals.paired_over_seeds(np.ones((1, 2)), names(2), denominators=np.array([3.0, 0.0]))
    with pytest.raises(ValueError, match=r"denominators: shape \(3,\) for 2 rows"):
        intervals.paired_over_seeds(np.ones((1, 2)), names(2), denominators=np.ones(3))
    with pytest.raises(ValueError, match="for 2 group names"):
        mean_interval(np.ones(3), names(2))


def test_a_share_that_never_varied_is_not_certain():
    assert intervals.certain_only(0.0, 20) == (
        0.0,
        0.0,
        pytest.approx(1 - 0.025**0.05),
    )  # 0.168, as binomtest gives
    assert intervals.certain_only(1.0, 20) == (1.0, pytest.approx(0.025**0.05), 1.0)
    exact = binomtest(0, 20).proportion_ci(method="exact")
    assert intervals.certain_only(0.0, 20).high == pytest.approx(exact.high)
    reach = pytest.approx(1 - 0.025**0.05)
    low, high = intervals.certain_only(-1.0, 20, lowest=-1.0)[1:]
    assert (low, high + 1) == (-1.0, reach)
    low, high = intervals.certain_only(0.0, 20, lowest=-1.0)[1:]
    assert (-low, high) == (reach, reach)
    with pytest.raises(ValueError, match=r"0 or 1, got 0\.5"):
        intervals.certain_only(0.5, 20)


def test_differences_that_never_varied_have_no_interval():
    found = intervals.paired_over_seeds(np.zeros((1, 5)), list("abcde"))
    assert found.estimate == 0
    assert np.isnan([found.low, found.high]).all()


def test_few_groups_widen_the_percentiles_as_much_as_a_t_interval():
    """Three groups: the tail is Phi(sqrt(3/2) * t(2, 0.025)), so that the interval is all that
    draws ever reached."""
    values = np.array([1.0, 2.0, 6.0])
    interval = mean_interval(values, ["a", "b", "c"], draws=4000)
    assert interval == (3.0, 1.0, 6.0)
    many = np.random.default_rng(4).normal(size=8)
    low, high = mean_interval(many, names(8), draws=20_000)[1:]
    tail = scipy.stats.norm.cdf(np.sqrt(8 / 7) * scipy.stats.t.ppf(0.025, 7))
    draws = np.random.default_rng(9).choice(many, size=(20_000, 8)).mean(axis=1)
    assert low == pytest.approx(np.quantile(draws, tail), abs=0.03)
    assert high == pytest.approx(np.quantile(draws, 1 - tail), abs=0.03)


def test_an_estimate_stands_where_an_interval_does_not():
    one = intervals.bootstrap(np.array([[2.0, 1.0]]), ["a"], intervals.ratio)
    alike = mean_interval(np.full(6, 0.1), names(6))
    few = intervals.paired_over_seeds(np.array([[0.5, 0.7]]), ["a", "a"])
    for interval, estimate in ((one, 2.0), (alike, 0.1), (few, 0.6)):
        assert interval.estimate == pytest.approx(estimate)
        assert isinstance(interval, intervals.Interval)
        assert np.isnan([interval.low, interval.high]).all()


def test_nearly_equal_groups_are_equal_up_to_rounding_of_their_size():
    close = 1e9 + np.array([0.0, 1e-5, 0.0, 1e-5])
    assert np.isnan(mean_interval(close, names(4)).low)
    assert not np.isnan(mean_interval(close - 1e9, names(4)).low)
    assert not np.isnan(mean_interval(np.array([0.0, 3e-12, 0.0, 3e-12]), names(4)).low)


def test_defaults_are_2000_draws_of_seed_0():
    values = np.random.default_rng(5).normal(size=30)
    assert mean_interval(values, names(30)) == mean_interval(values, names(30), draws=2000, seed=0)
    assert mean_interval(values, names(30)) != mean_interval(values, names(30), draws=2001, seed=0)
    assert mean_interval(values, names(30)) != mean_interval(values, names(30), draws=2000, seed=1)


def test_over_two_seeds_and_two_groups_by_hand():
    """Seeds' means 1 and 2, groups' means 1 and 2: each part has variance 1/4 with one degree of
    freedom, together t with 2."""
    interval = intervals.paired_over_seeds(np.array([[0.5, 1.5], [1.5, 2.5]]), ["a", "b"])
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(1 / 2)
    assert interval == pytest.approx((1.5, 1.5 - half, 1.5 + half))


def test_whole_numbers_are_read_as_numbers():
    assert intervals.seed_interval([1, 2, 3]) == intervals.seed_interval([1.0, 2.0, 3.0])
    counted = intervals.paired_over_seeds(
        np.array([[1, 2], [3, 4]]), ["a", "b"], denominators=np.array([1, 3])
    )
    assert counted == intervals.paired_over_seeds(
        np.array([[1.0, 2.0], [3.0, 4.0]]), ["a", "b"], denominators=np.array([1.0, 3.0])
    )
    with pytest.raises(DataError, match="row 1: a denominator must be above 0, got 0"):
        intervals.paired_over_seeds(
            np.ones((1, 3)), names(3), denominators=np.array([0.5, 0.0, 2.0])
        )
    with pytest.raises(DataError, match=r"^no rows: an interval needs at least one value$"):
        intervals.seed_interval([])
    with pytest.raises(DataError, match="1 of 2 values are not finite, the first at index 1, 0"):
        intervals.require_finite(np.array([[1.0], [np.nan]]))


def test_the_tail_is_that_of_the_expanded_percentile_interval():
    """The same draws, and the quantiles that Hesterberg (2015) gives for five groups."""
    values = np.array([0.0, 1.0, 3.0, 7.0, 20.0])
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), size=2000) @ values / 5
    tail = scipy.stats.norm.cdf(np.sqrt(5 / 4) * scipy.stats.t.ppf(0.025, 4))
    low, high = np.quantile(draws, [tail, 1 - tail])
    assert mean_interval(values, names(5))[1:] == pytest.approx((low, high), rel=1e-12)
