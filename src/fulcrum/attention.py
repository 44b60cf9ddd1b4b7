"""Attention for packed rows: every example sees itself only, and no mask of row length squared is ever built.

What sees what (`prefix.Segment`) travels as a forward keyword argument through the model to this function, which Transformers
calls by name (`AttentionInterface`). On a GPU the same row goes to Transformers' own variable-length flash attention; there the
boundaries are its `cu_seq_lens`. That path is written after its documentation and not yet measured.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface

from fulcrum.errors import ModelError
from fulcrum.prefix import Segment

NAME = "fulcrum_segments"

# Up to this many keys a plain batched product is faster on a CPU than PyTorch's fused kernel (LOG.md, 2026-11-22).
_SHORT = 384
_QUERIES = 256  # of a long segment at a time: later keys need not be looked at


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
    segments: tuple[Segment, ...] | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of one row and to its context. Returns (1, tokens, heads, head_dim)."""
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(f"packed attention cannot apply {name!r} (attention sinks, position biases)")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = [
        _one_segment(
            query[0, :, part.start : part.end], _seen(key[0], part), _seen(value[0], part),
            scale, dropout, sliding_window, softcap,
        )
        for part in segments or (Segment(0, query.shape[2]),)
    ]  # fmt: skip
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _seen(states: Tensor, part: Segment) -> Tensor:
    """Keys or values (heads, tokens, d) of the context and the segment itself, in the order of their positions."""
    if not part.context:
        return states[:, part.start : part.end]
    if part.context[-1][1] == part.start:  # laid out directly before it
        ranges = [*part.context[:-1], (part.context[-1][0], part.end)]
    else:
        ranges = [*part.context, (part.start, part.end)]
    return torch.cat([states[:, a:b] for a, b in ranges], dim=1) if len(ranges) > 1 else states[:, ranges[0][0] : part.end]


def _one_segment(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last tokens of a sequence attend to all of it: query (heads, tokens, d), key and value (groups, seen, d)."""
    heads, tokens, width = query.shape
    groups, seen, _ = key.shape
    windowed = window is not None and seen > window
    if seen > _SHORT and tokens == seen and not windowed and softcap is None:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=heads != groups
        )[0]
    outputs: list[Tensor] = []
    before = seen - tokens
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        low = max(0, before + start - window + 1) if window is not None else 0
        near = slice(low, before + end)
        # Heads that share keys are one batch entry with more queries: keys need no copies.
        asked = (query[:, start:end] * scale).reshape(groups, -1, width)
        scores = torch.bmm(asked, key[:, near].transpose(1, 2))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        bias = _bias(end - start, near.stop - low, window, query.dtype, query.device)
        scores = scores.view(groups, -1, *bias.shape).add_(bias)
        weights = functional.dropout(scores.softmax(dim=-1).to(value.dtype), dropout, training=dropout > 0)
        mixed = torch.bmm(weights.view(groups, -1, near.stop - low), value[:, near])
        outputs.append(mixed.view(heads, end - start, -1))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


@lru_cache(maxsize=64)  # the layers of a row ask for the same ones
def _bias(tokens: int, seen: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where the last `tokens` of `seen` positions may look, -inf elsewhere: (tokens, seen)."""
    place = torch.arange(seen - tokens, seen, device=device)[:, None] - torch.arange(seen, device=device)
    hidden = (place < 0) | (place >= window) if window is not None else place < 0
    return torch.zeros(tokens, seen, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(NAME, segment_attention)


def keywords(segments: Sequence[Segment], flash: bool, device: torch.device) -> dict[str, Any]:
    """Forward keyword arguments that carry the segments of one packed row; on a GPU they must have no context."""
    if not flash:
        return {"segments": tuple(segments)}
    lengths = torch.tensor([0, *(part.end for part in segments)], dtype=torch.int32, device=device)
    longest = max(part.end - part.start for part in segments)
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}
