"""Settings of the experiments on the mechanism itself: how the gain grows with general data (`scale`), and in which skills it
lies (`quanta`).
"""

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from fulcrum.sections import Section

Design = Literal["exposures", "steps", "permuted"]


class ScaleSettings(Section):
    """How much general data each training gets, and what is held fixed meanwhile. Seeds are those of `compare`, else five."""

    ratios: tuple[float, ...] = Field(
        (0, 0.5, 1, 2, 4, 8, 16, 32, 64), min_length=3, description="general rows for each shown task row, ascending"
    )
    designs: tuple[Design, ...] = Field(
        ("exposures", "steps"),
        min_length=1,
        description="exposures: each task row is shown `repeats` times, and trainings grow; steps: all trainings are as long, "
        "and task rows are shown less often; permuted: as exposures, general rows with each other's answers",
    )
    rows: int | None = Field(None, ge=4, description="task rows of each task; none: all, train and dev")
    repeats: int = Field(4, ge=1, description="times each task row is shown, where exposures are fixed")
    passes: int | None = Field(
        None,
        ge=2,
        description="length of each training in passes over the task rows, where steps are fixed; none: so that the largest "
        "ratio shows each row once",
    )

    @field_validator("ratios")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[0] != 0 or any(b <= a for a, b in pairwise(value)):
            raise ValueError(f"ratios begin with 0 (no general data) and ascend, got {', '.join(f'{r:g}' for r in value)}")
        return value

    @field_validator("designs")
    @classmethod
    def _once(cls, value: tuple[Design, ...]) -> tuple[Design, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"a design is given twice in {', '.join(value)}; one curve counted as two would feign certainty")
        return value


class QuantaSettings(Section):
    """Which answers are looked at, and how their clusters are found (after Michaud et al. 2023, arXiv 2303.13506)."""

    unit: Literal["tokens", "rows"] = Field("tokens", description="what is clustered: single answer tokens, or whole answers")
    items: int = Field(1000, ge=40, description="how many of them, half of the task's test rows, half of held-out general rows")
    repeats: int = Field(4, ge=1, description="times each task row is shown, in both arms")
    points: int = Field(6, ge=1, description="moments of a training at which every item's loss is taken, its end among them")
    most: int = Field(64, ge=2, description="clusters at most")
    rows: int | None = Field(None, ge=4, description="task rows to train on; none: all, train and dev")
