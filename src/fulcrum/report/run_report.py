"""Show a run in the terminal, as one offline HTML page, and as a model card.

Everything is read from ``results.json`` (the plain form of `types.Results`) and
``predictions.jsonl`` of a run folder, so that an old run can be shown again and no model is needed.
`summary` has the numbers, `plots` the pictures.

Invariants: the page runs no script and asks no network; all text of the user's rows is inert; equal
inputs give equal bytes.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulcrum.core import store
from fulcrum.core.errors import ModelError, StoreError
from fulcrum.core.types import Results
from fulcrum.model import registry
from fulcrum.report import anchor_validity, certificate_page, plots, summary
from fulcrum.report.run_kinds import Chapter, RunKind
from fulcrum.report.summary import Grid, Record
from fulcrum.stats import certificate
from fulcrum.stats.certificate import Certificate
from fulcrum.stats.intervals import Interval

if TYPE_CHECKING:
    from rich.table import Table

# These keep the page below 1 MB.
EXAMPLE_ROWS = 10  # of one task
ALL_EXAMPLE_ROWS = 60
EXAMPLE_CHARACTERS = 700
CURVE_POINTS = 50


@dataclass(frozen=True)
class ExportFacts:
    """What a model card says of an export."""

    to: str  # kind of the export
    arm: str
    rank: int  # of the arm's adapter
    files: Sequence[str]
    anchor: Any  # an `Anchor`, or None
    check: Record | None  # how it scored when loaded again (`check.Check`); None: it was not
    inputs: Sequence[Sequence[str]]  # kind, name, SHA-256 and licence of each


# ---- read a run folder


def load(folder: Path) -> Record:
    """Return ``results.json`` of a run folder.

    Raises StoreError if it is missing, broken or of another version.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such run folder; give the output_dir of a finished run")
    path = folder / "results.json"
    if not path.exists():
        raise StoreError(
            f"{folder}: no results.json and no {certificate.FILE}; a report is made from one of "
            "them"
        )
    results = store.read_json(path)
    expected = {field.name: field.default for field in fields(Results)}
    version = results.get("version") if isinstance(results, dict) else None
    if version != expected["version"]:
        raise StoreError(
            f"{path}: has version {version}, this Fulcrum reads {expected['version']}; use the "
            "Fulcrum that wrote it"
        )
    missing = sorted(expected.keys() - results.keys())
    if missing:
        raise StoreError(f"{path}: lacks {', '.join(missing)}; the file was changed or damaged")
    return dict(results)


def has_certificate_only(folder: Path) -> bool:
    """Return whether a folder was written by `fulcrum certify`, not by a run."""
    return not (folder / "results.json").exists() and (folder / certificate.FILE).exists()


def _read_predictions(path: Path) -> list[Record]:
    """Return the predictions; none if the file was removed, which the page then says."""
    if not path.exists():
        return []
    rows = []
    # Not `splitlines`: it also breaks at U+2028 and its like, which a row may contain.
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not UTF-8
            raise StoreError(
                f"{path}:{number}: not readable as JSON ({error}); the file was changed or damaged"
            ) from None
    return rows


def _read_if_there(file: Path) -> Any:
    return store.read_json(file) if file.exists() else None


# ---- the terminal


def tables(results: Record, *, certified: bool = False) -> list["Table"]:
    """Return the terminal's tables: scores by task, paired differences, cost, forgetting.

    The certificates of a `certified` run have the differences and forgetting.
    """
    grids = _score_grids(results)
    if not certified:
        grids.append(summary.difference_grid(results, first_metric_only=True))
    grids.append(_training_and_cost(results))
    if not certified:
        grids.append(summary.forgetting_grid(results))
    return [_rich_table(grid) for grid in grids if grid.rows]


def _score_grids(results: Record) -> list[Grid]:
    return [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]


def _training_and_cost(results: Record) -> Grid:
    """Return a row an arm: what shows that arms were treated alike, in at most 100 columns."""
    trained = {}
    for row in summary.training_grid(results).rows:
        arm, examples, tokens, loss_tokens, *_, steps, train_tokens = row
        trained[arm] = (examples, tokens, loss_tokens, steps, train_tokens)
    rows = []
    for arm, *_, seconds in summary.cost_grid(results).rows:
        rows.append((arm, *trained.get(arm, ("–",) * 5), seconds))
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


def _rich_table(grid: Grid) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text  # plain text: a task called `[red]` must stay what it is

    styles = {"best": "bold", "base": "dim", "better": "bold green", "worse": "bold red"}
    table = Table(
        title=Text(grid.title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=" ",  # the blank line that the lower edge would be
        show_edge=False,  # without edges six arms with four metrics fit 100 columns
        pad_edge=False,
    )
    for place, name in enumerate(grid.head):
        is_first = place == 0
        table.add_column(
            Text(name),
            justify="left" if is_first else "right",
            no_wrap=is_first,
            overflow="fold",  # an ellipsis would hide digits in a narrow terminal
        )
    marks = grid.marks or ("",) * len(grid.rows)
    for row, mark in zip(grid.rows, marks, strict=True):
        table.add_row(*map(Text, row), style=styles.get(mark, ""))
    return table


# ---- plots


def score_plot(results: Record, task: str) -> str:
    """Return SVGs of a task's scores, a panel for each metric; nothing if it was not scored."""
    arms = summary.by_arm(results)
    panels = []
    for metric in summary.metrics_of(arms, task):
        name = metric["metric"]
        scores = {arm: summary.scores_of(seeds, task, name) for arm, seeds in arms.items()}
        direction = "higher is better" if metric["higher_is_better"] else "lower is better"
        unit = summary.UNITS.get(name)
        x_label = direction if unit is None else f"{unit}, {direction}"
        panels.append(plots.Dots(summary.label_of(name), x_label, _dots(scores)))
    return plots.dots(panels)


def forgetting_plot(results: Record) -> str:
    """Return SVGs of the NLL on held-out general rows, a panel for each source.

    A dashed line is the NLL of the `_untrained` arm.
    """
    arms = summary.by_arm(results)
    untrained = _untrained(results)
    sources: dict[str, None] = {}
    for seeds in arms.values():
        sources |= dict.fromkeys(seeds[0]["general_nll"])
    panels = []
    for source in sources:
        scores = {arm: _general_scores(seeds, source) for arm, seeds in arms.items()}
        reference = None
        if untrained is not None and scores[untrained]:
            reference = summary.value_of(scores[untrained][0])
        x_label = "NLL, nats per answer token, lower is better"
        panels.append(plots.Dots(source, x_label, _dots(scores), reference))
    return plots.dots(panels)


def _general_scores(seeds: Sequence[Record], source: str) -> list[Record]:
    return [seed["general_nll"][source] for seed in seeds if source in seed["general_nll"]]


def _dots(scores: Mapping[str, Sequence[Record]]) -> list[plots.Dot]:
    """Return a dot for each arm that has scores, one a seed."""
    colours = plots.arm_colours(scores)
    dots = []
    for arm, seeds in scores.items():
        if seeds:
            values = [summary.value_of(score) for score in seeds]
            dots.append(plots.Dot(arm, summary.interval_of(seeds), values, colours[arm]))
    return dots


def _untrained(results: Record) -> str | None:
    """Return the arm that forgetting is measured against: the first untrained one."""
    for name, arm in summary.by_arm(results).items():
        if not summary.trainings(arm) and arm[0]["general_nll"]:
            return name
    return None


def training_plot(results: Record) -> str:
    """Return SVGs of task loss, general loss and dev NLL by step.

    Each trained arm shows the tested training of its first seed.
    """
    task_curves = []
    general_curves = []
    dev_curves = []
    for name, arm in summary.by_arm(results).items():
        for run in summary.trainings(arm)[:1]:
            task_losses = []
            general_losses = []
            for point in run["history"]:
                task_losses.append((point["step"], point["task_loss"]))
                general_losses.append((point["step"], point["general_loss"]))
            task_curves.append(plots.Curve(name, _smooth(_drop_missing(task_losses))))
            general_curves.append(plots.Curve(name, _smooth(_drop_missing(general_losses))))
            dev_curves.append(plots.Curve(name, _drop_missing(run["dev_nll"]), run["best_step"]))
    panels = []
    for title, curves in (
        ("Loss on task rows", task_curves),
        ("Loss on general rows", general_curves),
        ("NLL on dev rows", dev_curves),
    ):
        drawn = [curve for curve in curves if curve.points]
        if drawn:
            panels.append(plots.Curves(title, "nats per token", drawn))
    return plots.curves(panels)


def _drop_missing(points: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if value is not None]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring steps: at most CURVE_POINTS points, with less noise."""
    size = max(1, math.ceil(len(points) / CURVE_POINTS))
    means = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return means


def anchor_plot(anchors: Record) -> str:
    """Return an SVG of the loss before training of a task's anchors.

    The intervals are those of the difference to no anchor.
    """
    none = next(score["loss"] for score in anchors["scores"] if score["source"] == "control: none")
    rows = []
    for place, score in enumerate(anchors["scores"], start=1):
        low = none + summary.value_of(score, "low")
        high = none + summary.value_of(score, "high")
        interval = Interval(score["loss"], low, high)
        rows.append(plots.Dot(f"{place}: {score['source']}", interval))
    x_label = "nats per answer token, lower is better"
    return plots.dots([plots.Dots("Loss before training", x_label, rows, none)])


def _pilot_plot(pilot: Record) -> str:
    return plots.amounts(pilot["ratios"], pilot["losses"], pilot["errors"], pilot["chosen"])


# ---- examples


def examples(results: Record, predictions: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Return for each task the test rows on which arms differ most, in nats per answer token.

    Differences in either direction count, between tell and sft if both exist, else between all
    arms. The first seed is shown.
    """
    arms = list(summary.by_arm(results))
    compared = ["tell", "sft"] if {"tell", "sft"} <= set(arms) else arms
    limit = max(3, min(EXAMPLE_ROWS, ALL_EXAMPLE_ROWS // max(1, len(results["tasks"]))))
    by_task: dict[str, list[dict[str, Any]]] = {}
    for facts in results["tasks"]:
        rows: dict[str, dict[str, Record]] = {}  # origin -> arm -> its prediction
        for prediction in predictions:
            if prediction["task"] == facts["name"] and prediction["size"] in (0, results["size"]):
                rows.setdefault(prediction["origin"], {}).setdefault(prediction["arm"], prediction)
        ranked = sorted(rows.values(), key=lambda row: _spread(row, compared), reverse=True)
        by_task[facts["name"]] = [_describe_example(row, arms) for row in ranked[:limit]]
    return by_task


def _nll_per_token(prediction: Record) -> float:
    tokens: int = prediction["n_tokens"]
    if tokens == 0:
        return math.nan
    return summary.value_of(prediction, "nll_sum") / tokens


def _spread(row: Mapping[str, Record], arms: Sequence[str]) -> float:
    """Return the largest difference of these arms' losses on a row."""
    losses = [_nll_per_token(row[arm]) for arm in arms if arm in row]
    losses = [loss for loss in losses if math.isfinite(loss)]
    return max(losses) - min(losses) if losses else 0.0


def _describe_example(row: Mapping[str, Record], arms: Sequence[str]) -> dict[str, Any]:
    # `base` and `sft` have the prompt without the anchor.
    shown = next(row[arm] for arm in ("base", "sft", *arms, *row) if arm in row)
    outputs = []
    for arm in arms:
        if arm in row:
            text = row[arm]["output"]
            loss = summary.decimal(_nll_per_token(row[arm]))
            outputs.append((arm, None if text is None else _clip(text), loss))
    return {
        "origin": shown["origin"],
        "prompt": _clip(shown["prompt"]),
        "gold": _clip(shown["gold"]),
        "outputs": outputs,
    }


def _clip(text: str) -> str:
    rest = len(text) - EXAMPLE_CHARACTERS
    if rest <= 0:
        return text
    return f"{text[:EXAMPLE_CHARACTERS]} … ({rest:,} more characters)"


# ---- the page


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


def html(
    results: Record,
    predictions: Sequence[Record],
    kind: RunKind,
    certificates: Mapping[str, Certificate] | None = None,
    pilot: Record | None = None,
    anchors: Sequence[Record] = (),
    chapter: Chapter | None = None,
) -> str:
    """Return the report as one page; equal inputs give equal text.

    It opens with the certificates and the `chapter` of its kind of run; if there is neither, with
    the claims about the arms. A `pilot` chose how much general data; `anchors` were scored before
    training.
    """
    import yaml

    views = certificate_page.views(certificates or {})
    anchor_views = []
    for each in anchor_validity.rows(results, anchors):
        anchor_views.append({**each, "plot": anchor_plot(each)})
    return _render(
        "report.html.j2",
        results,
        kind=kind,
        per_task=_view_tasks(results),
        examples=examples(results, predictions),
        training_plot=training_plot(results),
        pilot=pilot,
        pilot_plot="" if pilot is None else _pilot_plot(pilot),
        anchors=anchor_views,
        forgetting_plot=forgetting_plot(results),
        settings=yaml.safe_dump(dict(results["settings"]), sort_keys=False, allow_unicode=True),
        views=views,
        chapter=chapter,
        notes=_notes_beyond(results, views),
    )


def _view_tasks(results: Record) -> list[dict[str, Any]]:
    arms = summary.by_arm(results)
    tasks = []
    for facts in results["tasks"]:
        name = facts["name"]
        tasks.append(
            {
                "facts": facts,
                "metrics": summary.metrics_of(arms, name),
                "grid": summary.score_grid(results, name),
                "plot": score_plot(results, name),
            }
        )
    return tasks


def _notes_beyond(results: Record, views: Sequence[Record]) -> list[str]:
    """Return the run's notes that no certificate shows."""
    certified: set[str] = set()
    for view in views:
        certified.update(view["notes"])
    return [note for note in results["notes"] if note not in certified]


# ---- model cards


def card(results: Record, kind: RunKind, adapter_note: str) -> str:
    """Return the model card of a run that keeps adapters, in Markdown.

    `adapter_note` says in a sentence how the anchor gets into the prompt.
    """
    trained = [arm["arm"] for arm in results["arms"] if arm["training"] is not None]
    shown = "sft"
    if "tell" in trained:
        shown = "tell"
    elif trained:
        shown = trained[0]
    return _render(
        "card.md.j2",
        results,
        kind=kind,
        adapter_note=adapter_note,
        anchors=[facts for facts in results["tasks"] if facts["anchor"] is not None],
        grids=_score_grids(results),
        max_new_tokens=_longest_answer(results),
        folder=(kind.adapters or "").format(arm=shown),
        base=_base_kind(results["settings"]["model"]),
        asked=results["settings"].get("eval", {}).get("anchored", True),
    )


def export_card(results: Record, export: ExportFacts) -> str:
    """Return the model card of an export, in Markdown."""
    return _render(
        "export.md.j2",
        results,
        export=export,
        weights=next((name for name in export.files if name.endswith(".gguf")), ""),
        max_new_tokens=_longest_answer(results),
    )


def _longest_answer(results: Record) -> int:
    """Return how many tokens an answer of any task may have."""
    limits = [task["max_new_tokens"] for task in results["settings"].get("tasks", ())]
    return max(limits, default=64)


def _base_kind(name: str) -> str:
    """Return how others can get the base model: ``wheel``, ``folder``, ``gguf`` or ``hub``."""
    try:
        return registry.locate(name).kind
    except ModelError:  # its files were removed since the run
        return "gguf" if name.lower().endswith(".gguf") else "folder"


# ---- templates


def _render(template: str, results: Record, **more: Any) -> str:
    environment = certificate_page.environment()
    environment.filters |= {"fence": _fence, "literal": _literal}
    trained = []
    most_steps = 0
    for name, arm in summary.by_arm(results).items():
        runs = summary.trainings(arm)
        if runs:
            trained.append(name)
            most_steps = max(most_steps, *(run["steps"] for run in runs))
    text = environment.get_template(template).render(
        results=results,
        claims=summary.claims(results),
        seeds=sorted({result["seed"] for result in results["arms"]}),
        trained=trained,
        training=summary.training_grid(results),
        cost=summary.cost_grid(results),
        differences=summary.difference_grid(results),
        forgetting=summary.forgetting_grid(results),
        untrained=_untrained(results),
        is_capped=most_steps <= results["step_cap"],
        draws=results["settings"].get("eval", {}).get("draws"),
        peak_mebibytes=round(results["peak_memory_bytes"] / 2**20),
        **more,
    )
    return str(text)


def _literal(text: str) -> str:
    """Return a Python literal: JSON's escapes are Python's if text stays beyond ASCII."""
    return json.dumps(text, ensure_ascii=False)


def _fence(text: str) -> str:
    """Return a Markdown fence that no line of the text can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
