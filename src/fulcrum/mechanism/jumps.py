"""Whether a score jumps as general data grows, or only rises smoothly, or only seems to jump because its metric is hard.

A jump is claimed only if all of these hold for a continuous metric: an abrupt form beats the power law by 6 in AICc; it fits
better than any smooth curve by more than noise explains (p < 0.01, by simulating the best smooth curve); halves of the seeds
place it within an octave of each other; and it is an improvement. Where none is found, `detectable` says how large a jump
would have had to be.

Scores are (seeds, levels), one training run each; a seed is a chain that may move all of its levels together, which counts as
no noise. Works on plain arrays of any trainer's results. The ratio is g, an octave a doubling of g + 1.

Invariants: an affine change of the metric, with its direction, changes nothing but the units of the answer; equal scores and
seeds give equal answers.

Which test rows jump: rows whose loss falls in one step as general data grows, while the mean over rows may fall smoothly.

Invariant: rows are tested one by one and corrected together; an affine change of a row's losses changes its size, not its p.

What tests for a jump come to, in a word and a sentence, no surer than what such an experiment could have found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import false_discovery_control

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray, IntArray
from fulcrum.mechanism.curve_fits import (
    FORMS,
    RISE,
    Fit,
    Grid,
    Nearest,
    aicc,
    finite,
    fits,
    grid_of,
    least_rss,
    octaves,
)

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
    ratios: Sequence[float] | FloatArray,
    scores: FloatArray,
    *,
    higher_is_better: bool,
    draws: int = 1000,
    seed: int = 0,
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
    noise, moves, found = (
        float(np.sqrt(_noise(given[None]).mean())),
        float(np.ptp(means)),
        fits(ratios, means),
    )
    still = _still(given, noise)
    if len(x) < LEAST_LEVELS:
        nan, failed = float("nan"), ("levels", *(("seeds",) if n_seeds < 2 else ()))
        return JumpTest(
            levels,
            n_seeds,
            nan,
            nan,
            nan,
            (nan, nan),
            nan,
            nan,
            False,
            (nan, nan),
            False,
            failed,
            noise,
            moves,
            still,
            found,
        )
    _check_draws(draws)
    grid, sign = grid_of(tuple(x)), 1.0 if higher_is_better else -1.0
    tested = _test(sign * given[None], grid)
    rng = np.random.default_rng(seed)
    p = float(
        _p_values(tested.contrast, tested.null, tested.variance, grid, n_seeds, draws, rng)[0]
    )
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
        raise DataError(
            f"scores of shape {given.shape} for {n_levels} ratios: give (seeds, {n_levels}), one row for each seed"
        )
    finite("scores", given)
    return given


def _check_draws(draws: int) -> None:
    if 1 / (draws + 1) >= LEAST_P:
        raise DataError(
            f"draws: {draws} simulated curves cannot show p < {LEAST_P:g}; give 199 or more"
        )


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
    return float(
        f_distribution.sf(between / noise**2, n_levels - 1, (n_seeds - 1) * (n_levels - 1))
    )


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
        scored = np.minimum(
            scored,
            aicc(np.maximum(grid.breaks.nearest(means).rss, floor), n_levels, FORMS["break"]),
        )
    statistic = (
        aicc(np.maximum(grid.power.nearest(means).rss, floor), n_levels, FORMS["power"]) - scored
    )
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
        replicated = (
            same
            & (np.abs(halves[:, 0] - halves[:, 1]) <= REPLICATION + 1e-9)
            & (np.ptp(means, axis=1) > 0)
        )
    null = smooth.slope[:, None] * grid.smooth.unit[smooth.number]
    # Few seeds tell little of a level's own noise: it counts as much as `_SHRINK` degrees of freedom of all levels together.
    own = (n_seeds - 1) / (n_seeds - 1 + _SHRINK)
    variance = own * by_level + (1 - own) * pooled[:, None]
    misfit = smooth.rss / (n_levels - SHAPE)
    variance = variance * np.maximum(1, misfit / np.where(pooled > 0, pooled, np.inf))[:, None]
    variance = np.where(pooled[:, None] > 0, variance, misfit[:, None])
    return _Tested(statistic, contrast, abrupt, halves, replicated, null, variance)


def _contrast(
    smooth: FloatArray, abrupt: FloatArray, variance: FloatArray, floor: FloatArray, n_levels: int
) -> FloatArray:
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
        unit = (
            (variance * rng.chisquare(df, (draws, n_levels)) / df).mean(axis=1)
            if df
            else np.zeros(draws)
        )
        smooth, abrupt = grid.smooth.nearest(drawn).rss, grid.abrupt.nearest(drawn).rss
        contrast = _contrast(smooth, abrupt, unit, least_rss(drawn), n_levels)
        p[i] = (1 + int((contrast >= observed[i]).sum())) / (draws + 1)
    return p


def find_jumps(
    ratios: Sequence[float] | FloatArray,
    scores: FloatArray,
    *,
    draws: int = 199,
    seed: int = 0,
    every_p: bool = False,
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
    p[asked] = _p_values(
        tested.contrast[asked],
        tested.null[asked],
        tested.variance[asked],
        grid,
        given.shape[1],
        draws,
        rng,
    )
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
            raise DataError(
                f"{name} {value:g}: it must be a number from 0 up, in the metric's unit"
            )


@lru_cache(maxsize=64)
def _in_noise(
    ratios: tuple[float, ...], seeds: int, share: float, simulations: int, draws: int
) -> float:
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


SIDE = 2  # levels, at least, before and after a step
SLOPES = range(
    7
)  # of the null's line over all levels, in standard deviations; beyond, steps fit too badly to matter


@dataclass(frozen=True, slots=True, eq=False)
class RowJumps:
    """Which test rows jump, (rows,) each. `place` is the number of the level before the step, `size` its change in the loss
    (negative where it falls). `by_place` (levels - 1,) counts the rows that jump after each level. `wide` are the places whose
    two levels lie more than an octave apart: `unplaced` rows would jump there, but no step within an octave can be told.
    """

    p: FloatArray
    adjusted: FloatArray
    place: IntArray
    size: FloatArray
    jumps: BoolArray
    by_place: IntArray
    wide: tuple[int, ...]
    unplaced: int


def row_jumps(
    ratios: Sequence[float] | FloatArray,
    losses: FloatArray,
    *,
    level: float = 0.10,
    least: float = 0.5,
    draws: int = 100_000,
    seed: int = 0,
) -> RowJumps:
    """Find test rows whose loss (levels, rows), in nats per token and mean over seeds, falls in one step.

    For each row, one step between adjacent levels is compared with a line in log2(g + 1) by n log(RSS line / RSS step); two
    levels or more lie on each side, as one alone is an outlier as well as a step. The null is a line with Gaussian residuals.
    Their size cancels, so that one simulation serves all rows; the slope over it does not (with 3 deviations over all levels,
    1% of false alarms at a flat line become 3.5%), so that p is the largest over slopes. A row jumps where Benjamini and
    Hochberg (1995) reject at `level` over all rows, the step is a fall of at least `least`, and the levels around it are at
    most an octave of g + 1 apart. A row that does not vary has p 1. Raises DataError for what is no table of losses.
    """
    x = octaves(ratios)
    if len(x) < 2 * SIDE:
        raise DataError(
            f"{len(x)} ratios: a step needs {SIDE} levels on each side; measure at {2 * SIDE} ratios or more"
        )
    given = np.asarray(losses, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != len(x) or not given.shape[1]:
        raise DataError(
            f"losses of shape {given.shape} for {len(x)} ratios: give ({len(x)}, rows), a column for each row"
        )
    finite("losses", given)
    if not (0 < level < 1 and least >= 0 and draws >= 1):
        raise DataError(
            f"level {level:g}, least {least:g}, draws {draws}: give a share between 0 and 1, nats from 0 up, a number from 1 up"
        )
    statistic, place, size = _steps(x, given)
    at_least = np.max(
        [
            draws - np.searchsorted(null, statistic, side="left")
            for null in _nulls(tuple(x), draws, seed)
        ],
        axis=0,
    )
    p = np.where(np.isneginf(statistic), 1.0, (1 + at_least) / (draws + 1))
    adjusted = np.asarray(false_discovery_control(p, method="bh"))
    wide = np.diff(x) > 1 + 1e-9
    falls = (adjusted <= level) & (size <= -least)
    jumps = falls & ~wide[place]
    return RowJumps(
        p, adjusted, place, size, jumps, np.bincount(place[jumps], minlength=len(x) - 1),
        tuple(int(i) for i in np.flatnonzero(wide)), int((falls & wide[place]).sum()),
    )  # fmt: skip


@lru_cache(maxsize=4)  # for all arms and metrics at the same levels
def _nulls(x: tuple[float, ...], draws: int, seed: int) -> tuple[FloatArray, ...]:
    """The statistic of simulated lines, ascending, for each slope."""
    at = np.array(x)
    residuals = np.random.default_rng(seed).standard_normal((len(at), draws))
    rise = ((at - at[0]) / (at[-1] - at[0]))[:, None]
    return tuple(np.sort(_steps(at, residuals + slope * rise)[0]) for slope in SLOPES)


def _steps(x: FloatArray, values: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    """For each column of values (L, rows): the log likelihood ratio of step to line, the step's place, and its size."""
    n = len(x)
    centred = values - values.mean(axis=0)
    total = (centred**2).sum(axis=0)
    slope = x - x.mean()
    slope = slope / np.sqrt(slope @ slope)
    line = np.maximum(total - (slope @ centred) ** 2, 0.0)
    before = np.arange(1, n)[:, None]
    sums = np.cumsum(centred, axis=0)[:-1]
    explained = sums**2 * (1 / before + 1 / (n - before))
    place = np.argmax(explained[SIDE - 1 : n - SIDE], axis=0) + SIDE - 1
    columns = np.arange(values.shape[1])
    step = np.maximum(total - explained[place, columns], 0.0)
    size = -sums[place, columns] * (1 / (place + 1) + 1 / (n - place - 1))
    rounding = 1e-24 * n * np.abs(values).max(axis=0) ** 2 + 1e-300
    tiny = np.maximum(rounding, 1e-13 * total)
    statistic = n * np.log(np.maximum(line, tiny) / np.maximum(step, tiny))
    return (
        np.where(total <= rounding, -np.inf, statistic),
        place,
        np.where(total <= rounding, 0.0, size),
    )


MOVED = 0.05  # p of the F test below which the level means are said to differ


def verdict(
    continuous: JumpTest,
    hard: Mapping[str, JumpTest] | Sequence[JumpTest] = (),
    *,
    worth: float = 0.0,
) -> tuple[str, str]:
    """One of "jump", "smooth", "metric artefact", "not enough data", and a sentence that says why, with its numbers.

    `hard` are other metrics of the same runs that move in steps (exact match, accuracy): a jump in one of these alone is what
    thresholds make of a smooth curve (Schaeffer et al. 2023, arXiv 2304.15004). "jump" may be a worsening; the sentence then
    says so first. "not enough data": fewer than 7 levels or 2 seeds, or no jump found where one as large as all that the
    curve moves would be missed more often than found; unless the level means do not differ (F test) and one of `worth`, in the
    metric, would be found in 80%: a flat curve moves by noise alone, and may be known well.
    """
    named = (
        dict(hard)
        if isinstance(hard, Mapping)
        else {f"hard metric {i + 1}": test for i, test in enumerate(hard)}
    )
    n, seeds = len(continuous.ratios), continuous.seeds
    if n < LEAST_LEVELS or seeds < 2:
        return "not enough data", (
            f"{_flat(continuous)}{n} levels of general data and {seeds} seed{'s' * (seeds != 1)} can show no jump: it takes "
            f"{LEAST_LEVELS} levels, and 2 seeds that agree."
        )
    if continuous.abrupt:
        return "jump", _told(continuous)
    least = detectable(continuous.ratios, continuous.noise, seeds)
    chance = power(continuous.ratios, continuous.noise, seeds, continuous.moves)
    why = _why_not(continuous)
    if chance < 0.5 and not (continuous.still >= MOVED and least <= worth):
        return "not enough data", (
            f"{_flat(continuous)}No jump is shown ({why}), but one as large as all that the curve moves "
            f"({continuous.moves:.3g}) would be found in {chance:.0%} of such experiments only; one of {least:.3g} in 80%. "
            "More levels decide, or more seeds."
        )
    limit = (
        f"A jump of {least:.3g} between the middle levels, flat elsewhere, would be found in 80% of such experiments."
        if continuous.noise
        else "Seeds do not differ, so nothing can be said of what jump would be found."
    )
    artefacts = [f"{name} ({_at(test)})" for name, test in named.items() if test.abrupt]
    if artefacts:
        return "metric artefact", (
            f"{'; '.join(artefacts)} jump{'s' * (len(artefacts) == 1)}, but the continuous metric does not ({why}): the step "
            f"is the hard metric's, not the model's. {limit}"
        )
    if continuous.failed == (
        "AICc",
    ):  # a step on a slope, as a sigmoid has none to offer; the rule stands, the doubt is said
        return "smooth", (
            f"No jump is claimed ({why}), but an abrupt curve fits better than any smooth one, by more than noise: more levels "
            f"decide. {limit}"
        )
    return "smooth", f"{_flat(continuous)}General data makes no jump in this curve ({why}). {limit}"


def _flat(test: JumpTest) -> str:
    if not test.still >= MOVED:  # nan with one seed, which shows no noise to compare with
        return ""
    return f"No change with general data is shown (F test of the levels, p {_p(test.still)}). "


def _at(test: JumpTest) -> str:
    low, high = test.between
    return (
        f"{test.size:+.3g} at ratio {test.location:.3g}, between the measured {low:g} and {high:g}; "
        f"ΔAICc {test.statistic:.1f}, p {_p(test.p)}"
    )


def _told(test: JumpTest) -> str:
    kind = "An improvement by a jump" if test.improves else "A worsening jump"
    first, second = test.halves
    return (
        f"{kind}: {_at(test)}. Halves of the seeds place it at {first:.3g} and {second:.3g}. The score changes faster there "
        f"than any smooth curve that fits the other levels."
    )


def _why_not(test: JumpTest) -> str:
    """Every condition with its number, and what it lacks where it fails."""
    first, second = test.halves
    aicc_lacks = f", needs {LEAST_AICC:g} over the power law" if "AICc" in test.failed else ""
    p_lacks = f", needs below {LEAST_P:g} against smooth curves" if "p" in test.failed else ""
    told = [f"ΔAICc {test.statistic:.1f}{aicc_lacks}", f"p {_p(test.p)}{p_lacks}"]
    if "replication" in test.failed and test.moves:
        told.append(
            f"halves of the seeds do not agree on a place or a direction: ratio {first:.3g} and {second:.3g}"
        )
    return "; ".join(told)


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"
