"""A packed row -> the loss at its supervised tokens, in nats.

Training and scoring share this one path, so their losses agree. The head runs at supervised
positions only, in chunks, and in training each chunk's gradient is taken at once: the logits of a
whole row (262,144 numbers a token for Gemma) never exist.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from fulcrum.core.types import IntArray, Tokens
from fulcrum.model import adapter, attention
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.packing import Segment, Tree, layout, pack, single, trees

_CHUNK = 128  # supervised positions whose logits exist at a time
# Of these, numbers worked on at a time: a vocabulary's many passes stay in the processor's cache.
_CACHED = 2**20
# A row whose activations would need more is recomputed in the backward pass.
_ACTIVATION_BYTES = 1_800 * 2**20


@dataclass(frozen=True)
class Row:
    """One packed row of n tokens, and its targets."""

    ids: Tensor  # (1, n)
    positions: Tensor  # (1, n)
    segments: tuple[Segment, ...]
    where: Tensor  # position that predicts each target: (targets,)
    labels: Tensor  # token id of each target: (targets,)
    owner: Tensor  # the caller's example that each target belongs to: (targets,)


def rows(
    examples: Sequence[Tokens], loaded: LoadedModel, budget: int, *, share: bool = True
) -> list[Row]:
    """Lay examples into rows of at most `budget` tokens; nothing is cut or dropped.

    A longer example has its own row. With `share`, common prefixes are in a row once. The loss and
    its gradient stay what they are, as long as nothing is drawn for each token (adapter dropout).
    """
    alone = [single(index, len(example)) for index, example in enumerate(examples)]
    if not loaded.packed:
        return [_row(examples, [tree], loaded.device) for tree in alone]
    forest = alone
    if share and loaded.shares:
        forest = trees([example.ids for example in examples], budget)
    packed = []
    for row in pack([tree.length for tree in forest], budget):
        packed.append(_row(examples, [forest[k] for k in row.members], loaded.device))
    return packed


def _row(examples: Sequence[Tokens], forest: Sequence[Tree], device: torch.device) -> Row:
    laid = layout([example.ids for example in examples], forest)
    where, labels, owner = [], [], []
    for member, places in laid.places.items():
        # Nothing predicts an example's first token.
        targets = np.flatnonzero(examples[member].loss_mask[1:])
        where.append(places[targets])
        labels.append(examples[member].ids[targets + 1])
        owner.append(np.full(len(targets), member))

    def tensor(*arrays: IntArray) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), dtype=torch.int64, device=device)

    return Row(
        tensor(laid.ids)[None],
        tensor(laid.positions)[None],
        laid.segments,
        tensor(*where),
        tensor(*labels),
        tensor(*owner),
    )


def row_loss(
    loaded: LoadedModel, row: Row, weights: Tensor, *, kl: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss of a row, and the nats of each target (no gradient).

    `weights` (targets,) are divided by the step's total already, so that rows of a step just add
    up. `kl` adds so many times KL(base || adapted) to each target's loss; that is in the gradient
    of the returned value, not in the value.
    """
    recompute = _needs_checkpointing(loaded, row)
    if recompute != loaded.recomputes:
        set_checkpointing(loaded, recompute)
    with loaded.precision(), _adapter_precision(loaded), _layers_compiled(loaded, not recompute):
        base = _base(loaded, row) if kl else None
        if _head_is_apart(loaded):
            apply: Any = _ChunkedLoss.apply
            total, each = apply(_hidden(loaded, row), loaded.head, row.labels, weights, base, kl)
            return total, each
        logits = _logits_everywhere(loaded, row).float()
        losses = functional.cross_entropy(logits, row.labels, reduction="none")
        total = (losses * weights).sum()
        if base is not None:
            distances = functional.kl_div(
                logits.log_softmax(-1), base.float().softmax(-1), reduction="none"
            )
            distance = kl * (distances.sum(-1) * weights).sum()
            total = total + distance - distance.detach()
        return total, losses.detach()


@torch.no_grad()
def row_nats(loaded: LoadedModel, row: Row, temperatures: Sequence[float] = (1.0,)) -> Tensor:
    """Return the nats of each target at each temperature of the logits: (targets, temperatures)."""
    with loaded.precision(), _adapter_precision(loaded):
        if not loaded.split_head:
            return _nats_at(_logits_everywhere(loaded, row), row.labels, temperatures)
        hidden = _hidden(loaded, row)
        nats = []
        for part in _chunks(len(row.labels), _CHUNK):
            nats.append(_nats_at(loaded.head(hidden[part]), row.labels[part], temperatures))
        return torch.cat(nats)


@torch.no_grad()
def row_kl(loaded: LoadedModel, row: Row) -> Tensor:
    """Return KL(base || adapted) at each target, in nats: (targets,).

    It tells how far the whole next-token distribution moved.
    """
    with loaded.precision(), _adapter_precision(loaded):
        apart = _head_is_apart(loaded)
        base = _base(loaded, row)
        own = _hidden(loaded, row) if apart else _logits_everywhere(loaded, row)
        vocabulary = loaded.causal.config.get_text_config().vocab_size
        size = min(_CHUNK, max(1, 4 * _CACHED // vocabulary))
        divergences = []
        for part in _chunks(len(row.labels), size):
            if apart:
                divergences.append(_divergence(loaded.head(base[part]), loaded.head(own[part])))
            else:
                divergences.append(_divergence(base[part], own[part]))
        return torch.cat(divergences)


def set_checkpointing(loaded: LoadedModel, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them.

    Rows too long to keep them are a third slower so, for a fraction of the memory.
    """
    loaded.recomputes = on  # as far as the model can
    on = on and bool(getattr(loaded.causal, "supports_gradient_checkpointing", False))
    if on == getattr(loaded.causal, "is_activation_checkpointing", False):
        return
    if on:
        loaded.causal.activation_checkpointing_enable({"use_reentrant": False})
    else:
        loaded.causal.activation_checkpointing_disable()
    for module in loaded.causal.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # This layer's flag alone: its parts stay in evaluation mode, so that the frozen base's
            # own dropout stays off.
            module.training = on


def _inputs(loaded: LoadedModel, row: Row) -> dict[str, Any]:
    inputs = {"input_ids": row.ids, "use_cache": False}
    if loaded.packed:  # else one example: its positions are the default, and some models take none
        inputs["position_ids"] = row.positions
        inputs |= attention.keywords(row.segments, loaded.flash, loaded.device)
    return inputs


def _hidden(loaded: LoadedModel, row: Row) -> Tensor:
    """Return the hidden states at the positions that predict targets: (targets, d)."""
    hidden: Tensor = loaded.body(**_inputs(loaded, row))[0]
    # Its gradient adds in a fixed order if several targets share a place.
    return hidden[0].index_select(0, row.where)


def _logits_everywhere(loaded: LoadedModel, row: Row) -> Tensor:
    logits: Tensor = loaded.causal(**_inputs(loaded, row)).logits
    return logits[0].index_select(0, row.where)


@torch.no_grad()
def _base(loaded: LoadedModel, row: Row) -> Tensor:
    """Return the base model's hidden states at the targets, or logits if the head is not apart."""
    apart = _head_is_apart(loaded)  # first: without its adapter the head has no gradient
    with adapter.without(loaded):
        return _hidden(loaded, row) if apart else _logits_everywhere(loaded, row)


def _head_is_apart(loaded: LoadedModel) -> bool:
    """Return whether the head runs by itself, on chunks; an adapter on it has no gradient then."""
    head = loaded.causal.get_output_embeddings()
    return loaded.split_head and not any(parameter.requires_grad for parameter in head.parameters())


class _ChunkedLoss(torch.autograd.Function):
    """sum(weights * cross entropy) over targets, and each target's nats.

    The gradient for the hidden states is taken chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        labels: Tensor,
        weights: Tensor,
        base: Tensor | None,
        kl: float,
    ) -> tuple[Tensor, Tensor]:
        nats = []
        gradients = []
        for part in _chunks(len(labels), _CHUNK):
            chunk = hidden[part].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = head(chunk)
            gradient = logits.detach()
            base_logits = None if base is None else head(base[part])
            nats.append(_nats(gradient, labels[part], base=base_logits, kl=kl))
            down = torch.autograd.grad(logits, chunk, gradient)[0]
            gradients.append((down.float() * weights[part, None]).to(down.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx: Any, total_gradient: Tensor, _each: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * total_gradient.to(gradient.dtype), None, None, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _nats(logits: Tensor, labels: Tensor, *, base: Tensor | None = None, kl: float = 0.0) -> Tensor:
    """Return the nats of each target, in float32, and turn `logits` into their gradient in place.

    The gradient (n, vocabulary) is softmax minus one-hot. With the base model's logits, `kl` times
    (softmax minus its softmax) is added: the gradient of KL(base || adapted).
    """
    nats = []
    for part in _chunks(len(labels), max(1, _CACHED // logits.shape[1])):
        scores = logits[part].float()
        target = labels[part, None]
        total = scores.logsumexp(dim=-1, keepdim=True)
        nats.append((total - scores.gather(1, target))[:, 0])
        scores = (scores - total).exp_()
        if base is not None:
            scores.add_(scores - base[part].float().softmax(dim=-1), alpha=kl)
        logits[part] = scores.scatter_add_(1, target, scores.new_full(target.shape, -1.0))
    return torch.cat(nats)


def _nats_at(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Tensor:
    nats = []
    for part in _chunks(len(labels), max(1, _CACHED // logits.shape[1])):
        scores = logits[part].float()
        target = scores.gather(1, labels[part, None])[:, 0]
        columns = [(scores / t).logsumexp(dim=-1) - target / t for t in temperatures]
        nats.append(torch.stack(columns, dim=1))
    return torch.cat(nats)


def _divergence(base: Tensor, own: Tensor) -> Tensor:
    expected = base.float().log_softmax(dim=-1)
    actual = own.float().log_softmax(dim=-1)
    return functional.kl_div(actual, expected, reduction="none", log_target=True).sum(dim=-1)


def _adapter_precision(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Let autocast choose the dtype inside adapters.

    PEFT would lift their inputs to fp32, only to have them cast back.
    """
    if loaded.peft is None or loaded.dtype == torch.float32:
        return nullcontext()
    casting: AbstractContextManager[None] = disable_input_dtype_casting(loaded.peft)
    return casting


@contextmanager
def _layers_compiled(loaded: LoadedModel, on: bool) -> Iterator[None]:
    """Inside, layers run as `training.compile` compiled them, if they were and `on` is set.

    They do in training alone, and not if they are recomputed.
    """
    for layer, call in loaded.compiled if on else ():
        layer._compiled_call_impl = call
    try:
        yield
    finally:
        for layer, _ in loaded.compiled:
            layer._compiled_call_impl = None


def _needs_checkpointing(loaded: LoadedModel, row: Row) -> bool:
    """Return whether the row's activations are too many to keep, by the model's shapes."""
    config = loaded.causal.config.get_text_config()
    width = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    if isinstance(inner, list | tuple):
        inner = max(inner)
    heads = getattr(config, "num_attention_heads", 0) or 1
    key_heads = getattr(config, "num_key_value_heads", heads) or heads
    head_width = getattr(config, "head_dim", None) or width // heads
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    inside = attention.kept_numbers(row.segments, heads, key_heads, head_width, capped=capped)
    layers = getattr(config, "num_hidden_layers", 0)
    numbers = (row.ids.shape[1] * (13 * width + 6 * inner) + inside) * layers
    number_bytes = 2 if loaded.dtype == torch.bfloat16 else 4
    return numbers * number_bytes > _ACTIVATION_BYTES
