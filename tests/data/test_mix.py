import dataclasses
import hashlib
import re
from collections import Counter
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fulcrum.config.sections import Order
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.data import mix
from fulcrum.data.mix import ORDERS, Plan, plan, share

PERMUTATIONS = [mix._feistel, lambda index, n, *key: mix._fisher_yates(n, *key)[index]]
every_permutation = pytest.mark.parametrize(
    "permute", PERMUTATIONS, ids=["feistel", "fisher_yates"]
)
every_order = pytest.mark.parametrize("order", ORDERS)

CHANCES = (0.03234672816961037, 0.6739353295506166, 0.6801017682583281)  # seed 5, "anchor"

# A stream of 3 task rows (T), shown twice, among 9 of 20 general rows (g), seed 7. A change here
# breaks resuming old runs.
GOLDEN = {
    "random": "T0 g3 T0 g18 g15 g14 g13 T1 g19 g16 g11 T1 g17 T2 T2",
    "epoch_stratified": "g16 T1 T2 g15 g19 g17 T0 g18 g13 g11 T0 T2 g3 g14 T1",
    "general_then_task": "g19 g11 g13 g15 g14 g17 g18 g3 g16 T2 T1 T0 T1 T2 T0",
    "task_then_general": "T2 T1 T0 T0 T1 T2 g17 g3 g18 g19 g11 g14 g16 g15 g13",
}


def make(order="random", n_task=3, n_general=20, repeats=2, general_per_task=1.5, seed=7) -> Plan:
    return plan(
        n_task,
        n_general,
        repeats=repeats,
        general_per_task=general_per_task,
        order=order,
        seed=seed,
    )


def whole(p: Plan):
    return p.slice(0, len(p))


# Permutations


@every_permutation
def test_permutation_is_a_bijection_for_every_size(permute):
    for n in [*range(1, 2100), 4095, 4096, 4097, 5000]:
        seen = np.zeros(n, dtype=bool)
        seen[permute(np.arange(n), n, 0, "test", 0)] = True
        assert seen.all(), n


@given(st.integers(65_537, 10**15), st.integers(0, 2**40), st.data())
@settings(max_examples=30, deadline=None)
def test_feistel_keeps_distinct_values_distinct_and_inside(n, seed, data):
    index = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=2, max_size=50))))
    images = mix._permute(index, n, seed, "test", 0)
    assert len(set(images.tolist())) == len(index)
    assert images.min() >= 0
    assert images.max() < n


def test_a_permutation_beyond_the_stored_tables_is_named_by_seed_stream_and_epoch():
    n = mix._TABLE_LIMIT + 1
    index = np.arange(50)
    found = {
        key: tuple(mix._permute(index, n, *key))
        for key in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    }
    assert len(set(found.values())) == 4
    assert list(found[1, "a", 0]) == mix._feistel(index, n, 1, "a", 0).tolist()
    at_limit = mix._permute(index, mix._TABLE_LIMIT, 1, "a", 0)
    assert at_limit.tolist() == mix._fisher_yates(mix._TABLE_LIMIT, 1, "a", 0)[index].tolist()
    assert at_limit.dtype == np.int64


def test_feistel_block_by_block_equals_one_by_one():
    n = 3 * mix._BLOCK + 5
    images = mix._feistel(np.arange(n), n, 1, "test", 0)
    assert np.array_equal(np.sort(images), np.arange(n))
    picked = [0, mix._BLOCK - 1, mix._BLOCK, n - 1]
    assert [int(mix._feistel(np.array([i]), n, 1, "test", 0)[0]) for i in picked] == images[
        picked
    ].tolist()


def test_permutation_golden_vectors():
    assert mix._fisher_yates(16, 7, "golden", 0).tolist() == [
        3,
        14,
        8,
        0,
        12,
        15,
        5,
        13,
        2,
        6,
        1,
        10,
        9,
        7,
        11,
        4,
    ]
    assert mix._feistel(np.arange(16), 16, 7, "golden", 0).tolist() == [
        7,
        9,
        2,
        4,
        10,
        14,
        11,
        12,
        0,
        5,
        1,
        13,
        6,
        8,
        3,
        15,
    ]
    assert mix._feistel(np.arange(13), 13, 7, "golden", 3).tolist() == [
        1,
        6,
        8,
        7,
        0,
        4,
        12,
        11,
        3,
        2,
        10,
        5,
        9,
    ]
    assert mix._feistel(np.arange(5), 10**12, 7, "golden", 0).tolist() == [
        40235411199,
        987952049054,
        505046044044,
        354506185126,
        44077895866,
    ]


def test_splitmix64_is_the_published_generator():
    # Reference output of the C source by Vigna for state 0: the first three numbers.
    states = np.array([0, 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], dtype=np.uint64)
    assert mix._splitmix64(states).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@every_permutation
@pytest.mark.parametrize("n", [50, 64, 100])
def test_mean_image_of_every_item_is_the_middle(permute, n):
    """Mean over seeds of each item's place: sum of squared z-scores is chi-square with n - 1
    degrees of freedom."""
    n_seeds = 400
    places = np.array(
        [permute(np.arange(n), n, seed, "chi", 0) for seed in range(n_seeds)], dtype=float
    )
    z = (places.mean(axis=0) - (n - 1) / 2) / np.sqrt((n * n - 1) / 12 / n_seeds)
    statistic = float((z**2).sum()) * (n - 1) / n
    assert chi2.ppf(0.001, n - 1) < statistic < chi2.ppf(0.999, n - 1)


def test_seeds_streams_and_epochs_give_different_permutations():
    index = np.arange(100)
    base = mix._permute(index, 100, 1, "task", 0).tolist()
    for other in [(2, "task", 0), (1, "general", 0), (1, "task", 1)]:
        assert mix._permute(index, 100, *other).tolist() != base


def test_chances_are_those_of_their_positions_and_uniform():
    whole_ = mix.chances(0, 4000, 5, "anchor")
    assert whole_[:3].tolist() == pytest.approx([CHANCES[0], CHANCES[1], CHANCES[2]], abs=1e-12)
    assert mix.chances(1000, 1010, 5, "anchor").tolist() == whole_[1000:1010].tolist()
    assert 0 <= whole_.min() < 0.01
    assert 0.99 < whole_.max() < 1
    assert abs(whole_.mean() - 0.5) < 4 / np.sqrt(12 * 4000)
    for other in [(6, "anchor"), (5, "other")]:
        assert mix.chances(0, 4000, *other).tolist() != whole_.tolist()


# Plans


@every_order
def test_golden_streams(order):
    is_task, rows = whole(make(order))
    assert (
        " ".join(("T" if t else "g") + str(r) for t, r in zip(is_task, rows, strict=True))
        == GOLDEN[order]
    )


def test_orders_are_those_of_the_settings():
    assert set(get_args(Order)) - {"auto"} == set(ORDERS)


@given(
    st.sampled_from(ORDERS),
    st.integers(1, 60),
    st.integers(1, 9),
    st.floats(0, 6),
    st.integers(0, 50),
    st.integers(-(2**40), 2**70),
)
@settings(max_examples=300, deadline=None)
def test_task_rows_appear_exactly_r_times_and_general_rows_once(
    order, n_task, repeats, per_task, spare, seed
):
    used = round(per_task * (n_task * repeats))  # in this order: 1.9 * 9 * 5 is not 1.9 * 45
    p = plan(
        n_task, used + spare, repeats=repeats, general_per_task=per_task, order=order, seed=seed
    )
    is_task, rows = whole(p)
    assert len(p) == n_task * repeats + used == len(rows)
    assert Counter(rows[is_task].tolist()) == dict.fromkeys(range(n_task), repeats)
    general = rows[~is_task].tolist()
    assert len(set(general)) == len(general) == used
    assert all(0 <= row < p.n_general for row in general)


@every_order
@pytest.mark.parametrize("n_task", [300, 70_000])
def test_exact_counts_beyond_the_stored_tables(order, n_task):
    is_task, rows = whole(
        make(order, n_task=n_task, n_general=200_000, repeats=2, general_per_task=75_000 / n_task)
    )
    assert (np.bincount(rows[is_task], minlength=n_task) == 2).all()
    assert len(np.unique(rows[~is_task])) == 150_000


@every_order
def test_a_slice_is_its_items(order):
    p = make(order, n_task=17, n_general=400, repeats=5, general_per_task=3.3)
    is_task, rows = whole(p)
    items = [("task" if t else "general", int(r)) for t, r in zip(is_task, rows, strict=True)]
    assert list(p) == items
    for start, stop in [(0, 0), (3, 9), (80, 201), (len(p), len(p))]:
        part_task, part_rows = p.slice(start, stop)
        assert np.array_equal(part_task, is_task[start:stop])
        assert np.array_equal(part_rows, rows[start:stop])
        assert (part_task.dtype, part_rows.dtype) == (np.bool_, np.int64)


@every_order
def test_plan_of_a_billion_rows_slices_anywhere(order):
    p = plan(10**7, 10**9, repeats=8, general_per_task=12.0, order=order, seed=3)
    assert len(p) == 1_040_000_000
    for start in (0, len(p) // 3, len(p) - 1000):
        is_task, rows = p.slice(start, start + 1000)
        assert (rows >= 0).all()
        assert (rows[is_task] < 10**7).all()
        assert (rows[~is_task] < 10**9).all()
        assert len(np.unique(rows[~is_task])) == (~is_task).sum()
        assert p[start + 7] == (("task" if is_task[7] else "general"), int(rows[7]))


@every_order
def test_general_rows_of_a_seed_are_the_same_in_every_order_and_nested_in_longer_streams(order):
    def general(order, per_task):
        is_task, rows = whole(make(order, n_task=10, n_general=500, general_per_task=per_task))
        return set(rows[~is_task].tolist())

    assert general(order, 2.0) == general("random", 2.0)
    assert general(order, 2.0) < general(order, 5.0)
    assert general(order, 2.0) != set(range(40))  # not a prefix of the pool


@every_order
def test_a_seed_fixes_the_stream_and_another_seed_changes_it(order):
    streams = [list(make(order, n_task=30, n_general=200, seed=seed)) for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]


@every_order
def test_without_general_rows_it_is_plain_sft(order):
    is_task, rows = whole(make(order, n_task=10, n_general=0, repeats=3, general_per_task=0))
    assert is_task.all()
    assert sorted(rows.tolist()) == sorted(list(range(10)) * 3)


def test_random_is_a_full_shuffle():
    """Over seeds, every position holds a task row equally often: 5 x 200 draws in a stream of
    25."""
    counts = sum(
        whole(make(n_task=5, n_general=20, repeats=1, general_per_task=4, seed=s))[0].astype(int)
        for s in range(200)
    )
    statistic = float(((counts - 40) ** 2 / (200 * 0.2 * 0.8)).sum()) * 24 / 25
    assert chi2.ppf(0.001, 24) < statistic < chi2.ppf(0.999, 24)


@pytest.mark.parametrize("general_per_task", [0, 0.31, 1.0, 4.0])
def test_every_stratified_segment_holds_the_whole_task_set(general_per_task):
    p = make(
        "epoch_stratified", n_task=13, n_general=500, repeats=7, general_per_task=general_per_task
    )
    ends = [epoch * len(p) // 7 for epoch in range(8)]
    for start, stop in pairwise(ends):
        is_task, rows = p.slice(start, stop)
        assert sorted(rows[is_task].tolist()) == list(range(13))
        assert (~is_task).sum() in (p.general_used // 7, -(-p.general_used // 7))


@pytest.mark.parametrize("order", ["epoch_stratified", "general_then_task", "task_then_general"])
def test_task_rows_are_shown_epoch_by_epoch_in_a_new_order(order):
    is_task, rows = whole(make(order, n_task=30, n_general=1000, repeats=4, general_per_task=4))
    epochs = rows[is_task].reshape(4, 30).tolist()
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(
    ("order", "n_first"), [("general_then_task", 12), ("task_then_general", 6)]
)
def test_one_source_after_the_other(order, n_first):
    is_task, _ = whole(make(order, general_per_task=2))
    assert is_task[:n_first].all() == is_task[0] == (order == "task_then_general")
    assert (is_task[n_first:] != is_task[0]).all()


def test_fingerprint_covers_every_field():
    p = make()
    canonical = (
        b'{"general_used":9,"n_general":20,"n_task":3,"order":"random","repeats":2,"seed":7}'
    )
    assert p.fingerprint == hashlib.sha256(canonical).hexdigest()
    changed = {
        "n_task": 4,
        "n_general": 21,
        "repeats": 3,
        "general_used": 8,
        "order": "epoch_stratified",
        "seed": 8,
    }
    assert changed.keys() == dataclasses.asdict(p).keys()
    prints = {
        dataclasses.replace(p, **{name: value}).fingerprint for name, value in changed.items()
    }
    assert len(prints | {p.fingerprint}) == 7


# Errors


def test_positions_that_exceed_64_bits_are_refused_and_no_others():
    """N * (RT + 1) must stay below 2**63: of one task row and G general rows that is 2 * (G +
    1)."""
    most = 2**62 - 2
    assert len(Plan(1, most, 1, most, "random", 0)) == most + 1
    assert (
        plan(2**20, 2**62, repeats=1, general_per_task=2**22, order="random", seed=0).general_used
        == 2**42
    )
    with pytest.raises(ConfigError, match="exceed 64-bit arithmetic"):
        plan(2**21, 2**62, repeats=1, general_per_task=2**22, order="random", seed=0)
    with pytest.raises(ConfigError, match="exceed 64-bit arithmetic"):
        plan(2**32, 2**62, repeats=1, general_per_task=0, order="random", seed=0)


def test_a_pool_that_is_too_small_names_the_settings_that_work():
    message = (
        "mix: general_per_task 4 × repeats 8 × 500 task rows = 16,000 general rows, but the "
        "pool has 10,000 and none is "
        "shown twice. Set general_per_task to 2.5, or repeats to 5, or add 6,000 general rows."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(n_task=500, n_general=10_000, repeats=8, general_per_task=4)
    assert (
        make(n_task=500, n_general=10_000, repeats=8, general_per_task=2.5).general_used == 10_000
    )
    assert make(n_task=500, n_general=10_000, repeats=5, general_per_task=4).general_used == 10_000


def test_an_empty_pool_leaves_plain_sft():
    with pytest.raises(
        ConfigError, match=r"Set general_per_task to 0 \(plain SFT\), or add 9 general rows\.$"
    ):
        make(n_general=0)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"n_task": 0}, DataError, "at least 1 task row, got 0"),
        ({"order": "randm"}, ConfigError, "unknown order 'randm'; did you mean 'random'"),
        ({"repeats": 0}, ConfigError, "repeats must be at least 1, got 0"),
        (
            {"general_per_task": -1.0},
            ConfigError,
            "general_per_task must be 0 .plain SFT. or a positive number up to 1e.09, got -1.0",
        ),
        ({"general_per_task": float("nan")}, ConfigError, "got nan"),
        (
            {"n_task": 10**10, "general_per_task": 0},
            ConfigError,
            "20,000,000,000 of 20,000,000,000 positions exceed 64-bit",
        ),
    ],
)
def test_settings_out_of_range(changes, kind, message):
    with pytest.raises(kind, match=message):
        make(**changes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 16), (5, 4)])
def test_slices_outside_the_plan(start, stop):
    with pytest.raises(
        IndexError, match=f"positions {start} to {stop} are not inside a plan of 15 positions"
    ):
        make().slice(start, stop)


# Shares and warnings


def test_share_counts_examples_tokens_and_loss_tokens():
    """Long general answers: a fifth of the examples is a tenth of the tokens and 3% of what is
    learned."""
    is_task = np.array([True, False, False, False, False])
    s = share(is_task, np.array([40, 90, 90, 90, 90]), np.array([6, 49, 48, 49, 48]))
    assert (s.examples, s.tokens, s.loss_tokens) == (0.2, 0.1, 0.03)
    assert (s.task_examples, s.general_examples, s.total_tokens, s.total_loss_tokens) == (
        1,
        4,
        400,
        200,
    )


def test_share_refuses_what_it_cannot_count():
    with pytest.raises(DataError, match="equal lengths, got 2, 2 and 1"):
        share(np.array([True, False]), np.array([1, 2]), np.array([1]))
    with pytest.raises(DataError, match="2 rows of 3 tokens hold no supervised token"):
        share(np.array([True, False]), np.array([1, 2]), np.array([0, 0]))


def test_warnings_are_silent_on_the_defaults():
    for order in ORDERS:
        assert (
            mix.warnings(
                make(order, n_task=100, n_general=4000, repeats=8, general_per_task=4), batch_size=8
            )
            == []
        )


def test_warnings_name_steps_without_task_rows():
    p = make(n_task=10, n_general=2000, repeats=1, general_per_task=99)
    assert mix.warnings(p, batch_size=8) == [
        "mix: a step of 8 rows holds 0.08 task rows on average; about 92% of the steps hold none. "
        "Raise batch_size to 100, or lower general_per_task to 7."
    ]
    assert mix.warnings(p, batch_size=100) == []


@pytest.mark.parametrize(
    ("order", "general_per_task", "limit"),
    [
        ("random", 4, "20 (mixed"),
        ("random", 0, "8 (unmixed"),
        ("general_then_task", 4, "8 (unmixed"),
    ],
)
def test_warnings_name_many_repeats(order, general_per_task, limit):
    def advice(repeats):
        return mix.warnings(
            make(order, n_general=900, repeats=repeats, general_per_task=general_per_task),
            batch_size=16,
        )

    bound = int(limit.split()[0])
    assert advice(bound) == []
    (text,) = advice(bound + 1)
    assert f"each of 3 task rows is shown {bound + 1} times; beyond {limit} data)" in text
