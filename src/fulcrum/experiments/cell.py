"""One cell of a comparison: an arm at a size and a seed.

Its hyperparameters are chosen by cross-validation inside its task rows, then all of these rows
train the adapter that is scored, once, on test. Dev rows are task rows here (rule (a) of a fair
comparison): what chooses hyperparameters is data that a user has to label too. The last step's
weights count in every arm.
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
OTHER_ANCHORS = ("without", "with", "wrong", "reworded")  # than an arm is asked with
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
        """The folder that this process writes to; None if it writes nothing."""
        return self.folder if distributed.writes() else None

    def listener(self, label: str) -> loop.Progress:
        """Return what tells of a training's steps, under this label.

        All of them go to the listener; some, and every dev loss, into a file for anyone who looks
        on from outside.
        """
        events = None if self.kept is None else self.kept / store.EVENTS

        def tell(point: TrainPoint, steps: int, newest: float | None) -> None:
            self.progress.step(label, point, steps, newest)
            is_shown = newest is not None or loop.is_shown(point.step, steps)
            if events is not None and is_shown:
                line = {"run": label, "steps": steps, "dev_nll": newest, **store.plain(point)}
                store.append_jsonl(events, line)

        return tell

    def checkpoint(self, label: str) -> Path | None:
        """Return where the training with this label saves itself."""
        return None if self.folder is None else self.folder / "checkpoints" / label


@dataclass(frozen=True)
class Cell:
    """An arm at a number of task rows and a seed."""

    arm: Arm
    size: int  # task rows of each task; 0 for an arm that does not depend on them
    seed: int

    @property
    def name(self) -> str:
        """How it is called in files and messages."""
        return f"{self.arm.name}-{self.size}-seed{self.seed}"


def tokenised(
    model: LoadedModel, plan: ArmPlan, tasks: Sequence[Task], part: str
) -> list[list[Tokens]]:
    """Return the dev or test rows of every task as the arm is scored on them."""
    found = []
    for task in tasks:
        form = encode.make_format(model.tokenizer, plan.ask_anchors[task.name])
        found.append([encode.final_answer(example, form) for example in getattr(task, part)])
    return found


def own_settings(settings: TrainSettings, arm: Arm, chosen: Hyperparameters) -> TrainSettings:
    """Return the trainer's settings with those of the arm and of the trial."""
    changes = dict(arm.train)
    if chosen.learning_rate is not None:
        changes["learning_rate"] = chosen.learning_rate
    if chosen.weight_decay is not None:
        changes["weight_decay"] = chosen.weight_decay
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


def fit(
    session: Session, plan: ArmPlan, chosen: Hyperparameters, seed: int, label: str
) -> list[TrainingRun]:
    """Train an arm on all its task rows, put the adapter on the model, return each training.

    An arm that is not trained has no adapter. Of several `members` the average is put on.
    """
    trained = own_settings(session.settings.train, plan.arm, chosen)
    states: list[State] = []
    runs: list[TrainingRun] = []
    for member in range(plan.members):
        name = label if plan.members == 1 else f"{label}-member{member}"
        purpose = "train" if member == 0 else f"train {member}"
        order = store.seed_for(seed, purpose) if member else seed
        recipe = loop.Recipe(trained, store.seed_for(seed, purpose), chosen.repeats, chosen.kl)
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
        return runs  # it stands on the model since it was trained
    adapter.drop_adapter(session.model)
    if states:
        adapter.use(session.model, soup(states, chosen.scale), _wider(trained, plan.members))
    return runs


def soup(states: Sequence[State], scale: float) -> State:
    """Return the average of adapters, times `scale`, as one adapter of the ranks' sum.

    It is exact, unlike averages of its factors. The adapter's own scaling (alpha over rank) must
    stay what it was (`_wider`).
    """
    found: State = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        if "lora_A" in name:
            found[name] = torch.cat(parts, dim=0)
        else:
            found[name] = torch.cat(parts, dim=1) * (scale / len(parts))
    return found


def _wider(trained: TrainSettings, members: int) -> TrainSettings:
    alpha = trained.lora_alpha * (members**0.5 if trained.use_rslora else members)
    return trained.model_copy(update={"lora_r": trained.lora_r * members, "lora_alpha": alpha})


def _length(model: LoadedModel) -> baselines.Length:
    plain = encode.make_format(model.tokenizer, None)
    return lambda example: encode.answer_length(example, plain)


def numbers_of_shots(model: LoadedModel, plan: ArmPlan, seed: int) -> tuple[Hyperparameters, ...]:
    """Return the numbers of examples that a few-shot arm tries.

    They are as many as the smallest fold leaves, in prompts that the model's context holds.
    """
    plain = encode.make_format(model.tokenizer, None)
    folds = plan.folds(plan.settings.compare.folds, store.seed_for(seed, "folds"))
    numbers = [baselines.shot_counts(fold.rows.tasks, plain, model.context) for fold in folds]
    return tuple(Hyperparameters(shots=number) for number in min(numbers, key=len))


def tune(session: Session, plan: ArmPlan, cell: Cell, chosen: Hyperparameters) -> Trial:
    """Measure hyperparameters by cross-validation inside the task rows; no test row is seen.

    A training that diverges has an infinite loss: it is worse than any other.
    """
    started = time.perf_counter()
    label = f"{cell.name}-{chosen.name}"
    nats = np.zeros((len(plan.rows.tasks), len(TEMPERATURES)))
    counts = np.zeros((len(plan.rows.tasks), 1))
    tokens, seconds = 0, 0.0
    folds = plan.folds(session.settings.compare.folds, store.seed_for(cell.seed, "folds"))
    for place, fold in enumerate(folds):
        if plan.arm.tfidf:
            losses = _losses_of_counts(session.model, fold.rows.tasks)
        else:
            tasks = _prompted(fold.rows.tasks, chosen)
            try:
                runs = fit(session, fold, chosen, cell.seed, f"{label}-fold{place}")
            except DivergedError as error:  # no other fold need show it
                session.progress.stage(f"{label}: {error}")
                return Trial(chosen, math.inf, tokens, time.perf_counter() - started)
            tokens += sum(run.train_tokens for run in runs)
            seconds += sum(run.seconds for run in runs)
            parts = tokenised(session.model, plan, tasks, "dev")
            losses = [generate.nats_at(session.model, part, TEMPERATURES) for part in parts]
        nats += [own.sum(axis=0) for own, _ in losses]
        counts += [[number.sum()] for _, number in losses]
    by_temperature = (nats / counts).mean(axis=0)
    loss = float(by_temperature[TEMPERATURES.index(1.0)])
    if not math.isfinite(loss):
        loss = math.inf
    # A resumed training knows the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, seconds)
    temperature = 1.0 if plan.arm.tfidf else best_temperature(by_temperature)
    return Trial(chosen, loss, tokens, seconds, temperature)


def _losses_of_counts(
    model: LoadedModel, tasks: Sequence[Task]
) -> list[tuple[FloatArray, IntArray]]:
    """Return nats (rows, temperatures) and tokens (rows,) of dev rows by word counts, task by task.

    Counts have no temperature: their loss is the same at each.
    """
    found = []
    for task in tasks:
        nats, number = baselines.losses(task.train, task.dev, _length(model))
        found.append((np.repeat(nats[:, None], len(TEMPERATURES), axis=1), number))
    return found


def _prompted(tasks: Sequence[Task], chosen: Hyperparameters) -> Sequence[Task]:
    """Return the tasks with training rows in their prompts, if any are to stand there."""
    if not chosen.shots:
        return tasks
    return [baselines.add_shots(task, chosen.shots) for task in tasks]


def best_temperature(losses: FloatArray) -> float:
    """Return the temperature of the least of `losses` (at TEMPERATURES).

    It is the lowest point of a parabola in the logarithm of the temperature; 1 if losses are not
    finite.
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


@dataclass(frozen=True)
class Choice:
    """Hyperparameters that a final training may have."""

    place: int | None  # among the trials; None: nothing was tried
    hyperparameters: Hyperparameters
    temperature: float | None


def best_first(arm: Arm, tried: Sequence[Trial]) -> list[Choice]:
    """Return what a final training may have: the trials that did not diverge, the best first.

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

    With `probed`, look for side effects too.

    A training that diverges, before any test row is seen, gives way to the next best
    hyperparameters. Raises ConfigError if none is left.
    """
    started = time.perf_counter()
    choice, runs = _fit_best(session, plan, cell, tried)
    tasks = _prompted(plan.rows.tasks, choice.hyperparameters)
    scored = score(session, plan, tasks, cell.name, choice.temperature)
    probes = probe(session, plan, tasks) if probed and not plan.arm.tfidf else {}
    return replace(
        scored,
        size=plan.rows.longest if plan.arm.depends_on_seed else 0,
        seed=cell.seed,
        tried=tuple(tried),
        chosen=choice.place,
        training=replace(runs[0], history=thinned(runs[0].history)) if runs else None,
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


def probe(
    session: Session, plan: ArmPlan, tasks: Sequence[Task]
) -> dict[str, tuple[Prediction, ...]]:
    """Measure side effects: what the anchor ties, what leaks, how far the model drifted.

    These are test rows with other anchors than the arm is asked with (`other_anchors`), answers to
    general prompts without any, and (as `nll_sum`) KL(base || adapted) on texts that the base model
    sampled for these. A model that answers general prompts in the task's form has not learned when
    the task is asked for.
    """
    model, batch_tokens = session.model, session.settings.eval.batch_tokens
    found: dict[str, tuple[Prediction, ...]] = {}
    for task in tasks:
        for name, changed in other_anchors(task, tasks, plan).items():
            asked = replace(task, anchor=changed, metrics=("nll",))
            found[f"{task.name}: {name} anchor"] = scoring.predict(
                model, asked, asked.test, batch_tokens=batch_tokens
            )
    general = next((part for part in plan.rows.held_out.values() if part), ())[:PROBED]
    if general:
        longest = max(task.max_new_tokens for task in tasks)
        asked = Task("general", (), (), general, None, ("exact_match",), longest)
        found[GENERAL_PROMPTS] = scoring.predict(model, asked, general, batch_tokens=batch_tokens)
    if general and model.peft is not None:
        found[DRIFT] = drift(model, general, batch_tokens)
    return found


def other_anchors(task: Task, tasks: Sequence[Task], plan: ArmPlan) -> dict[str, Anchor | None]:
    """Return the other anchors with which a trained arm is asked to see what hangs on its own.

    They are none, another task's, the same in other words; and its own, if it is asked without one.
    """
    own = plan.train_anchors[task.name]
    if own is None:
        return {}
    given = plan.arm.anchor
    if given is None:
        given = next(one.anchor for one in plan.settings.tasks if one.name == task.name)
    paraphrase = given.paraphrase if given is not None and given.value == own else None
    another = ANOTHER
    for other in tasks:
        if other.name != task.name and other.anchor is not None and other.anchor.text != own.text:
            another = other.anchor.text
            break
    found: dict[str, Anchor | None] = {
        "without": None,
        "wrong": replace(own, text=another),
        "reworded": replace(own, text=paraphrase or reworded(own.text)),
    }
    if plan.ask_anchors[task.name] is None:
        found["with"] = own
        del found["without"]
    return found


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
    said = []
    for row, text in zip(general, texts, strict=True):
        if text:
            answered = replace(row, messages=(*row.prompt, replace(row.messages[-1], content=text)))
            said.append((row, text, encode.final_answer(answered, plain)))
    nats, counts = generate.divergence(model, [tokens for *_, tokens in said])
    found = []
    for (row, text, _), nat, number in zip(said, nats, counts, strict=True):
        found.append(
            Prediction(
                row.origin, row.group, row.question, row.answer, text, float(nat), int(number)
            )
        )
    return tuple(found)


def thinned(history: Sequence[TrainPoint], points: int = 64) -> tuple[TrainPoint, ...]:
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
    """Score what is on the model: test rows of `tasks`, and held-out general rows.

    With a `temperature`, test rows have their loss at that too.
    """
    model, evaluation = session.model, session.settings.eval
    scores, predictions = {}, {}
    for task in tasks:
        if plan.arm.tfidf:
            predictions[task.name] = baselines.predict(task, _length(model))
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
    general_nll = {
        name: metrics.score(rows, ["nll"], draws=evaluation.draws)[0]
        for name, rows in general.items()
    }
    return ArmResult(
        plan.arm.name, 0, 0, (), None, None, scores, predictions, general, general_nll, 0.0
    )
