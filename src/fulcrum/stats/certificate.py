"""A certificate, typed: what an arm's general data bought, in rows and in score, with intervals.

`certificate.json` holds codes and numbers alone. All of them follow from the outcomes next to it
and the question asked (`certification`), so that `verify` can compute them again. `wording` makes
the sentences, which may change without breaking a stored certificate.

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
FORMAT = 3  # 1 knew no `identifiable` of each row gain; 2 held sentences, and turned losses round

Verdict = Literal["gain", "no_gain", "loss", "unknown"]
Choice = Literal["general_data", "labelling", "undecided", "unmeasured"]


# ---- numbers in JSON: null is what is not known, a code what lies beyond the measured sizes


def _read_interval(given: Any) -> Interval:
    if isinstance(given, Interval):
        return given
    _check_keys(given, Interval._fields)
    return Interval(
        *(math.nan if given[key] is None else _finite(given[key]) for key in Interval._fields)
    )


def _plain_interval(interval: Interval) -> dict[str, float | None]:
    return {
        key: value if math.isfinite(value) else None for key, value in interval._asdict().items()
    }


def _read_factor(given: Any) -> Factor:
    if isinstance(given, Factor):
        return given
    _check_keys(given, Factor._fields)
    return Factor(*(_read_end(given[key]) for key in Factor._fields))


def _read_end(end: Any) -> float:
    if end is None:
        return math.nan
    if end == "under":
        return 0.0
    return math.inf if end == "over" else _finite(end)


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


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


# A number with its 95% interval; nan where nothing is known.
Estimate = Annotated[Interval, PlainValidator(_read_interval), PlainSerializer(_plain_interval)]
# A factor in rows or tokens; 0 or inf beyond what was measured, nan where nothing is known.
Censored = Annotated[Factor, PlainValidator(_read_factor), PlainSerializer(_plain_factor)]


def signed(interval: Interval, sign: int) -> Interval:
    """Multiply an interval by +1 or -1; a zero has no sign."""
    if sign > 0:
        return interval
    return Interval(-interval.estimate + 0.0, -interval.high + 0.0, -interval.low + 0.0)


# ---- what a certificate holds


@dataclass(frozen=True, slots=True)
class AtEnd:
    """A hyperparameter whose best value was the least or the most that was tried."""

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
    all_rows: int | None = None  # the largest size, where the task has no further rows
    test_rows: int | None = None  # rows held out as test rows, where the task has no test file
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
    tokens: float | None  # of the task rows, mean over seeds; None where they say nothing
    by_seed: tuple[float, ...]
    score: Estimate


@dataclass(frozen=True, slots=True)
class Selection:
    """Which arm is the reference at a size."""

    size: int  # task rows
    arm: str  # by the estimate itself
    shares: Mapping[str, float]  # of the draws in which an arm was selected

    @property
    def usual(self) -> str:
        """The arm that was selected in most draws."""
        return max(self.shares, key=self.shares.__getitem__)


@dataclass(frozen=True, slots=True)
class Worth:
    """A row saving (of all rows), or the row gain of so many."""

    size: int  # task rows
    identifiable: bool  # whether the reference clearly rises where this is read off
    rows: Censored
    tokens: Censored | None  # the same in task tokens, where these rise with the rows


@dataclass(frozen=True, slots=True)
class MoreRows:
    """What labelling more rows would have brought, next to what general data brought."""

    rows: int  # more labelled rows
    choice: Choice
    references: tuple[str, ...]  # the arms that were measured with so many
    labelling: Estimate  # difference of the reference with more rows to the reference with all
    advantage: Estimate  # difference of the arm with all rows to the reference with more


@dataclass(frozen=True, slots=True)
class Part:
    """A difference between arms with all rows that tells what the whole difference comes from."""

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
    selected_on: Literal[
        "dev", "test"
    ]  # the scores that select the reference; its own test scores favour it
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
        """The row gain of all rows, where it can be read off."""
        for worth in self.gains:
            if worth.size == self.rows and worth.identifiable:
                return worth
        return None

    @property
    def reference(self) -> Selection:
        """The reference with all rows."""
        return next(selection for selection in self.references if selection.size == self.rows)

    def improvement(self, difference: Interval) -> Interval:
        """Return a difference or slope of this metric with the sign that makes above 0 better."""
        return signed(difference, -1 if self.lower_is_better else 1)


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
    """What arms did next to the task, by one metric, such as "leakage" or "forgetting: pool"."""

    metric: str
    seeds: int
    groups: float  # equal content groups that the rows are worth
    arms: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The hyperparameters of a cell; None where there was nothing to choose."""

    arm: str
    size: int
    seed: int
    values: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the outcomes rest on. If another trainer made them, only their file is known."""

    outcomes_file: str | None = None  # its SHA-256
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(
        default_factory=dict
    )  # short hash of each task row, by its place
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each data file, by its path
    made: Mapping[str, str] = field(
        default_factory=dict
    )  # SHA-256 of each file of rows that a model made
    general_rows: Mapping[str, str] = field(
        default_factory=dict
    )  # hash of the general rows, by seed
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, machine, model
    hyperparameters: tuple[Chosen, ...] = ()
    adjusted_p: Mapping[str, float] = field(default_factory=dict)  # of several tasks, by Holm


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
        """The answer of the metric that decides."""
        return self.answers[0]

    @property
    def seal(self) -> str:
        """The SHA-256 that this content should be sealed with."""
        content = self.plain()
        del content["sha256"]
        return store.fingerprint(content)

    def plain(self) -> dict[str, Any]:
        """Return the certificate as JSON holds it."""
        plain: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return plain

    @classmethod
    def read(cls, file: Path) -> "Certificate":
        """Read a certificate. Raises StoreError for anything else, and for other formats."""
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
        if changed := store.changes(content, certificate.plain()):
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
    """Return whether a metric tells what happened next to the task, such as "leakage"."""
    return metric.partition(":")[0] in ("forgetting", "drift", "dependency", "leakage")
