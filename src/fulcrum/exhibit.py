"""What a certificate shows of a metric, laid out: learning curves, how far the rows went, what it comes from; side effects."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulcrum import plots, summary
from fulcrum.learning_plots import Line, Mark, Reading, learning_curves
from fulcrum.stats import Interval
from fulcrum.wording import ends, factor_text, in_rows, more_rows_text, not_identifiable, percent, signed, verdict_of

# How to read a part of the attribution, by its name up to the arms.
READ = {
    "in all": "Over the best arm without general data: the difference that the verdict is about.",
    "mixing": "General rows in the stream, no anchor: what mixing alone brings.",
    "anchor within the mix": "The same mixed stream, the anchor in every task prompt: what the anchor adds to the mix.",
    "interaction of anchor and mix": "What the anchor brings within the mix, less what it brings without general rows. "
    "Where its interval holds 0, anchor and mix were not shown to do more together than apart.",
    "shuffle": "The same rows, shuffled together instead of one source after the other: what the order brings.",
    "equal exposures": "Against SFT with the anchor and as many passes over the task rows: what general rows bring beside "
    "these. SFT was not tuned here, so this is no comparison of methods.",
    "transfer": "Against general rows whose answers teach nothing: what is left comes of the content of the general rows.",
}
# What a dependency on the anchor is the rise of: test rows asked ...
ASKED = {
    "without anchor": "without the anchor",
    "with anchor": "with the anchor, by an arm that is asked without it",
    "wrong anchor": "with another anchor",
    "reworded anchor": "with the anchor in other words",
}
_SELECTED = 0.05  # share of draws from which on an arm counts as a reference that was used


def named(answer: Mapping[str, Any]) -> str:
    """A metric with its unit: "NLL, nats per answer token"."""
    name = answer["metric"]
    return ", ".join(filter(None, (summary.label_of(name), summary.UNITS.get(name))))


def reference_at(answer: Mapping[str, Any], size: int) -> str:
    """The arm that was selected most often at a size."""
    shares = answer["reference"][str(size)]
    return str(max(shares, key=shares.__getitem__))


def sign_of(answer: Mapping[str, Any]) -> int:
    """-1 where lower is better: scores of a certificate are turned, higher is better."""
    return -1 if answer["lower_is_better"] else 1


def answer_of(answer: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
    """One metric: learning curves for wide and for narrow pages, tables, attribution."""
    lines, reading = lines_of(answer, question), reading_of(answer, question)
    glyph, kind, word = verdict_of(answer, None)
    parts = [{"name": f"in all ({question['arm']} - reference)", **answer["difference"]}, *answer["attribution"]]
    sizes = sorted({point["size"] for point in answer["points"]})
    scores = {(point["arm"], point["size"]): ends(point["score"], sign_of(answer)) for point in answer["points"]}
    shown = [(line.arm, [scores.get((line.arm, size), "") for size in sizes]) for line in lines]
    return {
        "metric": summary.label_of(answer["metric"]), "named": named(answer), "n": answer["rows"],
        "lower": answer["lower_is_better"], "verdict": f"{glyph} {word}", "kind": kind,
        "difference": " ".join(signed(answer["difference"], sign_of(answer))), "seeds": answer["seeds"],
        "curves": {
            "wide": learning_curves(lines, reading),
            "narrow": learning_curves(lines, reading, narrow=True),
        },
        "sizes": sizes, "scores": shown, "reading": reading,
        "factors": _factors(answer, question), "units": list(answer["saving"]),
        "identifiable": any(found["identifiable"] for found in (answer, *answer["gain"])),
        "why": "" if answer["identifiable"] else not_identifiable(answer),
        "more": more_rows_text(answer), "more_rows": answer["more_rows"]["rows"],
        "slope": " ".join(signed(answer["slope"], sign_of(answer))) if answer["slope"]["estimate"] is not None else "",
        "parts": _bars(
            [(_part(part["name"]), part) for part in parts], sign_of(answer),
            lambda part: " ".join(signed(part, sign_of(answer))),
            x_label="← better · worse →" if answer["lower_is_better"] else "← worse · better →",
            about=[READ.get(part["name"].split(" (")[0], "") for part in parts],
        ),
    }  # fmt: skip


def _part(name: str) -> tuple[str, str]:
    """A part's name and the arms in it."""
    found = re.fullmatch(r"(.*?) \((.*)\)", name)
    return (found[1], found[2].replace(" - ", " − ")) if found else (name, "")


def lines_of(answer: Mapping[str, Any], question: Mapping[str, Any]) -> list[Line]:
    """The arms as lines: the one that is asked for first, then the references that were selected, then the others."""
    points: dict[str, list[Mapping[str, Any]]] = {}
    for point in answer["points"]:
        points.setdefault(point["arm"], []).append(point)
    shares = [share for shares in answer["reference"].values() for share in shares.items()]
    used = [arm for arm in points if any(name == arm and share >= _SELECTED for name, share in shares)]
    order = [arm for arm in dict.fromkeys([question["arm"], *used, *points]) if arm in points]
    found = []
    for arm in order:
        marks = tuple(_mark(answer, point) for point in sorted(points[arm], key=lambda point: point["size"]))
        label = f"{arm}, reference" if arm in used else arm
        if [mark.size for mark in marks] == [0]:
            label = f"{arm}, untrained"
        found.append(Line(arm, label, marks, strong=arm == question["arm"] or arm in used))
    return found


def _mark(answer: Mapping[str, Any], point: Mapping[str, Any]) -> Mark:
    sign, size = sign_of(answer), point["size"]
    score = {key: None if value is None else sign * value for key, value in point["score"].items()}
    low, high = (score["low"], score["high"]) if sign > 0 else (score["high"], score["low"])
    seeds = tuple(sign * value for value in point["by_seed"])
    # An untrained arm stands at every size, and may be the reference at any.
    at = [size] if size else [int(each) for each in answer["reference"]]
    shares = {each: answer["reference"].get(str(each), {}).get(point["arm"], 0.0) for each in at}
    tip = [
        f"{point['arm']}, {f'{size:,} rows' if size else 'untrained'}",
        f"{summary.label_of(answer['metric'])} {ends(point['score'], sign)}",
    ]
    if size and len(seeds) > 1:
        tip.append(f"{len(seeds)} seeds: {summary.decimal(min(seeds))} to {summary.decimal(max(seeds))}")
    if size and point["tokens"] is not None:
        tip.append(f"{point['tokens']:,.0f} task tokens")
    for each, share in shares.items():
        if share >= _SELECTED:
            tip.append(f"reference in {percent(share)} of draws{'' if size else f' at {each:,} rows'}")
    ringed = any(str(each) in answer["reference"] and reference_at(answer, each) == point["arm"] for each in at)
    return Mark(size, float(score["estimate"] or 0), low, high, seeds, "\n".join(tip), ringed)


def reading_of(answer: Mapping[str, Any], question: Mapping[str, Any]) -> Reading | None:
    """Where the row saving is read off the curves; None where there is none to read."""
    saving, n, sign = answer["saving"]["rows"], answer["rows"], sign_of(answer)
    if not answer["identifiable"] or saving["most"] <= 1 or saving["estimate"] in ("under", None):
        return None
    own = next(p["score"]["estimate"] for p in answer["points"] if (p["arm"], p["size"]) == (question["arm"], n))
    sizes = [p["size"] for p in answer["points"] if p["arm"] == question["arm"] and p["size"]]
    rows = n / (saving["most"] if saving["estimate"] == "over" else saving["estimate"])
    fewest = n / saving["high"] if isinstance(saving["high"], float | int) else None
    most = n / saving["low"] if isinstance(saving["low"], float | int) else rows if saving["low"] == "over" else None
    return Reading(
        sign * (own - answer["difference"]["estimate"]), n, rows, fewest, most, min(sizes), in_rows(saving, n, short=True)
    )


def _factors(answer: Mapping[str, Any], question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row saving and each row gain: name, a factor for each unit, and in words."""
    n, arm = answer["rows"], question["arm"]
    units = list(answer["saving"])
    saving = {**answer["saving"], "size": n, "identifiable": answer["identifiable"]}
    rows = [("row saving", saving, in_rows(answer["saving"]["rows"], n))]
    rows += [("row gain", gain, in_rows(gain["rows"], gain["size"], gain=arm)) for gain in answer["gain"]]
    return [
        {
            "name": name, "size": found["size"], "words": words if found["identifiable"] else "",
            "factors": [" ".join(factor_text(found[unit])) if found["identifiable"] else "not identifiable" for unit in units],
        }
        for name, found, words in rows
    ]  # fmt: skip


def _bars(
    named: Sequence[tuple[tuple[str, str], Mapping[str, Any]]],
    sign: int,
    show: Callable[[Mapping[str, Any]], str],
    *,
    x_label: str,
    about: Sequence[str] = (),
    colours: Mapping[str, str] | None = None,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """Dots with intervals on one axis that holds 0, with their texts: (name, what of it), estimate and ends."""
    dots, rows = [], []
    for (name, part), text in zip(named, about or [""] * len(named), strict=True):
        ends_ = [math.nan, math.nan]
        if part["low"] is not None and part["high"] is not None:
            ends_ = sorted(min(max(sign * part[end], limits[0]), limits[1]) for end in ("low", "high"))
        interval = Interval(sign * float(part["estimate"] or 0), *ends_)
        label = ", ".join(filter(None, name)) if colours else name[0]
        dots.append(plots.Dot(label, interval, colour=(colours or {}).get(name[0], plots.INK)))
        rows.append({"name": name, "text": show(part), "about": text})
    return {"svg": plots.dots([plots.Dots("", x_label, dots, 0.0)]), "rows": rows}


def effects_of(certificate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Side effects as dots with intervals: forgetting, drift, leakage, dependency; arms as in the learning curves."""
    answer = certificate["answers"][0]
    arms = [line.arm for line in lines_of(answer, certificate["question"])]
    kinds = ("forgetting", "drift", "leakage", "dependency")
    effects = certificate.get("side_effects") or []
    order = sorted(effects, key=lambda effect: kinds.index(effect["metric"].partition(":")[0]))
    return [_effect(effect, answer["rows"], arms) for effect in order]


def _effect(effect: Mapping[str, Any], n: int, order: Sequence[str]) -> dict[str, Any]:
    """One side effect: rises over the untrained model where there is one, shares for leakage."""
    kind, _, what = effect["metric"].partition(":")
    arms = sorted(effect["arms"], key=lambda arm: order.index(arm["arm"]) if arm["arm"] in order else len(order))
    known = [arm["arm"] for arm in effect["arms"]]
    base = next((arm["arm"] for arm in effect["arms"] if arm["size"] == 0), None)
    rises = kind == "forgetting" and any(arm["rise"] for arm in arms)
    shown = [arm for arm in arms if arm["rise"]] if rises else arms
    rows = [
        ((arm["arm"], f"{arm['size']:,} rows" if arm["size"] else "untrained"), arm["rise" if rises else "score"])
        for arm in shown
    ]

    def show(part: Mapping[str, Any]) -> str:
        return " ".join(signed(part)) if rises else ends(part, percents=kind == "leakage")

    x_label = {"drift": "further →", "dependency": "rise"}.get(kind, "worse →")
    limits = {"leakage": (0.0, 1.0), "drift": (0.0, math.inf)}.get(kind, (-math.inf, math.inf))
    return {
        "kind": kind, "what": what.strip(), "asked": ASKED.get(what.strip(), what.strip()), "base": base, "rises": rises,
        "seeds": effect["seeds"], "groups": f"{effect['groups']:g}", "apart": any(arm["size"] not in (0, n) for arm in shown),
        "plot": _bars(rows, 1, show, x_label=x_label, colours=plots.arm_colours([*order, *known]), limits=limits),
        "level": next((ends(arm["score"]) for arm in arms if arm["arm"] == base), ""),
    }  # fmt: skip
