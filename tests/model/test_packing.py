import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import PackedRow
from fulcrum.model.packing import pack

lengths_and_budget = given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 50))


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([], 8, []),
        ([3, 6, 5, 2], 8, [((0, 2), 8), ((1, 3), 8)]),
        (
            [2, 3, 6, 5],
            8,
            [((0, 2), 8), ((1, 3), 8)],
        ),  # the longest first: in the order given it would be three rows
        ([8, 8], 8, [((0,), 8), ((1,), 8)]),
        ([9, 1], 8, [((0,), 9), ((1,), 1)]),  # too long: alone, whole, and nothing joins it
        ([1, 1, 1], 2, [((0, 1), 2), ((2,), 1)]),  # equal lengths: by index
        (
            [8, 6, 6, 1],
            13,
            [((0,), 8), ((1, 2, 3), 13)],
        ),  # 1 fits both: it goes to the fuller row, not to the first
    ],
)
def test_rows(lengths, budget, rows):
    assert pack(lengths, budget) == [PackedRow(members, length) for members, length in rows]


@lengths_and_budget
def test_every_example_is_in_exactly_one_row_whole(lengths, budget):
    rows = pack(lengths, budget)
    assert sorted(i for row in rows for i in row.members) == list(range(len(lengths)))
    for row in rows:
        assert row.length == sum(lengths[i] for i in row.members)
        assert row.length <= budget or len(row.members) == 1
        assert list(row.members) == sorted(row.members)
    firsts = [row.members[0] for row in rows]
    assert firsts == sorted(firsts)


@lengths_and_budget
def test_at_most_one_row_is_half_empty(lengths, budget):
    """Two rows that fit together would have been one: what best-fit guarantees, and why rows are
    few."""
    assert sum(2 * row.length <= budget for row in pack(lengths, budget)) <= 1


@lengths_and_budget
def test_same_lengths_same_rows_whatever_the_container(lengths, budget):
    assert (
        pack(lengths, budget)
        == pack(np.array(lengths, dtype=np.int64), budget)
        == pack(tuple(lengths), budget)
    )


def test_refusals():
    with pytest.raises(ConfigError, match="budget of at least 1 token, got 0"):
        pack([1], 0)
    with pytest.raises(DataError, match="example 2 has 0 tokens"):
        pack([4, 1, 0], 8)
