"""An adapter merged into its base model: a plain safetensors folder, beside a tokenizer whose chat template has the anchor.

Weights are added in float32 and rounded once, when they are saved: PEFT would round the adapter's part and then the sum to the
base's own precision, in which a small adapter can vanish.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulcrum import adapter, anchor, model
from fulcrum.adapter import State
from fulcrum.config import Settings, TrainSettings
from fulcrum.records import Anchor


def merged(settings: Settings, own: TrainSettings, state: State) -> tuple[Any, Any]:
    """The base model that `settings` name with an adapter's weights added to its own, in float32, and its tokenizer.

    `own` are the settings with the adapter's rank and scale. Raises ModelError.
    """
    exact = own.model_copy(update={"dtype": "float32", "device": "cpu", "load_in_4bit": False, "compile": "never"})
    loaded = model.load(settings.model, exact, trust_remote_code=settings.trust_remote_code)
    adapter.use(loaded, state, exact)
    _untie(loaded.causal)
    whole = loaded.peft.merge_and_unload(safe_merge=True)
    return whole, loaded.tokenizer


def _untie(causal: Any) -> None:
    """An adapter on the input embeddings or on the output head must not reach the other, which may be the same numbers."""
    ends = [end for end in (causal.get_input_embeddings(), causal.get_output_embeddings()) if hasattr(end, "base_layer")]
    for end in ends:
        causal.config.tie_word_embeddings = False
        end.base_layer.weight = nn.Parameter(end.base_layer.weight.detach().clone(), requires_grad=False)


def save(causal: Any, tokenizer: Any, folder: Path, own_anchor: Anchor | None, dtype: torch.dtype) -> None:
    """Write the model's files in `dtype` into a folder. The model in memory is in `dtype` afterwards."""
    causal.to(dtype)
    causal.config.dtype = dtype
    causal.save_pretrained(folder)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = anchor.bake(template, own_anchor)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = template
