"""Which test rows jump: rows whose loss falls in one step as general data grows, while the mean over rows may fall smoothly.

Invariant: rows are tested one by one and corrected together; an affine change of a row's losses changes its size, not its p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import false_discovery_control

from fulcrum.errors import DataError
from fulcrum.records import BoolArray, FloatArray, IntArray
from fulcrum.scaling_fits import finite, octaves

SIDE = 2  # levels, at least, before and after a step
SLOPES = range(7)  # of the null's line over all levels, in standard deviations; beyond, steps fit too badly to matter


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
        raise DataError(f"{len(x)} ratios: a step needs {SIDE} levels on each side; measure at {2 * SIDE} ratios or more")
    given = np.asarray(losses, dtype=np.float64)
    if given.ndim != 2 or given.shape[0] != len(x) or not given.shape[1]:
        raise DataError(f"losses of shape {given.shape} for {len(x)} ratios: give ({len(x)}, rows), a column for each row")
    finite("losses", given)
    if not (0 < level < 1 and least >= 0 and draws >= 1):
        raise DataError(
            f"level {level:g}, least {least:g}, draws {draws}: give a share between 0 and 1, nats from 0 up, a number from 1 up"
        )
    statistic, place, size = _steps(x, given)
    at_least = np.max([draws - np.searchsorted(null, statistic, side="left") for null in _nulls(tuple(x), draws, seed)], axis=0)
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
    return np.where(total <= rounding, -np.inf, statistic), place, np.where(total <= rounding, 0.0, size)
