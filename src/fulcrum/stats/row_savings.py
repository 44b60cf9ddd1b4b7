"""How far the task rows went: differences, row savings and row gains between arms' learning curves, with intervals.

A *point* is an arm at a size (number of task rows; 0 for an untrained arm, which stands at every size). Every point is
measured by the same seeds, each a whole chain (subset of rows, order, initialisation) over all arms and sizes, and on the same
test groups. Scores are higher-is-better throughout.

All intervals come from one set of draws of all points together (`draw`), in which everything is done anew: the best arm
without general data is selected, curves are made monotone and inverted. In a draw, a seed moves all points of its chain
together, and so does a test group. A percentile bootstrap over 5 seeds cannot leave their range and covers too seldom; so
seeds and groups are not resampled but multiplied by normal numbers over a common chi: any contrast of means then has its t
interval (the fiducial sum of two where seeds and groups both matter), and what is bent from means has what follows from that.

Invariant: nothing is extrapolated. A factor beyond what the measured sizes can show is censored, and a draw of it counts as
infinite (or 0) in the quantiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray
from fulcrum.stats.intervals import Interval

Point = tuple[str, int]  # arm, size in task rows


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Scores of P points: `by_seed` (P, seeds); `by_group` (P, P), the covariance of their means over seeds that comes of
    test groups which could have been others; `groups`, how many equal ones they are worth; `dev` (P, seeds), the scores that
    arms are selected by; `tokens` (P,) of the task rows used; `shared`, what seeds with test rows of their own have in
    common by training on each other's, as a part of their variance (0 where all have the same test rows).
    """

    points: tuple[Point, ...]
    by_seed: FloatArray
    by_group: FloatArray
    groups: float
    dev: FloatArray
    tokens: FloatArray
    shared: float

    def place(self, point: Point) -> int:
        """Index of a point; DataError where it was not measured."""
        if point not in self.points:
            raise DataError(
                f"{point[0]} was not measured at {point[1]} rows; measured: {_listed(self.points)}"
            )
        return self.points.index(point)

    def sizes(self, arms: Sequence[str]) -> list[int]:
        """The sizes at which some of the arms were measured, ascending."""
        return sorted({size for arm, size in self.points if arm in arms})


def _listed(points: Sequence[Point]) -> str:
    return ", ".join(f"{arm} at {size}" for arm, size in points)


def measure(
    outcomes: Mapping[Point, FloatArray],
    groups: Sequence[str],
    *,
    denominators: FloatArray | None = None,
    dev: Mapping[Point, Sequence[float] | FloatArray] | None = None,
    tokens: Mapping[Point, float] | None = None,
) -> Measured:
    """Summarise per-row outcomes (seeds, rows) of every point; a point's score is sum over sum of `denominators` (1 each).

    A row that was no test row at a seed is nan there, in all points. `dev` are scores by seed of rows that are not test rows;
    without them arms are selected by their test scores, which favours the reference. An untrained arm has one row of outcomes,
    which stands for all seeds. Raises DataError where points have different rows or seeds, where there are no rows, or where a
    value is not finite.
    """
    points = tuple(outcomes)
    if not points:
        raise DataError("no outcomes: an interval needs at least one point")
    n_seeds = max(len(values) for values in outcomes.values())
    sizes = (
        np.ones(len(groups)) if denominators is None else np.asarray(denominators, dtype=np.float64)
    )
    if not sizes.size or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise DataError(f"{len(sizes)} test rows: every row needs a denominator above 0")
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    tested = _tested(outcomes, n_seeds, len(groups))
    weights = np.array(
        [np.bincount(place, sizes * seen, len(names)) for seen in tested]
    )  # (seeds, groups)
    total = weights.sum(axis=1)
    by_seed, residuals = (
        np.empty((len(points), n_seeds)),
        np.zeros((len(points), n_seeds, len(names))),
    )
    for number, (point, given) in enumerate(outcomes.items()):
        values = np.where(
            tested, np.asarray(given, dtype=np.float64), 0.0
        )  # one row of outcomes stands for all seeds
        if not np.isfinite(values).all():
            raise DataError(
                f"{_listed([point])}: {int((~np.isfinite(values)).sum())} outcomes are not finite"
            )
        by_seed[number] = values.sum(axis=1) / total
        for k, row in enumerate(values):  # the linearised ratio (Cochran 1977, 6.4)
            residuals[number, k] = (
                np.bincount(place, row, len(names)) - by_seed[number, k] * weights[k]
            ) / total[k]
    selection = (
        by_seed
        if dev is None
        else np.array([np.resize(dev[point], n_seeds) for point in points], dtype=np.float64)
    )
    used = np.array([(tokens or {}).get(point, float(point[1])) for point in points])
    # A group's own part in the mean hides its residual (the jackknife puts that right), and large ones are worth few.
    residuals /= np.maximum(1 - weights / total[:, None], 1e-12)
    whole = weights.max(axis=0)
    worth = float((whole**2).sum() ** 2 / (whole**4).sum())
    return Measured(
        points,
        by_seed,
        _between_groups(residuals),
        worth,
        selection,
        used,
        shared_variance(float(tested.sum(axis=1).mean()), len(groups)),
    )


def shared_variance(test: float, every: int) -> float:
    """Test rows over training rows, where a seed has `test` rows of `every` as its own test rows; 0 where it has all.

    Folds train on each other's test rows, so that the variance of their mean is 1/K + test/train of that between them, not
    1/K (Nadeau and Bengio 2003, "Inference for the Generalization Error", Machine Learning 52).
    """
    return 0.0 if test == every else test / (every - test)


def _tested(outcomes: Mapping[Point, FloatArray], n_seeds: int, n_rows: int) -> BoolArray:
    """Which rows were test rows at each seed (seeds, rows); DataError where points do not agree."""
    tested, first = np.ones((n_seeds, n_rows), dtype=bool), None
    for point, given in outcomes.items():
        if np.shape(given) not in ((1, n_rows), (n_seeds, n_rows)):
            raise DataError(
                f"{_listed([point])}: outcomes of shape {np.shape(given)}, expected ({n_seeds}, {n_rows})"
            )
        if len(given) == n_seeds:
            own = ~np.isnan(np.asarray(given, dtype=np.float64))
            if first is not None and (own != tested).any():
                raise DataError(
                    f"{_listed([first])} and {_listed([point])} have other test rows at a seed"
                )
            tested, first = own, point
    if not tested.any(axis=0).all():
        raise DataError(
            f"row number {int(tested.any(axis=0).argmin()) + 1}: its outcomes are not finite at any seed"
        )
    if not tested.any(axis=1).all():
        raise DataError(f"seed number {int(tested.any(axis=1).argmin()) + 1} has no test rows")
    return tested


def _between_groups(residuals: FloatArray) -> FloatArray:
    """Covariance (P, P) of means over seeds, from each group's jackknife residuals (P, seeds, groups).

    What a group does at one seed alone is left out where it can be estimated: the spread between seeds holds it already.
    """
    n_seeds, n_groups = residuals.shape[1:]
    if n_groups < 2:
        return np.zeros((len(residuals), len(residuals)))
    means = residuals.mean(axis=1)
    total = means @ means.T
    rounding = 1e-12 * np.abs(total).max()
    if n_seeds > 1:
        alone = (residuals - means[:, None]).reshape(len(residuals), -1)
        total -= alone @ alone.T / (n_seeds * (n_seeds - 1))
        total[np.abs(total) <= rounding] = (
            0.0  # of groups that were tested at one seed each, nothing is left
        )
    covariance: FloatArray = total * (n_groups - 1) / n_groups
    return covariance


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Draws of all points at once, (1 + draws, P) each: `score` on test and `dev`. Row 0 is the estimate itself."""

    measured: Measured
    score: FloatArray
    dev: FloatArray

    def of(self, arm: str, size: int) -> FloatArray:
        """The draws of one point: (1 + draws,)."""
        return self.score[:, self.measured.place((arm, size))]


def draw(measured: Measured, *, draws: int = 2000, seed: int = 0) -> Draws:
    """Draw all points together, for seeds and test groups that both could have been others.

    With one seed only the groups vary: what follows is *given this seed*. With one group nothing is known of others, and only
    the seeds vary.
    """
    n_seeds = measured.by_seed.shape[1]
    rng = np.random.default_rng(seed)
    score = np.repeat(measured.by_seed.mean(axis=1)[None], draws + 1, axis=0)
    dev = np.repeat(measured.dev.mean(axis=1)[None], draws + 1, axis=0)
    if n_seeds > 1:
        moves = rng.standard_normal((draws, n_seeds)) * _widening(rng, draws, n_seeds - 1)
        for target, values in ((score, measured.by_seed), (dev, measured.dev)):
            centred = values - values.mean(axis=1, keepdims=True)
            target[1:] += (
                moves @ centred.T * np.sqrt((1 / n_seeds + measured.shared) / (n_seeds - 1))
            )
    if measured.groups > 1:
        moves = rng.standard_normal((draws, len(measured.points))) * _widening(
            rng, draws, max(measured.groups - 1, 1.0)
        )
        score[1:] += moves @ _root(measured.by_group)
    return Draws(measured, score, dev)


def _root(covariance: FloatArray) -> FloatArray:
    """The symmetric square root, which is unique; what estimation made negative is 0."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = 10 * len(values) * np.finfo(np.float64).eps * max(values.max(initial=0), 0)
    root: FloatArray = (vectors * np.sqrt(np.where(values > rounding, values, 0))) @ vectors.T
    return root


def _widening(rng: np.random.Generator, draws: int, df: float) -> FloatArray:
    """Normal numbers times this are t numbers with `df` degrees of freedom: (draws, 1)."""
    widening: FloatArray = np.sqrt(df / rng.chisquare(df, size=(draws, 1)))
    return widening


def contrast(*parts: tuple[int, FloatArray]) -> FloatArray:
    """Sum of draws (1 + draws,) with their signs; 0 where only rounding is left, which differs between processors."""
    total: FloatArray = np.sum([sign * values for sign, values in parts], axis=0)
    rounding = 1e-9 * max(float(np.abs(values).max()) for _, values in parts)
    return np.where(np.abs(total) <= rounding, 0.0, total)


def interval(values: FloatArray, level: float = 0.95) -> Interval:
    """Estimate (the first value) and quantiles of the others, which may be infinite; nan where nothing varies."""
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2], method="nearest")
    if (
        np.isfinite(values).all() and np.ptp(values) <= 1e-12 * np.abs(values).max()
    ):  # rounding is no spread
        return Interval(float(values[0]), np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def p_value(values: FloatArray) -> float:
    """Two-sided p-value of "the difference is 0" from its draws; never below one in their number."""
    drawn = values[1:]
    tail = min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0)))
    return float(min(1.0, max(2 * tail, 1 / len(drawn))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values over several tasks (Holm 1979): reject where at most the level, at which no more than that share of
    families has any false rejection."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(
        np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    )
    return [float(p) for p in np.minimum(adjusted, 1.0)]


class Reference(NamedTuple):
    """The best arm without general data at each size, selected anew in each draw: `score` (1 + draws, sizes)."""

    sizes: tuple[int, ...]
    score: FloatArray
    chosen: Mapping[
        int, Mapping[str, float]
    ]  # size -> arm -> share of draws in which it was selected
    picked: Mapping[int, str]  # size -> the arm that the estimate itself selects

    @property
    def last(self) -> FloatArray:
        """Its score with all rows."""
        return self.score[:, -1]


def curve(draws: Draws, arms: Sequence[str], n: int) -> Reference:
    """The reference as a curve over sizes, beyond `n` too: always of the same arms.

    Where arms stand at different sizes, the best of whatever is there would rise and fall with which arms are there. So only
    sizes count at which all stand that stand at `n`; unless one arm is the best at each of them in 95% of the draws: then it is
    the reference at all of its own sizes.
    """
    points = draws.measured.points
    there = [arm for arm in arms if (arm, n) in points or (arm, 0) in points]
    trained = [arm for arm in there if (arm, n) in points]
    common = [
        size
        for size in draws.measured.sizes(trained)
        if all((arm, size) in points for arm in trained) and size > 0
    ]
    found = reference(draws, there, max(common, default=n), only=common or [n])
    leaders = {
        max(shares, key=shares.__getitem__)
        for shares in found.chosen.values()
        if max(shares.values()) >= 0.95
    }
    certain = len(leaders) == 1 and all(
        max(shares.values()) >= 0.95 for shares in found.chosen.values()
    )
    leader = next(iter(leaders), "")
    if certain and leader in trained:
        return reference(draws, [leader], max(draws.measured.sizes([leader])))
    return found


def reference(
    draws: Draws, arms: Sequence[str], n: int, *, only: Sequence[int] | None = None
) -> Reference:
    """The best of `arms` at every size up to `n` (of `only` these), by dev score. Raises DataError where none was measured at
    `n`.

    Where test scores select it is flattered: in the estimate by what the seeds happened to be, in a draw by that and by what is
    drawn. How far the selected draws lie above those of the arm that the estimate selects says by how much, and they are moved
    back by both (as a pivotal bootstrap interval is: Davison and Hinkley 1997, "Bootstrap Methods and their Application",
    5.2); the estimate stays the plain difference.
    """
    sizes = [
        size
        for size in draws.measured.sizes(arms)
        if 0 < size <= n and (only is None or size in only)
    ]
    if n not in sizes and any((arm, 0) in draws.measured.points for arm in arms):
        sizes.append(n)  # an untrained arm stands there too
    if n not in sizes:
        raise DataError(
            f"none of {', '.join(arms)} was measured at {n} rows; measured: {_listed(draws.measured.points)}"
        )
    score, chosen, picked = [], {}, {}
    for size in sizes:
        at = {arm: at for arm in arms for at in (0, size) if (arm, at) in draws.measured.points}
        named, places = list(at), [draws.measured.place(point) for point in at.items()]
        best = draws.dev[:, places].argmax(axis=1)
        own = np.take_along_axis(draws.score[:, places], best[:, None], axis=1)[:, 0]
        # Draws of two seeds have tails without a mean: they stay flattered, which makes gains harder to show.
        if draws.measured.dev is draws.measured.by_seed and draws.measured.by_seed.shape[1] != 2:
            own[1:] -= 2 * (own[1:] - draws.score[1:, places[best[0]]]).mean()
        score.append(own)
        chosen[size] = {arm: float(np.mean(best[1:] == k)) for k, arm in enumerate(named)}
        picked[size] = named[best[0]]
    return Reference(tuple(sizes), np.column_stack(score), chosen, picked)


def beaten(draws: Draws, arm: str, references: Sequence[str], n: int, level: float = 0.95) -> bool:
    """Whether some reference is surely better than `arm` at `n` rows, allowing for there being several (Bonferroni).

    The best of several, selected by the very scores that it is judged by, is flattered; each by itself is not.
    """
    there = [
        at for name in references for at in ((name, n), (name, 0)) if at in draws.measured.points
    ]
    each = 1 - (1 - level) / max(1, len(there))
    own = draws.of(arm, n)
    return any(interval(contrast((1, own), (-1, draws.of(*at))), each).high < 0 for at in there)


def monotone(values: FloatArray) -> FloatArray:
    """The nearest curves that do not fall, (draws, sizes): isotonic regression, by its max-min formula."""
    sums = np.pad(values.cumsum(axis=1), ((0, 0), (1, 0)))
    width = values.shape[1]
    fitted = np.full(values.shape, -np.inf)
    for first in range(width):
        means = np.stack(
            [
                (sums[:, last + 1] - sums[:, first]) / (last + 1 - first)
                for last in range(first, width)
            ],
            axis=1,
        )
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[
            :, ::-1
        ]  # over all ends at or after each size
        fitted[:, first:] = np.maximum(fitted[:, first:], least)
    return fitted


def reach(sizes: Sequence[float], curves: FloatArray, target: FloatArray) -> FloatArray:
    """Log of the smallest size at which each curve (draws, sizes), monotone, is at `target` (draws,); log-linear in between.

    -inf where it is above it at the smallest size already, inf where it never is there: nothing is extrapolated.
    """
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    rounding = 1e-9 * np.maximum(np.abs(curves).max(axis=1), np.abs(target))
    first = (curves < (target - rounding)[:, None]).sum(
        axis=1
    )  # of the sizes, how many do not reach it
    found = np.where(
        first == 0, np.where(curves[:, 0] > target + rounding, -np.inf, logs[0]), np.inf
    )
    inside = np.flatnonzero((first > 0) & (first < len(logs)))
    upper = first[inside]
    low, high = curves[inside, upper - 1], curves[inside, upper]
    part = np.minimum((target[inside] - low) / (high - low), 1.0)
    found[inside] = logs[upper - 1] + part * (logs[upper] - logs[upper - 1])
    return found


class Factor(NamedTuple):
    """A row saving or row gain with its interval. 0 and inf stand for censored ends: below `least`, at or above `most`."""

    estimate: float
    low: float
    high: float
    least: float
    most: float


def row_saving(draws: Draws, arm: str, ref: Reference, *, tokens: bool = False) -> Factor:
    """N over the rows with which `arm` is as good as the reference with all N: 1.6 says that 40 of 64 rows would have sufficed.

    In task tokens with `tokens`. Measured between 1 (below: not even all rows suffice) and N over the arm's smallest size.
    """
    n = ref.sizes[-1]
    sizes = [size for size in draws.measured.sizes([arm]) if 0 < size <= n]
    if n not in sizes:
        raise DataError(
            f"{arm} was not measured at {n} rows; measured: {_listed(draws.measured.points)}"
        )
    units = _units(draws, arm, sizes, tokens)
    curve = monotone(np.column_stack([draws.of(arm, size) for size in sizes]))
    saved = np.exp(np.log(units[-1]) - reach(units, curve, ref.last))
    return _factor(saved, 1.0, units[-1] / units[0])


def row_gain(draws: Draws, arm: str, size: int, ref: Reference, *, tokens: bool = False) -> Factor:
    """The rows that the reference needs to be as good as `arm` is with `size` of them, over `size`.

    In task tokens with `tokens`. Measured between the smallest and the largest size of the reference over `size`.
    """
    own = _units(draws, arm, [size], tokens)[0]
    units = []
    for at, shares in ref.chosen.items():
        there = {
            name: share for name, share in shares.items() if (name, at) in draws.measured.points
        }
        there = there or {
            name: 0.0 for name, own_size in draws.measured.points if own_size == at
        }  # an untrained reference
        units += _units(draws, max(there, key=there.__getitem__), [at], tokens)
    needed = np.exp(reach(units, monotone(ref.score), draws.of(arm, size)))
    return _factor(needed / own, units[0] / own, units[-1] / own)


def _factor(values: FloatArray, least: float, most: float) -> Factor:
    """A factor from its draws; where all of them lie below `least` its ends do too, as they do beyond `most`."""
    estimate, low, high = (0.0, 0.0, 0.0) if not values.any() else interval(values)
    return Factor(estimate, low, high, least, most)


def _units(draws: Draws, arm: str, sizes: Sequence[int], tokens: bool) -> list[float]:
    return [
        float(draws.measured.tokens[draws.measured.place((arm, size))]) if tokens else float(size)
        for size in sizes
    ]


def slope(ref: Reference, *, since: float = 0) -> Interval:
    """Score that the reference gains with each doubling of its rows (least squares), from size `since` on; nan with one size.

    Where the interval is not above 0 no factor is identifiable: any small difference would be worth any number of rows.
    """
    chosen = np.asarray(ref.sizes) >= since
    if chosen.sum() < 2:
        return Interval(np.nan, np.nan, np.nan)
    doublings = np.log2(ref.sizes)[chosen]
    centred = doublings - doublings.mean()
    return interval(ref.score[:, chosen] @ centred / (centred @ centred))


def slope_towards(ref: Reference, n: int) -> Interval:
    """The slope where the reference comes to `n` rows: over its last sizes within a factor of 4."""
    sizes = tuple(size for size in ref.sizes if size <= n)
    below = Reference(sizes, ref.score[:, : len(sizes)], {}, {})
    return slope(below, since=min(n / 4, below.sizes[-2]) if len(below.sizes) > 1 else n)


def identifiable(ref: Reference, n: int) -> bool:
    """Whether the reference rises clearly, as a whole and where it comes to `n` rows, as a row saving needs.

    A reference that has levelled off is as good with few rows as with all: what it then takes few rows to reach is no merit
    of general data.
    """
    return slope(ref).low > 0 and slope_towards(ref, n).low > 0


def gain_identifiable(ref: Reference, size: int) -> bool:
    """Whether the reference rises clearly, as a whole and from `size` rows on, where the gain of so many rows is read off."""
    return slope(ref).low > 0 and slope(ref, since=size).low > 0


def at(ref: Reference, rows: int) -> FloatArray | None:
    """Draws of the reference's score with so many rows, between its measured sizes (log-linear); None beyond them."""
    if len(ref.sizes) < 2 or not ref.sizes[0] <= rows <= ref.sizes[-1]:
        return None
    logs, curves, at = np.log(ref.sizes), monotone(ref.score), np.log(rows)
    upper = int(np.clip(np.searchsorted(logs, at), 1, len(logs) - 1))
    part = (at - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
    between: FloatArray = curves[:, upper - 1] + part * (curves[:, upper] - curves[:, upper - 1])
    return between


def apart(a: Factor, b: Factor) -> bool:
    """Whether two factors' intervals contradict each other, as those of the loss and of the task's own metric may."""
    return a.low > b.high or b.low > a.high
