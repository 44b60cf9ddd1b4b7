"""Fit four forms to how a score moves with the ratio of general to task data; compare them by AICc.

The ratio is g >= 0, u = g + 1, and x = log2(u), in octaves. Every form is a shape of few
parameters, times `a`, plus `c`. For a given shape `a` and `c` are linear. So one product of
matrices gives the least squares of thousands of curves over a grid of shapes, each centred and
scaled to length 1 (variable projection: Golub and Pereyra 1973, SIAM J. Numer. Anal. 10(2)).

Shapes in comments: B curves, G shapes, L levels.

Invariant: equal numbers give equal fits, whatever is drawn elsewhere. An affine change of the
scores changes `c`, `a` and the residuals only, never which form is best.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit

from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray, IntArray

# The number of parameters, with the variance of the residuals.
FORMS = {"constant": 2, "power": 4, "sigmoid": 5, "break": 7}
RISE = float(2 * np.log(9))  # octaves from 10% to 90% of a sigmoid, in widths
ABRUPT = 2.0  # octaves: a rise that takes no longer is abrupt
NARROW = np.array([0.1, 0.5, 1.0, 1.5, ABRUPT])
WIDE = np.array([2.1, 2.5, 3.0, 4.0, 6.0, 10.0])

Shape = Callable[[FloatArray, FloatArray], FloatArray]  # (L,), (G, p) -> (G, L)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A form fitted to level means. If it has too few levels, it is refused and not fitted."""

    form: str
    parameters: Mapping[str, float]  # of its formula
    rss: float  # nan if refused
    k: int  # number of parameters, with the variance
    aicc: float  # infinite if refused
    curve: FloatArray  # (L,)
    refused: str = ""  # what it needs


class Nearest(NamedTuple):
    """The best shape of a family for each of B curves."""

    rss: FloatArray  # (B,), residual sum of squares
    number: IntArray  # (B,), of the shape in the family
    slope: FloatArray  # (B,), what multiplies the shape, centred and of length 1


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The shapes of one form over the levels."""

    parameters: FloatArray  # (G, p)
    shapes: FloatArray  # (G, L)
    unit: FloatArray  # (G, L), centred and of length 1

    def nearest(self, centred: FloatArray) -> Nearest:
        """Return the best shape for each centred curve (B, L)."""
        along = centred @ self.unit.T
        number = np.argmax(along * along, axis=1)
        slope = along[np.arange(len(centred)), number]
        rss = np.maximum((centred * centred).sum(axis=1) - slope * slope, 0.0)
        return Nearest(rss, number, slope)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """All families over one set of levels."""

    x: FloatArray  # (L,), octaves
    power: Family
    smooth: Family  # whatever a curve without a jump may look like
    # Sigmoids that rise within two octaves, with two levels or more on each side: one level alone
    # is a fast start, or an outlier.
    abrupt: Family
    sigmoid: Family
    breaks: Family


def octaves(ratios: Sequence[float] | FloatArray) -> FloatArray:
    """Return log2(g + 1) of the levels.

    Raises DataError unless they are three or more, finite, not negative and ascending.
    """
    levels = np.asarray(ratios, dtype=np.float64)
    if levels.ndim != 1 or len(levels) < 3:
        raise DataError(
            f"ratios of shape {levels.shape}: a curve needs 3 levels or more; measure at more "
            "ratios"
        )
    bad = levels[~np.isfinite(levels) | (levels < 0)]
    if len(bad):
        raise DataError(f"ratio {bad[0]:g}: a ratio of general to task rows is a number from 0 up")
    if (np.diff(levels) <= 0).any():
        place = int(np.argmax(np.diff(levels) <= 0))
        raise DataError(
            f"ratios {levels[place]:g}, {levels[place + 1]:g} in this order: give each ratio once, "
            "ascending"
        )
    x: FloatArray = np.log2(levels + 1)
    return x


def require_finite(name: str, values: FloatArray) -> None:
    """Raise DataError if a value is not a number."""
    broken = ~np.isfinite(values)
    if broken.any():
        where = ", ".join(map(str, np.argwhere(broken)[0]))
        raise DataError(
            f"{name}: {int(broken.sum())} of {values.size} are not finite, the first at [{where}]; "
            "leave that run out"
        )


def aicc(rss: FloatArray | float, n: int, k: int) -> FloatArray:
    """Return Akaike's criterion for small samples and Gaussian residuals; inf if n < k + 2.

    See Hurvich and Tsai 1989, Biometrika 76(2).
    """
    if n < k + 2:
        return np.full(np.shape(rss), np.inf)
    value: FloatArray = n * np.log(np.asarray(rss) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    return value


def rounding_floor(means: FloatArray) -> FloatArray:
    """Return the residual sum of squares below which all is rounding, for level means (..., L).

    It is that of a millionth of the curve's range at each level.
    """
    scale = np.maximum(1e-6 * np.ptp(means, axis=-1), 1e-12 * np.abs(means).max(axis=-1))
    floor: FloatArray = means.shape[-1] * np.maximum(scale, 1e-150) ** 2
    return floor


def fit_forms(
    ratios: Sequence[float] | FloatArray, means: Sequence[float] | FloatArray
) -> dict[str, Fit]:
    """Fit all forms to the level means (levels,) over seeds, in the order of `FORMS`.

    - constant: c
    - power: c + a u^(-beta), beta > 0
    - sigmoid: c + a / (1 + exp(-(x - location) / width)), in octaves
    - break: c + a u^(-b0) (1 + (u / d)^(1/f))^(-b1 f), one smooth break, of Caballero et al. 2022
      (arXiv 2210.14891)

    AICc counts distinct levels, as seeds share what is wrong with a form. Raises DataError if the
    means are not a curve.
    """
    x = octaves(ratios)
    values = np.asarray(means, dtype=np.float64)
    if values.shape != x.shape:
        raise DataError(
            f"means of shape {values.shape} for {len(x)} ratios: give one mean for each ratio"
        )
    require_finite("means", values)
    grid = grid_of(tuple(x))
    bounds = {
        "power": {"beta": (1e-3, 20.0)},
        "sigmoid": {"location": (x[0], x[-1]), "width": (0.01, 10.0)},
        "break": {
            "b0": (-1.0, 10.0),
            "b1": (-10.0, 10.0),
            "d": (1.0, 2.0 ** x[-1]),
            "f": (0.02, 2.0),
        },
    }
    families = {"power": grid.power, "sigmoid": grid.sigmoid, "break": grid.breaks}
    fits = {"constant": _fit("constant", values, np.zeros_like(x), {})}
    for form, family in families.items():
        if len(values) < FORMS[form] + 2:
            fits[form] = _refuse(form, len(values))
        else:
            fits[form] = _search(form, values, x, family, bounds[form])
    return fits


def evaluate(fit: Fit, ratios: Sequence[float] | FloatArray) -> FloatArray:
    """Return a fitted form's values at any `ratios`, (ratios,). Raise DataError if refused."""
    if fit.refused:
        raise DataError(f"{fit.form}: {fit.refused}, and so has no curve")
    x = np.log2(np.asarray(ratios, dtype=np.float64) + 1)
    parameters = dict(fit.parameters)
    c, a = parameters.pop("c"), parameters.pop("a", None)
    if a is None:
        return np.full_like(x, c)
    curve: FloatArray = c + a * _SHAPES[fit.form](x, np.array([list(parameters.values())]))[0]
    return curve


def best_fit(fits: Mapping[str, Fit]) -> Fit | None:
    """Return the form with the least AICc, of equal ones the simplest; None if all were refused."""
    fitted = [fit for fit in fits.values() if not fit.refused]
    return min(fitted, key=lambda fit: fit.aicc) if fitted else None


@lru_cache(maxsize=32)
def grid_of(x: tuple[float, ...]) -> Grid:
    """Return the grid of shapes over levels at these octaves."""
    at = np.array(x)
    betas = np.geomspace(0.01, 8.0, 48)[:, None]
    power = _power(at, betas)
    # A curve that is flat at first and then rises ever faster is smooth too: up to the tail of a
    # sigmoid that is just not abrupt.
    rising = -np.geomspace(0.05, RISE / ABRUPT / np.log(2), 24)[:, None]
    narrow = _table(np.arange(at[1], at[-2] + 1e-9, 0.125), NARROW / RISE)
    wide = _table(np.arange(at[0] - 3, at[-1] + 3, 0.25), WIDE / RISE)
    within = wide[(wide[:, 0] >= at[0]) & (wide[:, 0] <= at[-1])]
    smooth = np.concatenate([power, _power(at, rising), at[None], _sigmoid(at, wide)])
    sigmoids = np.concatenate([narrow, within])
    places = 2 ** np.arange(at[1], at[-2] + 1e-9, 0.5)
    bent = _table([0.0, 0.1, 0.3, 1.0], [-3.0, -1.0, -0.3, 0.3, 1.0, 3.0], places, [0.05, 0.2, 0.5])
    return Grid(
        x=at,
        power=_family(power, betas),
        smooth=_family(smooth, np.zeros((len(smooth), 0))),
        abrupt=_family(_sigmoid(at, narrow), narrow),
        sigmoid=_family(_sigmoid(at, sigmoids), sigmoids),
        breaks=_family(_break(at, bent), bent),
    )


def _table(*axes: Iterable[float]) -> FloatArray:
    return np.array(list(product(*axes)), dtype=np.float64)


def _family(shapes: FloatArray, parameters: FloatArray) -> Family:
    centred = shapes - shapes.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    kept = length[:, 0] > 1e-9 * np.abs(shapes).max(axis=1)  # a flat shape is the constant
    return Family(parameters[kept], shapes[kept], centred[kept] / length[kept])


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


_SHAPES: Mapping[str, Shape] = {"power": _power, "sigmoid": _sigmoid, "break": _break}


def _fit(form: str, values: FloatArray, shape: FloatArray, named: Mapping[str, float]) -> Fit:
    """Fit `a` and `c` to the values (L,), the shape (L,) and its `named` parameters being given."""
    n, k = len(values), FORMS[form]
    if n < k + 2:
        return _refuse(form, n)
    centred = shape - shape.mean()
    length = float(centred @ centred)
    a = float(centred @ values) / length if length > 0 else 0.0
    c = float(values.mean() - a * shape.mean())
    curve = c + a * shape
    rss = float(((values - curve) ** 2).sum())
    criterion = float(aicc(max(rss, float(rounding_floor(values))), n, k))
    linear = {"c": c} if form == "constant" else {"c": c, "a": a}
    return Fit(form, {**linear, **named}, rss, k, criterion, curve)


def _refuse(form: str, n: int) -> Fit:
    k = FORMS[form]
    needs = f"needs {k + 2} levels, has {n}"
    return Fit(form, {}, np.nan, k, np.inf, np.full(n, np.nan), refused=needs)


def _search(
    form: str,
    values: FloatArray,
    x: FloatArray,
    family: Family,
    bounds: Mapping[str, tuple[float, float]],
) -> Fit:
    """Fit a form: the best of the grid, or what a local search from there finds, if that is better.

    The search is over the shape's parameters, within `bounds` by name.
    """
    shape = _SHAPES[form]
    centred = values - values.mean()
    start = family.parameters[family.nearest(centred[None]).number[0]]

    def residuals(parameters: FloatArray) -> FloatArray:
        basis = shape(x, parameters[None])[0]
        basis = basis - basis.mean()
        length = float(basis @ basis)
        slope = float(basis @ centred) / length if length > 1e-300 else 0.0
        left: FloatArray = centred - basis * slope
        return left

    def rss(parameters: FloatArray) -> float:
        return float((residuals(parameters) ** 2).sum())

    low, high = np.array(list(bounds.values())).T
    # So that tolerances do not depend on the metric's scale.
    unit = max(float(np.ptp(values)), 1e-150)
    searched = least_squares(
        lambda parameters: residuals(parameters) / unit,
        np.clip(start, low + 1e-9, high - 1e-9),
        bounds=(low, high),
        x_scale=high - low,
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
        max_nfev=60,
    )
    chosen = min((start, searched.x), key=rss)
    named = dict(zip(bounds, map(float, chosen), strict=True))
    return _fit(form, values, shape(x, chosen[None])[0], named)
