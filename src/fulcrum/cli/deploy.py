"""`fulcrum export`, `serve` and `ui`: adapters for other programs, for clients, on a page."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.cli import common
from fulcrum.cli.common import RunFolder, TaskName
from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from fulcrum.deploy.check import Check
    from fulcrum.deploy.models import ServedModels

MISSING = "the server's packages are missing: pip install 'fulcrum-llm[serve]'"
PORT = 8642  # of the page


def export(
    ctx: typer.Context,
    run_folder: RunFolder,
    to: Annotated[
        str, typer.Option("--to", metavar="adapter|merged|gguf|modelfile", help="What to write.")
    ],
    arm: Annotated[
        str | None,
        typer.Option("--arm", help="Arm (default: the first of tell, mix, sft_anchor, sft)."),
    ] = None,
    task: TaskName = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write (default: in RUN_FOLDER/export).")
    ] = None,
    quantization: Annotated[
        str, typer.Option("--quantization", help="Of gguf: f16, q8_0; others need --llama-cpp.")
    ] = "q8_0",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="bfloat16|float16|float32", help="Of merged weights.")
    ] = "bfloat16",
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="Dev rows on which it is scored again; 0: none.")
    ] = 32,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", help="Folder of llama.cpp, for what needs it.")
    ] = None,
) -> None:
    """Write an adapter for other programs, and score it again as they load it.

    adapter: PEFT. merged: one folder for Transformers and vLLM. gguf: llama.cpp and Ollama.
    modelfile: an adapter for Ollama. The anchor is in the chat template of each.
    """
    notes = common.notes(ctx)
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.deploy import export as exporting

    wanted = exporting.Wanted(to, quantization.lower(), dtype, llama_cpp)
    with Watch(notes) as watch:
        watch.stage("loading the model")
        exported = exporting.export(
            run_folder, wanted, arm=arm, task=task, out=out, rows=rows, count=watch.count
        )
    terminal.say(terminal.console(), f"wrote {exported.folder}: {', '.join(exported.files)}")
    _show_check(exported.check)


def _show_check(check: "Check | None") -> None:
    from fulcrum.cli import terminal

    screen = terminal.console()
    if check is None:
        terminal.say(screen, "not scored again (--rows 0)", "yellow")
        return
    before, after = check.nats
    lines = [("nats per answer token", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")]
    for name, before, after in check.scores:
        lines.append((name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"))
    title = f"Scored again by {check.reader}: {check.rows} rows, {check.tokens} answer tokens"
    screen.print(terminal.grid(title, ("", "as trained", "exported", "difference"), lines))
    same = ""
    if check.same_answers is not None:
        same = f"; {check.same_answers:.0%} of the answers are equal"
    terminal.say(
        screen,
        f"likeliest tokens agree in {check.agreement:.1%}{same}; "
        "the prompts' tokens are those of training",
    )


def serve(
    ctx: typer.Context,
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Finished runs of one base model.")
    ],
    arm: Annotated[
        str, typer.Option("--arm", metavar="A,B", help="Arms to serve (default: all of them).")
    ] = "",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers under way at once.")] = 32,
    waiting: Annotated[
        int, typer.Option("--waiting", min=0, help="Questions that may wait; more get 429.")
    ] = 256,
    context: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of a prompt with its answer; memory.")
    ] = 2048,
    threads: Annotated[
        int,
        typer.Option("--threads", min=0, help="Of the model; 0: all cores but one, for requests."),
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer that may be asked for.")
    ] = 1024,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, help="Bytes that a request may have.")
    ] = 1_000_000,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds that an answer may take.")
    ] = 120.0,
    grace: Annotated[
        int,
        typer.Option("--grace", min=0, help="Seconds that open answers may go on after Ctrl-C."),
    ] = 30,
    key_variable: common.KeyVariable = "FULCRUM_API_KEY",
) -> None:
    """Serve trained adapters to OpenAI's clients; the anchor is put in by the server.

    Models are called by their arms (tell, sft ...), and `base` is the model without an adapter.
    Answers are greedy unless a temperature is asked for.
    """
    from fulcrum.deploy.openai_api import LOOPBACK

    key = os.environ.get(key_variable) or None
    is_local = host in LOOPBACK
    if key is None and not is_local:
        raise ConfigError(
            f"--host {host}: others could ask too; "
            f"set a key in {key_variable}, or listen on 127.0.0.1"
        )
    listening = common.bind(host, port)
    notes = common.notes(ctx)
    try:
        from fulcrum.deploy import server
    except ImportError as error:
        raise ConfigError(f"{MISSING} ({error})") from error
    from fulcrum.cli import terminal
    from fulcrum.deploy import models
    from fulcrum.deploy.engine import Engine

    with terminal.working(notes, "loading the model"):
        speakers = models.load(run_folders, common.names(arm))
        engine = Engine(
            speakers.loaded,
            speakers.by_name,
            slots=slots,
            waiting=waiting,
            context=context,
            threads=threads or max(1, (os.cpu_count() or 1) - 1),
        )
    limits = server.Limits(max_body, max_tokens, timeout)
    hosts = LOOPBACK if is_local else ()
    app = server.application(engine, limits=limits, key=key, hosts=hosts)
    listening.listen()  # clients that connect from now on are answered
    _show_models(speakers, host, listening.getsockname()[1])
    # uvicorn raises the signal that ended it once more when it is done.
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    server.run(app, engine, listening, grace)


def _show_models(speakers: "ServedModels", host: str, port: int) -> None:
    from fulcrum.cli import terminal

    notes = terminal.console(stderr=True)
    for text in speakers.notes:
        terminal.say(notes, f"warning: {text}", "yellow")
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}"
    terminal.say(terminal.console(), f"listening on {address}")
    models = ", ".join(speakers.by_name)
    terminal.say(notes, f"models: {models}; base URL for clients: {address}/v1; Ctrl-C stops")


def _leave(number: int, frame: "FrameType | None") -> None:
    sys.exit(0)


def ui(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where data, settings and runs of the page are kept.")
    ] = Path("fulcrum-ui"),
    runs: Annotated[
        list[Path] | None,
        typer.Option("--runs", metavar="FOLDER", help="Show the runs below it too; repeatable."),
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option("--model", metavar="FOLDER", help="A model that runs may use; repeatable."),
    ] = None,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Where it listens on this machine; 0: any."),
    ] = PORT,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Open a page for the whole way: data, settings, plan, run, certificate, chat, export.

    It listens on this machine alone. Runs are processes of their own: they go on when the page or
    its server is closed.
    """
    try:
        from fulcrum.web import app as web_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"the page needs {error.name}: pip install 'fulcrum-llm[ui]'") from None
    import webbrowser

    from fulcrum import api
    from fulcrum.cli import terminal
    from fulcrum.web.workspace import Workspace

    screen = terminal.console()
    space = Workspace(folder, runs or (), model or ())
    addresses: list[str] = []

    def show(address: str) -> None:
        label = "to open it in another browser" if addresses else "page"
        terminal.say(screen, f"{label}: {address}")
        addresses.append(address)

    with space.held(), common.bind("127.0.0.1", port) as listening:
        listening.listen()
        app = web_app.guarded(space, listening.getsockname()[1], show, api.KINDS)
        terminal.say(screen, f"kept in {space.folder}; Ctrl-C ends the page and no run")
        if browser:
            webbrowser.open(addresses[0])
        web_app.serve(app, listening)
