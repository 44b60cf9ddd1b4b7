"""`compare --budget` and `--quick`: what the time buys, before it is spent, and what a quick look said."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulcrum.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fulcrum.config import Settings


def planned(
    screen: "Console", settings: "Settings", text: str, *, quick: bool, resume: bool, ask: bool
) -> tuple["Settings", dict[str, Any]]:
    """The settings of the design that the budget buys, shown and agreed to; and what `compare` has to know of it.

    A resumed comparison goes on with the design that was agreed to. Raises ConfigError where nothing fits, or nobody agrees.
    """
    if (known := _agreed(settings, resume=resume)) is not None:
        return known
    from fulcrum import budget, terminal

    seconds = budget.parse(text) if text else budget.QUICK_SECONDS
    with terminal.working(screen, "measuring what the budget buys"):
        design = budget.plan(settings, seconds, quick=quick)
    compare = design.settings.compare
    rows = [
        ("arms", ", ".join(arm if isinstance(arm, str) else arm.name for arm in compare.arms)),
        ("task rows", ", ".join(map(str, compare.sizes or ("all",)))),
        *((f"task rows of {name}", ", ".join(map(str, sizes))) for name, sizes in compare.sizes_of.items()),
        ("repeats tried", str(design.settings.mix.repeats) if design.settings.mix.repeats != "auto" else "1, 2, 4, 8"),
        ("trials and trainings", f"{design.units}"),
    ]
    _agree(screen, rows, design.settings, design.left_out, design.seconds, seconds, ask=ask)
    return design.settings, {"budget": seconds, "left_out": design.left_out}


def planned_scale(
    screen: "Console", settings: "Settings", text: str, *, resume: bool, ask: bool
) -> tuple["Settings", dict[str, Any]]:
    """The same for `scale`."""
    if (known := _agreed(settings, resume=resume)) is not None:
        return known
    from fulcrum import budget, ladder, scale, terminal

    seconds = budget.parse(text)
    with terminal.working(screen, "measuring what the budget buys"):
        design = scale.plan(settings, seconds)
    levels = ladder.levels(design.settings)
    rows = [
        (f"ratios, {name}", ", ".join(f"{level.ratio:.3g}" for level in levels if level.design == name))
        for name in design.settings.scale.designs
    ]
    rows.append(("trainings", f"{design.trainings}"))
    _agree(screen, rows, design.settings, design.left_out, design.seconds, seconds, ask=ask)
    return design.settings, {"budget": seconds, "left_out": design.left_out}


def goes_on(settings: "Settings", *, resume: bool) -> bool:
    """Whether a run is resumed that a budget planned: then that plan counts, whether or not the budget is given again."""
    from fulcrum import store

    return resume and (Path(settings.output_dir) / store.PLAN).exists()


def _agreed(settings: "Settings", *, resume: bool) -> tuple["Settings", dict[str, Any]] | None:
    """The design that was agreed to, where a run is resumed that has one."""
    from fulcrum import config, run_folder, store

    if goes_on(settings, resume=resume):
        known = store.read_json(Path(settings.output_dir) / store.PLAN)
        here = {"output_dir": settings.output_dir, "report_to": settings.report_to}
        agreed = config.Settings.model_validate({**known["settings"], **here})
        return agreed, {"budget": known["seconds"], "left_out": known["left_out"]}
    run_folder.check_free(Path(settings.output_dir), resume=resume)
    return None


def _agree(
    screen: "Console", rows: list[tuple[str, str]], settings: "Settings", left_out: "Sequence[str]", expected: float,
    seconds: float, *, ask: bool,
) -> None:  # fmt: skip
    """Show a design, and have it agreed to where somebody is to be asked."""
    from fulcrum import terminal

    test = [task.test_limit for task in settings.tasks]
    shown = [
        *rows,
        ("seeds", f"{len(settings.seeds)}"),
        ("test rows", ", ".join("all" if limit is None else str(limit) for limit in test)),
        ("left out", "; ".join(left_out) or "nothing"),
        ("expected", f"{expected / 60:.0f} of {seconds / 60:.0f} minutes"),
    ]
    screen.print(terminal.grid("What the budget buys", ("", ""), shown, numbers=False))
    if ask:
        if not sys.stdin.isatty():
            raise ConfigError("--budget asks before it starts, and nobody can answer here; give -y, or --dry-run to look only")
        if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ConfigError("not started; change the budget or the settings")


def answer(screen: "Console", folder: Path) -> None:
    """Say what a quick look found, and how sure that is."""
    from fulcrum import certificate, terminal, wording

    file = folder / certificate.FILE
    if file.exists():
        found = certificate.Certificate.read(file).answer
        terminal.say(screen, wording.quick_answer(found), "bold")
