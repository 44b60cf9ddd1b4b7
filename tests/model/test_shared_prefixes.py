import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fulcrum.model.packing import BLOCK, Layout, Node, Segment, Tree, common, layout, single, trees


def ids(*runs: tuple[int, int]) -> np.ndarray:
    """`(token, times)` runs, end to end."""
    return np.repeat([token for token, _ in runs], [times for _, times in runs])


# A header that all share, an anchor that two share, and an example twice.
HEADER, ANCHOR = (1, BLOCK), (2, 2 * BLOCK + 3)
ROWS = [
    ids(HEADER, (9, 5)),
    ids(HEADER, ANCHOR, (7, 4)),
    ids((4, 6)),
    ids(HEADER, ANCHOR, (5, 2)),
    ids(HEADER, (9, 5)),
]


def test_a_header_an_anchor_and_an_example_twice():
    first, second = trees(ROWS, 1000)
    assert first.members == (3, 1, 0, 4)
    anchored = BLOCK + 2 * BLOCK  # the anchor's last three tokens are no whole block
    assert first.nodes == (
        Node(3, 0, BLOCK, ()),
        Node(3, BLOCK, anchored, (0,)),
        Node(3, anchored, len(ROWS[3]), (0, 1)),
        Node(1, anchored, len(ROWS[1]), (0, 1)),
        Node(0, BLOCK, len(ROWS[0]), (0,)),
        Node(4, BLOCK, len(ROWS[4]), (0,)),
    )
    assert first.paths == ((0, 1, 2), (0, 1, 3), (0, 4), (0, 5))
    assert second == single(2, 6) == Tree((2,), (Node(2, 0, 6, ()),), ((0,),))


def test_what_stands_where_and_what_it_sees():
    laid = layout(ROWS, trees(ROWS, 1000))
    a, b, c, d = BLOCK, 3 * BLOCK, 3 * BLOCK + 5, 3 * BLOCK + 12
    assert laid.segments == (
        Segment(0, a),
        Segment(a, b, ((0, a),)),
        Segment(b, c, ((0, b),)),
        Segment(c, d, ((0, b),)),
        Segment(d, d + 5, ((0, a),)),
        Segment(d + 5, d + 10, ((0, a),)),
        Segment(d + 10, d + 16),
    )
    assert laid.positions[d : d + 5].tolist() == list(range(BLOCK, BLOCK + 5))
    assert laid.places[0].tolist() == [*range(BLOCK), *range(d, d + 5)]


def check(examples: list[np.ndarray], laid: Layout) -> None:
    assert sorted(laid.places) == list(range(len(examples)))
    for k, example in enumerate(examples):
        assert laid.ids[laid.places[k]].tolist() == example.tolist()
        assert laid.positions[laid.places[k]].tolist() == list(range(len(example)))
    seen = np.zeros(len(laid.ids), dtype=int)
    for part in laid.segments:
        seen[part.start : part.end] += 1
        before = [place for a, b in part.context for place in range(a, b)]
        assert laid.positions[before].tolist() == list(
            range(laid.positions[part.start])
        )  # all that comes before, in order
    assert (seen == 1).all()


few_tokens = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=2 * BLOCK)).map(
        lambda pair: np.array([0] * (pair[0] * BLOCK) + pair[1] + [1])
    ),
    min_size=1,
    max_size=12,
)


@given(few_tokens, st.integers(1, 120))
def test_every_example_is_spelled_once_within_the_budget(examples, budget):
    forest = trees(examples, budget)
    check(examples, layout(examples, forest))
    for tree in forest:
        assert tree.length <= budget or len(tree.members) == 1
        assert all(
            node.end - node.start >= BLOCK
            for node in tree.nodes
            if any(node in path for path in inner(tree))
        )


def inner(tree: Tree) -> list[list[Node]]:
    """The nodes that more than one example uses."""
    counts = np.bincount([k for path in tree.paths for k in path], minlength=len(tree.nodes))
    return [[node] for node, count in zip(tree.nodes, counts, strict=True) if count > 1]


@given(few_tokens)
def test_no_shared_block_is_computed_twice(examples):
    """Unlimited, the trees hold each distinct prefix of whole blocks once, and the rest of each
    example."""
    blocks = {tuple(e[: k * BLOCK]) for e in examples for k in range(1, len(e) // BLOCK + 1)}
    rest = sum(len(e) % BLOCK for e in examples)
    assert sum(tree.length for tree in trees(examples, 10**9)) == BLOCK * len(blocks) + rest


def test_the_order_of_the_examples_does_not_matter():
    length = sum(tree.length for tree in trees(ROWS, 1000))
    assert (
        sum(tree.length for tree in trees(ROWS[::-1], 1000))
        == length
        == 3 * BLOCK + 7 + 5 + 5 + 5 + 6
    )


def test_many_examples_that_nest_do_not_exhaust_the_stack():
    examples = [np.zeros(BLOCK * k + 1, dtype=np.int64) for k in range(1, 2001)]
    (tree,) = trees(examples, 10**9)
    assert tree.length == BLOCK * 2000 + 2000


def test_what_all_examples_begin_with():
    same = np.arange(20)
    assert common([same, np.append(same[:17], 99), same[:19]]) == 16  # whole blocks
    assert common([same, same]) == 16
    assert common([same, same[::-1]]) == 0
    assert common([]) == 0
