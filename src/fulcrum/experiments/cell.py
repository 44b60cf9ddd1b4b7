"""Tune, train and score one cell of a comparison: an arm at a size and a seed.

Hyperparameters are chosen by cross-validation inside the cell's task rows. Then all of these rows
train the adapter that is scored on test, once. Dev rows are task rows here (rule (a) of a fair
comparison): a user has to label the rows that choose hyperparameters too. In every arm the weights
of the last step are used.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TrainSettings
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DivergedError
from fulcrum.core.progress import ProgressListener
from fulcrum.core.types import (
    Anchor,
    ArmResult,
    Example,
    FloatArray,
    Hyperparameters,
    IntArray,
    Prediction,
    Task,
    Tokens,
    TrainingRun,
    TrainPoint,
    Trial,
)
from fulcrum.data import encode
from fulcrum.data.anchor_template import ANOTHER, reworded
from fulcrum.experiments import baselines, scoring
from fulcrum.experiments.arm_data import ArmPlan
from fulcrum.model import adapter, distributed, generate
from fulcrum.model.adapter import State
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import metrics
from fulcrum.training import loop

PROBED = 32  # general prompts
TEMPERATURES = tuple(2 ** (k / 3) for k in range(-3, 7))  # 0.5 to 4
GENERAL_PROMPTS = "general prompts"
DRIFT = "drift"
OTHER_ANCHORS = ("without", "with", "wrong", "reworded")  # not the one that an arm is asked with
_SAMPLED = 64  # tokens of the base model's own text, by which drift is measured


@dataclass(frozen=True)
class Session:
    """What every part of a run shares."""

    model: LoadedModel
    settings: Settings
    folder: Path | None  # of the run; None: nothing is kept
    progress: ProgressListener

    @property
    def kept(self) -> Path | None:
        """Return the folder that this process writes to; None if it writes nothing."""
        return self.folder if distributed.writes() else None

    def listener(self, label: str) -> loop.Progress:
        """Return a function that reports the steps of a training under this label.

        It passes every step to the listener. Some steps, and every dev loss, also go to a file, for
        anyone who watches from outside.
        """
        events = None if self.kept is None else self.kept / store.EVENTS

        def report(point: TrainPoint, steps: int, newest: float | None) -> None:
            self.progress.step(label, point, steps, newest)
            is_shown = newest is not None or loop.is_shown(point.step, steps)
            if events is not None and is_shown:
                line = {"run": label, "steps": steps, "dev_nll": newest, **store.plain(point)}
                store.append_jsonl(events, line)

        return report

    def checkpoint(self, label: str) -> Path | None:
        """Return where the training with this label saves its checkpoints."""
        return None if self.folder is None else self.folder / "checkpoints" / label


@dataclass(frozen=True)
class Cell:
    """An arm at a number of task rows and a seed."""

    arm: Arm
    size: int  # task rows of each task; 0 for an arm that does not depend on them
    seed: int

    @property
    def name(self) -> str:
        """Return its name in files and messages."""
        return f"{self.arm.name}-{self.size}-seed{self.seed}"


# Training.


def fit(
    session: Session, plan: ArmPlan, chosen: Hyperparameters, seed: int, label: str
) -> list[TrainingRun]:
    """Train an arm on all its task rows, put the adapter on the model, return each training.

    An arm that is not trained has no adapter. Several `members` are trained one after the other,
    and their average is put on the model.
    """
    settings = own_settings(session.settings.train, plan.arm, chosen)
    states: list[State] = []
    runs: list[TrainingRun] = []
    for member in range(plan.members):
        name = label if plan.members == 1 else f"{label}-member{member}"
        purpose = "train" if member == 0 else f"train {member}"
        order = store.seed_for(seed, purpose) if member else seed
        recipe = loop.Recipe(settings, store.seed_for(seed, purpose), chosen.repeats, chosen.kl)
        state, run = loop.train(
            session.model,
            plan.stream(session.model.tokenizer, chosen.repeats, order),
            recipe,
            checkpoint=session.checkpoint(name),
            progress=session.listener(name),
            say=session.progress.stage,
        )
        states.append(state)
        runs.append(run)
    if plan.members == 1:
        return runs  # its adapter is still on the model
    adapter.drop_adapter(session.model)
    if states:
        average = average_adapters(states, chosen.scale)
        adapter.use(session.model, average, _averaged_settings(settings, plan.members))
    return runs


def own_settings(settings: TrainSettings, arm: Arm, chosen: Hyperparameters) -> TrainSettings:
    """Return the trainer's settings with those of the arm and of the trial."""
    changes = dict(arm.train)
    if chosen.learning_rate is not None:
        changes["learning_rate"] = chosen.learning_rate
    if chosen.weight_decay is not None:
        changes["weight_decay"] = chosen.weight_decay
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


def average_adapters(states: Sequence[State], scale: float) -> State:
    """Return the average of adapters, times `scale`, as one adapter whose rank is their sum.

    It is exact, unlike an average of the factors. The adapter's own scaling (alpha over rank) must
    stay the same (`_averaged_settings`).
    """
    average: State = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        if "lora_A" in name:
            average[name] = torch.cat(parts, dim=0)
        else:
            average[name] = torch.cat(parts, dim=1) * (scale / len(parts))
    return average


def _averaged_settings(settings: TrainSettings, members: int) -> TrainSettings:
    alpha = settings.lora_alpha * (members**0.5 if settings.use_rslora else members)
    return settings.model_copy(update={"lora_r": settings.lora_r * members, "lora_alpha": alpha})


# Trials.


def tune(session: Session, plan: ArmPlan, cell: Cell, chosen: Hyperparameters) -> Trial:
    """Measure hyperparameters by cross-validation inside the task rows; no test row is seen.

    A training that diverges has an infinite loss, so that every other is better.
    """
    started = time.perf_counter()
    label = f"{cell.name}-{chosen.name}"
    nats = np.zeros((len(plan.rows.tasks), len(TEMPERATURES)))  # summed over the rows of all folds
    counts = np.zeros((len(plan.rows.tasks), 1))
    tokens = 0
    trained_seconds = 0.0
    folds = plan.folds(session.settings.compare.folds, store.seed_for(cell.seed, "folds"))
    for place, fold in enumerate(folds):
        if plan.arm.tfidf:
            losses = _word_count_losses(session.model, fold.rows.tasks)
        else:
            try:
                runs = fit(session, fold, chosen, cell.seed, f"{label}-fold{place}")
            except DivergedError as error:  # the other folds need not be tried
                session.progress.stage(f"{label}: {error}")
                return Trial(chosen, math.inf, tokens, time.perf_counter() - started)
            tokens += sum(run.train_tokens for run in runs)
            trained_seconds += sum(run.seconds for run in runs)
            losses = _dev_losses(session.model, plan, _with_shots(fold.rows.tasks, chosen))
        for task, (row_nats, row_tokens) in enumerate(losses):
            nats[task] += row_nats.sum(axis=0)
            counts[task] += row_tokens.sum()
    by_temperature = (nats / counts).mean(axis=0)
    loss = float(by_temperature[TEMPERATURES.index(1.0)])
    if not math.isfinite(loss):
        loss = math.inf
    # A resumed training knows the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, trained_seconds)
    temperature = 1.0 if plan.arm.tfidf else best_temperature(by_temperature)
    return Trial(chosen, loss, tokens, seconds, temperature)


def tokenised(
    model: LoadedModel, plan: ArmPlan, tasks: Sequence[Task], part: str
) -> list[list[Tokens]]:
    """Return the dev or test rows of every task as the arm is scored on them."""
    by_task = []
    for task in tasks:
        form = encode.make_format(model.tokenizer, plan.ask_anchors[task.name])
        by_task.append([encode.final_answer(example, form) for example in getattr(task, part)])
    return by_task


def _dev_losses(
    model: LoadedModel, plan: ArmPlan, tasks: Sequence[Task]
) -> list[tuple[FloatArray, IntArray]]:
    """Return each task's dev losses in nats (rows, temperatures), and answer tokens (rows,)."""
    losses = []
    for rows in tokenised(model, plan, tasks, "dev"):
        losses.append(generate.losses_at(model, rows, TEMPERATURES))
    return losses


def _word_count_losses(
    model: LoadedModel, tasks: Sequence[Task]
) -> list[tuple[FloatArray, IntArray]]:
    """Return the same for the word-count classifier, whose loss no temperature changes."""
    losses = []
    for task in tasks:
        nats, counts = baselines.losses(task.train, task.dev, _answer_length(model))
        losses.append((np.repeat(nats[:, None], len(TEMPERATURES), axis=1), counts))
    return losses


def _answer_length(model: LoadedModel) -> baselines.Length:
    plain = encode.make_format(model.tokenizer, None)
    return lambda example: encode.answer_length(example, plain)


def _with_shots(tasks: Sequence[Task], chosen: Hyperparameters) -> Sequence[Task]:
    """Return the tasks with `chosen.shots` training rows in their prompts."""
    if not chosen.shots:
        return tasks
    return [baselines.add_shots(task, chosen.shots) for task in tasks]


def few_shot_trials(model: LoadedModel, plan: ArmPlan, seed: int) -> tuple[Hyperparameters, ...]:
    """Return the numbers of examples that a few-shot arm tries.

    The smallest fold must have that many rows, and the model's context must hold the prompts.
    """
    plain = encode.make_format(model.tokenizer, None)
    folds = plan.folds(plan.settings.compare.folds, store.seed_for(seed, "folds"))
    numbers = [baselines.shot_counts(fold.rows.tasks, plain, model.context) for fold in folds]
    return tuple(Hyperparameters(shots=number) for number in min(numbers, key=len))


def best_temperature(losses: FloatArray) -> float:
    """Return the temperature with the least loss; `losses` are those at TEMPERATURES.

    A parabola in the logarithm of the temperature is laid through the least loss and its
    neighbours. Returns 1 if a loss is not finite.
    """
    least = int(np.argmin(losses))
    if not np.isfinite(losses).all():
        return 1.0
    if not 0 < least < len(losses) - 1:
        return TEMPERATURES[least]
    before, at, after = losses[least - 1 : least + 2]
    bend = before - 2 * at + after
    step = 0.5 * (before - after) / bend if bend > 0 else 0.0
    return float(TEMPERATURES[least] * 2 ** (step / 3))


# The final training.


@dataclass(frozen=True)
class Choice:
    """Hyperparameters that a final training may have."""

    place: int | None  # among the trials; None: nothing was tried
    hyperparameters: Hyperparameters
    temperature: float | None


def best_first(arm: Arm, tried: Sequence[Trial]) -> list[Choice]:
    """Return the trials that did not diverge, the best first.

    If `tried` is empty, train with the arm's own `repeats`.
    """
    if not tried:
        return [Choice(None, Hyperparameters(repeats=arm.repeats or 1), None)]
    usable = [place for place in range(len(tried)) if not math.isinf(tried[place].dev_nll)]
    usable.sort(key=lambda place: tried[place].dev_nll)
    return [Choice(place, tried[place].setting, tried[place].temperature) for place in usable]


def final(
    session: Session, plan: ArmPlan, cell: Cell, tried: Sequence[Trial], *, probed: bool = False
) -> ArmResult:
    """Train on all rows with the best of `tried`, and score test, once.

    With `probed`, measure side effects too. If a training diverges, which shows before any test row
    is seen, the next best hyperparameters are used. Raises ConfigError if none are left.
    """
    started = time.perf_counter()
    choice, runs = _fit_best(session, plan, cell, tried)
    tasks = _with_shots(plan.rows.tasks, choice.hyperparameters)
    result = score(session, plan, tasks, cell.name, choice.temperature)
    probes: dict[str, tuple[Prediction, ...]] = {}
    if probed and not plan.arm.tfidf:
        probes = probe(session, plan, tasks)
    return replace(
        result,
        size=plan.rows.longest if plan.arm.depends_on_seed else 0,
        seed=cell.seed,
        tried=tuple(tried),
        chosen=choice.place,
        training=replace(runs[0], history=_thin(runs[0].history)) if runs else None,
        seconds=max(time.perf_counter() - started, sum(run.seconds for run in runs)),
        probes=probes,
    )


def _fit_best(
    session: Session, plan: ArmPlan, cell: Cell, tried: Sequence[Trial]
) -> tuple[Choice, list[TrainingRun]]:
    """Train with the best hyperparameters that do not diverge on all rows."""
    for attempt, choice in enumerate(best_first(plan.arm, tried)):
        if plan.arm.tfidf:
            return choice, []
        label = f"{cell.name}-attempt{attempt}" if attempt else cell.name
        name = choice.hyperparameters.name
        try:
            runs = fit(session, plan, choice.hyperparameters, cell.seed, label)
        except DivergedError as error:
            session.progress.stage(f"{label}, {name}: {error}")
            continue
        if adapter.is_finite(session.model):
            return choice, runs
        session.progress.stage(f"{label}: training diverged with {name}")
    rate = session.settings.train.learning_rate
    raise ConfigError(
        f"{cell.name}: training diverged with every setting; lower train.learning_rate ({rate:g})"
    )


def _thin(history: Sequence[TrainPoint], points: int = 64) -> tuple[TrainPoint, ...]:
    """Return at most `points` of a history, evenly spaced, the last among them."""
    every = math.ceil(len(history) / points)
    return tuple(history[::-1][::every][::-1])


def score(
    session: Session,
    plan: ArmPlan,
    tasks: Sequence[Task],
    label: str,
    temperature: float | None = None,
) -> ArmResult:
    """Score the model with whatever is on it: test rows of `tasks`, and held-out general rows.

    With a `temperature`, test rows have their loss at it too.
    """
    model = session.model
    evaluation = session.settings.eval
    scores = {}
    predictions = {}
    for task in tasks:
        if plan.arm.tfidf:
            predictions[task.name] = baselines.predict(task, _answer_length(model))
        else:
            predictions[task.name] = scoring.predict(
                model,
                replace(task, anchor=plan.ask_anchors[task.name]),
                task.test,
                batch_tokens=evaluation.batch_tokens,
                temperature=temperature,
                count=partial(session.progress.count, f"{label}: answers to {task.name}"),
            )
        scores[task.name] = metrics.score(
            predictions[task.name], task.metrics, draws=evaluation.draws
        )
    general: Mapping[str, tuple[Prediction, ...]] = {}
    if not plan.arm.tfidf:
        general = scoring.general_predictions(model, plan.rows.held_out, session.progress.stage)
    general_nll = {}
    for source, rows in general.items():
        general_nll[source] = metrics.score(rows, ["nll"], draws=evaluation.draws)[0]
    return ArmResult(
        arm=plan.arm.name,
        size=0,
        seed=0,
        tried=(),
        chosen=None,
        training=None,
        scores=scores,
        predictions=predictions,
        general=general,
        general_nll=general_nll,
        seconds=0.0,
    )


# Side effects.


def probe(
    session: Session, plan: ArmPlan, tasks: Sequence[Task]
) -> dict[str, tuple[Prediction, ...]]:
    """Measure side effects: how much depends on the anchor, what leaks, how far the model drifted.

    There are test rows with anchors that the arm is not asked with (`other_anchors`), answers to
    general prompts without any, and (as `nll_sum`) KL(base || adapted) on texts that the base model
    sampled for these prompts. A model that answers general prompts in the task's form has not
    learned when it is asked for the task.
    """
    model = session.model
    batch_tokens = session.settings.eval.batch_tokens
    probes: dict[str, tuple[Prediction, ...]] = {}
    for task in tasks:
        for name, anchor in other_anchors(task, tasks, plan).items():
            changed = replace(task, anchor=anchor, metrics=("nll",))
            probes[f"{task.name}: {name} anchor"] = scoring.predict(
                model, changed, changed.test, batch_tokens=batch_tokens
            )
    general = next((part for part in plan.rows.held_out.values() if part), ())[:PROBED]
    if general:
        longest = max(task.max_new_tokens for task in tasks)
        prompts = Task("general", (), (), general, None, ("exact_match",), longest)
        probes[GENERAL_PROMPTS] = scoring.predict(
            model, prompts, general, batch_tokens=batch_tokens
        )
    if general and model.peft is not None:
        probes[DRIFT] = drift(model, general, batch_tokens)
    return probes


def other_anchors(task: Task, tasks: Sequence[Task], plan: ArmPlan) -> dict[str, Anchor | None]:
    """Return the anchors with which a trained arm is probed, by what differs from its own.

    They are none, another task's, and the same in other words. An arm that is asked without an
    anchor is probed with its own instead of without.
    """
    own = plan.train_anchors[task.name]
    if own is None:
        return {}
    given = plan.arm.anchor
    if given is None:
        given = next(one.anchor for one in plan.settings.tasks if one.name == task.name)
    paraphrase = None
    if given is not None and given.value == own:
        paraphrase = given.paraphrase
    another = ANOTHER
    for other in tasks:
        if other.name != task.name and other.anchor is not None and other.anchor.text != own.text:
            another = other.anchor.text
            break
    anchors: dict[str, Anchor | None] = {
        "without": None,
        "wrong": replace(own, text=another),
        "reworded": replace(own, text=paraphrase or reworded(own.text)),
    }
    if plan.ask_anchors[task.name] is None:
        anchors["with"] = own
        del anchors["without"]
    return anchors


def drift(
    model: LoadedModel, general: Sequence[Example], batch_tokens: int
) -> tuple[Prediction, ...]:
    """Return KL(base || adapted) on texts that the base model samples for general prompts.

    The texts are the same for every adapter.
    """
    plain = encode.make_format(model.tokenizer, None)
    prompts = [encode.prompt_ids(row.prompt, plain) for row in general]
    with adapter.without(model):
        texts = generate.generate(
            model,
            prompts,
            plain,
            max_new_tokens=_SAMPLED,
            batch_tokens=batch_tokens,
            decoding=generate.Decoding(seed=0),
        )
    sampled = []
    tokens = []
    for row, text in zip(general, texts, strict=True):
        if text:
            answered = replace(row, messages=(*row.prompt, replace(row.messages[-1], content=text)))
            sampled.append((row, text))
            tokens.append(encode.final_answer(answered, plain))
    divergences, counts = generate.divergence(model, tokens)
    predictions = []
    for (row, text), nats, number in zip(sampled, divergences, counts, strict=True):
        predictions.append(
            Prediction(
                origin=row.origin,
                group=row.group,
                prompt=row.question,
                gold=row.answer,
                output=text,
                nll_sum=float(nats),
                n_tokens=int(number),
            )
        )
    return tuple(predictions)
