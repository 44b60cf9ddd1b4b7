"""Packing: examples laid end to end in rows of a token budget, so that no padding is computed.

Callers pack the examples of one optimizer step only, so packing changes speed and nothing else.
Every example is in exactly one row, whole; a row exceeds the budget only if it holds one example.

Examples that begin alike form a tree, whose common beginnings are computed once: in a causal model
the states of a prefix do not depend on what follows. The template's header, a system text and the
anchor of many examples then take one forward pass. Every continuation attends to it, and its
gradient is the sum over them: exact. The nodes on the path of an example spell exactly that
example.

Token counts or token ids of examples come in. Out come `PackedRow`s, whose members index the
caller's list; `Tree`s; and the `Layout` of a row, whose `Segment`s say which tokens see which.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import IntArray, PackedRow

# Prefixes are cut at multiples of this: so a node is never too small to pay for its attention call.
BLOCK = 8


class Node(NamedTuple):
    """A part of an example that others may share."""

    source: int  # example that holds the tokens
    start: int  # first token
    end: int  # last token + 1
    parents: tuple[int, ...]  # the nodes before it on its path, root first


@dataclass(frozen=True)
class Tree:
    """Examples with a common beginning."""

    members: tuple[int, ...]
    nodes: tuple[Node, ...]  # parents come before children
    paths: tuple[tuple[int, ...], ...]  # the nodes that spell each member

    @property
    def length(self) -> int:
        """Tokens that are computed."""
        return sum(node.end - node.start for node in self.nodes)


class Segment(NamedTuple):
    """Tokens of a packed row that see each other causally, and their context whole."""

    start: int
    end: int  # last token + 1
    context: tuple[tuple[int, int], ...] = ()  # ranges of the row


class Layout(NamedTuple):
    """A packed row."""

    ids: IntArray  # (n,)
    positions: IntArray  # (n,)
    segments: tuple[Segment, ...]
    places: dict[int, IntArray]  # where each member's tokens are: (its length,)


def pack(lengths: Sequence[int], budget: int) -> list[PackedRow]:
    """Lay examples of `lengths` tokens into rows of at most `budget` tokens.

    Best-fit decreasing (arXiv 2404.10830): each example, longest first, goes to the fullest row
    with room for it; one longer than the budget gets its own row. Members ascend within a row and
    rows ascend by their first member:

        pack([3, 6, 5, 2], budget=8)
        -> [PackedRow(members=(0, 2), length=8), PackedRow(members=(1, 3), length=8)]

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
    for index in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        best = bisect_left(room, (lengths[index], -1))
        if best < len(room):
            free, row = room.pop(best)
        else:
            free, row = budget, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > lengths[index]:
            insort(room, (free - lengths[index], row))
    packed = []
    for members in rows:
        packed.append(PackedRow(tuple(sorted(members)), int(sum(lengths[k] for k in members))))
    return sorted(packed, key=lambda row: row.members)


def single(index: int, length: int) -> Tree:
    """Return the tree of an example that shares nothing."""
    return Tree((index,), (Node(index, 0, length, ()),), ((0,),))


def trees(examples: Sequence[IntArray], budget: int) -> list[Tree]:
    """Join examples that share at least `BLOCK` first tokens into trees of at most `budget` tokens.

    A single example may be longer. Examples are joined in the order of their ids, so that those
    with the longest common prefixes are neighbours.
    """
    order = sorted(range(len(examples)), key=lambda k: examples[k].astype(">u4").tobytes())
    shared = [_common(examples[a], examples[b]) for a, b in pairwise(order)]
    forest: list[Tree] = []
    start = 0
    while start < len(order):
        end = start + 1
        length = len(examples[order[start]])
        while end < len(order) and shared[end - 1]:
            added = len(examples[order[end]]) - shared[end - 1]
            if length + added > budget:
                break
            length += added
            end += 1
        forest.append(_tree(examples, order[start:end], shared[start : end - 1]))
        start = end
    return forest


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    size = min(len(one), len(other))
    for place in range(size):
        if one[place] != other[place]:
            return place
    return size


def common(examples: Sequence[IntArray]) -> int:
    """Return the length, in whole blocks, of what all examples begin with; 0 without any."""
    return min((_common(examples[0], other) for other in examples), default=0)


def _common(a: IntArray, b: IntArray) -> int:
    """Return the length of the common prefix, cut to whole blocks."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    length = int(differing[0]) if len(differing) else size
    return length // BLOCK * BLOCK


def _tree(examples: Sequence[IntArray], members: Sequence[int], shared: Sequence[int]) -> Tree:
    """Return the tree of examples in sorted order.

    `shared[k]` is how many tokens `members[k]` and the next one have in common.
    """
    nodes: list[Node] = []
    paths: dict[int, tuple[int, ...]] = {}
    # (first member, last + 1, tokens that are in nodes already, parents)
    waiting: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(members), 0, ())]
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
        bounds = [low, *(k + 1 for k in range(low, high - 1) if shared[k] == cut), high]
        for first, last in reversed(list(pairwise(bounds))):
            waiting.append((first, last, cut, parents))
    return Tree(tuple(members), tuple(nodes), tuple(paths[member] for member in members))


def layout(examples: Sequence[IntArray], forest: Sequence[Tree]) -> Layout:
    """Lay the nodes of trees end to end in one row; nodes point into the examples' token ids."""
    ids = []
    positions = []
    segments: list[Segment] = []
    places: dict[int, IntArray] = {}
    end = 0
    for tree in forest:
        ranges: list[tuple[int, int]] = []  # of the tree's nodes in the row
        for node in tree.nodes:
            start = end
            end += node.end - node.start
            ranges.append((start, end))
            segments.append(Segment(start, end, _merged([ranges[k] for k in node.parents])))
            ids.append(examples[node.source][node.start : node.end])
            positions.append(np.arange(node.start, node.end))
        for member, path in zip(tree.members, tree.paths, strict=True):
            places[member] = np.concatenate([np.arange(*ranges[k]) for k in path])
    return Layout(np.concatenate(ids), np.concatenate(positions), tuple(segments), places)


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join neighbouring ranges."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
