"""Whether a score jumps as general data grows, or only rises smoothly, or only seems to jump because its metric is hard.

A jump is claimed only if all of these hold for a continuous metric: an abrupt form beats the power law by 6 in AICc; it fits
better than any smooth curve by more than noise explains (p < 0.01, by simulating the best smooth curve); halves of the seeds
place it within an octave of each other; and it is an improvement. Where none is found, `detectable` says how large a jump
would have had to be.

Scores are (seeds, levels), one training run each; a seed is a chain that may move all of its levels together, which counts as
no noise. Works on plain arrays of any trainer's results. The ratio is g, an octave a doubling of g + 1.

Invariants: an affine change of the metric, with its direction, changes nothing but the units of the answer; equal scores and
seeds give equal answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import f as f_distribution

from fulcrum.errors import DataError
from fulcrum.records import BoolArray, FloatArray
from fulcrum.scaling_fits import FORMS, RISE, Fit, Grid, Nearest, aicc, finite, fits, grid_of, least_rss, octaves

LEAST_AICC, LEAST_P, REPLICATION = 6.0, 0.01, 1.0  # the last in octaves
LEAST_LEVELS = FORMS["sigmoid"] + 2
SHAPE = 4  # parameters of an abrupt curve: c, a, location, width
_SHRINK = 2  # degrees of freedom with which the noise of all levels counts in that of one


@dataclass(frozen=True, slots=True, eq=False)
class JumpTest:
    """What one metric shows. Locations are ratios; nan where fewer than 7 levels allow no test, or 2 seeds no halves.

    `statistic` is AICc(power) - AICc(best form that can bend: abrupt sigmoid, or one break). `between` are the measured ratios
    around the location, `rise` the octaves from 10% to 90%: both are as fine as the levels only. `size` is in the metric,
    negative where it falls. `failed` names the conditions that do not hold, of "levels", "seeds", "AICc", "p", "replication",
    "direction". `noise` is the standard deviation of one seed at one level, on average over levels, `moves` the range of the
    level means, `still` the p of the F test that these are equal (seeds as blocks); nan with one seed.
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
    failed: tuple[str, ...]
    noise: float
    moves: float
    still: float
    fits: Mapping[str, Fit]

    @property
    def jump(self) -> bool:
        """All conditions hold."""
        return not self.failed

    @property
    def abrupt(self) -> bool:
        """All but the direction: a jump, which may be a worsening."""
        return set(self.failed) <= {"direction"}


class _Tested(NamedTuple):
    """Of B experiments, (B,) each, higher is better; `halves` (B, 2) in octaves."""

    statistic: FloatArray
    contrast: FloatArray
    abrupt: Nearest
    halves: FloatArray
    replicated: BoolArray
    null: FloatArray  # (B, L), the best smooth curve
    variance: FloatArray  # (B, L), of each level mean, for simulating the null


def jump_test(
    ratios: Sequence[float] | FloatArray, scores: FloatArray, *, higher_is_better: bool, draws: int = 1000, seed: int = 0
) -> JumpTest:
    """Test one metric's scores (seeds, levels) for a jump.

    p is of how much better the best abrupt curve fits than the best smooth one, in units of noise, against `draws` simulated
    curves around that smooth one. Smooth is a power law or another power of g + 1, a line in log(g + 1), or a sigmoid rising
    over more than two octaves. The unit is the seeds' noise (two-way residuals: a seed's own level taken out), drawn anew each
    time, so that its uncertainty counts; or what the abrupt curve leaves over, where that is more. The null's noise is that of
    each level (its own variance, shrunk towards that of all), or what the smooth curve leaves over, where that is more. Halves
    are every other seed, so that the order of seeds matters a little. A step on a slope is hardly found: no form has both.
    Raises DataError for what is no table of scores.
    """
    x = octaves(ratios)
    given = _table(scores, len(x))
    levels = tuple(float(g) for g in np.asarray(ratios, dtype=np.float64))
    n_seeds, means = len(given), given.mean(axis=0)
    noise, moves, found = float(np.sqrt(_noise(given[None]).mean())), float(np.ptp(means)), fits(ratios, means)
    still = _still(given, noise)
    if len(x) < LEAST_LEVELS:
        nan, failed = float("nan"), ("levels", *(("seeds",) if n_seeds < 2 else ()))
        return JumpTest(
            levels, n_seeds, nan, nan, nan, (nan, nan), nan, nan, False, (nan, nan), False, failed, noise, moves, still, found
        )
    _check_draws(draws)
    grid, sign = grid_of(tuple(x)), 1.0 if higher_is_better else -1.0
    tested = _test(sign * given[None], grid)
    rng = np.random.default_rng(seed)
    p = float(_p_values(tested.contrast, tested.null, tested.variance, grid, n_seeds, draws, rng)[0])
    shape = int(tested.abrupt.number[0])
    place, width = grid.abrupt.parameters[shape]
    improves = bool(tested.abrupt.slope[0] > 0)
    conditions = {
        "seeds": n_seeds >= 2,
        "AICc": bool(tested.statistic[0] >= LEAST_AICC),
        "p": p < LEAST_P,
        "replication": bool(tested.replicated[0]),
        "direction": improves,
    }
    after = int(np.clip(np.searchsorted(x, place), 1, len(x) - 1))
    # The plateaus of `shapes` are 1 apart.
    swing = float(np.ptp(grid.abrupt.unit[shape]) / np.ptp(grid.abrupt.shapes[shape]))
    return JumpTest(
        levels, n_seeds, float(tested.statistic[0]), p, float(2**place - 1), (levels[after - 1], levels[after]),
        float(width * RISE), sign * float(tested.abrupt.slope[0]) * swing, improves,
        (float(2 ** tested.halves[0, 0] - 1), float(2 ** tested.halves[0, 1] - 1)), bool(tested.replicated[0]),
        tuple(name for name, holds in conditions.items() if not holds), noise, moves, still, found,
    )  # fmt: skip


def _table(scores: FloatArray, n_levels: int) -> FloatArray:
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] != n_levels or not len(given):
        raise DataError(f"scores of shape {given.shape} for {n_levels} ratios: give (seeds, {n_levels}), one row for each seed")
    finite("scores", given)
    return given


def _check_draws(draws: int) -> None:
    if 1 / (draws + 1) >= LEAST_P:
        raise DataError(f"draws: {draws} simulated curves cannot show p < {LEAST_P:g}; give 199 or more")


def _noise(scores: FloatArray) -> FloatArray:
    """Variance of one seed at each level (B, L) from scores (B, S, L), without the seeds' main effects; nan with one seed. The
    mean over levels is the two-way residual variance."""
    n_seeds, n_levels = scores.shape[1:]
    if n_seeds < 2:
        return np.full((len(scores), n_levels), np.nan)
    left = scores - scores.mean(axis=1, keepdims=True)
    left = left - left.mean(axis=2, keepdims=True)
    variance: FloatArray = (left**2).sum(axis=1) / (n_seeds - 1) * (n_levels / (n_levels - 1))
    return variance


def _still(scores: FloatArray, noise: float) -> float:
    """p of the F test that all level means of scores (S, L) are equal, each seed a block; 1 where nothing moves at all."""
    n_seeds, n_levels = scores.shape
    if n_seeds < 2:
        return float("nan")
    between = n_seeds * float(scores.mean(axis=0).var(ddof=1))
    if between <= 1e-24 * float(np.abs(scores).max()) ** 2:
        return 1.0
    if noise == 0:
        return 0.0
    return float(f_distribution.sf(between / noise**2, n_levels - 1, (n_seeds - 1) * (n_levels - 1)))


def _test(scores: FloatArray, grid: Grid) -> _Tested:
    """All but p of B experiments (B, S, L), higher is better."""
    n_seeds, n_levels = scores.shape[1:]
    centred = scores - scores.mean(axis=(1, 2), keepdims=True)
    means = centred.mean(axis=1)
    means = means - means.mean(axis=1, keepdims=True)
    floor = least_rss(means)
    abrupt, smooth = grid.abrupt.nearest(means), grid.smooth.nearest(means)
    scored = aicc(np.maximum(abrupt.rss, floor), n_levels, FORMS["sigmoid"])
    if n_levels >= FORMS["break"] + 2:
        scored = np.minimum(scored, aicc(np.maximum(grid.breaks.nearest(means).rss, floor), n_levels, FORMS["break"]))
    statistic = aicc(np.maximum(grid.power.nearest(means).rss, floor), n_levels, FORMS["power"]) - scored
    by_level = np.nan_to_num(_noise(centred) / n_seeds)
    pooled = by_level.mean(axis=1)
    contrast = _contrast(smooth.rss, abrupt.rss, pooled, floor, n_levels)
    if n_seeds < 2:
        halves, replicated = np.full((len(means), 2), np.nan), np.zeros(len(means), dtype=bool)
    else:
        parts = [centred[:, start::2].mean(axis=1) for start in (0, 1)]
        apart = [grid.abrupt.nearest(part - part.mean(axis=1, keepdims=True)) for part in parts]
        halves = np.column_stack([grid.abrupt.parameters[half.number, 0] for half in apart])
        same = np.sign(apart[0].slope) == np.sign(apart[1].slope)
        replicated = same & (np.abs(halves[:, 0] - halves[:, 1]) <= REPLICATION + 1e-9) & (np.ptp(means, axis=1) > 0)
    null = smooth.slope[:, None] * grid.smooth.unit[smooth.number]
    # Few seeds tell little of a level's own noise: it counts as much as `_SHRINK` degrees of freedom of all levels together.
    own = (n_seeds - 1) / (n_seeds - 1 + _SHRINK)
    variance = own * by_level + (1 - own) * pooled[:, None]
    misfit = smooth.rss / (n_levels - SHAPE)
    variance = variance * np.maximum(1, misfit / np.where(pooled > 0, pooled, np.inf))[:, None]
    variance = np.where(pooled[:, None] > 0, variance, misfit[:, None])
    return _Tested(statistic, contrast, abrupt, halves, replicated, null, variance)


def _contrast(smooth: FloatArray, abrupt: FloatArray, variance: FloatArray, floor: FloatArray, n_levels: int) -> FloatArray:
    unit: FloatArray = np.maximum(np.maximum(variance, abrupt / (n_levels - SHAPE)), floor)
    value: FloatArray = (smooth - abrupt) / unit
    return value


def _p_values(
    observed: FloatArray,
    nulls: FloatArray,
    variances: FloatArray,
    grid: Grid,
    n_seeds: int,
    draws: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Share of curves simulated under the best smooth one whose contrast is as large, the observed one counted among them."""
    n_levels, df = len(grid.x), n_seeds - 1
    p = np.empty(len(observed))
    for i, (null, variance) in enumerate(zip(nulls, variances, strict=True)):
        drawn = null + np.sqrt(variance) * rng.standard_normal((draws, n_levels))
        drawn -= drawn.mean(axis=1, keepdims=True)
        unit = (variance * rng.chisquare(df, (draws, n_levels)) / df).mean(axis=1) if df else np.zeros(draws)
        smooth, abrupt = grid.smooth.nearest(drawn).rss, grid.abrupt.nearest(drawn).rss
        contrast = _contrast(smooth, abrupt, unit, least_rss(drawn), n_levels)
        p[i] = (1 + int((contrast >= observed[i]).sum())) / (draws + 1)
    return p


def find_jumps(
    ratios: Sequence[float] | FloatArray, scores: FloatArray, *, draws: int = 199, seed: int = 0, every_p: bool = False
) -> tuple[BoolArray, FloatArray]:
    """Which of many experiments, scores (experiments, seeds, levels), show an improving jump, and their p; higher is better.

    p is simulated only where all other conditions hold, and is nan elsewhere, unless `every_p`. Raises DataError for fewer than
    7 levels or 2 seeds, or where a score is not finite.
    """
    x, given = octaves(ratios), np.asarray(scores, dtype=np.float64)
    if given.ndim != 3 or given.shape[2] != len(x) or len(x) < LEAST_LEVELS or given.shape[1] < 2:
        raise DataError(
            f"scores of shape {given.shape} for {len(x)} ratios: give (experiments, seeds, levels), at least "
            f"{LEAST_LEVELS} levels and 2 seeds"
        )
    finite("scores", given)
    _check_draws(draws)
    grid, rng = grid_of(tuple(x)), np.random.default_rng(seed)
    tested = _test(given, grid)
    holds = (tested.statistic >= LEAST_AICC) & tested.replicated & (tested.abrupt.slope > 0)
    asked = holds | every_p
    p = np.full(len(holds), np.nan)
    p[asked] = _p_values(tested.contrast[asked], tested.null[asked], tested.variance[asked], grid, given.shape[1], draws, rng)
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
    """Share of simulated experiments in which all conditions find a step of `size` (in the metric) between the middle levels.

    `noise` is the standard deviation of one seed at one level, the same at all; the curve is flat on both sides of the step. 0
    with fewer than 7 levels or 2 seeds, which allow no claim. Raises DataError for a noise or size below 0, and for few draws.
    """
    x = octaves(ratios)
    _check_sizes(noise=noise, size=size)
    _check_draws(draws)
    if len(x) < LEAST_LEVELS or seeds < 2:
        return 0.0
    step = np.where(np.arange(len(x)) >= len(x) // 2, size, 0.0)
    moved = noise * np.random.default_rng([seed, 1]).standard_normal((simulations, seeds, len(x)))
    return float(find_jumps(ratios, step + moved, draws=draws, seed=seed)[0].mean())


def detectable(
    ratios: Sequence[float] | FloatArray,
    noise: float,
    seeds: int,
    *,
    share: float = 0.8,
    simulations: int = 100,
    draws: int = 199,
) -> float:
    """The smallest step, in the metric, that `power` finds in at least `share` of simulations; inf where none is (fewer than 7
    levels or 2 seeds). Only size over noise matters, so that one search serves all metrics at the same levels and seeds.
    Raises DataError for a noise below 0, and for few draws.
    """
    octaves(ratios)
    _check_sizes(noise=noise)
    _check_draws(draws)
    levels = tuple(float(g) for g in np.asarray(ratios, dtype=np.float64))
    least = _in_noise(levels, seeds, share, simulations, draws)
    return least * noise if np.isfinite(least) else float("inf")


def _check_sizes(**given: float) -> None:
    for name, value in given.items():
        if not (np.isfinite(value) and value >= 0):
            raise DataError(f"{name} {value:g}: it must be a number from 0 up, in the metric's unit")


@lru_cache(maxsize=64)
def _in_noise(ratios: tuple[float, ...], seeds: int, share: float, simulations: int, draws: int) -> float:
    low, high = -2.0, 14.0  # log2 of size over noise
    if power(ratios, 1.0, seeds, 2**high, simulations=simulations, draws=draws) < share:
        return float("inf")
    while high - low > 0.05:
        middle = (low + high) / 2
        if power(ratios, 1.0, seeds, 2**middle, simulations=simulations, draws=draws) < share:
            low = middle
        else:
            high = middle
    return float(2**high)
