"""Write the table of `results/README.md` from the stored results.

    python scripts/results_table.py results

Every number comes from a certificate, from `scaling.json`, `quanta.json.gz` or `pilot.json`; what
was asked and the command are the first lines of a result's `run.yaml`; the commit is in its
manifest. The text around the table stays as it is.
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fulcrum.core import store
from fulcrum.mechanism import scale_report
from fulcrum.report import wording
from fulcrum.report.summary import label_of
from fulcrum.stats import certificate, outcomes
from fulcrum.stats.certificate import Certificate

BEGIN, END = "<!-- made by scripts/results_table.py -->", "<!-- end of the table -->"
HEAD = (
    "result",
    "question",
    "task",
    "model",
    "task rows",
    "n",
    "seeds",
    "number [95% interval]",
    "verdict",
    "commit",
    "command",
)
QUANTA = f"{store.QUANTA}.gz"


class Row(NamedTuple):
    """What the table says of one result."""

    task_rows: str
    n: str  # test rows, or other items that were judged
    seeds: str
    number: str
    verdict: str


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    readme = results / "README.md"
    text = readme.read_text(encoding="utf-8")
    store.write_bytes(readme, with_table(text, results).encode())


def with_table(text: str, results: Path) -> str:
    """Return a text with the table in place of the one between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def table(results: Path) -> str:
    """Return the table in Markdown, a row for each result."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for folder in sorted(path.parent for path in results.rglob("manifest.json")):
        name = folder.relative_to(results).as_posix()
        settings = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        head = (folder / "run.yaml").read_text(encoding="utf-8")
        manifest = store.read_json(folder / "manifest.json")
        row = describe(folder, settings)
        cells = (
            f"[{name}]({name})",
            _told(head, "Question"),
            settings["tasks"][0]["name"],
            settings["model"],
            *row,
            manifest["commit"],
            f"`{_told(head, 'Command')}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(head: str, what: str) -> str:
    """Return what a comment at the head of `run.yaml` says."""
    found = re.search(rf"^# {what}: (.*)$", head, re.MULTILINE)
    return "" if found is None else found[1]


def describe(folder: Path, settings: dict[str, Any]) -> Row:
    """Return the numbers of a result, by what is stored of it."""
    if (folder / certificate.FILE).exists():
        return of_certificate(folder)
    if (folder / store.SCALING).exists():
        return of_scaling(folder, settings)
    if (folder / QUANTA).exists():
        return of_quanta(folder, settings)
    if (folder / store.PILOT).exists():
        return of_pilot(folder)
    return Row("", "", "", "no certificate: see its manifest", "")


def of_certificate(folder: Path) -> Row:
    """Return the answer of the metric that decides."""
    known = Certificate.read(folder / certificate.FILE)
    answer = known.answer
    n = len(outcomes.read(outcomes.file_in(folder)).rows[answer.metric])
    arms = f"{known.question.arm} − {answer.reference.arm}"
    number = f"{label_of(answer.metric)} {wording.difference(answer.difference)} ({arms})"
    _, _, word = wording.badge(answer, known.contradiction)
    return Row(str(answer.rows), str(n), str(answer.seeds), number, f"{word}{_factor(known)}")


def _factor(known: Certificate) -> str:
    answer = known.answer
    if answer.verdict != "gain" or known.contradiction is not None:
        return ""
    if answer.saving.identifiable and answer.saving.rows.most > 1:
        return f"; row saving {wording.factor(answer.saving)}"
    return "" if answer.gain is None else f"; row gain {wording.factor(answer.gain)}"


def of_scaling(folder: Path, settings: dict[str, Any]) -> Row:
    """Return how far each design moved the loss, and its verdict."""
    known = store.read_json(folder / store.SCALING)
    n = len(outcomes.read(outcomes.file_in(folder)).rows[scale_report.CONTINUOUS])
    moved, words = [], []
    for design in known["tasks"][0]["designs"]:
        losses = next(one for one in design["metrics"] if one["metric"] == scale_report.CONTINUOUS)
        by_seed = np.array(losses["by_seed"])
        change = wording.difference(scale_report.over_seeds(by_seed[:, -1] - by_seed[:, 0]))
        most = f"{design['ratios'][-1]:g}"
        moved.append(f"{design['design']}: NLL {change} from 0 to {most} general rows a task row")
        words.append(f"{design['design']}: {design['word']}")
    seeds = str(len(known["seeds"]))
    rows = str(settings["scale"]["rows"])
    return Row(rows, str(n), seeds, "; ".join(moved), "; ".join(words))


def of_quanta(folder: Path, settings: dict[str, Any]) -> Row:
    """Return the clusters and the verdict of the test."""
    record = json.loads(gzip.decompress((folder / QUANTA).read_bytes()))
    found, items = record["clusters"], f"{len(record['items']):,} answer {record['unit']}"
    stability = f"{found['stability']:.2f}"
    number = f"{found['k']} clusters; over halves of the items they agree by {stability}"
    return Row(str(settings["quanta"]["rows"]), items, "1", number, record["test"]["verdict"])


def of_pilot(folder: Path) -> Row:
    """Return the amount that a pilot chose, and the loss next to that of none."""
    known = store.read_json(folder / store.PILOT)
    losses = []
    for ratio, loss, error in zip(known["ratios"], known["losses"], known["errors"], strict=True):
        error_text = f" ± {error:.3f}" if ratio else ""
        losses.append(f"{ratio:g}: {loss:.3f}{error_text}")
    number = f"held-out NLL by general rows a task row (± standard error): {', '.join(losses)}"
    return Row(str(known["rows"]), str(known["rows"]), "1", number, f"{known['chosen']:g} chosen")


if __name__ == "__main__":
    main()
