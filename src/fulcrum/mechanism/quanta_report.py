"""Show `quanta.json` as a page: the clusters' tokens in context, and what each arm learned of each.

Invariants: the page is one file that runs no script and asks no network; text of the user's rows is
inert; equal records give equal bytes.
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

PAGE = "quanta.html"
TITLE = "Clusters of answers"
SHOWN = 40  # items of a cluster that the page holds
_PICTURES = 24  # clusters, the largest, whose curves are drawn
_WORDS = 6  # commonest texts of a cluster


def read(folder: Path) -> Record:
    """Return `quanta.json` of a run folder. Raise StoreError if it is not of this version."""
    record = store.read_json(folder / store.QUANTA)
    if not isinstance(record, dict) or record.get("version") != 1:
        raise StoreError(
            f"{folder / store.QUANTA}: not a record of this version; use the Fulcrum that wrote it"
        )
    return record


def sentences(record: Record) -> list[str]:
    """Return the result in words: the clusters, then the test."""
    clusters = record["clusters"]
    counted = _count_items(record)
    if not clusters["k"]:
        best = max((tried["stability"] for tried in clusters["candidates"]), default=0.0)
        return [
            f"No stable clusters in {counted}: of the numbers that the gaps between eigenvalues "
            f"suggest, the best agrees with itself over draws of the items by {best:.3f} (adjusted "
            "Rand index; 0.6 is asked for). Nothing is tested."
        ]
    agree = f"over draws of the items they agree by {clusters['stability']:.2f}."
    return [f"{clusters['k']} clusters in {counted}; {agree}", record["test"]["sentence"]]


def cluster_rows(record: Record) -> list[dict[str, Any]]:
    """Return what the page shows of every cluster, the largest first.

    That is its sizes, density, and gain, and the losses of the task's and of general items by arm
    and step.
    """
    by_label: dict[int, list[Record]] = {}
    for item in record["items"]:
        if item["cluster"] is not None:
            by_label.setdefault(item["cluster"], []).append(item)
    tested = {}
    if record["test"]:
        tested = {cluster["label"]: cluster for cluster in record["test"]["clusters"]}
    rows = []
    for label, items in sorted(by_label.items()):
        own = [item for item in items if not item["general"]]
        general = [item for item in items if item["general"]]
        losses = {}
        if own:
            losses["task"] = _losses(own, record["arms"])
        if general:
            losses["general"] = _losses(general, record["arms"])
        rows.append(
            {
                "label": label,
                "size": len(items),
                "task": len(own),
                "general": len(general),
                "density": tested[label]["density"],
                "gain": tested[label]["gain"],
                "losses": losses,
                "items": _some_of_both(own, general),
                "words": _common_words(items),
            }
        )
    return rows


def shown(text: str) -> str:
    """Return a token with line breaks and the spaces at its ends made visible."""
    marked = text.replace("\n", "⏎").replace("\t", "⇥")
    inner = marked.strip(" ")
    if not inner:
        return "␣" * len(marked)
    ahead = len(marked) - len(marked.lstrip(" "))
    behind = len(marked) - len(marked.rstrip(" "))
    return "␣" * ahead + inner + "␣" * behind


def html(record: Record, title: str) -> str:
    """Return the explorer page."""
    rows = cluster_rows(record)
    for row in rows:
        row["plot"] = ""
        if row["label"] < _PICTURES:
            row["plot"] = plots.curves(_panels(row, record["arms"], record["steps"]))
    plain, mixed = record["arms"]
    clusters = record["clusters"]
    page = certificate_page.environment().get_template("quanta.html.j2")
    return str(
        page.render(
            record=record,
            title=title,
            rows=rows,
            sentences=sentences(record),
            shown=shown,
            plain=plain,
            mixed=mixed,
            eigenvalues=research_plots.eigenvalues(clusters["eigenvalues"], clusters["k"]),
            scatter=_scatter(rows, plain, mixed),
        )
    )


def write_chapter(folder: Path, results: Record, predictions: Sequence[Record]) -> Chapter:
    """Write the explorer page into a run folder; return what the report says of the clusters."""
    record = read(folder)
    title = ", ".join(facts["name"] for facts in results["tasks"])
    store.write_bytes(folder / PAGE, html(record, title).encode())
    template = certificate_page.environment().get_template("quanta_opening.html.j2")
    return Chapter(template.render(title=TITLE, sentences=sentences(record), page=PAGE))


def read_sentences(folder: Path, results: Record) -> list[str]:
    """Return a run folder's result in words. Raise StoreError if it cannot be read."""
    return sentences(read(folder))


def _count_items(record: Record) -> str:
    items, without = record["items"], record["without_gradient"]
    general = sum(item["general"] for item in items)
    counted = (
        f"{len(items):,} answer {record['unit']} ({len(items) - general:,} of the task's test "
        f"rows, {general:,} general"
    )
    if without:
        counted += f"; {without:,} more have a gradient of zero and are left out"
    return f"{counted})"


def _losses(items: Sequence[Record], arms: Sequence[str]) -> dict[str, Any]:
    """Return mean losses: untrained, and of each arm by step."""
    losses: dict[str, Any] = {"untrained": float(np.mean([item["untrained"] for item in items]))}
    for arm in arms:
        losses[arm] = np.mean([item["losses"][arm] for item in items], axis=0).tolist()
    return losses


def _some_of_both(own: Sequence[Record], general: Sequence[Record]) -> list[Record]:
    """Return up to SHOWN items, evenly spaced: half of each kind if there are as many."""
    half = SHOWN // 2
    chosen = _evenly(own, max(half, SHOWN - len(general)))
    return chosen + _evenly(general, max(half, SHOWN - len(own)))


def _evenly(items: Sequence[Record], most: int) -> list[Record]:
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in dict.fromkeys(places.tolist())]


def _common_words(items: Sequence[Record]) -> list[str]:
    """Return the commonest texts of a cluster, each with its number."""
    counts: dict[str, int] = {}
    for item in items:
        counts[item["text"]] = counts.get(item["text"], 0) + 1
    common = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_WORDS]
    return [f"{shown(text)[:40]} ×{count}" for text, count in common]


def _scatter(rows: Sequence[Record], plain: str, mixed: str) -> str:
    """Return the plot of gain over density, or nothing if no cluster has a gain."""
    spots = []
    for row in rows:
        gain = row["gain"]
        if gain is not None and math.isfinite(gain):
            number = str(row["label"] + 1)
            spots.append(research_plots.Spot(row["density"], gain, row["task"], number))
    if not spots:
        return ""
    x_label = "share of general items (each kind weighs as much)"
    return research_plots.spots(spots, x_label, f"gain: nats that {mixed} is below {plain}")


def _panels(
    row: Mapping[str, Any], arms: Sequence[str], steps: Mapping[str, Sequence[int]]
) -> list[plots.Curves]:
    """Return a panel each for the task's and the general items: their mean loss over training."""
    panels = []
    for kind, losses in row["losses"].items():
        curves = []
        for arm in arms:
            values = [losses["untrained"], *losses[arm]]
            curves.append(plots.Curve(arm, list(zip([0, *steps[arm]], values, strict=True))))
        panels.append(plots.Curves(f"Its {kind} items", "nats per token", curves))
    return panels


QUANTA = RunKind(
    "quanta",
    TITLE,
    selection="none",
    write_chapter=write_chapter,
    sentences=read_sentences,
    pages=(PAGE,),
)
