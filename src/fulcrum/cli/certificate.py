"""`fulcrum certify` and `verify`: an honest number for any trainer's outcomes, and its check."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from fulcrum.stats.certificate import Answer
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
            "--metric", help="Repeatable, the first decides. Needed if the file has several."
        ),
    ] = None,
    lower: Annotated[
        Names,
        typer.Option(
            "--lower-is-better",
            metavar="METRIC",
            help="Repeatable; in addition to nll, loss, perplexity, wer and such.",
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
    """Say from any trainer's outcomes what general data bought, with intervals.

    A line is {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "outcome": 0.5}, with "metric",
    "group" (rows that belong together) and "weight" where needed: a score is the sum of outcomes
    over the sum of weights, so that summed nats with the number of answer tokens as weight are nats
    per token. {"arm": "sft", "size": 64, "seed": 0, "dev": 0.7, "tokens": 5321} says by what score
    a cell was selected (higher is better; without it arms are selected on test, which favours the
    reference) and how many tokens its task rows have.
    """
    from fulcrum.cli import terminal
    from fulcrum.core import store
    from fulcrum.report import certificate_page, wording
    from fulcrum.stats import certificate, certification, outcomes
    from fulcrum.stats.certificate import Inputs, Question

    for name in (certificate.FILE, outcomes.FILE, certificate_page.REPORT):
        if (out / name).exists():
            raise ConfigError(
                f"{out / name}: exists already and is not overwritten; "
                "name another folder with --out"
            )
    read = outcomes.read(file)
    metrics = tuple(metric or _metrics(read, file))
    lower_is_better = []
    for name in metrics:
        by_name = _is_lower_by_name(name) and name not in (higher or ())
        if by_name or name in (lower or ()):
            lower_is_better.append(name)
    references = tuple(reference or _references(read))
    question = Question(arm, references, metrics, tuple(lower_is_better), task, draws)
    screen = terminal.console()
    with terminal.working(screen, "computing intervals"):
        inputs = Inputs(outcomes_file=store.file_sha256(file))
        sealed = certification.write(out, read, question, inputs)
    terminal.say(screen, wording.headline(sealed), "bold")
    for answer in sealed.answers:
        _show_answer(answer)
    terminal.say(screen, f"report: {certificate_page.write(out)}")
    sealed_file = out / certificate.FILE
    terminal.say(screen, f"wrote {sealed_file}; check it any time: fulcrum verify {sealed_file}")


def _metrics(read: "Outcomes", file: Path) -> list[str]:
    """Return the only metric of outcomes. Raise ConfigError if there are several."""
    from fulcrum.stats import certificate

    names = [name for name in read.values if not certificate.is_side_effect(name)]
    if len(names) > 1:
        raise ConfigError(
            f"{file} has the metrics {', '.join(names)}; "
            "say with --metric which count, the deciding one first"
        )
    return names


def _is_lower_by_name(name: str) -> bool:
    folded = name.casefold()
    if folded in LOWER_IS_BETTER:
        return True
    return any(part in LOWER_IS_BETTER for part in re.split(r"[^a-z]+", folded))


def _references(read: "Outcomes") -> list[str]:
    """Return the arms known to use no general data. Raise ConfigError if there are none."""
    from fulcrum.config.arms import ARMS

    arms = set()
    for cells in read.values.values():
        arms |= {arm for arm, _, _ in cells}
    references = [name for name, arm in ARMS.items() if arm.is_reference and name in arms]
    if not references:
        raise ConfigError(
            f"none of the arms ({', '.join(sorted(arms))}) is known to use no general data; "
            "name it with --reference"
        )
    return references


def _show_answer(answer: "Answer") -> None:
    from fulcrum.cli import terminal
    from fulcrum.report import wording

    screen = terminal.console()
    for table in terminal.certificate_tables(answer):
        screen.print(table)
    short, _, full = wording.more_rows(answer)
    rows = answer.more_rows.rows
    terminal.say(screen, f"{rows} more labelled rows, or general data? {short}. {full}")
    if answer.selected_on == "test":
        terminal.say(screen, f"The reference was selected by {wording.selected_by(answer)}.")


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
    """Compare a run with its manifest, and compute every number of certificates again."""
    from fulcrum import api
    from fulcrum.cli import terminal
    from fulcrum.core import store
    from fulcrum.stats import certificate

    is_run = (path / store.MANIFEST).is_file()
    if again and not is_run:
        raise ConfigError(
            f"--again: {path} is not a run folder; "
            "give the output_dir of `fulcrum train` or `compare`"
        )
    screen = terminal.console()
    with terminal.working(screen, "reading hashes, computing intervals"):
        wrong, unchecked = api.verify(path)
    if again:
        from fulcrum.cli.terminal import Watch

        with Watch(screen) as watch:
            repeated = api.repeat(path, watch)
        wrong = wrong + repeated.wrong
        unchecked = unchecked + repeated.unchecked
    for text in unchecked:
        terminal.say(screen, f"not checked: {text}", "yellow")
    for text in wrong:
        terminal.say(screen, text, "red")
    if wrong:
        count = "1 thing that does" if len(wrong) == 1 else f"{len(wrong)} things that do"
        terminal.fail(f"{path}: {count} not match")
        raise typer.Exit(2)
    confirmed = []
    if again:
        confirmed.append("made again, it gave the same bits")
    if is_run:
        confirmed.append("every file that the manifest names is as the run made it")
    if not is_run or any(path.rglob(certificate.FILE)):
        confirmed.append(
            "every number follows from the outcomes next to it "
            "(the seal is no signature: it does not say who made it)"
        )
    terminal.say(screen, f"{path}: {'; '.join(confirmed)}")
