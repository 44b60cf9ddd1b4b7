"""Clusters of gradients: literal affinities, planted clusters and noise; the density test against
scipy and planted trends."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray, IntArray
from fulcrum.mechanism import clusters
from fulcrum.mechanism.clusters import DensityTest

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


def by_cluster(
    densities: list[float],
    gains: list[float],
    before: list[float] | None = None,
    *,
    task_items: int = 4,
    **settings: int,
) -> DensityTest:
    """The test of clusters that have `task_items` task items each, and so many general ones that
    densities are as given."""
    labels, general, gain, base = [], [], [], []
    for label, (density, mean) in enumerate(zip(densities, gains, strict=True)):
        others = round(task_items * density / (1 - density))
        labels += [label] * (task_items + others)
        general += [False] * task_items + [True] * others
        gain += [mean] * task_items + [
            np.nan
        ] * others  # general items have no gain, and none is looked at
        base += [before[label] if before else 0.0] * task_items + [np.nan] * others
    task = ~np.array(general)
    return clusters.density_test(
        labels, general, task, gain, before=base if before else None, **settings
    )


DENSITIES = [0.0, 0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 0.8]


class TestDensity:
    def test_a_planted_rise(self) -> None:
        found = by_cluster(DENSITIES, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
        assert found.verdict == "rises"
        assert found.rho is not None
        assert found.rho.estimate == pytest.approx(1)
        assert found.p == pytest.approx(1 / 10_001, abs=3e-4)
        assert (found.usable, found.partial) == (8, None)
        assert found.sentence.startswith(
            "The gain rises with a cluster's general-data density (rho 1.00"
        )
        assert found.sentence.endswith(
            "This is a correlation over clusters only: it does not say that the density is the "
            "cause."
        )
        np.testing.assert_allclose([row.density for row in found.clusters], DENSITIES)
        assert [row.size for row in found.clusters] == [4, 5, 6, 8, 10, 12, 16, 20]
        assert {row.task_items for row in found.clusters} == {4}

    def test_a_fall_is_no_rise(self) -> None:
        found = by_cluster(DENSITIES, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
        assert (found.verdict, found.p) == ("not shown", pytest.approx(1))
        assert found.sentence.startswith(
            "It is not shown that the gain rises with a cluster's general-data density (rho -1.00"
        )

    def test_scipy_agrees(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            gains = rng.integers(0, 4, size=8).astype(float).tolist()  # with ties
            found = by_cluster(DENSITIES, gains, permutations=10)
            assert found.rho is not None
            assert found.rho.estimate == pytest.approx(spearmanr(DENSITIES, gains).statistic)
            assert found.rho.low < found.rho.estimate < found.rho.high

    def test_few_clusters_are_dealt_in_all_orders(self) -> None:
        gains = [0.2, 0.1, 0.3, 0.5, 0.4]
        found = by_cluster(DENSITIES[:5], gains)
        observed = spearmanr(DENSITIES[:5], gains).statistic
        every = [
            spearmanr(dealt, gains).statistic >= observed - 1e-9
            for dealt in itertools.permutations(DENSITIES[:5])
        ]
        assert found.p == pytest.approx(np.mean(every))

    def test_p_is_right_without_a_trend(self) -> None:
        rng = np.random.default_rng(1)
        p = [
            by_cluster(DENSITIES, rng.normal(size=8).tolist(), permutations=200, seed=k).p
            for k in range(300)
        ]
        assert np.mean(np.array(p, float) < 0.05) < 0.09  # 0.05 and three standard errors

    def test_what_is_due_to_the_loss_before_is_told(self) -> None:
        before = [1.0, 2, 3, 4, 5, 6, 7, 8]
        noise = np.random.default_rng(3).permutation(8) - 3.5
        order = np.argsort(np.array(before) + 0.6 * noise)
        gains = [float(np.flatnonzero(order == k)[0]) for k in range(8)]
        densities = [DENSITIES[k] for k in (1, 0, 3, 2, 5, 4, 7, 6)]
        found = by_cluster(densities, gains, before)
        assert found.partial == pytest.approx(partial(densities, gains, before))
        assert found.partial_p is not None
        assert found.rho is not None
        assert abs(found.partial) < found.rho.estimate
        assert "With the loss before training held fixed" in found.sentence

    def test_nothing_is_left_where_the_loss_before_says_it_all(self) -> None:
        gains = [1.0, 2, 3, 4, 5, 6, 7, 8]
        found = by_cluster(DENSITIES, gains, gains)
        assert (found.verdict, found.partial, found.partial_p) == ("rises", None, None)
        assert "held fixed nothing is left to compare" in found.sentence

    def test_weights_change_densities(self) -> None:
        labels, general = [0, 0, 0, 0], [True, True, False, False]
        found = clusters.density_test(
            labels, general, np.logical_not(general), np.zeros(4), weights=[3, 3, 1, 1]
        )
        assert found.clusters[0].density == 0.75

    def test_too_few_clusters(self) -> None:
        found = by_cluster(DENSITIES[:4], [1.0, 2, 3, 4])
        assert (found.verdict, found.rho, found.p) == ("not enough clusters", None, None)
        assert (
            found.sentence
            == "Not enough clusters: 4 of 4 have 3 task items or more, and a trend needs 5."
        )
        few = by_cluster(DENSITIES, DENSITIES, task_items=2)
        assert (
            few.sentence
            == "Not enough clusters: 0 of 8 have 3 task items or more, and a trend needs 5."
        )

    def test_clusters_without_task_items_are_counted(self) -> None:
        labels = np.concatenate([np.repeat(np.arange(6), 4), [6, 6]])
        general = np.tile([False, False, True, False], 7)[: len(labels)]
        general[-2:] = True
        general[:4] = False
        gain = labels.astype(float)
        found = clusters.density_test(labels, general, ~general, gain)
        assert (found.usable, found.clusters[6].gain) == (6, None)
        assert "1 clusters with fewer than 3 task items are not in it." in found.sentence

    @pytest.mark.parametrize(
        ("densities", "gains", "what"),
        [([0.5] * 6, [1.0, 2, 3, 4, 5, 6], "general density"), (DENSITIES, [1.0] * 8, "gain")],
    )
    def test_no_variation(self, densities: list[float], gains: list[float], what: str) -> None:
        found = by_cluster(densities, gains)
        assert found.verdict == "no variation"
        assert found.sentence == f"No variation: all {len(gains)} clusters have the same {what}."

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": []}, r"labels: shape \(0,\); it must be \(items,\)"),
            ({"gain": [0.0]}, r"gain: shape \(1,\); it must be \(4,\)"),
            (
                {"gain": [0, 0, np.nan, 0]},
                "gain: 1 values are not finite, the first that of item 2",
            ),
            (
                {"before": [0, 0, 0, np.inf]},
                "before: 1 values are not finite, the first that of item 3",
            ),
            ({"is_task_item": [0, 1, 1, 1]}, "item 1 is both general and the task's"),
            ({"weights": [1, 1, 0, 1]}, "weights: item 2 has 0; a weight must be above 0"),
            ({"fewest": 0}, "fewest 0, permutations 10000"),
        ],
    )
    def test_errors(self, changes: dict[str, list[float]], message: str) -> None:
        given = {
            "labels": [0, 0, 1, 1],
            "is_general": [1, 1, 0, 0],
            "is_task_item": [0, 0, 1, 1],
            "gain": [0.0] * 4,
        }
        with pytest.raises(DataError, match=message):
            clusters.density_test(**(given | changes))


def partial(x: list[float], y: list[float], z: list[float]) -> float:
    """Partial rank correlation of x and y given z, by its textbook formula."""
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    return float((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
