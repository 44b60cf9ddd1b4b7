"""Many conversations in one forward pass: a key/value cache with a row, a *slot*, for each, all of lengths of their own.

A step writes new keys and values where each slot ends, and a query sees the keys of its own slot up to its own position
(`AttentionInterface`, as `attention`). So prompts and answers of any length share a step without being padded against each
other, one that ends leaves at once, and one that comes takes its slot: what Orca calls iteration-level scheduling (Yu et al.,
OSDI 2022). Adapters are chosen by row, through PEFT's `adapter_names`.

Invariant: a slot's logits are those of its tokens alone. Keys past a slot's length are never seen, and are always numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from fulcrum.core.errors import ModelError
from fulcrum.model.adapter import BASE, no_dropout, without
from fulcrum.model.base_model import (
    PROBE_TEXTS,
    LoadedModel,
    allowed_distance,
    declares_window,
    probe_ids,
    probe_nats,
)
from fulcrum.model.loss import set_checkpointing

NAME = "fulcrum_slots"
_WIDTH = 256  # tokens a slot has room for at first; doubled when one needs more


@dataclass
class _Step:
    """Where a step's tokens go. `rows` picks the slots, `index` (n,) is the same as numbers; `positions` (n, tokens); `width`:
    keys that some query sees. `biases` are worked out once for all layers of a kind."""

    rows: slice | Tensor
    index: Tensor
    positions: Tensor
    width: int
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a query may look, else -inf: (n, 1, 1, tokens, keys)."""
        if (window, dtype) not in self.biases:
            keys, at = (
                torch.arange(self.width, device=self.positions.device),
                self.positions[:, :, None],
            )
            seen = keys <= at
            seen = seen if window is None else seen & (keys > at - window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, float("-inf")
            )
            self.biases[window, dtype] = bias[:, None, None]
        return self.biases[window, dtype]


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # Transformers' classes have no types
    """One layer's keys and values: (slots, key/value heads, room, head_dim)."""

    def __init__(self, slots: "Slots") -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for every slot."""
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.slots.number, states.shape[1], self.slots.room, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values where each slot ends; returns all that its queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.slots.step
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held[step.index[:, None], :, step.positions] = states.transpose(1, 2).to(held.dtype)
        return self.keys[step.rows, :, : step.width], self.values[step.rows, :, : step.width]

    def widen(self, room: int) -> None:
        """Grow to a room of so many tokens."""
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            if old.shape[2] >= room:  # when memory was short for another layer
                continue
            grown = old.new_zeros((*old.shape[:2], room, old.shape[3]))
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first tokens of another."""
        for held in (self.keys, self.values):
            held[target, :, :length] = held[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Nobody masks but `slot_attention`."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No single length: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """As `DynamicLayer`'s: none."""
        return -1


def slot_attention(
    module: nn.Module,
    query: Tensor,  # (n, heads, tokens, head_dim)
    key: Tensor,  # (n, key_value_heads, keys, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slots: "Slots | None" = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention of each slot's new tokens to that slot's keys, without repeating the keys that several heads share. Returns
    (n, tokens, heads, head_dim)."""
    if slots is None:
        raise ModelError(
            "slot attention was called without its slots; generate with `fulcrum.generate`"
        )
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise ModelError(
                f"slot attention cannot apply {name!r} (attention sinks, position biases)"
            )
    n, heads, tokens, width = query.shape
    shared, keys = key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    grouped = (query * scale).to(value.dtype).reshape(n, shared, heads // shared * tokens, width)
    scores = (
        torch.matmul(grouped, key.to(value.dtype).transpose(2, 3))
        .view(n, shared, heads // shared, tokens, keys)
        .float()
    )
    scores = torch.tanh(scores / softcap) * softcap if softcap is not None else scores
    weights = torch.softmax(scores + slots.step.bias(sliding_window, scores.dtype), dim=-1).to(
        value.dtype
    )
    found = torch.matmul(weights.view(n, shared, heads // shared * tokens, keys), value)
    return found.view(n, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(NAME, slot_attention)


class Slots:
    """`number` conversations of a model, each with an adapter of its own or none."""

    def __init__(self, loaded: LoadedModel, number: int, most: int | None = None) -> None:
        """Make the model ready, and find out whether it can do this. Raises ModelError where it cannot, with the reason.

        `most`: tokens that a slot will need at most.

        From then on the model's attention is this one: whoever does anything else with it must `close` the slots first.
        """
        self.loaded, self.number, self.most = loaded, number, most
        self.lengths = [0] * number
        self.room = _WIDTH
        self.step = _Step(slice(0), torch.empty(0, dtype=torch.int64), torch.empty(0), 0)
        self._cache = Cache(layer_class_to_replicate=partial(_Layer, self))
        self._windows: set[int | None] = set()
        no_dropout(loaded)
        set_checkpointing(loaded, False)
        self._before = str(loaded.causal.config._attn_implementation)
        why = self._probe()
        if why:
            self.close()
            raise ModelError(
                f"{loaded.name!r} cannot answer several conversations at once: {why}; use `fulcrum chat`"
            )

    def close(self) -> None:
        """Give the model its own attention back."""
        self.loaded.causal.set_attn_implementation(self._before)

    def clear(self, slot: int) -> None:
        """Forget a slot's tokens."""
        self.lengths[slot] = 0

    def erase(self, slot: int) -> None:
        """Forget a slot's tokens, and what was computed of them."""
        self.clear(slot)
        for layer in self._cache.layers:
            layer.keys[slot], layer.values[slot] = 0, 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another."""
        for layer in self._cache.layers:
            layer.copy(source, target, length)
        self.lengths[target] = length

    @torch.no_grad()
    def extend(
        self, slots: Sequence[int], ids: Sequence[Sequence[int]], adapters: Sequence[str]
    ) -> Tensor:
        """Add tokens to slots, each with its adapter (`BASE`: none). Returns the logits after the last of each:
        (n, vocabulary), float32."""
        counts = [len(part) for part in ids]
        device = self.loaded.device
        given = pad_sequence(
            [torch.as_tensor(part, dtype=torch.int64) for part in ids], batch_first=True
        ).to(device)
        starts = torch.tensor([self.lengths[slot] for slot in slots], device=device)
        # Padding stands behind a slot's tokens, is seen by none of them, and is written over by those that come there.
        positions = starts[:, None] + torch.arange(given.shape[1], device=device)
        self._make_room(int(positions.max()) + 1)
        index = torch.tensor(slots, device=device)
        straight = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        rows = (
            slice(slots[0], slots[0] + len(slots)) if straight else index
        )  # a slice is looked at, an index is copied
        width = max(self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True))
        self.step = _Step(rows, index, positions, width)
        last = torch.tensor(counts, device=device) - 1
        kept, where = torch.unique(last, return_inverse=True)
        if self.loaded.context is not None:  # padding may stand where the model knows no position
            positions = positions.clamp(max=self.loaded.context - 1)
        logits = self._forward(given, positions, kept, adapters)[
            torch.arange(len(slots)), where
        ].float()
        self._windows |= {window for window, _ in self.step.biases}
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        return logits

    def _forward(
        self, ids: Tensor, positions: Tensor, kept: Tensor, adapters: Sequence[str]
    ) -> Tensor:
        peft = self.loaded.peft
        options: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True, "slots": self}
        options |= {"input_ids": ids, "position_ids": positions, "logits_to_keep": kept}
        with self.loaded.precision():
            if peft is None:
                found: Tensor = self.loaded.causal(**options).logits
                return found
            names = set(adapters)
            if (
                len(names) == 1 and BASE not in names
            ):  # one product a layer, where PEFT's mixed batches take several
                if peft.active_adapter != adapters[0]:
                    peft.set_adapter(adapters[0], inference_mode=True)
                found = self.loaded.causal(**options).logits
                return found
            found = peft(adapter_names=list(adapters), **options).logits
            return found

    def _make_room(self, tokens: int) -> None:
        if tokens > self.room:
            room = max(
                tokens, 2 * self.room if self.most is None else min(2 * self.room, self.most)
            )
            for layer in self._cache.layers:
                layer.widen(room)
            self.room = room  # last: where memory does not suffice, all stays as it was

    def _probe(self) -> str:
        """Two texts side by side, some of their tokens at once and then one by one, against the stock attention. Returns why
        this model cannot do it, or ''."""
        loaded, slots = self.loaded, list(range(min(2, self.number)))
        texts = [probe_ids(loaded, text, special=True) for text in PROBE_TEXTS[: len(slots)]]
        ids: list[list[int]] = [text[0].tolist() for text in texts]
        begun = [3 + 2 * slot for slot in slots]
        near: list[list[Tensor]] = [[] for _ in slots]
        try:
            with torch.no_grad(), without(loaded):
                stock = [probe_nats(loaded.causal(input_ids=text).logits, text) for text in texts]
                allowed = allowed_distance(loaded, texts, stock)
            loaded.causal.set_attn_implementation(NAME)
            parts = [ids[slot][: begun[slot]] for slot in slots]
            for more in range(4):
                logits = self.extend(slots, parts, [BASE] * len(slots))
                parts = [[ids[slot][begun[slot] + more]] for slot in slots]
                for slot in slots:
                    near[slot].append(-torch.log_softmax(logits[slot], dim=-1)[parts[slot][0]])
        except (
            Exception
        ) as error:  # whatever a model's own code raises: it has no key/value cache of this kind
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        for slot in slots:
            self.clear(slot)
        if declares_window(loaded.causal.config.get_text_config()) and self._windows == {None}:
            return "its sliding window does not reach the attention"
        apart = [
            torch.stack(near[slot]) - stock[slot][begun[slot] - 1 : begun[slot] + 3]
            for slot in slots
        ]
        distance = float(torch.cat(apart).abs().mean())
        return (
            ""
            if distance <= allowed
            else f"its answers differ from single ones ({distance:.2g} nats, allowed {allowed:.2g})"
        )
