"""How much general data a task wants, none included: small mixtures are trained, and what they lose
on rows held out is fitted.

A mixture is worth another number where its task rows repeat more or less often ("repetition
mismatch", arXiv 2606.07597), so the pilot takes fewer task rows *and* fewer general ones, and shows
every task row as often as the run will. Task rows alone would have the fewest steps that way, and
whatever is mixed in, permuted answers too, would seem to help: so they may also be shown more
often, in as many steps as the larger mixtures (`_ALONE`). The best of these stands for none.
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

REPEATS = 4  # where the run's own number is tuned
FEWEST, MOST = 8, 32  # task rows

_FOLDS = 2
_MOST_EPOCHS = 32  # that a pilot of few rows speaks for
_ALONE = (0.0, 4.0, 16.0)  # task rows alone are trained in the steps of these ratios


def resolve(
    settings: Settings, *, compared: bool, progress: ProgressListener
) -> tuple[Settings, Pilot | None]:
    """Return the settings with `general_per_task: auto` settled, and what the pilot found.

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
    folder = Path(settings.output_dir)
    if (folder / store.PILOT).exists():
        found = store.read_as(folder / store.PILOT, Pilot)
    else:
        progress.stage("a pilot: how much general data?")
        repeats = REPEATS if settings.mix.repeats == "auto" else settings.mix.repeats
        small = settings.model_copy(
            update={"mix": settings.mix.model_copy(update={"repeats": repeats, "select": "random"})}
        )
        loaded = base_model.load(
            settings.model, settings.train, trust_remote_code=settings.trust_remote_code
        )
        seed = settings.seeds[0] if compared else settings.seed
        rows = run_data.prepare_for_pilot(
            small,
            loaded.tokenizer,
            loaded.context,
            seed,
            compared=compared,
            mixed_rows=_fed(small, repeats),
        )
        found = run(Session(loaded, small, None, progress), rows, own_arm(small))
    return _settled(settings, found), found


def _fed(settings: Settings, repeats: int) -> int:
    """Return how many task rows the pool can feed at the largest ratio, up to `MOST`.

    There is room for general rows that may not be used.
    """
    size = len(pool.open_pool(settings.general, settings.seed, near=settings.clean.near_duplicates))
    rows = int(0.8 * (size - settings.eval.general_rows) / (PILOT_RATIOS[-1] * repeats))
    if rows < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: its pilot mixes up to {PILOT_RATIOS[-1]:g} general rows "
            f"for each of {FEWEST} task "
            f"rows shown {repeats} times, and the pool has {size:,} rows; add some, lower "
            "mix.repeats, or set a number"
        )
    return min(rows, MOST)


def _settled(settings: Settings, found: Pilot) -> Settings:
    """Return the settings with what a pilot chose.

    If it is 0, arms with general data go; epochs stay within TELL's steps.
    """
    compare, mix = settings.compare, settings.mix
    changes: dict[str, Any] = {"extra_trials": compare.extra_trials + len(found.ratios)}
    if found.chosen == 0:  # what mixes would have nothing to mix
        gone = dropped(settings)
        arms = tuple(arm for arm in compare.arms if name_of(arm) not in gone)
        changes |= {
            "arms": arms if len(arms) > 1 else ("base", "sft"),
            "sizes_of": {
                name: sizes for name, sizes in compare.sizes_of.items() if name not in gone
            },
            "sft_epochs": compare.sft_epochs
            or tuple(sorted({*mix.candidates, min(found.alone, _MOST_EPOCHS)})),
        }
    elif compare.sft_epochs:  # set, perhaps by a budget, for the most that might be chosen
        most = max(1, math.floor(max(mix.candidates) * (1 + found.chosen)))
        changes["sft_epochs"] = tuple(sorted({min(epochs, most) for epochs in compare.sft_epochs}))
    parts = {
        "mix": mix.model_copy(update={"general_per_task": found.chosen}),
        "compare": compare.model_copy(update=changes),
    }
    return settings.model_copy(update=parts)


def dropped(settings: Settings) -> list[str]:
    """Return the names of the arms that a comparison cannot have if nothing is to be mixed."""
    arms = [arm_of(settings, name_of(arm)) for arm in settings.compare.arms]
    mixed = {arm.name for arm in arms if arm.uses_general_data}
    return [arm.name for arm in arms if arm.name in mixed or arm.hyperparameters_of in mixed]


def keep(found: Pilot | None, folder: Path | None, gone: Sequence[str] = ()) -> list[str]:
    """Write what a pilot found into the run's folder; say it, and which arms are `gone`."""
    if found is None:
        return []
    if folder is not None:
        store.write_json(folder / store.PILOT, found)
    return [
        sentence(found),
        *([f"Left out, since nothing is to be mixed: {', '.join(gone)}."] if gone else []),
    ]


def sentence(found: Pilot) -> str:
    """What a pilot found, in a sentence."""
    curve = ", ".join(
        f"{ratio:g}: {loss:.3f}" + (f" (difference to 0 ± {error:.3f})" if ratio else "")
        for ratio, loss, error in zip(found.ratios, found.losses, found.errors, strict=True)
    )
    most = ", the most that it tried" if found.chosen >= found.ratios[-1] else ""
    return (
        f"mix.general_per_task: auto chose {found.chosen:g}{most}. Held-out nats per answer token "
        "by general rows for each "
        f"shown task row: {curve}; {found.rows} task rows, {found.repeats} repeats (alone: "
        f"{found.alone}), "
        f"{found.tokens:,} tokens, {found.seconds:.0f} s."
    )


def run(session: Session, rows: RunData, arm: Arm) -> Pilot:
    """Train mixtures of `PILOT_RATIOS` on some of the task rows, by cross-validation; choose one.

    The most that `mix.pilot_tokens` buy of the task rows are used. Raises ConfigError if they buy
    fewer than `FEWEST`.
    """
    settings = session.settings
    repeats = REPEATS if settings.mix.repeats == "auto" else settings.mix.repeats
    count = _affordable(session, resolve_arm(arm, rows, settings), repeats)
    small = rows.at(count)
    alone = plain_sft(arm)
    tried = [(alone, round(repeats * (1 + ratio))) for ratio in _ALONE]
    tried += [
        (arm.model_copy(update={"general_per_task": ratio}), repeats) for ratio in PILOT_RATIOS[1:]
    ]
    found, groups, tokens, seconds = [], list[str](), 0, 0.0
    for own, shown in tried:
        measured = _once(session, resolve_arm(own, small, settings), Hyperparameters(shown))
        found.append(measured.nats)
        groups = measured.groups
        tokens += measured.tokens
        seconds += measured.seconds
    adapter.drop_adapter(session.model)
    best = min(range(len(_ALONE)), key=lambda k: float(found[k].mean()))
    none = found[best]
    by_ratio = np.stack([none, *found[len(_ALONE) :]])
    losses = by_ratio.mean(axis=1)
    errors = np.array([_error(row - none, groups) for row in by_ratio])
    return Pilot(
        ratios=PILOT_RATIOS,
        losses=tuple(losses.tolist()),
        errors=tuple(errors.tolist()),
        chosen=choose(PILOT_RATIOS, losses, errors),
        rows=count,
        repeats=repeats,
        alone=tried[best][1],
        tokens=tokens,
        seconds=seconds,
    )


def choose(ratios: Sequence[float], losses: FloatArray, errors: FloatArray) -> float:
    """The ratio at the lowest point of a parabola in log2(1 + ratio) through the losses.

    0 where no ratio's loss is more than two standard errors (of its difference) below that of none:
    there are three looks, and trainings have a noise of their own.
    """
    if not any(losses[k] + 2 * errors[k] < losses[0] for k in range(1, len(ratios))):
        return 0.0
    logs = np.log2(1 + np.asarray(ratios))
    place = int(np.argmin(losses))
    best = float(logs[place])
    bend, slope, _ = np.polyfit(logs, losses, 2)
    lowest = -slope / (2 * bend) if bend > 0 else best
    # Between the neighbours of the best one measured: four points say no more.
    near = logs[max(1, place - 1) : place + 2]
    bounded = min(max(lowest, float(near[0])), float(near[-1]))
    return float(round(2**bounded - 1, 1))


def _affordable(session: Session, plan: ArmPlan, repeats: int) -> int:
    """Return how many rows of each task the tokens buy: two folds train on every row once."""

    def length(part: Sequence[Example], anchor: Anchor | None) -> float:
        form = encode.make_format(session.model.tokenizer, anchor)
        return float(np.mean([len(encode.encode(row, form)) for row in part[:64]])) if part else 0.0

    rows, budget = plan.rows, session.settings.mix.pilot_tokens
    task = sum(length(own.train, plan.train_anchors[own.name]) for own in rows.tasks)
    general = length(rows.general, None) * len(rows.tasks)
    mixed = sum(task + ratio * general for ratio in PILOT_RATIOS[1:])
    each = repeats * (mixed + sum(task * (1 + ratio) for ratio in _ALONE))
    bought = math.floor(budget / each)
    if bought < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: {budget:,} pilot tokens buy mixtures of {bought} task "
            "rows, "
            f"{FEWEST} are needed; set mix.pilot_tokens to {math.ceil(each * FEWEST):,}, or "
            "general_per_task to a number"
        )
    return min(bought, MOST, rows.longest)


@dataclass(frozen=True)
class _Measured:
    """What one mixture loses on task rows held out, and what it cost to know it."""

    nats: FloatArray  # (rows,) per answer token
    groups: list[str]  # of content, of each row
    tokens: int  # trained on
    seconds: float


def _once(session: Session, plan: ArmPlan, chosen: Hyperparameters) -> _Measured:
    """Measure a mixture, or read it back: a pilot that was killed resumes with what is left."""
    loaded, settings = session.model, session.settings
    about: list[Any] = [
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
    file = store.cache_dir() / "pilots" / f"{store.fingerprint(about)[:32]}.json"
    known = store.recalled(file)
    if known:
        return _Measured(
            np.array(known["nats"]), known["groups"], known["tokens"], known["seconds"]
        )
    found = _held_out(session, plan, chosen)
    store.write_json(file, {**vars(found), "nats": found.nats.tolist()})
    return found


def _held_out(session: Session, plan: ArmPlan, chosen: Hyperparameters) -> _Measured:
    """Measure the loss of every task row, each held out once."""
    started = time.perf_counter()
    per_row = plan.general_count(1) / max(1, plan.rows.n_task)
    label = f"pilot of {per_row:g} general rows a task row, {chosen.repeats} repeats"
    nats, tokens, groups = [], 0, list[str]()
    seed = plan.rows.seed
    for place, fold in enumerate(plan.folds(_FOLDS, store.seed_for(seed, "pilot"))):
        runs = cell.fit(session, fold, chosen, seed, f"{label}, fold {place + 1}")
        tokens += sum(run.train_tokens for run in runs)
        for part in cell.tokenised(session.model, fold, fold.rows.tasks, "dev"):
            own, counts = generate.nats(session.model, part)
            nats.append(own / counts)
        groups += [row.group for task in fold.rows.tasks for row in task.dev]
    return _Measured(np.concatenate(nats), groups, tokens, time.perf_counter() - started)


def _error(differences: FloatArray, groups: Sequence[str]) -> float:
    """Standard error of the mean of rows, which vary by content group."""
    names, place = np.unique(groups, return_inverse=True)
    centred = np.bincount(place, differences - differences.mean(), len(names))
    count = len(names)
    return math.sqrt(count / (count - 1) * float((centred**2).sum())) / len(differences)
