"""A certificate as sections of a page: what it says, learning curves, how far the rows went, what it comes from, side effects.

A view is made of the certificate's plain values alone, so that an old one can be shown anew and no model is needed.

Invariants: no number without its interval, or the word that it has none; what is censored or not identifiable is said in
words; the page runs no script and asks no network, text of the user's is inert, and equal certificates give equal bytes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulcrum import certificate, exhibit, store, summary
from fulcrum.errors import StoreError
from fulcrum.wording import factor_text, gain_of, in_rows, more_rows_text, not_identifiable, percent, signed, verdict_of

REPORT = "report.html"
Certificate = Mapping[str, Any]


def find(folder: Path) -> dict[str, Certificate]:
    """The certificates of a run folder, or of a folder that `fulcrum certify` wrote, by their path within it, sorted.

    Raises StoreError where one cannot be read.
    """
    paths = (
        [folder / certificate.FILE]
        if (folder / certificate.FILE).exists()
        else sorted((folder / "certificates").rglob(certificate.FILE))
    )
    return {path.relative_to(folder).as_posix(): certificate.read(path) for path in paths}


def views(certificates: Mapping[str, Certificate]) -> list[dict[str, Any]]:
    """What the template shows of each certificate. Raises StoreError for one that lacks what a certificate has."""
    found = []
    for number, (path, known) in enumerate(certificates.items(), start=1):
        try:
            found.append({**view(known), "id": f"c{number}", "path": path})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(f"{path}: not a certificate as it is written ({error!r:.80}); the file was changed") from None
    return found


def html(certificates: Mapping[str, Certificate]) -> str:
    """The certificates as one page."""
    page = environment().get_template("certificate_page.html.j2")
    return str(page.render(views=views(certificates)))


def write(folder: Path) -> Path:
    """Write ``report.html`` with the certificate of a folder that holds no run. Raises StoreError where there is none."""
    if not (found := find(folder)):
        raise StoreError(f"{folder}: no {certificate.FILE} in it; give a run folder, or one that `fulcrum certify` wrote")
    store.write_bytes(folder / REPORT, html(found).encode())
    return folder / REPORT


def environment() -> Any:
    """The templates: everything is escaped, nothing may be undefined."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("fulcrum", "data"),
        autoescape=True,  # of every template, whatever its name ends in
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def view(known: Certificate) -> dict[str, Any]:
    """What the template shows of one certificate."""
    question, answers = known["question"], known["answers"]
    glyph, kind, word = verdict_of(answers[0], known["contradiction"])
    return {
        "task": question["task"], "arm": question["arm"], "headline": known["headline"],
        "contradiction": known["contradiction"], "notes": question["notes"],
        "glyph": glyph, "kind": kind, "word": word, "tiles": _tiles(known, question),
        "answers": [exhibit.answer_of(answer, question) for answer in answers],
        "effects": exhibit.effects_of(known),
        "method": _method(known), "seal": known["sha256"], "hashes": _hashes(known["inputs"]),
        "cells": len(known["outcomes"]), "settings": _settings(known["inputs"].get("settings chosen")),
    }  # fmt: skip


def _tiles(known: Certificate, question: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The three numbers to take away: name, value, interval and meaning; no factor where metrics contradict each other."""
    answer = known["answers"][0]
    n, more, saving = answer["rows"], answer["more_rows"], answer["saving"]["rows"]
    value, span = signed(answer["difference"], exhibit.sign_of(answer))
    better = "lower is better" if answer["lower_is_better"] else "higher is better"
    tiles = [
        (f"{exhibit.named(answer)}, {better}: {question['arm']} − {exhibit.reference_at(answer, n)} at {n} rows", value, span)
    ]
    gain = gain_of(answer)
    if not answer["identifiable"] and gain is None:
        tiles.append(("Row saving", "not identifiable", f"because {not_identifiable(answer)}"))
    elif known["contradiction"]:
        each = (f"{exhibit.named(own)} {' '.join(factor_text(own['saving']['rows']))}" for own in known["answers"])
        tiles.append(("Row saving", "none stated", "; ".join(each)))
    elif gain is not None and (not answer["identifiable"] or saving["most"] <= 1):
        value, span = factor_text(gain["rows"])
        tiles.append(("Row gain", value, f"{span}: {in_rows(gain['rows'], n, gain=question['arm'])}"))
    else:
        value, span = factor_text(saving)
        tiles.append(("Row saving", value, f"{span}: {in_rows(saving, n)}"))
    short, brief, _ = more_rows_text(answer)
    return [*tiles, (f"{more['rows']} more labelled rows, or general data?", short, brief)]


def _method(known: Certificate) -> dict[str, Any]:
    """How it was measured, of the first metric: the reference's selection by size, seeds, groups, draws."""
    first = known["answers"][0]
    names = [arm for arm in known["question"]["references"] if any(arm in shares for shares in first["reference"].values())]
    rows = [
        (int(size), [percent(shares[arm]) if arm in shares else "–" for arm in names])
        for size, shares in first["reference"].items()
    ]
    groups = [
        (summary.label_of(answer["metric"]), answer["seeds"], f"{answer['test_groups']:g}") for answer in known["answers"]
    ]
    return {
        "names": names, "rows": rows, "groups": groups, "selected_on": first["selected_on"],
        "draws": known["question"]["draws"], "seed": known["question"]["seed"],
    }  # fmt: skip


def _settings(chosen: Any) -> list[tuple[str, str, str]]:
    """The settings chosen, by arm and size: what differs between any two of them, with the seeds where these differ."""
    if not isinstance(chosen, Mapping):
        return []
    known = [value for value in chosen.values() if isinstance(value, Mapping)]
    keys = [key for key in (known[0] if known else ()) if len({str(value.get(key)) for value in known}) > 1 or key == "repeats"]
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell, value in chosen.items():
        name = re.fullmatch(r"(.*) at (\d+) rows, seed (\d+)", cell)
        arm, size, seed = name.groups() if name else (cell, "", "")
        text = (
            ", ".join(f"{key.replace('_', ' ')} {value[key]}" for key in keys)
            if isinstance(value, Mapping)
            else "nothing to choose"
        )
        found.setdefault((arm, size), {}).setdefault(text or "as every other", []).append(seed)
    rows: dict[tuple[str, str], list[str]] = {}
    for (arm, size), texts in sorted(found.items(), key=lambda item: (item[0][0], int(item[0][1] or 0))):
        apart = [f"{text} (seeds {', '.join(seeds)})" for text, seeds in texts.items()]
        rows.setdefault((arm, "; ".join(apart if len(texts) > 1 else texts)), []).append(size)
    return [(arm, ", ".join(sizes), text) for (arm, text), sizes in rows.items()]


def _hashes(inputs: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the outcomes rest on, as the certificate states it: a table for each group of names."""
    single = [(name, str(value)) for name, value in inputs.items() if not isinstance(value, Mapping | list)]
    groups = [
        (name, [(str(key), str(item)) for key, item in value.items()])
        for name, value in inputs.items()
        if isinstance(value, Mapping) and name not in ("settings", "rows", "settings chosen") and value
    ]
    rows = [("data rows", f"{len(inputs['rows']):,}, each with its hash")] if inputs.get("rows") else []
    return [("outcomes", single + rows), *groups] if single or rows else groups
