"""How much general data a task needs, none included: small mixtures are trained and compared.

Their losses on held-out task rows are fitted by a parabola, whose lowest point is chosen.

The best mixture depends on how often its task rows repeat ("repetition mismatch", arXiv
2606.07597), so the pilot takes fewer task rows *and* fewer general ones, and shows every task row
as often as the run will. Task rows alone would have the fewest steps that way, and anything mixed
in, even permuted answers, would seem to help: so they are also shown more often, in as many steps
as the larger mixtures (`_ALONE`). The best of these counts as the mixture without general rows.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.config.arms import arm_of, name_of, own_arm, plain_sft
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import PILOT_RATIOS
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import ProgressListener
from fulcrum.core.types import Anchor, Example, FloatArray, Hyperparameters, Pilot
from fulcrum.data import encode, pool, run_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import ArmPlan
from fulcrum.experiments.arm_data import resolve as resolve_arm
from fulcrum.experiments.cell import Session
from fulcrum.model import adapter, base_model, generate

REPEATS = 4  # if the run's own number is tuned
FEWEST, MOST = 8, 32  # task rows

_FOLDS = 2
_MOST_EPOCHS = 32  # a pilot of few rows says nothing about more
_ALONE = (0.0, 4.0, 16.0)  # task rows alone are trained in the steps of these ratios


def resolve(
    settings: Settings, *, compared: bool, progress: ProgressListener
) -> tuple[Settings, Pilot | None]:
    """Return the settings with a number for `general_per_task: auto`, and the pilot that chose it.

    The pilot is read back if a run is resumed.

    If the pilot chooses 0, SFT may use the number of epochs that was best without general data. Dev
    rows are task rows here; test rows are never seen: neither those of a run, nor (`compared`)
    those of a comparison. Raises ConfigError, DataError or ModelError.
    """
    if settings.mix.general_per_task != "auto":
        return settings, None
    if compared:
        settings.refuse_choosing_by(
            "mix.general_per_task: auto", "anything", "use one seed, set a number"
        )
    file = Path(settings.output_dir) / store.PILOT
    if file.exists():
        pilot = store.read_as(file, Pilot)
    else:
        progress.stage("a pilot: how much general data?")
        pilot = _prepare_and_run(settings, compared=compared, progress=progress)
    return _with_choice(settings, pilot), pilot


def keep(pilot: Pilot | None, folder: Path | None, gone: Sequence[str] = ()) -> list[str]:
    """Write a pilot into the run's folder; return notes on it, and on the arms that are `gone`."""
    if pilot is None:
        return []
    if folder is not None:
        store.write_json(folder / store.PILOT, pilot)
    notes = [sentence(pilot)]
    if gone:
        notes.append(f"Left out, since nothing is to be mixed: {', '.join(gone)}.")
    return notes


def sentence(pilot: Pilot) -> str:
    """Say what a pilot found, in a sentence."""
    curve = []
    for ratio, loss, error in zip(pilot.ratios, pilot.losses, pilot.errors, strict=True):
        difference = f" (difference to 0 ± {error:.3f})" if ratio else ""
        curve.append(f"{ratio:g}: {loss:.3f}{difference}")
    most = ", the most that it tried" if pilot.chosen >= pilot.ratios[-1] else ""
    return (
        f"mix.general_per_task: auto chose {pilot.chosen:g}{most}. Held-out nats per answer token "
        f"by general rows for each shown task row: {', '.join(curve)}; {pilot.rows} task rows, "
        f"{pilot.repeats} repeats (alone: {pilot.alone}), {pilot.tokens:,} tokens, "
        f"{pilot.seconds:.0f} s."
    )


def dropped(settings: Settings) -> list[str]:
    """Return the names of the arms that a comparison cannot have if nothing is to be mixed."""
    arms = [arm_of(settings, name_of(arm)) for arm in settings.compare.arms]
    mixed = {arm.name for arm in arms if arm.uses_general_data}
    return [arm.name for arm in arms if arm.name in mixed or arm.hyperparameters_of in mixed]


def run(session: Session, rows: RunData, arm: Arm) -> Pilot:
    """Train mixtures of `PILOT_RATIOS` on some of the task rows, by cross-validation; choose one.

    It uses as many task rows as `mix.pilot_tokens` pay for. Raises ConfigError if these are fewer
    than `FEWEST`.
    """
    settings = session.settings
    repeats = _repeats(settings)
    count = _affordable(session, resolve_arm(arm, rows, settings), repeats)
    small = rows.at(count)
    alone = plain_sft(arm)
    tried = [(alone, round(repeats * (1 + ratio))) for ratio in _ALONE]
    for ratio in PILOT_RATIOS[1:]:
        tried.append((arm.model_copy(update={"general_per_task": ratio}), repeats))
    row_losses: list[FloatArray] = []
    groups: list[str] = []  # the same rows in every mixture
    tokens, seconds = 0, 0.0
    for own, shown in tried:
        plan = resolve_arm(own, small, settings)
        measured = _load_or_measure(session, plan, Hyperparameters(shown))
        row_losses.append(measured.losses)
        groups = measured.groups
        tokens += measured.tokens
        seconds += measured.seconds
    adapter.drop_adapter(session.model)
    best_alone = min(range(len(_ALONE)), key=lambda k: float(row_losses[k].mean()))
    without = row_losses[best_alone]
    by_ratio = np.stack([without, *row_losses[len(_ALONE) :]])
    losses = by_ratio.mean(axis=1)
    errors = np.array([_standard_error(row - without, groups) for row in by_ratio])
    return Pilot(
        ratios=PILOT_RATIOS,
        losses=tuple(losses.tolist()),
        errors=tuple(errors.tolist()),
        chosen=choose(PILOT_RATIOS, losses, errors),
        rows=count,
        repeats=repeats,
        alone=tried[best_alone][1],
        tokens=tokens,
        seconds=seconds,
    )


def choose(ratios: Sequence[float], losses: FloatArray, errors: FloatArray) -> float:
    """Return the ratio at the lowest point of a parabola in log2(1 + ratio) through the losses.

    It is 0 unless some ratio's loss is more than two standard errors (of its difference) below that
    of none: there are three looks, and trainings have a noise of their own.
    """
    if not any(losses[k] + 2 * errors[k] < losses[0] for k in range(1, len(ratios))):
        return 0.0
    logs = np.log2(1 + np.asarray(ratios))
    place = int(np.argmin(losses))
    bend, slope, _ = np.polyfit(logs, losses, 2)
    lowest = -slope / (2 * bend) if bend > 0 else float(logs[place])
    # Between the neighbours of the best one measured: four points say no more.
    near = logs[max(1, place - 1) : place + 2]
    bounded = min(max(lowest, float(near[0])), float(near[-1]))
    return float(round(2**bounded - 1, 1))


def _prepare_and_run(settings: Settings, *, compared: bool, progress: ProgressListener) -> Pilot:
    """Load the model and the rows that a pilot may see, and run it."""
    repeats = _repeats(settings)
    mix = settings.mix.model_copy(update={"repeats": repeats, "select": "random"})
    small = settings.model_copy(update={"mix": mix})
    loaded = base_model.load_for(settings)
    rows = run_data.prepare_for_pilot(
        small,
        loaded.tokenizer,
        loaded.context,
        settings.seeds[0] if compared else settings.seed,
        compared=compared,
        mixed_rows=_rows_of_pool(small, repeats),
    )
    return run(Session(loaded, small, None, progress), rows, own_arm(small))


def _repeats(settings: Settings) -> int:
    return REPEATS if settings.mix.repeats == "auto" else settings.mix.repeats


def _rows_of_pool(settings: Settings, repeats: int) -> int:
    """Return how many task rows the pool can feed at the largest ratio, up to `MOST`.

    A fifth of the pool is allowed to be unusable.
    """
    size = len(pool.open_pool(settings.general, settings.seed, near=settings.clean.near_duplicates))
    rows = int(0.8 * (size - settings.eval.general_rows) / (PILOT_RATIOS[-1] * repeats))
    if rows < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: its pilot mixes up to {PILOT_RATIOS[-1]:g} general rows "
            f"for each of {FEWEST} task rows shown {repeats} times, and the pool has {size:,} "
            "rows; add some, lower mix.repeats, or set a number"
        )
    return min(rows, MOST)


def _with_choice(settings: Settings, pilot: Pilot) -> Settings:
    """Return the settings with what a pilot chose.

    If it is 0, arms with general data are removed; epochs stay within TELL's steps.
    """
    compare, mix = settings.compare, settings.mix
    changes: dict[str, Any] = {"extra_trials": compare.extra_trials + len(pilot.ratios)}
    if pilot.chosen == 0:
        changes |= _without_mixtures(settings, pilot)
    elif compare.sft_epochs:  # set, perhaps by a budget, for the most that might be chosen
        most = max(1, math.floor(max(mix.candidates) * (1 + pilot.chosen)))
        changes["sft_epochs"] = tuple(sorted({min(epochs, most) for epochs in compare.sft_epochs}))
    parts = {
        "mix": mix.model_copy(update={"general_per_task": pilot.chosen}),
        "compare": compare.model_copy(update=changes),
    }
    return settings.model_copy(update=parts)


def _without_mixtures(settings: Settings, pilot: Pilot) -> dict[str, Any]:
    """Return what changes in a comparison if nothing is to be mixed."""
    compare = settings.compare
    gone = dropped(settings)
    arms = tuple(arm for arm in compare.arms if name_of(arm) not in gone)
    sizes_of = {name: sizes for name, sizes in compare.sizes_of.items() if name not in gone}
    epochs = {*settings.mix.candidates, min(pilot.alone, _MOST_EPOCHS)}
    return {
        "arms": arms if len(arms) > 1 else ("base", "sft"),
        "sizes_of": sizes_of,
        "sft_epochs": compare.sft_epochs or tuple(sorted(epochs)),
    }


def _affordable(session: Session, plan: ArmPlan, repeats: int) -> int:
    """Return how many rows of each task the tokens pay for: two folds train on every row once."""
    rows, budget = plan.rows, session.settings.mix.pilot_tokens
    tokenizer = session.model.tokenizer
    lengths = []
    for own in rows.tasks:
        lengths.append(_mean_length(own.train, plan.train_anchors[own.name], tokenizer))
    task = sum(lengths)  # tokens of one row of each task
    general = _mean_length(rows.general, None, tokenizer) * len(rows.tasks)
    mixed = sum(task + ratio * general for ratio in PILOT_RATIOS[1:])
    alone = sum(task * (1 + ratio) for ratio in _ALONE)
    each = repeats * (mixed + alone)
    bought = math.floor(budget / each)
    if bought < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: {budget:,} pilot tokens buy mixtures of {bought} task "
            f"rows, {FEWEST} are needed; set mix.pilot_tokens to {math.ceil(each * FEWEST):,}, or "
            "general_per_task to a number"
        )
    return min(bought, MOST, rows.longest)


def _mean_length(
    rows: Sequence[Example], anchor: Anchor | None, tokenizer: encode.Tokenizer
) -> float:
    """Return the tokens of a row, from the first few; 0 without rows."""
    if not rows:
        return 0.0
    form = encode.make_format(tokenizer, anchor)
    return float(np.mean([len(encode.encode(row, form)) for row in rows[:64]]))


@dataclass(frozen=True)
class _Measured:
    """The losses of one mixture on held-out task rows, and what it cost to measure them."""

    losses: FloatArray  # (rows,) nats per answer token
    groups: list[str]  # of content, of each row
    tokens: int  # trained on
    seconds: float


def _load_or_measure(session: Session, plan: ArmPlan, chosen: Hyperparameters) -> _Measured:
    """Measure a mixture, or read it back if an earlier pilot, perhaps killed, measured it."""
    loaded, settings = session.model, session.settings
    identity: list[Any] = [
        store.code(),
        loaded.fingerprint(),
        str(loaded.dtype),
        str(loaded.device),
        settings.train.model_dump(mode="json"),
        settings.mix.model_dump(mode="json"),
        plan.arm.model_dump(mode="json"),
        chosen,
        plan.rows.seed,
        plan.rows.fingerprints,
        [task.anchor for task in plan.rows.tasks],
    ]
    file = store.cache_dir() / "pilots" / f"{store.fingerprint(identity)[:32]}.json"
    stored = store.recalled(file)
    if stored:
        losses = np.array(stored["nats"])
        return _Measured(losses, stored["groups"], stored["tokens"], stored["seconds"])
    measured = _held_out(session, plan, chosen)
    content = {
        "nats": measured.losses.tolist(),
        "groups": measured.groups,
        "tokens": measured.tokens,
        "seconds": measured.seconds,
    }
    store.write_json(file, content)
    return measured


def _held_out(session: Session, plan: ArmPlan, chosen: Hyperparameters) -> _Measured:
    """Measure the loss of every task row, each held out once."""
    started = time.perf_counter()
    per_row = plan.general_count(1) / max(1, plan.rows.n_task)
    label = f"pilot of {per_row:g} general rows a task row, {chosen.repeats} repeats"
    losses: list[FloatArray] = []
    groups: list[str] = []
    tokens = 0
    seed = plan.rows.seed
    for place, fold in enumerate(plan.folds(_FOLDS, store.seed_for(seed, "pilot"))):
        runs = cell.fit(session, fold, chosen, seed, f"{label}, fold {place + 1}")
        tokens += sum(run.train_tokens for run in runs)
        for part in cell.tokenised(session.model, fold, fold.rows.tasks, "dev"):
            nats, counts = generate.nats(session.model, part)
            losses.append(nats / counts)
        for task in fold.rows.tasks:
            groups += [row.group for row in task.dev]
    return _Measured(np.concatenate(losses), groups, tokens, time.perf_counter() - started)


def _standard_error(differences: FloatArray, groups: Sequence[str]) -> float:
    """Return the standard error of the mean of rows, which vary by content group."""
    names, place = np.unique(groups, return_inverse=True)
    centred = np.bincount(place, differences - differences.mean(), len(names))
    count = len(names)
    return math.sqrt(count / (count - 1) * float((centred**2).sum())) / len(differences)
