"""Make settings of runs, kill them at a step, and compare what they leave."""

import json
from pathlib import Path
from typing import Any

from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.progress import Silent
from fulcrum.core.types import TrainPoint


def settings(place: Path, output: Path, **changes: Any) -> Settings:
    """One small run; keys with dots reach into sections."""
    data: dict[str, Any] = {
        "model": str(place / "model"),
        "task": {
            "train": str(place / "train.jsonl"),
            "dev": str(place / "dev.jsonl"),
            "test": str(place / "test.jsonl"),
            "anchor": "Name it.",
            "max_new_tokens": 4,
        },
        "general": str(place / "pool.jsonl"),
        "mix": {"general_per_task": 2, "repeats": 2},
        "train": {
            "batch_size": 4,
            "lora_r": 4,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "device": "cpu",
            "evaluations": 2,
            "save_every": 3,
        },
        "eval": {"general_rows": 2, "draws": 100},
        "output_dir": str(output),
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = data
        for name in sections:
            section = section[name]
        section[last] = value
    return settings_from_dict(data)


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing can catch a kill."""


class KillAfter(Silent):
    """Dies at the n-th optimizer step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def timeless(value: Any) -> Any:
    """Results without what differs between two equal runs: timings, memory, the folder's name."""
    if isinstance(value, dict):
        left_out = ("seconds", "peak_memory_bytes", "output_dir")
        return {key: timeless(item) for key, item in value.items() if key not in left_out}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
