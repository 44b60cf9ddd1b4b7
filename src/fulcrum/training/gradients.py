"""Sketches of gradients: what a row would teach the adapter's B matrices, in few numbers.

The gradient of B in a layer is a sum over a row's tokens of (gradient at the layer's output) x
(input after A). Hooks see both factors of every token in the backward pass. There the first is
projected to a few dimensions, the products are summed over each row's tokens, and a count-sketch
joins the sums of all layers. Cosines of gradients are preserved, and a packed row of many examples
costs one forward and one backward pass.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fulcrum.core import store
from fulcrum.core.errors import ModelError
from fulcrum.core.progress import Count, after
from fulcrum.core.types import FloatArray, Tokens
from fulcrum.model import adapter, loss
from fulcrum.model.adapter import LoraLinear
from fulcrum.model.base_model import LoadedModel

GRADIENTS_LABEL = "rows whose gradients are taken"
DIMENSIONS = 4096  # of a sketch
_BLOCK = 512  # rows whose sketches are stored together: at most so many are repeated after a kill
# Dimensions left of a layer's output: cosines of SmolLM2-135M's gradients are then off by 0.03.
_PROJECTED = 16


@dataclass(frozen=True)
class SketchOptions:
    """How gradients are sketched."""

    budget: int = 1536  # tokens in a packed row
    seed: int = 0  # of the projections
    normalise: bool = False  # to unit length, for cosines: half precision loses small gradients


def sketch(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    options: SketchOptions,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Return sketches of the gradients of examples' mean losses: (examples, DIMENSIONS).

    They are taken with respect to the present adapter's B matrices. `progress` is called with the
    number of examples done.

    Source: LESS (Xia et al. 2024, arXiv 2402.04333), which projects whole gradients; the
    count-sketch is that of Charikar, Chen and Farach-Colton (2002). LESS also divides general rows'
    gradients by Adam's moments; these are plain ones, of B alone.
    """
    layers = [module for module in loaded.peft.modules() if isinstance(module, LoraLinear)]
    if not layers:
        raise ModelError(
            f"{loaded.name!r}: none of its adapted layers is one whose gradients can be sketched "
            "(linear, not in 4 bits); choose rows by mix.select: similar"
        )
    compiled = loaded.compiled
    loaded.compiled = []  # hooks do not reach into compiled layers
    sketches = torch.zeros(len(examples), DIMENSIONS)
    done = 0
    try:
        # Shared tokens would belong to several examples.
        for row in loss.rows(examples, loaded, options.budget, share=False):
            counts = torch.bincount(row.owner, minlength=len(examples))
            _add_row(loaded, layers, row, 1 / counts[row.owner].float(), sketches, options.seed)
            done += int((counts > 0).sum())
            if progress is not None:
                progress(done)
    finally:
        loaded.compiled = compiled
        for parameter in loaded.peft.parameters():
            parameter.grad = None
    result = sketches.numpy().astype(np.float64)
    if options.normalise:
        lengths = np.linalg.norm(result, axis=1, keepdims=True)
        result /= np.maximum(lengths, np.finfo(np.float64).tiny)
    return result


def _add_row(
    loaded: LoadedModel,
    layers: Sequence[LoraLinear],
    row: loss.Row,
    weights: Tensor,
    sketches: Tensor,
    seed: int,
) -> None:
    """Add the gradients of a packed row's examples to their sketches."""
    hooks = _Hooks(sketches, _owners(row), seed)
    handles = [hooks.listen(layer, number) for number, layer in enumerate(layers)]
    try:
        total, _ = loss.row_loss(loaded, row, weights)
        torch.autograd.backward(total)
    finally:
        for handle in handles:
            handle.remove()


def _owners(row: loss.Row) -> Tensor:
    """Return which example each token of a row belongs to: (n,), on the CPU.

    Segments are whole examples here.
    """
    starts = torch.tensor([segment.start for segment in row.segments])
    segment_of = torch.searchsorted(starts, torch.arange(row.ids.shape[1]), right=True) - 1
    example_of = torch.empty(len(row.segments), dtype=torch.int64)
    example_of[segment_of[row.where.cpu()]] = row.owner.cpu()
    return example_of[segment_of]


@dataclass
class _Hooks:
    """Hooks that add every layer's part of the gradients to the sketches of a row's examples."""

    sketches: Tensor  # (examples, DIMENSIONS)
    owner: Tensor  # example of each of the row's tokens: (n,)
    seed: int
    inputs: dict[int, Tensor] = field(default_factory=dict)  # after A, by layer: (n, rank)

    def listen(self, layer: LoraLinear, number: int) -> Any:
        """Put the hooks on layer `number`; return the handle that removes them."""
        name = layer.active_adapters[0]

        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # a pass that keeps no activations; it will be repeated
                return
            flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self.inputs[number] = flat.float() @ module.lora_A[name].weight.detach().float().t()

            def backward(gradient: Tensor) -> None:
                self._add(number, gradient.detach().reshape(-1, gradient.shape[-1]).float())

            register: Any = output.register_hook
            register(backward)

        return layer.register_forward_hook(forward)

    def _add(self, number: int, gradient: Tensor) -> None:
        low = self.inputs.pop(number)
        device = gradient.device
        projection, buckets, signs = _random(self.seed, number, gradient.shape[1], low.shape[1])
        products = torch.einsum("tk,tr->tkr", gradient @ projection.to(device), low)
        products = products.reshape(len(low), -1)
        members, member_of = torch.unique(self.owner, return_inverse=True)
        sums = torch.zeros(len(members), products.shape[1], device=device)
        sums = sums.index_add_(0, member_of.to(device), products).cpu()
        added = torch.zeros(len(members), self.sketches.shape[1])
        self.sketches[members] += added.index_add_(1, buckets, sums * signs)


@lru_cache(maxsize=1024)
def _random(seed: int, layer: int, width: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's projection (width, k), and the buckets and signs of its k x rank sums."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    signs = torch.randint(0, 2, (width, _PROJECTED), generator=generator) * 2.0 - 1
    buckets = torch.randint(0, DIMENSIONS, (_PROJECTED * rank,), generator=generator)
    bucket_signs = torch.randint(0, 2, (_PROJECTED * rank,), generator=generator) * 2.0 - 1
    return signs / _PROJECTED**0.5, buckets, bucket_signs


def sketch_in_blocks(
    loaded: LoadedModel,
    examples: Sequence[tuple[str, Tokens]],
    options: SketchOptions,
    *,
    put_adapter: Callable[[], object],
    folder: Path | None,
    count: Count,
) -> tuple[npt.NDArray[np.float16], float]:
    """Return the sketches of examples, in their order, and the seconds they took.

    `examples` are pairs of key and tokens; a key may occur twice. Blocks of sketches are stored in
    `folder` under the keys, and read back when a run is resumed. `put_adapter` is called once,
    before the first block that is not stored.
    """
    blocks = []
    seconds = 0.0
    has_adapter = False
    for start in range(0, len(examples), _BLOCK):
        block = examples[start : start + _BLOCK]
        name = store.fingerprint([[key for key, _ in block], options.budget])
        file = None if folder is None else folder / f"{start // _BLOCK:04}.npz"
        stored = None if file is None else _read(file, name)
        if stored is None:
            began = time.perf_counter()
            if not has_adapter:
                put_adapter()
                has_adapter = True
            progress = after(start, len(examples), count)
            sketches = sketch(loaded, [tokens for _, tokens in block], options, progress)
            stored = sketches.astype(np.float16), time.perf_counter() - began
            if file is not None:
                _write(file, name, *stored)
        blocks.append(stored[0])
        seconds += stored[1]
    if has_adapter:
        adapter.drop_adapter(loaded)
    return np.concatenate(blocks), seconds


def _write(file: Path, name: str, sketches: npt.NDArray[np.float16], seconds: float) -> None:
    store.write_arrays(file, names=np.array(name), gradients=sketches, seconds=np.array(seconds))


def _read(file: Path, name: str) -> tuple[npt.NDArray[np.float16], float] | None:
    """Return the sketches of a stored block and the seconds they took; None if it is another."""
    try:
        with np.load(file) as stored:
            if str(stored["names"]) != name:
                return None
            return stored["gradients"], float(stored["seconds"])
    except (OSError, ValueError, KeyError, BadZipFile):
        return None  # missing or damaged: it is made again
