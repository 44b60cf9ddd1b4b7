"""What a time budget buys: the speed of this model on these rows is measured first, then the richest honest design that fits.

A dense curve of SFT is cheap and shows whether anything can be identified; arms with general rows stand at few sizes. What a
design leaves out is said, here and in the certificate. While it runs, whole seeds are dropped rather than the budget overrun.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fulcrum import adapter, cell, encode, generate, material, metrics, model, pool, training
from fulcrum.arm_data import resolve
from fulcrum.arms import ARMS, by_dropping, chosen_arms, sizes_of
from fulcrum.cell import Cell
from fulcrum.comparison import plan_trials
from fulcrum.config import LEAST_FOLDS, CompareSettings, Settings
from fulcrum.errors import ConfigError
from fulcrum.material import RunData
from fulcrum.model import LoadedModel
from fulcrum.records import Trial
from fulcrum.units import ComparisonPlan, Job, Speed

QUICK_SECONDS = 600
_FEWEST = 8  # task rows of a design
_SAMPLE = 32  # rows of each kind by which speed is measured
PLANNED = 0.92  # of the budget: what is left over is for reading, writing and the unforeseen


def parse(text: str) -> float:
    """Seconds of a text such as 2h, 1h30m, 90m or 600s. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+)s)?", text.strip())
    seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0
    if seconds <= 0:
        raise ConfigError(f"--budget {text!r}: write hours, minutes and seconds as 2h, 1h30m, 90m or 600s")
    return seconds


@dataclass(frozen=True)
class Design:
    """Settings that a budget allows, the seconds that they are expected to take, and what had to be left out, in words."""

    settings: Settings
    seconds: float
    left_out: tuple[str, ...]
    units: int


def plan(settings: Settings, seconds: float, *, quick: bool = False) -> Design:
    """The richest design that `seconds` buy on this machine. Raises ConfigError where not even the least one fits."""
    if settings.mix.general_per_task == "auto":
        raise ConfigError(
            "--budget plans with a number of general rows, and mix.general_per_task is auto; set one, or leave --budget out"
        )
    started = time.perf_counter()
    loaded = model.load(settings.model, settings.train, trust_remote_code=settings.trust_remote_code)
    wide = _widest(settings)
    rows = material.of_seeds(wide, loaded.tokenizer, loaded.context, wide.seeds, mixed_rows=_SAMPLE)[0]
    speed = measure(rows, loaded, settings)
    found = None
    every = min(len(task.train) for task in rows.tasks)
    near = settings.clean.near_duplicates
    general = len(pool.open_pool(settings.general, settings.seed, near=near)) if settings.general else 0
    sizes = [every] if settings.compare.sizes is not None else _fewer(every)
    # Rather fewer rows than two seeds, whose intervals hold nearly everything.
    for seeds, most in itertools.product((1,) if quick else (3, 1), sizes):
        for design, left_out in designs(settings, most, quick=quick):
            if _general_rows(design, every) > general or len(design.seeds) < seeds:
                continue  # the pool cannot feed it, or there are too few seeds
            try:
                units, cost = predict(design, rows, loaded, speed)
            except ConfigError:
                continue  # what these settings ask of SFT does not fit into so few steps
            beyond = [f"task rows beyond {most} of {every}"] if most < every else []
            found = Design(design, cost, (*beyond, *left_out), units)
            if cost <= seconds * PLANNED - (time.perf_counter() - started):
                return found
    least = 0.0 if found is None else found.seconds
    raise ConfigError(
        f"--budget: the least design takes about {least / PLANNED / 60:.0f} minutes with this model on this machine, the "
        f"budget has {seconds / 60:.0f}; raise it, or lower mix.general_per_task, train.max_length or task.test_limit"
    )


def _fewer(every: int) -> list[int]:
    """All rows and ever fewer of them, by a factor of the root of 2, down to the fewest that say anything."""
    steps = (round(every / 2 ** (k / 2)) for k in range(64))
    return list(itertools.takewhile(lambda number: number >= _FEWEST, steps)) or [every]


def _general_rows(settings: Settings, every: int) -> float:
    """About how many general rows a design needs."""
    largest = [max(sizes_of(settings, arm, every)) for arm in chosen_arms(settings) if arm.uses_general_data]
    shown = max(largest, default=0) * max(settings.mix.candidates) * len(settings.tasks)
    return shown * settings.mix.per_task + settings.eval.general_rows


def _widest(settings: Settings) -> Settings:
    """The settings with all rows, so that every smaller design can be counted from the same material.

    Where seeds hold out folds of the rows: the fewest, and so largest, folds that there may be, which leave the fewest rows.
    """
    seeds = _seeds(settings, LEAST_FOLDS if settings.outer_folds else 1)
    changes: dict[str, Any] = {"sizes": None, "sizes_of": {}, "seeds": seeds}
    return settings.model_copy(update={"compare": settings.compare.model_copy(update=changes)})


def measure(rows: RunData, loaded: LoadedModel, settings: Settings) -> Speed:
    """Seconds a row: of training on task rows and on general rows, of scoring, of an answer; on rows of this run."""
    few = rows.at(_SAMPLE)
    mixed = next((arm for arm in chosen_arms(settings) if arm.uses_general_data and arm.task_rows), None)
    plain = ARMS["sft_anchor" if any(task.anchor for task in few.tasks) else "sft"]
    task = general = start = 0.0
    for arm in (plain, mixed):
        if arm is None:
            continue
        part = resolve(arm, few, settings).stream(loaded.tokenizer, 1, 0)
        began = time.perf_counter()
        _, result = training.train(loaded, part, None, settings.train, seed=0, repeats=1)
        # The first step warms up; what is no step is spent on every training alike.
        start = time.perf_counter() - began - result.seconds
        first, last = result.history[0], result.history[-1]
        seconds = (last.seconds - first.seconds) / (last.step - 1) * last.step if last.step > 1 else last.seconds
        if arm.uses_general_data:
            general = max(0.0, seconds - task * part.plan.task_positions) / max(1, part.plan.general_used)
        else:
            task = seconds / part.plan.task_positions
    own = few.tasks[0]
    form = encode.make_format(loaded.tokenizer, own.anchor)
    rows_of_test = own.test[:_SAMPLE]
    tokens = [encode.final_answer(row, form) for row in rows_of_test]
    prompts = [encode.prompt_ids(row.prompt, form) for row in rows_of_test]
    longest, at_once = own.max_new_tokens, settings.eval.batch_tokens
    scored = _timed(partial(generate.nats_at, loaded, tokens, cell.TEMPERATURES)) / len(tokens)
    answering = partial(generate.generate, loaded, prompts, form, max_new_tokens=longest, batch_tokens=at_once)
    answered = _timed(answering) / len(prompts)
    adapter.drop_adapter(loaded)
    return Speed(task, general, scored, answered, start)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def predict(settings: Settings, rows: RunData, loaded: LoadedModel, speed: Speed) -> tuple[int, float]:
    """Return the number of jobs of a design, and about how many seconds they take. Of what is tuned, the mean counts."""
    repeats = settings.mix.candidates
    general = rows.general[: round(len(rows.general) * max(repeats) / max(rows.repeats))]
    pairs = zip(rows.tasks, settings.tasks, strict=True)
    tasks = tuple(replace(task, test=task.test[: own.test_limit], metrics=own.metrics) for task, own in pairs)
    held_out = {name: part[: settings.eval.general_rows] for name, part in rows.held_out.items()}
    tried_now = replace(rows, repeats=repeats, general=general, tasks=tasks, held_out=held_out)
    by_seed = dict.fromkeys(settings.seeds, tried_now)
    comparison = ComparisonPlan(settings, by_seed, Path(settings.output_dir), speed)
    arms = chosen_arms(settings)
    trials = list(plan_trials(comparison, arms, loaded))
    seconds, number = sum(comparison.cost(job) for job in trials), len(trials)
    for arm in arms:
        source, times = arm.hyperparameters_of or arm.name, len(comparison.seeds_of(arm))
        for size in comparison.sizes(arm):
            tried = [job.hyperparameters for job in trials if (job.cell.arm.name, job.cell.size) == (source, size)]
            each = []
            for chosen in dict.fromkeys(one for one in tried if one is not None):
                final = Job(Cell(arm, size, comparison.seeds[0]), None, (Trial(chosen, 0.0, 0, 0.0),))
                each.append(comparison.cost(final))
            seconds += times * sum(each) / len(each)
            number += times
    return number, seconds


def designs(settings: Settings, rows: int, *, quick: bool) -> Iterator[tuple[Settings, list[str]]]:
    """Designs from the richest to the least, each with what it leaves out. What the settings fix themselves is kept."""
    compare, left_out = settings.compare, dict[str, str]()  # by what is left out: the last word counts
    fixed = compare.model_fields_set
    curve = [size for size in (16 * 2**k for k in range(20)) if size <= 0.75 * rows] + [rows]
    rows = max(compare.sizes) if compare.sizes else rows
    curve = [size for size in curve if size <= rows]
    arms = [arm.name for arm in chosen_arms(settings)]
    usual = ("sft_anchor", "sft") if quick else ("sft", "sft_anchor")
    reference = next((name for name in usual if name in arms), None)
    changes: dict[str, Any] = {
        name: value
        for name, value in (("tune", "each" if settings.outer_folds else "first"), ("folds", 2))
        if name not in fixed
    }
    if "arms" not in fixed and not quick:
        changes["arms"] = tuple(dict.fromkeys((*arms, "general_then_task", "placebo_permuted")))
    if "seeds" not in fixed:
        changes["seeds"] = _seeds(settings, 2 if quick else 8 if rows <= 64 else 5)
    if "sizes" not in fixed:
        smaller = max(16, rows // 4)
        changes["sizes"] = (rows,) if quick or smaller > 0.75 * rows else (smaller, rows)
    if "sizes_of" not in fixed and reference is not None:
        changes["sizes_of"] = {reference: tuple(curve[-3:] if quick else curve)}
    if quick:
        left_out["look"] = (
            "for a quick look: seeds but two, sizes of the mixture but one, most trials, metrics but one, side effects"
        )
    design = _changed(settings, **changes)
    if quick:
        design = few_rows(_thrifty(design, 4), 100)
        tasks = tuple(task.model_copy(update={"metrics": _few_metrics(task.metrics)}) for task in design.tasks)
        design = design.model_copy(update={"tasks": tasks, "eval": design.eval.model_copy(update={"general_rows": 0})})
        if "arms" not in fixed:
            mixed = "tell" if "tell" in arms else "mix"
            design = _changed(design, arms=tuple(name for name in arms if name in ("base", reference, mixed)))
    yield design, list(left_out.values())
    for rival in () if "arms" in fixed else by_dropping():
        present = [arm if isinstance(arm, str) else arm.name for arm in design.compare.arms]
        if rival in present:
            left_out[rival] = f"arm {rival}"
            design = _changed(design, arms=tuple(name for name in present if name != rival))
            yield design, list(left_out.values())
    if "seeds" not in fixed and len(design.seeds) > 5:
        left_out["seeds"] = "seeds beyond the fifth"
        design = _changed(design, seeds=_seeds(settings, 5))
        yield design, list(left_out.values())
    for limit in (300, 200, 100):
        if any((task.test_limit or limit + 1) > limit for task in settings.tasks):
            left_out["test"] = f"test rows beyond {limit}"
            design = few_rows(design, limit)
            yield design, list(left_out.values())
    if "sizes" not in fixed and len(design.compare.sizes or ()) > 1:
        left_out["mixtures"] = "mixtures of fewer than all rows, and so every row saving"
        design = _changed(design, sizes=(rows,))
        yield design, list(left_out.values())
    if design.mix.repeats == "auto":
        left_out["trials"] = "all but one number of repeats, and of epochs all but two"
        design = _thrifty(design, 4)
        yield design, list(left_out.values())
    if "sizes_of" not in fixed and reference is not None and len(curve) > 3:
        left_out["curve"] = "sizes of the reference but three"
        design = _changed(design, sizes_of={reference: (curve[0], curve[len(curve) // 2], rows)})
        yield design, list(left_out.values())
    if "seeds" not in fixed:
        for number in (3, 2):
            if len(design.seeds) > number:
                left_out["seeds"] = f"seeds but {number}: intervals will be wide"
                design = _changed(design, seeds=_seeds(settings, number))
                yield design, list(left_out.values())


def _seeds(settings: Settings, number: int) -> tuple[int, ...]:
    return tuple(range(settings.seed, settings.seed + number))


def _changed(settings: Settings, **changes: Any) -> Settings:
    """The settings with others for the comparison; sizes of arms that are no more go with these."""
    values = {**settings.compare.model_dump(), **changes}
    names = [arm if isinstance(arm, str) else arm["name"] if isinstance(arm, dict) else arm.name for arm in values["arms"]]
    values["sizes_of"] = {name: sizes for name, sizes in values["sizes_of"].items() if name in names}
    compare = CompareSettings.model_validate(values)
    return settings.model_copy(update={"compare": compare})


def _few_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The first metric that has a value for each row, beside those of labels, which need no more time."""
    first = next((name for name in names if metrics.HAS_OUTCOMES[name]), names[0])
    return tuple(name for name in names if name == first or name in metrics.LABELS)


def few_rows(settings: Settings, limit: int) -> Settings:
    """The settings with at most `limit` test rows of each task."""
    tasks = [task.model_copy(update={"test_limit": min(limit, task.test_limit or limit)}) for task in settings.tasks]
    return settings.model_copy(update={"tasks": tuple(tasks)})


def _thrifty(settings: Settings, repeats: int) -> Settings:
    """One number of repeats for mixtures, as many and three times as many epochs for SFT."""
    if settings.mix.repeats == "auto":
        settings = settings.model_copy(update={"mix": settings.mix.model_copy(update={"repeats": repeats})})
    repeats = max(settings.mix.candidates)
    if settings.compare.sft_epochs is not None or settings.mix.unit == "tokens":
        return settings
    most = math.floor(repeats * (1 + settings.mix.per_task))
    return _changed(settings, sft_epochs=tuple(sorted({repeats, min(most, 3 * repeats)})))
