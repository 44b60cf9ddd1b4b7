"""Count the jumps that `fulcrum.mechanism.jumps` claims if none or some were planted.

    python validation/simulate_scaling.py    # 500 experiments a cell, some minutes
    python validation/simulate_scaling.py --experiments 100

Smooth truths rise by 1 over the levels (the constant by 0); noise is the standard deviation of one
seed at one level, and a seed moves its whole chain besides. Some truths lie outside of every form
that is fitted: exponential saturation, a hump. A cell of the false alarms is one noise and one
number of seeds; "p alone" is the bootstrap without the other conditions.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from fulcrum.core.types import BoolArray, FloatArray
from fulcrum.mechanism.jumps import find_jumps
from fulcrum.mechanism.row_jumps import row_jumps

SHORT = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LONG = (*SHORT, 32.0, 64.0)
NOISES, SEEDS, DRAWS = (0.02, 0.05, 0.1), (3, 5), 199
CHAIN = 0.2  # standard deviation of what a seed adds to all of its levels

Curve = Callable[[FloatArray], FloatArray]


def _unit(values: FloatArray) -> FloatArray:
    scaled: FloatArray = (values - values.min()) / np.ptp(values)
    return scaled


def _power(beta: float) -> Curve:
    return lambda g: _unit(-((g + 1) ** -beta))


def _logistic(place: float, rise: float) -> Curve:
    return lambda g: 1 / (1 + np.exp(-(np.log2(g + 1) - place) * 2 * np.log(9) / rise))


def _saturating(tau: float) -> Curve:
    return lambda g: _unit(-np.exp(-g / tau))


SMOOTH: dict[str, Curve] = {
    "constant": np.zeros_like,
    **{f"power law, beta {beta:g}": _power(beta) for beta in (0.2, 0.5, 1.0, 2.0, 4.0)},
    "line in log(g + 1)": lambda g: _unit(np.log2(g + 1)),
    "line in g": _unit,
    **{f"logistic, 10-90% in {rise:g} octaves": _logistic(2.0, rise) for rise in (2.5, 3.0, 4.0)},
    **{f"1 - exp(-g / {tau:g})": _saturating(tau) for tau in (1.0, 4.0, 16.0)},
    "hump": lambda g: np.exp(-((np.log2(g + 1) - 2) ** 2) / 4),
}


@dataclass(frozen=True)
class Noise:
    """How seeds differ: `kind` gauss, t3 (scaled to the same deviation), drift (a random walk over
    levels), or unequal (a fifth from the third level on)."""

    sd: float
    kind: str = "gauss"

    def draw(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> FloatArray:
        """Noise (experiments, seeds, levels)."""
        drawn = (
            rng.standard_t(3, shape) / np.sqrt(3)
            if self.kind == "t3"
            else rng.standard_normal(shape)
        )
        if self.kind == "drift":
            drawn = np.cumsum(drawn, axis=2) / np.sqrt(shape[2])
        if self.kind == "unequal":
            drawn[:, :, 2:] /= 5
        chain: FloatArray = self.sd * drawn + CHAIN * rng.standard_normal((*shape[:2], 1))
        return chain


def experiments(
    levels: tuple[float, ...],
    curve: FloatArray,
    noise: Noise,
    seeds: int,
    number: int,
    seed: int,
    *,
    every_p: bool = False,
) -> tuple[BoolArray, FloatArray]:
    """Which of `number` experiments claim an improving jump, and their p; a false alarm counts in
    either direction."""
    scores = curve + noise.draw(
        np.random.default_rng([seed, seeds, len(levels)]), (number, seeds, len(levels))
    )
    return find_jumps(levels, scores, draws=DRAWS, seed=seed, every_p=every_p)


def share(hits: int, number: int) -> str:
    """A share with its Clopper-Pearson interval."""
    low, high = binomtest(hits, number).proportion_ci(method="exact")
    return f"{hits}/{number} {hits / number:.2%} [{low:.2%}, {high:.2%}]"


def false_alarms(number: int) -> Iterator[Table]:
    """Each smooth truth: claims over all cells, and the worst cell."""
    totals = {"claimed": 0, "p alone": 0, "experiments": 0, "cells above 1%": 0}
    for levels in (SHORT, LONG):
        title = (
            f"False alarms, {len(levels)} levels up to {levels[-1]:g}: jumps claimed, either way, "
            "where the truth is smooth"
        )
        table = Table(title=title)
        for column in ("truth", "claimed", "worst cell", "p < 0.01 alone"):
            table.add_column(column)
        for name, truth in SMOOTH.items():
            cells = []
            for at, (sd, seeds) in enumerate(product(NOISES, SEEDS)):
                claims, low_p = np.zeros(number, dtype=bool), np.zeros(number, dtype=bool)
                for sign in (1, -1):  # the same curves upside down: an alarm in either direction
                    curve = sign * truth(np.array(levels))
                    scores = curve + sign * Noise(sd).draw(
                        np.random.default_rng([at, len(levels)]), (number, seeds, len(levels))
                    )
                    found, p = find_jumps(levels, scores, draws=DRAWS, seed=at, every_p=sign > 0)
                    claims |= found
                    low_p |= (p < 0.01) & (sign > 0)
                cells.append((int(claims.sum()), int(low_p.sum()), f"noise {sd:g}, {seeds} seeds"))
            claimed, alone = sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)
            worst = max(cells)
            table.add_row(
                name,
                share(claimed, number * len(cells)),
                f"{worst[0] / number:.2%} ({worst[2]})" if worst[0] else "none",
                share(alone, number * len(cells)),
            )
            totals["claimed"] += claimed
            totals["p alone"] += alone
            totals["experiments"] += number * len(cells)
            totals["cells above 1%"] += sum(
                binomtest(c[0], number).proportion_ci(method="exact").low > 0.01 for c in cells
            )
        yield table
    table = Table(title="False alarms in all")
    for column in totals:
        table.add_column(column)
    table.add_row(
        share(totals["claimed"], totals["experiments"]),
        share(totals["p alone"], totals["experiments"]),
        str(totals["experiments"]),
        str(totals["cells above 1%"]),
    )
    yield table


def other_noise(number: int) -> Table:
    """Return the false alarms if the noise is not what the test assumes."""
    table = Table(
        title=(
            "False alarms under other noise (sd 0.05, 5 seeds): p < 0.01 alone, and all conditions"
        )
    )
    for column in ("levels", "noise", "truth", "p alone", "claimed"):
        table.add_column(column)
    truths = (
        "constant",
        "power law, beta 0.5",
        "logistic, 10-90% in 2.5 octaves",
        "hump",
        "1 - exp(-g / 1)",
        "1 - exp(-g / 4)",
    )
    for levels, kind in product((SHORT, LONG), ("t3", "drift", "unequal")):
        for name in truths:
            curve = SMOOTH[name](np.array(levels))
            found, p = experiments(levels, curve, Noise(0.05, kind), 5, number, 3, every_p=True)
            table.add_row(
                str(len(levels)),
                kind,
                name,
                share(int((p < 0.01).sum()), number),
                share(int(found.sum()), number),
            )
    return table


def powers(number: int) -> Iterator[Table]:
    """How often planted jumps are found: by size over the noise of one seed, place, shape of what
    lies around, and seeds."""
    for levels, sizes in ((SHORT, (5, 10, 20, 40, 80)), (LONG, (1, 2, 4, 6, 8, 12, 20))):
        table = Table(
            title=(
                f"Power, {len(levels)} levels up to {levels[-1]:g}: jumps found, by size in units "
                "of one seed's noise"
            )
        )
        for column in ("step between", "background", "seeds", *(f"{size:g}" for size in sizes)):
            table.add_column(column)
        x = np.log2(np.array(levels) + 1)
        for after, background, seeds in product(
            range(2, len(levels) - 1), ("flat", "slope"), SEEDS
        ):
            if background == "slope" and after != len(levels) // 2:
                continue
            step = np.where(np.arange(len(levels)) >= after, 1.0, 0.0) + (
                0.5 * _unit(x) if background == "slope" else 0.0
            )
            found = [
                experiments(levels, size * step, Noise(1.0), seeds, number, 5)[0].mean()
                for size in sizes
            ]
            between = f"{levels[after - 1]:g} and {levels[after]:g}"
            around = "flat" if background == "flat" else "line of half its size"
            table.add_row(
                between, around, str(seeds), *(f"{found_share:.0%}" for found_share in found)
            )
        yield table


def rows(number: int) -> Table:
    """False discovery proportions of `row_jumps`, 500 rows an experiment, and how many planted
    jumps it finds."""
    table = Table(
        title=(
            "Rows: false discovery proportion (nominal 10%), 500 rows; truly jumping rows fall by "
            "1 nat, noise 0.15"
        )
    )
    for column in (
        "levels",
        "noise",
        "slope of null rows",
        "jumping rows",
        "mean FDP",
        "any false",
        "found of the jumping rows",
    ):
        table.add_column(column)
    kinds: dict[str, Callable[[np.random.Generator, tuple[int, int]], FloatArray]] = {
        "gauss": lambda rng, shape: rng.standard_normal(shape),
        "t5": lambda rng, shape: rng.standard_t(5, shape) / np.sqrt(5 / 3),
        "t3": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
    }
    for levels, kind, slope, jumping in product(
        (SHORT, LONG), kinds, (0.0, -1.0, -2.0), (0.0, 0.2)
    ):
        x, false, some, found = np.log2(np.array(levels) + 1), [], [], []
        for experiment in range(number):
            rng = np.random.default_rng([experiment, len(levels)])
            true = np.arange(500) < 500 * jumping
            place = rng.integers(2, len(levels) - 1, 500)
            sd = np.where(
                true, 0.15, rng.choice([0.05, 0.15, 0.6], 500)
            )  # the noisiest null rows pass 0.5 nat by chance
            planted = np.where(
                true, -1.0 * (np.arange(len(levels))[:, None] >= place), slope * _unit(x)[:, None]
            )
            jumps = row_jumps(
                levels, planted + sd * kinds[kind](rng, (len(levels), 500)), draws=100_000
            ).jumps
            false.append(float((jumps & ~true).sum() / max(jumps.sum(), 1)))
            some.append(bool((jumps & ~true).any()))
            found.append(float(jumps[true].mean()) if jumping else np.nan)
        error = float(np.std(false) / np.sqrt(number))
        table.add_row(
            str(len(levels)),
            kind,
            f"{slope:g}",
            f"{jumping:.0%}",
            f"{np.mean(false):.1%} ± {error:.1%}",
            f"{np.mean(some):.0%}",
            f"{np.mean(found):.0%}" if jumping else "-",
        )
    return table


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", type=int, default=500)
    number = parser.parse_args().experiments
    console = Console(width=160)
    for table in false_alarms(number):
        console.print(table)
    console.print(other_noise(number))
    for table in powers(min(number, 200)):
        console.print(table)
    console.print(rows(max(number // 10, 10)))


if __name__ == "__main__":
    main()
