"""Write outcomes and the question asked of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fulcrum.stats.certificate import Question

SIZES = (16, 32, 64)
ROWS = 40


def lines(
    tell: float = 1.0, sft: float = 1.0, *, seeds: int = 5, dev: bool = True
) -> Iterator[dict[str, object]]:
    """A comparison: each doubling brings 1, `tell` is so many doublings ahead, `sft` scales the
    reference's slope."""
    rng = np.random.default_rng(0)
    for arm, ahead in (("sft", 0.0), ("tell", tell)):
        for size in SIZES:
            for seed in range(seeds):
                score = sft * np.log2(size / 16) + ahead + rng.normal(0, 0.1)
                cell = {"arm": arm, "size": size, "seed": seed}
                if dev:
                    yield {**cell, "dev": score, "tokens": 10 * size}
                for row in range(ROWS):
                    value = score + (row % 7 - 3) / 10 + rng.normal(0, 0.05)
                    yield {
                        **cell,
                        "metric": "quality",
                        "row": f"r{row}",
                        "group": f"g{row // 2}",
                        "outcome": value,
                    }


def save(path: Path, content: Iterator[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


QUESTION = Question("tell", ("sft",), ("quality",))
