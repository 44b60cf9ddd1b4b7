"""Find clusters of items that teach the same thing, by their gradients (quanta discovery).

Items (answer tokens or rows) whose gradients point the same way use the same skill (Michaud et al.
2023, "The quantization model of neural scaling", arXiv 2303.13506). Their affinity is 1 -
arccos(cosine) / pi: 0.5 for gradients that have nothing in common. Over many items that baseline
drowns small clusters, and skills have power-law frequencies. So clusters are sought in what
affinities have above a floor: that of the same gradients with random signs, on top of what all
items share. Then each cluster is nearly a component of its own, with an eigenvalue near 1 whatever
its size, and the eigenvalues fall after the last one.

Data: gradients (n, d), or sketches of them, one row an item.

Invariants: neither the lengths of gradients nor the order of items change what clusters there are;
a number of clusters is reported only if clusterings of halves of the items agree with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh, qr, svd

from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray, IntArray

FEWEST_ITEMS = 20  # that can be clustered
STABLE = 0.6  # adjusted Rand index from which clusters are stable
_CANDIDATES = 5  # numbers of clusters whose stability is measured
_TIE = 0.02  # adjusted Rand index, within which numbers of clusters are equally stable
# Quantile of the cosines of gradients with random signs from which two items have something in
# common.
_NOISE = 0.99
_NOISES = 3  # times signs are drawn
# Quantile of all cosines that all items share: true while fewer than 3/4 of the pairs are in
# clusters.
_SHARED = 0.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number of clusters that was tried."""

    k: int
    gap: float  # between its eigenvalue and the next
    stability: float  # mean adjusted Rand index with clusterings of halves of the items


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Clusters of n items, if any are stable.

    - `labels` (n,): each item's cluster, 0 the largest; None if none are stable
    - `k`: their number, or 0
    - `eigenvalues`: descending
    - `candidates`: the numbers that were tried, by descending k times gap
    - `stability`: of the chosen number
    - `floor`: the cosine from which two items have something in common
    """

    labels: IntArray | None
    k: int
    eigenvalues: FloatArray
    candidates: tuple[Candidate, ...]
    stability: float | None
    floor: float

    @property
    def sentence(self) -> str:
        """Return the result in plain words."""
        if self.labels is not None:
            sizes = np.bincount(self.labels)
            return (
                f"{self.k} clusters of {sizes.min()} to {sizes.max()} items; clusterings of halves "
                f"of the items agree with them (adjusted Rand index {self.stability:.2f})."
            )
        best = max(self.candidates, key=lambda candidate: candidate.stability)
        return (
            f"No stable clusters: the most stable of the numbers tried, {best.k}, has an adjusted "
            f"Rand index of {best.stability:.2f} with clusterings of halves of the items; {STABLE} "
            "is asked for."
        )


def affinity(gradients: npt.ArrayLike) -> FloatArray:
    """Return 1 - arccos(cosine) / pi of every two of n gradients (n, d), as an array (n, n).

    It is 0 for opposite gradients, 0.5 if they have nothing in common, and 1 for the same
    direction. Raises `DataError` if gradients are no table, a value is not finite, or a gradient is
    zero, which has no direction. The caller decides what to do about those.
    """
    return np.asarray(1 - np.arccos(_cosines(_unit(gradients))) / np.pi)


def spectrum(affinity: npt.ArrayLike, most: int) -> FloatArray:
    """Return the `most` largest eigenvalues of D^-1/2 A D^-1/2, descending; D has A's row sums.

    Raises `DataError` if A is not an affinity.
    """
    weights = np.asarray(affinity, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        raise DataError(
            f"affinity: shape {weights.shape}; it must be (n, n), as `clusters.affinity` makes it"
        )
    is_valid = np.isfinite(weights).all() and weights.min() >= 0
    if not (is_valid and np.allclose(weights, weights.T) and weights.any(1).all()):
        raise DataError(
            "affinity: it must be finite, symmetric, nowhere below 0 and in no row 0, as "
            "`clusters.affinity` makes it"
        )
    if not 1 <= most <= len(weights):
        raise DataError(
            f"most: {most}; an affinity of {len(weights)} items has 1 to {len(weights)} eigenvalues"
        )
    values, _ = _leading(weights, most)
    return values


def find(
    gradients: npt.ArrayLike, *, most: int | None = None, draws: int = 20, seed: int = 0
) -> Clusters:
    """Find clusters of items by their gradients (n, d), or sketches, and how many there are.

    This is spectral clustering of affinities above the floor, with each item tied to all others as
    loosely as noise would tie it (Amini et al. 2013, Annals of Statistics 41(4)). Labels come from
    pivoted QR (Damle, Minden and Ying 2019, Information and Inference 8(1)), not from k-means as in
    the paper's code: k-means splits small clusters and merges large ones if sizes differ much (on
    planted tasks of 12 to 854 items an adjusted Rand index of 0.69, and 1.00 with QR).

    Five numbers of clusters k are tried, those with the largest k (l_k - l_k+1): gaps of
    eigenvalues that follow a power law fall as 1 / k. They go up to `most` (by default a fifth of
    the items, and at most 100). Each is clustered anew on `draws` random halves of the items; in
    larger parts clusters of chance survive. The number whose mean adjusted Rand index with these is
    highest is chosen if that is `STABLE` or above; of equal ones (0.02) that of the largest k (l_k
    - l_k+1).

    Raises `DataError` as `affinity` does, and for fewer than `FEWEST_ITEMS` items.
    """
    unit = _unit(gradients)
    limit = _most_clusters(len(unit), most, draws)
    rng = np.random.default_rng(seed)
    weights, floor = _graph(unit, rng)
    values, vectors = _leading(weights, limit + 1)
    gaps = values[:-1] - values[1:]
    order = np.argsort(-gaps[1:] * np.arange(2, limit + 1), kind="stable")
    labels = {int(k): _labels(vectors[:, :k]) for k in order[:_CANDIDATES] + 2}
    agreement = _agreement(weights, labels, draws, rng)
    candidates = tuple(Candidate(k, float(gaps[k - 1]), agreement[k]) for k in labels)
    chosen = choose(candidates)
    if chosen is None:
        return Clusters(None, 0, values, candidates, None, floor)
    return Clusters(
        labels=_by_size(labels[chosen.k]),
        k=len(np.unique(labels[chosen.k])),
        eigenvalues=values,
        candidates=candidates,
        stability=chosen.stability,
        floor=floor,
    )


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the number of clusters that is stable enough; of equally stable ones the first."""
    best = max(candidate.stability for candidate in candidates)
    enough = max(STABLE, best - _TIE)
    for candidate in candidates:
        if candidate.stability >= enough:
            return candidate
    return None


def _most_clusters(n: int, most: int | None, draws: int) -> int:
    """Return how many clusters of n items are tried at most. Raise DataError if none can be."""
    if n < FEWEST_ITEMS:
        raise DataError(
            f"gradients: {n} items; clusters need at least {FEWEST_ITEMS}: take gradients of more "
            "rows or tokens"
        )
    limit = min(100, n // 5) if most is None else most
    if not 2 <= limit < n // 2 or draws < 2:
        raise DataError(
            f"most {limit}, draws {draws}: of {n} items 2 to {n // 2 - 1} clusters can be told, by "
            "2 draws or more"
        )
    return limit


def _agreement(
    weights: FloatArray, labels: dict[int, IntArray], draws: int, rng: np.random.Generator
) -> dict[int, float]:
    """Return the mean adjusted Rand index of clusterings, by k, with those of random halves."""
    from sklearn.metrics import adjusted_rand_score

    n = len(weights)
    indices: dict[int, list[float]] = {k: [] for k in labels}
    for _ in range(draws):
        half = rng.permutation(n)[: n // 2]
        _, vectors = _leading(weights[np.ix_(half, half)], max(labels))
        for k, whole in labels.items():
            indices[k].append(float(adjusted_rand_score(whole[half], _labels(vectors[:, :k]))))
    return {k: float(np.mean(values)) for k, values in indices.items()}


def _graph(unit: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """Return affinities above the floor (n, n), with the ties to all; and the floor, a cosine.

    Random signs leave the size of every entry as it is and take away what gradients have in common.
    """
    pairs = np.triu_indices(len(unit), 1)
    floors, ties = [], []
    for _ in range(_NOISES):
        noise = _cosines(unit * (2 * rng.integers(0, 2, unit.shape, dtype=np.int8) - 1))
        floors.append(float(np.quantile(noise[pairs], _NOISE)))
        ties.append(float(_above(noise, floors[-1]).mean()))
    cosines = _cosines(unit)
    shared = max(0.0, float(np.quantile(cosines[pairs], _SHARED)))
    floor = min(float(np.mean(floors)) + shared, 1 - 1e-9)
    return _above(cosines, floor) + max(float(np.mean(ties)), 1e-9), floor


def _above(cosines: FloatArray, floor: float) -> FloatArray:
    """Return twice what affinities have above that of the cosine `floor`; 0 on the diagonal."""
    excess: FloatArray = np.clip(np.arcsin(cosines) - np.arcsin(floor), 0, None) * (2 / np.pi)
    np.fill_diagonal(excess, 0)
    return excess


def _leading(weights: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """Return the `most` largest eigenvalues of normalised weights, descending, and vectors."""
    scale = weights.sum(axis=1) ** -0.5
    last = (len(weights) - most, len(weights) - 1)
    values, vectors = eigh(weights * scale[:, None] * scale, subset_by_index=last, overwrite_a=True)
    return values[::-1], vectors[:, ::-1]


def _labels(vectors: FloatArray) -> IntArray:
    """Return clusters (n,) of items by their k leading eigenvectors (n, k).

    Each item is turned to the nearest of k items that lie far apart.
    """
    far = qr(vectors.T, mode="r", pivoting=True)[1][: vectors.shape[1]]
    left, _, right = svd(vectors[far].T)
    return np.asarray(np.abs(vectors @ (left @ right)).argmax(axis=1))


def _by_size(labels: IntArray) -> IntArray:
    """Number the clusters from the largest down; of equal ones by their first items."""
    _, first, place, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    return np.argsort(np.lexsort((first, -sizes))).astype(np.int64)[place]


def _unit(gradients: npt.ArrayLike) -> FloatArray:
    """Return the gradients scaled to length 1. Raise DataError if one has no direction."""
    unit = np.array(gradients, dtype=np.float64)
    if unit.ndim != 2 or not unit.size:
        raise DataError(
            f"gradients: shape {unit.shape}; they must be (items, dimensions), one row an item"
        )
    largest = np.abs(unit).max(axis=1)  # nan or infinite if a value is
    problems = {
        "have values that are not finite": ~np.isfinite(largest),
        "are zero: no direction": largest == 0,
    }
    for problem, broken in problems.items():
        if broken.any():
            raise DataError(
                f"gradients: {int(broken.sum())} of {len(unit)} items {problem}, the first is item "
                f"{int(np.argmax(broken))}; leave these out"
            )
    unit /= largest[:, None]  # so that no square over- or underflows
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit


def _cosines(unit: FloatArray) -> FloatArray:
    cosines = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(cosines, 1)
    return cosines
