"""Watch the memory of a long run of `fulcrum train`.

    python scripts/long_run.py RUN.yaml MINUTES OUT.json

After MINUTES it is asked to stop (SIGTERM). Every 5 seconds the resident memory of its processes is
sampled. Whether it grows is a line through the samples after the first `_WARM_UP` minutes, with an
interval from blocks of them: neighbours are alike.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from fulcrum.config.settings import load_settings
from fulcrum.core import store
from fulcrum.stats import intervals

_WARM_UP = 10.0  # minutes
_EVERY = 5.0  # seconds
_BLOCKS = 10


def resident(process: psutil.Process) -> int:
    """Bytes of a process and of those that it started."""
    found = 0
    for one in (process, *process.children(recursive=True)):
        try:
            found += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def slopes(minutes: np.ndarray, mib: np.ndarray) -> list[float]:
    """MiB an hour from each block's mean to the next one's."""
    times, levels = (
        np.array([part.mean() for part in np.array_split(values, _BLOCKS)])
        for values in (minutes, mib)
    )
    return [float(value) for value in np.diff(levels) / np.diff(times) * 60]


def main() -> None:
    """Run, sample, report."""
    run_file, limit, out = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    folder = Path(load_settings(run_file).output_dir)
    started = time.monotonic()
    process = psutil.Popen(
        [sys.executable, "-m", "fulcrum", "train", str(run_file), "--resume"],
        stdout=subprocess.DEVNULL,
    )
    samples: list[tuple[float, float]] = []
    while process.poll() is None:
        minutes = (time.monotonic() - started) / 60
        if minutes > limit:
            process.send_signal(signal.SIGTERM)
            process.wait()
            break
        samples.append((minutes, resident(process) / 2**20))
        out.write_text(json.dumps(samples))
        time.sleep(_EVERY)
    warm = np.array([sample for sample in samples if sample[0] >= _WARM_UP])
    grows = intervals.seed_interval(slopes(warm[:, 0], warm[:, 1]))
    line, _ = np.polyfit(warm[:, 0] / 60, warm[:, 1], 1)
    events = folder / store.EVENTS
    print(
        f"exit code {process.returncode} after {samples[-1][0]:.0f} minutes, {len(samples)} samples"
    )
    print(
        f"resident MiB: {warm[:, 1].min():.0f} to {warm[:, 1].max():.0f} after {_WARM_UP:g} "
        f"minutes; a line: {line:+.1f}/h"
    )
    print(
        f"change from block to block, MiB an hour: {grows.estimate:+.1f} [{grows.low:+.1f}, "
        f"{grows.high:+.1f}]"
    )
    print(
        f"events.jsonl: {events.stat().st_size:,} bytes, "
        f"{len(events.read_text().splitlines())} lines"
    )
    print(f"checkpoints kept: {sorted(path.name for path in folder.glob('checkpoints/*/*'))}")


if __name__ == "__main__":
    main()
