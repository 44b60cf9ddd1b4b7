"""Run the comparisons on real tasks of `results/notes` again, and print a Markdown table of them.

    python scripts/measure.py DATA_FOLDER OUT_FOLDER [NAME ...]

DATA_FOLDER holds ``tasks/NAME/{train,dev,test}.jsonl`` with the columns prompt, completion and
group, and ``general/{t0_pool,assistant_pool}.parquet`` with the columns prompt and completion;
The notes name the data sets. One process a run; run folders are made in OUT_FOLDER, and resumed
if they exist.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fulcrum.report import run_report, summary

ANCHORS = {
    "snips": "Turn the request into one JSON object with its intent and slots.",
    "nl2bash": "Write one bash command that does the following.",
    "wmt21-is-en-sentences": "Translate the Icelandic sentence into English.",
    "dialogsum": "Summarise the dialogue below in one or two sentences.",
}
SNIPS = {
    "name": "snips",
    "metrics": ["nll", "json_fields", "exact_match", "json_valid"],
    "max_new_tokens": 64,
}

# name -> (verb, task settings, other settings); what they leave open stands in `settings`.
RUNS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "snips": ("compare", {**SNIPS, "test_limit": 100}, {}),
    "nl2bash": (
        "compare",
        {"name": "nl2bash", "metrics": ["nll", "chrf", "exact_match"], "max_new_tokens": 48},
        {},
    ),
    "wmt-sentences": (
        "compare",
        {
            "name": "wmt21-is-en-sentences",
            "metrics": ["nll", "chrf"],
            "max_new_tokens": 64,
            "dev": None,
        },
        {},
    ),
    "dialogsum": (
        "compare",
        {"name": "dialogsum", "metrics": ["nll", "rouge_l", "chrf"], "max_new_tokens": 64},
        {"train.max_length": 512, "mix.general_per_task": 2},
    ),
    "snips-gemma": ("compare", SNIPS, {"model": "gemma-3-270m"}),
    # The paper's own rows: whole documents, and HaluEval in its prompt. Their anchors stand inside
    # the rows.
    "wmt-documents": (
        "train",
        {"name": "wmt21-is-en", "metrics": ["nll", "chrf"], "max_new_tokens": 256, "dev": None}
        | {"train_limit": 16, "dev_limit": 6, "test_limit": 8},
        {
            "train.max_length": 8192,
            "train.pack_tokens": 2048,
            "mix.general_per_task": 2,
            "mix.repeats": 1,
        },
    ),
    "halu-json": (
        "train",
        {
            "name": "halu-json",
            "metrics": ["nll", "balanced_accuracy", "mcc", "exact_match"],
            "max_new_tokens": 16,
        },
        {"train.max_length": 2048, "mix.general_per_task": 1, "mix.repeats": 1},
    ),
}


def settings(data: Path, out: Path, name: str) -> dict[str, Any]:
    """The whole settings of a run, as nested values."""
    _, task, changes = RUNS[name]
    folder = data / "tasks" / task["name"]
    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "dev", "test")}
    limits = {"train_limit": 64, "dev_limit": 32, "test_limit": 60}
    result: dict[str, Any] = {
        "model": "smollm2-135m-instruct",
        "task": {**files, "anchor": ANCHORS.get(task["name"]), **limits, **task},
        "general": [
            str(data / "general" / pool) for pool in ("t0_pool.parquet", "assistant_pool.parquet")
        ],
        "mix": {"general_per_task": 3, "repeats": 2},
        "train": {"max_length": 256, "evaluations": 4},
        "eval": {"general_rows": 32},
        "output_dir": str(out / name),
    }
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        (result[section] if section else result)[key] = value
    return result


def tables(folder: Path) -> str:
    """What a run says, as Markdown."""
    results = run_report.load(folder)
    lines = []
    for task in results["tasks"]:
        size = (
            f"{task['train']} train, {task['dev']} dev, {task['test']} test rows in "
            f"{task['test_groups']} groups"
        )
        cost = f"{results['seconds']:.0f} s, peak {results['peak_memory_bytes'] / 2**30:.1f} GiB"
        lines += [
            f"**`{task['name']}`, {results['settings']['model']}** ({size}; step cap "
            f"{results['step_cap']}; {cost})",
            "",
        ]
        lines += _markdown(summary.score_grid(results, task["name"]))
    return "\n".join(
        lines
        + _markdown(_telling(summary.difference_grid(results)))
        + _markdown(summary.forgetting_grid(results))
        + _markdown(summary.training_grid(results))
        + [summary.headline(results)]
    )


def _telling(grid: summary.Grid) -> summary.Grid:
    """What mixing and the anchor brought over tuned SFT; the other pairs stand in results.json."""
    pairs = {f"tell − {name}" for name in ("sft_anchor", "sft", "mix")} | {"mix − sft"}
    return replace(grid, rows=tuple(row for row in grid.rows if row[0] in pairs))


def _markdown(grid: summary.Grid) -> list[str]:
    lines = [grid.head, ("---",) * len(grid.head), *grid.rows] if grid.rows else []
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def main() -> None:
    """Run what is asked for (all, by default), one after the other."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    data, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    names = sys.argv[3:] or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        sys.exit(f"no run {unknown[0]!r}; known: {', '.join(RUNS)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = out / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump(settings(data, out, name), sort_keys=False), encoding="utf-8"
        )
        subprocess.run(
            [sys.executable, "-m", "fulcrum", RUNS[name][0], str(file), "--resume"], check=True
        )
        print(tables(out / name))


if __name__ == "__main__":
    main()
