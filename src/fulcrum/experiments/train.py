"""Train one adapter and score it next to the untouched model: the run of `fulcrum train`."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fulcrum.anchors import choose
from fulcrum.config.arms import own_arm, untrained
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.types import ArmResult, Results, Tokens, TrainingRun, Trial
from fulcrum.experiments import cell, made_rows, pilot
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Session
from fulcrum.experiments.lifecycle import begin, claimed, finish
from fulcrum.model import adapter, generate, save
from fulcrum.model.adapter import State
from fulcrum.model.base_model import LoadedModel
from fulcrum.report.run_kinds import TRAIN
from fulcrum.training import loop


def run_training(
    settings: Settings, *, resume: bool = False, progress: ProgressListener | None = None
) -> Results:
    """Train one adapter, score it next to the untouched model, and fill the run folder.

    Raises ConfigError, DataError, ModelError or StoreError, each naming the remedy.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    with claimed(settings, resume=resume):
        settings, anchors = choose.resolve(settings, compared=False, progress=progress)
        settings, measured = pilot.resolve(settings, compared=False, progress=progress)
        arm = own_arm(settings)
        session, (rows,) = begin(TRAIN, settings, [arm], [settings.seed], resume, progress)
        notes = [*choose.keep(anchors, session.kept), *pilot.keep(measured, session.kept)]
        rows = made_rows.with_gradients(session, rows, [resolve(arm, rows, settings)])
        base = resolve(untrained(arm), rows, settings)
        plan = resolve(arm, rows, settings)
        before = cell.score(session, base, rows.tasks, base.arm.name)
        after = train_arm(session, plan)
        if session.kept is not None:
            save.save_adapter(session.model, session.kept / "adapter", plan.ask_anchors)
        results = [replace(before, seed=settings.seed), after]
        return finish(TRAIN, session, [rows], results, started, notes=notes)


def train_arm(session: Session, plan: ArmPlan) -> ArmResult:
    """Train every trial of an arm; score the adapter that was best on dev, once, on test."""
    started = time.perf_counter()
    settings, model = session.settings, session.model
    seed, tasks = settings.seed, plan.rows.tasks
    dev = cell.tokenised(model, plan, tasks, "dev")
    states: list[State] = []
    runs: list[TrainingRun] = []
    trials: list[Trial] = []
    for chosen in plan.trials:
        label = f"{plan.arm.name}-seed{seed}-{chosen.name}"
        own = cell.own_settings(settings.train, plan.arm, chosen)
        state, run = loop.train(
            model,
            plan.stream(model.tokenizer, chosen.repeats, seed),
            loop.Recipe(own, store.seed_for(seed, "train"), chosen.repeats),
            dev_loss=lambda: dev_loss(model, dev),
            checkpoint=session.checkpoint(label),
            progress=session.listener(label),
            say=session.progress.stage,
        )
        states.append(state)
        runs.append(run)
        loss = min(loss for _, loss in run.dev_nll)
        trials.append(Trial(chosen, loss, run.train_tokens, run.seconds))
    best = min(range(len(trials)), key=lambda place: trials[place].dev_nll)
    adapter.use(model, states[best], settings.train)
    scored = cell.score(session, plan, tasks, f"{plan.arm.name}-seed{seed}")
    # The trials of a resumed training include the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, sum(trial.seconds for trial in trials))
    return replace(
        scored,
        size=plan.rows.n_task,
        seed=seed,
        tried=tuple(trials),
        chosen=best,
        training=runs[best],
        seconds=seconds,
    )


def dev_loss(loaded: LoadedModel, dev: Sequence[Sequence[Tokens]]) -> float:
    """Return nats per answer token, averaged over tasks: a large one does not decide alone."""
    return float(np.mean([generate.mean_loss(loaded, rows) for rows in dev]))
