"""Make the rows and settings of one cell."""

from typing import Any

from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.types import Anchor, Example, Message, Task
from fulcrum.data.run_data import RunData
from helpers.tiny import tiny_settings

COLOURS = ("red", "blue", "green")


def row(kind: str, number: int, answer: str | None = None, group: str | None = None) -> Example:
    turns = (
        Message("user", f"{kind} {number}"),
        Message("assistant", answer or COLOURS[number % 3]),
    )
    return Example(turns, group or f"{kind}{number}", f"{kind}:{number}")


def rows(kind: str, number: int) -> tuple[Example, ...]:
    return tuple(row(kind, k) for k in range(number))


def made(
    task_rows: int = 6, general_for: int = 6, repeats: tuple[int, ...] = (1, 2), name: str = "task"
) -> RunData:
    """Rows of a comparison: two general rows for a task row."""
    task = Task(
        name,
        rows("own", task_rows),
        (),
        rows("test", 3),
        Anchor("Name it."),
        ("nll", "accuracy"),
        3,
    )
    general = rows("general", 2 * max(repeats) * general_for)
    return RunData(
        (task,), general, {"pool": rows("held", 2)}, {}, repeats, general_for, batch_size=4
    )


def chosen(**compare: Any) -> Settings:
    task = {
        "train": "rows.jsonl",
        "anchor": "Name it.",
        "metrics": ["nll", "accuracy"],
        "max_new_tokens": 3,
    }
    train = tiny_settings(learning_rate=1e-2).model_dump()
    return settings_from_dict(
        {
            "task": task,
            "mix": {"general_per_task": 2, "repeats": 2},
            "train": train,
            "compare": compare,
            "eval": {"draws": 100},
        }
    )
