"""Save an adapter as a run does."""

from pathlib import Path

import torch

from fulcrum.core.types import Anchor
from fulcrum.model import adapter, save
from fulcrum.model.base_model import LoadedModel
from helpers.tiny import tiny_settings


def saved(loaded: LoadedModel, folder: Path, anchors: dict[str, Anchor | None]) -> Path:
    adapter.new_adapter(loaded, tiny_settings(), 0)
    generator = torch.Generator().manual_seed(
        1
    )  # B starts at zero: an adapter that changes nothing
    state = adapter.adapter_state(loaded)
    adapter.set_adapter_state(
        loaded, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    )
    return save.save_adapter(loaded, folder, anchors)
