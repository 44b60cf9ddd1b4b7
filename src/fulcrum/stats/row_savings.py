"""Row savings: how many task rows an arm spares, from learning curves of several arms.

A *point* is an arm at a size (number of task rows; 0 for an untrained arm, which counts at every
size). All points are measured with the same seeds and on the same test groups. A seed is a whole
chain (subset of rows, order, initialisation) over all arms and sizes. Higher scores are better.

All intervals come from one set of draws of all points together (`draw`). Each draw repeats the
whole analysis: it selects the best arm without general data, makes curves monotone and inverts
them. A seed moves all points of its chain together, and so does a test group.

A percentile bootstrap over 5 seeds cannot leave their range and covers too seldom. So seeds and
groups are not resampled but multiplied by normal numbers over a common chi. Any contrast of means
then has its t interval (the fiducial sum of two, if seeds and groups both matter), and whatever is
computed from means inherits its spread.

Invariant: nothing is extrapolated. A factor beyond what the measured sizes can show is censored,
and a draw of it counts as infinite (or 0) in the quantiles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray
from fulcrum.stats.intervals import Interval

Point = tuple[str, int]  # arm, size in task rows

_CERTAIN = 0.95  # of the draws: an arm selected in as many is the reference beyond doubt


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Scores of P points.

    points: (P)
    by_seed: (P, seeds), test scores
    by_group: (P, P), covariance of the means over seeds, as far as it comes from test groups that
        could have been others
    groups: the number of equal groups that the test groups are worth
    dev: (P, seeds), the scores that arms are selected by
    tokens: (P,), of the task rows used
    shared: if each seed has its own test rows, what seeds have in common because they train on each
        other's, as a part of their variance; else 0
    """

    points: tuple[Point, ...]
    by_seed: FloatArray
    by_group: FloatArray
    groups: float
    dev: FloatArray
    tokens: FloatArray
    shared: float

    def index(self, point: Point) -> int:
        """Return the index of a point. Raises DataError if it was not measured."""
        if point not in self.points:
            raise DataError(
                f"{point[0]} was not measured at {point[1]} rows; measured: {_listed(self.points)}"
            )
        return self.points.index(point)

    def sizes(self, arms: Sequence[str]) -> list[int]:
        """Return the sizes at which some of the arms were measured, ascending."""
        return sorted({size for arm, size in self.points if arm in arms})


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Draws of all P points at once; row 0 is the estimate itself.

    score: (1 + draws, P), on test rows
    dev: (1 + draws, P)
    """

    measured: Measured
    score: FloatArray
    dev: FloatArray

    def of(self, arm: str, size: int) -> FloatArray:
        """Return the draws of one point: (1 + draws,)."""
        return self.score[:, self.measured.index((arm, size))]


class Reference(NamedTuple):
    """The best arm without general data at each size, selected anew in each draw.

    sizes: ascending
    score: (1 + draws, sizes)
    shares: size -> arm -> share of draws in which it was selected
    selected: size -> the arm that the estimate itself selects
    """

    sizes: tuple[int, ...]
    score: FloatArray
    shares: Mapping[int, Mapping[str, float]]
    selected: Mapping[int, str]

    @property
    def last(self) -> FloatArray:
        """Return its score at the largest size."""
        return self.score[:, -1]


class Factor(NamedTuple):
    """A row saving or row gain with its interval.

    An end of 0 lies below `least`, one of inf at or above `most`: it is censored.
    """

    estimate: float
    low: float
    high: float
    least: float
    most: float


def measure(
    outcomes: Mapping[Point, FloatArray],
    groups: Sequence[str],
    *,
    denominators: FloatArray | None = None,
    dev: Mapping[Point, Sequence[float] | FloatArray] | None = None,
    tokens: Mapping[Point, float] | None = None,
) -> Measured:
    """Summarise the outcomes by row (seeds, rows) of every point.

    A point's score is the sum of its outcomes over the sum of `denominators` (1 each). A row that
    was no test row at a seed is nan there, in all points. An untrained arm has one row of outcomes,
    which counts for all seeds. `dev` are scores by seed on rows that are not test rows; without
    them arms are selected by their test scores, which favours the reference.

    Raises DataError if points have different rows or seeds, there are no rows, or a value is not
    finite.
    """
    points = tuple(outcomes)
    if not points:
        raise DataError("no outcomes: an interval needs at least one point")
    n_seeds = max(map(len, outcomes.values()))
    row_weights = _row_weights(denominators, len(groups))
    tested = _tested_rows(outcomes, n_seeds, len(groups))
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = len(names)
    weights = np.empty((n_seeds, n_groups))
    for seed, is_test in enumerate(tested):
        weights[seed] = np.bincount(group_of_row, row_weights * is_test, n_groups)
    total = weights.sum(axis=1)
    by_seed = np.empty((len(points), n_seeds))
    residuals = np.zeros((len(points), n_seeds, n_groups))
    for number, point in enumerate(points):
        # One row of outcomes is broadcast to all seeds.
        values = np.where(tested, np.asarray(outcomes[point], dtype=np.float64), 0.0)
        broken = int((~np.isfinite(values)).sum())
        if broken:
            raise DataError(f"{_listed([point])}: {broken} outcomes are not finite")
        by_seed[number] = values.sum(axis=1) / total
        for seed, row in enumerate(values):  # the linearised ratio (Cochran 1977, 6.4)
            group_sums = np.bincount(group_of_row, row, n_groups)
            expected = by_seed[number, seed] * weights[seed]
            residuals[number, seed] = (group_sums - expected) / total[seed]
    # A group's own part in the mean hides its residual; the jackknife corrects for that.
    residuals /= np.maximum(1 - weights / total[:, None], 1e-12)
    return Measured(
        points=points,
        by_seed=by_seed,
        by_group=_between_groups(residuals),
        groups=_effective_groups(weights.max(axis=0)),
        dev=by_seed if dev is None else _repeat_by_seed(dev, points, n_seeds),
        tokens=_tokens(tokens or {}, points),
        shared=shared_variance(float(tested.sum(axis=1).mean()), len(groups)),
    )


def shared_variance(test: float, every: int) -> float:
    """Return test rows over training rows, if a seed tests on `test` of `every` rows; 0 if on all.

    Folds train on each other's test rows, so the variance of their mean is 1/K + test/train of the
    variance between them, not 1/K (Nadeau and Bengio 2003, "Inference for the Generalization
    Error", Machine Learning 52).
    """
    if test == every:
        return 0.0
    return test / (every - test)


def draw(measured: Measured, *, draws: int = 2000, seed: int = 0) -> Draws:
    """Draw all points together, for seeds and test groups that both could have been others.

    With one seed only the groups vary: the result is then *given this seed*. With one group nothing
    is known of others, and only the seeds vary.
    """
    n_seeds = measured.by_seed.shape[1]
    rng = np.random.default_rng(seed)
    score = np.repeat(measured.by_seed.mean(axis=1)[None], draws + 1, axis=0)
    dev = np.repeat(measured.dev.mean(axis=1)[None], draws + 1, axis=0)
    if n_seeds > 1:
        moves = rng.standard_normal((draws, n_seeds)) * _widening(rng, draws, n_seeds - 1)
        scale = np.sqrt((1 / n_seeds + measured.shared) / (n_seeds - 1))
        for target, values in ((score, measured.by_seed), (dev, measured.dev)):
            centred = values - values.mean(axis=1, keepdims=True)
            target[1:] += moves @ centred.T * scale
    if measured.groups > 1:
        normal = rng.standard_normal((draws, len(measured.points)))
        moves = normal * _widening(rng, draws, max(measured.groups - 1, 1.0))
        score[1:] += moves @ symmetric_root(measured.by_group)
    return Draws(measured, score, dev)


def symmetric_root(covariance: FloatArray) -> FloatArray:
    """Return the symmetric square root, which is unique; negative estimates count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = 10 * len(values) * np.finfo(np.float64).eps * max(values.max(initial=0), 0)
    root: FloatArray = (vectors * np.sqrt(np.where(values > rounding, values, 0))) @ vectors.T
    return root


def contrast(*parts: tuple[int, FloatArray]) -> FloatArray:
    """Return the sum of draws (1 + draws,) with their signs.

    It is 0 if only rounding is left, which differs between processors.
    """
    total: FloatArray = np.sum([sign * values for sign, values in parts], axis=0)
    rounding = 1e-9 * max(float(np.abs(values).max()) for _, values in parts)
    return np.where(np.abs(total) <= rounding, 0.0, total)


def interval(values: FloatArray, level: float = 0.95) -> Interval:
    """Return the estimate (the first value) and quantiles of the others, which may be infinite.

    The quantiles are nan if nothing varies.
    """
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2], method="nearest")
    # Rounding is no spread.
    if np.isfinite(values).all() and np.ptp(values) <= 1e-12 * np.abs(values).max():
        return Interval(float(values[0]), np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def p_value(values: FloatArray) -> float:
    """Return the two-sided p-value of "the difference is 0" from its draws, at least 1 / draws."""
    drawn = values[1:]
    tail = min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0)))
    return float(min(1.0, max(2 * tail, 1 / len(drawn))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several tasks (Holm 1979).

    Rejecting those up to a level keeps the share of families with any false rejection below it.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(scaled)
    return [float(p) for p in np.minimum(adjusted, 1.0)]


def curve(draws: Draws, arms: Sequence[str], n: int) -> Reference:
    """Return the reference as a curve over sizes, also beyond `n`, always of the same arms.

    If arms were measured at different sizes, the best of those at each size would rise and fall
    with which arms are among them. So only sizes count at which all arms were measured that were
    measured at `n`; unless one arm is the best at each of them in 95% of the draws: then it is the
    reference at all its own sizes.
    """
    points = draws.measured.points
    candidates = [arm for arm in arms if (arm, n) in points or (arm, 0) in points]
    trained = [arm for arm in candidates if (arm, n) in points]
    common = []
    for size in draws.measured.sizes(trained):
        if size > 0 and all((arm, size) in points for arm in trained):
            common.append(size)
    best = reference(draws, candidates, max(common, default=n), only=common or [n])
    leader = _certain_leader(best)
    if leader in trained:
        return reference(draws, [leader], max(draws.measured.sizes([leader])))
    return best


def reference(
    draws: Draws, arms: Sequence[str], n: int, *, only: Sequence[int] | None = None
) -> Reference:
    """Return the best of `arms` by dev score at every size up to `n`, or at those among `only`.

    If test scores select it, it is flattered: in the estimate by chance in the seeds, in a draw by
    that and by chance in the draw. How far the selected draws lie above those of the arm that the
    estimate selects says by how much, and they are moved back by both (as a pivotal bootstrap
    interval is: Davison and Hinkley 1997, "Bootstrap Methods and their Application", 5.2). The
    estimate stays the plain difference.

    Raises DataError if no arm was measured at `n`.
    """
    measured = draws.measured
    sizes = []
    for size in measured.sizes(arms):
        if 0 < size <= n and (only is None or size in only):
            sizes.append(size)
    if n not in sizes and any((arm, 0) in measured.points for arm in arms):
        sizes.append(n)  # an untrained arm counts there too
    if n not in sizes:
        raise DataError(
            f"none of {', '.join(arms)} was measured at {n} rows; "
            f"measured: {_listed(measured.points)}"
        )
    # Draws of two seeds have tails without a mean: they stay flattered, which makes gains harder to
    # show.
    is_flattered = measured.dev is measured.by_seed and measured.by_seed.shape[1] != 2
    score = []
    shares = {}
    selected = {}
    for size in sizes:
        candidates = _points_at(measured, arms, size)
        places = [measured.index(point) for point in candidates]
        best = draws.dev[:, places].argmax(axis=1)
        own = np.take_along_axis(draws.score[:, places], best[:, None], axis=1)[:, 0]
        if is_flattered:
            own[1:] -= 2 * (own[1:] - draws.score[1:, places[best[0]]]).mean()
        score.append(own)
        shares[size] = {arm: float(np.mean(best[1:] == k)) for k, (arm, _) in enumerate(candidates)}
        selected[size] = candidates[best[0]][0]
    return Reference(tuple(sizes), np.column_stack(score), shares, selected)


def is_beaten(
    draws: Draws, arm: str, references: Sequence[str], n: int, level: float = 0.95
) -> bool:
    """Return whether some reference is surely better than `arm` at `n` rows (Bonferroni).

    The best of several, selected by the very scores that it is judged by, is flattered; each by
    itself is not.
    """
    rivals = []
    for name in references:
        for point in ((name, n), (name, 0)):
            if point in draws.measured.points:
                rivals.append(point)
    level_of_each = 1 - (1 - level) / max(1, len(rivals))
    own = draws.of(arm, n)
    for rival in rivals:
        lead = interval(contrast((1, own), (-1, draws.of(*rival))), level_of_each)
        if lead.high < 0:
            return True
    return False


def monotone(values: FloatArray) -> FloatArray:
    """Return the nearest curves that do not fall, (draws, sizes).

    This is isotonic regression, by its max-min formula.
    """
    sums = np.pad(values.cumsum(axis=1), ((0, 0), (1, 0)))
    width = values.shape[1]
    fitted = np.full(values.shape, -np.inf)
    for first in range(width):
        # Means from `first` to each size at or after it, then the least over all later ends.
        lengths = np.arange(1, width - first + 1)
        means = (sums[:, first + 1 :] - sums[:, first, None]) / lengths
        least = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted[:, first:] = np.maximum(fitted[:, first:], least)
    return fitted


def reach(sizes: Sequence[float], curves: FloatArray, target: FloatArray) -> FloatArray:
    """Return the log of the smallest size at which each monotone curve is at its target.

    `curves` is (draws, sizes), `target` (draws,); curves are log-linear between sizes. The result
    is -inf if a curve is above the target at the smallest size already, and inf if it never reaches
    it: nothing is extrapolated.
    """
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    rounding = 1e-9 * np.maximum(np.abs(curves).max(axis=1), np.abs(target))
    n_below = (curves < (target - rounding)[:, None]).sum(axis=1)
    at_smallest = np.where(curves[:, 0] > target + rounding, -np.inf, logs[0])
    reached = np.where(n_below == 0, at_smallest, np.inf)
    inside = np.flatnonzero((n_below > 0) & (n_below < len(logs)))
    upper = n_below[inside]
    low = curves[inside, upper - 1]
    high = curves[inside, upper]
    part = np.minimum((target[inside] - low) / (high - low), 1.0)
    reached[inside] = logs[upper - 1] + part * (logs[upper] - logs[upper - 1])
    return reached


def row_saving(draws: Draws, arm: str, ref: Reference, *, tokens: bool = False) -> Factor:
    """Return N over the rows with which `arm` is as good as the reference with all N.

    A saving of 1.6 says that 40 of 64 rows would have sufficed. It is measured between 1 (below:
    not even all rows suffice) and N over the arm's smallest size; with `tokens`, in task tokens.
    """
    n = ref.sizes[-1]
    sizes = [size for size in draws.measured.sizes([arm]) if 0 < size <= n]
    if n not in sizes:
        raise DataError(
            f"{arm} was not measured at {n} rows; measured: {_listed(draws.measured.points)}"
        )
    units = [_unit(draws, arm, size, tokens) for size in sizes]
    own_curve = monotone(np.column_stack([draws.of(arm, size) for size in sizes]))
    saved = np.exp(np.log(units[-1]) - reach(units, own_curve, ref.last))
    return _factor(saved, 1.0, units[-1] / units[0])


def row_gain(draws: Draws, arm: str, size: int, ref: Reference, *, tokens: bool = False) -> Factor:
    """Return the rows that the reference needs to be as good as `arm` with `size`, over `size`.

    It is measured between the reference's smallest and largest size over `size`; with `tokens`, in
    task tokens.
    """
    own = _unit(draws, arm, size, tokens)
    units = [_unit(draws, _usual_arm(draws, ref, at), at, tokens) for at in ref.sizes]
    needed = np.exp(reach(units, monotone(ref.score), draws.of(arm, size)))
    return _factor(needed / own, units[0] / own, units[-1] / own)


def slope(ref: Reference, *, since: float = 0) -> Interval:
    """Return what the reference gains with each doubling of its rows, from size `since` on.

    It is fitted by least squares, and nan with one size. If its interval is not above 0, no factor
    is identifiable: any small difference would be worth any number of rows.
    """
    chosen = np.asarray(ref.sizes) >= since
    if chosen.sum() < 2:
        return Interval(np.nan, np.nan, np.nan)
    doublings = np.log2(ref.sizes)[chosen]
    centred = doublings - doublings.mean()
    return interval(ref.score[:, chosen] @ centred / (centred @ centred))


def slope_towards(ref: Reference, n: int) -> Interval:
    """Return the slope near `n` rows: over the reference's last sizes within a factor of 4."""
    sizes = tuple(size for size in ref.sizes if size <= n)
    since: float = n
    if len(sizes) > 1:
        since = min(n / 4, sizes[-2])
    return slope(Reference(sizes, ref.score[:, : len(sizes)], {}, {}), since=since)


def identifiable(ref: Reference, n: int) -> bool:
    """Return whether the reference clearly rises, as a whole and towards `n` rows.

    A row saving needs that. A reference that has levelled off is as good with few rows as with all:
    that an arm reaches it with few rows is then no merit of general data.
    """
    return slope(ref).low > 0 and slope_towards(ref, n).low > 0


def gain_identifiable(ref: Reference, size: int) -> bool:
    """Return whether the reference clearly rises, as a whole and from `size` rows on.

    That is where the gain of so many rows is read off.
    """
    return slope(ref).low > 0 and slope(ref, since=size).low > 0


def score_at(ref: Reference, rows: int) -> FloatArray | None:
    """Return draws of the reference's score with so many rows; None beyond its measured sizes.

    Between sizes it is log-linear.
    """
    if len(ref.sizes) < 2 or not ref.sizes[0] <= rows <= ref.sizes[-1]:
        return None
    logs = np.log(ref.sizes)
    curves = monotone(ref.score)
    wanted = np.log(rows)
    upper = int(np.clip(np.searchsorted(logs, wanted), 1, len(logs) - 1))
    part = (wanted - logs[upper - 1]) / (logs[upper] - logs[upper - 1])
    between: FloatArray = curves[:, upper - 1] + part * (curves[:, upper] - curves[:, upper - 1])
    return between


def contradict(a: Factor, b: Factor) -> bool:
    """Return whether the intervals of two factors do not overlap.

    Those of the loss and of the task's own metric may.
    """
    return a.low > b.high or b.low > a.high


def _listed(points: Sequence[Point]) -> str:
    return ", ".join(f"{arm} at {size}" for arm, size in points)


def _row_weights(denominators: FloatArray | None, n_rows: int) -> FloatArray:
    """Return the weight of each row, 1 unless `denominators` say otherwise."""
    weights = np.ones(n_rows)
    if denominators is not None:
        weights = np.asarray(denominators, dtype=np.float64)
    if not weights.size or not (np.isfinite(weights) & (weights > 0)).all():
        raise DataError(f"{len(weights)} test rows: every row needs a denominator above 0")
    return weights


def _tested_rows(outcomes: Mapping[Point, FloatArray], n_seeds: int, n_rows: int) -> BoolArray:
    """Return which rows (seeds, rows) are test rows at each seed; all points must agree."""
    tested = np.ones((n_seeds, n_rows), dtype=bool)
    first = None
    for point, values in outcomes.items():
        if np.shape(values) not in ((1, n_rows), (n_seeds, n_rows)):
            raise DataError(
                f"{_listed([point])}: outcomes of shape {np.shape(values)}, "
                f"expected ({n_seeds}, {n_rows})"
            )
        if len(values) != n_seeds:
            continue
        own = ~np.isnan(np.asarray(values, dtype=np.float64))
        if first is not None and (own != tested).any():
            raise DataError(
                f"{_listed([first])} and {_listed([point])} have other test rows at a seed"
            )
        tested = own
        first = point
    if not tested.any(axis=0).all():
        row = int(tested.any(axis=0).argmin()) + 1
        raise DataError(f"row number {row}: its outcomes are not finite at any seed")
    if not tested.any(axis=1).all():
        seed = int(tested.any(axis=1).argmin()) + 1
        raise DataError(f"seed number {seed} has no test rows")
    return tested


def _between_groups(residuals: FloatArray) -> FloatArray:
    """Return the covariance (P, P) of means over seeds that comes from groups.

    `residuals` are the jackknife residuals of groups (P, seeds, groups). What a group does at one
    seed alone is subtracted if it can be estimated: the spread between seeds holds it already.
    """
    n_points, n_seeds, n_groups = residuals.shape
    if n_groups < 2:
        return np.zeros((n_points, n_points))
    means = residuals.mean(axis=1)
    total = means @ means.T
    rounding = 1e-12 * np.abs(total).max()
    if n_seeds > 1:
        alone = (residuals - means[:, None]).reshape(n_points, -1)
        total -= alone @ alone.T / (n_seeds * (n_seeds - 1))
        # If each group was tested at one seed, nothing but rounding is left.
        total[np.abs(total) <= rounding] = 0.0
    covariance: FloatArray = total * (n_groups - 1) / n_groups
    return covariance


def _effective_groups(weights: FloatArray) -> float:
    """Return how many equal groups these (groups,) are worth: a few large ones are worth few."""
    return float((weights**2).sum() ** 2 / (weights**4).sum())


def _repeat_by_seed(
    dev: Mapping[Point, Sequence[float] | FloatArray], points: Sequence[Point], n_seeds: int
) -> FloatArray:
    rows = [np.resize(dev[point], n_seeds) for point in points]
    return np.array(rows, dtype=np.float64)


def _tokens(tokens: Mapping[Point, float], points: Sequence[Point]) -> FloatArray:
    """Return the task tokens of each point; its rows, if they are not known."""
    return np.array([tokens.get(point, float(point[1])) for point in points])


def _widening(rng: np.random.Generator, draws: int, df: float) -> FloatArray:
    """Draw what turns normal numbers into t numbers with `df` degrees of freedom: (draws, 1)."""
    widening: FloatArray = np.sqrt(df / rng.chisquare(df, size=(draws, 1)))
    return widening


def _certain_leader(ref: Reference) -> str | None:
    """Return the arm that is surely the best at every size, or None."""
    leaders = set()
    for shares in ref.shares.values():
        leader = max(shares, key=shares.__getitem__)
        if shares[leader] < _CERTAIN:
            return None
        leaders.add(leader)
    return leaders.pop() if len(leaders) == 1 else None


def _points_at(measured: Measured, arms: Sequence[str], size: int) -> list[Point]:
    """List the points of arms that count at a size: those of this size, and untrained arms."""
    points = []
    for arm in dict.fromkeys(arms):
        if (arm, size) in measured.points:
            points.append((arm, size))
        elif (arm, 0) in measured.points:
            points.append((arm, 0))
    return points


def _usual_arm(draws: Draws, ref: Reference, size: int) -> str:
    """Return the arm measured at `size` that was the reference there in most draws."""
    measured = draws.measured.points
    shares = {arm: share for arm, share in ref.shares[size].items() if (arm, size) in measured}
    if shares:
        return max(shares, key=shares.__getitem__)
    # The reference is untrained: any arm's rows of this size will do.
    return next(arm for arm, own_size in measured if own_size == size)


def _unit(draws: Draws, arm: str, size: int, tokens: bool) -> float:
    """Return a point's size, in task tokens if asked."""
    if not tokens:
        return float(size)
    return float(draws.measured.tokens[draws.measured.index((arm, size))])


def _factor(values: FloatArray, least: float, most: float) -> Factor:
    """Return a factor from its draws; if all lie below `least` (0), its ends do too."""
    if not values.any():
        return Factor(0.0, 0.0, 0.0, least, most)
    return Factor(*interval(values), least, most)
