"""Make settings of runs that are used once they are finished."""

from pathlib import Path
from typing import Any


def settings(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of two steps without general data, as keywords."""
    task = {part: str(place / f"{part}.jsonl") for part in ("train", "dev", "test")}
    return {
        "model": str(place / "model"),
        "task": {
            "name": "colour",
            "anchor": "Name it.",
            "max_new_tokens": 3,
            **task,
            **changes.pop("task", {}),
        },
        "mix": {"general_per_task": 0, "repeats": 1},
        "train": {
            "batch_size": 4,
            "lora_r": 2,
            "evaluations": 1,
            "dtype": "float32",
            "device": "cpu",
        },
        "eval": {"general_rows": 0, "draws": 100},
        "output_dir": str(output),
        **changes,
    }
