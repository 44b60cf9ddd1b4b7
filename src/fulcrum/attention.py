"""Attention for packed rows: every example sees itself only, and no mask of row length squared is ever built.

The segment boundaries travel as forward keyword arguments through the model to this function, which Transformers calls by name
(`AttentionInterface`). On a GPU the same row goes to Transformers' own variable-length flash attention; there the boundaries
are its `cu_seq_lens`. That path is written after its documentation and not yet measured.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface

from fulcrum.errors import ModelError

NAME = "fulcrum_segments"

# Up to this many tokens a plain batched product is faster on a CPU than PyTorch's fused kernel (LOG.md, 2026-11-22).
_SHORT = 384


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
    segments: tuple[int, ...] | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment [segments[i], segments[i+1]) of one row. Returns (1, tokens, heads, head_dim)."""
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(f"packed attention cannot apply {name!r} (attention sinks, position biases)")
    ends = segments or (0, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = [
        _one_segment(query[0, :, a:b], key[0, :, a:b], value[0, :, a:b], scale, dropout, sliding_window, softcap)
        for a, b in pairwise(ends)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _one_segment(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    heads, tokens, _ = query.shape
    if heads != key.shape[0]:  # grouped queries
        key = key.repeat_interleave(heads // key.shape[0], dim=0)
        value = value.repeat_interleave(heads // value.shape[0], dim=0)
    windowed = window is not None and tokens > window
    if tokens > _SHORT and not windowed and softcap is None:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, dropout_p=dropout
        )[0]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    if windowed and window is not None:
        future |= torch.ones_like(future).tril_(-window)
    bias = torch.zeros(tokens, tokens, dtype=query.dtype, device=query.device).masked_fill_(future, float("-inf"))
    if softcap is None:
        scores = torch.baddbmm(bias.expand(heads, tokens, tokens), query, key.transpose(1, 2), alpha=scale)
    else:
        scores = torch.tanh(torch.bmm(query, key.transpose(1, 2)) * (scale / softcap)) * softcap + bias
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.bmm(functional.dropout(weights, dropout, training=dropout > 0), value)


AttentionInterface.register(NAME, segment_attention)


def boundaries(ends: tuple[int, ...], flash: bool, device: torch.device) -> dict[str, Any]:
    """Forward keyword arguments that carry the segment ends (0, ..., tokens) of one packed row."""
    if not flash:
        return {"segments": ends}
    lengths = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(ends))
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}
