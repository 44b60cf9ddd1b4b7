"""Write what the public Python functions give to python.json; `same_behaviour.py` compares it."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import fulcrum

RUN = "runs/python"
ORDERS = ("random", "epoch_stratified", "general_then_task", "task_then_general")


def main() -> None:
    """Call each function and write what it gives to python.json."""
    warnings.simplefilter("ignore")
    given = read_settings("python")
    task = fulcrum.Task(**given["task"])
    rows, rejects = fulcrum.read(task.train, group="group")
    found: dict[str, Any] = {
        "read": [[asdict(row) for row in rows], [asdict(reject) for reject in rejects]],
        "plan": {order: describe_plan(order) for order in ORDERS},
        "mix": fulcrum.Mix(general_per_task=2, repeats=3).model_dump(mode="json"),
        "train": asdict(fulcrum.train(**given)),
    }
    adapter = fulcrum.load_adapter(RUN)
    found["answer"] = adapter.answer(["colour ant 8", "colour owl 9"])
    first = fulcrum.Message("user", "colour bee 1")
    turns = [first, fulcrum.Message("assistant", "red"), fulcrum.Message("user", "and now?")]
    found["reply"] = adapter.reply([turns], max_new_tokens=6)
    anchor = adapter.anchor()
    found["anchor"] = [anchor == fulcrum.Anchor("Name it."), anchor]
    scores, predictions = fulcrum.evaluate(RUN, data="material/more.jsonl")
    found["evaluate"] = [[asdict(score) for score in scores], [asdict(one) for one in predictions]]
    given = read_settings("python-compare")
    found["compare"] = asdict(fulcrum.compare(**given))
    try:
        fulcrum.train(**{**given, "mix": {"repeat": 3}})
    except Exception as error:
        found["error"] = type(error).__name__
    Path("python.json").write_text(json.dumps(found, default=asdict), encoding="utf-8")


def read_settings(name: str) -> dict[str, Any]:
    """Return the settings of a file."""
    text = Path(f"settings/{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def describe_plan(order: str) -> dict[str, Any]:
    """Return the plan of a stream in an order, and each of its positions."""
    plan = fulcrum.plan(7, 90, repeats=3, general_per_task=2.5, order=order, seed=5)
    is_task, rows = plan.slice(0, len(plan))
    return {
        "fields": asdict(plan),
        "fingerprint": plan.fingerprint,
        "task_share": plan.task_share,
        "is_task": is_task.tolist(),
        "rows": rows.tolist(),
    }


if __name__ == "__main__":
    main()
