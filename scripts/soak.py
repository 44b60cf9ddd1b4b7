"""Kill processes, plant faults and fuzz, and print a table of what was lost.

    python scripts/soak.py [--kills 8] [--fuzzed 1000000]

Kills: real processes are killed (SIGKILL) at random moments, some in the middle of a checkpoint,
and resumed until they end; what they leave must be that of a process that nobody killed, bit
for bit (seconds and memory apart). Faults: the tests marked `fault`. Fuzzers: scripts/fuzz.py on
every target.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fulcrum.core import store

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from helpers import answering  # noqa: E402
from helpers.tiny import WORDS, save_task, tiny_settings, write_rows  # noqa: E402

_TIMED = re.compile(
    r"seconds|memory|^sha256$|^outputs$|dev_nll_seconds"
)  # names of what differs between equal runs
# Of 1,000 fuzzed inputs, how many go to each target: as many as its speed allows.
_SHARES = {"pack": 300, "plan": 300, "config": 150, "encode": 150, "ingest": 100}
_GIVE_UP = 600  # seconds for a process that was not killed


@dataclass(frozen=True)
class Job:
    """What is killed: the arguments of a command that begins or goes on in a folder, and what it
    leaves there in the end."""

    name: str
    arguments: Callable[[Path], list[str]]
    left: Callable[[Path], dict[str, Any]]
    checkpoints: bool = False


@dataclass
class Row:
    """A line of the table."""

    what: str
    tried: int = 0
    survived: int = 0
    notes: str = ""


def timeless(value: Any) -> Any:
    """A JSON value without what differs between equal runs."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not _TIMED.search(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def bits(folder: Path, *patterns: str) -> dict[str, str]:
    """Hashes of files, by name below `folder` (names that hash a path are *); of JSON without what
    is timed."""
    found = {}
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        data = path.read_bytes()
        if path.suffix == ".json":
            data = (
                json.dumps(timeless(json.loads(data)), sort_keys=True)
                .replace(str(folder), "")
                .encode()
            )
        found[re.sub(r"[0-9a-f]{32}", "*", str(path.relative_to(folder)))] = hashlib.sha256(
            data
        ).hexdigest()
    return found


def jobs(place: Path, url: str) -> list[Job]:
    """Every verb that takes long, on a tiny model; at `url` somebody answers."""
    data = {
        "model": str(place / "model"),
        "task": {
            "train": str(place / "train.jsonl"),
            "test": str(place / "test.jsonl"),
            "anchor": "Name it.",
            "metrics": ["nll", "exact_match"],
            "max_new_tokens": 4,
        },
        "general": str(place / "pool.jsonl"),
        "mix": {"general_per_task": 2, "repeats": 4},
        "train": {**tiny_settings().model_dump(), "save_every": 1, "evaluations": 6},
        "eval": {"general_rows": 8, "draws": 100},
        "compare": {"arms": ["base", "sft", "tell"], "seeds": [0, 1]},
    }
    run_file = place / "run.yaml"
    run_file.write_text(json.dumps(data))
    write_rows(place / "anchors.jsonl", [])
    (place / "anchors.jsonl").write_text(
        "".join(json.dumps({"text": f"Say the colour of {word}."}) + "\n" for word in WORDS)
    )
    write_rows(
        place / "big.jsonl",
        [
            (f"tell me of {a} {b} {k}", f"{b} {k} {a}")
            for k in range(400)
            for a in WORDS
            for b in WORDS
        ],
    )

    def verb(name: str) -> Callable[[Path], list[str]]:
        return lambda out: [name, str(run_file), "--output-dir", str(out / "run"), "--resume"]

    made = (
        "run/adapter*/**/*.safetensors",
        "run/predictions.jsonl",
        "run/results.json",
        "run/certificate.json",
        "run/cells/*.json",
    )
    return [
        Job("train", verb("train"), lambda out: bits(out, *made), checkpoints=True),
        Job("compare", verb("compare"), lambda out: bits(out, *made), checkpoints=True),
        Job(
            "pool build",
            lambda out: ["pool", "build", str(place / "big.jsonl"), "--jobs", "2"],
            lambda out: bits(
                out, "cache/pools/**/*.arrow", "cache/pools/**/*.npy", "cache/pools/**/*.parquet"
            ),
        ),
        Job(
            "selfgen",
            lambda out: [
                "selfgen",
                str(out / "made.jsonl"),
                "-n",
                "1500",
                "--endpoint",
                url,
                "--endpoint-model",
                "m",
            ],
            lambda out: bits(out, "made.*"),
        ),
        Job(
            "anchor score",
            lambda out: [
                "anchor",
                "score",
                str(run_file),
                str(place / "anchors.jsonl"),
                "--out",
                str(out / "s.json"),
            ],
            lambda out: bits(out, "s.json"),
        ),
    ]


def said(body: dict[str, Any], number: int) -> tuple[int, str]:
    """What a model says that takes its time, and says the same to the same question of the same
    seed."""
    time.sleep(0.01)
    return (
        200,
        f"What may a {WORDS[body['seed'] % 16]} of {body['seed'] % 997} years do on a day like "
        f"number {body['seed'] % 7919}?",
    )


def start(job: Job, out: Path) -> "subprocess.Popen[bytes]":
    """The command's process; its cache is its own."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "FULCRUM_CACHE": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "random",
    }
    log = (out / "log.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "fulcrum", *job.arguments(out)],
        stdout=log,
        stderr=log,
        env=environment,
    )


def half_written(out: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((out / "run" / "checkpoints").glob("*/.checkpoint-*"))


def kill_often(
    job: Job, work: Path, kills: int, rng: random.Random, say: Callable[[str], None]
) -> Row:
    """Kill a command `kills` times, a third of them in mid-checkpoint where it has some, and let it
    end."""
    row = Row(f"kill {job.name}")
    reference, out = work / f"{job.name}-whole", work / f"{job.name}-killed"
    began = time.monotonic()
    if start(job, reference).wait(_GIVE_UP) != 0:
        raise SystemExit(
            f"{job.name}: fails without being killed: {(reference / 'log.txt').read_text()[-500:]}"
        )
    whole, expected = time.monotonic() - began, job.left(reference)
    if not expected:
        raise SystemExit(f"{job.name}: left nothing that could be compared")
    caught, attempts = 0, 0
    while row.tried < kills and attempts < 4 * kills:
        attempts += 1
        in_checkpoint = job.checkpoints and row.tried % 3 == 2
        process, began = start(job, out), time.monotonic()
        limit = began + (whole if in_checkpoint else rng.uniform(0.2, 0.95) * whole)
        while time.monotonic() < limit and process.poll() is None:
            if in_checkpoint and half_written(out):
                break
            # a checkpoint of a tiny model takes a few milliseconds: that is looked for without a
            # pause
            if not in_checkpoint:
                time.sleep(0.02)
        over = process.poll() is not None
        process.kill()
        process.wait()
        row.tried, caught = row.tried + (not over), caught + half_written(out)
        if any(
            store.damaged(path) for path in (out / "run" / "checkpoints").glob("[!.]*/checkpoint-*")
        ):
            row.notes += "a damaged checkpoint; "
        if over:  # it was faster than the kill: begin another one
            row.notes += "other bits after an early end; " * (job.left(out) != expected)
            shutil.rmtree(out)
        say(f"{row.what}: {row.tried} of {kills}")
    process = start(job, out)
    if process.wait(_GIVE_UP) != 0:
        row.notes += f"did not go on: {(out / 'log.txt').read_text()[-300:]}"
    found = job.left(out)
    different = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
    row.survived = row.tried if not different and not row.notes else 0
    row.notes += (
        f"{len(expected)} files equal"
        if not different
        else f"different: {', '.join(sorted(different)[:3])}"
    )
    row.notes += f"; {caught} in mid-checkpoint" * job.checkpoints
    return row


def faults() -> Row:
    """The tests marked `fault`."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "fault",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            "-rA",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    passed, failed = (
        len(set(re.findall(rf"^{kind} (\S+)", done.stdout, re.M)))
        for kind in ("PASSED", "(?:FAILED|ERROR)")
    )
    return Row(
        "planted faults",
        passed + failed,
        passed,
        "" if done.returncode == 0 else done.stdout[-300:],
    )


def fuzz(target: str, runs: int, corpus: Path, seed: int) -> Row:
    """One target of the fuzzer."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "fuzz.py"),
            target,
            str(runs),
            str(corpus / target),
            str(seed),
        ],
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr + done.stdout)
    tried = int(executed.group(1)) if executed else 0
    found = [
        path.name
        for path in (corpus / target).glob("*-*")
        if path.name.startswith(("crash", "timeout", "oom"))
    ]
    lost = len(found) or int(done.returncode != 0)
    return Row(
        f"fuzz {target}",
        tried,
        tried - lost,
        ", ".join(found) or (done.stderr[-300:] if lost else ""),
    )


def main() -> None:
    """Run all three and print the table; exit code 1 where anything was lost."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--kills", type=int, default=8, help="of each command")
    asked.add_argument("--fuzzed", type=int, default=1_000_000, help="inputs over all targets")
    asked.add_argument("--only", help="kill this command alone, as selfgen")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--work", type=Path, help="folder to work in, kept (default: one that goes)")
    given = asked.parse_args()
    screen = Console()
    with tempfile.TemporaryDirectory() as name:
        work = given.work or Path(name)
        place = save_task(work / "task", 24, 16)
        rng, rows, began = random.Random(given.seed), list[Row](), time.monotonic()
        with answering.endpoint(said) as (url, _):
            for job in (
                job for job in jobs(place, url) if given.kills and given.only in (None, job.name)
            ):
                rows.append(kill_often(job, work, given.kills, rng, screen.print))
        screen.print("planted faults")
        rows.append(faults())
        for target, share in _SHARES.items() if given.fuzzed else ():
            screen.print(f"fuzz {target}")
            rows.append(fuzz(target, given.fuzzed * share // 1000, work / "corpus", given.seed + 1))
    table = Table(title=f"Soak, seed {given.seed}, {(time.monotonic() - began) / 60:.0f} minutes")
    for head in ("what", "tried", "survived", "lost", "notes"):
        table.add_column(head)
    for row in [
        *rows,
        Row("all", sum(row.tried for row in rows), sum(row.survived for row in rows)),
    ]:
        table.add_row(
            row.what,
            f"{row.tried:,}",
            f"{row.survived:,}",
            f"{row.tried - row.survived:,}",
            row.notes,
        )
    screen.print(table)
    sys.exit(any(row.tried != row.survived or not row.tried for row in rows))


if __name__ == "__main__":
    main()
