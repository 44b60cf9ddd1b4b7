"""Merge an adapter into its base model, and save both with the anchor in the chat template.

Weights are added in float32 and rounded once, when they are saved. PEFT would round the adapter's
part and then the sum to the base's own precision, in which a small adapter can vanish.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulcrum import adapter as adapters
from fulcrum.adapter import State
from fulcrum.anchor import bake
from fulcrum.config import Settings, TrainSettings
from fulcrum.model import load as load_model
from fulcrum.records import Anchor


def merge_adapter(settings: Settings, own: TrainSettings, state: State) -> tuple[Any, Any]:
    """Return the base model with an adapter's weights added, in float32, and its tokenizer.

    `own` are the settings with the adapter's rank and scale. Raise ModelError.
    """
    exact = own.model_copy(update={"dtype": "float32", "device": "cpu", "load_in_4bit": False, "compile": "never"})
    loaded = load_model(settings.model, exact, trust_remote_code=settings.trust_remote_code)
    adapters.use(loaded, state, exact)
    _untie(loaded.causal)
    whole = loaded.peft.merge_and_unload(safe_merge=True)
    return whole, loaded.tokenizer


def _untie(causal: Any) -> None:
    """Give the input embeddings and the output head weights of their own if one has an adapter.

    They may be the same numbers, and the adapter must not reach the other.
    """
    for end in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        if hasattr(end, "base_layer"):
            causal.config.tie_word_embeddings = False
            weight = end.base_layer.weight.detach().clone()
            end.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def save_merged(causal: Any, tokenizer: Any, folder: Path, anchor: Anchor | None, dtype: torch.dtype) -> None:
    """Write the model's files in `dtype` into a folder; the model in memory stays in `dtype`."""
    causal.to(dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = bake(template, anchor)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template
