"""Time steps of the engine without a server: SmolLM2 with random adapters.

    python bench/slots.py [--steps 10]

Each line: conversations at once and whose they are, seconds to read 100 prompt tokens each,
milliseconds of a step of a token each, tokens a second.
"""

import argparse
import time

import torch

from fulcrum.config.sections import TrainSettings
from fulcrum.deploy import kv_cache
from fulcrum.model import adapter, base_model

PROMPT = list(range(100, 200))


def main() -> None:
    """Print what each step took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    steps, settings = parser.parse_args().steps, TrainSettings()
    loaded, states = base_model.load("smollm2-135m-instruct", settings), {}
    for seed, name in enumerate(("one", "two")):
        adapter.new_adapter(loaded, settings, seed)
        torch.manual_seed(seed)
        states[name] = (
            {
                key: torch.randn_like(value) * 0.02
                for key, value in adapter.adapter_state(loaded).items()
            },
            settings,
        )
    adapter.put_on(loaded, states)
    held = kv_cache.KVCache(loaded, 32)
    print(f"{torch.get_num_threads()} threads, {loaded.dtype}")
    for number, names in (
        (1, ["one"]),
        (1, ["one"]),
        (32, ["one"]),
        (32, ["one", "two", adapter.BASE]),
        (32, [adapter.BASE]),
    ):
        rows, asked = list(range(number)), (names * number)[:number]
        for row in rows:
            held.clear(row)
        began = time.perf_counter()
        held.extend(rows, [PROMPT] * number, asked)
        read, began = time.perf_counter() - began, time.perf_counter()
        for _ in range(steps):
            held.extend(rows, [[55]] * number, asked)
        step = (time.perf_counter() - began) / steps
        print(
            f"{number:2} of {'+'.join(names)}: {read:.2f} s, {1000 * step:.0f} ms, "
            f"{number / step:.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
