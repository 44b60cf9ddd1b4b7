"""`fulcrum selfgen`: general data that a model makes itself."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from fulcrum.cli_start import EndpointModel, EndpointUrl, KeyVariable
from fulcrum.errors import ConfigError


def selfgen(
    ctx: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where the rows go; batches are kept beside it until then.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 1000,
    model: Annotated[
        str, typer.Option("--model", help="Who writes: a name, folder, .gguf file or hub id.")
    ] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed makes other rows.")] = 0,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of what is asked; answers are greedy.")] = 1.0,
    language: Annotated[str | None, typer.Option("--language", help="Keep rows in this language only, as en.")] = None,
    endpoint: EndpointUrl = "",
    endpoint_model: EndpointModel = "",
    key: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Let a model write general data: questions and its own answers, or, of a base model, texts in two parts."""
    from fulcrum import clean, store, terminal
    from fulcrum import selfgen as making
    from fulcrum.watch import Watch

    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: the name must end in .jsonl")
    parts = out.with_name(f".{out.name}.parts")
    if out.exists() and parts.exists():  # a kill after the last write: all rows are there
        shutil.rmtree(parts)
        terminal.say(terminal.console(), f"{out}: was finished already")
        return
    if out.exists():
        raise ConfigError(f"{out}: exists already and is not overwritten; name another file")
    if endpoint and not endpoint_model:
        raise ConfigError("--endpoint needs --endpoint-model, the model's name there")
    if language and language not in clean.languages():
        raise ConfigError(f"--language {language}: not a known code; known: {', '.join(clean.languages())}")
    screen = terminal.console()
    if not ctx.obj:
        terminal.silence_libraries()
    recipe = making.Recipe(rows, seed, temperature, language)
    if endpoint:
        from fulcrum.endpoint import Endpoint

        writer: making.Writer = making.OfEndpoint(Endpoint(endpoint, endpoint_model, os.environ.get(key)))
    else:
        from fulcrum import model as models
        from fulcrum.config import TrainSettings

        with terminal.working(screen, f"loading {model}"):
            writer = making.OfModel(models.load(model, TrainSettings()))
    with Watch(screen) as watch:
        made, left_out = making.made(writer, recipe, parts, lambda done, total: watch.count("rows made", done, total))
    described = {**writer.described, **store.plain(recipe), "kept": len(made), "left_out": left_out}
    store.write_json(out.with_suffix(".recipe.json"), described)
    store.write_jsonl(out, ({"prompt": row.question, "completion": row.answer, "family": "selfgen"} for row in made))
    shutil.rmtree(parts)  # last: while it is there, the command may be given again
    terminal.say(screen, f"wrote {out}: {len(made):,} of {rows:,} rows; left out, by reason:")
    terminal.say_rejects(screen, left_out)
    if len(made) < rows:
        terminal.say(screen, "The model repeats itself: another --seed or a higher --temperature may bring more.", "yellow")
