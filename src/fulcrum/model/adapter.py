"""LoRA adapters on a loaded base model, through PEFT: made from a seed, read, put on, taken off.

`LoraLinear` computes a linear layer with its adapter as one operation. PEFT multiplies, scales and
adds the adapter's output in separate steps, each a pass over (tokens, width) forward and another
one backward. Here products accumulate into the layer's own output, and into the input's gradient.
PEFT's class remains the parent: names, saving, merging and every special case (DoRA, dropout,
several adapters) are its own.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fulcrum.config.sections import TrainSettings
from fulcrum.core.errors import ConfigError, ModelError, nearest
from fulcrum.model.base_model import LoadedModel

State = dict[str, Tensor]  # an adapter's weights, by PEFT's names
BASE = "__base__"  # PEFT's name, in mixed batches, for the model without an adapter

# State-space kernels read these layers' weights directly: PEFT refuses two of them, and an adapter
# on the third would never run.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_READ_BY_KERNELS = ["out_proj", "conv1d", "dt_proj"]


def new_adapter(
    loaded: LoadedModel, settings: TrainSettings, seed: int, name: str = "default"
) -> None:
    """Put a fresh LoRA adapter on the base model, in place of the one before.

    Its initial weights depend on `seed` only. Sources: Hu et al. 2021 (arXiv 2106.09685); rsLoRA:
    arXiv 2312.03732; DoRA: arXiv 2402.09353; all through PEFT. Raises ConfigError for target
    modules that the model lacks or that cannot be adapted.
    """
    config = _config(loaded, settings)
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
    torch.manual_seed(seed)
    try:
        loaded.peft = get_peft_model(
            loaded.causal, config, adapter_name=name, autocast_adapter_dtype=True
        )
    except ValueError as error:
        raise ConfigError(_refusal(settings, str(error))) from error
    loaded.causal = loaded.peft.get_base_model()
    loaded.dropouts = []
    for path, module in loaded.peft.named_modules():
        if "lora_dropout" in path and isinstance(module, nn.Dropout):
            loaded.dropouts.append(module)
    set_dropout(loaded, False)


def drop_adapter(loaded: LoadedModel) -> None:
    """Return to the untouched base model."""
    if loaded.peft is not None:
        loaded.causal = loaded.peft.unload()
        loaded.peft = None


def use(loaded: LoadedModel, state: State | None, settings: TrainSettings) -> None:
    """Put an adapter with these weights on the base model, or none."""
    if state is None:
        drop_adapter(loaded)
        return
    if loaded.peft is None:
        new_adapter(loaded, settings, 0)
    set_adapter_state(loaded, state)


def put_on(loaded: LoadedModel, adapters: Mapping[str, tuple[State, TrainSettings]]) -> None:
    """Put several adapters on the base model, by name; each row of a batch may then have its own.

    Raises ModelError if the weights of one do not fit.
    """
    drop_adapter(loaded)
    for name, (state, settings) in adapters.items():
        if loaded.peft is None:
            new_adapter(loaded, settings, 0, name)
        else:
            loaded.peft.add_adapter(name, _config(loaded, settings))
        set_adapter_state(loaded, state, name)
    if loaded.peft is not None:
        loaded.peft.eval()  # PEFT mixes adapters in a batch in no other mode


def adapter_state(loaded: LoadedModel) -> State:
    """Return a copy of the adapter's weights."""
    return {name: tensor.detach().clone().cpu() for name, tensor in _weights(loaded).items()}


def set_adapter_state(
    loaded: LoadedModel, state: Mapping[str, Tensor], adapter: str = "default"
) -> None:
    """Put weights into an adapter that is on the model. Raises ModelError if they do not fit."""
    result = set_peft_model_state_dict(loaded.peft, dict(state), adapter_name=adapter)
    missing = [name for name in _weights(loaded, adapter) if name not in state]
    if result.unexpected_keys or missing:
        raise ModelError(
            f"adapter does not fit {loaded.name!r}: unknown weights {result.unexpected_keys[:3]}, "
            f"missing {missing[:3]}"
        )


def _weights(loaded: LoadedModel, adapter: str = "default") -> State:
    # PEFT would add the base's own weights if the output head is adapted.
    weights: State = get_peft_model_state_dict(
        loaded.peft, adapter_name=adapter, save_embedding_layers=False
    )
    return weights


def is_finite(loaded: LoadedModel) -> bool:
    """Return whether all weights of the present adapter are finite.

    They are not after a training that diverged.

    True without an adapter.
    """
    if loaded.peft is None:
        return True
    return all(tensor.isfinite().all() for tensor in _weights(loaded).values())


def without(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Inside, the model is the base model; the adapter comes back after."""
    if loaded.peft is None:
        return nullcontext()
    disabled: AbstractContextManager[None] = loaded.peft.disable_adapter()
    return disabled


@contextmanager
def active(loaded: LoadedModel, name: str) -> Iterator[None]:
    """Inside, the model is the base model with the adapter of this name (`BASE`: without any)."""
    if loaded.peft is None or name == BASE:
        with without(loaded):
            yield
        return
    loaded.peft.set_adapter(name, inference_mode=True)
    yield


def set_dropout(loaded: LoadedModel, on: bool) -> None:
    """Switch the adapter's dropout, the only one: the frozen base is always in evaluation mode."""
    for module in loaded.dropouts:
        module.train(on)


def no_dropout(loaded: LoadedModel) -> None:
    """Switch every dropout off, the base's own too: `model.train()` may have been called before."""
    for module in (loaded.peft or loaded.causal).modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def lora_config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    """Return the PEFT configuration that the settings describe.

    Raises ConfigError for target modules that the model lacks.
    """
    targets = settings.lora_target_modules
    _check_targets(loaded, targets)
    is_state_space = loaded.causal.config.model_type in _STATE_SPACE
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_READ_BY_KERNELS if is_state_space and targets == "all-linear" else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _refusal(settings: TrainSettings, error: str) -> str:
    """Say which setting PEFT refuses, by the name that is in its error."""
    for name, remedy in (("lora_dropout", "set it to 0"), ("use_dora", "set it to false")):
        if name in error:
            value = getattr(settings, name)
            return f"train.{name}: PEFT refuses {value!r} for this model: {error} {remedy}"
    targets = settings.lora_target_modules
    return (
        f"train.lora_target_modules: PEFT refuses {targets!r}: {error}; all-linear is the default"
    )


def _config(loaded: LoadedModel, settings: TrainSettings) -> LoraConfig:
    config = lora_config(loaded, settings)
    if not settings.load_in_4bit:
        # PEFT's documented way, in spite of the underscore.
        config._register_custom_module({nn.Linear: LoraLinear})
    return config


def _check_targets(loaded: LoadedModel, targets: str | tuple[str, ...]) -> None:
    """Refuse at once what PEFT refuses when training begins, and names that it would ignore."""
    if targets == "all-linear":
        return
    modules = dict(loaded.causal.named_modules())
    # As PEFT reads them: a single text is a pattern for whole names, a list holds whole names or
    # their ends.
    if isinstance(targets, str):
        _check_target(loaded, modules, targets, targets, hint=True)
        return
    for end in targets:
        _check_target(loaded, modules, end, rf"(.*\.)?{re.escape(end)}", hint=False)


def _check_target(
    loaded: LoadedModel, modules: Mapping[str, nn.Module], written: str, pattern: str, *, hint: bool
) -> None:
    try:
        named = [module for name, module in modules.items() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"train.lora_target_modules: {written!r} is no pattern ({error}); use a list of names"
        ) from error
    if named and all(_has_matrix(module) for module in named):
        return
    problem = "names what is no layer with a weight matrix" if named else "names no module"
    remedy = ""
    if hint:
        remedy = f" (a single text is a pattern for whole names; for their ends write [{written}])"
    ends = {"all-linear"}
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D):
            ends.add(name.rpartition(".")[2])
    raise ConfigError(
        f"train.lora_target_modules: {written!r} {problem} of {loaded.name!r}{remedy}"
        f"{nearest(written, ends)}"
    )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim >= 2


class LoraLinear(Linear):  # type: ignore[misc]  # PEFT's classes have no types
    """PEFT's LoRA layer over an `nn.Linear`, as one operation if one plain adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, as PEFT's layer does."""
        base = self.base_layer
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or name not in self.lora_A
            or name in self.lora_variant
            or not isinstance(self.lora_dropout[name], nn.Identity)
            or self.lora_B[name].bias is not None
            # A subclass or a hook makes more of the layer than its weight's product.
            or type(base) is not nn.Linear
            or base._forward_hooks
            or base._forward_pre_hooks
            or _is_cast(base.weight)
        ):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        apply: Any = _Product.apply
        product: Tensor = apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return product


def _is_cast(weight: Tensor) -> bool:
    """Return whether autocast would give products with this weight another dtype than it has."""
    kind = weight.device.type
    return torch.is_autocast_enabled(kind) and weight.dtype != torch.get_autocast_dtype(kind)


class _Product(torch.autograd.Function):
    """x W' + bias + scale (x A') B', all products in the dtype of W.

    W and its bias are frozen; A and B are in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a = a.to(weight.dtype)
        b = b.to(weight.dtype)
        low = flat @ a.t()
        result = functional.linear(flat, weight, bias)
        _add_product(result, low, b.t(), scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        ctx.input_dtype = x.dtype
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        flat, low, weight, a, b = ctx.saved_tensors
        down = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = down @ b
        for_b = (down.t() @ low).float().mul_(ctx.scale)
        for_a = (low_gradient.t() @ flat).float().mul_(ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, None, None, for_a, for_b, None
        for_x = down @ weight
        _add_product(for_x, low_gradient, a, ctx.scale)
        for_x = for_x.to(ctx.input_dtype).view(*gradient.shape[:-1], -1)
        return for_x, None, None, for_a, for_b, None


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left @ right to `into`, in place."""
    if torch.compiler.is_compiling():
        _add_product_opaquely(into, left, right, scale)
    else:
        into.addmm_(left, right, alpha=scale)


# A compiler that sees `addmm_` makes it a product of its own, and a copy.
@torch.library.custom_op("fulcrum::add_product", mutates_args=("into",))
def _add_product_opaquely(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    into.addmm_(left, right, alpha=scale)
