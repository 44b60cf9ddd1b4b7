"""Count how often the intervals of `fulcrum.stats.row_savings` cover what was planted.

    python validation/simulate.py                 # 1,000 experiments a case, some minutes
    python validation/simulate.py --experiments 200

An experiment has SFT at 16 to 256 rows, SFT with the anchor and TELL at some of these, S seeds and
200 test rows in 50 groups. The seeds' chains dominate: they move all arms together, each arm, and
each arm at each size. Truth is what the same measured sizes show without noise.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fulcrum.core.types import FloatArray
from fulcrum.stats import row_savings
from fulcrum.stats.intervals import Interval
from fulcrum.stats.row_savings import Factor, Point

SIZES, MIXED = (16, 32, 64, 128, 256), (16, 64, 256)
REFERENCES = ("sft", "sft_anchor")
ROWS, GROUPS, DRAWS = 200, 50, 1000
CHAIN, ARM, CELL, GROUP, ROW = (
    0.05,
    0.04,
    0.03,
    0.1,
    0.3,
)  # standard deviations, in the score's own unit

Curve = Callable[[float], float]


@dataclass(frozen=True)
class Case:
    """Planted curves: SFT's, SFT with the anchor's, and TELL's, by number of rows; `mixed`: where
    the latter are measured."""

    name: str
    sft: Curve
    sft_anchor: Curve
    tell: Curve
    mixed: tuple[int, ...] = MIXED
    on_test: bool = False  # references are selected by their test scores
    chain: float = CHAIN
    more: int = 0  # further references, as good as SFT with the anchor

    @property
    def references(self) -> tuple[str, ...]:
        """The arms without general data."""
        return (*REFERENCES, *(f"reference_{k}" for k in range(self.more)))

    @property
    def curves(self) -> dict[str, Curve]:
        """Every arm's curve."""
        return {
            "sft": self.sft,
            **dict.fromkeys(self.references[1:], self.sft_anchor),
            "tell": self.tell,
        }


def _log(level: float, per_doubling: float) -> Curve:
    return lambda size: level + per_doubling * np.log2(size / 16)


def _law(size: float) -> float:
    return float(1 - 3 * size**-0.5)


CASES = (
    Case("saving of 3", _log(0.0, 0.2), _log(-0.05, 0.2), lambda d: _log(0.0, 0.2)(3 * d)),
    Case("saving of 3, power law", _law, lambda d: _law(d) - 0.05, lambda d: _law(3 * d), SIZES),
    Case("no gain", _log(0.0, 0.2), _log(-0.1, 0.2), _log(0.0, 0.2)),
    Case("no gain, references alike", _log(0.0, 0.2), _log(0.0, 0.2), _log(0.0, 0.2)),
    Case("worse", _log(0.0, 0.2), _log(-0.1, 0.2), _log(-0.15, 0.2)),
    Case("beyond what sizes show", _log(0.0, 0.2), _log(-0.1, 0.2), _log(2.0, 0.2)),
    Case("flat reference", _log(0.0, 0.0), _log(-0.1, 0.0), _log(0.05, 0.0)),
    Case(
        "no gain, references alike, on test",
        _log(0.0, 0.2),
        _log(0.0, 0.2),
        _log(0.0, 0.2),
        on_test=True,
    ),
    Case(
        "no gain, four references alike, on test",
        _log(0, 0.2),
        _log(0, 0.2),
        _log(0, 0.2),
        on_test=True,
        more=2,
    ),
    Case(
        "no gain, seeds that move all arms, on test",
        _log(0, 0.2),
        _log(-0.5, 0.2),
        _log(0, 0.2),
        on_test=True,
        chain=1.0,
    ),
    Case("worse, on test", _log(0.0, 0.2), _log(-0.1, 0.2), _log(-0.15, 0.2), on_test=True),
    Case(
        "saving of 3, on test",
        _log(0.0, 0.2),
        _log(-0.05, 0.2),
        lambda d: _log(0.0, 0.2)(3 * d),
        on_test=True,
    ),
)


def outcomes(
    case: Case, seeds: int, rng: np.random.Generator
) -> tuple[dict[Point, FloatArray], dict[Point, FloatArray], list[str]]:
    """Outcomes (seeds, rows) of one experiment by point, dev scores (seeds,) by point, and the
    rows' groups."""
    place = np.repeat(np.arange(GROUPS), ROWS // GROUPS)
    difficulty = rng.normal(0, GROUP, GROUPS)[place]
    chain = rng.normal(0, case.chain, (seeds, 1))
    test: dict[Point, FloatArray] = {}
    dev: dict[Point, FloatArray] = {}
    for arm, curve in case.curves.items():
        own, liking = rng.normal(0, ARM, (seeds, 1)), rng.normal(0, GROUP, GROUPS)[place]
        for size in SIZES if arm == "sft" else case.mixed:
            moved = curve(size) + chain + own + rng.normal(0, CELL, (seeds, 1))
            test[arm, size] = moved + difficulty + 0.2 * liking + rng.normal(0, ROW, (seeds, ROWS))
            dev[arm, size] = moved[:, 0] + rng.normal(0, 0.05, seeds)
    return test, dev, [f"g{k}" for k in place]


@dataclass(frozen=True)
class Answer:
    """What one experiment says."""

    difference: Interval
    p: float
    saving: Factor
    gain: Factor
    identifiable: bool
    worse: bool


def answer(case: Case, seeds: int, number: int, draws: int = DRAWS) -> Answer:
    """Run one experiment and evaluate it as a comparison would."""
    test, dev, groups = outcomes(case, seeds, np.random.default_rng([number, seeds]))
    measured = row_savings.measure(test, groups, dev=None if case.on_test else dev)
    return _evaluate(row_savings.draw(measured, draws=draws, seed=number), case)


def _evaluate(drawn: row_savings.Draws, case: Case) -> Answer:
    ref = row_savings.reference(drawn, case.references, SIZES[-1])
    gained = drawn.of("tell", SIZES[-1]) - ref.last
    difference = row_savings.interval(gained)
    worse = (
        row_savings.is_beaten(drawn, "tell", case.references, SIZES[-1])
        if case.on_test
        else difference.high < 0
    )
    return Answer(
        difference,
        row_savings.p_value(gained),
        row_savings.row_saving(drawn, "tell", ref),
        row_savings.row_gain(drawn, "tell", 64, ref),
        row_savings.identifiable(ref, SIZES[-1]),
        worse,
    )


def truth(case: Case) -> Answer:
    """The same without noise: seeds and groups that do not differ."""
    exact = {
        (arm, d): np.full((1, 1), curve(d))
        for arm, curve in case.curves.items()
        for d in (SIZES if arm == "sft" else case.mixed)
    }
    return _evaluate(row_savings.draw(row_savings.measure(exact, ["g"]), draws=2), case)


def covers(found: Interval | Factor, true: float) -> bool:
    """Whether the interval holds the truth; a censored end holds all beyond it."""
    low, high = found.low, found.high  # nan, where nothing is said, covers nothing
    if isinstance(found, Factor):  # what is beyond the measured sizes is one value
        true, low, high = (_censored(value, found) for value in (true, low, high))
    return low - 1e-9 <= true <= high + 1e-9


def _censored(value: float, factor: Factor) -> float:
    return 0.0 if value < factor.least else np.inf if value > factor.most * (1 - 1e-9) else value


def report(case: Case, seeds: int, experiments: int) -> None:
    """Print shares over all experiments of a case."""
    true = truth(case)
    found = [answer(case, seeds, number) for number in range(experiments)]
    shares = {
        "difference covered": [covers(a.difference, true.difference.estimate) for a in found],
        "saving covered": [covers(a.saving, true.saving.estimate) for a in found],
        "gain at 64 covered": [covers(a.gain, true.gain.estimate) for a in found],
        "called a gain": [a.difference.low > 0 for a in found],
        "called a loss": [a.worse for a in found],
        "p at most 0.05": [a.p <= 0.05 for a in found],
        "identifiable": [a.identifiable for a in found],
        "saving beyond sizes": [a.saving.estimate == np.inf for a in found],
        "saving invented": [
            np.isfinite(a.saving.low) and a.saving.low > a.saving.most for a in found
        ],
    }
    saving = np.median([a.saving.estimate for a in found])
    print(
        f"\n## {case.name}, {seeds} seeds, {experiments} experiments; true difference "
        f"{true.difference.estimate:.3f}, "
        f"saving {true.saving.estimate:.2f}, gain {true.gain.estimate:.2f}; median saving "
        f"found {saving:.2f}"
    )
    for what, hits in shares.items():
        print(f"  {what:22} {np.mean(hits):6.1%}", flush=True)


def main() -> None:
    """Simulate all cases at 5 and 8 seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--case", default="", help="only cases whose names hold this")
    wanted = parser.parse_args()
    for case in [case for case in CASES if wanted.case in case.name]:
        for seeds in wanted.seeds:
            report(case, seeds, wanted.experiments)


if __name__ == "__main__":
    main()
