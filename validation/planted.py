"""A control for `fulcrum scale`: a task whose sub-skill occurs in general data alone.

`python validation/planted.py FOLDER`.

Every word has a made-up code, which general rows tell in many forms. The task asks for a ticket
that holds the code of a word; its few rows show the form and the codes of four words, its test asks
for the other six. So task rows alone cannot teach it, however often they are shown: mixing must
win, the curve must fall with the amount of general data, and it must not where general rows have
each other's answers (the design `permuted`), since nothing is then left to transfer.
"""

import argparse
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.cli import terminal
from fulcrum.cli.terminal import Watch
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core import store
from fulcrum.mechanism import scale_report
from fulcrum.mechanism.scale import run_scale
from fulcrum.stats.intervals import Interval

WORDS = (
    "brook",
    "stone",
    "lamp",
    "sparrow",
    "kettle",
    "meadow",
    "button",
    "candle",
    "drum",
    "engine",
)
KNOWN = 4  # words of which the task's rows tell the codes
_LETTERS = "BDFGHJKLMNPQRSTVWXZ"
_ASKED = (
    "What is the code of {}?",
    "Which code has {}?",
    "Tell me the code for {}.",
    "{}: its code?",
    "I need the code of {}.",
    "Look up {} in the code book.",
    "Code book entry of {}:",
    "How is {} written in code?",
    "Give {} as a code.",
    "Please encode {}.",
    "{} in the code book?",
    "Say the code that belongs to {}.",
)
_PAIRS = ("What are the codes of {} and {}?", "Look up {}, then {}.")
_TRIPLES = ("The codes of {}, {} and {}?", "Encode {}, {}, {}.")


def rows(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Prompts and answers of the task's `train` (16) and `test` (48) rows, and of the `pool`
    (1,740)."""
    rng = random.Random(seed)
    pairs = [a + b for a in _LETTERS for b in _LETTERS if a != b]
    codes = dict(zip(WORDS, rng.sample(pairs, len(WORDS)), strict=True))

    def ticket(word: str, number: int) -> tuple[str, str]:
        return f"{number} x {word}", f"[{codes[word]} * {number}]"

    pool = [(form.format(word), codes[word]) for form in _ASKED for word in WORDS]
    for size, forms in ((2, _PAIRS), (3, _TRIPLES)):
        for form, named in itertools.product(forms, itertools.permutations(WORDS, size)):
            pool.append((form.format(*named), ", ".join(codes[word] for word in named)))
    return {
        "train": [ticket(word, number) for word in WORDS[:KNOWN] for number in (2, 3, 5, 7)],
        "test": [
            ticket(word, number)
            for word in WORDS[KNOWN:]
            for number in (4, 6, 8, 9, 11, 12, 13, 14)
        ],
        "pool": pool,
    }


def write(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write the rows as JSON lines; returns the files by name."""
    found = {name: folder / f"{name}.jsonl" for name in ("train", "test", "pool")}
    for name, pairs in rows(seed).items():
        store.write_jsonl(
            found[name], [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
        )
    return {name: str(path) for name, path in found.items()}


def settings(folder: Path, **changes: Any) -> Settings:
    """Settings of the control, with its rows in `folder`."""
    files = write(folder / "data")
    return settings_from_dict(
        {
            "task": {
                "name": "tickets",
                "train": files["train"],
                "test": files["test"],
                "anchor": "Write the ticket.",
                "metrics": ["nll", "exact_match"],
                "max_new_tokens": 12,
            },
            "general": files["pool"],
            "clean": {"near_duplicates": 0},  # the pool's rows are alike on purpose
            "train": {"max_length": 128, "compile": "never"},
            "eval": {"general_rows": 16},
            "compare": {"seeds": [0, 1, 2]},
            "scale": {
                "rows": 16,
                "repeats": 2,
                "ratios": [0, 4, 32],
                "designs": ["exposures", "permuted"],
            },
            "output_dir": str(folder / "run"),
            **changes,
        }
    )


def judge(found: Mapping[str, Any]) -> dict[str, bool]:
    """What must hold of `scaling.json`, and whether it does: 95% intervals over seeds, and the F
    test of the levels.

    The skill itself is whether codes are right (exact match): wrong answers teach the loss what
    codes look like.
    """
    nll, exact = (
        {
            one["design"]: next(metric for metric in one["metrics"] if metric["metric"] == name)
            for one in _designs(found)
        }
        for name in ("nll", "exact_match")
    )
    gain = _change(nll["exposures"]["by_seed"])
    right, wrong = (_change(exact[name]["by_seed"]) for name in ("exposures", "permuted"))
    still = nll["exposures"]["still"]
    return {
        f"mixing wins: exact match {_told(right)}, loss {_told(gain)}": right.low > 0
        and gain.high < 0,
        f"scale sees it: the levels of the loss differ (F test, p {still:.2g})": still < 0.01,
        f"with each other's answers no transfer: exact match {_told(wrong)}": wrong.high
        < right.low / 2,
    }


def _designs(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(found["tasks"][0]["designs"])


def _change(by_seed: list[list[float]]) -> Interval:
    """From no general rows to the most."""
    values = np.array(by_seed)
    return scale_report.over_seeds(values[:, -1] - values[:, 0])


def _told(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def main() -> None:
    """Run the control with the default model; print its verdicts and whether they are as planted,
    else exit with 1."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", type=Path)
    asked.add_argument("--jobs", type=int, default=1)
    given = asked.parse_args()
    screen = terminal.console()
    terminal.silence_libraries()
    with Watch(screen) as watch:
        run_scale(settings(given.folder), resume=True, progress=watch, jobs=given.jobs)
    terminal.conclude(screen, given.folder / "run")
    held = judge(store.read_json(given.folder / "run" / store.SCALING))
    for what, holds in held.items():
        terminal.say(screen, f"{'as planted' if holds else 'NOT as planted'}: {what}")
    raise SystemExit(0 if all(held.values()) else 1)


if __name__ == "__main__":
    main()
