"""What commands share: their arguments, the settings, a console, a model and data made ready.

Every error of the command line ends here. One that a user can mend is one line on stderr and exit
code 2; any other is a bug of ours: a line that says so and exit code 1. With `--debug` the
traceback comes before the line. Ctrl-C is exit code 130, SIGTERM 143.
"""

import os
import re
import signal
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fulcrum.core import processes, user_paths
from fulcrum.core.errors import ConfigError, FulcrumError

if TYPE_CHECKING:
    from rich.console import Console

    from fulcrum.config.base import GeneralSource
    from fulcrum.config.settings import Settings
    from fulcrum.data.pool import Pool
    from fulcrum.experiments.budget import Estimate

RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.yaml", help="Settings file; `fulcrum init` writes one.")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN_FOLDER", help="The output_dir of a finished run.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as a.b=c; repeatable."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write what is shown there too, for other programs."
    ),
]
TaskName = Annotated[str | None, typer.Option("--task", help="Task (default: the first).")]
EndpointUrl = Annotated[
    str, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible; ends in /v1.")
]
EndpointModel = Annotated[str, typer.Option("--endpoint-model", help="The model's name there.")]
KeyVariable = Annotated[
    str, typer.Option("--key-variable", help="Environment variable with the endpoint's key.")
]


def notes(ctx: typer.Context) -> "Console":
    """Return a console on stderr; unless `--debug` is on, silence libraries."""
    from fulcrum.cli import terminal

    if not ctx.obj:
        terminal.silence_libraries()
    return terminal.console(stderr=True)


def ready(ctx: typer.Context, settings: "Settings", *, dry_run: bool = False) -> "Console":
    """Fetch the model and convert general data, with bars for what the cache lacks.

    Return a console on stdout. Of a dry run only the settings go to stdout if that is piped: the
    console is then one on stderr.
    """
    errors = notes(ctx)
    from fulcrum.cli import terminal
    from fulcrum.model import download

    screen = terminal.console()
    if dry_run and not screen.is_terminal:
        screen = errors
    with terminal.download(screen, settings.model) as progress:
        download.prepare(settings.model, progress)
    pools = [settings.general]
    for arm in settings.compare.arms:
        if not isinstance(arm, str):
            pools.append(arm.pool)
    for sources in pools:
        if sources:
            convert(screen, settings, sources)
    return screen


def convert(
    screen: "Console",
    settings: "Settings",
    sources: "Sequence[GeneralSource]",
    jobs: int | None = None,
) -> "Pool":
    """Open general data as the settings do, with a bar if anything must be converted first."""
    from fulcrum.cli.terminal import Watch
    from fulcrum.data import pool

    with Watch(screen) as watch:
        return pool.open_pool(
            sources,
            settings.seed,
            near=settings.clean.near_duplicates,
            jobs=jobs or os.cpu_count() or 1,
            progress=watch.count,
        )


def expected(screen: "Console", settings: "Settings") -> "list[Estimate]":
    """Measure and show about how long `train` and `compare` would take."""
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import clock
    from fulcrum.experiments import budget

    with terminal.working(screen, "measuring speed on a few rows"):
        estimates = budget.estimate(settings)
    for one in estimates:
        text = one.why_not
        if one.seconds is not None:
            text = f"{one.trainings:,} trainings, about {clock(one.seconds)}, an estimate"
        terminal.say(screen, f"{one.verb}: {text}")
    return estimates


def names(text: str) -> list[str]:
    """Return the names in an option like ``a,b``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at this address, not listening yet. Raise ConfigError if it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"--port {port} on {host}: {error.strerror}; another port (0: any free one) may do"
        ) from error
    return bound


DEBUG = "--debug"
_PATH_OF_HOME = re.compile(r"(~|\$\w+|\$\{\w+\})(/\S*)?$")
_RESUMED = "what was finished is kept; go on with --resume"
_KEPT = {  # what is said after Ctrl-C
    "train": _RESUMED,
    "compare": _RESUMED,
    "scale": _RESUMED,
    "quanta": _RESUMED,
    "pool": "what was converted is kept; the same command resumes it",
    "anchor": "what was scored is kept; the same command resumes it",
    "selfgen": "what was made is kept; the same command resumes it",
}


def _with_home(argument: str) -> str:
    """Return an argument with `~` and a leading variable replaced, which shells leave in quotes.

    That of an option (`--out=~/x`) too. Texts stay as they are.
    """
    option, equals, value = argument.partition("=")
    if not (equals and option.startswith("--")):
        option, equals, value = "", "", argument
    if not _PATH_OF_HOME.match(value):
        return argument
    try:
        return option + equals + user_paths.expanded(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


class Group(TyperGroup):
    """The verbs of the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept `--debug` after the verb too, where people add it, and `~` in every path."""
        if DEBUG in args:
            args = [DEBUG, *(arg for arg in args if arg != DEBUG)]
        return super().parse_args(ctx, list(map(_with_home, args)))

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; turn what a user can mend into one line."""
        processes.at_once()
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (FulcrumError, OSError) as error:
            from fulcrum.cli import terminal

            if ctx.params["debug"]:
                traceback.print_exc()
            terminal.fail(terminal.explain(error) if isinstance(error, OSError) else str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            from fulcrum.cli import terminal

            kept = _KEPT.get(ctx.invoked_subcommand or "", "nothing was changed")
            terminal.fail(kept, "stopped")
            raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None
        except Exception as error:
            is_typers_own = isinstance(error, typer.Exit | typer.Abort)
            if is_typers_own or hasattr(error, "exit_code"):  # Typer prints it
                raise
            from fulcrum.cli import terminal

            hint = "; --debug shows where"
            if ctx.params["debug"]:
                traceback.print_exc()
                hint = ""
            terminal.fail(f"a fault of Fulcrum itself: {type(error).__name__}: {error}{hint}")
            raise typer.Exit(1) from None
