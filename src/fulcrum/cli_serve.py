"""`fulcrum serve`: the adapters of some runs behind an OpenAI-compatible address."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum import cli_start
from fulcrum.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

MISSING = "the server's packages are missing: pip install 'fulcrum-llm[serve]'"


def serve(
    ctx: typer.Context,
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN_FOLDER...", help="Finished runs of one base model.")],
    arm: Annotated[str, typer.Option("--arm", metavar="A,B", help="Arms to serve (default: all of them).")] = "",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers under way at once.")] = 32,
    waiting: Annotated[int, typer.Option("--waiting", min=0, help="Questions that may wait; more get 429.")] = 256,
    context: Annotated[int, typer.Option("--context", min=16, help="Tokens of a prompt with its answer; memory.")] = 2048,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of the model; 0: all cores but one, for requests.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer that may be asked for.")] = 1024,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes that a request may have.")] = 1_000_000,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that an answer may take.")] = 120.0,
    grace: Annotated[int, typer.Option("--grace", min=0, help="Seconds that open answers may go on after Ctrl-C.")] = 30,
    key_variable: cli_start.KeyVariable = "FULCRUM_API_KEY",
) -> None:
    """Serve trained adapters to OpenAI's clients; the anchor is put in by the server.

    Models are called by their arms (tell, sft ...), and `base` is the model without an adapter. Answers are greedy unless a
    temperature is asked for.
    """
    from fulcrum.openai_api import LOOPBACK

    key = os.environ.get(key_variable) or None
    if host not in LOOPBACK and key is None:
        raise ConfigError(f"--host {host}: others could ask too; set a key in {key_variable}, or listen on 127.0.0.1")
    place = cli_start.bound(host, port)
    notes = cli_start.notes(ctx)
    try:
        from fulcrum import serve as serving
    except ImportError as error:
        raise ConfigError(f"{MISSING} ({error})") from error
    from fulcrum import speakers, terminal
    from fulcrum.engine import Engine

    with terminal.working(notes, "loading the model"):
        found = speakers.load(run_folders, cli_start.names(arm))
        engine = Engine(
            found.loaded,
            found.known,
            slots=slots,
            waiting=waiting,
            context=context,
            threads=threads or max(1, (os.cpu_count() or 1) - 1),
        )
    for text in found.notes:
        terminal.say(notes, f"warning: {text}", "yellow")
    limits = serving.Limits(max_body, max_tokens, timeout)
    app = serving.application(engine, limits=limits, key=key, hosts=LOOPBACK if host in LOOPBACK else ())
    where = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
    place.listen()  # from now on who connects is answered
    terminal.say(terminal.console(), f"listening on {where}")
    terminal.say(notes, f"models: {', '.join(found.known)}; base URL for clients: {where}/v1; Ctrl-C stops")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the one that ended it once more when it is done
        signal.signal(number, _leave)
    serving.run(app, engine, place, grace)


def _leave(number: int, frame: "FrameType | None") -> None:
    sys.exit(0)
