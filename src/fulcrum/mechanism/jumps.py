"""Test whether a score jumps as general data grows, or rises smoothly, or only seems to jump.

A jump is claimed only if all of these hold for a continuous metric:

- an abrupt form beats the power law by 6 in AICc;
- it fits better than any smooth curve by more than noise explains (p < 0.01, found by simulating
  the best smooth curve);
- halves of the seeds place it within an octave of each other;
- it is an improvement.

If no jump is found, `detectable` says how large one would have had to be. `verdict` puts the tests
of several metrics into a word and a sentence, no surer than what such an experiment can find.

Data: scores (seeds, levels), one training run each, of any trainer. A seed may move all of its
levels together, which does not count as noise. The ratio is g; an octave is a doubling of g + 1.

Invariants: an affine change of the metric, together with its direction, changes only the units of
the answer; equal scores and seeds give equal answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import f as f_distribution

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray
from fulcrum.mechanism.curve_fits import (
    FORMS,
    RISE,
    Fit,
    Grid,
    Nearest,
    aicc,
    fit_forms,
    grid_of,
    octaves,
    require_finite,
    rounding_floor,
)

LEAST_AICC = 6.0
LEAST_P = 0.01
REPLICATION = 1.0  # octaves
LEAST_LEVELS = FORMS["sigmoid"] + 2
MOVED = 0.05  # p of the F test below which the level means are said to differ
_SHAPE = 4  # parameters of an abrupt curve: c, a, location, width
_SHRINK = 2  # degrees of freedom with which the noise of all levels counts in that of one

Condition = Literal["levels", "seeds", "AICc", "p", "replication", "direction"]
Word = Literal["jump", "smooth", "metric artefact", "not enough data"]


@dataclass(frozen=True, slots=True, eq=False)
class JumpTest:
    """The test of one metric. With fewer than 7 levels what depends on the test is nan.

    - `ratios`, `seeds`: the levels, and the number of seeds
    - `statistic`: AICc(power law) - AICc(best form that can bend: abrupt sigmoid, or one break)
    - `p`: of how much better an abrupt curve fits than any smooth one
    - `location`: ratio of the best abrupt curve
    - `between`: the measured ratios around it
    - `rise`: octaves from 10% to 90% of the change; as fine as the levels only, as `between` is
    - `size`: change of the metric, negative if it falls
    - `improves`: whether that is for the better
    - `halves`: locations (ratios) by each half of the seeds; nan with one seed
    - `replicated`: whether the halves agree
    - `failed`: the conditions that do not hold
    - `noise`: standard deviation of one seed at one level, averaged over levels; nan with one seed
    - `moves`: range of the level means
    - `still`: p of the F test that the level means are equal (seeds are blocks); nan with one seed
    - `fits`: every form, fitted to the level means
    """

    ratios: tuple[float, ...]
    seeds: int
    statistic: float
    p: float
    location: float
    between: tuple[float, float]
    rise: float
    size: float
    improves: bool
    halves: tuple[float, float]
    replicated: bool
    failed: tuple[Condition, ...]
    noise: float
    moves: float
    still: float
    fits: Mapping[str, Fit]

    @property
    def jump(self) -> bool:
        """Return whether all conditions hold."""
        return not self.failed

    @property
    def abrupt(self) -> bool:
        """Return whether all conditions but the direction hold: a jump, for better or worse."""
        return set(self.failed) <= {"direction"}


def jump_test(
    ratios: Sequence[float] | FloatArray,
    scores: FloatArray,
    *,
    higher_is_better: bool,
    draws: int = 1000,
    seed: int = 0,
) -> JumpTest:
    """Test one metric's scores (seeds, levels) for a jump.

    p compares how much better the best abrupt curve fits than the best smooth one, in units of
    noise, with `draws` curves simulated around that smooth one. Smooth means a power law or another
    power of g + 1, a line in log(g + 1), or a sigmoid that rises over more than two octaves.

    The unit of noise is that of the seeds (two-way residuals: a seed's own level taken out), drawn
    anew each time, so that its uncertainty counts; or what the abrupt curve leaves over, if that is
    more. The null's noise is that of each level (its own variance, shrunk towards that of all), or
    what the smooth curve leaves over, if that is more.

    Halves are every other seed, so the order of seeds matters a little. A step on a slope is hardly
    found, because no form has both. Raises DataError if the scores are no such table.
    """
    x = octaves(ratios)
    table = _score_table(scores, len(x))
    described = _describe(ratios, table)
    if len(x) < LEAST_LEVELS:
        return described
    _check_draws(draws)
    grid = grid_of(tuple(x))
    sign = 1.0 if higher_is_better else -1.0
    tested = _test(sign * table[None], grid)
    rng = np.random.default_rng(seed)
    (p,) = _p_values(tested, np.array([True]), grid, len(table), draws, rng).tolist()
    number = int(tested.abrupt.number[0])
    slope = float(tested.abrupt.slope[0])
    statistic = float(tested.statistic[0])
    replicated = bool(tested.replicated[0])
    conditions: dict[Condition, bool] = {
        "seeds": len(table) >= 2,
        "AICc": statistic >= LEAST_AICC,
        "p": p < LEAST_P,
        "replication": replicated,
        "direction": slope > 0,
    }
    location, width = grid.abrupt.parameters[number]
    after = int(np.clip(np.searchsorted(x, location), 1, len(x) - 1))
    # The plateaus of `shapes` are 1 apart.
    swing = float(np.ptp(grid.abrupt.unit[number]) / np.ptp(grid.abrupt.shapes[number]))
    first, second = tested.halves[0]
    return replace(
        described,
        statistic=statistic,
        p=p,
        location=float(2**location - 1),
        between=(described.ratios[after - 1], described.ratios[after]),
        rise=float(width * RISE),
        size=sign * slope * swing,
        improves=slope > 0,
        halves=(float(2**first - 1), float(2**second - 1)),
        replicated=replicated,
        failed=tuple(name for name, holds in conditions.items() if not holds),
    )


def find_jumps(
    ratios: Sequence[float] | FloatArray,
    scores: FloatArray,
    *,
    draws: int = 199,
    seed: int = 0,
    every_p: bool = False,
) -> tuple[BoolArray, FloatArray]:
    """Return which of many experiments show an improving jump, and their p, (experiments,) each.

    Scores are (experiments, seeds, levels), higher is better. p is simulated only if all other
    conditions hold, and is nan otherwise, unless `every_p`. Raises DataError for fewer than 7
    levels or 2 seeds, or if a score is not finite.
    """
    x = octaves(ratios)
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 3 or table.shape[2] != len(x) or len(x) < LEAST_LEVELS or table.shape[1] < 2:
        raise DataError(
            f"scores of shape {table.shape} for {len(x)} ratios: give (experiments, seeds, "
            f"levels), at least {LEAST_LEVELS} levels and 2 seeds"
        )
    require_finite("scores", table)
    _check_draws(draws)
    grid = grid_of(tuple(x))
    tested = _test(table, grid)
    holds = (tested.statistic >= LEAST_AICC) & tested.replicated & (tested.abrupt.slope > 0)
    rng = np.random.default_rng(seed)
    p = _p_values(tested, holds | every_p, grid, table.shape[1], draws, rng)
    return holds & (p < LEAST_P), p


def power(
    ratios: Sequence[float] | FloatArray,
    noise: float,
    seeds: int,
    size: float,
    *,
    simulations: int = 100,
    draws: int = 199,
    seed: int = 0,
) -> float:
    """Return the share of simulated experiments that find a step of `size`, in the metric.

    The step is between the middle levels, and the curve is flat on both sides of it. `noise` is the
    standard deviation of one seed at one level, the same at all. The share is 0 with fewer than 7
    levels or 2 seeds, which allow no claim. Raises DataError for a noise or size below 0, and for
    too few draws.
    """
    x = octaves(ratios)
    _check_sizes(noise=noise, size=size)
    _check_draws(draws)
    if len(x) < LEAST_LEVELS or seeds < 2:
        return 0.0
    step = np.where(np.arange(len(x)) >= len(x) // 2, size, 0.0)
    errors = noise * np.random.default_rng([seed, 1]).standard_normal((simulations, seeds, len(x)))
    is_jump, _ = find_jumps(ratios, step + errors, draws=draws, seed=seed)
    return float(is_jump.mean())


def detectable(
    ratios: Sequence[float] | FloatArray,
    noise: float,
    seeds: int,
    *,
    share: float = 0.8,
    simulations: int = 100,
    draws: int = 199,
) -> float:
    """Return the smallest step, in the metric, that `power` finds in `share` of simulations.

    It is inf if there is none (fewer than 7 levels or 2 seeds). Only size over noise matters, so
    one search serves all metrics at the same levels and seeds. Raises DataError for a noise below
    0, and for too few draws.
    """
    octaves(ratios)
    _check_sizes(noise=noise)
    _check_draws(draws)
    in_noise = _detectable_in_noise(_as_tuple(ratios), seeds, share, simulations, draws)
    return in_noise * noise if np.isfinite(in_noise) else float("inf")


def verdict(
    continuous: JumpTest,
    hard: Mapping[str, JumpTest] | Sequence[JumpTest] = (),
    *,
    worth: float = 0.0,
) -> tuple[Word, str]:
    """Return "jump", "smooth", "metric artefact" or "not enough data", and a sentence on why.

    `hard` are other metrics of the same runs that move in steps (exact match, accuracy). A jump in
    one of these alone is what thresholds make of a smooth curve (Schaeffer et al. 2023, arXiv
    2304.15004). "jump" may be a worsening; the sentence then says so first.

    "not enough data" means fewer than 7 levels or 2 seeds; or no jump found, while one as large as
    all that the curve moves would be missed more often than found. The exception is a flat curve
    that is known well: the level means do not differ (F test), and a jump of `worth`, in the
    metric, would be found in 80% of experiments.
    """
    n_levels, seeds = len(continuous.ratios), continuous.seeds
    if n_levels < LEAST_LEVELS or seeds < 2:
        return "not enough data", (
            f"{_flat(continuous)}{n_levels} levels of general data and {seeds} "
            f"seed{'s' * (seeds != 1)} can show no jump: it takes {LEAST_LEVELS} levels, and 2 "
            "seeds that agree."
        )
    if continuous.abrupt:
        return "jump", _jump_sentence(continuous)
    least = detectable(continuous.ratios, continuous.noise, seeds)
    chance = power(continuous.ratios, continuous.noise, seeds, continuous.moves)
    why = _why_not(continuous)
    if chance < 0.5 and not (continuous.still >= MOVED and least <= worth):
        return "not enough data", (
            f"{_flat(continuous)}No jump is shown ({why}), but one as large as all that the curve "
            f"moves ({continuous.moves:.3g}) would be found in {chance:.0%} of such experiments "
            f"only; one of {least:.3g} in 80%. More levels decide, or more seeds."
        )
    limit = "Seeds do not differ, so nothing can be said of what jump would be found."
    if continuous.noise:
        limit = (
            f"A jump of {least:.3g} between the middle levels, flat elsewhere, would be found in "
            "80% of such experiments."
        )
    artefacts = _artefacts(hard)
    if artefacts:
        return "metric artefact", (
            f"{'; '.join(artefacts)} jump{'s' * (len(artefacts) == 1)}, but the continuous metric "
            f"does not ({why}): the step is the hard metric's, not the model's. {limit}"
        )
    if continuous.failed == ("AICc",):
        # Perhaps a step on a slope, which no form has: the rule holds, and the doubt is said.
        return "smooth", (
            f"No jump is claimed ({why}), but an abrupt curve fits better than any smooth one, by "
            f"more than noise: more levels decide. {limit}"
        )
    return "smooth", f"{_flat(continuous)}General data makes no jump in this curve ({why}). {limit}"


# The test


class _Tested(NamedTuple):
    """The tests, all but p, of B experiments whose scores are higher if better."""

    statistic: FloatArray  # (B,)
    contrast: FloatArray  # (B,), smooth minus abrupt RSS, in units of noise
    abrupt: Nearest  # (B,) each
    halves: FloatArray  # (B, 2), octaves
    replicated: BoolArray  # (B,)
    null: FloatArray  # (B, L), the best smooth curve
    variance: FloatArray  # (B, L), of each level mean, for simulating the null


def _score_table(scores: FloatArray, n_levels: int) -> FloatArray:
    """Return the scores as an array (seeds, levels). Raise DataError if they are not that."""
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != n_levels or not len(table):
        raise DataError(
            f"scores of shape {table.shape} for {n_levels} ratios: give (seeds, {n_levels}), one "
            "row for each seed"
        )
    require_finite("scores", table)
    return table


def _check_draws(draws: int) -> None:
    if 1 / (draws + 1) >= LEAST_P:
        raise DataError(
            f"draws: {draws} simulated curves cannot show p < {LEAST_P:g}; give 199 or more"
        )


def _check_sizes(**sizes: float) -> None:
    for name, value in sizes.items():
        if not (np.isfinite(value) and value >= 0):
            raise DataError(
                f"{name} {value:g}: it must be a number from 0 up, in the metric's unit"
            )


def _as_tuple(ratios: Sequence[float] | FloatArray) -> tuple[float, ...]:
    return tuple(float(ratio) for ratio in np.asarray(ratios, dtype=np.float64))


def _describe(ratios: Sequence[float] | FloatArray, table: FloatArray) -> JumpTest:
    """Return what can be said of scores (seeds, levels) without a test: the test's part is nan."""
    nan = float("nan")
    means = table.mean(axis=0)
    noise = float(np.sqrt(_level_variance(table[None]).mean()))
    failed: tuple[Condition, ...] = ("levels",) if len(table) >= 2 else ("levels", "seeds")
    return JumpTest(
        ratios=_as_tuple(ratios),
        seeds=len(table),
        statistic=nan,
        p=nan,
        location=nan,
        between=(nan, nan),
        rise=nan,
        size=nan,
        improves=False,
        halves=(nan, nan),
        replicated=False,
        failed=failed,
        noise=noise,
        moves=float(np.ptp(means)),
        still=_p_of_equal_means(table, noise),
        fits=fit_forms(ratios, means),
    )


def _level_variance(scores: FloatArray) -> FloatArray:
    """Return the variance of one seed at each level, (B, L), from scores (B, S, L).

    Seeds' main effects do not count. The mean over levels is the two-way residual variance. It is
    nan with one seed.
    """
    n_seeds, n_levels = scores.shape[1:]
    if n_seeds < 2:
        return np.full((len(scores), n_levels), np.nan)
    left = scores - scores.mean(axis=1, keepdims=True)
    left = left - left.mean(axis=2, keepdims=True)
    variance: FloatArray = (left**2).sum(axis=1) / (n_seeds - 1) * (n_levels / (n_levels - 1))
    return variance


def _p_of_equal_means(scores: FloatArray, noise: float) -> float:
    """Return p of the F test that all level means of scores (S, L) are equal; seeds are blocks.

    It is 1 if nothing moves at all, and nan with one seed.
    """
    n_seeds, n_levels = scores.shape
    if n_seeds < 2:
        return float("nan")
    between = n_seeds * float(scores.mean(axis=0).var(ddof=1))
    if between <= 1e-24 * float(np.abs(scores).max()) ** 2:
        return 1.0
    if noise == 0:
        return 0.0
    degrees = n_levels - 1, (n_seeds - 1) * (n_levels - 1)
    return float(f_distribution.sf(between / noise**2, *degrees))


def _test(scores: FloatArray, grid: Grid) -> _Tested:
    """Test B experiments (B, S, L), higher is better: everything but p."""
    n_seeds, n_levels = scores.shape[1:]
    centred = scores - scores.mean(axis=(1, 2), keepdims=True)
    means = centred.mean(axis=1)
    means = means - means.mean(axis=1, keepdims=True)
    floor = rounding_floor(means)
    abrupt, smooth = grid.abrupt.nearest(means), grid.smooth.nearest(means)
    by_level = np.nan_to_num(_level_variance(centred) / n_seeds)
    pooled = by_level.mean(axis=1)
    halves, replicated = _replicate(centred, grid)
    return _Tested(
        statistic=_over_power(means, abrupt, floor, grid),
        contrast=_contrast(smooth.rss, abrupt.rss, pooled, floor, n_levels),
        abrupt=abrupt,
        halves=halves,
        replicated=replicated & (np.ptp(means, axis=1) > 0),
        null=smooth.slope[:, None] * grid.smooth.unit[smooth.number],
        variance=_null_variance(by_level, pooled, smooth.rss, n_seeds),
    )


def _over_power(means: FloatArray, abrupt: Nearest, floor: FloatArray, grid: Grid) -> FloatArray:
    """Return AICc(power law) - AICc(best form that can bend) of centred curves (B, L)."""
    n_levels = means.shape[1]
    bent = aicc(np.maximum(abrupt.rss, floor), n_levels, FORMS["sigmoid"])
    if n_levels >= FORMS["break"] + 2:
        rss = np.maximum(grid.breaks.nearest(means).rss, floor)
        bent = np.minimum(bent, aicc(rss, n_levels, FORMS["break"]))
    rss = np.maximum(grid.power.nearest(means).rss, floor)
    difference: FloatArray = aicc(rss, n_levels, FORMS["power"]) - bent
    return difference


def _replicate(centred: FloatArray, grid: Grid) -> tuple[FloatArray, BoolArray]:
    """Place the jump by each half of the seeds of scores (B, S, L).

    Return the places (B, 2) in octaves, and whether they agree with each other and in direction.
    """
    n_experiments, n_seeds, _ = centred.shape
    if n_seeds < 2:
        return np.full((n_experiments, 2), np.nan), np.zeros(n_experiments, dtype=bool)
    places, signs = [], []
    for start in (0, 1):
        half = centred[:, start::2].mean(axis=1)
        abrupt = grid.abrupt.nearest(half - half.mean(axis=1, keepdims=True))
        places.append(grid.abrupt.parameters[abrupt.number, 0])
        signs.append(np.sign(abrupt.slope))
    is_near = np.abs(places[0] - places[1]) <= REPLICATION + 1e-9
    return np.column_stack(places), (signs[0] == signs[1]) & is_near


def _null_variance(
    by_level: FloatArray, pooled: FloatArray, smooth_rss: FloatArray, n_seeds: int
) -> FloatArray:
    """Return the variance (B, L) of each level mean around the best smooth curve.

    Few seeds tell little of a level's own noise, so that of all levels together counts in it as
    `_SHRINK` degrees of freedom do. What the smooth curve leaves over counts if it is more.
    """
    n_levels = by_level.shape[1]
    own = (n_seeds - 1) / (n_seeds - 1 + _SHRINK)
    variance = own * by_level + (1 - own) * pooled[:, None]
    misfit = smooth_rss / (n_levels - _SHAPE)
    variance = variance * np.maximum(1, misfit / np.where(pooled > 0, pooled, np.inf))[:, None]
    chosen: FloatArray = np.where(pooled[:, None] > 0, variance, misfit[:, None])
    return chosen


def _contrast(
    smooth: FloatArray, abrupt: FloatArray, variance: FloatArray, floor: FloatArray, n_levels: int
) -> FloatArray:
    """Return how much better the abrupt curve fits than the smooth one, (B,), in units of noise."""
    unit: FloatArray = np.maximum(np.maximum(variance, abrupt / (n_levels - _SHAPE)), floor)
    contrast: FloatArray = (smooth - abrupt) / unit
    return contrast


def _p_values(
    tested: _Tested,
    wanted: BoolArray,
    grid: Grid,
    n_seeds: int,
    draws: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Return p of the `wanted` experiments, (B,), and nan of the others.

    p is the share of curves, simulated under the best smooth one, whose contrast is as large. The
    observed one counts among them.
    """
    n_levels, df = len(grid.x), n_seeds - 1
    p = np.full(len(wanted), np.nan)
    for i in np.flatnonzero(wanted):
        variance = tested.variance[i]
        curves = tested.null[i] + np.sqrt(variance) * rng.standard_normal((draws, n_levels))
        curves -= curves.mean(axis=1, keepdims=True)
        unit = np.zeros(draws)
        if df:
            unit = (variance * rng.chisquare(df, (draws, n_levels)) / df).mean(axis=1)
        smooth, abrupt = grid.smooth.nearest(curves).rss, grid.abrupt.nearest(curves).rss
        contrast = _contrast(smooth, abrupt, unit, rounding_floor(curves), n_levels)
        p[i] = (1 + int((contrast >= tested.contrast[i]).sum())) / (draws + 1)
    return p


@lru_cache(maxsize=64)
def _detectable_in_noise(
    ratios: tuple[float, ...], seeds: int, share: float, simulations: int, draws: int
) -> float:
    """Return the smallest step found in `share` of simulations, in units of noise, or inf."""

    def is_found(log_size: float) -> bool:
        found = power(ratios, 1.0, seeds, 2**log_size, simulations=simulations, draws=draws)
        return found >= share

    low, high = -2.0, 14.0  # log2 of size over noise
    if not is_found(high):
        return float("inf")
    while high - low > 0.05:
        middle = (low + high) / 2
        if is_found(middle):
            high = middle
        else:
            low = middle
    return float(2**high)


# The sentences


def _flat(test: JumpTest) -> str:
    if not test.still >= MOVED:  # nan with one seed, which shows no noise to compare with
        return ""
    return f"No change with general data is shown (F test of the levels, p {_p(test.still)}). "


def _artefacts(hard: Mapping[str, JumpTest] | Sequence[JumpTest]) -> list[str]:
    """Return the hard metrics that jump, each with the place of its jump."""
    if not isinstance(hard, Mapping):
        hard = {f"hard metric {i + 1}": test for i, test in enumerate(hard)}
    return [f"{name} ({_place(test)})" for name, test in hard.items() if test.abrupt]


def _place(test: JumpTest) -> str:
    low, high = test.between
    return (
        f"{test.size:+.3g} at ratio {test.location:.3g}, between the measured {low:g} and "
        f"{high:g}; ΔAICc {test.statistic:.1f}, p {_p(test.p)}"
    )


def _jump_sentence(test: JumpTest) -> str:
    kind = "An improvement by a jump" if test.improves else "A worsening jump"
    first, second = test.halves
    return (
        f"{kind}: {_place(test)}. Halves of the seeds place it at {first:.3g} and {second:.3g}. "
        "The score changes faster there than any smooth curve that fits the other levels."
    )


def _why_not(test: JumpTest) -> str:
    """Return every condition with its number, and what it lacks if it fails."""
    first, second = test.halves
    statistic, p = f"ΔAICc {test.statistic:.1f}", f"p {_p(test.p)}"
    if "AICc" in test.failed:
        statistic += f", needs {LEAST_AICC:g} over the power law"
    if "p" in test.failed:
        p += f", needs below {LEAST_P:g} against smooth curves"
    reasons = [statistic, p]
    if "replication" in test.failed and test.moves:
        reasons.append(
            "halves of the seeds do not agree on a place or a direction: ratio "
            f"{first:.3g} and {second:.3g}"
        )
    return "; ".join(reasons)


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"
