import re
from math import log

import numpy as np
import pytest
from scipy.stats import f as f_law
from scipy.stats import false_discovery_control

import simulate_scaling
from fulcrum.core.errors import DataError
from fulcrum.mechanism.curve_fits import FORMS, aicc, best_fit, fit_forms, octaves
from fulcrum.mechanism.jumps import (
    JumpTest,
    detectable,
    find_jumps,
    jump_test,
    power,
    verdict,
)
from fulcrum.mechanism.row_jumps import row_jumps

SEVEN = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NINE = (*SEVEN, 32.0, 64.0)
U = np.array(NINE) + 1
X = np.log2(U)


def chains(curve, noise: float, seeds: int = 5, number: int = 0) -> np.ndarray:
    """Scores (seeds, levels) around a curve; a seed moves its whole chain besides."""
    rng = np.random.default_rng(number)
    return curve + rng.normal(0, 1, (seeds, 1)) + noise * rng.standard_normal((seeds, len(curve)))


def step(after: float, size: float = 1.0, levels: tuple[float, ...] = NINE) -> np.ndarray:
    return np.where(np.array(levels) > after, size, 0.0)


def judged(
    scores, levels: tuple[float, ...] = NINE, *, higher: bool = True, draws: int = 199
) -> JumpTest:
    return jump_test(levels, scores, higher_is_better=higher, draws=draws)


# Fits


def test_an_octave_is_a_doubling_of_ratio_plus_one():
    assert octaves([0, 1, 3, 7]) == pytest.approx([0, 1, 2, 3])


def test_aicc_by_hand():
    # 8 levels, rss 2, 4 parameters: 8 ln(2/8) + 8 + 2*4*5/3
    assert float(aicc(2.0, 8, 4)) == pytest.approx(8 * log(0.25) + 8 + 40 / 3)
    assert float(aicc(2.0, 6, 4)) == pytest.approx(6 * log(1 / 3) + 8 + 40)
    assert float(aicc(2.0, 5, 4)) == np.inf


def test_parameters_count_the_variance():
    assert FORMS == {"constant": 2, "power": 4, "sigmoid": 5, "break": 7}


@pytest.mark.parametrize(("beta", "a"), [(0.3, 2.0), (0.8, 0.7), (2.5, -1.5)])
def test_a_power_law_is_recovered_from_exact_values(beta, a):
    found = fit_forms(NINE, 0.25 + a * U**-beta)
    assert found["power"].parameters == pytest.approx({"c": 0.25, "a": a, "beta": beta}, rel=1e-4)
    assert found["power"].rss < 1e-12
    assert best_fit(found).form == "power"


def test_a_sigmoid_is_recovered_from_exact_values():
    found = fit_forms(NINE, 2 + 3 / (1 + np.exp(-(X - 2.3) / 0.6)))
    assert found["sigmoid"].parameters == pytest.approx(
        {"c": 2, "a": 3, "location": 2.3, "width": 0.6}, rel=1e-5
    )
    assert found["sigmoid"].curve == pytest.approx(2 + 3 / (1 + np.exp(-(X - 2.3) / 0.6)))
    assert best_fit(found).form == "sigmoid"


def test_one_break_is_recovered_from_exact_values():
    found = fit_forms(NINE, 1 + 2 * U**-0.1 * (1 + (U / 8) ** (1 / 0.2)) ** (-1.0 * 0.2))["break"]
    assert found.parameters == pytest.approx(
        {"c": 1, "a": 2, "b0": 0.1, "b1": 1, "d": 8, "f": 0.2}, rel=1e-3
    )


def test_a_constant_is_the_mean_and_best_where_nothing_moves():
    found = fit_forms(NINE, np.full(9, 0.1))
    assert found["constant"].parameters == pytest.approx({"c": 0.1})
    assert best_fit(found).form == "constant"
    values = np.arange(9.0)
    assert fit_forms(NINE, values)["constant"].rss == pytest.approx(60)
    assert fit_forms(NINE, values)["constant"].aicc == pytest.approx(float(aicc(60, 9, 2)))


@pytest.mark.parametrize(
    ("n", "refused"),
    [
        (
            3,
            {
                "constant": "needs 4 levels, has 3",
                "power": "needs 6",
                "sigmoid": "needs 7",
                "break": "needs 9",
            },
        ),
        (6, {"sigmoid": "needs 7 levels, has 6", "break": "needs 9"}),
        (7, {"break": "needs 9 levels, has 7"}),
        (9, {}),
    ],
)
def test_a_form_with_too_few_levels_says_so(n, refused):
    found = fit_forms(NINE[:n], np.sin(np.arange(n)))
    assert {name for name, fit in found.items() if fit.refused} == set(refused)
    for name, words in refused.items():
        assert found[name].refused.startswith(words)
        assert not found[name].parameters
        assert found[name].aicc == np.inf
    assert (best_fit(found) is None) == (n == 3)


def test_the_reported_fit_is_a_minimum():
    values = np.random.default_rng(0).normal(size=9)
    for fit in fit_forms(NINE, values).values():
        assert fit.rss == pytest.approx(float(((values - fit.curve) ** 2).sum()))
        assert fit.rss <= fit_forms(NINE, values)["constant"].rss + 1e-12
    sigmoid = fit_forms(NINE, values)["sigmoid"]
    place, width = sigmoid.parameters["location"], sigmoid.parameters["width"]
    for moved in (
        (place + 0.05, width),
        (place - 0.05, width),
        (place, width * 1.1),
        (place, width / 1.1),
    ):
        basis = np.column_stack([np.ones(9), 1 / (1 + np.exp(-(X - moved[0]) / moved[1]))])
        rest = values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
        assert float(rest @ rest) >= sigmoid.rss - 1e-9


# Jumps


@pytest.mark.parametrize(("after", "between"), [(1.0, (1, 2)), (2.0, (2, 4)), (8.0, (8, 16))])
def test_a_planted_jump_is_found_at_its_place(after, between):
    found = judged(chains(step(after), 0.05))
    assert found.failed == ()
    assert found.jump
    assert found.between == between
    assert between[0] < found.location < between[1]
    assert found.size == pytest.approx(1, abs=0.1)
    assert found.improves
    assert found.replicated
    assert found.p == 1 / 200
    assert found.noise == pytest.approx(0.05, abs=0.02)
    word, sentence = verdict(found)
    assert word == "jump"
    assert sentence.startswith("An improvement by a jump: +")
    assert f"between the measured {between[0]} and {between[1]}" in sentence
    assert f"ΔAICc {found.statistic:.1f}, p 0.005" in sentence


def test_seven_levels_find_a_jump_only_under_little_noise():
    assert judged(chains(step(2, levels=SEVEN), 0.005), SEVEN).jump
    missed = judged(chains(step(2, levels=SEVEN), 0.05), SEVEN)
    assert missed.failed == ("AICc",)
    assert missed.p == 1 / 200
    word, sentence = verdict(missed)
    assert word == "not enough data"
    assert f"ΔAICc {missed.statistic:.1f}, needs 6 over the power law" in sentence


def test_direction_a_worsening_jump_is_named_so():
    scores = chains(step(2), 0.05)
    worse = judged(scores, higher=False)
    assert worse.failed == ("direction",)
    assert not worse.jump
    assert worse.abrupt
    assert worse.size == pytest.approx(1, abs=0.1)
    assert verdict(worse)[0] == "jump"
    assert verdict(worse)[1].startswith("A worsening jump: +")
    assert judged(-scores, higher=False).jump


@pytest.mark.parametrize(("scale", "offset"), [(1000.0, 3.0), (1e-3, -50.0), (-2.0, 7.0)])
def test_an_affine_change_of_the_metric_changes_the_unit_only(scale, offset):
    scores = chains(step(4) + 0.2 * X, 0.1)
    one, other = judged(scores), judged(scale * scores + offset, higher=scale > 0)
    assert other.statistic == pytest.approx(one.statistic, rel=1e-6)
    assert other.p == one.p
    assert (other.failed, other.between, other.rise) == (one.failed, one.between, one.rise)
    assert other.location == one.location
    assert other.halves == one.halves
    assert other.size == pytest.approx(scale * one.size)
    assert (other.noise, other.moves) == pytest.approx(
        (abs(scale) * one.noise, abs(scale) * one.moves)
    )


def test_seeds_that_move_their_whole_chain_are_no_noise():
    scores = chains(step(2), 0.05)
    moved = scores + np.array([[5.0], [-3.0], [0.0], [9.0], [1.0]])
    one, other = judged(scores), judged(moved)
    assert other.noise == pytest.approx(one.noise)
    assert other.statistic == pytest.approx(one.statistic)
    assert other.p == one.p


def test_noise_is_the_two_way_residual():
    scores = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 3.0]])
    # residuals of both seeds: 0.25, 0.25, 0.25, -0.75 with opposite signs; 3 degrees of freedom
    assert jump_test((0, 1, 2, 4), scores, higher_is_better=True).noise == pytest.approx(
        (2 * (3 * 0.0625 + 0.5625) / 3) ** 0.5
    )


@pytest.mark.parametrize("name", sorted(simulate_scaling.SMOOTH))
def test_smooth_curves_make_no_jump(name):
    curve = simulate_scaling.SMOOTH[name](np.array(NINE))
    found = judged(chains(curve, 0.02))
    assert not found.abrupt
    assert verdict(found)[0] == ("not enough data" if name == "constant" else "smooth")


def test_the_p_value_refuses_what_only_beats_the_power_law():
    """A wide logistic passes AICc, replicates and improves; smooth curves explain it."""
    found = judged(
        chains(simulate_scaling.SMOOTH["logistic, 10-90% in 2.5 octaves"](np.array(NINE)), 0.01)
    )
    assert found.statistic > 10
    assert found.failed == ("p",)
    word, sentence = verdict(found)
    assert word == "smooth"
    assert "needs below 0.01 against smooth curves" in sentence


def test_a_jump_of_one_half_of_the_seeds_does_not_replicate():
    scores = chains(step(2), 0.02, seeds=4)
    scores[1::2] = chains(step(16), 0.02, seeds=2, number=1)
    found = judged(scores)
    assert "replication" in found.failed
    assert found.halves == (pytest.approx(2.9, abs=1), pytest.approx(23, abs=6))
    assert "halves of the seeds do not agree on a place or a direction: ratio" in verdict(found)[1]


def test_halves_that_jump_in_opposite_directions_do_not_replicate():
    scores = chains(step(2), 0.01, seeds=4)
    scores[1::2] = chains(step(2, -0.5), 0.01, seeds=2, number=1)
    found = judged(scores)
    assert abs(np.log2((found.halves[0] + 1) / (found.halves[1] + 1))) < 1
    assert not found.replicated
    assert "replication" in found.failed


def test_a_step_on_a_slope_is_no_claim_but_the_sentence_says_what_is_against_smooth():
    found = judged(chains(step(2, levels=SEVEN) + 0.05 * X[:7], 0.01), SEVEN)
    assert found.failed == ("AICc",)
    word, sentence = verdict(found)
    assert word == "smooth"
    assert sentence.startswith("No jump is claimed (ΔAICc")
    assert (
        "an abrupt curve fits better than any smooth one, by more than noise: more levels decide."
        in sentence
    )


def test_what_all_seeds_share_at_a_level_is_no_evidence_of_a_jump():
    """Seeds that agree to a thousandth do not make a ragged curve abrupt: no form fits it."""
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((100, 1, 9)) + 0.001 * rng.standard_normal((100, 3, 9))
    assert (find_jumps(NINE, scores, every_p=True)[1] < 0.01).mean() <= 0.02


@pytest.mark.parametrize("after", [0.0, 32.0])
def test_one_level_alone_at_an_end_is_no_jump(after):
    assert not judged(chains(step(after), 0.01)).abrupt


def test_a_constant_shows_no_change():
    word, sentence = verdict(judged(chains(np.zeros(9), 0.05)))
    assert word == "not enough data"
    assert sentence.startswith(
        "No change with general data is shown (F test of the levels, p 0.38). "
    )
    assert re.search(
        r"as large as all that the curve moves \(0\.\d+\) would be found in \d+% of such "
        r"experiments only",
        sentence,
    )


def test_scores_that_never_differ_are_no_jump():
    found = judged(np.full((3, 9), 0.25))
    assert (found.p, found.noise, found.moves) == (1, 0, 0)
    assert not found.abrupt
    sentence = verdict(found)[1]
    assert sentence.startswith("No change with general data is shown")
    assert "halves" not in sentence
    assert "A jump of 0" not in sentence


def test_exact_scores_without_noise_are_judged_too():
    assert judged(np.tile(step(2), (3, 1))).jump
    assert not judged(np.tile(U**-0.5, (3, 1)), higher=False).abrupt


def test_still_is_the_f_test_of_a_two_way_layout():
    """Seeds are blocks: what moves all levels of one is no noise."""
    scores = np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.0, 1.0, 2.0]])
    between = 3 * ((scores.mean(axis=0) - scores.mean()) ** 2).sum() / 2
    left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    expected = float(f_law.sf(between / ((left**2).sum() / 4), 2, 4))
    assert judged(scores, (0.0, 1.0, 2.0)).still == pytest.approx(expected)
    assert np.isnan(judged(scores[:1], (0.0, 1.0, 2.0)).still)


@pytest.mark.parametrize("levels", [5, 7, 9])
def test_what_plainly_moves_is_never_said_not_to(levels):
    """AICc admits nothing but a constant at five levels, and none of the forms is a dip."""
    fall, dip = U**-0.5, -np.exp(-((X - 2) ** 2) / 2)
    for curve in (fall, dip):
        found = judged(chains(curve[:levels], 0.01, seeds=3), NINE[:levels], higher=False)
        assert found.still < 1e-6
        assert "No change" not in verdict(found, worth=0.5)[1]
    one = judged(chains(np.zeros(levels), 0.01, seeds=1), NINE[:levels])
    assert "No change" not in verdict(one)[1]  # one seed shows no noise


def test_a_step_that_could_hardly_be_claimed_is_not_called_smooth():
    """Seven levels: a step of 25 standard deviations lacks AICc; that one of half a nat would be
    found is no reason."""
    found = [judged(chains(step(2, 0.15, SEVEN), 0.006, 3, number), SEVEN) for number in range(8)]
    words = {verdict(one, worth=0.5)[0] for one in found if not one.abrupt}
    assert words == {"not enough data"}


@pytest.mark.parametrize("draws", [50, 98])
def test_draws_that_cannot_show_a_p_are_refused_everywhere(draws):
    scores = chains(step(2), 0.1)
    for ask in (
        lambda: judged(scores, draws=draws),
        lambda: find_jumps(NINE, scores[None], draws=draws),
        lambda: power(NINE, 0.1, 5, 1.0, draws=draws),
        lambda: detectable(NINE, 0.1, 5, draws=draws),
    ):
        with pytest.raises(DataError, match=rf"draws: {draws} .* give 199 or more"):
            ask()


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_a_noise_that_is_none_is_refused(noise):
    with pytest.raises(DataError, match=r"noise .*: it must be a number from 0 up"):
        detectable(NINE, noise, 3)


def test_unequal_noise_raises_no_more_alarms():
    """The first two levels are five times as noisy as the others.

    Drawn with one variance the null gave 6 to 11%.
    """
    unequal = simulate_scaling.Noise(0.05, "unequal")
    for name in ("logistic, 10-90% in 2.5 octaves", "power law, beta 1", "1 - exp(-g / 4)"):
        curve = simulate_scaling.SMOOTH[name](np.array(NINE))
        assert simulate_scaling.experiments(NINE, curve, unequal, 3, 200, 0)[0].mean() <= 0.01


def test_a_hard_metric_alone_is_an_artefact():
    smooth = judged(chains(-(U**-0.5), 0.01))
    hard = judged(chains(step(8), 0.02))
    word, sentence = verdict(smooth, {"exact match": hard})
    assert word == "metric artefact"
    assert sentence.startswith("exact match (+")
    assert "jumps, but the continuous metric does not" in sentence
    assert verdict(smooth, [hard])[1].startswith("hard metric 1 (")
    assert verdict(smooth, [smooth])[0] == "smooth"
    assert verdict(hard, [hard])[0] == "jump"


@pytest.mark.parametrize(
    ("levels", "seeds", "failed"),
    [(6, 5, ("levels",)), (9, 1, ("seeds", "replication")), (5, 1, ("levels", "seeds"))],
)
def test_too_few_levels_or_seeds_are_not_enough(levels, seeds, failed):
    found = judged(chains(step(2)[:levels], 0.01, seeds=seeds), NINE[:levels])
    assert found.failed == failed
    word, sentence = verdict(found)
    assert word == "not enough data"
    assert f"{levels} levels of general data and {seeds} seed" in sentence
    assert np.isnan(found.statistic) == (levels < 7)
    assert detectable(NINE[:levels], 0.1, seeds) == np.inf
    assert power(NINE[:levels], 0.1, seeds, 100.0) == 0


def test_power_grows_with_size_and_the_detectable_size_is_where_it_reaches_a_share():
    small, large = power(NINE, 0.1, 5, 0.1), power(NINE, 0.1, 5, 1.0)
    assert small < 0.2
    assert large > 0.95
    least = detectable(NINE, 0.1, 5)
    assert 0.3 < least < 0.8
    assert power(NINE, 0.1, 5, least) >= 0.8
    assert power(NINE, 0.1, 5, 0.8 * least) < 0.8
    assert detectable(NINE, 0.2, 5) == pytest.approx(2 * least)
    assert detectable(SEVEN, 0.1, 5) > 5 * least


def test_many_experiments_at_once_are_the_same_as_one_by_one():
    scores = np.stack(
        [chains(step(2), 0.1, number=number) for number in range(4)] + [chains(X, 0.1)]
    )
    found, p = find_jumps(NINE, scores, every_p=True)
    singly = [judged(one) for one in scores]
    assert found.tolist() == [one.jump for one in singly]
    assert p[0] == singly[0].p
    assert np.isnan(find_jumps(NINE, scores)[1][-1])
    assert not find_jumps(NINE, -scores)[0].any()  # worsening


@pytest.mark.parametrize(
    "name", ["constant", "power law, beta 1", "line in g", "logistic, 10-90% in 2.5 octaves"]
)
def test_false_alarms_stay_within_one_percent(name):
    curve = simulate_scaling.SMOOTH[name](np.array(NINE))
    found, p = simulate_scaling.experiments(
        NINE, curve, simulate_scaling.Noise(0.05), 3, 200, 0, every_p=True
    )
    assert found.mean() <= 0.01
    assert (p < 0.01).mean() <= 0.02


def test_the_same_seed_gives_the_same_answer():
    scores = chains(X / 6, 0.3)
    one, other = judged(scores), judged(scores)
    assert (one.p, one.statistic) == (other.p, other.statistic)
    assert one.p > 1 / 200


# Rows


def test_a_row_that_falls_in_one_step_is_found_among_lines():
    rng = np.random.default_rng(0)
    losses = 3 - 0.3 * X[:, None] + 0.05 * rng.standard_normal((9, 50))
    losses[:, :10] = 3 - step(4)[:, None] + 0.05 * rng.standard_normal((9, 10))
    found = row_jumps(NINE, losses, draws=20_000)
    assert found.jumps.tolist() == [True] * 10 + [False] * 40
    assert found.place[:10].tolist() == [4] * 10
    assert found.size[:10] == pytest.approx(-np.ones(10), abs=0.1)
    assert found.by_place.tolist() == [0, 0, 0, 0, 10, 0, 0, 0]
    assert found.wide == ()
    assert found.unplaced == 0
    assert found.adjusted == pytest.approx(false_discovery_control(found.p))


def test_a_step_needs_half_a_nat_and_to_fall():
    rng = np.random.default_rng(1)
    noise = 0.01 * rng.standard_normal((9, 3))
    losses = np.column_stack([-step(2, 0.45), -step(2, 0.55), step(2, 1.0)]) + noise
    found = row_jumps(NINE, losses, draws=20_000)
    assert (found.adjusted < 0.1).all()
    assert found.jumps.tolist() == [False, True, False]
    assert found.size == pytest.approx([-0.45, -0.55, 1.0], abs=0.02)
    assert row_jumps(NINE, losses, draws=20_000, least=0.4).jumps.tolist() == [True, True, False]


def test_a_fall_between_levels_more_than_an_octave_apart_has_no_place():
    levels = (0, 1, 3, 15, 31, 63, 127)
    losses = -np.where(np.arange(7) >= 3, 1.0, 0.0)[:, None] + 0.01 * np.random.default_rng(
        0
    ).standard_normal((7, 4))
    found = row_jumps(levels, losses, draws=20_000)
    assert found.wide == (2,)
    assert found.unplaced == 4
    assert not found.jumps.any()


def test_one_outlying_level_is_no_step():
    losses = 0.01 * np.random.default_rng(0).standard_normal((9, 2))
    losses[0, 0] += 3
    losses[-1, 1] -= 3
    found = row_jumps(NINE, losses, draws=20_000)
    assert (found.p > 0.05).all()
    assert set(found.place) <= {1, 2, 3, 4, 5, 6}


def test_rows_without_spread_and_rows_without_noise():
    losses = np.column_stack([np.full(9, 0.1), -step(2), 5 - X])
    found = row_jumps(NINE, losses, draws=2000)
    assert found.p == pytest.approx([1, 1 / 2001, 1])
    assert found.size[0] == 0
    assert found.jumps.tolist() == [False, True, False]


def test_p_is_not_too_small_at_any_slope():
    rng = np.random.default_rng(2)
    for slope in (0, 1.5, 3, 5):
        p = row_jumps(
            NINE, slope * X[:, None] / X[-1] + rng.standard_normal((9, 20_000)), draws=20_000
        ).p
        assert (p <= 0.01).mean() <= 0.013
        assert (p <= 0.05).mean() <= 0.055


def test_an_affine_change_of_the_losses_changes_no_p():
    losses = np.random.default_rng(3).standard_normal((9, 20)) - step(2)[:, None]
    one, other = row_jumps(NINE, losses, draws=2000), row_jumps(NINE, 7 + 100 * losses, draws=2000)
    assert other.p == pytest.approx(one.p)
    assert other.size == pytest.approx(100 * one.size)


# Errors


@pytest.mark.parametrize(
    ("ratios", "match"),
    [
        ((0, 1), r"ratios of shape \(2,\): a curve needs 3 levels or more"),
        (((0, 1, 2),), r"ratios of shape \(1, 3\)"),
        ((0, 1, -1), "ratio -1: a ratio of general to task rows is a number from 0 up"),
        ((0, 1, np.inf), "ratio inf"),
        ((0, np.nan, 1), "ratio nan"),
        ((0, 2, 1), "ratios 2, 1 in this order: give each ratio once, ascending"),
        ((0, 1, 1), "ratios 1, 1 in this order"),
    ],
)
def test_ratios_that_are_no_curve_are_refused(ratios, match):
    with pytest.raises(DataError, match=match):
        fit_forms(ratios, [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match=match):
        jump_test(ratios, np.zeros((2, 3)), higher_is_better=True)
    with pytest.raises(DataError, match=match):
        row_jumps(ratios, np.zeros((3, 2)))
    with pytest.raises(DataError, match=match):
        detectable(ratios, 1.0, 3)


def test_numbers_that_fit_no_ratios_are_refused():
    with pytest.raises(DataError, match=r"means of shape \(3,\) for 7 ratios"):
        fit_forms(SEVEN, [1, 2, 3])
    with pytest.raises(DataError, match=r"scores of shape \(7,\) for 7 ratios: give \(seeds, 7\)"):
        jump_test(SEVEN, np.zeros(7), higher_is_better=True)
    with pytest.raises(DataError, match=r"scores of shape \(7, 3\) for 7 ratios"):
        jump_test(SEVEN, np.zeros((7, 3)), higher_is_better=True)
    with pytest.raises(DataError, match=r"scores of shape \(0, 7\)"):
        jump_test(SEVEN, np.zeros((0, 7)), higher_is_better=True)
    with pytest.raises(DataError, match=r"losses of shape \(3, 7\) for 7 ratios: give \(7, rows\)"):
        row_jumps(SEVEN, np.zeros((3, 7)))
    with pytest.raises(
        DataError, match="3 ratios: a step needs 2 levels on each side; measure at 4 ratios or more"
    ):
        row_jumps((0, 1, 2), np.zeros((3, 7)))
    with pytest.raises(
        DataError,
        match=r"scores of shape \(2, 7\) for 7 ratios: give \(experiments, seeds, levels\)",
    ):
        find_jumps(SEVEN, np.zeros((2, 7)))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"means: 1 of 7 are not finite, the first at \[2\]"):
        fit_forms(SEVEN, [0, 0, np.nan, 0, 0, 0, 0])
    broken = np.zeros((3, 7))
    broken[1, 4] = np.inf
    with pytest.raises(
        DataError,
        match=r"scores: 1 of 21 are not finite, the first at \[1, 4\]; leave that run out",
    ):
        jump_test(SEVEN, broken, higher_is_better=True)
    with pytest.raises(DataError, match=r"losses: 1 of 21 are not finite, the first at \[4, 1\]"):
        row_jumps(SEVEN, broken.T)


def test_settings_out_of_range_are_refused():
    with pytest.raises(
        DataError, match=r"draws: 99 simulated curves cannot show p < 0.01; give 199 or more"
    ):
        jump_test(SEVEN, np.zeros((3, 7)), higher_is_better=True, draws=99)
    with pytest.raises(DataError, match="noise -1: it must be a number from 0 up"):
        power(SEVEN, -1.0, 3, 1.0)
    with pytest.raises(
        DataError, match=r"level 2, least 0.5, draws 100000: give a share between 0 and 1"
    ):
        row_jumps(SEVEN, np.zeros((7, 3)), level=2.0)
