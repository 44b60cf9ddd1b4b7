"""What commands share before they begin: their arguments, the settings, a console, and a model and general data made ready."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fulcrum.budget import Estimate
    from fulcrum.config import Settings
    from fulcrum.pool import Pool
    from fulcrum.sections import GeneralSource

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Settings file; `fulcrum init` writes one.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The output_dir of a finished run.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as a.b=c; repeatable.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write what is shown there too, for other programs.")
]
TaskName = Annotated[str | None, typer.Option("--task", help="Task (default: the first).")]
EndpointUrl = Annotated[str, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible; ends in /v1.")]
EndpointModel = Annotated[str, typer.Option("--endpoint-model", help="The model's name there.")]
KeyVariable = Annotated[str, typer.Option("--key-variable", help="Environment variable with the endpoint's key.")]


def notes(ctx: typer.Context) -> "Console":
    """A console on stderr; unless `--debug` is on, libraries are silenced."""
    from fulcrum import terminal

    if not ctx.obj:
        terminal.silence_libraries()
    return terminal.console(stderr=True)


def ready(ctx: typer.Context, settings: "Settings", *, dry_run: bool = False) -> "Console":
    """A console on stdout, once the model is fetched and general data are converted, with bars where the cache lacks them.

    Of a dry run only the settings go to stdout where that is piped: the console is then one on stderr.
    """
    aside = notes(ctx)
    from fulcrum import fetch, terminal

    screen = terminal.console()
    screen = aside if dry_run and not screen.is_terminal else screen
    with terminal.download(screen, settings.model) as progress:
        fetch.prepare(settings.model, progress)
    arms = [arm for arm in settings.compare.arms if not isinstance(arm, str)]
    for sources in filter(None, (settings.general, *(arm.pool for arm in arms))):
        convert(screen, settings, sources)
    return screen


def convert(screen: "Console", settings: "Settings", sources: "Sequence[GeneralSource]", jobs: int | None = None) -> "Pool":
    """Open general data as the settings do, with a bar where anything must be converted first."""
    from fulcrum import pool as pools
    from fulcrum.watch import Watch

    near, jobs = settings.clean.near_duplicates, jobs or os.cpu_count() or 1
    with Watch(screen) as watch:
        return pools.open_pool(sources, settings.seed, near=near, jobs=jobs, progress=watch.count)


def expected(screen: "Console", settings: "Settings") -> "list[Estimate]":
    """About how long `train` and `compare` would take, measured and shown."""
    from fulcrum import budget, terminal
    from fulcrum.watch import clock

    with terminal.working(screen, "measuring speed on a few rows"):
        found = budget.estimate(settings)
    for one in found:
        told = one.why_not if one.seconds is None else f"{one.trainings:,} trainings, about {clock(one.seconds)}, an estimate"
        terminal.say(screen, f"{one.verb}: {told}")
    return found


def names(text: str) -> list[str]:
    """The names in an option like ``a,b``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Raises ConfigError where that cannot be had."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        raise ConfigError(f"--port {port} on {host}: {error.strerror}; another port (0: any free one) may do") from error
    return found
