"""Make a certificate from outcomes: answer the question metric by metric, then seal it.

Everything is computed from draws in which higher is better (`row_savings`), and turned back into
the metric's own sign at the end.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    with_sign,
)
from fulcrum.stats.intervals import Interval
from fulcrum.stats.outcomes import Outcomes
from fulcrum.stats.row_savings import Draws, Reference

MORE = 50  # rows that the user could label instead

# What a difference between arms with all rows says, by code; each is a sum of scores, + or -.
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
    answers = []
    for metric in question.metrics:
        draws = _draw(found, question, metric)
        answers.append(_answer(_Comparison.of(draws, question, metric), metric))
    side_effects = []
    for metric in sorted(found.values):
        if is_side_effect(metric):
            side_effects.append(_side_effect(found, question, metric, answers[0].rows))
    return Certificate(question, _contradiction(answers), tuple(answers), tuple(side_effects))


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
            f"{question.arm} cannot be its own reference; name the arms without general data as "
            "references"
        )


def _draw(found: Outcomes, question: Question, metric: str) -> Draws:
    """Draw all points of one metric, higher is better."""
    sign = _sign(question, metric)
    seeds = {point: found.seeds(metric, *point) for point in found.points(metric)}
    _check_seeds(seeds)
    scores = {}
    dev: dict[tuple[str, int], list[float]] = {}
    tokens = {}
    is_dev_known = True
    for point, own_seeds in seeds.items():
        scores[point] = sign * found.matrix(metric, *point)
        cells = [(*point, seed) for seed in own_seeds]
        dev[point] = [0.0]  # an arm that is no reference is not selected
        if found.dev.keys() >= set(cells):
            dev[point] = [found.dev[cell] for cell in cells]
        elif point[0] in question.references:
            is_dev_known = False
        if found.tokens.keys() >= set(cells):
            tokens[point] = float(np.mean([found.tokens[cell] for cell in cells]))
    measured = row_savings.measure(
        scores,
        found.groups[metric],
        denominators=found.weights[metric],
        dev=dev if is_dev_known else None,
        tokens=tokens,
    )
    return row_savings.draw(measured, draws=question.draws, seed=question.seed)


def _sign(question: Question, metric: str) -> int:
    return -1 if metric in question.lower_is_better else 1


def _check_seeds(seeds: Mapping[tuple[str, int], list[int]]) -> None:
    """Raise DataError if a point lacks seeds, but for untrained arms with one."""
    all_seeds = max(seeds.values(), key=len)
    for (arm, size), own in seeds.items():
        if own != all_seeds and not (size == 0 and len(own) == 1):
            raise DataError(
                f"{arm} at {size} rows has the seeds {_listed(own)}, other cells have "
                f"{_listed(all_seeds)}; every arm and size needs the same seeds, since a seed is a "
                "whole chain (an untrained arm has size 0 and one seed)"
            )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """What all parts of an answer are computed from; higher is better in draws.

    n: the task rows at which arms are compared
    best: the reference with up to `n` rows
    curve: the reference's learning curve, also beyond `n`
    improvement: draws of the arm minus the reference, both with `n` rows
    in_tokens: whether factors are stated in tokens too
    sign: -1 if lower is better by the metric, else 1
    """

    draws: Draws
    question: Question
    n: int
    best: Reference
    curve: Reference
    improvement: FloatArray
    in_tokens: bool
    sign: int

    @classmethod
    def of(cls, draws: Draws, question: Question, metric: str) -> "_Comparison":
        n = _largest(draws, question)
        best = row_savings.reference(draws, question.references, n)
        return cls(
            draws,
            question,
            n,
            best,
            curve=row_savings.curve(draws, question.references, n),
            improvement=row_savings.contrast((1, draws.of(question.arm, n)), (-1, best.last)),
            in_tokens=_tokens_rise(draws, question),
            sign=_sign(question, metric),
        )


def _answer(comparison: _Comparison, metric: str) -> Answer:
    """Say all that one metric says."""
    draws, question = comparison.draws, comparison.question
    n, curve, sign = comparison.n, comparison.curve, comparison.sign
    measured = draws.measured
    improvement = row_savings.interval(comparison.improvement)
    on_test = measured.dev is measured.by_seed
    is_worse = improvement.high < 0
    if on_test:
        is_worse = row_savings.is_beaten(draws, question.arm, question.references, n)
    gains = []
    for size in measured.sizes([question.arm]):
        if 0 < size < curve.sizes[-1]:
            gains.append(_gain(comparison, size))
    return Answer(
        metric=metric,
        lower_is_better=sign < 0,
        rows=n,
        seeds=measured.by_seed.shape[1],
        test_groups=round(measured.groups, 1),
        points=_points(comparison),
        references=_selections(comparison),
        selected_on="test" if on_test else "dev",
        difference=with_sign(improvement, sign),
        p=None if np.isnan(improvement.low) else row_savings.p_value(comparison.improvement),
        slope=with_sign(row_savings.slope(curve), sign),
        slope_towards_rows=with_sign(row_savings.slope_towards(curve, n), sign),
        saving=_saving(comparison),
        gains=tuple(gains),
        verdict=_verdict(improvement, is_worse),
        more_rows=_more_rows(comparison),
        attribution=_attribution(draws, n, sign),
    )


def _points(comparison: _Comparison) -> tuple[Point, ...]:
    sign, measured = comparison.sign, comparison.draws.measured
    points = []
    for place, (arm, size) in enumerate(measured.points):
        tokens = float(measured.tokens[place]) if comparison.in_tokens else None
        by_seed = tuple(sign * float(score) + 0.0 for score in measured.by_seed[place])
        score = with_sign(row_savings.interval(comparison.draws.score[:, place]), sign)
        points.append(Point(arm, size, tokens, by_seed, score))
    return tuple(points)


def _selections(comparison: _Comparison) -> tuple[Selection, ...]:
    """List the reference by size; with all rows it is what the arm is compared with."""
    n, best, curve = comparison.n, comparison.best, comparison.curve
    shares = {**best.shares, **curve.shares, n: best.shares[n]}
    arms = {**best.selected, **curve.selected, n: best.selected[n]}
    return tuple(Selection(size, arms[size], dict(shares[size])) for size in sorted(shares))


def _saving(comparison: _Comparison) -> Worth:
    draws, arm, best = comparison.draws, comparison.question.arm, comparison.best
    rows = row_savings.row_saving(draws, arm, best)
    tokens = None
    if comparison.in_tokens:
        tokens = row_savings.row_saving(draws, arm, best, tokens=True)
    identifiable = row_savings.identifiable(comparison.curve, comparison.n)
    return Worth(comparison.n, identifiable, rows, tokens)


def _gain(comparison: _Comparison, size: int) -> Worth:
    draws, arm, curve = comparison.draws, comparison.question.arm, comparison.curve
    rows = row_savings.row_gain(draws, arm, size, curve)
    tokens = None
    if comparison.in_tokens:
        tokens = row_savings.row_gain(draws, arm, size, curve, tokens=True)
    return Worth(size, row_savings.gain_identifiable(curve, size), rows, tokens)


def _side_effect(found: Outcomes, question: Question, metric: str, n: int) -> SideEffect:
    """Measure a side effect of every arm with `n` rows, or with its most if it lacks this size."""
    points = _points_at(found, metric, n)
    scores = {point: found.matrix(metric, *point) for point in points}
    measured = row_savings.measure(scores, found.groups[metric], denominators=found.weights[metric])
    draws = row_savings.draw(measured, draws=question.draws, seed=question.seed)
    base = points[0] if points[0][1] == 0 else None  # untrained ones come first
    effects = []
    for point in points:
        own = draws.of(*point)
        score = row_savings.interval(own)
        rise = None
        if base is not None and point != base:
            rise = row_savings.interval(row_savings.contrast((1, own), (-1, draws.of(*base))))
        if metric == "leakage":  # a share
            score = _clip(score, 1.0)
        elif metric == "drift":  # a divergence
            score = _clip(score, np.inf)
        effects.append(Effect(*point, score, rise))
    return SideEffect(metric, measured.by_seed.shape[1], round(measured.groups, 1), tuple(effects))


def _clip(score: Interval, most: float) -> Interval:
    return Interval(*np.clip(score, 0.0, most).tolist())


def _points_at(found: Outcomes, metric: str, n: int) -> list[tuple[str, int]]:
    """List each arm at `n` rows, else at its largest size; untrained ones first."""
    sizes: dict[str, list[int]] = {}
    for arm, size in found.points(metric):
        sizes.setdefault(arm, []).append(size)
    points = []
    for arm, own in sizes.items():
        points.append((arm, n if n in own else max(own)))
    return sorted(points, key=lambda point: (point[1] > 0, point))


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
            total = row_savings.contrast(*[(factor, draws.of(arm, n)) for arm, factor in arms])
            parts.append(Part(code, with_sign(row_savings.interval(total), sign)))
    return tuple(parts)


def _tokens_rise(draws: Draws, question: Question) -> bool:
    """Return whether tokens are known and rise with the rows; else no factor is in tokens."""
    measured = draws.measured
    for arms in ([question.arm], question.references):
        trained = []
        for (arm, size), tokens in zip(measured.points, measured.tokens, strict=True):
            if arm in arms and size > 0:
                trained.append((size, tokens))
        for size, tokens in trained:
            if tokens == size:  # they are not known
                return False
            if any(size < other and tokens >= more for other, more in trained):
                return False
    return True


def _more_rows(comparison: _Comparison) -> MoreRows:
    """Ask whether more labelled rows would have bought more than the arm's general data.

    The reference's curve says what they would bring; if it does not go so far, that of the
    references which were measured with so many rows. These may not be the best there is, so that
    labelling is worth at least as much.
    """
    draws, question, sign = comparison.draws, comparison.question, comparison.sign
    curve = comparison.curve
    wanted = comparison.n + MORE
    if curve.sizes[-1] < wanted:
        far = []
        for arm in question.references:
            if max(draws.measured.sizes([arm]), default=0) >= wanted:
                far.append(arm)
        if far:
            curve = row_savings.curve(draws, far, max(draws.measured.sizes(far)))
    with_more = row_savings.score_at(curve, wanted)
    if with_more is None:
        nothing = Interval(math.nan, math.nan, math.nan)
        return MoreRows(MORE, "unmeasured", (), nothing, nothing)
    over_labelling = row_savings.contrast(
        (1, draws.of(question.arm, comparison.n)), (-1, with_more)
    )
    by_labelling = row_savings.contrast((1, comparison.improvement), (-1, over_labelling))
    advantage = row_savings.interval(over_labelling)
    labelling = row_savings.interval(by_labelling)
    choice: Choice = "undecided"
    if advantage.low > 0:
        choice = "general_data"
    elif advantage.high < 0:
        choice = "labelling"
    arms = tuple(sorted(set(curve.selected.values())))
    return MoreRows(MORE, choice, arms, with_sign(labelling, sign), with_sign(advantage, sign))


def _verdict(improvement: Interval, is_worse: bool) -> Verdict:
    """Say what the improvement means.

    A reference that was selected by the scores it is judged by is flattered, which makes gains
    harder to show; `is_worse` then comes from comparing the arm with each reference by itself.
    """
    if np.isnan(improvement.low) and improvement.estimate != 0:
        return "unknown"  # nothing varied, or nothing is known of other seeds and groups
    if improvement.low > 0:
        return "gain"
    return "loss" if is_worse else "no_gain"


def _contradiction(answers: Sequence[Answer]) -> Contradiction | None:
    """Find two metrics that say the opposite, or whose factors contradict each other."""
    by_verdict = {answer.verdict: answer.metric for answer in answers}
    if "gain" in by_verdict and "loss" in by_verdict:
        return Contradiction("verdicts", (by_verdict["gain"], by_verdict["loss"]))
    for a, b in combinations(answers, 2):
        both = (a.metric, b.metric)
        if _contradict(a.saving, b.saving):
            return Contradiction("savings", both)
        if _contradict(a.gain, b.gain):
            return Contradiction("gains", both)
    return None


def _contradict(a: Worth | None, b: Worth | None) -> bool:
    if a is None or b is None or not (a.identifiable and b.identifiable):
        return False
    return row_savings.contradict(a.rows, b.rows)
