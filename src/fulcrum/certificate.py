"""Outcomes -> certificate: what the general data bought, in rows and in score, with intervals; sealed.

A certificate folder holds `outcomes.jsonl` (every outcome of every test row) and `certificate.json`, whose numbers are all
computed from these outcomes and from the question asked; `verification` computes them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fulcrum import outcomes, row_savings, store
from fulcrum.errors import DataError, StoreError, nearest
from fulcrum.intervals import Interval
from fulcrum.outcomes import Cell, Outcomes
from fulcrum.records import FloatArray
from fulcrum.row_savings import Draws, Factor, Reference

FILE, OUTCOMES = "certificate.json", "outcomes.jsonl"
FORMAT = 2  # 1 knew no `identifiable` of each row gain
_KEYS = {"format", "question", "headline", "contradiction", "answers", "side_effects", "inputs", "outcomes", "sha256"}
MORE = 50  # rows that the user could label instead

# What a difference between arms at all rows says; each is a sum of scores, + or -.
ATTRIBUTION: Mapping[str, tuple[tuple[str, int], ...]] = {
    "mixing (mix - sft)": (("mix", 1), ("sft", -1)),
    "anchor within the mix (tell - mix)": (("tell", 1), ("mix", -1)),
    "interaction of anchor and mix": (("tell", 1), ("mix", -1), ("sft_anchor", -1), ("sft", 1)),
    "shuffle (tell - general_then_task)": (("tell", 1), ("general_then_task", -1)),
    "equal exposures (tell - sft_matched)": (("tell", 1), ("sft_matched", -1)),
    "transfer (tell - placebo_permuted)": (("tell", 1), ("placebo_permuted", -1)),
    "transfer (tell - placebo_own_answers)": (("tell", 1), ("placebo_own_answers", -1)),
}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the outcomes: what `arm` brought over the best of `references`, which use no general data.

    The first of `metrics` is the one that decides; those in `lower_is_better` are turned round before anything else.
    `notes` say what a reader has to know of how the outcomes were made.
    """

    arm: str
    references: tuple[str, ...]
    metrics: tuple[str, ...]
    lower_is_better: tuple[str, ...] = ()
    task: str = "task"
    draws: Annotated[int, Field(ge=200, le=100_000)] = 2000
    seed: Annotated[int, Field(ge=0)] = 0
    notes: tuple[str, ...] = ()


def certify(found: Outcomes, question: Question) -> dict[str, Any]:
    """The certificate's content: plain values, without its seal. Raises DataError where the question fits the outcomes not."""
    _check(found, question)
    measured = [_measure(found, question, metric) for metric in question.metrics]
    answers = [_answer(draws, question, metric) for draws, metric in zip(measured, question.metrics, strict=True)]
    contradiction = _contradiction(answers)
    return {
        "format": FORMAT,
        "question": asdict(question),
        "headline": _headline(answers[0], question, contradiction),
        "contradiction": contradiction,
        "answers": [_without_draws(answer) for answer in answers],
        "side_effects": [
            _side_effect(found, question, metric, answers[0]["rows"])
            for metric in sorted(found.values)
            if is_side_effect(metric)
        ],
    }


def _check(found: Outcomes, question: Question) -> None:
    if not question.metrics:
        raise DataError("no metric is asked for; name at least one")
    for metric in (*question.metrics, *question.lower_is_better):
        if metric not in found.values:
            raise DataError(f"no outcomes of the metric {metric!r}{nearest(metric, list(found.values))}")
    if not question.references:
        raise DataError("no reference is named; name the arms without general data")
    for metric in question.metrics:
        known = sorted({arm for arm, _ in found.points(metric)})
        for arm in (question.arm, *question.references):
            if arm not in known:
                raise DataError(f"no outcomes of the arm {arm!r} by {metric}{nearest(arm, known)}")
    if question.arm in question.references:
        raise DataError(f"{question.arm} cannot be its own reference; name the arms without general data as references")


def _measure(found: Outcomes, question: Question, metric: str) -> Draws:
    """Draws of all points of one metric, higher is better."""
    sign = -1.0 if metric in question.lower_is_better else 1.0
    points = found.points(metric)
    seeds = {point: found.seeds(metric, *point) for point in points}
    most = max(seeds.values(), key=len)
    for point, own in seeds.items():
        if own != most and not (point[1] == 0 and len(own) == 1):
            raise DataError(
                f"{point[0]} at {point[1]} rows has the seeds {_named(own)}, other cells have {_named(most)}; every arm and "
                "size needs the same seeds, since a seed is a whole chain (an untrained arm has size 0 and one seed)"
            )
    cells = {point: [(*point, seed) for seed in own] for point, own in seeds.items()}
    dev = {point: [found.dev[cell] for cell in own] for point, own in cells.items() if all(cell in found.dev for cell in own)}
    known = {point: [found.tokens[cell] for cell in own] for point, own in cells.items() if _all_in(own, found.tokens)}
    missing = [point for point in points if point[0] in question.references and point not in dev]
    scores = {point: sign * found.matrix(metric, *point) for point in points}
    measured = row_savings.measure(
        scores, found.groups[metric], denominators=found.weights[metric],
        dev=None if missing else {point: dev.get(point, [0.0]) for point in points},
        tokens={point: float(np.mean(values)) for point, values in known.items()},
    )  # fmt: skip
    return row_savings.draw(measured, draws=question.draws, seed=question.seed)


def _named(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _all_in(cells: Sequence[Cell], known: Mapping[Cell, float]) -> bool:
    return all(cell in known for cell in cells)


def _answer(draws: Draws, question: Question, metric: str) -> dict[str, Any]:
    """All that one metric says."""
    measured = draws.measured
    n = _largest(draws, question)
    ref = row_savings.reference(draws, question.references, n)
    whole = row_savings.curve(draws, question.references, n)
    gained = row_savings.contrast((1, draws.of(question.arm, n)), (-1, ref.last))
    slope, on_test = row_savings.slope(whole), measured.dev is measured.by_seed
    difference = row_savings.interval(gained)
    in_tokens = _tokens_rise(draws, question)
    units = {"rows": False, "tokens": True} if in_tokens else {"rows": False}

    def worth(size: int) -> dict[str, Any]:
        gains = {unit: row_savings.row_gain(draws, question.arm, size, whole, tokens=tokens) for unit, tokens in units.items()}
        known = row_savings.gain_identifiable(whole, size)
        return {"size": size, "identifiable": known, **{unit: _factor(gain) for unit, gain in gains.items()}}

    savings = {unit: row_savings.row_saving(draws, question.arm, ref, tokens=tokens) for unit, tokens in units.items()}
    sizes = [size for size in measured.sizes([question.arm]) if 0 < size < whole.sizes[-1]]
    return {
        "metric": metric, "lower_is_better": metric in question.lower_is_better, "rows": n,
        "seeds": measured.by_seed.shape[1], "test_groups": round(measured.groups, 1),
        "points": [
            {"arm": arm, "size": size, "tokens": float(measured.tokens[k]) if in_tokens else None,
             "by_seed": measured.by_seed[k].tolist(), "score": _ends(row_savings.interval(draws.score[:, k]))}
            for k, (arm, size) in enumerate(measured.points)
        ],
        "reference": {str(size): dict(chosen) for size, chosen in {**ref.chosen, **whole.chosen, n: ref.chosen[n]}.items()},
        "reference_chosen": {str(size): arm for size, arm in {**ref.picked, **whole.picked, n: ref.picked[n]}.items()},
        "selected_on": "test, which favours the reference" if on_test else "dev",
        "difference": {**_ends(difference), "p": _p(difference, gained)},
        "slope": _ends(slope), "slope_towards_rows": _ends(row_savings.slope_towards(whole, n)),
        "identifiable": row_savings.identifiable(whole, n),
        "saving": {unit: _factor(factor) for unit, factor in savings.items()},
        "gain": [worth(size) for size in sizes],
        "verdict": _verdict(
            difference, row_savings.beaten(draws, question.arm, question.references, n) if on_test else difference.high < 0
        ),
        "more_rows": _more_rows(draws, question, whole, n, gained),
        "attribution": _attribution(draws, n),
        "_saving": savings["rows"],
        "_gain": row_savings.row_gain(draws, question.arm, n, whole) if row_savings.gain_identifiable(whole, n) else None,
    }  # fmt: skip


def is_side_effect(metric: str) -> bool:
    """Whether a metric is of what happened beside the task: "leakage", "forgetting: pool", "dependency: wrong anchor"."""
    return metric.partition(":")[0] in ("forgetting", "drift", "dependency", "leakage")


def _side_effect(found: Outcomes, question: Question, metric: str, n: int) -> dict[str, Any]:
    """What arms did beside the task, at `n` rows (an arm that was not measured there: at its most): forgetting, drift, leakage.

    Lower is better. `rise` is the difference to the first untrained arm (size 0), on the same rows.
    """
    points = _points_at(found, metric, n)
    scores = {point: found.matrix(metric, *point) for point in points}
    measured = row_savings.measure(scores, found.groups[metric], denominators=found.weights[metric])
    draws = row_savings.draw(measured, draws=question.draws, seed=question.seed)
    base = next((point for point in points if point[1] == 0), None)
    arms = []
    for point in points:
        rise = None
        if base is not None and point != base:
            rise = _ends(row_savings.interval(row_savings.contrast((1, draws.of(*point)), (-1, draws.of(*base)))))
        score = _ends(row_savings.interval(draws.of(*point)))
        if metric in ("leakage", "drift"):  # a share, and a divergence
            most = 1.0 if metric == "leakage" else np.inf
            score = {end: None if value is None else min(most, max(0.0, value)) for end, value in score.items()}
        arms.append({"arm": point[0], "size": point[1], "score": score, "rise": rise})
    return {"metric": metric, "seeds": measured.by_seed.shape[1], "groups": round(measured.groups, 1), "arms": arms}


def _points_at(found: Outcomes, metric: str, n: int) -> list[tuple[str, int]]:
    """Each arm at `n` rows, else at its largest size; untrained ones first."""
    sizes: dict[str, list[int]] = {}
    for arm, size in found.points(metric):
        sizes.setdefault(arm, []).append(size)
    chosen = [(arm, n if n in own else max(own)) for arm, own in sizes.items()]
    return sorted(chosen, key=lambda point: (point[1] > 0, point))


def _largest(draws: Draws, question: Question) -> int:
    """The most rows at which the arm and some reference were measured."""
    own, others = (set(draws.measured.sizes(arms)) - {0} for arms in ([question.arm], question.references))
    if not own:
        raise DataError(f"{question.arm} was measured at no size above 0; a size is a number of task rows")
    if not (both := own & others if others else own):
        raise DataError(
            f"{question.arm} was measured at {_named(sorted(own))} rows, the references at {_named(sorted(others))}; a "
            "difference needs a size that is in both"
        )
    return max(both)


def _attribution(draws: Draws, n: int) -> list[dict[str, Any]]:
    found = []
    for name, parts in ATTRIBUTION.items():
        if all((arm, n) in draws.measured.points for arm, _ in parts):
            total = row_savings.contrast(*((sign, draws.of(arm, n)) for arm, sign in parts))
            found.append({"name": name, **_ends(row_savings.interval(total))})
    return found


def _tokens_rise(draws: Draws, question: Question) -> bool:
    """Whether tokens are known and rise with the rows, in the arm and in the references: else no factor is in tokens."""
    for arms in ([question.arm], question.references):
        points = sorted((size, draws.measured.tokens[draws.measured.place((arm, size))], arm)
                        for arm, size in draws.measured.points if arm in arms and size)  # fmt: skip
        if any(tokens == size for size, tokens, _ in points):
            return False
        if any(a[0] < b[0] and a[1] >= b[1] for a in points for b in points):
            return False
    return True


def _more_rows(draws: Draws, question: Question, ref: Reference, n: int, gained: FloatArray) -> dict[str, Any]:
    """Would more labelled rows have bought more than the arm's general data?

    The reference's curve says what they would bring; where it does not go so far, that of the references which were measured
    with so many rows (`by`). These may not be the best there is, so that labelling is worth at least as much.
    """
    far = [arm for arm in question.references if max(draws.measured.sizes([arm]), default=0) >= n + MORE]
    known = ref if ref.sizes[-1] >= n + MORE or not far else row_savings.curve(draws, far, max(draws.measured.sizes(far)))
    reached = row_savings.at(known, n + MORE)
    if reached is None:
        return {"rows": MORE, "answer": "cannot be said: the reference was not measured with so many"}
    advantage_draws = row_savings.contrast((1, draws.of(question.arm, n)), (-1, reached))
    advantage = row_savings.interval(advantage_draws)
    labelling = row_savings.interval(row_savings.contrast((1, gained), (-1, advantage_draws)))
    return {
        "rows": MORE, "by": sorted(set(known.picked.values())), "labelling": _ends(labelling), "advantage": _ends(advantage),
        "answer": "general data" if advantage.low > 0 else "labelling" if advantage.high < 0 else "cannot be told apart",
    }  # fmt: skip


def _p(difference: Interval, gained: FloatArray) -> float | None:
    return None if np.isnan(difference.low) else row_savings.p_value(gained)


def _verdict(difference: Interval, is_worse: bool) -> str:
    """What the difference says. The best of several references by the scores it is judged by is flattered, which makes gains
    harder to show; whether the arm `is_worse` is asked of each reference by itself then.
    """
    if np.isnan(difference.low) and difference.estimate != 0:
        return "cannot be said"  # nothing varied, or nothing is known of other seeds and groups
    return "gain" if difference.low > 0 else "loss" if is_worse else "no gain shown"


def _contradiction(answers: Sequence[Mapping[str, Any]]) -> str | None:
    """Two metrics that say the opposite, or whose factors lie apart: then neither is a headline."""
    verdicts = {answer["verdict"]: answer["metric"] for answer in answers}
    if {"gain", "loss"} <= verdicts.keys():
        return f"{verdicts['gain']} is better, and {verdicts['loss']} is worse"
    for a, b in combinations(answers, 2):
        if a["identifiable"] and b["identifiable"] and row_savings.apart(a["_saving"], b["_saving"]):
            return f"the row savings by {a['metric']} and by {b['metric']} contradict each other"
        if a["_gain"] is not None and b["_gain"] is not None and row_savings.apart(a["_gain"], b["_gain"]):
            return f"the row gains by {a['metric']} and by {b['metric']} contradict each other"
    return None


def _without_draws(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if not key.startswith("_")}


def _ends(interval: Interval) -> dict[str, float | None]:
    """An interval as plain values; None where an end is unknown."""
    return {key: float(value) if np.isfinite(value) else None for key, value in interval._asdict().items()}


def _factor(factor: Factor) -> dict[str, Any]:
    """A factor as plain values; "under" and "over" stand for what lies beyond `least` and `most`, None for an unknown end."""

    def end(value: float) -> float | str | None:
        return None if np.isnan(value) else "over" if value == np.inf else "under" if value == 0 else float(value)

    return {key: end(value) for key, value in factor._asdict().items()}


def _headline(answer: Mapping[str, Any], question: Question, contradiction: str | None) -> str:
    """The sentence that a user wants."""
    n, difference = answer["rows"], answer["difference"]
    best = answer["reference_chosen"][str(n)]
    moved = f"{answer['metric']} {_signed(difference, answer['lower_is_better'])} at {n} rows against {best}"
    seeds = "" if answer["seeds"] > 1 else "; intervals are given this one seed and say nothing of another training run"
    if answer["verdict"] == "cannot be said":
        return f"Cannot be said, since nothing varied between seeds and test groups. {question.arm}: {moved}{seeds}."
    if answer["verdict"] != "gain":
        lead = "No gain shown" if answer["verdict"] == "no gain shown" else "Worse"
        other = f", although {contradiction}" if contradiction else ""
        return f"{lead}: use {best}{other}. {question.arm}: {moved}{seeds}."
    if contradiction is not None:
        return f"A gain, of which no factor can be stated: {contradiction}. {question.arm}: {moved}{seeds}."
    if answer["identifiable"] and answer["_saving"].most > 1:
        return f"{saved(answer['_saving'], n)}; {moved}{seeds}."
    if answer["_gain"] is not None:
        return f"{gained(answer['_gain'], n)}; {moved}{seeds}."
    if not answer["identifiable"]:
        return (
            "A gain whose worth in rows is not identifiable: the reference does not clearly rise with its rows, as a whole and "
            f"towards {n} rows, so that a small difference would be worth any number of them. {question.arm}: {moved}{seeds}."
        )
    return f"A gain whose worth in rows was not measured: {question.arm} has no smaller size. {question.arm}: {moved}{seeds}."


def saved(saving: Factor, n: int) -> str:
    """ "40 of your 64 rows would have sufficed: row saving 1.6x (95% interval 1.2 to 2.3)", censored where it is."""
    ends = [_times(value, saving) for value in (saving.low, saving.high)]
    span = "" if np.isnan(saving.low) or saving.low == np.inf else f" (95% interval {ends[0]} to {ends[1]})"
    if saving.estimate == np.inf:
        return (
            f"{n / saving.most:.0f} of your {n} rows or fewer would have sufficed: row saving at least {saving.most:.1f}x{span}"
        )
    return f"{n / saving.estimate:.0f} of your {n} rows would have sufficed: row saving {saving.estimate:.1f}x{span}"


def gained(gain: Factor, n: int) -> str:
    """ "Your 32 rows were worth 94 without general data: row gain 2.9x (95% interval 2.1 to at least 4.0)"."""
    ends = [_times(value, gain) for value in (gain.low, gain.high)]
    span = "" if np.isnan(gain.low) or gain.low == np.inf else f" (95% interval {ends[0]} to {ends[1]})"
    if gain.estimate == np.inf:
        worth = f"{n * gain.most:.0f} or more"
    else:
        worth = f"{n * gain.estimate:.0f}" if gain.estimate else f"fewer than {n * gain.least:.0f}"
    return f"Your {n} rows were worth {worth} without general data: row gain {_times(gain.estimate, gain)}x{span}"


def _times(value: float, factor: Factor) -> str:
    return f"below {factor.least:.1f}" if value == 0 else f"at least {factor.most:.1f}" if value == np.inf else f"{value:.1f}"


def _signed(interval: Mapping[str, float | None], lower_is_better: bool) -> str:
    """A difference in the metric's own direction, with its interval."""
    known = [interval[key] for key in ("estimate", "low", "high")]
    values = [-value if lower_is_better else value for value in known if value is not None]
    if len(values) < 3:
        return f"{values[0]:+.3f} (no interval)" if values else "by nothing known"
    return f"{values[0]:+.3f} (95% interval {min(values[1:]):+.3f} to {max(values[1:]):+.3f})"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a SHA-256 over its canonical JSON."""
    return {**content, "sha256": store.fingerprint(content)}


def write(folder: Path, found: Outcomes, question: Question, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write outcomes and certificate; returns the certificate. `about` says what the outcomes came from: hashes, settings.

    Raises DataError where the question does not fit the outcomes, StoreError where the disk refuses.
    """
    content = certify(found, question)
    outcomes.write(folder / OUTCOMES, found)
    sealed = seal({**content, "inputs": dict(about), "outcomes": hashes(found)})
    store.write_bytes(folder / FILE, (json.dumps(sealed, indent=1, ensure_ascii=False) + "\n").encode())
    return sealed


def hashes(found: Outcomes) -> dict[str, str]:
    """A hash of each cell's lines, so that a changed outcome can be named."""
    by_cell: dict[str, list[Any]] = {}
    for line in outcomes.lines(found):
        cell = f"{line['arm']} at {line['size']} rows, seed {line['seed']}"
        by_cell.setdefault(f"{cell}, {line['metric']}" if "metric" in line else cell, []).append(line)
    return {cell: store.fingerprint(lines) for cell, lines in by_cell.items()}


def read(file: Path) -> dict[str, Any]:
    """A certificate with just its keys. Raises StoreError for anything else."""
    try:
        known = store.strict_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: cannot be read as a certificate: {error}") from None
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise StoreError(f"{file}: not a certificate of a format that this version knows")
    if set(known) != _KEYS or not isinstance(known["outcomes"], dict) or not isinstance(known["question"], dict):
        odd = sorted(set(known) ^ _KEYS)
        raise StoreError(
            f"{file}: not a certificate as it is written: {', '.join(odd) or 'outcomes or question'} missing or odd"
        )
    return known
