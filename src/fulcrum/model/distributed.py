"""The processes that a launcher started: who writes, what they agree on, what they share.

The launcher is `accelerate launch` or `torchrun`. Every process runs the same program on the same
rows; only an optimizer step's examples are divided among them. Adapters are whole in each process:
they are small, so their gradients are summed in one message a step, without a wrapper around the
model. The frozen base is whole in each too, or spread over them if the launcher asks for FSDP. It
has no gradients, so FSDP only gathers a layer's weights for as long as the layer runs.
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
# Options of Accelerate's launcher for FSDP that Fulcrum lacks, or decides by itself.
_UNSUPPORTED = (
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_ACTIVATION_CHECKPOINTING",
)


def processes() -> Any:
    """Return Accelerate's `PartialState`.

    It knows `num_processes`, `process_index`, `is_main_process` and `wait_for_everyone()`.
    """
    # The first call decides, and must not wait for a GPU that is not there.
    return PartialState(cpu=not torch.cuda.is_available())


def writes() -> bool:
    """Return whether this process is the one that writes files."""
    return bool(processes().is_main_process)


def is_alone() -> bool:
    """Return whether `accelerate launch` started one process only.

    With `--cpu` it leaves more to MPI.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    return launched and processes().num_processes == 1


def agreed(value: T) -> T:
    """Return the first process's value in every process, for what timing may decide differently."""
    values = [value]
    if processes().num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def total(numbers: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over all processes.

    GPUs can only sum what lies on one, so it goes through `device`.
    """
    if processes().num_processes == 1:
        return numbers
    summed: Tensor = reduce(numbers.to(device), reduction="sum")
    return summed.to(numbers.device)


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes.

    A parameter without a gradient in any process keeps none, as in one process.
    """
    if processes().num_processes == 1:
        return
    own = list(parameters)
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in own]
    has_gradient = [float(each.grad is not None) for each in own]
    counts = torch.tensor(has_gradient, device=parts[0].device)
    summed = total(torch.cat([counts, *(part.flatten() for part in parts)]), counts.device)
    sizes = [len(own), *(part.numel() for part in parts)]
    counts, *flat = torch.split(summed, sizes)
    for each, count, gradient in zip(own, counts.tolist(), flat, strict=True):
        each.grad = gradient.view_as(each) if count else None


def wants_shards() -> bool:
    """Return whether the launcher asks for FSDP.

    Raises ConfigError for a kind that is not supported.
    """
    asks = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not asks or processes().num_processes == 1:
        return False
    wrong = []
    for name in _UNSUPPORTED:
        if os.environ.get(name, "").lower() == "true":
            wrong.append(f"{name.lower()}: true")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        wrong.append(f"fsdp_version: {version}")
    if wrong:
        raise ConfigError(
            f"the launcher asks for FSDP with {', '.join(wrong)}; examples/accelerate/fsdp.yaml is "
            "what works"
        )
    return True


def spread(body: nn.Module, device: torch.device) -> None:
    """Spread a frozen model's layers over the processes; what is not in a layer stays whole.

    The root is the `body`, which training, scoring and generation all run through; the output head
    is outside. Embeddings and head, which often share their weights, are left whole. Each process
    holds 1/n of every layer, and all of the layer that runs. Source: FSDP 2,
    `torch.distributed.fsdp.fully_shard`. Raises ModelError for a model without layers of the usual
    kind.
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
    outside = {weight for weight in body.parameters() if id(weight) not in inside}
    fully_shard(body, ignored_params=outside, **options)
