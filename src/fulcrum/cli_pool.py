"""`fulcrum pool`: convert, describe, sample and check general data."""

import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fulcrum.config import Settings
    from fulcrum.pool import Pool

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Given = Annotated[str, typer.Argument(metavar="RUN.yaml|DATA", help="A settings file, or a file, folder, glob or hub id.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Processes that convert (default: as many as processors).")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of RUN.yaml; repeatable.")
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

    from fulcrum import terminal

    screen, opened = _open(ctx, given, None, changes)
    for index in np.random.default_rng(seed).permutation(len(opened))[:rows]:
        row = opened[int(index)]
        terminal.say(screen, f"\n{row.origin}", "bold")
        for message in row.messages:
            terminal.say(screen, f"{message.role}: {message.content}")


@app.command()
def check(
    ctx: typer.Context,
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Settings file with `task:` and `general:`.")],
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Look at so many rows of the pool (default: all).")] = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Rows to show of each reason.")] = 3,
    changes: Changes = None,
) -> None:
    """Say which general rows may stand beside the tasks, and show examples of those that may not."""
    from fulcrum import material, terminal
    from fulcrum import pool as pools

    settings = _settings(run_file, changes)
    if not settings.tasks:
        raise ConfigError(f"{run_file}: is data; `pool check` needs a settings file, which says what the task rows are")
    tasks = [material.read_task(task, settings.seed)[0] for task in settings.tasks]
    screen, opened = _open(ctx, run_file, None, changes)
    with terminal.working(screen, "comparing with the task's rows"):
        found = pools.select(
            opened, min(rows or len(opened), len(opened)), seed=settings.seed, fits=lambda _: None,
            task_rows=[row for task in tasks for row in task.train],
            held_out_rows=[row for task in tasks for row in (*task.dev, *task.test)],
            anchors=[task.anchor for task in tasks if task.anchor is not None], near=settings.clean.near_duplicates,
        )  # fmt: skip
    _show(screen, opened)
    terminal.say(screen, f"beside the tasks: {len(found.examples):,} rows may stand, {len(found.rejects):,} may not")
    terminal.say_rejects(screen, Counter(reject.reason for reject in found.rejects))
    left: Counter[str] = Counter()
    for reject in (*opened.shown, *found.rejects):
        left[reject.reason] += 1
        if left[reject.reason] <= examples:
            terminal.say(screen, f"{reject.reason}: {reject.origin}: {reject.detail[:200]}")


def _settings(given: str, changes: list[str] | None) -> "Settings":
    from fulcrum import config, sections

    if given.lower().endswith((".yaml", ".yml")):
        return config.load(given, changes or ())
    if changes:
        raise ConfigError(f"--set changes a settings file, and {given} is data; write RUN.yaml, or leave --set out")
    return config.Settings.model_construct(tasks=(), general=(sections.GeneralSource(path=given),))


def _open(ctx: typer.Context, given: str, jobs: int | None, changes: list[str] | None) -> "tuple[Console, Pool]":
    from fulcrum import pool as pools
    from fulcrum import terminal
    from fulcrum.watch import Watch

    if not ctx.obj:
        terminal.silence_data_libraries()
    settings, screen = _settings(given, changes), terminal.console()
    with Watch(screen) as watch:
        opened = pools.open_pool(
            settings.general, settings.seed, near=settings.clean.near_duplicates, jobs=jobs or os.cpu_count() or 1,
            progress=watch.count,
        )  # fmt: skip
    return screen, opened


def _show(screen: "Console", opened: "Pool") -> None:
    from fulcrum import clean, terminal

    for part in opened.stretches:
        weight = "" if part.source.weight is None else f", weight {part.source.weight:g}"
        terminal.say(screen, f"{part.source.path}: {part.stop - part.start:,} rows{weight}")
    terminal.say(screen, f"{len(opened):,} rows; left out: {sum(opened.left_out.values()):,}")
    terminal.say_rejects(screen, opened.left_out)
    if opened.exact_only:
        terminal.say(screen, f"near-duplicates were not looked for: more than {clean.NEAR_ROWS:,} rows, exact ones only")


def _show_words(screen: "Console", opened: "Pool") -> None:
    import numpy as np

    from fulcrum import terminal

    counts = opened.words()
    if len(counts):
        low, middle, high = np.quantile(counts, [0.05, 0.5, 0.95])
        terminal.say(
            screen, f"words in a row: {low:,.0f} to {high:,.0f} (90% of rows), median {middle:,.0f}; {counts.sum():,} in all"
        )
