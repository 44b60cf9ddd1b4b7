"""Training with compiled layers: norms, rotary positions, activations and residuals become a few passes over memory.

`torch.compile` takes its time before it saves any, so a run compiles only where its training is long enough to pay for that.
One layer is compiled and stands for all that are alike. Attention, whose shapes change with every row, stays outside, and so do
scoring and generation: they compute the same whether a run was long or short.
"""

import os
import shutil
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from fulcrum.config.settings import TrainSettings
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example
from fulcrum.data import encode
from fulcrum.model import adapter, attention, loss
from fulcrum.model.base_model import LoadedModel

# Tokens x hidden size x layers of all training from which on compiling pays: measured with both models, caches cold (LOG.md).
PAYS_FROM = 1e10


def wanted(loaded: LoadedModel, settings: TrainSettings, tokens: int) -> bool:
    """Whether a run that trains on so many tokens, all its cells together, should compile.

    Raises ConfigError where `train.compile` is always and this machine or model cannot.
    """
    if tokens == 0:
        return False
    lacks = "" if loaded.packed else "this model trains one example per row"
    lacks = lacks or ("its layers are spread over processes (FSDP)" if loaded.sharded else "")
    lacks = lacks or (
        "" if _compiler() else "no C++ compiler is installed (g++ or clang++, or set CXX)"
    )
    if settings.compile == "always" and lacks:
        raise ConfigError(f"train.compile is always, but {lacks}; set it to auto or never")
    if settings.compile != "auto":
        return settings.compile == "always"
    config = loaded.causal.config.get_text_config()
    work = tokens * getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    return not lacks and loaded.device.type == "cpu" and work >= PAYS_FROM


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(
        (
            found
            for name in ([named] if named else ["g++", "clang++"])
            if (found := shutil.which(name))
        ),
        None,
    )


def switch_on(loaded: LoadedModel, settings: TrainSettings, example: Example) -> None:
    """Compile the layers, and train rows of a short `example` to see that they run.

    Where they do not, `loaded.facts` says why. Raises ConfigError for that where `train.compile` is always.
    """
    outside: Any = torch.compiler.disable
    AttentionInterface.register(attention.NAME, outside(attention.segment_attention))
    # The first layer's input has no gradient: a second compilation for one layer would not pay.
    layers = [
        module for module in loaded.body.modules() if isinstance(module, GradientCheckpointingLayer)
    ][1:]
    for layer in layers:
        layer.compile(dynamic=True)
        loaded.compiled.append((layer, layer._compiled_call_impl))
        layer._compiled_call_impl = None
    adapter.new_adapter(loaded, settings, 0)
    tokens = encode.encode(example, encode.make_format(loaded.tokenizer, None))
    try:
        for copies in (1, 2):
            (row, *_) = loss.rows([tokens] * copies, loaded, settings.pack_tokens, share=False)
            total, _ = loss.row_loss(loaded, row, torch.ones(len(row.labels), device=loaded.device))
            torch.autograd.backward(total)
    except Exception as error:  # whatever a compiler or a model's own code raises, the layers still run as they are
        loaded.compiled.clear()
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        if settings.compile == "always":
            raise ConfigError(
                f"train.compile is always, but {why}; set it to auto or never"
            ) from error
        loaded.facts = (*loaded.facts, f"layers could not be compiled: {why}")
    else:
        loaded.facts = (*loaded.facts, "layers are compiled for training")
    adapter.drop_adapter(loaded)
