"""Turn an experiment on the mechanism into arms of a comparison.

`quanta` has two arms. `scale` has an arm for each amount of general data, in up to three designs.
With *fixed exposures* each task row is shown equally often at every ratio, so trainings grow. With
*fixed steps* all trainings are equally long, so task rows are shown less often. A jump in one alone
may come of the length of training, or of the task's share of it. *Permuted* is fixed exposures with
the general rows' answers swapped: what that brings too is no transfer.

Invariant: general rows are nested, so a larger ratio has those of the smaller ones too.
"""

from dataclasses import dataclass
from typing import Any

from fulcrum.config.arms import chosen_arms, own_arm, plain_sft
from fulcrum.config.experiments import Arm, Design
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError

SEEDS = 5  # if the settings name none
_FEWEST_AMOUNTS = 3


@dataclass(frozen=True)
class Level:
    """One amount of general data."""

    design: Design
    ratio: float  # general rows for each shown task row
    repeats: int  # times that each task row is shown
    arm: str


def levels(settings: Settings) -> tuple[Level, ...]:
    """Return the amounts of every design, ascending.

    With fixed steps a ratio is what a whole number of repeats makes of it, and two that come to the
    same are one. Raises ConfigError if fewer than three are left.
    """
    ladder: list[Level] = []
    for design in settings.scale.designs:
        distinct = {}
        for wanted in settings.scale.ratios:
            level = _level(settings, design, wanted)
            distinct[level.repeats, level.ratio] = level
        if len(distinct) < _FEWEST_AMOUNTS:
            raise ConfigError(
                f"scale.ratios: {design}: only {len(distinct)} amounts differ at "
                f"{passes(settings)} passes over the task rows; raise scale.passes, or give larger "
                "ratios"
            )
        ladder += sorted(distinct.values(), key=lambda level: level.ratio)
    return tuple(ladder)


def passes(settings: Settings) -> int:
    """Return how long each training of fixed steps is, in passes over the task rows."""
    return settings.scale.passes or round(1 + settings.scale.ratios[-1])


def prepared(settings: Settings) -> Settings:
    """Return the settings of `scale`: an arm for each level in place of `compare`'s.

    There are general rows enough for all, and the loss is the first metric. All arms have one
    order, so that only the amount changes along a curve. Raises ConfigError for settings that
    cannot be scaled.
    """
    _check_scale(settings)
    ladder = levels(settings)
    arms = {level.arm: _arm(settings, level) for level in ladder}
    compare: dict[str, Any] = {
        "arms": tuple(arms.values()),
        "sizes": None if settings.scale.rows is None else (settings.scale.rows,),
        "sizes_of": {},
        "seeds": settings.compare.seeds or tuple(range(settings.seed, settings.seed + SEEDS)),
    }
    tasks = []
    for task in settings.tasks:
        others = [name for name in task.metrics if name != "nll"]
        tasks.append(task.model_copy(update={"metrics": ("nll", *others)}))
    # A mixture that shows every row once and is as long as the longest training: general rows
    # enough for every arm, and the most that any takes.
    longest = max(level.repeats * (1 + level.ratio) for level in ladder)
    scaled = settings.model_copy(
        update={
            "tasks": tuple(tasks),
            "mix": settings.mix.model_copy(update={"general_per_task": longest - 1, "repeats": 1}),
            "compare": settings.compare.model_copy(update=compare),
        }
    )
    chosen_arms(scaled)
    return scaled


def paired(settings: Settings) -> Settings:
    """Return the settings of `quanta`: SFT and TELL in place of `compare`'s arms.

    There are held-out general rows enough. Raises ConfigError if there is nothing to compare.
    """
    mixed = own_arm(settings)
    _check_quanta(settings, mixed)
    compare: dict[str, Any] = {
        "arms": (plain_sft(mixed).name, mixed.name),
        "seeds": (settings.seed,),
        "sizes_of": {},
        "sizes": None if settings.quanta.rows is None else (settings.quanta.rows,),
    }
    # Half of the items are general answers of some ten tokens, so a quarter of that half in rows is
    # plenty. A smaller pool gives what it has.
    rows = settings.quanta.items // (2 if settings.quanta.unit == "rows" else 8)
    general_rows = max(settings.eval.general_rows, rows)
    return settings.model_copy(
        update={
            "compare": settings.compare.model_copy(update=compare),
            "mix": settings.mix.model_copy(update={"repeats": settings.quanta.repeats}),
            "eval": settings.eval.model_copy(update={"general_rows": general_rows}),
        }
    )


def _level(settings: Settings, design: Design, wanted: float) -> Level:
    repeats, ratio = settings.scale.repeats, wanted
    if design == "steps":
        repeats = max(1, round(passes(settings) / (1 + wanted)))
        ratio = passes(settings) / repeats - 1
    # Without general rows there are no answers to permute: the arm is that of fixed exposures.
    prefix = "exposures" if wanted == 0 and design == "permuted" else design
    number = f"{wanted:g}".replace(".", "_").replace("+", "").replace("-", "m")
    return Level(design, ratio, repeats, f"{prefix}_{number}")


def _arm(settings: Settings, level: Level) -> Arm:
    anchored = any(task.anchor is not None for task in settings.tasks)
    if level.ratio == 0:
        return Arm(name=level.arm, anchored=anchored, repeats=level.repeats)
    return Arm(
        name=level.arm,
        anchored=anchored,
        repeats=level.repeats,
        general="permuted" if level.design == "permuted" else "pool",
        general_per_task=level.ratio,
        order="epoch_stratified" if settings.mix.order == "auto" else settings.mix.order,
    )


def _check_scale(settings: Settings) -> None:
    if settings.mix.unit == "tokens":
        raise ConfigError("scale counts general rows by examples; leave mix.unit: tokens out")
    if settings.mix.select != "random":
        raise ConfigError(
            f"scale: rows are drawn at random, nested; leave mix.select: {settings.mix.select} out"
        )
    _require_anchors("scale", settings)
    if not settings.general:
        raise ConfigError("scale: `general:` names no data to scale; name some")


def _check_quanta(settings: Settings, mixed: Arm) -> None:
    if not mixed.uses_general_data:
        raise ConfigError(
            "quanta asks what general data bring; set mix.general_per_task above 0 and name "
            "`general:`"
        )
    _require_anchors("quanta", settings)
    if settings.mix.select == "gradient":
        raise ConfigError(
            "quanta: mix.select: gradient is of `train` and `compare`; choose random or similar"
        )
    if settings.mix.general_per_task == "auto":
        raise ConfigError(
            "quanta: mix.general_per_task is auto, which a pilot settles; set a number"
        )


def _require_anchors(verb: str, settings: Settings) -> None:
    """Raise ConfigError if an anchor is yet to be chosen: that would be one more difference."""
    for task in settings.tasks:
        if task.anchor is not None and task.anchor.is_auto:
            raise ConfigError(
                f"{verb}: the anchor of {task.name} is auto, which `train` and `compare` settle; "
                "write one (`fulcrum anchor score` names it)"
            )
