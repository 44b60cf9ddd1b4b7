"""Build a pool of millions of rows, kill it once and resume it; measure time and memory.

    python bench/pools.py --rows 10000000 --jobs 2 --folder /somewhere/with/10GB

Rows are generated: of every hundred one repeats an earlier row of another file exactly. Every step
runs in a process of its own, whose memory (its children's too) is watched from outside, twenty
times a second: resident memory that is not the file cache's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fulcrum.config.base import GeneralSource
from fulcrum.data import filters, pool

FILES, NEAR = 10, 0.8
WORDS = [f"word{k}" for k in range(5000)]
OPEN = (
    "import sys, time; from fulcrum.data import mix, pool; from fulcrum.config.base import "
    "GeneralSource\n"
    "started = time.perf_counter(); found = pool.open_pool([GeneralSource(path=sys.argv[1])], "
    "0); found[len(found) // 2]\n"
    "print(len(found), found.left_out, round(time.perf_counter() - started, 3))\n"
)
BUILD = (
    "import sys; from fulcrum.data import pool; from fulcrum.config.base import GeneralSource\n"
    "if __name__ == '__main__':\n"
    "    pool.open_pool([GeneralSource(path=sys.argv[1])], 0, jobs=int(sys.argv[2]), "
    "progress=lambda *told: print(*told, flush=True))\n"
)


def write(folder: Path, rows: int) -> int:
    """Write the files; returns how many rows repeat another."""
    folder.mkdir(parents=True, exist_ok=True)
    each, repeats = rows // FILES, 0
    for place in range(FILES):
        with (folder / f"{place:02}.jsonl").open("w", encoding="utf-8") as stream:
            for k in range(each):
                number = place * each + k
                if place and k % 100 == 0:  # as in the file before
                    number, repeats = number - each + 1, repeats + 1
                words = " ".join(
                    WORDS[(number * step + step) % len(WORDS)] for step in (7, 11, 13, 17, 19, 23)
                )
                stream.write(
                    json.dumps(
                        {"prompt": f"Say {number}: {words}", "completion": f"{words} {number * 31}"}
                    )
                    + "\n"
                )
    return repeats


def resident(pid: int) -> int:
    """Anonymous resident memory (bytes) of a process and its children."""
    total, pids = 0, [pid]
    while pids:
        own = pids.pop()
        try:
            status = Path(f"/proc/{own}/status").read_text()
            pids += [
                int(child) for child in Path(f"/proc/{own}/task/{own}/children").read_text().split()
            ]
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) * 1024
            for line in status.splitlines()
            if line.startswith("RssAnon")
        )
    return total


def watched(code: str, *words: object, kill_after: float | None = None) -> tuple[float, int, str]:
    """Run a script; returns seconds, peak memory in bytes, and what it printed.

    It is killed after `kill_after` seconds.
    """
    script = Path(f"/tmp/bench-pools-{os.getpid()}.py")
    script.write_text(code)
    log = script.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, script, *map(str, words)], stdout=stream, start_new_session=True
        )
        started, peak = time.monotonic(), 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if kill_after is not None and time.monotonic() - started > kill_after:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    if kill_after is None and process.returncode:
        raise SystemExit(f"the script failed with {process.returncode}")
    return time.monotonic() - started, peak, log.read_text()


def near(folder: Path, rows: int, jobs: int) -> None:
    """Plant near-duplicates (1 to 5 words of 40 changed) in rows that are not alike; print how many
    are found, and the time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [[f"w{k}" for k in row] for row in rng.integers(20_000, size=(rows, 40))]
    planted = range(rows - rows // 50, rows)
    alike = set()
    for k in planted:
        texts[k] = list(texts[k - rows // 2])
        for place in rng.choice(40, 1 + k % 5, replace=False):
            texts[k][place] = f"changed{place}"
        own, other = (
            filters.shingles([" ".join(text), "yes"]) for text in (texts[k], texts[k - rows // 2])
        )
        if len(own & other) / len(own | other) >= NEAR:
            alike.add(k)
    file = folder / "near.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": " ".join(text), "completion": "yes"}) + "\n" for text in texts
        )
    )
    started = time.monotonic()
    found = pool.open_pool([GeneralSource(path=str(file))], 0, near=NEAR, jobs=jobs)
    seconds = time.monotonic() - started
    gone = set(range(rows)) - {
        int(found[k].origin.rpartition(":")[2]) - 1 for k in range(len(found))
    }
    what = (
        f"{rows:,} rows with {len(planted):,} changed copies, {len(alike):,} of them at {NEAR} or "
        "more"
    )
    print(
        f"{what}: {len(gone & alike):,} found, {len(gone - alike):,} others removed; "
        f"{seconds:.0f} s"
    )


def main() -> None:
    """Build, kill, go on, open."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--kill-after",
        type=float,
        default=None,
        help="seconds; default: an eighth of a million rows' time",
    )
    parser.add_argument(
        "--near-rows",
        type=int,
        default=0,
        help="plant near-duplicates in so many rows, and no more than that",
    )
    args = parser.parse_args()
    os.environ["FULCRUM_CACHE"] = str(args.folder / "cache")
    if args.near_rows:
        near(args.folder / "near", args.near_rows, args.jobs)
        return
    data = args.folder / "data"
    repeats = write(data, args.rows)
    size = sum(file.stat().st_size for file in data.iterdir())
    print(f"{args.rows:,} rows, {size / 1e9:.2f} GB, {repeats:,} repeats", flush=True)
    kill_after = args.kill_after or args.rows / 1_000_000 * 8
    seconds, peak, text = watched(BUILD, data, args.jobs, kill_after=kill_after)
    before = sum(1 for _ in (args.folder / "cache").rglob("*.json"))
    print(
        f"killed after {seconds:.0f} s ({peak / 2**20:.0f} MiB), {before} small files written; "
        f"{text.splitlines()[-1]}",
        flush=True,
    )
    more, again, _ = watched(BUILD, data, args.jobs)
    print(
        f"gone on for {more:.0f} s, peak {again / 2**20:.0f} MiB; "
        f"{args.rows / (seconds + more):,.0f} rows/s in all",
        flush=True,
    )
    _, memory, text = watched(OPEN, data)
    print(f"opened: rows, left out, seconds: {text.strip()}; peak {memory / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
