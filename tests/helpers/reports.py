"""Make results as results.json holds them."""

import json
from pathlib import Path

from fulcrum.core import store
from fulcrum.core.types import (
    ArmResult,
    Difference,
    Hyperparameters,
    Prediction,
    Results,
    Score,
    Share,
    TaskFacts,
    TrainingRun,
    TrainPoint,
    Trial,
)

ARMS = {
    "base": 2.31,
    "base_anchor": 2.05,
    "sft": 1.42,
    "sft_anchor": 1.38,
    "mix": 1.33,
    "tell": 1.26,
}
MATCH = {
    "base": 0.02,
    "base_anchor": 0.05,
    "sft": 0.4,
    "sft_anchor": 0.45,
    "mix": 0.483,
    "tell": 0.55,
}
FORGOTTEN = {"base_anchor": 0.0, "sft": 0.3, "sft_anchor": 0.25, "mix": 0.01, "tell": -0.02}
SIZE = 60  # task rows, dev rows among them


def score(metric: str, value: float, n: int = 60, groups: int = 60, half: float = 0.1) -> Score:
    return Score(
        metric, value, value - half, value + half, n, groups, metric != "nll", (value,) * 3
    )


def training(arm: str, level: float, steps: int = 120, *, dev_apart: bool = False) -> TrainingRun:
    """Dev rows that are apart choose the step; of a comparison the last one counts."""
    mixed = arm in ("mix", "tell")
    history = tuple(
        TrainPoint(
            s,
            level + 1 / s if not mixed or s % 2 else None,
            2.4 - s / 1000 if mixed else None,
            5e-4,
            900 * s,
            0.5 * s,
        )
        for s in range(1, steps + 1)
    )
    dev = (
        tuple((s, level + 0.1 + abs(s - 75) / 100) for s in range(15, steps + 1, 15))
        if dev_apart
        else ()
    )
    share = (
        Share(0.2, 0.08, 0.03, 192, 768, 110_000, 41_000)
        if mixed
        else Share(1.0, 1.0, 1.0, 960, 0, 52_000, 9_000)
    )
    return TrainingRun(
        4, steps, 75 if dev_apart else steps, dev, history, share, share.total_tokens, 61.5
    )


def arm_result(
    arm: str, seed: int, tasks: tuple[str, ...], shift: float, kind: str = "compare"
) -> ArmResult:
    """What a comparison tries costs 2 of 3 parts of the rows in each of 3 folds; a single run tries
    what it keeps."""
    level = ARMS[arm] + (0 if arm.startswith("base") else shift)
    trained = not arm.startswith("base")
    scores = {task: (score("nll", level), score("exact_match", MATCH[arm])) for task in tasks}
    general = {"builtin": score("nll", 2.0 + FORGOTTEN.get(arm, 0.0) + shift)}
    trial = training(arm, level, dev_apart=kind == "train") if trained else None
    tokens = 0 if trial is None else trial.train_tokens * (1 if kind == "train" else 2)
    repeats = (4, 8) if trained else (1,) if kind == "compare" else ()
    tried = tuple(
        Trial(Hyperparameters(r), level + 0.1 + k / 20, tokens, 100.0 if trained else 2.0)
        for k, r in enumerate(repeats)
    )
    predictions = (Prediction(f"t.jsonl:{seed}", "g", "p", "g", "o", 1.0, 1),)
    held_out = {"builtin": (Prediction(f"b.jsonl:{seed}", "g", "p", "g", None, 1.0, 1),)}
    return ArmResult(
        arm,
        SIZE if trained else 0,
        seed,
        tried,
        0 if tried else None,
        trial,
        scores,
        {tasks[0]: predictions},
        held_out,
        general,
        130.0,
    )


def make(
    seeds: tuple[int, ...] = (0,),
    tasks: tuple[str, ...] = ("tickets",),
    bounds: tuple[float, float] = (-0.2, -0.03),
    **changes,
) -> dict:
    middle = round(sum(bounds) / 2, 3)
    differences = tuple(
        Difference(
            task,
            metric,
            "tell",
            reference,
            sign * middle,
            *sorted(sign * b for b in bounds),
            len(seeds),
            metric != "nll",
        )
        for task in tasks
        for reference in ("sft", "sft_anchor", "mix")
        for metric, sign in (("nll", 1), ("exact_match", -1))
    )
    forgetting = tuple(
        Difference("builtin", "nll", arm, "base", rise, rise - 0.03, rise + 0.04, len(seeds), False)
        for arm, rise in FORGOTTEN.items()
    )
    arms = tuple(
        arm_result(arm, seed, tasks, 0.02 * i, changes.get("kind", "compare"))
        for i, seed in enumerate(seeds)
        for arm in ARMS
        if i == 0 or not arm.startswith("base")  # the same at every seed, and run once
    )
    facts = tuple(
        TaskFacts(
            t,
            "Sort the ticket below; answer with one JSON object.",
            "user_prefix",
            48,
            12,
            60,
            60,
            5321,
        )
        for t in tasks
    )
    settings = {
        "model": "smollm2-135m-instruct",
        "eval": {"draws": 2000},
        "train": {"lora_r": 16, "lora_alpha": 32.0, "learning_rate": 5e-4, "batch_size": 8},
    }
    notes = ("3 general rows shared a 13-gram with a test row and were dropped.",)
    values = {
        **{
            "kind": "compare",
            "settings": settings,
            "environment": {"torch": "2.13.0", "python": "3.11.2", "parameters": "100000000"},
            "tasks": facts,
        },
        **{
            "notes": notes,
            "rejects": {"empty answer": 2, "duplicate of a test row": 1},
            "arms": arms,
        },
        **{"differences": differences, "forgetting": forgetting, "step_cap": 120},
        **{"seconds": 903.2, "peak_memory_bytes": 1_500 * 2**20, "size": SIZE},
    }
    plain = store.plain(Results(**(values | changes)))
    for arm in plain["arms"]:
        arm["predictions"] = arm["general"] = {}
    return json.loads(json.dumps(plain, allow_nan=False))


def predictions(
    task: str = "tickets", text: str = "Printer on floor 3 is out of toner."
) -> list[dict]:
    rows = []
    for row in range(15):
        for arm, level in ARMS.items():
            gap = row if arm == "tell" else 0
            value = Prediction(
                f"{task}.jsonl:{row}",
                f"g{row}",
                f"{text} #{row}",
                '{"queue": "it"}',
                f"{arm} says {row}",
                5 * level + gap,
                5,
            )
            size = 0 if arm.startswith("base") else SIZE
            rows.append({"arm": arm, "size": size, "seed": 0, "task": task, **store.plain(value)})
    return rows


def folder_with(tmp_path: Path, results: dict, lines: list[dict]) -> Path:
    store.write_json(tmp_path / "results.json", results)
    store.write_jsonl(tmp_path / "predictions.jsonl", lines)
    return tmp_path
