"""The density test of clusters' gains against scipy, planted trends and wrong arguments."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from fulcrum.core.errors import DataError
from fulcrum.mechanism.cluster_gains import DensityTest, density_test, summarise


def by_cluster(
    densities: list[float],
    gains: list[float],
    before: list[float] | None = None,
    *,
    task_items: int = 4,
    **settings: int,
) -> DensityTest:
    """Test clusters of `task_items` task items each, and general ones that make the densities."""
    labels, general, gain, base = [], [], [], []
    for label, (density, mean) in enumerate(zip(densities, gains, strict=True)):
        others = round(task_items * density / (1 - density))
        labels += [label] * (task_items + others)
        general += [False] * task_items + [True] * others
        # General items have no gain, and none is used.
        gain += [mean] * task_items + [np.nan] * others
        base += [before[label] if before else 0.0] * task_items + [np.nan] * others
    task = ~np.array(general)
    described = summarise(labels, general, task, gain, before=base if before else None)
    return density_test(described, **settings)


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
            "This is a correlation over clusters only: it does not say that the "
            "density is the cause."
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
        task = np.logical_not(general)
        (cluster,) = summarise(labels, general, task, np.zeros(4), weights=[3, 3, 1, 1])
        assert cluster.density == 0.75

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
        found = density_test(summarise(labels, general, ~general, gain))
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
            summarise(**(given | changes))

    def test_no_fewest_task_items(self) -> None:
        described = summarise([0, 1], [1, 0], [0, 1], [0.0, 0.0])
        with pytest.raises(DataError, match="fewest 0, permutations 10000"):
            density_test(described, fewest=0)


def partial(x: list[float], y: list[float], z: list[float]) -> float:
    """Partial rank correlation of x and y given z, by its textbook formula."""
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    return float((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
