"""`quanta.json` as a page on which a person reads the clusters: their tokens in context, and what each arm learned of each.

Invariants: the page is one file that runs no script and asks no network; text of the user's rows is inert; equal records give
equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.report import certificate_page, plots, research_plots
from fulcrum.report.run_kinds import Chapter, RunKind
from fulcrum.report.summary import Record

PAGE, TITLE = "quanta.html", "Clusters of answers"
SHOWN = 40  # items of a cluster that the page holds
_PICTURES = 24  # clusters, the largest, whose curves are drawn


def read(folder: Path) -> Record:
    """`quanta.json` of a run folder. Raises StoreError where it cannot be read or is of another version."""
    found = store.read_json(folder / store.QUANTA)
    if not isinstance(found, dict) or found.get("version") != 1:
        raise StoreError(
            f"{folder / store.QUANTA}: not a record of this version; use the Fulcrum that wrote it"
        )
    return found


def sentences(record: Record) -> list[str]:
    """What was found, in words: the clusters, then the test."""
    clusters, items = record["clusters"], record["items"]
    general = sum(item["general"] for item in items)
    counted = f"{len(items):,} answer {record['unit']} ({len(items) - general:,} of the task's test rows, {general:,} general"
    without = record["without_gradient"]
    counted += f"; {without:,} more have a gradient of zero and are left out)" if without else ")"
    if not clusters["k"]:
        best = max((one["stability"] for one in clusters["candidates"]), default=0.0)
        return [
            f"No stable clusters in {counted}: of the numbers that the gaps between eigenvalues suggest, the best agrees with "
            f"itself over draws of the items by {best:.3f} (adjusted Rand index; 0.6 is asked for). Nothing is tested."
        ]
    found = f"{clusters['k']} clusters in {counted}; over draws of the items they agree by {clusters['stability']:.2f}."
    return [found, record["test"]["sentence"]]


def cluster_rows(record: Record) -> list[dict[str, Any]]:
    """Every cluster, the largest first: its sizes, density, losses of the task's and of general items by arm and step."""
    by_label: dict[int, list[Record]] = {}
    for item in record["items"]:
        if item["cluster"] is not None:
            by_label.setdefault(item["cluster"], []).append(item)
    tested = {one["label"]: one for one in record["test"]["clusters"]} if record["test"] else {}
    rows = []
    for label, items in sorted(by_label.items()):
        own, general = (
            [item for item in items if item["general"] == kind] for kind in (False, True)
        )
        losses = {
            kind: _losses(part, record["arms"])
            for kind, part in (("task", own), ("general", general))
            if part
        }
        rows.append(
            {
                "label": label, "size": len(items), "task": len(own), "general": len(general),
                "density": tested[label]["density"], "gain": tested[label]["gain"], "losses": losses,
                "items": _interleaved(own, general), "words": _words(items),
            }
        )  # fmt: skip
    return rows


def _losses(items: Sequence[Record], arms: Sequence[str]) -> dict[str, Any]:
    """Mean losses: untrained, and of each arm by step."""
    return {
        "untrained": float(np.mean([item["untrained"] for item in items])),
        **{arm: np.mean([item["losses"][arm] for item in items], axis=0).tolist() for arm in arms},
    }


def _interleaved(own: Sequence[Record], general: Sequence[Record]) -> list[Record]:
    """Of both kinds as many as may be, evenly spaced, up to SHOWN."""
    half = SHOWN // 2
    wanted = max(half, SHOWN - len(general)), max(half, SHOWN - len(own))
    return [
        part[k]
        for part, most in zip((own, general), wanted, strict=True)
        for k in dict.fromkeys(
            np.linspace(0, len(part) - 1, min(most, len(part))).round().astype(int).tolist()
        )
    ]


def _words(items: Sequence[Record], most: int = 6) -> list[str]:
    """The commonest texts of a cluster, each with its number."""
    counts: dict[str, int] = {}
    for item in items:
        counts[item["text"]] = counts.get(item["text"], 0) + 1
    common = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    return [f"{shown(text)[:40]} ×{count}" for text, count in common]


def shown(text: str) -> str:
    """A token as a reader can see it: spaces at its ends and line breaks are marked."""
    marked = text.replace("\n", "⏎").replace("\t", "⇥")
    ahead, behind = len(marked) - len(marked.lstrip(" ")), len(marked) - len(marked.rstrip(" "))
    if ahead == len(marked):
        return "␣" * ahead
    return "␣" * ahead + marked.strip(" ") + "␣" * behind


def html(record: Record, title: str) -> str:
    """The explorer page."""
    rows = cluster_rows(record)
    steps = record["steps"]
    for row in rows:
        row["plot"] = (
            plots.curves(_panels(row, record["arms"], steps)) if row["label"] < _PICTURES else ""
        )
    usable = [row for row in rows if row["gain"] is not None and math.isfinite(row["gain"])]
    spots = [
        research_plots.Spot(row["density"], row["gain"], row["task"], str(row["label"] + 1))
        for row in usable
    ]
    plain, mixed = record["arms"]
    return str(
        certificate_page.environment().get_template("quanta.html.j2").render(
            record=record, title=title, rows=rows, sentences=sentences(record), shown=shown, plain=plain, mixed=mixed,
            eigenvalues=research_plots.eigenvalues(record["clusters"]["eigenvalues"], record["clusters"]["k"]),
            scatter=research_plots.spots(spots, "share of general items (each kind weighs as much)",
                                f"gain: nats that {mixed} is below {plain}") if spots else "",
        )
    )  # fmt: skip


def _panels(
    row: Mapping[str, Any], arms: Sequence[str], steps: Mapping[str, Sequence[int]]
) -> list[plots.Curves]:
    """The mean loss of a cluster's items over training, the task's and the general ones."""
    return [
        plots.Curves(
            f"Its {kind} items", "nats per token",
            [
                plots.Curve(arm, list(zip([0, *steps[arm]], [losses["untrained"], *losses[arm]], strict=True)))
                for arm in arms
            ],
        )
        for kind, losses in row["losses"].items()
    ]  # fmt: skip


def write_chapter(folder: Path, results: Record, predictions: Sequence[Record]) -> Chapter:
    """Write the explorer page into a run folder, and return what the report says of the clusters."""
    found = read(folder)
    title = ", ".join(facts["name"] for facts in results["tasks"])
    store.write_bytes(folder / PAGE, html(found, title).encode())
    template = certificate_page.environment().get_template("quanta_opening.html.j2")
    return Chapter(template.render(title=TITLE, sentences=sentences(found), page=PAGE))


def read_sentences(folder: Path, results: Record) -> list[str]:
    """Return what was found in a run folder, in words. Raises StoreError if it cannot be read."""
    return sentences(read(folder))


QUANTA = RunKind(
    "quanta",
    TITLE,
    selection="none",
    write_chapter=write_chapter,
    sentences=read_sentences,
    pages=(PAGE,),
)
