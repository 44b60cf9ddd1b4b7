"""`fulcrum certify` and `fulcrum verify`: an honest number for outcomes that any trainer made, and its check."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fulcrum.errors import ConfigError

if TYPE_CHECKING:
    from fulcrum.outcomes import Outcomes

REFERENCES = ("kshot", "sft", "sft_anchor", "sft_kl", "soup", "tfidf", "base_anchor", "base")  # arms without general data
# Metrics whose names hold one of these are better when lower, unless told otherwise.
LOWER_IS_BETTER = ("nll", "loss", "perplexity", "error", "brier", "mae", "mse", "wer", "cer", "ter", "edit_distance")

Names = list[str] | None


def certify(
    file: Annotated[Path, typer.Argument(metavar="OUTCOMES.jsonl", help="One line for each test row of each cell.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the certificate and the outcomes.")] = Path("certificate"),
    arm: Annotated[str, typer.Option("--arm", help="The arm whose gain is asked for.")] = "tell",
    reference: Annotated[
        Names,
        typer.Option("--reference", help="An arm without general data; repeatable. Default: those there with known names."),
    ] = None,
    metric: Annotated[
        Names, typer.Option("--metric", help="Repeatable, the first decides. Needed where the file has several.")
    ] = None,
    lower: Annotated[
        Names,
        typer.Option("--lower-is-better", metavar="METRIC", help="Repeatable; beside nll, loss, perplexity, wer and such."),
    ] = None,
    higher: Annotated[Names, typer.Option("--higher-is-better", metavar="METRIC", help="Repeatable; against its name.")] = None,
    task: Annotated[str, typer.Option("--task", help="What the task is called.")] = "task",
    draws: Annotated[int, typer.Option("--draws", min=200, max=100_000, help="Draws for intervals.")] = 2000,
) -> None:
    """Say from outcomes that any trainer made what general data bought: difference, row saving, row gain, with intervals.

    A line is {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "outcome": 0.5}, with "metric", "group" (rows that belong
    together) and "weight" where needed: a score is the sum of outcomes over the sum of weights, so that summed nats with the
    number of answer tokens as weight are nats per token. {"arm": "sft", "size": 64,
    "seed": 0, "dev": 0.7, "tokens": 5321} says by what score a cell was selected (higher is better; without it arms are
    selected on test, which favours the reference) and how many tokens its task rows have.
    """
    from fulcrum import certificate, outcomes, store, terminal
    from fulcrum.certificate import Question

    for name in (certificate.FILE, certificate.OUTCOMES):
        if (out / name).exists():
            raise ConfigError(f"{out / name}: exists already and is not overwritten; name another folder with --out")
    found = outcomes.read(file)
    known = [name for name in found.values if not certificate.is_side_effect(name)]
    if not metric and len(known) > 1:
        raise ConfigError(f"{file} has the metrics {', '.join(known)}; say with --metric which count, the deciding one first")
    metrics = tuple(metric or known)
    turned = tuple(name for name in metrics if name in (lower or ()) or (_lower_by_name(name) and name not in (higher or ())))
    question = Question(arm, tuple(reference or _references(found)), metrics, turned, task, draws)
    screen = terminal.console()
    with terminal.working(screen, "computing intervals"):
        sealed = certificate.write(out, found, question, {"outcomes file": store.file_sha256(file)})
    terminal.say(screen, sealed["headline"], "bold")
    for answer in sealed["answers"]:
        for table in tables(answer):
            screen.print(table)
        more = answer["more_rows"]
        terminal.say(screen, f"{more['rows']} more labelled rows, or general data: {more['answer']}")
        if answer["selected_on"] != "dev":
            terminal.say(screen, f"The reference was selected on {answer['selected_on']}.")
    terminal.say(screen, f"wrote {out / certificate.FILE}; check it any time: fulcrum verify {out / certificate.FILE}")


def _lower_by_name(name: str) -> bool:
    return any(part in LOWER_IS_BETTER for part in re.split(r"[^a-z]+", name.casefold())) or name.casefold() in LOWER_IS_BETTER


def _references(found: "Outcomes") -> list[str]:
    known = {arm for cells in found.values.values() for arm, _, _ in cells}
    chosen = [name for name in REFERENCES if name in known]
    if not chosen:
        raise ConfigError(
            f"none of the arms ({', '.join(sorted(known))}) is known to use no general data; name it with --reference"
        )
    return chosen


def tables(answer: dict[str, Any]) -> list[Any]:
    """One metric of a certificate as tables for a terminal."""
    from fulcrum import terminal

    sign = -1 if answer["lower_is_better"] else 1
    sizes = sorted({point["size"] for point in answer["points"]})
    arms = list(dict.fromkeys(point["arm"] for point in answer["points"]))
    scores = {(point["arm"], point["size"]): point["score"] for point in answer["points"]}
    title = f"{answer['metric']} by task rows ({'lower' if answer['lower_is_better'] else 'higher'} is better), 95% intervals"
    rows = [[arm, *(_interval(scores.get((arm, size)), sign) for size in sizes)] for arm in arms]
    found = [terminal.grid(title, ["arm", *map(str, sizes)], rows)]
    factors = [["row saving", str(answer["rows"]), *(_factor(factor) for factor in answer["saving"].values())]]
    for gain in answer["gain"]:
        factors.append(["row gain", str(gain["size"]), *(_factor(gain[unit]) for unit in answer["saving"])])
    if not answer["identifiable"]:
        factors = [[*row[:2], *("not identifiable" for _ in row[2:])] for row in factors]
    found.append(
        terminal.grid("How far the rows went", ["factor", "at", *(f"in {unit}" for unit in answer["saving"])], factors)
    )
    contrasts = [["difference to the reference", _interval(answer["difference"], sign)]]
    contrasts += [[part["name"], _interval(part, sign)] for part in answer["attribution"]]
    found.append(terminal.grid(f"What it comes from, at {answer['rows']} rows", ["part", "difference"], contrasts))
    return found


def _interval(ends: dict[str, Any] | None, sign: int) -> str:
    if ends is None:
        return ""
    if ends["low"] is None or ends["high"] is None:
        return f"{sign * ends['estimate']:.3f}"
    low, high = sorted((sign * ends["low"], sign * ends["high"]))
    return f"{sign * ends['estimate']:.3f} [{low:.3f}, {high:.3f}]"


def _factor(factor: dict[str, Any]) -> str:
    def end(value: Any) -> str:
        if value in ("under", "over"):
            return f"<{factor['least']:.2g}" if value == "under" else f"≥{factor['most']:.3g}"
        return "?" if value is None else f"{value:.2f}"

    return f"{end(factor['estimate'])} [{end(factor['low'])}, {end(factor['high'])}]"


def verify(
    file: Annotated[Path, typer.Argument(metavar="CERTIFICATE.json", help="A certificate, its outcomes beside it.")],
) -> None:
    """Compute every number of a certificate again from the stored outcomes, and say what does not match."""
    from fulcrum import certificate, terminal

    file = file / certificate.FILE if file.is_dir() else file
    screen = terminal.console()
    with terminal.working(screen, "computing intervals"):
        wrong, unchecked = certificate.verify(file)
    for text in unchecked:
        terminal.say(screen, f"not checked: {text}", "yellow")
    for text in wrong:
        terminal.say(screen, text, "red")
    if wrong:
        terminal.fail(
            f"{file}: {len(wrong)} thing{'s' if len(wrong) > 1 else ''} that do{'' if len(wrong) > 1 else 'es'} not match"
        )
        raise typer.Exit(2)
    terminal.say(
        screen,
        f"{file}: every number follows from the outcomes beside it. (The seal is no signature: it does not say who made it.)",
    )
