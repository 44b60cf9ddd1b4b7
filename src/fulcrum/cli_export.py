"""`fulcrum export`: an adapter for other programs, scored again as they load it."""

from pathlib import Path
from typing import Annotated

import typer

from fulcrum import cli_start
from fulcrum.cli_start import RunFolder, TaskName


def export(
    ctx: typer.Context,
    run_folder: RunFolder,
    to: Annotated[str, typer.Option("--to", metavar="adapter|merged|gguf|modelfile", help="What to write.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Arm (default: the first of tell, mix, sft_anchor, sft).")] = None,
    task: TaskName = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write (default: in RUN_FOLDER/export).")] = None,
    quantization: Annotated[str, typer.Option("--quantization", help="Of gguf: f16, q8_0; others need --llama-cpp.")] = "q8_0",
    dtype: Annotated[str, typer.Option("--dtype", metavar="bfloat16|float16|float32", help="Of merged weights.")] = "bfloat16",
    rows: Annotated[int, typer.Option("--rows", min=0, help="Dev rows on which it is scored again; 0: none.")] = 32,
    llama_cpp: Annotated[Path | None, typer.Option("--llama-cpp", help="Folder of llama.cpp, for what needs it.")] = None,
) -> None:
    """Write an adapter for other programs, and score it again as they load it.

    adapter: PEFT. merged: one folder for Transformers and vLLM. gguf: llama.cpp and Ollama. modelfile: an adapter for Ollama.
    The anchor is in the chat template of each.
    """
    notes = cli_start.notes(ctx)
    from fulcrum import shipping, terminal
    from fulcrum.watch import Watch

    wanted = shipping.Wanted(to, quantization.lower(), dtype, llama_cpp)
    with Watch(notes) as watch:
        watch.stage("loading the model")
        found = shipping.export(run_folder, wanted, arm=arm, task=task, out=out, rows=rows, count=watch.count)
    screen = terminal.console()
    terminal.say(screen, f"wrote {found.folder}: {', '.join(found.files)}")
    if found.check is None:
        terminal.say(screen, "not scored again (--rows 0)", "yellow")
        return
    check = found.check
    lines = [("nats per answer token", f"{check.nats[0]:.4f}", f"{check.nats[1]:.4f}", f"{check.nats[1] - check.nats[0]:+.4f}")]
    lines += [(name, f"{one:.3f}", f"{other:.3f}", f"{other - one:+.3f}") for name, one, other in check.scores]
    title = f"Scored again by {check.reader}: {check.rows} rows, {check.tokens} answer tokens"
    screen.print(terminal.grid(title, ("", "as trained", "exported", "difference"), lines))
    same = "" if check.same_answers is None else f"; {check.same_answers:.0%} of the answers are equal"
    terminal.say(screen, f"likeliest tokens agree in {check.agreement:.1%}{same}; the prompts' tokens are those of training")
