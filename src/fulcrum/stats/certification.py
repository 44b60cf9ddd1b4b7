"""Outcomes -> certificate: the question asked of them, answered metric by metric, and sealed.

Everything is computed from draws in which higher is better (`row_savings`), and turned back into
the metric's own sign at the end.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import FloatArray
from fulcrum.stats import outcomes, row_savings
from fulcrum.stats.certificate import (
    FILE,
    Answer,
    CellHash,
    Certificate,
    Choice,
    Contradiction,
    Effect,
    Inputs,
    MoreRows,
    Part,
    Point,
    Question,
    Selection,
    SideEffect,
    Verdict,
    Worth,
    is_side_effect,
    save,
    sealed,
    signed,
)
from fulcrum.stats.intervals import Interval
from fulcrum.stats.outcomes import Cell, Outcomes
from fulcrum.stats.row_savings import Draws, Reference

MORE = 50  # rows that the user could label instead

# What a difference between arms at all rows says, by code; each is a sum of scores, + or -.
ATTRIBUTION: Mapping[str, tuple[tuple[str, int], ...]] = {
    "mixing": (("mix", 1), ("sft", -1)),
    "anchor_within_mix": (("tell", 1), ("mix", -1)),
    "interaction": (("tell", 1), ("mix", -1), ("sft_anchor", -1), ("sft", 1)),
    "shuffle": (("tell", 1), ("general_then_task", -1)),
    "equal_exposures": (("tell", 1), ("sft_matched", -1)),
    "transfer_over_permuted": (("tell", 1), ("placebo_permuted", -1)),
    "transfer_over_own_answers": (("tell", 1), ("placebo_own_answers", -1)),
}


def write(folder: Path, found: Outcomes, question: Question, inputs: Inputs) -> Certificate:
    """Write outcomes and their certificate into a folder, and return the certificate.

    Raises DataError if the question does not fit the outcomes, StoreError if the disk refuses.
    """
    certificate = sealed(replace(certify(found, question), inputs=inputs, outcomes=hashes(found)))
    outcomes.write(folder / outcomes.FILE, found)
    save(folder / FILE, certificate)
    return certificate


def hashes(found: Outcomes) -> tuple[CellHash, ...]:
    """Return a hash of the lines of each cell and metric."""
    by_cell: dict[tuple[str, int, int, str | None], list[Any]] = {}
    for line in outcomes.lines(found):
        key = (line["arm"], line["size"], line["seed"], line.get("metric"))
        by_cell.setdefault(key, []).append(line)
    return tuple(CellHash(*key, sha256=store.fingerprint(lines)) for key, lines in by_cell.items())


def certify(found: Outcomes, question: Question) -> Certificate:
    """Answer a question, not yet sealed. Raises DataError if it does not fit the outcomes."""
    _check(found, question)
    answers = tuple(
        _answer(_measure(found, question, metric), question, metric) for metric in question.metrics
    )
    effects = [metric for metric in sorted(found.values) if is_side_effect(metric)]
    return Certificate(
        question,
        _contradiction(answers),
        answers,
        tuple(_side_effect(found, question, metric, answers[0].rows) for metric in effects),
    )


def _check(found: Outcomes, question: Question) -> None:
    if not question.metrics:
        raise DataError("no metric is asked for; name at least one")
    for metric in (*question.metrics, *question.lower_is_better):
        if metric not in found.values:
            raise DataError(
                f"no outcomes of the metric {metric!r}{nearest(metric, list(found.values))}"
            )
    if not question.references:
        raise DataError("no reference is named; name the arms without general data")
    for metric in question.metrics:
        known = sorted({arm for arm, _ in found.points(metric)})
        for arm in (question.arm, *question.references):
            if arm not in known:
                raise DataError(f"no outcomes of the arm {arm!r} by {metric}{nearest(arm, known)}")
    if question.arm in question.references:
        raise DataError(
            f"{question.arm} cannot be its own reference; name the arms without general data as references"
        )


def _sign(question: Question, metric: str) -> int:
    return -1 if metric in question.lower_is_better else 1


def _measure(found: Outcomes, question: Question, metric: str) -> Draws:
    """Draw all points of one metric, higher is better."""
    sign = _sign(question, metric)
    points = found.points(metric)
    seeds = {point: found.seeds(metric, *point) for point in points}
    most = max(seeds.values(), key=len)
    for point, own in seeds.items():
        if own != most and not (point[1] == 0 and len(own) == 1):
            raise DataError(
                f"{point[0]} at {point[1]} rows has the seeds {_listed(own)}, other cells have "
                f"{_listed(most)}; every arm and size needs the same seeds, since a seed is a "
                "whole chain (an untrained arm has size 0 and one seed)"
            )
    cells = {point: [(*point, seed) for seed in own] for point, own in seeds.items()}
    dev = {
        point: [found.dev[cell] for cell in own]
        for point, own in cells.items()
        if _all_in(own, found.dev)
    }
    tokens = {
        point: [found.tokens[cell] for cell in own]
        for point, own in cells.items()
        if _all_in(own, found.tokens)
    }
    missing = [point for point in points if point[0] in question.references and point not in dev]
    measured = row_savings.measure(
        {point: sign * found.matrix(metric, *point) for point in points},
        found.groups[metric],
        denominators=found.weights[metric],
        dev=None if missing else {point: dev.get(point, [0.0]) for point in points},
        tokens={point: float(np.mean(values)) for point, values in tokens.items()},
    )
    return row_savings.draw(measured, draws=question.draws, seed=question.seed)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _all_in(cells: Sequence[Cell], known: Mapping[Cell, float]) -> bool:
    return all(cell in known for cell in cells)


def _answer(draws: Draws, question: Question, metric: str) -> Answer:
    """Say all that one metric says, from draws in which higher is better."""
    sign, measured = _sign(question, metric), draws.measured
    n = _largest(draws, question)
    ref = row_savings.reference(draws, question.references, n)
    whole = row_savings.curve(draws, question.references, n)
    improved = row_savings.contrast((1, draws.of(question.arm, n)), (-1, ref.last))
    improvement = row_savings.interval(improved)
    on_test = measured.dev is measured.by_seed
    is_worse = improvement.high < 0
    if on_test:
        is_worse = row_savings.is_beaten(draws, question.arm, question.references, n)
    in_tokens = _tokens_rise(draws, question)
    sizes = [size for size in measured.sizes([question.arm]) if 0 < size < whole.sizes[-1]]
    return Answer(
        metric=metric,
        lower_is_better=sign < 0,
        rows=n,
        seeds=measured.by_seed.shape[1],
        test_groups=round(measured.groups, 1),
        points=_points(draws, sign, in_tokens=in_tokens),
        references=_selections(ref, whole, n),
        selected_on="test" if on_test else "dev",
        difference=signed(improvement, sign),
        p=None if np.isnan(improvement.low) else row_savings.p_value(improved),
        slope=signed(row_savings.slope(whole), sign),
        slope_towards_rows=signed(row_savings.slope_towards(whole, n), sign),
        saving=_saving(draws, question, ref, whole, n, in_tokens=in_tokens),
        gains=tuple(_gain(draws, question, whole, size, in_tokens=in_tokens) for size in sizes),
        verdict=_verdict(improvement, is_worse),
        more_rows=_more_rows(draws, question, whole, n, improved, sign),
        attribution=_attribution(draws, n, sign),
    )


def _points(draws: Draws, sign: int, *, in_tokens: bool) -> tuple[Point, ...]:
    points = []
    for place, (arm, size) in enumerate(draws.measured.points):
        tokens = float(draws.measured.tokens[place]) if in_tokens else None
        by_seed = tuple(sign * float(score) + 0.0 for score in draws.measured.by_seed[place])
        score = signed(row_savings.interval(draws.score[:, place]), sign)
        points.append(Point(arm, size, tokens, by_seed, score))
    return tuple(points)


def _selections(ref: Reference, whole: Reference, n: int) -> tuple[Selection, ...]:
    """List the reference by size; with all rows (`n`) it is what the arm is compared with."""
    chosen = {**ref.shares, **whole.shares, n: ref.shares[n]}
    picked = {**ref.selected, **whole.selected, n: ref.selected[n]}
    return tuple(Selection(size, picked[size], dict(chosen[size])) for size in sorted(chosen))


def _saving(
    draws: Draws, question: Question, ref: Reference, whole: Reference, n: int, *, in_tokens: bool
) -> Worth:
    rows = row_savings.row_saving(draws, question.arm, ref)
    tokens = row_savings.row_saving(draws, question.arm, ref, tokens=True) if in_tokens else None
    return Worth(n, row_savings.identifiable(whole, n), rows, tokens)


def _gain(
    draws: Draws, question: Question, whole: Reference, size: int, *, in_tokens: bool
) -> Worth:
    rows = row_savings.row_gain(draws, question.arm, size, whole)
    tokens = (
        row_savings.row_gain(draws, question.arm, size, whole, tokens=True) if in_tokens else None
    )
    return Worth(size, row_savings.gain_identifiable(whole, size), rows, tokens)


def _side_effect(found: Outcomes, question: Question, metric: str, n: int) -> SideEffect:
    """Measure a side effect of every arm with `n` rows, or with its most if it lacks this size."""
    points = _points_at(found, metric, n)
    scores = {point: found.matrix(metric, *point) for point in points}
    measured = row_savings.measure(scores, found.groups[metric], denominators=found.weights[metric])
    draws = row_savings.draw(measured, draws=question.draws, seed=question.seed)
    base = next((point for point in points if point[1] == 0), None)
    arms = []
    for point in points:
        score, rise = row_savings.interval(draws.of(*point)), None
        if base is not None and point != base:
            rise = row_savings.interval(
                row_savings.contrast((1, draws.of(*point)), (-1, draws.of(*base)))
            )
        if metric in ("leakage", "drift"):  # a share, and a divergence
            most = 1.0 if metric == "leakage" else np.inf
            score = Interval(*(float(np.clip(end, 0.0, most)) for end in score))
        arms.append(Effect(*point, score, rise))
    return SideEffect(metric, measured.by_seed.shape[1], round(measured.groups, 1), tuple(arms))


def _points_at(found: Outcomes, metric: str, n: int) -> list[tuple[str, int]]:
    """List each arm at `n` rows, else at its largest size; untrained ones first."""
    sizes: dict[str, list[int]] = {}
    for arm, size in found.points(metric):
        sizes.setdefault(arm, []).append(size)
    chosen = [(arm, n if n in own else max(own)) for arm, own in sizes.items()]
    return sorted(chosen, key=lambda point: (point[1] > 0, point))


def _largest(draws: Draws, question: Question) -> int:
    """Return the most rows at which the arm and some reference were measured."""
    own = set(draws.measured.sizes([question.arm])) - {0}
    others = set(draws.measured.sizes(question.references)) - {0}
    if not own:
        raise DataError(
            f"{question.arm} was measured at no size above 0; a size is a number of task rows"
        )
    both = own & others if others else own
    if not both:
        raise DataError(
            f"{question.arm} was measured at {_listed(sorted(own))} rows, the references at "
            f"{_listed(sorted(others))}; a difference needs a size that is in both"
        )
    return max(both)


def _attribution(draws: Draws, n: int, sign: int) -> tuple[Part, ...]:
    parts = []
    for code, arms in ATTRIBUTION.items():
        if all((arm, n) in draws.measured.points for arm, _ in arms):
            total = row_savings.contrast(*((part, draws.of(arm, n)) for arm, part in arms))
            parts.append(Part(code, signed(row_savings.interval(total), sign)))
    return tuple(parts)


def _tokens_rise(draws: Draws, question: Question) -> bool:
    """Return whether tokens are known and rise with the rows; else no factor is in tokens."""
    measured = draws.measured
    for arms in ([question.arm], question.references):
        points = [
            (size, measured.tokens[place])
            for place, (arm, size) in enumerate(measured.points)
            if arm in arms
        ]
        trained = [(size, tokens) for size, tokens in points if size]
        if any(tokens == size for size, tokens in trained):
            return False
        if any(a[0] < b[0] and a[1] >= b[1] for a in trained for b in trained):
            return False
    return True


def _more_rows(
    draws: Draws, question: Question, ref: Reference, n: int, improved: FloatArray, sign: int
) -> MoreRows:
    """Ask whether more labelled rows would have bought more than the arm's general data.

    The reference's curve says what they would bring; if it does not go so far, that of the
    references which were measured with so many rows. These may not be the best there is, so that
    labelling is worth at least as much.
    """
    far = [
        arm
        for arm in question.references
        if max(draws.measured.sizes([arm]), default=0) >= n + MORE
    ]
    if ref.sizes[-1] < n + MORE and far:
        ref = row_savings.curve(draws, far, max(draws.measured.sizes(far)))
    reached = row_savings.score_at(ref, n + MORE)
    if reached is None:
        nothing = Interval(math.nan, math.nan, math.nan)
        return MoreRows(MORE, "unmeasured", (), nothing, nothing)
    over_labelling = row_savings.contrast((1, draws.of(question.arm, n)), (-1, reached))
    advantage = row_savings.interval(over_labelling)
    labelling = row_savings.interval(row_savings.contrast((1, improved), (-1, over_labelling)))
    choice: Choice = "undecided"
    if advantage.low > 0:
        choice = "general_data"
    elif advantage.high < 0:
        choice = "labelling"
    arms = tuple(sorted(set(ref.selected.values())))
    return MoreRows(MORE, choice, arms, signed(labelling, sign), signed(advantage, sign))


def _verdict(improvement: Interval, is_worse: bool) -> Verdict:
    """Say what the improvement says.

    A reference that was selected by the scores it is judged by is flattered, which makes gains
    harder to show; whether the arm `is_worse` is then asked of each reference by itself.
    """
    if np.isnan(improvement.low) and improvement.estimate != 0:
        return "unknown"  # nothing varied, or nothing is known of other seeds and groups
    if improvement.low > 0:
        return "gain"
    return "loss" if is_worse else "no_gain"


def _contradiction(answers: Sequence[Answer]) -> Contradiction | None:
    """Find two metrics that say the opposite, or whose factors lie apart."""
    by_verdict = {answer.verdict: answer.metric for answer in answers}
    if "gain" in by_verdict and "loss" in by_verdict:
        return Contradiction("verdicts", (by_verdict["gain"], by_verdict["loss"]))
    for a, b in combinations(answers, 2):
        both = (a.metric, b.metric)
        if (
            a.saving.identifiable
            and b.saving.identifiable
            and row_savings.contradict(a.saving.rows, b.saving.rows)
        ):
            return Contradiction("savings", both)
        if (
            a.gain is not None
            and b.gain is not None
            and row_savings.contradict(a.gain.rows, b.gain.rows)
        ):
            return Contradiction("gains", both)
    return None
