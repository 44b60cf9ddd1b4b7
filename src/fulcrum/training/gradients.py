"""What a row would teach: the gradient of its loss in the adapter's B matrices, sketched.

The gradient of B in a layer is a sum over a row's tokens of (gradient at the layer's output) x
(input after A). Both factors of every token pass through a hook in the backward pass; there the
first is projected to a few dimensions, the products are summed over each row's tokens, and a
count-sketch of all layers' sums is what is kept: cosines of gradients stay, and a packed row of
many examples costs one forward and one backward pass.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
_BLOCK = 512  # rows whose gradients are kept together: so many are taken again after a kill
# Dimensions that are left of a layer's output: cosines of SmolLM2-135M's gradients are off by 0.03.
_PROJECTED = 16


def gradients(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    *,
    budget: int = 1536,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Return sketches of the gradients of examples' mean losses: (examples, d).

    They are taken with respect to the present adapter's B matrices.

    Source: LESS (Xia et al. 2024, arXiv 2402.04333), which projects whole gradients; the
    count-sketch is that of Charikar, Chen and Farach-Colton (2002). LESS also divides general rows'
    gradients by Adam's moments; these are plain ones, of B alone. `budget` tokens are in a packed
    row.
    """
    layers = [module for module in loaded.peft.modules() if isinstance(module, LoraLinear)]
    if not layers:
        raise ModelError(
            f"{loaded.name!r}: none of its adapted layers is one whose gradients can be sketched "
            "(linear, not in 4 bits); "
            "choose rows by mix.select: similar"
        )
    compiled, loaded.compiled = loaded.compiled, []  # hooks do not reach into compiled layers
    found = torch.zeros(len(examples), DIMENSIONS)
    done = 0
    try:
        # Shared tokens would belong to several examples.
        for row in loss.rows(examples, loaded, budget, share=False):
            counts = torch.bincount(row.owner, minlength=len(examples))
            sketch = _Sketch(found, _owners(row), seed)
            handles = [
                hook for place, layer in enumerate(layers) for hook in sketch.listen(layer, place)
            ]
            try:
                total, _ = loss.row_loss(loaded, row, 1 / counts[row.owner].float())
                torch.autograd.backward(total)
            finally:
                for handle in handles:
                    handle.remove()
            done += int((counts > 0).sum())
            if progress is not None:
                progress(done)
    finally:
        loaded.compiled = compiled
        for parameter in loaded.peft.parameters():
            parameter.grad = None
    return found.numpy().astype(np.float64)


def _owners(row: loss.Row) -> Tensor:
    """Which example each token of a row belongs to: (n,), on the CPU.

    Segments are whole examples here.
    """
    starts = torch.tensor([segment.start for segment in row.segments])
    segment_of = torch.searchsorted(starts, torch.arange(row.ids.shape[1]), right=True) - 1
    example_of = torch.empty(len(row.segments), dtype=torch.int64)
    example_of[segment_of[row.where.cpu()]] = row.owner.cpu()
    return example_of[segment_of]


@dataclass
class _Sketch:
    """Adds every layer's part of the gradients to `into` (examples, d)."""

    into: Tensor
    owner: Tensor
    seed: int
    low: dict[int, Tensor] = field(default_factory=dict)

    def listen(self, layer: LoraLinear, place: int) -> list[Any]:
        name = layer.active_adapters[0]

        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # a pass whose activations are not kept; it comes again
                return
            flat = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self.low[place] = flat.float() @ module.lora_A[name].weight.detach().float().t()

            def arrived(gradient: Tensor) -> None:
                self._add(place, gradient.detach().reshape(-1, gradient.shape[-1]).float())

            hook: Any = output.register_hook
            hook(arrived)

        return [layer.register_forward_hook(forward)]

    def _add(self, place: int, gradient: Tensor) -> None:
        low, device = self.low.pop(place), gradient.device
        projection, buckets, signs = _random(self.seed, place, gradient.shape[1], low.shape[1])
        parts = torch.einsum("tk,tr->tkr", gradient @ projection.to(device), low).reshape(
            len(low), -1
        )
        members, where = torch.unique(self.owner, return_inverse=True)
        sums = (
            torch.zeros(len(members), parts.shape[1], device=device)
            .index_add_(0, where.to(device), parts)
            .cpu()
        )
        added = torch.zeros(len(members), self.into.shape[1]).index_add_(1, buckets, sums * signs)
        self.into[members] += added


@lru_cache(maxsize=1024)
def _random(seed: int, place: int, width: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's projection (width, k), and where its k x rank sums go, with which signs."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
    signs = torch.randint(0, 2, (width, _PROJECTED), generator=generator) * 2.0 - 1
    buckets = torch.randint(0, DIMENSIONS, (_PROJECTED * rank,), generator=generator)
    turned = torch.randint(0, 2, (_PROJECTED * rank,), generator=generator) * 2.0 - 1
    return signs / _PROJECTED**0.5, buckets, turned


def in_blocks(
    loaded: LoadedModel,
    examples: Mapping[str, Tokens],
    begin: Callable[[], object],
    place: Path | None,
    *,
    budget: int,
    seed: int,
    count: Count,
    unit: bool = False,
) -> tuple[npt.NDArray[np.float16], float]:
    """Return `gradients` of examples, in their order: (examples, d), and the seconds they took.

    Blocks of them are kept in `place` as they are done, by the examples' keys, and read back when a
    run is resumed. `begin` puts the adapter on the model, if there is anything to take. With
    `unit`, each is divided by its length, for cosines (of gradients that are small, half precision
    would keep nothing).
    """
    keys, found = list(examples), []
    seconds, begun = 0.0, False
    for start in range(0, len(keys), _BLOCK):
        block = keys[start : start + _BLOCK]
        names = store.fingerprint([block, budget])
        file = None if place is None else place / f"{start // _BLOCK:04}.npz"
        known = None if file is None else _kept(file, names)
        if known is None:
            began = time.perf_counter()
            if not begun:
                begin()
                begun = True
            counted = after(start, len(keys), count)
            taken = gradients(
                loaded, [examples[key] for key in block], budget=budget, seed=seed, progress=counted
            )
            if unit:
                taken /= np.maximum(
                    np.linalg.norm(taken, axis=1, keepdims=True), np.finfo(np.float64).tiny
                )
            known = taken.astype(np.float16), time.perf_counter() - began
            if file is not None:
                store.write_arrays(
                    file, names=np.array(names), gradients=known[0], seconds=np.array(known[1])
                )
        found.append(known[0])
        seconds += known[1]
    if begun:
        adapter.drop_adapter(loaded)
    return np.concatenate(found), seconds


def _kept(file: Path, names: str) -> tuple[npt.NDArray[np.float16], float] | None:
    """Return stored gradients of these rows, and the seconds they took; None if not whole."""
    try:
        with np.load(file) as kept:
            return (
                (kept["gradients"], float(kept["seconds"])) if str(kept["names"]) == names else None
            )
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
