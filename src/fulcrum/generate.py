"""Scoring and generating: examples -> nats of their gold answers; prompts -> texts (greedy).

Scoring uses the training path (packed rows), generation Transformers' own `generate` with left padding, longest prompts first,
so that a batch holds prompts of like length and an out-of-memory shows at once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from fulcrum.encode import Format
from fulcrum.loss import row_nats, rows, set_checkpointing
from fulcrum.model import LoadedModel, generation_attention
from fulcrum.records import FloatArray, IntArray, Tokens


def nats(loaded: LoadedModel, examples: Sequence[Tokens], *, budget: int = 2048) -> tuple[FloatArray, IntArray]:
    """Summed nats of each example's supervised tokens, and their number; both (examples,)."""
    total = np.zeros(len(examples))
    count = np.zeros(len(examples), dtype=np.int64)
    for row in rows(examples, loaded, budget):
        owner = row.owner.cpu().numpy()
        np.add.at(total, owner, row_nats(loaded, row).double().cpu().numpy())
        np.add.at(count, owner, 1)
    return total, count


def mean_nats(loaded: LoadedModel, examples: Sequence[Tokens]) -> float:
    """Nats per supervised token over all examples together."""
    total, count = nats(loaded, examples)
    return float(total.sum() / count.sum())


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    form: Format,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to tokenised prompts, in their order, without the end token and special tokens.

    `batch_tokens` bounds prompts x (longest prompt + answer) of a batch. `progress` is told how many prompts are done.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    set_checkpointing(loaded, False)  # a layer that recomputes would drop the key/value cache
    training = generation_attention(loaded)
    stop = sorted({*form.end_ids, *_end_ids(loaded)})
    # Transformers takes what a call leaves open from the model's own configuration, whose penalties are no part of greedy.
    shipped, loaded.causal.generation_config = loaded.causal.generation_config, GenerationConfig()
    try:
        start = 0
        while start < len(order):
            longest = len(prompts[order[start]])
            size = max(1, batch_tokens // (longest + max_new_tokens))
            batch = order[start : start + size]
            for index, text in zip(batch, _batch(loaded, [prompts[i] for i in batch], stop, max_new_tokens), strict=True):
                texts[index] = text
            start += len(batch)
            if progress is not None:
                progress(start)
    finally:
        loaded.causal.generation_config = shipped
        if loaded.packed:
            loaded.causal.set_attn_implementation(training)
    return texts


def _batch(loaded: LoadedModel, prompts: Sequence[Sequence[int]], stop: Sequence[int], max_new_tokens: int) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    pad = loaded.tokenizer.pad_token_id
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64, device=loaded.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.as_tensor(prompt, device=loaded.device)
        mask[i, longest - len(prompt) :] = 1
    with loaded.precision():
        output = loaded.causal.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=stop, pad_token_id=pad,
        )  # fmt: skip
    return [_until_end(loaded, row, stop) for row in output[:, longest:].tolist()]


def _end_ids(loaded: LoadedModel) -> list[int]:
    configured = loaded.causal.generation_config.eos_token_id
    if configured is None:
        return []
    return [int(token) for token in configured] if isinstance(configured, list | tuple) else [int(configured)]


def _until_end(loaded: LoadedModel, ids: list[int], stop: Sequence[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return str(loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
