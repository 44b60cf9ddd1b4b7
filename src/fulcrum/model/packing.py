"""Packing: examples laid end to end in rows of a token budget, so that no padding is ever computed.

In: one token count an example, or a tree of examples. Out: `PackedRow`s whose members index the caller's list.
Callers pack the examples of one optimizer step only, so packing changes speed and nothing else.

Invariant: every example is in exactly one row, whole; a row exceeds the budget only if it holds a single example.

Shared prefixes: examples that begin alike become a tree, whose common beginnings are computed once.

In a causal model the states of a prefix do not depend on what follows. So the template's header, a system text and the anchor
of many examples need one forward pass; every continuation attends to it, and its gradient is the sum over them: exact.

In: token ids of examples. Out: `Tree`s, and the `Layout` of a packed row, whose `Segment`s say which tokens see which.
Invariant: the nodes on the path of an example spell exactly that example.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import IntArray, PackedRow

# Prefixes are cut at multiples of this: so a node is never too small to pay for its own attention call.
BLOCK = 8


class Node(NamedTuple):
    """Tokens [start, end) of example `source`; `parents` are the nodes before it on its path, root first."""

    source: int
    start: int
    end: int
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Examples with a common beginning. `paths[k]` are the nodes that spell `members[k]`; parents come before children."""

    members: tuple[int, ...]
    nodes: tuple[Node, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens that are computed."""
        return sum(node.end - node.start for node in self.nodes)


class Segment(NamedTuple):
    """Tokens [start, end) of a packed row; they see the row's `context` ranges whole, and each other causally."""

    start: int
    end: int
    context: tuple[tuple[int, int], ...] = ()


class Layout(NamedTuple):
    """A packed row: its token ids and positions (n,), its segments, and where in it each member's tokens stand."""

    ids: IntArray
    positions: IntArray
    segments: tuple[Segment, ...]
    places: dict[int, IntArray]


def single(index: int, length: int) -> Tree:
    """The tree of an example that shares nothing."""
    return Tree((index,), (Node(index, 0, length, ()),), ((0,),))


def trees(examples: Sequence[IntArray], budget: int) -> list[Tree]:
    """Join examples that share at least `BLOCK` first tokens into trees of at most `budget` tokens (single ones: any length).

    Examples are joined in the order of their ids, so that those with the longest common prefixes stand side by side.
    """
    order = sorted(range(len(examples)), key=lambda index: examples[index].astype(">u4").tobytes())
    shared = [_common(examples[a], examples[b]) for a, b in pairwise(order)]
    found: list[Tree] = []
    start = 0
    while start < len(order):
        end, length = start + 1, len(examples[order[start]])
        while (
            end < len(order)
            and shared[end - 1]
            and length + len(examples[order[end]]) - shared[end - 1] <= budget
        ):
            length += len(examples[order[end]]) - shared[end - 1]
            end += 1
        found.append(_tree(examples, order[start:end], shared[start : end - 1]))
        start = end
    return found


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def common(examples: Sequence[IntArray]) -> int:
    """Length, in whole blocks, of what all examples begin with; 0 without any."""
    return min((_common(examples[0], other) for other in examples), default=0)


def _common(a: IntArray, b: IntArray) -> int:
    """Length of the common prefix, cut to whole blocks."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0] if len(differs) else size) // BLOCK * BLOCK


def _tree(examples: Sequence[IntArray], members: Sequence[int], shared: Sequence[int]) -> Tree:
    """The tree of examples in sorted order, `shared[k]` being what `members[k]` and the next one have in common."""
    nodes: list[Node] = []
    paths: dict[int, tuple[int, ...]] = {}
    waiting: list[tuple[int, int, int, tuple[int, ...]]] = [
        (0, len(members), 0, ())
    ]  # first, last + 1, depth, parents
    while waiting:
        low, high, depth, parents = waiting.pop()
        source = members[low]
        cut = min(shared[low : high - 1], default=len(examples[source]))
        if cut > depth:
            nodes.append(Node(source, depth, cut, parents))
            parents = (*parents, len(nodes) - 1)
        if high - low == 1:
            paths[source] = parents
            continue
        inner = [k + 1 for k in range(low, high - 1) if shared[k] == cut]
        waiting.extend(
            (a, b, cut, parents) for a, b in reversed(list(pairwise([low, *inner, high])))
        )
    return Tree(tuple(members), tuple(nodes), tuple(paths[member] for member in members))


def layout(examples: Sequence[IntArray], forest: Sequence[Tree]) -> Layout:
    """Lay the nodes of trees end to end in one row. `examples` are the token ids that the trees' nodes point into."""
    nodes = [node for tree in forest for node in tree.nodes]
    ends = np.cumsum([0, *(node.end - node.start for node in nodes)]).tolist()
    parts: list[Segment] = []
    places: dict[int, IntArray] = {}
    for tree in forest:
        first = len(parts)
        own = list(pairwise(ends[first : first + len(tree.nodes) + 1]))
        parts += [
            Segment(*own[k], _merged([own[p] for p in node.parents]))
            for k, node in enumerate(tree.nodes)
        ]
        for member, path in zip(tree.members, tree.paths, strict=True):
            places[member] = np.concatenate([np.arange(*own[k]) for k in path])
    return Layout(
        np.concatenate([examples[node.source][node.start : node.end] for node in nodes]),
        np.concatenate([np.arange(node.start, node.end) for node in nodes]),
        tuple(parts),
        places,
    )


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbouring ranges."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def pack(lengths: Sequence[int], budget: int) -> list[PackedRow]:
    """Lay examples of `lengths` tokens into rows of at most `budget` tokens: best-fit decreasing (arXiv 2404.10830).

    Each example, longest first, goes to the fullest row with room for it; one longer than the budget gets its own row.
    Members ascend within a row and rows ascend by their first member:

        pack([3, 6, 5, 2], budget=8) -> [PackedRow(members=(0, 2), length=8), PackedRow(members=(1, 3), length=8)]

    Raises ConfigError if `budget` < 1, DataError if an example has no tokens.
    """
    if budget < 1:
        raise ConfigError(f"pack: a row needs a budget of at least 1 token, got {budget}")
    for index, length in enumerate(lengths):
        if length < 1:
            raise DataError(
                f"pack: example {index} has {length} tokens; an example needs at least 1"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row) of rows that are not full, ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = bisect_left(room, (lengths[index], -1))
        if best < len(room):
            free, row = room.pop(best)
        else:
            free, row = budget, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            insort(room, (free - lengths[index], row))
    packed = [
        PackedRow(tuple(sorted(members)), int(sum(lengths[i] for i in members))) for members in rows
    ]
    return sorted(packed, key=lambda row: row.members)
