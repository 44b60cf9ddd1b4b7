"""Clusters of gradients: literal affinities, planted clusters and noise."""

import numpy as np
import pytest
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray, IntArray
from fulcrum.mechanism import clusters

SIZES = (300, 120, 60, 40, 25, 15, 12)


def planted(
    sizes: tuple[int, ...], spread: float, *, d: int = 400, shared: float = 0.0, seed: int = 0
) -> tuple[FloatArray, IntArray]:
    """Gaussian clusters of given sizes around directions of their own, and `shared` times a
    direction of all."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = rng.normal(size=(len(sizes), d))
    return centres[labels] + spread * rng.normal(size=(len(labels), d)) + shared * rng.normal(
        size=d
    ), labels


class TestAffinity:
    def test_literal(self) -> None:
        found = clusters.affinity([[1, 0], [3, 0], [0, 2], [-5, 0], [1, 1]])
        expected = [
            [1, 1, 0.5, 0, 0.75],
            [1, 1, 0.5, 0, 0.75],
            [0.5, 0.5, 1, 0.5, 0.75],
            [0, 0, 0.5, 1, 0.25],
            [0.75, 0.75, 0.75, 0.25, 1],
        ]
        np.testing.assert_allclose(found, expected, atol=1e-7)

    def test_lengths_do_not_matter_however_far_apart(self) -> None:
        gradients, _ = planted((5, 5), 1.0, d=20)
        lengths = np.geomspace(1e-200, 1e200, 10)[:, None]
        np.testing.assert_allclose(
            clusters.affinity(gradients * lengths), clusters.affinity(gradients), atol=1e-7
        )

    @pytest.mark.parametrize(
        ("gradients", "message"),
        [
            (np.ones(5), r"gradients: shape \(5,\).*\(items, dimensions\)"),
            (np.ones((0, 5)), r"shape \(0, 5\)"),
            ([[1.0, 0], [0, 0], [0, 0]], "2 of 3 items are zero.*first is item 1; leave these out"),
            (
                [[1.0, 0], [0, 1], [0, np.nan]],
                "1 of 3 items have values that are not finite, the first is item 2",
            ),
            (
                [[np.inf, 0], [0, 1]],
                "1 of 2 items have values that are not finite, the first is item 0",
            ),
        ],
    )
    def test_what_has_no_direction_is_an_error(self, gradients: FloatArray, message: str) -> None:
        with pytest.raises(DataError, match=message):
            clusters.affinity(gradients)


class TestSpectrum:
    def test_components_have_an_eigenvalue_of_1_each(self) -> None:
        blocks = np.kron(np.eye(3), np.ones((2, 2)))
        np.testing.assert_allclose(clusters.spectrum(blocks, 4), [1, 1, 1, 0], atol=1e-12)

    def test_two_orthogonal_pairs(self) -> None:
        found = clusters.spectrum(clusters.affinity([[1, 0], [1, 0], [0, 1], [0, 1]]), 4)
        np.testing.assert_allclose(
            found, [1, 1 / 3, 0, 0], atol=1e-7
        )  # the baseline of 0.5 hides 2/3 of the structure

    @pytest.mark.parametrize(
        ("given", "most", "message"),
        [
            (np.ones((2, 3)), 1, r"shape \(2, 3\)"),
            (-np.ones((2, 2)), 1, "nowhere below 0"),
            (np.array([[1.0, 2], [3, 1]]), 1, "symmetric"),
            (np.diag([1.0, 0]), 1, "in no row 0"),
            (np.ones((3, 3)), 4, "most: 4; an affinity of 3 items"),
        ],
    )
    def test_errors(self, given: FloatArray, most: int, message: str) -> None:
        with pytest.raises(DataError, match=message):
            clusters.spectrum(given, most)


class TestFind:
    @pytest.mark.parametrize("shared", [0.0, 1.0])
    @pytest.mark.parametrize("spread", [1.0, 2.0])
    def test_planted_clusters_of_unequal_sizes(self, spread: float, shared: float) -> None:
        gradients, labels = planted(SIZES, spread, d=1000, shared=shared)
        found = clusters.find(gradients, draws=5)
        assert found.labels is not None
        assert found.k == 7
        assert found.candidates[0].k == 7
        np.testing.assert_array_equal(
            found.labels, labels
        )  # named from the largest down, as planted
        assert found.stability == pytest.approx(1)
        assert found.sentence.startswith(
            "7 clusters of 12 to 300 items; clusterings of halves of the items agree"
        )

    def test_power_law_frequencies(self) -> None:
        sizes = tuple(int(8 * (20 / place) ** 1.4) for place in range(1, 21))
        assert max(sizes) / min(sizes) > 60
        gradients, labels = planted(sizes, 1.5, d=500)
        found = clusters.find(gradients, draws=3)
        assert found.labels is not None
        assert (found.k, adjusted_rand_score(labels, found.labels)) == (20, 1.0)

    @pytest.mark.parametrize(("n", "d"), [(300, 4096), (500, 64), (1000, 512)])
    def test_noise_has_no_stable_clusters(self, n: int, d: int) -> None:
        found = clusters.find(np.random.default_rng(n).normal(size=(n, d)), draws=5)
        assert (found.labels, found.k, found.stability) == (None, 0, None)
        assert found.candidates
        assert found.sentence.startswith("No stable clusters: the most stable of the numbers tried")

    def test_one_direction_of_all_is_no_cluster(self) -> None:
        gradients, _ = planted((200,), 1.0)
        assert clusters.find(gradients, draws=5).k == 0

    def test_labels_are_those_of_scikit_learn(self) -> None:
        gradients, _ = planted(SIZES, 2.0)
        found = clusters.find(gradients, draws=2)
        weights, _ = clusters._graph(clusters._unit(gradients), np.random.default_rng(0))
        oracle = SpectralClustering(
            7, affinity="precomputed", assign_labels="cluster_qr", random_state=0
        ).fit_predict(weights)
        assert adjusted_rand_score(oracle, found.labels) == 1

    def test_order_and_lengths_do_not_matter(self) -> None:
        gradients, _ = planted(SIZES, 2.0)
        rng = np.random.default_rng(5)
        order = rng.permutation(len(gradients))
        moved = clusters.find(
            gradients[order] * rng.uniform(1e-3, 1e3, size=(len(order), 1)), draws=2
        )
        np.testing.assert_array_equal(moved.labels, clusters.find(gradients, draws=2).labels[order])

    def test_equal_seeds_give_equal_numbers(self) -> None:
        gradients, _ = planted((40, 20), 2.0)
        first, second = (
            clusters.find(gradients.astype(np.float32), draws=3, seed=1) for _ in range(2)
        )
        assert first.candidates == second.candidates

    def test_given_gradients_stay_as_they_are(self) -> None:
        gradients, _ = planted((15, 15), 0.5)
        copy = gradients.copy()
        clusters.find(gradients, draws=2)
        np.testing.assert_array_equal(gradients, copy)

    @pytest.mark.parametrize(
        ("n", "settings", "message"),
        [
            (19, {}, "19 items; clusters need at least 20: take gradients of more"),
            (20, {"most": 10}, "most 10, draws 20: of 20 items 2 to 9 clusters"),
            (20, {"most": 1}, "most 1"),
            (20, {"draws": 1}, "draws 1"),
        ],
    )
    def test_errors(self, n: int, settings: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            clusters.find(np.random.default_rng(0).normal(size=(n, 8)), **settings)
