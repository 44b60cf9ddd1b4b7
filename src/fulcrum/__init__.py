"""Adapt a language model with few task rows and much general data, and prove what it brought.

Names are loaded on first use, so that `import fulcrum` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulcrum.api import (
        Mix,
        Task,
        compare,
        evaluate,
        load_adapter,
        quanta,
        scale,
        train,
        verify,
    )
    from fulcrum.core.types import Anchor, Example, Message, Results
    from fulcrum.data.mix import plan
    from fulcrum.data.task_data import read

_HOME = {
    "Anchor": "core.types.Anchor",
    "Example": "core.types.Example",
    "Message": "core.types.Message",
    "Mix": "api.Mix",
    "Results": "core.types.Results",
    "Task": "api.Task",
    "compare": "api.compare",
    "evaluate": "api.evaluate",
    "load_adapter": "api.load_adapter",
    "plan": "data.mix.plan",
    "quanta": "api.quanta",
    "read": "data.task_data.read",
    "scale": "api.scale",
    "train": "api.train",
    "verify": "api.verify",
}

__all__ = [
    "Anchor",
    "Example",
    "Message",
    "Mix",
    "Results",
    "Task",
    "compare",
    "evaluate",
    "load_adapter",
    "plan",
    "quanta",
    "read",
    "scale",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'fulcrum' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    module, _, attribute = _HOME[name].rpartition(".")
    return getattr(import_module(f"fulcrum.{module}"), attribute)
