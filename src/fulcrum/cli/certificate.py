"""`fulcrum certify` and `fulcrum verify`: an honest number for outcomes that any trainer made, and its check."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from fulcrum.stats.outcomes import Outcomes

# Metrics whose names hold one of these are better when lower, unless told otherwise.
LOWER_IS_BETTER = (
    "nll",
    "loss",
    "perplexity",
    "error",
    "brier",
    "mae",
    "mse",
    "wer",
    "cer",
    "ter",
    "edit_distance",
)

Names = list[str] | None


def certify(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="OUTCOMES.jsonl[.gz]", help="One line for each test row of each cell."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the certificate and the outcomes.")
    ] = Path("certificate"),
    arm: Annotated[str, typer.Option("--arm", help="The arm whose gain is asked for.")] = "tell",
    reference: Annotated[
        Names,
        typer.Option(
            "--reference",
            help="An arm without general data; repeatable. Default: those there with known names.",
        ),
    ] = None,
    metric: Annotated[
        Names,
        typer.Option(
            "--metric", help="Repeatable, the first decides. Needed where the file has several."
        ),
    ] = None,
    lower: Annotated[
        Names,
        typer.Option(
            "--lower-is-better",
            metavar="METRIC",
            help="Repeatable; beside nll, loss, perplexity, wer and such.",
        ),
    ] = None,
    higher: Annotated[
        Names,
        typer.Option("--higher-is-better", metavar="METRIC", help="Repeatable; against its name."),
    ] = None,
    task: Annotated[str, typer.Option("--task", help="What the task is called.")] = "task",
    draws: Annotated[
        int, typer.Option("--draws", min=200, max=100_000, help="Draws for intervals.")
    ] = 2000,
) -> None:
    """Say from outcomes that any trainer made what general data bought: difference, row saving, row gain, with intervals.

    A line is {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "outcome": 0.5}, with "metric", "group" (rows that belong
    together) and "weight" where needed: a score is the sum of outcomes over the sum of weights, so that summed nats with the
    number of answer tokens as weight are nats per token. {"arm": "sft", "size": 64,
    "seed": 0, "dev": 0.7, "tokens": 5321} says by what score a cell was selected (higher is better; without it arms are
    selected on test, which favours the reference) and how many tokens its task rows have.
    """
    from fulcrum.cli import terminal
    from fulcrum.core import store
    from fulcrum.report import certificate_page, wording
    from fulcrum.stats import certificate, certification, outcomes
    from fulcrum.stats.certificate import Inputs, Question

    for name in (certificate.FILE, outcomes.FILE, certificate_page.REPORT):
        if (out / name).exists():
            raise ConfigError(
                f"{out / name}: exists already and is not overwritten; name another folder with --out"
            )
    found = outcomes.read(file)
    known = [name for name in found.values if not certificate.is_side_effect(name)]
    if not metric and len(known) > 1:
        raise ConfigError(
            f"{file} has the metrics {', '.join(known)}; say with --metric which count, the deciding one first"
        )
    metrics = tuple(metric or known)
    turned = tuple(
        name
        for name in metrics
        if name in (lower or ()) or (_lower_by_name(name) and name not in (higher or ()))
    )
    question = Question(arm, tuple(reference or _references(found)), metrics, turned, task, draws)
    screen = terminal.console()
    with terminal.working(screen, "computing intervals"):
        sealed = certification.write(
            out, found, question, Inputs(outcomes_file=store.file_sha256(file))
        )
    terminal.say(screen, wording.headline(sealed), "bold")
    for answer in sealed.answers:
        for table in terminal.certificate_tables(answer):
            screen.print(table)
        short, _, full = wording.more_rows(answer)
        rows = answer.more_rows.rows
        terminal.say(screen, f"{rows} more labelled rows, or general data? {short}. {full}")
        if answer.selected_on == "test":
            terminal.say(screen, f"The reference was selected by {wording.selected_by(answer)}.")
    terminal.say(screen, f"report: {certificate_page.write(out)}")
    terminal.say(
        screen,
        f"wrote {out / certificate.FILE}; check it any time: fulcrum verify {out / certificate.FILE}",
    )


def _lower_by_name(name: str) -> bool:
    return (
        any(part in LOWER_IS_BETTER for part in re.split(r"[^a-z]+", name.casefold()))
        or name.casefold() in LOWER_IS_BETTER
    )


def _references(found: "Outcomes") -> list[str]:
    from fulcrum.config.arms import ARMS

    known = {arm for cells in found.values.values() for arm, _, _ in cells}
    chosen = [name for name, arm in ARMS.items() if arm.is_reference and name in known]
    if not chosen:
        raise ConfigError(
            f"none of the arms ({', '.join(sorted(known))}) is known to use no general data; name it with --reference"
        )
    return chosen


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_FOLDER|CERTIFICATE.json",
            help="A run folder, or a certificate next to its outcomes.",
        ),
    ],
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Make the run again, in a folder that is then dropped, and compare the bits.",
        ),
    ] = False,
) -> None:
    """Compare what a run made with its manifest, and compute every number of certificates again from their outcomes."""
    from fulcrum import api
    from fulcrum.cli import terminal
    from fulcrum.core import store
    from fulcrum.stats import certificate

    is_run = (path / store.MANIFEST).is_file()
    if again and not is_run:
        raise ConfigError(
            f"--again: {path} is not a run folder; give the output_dir of `fulcrum train` or `compare`"
        )
    screen = terminal.console()
    with terminal.working(screen, "reading hashes, computing intervals"):
        wrong, unchecked = api.verify(path)
    if again:
        from fulcrum.cli.terminal import Watch

        with Watch(screen) as watch:
            found = api.repeat(path, watch)
        wrong, unchecked = wrong + found.wrong, unchecked + found.unchecked
    for text in unchecked:
        terminal.say(screen, f"not checked: {text}", "yellow")
    for text in wrong:
        terminal.say(screen, text, "red")
    if wrong:
        terminal.fail(
            f"{path}: {len(wrong)} thing{'s' if len(wrong) > 1 else ''} that do{'' if len(wrong) > 1 else 'es'} not match"
        )
        raise typer.Exit(2)
    said = []
    if is_run:
        said.append("every file that the manifest names is as the run made it")
    if not is_run or any(path.rglob(certificate.FILE)):
        said.append(
            "every number follows from the outcomes next to it (the seal is no signature: it does not say who made it)"
        )
    if again:
        said.insert(0, "made again, it gave the same bits")
    terminal.say(screen, f"{path}: {'; '.join(said)}")
