"""The command line: parse, call, print.

Commands import what they need when they run, so that `--help` answers at once. Output goes to
stdout; for `eval` and `chat`, whose output may be piped, progress goes to stderr.
"""

import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fulcrum.cli import anchor, certificate, common, deploy, models, pool
from fulcrum.cli import budget as budget_options
from fulcrum.cli.common import DEBUG, Changes, Group, RunFile, RunFolder, TaskName
from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fulcrum.config.base import DataSource
    from fulcrum.config.settings import Settings
    from fulcrum.core.types import Example
    from fulcrum.experiments.preview import Preview
    from fulcrum.report.run_kinds import RunKind

app = typer.Typer(
    cls=Group,
    name="fulcrum",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes more time to draw the help than all the rest of it
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models.app, name="models")
app.add_typer(pool.app, name="pool")
app.add_typer(anchor.app, name="anchor")

Model = Annotated[str | None, typer.Option("--model", help="Override `model`.")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="Override `output_dir`.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Override `seed`; `compare` takes compare.seeds where set."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that output_dir holds.")]
ForceNew = Annotated[
    bool,
    typer.Option(
        "--force-new",
        help="If output_dir is taken, begin a new run in output_dir-2, -3 ... next to it.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the resolved settings, shares and steps, and train nothing."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        "--preset", metavar="quick|standard|full", help="Run this design; its cost is shown first."
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        "--budget", metavar="TIME", help="As 2h or 90m: run the richest design that fits."
    ),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="A first answer: short for --preset quick --budget 10m."),
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Start a planned run without asking.")]
Jobs = Annotated[
    int, typer.Option("--jobs", min=1, help="Units run at once, each with its part of the threads.")
]
On = Annotated[
    str, typer.Option("--on", metavar="local|ray", help="Local processes, or a Ray cluster.")
]
ArmName = Annotated[
    str | None,
    typer.Option("--arm", help="Arm (default: the first there of tell, mix, sft_anchor, sft)."),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fulcrum {version('fulcrum-llm')}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show tracebacks and what libraries say.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt a language model with few task rows and much general data, and prove what it bought."""
    ctx.obj = debug


@app.command()
def init(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA_FILE", help="Task rows: .jsonl .json .csv .parquet, folder or hub id."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The settings file (default: named after the data)."),
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="Test rows.")] = None,
    model: Annotated[
        str, typer.Option("--model", help="The model to adapt.")
    ] = "smollm2-135m-instruct",
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            metavar="OURS=THEIRS,...",
            help="Name columns, e.g. prompt=text,completion=label.",
        ),
    ] = "",
    json_file: common.JsonFile = None,
) -> None:
    """Look at a data file and write a settings file to start from."""
    from fulcrum.cli import terminal
    from fulcrum.config.base import DataSource
    from fulcrum.core import store
    from fulcrum.data import starter, task_data
    from fulcrum.model import registry

    out = out or Path(f"{starter.stem(data)}.yaml")
    if out.exists():
        raise ConfigError(
            f"{out}: exists already and is not overwritten; name another file with --out"
        )
    registry.locate(model)  # report a misspelt name before anything is read
    if not ctx.obj:
        terminal.silence_data_libraries()
    screen = terminal.console()
    source = DataSource(path=data, columns=starter.read_columns(columns))
    examples, rejects, notes = task_data.read_rows([source])
    task_data.require_rows(examples, rejects, minimum=2)
    kept = f"{len(examples):,} rows kept, {len(rejects):,} rejected"
    terminal.say(screen, f"{data}: {starter.formats(source)}, {kept}")
    if rejects:
        terminal.say_rejects(screen, Counter(reject.reason for reject in rejects))
    terminal.warn(screen, (), notes)
    test_source = None
    if test is not None:
        test_source = source.model_copy(update={"path": test})
        _check_test_rows(test_source, examples)
    guess = starter.guess(examples)
    text = starter.write_yaml(
        guess, train=source, test=test_source, model=model, n_rows=len(examples)
    )
    store.write_bytes(out, text.encode())
    if json_file is not None:
        facts = {
            "format": starter.formats(source),
            "kept": len(examples),
            "rejected": len(rejects),
            "answers": guess.why,
            "reasons": Counter(reject.reason for reject in rejects),
            "notes": notes,
            "rejects": rejects[:5],
            "rows": examples[:5],
        }
        store.write_json(json_file, facts)
    terminal.say(screen, f"answers: {guess.why}; metrics: {', '.join(guess.metrics)}")
    terminal.say(
        screen, f"wrote {out}; put your own words into its anchor, then look: fulcrum check {out}"
    )


def _check_test_rows(source: "DataSource", examples: "Sequence[Example]") -> None:
    """Read test rows, and say how many there are. Raise DataError if they overlap the others."""
    from fulcrum.cli import terminal
    from fulcrum.data import task_data

    test_rows, rejects, notes = task_data.read_rows([source])
    task_data.require_rows(test_rows, rejects, minimum=1)
    task_data.check_overlap(examples, test_rows, "test")
    kept = f"{len(test_rows):,} rows kept, {len(rejects):,} rejected"
    terminal.say(terminal.console(), f"{source.path}: {kept}")
    terminal.warn(terminal.console(), (), notes)


@app.command()
def check(
    ctx: typer.Context,
    run_file: RunFile,
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="How many rows of each task to show.")
    ] = 3,
    changes: Changes = None,
    minutes: Annotated[
        bool, typer.Option("--minutes", help="Measure about how long train and compare would take.")
    ] = False,
    json_file: common.JsonFile = None,
) -> None:
    """Validate the data and show exactly what the model sees.

    Trained tokens are coloured; if the output is piped, they are between [[trained]] and
    [[/trained]].
    """
    from fulcrum.config.settings import load_settings

    settings = load_settings(run_file, changes or ())
    screen = common.ready(ctx, settings)
    from fulcrum.cli import terminal
    from fulcrum.config.arms import own_arm
    from fulcrum.core import store
    from fulcrum.experiments import preview

    with terminal.working(screen, "reading data"):
        seen = preview.open_preview(settings, settings.seed, [own_arm(settings)])
        lengths = preview.lengths(seen)
        trials = preview.trials(seen, [own_arm(settings)])
    terminal.say(
        screen,
        f"general rows chosen for the longest plan: {len(seen.rows.general):,}; "
        "rows not used, by reason:",
    )
    terminal.say_rejects(screen, seen.rows.rejects)
    screen.print(terminal.length_table(lengths), terminal.trial_table(trials))
    terminal.warn(screen, trials, seen.rows.notes)
    _show_rows(screen, seen, rows)
    expected = common.expected(screen, settings) if minutes else []
    if json_file is not None:
        store.write_json(json_file, {**preview.facts(seen, trials, rows), "expected": expected})


def _show_rows(screen: "Console", seen: "Preview", count: int) -> None:
    """Print so many rows of each task and one general row, as the model sees them."""
    from fulcrum.cli import terminal
    from fulcrum.data import encode
    from fulcrum.experiments import preview

    plain = encode.make_format(seen.tokenizer, None)
    samples = []
    for task in seen.rows.tasks:
        form = encode.make_format(plain.tokenizer, task.anchor)
        samples.append((task.name, form, task.train[:count]))
    samples.append(("general", plain, seen.rows.general[: min(count, 1)]))
    for name, form, examples in samples:
        for example in examples:
            terminal.say(screen, f"\n{name}, {example.origin}:", "bold")
            spans = preview.spans(example, form)
            text = terminal.row_text(spans, colour=screen.is_terminal)
            screen.print(text, soft_wrap=True)


@app.command()
def train(
    ctx: typer.Context,
    run_file: RunFile,
    changes: Changes = None,
    model: Model = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    resume: Resume = False,
    force_new: ForceNew = False,
    dry_run: DryRun = False,
) -> None:
    """Train one adapter and compare its scores with the untouched model's."""
    given = Overrides(model, output_dir, seed)
    settings = _settings(run_file, changes, given, force_new=_forced(force_new, resume))
    _launch(ctx, "train", settings, resume=resume, dry_run=dry_run)


@app.command()
def compare(
    ctx: typer.Context,
    run_file: RunFile,
    changes: Changes = None,
    model: Model = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    resume: Resume = False,
    force_new: ForceNew = False,
    dry_run: DryRun = False,
    preset: Preset = "",
    budget: Budget = "",
    quick: Quick = False,
    yes: Yes = False,
    jobs: Jobs = 1,
    on: On = "local",
) -> None:
    """Train every arm on the same rows and say what mixing brought."""
    given = Overrides(model, output_dir, seed)
    settings = _settings(run_file, changes, given, force_new=_forced(force_new, resume))
    request = budget_options.read_request(preset, budget, quick=quick)
    how: dict[str, Any] = {"jobs": jobs, "on": on}
    if budget_options.is_planned(settings, resume=resume):
        settings, how["budget"] = budget_options.read_plan(settings)
    elif request is not None:
        screen = _ready_to_plan(ctx, settings, resume=resume, dry_run=dry_run)
        ask = not (yes or dry_run)
        settings, how["budget"] = budget_options.plan_comparison(screen, settings, request, ask=ask)
    _launch(ctx, "compare", settings, resume=resume, dry_run=dry_run, **how)
    if request is not None and request.preset == "quick" and not dry_run:
        budget_options.answer(Path(settings.output_dir))


def _ready_to_plan(
    ctx: typer.Context, settings: "Settings", *, resume: bool, dry_run: bool
) -> "Console":
    """Return a console once the run folder is free and the model and general data are ready."""
    from fulcrum.core import run_folder

    run_folder.check_free(Path(settings.output_dir), resume=resume)
    return common.ready(ctx, settings, dry_run=dry_run)


@app.command()
def scale(
    ctx: typer.Context,
    run_file: RunFile,
    changes: Changes = None,
    model: Model = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    resume: Resume = False,
    force_new: ForceNew = False,
    dry_run: DryRun = False,
    budget: Budget = "",
    yes: Yes = False,
    jobs: Jobs = 1,
    on: On = "local",
) -> None:
    """Train with more and more general data: does the gain grow smoothly, jump, or not at all?"""
    from fulcrum.mechanism import scale_arms

    given = Overrides(model, output_dir, seed)
    settings = _settings(run_file, changes, given, force_new=_forced(force_new, resume))
    scale_arms.prepared(settings)  # report what cannot be scaled before anything is read
    how: dict[str, Any] = {"jobs": jobs, "on": on}
    if budget_options.is_planned(settings, resume=resume):
        settings, how["budget"] = budget_options.read_plan(settings)
    elif budget:
        seconds = budget_options.parse_duration(budget)
        screen = _ready_to_plan(ctx, settings, resume=resume, dry_run=dry_run)
        ask = not (yes or dry_run)
        settings, how["budget"] = budget_options.plan_scaling(screen, settings, seconds, ask=ask)
    plan = scale_arms.prepared
    _launch(ctx, "scale", settings, resume=resume, dry_run=dry_run, plan=plan, **how)


@app.command()
def quanta(
    ctx: typer.Context,
    run_file: RunFile,
    changes: Changes = None,
    model: Model = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    resume: Resume = False,
    force_new: ForceNew = False,
    dry_run: DryRun = False,
) -> None:
    """Cluster answers by what they would teach: does general data help where it is dense?"""
    from fulcrum.mechanism import scale_arms

    given = Overrides(model, output_dir, seed)
    settings = _settings(run_file, changes, given, force_new=_forced(force_new, resume))
    scale_arms.paired(settings)  # report what cannot be measured before anything is read
    _launch(ctx, "quanta", settings, resume=resume, dry_run=dry_run, plan=scale_arms.paired)


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    run_folder: RunFolder,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Rows to score, their columns named as the task's (default: its test rows).",
        ),
    ] = None,
    arm: ArmName = None,
    task: TaskName = None,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="A,B", help="Metrics (default: the task's own).")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write predictions there (default: RUN_FOLDER/eval)."),
    ] = None,
) -> None:
    """Score a trained adapter on other rows, none of which it was trained on.

    Metrics: nll, exact_match, token_f1, rouge_l, chrf, json_valid, json_fields, accuracy, bleu,
    balanced_accuracy, mcc.
    """
    from fulcrum.cli import terminal
    from fulcrum.stats import metrics as known_metrics

    names = common.names(metrics)
    known_metrics.needs_generation(names)  # report a misspelt name before the model is loaded
    notes = common.notes(ctx)
    from fulcrum.experiments import finished

    with terminal.working(notes, "loading the model and scoring"):
        scored = finished.evaluate(
            run_folder, data=data, arm=arm, task=task, metric_names=names, out=out
        )
    if scored.rejects:
        terminal.say(notes, f"rows of {data} left out, by reason:")
        terminal.say_rejects(notes, scored.rejects)
    for text in scored.notes:
        terminal.say(notes, f"warning: {text}", "yellow")
    title = f"{run_folder}: {data or 'test rows'}"
    terminal.console().print(terminal.score_table(title, scored.scores))
    terminal.say(notes, f"wrote {len(scored.predictions):,} predictions to {scored.file}")


@app.command()
def chat(
    ctx: typer.Context,
    run_folder: RunFolder,
    arm: ArmName = None,
    task: TaskName = None,
    others: Annotated[
        str,
        typer.Option(
            "--with", metavar="A,B", help="Arms to ask too, as base,sft; base: no adapter."
        ),
    ] = "",
) -> None:
    """Talk to a trained adapter, or to several side by side.

    One question a line, typed or piped in; `/anchor off` leaves the anchor out, `/history` shows
    what was said, `/reset` begins anew, `/quit` ends.
    """
    notes = common.notes(ctx)
    from fulcrum.cli import terminal
    from fulcrum.cli.chat import Talk
    from fulcrum.deploy import models

    with terminal.working(notes, "loading the model"):
        speakers, names = models.side_by_side(run_folder, arm, common.names(others), task)
    for text in speakers.notes:
        terminal.say(notes, f"warning: {text}", "yellow")
    anchors = {}
    for name in names:
        anchor = speakers.by_name[name].form.anchor
        text = "no anchor" if anchor is None else f"anchor ({anchor.placement}): {anchor.text}"
        anchors[name] = text
        terminal.say(notes, text if len(names) == 1 else f"{name}: {text}")
    Talk(notes, speakers.speak, anchors).run()


app.command("export")(deploy.export)
app.command("serve")(deploy.serve)


@app.command()
def mix(
    ctx: typer.Context,
    run_file: RunFile,
    out: Annotated[Path, typer.Option("--out", help="File to write, .jsonl or .parquet.")],
    changes: Changes = None,
    model: Model = None,
    seed: Seed = None,
) -> None:
    """Write the exact training stream for use in other trainers."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out {out}: the name must end in .jsonl or .parquet")
    settings = _settings(run_file, changes, Overrides(model, None, seed))
    if settings.mix.select == "gradient":
        raise ConfigError(
            "mix.select: gradient needs gradients, "
            "which only `train` and `compare` take; choose another"
        )
    screen = common.ready(ctx, settings)
    from fulcrum.cli import terminal
    from fulcrum.config.arms import own_arm
    from fulcrum.experiments import preview

    if any(task.anchor is not None and task.anchor.is_auto for task in settings.tasks):
        raise ConfigError(
            "task.anchor is auto, which a run settles; write one "
            "(`fulcrum anchor score` names it, config.yaml of a run has it)"
        )
    if settings.mix.general_per_task == "auto":
        raise ConfigError(
            "mix.general_per_task is auto, which a run settles by a pilot; "
            "set a number (config.yaml of a finished run has one)"
        )
    with terminal.working(screen, "reading data"):
        seen = preview.open_preview(settings, settings.seed, [own_arm(settings)])
        trials = preview.trials(seen, [own_arm(settings)])
        repeats = max(seen.rows.repeats)
        rows = list(preview.stream_rows(seen, repeats))
        preview.write_stream(rows, preview.stream_facts(seen, repeats), out)
    screen.print(terminal.trial_table([trial for trial in trials if trial.repeats == repeats]))
    if settings.mix.repeats == "auto":
        terminal.say(
            screen, f"mix.repeats is auto: written with {repeats}; choose with --set mix.repeats=N"
        )
    terminal.say(
        screen,
        f"wrote {len(rows):,} rows to {out}; keep their order, and do not shuffle them again",
    )


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write report.html of a run, or of a certificate's folder, anew and print what it says."""
    from fulcrum import api
    from fulcrum.cli import terminal

    api.write_report(run_folder)
    terminal.conclude(terminal.console(), run_folder)


@dataclass(frozen=True)
class Overrides:
    """Settings with an option of their own; None: not given."""

    model: str | None
    output_dir: str | None
    seed: int | None


def _settings(
    run_file: Path, changes: Sequence[str] | None, given: Overrides, *, force_new: bool = False
) -> "Settings":
    from fulcrum.config.settings import load_settings
    from fulcrum.core import run_folder

    overrides = {name: value for name, value in asdict(given).items() if value is not None}
    settings = load_settings(run_file, changes or (), overrides)
    if force_new:
        free = run_folder.first_free(Path(settings.output_dir))
        return settings.model_copy(update={"output_dir": str(free)})
    return settings


def _forced(force_new: bool, resume: bool) -> bool:
    if force_new and resume:
        raise ConfigError(
            "--resume continues a run and --force-new begins another; give one of them"
        )
    return force_new


def _launch(
    ctx: typer.Context,
    verb: str,
    settings: "Settings",
    *,
    resume: bool,
    dry_run: bool,
    plan: "Callable[[Settings], Settings] | None" = None,
    **how: Any,
) -> None:
    """Do what `train`, `compare`, `scale` and `quanta` do, or print what they would.

    `plan` returns the settings with the arms that the verb trains, if these are not the settings'
    own.
    """
    screen = common.ready(ctx, settings, dry_run=dry_run)
    from fulcrum import api

    kind = api.KINDS[verb]
    if dry_run:
        _dry_run(screen, settings if plan is None else plan(settings), kind)
        return
    from fulcrum.cli import terminal
    from fulcrum.cli.terminal import Watch
    from fulcrum.model import distributed

    with Watch(screen) if distributed.writes() else nullcontext() as watch:
        api.launch(kind, settings, resume=resume, progress=watch, **how)
    if distributed.writes():
        terminal.conclude(screen, Path(settings.output_dir))


def _dry_run(screen: "Console", settings: "Settings", kind: "RunKind") -> None:
    from fulcrum.cli import terminal
    from fulcrum.config.arms import chosen_arms, own_arm
    from fulcrum.config.settings import dump_settings
    from fulcrum.core import store
    from fulcrum.experiments import preview

    # With dev rows apart there is one adapter at one seed.
    chosen = [own_arm(settings)] if kind.has_dev_apart else chosen_arms(settings)
    seeds = (settings.seed,) if kind.has_dev_apart else tuple(settings.seeds)
    with terminal.working(screen, "reading data"):
        seen = preview.open_preview(settings, seeds[0], chosen, dev_apart=kind.has_dev_apart)
        trials = preview.trials(seen, chosen)
    terminal.say(terminal.console(), dump_settings(settings).rstrip())
    screen.print(terminal.trial_table(trials))
    terminal.warn(screen, trials, seen.rows.notes)
    if Path(settings.output_dir, store.MANIFEST).exists():
        terminal.say(
            screen,
            f"warning: {settings.output_dir} holds a run already; --resume continues it",
            "yellow",
        )
    runs = len(trials) * len(seeds)
    steps = sum(trial.steps for trial in trials) * len(seeds)
    parts = []
    if len(seeds) > 1:
        parts.append(f"{len(seeds)} seeds")
    counted = f"{_plural(runs, 'training run')}, {_plural(steps, 'step')} in all"
    if kind.selection == "cross-validation":
        folds = settings.compare.folds
        parts.append(f"each tried by {folds}-fold cross-validation, the best trained on all rows")
        counted = f"up to {counted}"
    text = ": ".join([*parts, counted])
    terminal.say(screen, f"{text}; nothing was trained (--dry-run)")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


for verb in (pool.selfgen, certificate.certify, certificate.verify, deploy.ui):
    app.command()(verb)


def main() -> None:
    """Run the command line; the console entry point.

    Terminals that lack a character get its number: no command fails because of what a row holds.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fulcrum")
