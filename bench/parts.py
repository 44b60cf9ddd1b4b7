"""Time Fulcrum's own parts against the plain way.

Parts: generation, shared prefixes, start-up, plan, comparison.

    python bench/parts.py                       # all of them
    python bench/parts.py generation prefixes   # some
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fulcrum.config.base import DataSource
from fulcrum.config.sections import TrainSettings
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode, mix, selection, task_data
from fulcrum.data.token_stream import Stream
from fulcrum.model import adapter, base_model, generate, loss
from fulcrum.stats import row_savings
from fulcrum.training import gradients, loop

MODEL = "smollm2-135m-instruct"
DEMO = Path(__file__).parent.parent / "src/fulcrum/data/builtin/demo"
ROUNDS = 3


def in_turn(ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each way, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def tell(what: str, seconds: Mapping[str, Sequence[float]]) -> None:
    """Print medians, ranges and the ratio of the second way to the first, round by round."""
    first, second = seconds
    ratios = [b / a for a, b in zip(seconds[first], seconds[second], strict=True)]
    shown = "; ".join(
        f"{n} {statistics.median(s):.2f} s ({min(s):.2f} to {max(s):.2f})"
        for n, s in seconds.items()
    )
    print(
        f"{what}: {shown}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f})",
        flush=True,
    )


def rows_of(
    name: str, anchor_tokens: int, body_tokens: int, number: int, tokenizer: Any
) -> tuple[list[Example], Anchor]:
    """Rows of about `body_tokens` with an anchor of about `anchor_tokens`, cut out of the packaged
    pool's text."""
    packaged, _ = task_data.read([DataSource(path="builtin")])
    ids = tokenizer(" ".join(row.answer for row in packaged), add_special_tokens=False)["input_ids"]

    def text(start: int, length: int) -> str:
        return str(tokenizer.decode(ids[start : start + length]))

    question, answer = body_tokens * 3 // 5, body_tokens * 2 // 5
    rows = []
    for k in range(number):
        start = anchor_tokens + k * body_tokens
        turns = (
            Message("user", text(start, question)),
            Message("assistant", text(start + question, answer)),
        )
        rows.append(Example(turns, f"{name}{k}", f"{name}:{k}"))
    return rows, Anchor(text(0, anchor_tokens))


def generation() -> None:
    """Answers to prompts with a common anchor: batched and with the anchor's keys computed once,
    against one by one."""
    loaded = base_model.load(MODEL, TrainSettings())
    task, _ = task_data.read([DataSource(path=str(DEMO / "test.jsonl"))])
    form = encode.make_format(loaded.tokenizer, rows_of("g", 100, 10, 0, loaded.tokenizer)[1])
    prompts = [encode.prompt_ids(row.prompt, form) for row in task[:40]]

    def batched() -> list[str]:
        return generate.generate(loaded, prompts, form, max_new_tokens=32, batch_tokens=4096)

    def singly() -> list[str]:
        texts = []
        training_attention = base_model.generation_attention(loaded)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad(), loaded.precision():
                out = loaded.causal.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=32,
                    do_sample=False,
                    eos_token_id=list(form.end_ids),
                    pad_token_id=loaded.tokenizer.pad_token_id,
                )
            texts.append(
                str(
                    loaded.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
                ).strip()
            )
        loaded.causal.set_attn_implementation(training_attention)
        return texts

    equal = np.mean([a == b for a, b in zip(batched(), singly(), strict=True)])
    tell(
        f"40 answers of 32 tokens, {equal:.0%} equal",
        in_turn({"Fulcrum": batched, "model.generate one by one": singly}),
    )


def prefixes() -> None:
    """Common prefixes computed once, against every time: scoring, sft_anchor, and a real stream of
    task and general rows."""
    settings = TrainSettings(pack_tokens=4096)
    loaded = base_model.load(MODEL, settings)
    rows, anchor = rows_of("p", 290, 200, 32, loaded.tokenizer)
    form, plain = (encode.make_format(loaded.tokenizer, each) for each in (anchor, None))
    long = [encode.encode(row, form) for row in rows]
    general, _ = task_data.read([DataSource(path="builtin", limit=64)])
    task, _ = task_data.read([DataSource(path=str(DEMO / "train.jsonl"))])
    demo = encode.make_format(
        loaded.tokenizer,
        Anchor("Read the mail to the shop and answer with one JSON object that sorts it."),
    )
    mixed = mix.plan(8, 24, repeats=1, general_per_task=3, order="random", seed=0)
    alone = mix.plan(32, 0, repeats=1, general_per_task=0, order="random", seed=0)
    streams = {
        "sft_anchor, anchor of 290": Stream(alone, long, []),
        "tell, demo": Stream(
            mixed,
            [encode.encode(row, demo) for row in task[:8]],
            [encode.encode(row, plain) for row in general[:24]],
        ),
    }

    def score(share: bool) -> None:
        for row in loss.rows(long, loaded, 4096, share=share):
            loss.row_nats(loaded, row)

    tell(
        "scoring, anchor of 290, bodies of 200, rows of 4,096",
        in_turn({"shared": lambda: score(True), "apart": lambda: score(False)}),
    )
    for name, stream in streams.items():

        def train(share: bool, stream: Stream = stream) -> None:
            chosen = settings.model_copy(update={"share_prefixes": share, "evaluations": 1})
            recipe = loop.Recipe(chosen, seed=0, repeats=1)
            loop.train(loaded, stream, recipe, dev_loss=lambda: 0.0)

        tell(
            name,
            in_turn(
                {
                    "shared": lambda train=train: train(True),
                    "apart": lambda train=train: train(False),
                }
            ),
        )
    adapter.drop_adapter(loaded)


def start() -> None:
    """`fulcrum --help`, shell completion, and `fulcrum check` on 10,000 rows."""
    command = [sys.executable, "-m", "fulcrum"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_text(
            "".join(
                json.dumps({"prompt": f"sort item {i}", "completion": f"box {i % 7}"}) + "\n"
                for i in range(10_000)
            )
        )
        run = Path(folder, "run.yaml")
        run.write_text(
            f"model: {MODEL}\ntask: {{train: {file}, anchor: Sort it.}}\nmix: "
            f"{{general_per_task: 0.2, repeats: 1}}\n"
        )
        completing = {
            "_FULCRUM_COMPLETE": "complete_bash",
            "COMP_WORDS": "fulcrum co",
            "COMP_CWORD": "1",
        }
        for name, arguments, variables in (
            ("--help", ["--help"], {}),
            ("completion", [], completing),
            ("check, 10,000 rows", ["check", str(run)], {}),
        ):
            seconds = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                subprocess.run(
                    [*command, *arguments],
                    check=True,
                    capture_output=True,
                    env={**os.environ, **variables},
                )
                seconds.append(time.perf_counter() - started)
            print(
                f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to "
                f"{max(seconds):.2f})",
                flush=True,
            )


def plan() -> None:
    """Positions a second, and one position, of plans of many sizes."""
    for rows, pool in ((100, 10**3), (10**5, 10**6), (10**7, 10**9)):
        made = mix.plan(rows, pool, repeats=2, general_per_task=4, order="random", seed=0)
        number = min(len(made), 4_000_000)
        made.slice(0, 1)
        started = time.perf_counter()
        made.slice(0, number)
        rate = number / (time.perf_counter() - started)
        started = time.perf_counter()
        for position in range(0, len(made), max(1, len(made) // 500)):
            made[position]
        single = (time.perf_counter() - started) / 500
        print(
            f"plan of {len(made):,}: {rate / 1e6:.1f} million positions/s, one position "
            f"{single * 1e6:.0f} us",
            flush=True,
        )


def comparison() -> None:
    """Six cells of one comparison, against six separate `train` and `eval` commands on the same
    rows."""
    command = [sys.executable, "-m", "fulcrum"]
    seconds: dict[str, list[float]] = {"compare": [], "six train and eval": []}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run.yaml")
        run.write_text(
            f"model: {MODEL}\ntask: {{train: {DEMO}/train.jsonl, dev: {DEMO}/dev.jsonl, test: "
            f"{DEMO}/test.jsonl,\n"
            "  anchor: Sort the mail., "
            "metrics: [nll, exact_match], train_limit: 16, dev_limit: 8, test_limit: 12, "
            "max_new_tokens: 32}\n"
            "mix: {general_per_task: 2, repeats: 1}\neval: {general_rows: 16}\ntrain: "
            "{evaluations: 2}\n"
            "compare: {arms: [tell, mix], seeds: [0, 1, 2], sft_epochs: [1]}\n"
        )
        for number in range(ROUNDS):
            started = time.perf_counter()
            subprocess.run(
                [*command, "compare", str(run), "--output-dir", f"{folder}/c{number}"],
                check=True,
                capture_output=True,
            )
            seconds["compare"].append(time.perf_counter() - started)
            started = time.perf_counter()
            for seed in range(3):
                for anchor in ("Sort the mail.", "none"):
                    out = f"{folder}/t{number}-{seed}-{anchor[:4]}"
                    changes = [
                        "--set",
                        f"task.anchor={anchor}",
                        "--seed",
                        str(seed),
                        "--output-dir",
                        out,
                    ]
                    subprocess.run(
                        [*command, "train", str(run), *changes], check=True, capture_output=True
                    )
                    subprocess.run([*command, "eval", out], check=True, capture_output=True)
            seconds["six train and eval"].append(time.perf_counter() - started)
    tell("six cells", seconds)


def statistics_of_a_comparison() -> None:
    """What a certificate says of one metric: 15 arms at 8 seeds on 10,000 examples, five arms with
    a curve of 5 sizes."""
    rng = np.random.default_rng(0)
    sizes, groups = (16, 32, 64, 128, 256), [f"g{k // 2}" for k in range(10_000)]
    arms = {"sft": sizes, "sft_anchor": sizes, "soup": sizes, "tell": sizes, "mix": sizes}
    arms |= {f"arm{k}": (256,) for k in range(10)}
    points = [(arm, size) for arm, each in arms.items() for size in each]
    outcomes = {point: rng.normal(np.log2(point[1]), 1, (8, 10_000)) for point in points}
    dev = {point: rng.normal(np.log2(point[1]), 0.1, 8) for point in points}
    started = time.perf_counter()
    drawn = row_savings.draw(row_savings.measure(outcomes, groups, dev=dev), draws=2000)
    ref = row_savings.reference(drawn, ("sft", "sft_anchor", "soup"), 256)
    for arm in arms:
        row_savings.interval(drawn.of(arm, 256) - ref.last)
    for arm in ("tell", "mix"):
        row_savings.row_saving(drawn, arm, ref)
        for size in sizes[:-1]:
            row_savings.row_gain(drawn, arm, size, ref)
    row_savings.slope(ref)
    row_savings.score_at(ref, 64 + 50)
    print(
        "statistics, 10,000 examples x 15 arms x 8 seeds, 2,000 draws: "
        f"{time.perf_counter() - started:.1f} s",
        flush=True,
    )


def choice() -> None:
    """50,000 short rows put in order for 32 task rows: by words, by clusters, and 2,048 of them by
    gradient."""
    loaded = base_model.load(MODEL, TrainSettings())
    packaged, _ = task_data.read([DataSource(path="builtin")])
    words = " ".join(row.question + " " + row.answer for row in packaged).split()

    def row(k: int) -> Example:
        start = k * 7919 % (len(words) - 24)
        turns = (
            Message("user", " ".join(words[start : start + 16])),
            Message("assistant", " ".join(words[start + 16 : start + 24])),
        )
        return Example(turns, f"g{k}", f"general:{k}")

    rows, (task, _) = (
        [row(k) for k in range(50_000)],
        task_data.read([DataSource(path=str(DEMO / "train.jsonl"))]),
    )
    started = time.perf_counter()
    order = selection.similar(rows, task[:32], 0)
    print(f"similar: {time.perf_counter() - started:.1f} s", flush=True)
    started = time.perf_counter()
    selection.diverse(rows, 0)
    print(f"diverse: {time.perf_counter() - started:.1f} s", flush=True)
    form = encode.make_format(loaded.tokenizer, None)
    adapter.new_adapter(loaded, TrainSettings(), 0)
    examples = [encode.encode(row, form) for row in [*task[:32], *(rows[k] for k in order[:2048])]]
    started = time.perf_counter()
    found = gradients.sketch(loaded, examples, gradients.SketchOptions())
    selection.by_gradient(found[32:], found[:32])
    seconds, tokens = time.perf_counter() - started, sum(map(len, examples))
    took = f"{len(examples):,} rows of {tokens / len(examples):.0f} tokens in {seconds:.0f} s"
    print(f"gradient: {took}, {tokens / seconds:,.0f} tokens/s", flush=True)


PARTS = {
    part.__name__: part
    for part in (start, plan, generation, prefixes, comparison, statistics_of_a_comparison, choice)
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or PARTS:
        PARTS[wanted]()
    print(
        "peak memory of this process "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
