"""The trainings of an experiment on the mechanism as arms of a comparison: of `quanta` two, of `scale` one for each amount of
general data.

With *fixed exposures* each task row is shown as often at every ratio, so that trainings grow; with *fixed steps* all trainings
are as long, so that task rows are shown less often. A jump in one alone may come of the length of training, or of the task's
share of it. *Permuted* is fixed exposures with each other's answers: what that brings too is no transfer.
Invariant: general rows are nested, a larger ratio has those of the smaller ones too.
"""

from dataclasses import dataclass
from typing import Any

from fulcrum.config.arms import chosen_arms, own_arm, plain_sft
from fulcrum.config.experiments import Arm, Design
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError

SEEDS = 5  # where the settings name none


@dataclass(frozen=True)
class Level:
    """One amount of general data: `ratio` general rows for each shown task row, which is shown `repeats` times, by `arm`."""

    design: Design
    ratio: float
    repeats: int
    arm: str


def levels(settings: Settings) -> tuple[Level, ...]:
    """The amounts of every design, ascending. Where steps are fixed, ratios are what whole numbers of repeats make of them, and
    two that come to the same are one. Raises ConfigError where fewer than three are left."""
    scale, found = settings.scale, dict[tuple[Design, int, float], Level]()
    for design in scale.designs:
        for wanted in scale.ratios:
            ratio, repeats = wanted, scale.repeats
            if design == "steps":
                repeats = max(1, round(passes(settings) / (1 + wanted)))
                ratio = passes(settings) / repeats - 1
            kind = (
                "exposures" if wanted == 0 and design == "permuted" else design
            )  # without general rows there is none to permute
            found[design, repeats, ratio] = Level(design, ratio, repeats, f"{kind}_{_word(wanted)}")
        if (number := sum(level.design == design for level in found.values())) < 3:
            raise ConfigError(
                f"scale.ratios: {design}: only {number} amounts differ at {passes(settings)} passes over the task rows; raise "
                "scale.passes, or give larger ratios"
            )
    return tuple(
        sorted(found.values(), key=lambda level: (scale.designs.index(level.design), level.ratio))
    )


def passes(settings: Settings) -> int:
    """How long each training is where steps are fixed, in passes over the task rows."""
    return settings.scale.passes or round(1 + settings.scale.ratios[-1])


def _word(ratio: float) -> str:
    return f"{ratio:g}".replace(".", "_").replace("+", "").replace("-", "m")


def prepared(settings: Settings) -> Settings:
    """The settings with an arm for each level in place of `compare`'s, general rows enough for all, and the loss as first
    metric.

    All arms have one order, so that nothing but the amount changes along a curve. Raises ConfigError for what cannot be scaled.
    """
    if settings.mix.unit == "tokens":
        raise ConfigError("scale counts general rows by examples; leave mix.unit: tokens out")
    if settings.mix.select != "random":
        raise ConfigError(
            f"scale: rows are drawn at random, nested; leave mix.select: {settings.mix.select} out"
        )
    _no_auto("scale", settings)
    if not settings.general:
        raise ConfigError("scale: `general:` names no data to scale; name some")
    order = "epoch_stratified" if settings.mix.order == "auto" else settings.mix.order
    anchored = any(task.anchor is not None for task in settings.tasks)
    longest = max(level.repeats * (1 + level.ratio) for level in levels(settings))
    made = {
        level.arm: Arm(
            name=level.arm, anchored=anchored, repeats=level.repeats,
            **({} if level.ratio == 0 else {
                "general": "permuted" if level.design == "permuted" else "pool",
                "general_per_task": level.ratio, "order": order,
            }),
        )
        for level in levels(settings)
    }  # fmt: skip
    changes: dict[str, Any] = {
        "arms": tuple(made.values()), "sizes": None if settings.scale.rows is None else (settings.scale.rows,), "sizes_of": {},
        "seeds": settings.compare.seeds or tuple(range(settings.seed, settings.seed + SEEDS)),
    }  # fmt: skip
    tasks = tuple(
        task.model_copy(
            update={"metrics": ("nll", *(name for name in task.metrics if name != "nll"))}
        )
        for task in settings.tasks
    )
    # A mixture of single showings that is as long as the longest training: enough general rows for every arm, and its cap.
    mix = settings.mix.model_copy(update={"general_per_task": longest - 1, "repeats": 1})
    found = settings.model_copy(
        update={"tasks": tasks, "mix": mix, "compare": settings.compare.model_copy(update=changes)}
    )
    chosen_arms(found)
    return found


def _no_auto(verb: str, settings: Settings) -> None:
    """Raise ConfigError where an anchor is yet to be chosen: here that would be one more thing that differs."""
    for task in settings.tasks:
        if task.anchor is not None and task.anchor.is_auto:
            raise ConfigError(
                f"{verb}: the anchor of {task.name} is auto, which `train` and `compare` settle; write one "
                "(`fulcrum anchor score` names it)"
            )


def paired(settings: Settings) -> Settings:
    """The settings of `quanta`: SFT and TELL in place of `compare`'s arms, and held-out general rows enough. Raises ConfigError
    for what leaves nothing to ask."""
    mixed = own_arm(settings)
    if not mixed.uses_general_data:
        raise ConfigError(
            "quanta asks what general data bring; set mix.general_per_task above 0 and name `general:`"
        )
    _no_auto("quanta", settings)
    if settings.mix.select == "gradient":
        raise ConfigError(
            "quanta: mix.select: gradient is of `train` and `compare`; choose random or similar"
        )
    if settings.mix.general_per_task == "auto":
        raise ConfigError(
            "quanta: mix.general_per_task is auto, which a pilot settles; set a number"
        )
    plain = plain_sft(mixed)
    compare = settings.compare.model_copy(
        update={
            "arms": (plain.name, mixed.name), "seeds": (settings.seed,), "sizes_of": {},
            "sizes": None if settings.quanta.rows is None else (settings.quanta.rows,),
        }
    )  # fmt: skip
    # Answers of some ten tokens: a quarter of the items' number in rows is plenty, and a smaller pool gives what it has.
    general_rows = max(
        settings.eval.general_rows,
        settings.quanta.items // (2 if settings.quanta.unit == "rows" else 8),
    )
    return settings.model_copy(
        update={
            "compare": compare, "mix": settings.mix.model_copy(update={"repeats": settings.quanta.repeats}),
            "eval": settings.eval.model_copy(update={"general_rows": general_rows}),
        }
    )  # fmt: skip
