"""Checkpoints of one training: written whole or not at all, checked by hash when read, the last two kept.

Two, since a disk may damage what it said it wrote: the newest that is whole is gone on with. Where none is, training begins
anew, to the same bits.
"""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.store import plain
from fulcrum.core.types import TrainPoint
from fulcrum.model.adapter import State

KEPT = 2


@dataclass
class Progress:
    """All that a resumed training needs beside weights and optimizer. `done` steps are finished."""

    done: int = 0
    best_step: int = 0
    best_dev: float = math.inf
    dev: list[tuple[int, float]] = field(default_factory=list)
    history: list[TrainPoint] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    stale: int = 0  # dev losses in a row that were no better


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps: the adapter, its weights that were best on dev, AdamW's state, how far it is."""

    adapter: State
    best: State
    optimizer: dict[str, Any]
    progress: Progress


def write(folder: Path, identity: str, found: Checkpoint) -> None:
    """Write checkpoint-N into `folder`, and drop all but the `KEPT` newest. The random state is this moment's.

    Raises StoreError where the disk refuses; what was there stays.
    """

    def fill(place: Path) -> None:
        (place / "adapter.safetensors").write_bytes(save(found.adapter))
        (place / "best.safetensors").write_bytes(save(found.best))
        packed = io.BytesIO()
        torch.save({"optimizer": found.optimizer, "rng": torch.get_rng_state()}, packed)
        (place / "optimizer.pt").write_bytes(packed.getvalue())
        (place / "state.json").write_text(
            json.dumps({"identity": identity, **plain(found.progress)})
        )

    store.write_folder(folder / f"checkpoint-{found.progress.done}", fill)
    for old in _in_order(folder)[:-KEPT]:
        store.drop_folder(old)


def newest(folder: Path, identity: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, its random state set; None where there is none. `say` is told of damaged ones.

    Raises StoreError where it was made with other settings, data or model.
    """
    for partial in folder.glob(".*"):  # what a killed process was writing
        shutil.rmtree(partial, ignore_errors=True)
    for place in reversed(_in_order(folder)):
        if damaged := store.damaged(place):
            say(
                f"{place}: not gone on with: {', '.join(damaged)} damaged or missing; an older one or none is used"
            )
            continue
        data = store.read_json(place / "state.json")
        if data.pop("identity", None) != identity:
            raise StoreError(
                f"{place}: made with other settings, data or model; choose another output_dir"
            )
        data["best_dev"] = math.inf if data["best_dev"] is None else data["best_dev"]
        data["dev"] = [(step, value) for step, value in data["dev"]]
        data["history"] = [TrainPoint(**point) for point in data["history"]]
        saved = torch.load(place / "optimizer.pt", weights_only=True)
        torch.set_rng_state(saved["rng"])
        adapter, best = (load_file(place / f"{name}.safetensors") for name in ("adapter", "best"))
        return Checkpoint(adapter, best, saved["optimizer"], Progress(**data))
    return None


def _in_order(folder: Path) -> list[Path]:
    numbered = (
        path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()
    )  # no copies of some
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))
