"""Quanta discovery: which items teach the same thing, by their gradients, and whether general data helped where it is dense.

Items (answer tokens or rows) whose gradients point the same way use the same skill (Michaud et al. 2023, "The quantization
model of neural scaling", arXiv 2303.13506). Their affinity, 1 - arccos(cosine) / pi, is 0.5 for gradients that have nothing in
common; over many items that drowns small clusters, and skills have power-law frequencies. So clusters are sought in what
affinities have above a floor: that of the same gradients with random signs, on top of what all items share. Then each cluster
is nearly a component of its own, with an eigenvalue near 1 whatever its size, and the eigenvalues fall after the last one.

Invariants: neither the lengths of gradients nor the order of items matter to what clusters there are; a number of clusters is
only told if clusterings of halves of the items agree with it; nothing is left out without being counted.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh, qr, svd
from scipy.stats import norm, rankdata

from fulcrum.core.errors import DataError
from fulcrum.core.types import BoolArray, FloatArray, IntArray
from fulcrum.stats.intervals import Interval

Verdict = Literal["rises", "not shown", "not enough clusters", "no variation"]

FEWEST_ITEMS = 20  # of which clusters can be told
FEWEST_CLUSTERS = 5  # over which a trend can be told
STABLE = 0.6  # adjusted Rand index from which clusters are stable
LEVEL = 0.05  # below which a trend's p makes it one
_CANDIDATES = 5  # numbers of clusters whose stability is looked at
_TIE = 0.02  # adjusted Rand index, within which numbers of clusters are equally stable
_NOISE = 0.99  # quantile of the cosines of gradients with random signs from which two items have something in common
_NOISES = 3  # times signs are drawn
_SHARED = 0.25  # quantile of all cosines that all items share: holds while fewer than 3/4 of the pairs are inside clusters


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number of clusters: the gap after its eigenvalue, and the mean adjusted Rand index with clusterings of halves."""

    k: int
    gap: float
    stability: float


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """What was found: `labels` (n,) from 0, the largest cluster first, and their number `k`; None and 0 where none are stable.
    `eigenvalues` descend; `candidates` stand by descending k times gap; `stability` is that of the chosen one. `floor` is the
    cosine from which two items have something in common."""

    labels: IntArray | None
    k: int
    eigenvalues: FloatArray
    candidates: tuple[Candidate, ...]
    stability: float | None
    floor: float

    @property
    def sentence(self) -> str:
        """What was found, in plain words."""
        if self.labels is not None:
            sizes = np.bincount(self.labels)
            agree = f"clusterings of halves of the items agree with them (adjusted Rand index {self.stability:.2f})"
            return f"{self.k} clusters of {sizes.min()} to {sizes.max()} items; {agree}."
        best = max(self.candidates, key=lambda one: one.stability)
        return (
            f"No stable clusters: the most stable of the numbers tried, {best.k}, has an adjusted Rand index of "
            f"{best.stability:.2f} with clusterings of halves of the items; {STABLE} is asked for."
        )


def affinity(gradients: npt.ArrayLike) -> FloatArray:
    """1 - arccos(cosine) / pi of every two of n gradients (n, d): (n, n), from 0 (opposite) over 0.5 (nothing in common) to 1.

    Raises `DataError` where gradients are no table, a value is not finite, or a gradient is zero, which has no direction: to
    leave it out is for the caller, who knows what it belongs to.
    """
    return np.asarray(1 - np.arccos(_cosines(_unit(gradients))) / np.pi)


def spectrum(affinity: npt.ArrayLike, most: int) -> FloatArray:
    """The `most` largest eigenvalues of D^-1/2 A D^-1/2, descending; D has A's row sums. `DataError` where A is no affinity."""
    weights = np.asarray(affinity, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        raise DataError(
            f"affinity: shape {weights.shape}; it must be (n, n), as `clusters.affinity` makes it"
        )
    if (
        not np.isfinite(weights).all()
        or weights.min() < 0
        or not np.allclose(weights, weights.T)
        or not weights.any(1).all()
    ):
        raise DataError(
            "affinity: it must be finite, symmetric, nowhere below 0 and in no row 0, as `clusters.affinity` makes it"
        )
    if not 1 <= most <= len(weights):
        raise DataError(
            f"most: {most}; an affinity of {len(weights)} items has 1 to {len(weights)} eigenvalues"
        )
    return _leading(weights, most)[0]


def find(
    gradients: npt.ArrayLike, *, most: int | None = None, draws: int = 20, seed: int = 0
) -> Clusters:
    """Clusters of items by their gradients (n, d) or sketches of these, and how many there are.

    Spectral clustering of affinities above the floor, each item tied to all others as loosely as noise would tie it (Amini et
    al. 2013, Annals of Statistics 41(4)). Labels are those of pivoted QR (Damle, Minden and Ying 2019, Information and
    Inference 8(1)), not of k-means as in the paper's code: k-means splits small clusters and merges large ones where sizes
    differ much (on planted tasks of 12 to 854 items an adjusted Rand index of 0.69, where this has 1.00).

    The five numbers of clusters k that are tried have the largest k (l_k - l_k+1): gaps of eigenvalues that follow a power law
    fall as 1 / k. They are up to `most` (a fifth of the items and 100 at the most, where not given). Each is clustered anew on
    `draws` random halves of the items; in larger parts clusters of chance survive. The number whose mean adjusted Rand index
    with these is highest is chosen if that is `STABLE` or above; of equal ones (0.02) that of the largest k (l_k - l_k+1).

    Raises `DataError` as `affinity` does, and for fewer than `FEWEST_ITEMS` items.
    """
    from sklearn.metrics import adjusted_rand_score

    unit = _unit(gradients)
    n = len(unit)
    if n < FEWEST_ITEMS:
        raise DataError(
            f"gradients: {n} items; clusters need at least {FEWEST_ITEMS}: take gradients of more rows or tokens"
        )
    limit = min(100, n // 5) if most is None else most
    if not 2 <= limit < n // 2 or draws < 2:
        raise DataError(
            f"most {limit}, draws {draws}: of {n} items 2 to {n // 2 - 1} clusters can be told, by 2 draws or more"
        )
    rng = np.random.default_rng(seed)
    weights, floor = _graph(unit, rng)
    values, vectors = _leading(weights, limit + 1)
    gaps = values[:-1] - values[1:]
    tried = [
        int(k)
        for k in np.argsort(-gaps[1:] * np.arange(2, limit + 1), kind="stable")[:_CANDIDATES] + 2
    ]
    labels = {k: _labels(vectors[:, :k]) for k in tried}
    agreement: dict[int, list[float]] = {k: [] for k in tried}
    for _ in range(draws):
        half = rng.permutation(n)[: n // 2]
        vectors = _leading(weights[np.ix_(half, half)], max(tried))[1]
        for k in tried:
            agreement[k].append(
                float(adjusted_rand_score(labels[k][half], _labels(vectors[:, :k])))
            )
    candidates = tuple(
        Candidate(k, float(gaps[k - 1]), float(np.mean(agreement[k]))) for k in tried
    )
    one = choose(candidates)
    if one is None:
        return Clusters(None, 0, values, candidates, None, floor)
    return Clusters(
        _by_size(labels[one.k]),
        len(np.unique(labels[one.k])),
        values,
        candidates,
        one.stability,
        floor,
    )


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the number of clusters that is stable enough; of equally stable ones the first."""
    enough = max(STABLE, max(one.stability for one in candidates) - _TIE)
    return next((one for one in candidates if one.stability >= enough), None)


def _graph(unit: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """Affinities above the floor (n, n), with every item's tie to all, and the floor as a cosine. Random signs leave the size
    of every entry as it is and take away what gradients have in common."""
    pairs, floors, ties = np.triu_indices(len(unit), 1), [], []
    for _ in range(_NOISES):
        noise = _cosines(unit * (2 * rng.integers(0, 2, unit.shape, dtype=np.int8) - 1))
        floors.append(float(np.quantile(noise[pairs], _NOISE)))
        ties.append(float(_above(noise, floors[-1]).mean()))
    cosines = _cosines(unit)
    shared = max(0.0, float(np.quantile(cosines[pairs], _SHARED)))
    floor = min(float(np.mean(floors)) + shared, 1 - 1e-9)
    return _above(cosines, floor) + max(float(np.mean(ties)), 1e-9), floor


def _above(cosines: FloatArray, floor: float) -> FloatArray:
    """Twice what affinities have above that of a cosine of `floor`, and 0 below it and between an item and itself."""
    found: FloatArray = np.clip(np.arcsin(cosines) - np.arcsin(floor), 0, None) * (2 / np.pi)
    np.fill_diagonal(found, 0)
    return found


def _leading(weights: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """The `most` largest eigenvalues of normalised weights, descending, and their vectors (n, most)."""
    scale = weights.sum(axis=1) ** -0.5
    last = (len(weights) - most, len(weights) - 1)
    values, vectors = eigh(weights * scale[:, None] * scale, subset_by_index=last, overwrite_a=True)
    return values[::-1], vectors[:, ::-1]


def _labels(vectors: FloatArray) -> IntArray:
    """Clusters (n,) of items by their k leading eigenvectors (n, k): each is turned to the nearest of k items far apart."""
    far = qr(vectors.T, mode="r", pivoting=True)[1][: vectors.shape[1]]
    left, _, right = svd(vectors[far].T)
    return np.asarray(np.abs(vectors @ (left @ right)).argmax(axis=1))


def _by_size(labels: IntArray) -> IntArray:
    """The same clusters, named 0, 1, ... from the largest one down (of equal ones, that of the first item comes first)."""
    _, first, place, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    return np.argsort(np.lexsort((first, -sizes))).astype(np.int64)[place]


def _unit(gradients: npt.ArrayLike) -> FloatArray:
    found = np.array(gradients, dtype=np.float64)
    if found.ndim != 2 or not found.size:
        raise DataError(
            f"gradients: shape {found.shape}; they must be (items, dimensions), one row an item"
        )
    largest = np.abs(found).max(axis=1)  # nan or infinite where a value is
    for broken, what in (
        (~np.isfinite(largest), "have values that are not finite"),
        (largest == 0, "are zero: no direction"),
    ):
        if broken.any():
            what = f"{int(broken.sum())} of {len(found)} items {what}, the first is item {int(np.argmax(broken))}"
            raise DataError(f"gradients: {what}; leave these out")
    found /= largest[:, None]  # so that no square over- or underflows
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def _cosines(unit: FloatArray) -> FloatArray:
    found = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(found, 1)
    return found


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster of the density test: its items, how many of them are the task's, the share of general ones, and of its task
    items the mean gain and loss before training; None where there are none, or it was not given."""

    label: int
    size: int
    task_items: int
    density: float
    gain: float | None
    before: float | None


@dataclass(frozen=True, slots=True)
class DensityTest:
    """Whether the gain rises with general density. `rho`: Spearman's over `usable` clusters, with its 95% interval;
    `p` one-sided; `partial`, `partial_p`: the same with the loss before training held fixed. None where it cannot be told.
    """

    clusters: tuple[Cluster, ...]
    usable: int
    verdict: Verdict
    rho: Interval | None
    p: float | None
    partial: float | None
    partial_p: float | None
    sentence: str


def density_test(
    labels: npt.ArrayLike,
    is_general: npt.ArrayLike,
    is_task_item: npt.ArrayLike,
    gain: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    before: npt.ArrayLike | None = None,
    permutations: int = 10_000,
    seed: int = 0,
    fewest: int = 3,
) -> DensityTest:
    """Whether general data helped where it is dense: does a cluster's mean gain rise with its general density?

    All are (n,), by item; `gain` is the loss of SFT minus that of TELL, only looked at where `is_task_item`, as is `before`,
    the loss before training: what was hard can gain more. A cluster's density is the share of general items, each counted by
    its weight (1, if none are given). Clusters with `fewest` task items are used. p deals the densities anew to the clusters:
    all orders where these are at most `permutations`, else that many at random. The interval is Fisher's with the variance
    of Bonett and Wright (2000, Psychometrika 65). The partial one is of ranks, and its p deals anew the residuals of the
    densities' ranks (Freedman and Lane 1983). A trend over clusters is a correlation only: clusters differ in more than that.

    Raises `DataError` for other shapes, values that are not finite, an item that is both, or a weight that is not above 0.
    """
    names = _column("labels", labels)
    n = len(names)
    general, task = (
        _column("is_general", is_general, n) != 0,
        _column("is_task_item", is_task_item, n) != 0,
    )
    if (general & task).any():
        raise DataError(
            f"item {int(np.argmax(general & task))} is both general and the task's; it must be one, or neither"
        )
    gains = _column("gain", gain, n, task)
    losses = None if before is None else _column("before", before, n, task)
    shares = np.ones(n) if weights is None else _column("weights", weights, n)
    if not (shares > 0).all():
        raise DataError(
            f"weights: item {int(np.argmin(shares > 0))} has {shares.min():g}; a weight must be above 0"
        )
    if fewest < 1 or permutations < 1:
        raise DataError(f"fewest {fewest}, permutations {permutations}: both must be 1 or more")
    rows = []
    for name in np.unique(names):
        inside, own = names == name, (names == name) & task
        density = float(shares[inside & general].sum() / shares[inside].sum())
        mean = float(gains[own].mean()) if own.any() else None
        base = float(losses[own].mean()) if losses is not None and own.any() else None
        rows.append(Cluster(int(name), int(inside.sum()), int(own.sum()), density, mean, base))
    return _judge(tuple(rows), fewest, partial(_rises, permutations=permutations, seed=seed))


def _judge(
    rows: tuple[Cluster, ...], fewest: int, p_of: Callable[[FloatArray, FloatArray], float]
) -> DensityTest:
    used = [row for row in rows if row.task_items >= fewest]
    n = len(used)

    def untold(verdict: Verdict, why: str) -> DensityTest:
        return DensityTest(
            rows, n, verdict, None, None, None, None, f"{verdict.capitalize()}: {why}."
        )

    if n < FEWEST_CLUSTERS:
        have = f"{n} of {len(rows)} have {fewest} task items or more"
        return untold("not enough clusters", f"{have}, and a trend needs {FEWEST_CLUSTERS}")
    x, y, base = (
        _ranks([getattr(row, side) for row in used]) for side in ("density", "gain", "before")
    )
    if not x.any() or not y.any():
        return untold(
            "no variation",
            f"all {n} clusters have the same {'gain' if x.any() else 'general density'}",
        )
    rho, p = _correlation(x, y), p_of(x, y)
    z, half = (
        np.arctanh(np.clip(rho, -0.999, 0.999)),
        norm.ppf(0.975) * math.sqrt((1 + rho * rho / 2) / (n - 3)),
    )
    interval = Interval(rho, float(np.tanh(z - half)), float(np.tanh(z + half)))
    verdict: Verdict = "rises" if p < LEVEL else "not shown"
    what = "rises with a cluster's general-data density"
    sentence = f"The gain {what}" if verdict == "rises" else f"It is not shown that the gain {what}"
    sentence += f" (rho {rho:.2f}, 95% interval {interval.low:.2f} to {interval.high:.2f}, p {p:.3g}, {n} clusters)."
    held, held_p = None, None
    if used[0].before is not None:
        if (left := _residual(x, base)).any() and (right := _residual(y, base)).any():
            held, held_p = _correlation(left, right), p_of(left, right)
        told = (
            "nothing is left to compare"
            if held_p is None
            else "it does"
            if held_p < LEVEL
            else "that is not shown"
        )
        numbers = "" if held is None else f" (partial rho {held:.2f}, p {held_p:.3g})"
        sentence += f" With the loss before training held fixed {told}{numbers}."
    if n < len(rows):
        sentence += f" {len(rows) - n} clusters with fewer than {fewest} task items are not in it."
    sentence += (
        " This is a correlation over clusters only: it does not say that the density is the cause."
    )
    return DensityTest(rows, n, verdict, interval, p, held, held_p, sentence)


def _ranks(values: Sequence[float | None]) -> FloatArray:
    """Ranks less their mean; 0 where there are no values."""
    return np.asarray(
        rankdata([0.0 if value is None else value for value in values]) - (len(values) + 1) / 2
    )


def _residual(values: FloatArray, base: FloatArray) -> FloatArray:
    """What centred values have beyond their line over `base`; exactly 0 where that is nothing but rounding."""
    if not base.any():
        return values
    left: FloatArray = values - base * (values @ base) / (base @ base)
    return left if np.abs(left).max() > 1e-9 else np.zeros_like(left)


def _correlation(x: FloatArray, y: FloatArray) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def _rises(x: FloatArray, y: FloatArray, *, permutations: int, seed: int) -> float:
    """One-sided p: how often x dealt anew goes at least as much with y."""
    observed = float(x @ y) - 1e-9 * math.sqrt((x @ x) * (y @ y))  # equal sums differ by rounding
    if math.factorial(len(x)) <= permutations:
        return float(
            np.mean([np.array(dealt) @ y >= observed for dealt in itertools.permutations(x)])
        )
    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.tile(x, (permutations, 1)), axis=1) @ y
    return float((1 + np.sum(dealt >= observed)) / (1 + permutations))


def _column(
    name: str, given: npt.ArrayLike, n: int | None = None, used: BoolArray | None = None
) -> FloatArray:
    """Values by item (n,), finite where they are used."""
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 1 or not values.size or (n is not None and len(values) != n):
        raise DataError(
            f"{name}: shape {values.shape}; it must be {'(items,)' if n is None else (n,)}, a value for each item"
        )
    broken = ~np.isfinite(values) & (True if used is None else used)
    if broken.any():
        raise DataError(
            f"{name}: {int(broken.sum())} values are not finite, the first that of item {int(np.argmax(broken))}"
        )
    return values
