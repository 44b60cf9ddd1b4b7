"""`fulcrum ui`: the local page, from a data file to a certificate."""

from pathlib import Path
from typing import Annotated

import typer

from fulcrum import cli_start
from fulcrum.errors import ConfigError

PORT = 8642


def ui(
    folder: Annotated[Path, typer.Option("--folder", help="Where data, settings and runs of the page are kept.")] = Path(
        "fulcrum-ui"
    ),
    runs: Annotated[
        list[Path] | None, typer.Option("--runs", metavar="FOLDER", help="Show the runs below it too; repeatable.")
    ] = None,
    model: Annotated[
        list[Path] | None, typer.Option("--model", metavar="FOLDER", help="A model that runs may use; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where it listens on this machine; 0: any.")] = PORT,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page for the whole way: data, settings, plan, run, certificate, chat, export.

    It listens on this machine alone. Runs are processes of their own: they go on when the page or its server is closed.
    """
    try:
        from fulcrum import web
    except ModuleNotFoundError as error:
        raise ConfigError(f"the page needs {error.name}: pip install 'fulcrum-llm[ui]'") from None
    import webbrowser

    from fulcrum import api, terminal
    from fulcrum.workspace import Workspace

    screen = terminal.console()
    space = Workspace(folder, runs or (), model or ())
    addresses: list[str] = []

    def told(address: str) -> None:
        terminal.say(screen, f"to open it in another browser: {address}" if addresses else f"page: {address}")
        addresses.append(address)

    with space.held(), cli_start.bound("127.0.0.1", port) as listening:
        listening.listen()
        app = web.guarded(space, listening.getsockname()[1], told, api.KINDS)
        terminal.say(screen, f"kept in {space.folder}; Ctrl-C ends the page and no run")
        if browser:
            webbrowser.open(addresses[0])
        web.serve(app, listening)
