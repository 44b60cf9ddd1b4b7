"""Measure where the time of a training step goes: parts are dropped or exchanged, in turn.

    python bench/breakdown.py --pool ROWS.parquet                       # both models, everything
    python bench/breakdown.py --models gemma-3-270m --parts compiled

A profiler is no help here: what it writes down needs pages of its own, and products look a third
slower than they are.
"""

import argparse
import ctypes
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface

from fulcrum.config.base import DataSource
from fulcrum.config.sections import TrainSettings
from fulcrum.core.types import Example, Tokens
from fulcrum.data import encode, task_data
from fulcrum.model import adapter, attention, base_model, loss
from fulcrum.training import compile

ROUNDS, STEP = 5, 8
Way = Callable[[], object]


def examples(loaded: base_model.LoadedModel, pool: str, count: int) -> tuple[list[Tokens], Example]:
    """General rows as `speed.py` takes them (prompts of at most 400 tokens), and the first of them
    as text."""
    form = encode.make_format(loaded.tokenizer, None)
    general, _ = task_data.read([DataSource(path=pool, limit=40 * count)])
    short = [row for row in general if len(encode.prompt_ids(row.prompt, form)) <= 400]
    return [each for each in (encode.encode(row, form) for row in short) if len(each) <= 1024][
        :count
    ], short[0]


def train(loaded: base_model.LoadedModel, rows: Sequence[loss.Row]) -> None:
    """Loss and gradient of rows, as a step has them, without the optimizer."""
    for row in rows:
        total, _ = loss.row_loss(loaded, row, torch.full((len(row.labels),), 1 / len(row.labels)))
        torch.autograd.backward(total)
    loaded.causal.zero_grad()


def in_turn(
    ways: Mapping[str, Way], before: Mapping[str, Way] | None = None
) -> dict[str, list[float]]:
    """Seconds of each way, `ROUNDS` times in turn after one time that does not count; `before`
    prepares a way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            if before and name in before:
                before[name]()
            started = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def say(seconds: Mapping[str, Sequence[float]]) -> None:
    """One line a way: milliseconds, and what the first way takes more."""
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        more = statistics.median(a - b for a, b in zip(first, times, strict=True))
        median, low, high = (
            1e3 * value for value in (statistics.median(times), min(times), max(times))
        )
        print(
            f"  {name:40} {median:7.0f} ms ({low:.0f} to {high:.0f})  {1e3 * more:+6.0f} ms saved",
            flush=True,
        )


def _no_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **_: Any
) -> tuple[Tensor, None]:
    heads = query.shape[1] // value.shape[1]
    return (query + key.repeat_interleave(heads, 1) + value.repeat_interleave(heads, 1)).transpose(
        1, 2
    ), None


class _BaseOnly(torch.autograd.Function):
    """The base's product in place of base and adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        _scale: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, a, b)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b = ctx.saved_tensors
        down = gradient @ weight if ctx.needs_input_grad[0] else None
        return down, None, None, torch.zeros_like(a), torch.zeros_like(b), None


class _Without:
    """Leaves parts of a model out: `without("attention", "norms")` from then on, `without()` for
    the whole again."""

    def __init__(self, loaded: base_model.LoadedModel) -> None:
        named = dict(loaded.causal.named_modules())
        self.norms = [module for module in named.values() if "RMSNorm" in type(module).__name__]
        self.gates = [module for name, module in named.items() if name.endswith(".mlp")]
        self.product = adapter._Product

    def __call__(self, *parts: str) -> None:
        left_out = "attention" in parts
        AttentionInterface.register(
            attention.NAME, _no_attention if left_out else attention.segment_attention
        )
        module: ModuleType | Any = adapter
        module._Product = _BaseOnly if "adapters" in parts else self.product
        for norm in self.norms:
            self._exchange(norm, (lambda x: x) if "norms" in parts else None)
        for gate in self.gates:
            summed = (
                (lambda x, gate=gate: gate.down_proj(gate.gate_proj(x) + gate.up_proj(x)))
                if "gates" in parts
                else None
            )
            self._exchange(gate, summed)

    @staticmethod
    def _exchange(module: nn.Module, forward: Callable[..., Tensor] | None) -> None:
        module.__dict__.pop("forward", None)
        if forward is not None:
            module.__dict__["forward"] = forward


def _products(loaded: base_model.LoadedModel, tokens: int) -> Way:
    """The frozen body's products for a row of so many tokens, forward and backward, and nothing
    else."""
    layers = [
        module
        for module in loaded.body.modules()
        if type(module) is nn.Linear and not module.weight.requires_grad
    ]
    states = {
        width: torch.randn(tokens, width).to(layers[0].weight.dtype)
        for m in layers
        for width in m.weight.shape
    }

    def run() -> None:
        for layer in layers:
            functional.linear(states[layer.weight.shape[1]], layer.weight)
            torch.matmul(states[layer.weight.shape[0]], layer.weight)

    return run


def parts(loaded: base_model.LoadedModel, rows: Sequence[Tokens], _example: Example) -> None:
    """A whole step's row and a short one, forward and backward, with parts left out."""
    without = _Without(loaded)
    names = {
        "without attention": ("attention",),
        "without adapters": ("adapters",),
        "without norms": ("norms",),
        "gate's product as a sum": ("gates",),
        "without all four": ("attention", "adapters", "norms", "gates"),
    }
    for chosen in (rows[:STEP], [min(rows, key=len)]):
        (row,) = loss.rows(chosen, loaded, 10**6)
        print(f"one row of {row.ids.shape[1]} tokens, {len(row.labels)} targets:", flush=True)

        def whole(row: loss.Row = row) -> None:
            train(loaded, [row])

        def forward(row: loss.Row = row) -> None:
            with torch.no_grad():
                loss.row_loss(loaded, row, torch.ones(len(row.labels)))

        ways = {
            "all": whole,
            "forward alone": forward,
            "the body's products alone": _products(loaded, row.ids.shape[1]),
        }
        restored = dict.fromkeys(ways, lambda: without())
        left_out = {name: lambda parts=parts: without(*parts) for name, parts in names.items()}
        say(in_turn({**ways, **dict.fromkeys(names, whole)}, {**restored, **left_out}))
        without()


def compiling(loaded: base_model.LoadedModel, rows: Sequence[Tokens], example: Example) -> None:
    """Six steps with the layers compiled and not."""
    steps = [
        loss.rows(rows[at : at + STEP], loaded, TrainSettings().pack_tokens)
        for at in range(0, 6 * STEP, STEP)
    ]
    started = time.perf_counter()
    compile.switch_on(loaded, TrainSettings(), example)
    print(f"{loaded.facts[-1]}, in {time.perf_counter() - started:.0f} s", flush=True)
    adapter.new_adapter(loaded, TrainSettings(), 0)
    calls = list(loaded.compiled)
    before: dict[str, Way] = {
        "as it is": loaded.compiled.clear,
        "compiled": lambda: loaded.compiled.extend(calls),
    }

    def all_steps() -> None:
        for step in steps:
            train(loaded, step)

    seconds = in_turn(dict.fromkeys(before, all_steps), before)
    say(seconds)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"  {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    loaded.compiled.clear()
    AttentionInterface.register(attention.NAME, attention.segment_attention)


def pages(loaded: base_model.LoadedModel, rows: Sequence[Tokens], _example: Example) -> None:
    """Three steps with freed memory given back at once, as glibc does, and kept
    (`model._keep_memory`); Linux only."""
    steps = [
        loss.rows(rows[at : at + STEP], loaded, TrainSettings().pack_tokens)
        for at in range(0, 3 * STEP, STEP)
    ]
    library = ctypes.CDLL(None)

    def give_back() -> None:
        library.mallopt(base_model._M_MMAP_THRESHOLD, 128 * 2**10)
        library.mallopt(base_model._M_TRIM_THRESHOLD, 128 * 2**10)

    # One after the other: memory once kept would serve the other way too.
    seconds: dict[str, list[float]] = {}
    for prepare in (give_back, base_model._keep_memory):
        prepare()
        name = prepare.__name__.strip("_").replace("_", " ")
        train(loaded, steps[0])
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds |= in_turn({name: lambda: [train(loaded, step) for step in steps]})
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(f"  {name}: {faults / len(steps) / (ROUNDS + 1):,.0f} page faults a step", flush=True)
    say(seconds)


def lanes(loaded: base_model.LoadedModel, rows: Sequence[Tokens], _example: Example) -> None:
    """Six steps as rows of all threads, and as two rows at a time with half of the threads each."""
    threads = torch.get_num_threads()
    budget = TrainSettings().pack_tokens
    parameters = [parameter for parameter in loaded.causal.parameters() if parameter.requires_grad]
    steps = [sorted(rows[at : at + STEP], key=len, reverse=True) for at in range(0, 6 * STEP, STEP)]
    whole = [loss.rows(step, loaded, budget) for step in steps]
    halves = [
        [
            loss.rows(half, loaded, budget)
            for half in (step[0::4] + step[3::4], step[1::4] + step[2::4])
        ]
        for step in steps
    ]

    def gradient(half: Sequence[loss.Row], each: int) -> None:
        # a new thread takes the process's number at its first question; then it may have its own
        torch.get_num_threads()
        torch.set_num_threads(each)
        for row in half:
            total, _ = loss.row_loss(
                loaded, row, torch.full((len(row.labels),), 1 / len(row.labels))
            )
            torch.autograd.grad(total, parameters)

    with ThreadPoolExecutor(2) as pool:

        def together() -> None:
            for step in whole:
                gradient(step, threads)

        def apart() -> None:
            for step in halves:
                list(pool.map(lambda half: gradient(half, max(1, threads // 2)), step))

        seconds = in_turn(
            {"one row, all threads": together, "two rows, half of the threads each": apart}
        )
    torch.set_num_threads(threads)
    say(seconds)


PARTS = {"parts": parts, "compiled": compiling, "pages": pages, "lanes": lanes}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct", "gemma-3-270m"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--pool", default="builtin", help="where general rows come from")
    wanted = parser.parse_args()
    for name in wanted.models:
        loaded = base_model.load(name, TrainSettings())
        rows, example = examples(loaded, wanted.pool, 6 * STEP)
        for part in wanted.parts:
            print(f"\n## {name}, {part}", flush=True)
            adapter.new_adapter(loaded, TrainSettings(), 0)
            PARTS[part](loaded, rows, example)


if __name__ == "__main__":
    main()
