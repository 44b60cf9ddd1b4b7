"""The processes that a launcher started (`accelerate launch`, `torchrun`): who writes, what they agree on, what they share.

Every process runs the same program on the same rows; only an optimizer step's examples are divided among them. Adapters are
whole in each of them: small as they are, their gradients are summed in one message a step, which needs no wrapper around the
model. The frozen base is whole in each too, or spread over them where the launcher asks for FSDP: it has no gradients, so that
all there is to FSDP is to gather a layer's weights for as long as the layer runs.
"""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from fulcrum.core.errors import ConfigError, ModelError

T = TypeVar("T")
# What Accelerate's launcher may ask for with FSDP and Fulcrum does not do, or does by itself.
_NOT_DONE = (
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_ACTIVATION_CHECKPOINTING",
)


def processes() -> Any:
    """Accelerate's `PartialState`: `num_processes`, `process_index`, `is_main_process`, `wait_for_everyone()`."""
    return PartialState(
        cpu=not torch.cuda.is_available()
    )  # the first call decides, and must not wait for a GPU


def writes() -> bool:
    """Whether this process is the one that writes files."""
    return bool(processes().is_main_process)


def is_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and started one: with `--cpu` it leaves starting to MPI."""
    return {
        "ACCELERATE_MIXED_PRECISION",
        "MASTER_ADDR",
    } <= os.environ.keys() and processes().num_processes == 1


def agreed(value: T) -> T:
    """The first process's value, in every process: for what is found by timing, which may differ between them."""
    found = [value]
    if processes().num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def total(numbers: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over all processes; between GPUs only what lies on one (`device`) can be summed."""
    if processes().num_processes == 1:
        return numbers
    summed: Tensor = reduce(numbers.to(device), reduction="sum")
    return summed.to(numbers.device)


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes. A parameter that no process has a gradient for keeps none, as in one process."""
    if processes().num_processes == 1:
        return
    known = list(parameters)
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in known]
    had = torch.tensor([float(each.grad is not None) for each in known], device=parts[0].device)
    summed = total(torch.cat([had, *(part.flatten() for part in parts)]), had.device)
    sizes = [len(known), *(part.numel() for part in parts)]
    had, *flat = torch.split(summed, sizes)
    for each, counted, gradient in zip(known, had.tolist(), flat, strict=True):
        each.grad = gradient.view_as(each) if counted else None


def wants_shards() -> bool:
    """Whether the launcher asks for FSDP. Raises ConfigError where it asks for a kind of it that is not done here."""
    if (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true"
        or processes().num_processes == 1
    ):
        return False
    wrong = [
        f"{name.lower()}: true" for name in _NOT_DONE if os.environ.get(name, "").lower() == "true"
    ]
    version = os.environ.get("FSDP_VERSION", "1")
    wrong += [f"fsdp_version: {version}"] * (version != "2")
    if wrong:
        raise ConfigError(
            f"the launcher asks for FSDP with {', '.join(wrong)}; examples/accelerate/fsdp.yaml is what works"
        )
    return True


def spread(causal: Any, body: nn.Module, device: torch.device) -> None:
    """Spread a frozen model's layers over the processes, on their devices; what is not in a layer stays whole.

    The root is the `body`, through which training, scoring and generation all go, with the output head beside it: embeddings
    and head, which often share their weights, are left whole. Each process holds 1/n of every layer, and one layer more while
    that runs. Source: FSDP 2, `torch.distributed.fsdp.fully_shard`. Raises ModelError for a model without layers of the
    usual kind.
    """
    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "FSDP: this model has no layers of a kind that could be spread; use multi_gpu.yaml"
        )
    options = {
        "mesh": init_device_mesh(device.type, (processes().num_processes,)),
        "reshard_after_forward": FullyShardedDataParallelPlugin().reshard_after_forward,
    }
    for layer in layers:
        fully_shard(layer, **options)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    fully_shard(
        body,
        ignored_params={weight for weight in body.parameters() if id(weight) not in inside},
        **options,
    )
