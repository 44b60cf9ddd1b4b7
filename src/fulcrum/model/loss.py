"""A packed row -> nats at its supervised tokens. Training and scoring share this one path, so their losses agree.

The head runs at supervised positions only, in chunks, and in training each chunk's gradient is taken at once: the logits of a
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
_CACHED = (
    2**20
)  # of these, how many numbers are worked on at a time: a vocabulary's many passes stay in the processor's cache
_ACTIVATION_BYTES = (
    1_800 * 2**20
)  # a row whose activations would need more is recomputed in the backward pass


@dataclass(frozen=True)
class Row:
    """One packed row: `ids` and `positions` (1, n), the `segments` it is made of, and its targets.

    Target k is token `labels[k]`, predicted at position `where[k]`, belonging to the caller's example `owner[k]`.
    """

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    where: Tensor
    labels: Tensor
    owner: Tensor


def rows(
    examples: Sequence[Tokens], loaded: LoadedModel, budget: int, *, share: bool = True
) -> list[Row]:
    """Lay examples into rows of at most `budget` tokens (a longer example has its own row); nothing is cut or dropped.

    With `share`, common prefixes stand in a row once. The loss and its gradient stay what they are, as long as nothing is
    drawn at random for each token (adapter dropout).
    """
    alone = [single(index, len(example)) for index, example in enumerate(examples)]
    if not loaded.packed:
        return [_row(examples, [tree], loaded.device) for tree in alone]
    forest = (
        trees([example.ids for example in examples], budget) if share and loaded.shares else alone
    )
    packed = pack([tree.length for tree in forest], budget)
    return [_row(examples, [forest[k] for k in row.members], loaded.device) for row in packed]


def _row(examples: Sequence[Tokens], forest: Sequence[Tree], device: torch.device) -> Row:
    laid = layout([example.ids for example in examples], forest)
    where, labels, owner = [], [], []
    for member, places in laid.places.items():
        targets = np.flatnonzero(
            examples[member].loss_mask[1:]
        )  # nothing predicts an example's first token
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


def _inputs(loaded: LoadedModel, row: Row) -> dict[str, Any]:
    alone = {"input_ids": row.ids, "use_cache": False}
    if not loaded.packed:
        return alone  # one example: its positions are the default ones, and some architectures take none
    return {
        **alone,
        "position_ids": row.positions,
        **attention.keywords(row.segments, loaded.flash, loaded.device),
    }


def _hidden(loaded: LoadedModel, row: Row) -> Tensor:
    """Hidden states at the positions that predict targets: (targets, d)."""
    hidden: Tensor = loaded.body(**_inputs(loaded, row))[0]
    return hidden[0].index_select(
        0, row.where
    )  # whose gradient adds in a fixed order where several targets share a place


def _split(loaded: LoadedModel) -> bool:
    """Whether the head runs apart, on chunks: not where an adapter stands on it, whose gradient would be lost."""
    head = loaded.causal.get_output_embeddings()
    return loaded.split_head and not any(parameter.requires_grad for parameter in head.parameters())


def _logits_everywhere(loaded: LoadedModel, row: Row) -> Tensor:
    logits: Tensor = loaded.causal(**_inputs(loaded, row)).logits
    return logits[0].index_select(0, row.where)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _nats(logits: Tensor, labels: Tensor, *, base: Tensor | None = None, kl: float = 0.0) -> Tensor:
    """Nats of each target, in float32, while `logits` (n, vocabulary) become softmax minus one-hot, the gradient.

    With the base model's logits `kl` times (softmax minus its softmax) is added, the gradient of KL(base || tuned).
    """
    nats = []
    for part in _chunks(len(labels), max(1, _CACHED // logits.shape[1])):
        scores, target = logits[part].float(), labels[part, None]
        total = scores.logsumexp(dim=-1, keepdim=True)
        nats.append((total - scores.gather(1, target))[:, 0])
        scores = (scores - total).exp_()
        if base is not None:
            scores.add_(scores - base[part].float().softmax(dim=-1), alpha=kl)
        logits[part] = scores.scatter_add_(1, target, scores.new_full(target.shape, -1.0))
    return torch.cat(nats)


class _ChunkedLoss(torch.autograd.Function):
    """sum(weights * cross entropy) over targets, with the gradient for the hidden states taken chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, weights: Tensor,
        base: Tensor | None, kl: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        nats, gradients = [], []
        for part in _chunks(len(labels), _CHUNK):
            chunk = hidden[part].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = head(chunk)
            gradient = logits.detach()
            there = None if base is None else head(base[part])
            nats.append(_nats(gradient, labels[part], base=there, kl=kl))
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


def row_loss(
    loaded: LoadedModel, row: Row, weights: Tensor, *, kl: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted loss of a row, and the nats of each target (no gradient).

    `weights` (targets,) already hold the division by the step's total, so that rows of a step just add up. `kl` adds to each
    target's loss so many times KL(base || tuned), the divergence of the adapted model from the base model there; the value
    that is returned is without it, its gradient with it.
    """
    recompute = _needs_checkpointing(loaded, row)
    if recompute != loaded.recomputes:
        set_checkpointing(loaded, recompute)
    with loaded.precision(), _adapter_precision(loaded), _layers_compiled(loaded, not recompute):
        base = _base(loaded, row) if kl else None
        if _split(loaded):
            apply: Any = _ChunkedLoss.apply
            total, each = apply(_hidden(loaded, row), loaded.head, row.labels, weights, base, kl)
            return total, each
        logits = _logits_everywhere(loaded, row).float()
        losses = functional.cross_entropy(logits, row.labels, reduction="none")
        total = (losses * weights).sum()
        if base is not None:
            apart = functional.kl_div(
                logits.log_softmax(-1), base.float().softmax(-1), reduction="none"
            ).sum(-1)
            distance = kl * (apart * weights).sum()
            total = total + distance - distance.detach()
        return total, losses.detach()


@torch.no_grad()
def _base(loaded: LoadedModel, row: Row) -> Tensor:
    """What the base model has at the row's targets: hidden states where the head runs apart, else logits."""
    split = _split(loaded)  # before adapters are switched off: these tell it by their gradients
    with adapter.without(loaded):
        return _hidden(loaded, row) if split else _logits_everywhere(loaded, row)


@torch.no_grad()
def row_nats(loaded: LoadedModel, row: Row, temperatures: Sequence[float] = (1.0,)) -> Tensor:
    """Nats of each target of a row at each temperature that divides the logits, for scoring: (targets, temperatures)."""
    with loaded.precision(), _adapter_precision(loaded):
        if not loaded.split_head:
            return _nats_at(_logits_everywhere(loaded, row), row.labels, temperatures)
        hidden, parts = _hidden(loaded, row), _chunks(len(row.labels), _CHUNK)
        return torch.cat(
            [_nats_at(loaded.head(hidden[part]), row.labels[part], temperatures) for part in parts]
        )


def _nats_at(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Tensor:
    found = []
    for part in _chunks(len(labels), max(1, _CACHED // logits.shape[1])):
        scores = logits[part].float()
        target = scores.gather(1, labels[part, None])[:, 0]
        found.append(
            torch.stack([(scores / t).logsumexp(dim=-1) - target / t for t in temperatures], dim=1)
        )
    return torch.cat(found)


@torch.no_grad()
def row_kl(loaded: LoadedModel, row: Row) -> Tensor:
    """KL(base || adapted) at each target of a row, in nats: how far the whole next-token distribution moved; (targets,)."""
    with loaded.precision(), _adapter_precision(loaded):
        split, base = _split(loaded), _base(loaded, row)
        own = _hidden(loaded, row) if split else _logits_everywhere(loaded, row)
        head = loaded.head if split else lambda logits: logits
        size = min(_CHUNK, max(1, 4 * _CACHED // loaded.causal.config.get_text_config().vocab_size))
        return torch.cat(
            [_divergence(head(base[p]), head(own[p])) for p in _chunks(len(row.labels), size)]
        )


def _divergence(base: Tensor, own: Tensor) -> Tensor:
    expected, found = (logits.float().log_softmax(dim=-1) for logits in (base, own))
    return functional.kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1)


def _adapter_precision(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Let autocast choose the dtype inside adapters: PEFT would lift their inputs to fp32, only to have them cast back."""
    if loaded.peft is None or loaded.dtype == torch.float32:
        return nullcontext()
    casting: AbstractContextManager[None] = disable_input_dtype_casting(loaded.peft)
    return casting


@contextmanager
def _layers_compiled(loaded: LoadedModel, on: bool) -> Iterator[None]:
    """Inside, those layers run compiled that `compiled` has compiled: in training only, and not where they are recomputed."""
    for layer, call in loaded.compiled if on else ():
        layer._compiled_call_impl = call
    try:
        yield
    finally:
        for layer, _ in loaded.compiled:
            layer._compiled_call_impl = None


def _needs_checkpointing(loaded: LoadedModel, row: Row) -> bool:
    config = loaded.causal.config.get_text_config()
    width = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    heads = getattr(config, "num_attention_heads", 0) or 1
    key_heads, head_width = (
        getattr(config, "num_key_value_heads", heads) or heads,
        getattr(config, "head_dim", width // heads),
    )
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    inside = attention.kept_numbers(
        row.segments, heads, key_heads, head_width or width // heads, capped=capped
    )
    numbers = (row.ids.shape[1] * (13 * width + 6 * inner) + inside) * getattr(
        config, "num_hidden_layers", 0
    )
    return numbers * (2 if loaded.dtype == torch.bfloat16 else 4) > _ACTIVATION_BYTES


def set_checkpointing(loaded: LoadedModel, on: bool) -> None:
    """Recompute activations in the backward pass, for rows too long to keep them: a third slower, a fraction of the memory."""
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
            # The flag of this layer alone: its parts stay in evaluation mode, so the frozen base's own dropout stays off.
            module.training = on
