"""LoRA adapters on a loaded base model, through PEFT: made fresh from a seed, read, put on, taken off."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fulcrum.config import TrainSettings
from fulcrum.errors import ConfigError, ModelError, nearest
from fulcrum.lora import LoraLinear
from fulcrum.model import LoadedModel

State = dict[str, Tensor]
BASE = "__base__"  # PEFT's name, in mixed batches, for the model without an adapter

# State-space kernels read these layers' weights directly: PEFT refuses two of them, an adapter on the third would never run.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_READ_BY_KERNELS = ["out_proj", "conv1d", "dt_proj"]


def new_adapter(loaded: LoadedModel, settings: TrainSettings, seed: int, name: str = "default") -> None:
    """Put a fresh LoRA adapter on the base model (dropping the one before); its initial weights depend on `seed` only.

    Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353; through PEFT.
    Raises ConfigError for target modules that the model lacks or that cannot be adapted.
    """
    config = _config(loaded, settings)
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
    torch.manual_seed(seed)
    try:
        loaded.peft = get_peft_model(loaded.causal, config, adapter_name=name, autocast_adapter_dtype=True)
    except ValueError as error:
        named = settings.lora_target_modules
        raise ConfigError(f"train.lora_target_modules: PEFT refuses {named!r}: {error}; all-linear is the default") from error
    loaded.causal = loaded.peft.get_base_model()
    loaded.dropouts = [
        module for part, module in loaded.peft.named_modules() if "lora_dropout" in part and isinstance(module, nn.Dropout)
    ]
    set_dropout(loaded, False)


def _config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    config = lora_config(loaded, settings)
    if not settings.load_in_4bit:
        config._register_custom_module({nn.Linear: LoraLinear})  # PEFT's documented way, in spite of the underscore
    return config


def set_dropout(loaded: LoadedModel, on: bool) -> None:
    """Adapter dropout is the only dropout there is: the frozen base always runs in evaluation mode."""
    for module in loaded.dropouts:
        module.train(on)


def no_dropout(loaded: LoadedModel) -> None:
    """Switch every dropout off, the base's own too: whoever scores does not trust what stood before (`model.train()`)."""
    for module in (loaded.peft or loaded.causal).modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def lora_config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    """The PEFT configuration that the settings describe. Raises ConfigError for target modules that the model lacks."""
    kind = loaded.causal.config.model_type
    targets = settings.lora_target_modules
    _check_targets(loaded, targets)
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


def _check_targets(loaded: LoadedModel, targets: str | tuple[str, ...]) -> None:
    """Refuse at once what PEFT refuses when training begins, and names of a list that it would pass over."""
    if targets == "all-linear":
        return
    # As PEFT reads them: a list holds whole names or their ends, a single text is a pattern for whole names.
    pattern_of = {targets: targets} if isinstance(targets, str) else {end: rf"(.*\.)?{re.escape(end)}" for end in targets}
    modules = dict(loaded.causal.named_modules())
    ends = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    for written, pattern in pattern_of.items():
        try:
            found = [module for name, module in modules.items() if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"train.lora_target_modules: {written!r} is no pattern ({error}); use a list of names") from error
        if not found or any(getattr(module, "weight", torch.empty(0)).ndim < 2 for module in found):
            what = "names what is no layer with a weight matrix" if found else "names no module"
            hint = f" (a single text is a pattern for whole names; for their ends write [{written}])" * isinstance(targets, str)
            known = nearest(written, {*ends, "all-linear"})
            raise ConfigError(f"train.lora_target_modules: {written!r} {what} of {loaded.name!r}{hint}{known}")


def drop_adapter(loaded: LoadedModel) -> None:
    """Return to the untouched base model."""
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
        loaded.peft = None


def adapter_state(loaded: LoadedModel) -> State:
    """A copy of the adapter's weights, in PEFT's names."""
    return {name: tensor.detach().clone().cpu() for name, tensor in _weights(loaded).items()}


def _weights(loaded: LoadedModel, adapter: str = "default") -> State:
    # PEFT would add the base's own weights where the output head is adapted.
    found: State = get_peft_model_state_dict(loaded.peft, adapter_name=adapter, save_embedding_layers=False)
    return found


def without(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Inside, the model is the base model; the adapter comes back after."""
    found: AbstractContextManager[None] = nullcontext() if loaded.peft is None else loaded.peft.disable_adapter()
    return found


@contextmanager
def active(loaded: LoadedModel, name: str) -> Iterator[None]:
    """Inside, the model is the base model with the adapter of this name (`BASE`: without any)."""
    if loaded.peft is None or name == BASE:
        with without(loaded):
            yield
        return
    loaded.peft.set_adapter(name, inference_mode=True)
    yield


def is_finite(loaded: LoadedModel) -> bool:
    """Whether every weight of the present adapter is a number: a training that diverged leaves others. True without adapter."""
    return loaded.peft is None or all(tensor.isfinite().all() for tensor in _weights(loaded).values())


def set_adapter_state(loaded: LoadedModel, state: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Put weights into an adapter that is on the model. Raises ModelError where they do not fit."""
    result = set_peft_model_state_dict(loaded.peft, dict(state), adapter_name=adapter)
    missing = [name for name in _weights(loaded, adapter) if name not in state]
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


def put_on(loaded: LoadedModel, adapters: Mapping[str, tuple[State, TrainSettings]]) -> None:
    """Put several adapters on the base model, by name; each row of a batch may then have its own. Raises ModelError where the
    weights of one do not fit."""
    drop_adapter(loaded)
    for name, (state, settings) in adapters.items():
        if loaded.peft is None:
            new_adapter(loaded, settings, 0, name)
        else:
            loaded.peft.add_adapter(name, _config(loaded, settings))
        set_adapter_state(loaded, state, name)
    if loaded.peft is not None:
        loaded.peft.eval()  # PEFT mixes adapters in a batch in no other mode
