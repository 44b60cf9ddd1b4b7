"""Many conversations in one forward pass: a key/value cache with a row, a *slot*, for each.

KVCache have lengths of their own. A step writes new keys and values at the end of each slot, and a
query sees the keys of its own slot up to its own position (`AttentionInterface`, as `attention`).
So prompts and answers of any length share a step without padding each other; one that ends leaves
at once, and a new one takes its slot: iteration-level scheduling (Orca: Yu et al., OSDI 2022).
Adapters are chosen by row, through PEFT's `adapter_names`.

Invariant: a slot's logits are those of its tokens alone. Keys past a slot's length are never seen,
and are always numbers.
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
    probe_losses,
)
from fulcrum.model.loss import set_checkpointing

NAME = "fulcrum_slots"
_ROOM = 256  # tokens a slot has room for at first; doubled when one needs more


@dataclass
class _Step:
    """Where the tokens of a step's n slots go."""

    rows: slice | Tensor  # the slots, as an index into keys and values
    index: Tensor  # (n,), the slots' numbers
    positions: Tensor  # (n, tokens)
    width: int  # keys that some query sees
    # by window and dtype, computed once for all layers that share them
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return 0 where a query may look, else -inf: (n, 1, 1, tokens, keys)."""
        if (window, dtype) not in self.biases:
            keys = torch.arange(self.width, device=self.positions.device)
            queries = self.positions[:, :, None]
            seen = keys <= queries
            if window is not None:
                seen = seen & (keys > queries - window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            bias.masked_fill_(~seen, float("-inf"))
            self.biases[window, dtype] = bias[:, None, None]
        return self.biases[window, dtype]


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # Transformers' classes have no types
    """One layer's keys and values: (slots, key/value heads, room, head_dim)."""

    def __init__(self, slots: "KVCache") -> None:
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
        """Write the step's keys and values at each slot's end; return all that queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.slots.step
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held[step.index[:, None], :, step.positions] = states.transpose(1, 2).to(held.dtype)
        return self.keys[step.rows, :, : step.width], self.values[step.rows, :, : step.width]

    def widen(self, room: int) -> None:
        """Grow to a room of so many tokens."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old.shape[2] >= room:  # grown before memory was too short for another layer
                continue
            grown = old.new_zeros((*old.shape[:2], room, old.shape[3]))
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first tokens of another."""
        for held in (self.keys, self.values):
            held[target, :, :length] = held[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes for a mask that is not used: `slot_attention` masks itself."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: there is no single length, and positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Return that there is none, as `DynamicLayer` does."""
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
    slots: "KVCache | None" = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend from each slot's new tokens to that slot's keys; return (n, tokens, heads, head_dim).

    Keys that several heads share are not repeated.
    """
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
    group = heads // shared  # query heads of one key/value head
    scale = width**-0.5 if scaling is None else scaling
    grouped = (query * scale).to(value.dtype).reshape(n, shared, group * tokens, width)
    scores = torch.matmul(grouped, key.to(value.dtype).transpose(2, 3))
    scores = scores.view(n, shared, group, tokens, keys).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + slots.step.bias(sliding_window, scores.dtype)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    attended = torch.matmul(weights.view(n, shared, group * tokens, keys), value)
    return attended.view(n, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(NAME, slot_attention)


class KVCache:
    """`number` conversations of a model, each with an adapter of its own or none."""

    def __init__(self, loaded: LoadedModel, number: int, most: int | None = None) -> None:
        """Make the model ready. Raise ModelError with the reason if it cannot do this.

        `most`: tokens that a slot will need at most.

        From then on the model's attention is this one: `close` the slots before any other use of
        it.
        """
        self.loaded = loaded
        self.number = number
        self.most = most
        self.lengths = [0] * number  # tokens
        self.room = _ROOM
        self.step = _Step(slice(0), torch.empty(0, dtype=torch.int64), torch.empty(0), 0)
        self._cache = Cache(layer_class_to_replicate=partial(_Layer, self))
        self._windows: set[int | None] = set()  # that layers asked for
        no_dropout(loaded)
        set_checkpointing(loaded, False)
        self._before = str(loaded.causal.config._attn_implementation)
        problem = self._probe()
        if problem:
            self.close()
            raise ModelError(
                f"{loaded.name!r} cannot answer several conversations at once: {problem}; "
                "use `fulcrum chat`"
            )

    def close(self) -> None:
        """Give the model its own attention back."""
        self.loaded.causal.set_attn_implementation(self._before)

    def clear(self, slot: int) -> None:
        """Forget a slot's tokens."""
        self.lengths[slot] = 0

    def erase(self, slot: int) -> None:
        """Forget a slot's tokens, and overwrite their keys and values."""
        self.clear(slot)
        for layer in self._cache.layers:
            layer.keys[slot] = 0
            layer.values[slot] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another."""
        for layer in self._cache.layers:
            layer.copy(source, target, length)
        self.lengths[target] = length

    @torch.no_grad()
    def extend(
        self, slots: Sequence[int], ids: Sequence[Sequence[int]], adapters: Sequence[str]
    ) -> Tensor:
        """Add tokens to slots, each with its adapter (`BASE`: none).

        Return the logits after the last of each: (n, vocabulary), float32.
        """
        device = self.loaded.device
        counts = [len(part) for part in ids]
        parts = [torch.as_tensor(part, dtype=torch.int64) for part in ids]
        given = pad_sequence(parts, batch_first=True).to(device)
        starts = torch.tensor([self.lengths[slot] for slot in slots], device=device)
        # Padding stands behind a slot's tokens: none of them sees it, and later ones overwrite it.
        positions = starts[:, None] + torch.arange(given.shape[1], device=device)
        self._make_room(int(positions.max()) + 1)
        index = torch.tensor(slots, device=device)
        rows: slice | Tensor = index
        adjacent = range(slots[0], slots[0] + len(slots))
        if list(slots) == list(adjacent):
            rows = slice(adjacent.start, adjacent.stop)  # gives a view, an index would copy
        width = max(self.lengths[slot] + count for slot, count in zip(slots, counts, strict=True))
        self.step = _Step(rows, index, positions, width)
        last = torch.tensor(counts, device=device) - 1
        kept, inverse = torch.unique(last, return_inverse=True)
        if self.loaded.context is not None:  # padding may be where the model knows no position
            positions = positions.clamp(max=self.loaded.context - 1)
        logits = self._forward(given, positions, kept, adapters)
        logits = logits[torch.arange(len(slots)), inverse].float()
        self._windows |= {window for window, _ in self.step.biases}
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        return logits

    def _forward(
        self, ids: Tensor, positions: Tensor, kept: Tensor, adapters: Sequence[str]
    ) -> Tensor:
        """Return the logits at the places `kept`: (n, kept, vocabulary)."""
        peft = self.loaded.peft
        model = self.loaded.causal
        options: dict[str, Any] = {
            "past_key_values": self._cache,
            "use_cache": True,
            "slots": self,
            "input_ids": ids,
            "position_ids": positions,
            "logits_to_keep": kept,
        }
        if peft is not None:
            names = set(adapters)
            if len(names) > 1 or BASE in names:
                model = peft
                options["adapter_names"] = list(adapters)
            elif peft.active_adapter != adapters[0]:
                # A single adapter takes one product a layer, PEFT's mixed batches take several.
                peft.set_adapter(adapters[0], inference_mode=True)
        with self.loaded.precision():
            logits: Tensor = model(**options).logits
        return logits

    def _make_room(self, tokens: int) -> None:
        if tokens <= self.room:
            return
        room = 2 * self.room
        if self.most is not None:
            room = min(room, self.most)
        room = max(tokens, room)
        for layer in self._cache.layers:
            layer.widen(room)
        self.room = room  # last: if memory does not suffice, all stays as it was

    def _probe(self) -> str:
        """Return why this model cannot do it, or ""."""
        try:
            distance, allowed = self._measure()
        except Exception as error:  # a model's own code raises many kinds: it has no such cache
            message = (str(error).splitlines() or [""])[0]
            return f"{type(error).__name__}: {message[:120]}"
        for slot in range(min(2, self.number)):
            self.clear(slot)
        has_window = declares_window(self.loaded.causal.config.get_text_config())
        if has_window and self._windows == {None}:
            return "its sliding window does not reach the attention"
        if not distance <= allowed:
            return (
                f"its answers differ from single ones ({distance:.2g} nats, allowed {allowed:.2g})"
            )
        return ""

    def _measure(self) -> tuple[float, float]:
        """Return how far losses in slots are from the stock attention's, and how far they may be.

        Two texts share their steps: some of their tokens at once, and then one by one.
        """
        loaded = self.loaded
        slots = list(range(min(2, self.number)))
        texts = [probe_ids(loaded, text, special=True) for text in PROBE_TEXTS[: len(slots)]]
        with torch.no_grad(), without(loaded):
            stock = [probe_losses(loaded.causal(input_ids=text).logits, text) for text in texts]
            allowed = allowed_distance(loaded, texts, stock)
        loaded.causal.set_attn_implementation(NAME)
        ids: list[list[int]] = [text[0].tolist() for text in texts]
        begun = [3 + 2 * slot for slot in slots]
        parts = [ids[slot][: begun[slot]] for slot in slots]
        distances = []
        for more in range(4):
            logits = self.extend(slots, parts, [BASE] * len(slots))
            for slot in slots:
                place = begun[slot] + more
                target = ids[slot][place]
                loss = -torch.log_softmax(logits[slot], dim=-1)[target]
                distances.append((loss - stock[slot][place - 1]).abs())
                parts[slot] = [target]
        return float(torch.stack(distances).mean()), allowed
