"""Measure what this machine allows at most: the matrix products of a frozen body, nothing else.

For each linear layer of the body y = x W' and dx = dy W are timed with the model's own shapes and
dtype, on rows of 1,024 tokens: the frozen weights need no gradient of their own. Adapters,
attention, norms, the head and the loss are left out.
"""

import sys
import time

import torch
from torch import nn

from fulcrum.config.sections import TrainSettings
from fulcrum.model import base_model

TOKENS, REPEATS = 1024, 5


def ceiling(name: str) -> float:
    """Tokens a second."""
    loaded = base_model.load(name, TrainSettings())
    layers = [module for module in loaded.body.modules() if isinstance(module, nn.Linear)]
    shapes: dict[tuple[int, int], int] = {}
    for layer in layers:
        shapes[layer.weight.shape] = shapes.get(layer.weight.shape, 0) + 1
    seconds = 0.0
    with torch.no_grad():
        for (out, into), number in shapes.items():
            weights = [layer.weight for layer in layers if layer.weight.shape == (out, into)]
            x, dy = (
                torch.randn(TOKENS, into).to(loaded.dtype),
                torch.randn(TOKENS, out).to(loaded.dtype),
            )
            best = float("inf")
            for _ in range(REPEATS):
                started = time.perf_counter()
                for weight in weights:
                    x @ weight.t()
                    dy @ weight
                best = min(best, time.perf_counter() - started)
            seconds += best * number / len(weights)
    return TOKENS / seconds


if __name__ == "__main__":
    print(ceiling(sys.argv[1]))
