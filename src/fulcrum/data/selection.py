"""Order the general rows that arms may choose from, by what they are like.

`similar` prefers rows whose words are the task's (no model), `by_gradient` rows from which an
adapter would learn what it learns from the task's (`training.gradients` computes the gradients),
`diverse` takes rows of every kind. All see the task rows that an arm trains on and nothing else: no
dev or test row, no row beyond its size.

Invariant: an order holds every candidate once, so fewer rows are the beginning of more.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fulcrum.core.types import Example, FloatArray, IntArray
from fulcrum.data import filters

SCORED = 4  # times the rows wanted: so many of the most similar are compared by gradient
BUCKETS = 10_000  # of hashed word n-grams, as in DSIR
_CLUSTER_SIZE = 64  # candidates in a cluster, about
_DIMENSIONS = 64  # in which candidates are clustered


def similar(candidates: Sequence[Example], task_rows: Sequence[Example], seed: int) -> IntArray:
    """Order candidates by how much likelier their words are in the task's rows than in the pool.

    Returns (candidates,) indices, best first; words are hashed words and word pairs.

    Source: DSIR (Xie et al. 2023, arXiv 2302.03169), resampling without replacement by Gumbel
    noise. Two changes: a task of few rows says little about most words, so its distribution is an
    even mixture of its own words and those of all candidates. And DSIR's examples have one length;
    here a sum over words would prefer the shortest rows, so a weight is the mean over a row's words
    times the mean number of words.
    """
    counts = _counts(_texts(candidates))
    lengths = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1)
    pool = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel() + 1
    pool /= pool.sum()
    own = np.asarray(_counts(_texts(task_rows)).sum(axis=0), dtype=np.float64).ravel()
    target = pool
    if own.any():
        target = (own + own.sum() * pool) / (2 * own.sum())
    weights: FloatArray = (counts @ np.log(target / pool)) / lengths * lengths.mean()
    noise = np.random.default_rng(seed).gumbel(size=len(candidates))
    return np.argsort(-(weights + noise), kind="stable")


def diverse(candidates: Sequence[Example], seed: int) -> IntArray:
    """Order candidates so that every beginning takes equally from all clusters, while they last.

    Returns (candidates,) indices. Clusters are k-means over hashed TF-IDF words in a few latent
    dimensions (scikit-learn), of about `_CLUSTER_SIZE` rows each.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    order = np.random.default_rng(seed).permutation(len(candidates))
    clusters = len(candidates) // _CLUSTER_SIZE
    if clusters < 2:
        return order
    weighted = TfidfTransformer().fit_transform(_counts(_texts(candidates)))
    latent = normalize(TruncatedSVD(_DIMENSIONS, random_state=seed).fit_transform(weighted))
    labels = MiniBatchKMeans(clusters, random_state=seed, n_init=1).fit_predict(latent)
    return by_turns(labels[order], order)


def by_turns(labels: IntArray, order: IntArray) -> IntArray:
    """Take one candidate of every label, then a second one of each that has two, and so on.

    `labels` are those of the candidates in `order`, which also decides within a turn.
    """
    seen = Counter[int]()
    turns = np.empty(len(labels), dtype=np.int64)
    for place, label in enumerate(labels.tolist()):
        turns[place] = seen[label]
        seen[label] += 1
    return order[np.argsort(turns, kind="stable")]


def by_gradient(candidates: FloatArray, task_rows: FloatArray) -> IntArray:
    """Order candidates by the cosine of their gradients with the mean direction of the task's.

    Shapes: `candidates` (candidates, d), `task_rows` (rows, d); returns (candidates,) indices.
    Source: LESS (Xia et al. 2024, arXiv 2402.04333).
    """
    directions = _unit(candidates.astype(np.float32))
    target = _unit(task_rows.astype(np.float32)).mean(axis=0)
    return np.argsort(-(directions @ target), kind="stable")


def _unit(rows: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def _texts(rows: Sequence[Example]) -> tuple[str, ...]:
    return tuple("\n".join(message.content for message in row.messages) for row in rows)


@lru_cache(maxsize=4)
def _counts(texts: tuple[str, ...]) -> Any:
    """Count hashed words and word pairs of each text: a sparse (texts, BUCKETS) matrix."""
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
