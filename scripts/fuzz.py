"""Drive a target of tests/helpers/fuzz_targets.py by coverage (atheris).

    python scripts/fuzz.py TARGET RUNS CORPUS [SEED]

What it finds lies in CORPUS as crash-...; tests/e2e/test_fuzz.py plays it again from
tests/corpus/TARGET.
"""

import contextlib
import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with atheris.instrument_imports(include=["fulcrum"]):
    from helpers.fuzz_targets import TARGETS

_SEEDS = 200


def main() -> None:
    """Run the fuzzer; it exits with 77 and says where the input is when it finds one that fails."""
    name, runs, corpus, *seed = sys.argv[1:]
    Path(corpus).mkdir(parents=True, exist_ok=True)
    drawn = random.Random(seed[0] if seed else "1")
    for number in range(
        _SEEDS
    ):  # from nothing, a fuzzer needs hours to reach inputs of some length
        Path(corpus, f"seed-{number}").write_bytes(drawn.randbytes(drawn.randrange(1, 512)))
    options = {
        "runs": runs,
        "seed": (seed or ["1"])[0],
        "max_len": 512,
        "len_control": 0,
        "timeout": 20,
        "rss_limit_mb": 4096,
        "print_final_stats": 1,
        "artifact_prefix": f"{corpus}/",
    }
    target = TARGETS[name]

    def quiet(data: bytes) -> None:
        with contextlib.redirect_stderr(None):  # libraries may say what they like
            target(data)

    atheris.Setup(
        [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), corpus], quiet
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
