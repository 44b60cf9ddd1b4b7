"""`fulcrum pool`: convert, describe, sample and check general data; `selfgen`: make some."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.cli import common
from fulcrum.cli.common import Changes, EndpointModel, EndpointUrl, KeyVariable
from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fulcrum.config.settings import Settings
    from fulcrum.core.types import Anchor, Task
    from fulcrum.data.pool import Pool
    from fulcrum.experiments.selfgen import Writer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Given = Annotated[
    str,
    typer.Argument(
        metavar="RUN.yaml|DATA", help="A settings file, or a file, folder, glob or hub id."
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, help="Processes that convert (default: as many as processors)."),
]


@app.callback()
def pool() -> None:
    """General data: convert once, then look at it."""


@app.command()
def build(ctx: typer.Context, given: Given, jobs: Jobs = None, changes: Changes = None) -> None:
    """Convert general data into a pool in the cache; a killed build goes on where it was."""
    _show(*_open(ctx, given, jobs, changes))


@app.command()
def info(ctx: typer.Context, given: Given, changes: Changes = None) -> None:
    """Count the rows of a pool, their words, and the rows that were left out."""
    screen, opened = _open(ctx, given, None, changes)
    _show(screen, opened)
    _show_words(screen, opened)


@app.command()
def sample(
    ctx: typer.Context,
    given: Given,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws others.")] = 0,
    changes: Changes = None,
) -> None:
    """Print rows of a pool, drawn by a seed."""
    import numpy as np

    from fulcrum.cli import terminal

    screen, opened = _open(ctx, given, None, changes)
    _show(screen, opened)
    for index in np.random.default_rng(seed).permutation(len(opened))[:rows]:
        row = opened[int(index)]
        terminal.say(screen, f"\n{row.origin}", "bold")
        for message in row.messages:
            terminal.say(screen, f"{message.role}: {message.content}")


@app.command()
def check(
    ctx: typer.Context,
    run_file: Annotated[
        str, typer.Argument(metavar="RUN.yaml", help="Settings file with `task:` and `general:`.")
    ],
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Look at so many rows of the pool (default: all)."),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Rows to show of each reason.")
    ] = 3,
    changes: Changes = None,
) -> None:
    """Say which general rows may be mixed with the tasks, and show examples of the others."""
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.data import pool as pools
    from fulcrum.data import task_data

    settings = _settings(run_file, changes)
    if not settings.tasks:
        raise ConfigError(
            f"{run_file}: is data; "
            "`pool check` needs a settings file, which says what the task rows are"
        )
    tasks = [task_data.read_task(task, settings.seed)[0] for task in settings.tasks]
    screen, opened = _open(ctx, run_file, None, changes)
    with Watch(screen) as watch:
        allowed, reasons, refused = pools.check(
            opened,
            rows or len(opened),
            pools.Exclusions(
                tasks=[(*task.train, *task.dev, *task.test) for task in tasks],
                anchors=_anchors(settings, tasks),
                near=settings.clean.near_duplicates,
            ),
            seed=settings.seed,
            shown=examples,
            progress=watch.count,
        )
    _show(screen, opened)
    terminal.say(
        screen, f"beside the tasks: {allowed:,} rows may stand, {sum(reasons.values()):,} may not"
    )
    terminal.say_rejects(screen, reasons)
    shown: Counter[str] = Counter()
    for reject in (*opened.shown, *refused):
        shown[reject.reason] += 1
        if shown[reject.reason] <= examples:
            terminal.say(screen, f"{reject.reason}: {reject.origin}: {reject.detail[:200]}")


def _anchors(settings: "Settings", tasks: "Sequence[Task]") -> "list[Anchor]":
    """Return anchors of tasks and of the file's arms; no general row may hold their text."""
    anchors = [task.anchor for task in tasks if task.anchor is not None]
    for arm in settings.compare.arms:
        if not isinstance(arm, str) and arm.anchor is not None:
            anchors.append(arm.anchor.value)
    return anchors


def _settings(given: str, changes: list[str] | None) -> "Settings":
    from fulcrum.config import base
    from fulcrum.config.settings import Settings, load_settings

    if given.lower().endswith((".yaml", ".yml")):
        return load_settings(given, changes or ())
    if changes:
        raise ConfigError(
            f"--set changes a settings file, and {given} is data; "
            "write RUN.yaml, or leave --set out"
        )
    return Settings.model_construct(tasks=(), general=(base.GeneralSource(path=given),))


def _open(
    ctx: typer.Context, given: str, jobs: int | None, changes: list[str] | None
) -> "tuple[Console, Pool]":
    from fulcrum.cli import terminal

    if not ctx.obj:
        terminal.silence_data_libraries()
    settings = _settings(given, changes)
    screen = terminal.console()
    if not settings.general:
        raise ConfigError(
            f"{given}: `general:` names no data; write `general: FILE`, or give the file itself"
        )
    return screen, common.convert(screen, settings, settings.general, jobs)


def _show(screen: "Console", opened: "Pool") -> None:
    from fulcrum.cli import terminal

    for part in opened.stretches:
        weight = "" if part.source.weight is None else f", weight {part.source.weight:g}"
        terminal.say(screen, f"{part.source.path}: {part.stop - part.start:,} rows{weight}")
    terminal.say(screen, f"{len(opened):,} rows; left out: {sum(opened.left_out.values()):,}")
    terminal.say_rejects(screen, opened.left_out)
    for note in opened.notes:
        terminal.say(screen, f"note: {note}", "yellow")


def _show_words(screen: "Console", opened: "Pool") -> None:
    import numpy as np

    from fulcrum.cli import terminal

    counts = opened.words()
    if not len(counts):
        return
    low, middle, high = np.quantile(counts, [0.05, 0.5, 0.95])
    terminal.say(
        screen,
        f"words in a row: {low:,.0f} to {high:,.0f} (90% of rows), "
        f"median {middle:,.0f}; {counts.sum():,} in all",
    )


def selfgen(
    ctx: typer.Context,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jsonl", help="Where the rows go; batches are kept next to it until then."
        ),
    ],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 1000,
    model: Annotated[
        str, typer.Option("--model", help="Who writes: a name, folder, .gguf file or hub id.")
    ] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed makes other rows.")] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.01, help="Of what is asked; answers are greedy.")
    ] = 1.0,
    language: Annotated[
        str | None, typer.Option("--language", help="Keep rows in this language only, as en.")
    ] = None,
    endpoint: EndpointUrl = "",
    endpoint_model: EndpointModel = "",
    key: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Let a model write general data: questions and its own answers.

    A base model writes texts in two parts.
    """
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.core import store
    from fulcrum.data import filters
    from fulcrum.experiments import selfgen as self_generation

    screen = terminal.console()
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: the name must end in .jsonl")
    parts = out.with_name(f".{out.name}.parts")
    if out.exists() and parts.exists():  # it was killed after the last write: all rows are there
        shutil.rmtree(parts)
        terminal.say(screen, f"{out}: was finished already")
        return
    if out.exists():
        raise ConfigError(f"{out}: exists already and is not overwritten; name another file")
    if endpoint and not endpoint_model:
        raise ConfigError("--endpoint needs --endpoint-model, the model's name there")
    if language and language not in filters.languages():
        raise ConfigError(
            f"--language {language}: not a known code; known: {', '.join(filters.languages())}"
        )
    if not ctx.obj:
        terminal.silence_libraries()
    recipe = self_generation.Recipe(rows, seed, temperature, language)
    writer = _endpoint_writer(endpoint, endpoint_model, key) if endpoint else _writer(model)
    with Watch(screen) as watch:
        count = partial(watch.count, "rows made")
        made, rejects = self_generation.make(writer, recipe, parts, count)
    facts = {**writer.described, **store.plain(recipe), "kept": len(made), "left_out": rejects}
    store.write_json(out.with_suffix(".recipe.json"), facts)
    lines = []
    for row in made:
        lines.append({"prompt": row.question, "completion": row.answer, "family": "selfgen"})
    store.write_jsonl(out, lines)
    shutil.rmtree(parts)  # last: while it is there, the command may be given again
    terminal.say(screen, f"wrote {out}: {len(made):,} of {rows:,} rows; left out, by reason:")
    terminal.say_rejects(screen, rejects)
    if len(made) < rows:
        terminal.say(
            screen,
            "The model repeats itself: another --seed or a higher --temperature may bring more.",
            "yellow",
        )


def _endpoint_writer(url: str, model: str, key_variable: str) -> "Writer":
    from fulcrum.experiments import selfgen as self_generation
    from fulcrum.model.endpoint import Endpoint

    return self_generation.OfEndpoint(Endpoint(url, model, os.environ.get(key_variable)))


def _writer(model: str) -> "Writer":
    from fulcrum.cli import terminal
    from fulcrum.config.sections import TrainSettings
    from fulcrum.experiments import selfgen as self_generation
    from fulcrum.model import base_model

    with terminal.working(terminal.console(), f"loading {model}"):
        return self_generation.OfModel(base_model.load(model, TrainSettings()))
