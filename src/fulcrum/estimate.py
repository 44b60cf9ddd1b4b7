"""About how long runs will take: the speed of this model on these rows is measured, the plans are counted. No promise.

What runs before a plan is known (scoring anchors of `anchor: auto`) is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fulcrum import arms, budget, material, metrics, model
from fulcrum.arm_data import ArmPlan, resolve
from fulcrum.config import Settings
from fulcrum.errors import FulcrumError
from fulcrum.material import RunData
from fulcrum.units import Speed


@dataclass(frozen=True)
class Estimate:
    """Expected seconds of a verb, and how many trainings (of a comparison, trials too) these are; or why nobody can say."""

    verb: str
    seconds: float | None
    trainings: int
    why_not: str = ""


def estimates(settings: Settings) -> list[Estimate]:
    """What `train` and `compare` would take on this machine. Raises ConfigError, DataError or ModelError as these would."""
    loaded = model.load(settings.model, settings.train, trust_remote_code=settings.trust_remote_code)
    own = arms.own_arm(settings)
    rows = material.prepare(
        settings, loaded.tokenizer, loaded.context, settings.seed, choose_from=arms.choose_from([own], settings)
    )
    speed = budget.measure(rows, loaded, settings)
    found = [of_training(resolve(own, rows, settings), speed)]
    if settings.mix.general_per_task == "auto":
        return [*found, Estimate("compare", None, 0, "a pilot chooses how many general rows there will be")]
    try:
        wide = material.of_seeds(
            settings, loaded.tokenizer, loaded.context, settings.seeds, mixed_rows=arms.largest_mixture(settings)
        )[0]
        units, seconds = budget.predict(settings, wide, loaded, speed)
    except FulcrumError as error:  # too few rows to be cut into folds, say: `train` is possible nonetheless
        return [*found, Estimate("compare", None, 0, str(error))]
    return [*found, Estimate("compare", seconds, units)]


def of_training(plan: ArmPlan, speed: Speed) -> Estimate:
    """Estimate every trial with its looks at the dev rows, then the test rows before and after."""
    settings, rows = plan.settings, plan.rows
    n_dev, n_test = (_rows(rows, part) for part in ("dev", "test"))
    seconds = 0.0
    for trial in plan.trials:
        trained = speed.task * trial.repeats * rows.n_task + speed.general * plan.general_count(trial.repeats)
        seconds += speed.start + trained + settings.train.evaluations * n_dev * speed.scored
    answered = _answered(settings, rows)
    held_out = sum(map(len, rows.held_out.values()))
    seconds += 2 * ((n_test + held_out) * speed.scored + answered * speed.answered)
    return Estimate("train", seconds, len(plan.trials))


def _rows(rows: RunData, part: str) -> int:
    return sum(len(getattr(task, part)) for task in rows.tasks)


def _answered(settings: Settings, rows: RunData) -> int:
    """Test rows whose answers are written, for metrics that need these."""
    pairs: Sequence[tuple[int, tuple[str, ...]]] = [
        (len(task.test), own.metrics) for task, own in zip(rows.tasks, settings.tasks, strict=True)
    ]
    return sum(number for number, names in pairs if metrics.needs_generation(names))
