"""What makes a run this run, and what its numbers depend on: settings, data, weights, code, versions, probes."""

import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from fulcrum import store
from fulcrum.config import Settings
from fulcrum.material import RunData
from fulcrum.model import LoadedModel


def manifest(kind: str, settings: Settings, loaded: LoadedModel, materials: Sequence[RunData]) -> dict[str, Any]:
    """What makes a run this run: settings, every data row, model and versions. Kept in the folder, compared at resume."""
    return {
        "kind": kind,
        "settings": settings.described(),
        "data": {part: [rows.fingerprints[part] for rows in materials] for part in materials[0].fingerprints},
        "left_out": [dict(sorted(rows.rejects.items())) for rows in materials],  # rows read and not used, by reason
        "environment": environment(loaded),
    }


def environment(loaded: LoadedModel) -> dict[str, str]:
    """Versions, code, weights and choices that a number depends on."""
    libraries = ("fulcrum-llm", "torch", "transformers", "peft", "accelerate", "numpy")
    return {
        "python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in libraries}, "code": store.code(), "model": loaded.name,
        "weights": loaded.fingerprint(), "parameters": str(loaded.parameters),
        "prompt": _prompt(loaded), "device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch."),
        "probes": f"packed {loaded.packed}, prefixes shared {loaded.shares}, head apart {loaded.split_head}, "
        f"layers compiled {bool(loaded.compiled)}",
    }  # fmt: skip


def _prompt(loaded: LoadedModel) -> str:
    """A hash of a rendered prompt: some templates write the date, and then tomorrow's tokens are others."""
    turns = [{"role": "user", "content": "x"}]
    return store.fingerprint(loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
