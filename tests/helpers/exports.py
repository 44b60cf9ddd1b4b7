"""Train a run to export."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fulcrum
from fulcrum.core import store
from helpers.finished_runs import settings
from helpers.tiny import write_rows

WORDS = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")


def moved(folder: Path) -> Path:
    """The run with an adapter that changes answers: one trained for two steps hardly does."""
    file = folder / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = {
        n: t if "lora_A" in n else 0.2 * torch.randn(t.shape, generator=generator)
        for n, t in load_file(file).items()
    }
    sums = folder / "adapter" / store.SUMS
    old = store.file_sha256(file)
    save_file(state, file, metadata={"format": "pt"})
    sums.write_text(sums.read_text().replace(old, store.file_sha256(file)))
    return folder


def trained(place: Path, model: Path, **changes: Any) -> Path:
    rows = [(f"colour {word}", ("red", "blue")[k % 2]) for k, word in enumerate(WORDS)]
    for name, part in (("train", rows[:6]), ("dev", rows[6:9]), ("test", rows[9:])):
        write_rows(place / f"{name}.jsonl", part)
    asked = settings(place, place / "run", **{"model": str(model), **changes})
    fulcrum.train(**asked)
    return moved(place / "run")
