"""A linear layer with a LoRA adapter as one operation: what PEFT computes, in fewer passes over the activations.

PEFT multiplies, scales and adds the adapter's output in separate steps, each a pass over (tokens, width) forward and another
one backward. Here products accumulate into the layer's own output, and into the input's gradient, where they belong.
PEFT's class remains the parent: names, saving, merging and every special case (DoRA, dropout, several adapters) are its own.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LoraLinear(Linear):  # type: ignore[misc]  # PEFT's classes have no types
    """PEFT's LoRA layer over an `nn.Linear`, computed by `_Product` where one plain adapter is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        base = self.base_layer
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        special = args or kwargs or self.disable_adapters or self.merged or name not in self.lora_A or name in self.lora_variant
        special = special or not isinstance(self.lora_dropout[name], nn.Identity) or self.lora_B[name].bias is not None
        # A subclass or a hook makes more of the layer than its weight's product.
        special = special or type(base) is not nn.Linear or base._forward_hooks or base._forward_pre_hooks
        if special or _is_cast(base.weight):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        apply: Any = _Product.apply
        product: Tensor = apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return product


def _is_cast(weight: Tensor) -> bool:
    """Whether autocast would give products with this weight another dtype than it has."""
    kind = weight.device.type
    return torch.is_autocast_enabled(kind) and weight.dtype != torch.get_autocast_dtype(kind)


@torch.library.custom_op("fulcrum::add_product", mutates_args=("into",))
def _opaque(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    into.addmm_(left, right, alpha=scale)


def _add_product(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """into += scale * left @ right, in place. A compiler that sees `addmm_` makes it a product beside, and a copy."""
    if torch.compiler.is_compiling():
        _opaque(into, left, right, scale)
    else:
        into.addmm_(left, right, alpha=scale)


class _Product(torch.autograd.Function):
    """x W' + bias + scale (x A') B', all products in the dtype of W. W and its bias are frozen; A and B are in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat, a, b = (tensor.to(weight.dtype) for tensor in (x.reshape(-1, x.shape[-1]), a, b))
        low = flat @ a.t()
        result = functional.linear(flat, weight, bias)
        _add_product(result, low, b.t(), scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.input_dtype = scale, x.dtype
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        flat, low, weight, a, b = ctx.saved_tensors
        down = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = down @ b
        for_b = (down.t() @ low).float().mul_(ctx.scale)
        for_a = (low_gradient.t() @ flat).float().mul_(ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, None, None, for_a, for_b, None
        for_x = down @ weight
        _add_product(for_x, low_gradient, a, ctx.scale)
        return for_x.to(ctx.input_dtype).view(*gradient.shape[:-1], -1), None, None, for_a, for_b, None
