"""Train on a small stream."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fulcrum.core.types import Tokens
from fulcrum.data import mix
from fulcrum.data.token_stream import Stream
from fulcrum.model import adapter, generate
from fulcrum.training import loop
from helpers.tiny import load_tiny, tiny_settings


def tokens(length: int, seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    return Tokens(rng.integers(4, 360, length), np.arange(length) >= length // 2)


TASK = [tokens(6 + 3 * i, i) for i in range(4)]
GENERAL = [tokens(12 + i, 100 + i) for i in range(16)]
DEV = [tokens(15, 50), tokens(9, 51)]


def stream(repeats: int = 2, general: int = 16, seed: int = 0) -> Stream:
    plan = mix.plan(
        4,
        general,
        repeats=repeats,
        general_per_task=general / (4 * repeats),
        order="random",
        seed=seed,
    )
    return Stream(plan, TASK, GENERAL[:general])


def train(
    folder: Path, *, seed: int = 0, rows: Stream | None = None, **options: Any
) -> tuple[adapter.State, Any]:
    """Train on a fresh copy of the tiny model, so that runs share nothing."""
    run = {name: options.pop(name) for name in ("checkpoint", "progress", "say") if name in options}
    kind = options.pop("kind", "llama")
    settings = tiny_settings(
        **{"learning_rate": 5e-3, "evaluations": 3, "save_every": 1, **options}
    )
    loaded = load_tiny(folder, kind)

    def dev_loss() -> float:
        return generate.mean_loss(loaded, DEV)

    recipe = loop.Recipe(settings, seed, repeats=2)
    return loop.train(loaded, rows or stream(), recipe, dev_loss=dev_loss, **run)


def same(a: adapter.State, b: adapter.State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
