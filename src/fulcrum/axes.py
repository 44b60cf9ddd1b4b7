"""Axes of plots: round ticks, and dots with intervals laid out on one axis in percent of its width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within an interval, at steps of 1, 2, 2.5 or 5 times a power of 10."""
    raw = max(high - low, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks as text, with as many decimals as tell them apart."""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d), 6)
    return [f"{tick + 0.0:,.{digits}f}".replace("-", "−") for tick in ticks]


@dataclass(frozen=True)
class Bar:
    """A value with its interval in percent of a plot's width; None where there is none."""

    at: float
    low: float | None
    high: float | None
    side: str


@dataclass(frozen=True)
class Axis:
    """A common axis of values, in percent."""

    ticks: tuple[tuple[float, str], ...]
    zero: float
    bars: tuple[Bar, ...]


def bars(values: Sequence[tuple[float, float | None, float | None]]) -> Axis:
    """Lay out (estimate, low, high) on one axis that holds 0."""
    known = [0.0, *(end for value in values for end in value if end is not None)]
    low, high = min(known), max(known)
    room = 0.06 * (high - low)
    low, high = (low - room, high + room) if room else (-0.1, 1.0)

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    ticks = nice_ticks(low, high, 4)
    drawn = []
    for estimate, first, last in values:
        side = "start" if at(estimate) < 34 else "end" if at(estimate) > 66 else "middle"
        drawn.append(Bar(at(estimate), None if first is None else at(first), None if last is None else at(last), side))
    return Axis(tuple(zip(map(at, ticks), tick_texts(ticks), strict=True)), at(0.0), tuple(drawn))
