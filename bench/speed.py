"""Compare the training speed of Fulcrum and its peers: same rows, same LoRA, same machine.

The contenders take turns; ratios, medians and ranges are printed.

    make bench                                   # everything; hours on two cores
    python bench/speed.py --models smollm2-135m-instruct --mixes general --rounds 3 \
        --pool ROWS.parquet

Each contender trains one pass over the same rows, in steps of 8, in a process of its own; tokens
are those of the rows without padding, as Fulcrum counts them, whoever trains. Loading and
tokenising are not timed. In each round the contenders take turns, so that what else the machine
does hits all of them. The ceiling is what the frozen body's matrix products alone would allow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulcrum.config.base import DataSource
from fulcrum.core.types import Example, Message
from fulcrum.data import encode, task_data
from fulcrum.model import download

HERE = Path(__file__).parent
LORA = {"lora_r": 16, "lora_alpha": 32.0, "batch": 8, "max_length": 1024}
ANCHOR_TOKENS, BODY_TOKENS = 290, 200


@dataclass(frozen=True)
class Contender:
    """Who trains: a script, the environment's interpreter, and what it is told."""

    name: str
    script: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    python: str = "hf"


OURS = Contender("fulcrum", "ours.py", "train", python="own")
COMPILED = Contender("fulcrum, compiled", "ours.py", "train", {"compile": "always"}, python="own")
TRL = Contender("trl, defaults", "peers.py", "trl")
HF = Contender("trainer + peft, padded", "peers.py", "hf")
SWIFT = Contender("ms-swift, defaults", "swift_peer.py", "swift", python="swift")
_FAST = {"gradient_checkpointing": False, "dtype": "bfloat16", "bf16": True}
# What is tried before the rounds to find TRL's best; the fastest one goes into them.
TRL_TRIED = (
    Contender("trl, bf16", "peers.py", "trl", _FAST),
    Contender(
        "trl, bf16, packed bfd",
        "peers.py",
        "trl",
        {**_FAST, "packing": True, "packing_strategy": "bfd", "batch": 1},
    ),
    Contender(
        "trl, bf16, packed bfd x2",
        "peers.py",
        "trl",
        {**_FAST, "packing": True, "packing_strategy": "bfd", "batch": 2},
    ),
    Contender(
        "trl, bf16, batch 2",
        "peers.py",
        "trl",
        {**_FAST, "batch": 2, "gradient_accumulation_steps": 4},
    ),
    Contender(
        "trl, bf16, batch 1",
        "peers.py",
        "trl",
        {**_FAST, "batch": 1, "gradient_accumulation_steps": 8},
    ),
)


def pythons() -> dict[str, str]:
    """Interpreters by environment; `make bench` makes the peers' ones."""
    return {
        "own": sys.executable,
        "hf": str(HERE / ".venv-hf" / "bin" / "python"),
        "swift": str(HERE / ".venv-swift" / "bin" / "python"),
    }


def run(
    contender: Contender, name: str, folder: str, rows: Path, tokens: int
) -> dict[str, Any] | None:
    """One run in a process of its own; None where it fails (said)."""
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            **LORA,
            "model": name if contender.python == "own" else folder,
            "rows": str(rows),
            "kind": contender.kind,
            "options": contender.options,
            "scratch": scratch,
            "template": encode.plain_template(adds_bos=True),
        }
        done = subprocess.run(
            [pythons()[contender.python], str(HERE / contender.script), json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            cwd=scratch,
        )
    if done.returncode:
        print(
            f"  {contender.name}: failed: "
            f"{(done.stderr.strip() or 'no output').splitlines()[-1][:200]}",
            flush=True,
        )
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["rate"] = tokens / found["seconds"]
    said = f" ({found['what']})" if contender.python == "own" else ""
    print(
        f"  {contender.name}: {found['rate']:.0f} tokens/s, peak "
        f"{found['peak_bytes'] / 2**30:.2f} GiB{said}",
        flush=True,
    )
    return found


def mixes(name: str, pool: str, count: int) -> dict[str, list[list[Message]]]:
    """Three row mixes: short task rows, rows with a long anchor, general rows."""
    tokenizer, _, _ = download.load_tokenizer(name, {})
    form = encode.make_format(tokenizer, None)
    packaged, _ = task_data.read([DataSource(path="builtin")])
    task, _ = task_data.read(
        [DataSource(path=str(HERE.parent / "src/fulcrum/data/builtin/demo/train.jsonl"))]
    )
    general, _ = task_data.read([DataSource(path=pool, limit=40 * count)])
    short = [
        row
        for row in general
        if len(encode.prompt_ids(row.prompt, form)) <= 400 and len(encode.encode(row, form)) <= 1024
    ]
    ids = tokenizer(" ".join(row.answer for row in packaged), add_special_tokens=False)["input_ids"]
    cut = iter(range(0, len(ids)))

    def take(number: int) -> str:
        return str(tokenizer.decode([ids[next(cut)] for _ in range(number)]))

    anchor = take(ANCHOR_TOKENS)
    bodies = [
        [
            Message("user", anchor + "\n\n" + take(BODY_TOKENS * 3 // 5)),
            Message("assistant", take(BODY_TOKENS * 2 // 5)),
        ]
        for _ in range(max(8, count // 2))
    ]
    return {
        "short task rows": [list(row.messages) for row in task[:count]],
        "long anchor": bodies,
        "general": [list(row.messages) for row in short[:count]],
    }


def write(rows: Sequence[Sequence[Message]], file: Path) -> None:
    """Rows as every peer reads them: conversations in prompt and completion."""
    lines = [
        [{"role": message.role, "content": message.content} for message in row] for row in rows
    ]
    file.write_text(
        "".join(json.dumps({"prompt": line[:-1], "completion": line[-1:]}) + "\n" for line in lines)
    )


def count_tokens(name: str, rows: Iterable[Sequence[Message]]) -> int:
    """Tokens of the rows in the model's own template."""
    form = encode.make_format(download.load_tokenizer(name, {})[0], None)
    return sum(len(encode.encode(Example(tuple(row), "", ""), form)) for row in rows)


def ceiling(name: str) -> float:
    """Tokens a second that the body's matrix products alone would allow, measured now in a process
    of its own."""
    return float(
        subprocess.run(
            [sys.executable, str(HERE / "ceiling.py"), name], check=True, capture_output=True
        ).stdout
    )


def rounds(
    contenders: Sequence[Contender], number: int, name: str, folder: str, rows: Path, tokens: int
) -> None:
    """Let the contenders take turns and print the table."""
    found: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    allowed: list[float] = []
    for _ in range(number):
        allowed.append(ceiling(name))
        for contender in contenders:
            if result := run(contender, name, folder, rows, tokens):
                found[contender.name].append(result)
    print(
        "\n| who | tokens/s, median (range) | Fulcrum is faster by (range over rounds) | peak "
        "GiB |\n|---|---|---|---|"
    )
    own = [result["rate"] for result in found[OURS.name]]
    for who, results in found.items():
        if rates := [result["rate"] for result in results]:
            ratios = [a / b for a, b in zip(own, rates, strict=False)]
            print(
                f"| {who} | {_spread(rates, '.0f')} | {_spread(ratios, '.2f')} | "
                f"{max(result['peak_bytes'] for result in results) / 2**30:.2f} |"
            )
    print(f"\nceiling {_spread(allowed, '.0f')} tokens/s")
    for who in (OURS.name, COMPILED.name):
        shares = [
            100 * result["rate"] / b for result, b in zip(found.get(who, []), allowed, strict=False)
        ]
        if shares:
            print(f"share of it, {who}: {_spread(shares, '.0f')} %", flush=True)


def memory(name: str, folder: str) -> None:
    """Peak memory of rows of 2,048 tokens, half of them supervised, one a step: with and without
    recomputed activations."""
    tokenizer, _, _ = download.load_tokenizer(name, {})
    form = encode.make_format(tokenizer, None)
    packaged, _ = task_data.read([DataSource(path="builtin")])
    ids = tokenizer(" ".join(row.answer for row in packaged), add_special_tokens=False)["input_ids"]
    rows = []
    for start in range(0, 6 * 2048, 2048):
        question, answer = (
            str(tokenizer.decode(ids[start + at : start + at + 1010])) for at in (0, 1010)
        )
        rows.append([Message("user", question), Message("assistant", answer)])
    lengths = [len(encode.encode(Example(tuple(row), "", ""), form)) for row in rows]
    print(
        f"\n## {name}, memory: {len(rows)} rows of {min(lengths)} to {max(lengths)} tokens, "
        "micro-batches of 1",
        flush=True,
    )
    one = {"batch": 1, "max_length": max(lengths)}
    pairs = (
        Contender("fulcrum, recomputing", "ours.py", "train", {"batch_size": 1}, python="own"),
        Contender(
            "trl, checkpointing", "peers.py", "trl", {"dtype": "bfloat16", "bf16": True, **one}
        ),
        Contender(
            "fulcrum, keeping",
            "ours.py",
            "train",
            {"batch_size": 1, "keep_activations": True},
            python="own",
        ),
        Contender("trl, no checkpointing", "peers.py", "trl", {**_FAST, **one}),
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "rows.jsonl")
        write(rows, file)
        for contender in pairs:
            run(contender, name, folder, file, sum(lengths))


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct", "gemma-3-270m"])
    parser.add_argument(
        "--mixes", nargs="+", default=["general", "short task rows", "long anchor", "memory"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=32, help="rows of a mix (half as many with the long anchor)"
    )
    parser.add_argument("--pool", default="builtin", help="where general rows come from")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        help="contenders to leave out, by the beginning of their names",
    )
    wanted = parser.parse_args()
    for name in wanted.models:
        folder = download.prepare(name)
        if "memory" in wanted.mixes:
            memory(name, folder)
        tried: Contender | None = None
        for mix, rows in mixes(name, wanted.pool, wanted.rows).items():
            if mix not in wanted.mixes:
                continue
            tokens = count_tokens(name, rows)
            print(f"\n## {name}, {mix}: {len(rows)} rows, {tokens:,} tokens", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch, "rows.jsonl")
                write(rows, file)
                contenders = [
                    c
                    for c in (OURS, COMPILED, TRL, HF, SWIFT)
                    if not c.name.startswith(tuple(wanted.without) or ("\0",))
                ]
                if "trl, best" not in wanted.without:
                    if tried is None:
                        print("searching for TRL's best:", flush=True)
                        results = [
                            (each, run(each, name, folder, file, tokens)) for each in TRL_TRIED
                        ]
                        tried = max(
                            (r for r in results if r[1]),
                            key=lambda pair: pair[1]["rate"] if pair[1] else 0,
                        )[0]
                        print(f"best: {tried.name}", flush=True)
                    contenders.insert(3, tried)
                rounds(contenders, wanted.rounds, name, folder, file, tokens)


if __name__ == "__main__":
    main()
