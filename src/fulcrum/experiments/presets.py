"""Define the presets `quick`, `standard` and `full`, and apply them to settings.

Every key that the settings file sets under `compare` stays as it is; a preset sets the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulcrum.config.arms import chosen_arms
from fulcrum.config.experiments import CompareSettings
from fulcrum.config.sections import MixSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, nearest
from fulcrum.stats import metrics

_FOLDS = 2
_REFERENCES = ("sft_anchor", "sft")  # the first that is compared gets the curve over task rows
_LEAST_SIZE = 16  # task rows; a curve begins here and doubles
_LARGEST_PART = 0.75  # of all task rows; a larger size would hardly differ from all


@dataclass(frozen=True)
class Preset:
    """A design of a comparison.

    name: as `--preset` takes it
    seeds: number of seeds
    arms: what is compared
    mixed_sizes: sizes of arms with general data: 1 (all task rows) or 2 (a quarter of them, too)
    sft_sizes: sizes of plain fine-tuning, the largest of 16, 32, 64 ... all; None: all of these
    repeats: times that mixed arms show each task row, while SFT tries that many epochs and three
        times as many; None: tuned
    test_rows: at most so many test rows of a task; None: all
    all_metrics: whether every metric of the task is scored; else the first, and those of labels,
        which cost no time
    side_effects: whether forgetting and leakage of the anchor are measured on general data

    Hyperparameters are chosen once, on the first seed's rows in two folds (without a test file: for
    each seed).
    """

    name: str
    seeds: int
    arms: tuple[str, ...]
    mixed_sizes: int
    sft_sizes: int | None
    repeats: int | None
    test_rows: int | None
    all_metrics: bool
    side_effects: bool


_QUICK_ARMS = ("base", "sft_anchor", "tell")
_STANDARD_ARMS = ("base", "base_anchor", "kshot", "sft", "sft_anchor", "mix", "tell")
_FULL_ARMS = (*_STANDARD_ARMS, "general_then_task", "placebo_permuted")

QUICK = Preset(
    name="quick",
    seeds=2,
    arms=_QUICK_ARMS,
    mixed_sizes=1,
    sft_sizes=3,
    repeats=4,
    test_rows=100,
    all_metrics=False,
    side_effects=False,
)
STANDARD = Preset(
    name="standard",
    seeds=3,
    arms=_STANDARD_ARMS,
    mixed_sizes=1,
    sft_sizes=3,
    repeats=4,
    test_rows=300,
    all_metrics=True,
    side_effects=True,
)
FULL = Preset(
    name="full",
    seeds=5,
    arms=_FULL_ARMS,
    mixed_sizes=2,
    sft_sizes=None,
    repeats=None,
    test_rows=None,
    all_metrics=True,
    side_effects=True,
)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (QUICK, STANDARD, FULL)}


def preset_named(name: str) -> Preset:
    """Return the preset of this name. Raises ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"--preset: there is no preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def apply(preset: Preset, settings: Settings, rows: int) -> Settings:
    """Return the settings with the preset's design on `rows` task rows.

    Keys of `compare` that the settings set stay as they are.
    """
    compare = settings.compare
    fixed = compare.model_fields_set
    curve = _curve(max(compare.sizes) if compare.sizes else rows)
    values: dict[str, Any] = {
        "arms": preset.arms,
        "seeds": seeds_from(settings, preset.seeds),
        "sizes": _mixed_sizes(curve, preset.mixed_sizes),
        "tune": "each" if settings.outer_folds else "first",
        "folds": _FOLDS,
    }
    changes = {key: value for key, value in values.items() if key not in fixed}
    design = _with_compare(settings, {**changes, "sizes_of": {}})
    names = [arm.name for arm in chosen_arms(design)]
    if "sizes_of" in fixed:
        sizes_of = {name: sizes for name, sizes in compare.sizes_of.items() if name in names}
    else:
        first = 0 if preset.sft_sizes is None else -preset.sft_sizes
        sizes = sorted({*curve[first:], *(design.compare.sizes or ())})
        references = [name for name in _REFERENCES if name in names]
        sizes_of = {name: tuple(sizes) for name in references[:1]}
    design = _with_compare(design, {"sizes_of": sizes_of})
    if preset.repeats is not None:
        design = _with_fewer_trials(design, preset.repeats)
    if preset.test_rows is not None:
        design = limit_test_rows(design, preset.test_rows)
    if not preset.all_metrics:
        design = _with_first_metric(design)
    if not preset.side_effects:
        evaluation = design.eval.model_copy(update={"general_rows": 0})
        design = design.model_copy(update={"eval": evaluation})
    return design


def reductions(design: Settings, full: Settings, test_rows: int) -> list[str]:
    """Return what a design has less of than `full`, in a few words each.

    `test_rows` is the number of test rows of the task with the most.
    """
    own = design.compare
    whole = full.compare
    counts = [
        ("seeds", len(design.seeds), len(full.seeds)),
        ("arms", len(own.arms), len(whole.arms)),
        ("mix sizes", len(own.sizes or ()), len(whole.sizes or ())),
    ]
    for arm, sizes in whole.sizes_of.items():
        counts.append((f"sizes of {arm}", len(own.sizes_of.get(arm, ())), len(sizes)))
    for task, complete in zip(design.tasks, full.tasks, strict=True):
        counts.append((f"metrics of {task.name}", len(task.metrics), len(complete.metrics)))
    reduced = [f"{number} of {most} {what}" for what, number, most in counts if number < most]
    if design.mix.repeats != full.mix.repeats or own.sft_epochs != whole.sft_epochs:
        reduced.append("fewer settings tried")
    limit = max(task.test_limit or test_rows for task in design.tasks)
    if limit < test_rows:
        reduced.append(f"at most {limit} test rows")
    if design.eval.general_rows < full.eval.general_rows:
        reduced.append("no side-effect checks")
    return reduced


def limit_test_rows(settings: Settings, limit: int) -> Settings:
    """Return the settings with at most `limit` test rows of each task."""
    tasks = []
    for task in settings.tasks:
        fewer = min(limit, task.test_limit or limit)
        tasks.append(task.model_copy(update={"test_limit": fewer}))
    return settings.model_copy(update={"tasks": tuple(tasks)})


def seeds_from(settings: Settings, number: int) -> tuple[int, ...]:
    """Return `number` seeds, from the run's own upwards."""
    return tuple(range(settings.seed, settings.seed + number))


def _curve(rows: int) -> list[int]:
    """Return 16, 32, 64 ... and all rows."""
    sizes = []
    size = _LEAST_SIZE
    while size <= _LARGEST_PART * rows:
        sizes.append(size)
        size *= 2
    return [*sizes, rows]


def _mixed_sizes(curve: Sequence[int], number: int) -> tuple[int, ...]:
    """Return all rows; with a `number` of 2 also the size of the curve nearest to a quarter."""
    rows = curve[-1]
    if number == 1 or len(curve) == 1:
        return (rows,)
    quarter = min(curve[:-1], key=lambda size: abs(size - rows / 4))
    return (quarter, rows)


def _with_compare(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return the settings with other values under `compare`, validated."""
    values = {name: getattr(settings.compare, name) for name in CompareSettings.model_fields}
    compare = CompareSettings.model_validate({**values, **changes})
    return settings.model_copy(update={"compare": compare})


def _with_first_metric(settings: Settings) -> Settings:
    """Return the settings with each task's first metric that scores rows, and those of labels."""
    tasks = []
    for task in settings.tasks:
        with_outcomes = [name for name in task.metrics if metrics.HAS_OUTCOMES[name]]
        first = (with_outcomes or task.metrics)[0]
        kept = tuple(name for name in task.metrics if name == first or name in metrics.LABELS)
        tasks.append(task.model_copy(update={"metrics": kept}))
    return settings.model_copy(update={"tasks": tuple(tasks)})


def _with_fewer_trials(settings: Settings, repeats: int) -> Settings:
    """Return the settings with one number of repeats, and SFT's epochs derived from it."""
    mix: MixSettings = settings.mix
    if mix.repeats == "auto":
        mix = mix.model_copy(update={"repeats": repeats})
        settings = settings.model_copy(update={"mix": mix})
    if settings.compare.sft_epochs is not None or mix.unit == "tokens":
        return settings
    shown = max(mix.candidates)
    most = math.floor(shown * (1 + mix.per_task))  # TELL's steps, which SFT must not exceed
    epochs = tuple(sorted({shown, min(most, 3 * shown)}))
    return _with_compare(settings, {"sft_epochs": epochs})
