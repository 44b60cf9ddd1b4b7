"""Lay out a certificate as sections of a page, and write the page.

The sections are what it says, learning curves, how far the rows went, what it comes from, side
effects and how it was certified. All of it is made from the certificate alone, so that an old one
can be shown anew and no model is needed.

Invariants: no number without its interval, or the words that it has none; what is censored or not
identifiable is said in words; the page runs no script and asks no network, text of the user's is
inert, and equal certificates give equal bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    Effect,
    Inputs,
    Point,
    Question,
    SideEffect,
    Worth,
)
from fulcrum.stats.intervals import Interval

REPORT = "report.html"
# What a dependency on the anchor is the rise of: test rows asked ...
ASKED = {
    "without anchor": "without the anchor",
    "with anchor": "with the anchor, by an arm that is asked without it",
    "wrong anchor": "with another anchor",
    "reworded anchor": "with the anchor in other words",
}
_EFFECTS = ("forgetting", "drift", "leakage", "dependency")  # in the order of the page
_SELECTED = 0.05  # share of draws from which on an arm counts as a reference that was used
_UNITS = ("rows", "tokens")


def find(folder: Path) -> dict[str, Certificate]:
    """Read the certificates of a folder, by their path within it, sorted.

    The folder is a run's, or one that `fulcrum certify` wrote. Raises StoreError if one cannot be
    read.
    """
    paths = sorted((folder / "certificates").rglob(certificate.FILE))
    if (folder / certificate.FILE).exists():
        paths = [folder / certificate.FILE]
    return {path.relative_to(folder).as_posix(): Certificate.read(path) for path in paths}


def views(certificates: Mapping[str, Certificate]) -> list[dict[str, Any]]:
    """Return what the template shows of each certificate."""
    found = []
    for place, (path, known) in enumerate(certificates.items(), start=1):
        found.append({**view(known), "id": f"c{place}", "path": path})
    return found


def html(certificates: Mapping[str, Certificate]) -> str:
    """Return the certificates as one page."""
    template = environment().get_template("certificate_page.html.j2")
    return str(template.render(views=views(certificates)))


def write(folder: Path) -> Path:
    """Write ``report.html`` with the certificate of a folder that holds no results of a run.

    Raises StoreError if there is no certificate.
    """
    certificates = find(folder)
    if not certificates:
        raise StoreError(
            f"{folder}: no {certificate.FILE} in it; give a run folder, or one that `fulcrum certify` wrote"
        )
    store.write_bytes(folder / REPORT, html(certificates).encode())
    return folder / REPORT


def environment() -> Any:
    """Return the templates: everything is escaped, nothing may be undefined."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("fulcrum.report"),
        autoescape=True,  # of every template, whatever its name ends in
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def view(known: Certificate) -> dict[str, Any]:
    """Return what the template shows of one certificate."""
    question, contradiction = known.question, known.contradiction
    glyph, kind, word = wording.badge(known.answer, contradiction)
    contradicted = "" if contradiction is None else wording.contradicted(contradiction)
    return {
        "task": question.task,
        "arm": question.arm,
        "headline": wording.headline(known),
        "contradiction": contradicted,
        "notes": wording.notes(known),
        "glyph": glyph,
        "kind": kind,
        "word": word,
        "tiles": _tiles(known),
        "answers": [view_answer(answer, question) for answer in known.answers],
        "effects": view_effects(known),
        "method": _method(known),
        "seal": known.sha256,
        "hashes": _hashes(known.inputs),
        "cells": len(known.outcomes),
        "hyperparameters": _hyperparameters(known.inputs.hyperparameters),
    }


def _tiles(known: Certificate) -> list[tuple[str, str, str]]:
    """Return the three numbers to take away: name, value, interval and meaning."""
    answer = known.answer
    reference = answer.reference.usual
    what = f"{known.question.arm} − {reference} at {answer.rows} rows"
    moved = wording.parts_of(answer.difference, signed=True)
    short, brief, _ = wording.more_rows(answer)
    return [
        (f"{named(answer)}, {wording.direction(answer)}: {what}", *moved),
        _factor_tile(known),
        (f"{answer.more_rows.rows} more labelled rows, or general data?", short, brief),
    ]


def _factor_tile(known: Certificate) -> tuple[str, str, str]:
    """Return the row saving, or the row gain; no factor if metrics contradict each other."""
    answer, arm = known.answer, known.question.arm
    saving, gain, n = answer.saving, answer.gain, answer.rows
    if not saving.identifiable and gain is None:
        return "Row saving", "not identifiable", f"because {wording.not_identifiable(answer)}"
    if known.contradiction is not None:
        each = []
        for own in known.answers:
            each.append(f"{named(own)} {' '.join(wording.factor_parts(own.saving.rows))}")
        return "Row saving", "none stated", "; ".join(each)
    if gain is not None and (not saving.identifiable or saving.rows.most <= 1):
        value, span = wording.factor_parts(gain.rows)
        return "Row gain", value, f"{span}: {wording.gained_rows(gain.rows, n, arm)}"
    value, span = wording.factor_parts(saving.rows)
    return "Row saving", value, f"{span}: {wording.saved_rows(saving.rows, n)}"


# ---- one metric


def named(answer: Answer) -> str:
    """Return a metric with its unit: "NLL, nats per answer token"."""
    unit = summary.UNITS.get(answer.metric)
    return ", ".join(filter(None, (summary.label_of(answer.metric), unit)))


def view_answer(answer: Answer, question: Question) -> dict[str, Any]:
    """Return one metric's curves for wide and for narrow pages, tables and attribution."""
    lines, reading = lines_of(answer, question), reading_of(answer, question)
    glyph, kind, word = wording.badge(answer)
    units = ["rows"] if answer.saving.tokens is None else list(_UNITS)
    slope = answer.slope
    return {
        "metric": summary.label_of(answer.metric),
        "named": named(answer),
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
        **_scores_table(answer, [line.arm for line in lines]),
        "reading": reading,
        "factors": _factors(answer, question.arm, units),
        "units": units,
        "identifiable": any(worth.identifiable for worth in (answer.saving, *answer.gains)),
        "why": "" if answer.saving.identifiable else wording.not_identifiable(answer),
        "more": wording.more_rows(answer),
        "more_rows": answer.more_rows.rows,
        "slope": "" if math.isnan(slope.estimate) else wording.difference(slope),
        "parts": _parts(answer, question.arm),
    }


def _scores_table(answer: Answer, arms: Sequence[str]) -> dict[str, Any]:
    sizes = sorted({point.size for point in answer.points})
    scores = {(point.arm, point.size): point.score for point in answer.points}
    rows = []
    for arm in arms:
        known = [scores.get((arm, size)) for size in sizes]
        cells = ["" if score is None else wording.with_interval(score) for score in known]
        rows.append((arm, cells))
    return {"sizes": sizes, "scores": rows}


def _parts(answer: Answer, arm: str) -> dict[str, Any]:
    """Return what the difference comes from, as dots on one axis."""
    whole = (
        "in all",
        f"{arm} − reference",
        "Over the best arm without general data: the difference that the verdict is about.",
    )
    shown = [(whole, answer.difference)]
    for part in answer.attribution:
        shown.append((wording.PARTS[part.code], part.difference))
    named_parts = [((name, arms), interval) for (name, arms, _), interval in shown]
    ways = "← better · worse →" if answer.lower_is_better else "← worse · better →"
    about = [text for (*_, text), _ in shown]
    return _bars(named_parts, wording.difference, x_label=ways, about=about)


def lines_of(answer: Answer, question: Question) -> list[Line]:
    """Return the arms as lines: the one that is asked for, then used references, then others."""
    points: dict[str, list[Point]] = {}
    for point in answer.points:
        points.setdefault(point.arm, []).append(point)
    used = [arm for arm in points if _is_used(answer, arm)]
    order = [arm for arm in dict.fromkeys([question.arm, *used, *points]) if arm in points]
    lines = []
    for arm in order:
        by_size = sorted(points[arm], key=lambda point: point.size)
        marks = tuple(_mark(answer, point) for point in by_size)
        label = f"{arm}, reference" if arm in used else arm
        if [mark.size for mark in marks] == [0]:
            label = f"{arm}, untrained"
        is_strong = arm == question.arm or arm in used
        lines.append(Line(arm, label, marks, strong=is_strong))
    return lines


def _is_used(answer: Answer, arm: str) -> bool:
    """Return whether an arm is the reference often enough to be shown as one."""
    return any(selection.shares.get(arm, 0) >= _SELECTED for selection in answer.references)


def _mark(answer: Answer, point: Point) -> Mark:
    size, score = point.size, point.score
    at = [selection for selection in answer.references if size in (0, selection.size)]
    where = f"{size:,} rows" if size else "untrained"
    tip = [f"{point.arm}, {where}"]
    tip.append(f"{summary.label_of(answer.metric)} {wording.with_interval(score)}")
    if size and len(point.by_seed) > 1:
        least, most = map(summary.decimal, (min(point.by_seed), max(point.by_seed)))
        tip.append(f"{len(point.by_seed)} seeds: {least} to {most}")
    if size and point.tokens is not None:
        tip.append(f"{point.tokens:,.0f} task tokens")
    for selection in at:  # an untrained arm may be the reference at any size
        share = selection.shares.get(point.arm, 0.0)
        if share >= _SELECTED:
            there = "" if size else f" at {selection.size:,} rows"
            tip.append(f"reference in {wording.percent(share)} of draws{there}")
    is_ringed = any(selection.usual == point.arm for selection in at)
    low, high = _or_none(score.low), _or_none(score.high)
    return Mark(size, score.estimate, low, high, point.by_seed, "\n".join(tip), is_ringed)


def _or_none(end: float) -> float | None:
    return end if math.isfinite(end) else None


def reading_of(answer: Answer, question: Question) -> Reading | None:
    """Return where the row saving is read off the curves; None if there is none to read."""
    saving, n = answer.saving.rows, answer.rows
    unreadable = math.isnan(saving.estimate) or saving.estimate == 0
    if not answer.saving.identifiable or saving.most <= 1 or unreadable:
        return None
    own = [point for point in answer.points if point.arm == question.arm and point.size]
    reached = next(point.score.estimate for point in own if point.size == n)
    rows = n / min(saving.estimate, saving.most)
    fewest = n / saving.high if 0 < saving.high < math.inf else None
    most = n / saving.low if 0 < saving.low < math.inf else None
    if saving.low == math.inf:
        most = rows
    height = reached - answer.difference.estimate
    text = wording.saved_rows(saving, n, short=True)
    return Reading(height, n, rows, fewest, most, min(point.size for point in own), text)


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


def _bars(
    shown: Sequence[tuple[tuple[str, str], Interval]],
    text_of: Callable[[Interval], str],
    *,
    x_label: str,
    about: Sequence[str] = (),
    colours: Mapping[str, str] | None = None,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """Draw dots with intervals on one axis that holds 0; each name has two parts."""
    dots, rows = [], []
    for place, (name, interval) in enumerate(shown):
        low, high = math.nan, math.nan
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            low, high = (min(max(end, limits[0]), limits[1]) for end in interval[1:])
        estimate = 0.0 if math.isnan(interval.estimate) else interval.estimate
        label = ", ".join(filter(None, name)) if colours else name[0]
        colour = (colours or {}).get(name[0], plots.INK)
        dots.append(plots.Dot(label, Interval(estimate, low, high), colour=colour))
        text = about[place] if about else ""
        rows.append({"name": name, "text": text_of(interval), "about": text})
    return {"svg": plots.dots([plots.Dots("", x_label, dots, 0.0)]), "rows": rows}


# ---- side effects


def view_effects(known: Certificate) -> list[dict[str, Any]]:
    """Return side effects as dots with intervals; arms as in the learning curves."""
    arms = [line.arm for line in lines_of(known.answer, known.question)]
    order = sorted(known.side_effects, key=lambda effect: _EFFECTS.index(_kind_of(effect)))
    return [_view_effect(effect, known.answer.rows, arms) for effect in order]


def _kind_of(effect: SideEffect) -> str:
    return effect.metric.partition(":")[0]


def _view_effect(effect: SideEffect, n: int, order: Sequence[str]) -> dict[str, Any]:
    """Return one side effect: rises over the untrained model if there is one, else scores."""
    kind, what = _kind_of(effect), effect.metric.partition(":")[2].strip()
    places = {arm: place for place, arm in enumerate(order)}
    arms = sorted(effect.arms, key=lambda arm: places.get(arm.arm, len(order)))
    base = next((arm for arm in effect.arms if arm.size == 0), None)
    rises = kind == "forgetting" and any(arm.rise is not None for arm in arms)
    shown: list[tuple[tuple[str, str], Interval]] = []
    sizes = set()
    for arm in arms:
        interval = arm.rise if rises else arm.score
        if interval is not None:
            shown.append(((arm.arm, _size_of(arm)), interval))
            sizes.add(arm.size)

    def text_of(interval: Interval) -> str:
        return wording.with_interval(interval, signed=rises, percents=kind == "leakage")

    x_label = {"drift": "further →", "dependency": "rise"}.get(kind, "worse →")
    colours = plots.arm_colours([*order, *(arm.arm for arm in effect.arms)])
    limits = {"leakage": (0.0, 1.0), "drift": (0.0, math.inf)}.get(kind, (-math.inf, math.inf))
    return {
        "kind": kind,
        "what": what,
        "asked": ASKED.get(what, what),
        "base": None if base is None else base.arm,
        "rises": rises,
        "seeds": effect.seeds,
        "groups": f"{effect.groups:g}",
        "apart": bool(sizes - {0, n}),
        "plot": _bars(shown, text_of, x_label=x_label, colours=colours, limits=limits),
        "level": "" if base is None else wording.with_interval(base.score),
    }


def _size_of(arm: Effect) -> str:
    return f"{arm.size:,} rows" if arm.size else "untrained"


# ---- how it was certified


def _method(known: Certificate) -> dict[str, Any]:
    """Return how the first metric was measured: the reference by size, seeds, groups, draws."""
    first, question = known.answer, known.question
    names = []
    for arm in question.references:
        if any(arm in selection.shares for selection in first.references):
            names.append(arm)
    rows = []
    for selection in first.references:
        shares = [selection.shares.get(arm) for arm in names]
        cells = ["–" if share is None else wording.percent(share) for share in shares]
        rows.append((selection.size, cells))
    groups = []
    for answer in known.answers:
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
    """Return the hyperparameters by arm and sizes: what differs between any two cells.

    Seeds are named where they differ.
    """
    keys = _telling(chosen)
    by_point: dict[tuple[str, int], dict[str, list[int]]] = {}
    for cell in chosen:
        text = "nothing to choose"
        if cell.values is not None:
            parts = [f"{key.replace('_', ' ')} {cell.values[key]}" for key in keys]
            text = ", ".join(parts) or "as every other"
        by_point.setdefault((cell.arm, cell.size), {}).setdefault(text, []).append(cell.seed)
    sizes: dict[tuple[str, str], list[str]] = {}
    for (arm, size), seeds_by_text in sorted(by_point.items()):
        texts = list(seeds_by_text)
        if len(texts) > 1:
            texts = [
                f"{text} (seeds {', '.join(map(str, seeds))})"
                for text, seeds in seeds_by_text.items()
            ]
        sizes.setdefault((arm, "; ".join(texts)), []).append(str(size))
    return [(arm, ", ".join(known), text) for (arm, text), known in sizes.items()]


def _telling(chosen: Sequence[Chosen]) -> list[str]:
    """Return the hyperparameters that differ between cells, and `repeats`."""
    known = [cell.values for cell in chosen if cell.values is not None]
    keys = []
    for key in known[0] if known else ():
        if key == "repeats" or len({str(values.get(key)) for values in known}) > 1:
            keys.append(key)
    return keys


def _hashes(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what the outcomes rest on: a table for each group of names."""
    single = []
    if inputs.outcomes_file is not None:
        single.append(("outcomes file", inputs.outcomes_file))
    if inputs.rows:
        single.append(("data rows", f"{len(inputs.rows):,}, each with its hash"))
    groups = {
        "outcomes": dict(single),
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
