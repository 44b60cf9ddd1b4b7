"""Training with compiled layers: norms, rotary positions, activations and residuals in few passes.

`torch.compile` takes its time before it saves any, so a run compiles only if its training is long
enough to pay for that. One layer is compiled and serves all that are alike. Attention, whose shapes
change with every row, is not compiled; nor are scoring and generation, which compute the same
whether a run was long or short.
"""

import os
import shutil
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from fulcrum.config.sections import TrainSettings
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example, Tokens
from fulcrum.data import encode
from fulcrum.model import adapter, attention, loss
from fulcrum.model.base_model import LoadedModel

# Tokens x hidden size x layers of all training from which compiling pays: measured with both
# built-in models and cold caches (results/notes/2026-11-22-speed-and-memory.md).
PAYS_FROM = 1e10


def wanted(loaded: LoadedModel, settings: TrainSettings, tokens: int) -> bool:
    """Return whether a run that trains on so many tokens, in all its cells, should compile.

    Raises ConfigError if `train.compile` is always and this machine or model cannot.
    """
    if tokens == 0:
        return False
    obstacle = _obstacle(loaded)
    if settings.compile == "always" and obstacle:
        raise ConfigError(f"train.compile is always, but {obstacle}; set it to auto or never")
    if settings.compile != "auto":
        return settings.compile == "always"
    config = loaded.causal.config.get_text_config()
    work = tokens * getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    return not obstacle and loaded.device.type == "cpu" and work >= PAYS_FROM


def _obstacle(loaded: LoadedModel) -> str:
    """Say why layers cannot be compiled; empty if they can."""
    if not loaded.packed:
        return "this model trains one example per row"
    if loaded.sharded:
        return "its layers are spread over processes (FSDP)"
    if _compiler() is None:
        return "no C++ compiler is installed (g++ or clang++, or set CXX)"
    return ""


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    return None


def switch_on(loaded: LoadedModel, settings: TrainSettings, example: Example) -> None:
    """Compile the layers, and train rows of a short `example` to see that they run.

    If they do not, `loaded.facts` says why. Raises ConfigError for that if `train.compile` is
    always.
    """
    outside: Any = torch.compiler.disable
    AttentionInterface.register(attention.NAME, outside(attention.segment_attention))
    layers = [one for one in loaded.body.modules() if isinstance(one, GradientCheckpointingLayer)]
    # The first layer's input has no gradient: compiling a second time for it would not pay.
    for layer in layers[1:]:
        layer.compile(dynamic=True)
        loaded.compiled.append((layer, layer._compiled_call_impl))
        layer._compiled_call_impl = None
    adapter.new_adapter(loaded, settings, 0)
    tokens = encode.encode(example, encode.make_format(loaded.tokenizer, None))
    try:
        _try_rows(loaded, settings, tokens)
    except Exception as error:  # of the compiler or the model's code; the layers run uncompiled
        loaded.compiled.clear()
        lines = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0][:120]}"
        if settings.compile == "always":
            raise ConfigError(
                f"train.compile is always, but {why}; set it to auto or never"
            ) from error
        loaded.facts = (*loaded.facts, f"layers could not be compiled: {why}")
    else:
        loaded.facts = (*loaded.facts, "layers are compiled for training")
    adapter.drop_adapter(loaded)


def _try_rows(loaded: LoadedModel, settings: TrainSettings, tokens: Tokens) -> None:
    for copies in (1, 2):
        row = loss.rows([tokens] * copies, loaded, settings.pack_tokens, share=False)[0]
        total, _ = loss.row_loss(loaded, row, torch.ones(len(row.labels), device=loaded.device))
        torch.autograd.backward(total)
