"""`fulcrum anchor`: propose anchors, score them before training, compare with the outcome."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from fulcrum.cli import common
from fulcrum.cli.common import Changes, EndpointModel, EndpointUrl, KeyVariable, RunFile, TaskName
from fulcrum.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fulcrum.anchors import choose
    from fulcrum.anchors.score import Candidate
    from fulcrum.core.types import Anchor, AnchorScores, Placement, Task

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

SOURCES = ("template", "model", "endpoint")


@app.callback()
def anchor() -> None:
    """Anchors: proposed, scored, measured."""


@app.command()
def propose(
    ctx: typer.Context,
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", help="File to write, .jsonl: one anchor a line.")],
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="How many, in each placement.")
    ] = 12,
    placement: Annotated[
        list[str] | None,
        typer.Option(
            "--placement", help="system, user_prefix, user_suffix, response_prefix; repeatable."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="A,B", help="Who: template, model, endpoint.")
    ] = "template,model",
    text: Annotated[
        list[str] | None, typer.Option("--text", help="An anchor of your own; repeatable.")
    ] = None,
    task: TaskName = None,
    endpoint: EndpointUrl = "",
    endpoint_model: EndpointModel = "",
    key: KeyVariable = "OPENAI_API_KEY",
    changes: Changes = None,
) -> None:
    """Write anchors for a task: filled from its training rows, or written by a model or by you."""
    from fulcrum.config.settings import load_settings
    from fulcrum.core.types import Placement

    sources = _check_names(common.names(by), SOURCES)
    placements = _check_names(placement or ["user_prefix"], get_args(Placement))
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: the name must end in .jsonl")
    if "endpoint" in sources and not (endpoint and endpoint_model):
        raise ConfigError(
            "--by endpoint needs --endpoint, its address, "
            "and --endpoint-model, the model's name there"
        )
    settings = load_settings(run_file, changes or ())
    screen = common.ready(ctx, settings)
    from fulcrum.anchors import choose
    from fulcrum.anchors.score import Candidate
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.core.types import Anchor
    from fulcrum.model.endpoint import Endpoint

    writer = Endpoint(endpoint, endpoint_model, os.environ.get(key)) if endpoint else None
    with terminal.working(screen, f"loading {settings.model}, reading data"):
        data = choose.load_data(settings, compared=False)
    chosen = _task(data.tasks, task)
    texts = text or ()
    candidates = []
    for name in placements:
        for own in texts:
            candidates.append(Candidate(Anchor(own, cast("Placement", name)), "given"))
    rejects = Counter[str]()
    with Watch(screen) as watch:
        for name in placements:
            proposed, refused = choose.propose_anchors(
                chosen,
                cast("Placement", name),
                data,
                wanted=count,
                by=[cast("choose.Source", source) for source in sources],
                endpoint=writer,
                progress=watch,
            )
            candidates += proposed
            rejects.update(refused)
    _write_candidates(screen, out, chosen.name, candidates, data)
    terminal.say(screen, "proposals that were no anchors, by reason:")
    terminal.say_rejects(screen, rejects)
    wanted = len(placements) * (count + len(texts))
    if len(candidates) < wanted:
        terminal.say(
            screen,
            f"{len(candidates)} of {wanted}: "
            "write some yourself (--text), or ask a larger model (--by endpoint)",
            "yellow",
        )
    terminal.say(screen, f"wrote {out}; next: fulcrum anchor score {run_file} {out}")


def _check_names(names: list[str], known: "Sequence[str]") -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is not known here; known: {', '.join(known)}")
    return names


def _write_candidates(
    screen: "Console",
    out: Path,
    task: str,
    candidates: "Sequence[Candidate]",
    data: "choose.AnchorData",
) -> None:
    """Write proposed anchors into a file, and show them."""
    from fulcrum.anchors import score as scoring
    from fulcrum.cli import terminal
    from fulcrum.core import store

    lines = []
    rows = []
    for one in candidates:
        tokens = scoring.count_tokens(one.anchor, data.loaded)
        line = {**store.plain(one.anchor), "source": one.source, "tokens": tokens}
        lines.append(line)
        rows.append((line["text"], line["placement"], one.source, str(tokens)))
    store.write_jsonl(out, lines)
    head = ("anchor", "placement", "by", "tokens")
    screen.print(terminal.grid(f"Anchors for {task}", head, rows, numbers=False))


@app.command()
def score(
    ctx: typer.Context,
    run_file: RunFile,
    anchors: Annotated[
        Path | None,
        typer.Argument(
            metavar="ANCHORS.jsonl", help="Of `anchor propose`, or your own: lines with a `text`."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the scores there too, as .json.")
    ] = None,
    task: TaskName = None,
    changes: Changes = None,
) -> None:
    """Score anchors on the model as it is, and name the best. Nothing is trained.

    Without ANCHORS.jsonl anchors are proposed first. The table
    always holds the task's own anchor and controls.
    """
    from fulcrum.config.settings import load_settings

    given = [] if anchors is None else _read_anchors(anchors)
    settings = load_settings(run_file, changes or ())
    screen = common.ready(ctx, settings)
    from fulcrum.anchors import choose
    from fulcrum.anchors.score import Candidate
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.core import store

    began = time.perf_counter()
    with terminal.working(screen, f"loading {settings.model}, reading data"):
        data = choose.load_data(settings, compared=False)
    chosen = _task(data.tasks, task)
    candidates = []
    where: Placement = "user_prefix"
    if chosen.anchor is not None:
        candidates.append(Candidate(chosen.anchor, "the task's"))
        where = chosen.anchor.placement
    for one, source in given:
        if one != chosen.anchor:
            candidates.append(Candidate(one, source))
    rejects: dict[str, int] = {}
    with Watch(screen) as watch:
        if anchors is None:
            proposed, rejects = choose.propose_anchors(chosen, where, data, progress=watch)
            candidates += proposed
        scores = choose.score_candidates(
            candidates,
            chosen,
            data,
            rejects=rejects,
            started=began,
            choose=True,
            progress=watch,
        )
    show(screen, scores)
    if out is not None:
        store.write_json(out, [scores])
        terminal.say(screen, f"wrote {out}")


@app.command()
def outcome(
    run_folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_FOLDER...", help="Comparisons with arms that differ in their `anchor:`."
        ),
    ],
) -> None:
    """Say whether the loss before training told which anchors trained best, over all folders."""
    from fulcrum.cli import terminal
    from fulcrum.report import anchor_validity

    screen = terminal.console()
    groups = []
    for folder in run_folders:
        groups += anchor_validity.read_groups(folder)
    if not groups:
        raise ConfigError(
            f"{run_folders[0]}: no arms that differ in their anchor alone; "
            "give arms an `anchor:` of their own and compare them"
        )
    for group in groups:
        rows = []
        for one in group.anchors:
            numbers = (f"{one.tokens}", f"{one.loss:.3f}", f"{one.outcome:.3f}")
            rows.append((one.arm, one.text, *numbers))
        head = ("arm", "anchor", "tokens", "S_loss", f"test NLL, {group.seeds} seeds")
        title = f"{group.task} ({group.folder})"
        screen.print(terminal.grid(title, head, rows, numbers=False))
    terminal.say(screen, anchor_validity.verdict(groups), "bold")


def show(screen: "Console", scores: "AnchorScores") -> None:
    """Print the scores of a task's anchors, the best first, the chosen one marked."""
    from fulcrum.anchors import choose
    from fulcrum.cli import terminal

    rows = []
    for one in scores.scores:
        interval = ""
        if one.low is not None and one.high is not None:
            interval = f"[{one.low:+.3f}, {one.high:+.3f}]"
        rows.append(
            (
                "→" if one.chosen else "",
                one.text or "(none)",
                one.placement if one.text else "",
                one.source,
                f"{one.tokens}",
                f"{one.loss:.3f}",
                interval,
            )
        )
    head = ("", "anchor", "placement", "by", "tokens", "S_loss", "to no anchor")
    title = f"Anchors of {scores.task}, scored on {scores.rows} training rows"
    screen.print(terminal.grid(title, head, rows, numbers=False))
    terminal.say(
        screen,
        "S_loss: nats per answer token before training, "
        "with the 95% interval of its difference to no anchor.",
    )
    if any(one.chosen for one in scores.scores):
        terminal.say(screen, choose.sentence(scores), "bold")


def _task(tasks: "Sequence[Task]", name: str | None) -> "Task":
    from fulcrum.core.errors import nearest

    for task in tasks:
        if name in (None, task.name):
            return task
    names = [task.name for task in tasks]
    raise ConfigError(f"--task {name}: no such task{nearest(str(name), names)}")


def _read_anchors(file: Path) -> "list[tuple[Anchor, str]]":
    """Return the anchors of a file with their sources. Raise DataError for lines that are none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); give a file of `fulcrum anchor propose`"
        ) from None
    if not lines:
        raise DataError(f"{file}: holds no anchor; write some with `fulcrum anchor propose`")
    return [_read_anchor(line, f"{file}:{number}") for number, line in enumerate(lines, 1)]


def _read_anchor(line: str, place: str) -> "tuple[Anchor, str]":
    from fulcrum.core.types import Anchor, Placement

    try:
        row = json.loads(line)
        text = str(row["text"])
        placement = row.get("placement", "user_prefix")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f'{place}: no anchor: {line[:80]!r}; a line is {{"text": "...", '
            '"placement": "user_prefix"}'
        ) from None
    if placement not in get_args(Placement) or not text.strip():
        known = ", ".join(get_args(Placement))
        raise DataError(
            f"{place}: placement {placement!r} or text {text!r:.40} is none; known: {known}"
        )
    return Anchor(text, placement), str(row.get("source", "given"))
