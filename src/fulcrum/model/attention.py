"""Attention for packed rows: every example sees itself only, and no mask of row length squared is ever built.

What sees what (`prefix.Segment`) travels as a forward keyword argument through the model to this function, which Transformers
calls by name (`AttentionInterface`). A row has many short segments, and one call for each of them would cost more than its
arithmetic: segments of like size are gathered into one padded batch, long ones are cut into pieces that see all before them.

On a GPU the row goes to Transformers' own variable-length flash attention; there the boundaries are its `cu_seq_lens`. That
path is written after its documentation and not yet measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fulcrum.core.errors import ModelError
from fulcrum.core.types import IntArray
from fulcrum.model.packing import Segment

NAME = "fulcrum_segments"

_QUERIES = 384  # a longer segment is cut: its early queries need not look at late keys
_WASTE = 12_000  # query-key pairs of padding that a batch of segments may have: more costs more than a batch of its own


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
    """Causal attention inside each segment of one row and to its context. Returns (1, tokens, heads, head_dim)."""
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(
                f"packed attention cannot apply {name!r} (attention sinks, position biases)"
            )
    if dropout:
        raise ModelError(
            f"packed attention has no dropout, the model asks for {dropout:g}; the frozen base runs without"
        )
    if segments is None and (query.shape[0] != 1 or query.shape[2] != key.shape[2]):
        raise ModelError(
            f"packed attention takes one row without a key/value cache, got queries of shape {tuple(query.shape)} and keys of "
            f"{tuple(key.shape)}; generate with `fulcrum.generate`, or call model.set_attn_implementation('sdpa') first"
        )
    known = segments or Segments((Segment(0, query.shape[2]),))
    plan = known.plan(query.shape[1], key.shape[1], sliding_window, value.dtype, value.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    apply: Any = _Attention.apply
    keep = torch.is_grad_enabled()
    return apply(
        query.to(value.dtype), key.to(value.dtype), value, plan, scale, softcap, keep
    ), None


@dataclass(frozen=True)
class _Batch:
    """Segments of like size, padded to one shape. `shape`: segments, queries, keys.

    `queries` and `keys` are row numbers in (tokens * heads, d), in the order (segment, key head, queries that share it, token).
    `bias` (segments, 1, 1, queries, keys) is 0 where a query may look, else -inf; `filled` is 0 for padding, None without any.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor
    filled: Tensor | None
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class _Plan:
    """The batches of one row, and the way back: where in all batches' outputs each token and head stands.

    `contexts` (batch, segment, slot, start, end): keys that a segment sees and does not own, whose gradients must be added.
    """

    batches: tuple[_Batch, ...]
    back_queries: Tensor
    back_keys: Tensor
    contexts: tuple[tuple[int, int, int, int, int], ...]


class Segments:
    """The segments of one packed row, and what each kind of layer needs to compute them, worked out once for all layers."""

    def __init__(self, parts: Sequence[Segment]) -> None:
        self.parts = tuple(parts)
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have asked for so far."""
        return {kind[2] for kind in self._plans}

    def plan(
        self,
        heads: int,
        key_heads: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Plan:
        """The plan of a layer with these heads and this sliding window."""
        kind = (heads, key_heads, window, dtype, device)
        if kind not in self._plans:
            self._plans[kind] = _plan(
                _pieces(self.parts, window), heads, key_heads, window, dtype, device
            )
        return self._plans[kind]


def kept_numbers(
    parts: Sequence[Segment], heads: int, key_heads: int, width: int, *, capped: bool
) -> int:
    """Numbers that one layer keeps for the backward pass: weights, and gathered queries, keys and values."""
    total = 0
    for piece in _pieces(parts, None):
        queries = piece.end - piece.start
        keys = queries + sum(b - a for a, b in piece.context)
        total += (
            heads * queries * (keys * (2 if capped else 1) + width) + 2 * key_heads * keys * width
        )
    return total


def _pieces(parts: Sequence[Segment], window: int | None) -> list[Segment]:
    """Cut long segments, and leave out of a context what a sliding window does not reach."""
    pieces = []
    for start, end, context in parts:
        for first in range(start, end, _QUERIES):
            before = (*context, (start, first)) if first > start else context
            hidden = sum(b - a for a, b in before) - window + 1 if window is not None else 0
            seen = []
            for a, b in before:
                left_out = min(max(hidden, 0), b - a)
                hidden -= left_out
                seen += [(a + left_out, b)] if left_out < b - a else []
            pieces.append(Segment(first, min(first + _QUERIES, end), tuple(seen)))
    return pieces


def _plan(
    pieces: Sequence[Segment],
    heads: int,
    key_heads: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    tokens = sum(piece.end - piece.start for piece in pieces)
    back_queries = np.empty((tokens, key_heads, heads // key_heads), dtype=np.int64)
    back_keys = np.empty((tokens, key_heads), dtype=np.int64)
    batches, contexts, queries_before, keys_before = [], [], 0, 0
    for number, members in enumerate(_alike(pieces)):
        n = [piece.end - piece.start for piece in members]
        seen = [
            np.concatenate([np.arange(a, b) for a, b in (*piece.context, (piece.start, piece.end))])
            for piece in members
        ]
        shape = (len(members), max(n), max(map(len, seen)))
        query_token, key_token = (
            np.zeros(shape[:2], dtype=np.int64),
            np.zeros((shape[0], shape[2]), dtype=np.int64),
        )
        hidden = np.ones(shape, dtype=np.bool_)
        place_query = (
            np.arange(shape[0] * heads * shape[1]).reshape(shape[0], key_heads, -1, shape[1])
            + queries_before
        )
        place_key = (
            np.arange(shape[0] * key_heads * shape[2]).reshape(shape[0], key_heads, -1)
            + keys_before
        )
        for s, piece in enumerate(members):
            own = len(seen[s]) - n[s]
            query_token[s, : n[s]], key_token[s, : len(seen[s])] = (
                np.arange(piece.start, piece.end),
                seen[s],
            )
            distance = np.arange(own, len(seen[s]))[:, None] - np.arange(len(seen[s]))
            hidden[s, : n[s], : len(seen[s])] = (distance < 0) | (
                distance >= (window or len(seen[s]) + 1)
            )
            hidden[s, n[s] :, 0] = False  # padding looks somewhere, and nobody looks at it
            back_queries[piece.start : piece.end] = np.moveaxis(place_query[s, :, :, : n[s]], -1, 0)
            back_keys[piece.start : piece.end] = place_key[s, :, own : len(seen[s])].T
            slots = np.cumsum([0, *(b - a for a, b in piece.context)]).tolist()
            contexts += [
                (number, s, slot, a, b) for slot, (a, b) in zip(slots, piece.context, strict=False)
            ]
        queries_before, keys_before = int(place_query.max()) + 1, int(place_key.max()) + 1
        head = np.arange(heads).reshape(1, key_heads, -1, 1)
        bias = torch.zeros(shape, dtype=dtype, device=device).masked_fill_(
            _tensor(hidden, device), float("-inf")
        )
        filled = np.arange(shape[1]) < np.array(n)[:, None]
        batches.append(
            _Batch(
                _tensor(query_token[:, None, None] * heads + head, device).flatten(),
                _tensor(key_token[:, None] * key_heads + np.arange(key_heads)[:, None], device).flatten(),
                bias[:, None, None], None if filled.all() else _tensor(filled, device).to(dtype)[:, None, None, :, None], shape,
            )
        )  # fmt: skip
    return _Plan(
        tuple(batches),
        _tensor(back_queries, device).flatten(),
        _tensor(back_keys, device).flatten(),
        tuple(contexts),
    )


def _tensor(array: IntArray | Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _alike(pieces: Sequence[Segment]) -> list[list[Segment]]:
    """Group pieces of like size, largest first, so that each group's padding stays below `_WASTE` query-key pairs."""
    sizes = {
        piece: (
            piece.end - piece.start,
            piece.end - piece.start + sum(b - a for a, b in piece.context),
        )
        for piece in pieces
    }
    groups: list[list[Segment]] = []
    most, needed = (0, 0), 0
    for piece in sorted(pieces, key=lambda piece: (*sizes[piece], piece.start), reverse=True):
        queries, keys = sizes[piece]
        wider = (max(most[0], queries), max(most[1], keys))
        if (
            groups
            and (len(groups[-1]) + 1) * wider[0] * wider[1] - needed - queries * keys <= _WASTE
        ):
            groups[-1].append(piece)
            most, needed = wider, needed + queries * keys
        else:
            groups.append([piece])
            most, needed = (queries, keys), queries * keys
    return groups


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + bias) v over the batches of a plan: (1, heads, tokens, d) -> (1, tokens, heads, d).

    The weights are kept for the backward pass; rows for which that is too much are recomputed layer by layer (`loss`).
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
        rows = [
            states.transpose(1, 2).reshape(-1, states.shape[-1]) for states in (query, key, value)
        ]
        saved, outputs = [], []
        with torch.autocast(query.device.type, enabled=False):
            for batch in plan.batches:
                (parts, longest, seen), groups = batch.shape, key.shape[1]
                q = rows[0].index_select(0, batch.queries).view(parts * groups, -1, width)
                k, v = (
                    states.index_select(0, batch.keys).view(parts * groups, seen, -1)
                    for states in rows[1:]
                )
                scores = _scaled(q, k.transpose(1, 2), scale)
                bent = None
                if softcap is not None:
                    bent = torch.tanh(scores / softcap)
                    scores = bent * softcap
                scores = scores.view(parts, groups, -1, longest, seen).add_(batch.bias)
                weights = scores.softmax(dim=-1).view(parts * groups, -1, seen)
                outputs.append(torch.bmm(weights, v).view(-1, value.shape[-1]))
                saved += [q, k, v, weights, bent] if keep else []
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.heads, ctx.tokens = plan, scale, (heads, key.shape[1]), tokens
        return _joined(outputs).index_select(0, plan.back_queries).view(1, tokens, heads, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan, (heads, groups) = ctx.plan, ctx.heads
        saved = (
            ctx.saved_tensors
        )  # read once: each reading would recompute them where activations are not kept
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_queries, for_keys, for_values = [], [], []
        for number, batch in enumerate(plan.batches):
            q, k, v, weights, bent = saved[5 * number : 5 * number + 5]
            parts, longest, _ = batch.shape
            down = rows.index_select(0, batch.queries)
            if batch.filled is not None:  # what stands for padding is some token's gradient
                down.view(parts, groups, -1, longest, down.shape[-1]).mul_(batch.filled)
            down = down.view(parts * groups, -1, down.shape[-1])
            for_values.append(torch.bmm(weights.transpose(1, 2), down))
            slope = torch._softmax_backward_data(
                torch.bmm(down, v.transpose(1, 2)), weights, -1, weights.dtype
            )
            slope = slope if bent is None else slope * (1 - bent * bent)
            for_queries.append(_scaled(slope, k, ctx.scale).view(-1, k.shape[-1]))
            for_keys.append(_scaled(slope.transpose(1, 2), q, ctx.scale))
        for_query = (
            _joined(for_queries).index_select(0, plan.back_queries).view(1, ctx.tokens, heads, -1)
        )
        for_key, for_value = (
            _own_and_context(parts, plan, groups) for parts in (for_keys, for_values)
        )
        return for_query.transpose(1, 2), for_key, for_value, None, None, None, None


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (a @ b), scaled inside the product: no pass and no rounding of its own."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _own_and_context(gradients: Sequence[Tensor], plan: _Plan, groups: int) -> Tensor:
    """Gradients (segments * groups, keys, d) of each batch -> (1, groups, tokens, d): as own key plus as others' context."""
    width = gradients[0].shape[-1]
    total = (
        _joined([part.view(-1, width) for part in gradients])
        .index_select(0, plan.back_keys)
        .view(-1, groups, width)
    )
    if plan.contexts:
        exact = total.float()  # a prefix is the sum over all that follow it
        views = [part.view(-1, groups, part.shape[1], width) for part in gradients]
        for number, segment, slot, start, end in plan.contexts:
            exact[start:end] += views[number][segment, :, slot : slot + end - start].transpose(0, 1)
        total = exact.to(total.dtype)
    return total.transpose(0, 1)[None]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


AttentionInterface.register(NAME, segment_attention)


def keywords(segments: Sequence[Segment], flash: bool, device: torch.device) -> dict[str, Any]:
    """Forward keyword arguments that carry the segments of one packed row; on a GPU they must have no context."""
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
