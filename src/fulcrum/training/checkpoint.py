"""Checkpoints of one training: written whole or not at all, and checked by hash when they are read.

The last two are kept, because a disk may damage what it reported as written: training resumes from
the newest one that is whole. If none is, it starts again, and ends with the same bits.
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
    """What a resumed training needs next to weights and optimizer."""

    done: int = 0  # finished steps
    best_step: int = 0
    best_dev: float = math.inf  # nats per token
    dev: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    history: list[TrainPoint] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    stale: int = 0  # dev losses in a row that were no better


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps."""

    adapter: State
    best: State  # the adapter that was best on dev rows
    optimizer: dict[str, Any]  # AdamW's state
    progress: Progress


def write(folder: Path, identity: str, checkpoint: Checkpoint) -> None:
    """Write checkpoint-N into `folder`, and drop all but the `KEPT` newest.

    The state of the random generator is stored too. Raises StoreError if the disk refuses; older
    checkpoints stay.
    """

    def fill(place: Path) -> None:
        (place / "adapter.safetensors").write_bytes(save(checkpoint.adapter))
        (place / "best.safetensors").write_bytes(save(checkpoint.best))
        packed = io.BytesIO()
        torch.save({"optimizer": checkpoint.optimizer, "rng": torch.get_rng_state()}, packed)
        (place / "optimizer.pt").write_bytes(packed.getvalue())
        state = {"identity": identity, **plain(checkpoint.progress)}
        (place / "state.json").write_text(json.dumps(state))

    store.write_folder(folder / f"checkpoint-{checkpoint.progress.done}", fill)
    for old in _in_order(folder)[:-KEPT]:
        store.drop_folder(old)


def newest(folder: Path, identity: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None, and set its random state.

    Each damaged one is reported to `say`. Raises StoreError if the checkpoint was made with other
    settings, data or model.
    """
    for partial in folder.glob(".*"):  # what a killed process was writing
        shutil.rmtree(partial, ignore_errors=True)
    for place in reversed(_in_order(folder)):
        damaged = store.damaged(place)
        if not damaged:
            return _read(place, identity)
        say(
            f"{place}: not used: {', '.join(damaged)} damaged or missing; resuming from an older "
            "checkpoint, or from the start"
        )
    return None


def _read(place: Path, identity: str) -> Checkpoint:
    state = store.read_json(place / "state.json")
    if state.pop("identity", None) != identity:
        raise StoreError(
            f"{place}: made with other settings, data or model; choose another output_dir"
        )
    if state["best_dev"] is None:
        state["best_dev"] = math.inf
    state["dev"] = [(step, value) for step, value in state["dev"]]
    state["history"] = [TrainPoint(**point) for point in state["history"]]
    saved = torch.load(place / "optimizer.pt", weights_only=True)
    torch.set_rng_state(saved["rng"])
    return Checkpoint(
        adapter=load_file(place / "adapter.safetensors"),
        best=load_file(place / "best.safetensors"),
        optimizer=saved["optimizer"],
        progress=Progress(**state),
    )


def _in_order(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first; copies under other names do not count."""
    by_step = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            by_step[int(number)] = path
    return [by_step[step] for step in sorted(by_step)]
