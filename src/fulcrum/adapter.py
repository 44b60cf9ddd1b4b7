"""LoRA adapters on a loaded base model, through PEFT: made fresh from a seed, read, put on, taken off."""

from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from fulcrum.config import TrainSettings
from fulcrum.errors import ModelError
from fulcrum.lora import LoraLinear
from fulcrum.model import LoadedModel

State = dict[str, Tensor]

# State-space kernels read these layers' weights directly: PEFT refuses two of them, an adapter on the third would never run.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_READ_BY_KERNELS = ["out_proj", "conv1d", "dt_proj"]


def new_adapter(loaded: LoadedModel, settings: TrainSettings, seed: int) -> None:
    """Put a fresh LoRA adapter on the base model (dropping the one before); its initial weights depend on `seed` only.

    Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353; through PEFT.
    """
    config = lora_config(loaded, settings)
    if not settings.load_in_4bit:
        config._register_custom_module({nn.Linear: LoraLinear})  # PEFT's documented way, in spite of the underscore
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
    torch.manual_seed(seed)
    loaded.peft = get_peft_model(loaded.causal, config, autocast_adapter_dtype=True)
    loaded.causal = loaded.peft.get_base_model()
    set_dropout(loaded, False)


def set_dropout(loaded: LoadedModel, on: bool) -> None:
    """Adapter dropout is the only dropout there is: the frozen base always runs in evaluation mode."""
    for name, module in loaded.peft.named_modules():
        if "lora_dropout" in name:
            module.train(on)


def lora_config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    """The PEFT configuration that the settings describe."""
    kind = loaded.causal.config.model_type
    targets = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_READ_BY_KERNELS if kind in _STATE_SPACE and targets == "all-linear" else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def drop_adapter(loaded: LoadedModel) -> None:
    """Return to the untouched base model."""
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
        loaded.peft = None


def adapter_state(loaded: LoadedModel) -> State:
    """A copy of the adapter's weights, in PEFT's names."""
    return {name: tensor.detach().clone().cpu() for name, tensor in get_peft_model_state_dict(loaded.peft).items()}


def set_adapter_state(loaded: LoadedModel, state: Mapping[str, Tensor]) -> None:
    """Put weights into the present adapter. Raises ModelError where they do not fit."""
    result = set_peft_model_state_dict(loaded.peft, dict(state))
    missing = [name for name in adapter_state(loaded) if name not in state]
    if result.unexpected_keys or missing:
        raise ModelError(
            f"adapter does not fit {loaded.name!r}: unknown weights {result.unexpected_keys[:3]}, missing {missing[:3]}"
        )


def use(loaded: LoadedModel, state: State | None, settings: TrainSettings) -> None:
    """Put an adapter on the base model, or none."""
    if state is None:
        drop_adapter(loaded)
        return
    if loaded.peft is None:
        new_adapter(loaded, settings, 0)
    set_adapter_state(loaded, state)
