"""`--preset`, `--budget` and `--quick`: show what will run and ask; say what `quick` found."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulcrum.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fulcrum.config.settings import Settings
    from fulcrum.experiments.budget import Design, Plan
    from fulcrum.stats.certificate import Budget

_QUICK_SECONDS = 600.0


@dataclass(frozen=True)
class Request:
    """What the options ask for.

    option: the one that was given, for messages
    preset: None: the richest that fits
    seconds: None: no limit
    """

    option: str
    preset: str | None
    seconds: float | None


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as 2h, 1h30m, 90m or 600s. Raise ConfigError."""
    pattern = r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+)s)?"
    match = re.fullmatch(pattern, text.strip())
    seconds = 0.0
    if match:
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if seconds <= 0:
        raise ConfigError(
            f"--budget {text!r}: write hours, minutes and seconds as 2h, 1h30m, 90m or 600s"
        )
    return seconds


def read_request(preset: str, duration: str, *, quick: bool) -> Request | None:
    """Return what the options ask for; None if none of them is given.

    `--quick` is short for `--preset quick --budget 10m`.
    """
    if not (preset or duration or quick):
        return None
    from fulcrum.experiments import presets

    seconds = parse_duration(duration) if duration else None
    if quick:
        if preset not in ("", presets.QUICK.name):
            raise ConfigError(
                f"--quick stands for --preset quick; leave it out, or --preset {preset}"
            )
        return Request("--quick", presets.QUICK.name, seconds or _QUICK_SECONDS)
    if preset:
        return Request("--preset", presets.preset_named(preset).name, seconds)
    return Request("--budget", None, seconds)


def plan_comparison(
    screen: "Console", settings: "Settings", request: Request, *, ask: bool
) -> tuple["Settings", "Budget"]:
    """Show the chosen design and have it agreed to; return its settings and the budget to keep.

    Raise ConfigError if nothing fits or nobody agrees.
    """
    from fulcrum.cli import terminal
    from fulcrum.experiments import budget
    from fulcrum.stats.certificate import Budget

    with terminal.working(screen, "measuring speed on a few rows"):
        plan = budget.plan(settings, preset=request.preset, seconds=request.seconds)
    screen.print(_preset_table(plan))
    design = plan.design
    _show_choice(screen, f"Preset {design.preset}", design.seconds, request.seconds, plan.left_out)
    if ask:
        _confirm(request.option)
    return design.settings, Budget(request.seconds, plan.left_out)


def plan_scaling(
    screen: "Console", settings: "Settings", seconds: float, *, ask: bool
) -> tuple["Settings", "Budget"]:
    """Do the same for `scale`."""
    from fulcrum.cli import terminal
    from fulcrum.mechanism import scale as scale_runs
    from fulcrum.mechanism import scale_arms
    from fulcrum.stats.certificate import Budget

    with terminal.working(screen, "measuring speed on a few rows"):
        plan = scale_runs.plan(settings, seconds)
    rows = []
    levels = scale_arms.levels(plan.settings)
    for name in plan.settings.scale.designs:
        ratios = [f"{level.ratio:.3g}" for level in levels if level.design == name]
        rows.append((f"ratios, {name}", ", ".join(ratios)))
    rows += [
        ("seeds", f"{len(plan.settings.seeds)}"),
        ("test rows", _test_rows(plan.settings)),
        ("trainings", f"{plan.trainings}"),
    ]
    screen.print(terminal.grid("The scaling run", ("", ""), rows, numbers=False))
    _show_choice(screen, "Scaling run", plan.seconds, seconds, plan.left_out)
    if ask:
        _confirm("--budget")
    return plan.settings, Budget(seconds, plan.left_out)


def is_planned(settings: "Settings", *, resume: bool) -> bool:
    """Return whether a planned run is resumed: its plan counts then, and no option does."""
    from fulcrum.core import store

    return resume and (Path(settings.output_dir) / store.PLAN).exists()


def read_plan(settings: "Settings") -> tuple["Settings", "Budget"]:
    """Return the settings and the budget that a run was begun with."""
    from fulcrum.config.settings import Settings
    from fulcrum.core import store
    from fulcrum.stats.certificate import Budget

    plan = store.read_json(Path(settings.output_dir) / store.PLAN)
    here = {"output_dir": settings.output_dir, "report_to": settings.report_to}
    agreed = Settings.model_validate({**plan["settings"], **here})
    return agreed, Budget(plan["seconds"], tuple(plan["left_out"]))


def _preset_table(plan: "Plan") -> Any:
    """Lay out every preset side by side, as it is on these rows and this machine."""
    from fulcrum.cli import terminal

    columns = [_describe(design) for design in plan.designs]
    names: dict[str, None] = {}  # in order, each once
    for column in columns:
        names |= dict.fromkeys(column)
    rows = []
    for name in names:
        rows.append([name, *(column.get(name, "–") for column in columns)])
    head = ["", *(design.preset for design in plan.designs)]
    return terminal.grid("Presets for these rows on this machine", head, rows, numbers=False)


def _describe(design: "Design") -> dict[str, str]:
    """Return a design's column of the table."""
    settings = design.settings
    compare = settings.compare
    arms = [arm if isinstance(arm, str) else arm.name for arm in compare.arms]
    cells = {"seeds": f"{len(settings.seeds)}", "arms": ", ".join(arms)}
    cells["task rows"] = _listed(compare.sizes or (design.rows,))
    for name, sizes in compare.sizes_of.items():
        cells[f"task rows of {name}"] = _listed(sizes)
    cells["repeats tried"] = _listed(settings.mix.candidates)
    cells["test rows"] = _test_rows(settings)
    metrics: dict[str, None] = {}  # in order, each once
    for task in settings.tasks:
        metrics |= dict.fromkeys(task.metrics)
    cells["metrics"] = ", ".join(metrics)
    cells["side effects"] = "checked" if settings.eval.general_rows else "not checked"
    cells["trials, trainings"] = f"{design.jobs}"
    cells["expected"] = design.why_not or f"about {_minutes(design.seconds)}"
    return cells


def _listed(numbers: "Sequence[int]") -> str:
    return ", ".join(map(str, numbers))


def _test_rows(settings: "Settings") -> str:
    limits = []
    for task in settings.tasks:
        limits.append("all" if task.test_limit is None else f"up to {task.test_limit}")
    return ", ".join(dict.fromkeys(limits))


def _minutes(seconds: float) -> str:
    number = max(1, round(seconds / 60))
    return "1 minute" if number == 1 else f"{number} minutes"


def _show_choice(
    screen: "Console", what: str, expected: float, limit: float | None, left_out: "Sequence[str]"
) -> None:
    """Say what will run, how long it will take, and what it has less of than it could have."""
    from fulcrum.cli import terminal

    given = "" if limit is None else f" of the {_minutes(limit)} given"
    terminal.say(screen, f"{what}: about {_minutes(expected)}{given}.", "bold")
    if left_out:
        aim = "Compared with the full design" if limit is None else f"To fit {_minutes(limit)}"
        terminal.say(screen, f"{aim}: {', '.join(left_out)}.")


def _confirm(option: str) -> None:
    """Ask whether to start. Raise ConfigError if the answer is no or nobody can answer."""
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{option} asks for confirmation, but this is not a terminal; "
            "add --yes, or --dry-run to see the plan"
        )
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("not started; choose another preset or budget, or change the settings")


def answer(folder: Path) -> None:
    """Say what a quick comparison found, and how sure that is."""
    from fulcrum.cli import terminal
    from fulcrum.report import wording
    from fulcrum.stats import certificate

    file = folder / certificate.FILE
    if file.exists():
        first = certificate.Certificate.read(file).answer
        terminal.say(terminal.console(), wording.quick_answer(first), "bold")
