"""Fulcrum: leverage learning. Adapt a language model with a few task rows and much general data, and prove what it bought.

Names are loaded on first use, so that `import fulcrum` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulcrum.config import MixSettings as Mix
    from fulcrum.config import TaskSettings as Task
    from fulcrum.ingest import read
    from fulcrum.mix import plan
    from fulcrum.records import Anchor, Example, Message, Results
    from fulcrum.use import compare, load_adapter, train
    from fulcrum.use import evaluate_run as evaluate

_HOME = {
    "Anchor": "records.Anchor",
    "Example": "records.Example",
    "Message": "records.Message",
    "Mix": "config.MixSettings",
    "Results": "records.Results",
    "Task": "config.TaskSettings",
    "compare": "use.compare",
    "evaluate": "use.evaluate_run",
    "load_adapter": "use.load_adapter",
    "plan": "mix.plan",
    "read": "ingest.read",
    "train": "use.train",
}

__all__ = [
    "Anchor", "Example", "Message", "Mix", "Results", "Task",
    "compare", "evaluate", "load_adapter", "plan", "read", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fulcrum' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _HOME[name].partition(".")
    return getattr(import_module(f"fulcrum.{module}"), attribute)
