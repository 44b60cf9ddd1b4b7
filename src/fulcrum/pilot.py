"""How much general data a task wants, none included: small mixtures are trained, and what they lose on rows held out is fitted.

A mixture is worth another number where its task rows repeat more or less often ("repetition mismatch", arXiv 2606.07597), so
the pilot takes fewer task rows *and* fewer general ones, and shows every task row as often as the run will. Task rows alone
would have the fewest steps that way, and whatever is mixed in, permuted answers too, would seem to help: so they may also be
shown more often, in as many steps as the larger mixtures (`_ALONE`). The best of these stands for none.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum import adapter, cell, encode, generate, material, model, pool, store
from fulcrum.arms import ARMS, anchor_of, arm_of, general_count, own_arm
from fulcrum.cell import Watcher
from fulcrum.config import PILOT_RATIOS, Arm, Settings
from fulcrum.errors import ConfigError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import Anchor, Example, FloatArray, Pilot, Setting

REPEATS = 4  # where the run's own number is tuned
FEWEST, MOST = 8, 32  # task rows

_FOLDS = 2
_MOST_EPOCHS = 32  # that a pilot of few rows speaks for
_ALONE = (0.0, 4.0, 16.0)  # task rows alone are trained in the steps of these ratios


def resolve(settings: Settings, *, compared: bool, watcher: Watcher) -> tuple[Settings, Pilot | None]:
    """The settings with `general_per_task: auto` settled by a pilot, and what it found; read back where a run is resumed.
    Where nothing is to be mixed, task rows may be shown as often as was best for them alone.

    Dev rows are task rows here; test rows are never seen: neither those of a run, nor (`compared`) those of a comparison.
    Raises ConfigError, DataError or ModelError.
    """
    if settings.mix.general_per_task != "auto":
        return settings, None
    if compared:
        settings.refuse_choosing_by("mix.general_per_task: auto", "anything", "use one seed, set a number")
    folder = Path(settings.output_dir)
    if (folder / store.PILOT).exists():
        found = store.read_as(folder / store.PILOT, Pilot)
    else:
        watcher.stage("a pilot: how much general data?")
        repeats = REPEATS if settings.mix.repeats == "auto" else settings.mix.repeats
        small = settings.model_copy(update={"mix": settings.mix.model_copy(update={"repeats": repeats, "select": "random"})})
        loaded = model.load(settings.model, settings.train, trust_remote_code=settings.trust_remote_code)
        seed = settings.seeds[0] if compared else settings.seed
        rows = material.prepare(
            small, loaded.tokenizer, loaded.context, seed, dev_apart=False, by_fold=compared, mixed_rows=_fed(small, repeats)
        )
        found = run(rows, loaded, own_arm(small), small, seed, watcher)
    return _settled(settings, found), found


def _fed(settings: Settings, repeats: int) -> int:
    """Task rows whose largest mixture the pool can feed, with room for rows that may not be used, up to `MOST`."""
    size = len(pool.open_pool(settings.general, settings.seed, near=settings.clean.near_duplicates))
    rows = int(0.8 * (size - settings.eval.general_rows) / (PILOT_RATIOS[-1] * repeats))
    if rows < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: its pilot mixes up to {PILOT_RATIOS[-1]:g} general rows for each of {FEWEST} task "
            f"rows shown {repeats} times, and the pool has {size:,} rows; add some, lower mix.repeats, or set a number"
        )
    return min(rows, MOST)


def _settled(settings: Settings, found: Pilot) -> Settings:
    """The settings with what a pilot chose: fewer arms where nothing is to be mixed, epochs within TELL's steps as they are."""
    compare, mix = settings.compare, settings.mix
    changes: dict[str, Any] = {"extra_trials": compare.extra_trials + len(found.ratios)}
    if found.chosen == 0:  # what mixes would have nothing to mix
        gone = dropped(settings)
        arms = tuple(arm for arm in compare.arms if _name(arm) not in gone)
        changes |= {
            "arms": arms if len(arms) > 1 else ("base", "sft"),
            "sizes_of": {name: sizes for name, sizes in compare.sizes_of.items() if name not in gone},
            "sft_epochs": compare.sft_epochs or tuple(sorted({*mix.candidates, min(found.alone, _MOST_EPOCHS)})),
        }
    elif compare.sft_epochs:  # they were set, by a budget perhaps, for the most that might be chosen
        most = max(1, math.floor(max(mix.candidates) * (1 + found.chosen)))
        changes["sft_epochs"] = tuple(sorted({min(epochs, most) for epochs in compare.sft_epochs}))
    return settings.model_copy(
        update={
            "mix": mix.model_copy(update={"general_per_task": found.chosen}), "compare": compare.model_copy(update=changes)
        }
    )  # fmt: skip


def _name(arm: str | Arm) -> str:
    return arm if isinstance(arm, str) else arm.name


def dropped(settings: Settings) -> list[str]:
    """The arms that a comparison cannot have where nothing is to be mixed, by name."""
    arms = [arm_of(settings, _name(arm)) for arm in settings.compare.arms]
    mixed = {arm.name for arm in arms if arm.mixes}
    return [arm.name for arm in arms if arm.name in mixed or arm.settings_of in mixed]


def keep(found: Pilot | None, folder: Path | None, gone: Sequence[str] = ()) -> list[str]:
    """Write what a pilot found beside the run that it settled; and say it, and which arms are `gone` for it."""
    if found is None:
        return []
    if folder is not None:
        store.write_json(folder / store.PILOT, found)
    return [sentence(found), *([f"Left out, since nothing is to be mixed: {', '.join(gone)}."] if gone else [])]


def sentence(found: Pilot) -> str:
    """What a pilot found, in a sentence."""
    curve = ", ".join(
        f"{ratio:g}: {loss:.3f}" + (f" (difference to 0 ± {error:.3f})" if ratio else "")
        for ratio, loss, error in zip(found.ratios, found.losses, found.errors, strict=True)
    )
    most = ", the most that it tried" if found.chosen >= found.ratios[-1] else ""
    return (
        f"mix.general_per_task: auto chose {found.chosen:g}{most}. Held-out nats per answer token by general rows for each "
        f"shown task row: {curve}; {found.rows} task rows, {found.repeats} repeats (alone: {found.alone}), "
        f"{found.tokens:,} tokens, {found.seconds:.0f} s."
    )


def run(rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, seed: int, watcher: Watcher) -> Pilot:
    """Train mixtures of `PILOT_RATIOS` by cross-validation inside some of the task rows, and choose one.

    The most that `mix.pilot_tokens` buy of the task rows are used. Raises ConfigError where they buy fewer than `FEWEST`.
    """
    repeats = REPEATS if settings.mix.repeats == "auto" else settings.mix.repeats
    count = _affordable(rows, loaded, arm, settings, repeats)
    small = rows.at(count)
    alone = ARMS["sft_anchor" if arm.anchored else "sft"]
    tried = [(alone, round(repeats * (1 + ratio))) for ratio in _ALONE]
    tried += [(arm.model_copy(update={"general_per_task": ratio}), repeats) for ratio in PILOT_RATIOS[1:]]
    found, tokens, seconds = [], 0, 0.0
    for own, shown in tried:
        label = f"pilot of {general_count(small, own, 1) / max(1, small.n_task):g} general rows a task row, {shown} repeats"
        nats, groups, trained, took = _once(small, loaded, own, settings, Setting(shown), seed, label, watcher)
        found.append(nats)
        tokens, seconds = tokens + trained, seconds + took
    adapter.drop_adapter(loaded)
    best = min(range(len(_ALONE)), key=lambda k: float(found[k].mean()))
    none = found[best]
    by_ratio = np.stack([none, *found[len(_ALONE) :]])
    losses = by_ratio.mean(axis=1)
    errors = np.array([_error(row - none, groups) for row in by_ratio])
    chosen = choose(PILOT_RATIOS, losses, errors)
    return Pilot(
        PILOT_RATIOS, tuple(losses.tolist()), tuple(errors.tolist()), chosen, count, repeats, tried[best][1], tokens, seconds
    )


def choose(ratios: Sequence[float], losses: FloatArray, errors: FloatArray) -> float:
    """The ratio at the lowest point of a parabola in log2(1 + ratio) through the losses.

    0 where no ratio's loss is more than two standard errors (of its difference) below that of none: there are three looks,
    and trainings have a noise of their own.
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


def _affordable(rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, repeats: int) -> int:
    """Task rows of each task that the pilot's tokens buy: with two folds every row is trained on once."""

    def length(part: Sequence[Example], anchor: Anchor | None) -> float:
        form = encode.make_format(loaded.tokenizer, anchor)
        return float(np.mean([len(encode.encode(row, form)) for row in part[:64]])) if part else 0.0

    task = sum(length(own.train, anchor_of(arm, own)) for own in rows.tasks)
    general = length(rows.general, None) * len(rows.tasks)
    mixed = sum(task + ratio * general for ratio in PILOT_RATIOS[1:])
    each = repeats * (mixed + sum(task * (1 + ratio) for ratio in _ALONE))
    bought = math.floor(settings.mix.pilot_tokens / each)
    if bought < FEWEST:
        raise ConfigError(
            f"mix.general_per_task: auto: {settings.mix.pilot_tokens:,} pilot tokens buy mixtures of {bought} task rows, "
            f"{FEWEST} are needed; set mix.pilot_tokens to {math.ceil(each * FEWEST):,}, or general_per_task to a number"
        )
    return min(bought, MOST, rows.longest)


def _once(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, setting: Setting, seed: int, label: str, watcher: Watcher
) -> tuple[FloatArray, list[str], int, float]:
    """What `_held_out` gives, and its seconds; kept in the cache, so that a pilot that was killed goes on with what is left."""
    about: list[Any] = [
        store.code(),
        loaded.fingerprint(),
        str(loaded.dtype),
        str(loaded.device),
        settings.train.model_dump(mode="json"),
    ]
    about += [settings.mix.model_dump(mode="json"), arm.model_dump(mode="json"), setting, seed, rows.fingerprints]
    key = store.fingerprint([*about, [task.anchor for task in rows.tasks]])
    file = store.cache_dir() / "pilots" / f"{key[:32]}.json"
    if known := store.recalled(file):
        return np.array(known["nats"]), known["groups"], known["tokens"], known["seconds"]
    started = time.perf_counter()
    nats, groups, tokens = _held_out(rows, loaded, arm, settings, setting, seed, label, watcher)
    seconds = time.perf_counter() - started
    store.write_json(file, {"nats": nats.tolist(), "groups": groups, "tokens": tokens, "seconds": seconds})
    return nats, groups, tokens, seconds


def _held_out(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, setting: Setting, seed: int, label: str, watcher: Watcher
) -> tuple[FloatArray, list[str], int]:
    """Nats per answer token of every task row, each held out once: (rows,); their content groups; and tokens trained on."""
    nats, tokens, groups = [], 0, list[str]()
    for place, fold in enumerate(rows.folds(_FOLDS, store.seed_for(seed, "pilot"))):
        trained = cell.fit(fold, loaded, arm, settings, setting, seed, f"{label}, fold {place + 1}", None, watcher)
        tokens += sum(result.train_tokens for result in trained)
        for part in cell.tokenised(loaded, fold.tasks, arm, settings, "dev"):
            own, counts = generate.nats(loaded, part)
            nats.append(own / counts)
        groups += [row.group for task in fold.tasks for row in task.dev]
    return np.concatenate(nats), groups, tokens


def _error(differences: FloatArray, groups: Sequence[str]) -> float:
    """Standard error of the mean of rows, which vary by content group."""
    names, place = np.unique(groups, return_inverse=True)
    centred = np.bincount(place, differences - differences.mean(), len(names))
    count = len(names)
    return math.sqrt(count / (count - 1) * float((centred**2).sum())) / len(differences)
