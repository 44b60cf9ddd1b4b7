"""Attention for packed rows: each example sees itself only, without a mask of row length squared.

What sees what (`packing.Segment`) travels as a forward keyword argument through the model to
`segment_attention`, which Transformers calls by name (`AttentionInterface`). A row has many short
segments, and one call for each would cost more than its arithmetic: segments of similar size are
gathered into one padded batch, and long ones are cut into pieces that see all before them.

On a GPU the row goes to Transformers' own variable-length flash attention, which takes the
boundaries as `cu_seq_lens`. That path follows its documentation and has not been measured yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fulcrum.core.errors import ModelError
from fulcrum.core.types import BoolArray, IntArray
from fulcrum.model.packing import Segment

NAME = "fulcrum_segments"

_QUERIES = 384  # a longer segment is cut: its early queries need not look at late keys
# Query-key pairs of padding in a batch of segments: more would cost more than another batch.
_WASTE = 12_000


def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, key_value_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: "Segments | None" = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each segment of one row and to its context.

    The result is (1, tokens, heads, head_dim). The signature is that of Transformers' interface.
    """
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(
                f"packed attention cannot apply {name!r} (attention sinks, position biases)"
            )
    if dropout:
        raise ModelError(
            f"packed attention has no dropout, the model asks for {dropout:g}; the frozen base "
            "runs without"
        )
    if segments is None:
        segments = _whole_row(query, key)
    plan = segments.plan(query.shape[1], key.shape[1], sliding_window, value.dtype, value.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    apply: Any = _Attention.apply
    keep = torch.is_grad_enabled()
    output: Tensor = apply(
        query.to(value.dtype), key.to(value.dtype), value, plan, scale, softcap, keep
    )
    return output, None


def _whole_row(query: Tensor, key: Tensor) -> "Segments":
    """Return the segments of a call that names none: one example, in a row of its own."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError(
            "packed attention takes one row without a key/value cache, got queries of shape "
            f"{tuple(query.shape)} and keys of {tuple(key.shape)}; generate with "
            "`fulcrum.generate`, or call model.set_attn_implementation('sdpa') first"
        )
    return Segments((Segment(0, query.shape[2]),))


def keywords(segments: Sequence[Segment], flash: bool, device: torch.device) -> dict[str, Any]:
    """Return the forward keyword arguments that carry the segments of one packed row.

    On a GPU (`flash`) segments must have no context.
    """
    if not flash:
        return {"segments": Segments(segments)}
    lengths = torch.tensor([0, *(part.end for part in segments)], dtype=torch.int32, device=device)
    longest = max(part.end - part.start for part in segments)
    return {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def kept_numbers(
    parts: Sequence[Segment], heads: int, key_heads: int, width: int, *, capped: bool
) -> int:
    """Return how many numbers one layer keeps for the backward pass.

    They are the attention weights, and gathered queries, keys and values.
    """
    matrices = 2 if capped else 1  # a soft-capped score is kept next to its weight
    total = 0
    for piece in _pieces(parts, None):
        queries, keys = _size(piece)
        total += heads * queries * (keys * matrices + width) + 2 * key_heads * keys * width
    return total


class _LayerKind(NamedTuple):
    """What the layers that share a plan have in common."""

    heads: int
    key_heads: int
    window: int | None  # tokens that a query sees, itself included
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Batch:
    """Segments of similar size, padded to one shape.

    Row numbers point into (tokens * heads, d), in the order (segment, key head, queries that share
    it, token).
    """

    queries: Tensor  # row numbers
    keys: Tensor  # row numbers
    bias: Tensor  # (segments, 1, 1, queries, keys): 0 if a query may look, else -inf
    filled: Tensor | None  # (segments, 1, 1, queries, 1): 0 for padding; None if there is none
    shape: tuple[int, int, int]  # segments, queries, keys


@dataclass(frozen=True)
class _Plan:
    """The batches of one row, and the way back from their outputs to its tokens and heads."""

    batches: tuple[_Batch, ...]
    back_queries: Tensor  # place of each token and head in all batches' outputs
    back_keys: Tensor  # place of each token and key head in all batches' keys
    # Keys that a segment sees but does not own, and whose gradients must be added:
    contexts: tuple[tuple[int, int, int, int, int], ...]  # (batch, segment, slot, start, end)


class Segments:
    """The segments of one packed row, with a plan for each kind of layer, made once for all."""

    def __init__(self, parts: Sequence[Segment]) -> None:
        self.parts = tuple(parts)
        self._plans: dict[_LayerKind, _Plan] = {}

    @property
    def windows(self) -> set[int | None]:
        """Return the sliding windows that layers have asked for so far."""
        return {kind.window for kind in self._plans}

    def plan(
        self,
        heads: int,
        key_heads: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Plan:
        """Return the plan of a layer with these heads and this sliding window."""
        kind = _LayerKind(heads, key_heads, window, dtype, device)
        if kind not in self._plans:
            self._plans[kind] = _plan(_pieces(self.parts, window), kind)
        return self._plans[kind]


def _pieces(parts: Sequence[Segment], window: int | None) -> list[Segment]:
    """Cut long segments, and drop from contexts what a sliding window does not reach."""
    pieces = []
    for start, end, context in parts:
        for first in range(start, end, _QUERIES):
            before = (*context, (start, first)) if first > start else context
            hidden = 0
            if window is not None:
                hidden = sum(b - a for a, b in before) - window + 1
            seen = []
            for a, b in before:
                dropped = min(max(hidden, 0), b - a)
                hidden -= dropped
                if dropped < b - a:
                    seen.append((a + dropped, b))
            pieces.append(Segment(first, min(first + _QUERIES, end), tuple(seen)))
    return pieces


def _size(piece: Segment) -> tuple[int, int]:
    """Return how many queries a piece has, and how many keys they see."""
    queries = piece.end - piece.start
    return queries, queries + sum(b - a for a, b in piece.context)


def _plan(pieces: Sequence[Segment], kind: _LayerKind) -> _Plan:
    heads, key_heads = kind.heads, kind.key_heads
    tokens = sum(piece.end - piece.start for piece in pieces)
    back_queries = np.empty((tokens, key_heads, heads // key_heads), dtype=np.int64)
    back_keys = np.empty((tokens, key_heads), dtype=np.int64)
    batches = []
    contexts = []
    queries_before = 0
    keys_before = 0
    for number, members in enumerate(_alike(pieces)):
        batch = _pad(members, kind)
        parts, longest, most_keys = batch.shape
        slots = np.arange(parts * heads * longest) + queries_before
        query_places = slots.reshape(parts, key_heads, -1, longest)
        slots = np.arange(parts * key_heads * most_keys) + keys_before
        key_places = slots.reshape(parts, key_heads, most_keys)
        for k, piece in enumerate(members):
            queries, keys = _size(piece)
            own = slice(piece.start, piece.end)
            back_queries[own] = np.moveaxis(query_places[k, :, :, :queries], -1, 0)
            back_keys[own] = key_places[k, :, keys - queries : keys].T
            slot = 0
            for start, end in piece.context:
                contexts.append((number, k, slot, start, end))
                slot += end - start
        queries_before += query_places.size
        keys_before += key_places.size
        batches.append(batch)
    return _Plan(
        tuple(batches),
        _tensor(back_queries, kind.device).flatten(),
        _tensor(back_keys, kind.device).flatten(),
        tuple(contexts),
    )


def _pad(members: Sequence[Segment], kind: _LayerKind) -> _Batch:
    """Gather pieces into one batch."""
    sizes = [_size(piece) for piece in members]
    longest = max(queries for queries, _ in sizes)
    most_keys = max(keys for _, keys in sizes)
    shape = (len(members), longest, most_keys)
    query_token = np.zeros((len(members), longest), dtype=np.int64)
    key_token = np.zeros((len(members), most_keys), dtype=np.int64)
    hidden = np.ones(shape, dtype=np.bool_)
    filled = np.zeros((len(members), longest), dtype=np.bool_)
    for k, (piece, (queries, keys)) in enumerate(zip(members, sizes, strict=True)):
        ranges = [np.arange(a, b) for a, b in (*piece.context, (piece.start, piece.end))]
        query_token[k, :queries] = ranges[-1]
        key_token[k, :keys] = np.concatenate(ranges)
        distance = np.arange(keys - queries, keys)[:, None] - np.arange(keys)
        hidden[k, :queries, :keys] = (distance < 0) | (distance >= (kind.window or keys + 1))
        hidden[k, queries:, 0] = False  # padding looks somewhere, and nobody looks at it
        filled[k, :queries] = True
    head = np.arange(kind.heads).reshape(1, kind.key_heads, -1, 1)
    query_rows = query_token[:, None, None] * kind.heads + head
    key_rows = key_token[:, None] * kind.key_heads + np.arange(kind.key_heads)[:, None]
    bias = torch.zeros(shape, dtype=kind.dtype, device=kind.device)
    bias.masked_fill_(_tensor(hidden, kind.device), float("-inf"))
    filled_tensor = None
    if not filled.all():
        filled_tensor = _tensor(filled, kind.device).to(kind.dtype)[:, None, None, :, None]
    return _Batch(
        _tensor(query_rows, kind.device).flatten(),
        _tensor(key_rows, kind.device).flatten(),
        bias[:, None, None],
        filled_tensor,
        shape,
    )


def _tensor(array: IntArray | BoolArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _alike(pieces: Sequence[Segment]) -> list[list[Segment]]:
    """Group pieces of similar size, largest first.

    The padding of a group stays below `_WASTE` query-key pairs.
    """
    groups: list[list[Segment]] = []
    widest = (0, 0)
    needed = 0  # query-key pairs of the last group
    for piece in sorted(pieces, key=lambda piece: (*_size(piece), piece.start), reverse=True):
        queries, keys = _size(piece)
        pairs = queries * keys
        wider = (max(widest[0], queries), max(widest[1], keys))
        padded = (len(groups[-1]) + 1) * wider[0] * wider[1] if groups else 0
        if groups and padded - needed - pairs <= _WASTE:
            groups[-1].append(piece)
            widest = wider
            needed += pairs
        else:
            groups.append([piece])
            widest = (queries, keys)
            needed = pairs
    return groups


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + bias) v over a plan: (1, heads, tokens, d) -> (1, tokens, heads, d).

    The weights are kept for the backward pass; rows for which that is too much are recomputed layer
    by layer (`loss.set_checkpointing`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: _Plan,
        scale: float,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        _, heads, tokens, width = query.shape
        groups = key.shape[1]
        query_rows, key_rows, value_rows = _rows(query), _rows(key), _rows(value)
        saved = []
        outputs = []
        with torch.autocast(query.device.type, enabled=False):
            for batch in plan.batches:
                parts, longest, seen = batch.shape
                q = query_rows.index_select(0, batch.queries).view(parts * groups, -1, width)
                k = key_rows.index_select(0, batch.keys).view(parts * groups, seen, -1)
                v = value_rows.index_select(0, batch.keys).view(parts * groups, seen, -1)
                scores = _scaled(q, k.transpose(1, 2), scale)
                bent = None
                if softcap is not None:
                    bent = torch.tanh(scores / softcap)
                    scores = bent * softcap
                scores = scores.view(parts, groups, -1, longest, seen).add_(batch.bias)
                weights = scores.softmax(dim=-1).view(parts * groups, -1, seen)
                outputs.append(torch.bmm(weights, v).view(-1, value.shape[-1]))
                if keep:
                    saved += [q, k, v, weights, bent]
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        ctx.scale = scale
        ctx.heads = (heads, groups)
        ctx.tokens = tokens
        return _joined(outputs).index_select(0, plan.back_queries).view(1, tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        heads, groups = ctx.heads
        saved = ctx.saved_tensors  # read once: with recomputed activations each read repeats them
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_queries, for_keys, for_values = [], [], []
        for number, batch in enumerate(plan.batches):
            q, k, v, weights, bent = saved[5 * number : 5 * number + 5]
            parts, longest, _ = batch.shape
            down = rows.index_select(0, batch.queries)
            if batch.filled is not None:  # a padded place holds some token's gradient
                down.view(parts, groups, -1, longest, down.shape[-1]).mul_(batch.filled)
            down = down.view(parts * groups, -1, down.shape[-1])
            for_values.append(torch.bmm(weights.transpose(1, 2), down))
            slope = torch._softmax_backward_data(
                torch.bmm(down, v.transpose(1, 2)), weights, -1, weights.dtype
            )
            if bent is not None:
                slope = slope * (1 - bent * bent)
            for_queries.append(_scaled(slope, k, ctx.scale).view(-1, k.shape[-1]))
            for_keys.append(_scaled(slope.transpose(1, 2), q, ctx.scale))
        for_query = _joined(for_queries).index_select(0, plan.back_queries)
        for_query = for_query.view(1, ctx.tokens, heads, -1).transpose(1, 2)
        for_key = _own_and_context(for_keys, plan, groups)
        for_value = _own_and_context(for_values, plan, groups)
        return for_query, for_key, for_value, None, None, None, None


def _rows(states: Tensor) -> Tensor:
    """Return (1, heads, tokens, d) as (tokens * heads, d)."""
    return states.transpose(1, 2).reshape(-1, states.shape[-1])


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * (a @ b), scaled inside the product: no pass and no rounding of its own."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _own_and_context(gradients: Sequence[Tensor], plan: _Plan, groups: int) -> Tensor:
    """Return the gradients of keys or values: as a token's own, and as the context of others.

    They come as (segments * groups, keys, d) of each batch, and become (1, groups, tokens, d).
    """
    width = gradients[0].shape[-1]
    total = _joined([part.view(-1, width) for part in gradients])
    total = total.index_select(0, plan.back_keys).view(-1, groups, width)
    if plan.contexts:
        exact = total.float()  # a prefix's gradient is the sum over all that follow it
        views = [part.view(-1, groups, part.shape[1], width) for part in gradients]
        for number, segment, slot, start, end in plan.contexts:
            exact[start:end] += views[number][segment, :, slot : slot + end - start].transpose(0, 1)
        total = exact.to(total.dtype)
    return total.transpose(0, 1)[None]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


AttentionInterface.register(NAME, segment_attention)
