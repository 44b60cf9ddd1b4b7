"""Which general rows, of many that may stand beside a task: the order in which candidates are taken, by what they are like.

`similar` asks for rows whose words are the task's (no model), `gradient` for rows from which an adapter would learn what it
learns from the task's (`probe` computes them), `diverse` for rows of every kind there is. All see the task rows that an arm
trains on and nothing else: no dev or test row, no row beyond its size.

Invariant: an order holds every candidate once, so that fewer rows are the beginning of more.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fulcrum.core.types import Example, FloatArray, IntArray
from fulcrum.data import filters

SCORED = 4  # of the most similar candidates so many times the rows wanted are compared by gradient
BUCKETS = 10_000  # of hashed word n-grams, as in DSIR
_CLUSTER = 64  # candidates in a cluster, about
_WIDTH = 64  # dimensions in which candidates are clustered


def similar(candidates: Sequence[Example], task_rows: Sequence[Example], seed: int) -> IntArray:
    """Order candidates by importance: how much likelier their hashed words and word pairs are in the task's rows than among the
    candidates. (candidates,) indices, best first.

    Source: DSIR (Xie et al. 2023, arXiv 2302.03169), resampling without replacement by Gumbel noise. A task of few rows says
    little of most words; so its distribution is that of all candidates, counted as much as its own words, and its words. DSIR's
    examples are of one length; these are not, and a sum over words would take the shortest: so weights are means over a row's
    words and pairs, times the mean number of these.
    """
    counts = _counts(_texts(candidates))
    lengths = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1)
    pool = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel() + 1
    pool /= pool.sum()
    own = np.asarray(_counts(_texts(task_rows)).sum(axis=0), dtype=np.float64).ravel()
    target = (own + own.sum() * pool) / (2 * own.sum()) if own.any() else pool
    weights: FloatArray = (counts @ np.log(target / pool)) / lengths * lengths.mean()
    noise = np.random.default_rng(seed).gumbel(size=len(candidates))
    return np.argsort(-(weights + noise), kind="stable")


def diverse(candidates: Sequence[Example], seed: int) -> IntArray:
    """Order candidates so that every beginning holds as many of each cluster of them as can be: (candidates,) indices.

    Clusters are k-means over hashed TF-IDF words in a few latent dimensions (scikit-learn), of some `_CLUSTER` rows each.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    order = np.random.default_rng(seed).permutation(len(candidates))
    clusters = len(candidates) // _CLUSTER
    if clusters < 2:
        return order
    weighted = TfidfTransformer().fit_transform(_counts(_texts(candidates)))
    latent = normalize(TruncatedSVD(_WIDTH, random_state=seed).fit_transform(weighted))
    labels = MiniBatchKMeans(clusters, random_state=seed, n_init=1).fit_predict(latent)
    return by_turns(labels[order], order)


def by_turns(labels: IntArray, order: IntArray) -> IntArray:
    """One candidate of every label, then a second one of each that has two, and so on; within these as in `order`."""
    seen: dict[int, int] = {}
    turns = np.empty(len(labels), dtype=np.int64)
    for place, label in enumerate(labels.tolist()):
        turns[place] = seen[label] = seen.get(label, -1) + 1
    return order[np.argsort(turns, kind="stable")]


def by_gradient(candidates: FloatArray, task_rows: FloatArray) -> IntArray:
    """Order candidates by the cosine of their gradients (candidates, d) with the mean direction of the task's (rows, d).

    Source: LESS (Xia et al. 2024, arXiv 2402.04333).
    """

    def unit(rows: FloatArray) -> FloatArray:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1)

    likeness = unit(candidates.astype(np.float32)) @ unit(task_rows.astype(np.float32)).mean(axis=0)
    return np.argsort(-likeness, kind="stable")


def _texts(rows: Sequence[Example]) -> tuple[str, ...]:
    return tuple("\n".join(message.content for message in row.messages) for row in rows)


@lru_cache(maxsize=4)
def _counts(texts: tuple[str, ...]) -> Any:
    """Hashed words and word pairs of each text: a sparse (texts, BUCKETS) matrix."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        n_features=BUCKETS,
        ngram_range=(1, 2),
        tokenizer=filters.words,
        token_pattern=None,
        alternate_sign=False,
        norm=None,
        lowercase=False,
    )
    return hashing.transform(texts)
