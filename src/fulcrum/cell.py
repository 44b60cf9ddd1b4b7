"""One cell of a comparison: an arm at a size and a seed. Settings are chosen by cross-validation inside its task rows, then all
of these rows train the adapter that is scored, once, on test.

Dev rows are task rows here (rule (a) of a fair comparison): what chooses a setting is data that a user has to label too. The
last step's weights count in every arm.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fulcrum import adapter, encode, generate, metrics, scoring, shots, store, training, words
from fulcrum.adapter import State
from fulcrum.anchor import ANOTHER, reworded
from fulcrum.arms import anchor_of, asked_anchor, stream
from fulcrum.config import Arm, Settings, TrainSettings
from fulcrum.errors import ConfigError, DivergedError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import (
    Anchor,
    ArmResult,
    Example,
    FloatArray,
    Prediction,
    Setting,
    Task,
    Tokens,
    TrainPoint,
    TrialResult,
    Tried,
)

PROBED = 32  # general prompts
TEMPERATURES = tuple(2 ** (k / 3) for k in range(-3, 7))  # 0.5 to 4
GENERAL_PROMPTS = "general prompts"
DRIFT = "drift"
OTHER_ANCHORS = ("without", "with", "wrong", "reworded")  # than an arm is asked with
_SAMPLED = 64  # tokens of the base model's own text, by which drift is measured


class Watcher(Protocol):
    """Who is told how a run goes on: the terminal, a notebook, nobody."""

    def stage(self, text: str) -> None:
        """Something began."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """An optimizer step ended."""

    def count(self, label: str, done: int, total: int) -> None:
        """`done` of `total` are finished."""

    def overall(self, done: int, total: int, seconds: float) -> None:
        """`done` of `total` units of a comparison are finished; the others take about so many seconds."""


class Silent:
    """The watcher that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Say nothing."""

    def count(self, label: str, done: int, total: int) -> None:
        """Say nothing."""

    def overall(self, done: int, total: int, seconds: float) -> None:
        """Say nothing."""


def tell(watcher: Watcher, label: str, events: Path | None) -> training.Progress:
    """Report steps to the watcher, and some of them, and every dev loss, to a file for anyone who looks on from outside."""

    def told(point: TrainPoint, steps: int, newest: float | None) -> None:
        watcher.step(label, point, steps, newest)
        shown = newest is not None or training.is_shown(point.step, steps)
        if events is not None and shown:
            store.append_jsonl(events, {"run": label, "steps": steps, "dev_nll": newest, **store.plain(point)})

    return told


def tokenised(loaded: LoadedModel, tasks: Sequence[Task], arm: Arm, settings: Settings, part: str) -> list[list[Tokens]]:
    """The dev or test rows of every task as an arm is scored on them."""
    forms = [encode.make_format(loaded.tokenizer, asked_anchor(arm, task, settings)) for task in tasks]
    return [
        [encode.final_answer(example, form) for example in getattr(task, part)] for task, form in zip(tasks, forms, strict=True)
    ]


def own_settings(settings: TrainSettings, arm: Arm, setting: Setting) -> TrainSettings:
    """The trainer's settings with those of the arm and of the trial."""
    chosen = {"learning_rate": setting.learning_rate, "weight_decay": setting.weight_decay}
    changes = {**arm.train, **{key: value for key, value in chosen.items() if value is not None}}
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


def fit(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, setting: Setting, seed: int, label: str,
    folder: Path | None, watcher: Watcher,
) -> list[TrialResult]:  # fmt: skip
    """Train an arm on all rows of `rows` and put the adapter on the model; returns the record of each training.

    An arm that is not trained has no adapter. Of several `members` the average is put on.
    """
    trained = own_settings(settings.train, arm, setting)
    states, results = [], []
    for member in range(arm.members if arm.trained else 0):
        name = label if arm.members == 1 else f"{label}-member{member}"
        purpose = "train" if member == 0 else f"train {member}"
        order = store.seed_for(seed, purpose) if member else seed
        state, result = training.train(
            loaded, stream(rows, loaded.tokenizer, arm, settings, setting.repeats, order), None, trained,
            seed=store.seed_for(seed, purpose), repeats=setting.repeats, kl=setting.kl,
            checkpoint=None if folder is None else folder / "checkpoints" / name,
            progress=tell(watcher, name, None if folder is None else folder / store.EVENTS), say=watcher.stage,
        )  # fmt: skip
        states.append(state)
        results.append(result)
    if arm.members == 1 and states:
        return results  # it stands on the model since it was trained
    adapter.drop_adapter(loaded)
    if states:
        adapter.use(loaded, soup(states, setting.scale), _wider(trained, arm.members))
    return results


def soup(states: Sequence[State], scale: float) -> State:
    """The average of adapters, times `scale`, as one adapter of the ranks' sum: exact, unlike averages of its factors.

    The adapter's own scaling (alpha over rank) must stay what it was (`_wider`).
    """
    found: State = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        found[name] = torch.cat(parts, dim=0) if "lora_A" in name else torch.cat(parts, dim=1) * (scale / len(parts))
    return found


def _wider(trained: TrainSettings, members: int) -> TrainSettings:
    alpha = trained.lora_alpha * (members**0.5 if trained.use_rslora else members)
    return trained.model_copy(update={"lora_r": trained.lora_r * members, "lora_alpha": alpha})


def _length(loaded: LoadedModel) -> words.Length:
    plain = encode.make_format(loaded.tokenizer, None)
    return lambda example: encode.answer_length(example, plain)


def numbers_of_shots(rows: Material, loaded: LoadedModel, settings: Settings, seed: int) -> tuple[Setting, ...]:
    """What a k-shot arm tries: as many rows as the smallest fold leaves, in prompts that the model's context holds."""
    plain = encode.make_format(loaded.tokenizer, None)
    folds = rows.folds(settings.compare.folds, store.seed_for(seed, "folds"))
    tried = [shots.numbers(fold.tasks, plain, loaded.context) for fold in folds]
    return tuple(Setting(shots=number) for number in min(tried, key=len))


def tune(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, setting: Setting, seed: int, label: str,
    folder: Path | None, watcher: Watcher,
) -> Tried:  # fmt: skip
    """The loss of a setting on rows it was not trained on, by cross-validation inside the task rows; none of test is seen."""
    started = time.perf_counter()
    nats, counts = np.zeros((len(rows.tasks), len(TEMPERATURES))), np.zeros((len(rows.tasks), 1))
    tokens, seconds = 0, 0.0
    for place, fold in enumerate(rows.folds(settings.compare.folds, store.seed_for(seed, "folds"))):
        tasks: Sequence[Task] = fold.tasks
        if arm.words:
            pairs = [words.nats(task.train, task.dev, _length(loaded)) for task in tasks]
            losses = [(np.repeat(own[:, None], len(TEMPERATURES), axis=1), number) for own, number in pairs]
        else:
            tasks = [shots.prompted(task, setting.shots) for task in tasks] if setting.shots else tasks
            try:
                results = fit(fold, loaded, arm, settings, setting, seed, f"{label}-fold{place}", folder, watcher)
            except DivergedError as error:  # worse than any other setting: no other fold need show it
                watcher.stage(f"{label}: {error}")
                return Tried(setting, math.inf, tokens, time.perf_counter() - started)
            tokens += sum(result.train_tokens for result in results)
            seconds += sum(result.seconds for result in results)
            losses = [generate.nats_at(loaded, part, TEMPERATURES) for part in tokenised(loaded, tasks, arm, settings, "dev")]
        nats += [own.sum(axis=0) for own, _ in losses]
        counts += [[number.sum()] for _, number in losses]
    by_temperature = (nats / counts).mean(axis=0)
    loss = float(by_temperature[TEMPERATURES.index(1.0)])
    # A training that diverged is worse than any other. Of a resumed one the results know the seconds of earlier processes.
    loss = loss if math.isfinite(loss) else math.inf
    seconds = max(time.perf_counter() - started, seconds)
    return Tried(setting, loss, tokens, seconds, 1.0 if arm.words else best_temperature(by_temperature))


def best_temperature(losses: FloatArray) -> float:
    """The temperature of the least of `losses` (at TEMPERATURES): the lowest point of a parabola in its logarithm, between the
    neighbours of the least. 1 where losses are not finite."""
    least = int(np.argmin(losses))
    if not np.isfinite(losses).all():
        return 1.0
    if not 0 < least < len(losses) - 1:
        return TEMPERATURES[least]
    before, at, after = losses[least - 1 : least + 2]
    bend = before - 2 * at + after
    step = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return float(TEMPERATURES[least] * 2 ** (step / 3))


def best_first(arm: Arm, tried: Sequence[Tried]) -> list[tuple[int | None, Setting, float | None]]:
    """The settings that a final training may have, each with its place in `tried` and its temperature: those that did not
    diverge, the best first; of an arm of which nothing was tried, what it says itself."""
    if not tried:
        return [(None, Setting(repeats=arm.repeats or 1), None)]
    usable = [k for k in range(len(tried)) if not math.isinf(tried[k].dev_nll)]
    return [(k, tried[k].setting, tried[k].temperature) for k in sorted(usable, key=lambda k: tried[k].dev_nll)]


def final(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, tried: Sequence[Tried], seed: int, label: str,
    folder: Path | None, watcher: Watcher, *, probed: bool = False,
) -> ArmResult:  # fmt: skip
    """Train on all rows with the setting that was best, and score test, once; with `probed`, look for side effects too.
    Of an arm of which nothing was `tried` the setting is what it says itself.

    A training that diverges, before any test row is seen, gives way to the next best setting. Raises ConfigError where none is
    left.
    """
    started, results = time.perf_counter(), list[TrialResult]()
    for attempt, choice in enumerate(best_first(arm, tried)):
        chosen, setting, temperature = choice
        name = f"{label}-attempt{attempt}" if attempt else label
        try:
            results = [] if arm.words else fit(rows, loaded, arm, settings, setting, seed, name, folder, watcher)
        except DivergedError as error:
            watcher.stage(f"{name}, {setting.name}: {error}")
            continue
        if arm.words or adapter.is_finite(loaded):
            break
        watcher.stage(f"{name}: training diverged with {setting.name}")
    else:
        raise ConfigError(
            f"{label}: training diverged with every setting; lower train.learning_rate ({settings.train.learning_rate:g})"
        )
    tasks: Sequence[Task] = rows.tasks
    if setting.shots:
        tasks = [shots.prompted(task, setting.shots) for task in tasks]
    found = score(rows, tasks, loaded, arm, settings, label, watcher, temperature)
    probes = probe(rows, tasks, loaded, arm, settings) if probed and not arm.words else {}
    seconds = max(time.perf_counter() - started, sum(result.seconds for result in results))
    size = rows.longest if arm.seeded else 0
    trained = replace(results[0], history=thinned(results[0].history)) if results else None
    return replace(
        found, size=size, seed=seed, tried=tuple(tried), chosen=chosen, training=trained, seconds=seconds, probes=probes
    )


def probe(
    rows: Material, tasks: Sequence[Task], loaded: LoadedModel, arm: Arm, settings: Settings
) -> dict[str, tuple[Prediction, ...]]:
    """What the anchor ties, what leaks, how far the model drifted: test rows with other anchors than the arm is asked with
    (`other_anchors`), answers to general prompts without any, and (as `nll_sum`) KL(base || adapted) on texts that the base
    model sampled for these.

    A model that answers general prompts in the task's form has not learned when the task is asked for.
    """
    found: dict[str, tuple[Prediction, ...]] = {}
    for task in tasks:
        for name, changed in other_anchors(task, tasks, arm, settings).items():
            asked = replace(task, anchor=changed, metrics=("nll",))
            found[f"{task.name}: {name} anchor"] = scoring.predict(
                loaded, asked, asked.test, batch_tokens=settings.eval.batch_tokens
            )
    general = next((part for part in rows.held_out.values() if part), ())[:PROBED]
    if general:
        asked = Task("general", (), (), general, None, ("exact_match",), max(task.max_new_tokens for task in tasks))
        found[GENERAL_PROMPTS] = scoring.predict(loaded, asked, general, batch_tokens=settings.eval.batch_tokens)
    if general and loaded.peft is not None:
        found[DRIFT] = drift(loaded, general, settings.eval.batch_tokens)
    return found


def other_anchors(task: Task, tasks: Sequence[Task], arm: Arm, settings: Settings) -> dict[str, Anchor | None]:
    """What an arm that was trained with an anchor is asked with to see what hangs on it: none, another task's, the same in
    other words; and its own, where it is asked without one."""
    own = anchor_of(arm, task)
    if own is None:
        return {}
    given = next(one.anchor for one in settings.tasks if one.name == task.name) if arm.anchor is None else arm.anchor
    wording = given.paraphrase if given is not None and given.value == own else None
    others = (other.anchor for other in tasks if other.name != task.name)
    another = next((one.text for one in others if one is not None and one.text != own.text), ANOTHER)
    found: dict[str, Anchor | None] = {
        "without": None, "wrong": replace(own, text=another),
        "reworded": replace(own, text=wording or reworded(own.text)),
    }  # fmt: skip
    if asked_anchor(arm, task, settings) is None:
        found["with"] = own
        del found["without"]
    return found


def drift(loaded: LoadedModel, general: Sequence[Example], batch_tokens: int) -> tuple[Prediction, ...]:
    """KL(base || adapted) over texts that the base model samples for general prompts, the same for every adapter."""
    plain = encode.make_format(loaded.tokenizer, None)
    prompts = [encode.prompt_ids(row.prompt, plain) for row in general]
    with adapter.without(loaded):
        texts = generate.generate(loaded, prompts, plain, max_new_tokens=_SAMPLED, batch_tokens=batch_tokens, sample=0)
    said = [
        (row, text, replace(row, messages=(*row.prompt, replace(row.messages[-1], content=text))))
        for row, text in zip(general, texts, strict=True) if text
    ]  # fmt: skip
    nats, counts = generate.divergence(loaded, [encode.final_answer(own, plain) for *_, own in said])
    return tuple(
        Prediction(row.origin, row.group, row.question, row.answer, text, float(nat), int(number))
        for (row, text, _), nat, number in zip(said, nats, counts, strict=True)
    )


def thinned(history: Sequence[TrainPoint], points: int = 64) -> tuple[TrainPoint, ...]:
    """At most `points` of a history, evenly spaced, the last among them."""
    every = math.ceil(len(history) / points)
    return tuple(history[::-1][::every][::-1])


def score(
    rows: Material, tasks: Sequence[Task], loaded: LoadedModel, arm: Arm, settings: Settings, label: str, watcher: Watcher,
    temperature: float | None = None,
) -> ArmResult:  # fmt: skip
    """Score what stands on the model on the test rows of `tasks` (their loss at a `temperature` too), and on held-out general
    rows."""
    scores, predictions = {}, {}
    for task in tasks:
        if arm.words:
            predictions[task.name] = words.predict(task, _length(loaded))
        else:
            predictions[task.name] = scoring.predict(
                loaded, replace(task, anchor=asked_anchor(arm, task, settings)), task.test,
                batch_tokens=settings.eval.batch_tokens, temperature=temperature,
                count=partial(watcher.count, f"{label}: answers to {task.name}"),
            )  # fmt: skip
        scores[task.name] = metrics.score(predictions[task.name], task.metrics, draws=settings.eval.draws)
    general: Mapping[str, tuple[Prediction, ...]] = {}
    if not arm.words:
        general = scoring.general_predictions(loaded, rows.held_out, watcher.stage)
    general_nll = {name: metrics.score(found, ["nll"], draws=settings.eval.draws)[0] for name, found in general.items()}
    return ArmResult(arm.name, 0, 0, (), None, None, scores, predictions, general, general_nll, 0.0)
