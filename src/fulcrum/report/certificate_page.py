"""Lay out a certificate as sections of a page, and write the page.

The sections are: the result, learning curves, row saving, attribution, side effects, method. They
are made from the certificate alone, so that an old one can be shown again and no model is needed.

Invariants: every number has its interval, or says that it has none; what is censored or not
identifiable is said in words; the page runs no script and asks no network; the user's text is
inert; equal certificates give equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.report import plots, summary, wording
from fulcrum.report.learning_plots import Line, Mark, Reading, learning_curves
from fulcrum.stats import certificate
from fulcrum.stats.certificate import (
    Answer,
    Certificate,
    Chosen,
    Inputs,
    Point,
    Question,
    SideEffect,
    Worth,
)
from fulcrum.stats.intervals import Interval

REPORT = "report.html"
# Dependency on the anchor: how the test rows were asked whose loss rises.
ASKED = {
    "without anchor": "without the anchor",
    "with anchor": "with the anchor, by an arm that is asked without it",
    "wrong anchor": "with another anchor",
    "reworded anchor": "with the anchor in other words",
}
_SELECTED = 0.05  # of the draws: an arm selected as often as that counts as a reference
_UNITS = ("rows", "tokens")


@dataclass(frozen=True)
class _Axis:
    """The axis of a side effect, with the limits that no score can pass."""

    label: str = "worse →"
    low: float = -math.inf
    high: float = math.inf
    percents: bool = False


_EFFECTS = {  # in the order of the page
    "forgetting": _Axis(),
    "drift": _Axis("further →", low=0.0),
    "leakage": _Axis(low=0.0, high=1.0, percents=True),
    "dependency": _Axis("rise"),
}


def find(folder: Path) -> dict[str, Certificate]:
    """Return the certificates of a folder, sorted by their path in it.

    The folder belongs to a run or was written by `fulcrum certify`. Raises StoreError if a
    certificate cannot be read.
    """
    if (folder / certificate.FILE).exists():
        paths = [folder / certificate.FILE]
    else:
        paths = sorted((folder / "certificates").rglob(certificate.FILE))
    return {path.relative_to(folder).as_posix(): Certificate.read(path) for path in paths}


def views(certificates: Mapping[str, Certificate]) -> list[dict[str, Any]]:
    """Return what the template shows of each certificate."""
    each = []
    for number, (path, one) in enumerate(certificates.items(), start=1):
        each.append({**view(one), "id": f"c{number}", "path": path})
    return each


def html(certificates: Mapping[str, Certificate]) -> str:
    """Return the certificates as one page."""
    template = environment().get_template("certificate_page.html.j2")
    return str(template.render(views=views(certificates)))


def write(folder: Path) -> Path:
    """Write ``report.html`` for a folder that has a certificate and no results of a run.

    Raises StoreError if there is no certificate.
    """
    certificates = find(folder)
    if not certificates:
        raise StoreError(
            f"{folder}: no {certificate.FILE} in it; give a run folder, or one that `fulcrum "
            "certify` wrote"
        )
    store.write_bytes(folder / REPORT, html(certificates).encode())
    return folder / REPORT


def environment() -> Any:
    """Return the template environment: it escapes everything and allows no undefined name."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("fulcrum.report"),
        autoescape=True,  # in every template, whatever its suffix
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def view(one: Certificate) -> dict[str, Any]:
    """Return what the template shows of one certificate."""
    question, contradiction = one.question, one.contradiction
    glyph, kind, word = wording.badge(one.answer, contradiction)
    return {
        "task": question.task,
        "arm": question.arm,
        "headline": wording.headline(one),
        "contradiction": "" if contradiction is None else wording.contradicted(contradiction),
        "notes": wording.notes(one),
        "glyph": glyph,
        "kind": kind,
        "word": word,
        "tiles": _tiles(one),
        "answers": [view_answer(answer, question) for answer in one.answers],
        "effects": view_effects(one),
        "method": _method(one),
        "seal": one.sha256,
        "hashes": _hashes(one.inputs),
        "cells": len(one.outcomes),
        "hyperparameters": _hyperparameters(one.inputs.hyperparameters),
    }


def _tiles(one: Certificate) -> list[tuple[str, str, str]]:
    """Return the three main numbers: name, value, interval and meaning."""
    answer = one.answer
    arms = f"{one.question.arm} − {answer.reference.usual} at {answer.rows} rows"
    short, brief, _ = wording.more_rows(answer)
    return [
        (
            f"{metric_with_unit(answer)}, {wording.direction(answer)}: {arms}",
            *wording.parts_of(answer.difference, signed=True),
        ),
        _factor_tile(one),
        (f"{answer.more_rows.rows} more labelled rows, or general data?", short, brief),
    ]


def _factor_tile(one: Certificate) -> tuple[str, str, str]:
    """Return the row saving, or the row gain; no factor if metrics contradict each other."""
    answer = one.answer
    saving, gain = answer.saving, answer.gain
    if not saving.identifiable and gain is None:
        return "Row saving", "not identifiable", f"because {wording.not_identifiable(answer)}"
    if one.contradiction is not None:
        by_metric = []
        for each in one.answers:
            text = " ".join(wording.factor_parts(each.saving.rows))
            by_metric.append(f"{metric_with_unit(each)} {text}")
        return "Row saving", "none stated", "; ".join(by_metric)
    if gain is not None and (not saving.identifiable or saving.rows.most <= 1):
        value, span = wording.factor_parts(gain.rows)
        meaning = wording.gained_rows(gain.rows, answer.rows, one.question.arm)
        return "Row gain", value, f"{span}: {meaning}"
    value, span = wording.factor_parts(saving.rows)
    return "Row saving", value, f"{span}: {wording.saved_rows(saving.rows, answer.rows)}"


# ---- one metric


def metric_with_unit(answer: Answer) -> str:
    """Return a metric with its unit: "NLL, nats per answer token"."""
    label = summary.label_of(answer.metric)
    unit = summary.UNITS.get(answer.metric)
    return label if unit is None else f"{label}, {unit}"


def view_answer(answer: Answer, question: Question) -> dict[str, Any]:
    """Return one metric's curves for wide and for narrow pages, tables and attribution."""
    lines = lines_of(answer, question)
    reading = reading_of(answer, question)
    glyph, kind, word = wording.badge(answer)
    units = ["rows"] if answer.saving.tokens is None else list(_UNITS)
    slope = answer.slope
    return {
        "metric": summary.label_of(answer.metric),
        "named": metric_with_unit(answer),
        "n": answer.rows,
        "lower": answer.lower_is_better,
        "verdict": f"{glyph} {word}",
        "kind": kind,
        "difference": wording.difference(answer.difference),
        "seeds": answer.seeds,
        "curves": {
            "wide": learning_curves(lines, reading),
            "narrow": learning_curves(lines, reading, narrow=True),
        },
        **_scores_table(answer, lines),
        "reading": reading,
        "factors": _factors(answer, question.arm, units),
        "units": units,
        "identifiable": any(worth.identifiable for worth in (answer.saving, *answer.gains)),
        "why": "" if answer.saving.identifiable else wording.not_identifiable(answer),
        "more": wording.more_rows(answer),
        "more_rows": answer.more_rows.rows,
        "slope": "" if math.isnan(slope.estimate) else wording.difference(slope),
        "parts": _attribution(answer, question.arm),
    }


def _scores_table(answer: Answer, lines: Sequence[Line]) -> dict[str, Any]:
    texts: dict[str, dict[int, str]] = {}  # arm -> size -> score
    for point in answer.points:
        texts.setdefault(point.arm, {})[point.size] = wording.with_interval(point.score)
    sizes = sorted({point.size for point in answer.points})
    rows = []
    for line in lines:
        rows.append((line.arm, [texts[line.arm].get(size, "") for size in sizes]))
    return {"sizes": sizes, "scores": rows}


def _attribution(answer: Answer, arm: str) -> dict[str, Any]:
    """Return what the difference comes from, as dots on one axis."""
    whole = (
        "in all",
        f"{arm} − reference",
        "Over the best arm without general data: the difference that the verdict is about.",
    )
    parts = [(whole, answer.difference)]
    for part in answer.attribution:
        parts.append((wording.PARTS[part.code], part.difference))
    dots = []
    rows = []
    for (name, arms, about), interval in parts:
        dots.append(_dot(name, interval))
        text = wording.difference(interval)
        rows.append({"name": (name, arms), "text": text, "about": about})
    x_label = "← better · worse →" if answer.lower_is_better else "← worse · better →"
    return {"svg": _draw(dots, x_label), "rows": rows}


def lines_of(answer: Answer, question: Question) -> list[Line]:
    """Return the arms as lines: first the arm in question, then references, then others."""
    points: dict[str, list[Point]] = {}
    for point in answer.points:
        points.setdefault(point.arm, []).append(point)
    references = [arm for arm in points if _is_reference(answer, arm)]
    order = dict.fromkeys([question.arm, *references, *points])
    lines = []
    for arm in order:
        if arm not in points:
            continue
        by_size = sorted(points[arm], key=lambda point: point.size)
        label = f"{arm}, reference" if arm in references else arm
        if [point.size for point in by_size] == [0]:
            label = f"{arm}, untrained"
        is_strong = arm == question.arm or arm in references
        marks = tuple(_mark(answer, point) for point in by_size)
        lines.append(Line(arm, label, marks, strong=is_strong))
    return lines


def _is_reference(answer: Answer, arm: str) -> bool:
    """Return whether an arm is the reference often enough to be shown as one."""
    return any(selection.shares.get(arm, 0) >= _SELECTED for selection in answer.references)


def _mark(answer: Answer, point: Point) -> Mark:
    size, score = point.size, point.score
    tip = [
        f"{point.arm}, {_show_size(size)}",
        f"{summary.label_of(answer.metric)} {wording.with_interval(score)}",
    ]
    if size and len(point.by_seed) > 1:
        lowest, highest = min(point.by_seed), max(point.by_seed)
        span = f"{summary.decimal(lowest)} to {summary.decimal(highest)}"
        tip.append(f"{len(point.by_seed)} seeds: {span}")
    if size and point.tokens is not None:
        tip.append(f"{point.tokens:,.0f} task tokens")
    is_ringed = False
    for selection in answer.references:
        if size not in (0, selection.size):  # an untrained arm may be the reference at any size
            continue
        is_ringed = is_ringed or selection.usual == point.arm
        share = selection.shares.get(point.arm, 0.0)
        if share >= _SELECTED:
            there = "" if size else f" at {selection.size:,} rows"
            tip.append(f"reference in {wording.percent(share)} of draws{there}")
    low, high = _none_if_unknown(score.low), _none_if_unknown(score.high)
    return Mark(size, score.estimate, low, high, point.by_seed, "\n".join(tip), is_ringed)


def _show_size(size: int) -> str:
    return f"{size:,} rows" if size else "untrained"


def _none_if_unknown(value: float) -> float | None:
    return value if math.isfinite(value) else None


def reading_of(answer: Answer, question: Question) -> Reading | None:
    """Return where the row saving is read off the curves; None if there is none to read."""
    saving, n = answer.saving.rows, answer.rows
    has_no_estimate = math.isnan(saving.estimate) or saving.estimate == 0
    if not answer.saving.identifiable or saving.most <= 1 or has_no_estimate:
        return None
    scores = {}
    for point in answer.points:
        if point.arm == question.arm and point.size:
            scores[point.size] = point.score.estimate
    rows = n / min(saving.estimate, saving.most)
    fewest = n / saving.high if 0 < saving.high < math.inf else None
    most = n / saving.low if 0 < saving.low < math.inf else None
    if saving.low == math.inf:
        most = rows
    return Reading(
        value=scores[n] - answer.difference.estimate,
        n=n,
        rows=rows,
        fewest=fewest,
        most=most,
        smallest=min(scores),
        text=wording.saved_rows(saving, n, short=True),
    )


def _factors(answer: Answer, arm: str, units: Sequence[str]) -> list[dict[str, Any]]:
    """Return the row saving and each row gain: name, a factor for each unit, and in words."""
    saving = answer.saving
    rows = [_factor_row("row saving", saving, units, wording.saved_rows(saving.rows, saving.size))]
    for gain in answer.gains:
        words = wording.gained_rows(gain.rows, gain.size, arm)
        rows.append(_factor_row("row gain", gain, units, words))
    return rows


def _factor_row(name: str, worth: Worth, units: Sequence[str], words: str) -> dict[str, Any]:
    return {
        "name": name,
        "size": worth.size,
        "words": words if worth.identifiable else "",
        "factors": [wording.factor(worth, unit) for unit in units],
    }


def _draw(dots: Sequence[plots.Dot], x_label: str) -> str:
    """Draw dots on one axis with a line at 0."""
    return plots.dots([plots.Dots("", x_label, dots, 0.0)])


def _dot(
    label: str, interval: Interval, colour: str = plots.INK, limits: _Axis | None = None
) -> plots.Dot:
    """Return a dot; its interval is cut to the limits, or absent if an end is unknown."""
    estimate = 0.0 if math.isnan(interval.estimate) else interval.estimate
    low, high = interval.low, interval.high
    if not math.isfinite(low) or not math.isfinite(high):
        low, high = math.nan, math.nan
    elif limits is not None:
        low = min(max(low, limits.low), limits.high)
        high = min(max(high, limits.low), limits.high)
    return plots.Dot(label, Interval(estimate, low, high), colour=colour)


# ---- side effects


def view_effects(one: Certificate) -> list[dict[str, Any]]:
    """Return side effects as dots with intervals; arms as in the learning curves."""
    kinds = list(_EFFECTS)
    effects = sorted(one.side_effects, key=lambda effect: kinds.index(_split_name(effect)[0]))
    arms = [line.arm for line in lines_of(one.answer, one.question)]
    return [_view_effect(effect, one.answer.rows, arms) for effect in effects]


def _split_name(effect: SideEffect) -> tuple[str, str]:
    """Return the kind of a side effect, and what it was measured on: forgetting, builtin."""
    kind, _, what = effect.metric.partition(":")
    return kind, what.strip()


def _view_effect(effect: SideEffect, n: int, order: Sequence[str]) -> dict[str, Any]:
    """Return one side effect: rises over the untrained model if there is one, else scores.

    n: task rows at which arms are compared
    order: of the arms
    """
    kind, what = _split_name(effect)
    axis = _EFFECTS[kind]
    base = next((arm for arm in effect.arms if arm.size == 0), None)
    rises = kind == "forgetting" and any(arm.rise is not None for arm in effect.arms)
    colours = plots.arm_colours([*order, *(arm.arm for arm in effect.arms)])
    places = {arm: place for place, arm in enumerate(order)}
    dots = []
    rows = []
    sizes = set()
    for arm in sorted(effect.arms, key=lambda arm: places.get(arm.arm, len(order))):
        interval = arm.rise if rises else arm.score
        if interval is None:
            continue
        sizes.add(arm.size)
        size = _show_size(arm.size)
        text = wording.with_interval(interval, signed=rises, percents=axis.percents)
        dots.append(_dot(f"{arm.arm}, {size}", interval, colours[arm.arm], axis))
        rows.append({"name": (arm.arm, size), "text": text, "about": ""})
    return {
        "kind": kind,
        "what": what,
        "asked": ASKED.get(what, what),
        "base": None if base is None else base.arm,
        "rises": rises,
        "seeds": effect.seeds,
        "groups": f"{effect.groups:g}",
        "apart": bool(sizes - {0, n}),
        "plot": {"svg": _draw(dots, axis.label), "rows": rows},
        "level": "" if base is None else wording.with_interval(base.score),
    }


# ---- method


def _method(one: Certificate) -> dict[str, Any]:
    """Return how the first metric was measured: the reference by size, seeds, groups, draws."""
    first, question = one.answer, one.question
    selected: set[str] = set()
    for selection in first.references:
        selected.update(selection.shares)
    names = [arm for arm in question.references if arm in selected]
    rows = []
    for selection in first.references:
        cells = []
        for arm in names:
            share = selection.shares.get(arm)
            cells.append("–" if share is None else wording.percent(share))
        rows.append((selection.size, cells))
    groups = []
    for answer in one.answers:
        groups.append((summary.label_of(answer.metric), answer.seeds, f"{answer.test_groups:g}"))
    return {
        "names": names,
        "rows": rows,
        "groups": groups,
        "selected_by": wording.selected_by(first),
        "draws": question.draws,
        "seed": question.seed,
    }


def _hyperparameters(chosen: Sequence[Chosen]) -> list[tuple[str, str, str]]:
    """Return arm, sizes and the hyperparameters that differ between any two cells.

    Seeds are named if they differ.
    """
    keys = _varying_keys(chosen)
    seeds: dict[tuple[str, int], dict[str, list[str]]] = {}  # (arm, size) -> text -> seeds
    for cell in chosen:
        text = _describe_values(cell.values, keys)
        seeds.setdefault((cell.arm, cell.size), {}).setdefault(text, []).append(str(cell.seed))
    sizes: dict[tuple[str, str], list[str]] = {}  # (arm, text) -> sizes
    for (arm, size), by_text in sorted(seeds.items()):
        texts = list(by_text)
        if len(texts) > 1:
            texts = [f"{text} (seeds {', '.join(numbers)})" for text, numbers in by_text.items()]
        sizes.setdefault((arm, "; ".join(texts)), []).append(str(size))
    return [(arm, ", ".join(numbers), text) for (arm, text), numbers in sizes.items()]


def _describe_values(values: Mapping[str, Any] | None, keys: Sequence[str]) -> str:
    if values is None:
        return "nothing to choose"
    parts = [f"{key.replace('_', ' ')} {values[key]}" for key in keys]
    return ", ".join(parts) or "as every other"


def _varying_keys(chosen: Sequence[Chosen]) -> list[str]:
    """Return the hyperparameters that differ between cells, and `repeats`."""
    texts: dict[str, set[str]] = {}
    all_values = [cell.values for cell in chosen if cell.values is not None]
    for key in all_values[0] if all_values else ():
        texts[key] = {str(values.get(key)) for values in all_values}
    return [key for key, different in texts.items() if key == "repeats" or len(different) > 1]


def _hashes(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the inputs of the outcomes with their hashes: a table for each group of names."""
    outcomes = {}
    if inputs.outcomes_file is not None:
        outcomes["outcomes file"] = inputs.outcomes_file
    if inputs.rows:
        outcomes["data rows"] = f"{len(inputs.rows):,}, each with its hash"
    groups = {
        "outcomes": outcomes,
        "files": inputs.files,
        "rows that a model made": inputs.made,
        "general rows, by seed": inputs.general_rows,
        "environment": inputs.environment,
        "p over all tasks (Holm)": inputs.adjusted_p,
    }
    tables = []
    for name, group in groups.items():
        if group:
            tables.append((name, [(str(key), str(value)) for key, value in group.items()]))
    return tables
