"""Load `fulcrum serve` with many clients for some minutes, then ask the same one by one.

    python bench/serving.py runs/tickets --data tickets_test.jsonl --clients 32 --minutes 10

Starts the server as a process of its own and asks it by OpenAI's own client: one client first, then
all of them, each asking again as soon as it is answered, for every model in turn; halves of the
answers are streamed. Now and then a client is cut off in the middle of an answer. Prints failures,
answers and tokens a second, latency, and the server's memory minute by minute.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai


@dataclass
class Heard:
    """What one stage of the bench saw.

    `latency` and `first` (streamed answers' first text) are in seconds.
    """

    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    cut: int = 0


async def ask(
    client: openai.AsyncOpenAI, model: str, question: str, most: int, stream: bool, heard: Heard
) -> None:
    """One question and its answer."""
    begun = time.perf_counter()
    messages = [{"role": "user", "content": question}]
    try:
        if stream:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            parts = await client.chat.completions.create(
                model=model, messages=messages, max_tokens=most, **options
            )
            told, usage = False, None
            async for part in parts:
                if not told and part.choices and part.choices[0].delta.content:
                    heard.first.append(time.perf_counter() - begun)
                    told = True
                usage = part.usage or usage
        else:
            usage = (
                await client.chat.completions.create(
                    model=model, messages=messages, max_tokens=most
                )
            ).usage
        heard.tokens += usage.completion_tokens
        heard.latency.append(time.perf_counter() - begun)
    except openai.OpenAIError as error:
        heard.failures.append(f"{type(error).__name__}: {error}")


async def cut_off(client: openai.AsyncOpenAI, model: str, question: str, heard: Heard) -> None:
    """A client that leaves in the middle of a long answer."""
    messages = [{"role": "user", "content": question}]
    parts = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=400, temperature=3.0, stream=True
    )
    await anext(aiter(parts))
    await parts.close()
    heard.cut += 1


async def load(
    base: str,
    models: list[str],
    questions: list[str],
    clients: int,
    seconds: float,
    most: int,
    seed: int,
) -> Heard:
    """`clients` clients that each ask again as soon as they are answered."""
    heard, until, draw = Heard(), time.perf_counter() + seconds, random.Random(seed)
    async with openai.AsyncOpenAI(
        base_url=base, api_key="none", max_retries=0, timeout=300
    ) as client:

        async def one(number: int) -> None:
            turn = 0
            while time.perf_counter() < until:
                turn += 1
                await ask(
                    client,
                    draw.choice(models),
                    draw.choice(questions),
                    most,
                    (number + turn) % 2 == 0,
                    heard,
                )

        async def leave() -> None:
            while time.perf_counter() < until:
                await asyncio.sleep(10)
                await cut_off(client, models[0], draw.choice(questions), heard)

        await asyncio.gather(
            *(one(number) for number in range(clients)), *([leave()] if clients > 1 else [])
        )
    return heard


async def watched(process: "subprocess.Popen[str]", memory: list[float]) -> None:
    """Resident memory of the server in MiB, every ten seconds."""
    while True:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        await asyncio.sleep(10)


def shown(heard: Heard, seconds: float) -> dict[str, object]:
    """The figures of a stage."""
    quantile = {
        name: [round(float(value), 3) for value in np.quantile(times, (0.5, 0.95))]
        if times
        else None
        for name, times in (
            ("latency p50, p95", heard.latency),
            ("first text p50, p95", heard.first),
        )
    }
    found = {
        "answers": len(heard.latency),
        "failures": len(heard.failures),
        "cut off": heard.cut,
        **quantile,
    }
    rates = {"answers/s": len(heard.latency) / seconds, "tokens/s": heard.tokens / seconds}
    return {**found, **{name: round(rate, 2) for name, rate in rates.items()}}


async def measure(
    args: argparse.Namespace, process: "subprocess.Popen[str]", base: str
) -> dict[str, object]:
    """One client, then all."""
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    questions = [row.get("prompt") or row["messages"][0]["content"] for row in rows]
    async with openai.AsyncOpenAI(base_url=base, api_key="none") as client:
        models = [
            model.id
            for model in (await client.models.list()).data
            if not args.models or model.id in args.models
        ]
    await load(base, models, questions, 1, 5, args.max_tokens, 0)  # to warm up
    alone = await load(base, models, questions, 1, args.alone * 60, args.max_tokens, 1)
    memory: list[float] = []
    watching = asyncio.create_task(watched(process, memory))
    together = await load(
        base, models, questions, args.clients, args.minutes * 60, args.max_tokens, 2
    )
    watching.cancel()
    one, many = shown(alone, args.alone * 60), shown(together, args.minutes * 60)
    return {
        "models": models,
        "one client": one,
        f"{args.clients} clients": many,
        "times as many tokens": round(many["tokens/s"] / one["tokens/s"], 2),
        "server MiB, each minute": [round(value) for value in memory[::6]],
        "what failed": sorted(set(together.failures))[:5],
    }


def main() -> None:
    """Parse, start, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", required=True, help="rows whose questions are asked (JSON lines)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--alone", type=float, default=1.5, help="minutes of one client")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[])
    args = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "fulcrum",
        "serve",
        *args.runs,
        "--port",
        "0",
        "--slots",
        str(args.clients),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        found = re.match(r"listening on (\S+)", process.stdout.readline())
        try:
            print(json.dumps(asyncio.run(measure(args, process, f"{found[1]}/v1")), indent=1))
        finally:
            process.terminate()
    print(f"the server ended with {process.returncode}")


if __name__ == "__main__":
    main()
