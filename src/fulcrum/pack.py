"""Packing: examples laid end to end in rows of a token budget, so that no padding is ever computed.

In: one token count an example, or a tree of examples. Out: `PackedRow`s whose members index the caller's list.
Callers pack the examples of one optimizer step only, so packing changes speed and nothing else.

Invariant: every example is in exactly one row, whole; a row exceeds the budget only if it holds a single example.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from fulcrum.errors import ConfigError, DataError
from fulcrum.records import PackedRow


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
            raise DataError(f"pack: example {index} has {length} tokens; an example needs at least 1")
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
    packed = [PackedRow(tuple(sorted(members)), int(sum(lengths[i] for i in members))) for members in rows]
    return sorted(packed, key=lambda row: row.members)
