"""Count how often intervals over folds cover the truth: comparisons without a test file.

With and without the factor of Nadeau and Bengio (2003).

    python validation/simulate_folds.py

Two ridge regressions (penalties 1 and 30, 20 inputs) are compared by their squared error, each fold
by what the others trained. The truth is the mean difference over 1,500 data sets of the training
size, on 2,000 new rows each.
"""

import numpy as np
from scipy.special import stdtrit

from fulcrum.core.types import FloatArray
from fulcrum.stats.row_savings import shared_variance

INPUTS, REPETITIONS = 20, 2000


def _fit(inputs: FloatArray, outputs: FloatArray, penalty: float) -> FloatArray:
    return np.linalg.solve(inputs.T @ inputs + penalty * np.eye(INPUTS), inputs.T @ outputs).astype(
        np.float64
    )


def _difference(
    inputs: FloatArray, outputs: FloatArray, tests: FloatArray, answers: FloatArray
) -> float:
    errors = [
        ((tests @ _fit(inputs, outputs, penalty) - answers) ** 2).mean() for penalty in (1.0, 30.0)
    ]
    return float(errors[0] - errors[1])


def coverage(rows: int, folds: int) -> tuple[float, float]:
    """Shares of 95% intervals that hold the truth: with the factor, and without."""
    rng = np.random.default_rng([rows, folds])
    weights = rng.normal(size=INPUTS) / np.sqrt(INPUTS)

    def drawn(number: int) -> tuple[FloatArray, FloatArray]:
        inputs = rng.normal(size=(number, INPUTS))
        return inputs, inputs @ weights + 2 * rng.normal(size=number)

    true = np.mean([_difference(*drawn(rows - rows // folds), *drawn(2000)) for _ in range(1500)])
    held, hits = np.arange(rows) % folds, np.zeros(2)
    for _ in range(REPETITIONS):
        x, y = drawn(rows)
        found = np.array(
            [
                _difference(x[held != k], y[held != k], x[held == k], y[held == k])
                for k in range(folds)
            ]
        )
        half = stdtrit(folds - 1, 0.975) * found.std(ddof=1) * np.sqrt(1 / folds)
        wider = np.sqrt(1 + folds * shared_variance(rows / folds, rows))
        hits += [abs(found.mean() - true) <= half * wider, abs(found.mean() - true) <= half]
    return float(hits[0] / REPETITIONS), float(hits[1] / REPETITIONS)


if __name__ == "__main__":
    for rows, folds in ((64, 8), (64, 5), (24, 4)):
        wide, plain = coverage(rows, folds)
        print(f"{rows} rows, {folds} folds: covered {wide:.1%}, without the factor {plain:.1%}")
