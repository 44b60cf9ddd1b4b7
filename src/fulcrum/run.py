"""One run on one page: every stage in order, from files to a scored adapter.

No stage calls the next; this file does.

files -> material (rows split and cleaned) -> tokens -> plan -> adapter, once per trial -> the trial
best on dev -> test scores
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from fulcrum import (
    adapter,
    candidates,
    cell,
    compiled,
    config,
    export,
    generate,
    launched,
    material,
    mix,
    model,
    pilot,
    probe,
    run_folder,
    run_report,
    scoring,
    store,
    training,
)
from fulcrum.adapter import State
from fulcrum.arm_data import ArmPlan, planned_tokens, resolve
from fulcrum.arms import arm_of, choose_from, largest_mixture, own_arm, sizes_of, untrained
from fulcrum.cell import Session
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError
from fulcrum.identity import environment, manifest, peak_memory_bytes
from fulcrum.material import RunData
from fulcrum.model import LoadedModel
from fulcrum.progress import ProgressListener, Silent
from fulcrum.records import (
    ArmResult,
    Difference,
    Hyperparameters,
    Results,
    Tokens,
    TrainingRun,
    Trial,
)
from fulcrum.run_kinds import TRAIN, RunKind

# What of a model's facts a report says.
_TOLD = (
    "one example per row",
    "could not be compiled",
    "are spread over",
)


def run(
    settings: Settings, *, resume: bool = False, progress: ProgressListener | None = None
) -> Results:
    """Train one adapter, score it next to the untouched model, and fill the run folder.

    Raises ConfigError, DataError, ModelError or StoreError, each naming the remedy.
    """
    progress, started = progress or Silent(), time.perf_counter()
    with claimed(settings, resume=resume):
        settings, anchors = candidates.resolve(settings, compared=False, progress=progress)
        settings, found = pilot.resolve(settings, compared=False, progress=progress)
        arm = own_arm(settings)
        session, (rows,) = begin(TRAIN, settings, [arm], [settings.seed], resume, progress)
        notes = [*candidates.keep(anchors, session.kept), *pilot.keep(found, session.kept)]
        rows = probe.with_gradients(session, rows, [resolve(arm, rows, settings)])
        base, plan = resolve(untrained(arm), rows, settings), resolve(arm, rows, settings)
        before = cell.score(session, base, rows.tasks, base.arm.name)
        results = [replace(before, seed=settings.seed), train_arm(session, plan)]
        if session.kept is not None:
            export.save_adapter(session.model, session.kept / "adapter", plan.ask_anchors)
        return finish(TRAIN, session, [rows], results, started, notes=notes)


@contextmanager
def claimed(settings: Settings, *, resume: bool) -> Iterator[None]:
    """Inside, the output folder is this run's alone. Raises StoreError where it cannot be."""
    folder = Path(settings.output_dir)
    if launched.writes():
        # Before a lock is put into somebody else's folder.
        run_folder.check_free(folder, resume=resume)
    with run_folder.held(folder) if launched.writes() else nullcontext():
        yield


def begin(
    kind: RunKind,
    settings: Settings,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    resume: bool,
    progress: ProgressListener,
) -> tuple[Session, list[RunData]]:
    """Load the model, read the rows of every seed, and make the output folder this run's.

    The folder is touched once nothing speaks against the run.

    What the probes chose is written to the folder's config.yaml, and a resumed run takes it from
    there.
    """
    folder = Path(settings.output_dir)
    if launched.wants_shards() and (not kind.can_shard or settings.train.use_dora):
        what = "use_dora" if kind.can_shard else kind.name
        raise ConfigError(
            f"the launcher asks for FSDP, with which {what} is not possible; use multi_gpu.yaml, "
            "or no launcher"
        )
    kept = config.load(folder / "config.yaml") if (folder / "config.yaml").exists() else settings
    chosen = settings.train.model_copy(
        update={name: getattr(kept.train, name) for name in ("dtype", "device", "compile")}
    )
    if launched.is_alone():
        progress.stage(
            "warning: the launcher was asked for several processes and started this one alone, "
            "which trains the same adapter; "
            "on a CPU: torchrun --nproc_per_node 2 -m fulcrum train ..."
        )
    progress.stage(f"loading {settings.model}")
    loaded = model.load(settings.model, chosen, trust_remote_code=settings.trust_remote_code)
    progress.stage("reading data")
    among = choose_from(arms, settings)
    apart = kind.has_dev_apart
    if apart:
        rows = [
            material.prepare(settings, loaded.tokenizer, loaded.context, seed, choose_from=among)
            for seed in seeds
        ]
    else:
        most = largest_mixture(settings)
        rows = material.of_seeds(
            settings, loaded.tokenizer, loaded.context, seeds, mixed_rows=most, choose_from=among
        )
    plans = []
    for each in rows:
        for arm in arms:
            sizes = (each.longest,) if apart else sizes_of(settings, arm, each.longest)
            plans += [resolve(arm, each.at(size), settings) for size in sizes]
    for plan in plans:
        _ = plan.trials  # wrong epochs are refused now, not hours later
    if any(arm.trained for arm in arms):
        for arm in arms:  # as are modules that the model does not have
            adapter.new_adapter(
                loaded, cell.own_settings(settings.train, arm, Hyperparameters()), 0
            )
        adapter.drop_adapter(loaded)
    tokens = sum(planned_tokens(plan, loaded.tokenizer) for plan in plans)
    if compiled.wanted(loaded, chosen, tokens):
        progress.stage("compiling the model's layers")
        shortest = min(
            rows[0].tasks[0].train,
            key=lambda row: sum(len(message.content) for message in row.messages),
        )
        compiled.switch_on(loaded, chosen, shortest)
    if launched.writes():
        run_folder.open_run(folder, manifest(kind.name, settings, loaded, rows), resume=resume)
        probed = {
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": loaded.device.type,
            "compile": "always" if loaded.compiled else "never",
        }
        resolved = settings.model_copy(update={"train": settings.train.model_copy(update=probed)})
        store.write_bytes(folder / "config.yaml", config.dump(resolved).encode())
    launched.processes().wait_for_everyone()
    return Session(loaded, settings, folder, progress), rows


def train_arm(session: Session, plan: ArmPlan) -> ArmResult:
    """Train every trial of an arm; score the adapter that was best on dev, once, on test."""
    started, settings, model = time.perf_counter(), session.settings, session.model
    seed, tasks = settings.seed, plan.rows.tasks
    dev = cell.tokenised(model, plan, tasks, "dev")
    found: list[tuple[State, TrainingRun]] = []
    trials: list[Trial] = []
    for chosen in plan.trials:
        label = f"{plan.arm.name}-seed{seed}-{chosen.name}"
        state, trained = training.train(
            model,
            plan.stream(model.tokenizer, chosen.repeats, seed),
            lambda: dev_loss(model, dev),
            cell.own_settings(settings.train, plan.arm, chosen),
            seed=store.seed_for(seed, "train"),
            repeats=chosen.repeats,
            checkpoint=session.checkpoint(label),
            progress=session.listener(label),
            say=session.progress.stage,
        )
        found.append((state, trained))
        loss = min(loss for _, loss in trained.dev_nll)
        trials.append(Trial(chosen, loss, trained.train_tokens, trained.seconds))
    best = min(range(len(trials)), key=lambda place: trials[place].dev_nll)
    state, trained = found[best]
    adapter.use(model, state, settings.train)
    scored = cell.score(session, plan, tasks, f"{plan.arm.name}-seed{seed}")
    # The trials of a resumed training know the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, sum(trial.seconds for trial in trials))
    return replace(
        scored,
        size=plan.rows.n_task,
        seed=seed,
        tried=tuple(trials),
        chosen=best,
        training=trained,
        seconds=seconds,
    )


def dev_loss(loaded: LoadedModel, dev: Sequence[Sequence[Tokens]]) -> float:
    """Nats per answer token, averaged over tasks so that a large one does not decide alone."""
    return float(np.mean([generate.mean_nats(loaded, rows) for rows in dev]))


def finish(
    kind: RunKind,
    session: Session,
    rows: Sequence[RunData],
    arms: Sequence[ArmResult],
    started: float,
    differences: Sequence[Difference] = (),
    notes: Sequence[str] = (),
) -> Results:
    """Write results.json, predictions.jsonl and report.html; return the results.

    A run that keeps adapters gets a model card too.
    """
    loaded, settings, first = session.model, session.settings, rows[0]
    folder = Path(settings.output_dir)
    chosen = dict.fromkeys(
        (a.arm, a.size, a.training.repeats) for a in arms if a.training is not None
    )
    plans = []
    for name, size, repeats in chosen:
        plan = resolve(arm_of(settings, name), first.at(size), settings)
        plans.append((name, plan.stream(loaded.tokenizer, repeats, 0).plan))
    facts = [fact for fact in loaded.facts if any(told in fact for told in _TOLD)]
    said = [*first.notes, *notes, *facts, *idle(arms)]
    if kind.has_mix_advice:
        for name, stream in plans:
            texts = mix.warnings(stream, settings.train.batch_size)
            said += [f"{name}: {text}" for text in texts]
    said += _numbers_of_shots(arms)
    size = shown_size(arms, settings)
    results = Results(
        kind=kind.name,
        settings=settings.model_dump(mode="json"),
        environment=environment(loaded),
        tasks=material.facts(first, loaded.tokenizer),
        notes=tuple(said),
        rejects=first.rejects,
        arms=tuple(replace(arm, predictions={}, general={}) for arm in arms),
        differences=tuple(differences),
        forgetting=tuple(forgetting([arm for arm in arms if arm.size in (0, size)])),
        step_cap=max(each.at(size or each.longest).step_cap for each in rows),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        size=size,
    )
    lines = [
        {
            "arm": arm.arm,
            "size": arm.size,
            "seed": arm.seed,
            "task": task,
            **store.plain(prediction),
        }
        for arm in arms
        for task, predictions in (
            *arm.predictions.items(),
            *((f"general: {name}", p) for name, p in arm.general.items()),
        )
        for prediction in predictions
    ]
    if launched.writes():
        store.write_jsonl(folder / "predictions.jsonl", lines)
        store.write_json(folder / "results.json", results)
        run_report.write(folder, kind)
        if kind.adapters is not None:
            card = run_report.card(run_report.load(folder), kind, export.NOTE)
            store.write_bytes(folder / "README.md", card.encode())
        run_folder.seal(folder)
    launched.processes().wait_for_everyone()
    return results


def _numbers_of_shots(arms: Sequence[ArmResult]) -> list[str]:
    """Say how many examples each arm without training put into the prompt, by seed."""
    shots: dict[tuple[str, int], list[int]] = {}
    for result in arms:
        if result.setting is not None and result.setting.shots:
            shots.setdefault((result.arm, result.size), []).append(result.setting.shots)
    found = []
    for (arm, size), numbers in shots.items():
        found.append(
            f"{arm} of {size} rows: examples in the prompt, by seed: {', '.join(map(str, numbers))}"
        )
    return found


def idle(arms: Sequence[ArmResult]) -> Iterator[str]:
    """Warn of trained arms with the very losses of an untrained one: no adapter was at work."""
    for arm in arms:
        own = losses(arm)
        for other in arms if arm.training is not None and own else ():
            if other.training is None and losses(other) == own:
                yield (
                    f"{arm.arm} (seed {arm.seed}) has the loss of {other.arm}, untrained, in every "
                    "test row: its adapter "
                    "was not applied, or learned nothing"
                )


def losses(arm: ArmResult) -> list[float]:
    """Return the summed nats of every test row of every task."""
    return [row.nll_sum for rows in arm.predictions.values() for row in rows]


def shown_size(arms: Sequence[ArmResult], settings: Settings) -> int:
    """Return the size at which arms are compared: the most task rows of a mixture, else of any."""
    mixed = [arm.size for arm in arms if arm_of(settings, arm.arm).uses_general_data]
    return max(mixed, default=0) or max((arm.size for arm in arms), default=0)


def forgetting(arms: Sequence[ArmResult]) -> Iterator[Difference]:
    """Give how far each arm's loss on held-out general rows is above the untouched model's.

    Rows are paired.
    """
    base = next((arm for arm in arms if arm.training is None and arm.general), None)
    if base is None:
        return
    for name in dict.fromkeys(arm.arm for arm in arms if arm.arm != base.arm and arm.general):
        for source, rows in base.general.items():
            own = [[row.nll_sum for row in arm.general[source]] for arm in arms if arm.arm == name]
            found = scoring.paired(
                source, "nll", name, base.arm, own, [[row.nll_sum for row in rows]], [rows]
            )
            if found is not None:
                yield found
