"""Test whether general data helped in the clusters where it is dense.

Each item (answer token or row) has a cluster, is general, the task's or neither, and a gain: the
loss of SFT minus that of TELL. Does a cluster's mean gain rise with its share of general items?

Invariant: every cluster is in the result, and those that the test leaves out are counted.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray
from fulcrum.stats.intervals import Interval

Verdict = Literal["rises", "not shown", "not enough clusters", "no variation"]

FEWEST_CLUSTERS = 5  # that can show a trend
LEVEL = 0.05  # p below which a trend is shown


@dataclass(frozen=True, slots=True)
class Cluster:
    """What its items say of a cluster."""

    label: int
    size: int  # items
    task_items: int
    density: float  # share of general items, by weight
    gain: float | None  # mean of its task items; None if it has none
    before: float | None  # their mean loss before training; None if not given


@dataclass(frozen=True, slots=True)
class DensityTest:
    """Whether the gain rises with general density. None stands for what cannot be computed.

    - `clusters`: all of them
    - `usable`: how many have task items enough
    - `verdict`, `sentence`: the result
    - `rho`: Spearman's over the usable clusters, with its 95% interval
    - `p`: one-sided
    - `partial`, `partial_p`: the same with the loss before training held fixed
    """

    clusters: tuple[Cluster, ...]
    usable: int
    verdict: Verdict
    rho: Interval | None
    p: float | None
    partial: float | None
    partial_p: float | None
    sentence: str


def summarise(
    labels: npt.ArrayLike,
    is_general: npt.ArrayLike,
    is_task_item: npt.ArrayLike,
    gain: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    before: npt.ArrayLike | None = None,
) -> tuple[Cluster, ...]:
    """Return every cluster's density and mean gain. All arguments are (n,), by item.

    `gain` is the loss of SFT minus that of TELL, and `before` the loss before training: what was
    hard can gain more. Both are used only if `is_task_item`. A cluster's density is the share of
    general items, each counted by its weight (by default 1).

    Raises `DataError` for other shapes, values that are not finite, an item that is both general
    and the task's, or a weight that is not above 0.
    """
    names = _column("labels", labels)
    n = len(names)
    general = _column("is_general", is_general, n) != 0
    task = _column("is_task_item", is_task_item, n) != 0
    if (general & task).any():
        raise DataError(
            f"item {int(np.argmax(general & task))} is both general and the task's; it must be "
            "one, or neither"
        )
    gains = _column("gain", gain, n, task)
    losses = None if before is None else _column("before", before, n, task)
    shares = np.ones(n) if weights is None else _column("weights", weights, n)
    if not (shares > 0).all():
        raise DataError(
            f"weights: item {int(np.argmin(shares > 0))} has {shares.min():g}; a weight must be "
            "above 0"
        )
    clusters = []
    for name in np.unique(names):
        inside = names == name
        own = inside & task
        clusters.append(
            Cluster(
                label=int(name),
                size=int(inside.sum()),
                task_items=int(own.sum()),
                density=float(shares[inside & general].sum() / shares[inside].sum()),
                gain=_mean(gains, own),
                before=None if losses is None else _mean(losses, own),
            )
        )
    return tuple(clusters)


def density_test(
    clusters: tuple[Cluster, ...], *, permutations: int = 10_000, seed: int = 0, fewest: int = 3
) -> DensityTest:
    """Test whether the clusters' mean gain rises with their general density.

    Clusters with `fewest` task items are used. p deals the densities anew to the clusters: in all
    orders if these are at most `permutations`, else that many at random. The interval is Fisher's
    with the variance of Bonett and Wright (2000, Psychometrika 65). The partial correlation is of
    ranks, and its p deals anew the residuals of the densities' ranks (Freedman and Lane 1983).

    A trend over clusters is only a correlation: clusters differ in more than that. Raises
    `DataError` for settings below 1.
    """
    if fewest < 1 or permutations < 1:
        raise DataError(f"fewest {fewest}, permutations {permutations}: both must be 1 or more")

    def p_of(x: FloatArray, y: FloatArray) -> float:
        return _p_of_rise(x, y, permutations, seed)

    usable = [cluster for cluster in clusters if cluster.task_items >= fewest]
    n = len(usable)
    if n < FEWEST_CLUSTERS:
        have = f"{n} of {len(clusters)} have {fewest} task items or more"
        why = f"{have}, and a trend needs {FEWEST_CLUSTERS}"
        return _no_test(clusters, n, "not enough clusters", why)
    x = _ranks([cluster.density for cluster in usable])
    y = _ranks([cluster.gain for cluster in usable])
    if not x.any() or not y.any():
        what = "gain" if x.any() else "general density"
        return _no_test(clusters, n, "no variation", f"all {n} clusters have the same {what}")
    rho, p = _with_interval(_correlation(x, y), n), p_of(x, y)
    what = "rises with a cluster's general-data density"
    sentence = f"The gain {what}" if p < LEVEL else f"It is not shown that the gain {what}"
    sentence += (
        f" (rho {rho.estimate:.2f}, 95% interval {rho.low:.2f} to {rho.high:.2f}, p {p:.3g}, {n} "
        "clusters)."
    )
    partial, partial_p = None, None
    if usable[0].before is not None:
        partial, partial_p = _partial(x, y, _ranks([cluster.before for cluster in usable]), p_of)
        sentence += _partial_sentence(partial, partial_p)
    if n < len(clusters):
        fewer = len(clusters) - n
        sentence += f" {fewer} clusters with fewer than {fewest} task items are not in it."
    sentence += (
        " This is a correlation over clusters only: it does not say that the density is the cause."
    )
    return DensityTest(
        clusters=clusters,
        usable=n,
        verdict="rises" if p < LEVEL else "not shown",
        rho=rho,
        p=p,
        partial=partial,
        partial_p=partial_p,
        sentence=sentence,
    )


def _column(
    name: str, values: npt.ArrayLike, n: int | None = None, used: BoolArray | None = None
) -> FloatArray:
    """Return the values as an array (n,). Raise DataError if they are not that, or not finite.

    Only the `used` ones must be finite.
    """
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not column.size or (n is not None and len(column) != n):
        shape = "(items,)" if n is None else (n,)
        raise DataError(f"{name}: shape {column.shape}; it must be {shape}, a value for each item")
    broken = ~np.isfinite(column)
    if used is not None:
        broken &= used
    if broken.any():
        raise DataError(
            f"{name}: {int(broken.sum())} values are not finite, the first that of item "
            f"{int(np.argmax(broken))}"
        )
    return column


def _mean(values: FloatArray, chosen: BoolArray) -> float | None:
    return float(values[chosen].mean()) if chosen.any() else None


def _no_test(clusters: tuple[Cluster, ...], usable: int, verdict: Verdict, why: str) -> DensityTest:
    sentence = f"{verdict.capitalize()}: {why}."
    return DensityTest(clusters, usable, verdict, None, None, None, None, sentence)


def _with_interval(rho: float, n: int) -> Interval:
    z = np.arctanh(np.clip(rho, -0.999, 0.999))
    half = norm.ppf(0.975) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return Interval(rho, float(np.tanh(z - half)), float(np.tanh(z + half)))


def _partial(
    x: FloatArray,
    y: FloatArray,
    base: FloatArray,
    p_of: Callable[[FloatArray, FloatArray], float],
) -> tuple[float | None, float | None]:
    """Return the correlation of x and y with `base` held fixed, and its p, or None twice."""
    left, right = _residual(x, base), _residual(y, base)
    if not (left.any() and right.any()):
        return None, None
    return _correlation(left, right), p_of(left, right)


def _partial_sentence(partial: float | None, p: float | None) -> str:
    start = " With the loss before training held fixed"
    if partial is None or p is None:
        return f"{start} nothing is left to compare."
    shown = "it does" if p < LEVEL else "that is not shown"
    return f"{start} {shown} (partial rho {partial:.2f}, p {p:.3g})."


def _ranks(values: Sequence[float | None]) -> FloatArray:
    """Return ranks less their mean; 0 if there are no values."""
    numbers = [0.0 if value is None else value for value in values]
    return np.asarray(rankdata(numbers) - (len(values) + 1) / 2)


def _residual(values: FloatArray, base: FloatArray) -> FloatArray:
    """Return what centred values have beyond their line over `base`; 0 if that is only rounding."""
    if not base.any():
        return values
    left: FloatArray = values - base * (values @ base) / (base @ base)
    return left if np.abs(left).max() > 1e-9 else np.zeros_like(left)


def _correlation(x: FloatArray, y: FloatArray) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def _p_of_rise(x: FloatArray, y: FloatArray, permutations: int, seed: int) -> float:
    """Return the one-sided p: how often x, dealt anew, rises with y at least as much."""
    observed = float(x @ y) - 1e-9 * math.sqrt((x @ x) * (y @ y))  # equal sums differ by rounding
    if math.factorial(len(x)) <= permutations:
        as_much = [np.array(dealt) @ y >= observed for dealt in itertools.permutations(x)]
        return float(np.mean(as_much))
    rng = np.random.default_rng(seed)
    products = rng.permuted(np.tile(x, (permutations, 1)), axis=1) @ y
    return float((1 + np.sum(products >= observed)) / (1 + permutations))
