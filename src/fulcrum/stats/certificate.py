"""A certificate: what an arm's general data bought, in rows and in score, with intervals.

`certificate.json` holds codes and numbers only. All of them follow from the outcomes next to it and
the question asked (`certification`), so `verify` can compute them again. `wording` makes the
sentences, which may change without breaking a stored certificate.

Invariant: every score, difference and slope is in its metric's own unit and sign. Of a loss, a
difference below 0 is an improvement.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.stats.intervals import Interval
from fulcrum.stats.row_savings import Factor

FILE = "certificate.json"
# 1 had no `identifiable` for each row gain; 2 held sentences, and turned the sign of losses.
FORMAT = 3

Verdict = Literal["gain", "no_gain", "loss", "unknown"]
Choice = Literal["general_data", "labelling", "undecided", "unmeasured"]


# Numbers in JSON: null if it is not known, "under" or "over" if it lies beyond the measured sizes.


def _read_interval(given: Any) -> Interval:
    if isinstance(given, Interval):
        return given
    _check_keys(given, Interval._fields)
    return Interval(*[_read_number(given[key]) for key in Interval._fields])


def _plain_interval(interval: Interval) -> dict[str, float | None]:
    plain: dict[str, float | None] = {}
    for key, value in interval._asdict().items():
        plain[key] = value if math.isfinite(value) else None
    return plain


def _read_factor(given: Any) -> Factor:
    if isinstance(given, Factor):
        return given
    _check_keys(given, Factor._fields)
    return Factor(*[_read_end(given[key]) for key in Factor._fields])


def _read_end(end: Any) -> float:
    if end == "under":
        return 0.0
    if end == "over":
        return math.inf
    return _read_number(end)


def _plain_factor(factor: Factor) -> dict[str, float | str | None]:
    plain: dict[str, float | str | None] = {}
    for key, value in factor._asdict().items():
        plain[key] = value
        if math.isnan(value):
            plain[key] = None
        elif value == math.inf:
            plain[key] = "over"
        elif value == 0:
            plain[key] = "under"
    return plain


def _check_keys(given: Any, keys: Sequence[str]) -> None:
    if not isinstance(given, Mapping) or set(given) != set(keys):
        raise ValueError(f"expected an object with {', '.join(keys)}")


def _read_number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


# A number with its 95% interval; nan if nothing is known.
Estimate = Annotated[Interval, PlainValidator(_read_interval), PlainSerializer(_plain_interval)]
# A factor in rows or tokens; 0 or inf beyond what was measured, nan if nothing is known.
Censored = Annotated[Factor, PlainValidator(_read_factor), PlainSerializer(_plain_factor)]


def with_sign(interval: Interval, sign: int) -> Interval:
    """Multiply an interval by +1 or -1; a zero has no sign."""
    if sign > 0:
        return interval
    return Interval(-interval.estimate + 0.0, -interval.high + 0.0, -interval.low + 0.0)


# What a certificate holds.


@dataclass(frozen=True, slots=True)
class AtEnd:
    """A hyperparameter whose best value was the smallest or the largest that was tried."""

    arm: str
    size: int  # task rows
    name: Literal["repeats", "learning_rate"]
    chosen: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Diverged:
    """A training on all rows that diverged with the best `trial`: the next best was used."""

    arm: str
    size: int  # task rows
    seed: int
    trial: str  # as in file names: "repeats4-learning_rate0.001"


@dataclass(frozen=True, slots=True)
class Budget:
    """What was agreed on before a comparison began, and what it skipped for it.

    seconds: the time that it might take; None: no limit
    left_out: what it has less of than the full design, in a few words each
    """

    seconds: float | None
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Design:
    """How a run made the outcomes, as far as a reader of the numbers must know it."""

    folds: int  # of the cross-validation inside the task rows, by which hyperparameters were chosen
    tune: Literal["first", "each"]  # at the first seed for all seeds, or at each seed
    trials: Mapping[str, int]  # settings tried, by arm
    trained: tuple[str, ...]  # the arms among these that are trained
    at_end: tuple[AtEnd, ...] = ()
    diverged: tuple[Diverged, ...] = ()
    all_rows: int | None = None  # the largest size, if the task has no further rows
    test_rows: int | None = None  # rows held out as test rows, if the task has no test file
    budget: Budget | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: what `arm` brought over the best of `references`, which mix nothing in."""

    arm: str
    references: tuple[str, ...]
    metrics: tuple[str, ...]  # the first decides
    lower_is_better: tuple[str, ...] = ()  # of the metrics
    task: str = "task"
    draws: Annotated[int, Field(ge=200, le=100_000)] = 2000
    seed: Annotated[int, Field(ge=0)] = 0  # of the draws
    design: Design | None = None  # None for outcomes that another trainer made


@dataclass(frozen=True, slots=True)
class Point:
    """An arm at a size, by one metric."""

    arm: str
    size: int  # task rows; 0 for an untrained arm
    tokens: float | None  # of the task rows, mean over seeds; None if they say nothing
    by_seed: tuple[float, ...]
    score: Estimate


@dataclass(frozen=True, slots=True)
class Selection:
    """Which arm is the reference at a size."""

    size: int  # task rows
    arm: str  # by the estimate itself
    shares: Mapping[str, float]  # arm -> share of the draws in which it was selected

    @property
    def usual(self) -> str:
        """Return the arm that was selected in most draws."""
        return max(self.shares, key=self.shares.__getitem__)


@dataclass(frozen=True, slots=True)
class Worth:
    """A row saving (with all rows), or the row gain of a number of rows."""

    size: int  # task rows
    identifiable: bool  # whether the reference clearly rises where this is read off
    rows: Censored
    tokens: Censored | None  # the same in task tokens, if these rise with the rows


@dataclass(frozen=True, slots=True)
class MoreRows:
    """What labelling more rows would have brought, compared with what general data brought."""

    rows: int  # how many more
    choice: Choice
    references: tuple[str, ...]  # the arms that were measured with so many
    labelling: Estimate  # the reference with more rows minus the reference with all rows
    advantage: Estimate  # the arm with all rows minus the reference with more rows


@dataclass(frozen=True, slots=True)
class Part:
    """A difference between arms with all rows that shows one cause of the whole difference."""

    code: str  # of ATTRIBUTION
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Answer:
    """All that one metric says."""

    metric: str
    lower_is_better: bool
    rows: int  # task rows at which arms are compared
    seeds: int
    test_groups: float  # equal content groups that the test rows are worth
    points: tuple[Point, ...]
    references: tuple[Selection, ...]  # by size, ascending
    # The scores that select the reference; its own test scores favour it.
    selected_on: Literal["dev", "test"]
    difference: Estimate  # the arm minus the reference
    p: float | None  # two-sided, of a difference of 0
    slope: Estimate  # of the reference, for each doubling of its rows
    slope_towards_rows: Estimate  # the same over its last sizes up to `rows`
    saving: Worth
    gains: tuple[Worth, ...]  # by size, ascending
    verdict: Verdict
    more_rows: MoreRows
    attribution: tuple[Part, ...]

    @property
    def gain(self) -> Worth | None:
        """Return the row gain of all rows, if it can be read off."""
        for worth in self.gains:
            if worth.size == self.rows and worth.identifiable:
                return worth
        return None

    @property
    def reference(self) -> Selection:
        """Return the reference with all rows."""
        return next(selection for selection in self.references if selection.size == self.rows)

    def improvement(self, difference: Interval) -> Interval:
        """Return a difference or slope of this metric with the sign that makes above 0 better."""
        return with_sign(difference, -1 if self.lower_is_better else 1)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two metrics that contradict each other, so that neither gives a headline."""

    code: Literal["verdicts", "savings", "gains"]
    metrics: tuple[str, str]  # of verdicts, the one that is better first


@dataclass(frozen=True, slots=True)
class Effect:
    """A side effect of one arm; lower is better."""

    arm: str
    size: int  # task rows; 0 for an untrained arm
    score: Estimate
    rise: Estimate | None  # over the first untrained arm, on the same rows


@dataclass(frozen=True, slots=True)
class SideEffect:
    """What arms did besides the task, by one metric, such as "leakage" or "forgetting: pool"."""

    metric: str
    seeds: int
    groups: float  # equal content groups that the rows are worth
    arms: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The hyperparameters of a cell; None if there was nothing to choose."""

    arm: str
    size: int
    seed: int
    values: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the outcomes rest on. If another trainer made them, only their file is known.

    outcomes_file: its SHA-256
    rows: place -> short hash of the task row
    files: path -> SHA-256 of the data file
    made: path -> SHA-256 of a file of rows that a model made
    general_rows: seed -> hash of the general rows
    environment: versions, machine, model
    adjusted_p: task -> p-value adjusted for several tasks, by Holm
    """

    outcomes_file: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    general_rows: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: tuple[Chosen, ...] = ()
    adjusted_p: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CellHash:
    """A hash of a cell's outcomes, so that a changed one can be named."""

    arm: str
    size: int
    seed: int
    metric: str | None  # None for the lines with dev score and tokens
    sha256: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate as `certificate.json` holds it."""

    question: Question
    contradiction: Contradiction | None
    answers: tuple[Answer, ...]  # by metric, the deciding one first
    side_effects: tuple[SideEffect, ...]
    inputs: Inputs = field(default_factory=Inputs)
    outcomes: tuple[CellHash, ...] = ()
    sha256: str = ""  # the seal
    format: int = FORMAT

    @property
    def answer(self) -> Answer:
        """Return the answer of the metric that decides."""
        return self.answers[0]

    @property
    def seal(self) -> str:
        """Return the SHA-256 that this content should be sealed with."""
        content = self.plain()
        del content["sha256"]
        return store.fingerprint(content)

    def plain(self) -> dict[str, Any]:
        """Return the certificate as JSON holds it."""
        plain: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return plain

    @classmethod
    def read(cls, file: Path) -> "Certificate":
        """Read a certificate. Raises StoreError for anything else, such as other formats."""
        try:
            content = store.strict_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{file}: cannot be read as a certificate: {error}") from None
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise StoreError(
                f"{file}: not a certificate of format {FORMAT} (found {version!r:.20}); "
                "certify its outcomes again, with `fulcrum certify`"
            )
        try:
            certificate = _adapter().validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise StoreError(
                f"{file}: not a certificate: {place}: {first['msg']}; the file was changed"
            ) from None
        changed = store.changes(content, certificate.plain())
        if changed:
            raise StoreError(
                f"{file}: not a certificate: odd {', '.join(changed[:5])}; the file was changed"
            )
        if not certificate.answers:
            raise StoreError(f"{file}: not a certificate: it has no answers; the file was changed")
        return certificate


@cache
def _adapter() -> TypeAdapter[Certificate]:
    return TypeAdapter(Certificate)


def sealed(certificate: Certificate) -> Certificate:
    """Return the certificate as it will be read, with its seal."""
    as_read = _adapter().validate_python(certificate.plain())
    return replace(as_read, sha256=as_read.seal)


def save(file: Path, certificate: Certificate) -> None:
    """Write a certificate as `Certificate.read` reads it. Raises StoreError if the disk refuses."""
    text = json.dumps(certificate.plain(), indent=1, ensure_ascii=False) + "\n"
    store.write_bytes(file, text.encode())


def is_side_effect(metric: str) -> bool:
    """Return whether a metric measures something besides the task, such as "leakage"."""
    return metric.partition(":")[0] in ("forgetting", "drift", "dependency", "leakage")
