"""`compare --budget` and `--quick`: what the time buys, before it is spent, and what a quick look said."""

import json
import math
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
    from fulcrum import certificate, terminal

    file = folder / certificate.FILE
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf-8"))["answers"][0]
    terminal.say(screen, quick_answer(found), "bold")


def quick_answer(found: dict[str, Any]) -> str:
    """Go, no go, or not known, from the first metric of a certificate."""
    slope, difference, n = found["slope"], found["difference"], found["rows"]
    rises = slope["low"] is not None and slope["low"] > 0
    falls = slope["high"] is not None and slope["high"] <= 0
    unknown = any(part[end] is None for part in (slope, difference) for end in ("low", "high"))
    steep = (
        "of one number of rows alone nobody knows what more of them bring"
        if slope["estimate"] is None
        else f"without general data each doubling of rows brings {_span(slope)} {found['metric']}"
    )
    brings = f"the general data bring {_span(difference)} at {n} rows (positive is better)"
    if found["seeds"] == 1:
        sure = "with one seed nothing is known of others"
    elif difference["low"] is None or difference["high"] is None:
        sure = f"{found['seeds']} seeds leave no interval here"
    else:
        half = (difference["high"] - difference["low"]) / 2
        then = _narrowed(half, found["seeds"])
        sure = f"{found['seeds']} seeds leave ±{half:.3f}; 5 would leave ±{then:.3f} at best"
    if unknown:
        verdict = "Not known"
    elif found["verdict"] == "gain":
        verdict = "Go" if rises else "Go for the gain; no factor in rows will be identifiable"
    elif found["verdict"] == "loss":
        verdict = "No go"
    elif falls:
        verdict = "No go, since more rows bring nothing, so that none can be saved"
    else:
        verdict = "Not known yet" if rises else "Not known yet, nor whether more rows bring anything"
    return f"{verdict}: {steep}; {brings}. How sure: {sure}."


def _narrowed(half: float, seeds: int, then: int = 5) -> float:
    """The half width of a t interval with as many seeds, from that of fewer; test rows may keep it wider."""
    from scipy.special import stdtrit

    return float(half * math.sqrt(seeds / then) * stdtrit(then - 1, 0.975) / stdtrit(seeds - 1, 0.975))


def _span(interval: dict[str, float | None]) -> str:
    known = [value for value in (interval["estimate"], interval["low"], interval["high"]) if value is not None]
    if len(known) < 3:
        return f"{known[0]:+.3f} (no interval)" if known else "nobody knows what"
    return f"{known[0]:+.3f} ({known[1]:+.3f} to {known[2]:+.3f})"
