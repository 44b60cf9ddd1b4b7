"""Measure time and memory of the gradients and clusters of `quanta`.

    python bench/gradients.py RUN.yaml [--rows 2000]

Whole answers, half of the task's training and test rows (with their anchor), half of general rows.
Memory is the peak of the process so far, so that each line says what the step before it needed at
most.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fulcrum.config.settings import load_settings
from fulcrum.data import task_data
from fulcrum.experiments.lifecycle import peak_memory_bytes
from fulcrum.mechanism import clusters, quanta
from fulcrum.model import adapter, base_model
from fulcrum.training import gradients


def main() -> None:
    """Print what each step took."""
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("settings", type=Path)
    asked.add_argument("--rows", type=int, default=2000)
    given = asked.parse_args()
    settings = load_settings(given.settings)
    task, train = settings.tasks[0], settings.train
    loaded = base_model.load(settings.model, train)

    def say(what: str, began: float) -> None:
        print(
            f"{what}: {time.perf_counter() - began:.0f} s, peak "
            f"{peak_memory_bytes() / 2**20:,.0f} MiB",
            flush=True,
        )

    began, wanted = time.perf_counter(), given.rows // 2
    own, _ = task_data.read([*task.test, *task.train])
    pool, _ = task_data.read(
        [source.model_copy(update={"limit": 2 * wanted}) for source in settings.general]
    )
    draw = partial(quanta.draw, tokenizer=loaded.tokenizer, unit="rows", wanted=wanted, seed=0)
    both = [
        *draw([(row, task.anchor_value()) for row in own], general=False),
        *draw([(row, None) for row in pool], general=True),
    ]
    say(
        f"{len(both):,} rows of {sum(len(item.tokens) for item in both):,} tokens, "
        f"{torch.get_num_threads()} threads",
        began,
    )
    began = time.perf_counter()
    begin = partial(adapter.new_adapter, loaded, train, 0)
    examples = [(item.key, item.tokens) for item in both]
    found, _ = gradients.sketch_in_blocks(
        loaded,
        examples,
        gradients.SketchOptions(train.pack_tokens, seed=0, normalise=True),
        put_adapter=begin,
        folder=None,
        count=lambda done, of: None,
    )
    say("gradients", began)
    began = time.perf_counter()
    clusters.find(found[found.any(axis=1)].astype(np.float64), most=64)
    say("clusters", began)


if __name__ == "__main__":
    main()
