"""Find the test rows whose loss falls in one step as general data grows.

The mean over all rows may fall smoothly while single rows jump, each at its own ratio. Rows are
tested one by one, a step against a line, and corrected together for how many they are.

Data: losses (levels, rows), each the mean over seeds, in nats per token.

Invariant: an affine change of a row's losses changes the size of its step, not its p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import false_discovery_control

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray, IntArray
from fulcrum.mechanism.curve_fits import octaves, require_finite

SIDE = 2  # levels, at least, before and after a step
# Slopes of the line under the null, in standard deviations of the noise over all levels. At steeper
# ones a step fits too badly to matter.
SLOPES = range(7)


@dataclass(frozen=True, slots=True, eq=False)
class RowJumps:
    """Which test rows jump.

    - `p`, `adjusted` (rows,): p of the step against a line, and the same corrected for many rows
    - `place` (rows,): the number of the level before the step
    - `size` (rows,): the step's change in the loss, negative if it falls
    - `jumps` (rows,): whether the row jumps
    - `by_place` (levels - 1,): how many rows jump after each level
    - `wide`: places whose two levels are more than an octave apart
    - `unplaced`: how many rows would jump at such a place, where no step within an octave shows
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
    """Find test rows whose loss falls in one step.

    `losses` are (levels, rows), in nats per token, each the mean over seeds.

    A row jumps if the step is significant at `level` after the correction of Benjamini and Hochberg
    (1995) over all rows, the loss falls by at least `least`, and the levels around the step are at
    most an octave of g + 1 apart. A row that does not vary has p 1.

    For each row the best step between adjacent levels is compared with a line in log2(g + 1), by n
    log(RSS line / RSS step). At least two levels lie on each side, because one alone is an outlier
    as well as a step. The null is a line with Gaussian residuals. Their size cancels, so one
    simulation serves all rows. The line's slope does not: with 3 deviations over all levels, 1% of
    false alarms at a flat line become 3.5%. So p is the largest over slopes.

    Raises DataError for losses or settings that allow no test.
    """
    x = octaves(ratios)
    table = _loss_table(losses, x)
    if not (0 < level < 1 and least >= 0 and draws >= 1):
        raise DataError(
            f"level {level:g}, least {least:g}, draws {draws}: give a share between 0 and 1, nats "
            "from 0 up, a number from 1 up"
        )
    statistic, place, size = _best_steps(x, table)
    counts = []  # of simulated statistics that are as large, for each slope
    for null in _null_statistics(tuple(x), draws, seed):
        counts.append(draws - np.searchsorted(null, statistic, side="left"))
    p = np.where(np.isneginf(statistic), 1.0, (1 + np.max(counts, axis=0)) / (draws + 1))
    adjusted = np.asarray(false_discovery_control(p, method="bh"))
    is_wide = np.diff(x) > 1 + 1e-9
    falls = (adjusted <= level) & (size <= -least)
    jumps = falls & ~is_wide[place]
    return RowJumps(
        p=p,
        adjusted=adjusted,
        place=place,
        size=size,
        jumps=jumps,
        by_place=np.bincount(place[jumps], minlength=len(x) - 1),
        wide=tuple(int(i) for i in np.flatnonzero(is_wide)),
        unplaced=int((falls & is_wide[place]).sum()),
    )


def _loss_table(losses: FloatArray, x: FloatArray) -> FloatArray:
    """Return the losses as an array (levels, rows). Raise DataError if they are not that."""
    if len(x) < 2 * SIDE:
        raise DataError(
            f"{len(x)} ratios: a step needs {SIDE} levels on each side; measure at {2 * SIDE} "
            "ratios or more"
        )
    table = np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != len(x) or not table.shape[1]:
        raise DataError(
            f"losses of shape {table.shape} for {len(x)} ratios: give ({len(x)}, rows), a column "
            "for each row"
        )
    require_finite("losses", table)
    return table


@lru_cache(maxsize=4)  # for all arms and metrics at the same levels
def _null_statistics(x: tuple[float, ...], draws: int, seed: int) -> tuple[FloatArray, ...]:
    """Return, for each slope, the statistics of simulated lines, ascending."""
    at = np.array(x)
    residuals = np.random.default_rng(seed).standard_normal((len(at), draws))
    line = ((at - at[0]) / (at[-1] - at[0]))[:, None]
    nulls = []
    for slope in SLOPES:
        statistic, _, _ = _best_steps(at, residuals + slope * line)
        nulls.append(np.sort(statistic))
    return tuple(nulls)


def _best_steps(x: FloatArray, values: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    """Return the best step of each column of values (L, rows).

    That is: the log likelihood ratio of step to line, the step's place, and its size, (rows,) each.
    """
    n = len(x)
    centred = values - values.mean(axis=0)
    total = (centred**2).sum(axis=0)
    slope = x - x.mean()
    slope = slope / np.sqrt(slope @ slope)
    line_rss = np.maximum(total - (slope @ centred) ** 2, 0.0)

    before = np.arange(1, n)[:, None]
    sums = np.cumsum(centred, axis=0)[:-1]
    explained = sums**2 * (1 / before + 1 / (n - before))
    place = np.argmax(explained[SIDE - 1 : n - SIDE], axis=0) + SIDE - 1
    columns = np.arange(values.shape[1])
    step_rss = np.maximum(total - explained[place, columns], 0.0)
    size = -sums[place, columns] * (1 / (place + 1) + 1 / (n - place - 1))

    rounding = 1e-24 * n * np.abs(values).max(axis=0) ** 2 + 1e-300
    tiny = np.maximum(rounding, 1e-13 * total)
    statistic = n * np.log(np.maximum(line_rss, tiny) / np.maximum(step_rss, tiny))
    is_flat = total <= rounding
    return np.where(is_flat, -np.inf, statistic), place, np.where(is_flat, 0.0, size)
