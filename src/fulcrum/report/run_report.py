"""What a run found, for the terminal, as one offline HTML page, and as a model card.

Everything is read from ``results.json`` (the plain form of `records.Results`) and ``predictions.jsonl`` of a run folder, so
that an old run can be reported anew and no model is needed. `fulcrum.summary` has the numbers, `fulcrum.plots` the pictures.

Invariants: the page runs no script and asks no network; all text of the user's rows is inert; equal inputs give equal bytes.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulcrum.core import store
from fulcrum.core.errors import ModelError, StoreError
from fulcrum.core.types import Results
from fulcrum.model import registry
from fulcrum.report import anchor_validity, certificate_page, plots, summary
from fulcrum.report.run_kinds import Chapter, RunKind
from fulcrum.report.summary import Grid, Record
from fulcrum.stats import certificate, intervals
from fulcrum.stats.certificate import Certificate

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE_ROWS, EXAMPLE_CHARACTERS, CURVE_POINTS = 10, 700, 50  # keep the page below 1 MB


def load(folder: Path) -> Record:
    """Return ``results.json`` of a run folder. Raises StoreError where it is missing, broken or of another version."""
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such run folder; give the output_dir of a finished run")
    path = folder / "results.json"
    if not path.exists():
        raise StoreError(
            f"{folder}: no results.json and no {certificate.FILE}; a report is made from one of them"
        )
    results = store.read_json(path)
    known = {field.name: field.default for field in fields(Results)}
    version = results.get("version") if isinstance(results, dict) else None
    if version != known["version"]:
        raise StoreError(
            f"{path}: has version {version}, this Fulcrum reads {known['version']}; use the Fulcrum that wrote it"
        )
    if missing := sorted(known.keys() - results.keys()):
        raise StoreError(f"{path}: lacks {', '.join(missing)}; the file was changed or damaged")
    return dict(results)


def _read_predictions(path: Path) -> list[Record]:
    """Read JSON lines; none where the file was taken away, which the page then says."""
    if not path.exists():
        return []
    rows = []
    # Not `splitlines`: it also breaks at U+2028 and its kind, which may stand inside a row.
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not UTF-8
            raise StoreError(
                f"{path}:{number}: not readable as JSON ({error}); the file was changed or damaged"
            ) from None
    return rows


def tables(results: Record, *, certified: bool = False) -> list["Table"]:
    """Return the terminal's tables: scores of each task, paired differences, training and cost, forgetting. See `Grid`.

    Where the run is `certified`, its certificates say what differences and forgetting are.
    """
    grids = [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]
    grids.append(_training_and_cost(results))
    if not certified:
        grids.insert(-1, summary.difference_grid(results, first_metric_only=True))
        grids.append(summary.forgetting_grid(results))
    return [_rich(grid) for grid in grids if grid.rows]


def _training_and_cost(results: Record) -> Grid:
    """A row an arm: the least that tells whether the arms were treated alike. Apart from the scores, to fit 100 columns."""
    trained = {row[0]: (*row[1:4], *row[-2:]) for row in summary.training_grid(results).rows}
    rows = [
        (row[0], *trained.get(row[0], ("–",) * 5), row[-1])
        for row in summary.cost_grid(results).rows
    ]
    head = (
        "arm",
        "task share: examples",
        "tokens",
        "loss tokens",
        "steps",
        "train tokens",
        "seconds",
    )
    return Grid("Training and cost", head, tuple(rows))


def _rich(grid: Grid) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text  # plain text: a task called `[red]` must stay what it is

    styles = {"best": "bold", "base": "dim", "better": "bold green", "worse": "bold red"}
    look: dict[str, Any] = {
        "title_justify": "left",
        "title_style": "bold",
        "box": box.SIMPLE_HEAD,
        "padding": (0, 1, 0, 0),
    }
    # Without edges six arms with four metrics fit 100 columns; the caption is the blank line that the lower edge was.
    table = Table(title=Text(grid.title), caption=" ", show_edge=False, pad_edge=False, **look)
    for place, name in enumerate(grid.head):
        # Folded, for an ellipsis would hide digits in a narrow terminal.
        table.add_column(
            Text(name), justify="right" if place else "left", no_wrap=place == 0, overflow="fold"
        )
    for row, mark in zip(grid.rows, grid.marks or ("",) * len(grid.rows), strict=True):
        table.add_row(*(Text(cell) for cell in row), style=styles.get(mark, ""))
    return table


def score_plot(results: Record, task: str) -> str:
    """Return the SVG with a panel for each metric of the task, or nothing where the task was not scored."""
    arms = summary.by_arm(results)
    panels = []
    for metric in summary.metrics_of(arms, task):
        name, direction = metric["metric"], "higher" if metric["higher_is_better"] else "lower"
        found = {arm: summary.scores_of(results, task, name) for arm, results in arms.items()}
        label = ", ".join(filter(None, (summary.UNITS.get(name), f"{direction} is better")))
        panels.append(plots.Dots(summary.label_of(name), label, _dots(found)))
    return plots.dots(panels) if panels else ""


def forgetting_plot(results: Record) -> str:
    """Return the SVG of NLL on held-out general rows, a panel for each source; a dashed line is the `_untrained` arm's."""
    arms = summary.by_arm(results)
    untrained = _untrained(results)
    panels = []
    for source in dict.fromkeys(
        source for arm in arms.values() for source in arm[0]["general_nll"]
    ):
        found = {
            name: [r["general_nll"][source] for r in arm if source in r["general_nll"]]
            for name, arm in arms.items()
        }
        base = found[untrained] if untrained else []
        reference = summary.value_of(base[0]) if base else None
        panels.append(
            plots.Dots(
                source, "NLL, nats per answer token, lower is better", _dots(found), reference
            )
        )
    return plots.dots(panels) if panels else ""


def _dots(scores: Mapping[str, Sequence[Any]]) -> list[plots.Dot]:
    """Return a dot for each arm that has scores."""
    colours = plots.arm_colours(scores)
    dots = []
    for arm, of_seeds in scores.items():
        if of_seeds:
            values = [summary.value_of(score) for score in of_seeds]
            dots.append(plots.Dot(arm, summary.interval_of(of_seeds), values, colours[arm]))
    return dots


def _untrained(results: Record) -> str | None:
    """The arm that forgetting is measured against: the first untrained one."""
    arms = summary.by_arm(results).items()
    return next(
        (name for name, arm in arms if not summary.trainings(arm) and arm[0]["general_nll"]), None
    )


def training_plot(results: Record) -> str:
    """Return the SVG of task loss, general loss and dev NLL by step: the chosen trial of each trained arm's first seed."""
    panels: dict[str, list[plots.Curve]] = {
        "Loss on task rows": [],
        "Loss on general rows": [],
        "NLL on dev rows": [],
    }
    for name, arm in summary.by_arm(results).items():
        for trial in summary.trainings(arm)[:1]:
            history = trial["history"]
            task = [(point["step"], point["task_loss"]) for point in history]
            general = [(point["step"], point["general_loss"]) for point in history]
            dev = plots.Curve(name, _known(trial["dev_nll"]), trial["best_step"])
            curves = (
                plots.Curve(name, _thin(_known(task))),
                plots.Curve(name, _thin(_known(general))),
                dev,
            )
            for lines, curve in zip(panels.values(), curves, strict=True):
                if curve.points:
                    lines.append(curve)
    drawn = [
        plots.Curves(title, "nats per token", lines) for title, lines in panels.items() if lines
    ]
    return plots.curves(drawn) if drawn else ""


def _known(points: Sequence[Any]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if value is not None]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average runs of steps, so that a curve has at most CURVE_POINTS points and the noise of single steps is calmed."""
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def anchor_plot(anchors: Record) -> str:
    """Return the SVG of a task's anchors: the loss before training of each, with the interval of its difference to none."""
    none = next(score["loss"] for score in anchors["scores"] if score["source"] == "control: none")
    rows = []
    for place, score in enumerate(anchors["scores"], 1):
        ends = [
            none + end if end is not None else math.nan for end in (score["low"], score["high"])
        ]
        rows.append(
            plots.Dot(f"{place}: {score['source']}", intervals.Interval(score["loss"], *ends))
        )
    return plots.dots(
        [plots.Dots("Loss before training", "nats per answer token, lower is better", rows, none)]
    )


def examples(results: Record, predictions: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Return for each task the test rows on which the arms differ most, in nats per answer token, in either direction.

    The arms compared are tell and sft where both exist, else all; of several seeds the first is shown.
    """
    arms = list(summary.by_arm(results))
    pair = ["tell", "sft"] if {"tell", "sft"} <= set(arms) else arms
    limit = max(3, min(EXAMPLE_ROWS, 60 // max(1, len(results["tasks"]))))
    shown: dict[str, list[dict[str, Any]]] = {}
    for facts in results["tasks"]:
        rows: dict[str, dict[str, Record]] = {}
        for prediction in predictions:
            if prediction["task"] == facts["name"] and prediction["size"] in (0, results["size"]):
                rows.setdefault(prediction["origin"], {}).setdefault(prediction["arm"], prediction)
        ranked = sorted(rows.values(), key=lambda row: -_gap(row, pair))
        shown[facts["name"]] = [_example(row, arms) for row in ranked[:limit]]
    return shown


def _per_token(prediction: Record) -> float:
    return (
        summary.value_of(prediction, "nll_sum") / prediction["n_tokens"]
        if prediction["n_tokens"]
        else math.nan
    )


def _gap(row: Mapping[str, Record], arms: Sequence[str]) -> float:
    values = [value for arm in arms if arm in row and math.isfinite(value := _per_token(row[arm]))]
    return max(values) - min(values) if values else 0.0


def _example(row: Mapping[str, Record], arms: Sequence[str]) -> dict[str, Any]:
    first = next(
        row[arm] for arm in ("base", "sft", *arms, *row) if arm in row
    )  # the prompt without anchor, if any arm has it
    outputs = []
    for arm in (name for name in arms if name in row):
        text = row[arm]["output"]
        outputs.append(
            (arm, None if text is None else _clip(text), summary.decimal(_per_token(row[arm])))
        )
    return {
        "origin": first["origin"],
        "prompt": _clip(first["prompt"]),
        "gold": _clip(first["gold"]),
        "outputs": outputs,
    }


def _clip(text: str) -> str:
    rest = len(text) - EXAMPLE_CHARACTERS
    return text if rest <= 0 else f"{text[:EXAMPLE_CHARACTERS]} … ({rest:,} more characters)"


def html(
    results: Record,
    predictions: Sequence[Record],
    kind: RunKind,
    certificates: Mapping[str, Certificate] | None = None,
    pilot: Record | None = None,
    anchors: Sequence[Record] = (),
    chapter: Chapter | None = None,
) -> str:
    """Return the report as one page that needs no network and runs no script; equal inputs give equal text.

    It opens with the certificates and the `chapter` of its kind of run; if there is neither, with the claims about the arms.
    A `pilot` chose how much general data; `anchors` were scored before training.
    """
    import yaml

    arms, views = summary.by_arm(results), certificate_page.views(certificates or {})
    per_task = [
        {
            "facts": facts,
            "metrics": summary.metrics_of(arms, facts["name"]),
            "grid": summary.score_grid(results, facts["name"]),
            "plot": score_plot(results, facts["name"]),
        }
        for facts in results["tasks"]
    ]
    return _render(
        "report.html.j2",
        results,
        kind=kind,
        per_task=per_task,
        examples=examples(results, predictions),
        training_plot=training_plot(results),
        pilot=pilot,
        anchors=[
            {**each, "plot": anchor_plot(each)} for each in anchor_validity.rows(results, anchors)
        ],
        pilot_plot=plots.amounts(pilot["ratios"], pilot["losses"], pilot["errors"], pilot["chosen"])
        if pilot
        else "",
        forgetting_plot=forgetting_plot(results),
        settings=yaml.safe_dump(dict(results["settings"]), sort_keys=False, allow_unicode=True),
        views=views,
        chapter=chapter,
        notes=[
            note for note in results["notes"] if not any(note in view["notes"] for view in views)
        ],
    )


def write(folder: Path, kind: RunKind) -> Path:
    """Write ``report.html`` into the folder of a run of this kind, and return its path.

    Raises StoreError if the run or a certificate cannot be read.
    """
    results = load(folder)
    predictions = _read_predictions(folder / "predictions.jsonl")
    pilot = _read_if_there(folder / store.PILOT)
    anchors = _read_if_there(folder / store.ANCHORS) or ()
    chapter = kind.write_chapter(folder, results, predictions) if kind.write_chapter else None
    text = html(results, predictions, kind, certificate_page.find(folder), pilot, anchors, chapter)
    path = folder / certificate_page.REPORT
    store.write_bytes(path, text.encode())
    return path


def _read_if_there(file: Path) -> Any:
    return store.read_json(file) if file.exists() else None


def has_certificate_only(folder: Path) -> bool:
    """Whether a folder is one that `fulcrum certify` wrote, and no run's."""
    return not (folder / "results.json").exists() and (folder / certificate.FILE).exists()


def card(results: Record, kind: RunKind, adapter_note: str) -> str:
    """Return the model card of a run that keeps adapters, in Markdown; `adapter_note` says in a sentence how the anchor gets
    into the prompt.
    """
    anchors = [facts for facts in results["tasks"] if facts["anchor"] is not None]
    grids = [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]
    longest = max(
        (task["max_new_tokens"] for task in results["settings"].get("tasks", ())), default=64
    )
    trained = [arm["arm"] for arm in results["arms"] if arm["training"] is not None]
    shown = "tell" if "tell" in trained else (trained or ["sft"])[0]
    folder = (kind.adapters or "").format(arm=shown)
    return _render(
        "card.md.j2",
        results,
        kind=kind,
        adapter_note=adapter_note,
        anchors=anchors,
        grids=grids,
        max_new_tokens=longest,
        folder=folder,
        base=_kind_of_base(results["settings"]["model"]),
        asked=results["settings"].get("eval", {}).get("anchored", True),
    )


def export_card(
    results: Record, to: str, arm: str, rank: int, files: Sequence[str], anchor: Any, check: Record | None,
    inputs: Sequence[Sequence[str]],
) -> str:  # fmt: skip
    """Return the model card of an export in Markdown.

    to: kind of the export
    arm, rank: of its adapter
    check: an `artefact.Check` as plain values
    inputs: what went in: kind, name, SHA-256 and licence of each
    """
    longest = max(
        (task["max_new_tokens"] for task in results["settings"].get("tasks", ())), default=64
    )
    weights = next((name for name in files if name.endswith(".gguf")), "")
    return _render(
        "export.md.j2", results, to=to, arm=arm, rank=rank, files=files, weights=weights, anchor=anchor, check=check,
        inputs=inputs, max_new_tokens=longest,
    )  # fmt: skip


def _kind_of_base(name: str) -> str:
    """How others come by the base model: ``wheel``, ``folder``, ``gguf`` or ``hub``."""
    try:
        return registry.locate(name).kind
    except ModelError:  # files that were taken away since the run
        return "gguf" if name.lower().endswith(".gguf") else "folder"


def _literal(text: str) -> str:
    """Write a Python string; JSON's escapes are Python's, as long as characters beyond ASCII stay as they are."""
    return json.dumps(text, ensure_ascii=False)


def _fence(text: str) -> str:
    """Return a Markdown fence that no line of the text can close."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def _render(template: str, results: Record, **more: Any) -> str:
    environment = certificate_page.environment()
    environment.filters |= {"fence": _fence, "literal": _literal}
    arms = summary.by_arm(results)
    steps = [
        result["training"]["steps"]
        for found in arms.values()
        for result in found
        if result["training"]
    ]
    text = environment.get_template(template).render(
        results=results,
        claims=summary.claims(results),
        seeds=sorted({result["seed"] for result in results["arms"]}),
        trained=[name for name, arm in arms.items() if summary.trainings(arm)],
        training=summary.training_grid(results),
        cost=summary.cost_grid(results),
        differences=summary.difference_grid(results),
        forgetting=summary.forgetting_grid(results),
        untrained=_untrained(results),
        is_capped=max(steps, default=0) <= results["step_cap"],
        draws=results["settings"].get("eval", {}).get("draws"),
        peak_mebibytes=round(results["peak_memory_bytes"] / 2**20),
        **more,
    )
    return str(text)
