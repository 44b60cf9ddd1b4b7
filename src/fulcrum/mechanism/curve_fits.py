"""How a score moves with the ratio of general to task data: four forms, fitted by least squares, compared by AICc.

The ratio is g >= 0, u = g + 1 and x = log2(u), in octaves. Every form is a shape of few parameters, times `a`, plus `c`. For a
given shape `a` and `c` are linear, so that a grid of shapes, each centred and scaled to length 1, gives the least squares of
thousands of curves by one product of matrices (variable projection: Golub and Pereyra 1973, SIAM J. Numer. Anal. 10(2)).

Invariant: equal numbers give equal fits, whatever is drawn elsewhere; an affine change of the scores changes `c`, `a` and the
residuals only, never which form is best.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.special import expit

from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray

FORMS = {
    "constant": 2,
    "power": 4,
    "sigmoid": 5,
    "break": 7,
}  # parameters, with the variance of the residuals
RISE = float(2 * np.log(9))  # octaves from 10% to 90% of a sigmoid, in widths
ABRUPT = 2.0  # octaves: a rise that takes no longer is abrupt
NARROW = np.array([0.1, 0.5, 1.0, 1.5, ABRUPT])
WIDE = np.array([2.1, 2.5, 3.0, 4.0, 6.0, 10.0])


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A form fitted to level means; `parameters` are those of its formula, `k` of them with the variance.

    A form that has too few levels is not fitted: `refused` says what it needs, `rss` is nan and `aicc` infinite.
    """

    form: str
    parameters: Mapping[str, float]
    rss: float
    k: int
    aicc: float
    curve: FloatArray  # (levels,)
    refused: str = ""


class Nearest(NamedTuple):
    """The best shape of a family for each of B curves: residual sum of squares, its number in the family."""

    rss: FloatArray  # (B,)
    number: npt.NDArray[np.intp]  # (B,)
    slope: FloatArray  # (B,): what multiplies it, centred and of length 1


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Shapes over the levels: `parameters` (G, p), `shapes` (G, L) as they are, `unit` (G, L) centred and of length 1."""

    parameters: FloatArray
    shapes: FloatArray
    unit: FloatArray

    def nearest(self, centred: FloatArray) -> Nearest:
        """The best shape for each centred curve (B, L)."""
        along = centred @ self.unit.T
        number = np.argmax(along * along, axis=1)
        slope = along[np.arange(len(centred)), number]
        return Nearest(
            np.maximum((centred * centred).sum(axis=1) - slope * slope, 0.0), number, slope
        )


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """All families over one set of levels. `smooth` has whatever a curve without a jump may look like; `abrupt` sigmoids that
    rise within two octaves, with two levels or more on each side: one level alone is a fast start, or an outlier."""

    x: FloatArray  # (L,) octaves
    power: Family
    smooth: Family
    abrupt: Family
    sigmoid: Family
    breaks: Family


def octaves(ratios: Sequence[float] | FloatArray) -> FloatArray:
    """log2(g + 1) of the levels; DataError unless they are three or more, finite, not negative and ascending."""
    levels = np.asarray(ratios, dtype=np.float64)
    if levels.ndim != 1 or len(levels) < 3:
        raise DataError(
            f"ratios of shape {levels.shape}: a curve needs 3 levels or more; measure at more ratios"
        )
    if not np.isfinite(levels).all() or (levels < 0).any():
        bad = levels[~np.isfinite(levels) | (levels < 0)]
        raise DataError(f"ratio {bad[0]:g}: a ratio of general to task rows is a number from 0 up")
    if (np.diff(levels) <= 0).any():
        place = int(np.argmax(np.diff(levels) <= 0))
        raise DataError(
            f"ratios {levels[place]:g}, {levels[place + 1]:g} in this order: give each ratio once, ascending"
        )
    x: FloatArray = np.log2(levels + 1)
    return x


def finite(name: str, values: FloatArray) -> None:
    """DataError where a value is no number."""
    broken = ~np.isfinite(values)
    if broken.any():
        where = ", ".join(map(str, np.argwhere(broken)[0]))
        raise DataError(
            f"{name}: {int(broken.sum())} of {values.size} are not finite, the first at [{where}]; leave that run out"
        )


def aicc(rss: FloatArray | float, n: int, k: int) -> FloatArray:
    """Akaike's criterion for small samples, Gaussian residuals (Hurvich and Tsai 1989, Biometrika 76(2)); inf if n < k + 2."""
    if n < k + 2:
        return np.full(np.shape(rss), np.inf)
    value: FloatArray = n * np.log(np.asarray(rss) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    return value


def least_rss(means: FloatArray) -> FloatArray:
    """A residual sum below this is rounding: a millionth of the curve's range at each level, means being (..., L)."""
    scale = np.maximum(1e-6 * np.ptp(means, axis=-1), 1e-12 * np.abs(means).max(axis=-1))
    floor: FloatArray = means.shape[-1] * np.maximum(scale, 1e-150) ** 2
    return floor


def fits(
    ratios: Sequence[float] | FloatArray, means: Sequence[float] | FloatArray
) -> dict[str, Fit]:
    """All forms fitted to the level means (levels,) over seeds, in the order of `FORMS`.

    - constant: c
    - power: c + a u^(-beta), beta > 0
    - sigmoid: c + a / (1 + exp(-(x - location) / width)), in octaves
    - break: c + a u^(-b0) (1 + (u / d)^(1/f))^(-b1 f), one smooth break, of Caballero et al. 2022 (arXiv 2210.14891)

    AICc counts distinct levels, as seeds share what is wrong with a form. Raises DataError for what is no curve.
    """
    x = octaves(ratios)
    values = np.asarray(means, dtype=np.float64)
    if values.shape != x.shape:
        raise DataError(
            f"means of shape {values.shape} for {len(x)} ratios: give one mean for each ratio"
        )
    finite("means", values)
    grid = grid_of(tuple(x))
    return {
        "constant": _fit("constant", values, np.zeros_like(x), {}),
        "power": _polished("power", values, x, grid.power, _power, ("beta",), ((1e-3, 20.0),)),
        "sigmoid": _polished(
            "sigmoid", values, x, grid.sigmoid, _sigmoid, ("location", "width"), ((x[0], x[-1]), (0.01, 10.0))
        ),
        "break": _polished(
            "break", values, x, grid.breaks, _break, ("b0", "b1", "d", "f"),
            ((-1.0, 10.0), (-10.0, 10.0), (1.0, 2.0 ** x[-1]), (0.02, 2.0)),
        ),
    }  # fmt: skip


def at(fit: Fit, ratios: Sequence[float] | FloatArray) -> FloatArray:
    """A fitted form between its levels: its values at other `ratios`, (ratios,). Raises DataError for one that was refused."""
    if fit.refused:
        raise DataError(f"{fit.form}: {fit.refused}, and so has no curve")
    x = np.log2(np.asarray(ratios, dtype=np.float64) + 1)
    named = np.array([[value for name, value in fit.parameters.items() if name not in ("c", "a")]])
    shape = {"power": _power, "sigmoid": _sigmoid, "break": _break}.get(fit.form)
    curve: FloatArray = fit.parameters["c"] + (
        fit.parameters["a"] * shape(x, named)[0] if shape else np.zeros_like(x)
    )
    return curve


def best(found: Mapping[str, Fit]) -> Fit | None:
    """The form with the least AICc, the simpler one where equal; None where none could be fitted."""
    fitted = [fit for fit in found.values() if not fit.refused]
    return min(fitted, key=lambda fit: fit.aicc) if fitted else None


def _fit(form: str, values: FloatArray, shape: FloatArray, named: Mapping[str, float]) -> Fit:
    n, k = len(values), FORMS[form]
    if n < k + 2:
        return Fit(
            form,
            {},
            np.nan,
            k,
            np.inf,
            np.full(n, np.nan),
            refused=f"needs {k + 2} levels, has {n}",
        )
    centred = shape - shape.mean()
    length = float(centred @ centred)
    a = float(centred @ values) / length if length > 0 else 0.0
    c = float(values.mean() - a * shape.mean())
    curve = c + a * shape
    rss = float(((values - curve) ** 2).sum())
    scored = float(aicc(max(rss, float(least_rss(values))), n, k))
    return Fit(
        form, {"c": c, **({"a": a} if form != "constant" else {}), **named}, rss, k, scored, curve
    )


def _polished(
    form: str,
    values: FloatArray,
    x: FloatArray,
    family: Family,
    shape: Callable[[FloatArray, FloatArray], FloatArray],
    names: tuple[str, ...],
    bounds: tuple[tuple[float, float], ...],
) -> Fit:
    """The best of the grid, improved by a local search over the shape's parameters where that finds better."""
    if len(values) < FORMS[form] + 2:
        return _fit(form, values, x, {})
    centred = values - values.mean()
    start = family.parameters[family.nearest(centred[None]).number[0]]

    def residuals(parameters: FloatArray) -> FloatArray:
        basis = shape(x, parameters[None])[0]
        basis = basis - basis.mean()
        length = float(basis @ basis)
        left: FloatArray = centred - basis * (
            float(basis @ centred) / length if length > 1e-300 else 0.0
        )
        return left

    low, high = np.array(bounds).T
    unit = max(
        float(np.ptp(values)), 1e-150
    )  # so that tolerances do not depend on the metric's scale
    found = least_squares(
        lambda p: residuals(p) / unit, np.clip(start, low + 1e-9, high - 1e-9), bounds=(low, high), x_scale=high - low,
        xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=60,
    ).x  # fmt: skip
    chosen = min((start, found), key=lambda p: float((residuals(p) ** 2).sum()))
    return _fit(
        form, values, shape(x, chosen[None])[0], dict(zip(names, map(float, chosen), strict=True))
    )


def _power(x: FloatArray, parameters: FloatArray) -> FloatArray:
    shapes: FloatArray = np.exp2(-parameters[:, :1] * x)
    return shapes


def _sigmoid(x: FloatArray, parameters: FloatArray) -> FloatArray:
    shapes: FloatArray = expit((x - parameters[:, :1]) / parameters[:, 1:])
    return shapes


def _break(x: FloatArray, parameters: FloatArray) -> FloatArray:
    b0, b1, d, f = (parameters[:, [i]] for i in range(4))
    ln = x * np.log(2)
    shapes: FloatArray = np.exp(-b0 * ln - b1 * f * np.logaddexp(0.0, (ln - np.log(d)) / f))
    return shapes


def _family(shapes: FloatArray, parameters: FloatArray) -> Family:
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    kept = length[:, 0] > 1e-9 * np.abs(shapes).max(axis=1)  # a flat shape is the constant
    return Family(parameters[kept], shapes[kept], centred[kept] / length[kept])


def _table(*axes: Iterable[float]) -> FloatArray:
    return np.array(list(product(*axes)), dtype=np.float64)


@lru_cache(maxsize=32)
def grid_of(x: tuple[float, ...]) -> Grid:
    """The grid of shapes over levels at these octaves."""
    at = np.array(x)
    betas = np.geomspace(0.01, 8.0, 48)[:, None]
    power = _power(at, betas)
    # What is flat at first and then rises ever faster is smooth too: up to the tail of a sigmoid that is just not abrupt.
    rising = -np.geomspace(0.05, RISE / ABRUPT / np.log(2), 24)[:, None]
    narrow = _table(np.arange(at[1], at[-2] + 1e-9, 0.125), NARROW / RISE)
    wide = _table(np.arange(at[0] - 3, at[-1] + 3, 0.25), WIDE / RISE)
    within = wide[(wide[:, 0] >= at[0]) & (wide[:, 0] <= at[-1])]
    curves = [power, _power(at, rising), at[None], _sigmoid(at, wide)]
    smooth = np.concatenate(curves)
    every = np.concatenate([narrow, within])
    places = 2 ** np.arange(at[1], at[-2] + 1e-9, 0.5)
    bent = _table([0.0, 0.1, 0.3, 1.0], [-3.0, -1.0, -0.3, 0.3, 1.0, 3.0], places, [0.05, 0.2, 0.5])
    return Grid(
        at,
        _family(power, betas),
        _family(smooth, np.zeros((len(smooth), 0))),
        _family(_sigmoid(at, narrow), narrow),
        _family(_sigmoid(at, every), every),
        _family(_break(at, bent), bent),
    )
