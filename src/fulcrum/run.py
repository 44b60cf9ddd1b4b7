"""One run on one page: every stage in order, from files to a scored adapter. No stage calls the next; this file does.

files -> material (rows split and cleaned) -> tokens -> plan -> adapter, once per trial -> the trial best on dev -> test scores
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
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
from fulcrum.arms import (
    ARMS,
    arm_of,
    asked_anchor,
    choose_from,
    largest_mixture,
    own_arm,
    planned_tokens,
    sizes_of,
    stream,
    trials,
)
from fulcrum.cell import Silent, Watcher
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError
from fulcrum.identity import environment, manifest, peak_memory_bytes
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import ArmResult, Difference, Results, Setting, Tokens, TrialResult, Tried
from fulcrum.run_kinds import TRAIN, RunKind

_TOLD = ("one example per row", "could not be compiled", "are spread over")  # what of a model's facts a report says


def run(settings: Settings, *, resume: bool = False, watcher: Watcher | None = None) -> Results:
    """Train one adapter as the settings say, score it beside the untouched model, and fill the run folder.

    Raises ConfigError, DataError, ModelError or StoreError, each naming the remedy.
    """
    watcher, started = watcher or Silent(), time.perf_counter()
    with claimed(settings, resume=resume):
        settings, anchors = candidates.resolve(settings, compared=False, watcher=watcher)
        settings, found = pilot.resolve(settings, compared=False, watcher=watcher)
        arm = own_arm(settings)
        loaded, (rows,), folder = begin(TRAIN, settings, [arm], [settings.seed], resume, watcher)
        kept = folder if launched.writes() else None
        notes = [*candidates.keep(anchors, kept), *pilot.keep(found, kept)]
        rows = probe.with_gradients(rows, loaded, [(rows, arm)], settings, kept, partial(watcher.count, probe.LABEL))
        base = ARMS["base_anchor" if arm.anchored else "base"]
        untrained = cell.score(rows, rows.tasks, loaded, base, settings, base.name, watcher)
        results = [replace(untrained, seed=settings.seed), train_arm(rows, loaded, arm, settings, folder, watcher)]
        if launched.writes():
            export.save_adapter(loaded, folder / "adapter", {t.name: asked_anchor(arm, t, settings) for t in rows.tasks})
        return finish(TRAIN, settings, folder, loaded, [rows], results, (), started, notes)


@contextmanager
def claimed(settings: Settings, *, resume: bool) -> Iterator[None]:
    """Inside, the output folder is this run's alone. Raises StoreError where it cannot be."""
    folder = Path(settings.output_dir)
    if launched.writes():
        run_folder.check_free(folder, resume=resume)  # before a lock is put into somebody else's folder
    with run_folder.held(folder) if launched.writes() else nullcontext():
        yield


def begin(
    kind: RunKind, settings: Settings, arms: Sequence[Arm], seeds: Sequence[int], resume: bool, watcher: Watcher
) -> tuple[LoadedModel, list[Material], Path]:
    """Load the model, read the rows of every seed, and make the output folder this run's, once nothing speaks against it.

    What the probes chose is written to the folder's config.yaml, and a resumed run takes it from there.
    """
    folder = Path(settings.output_dir)
    if launched.wants_shards() and (not kind.can_shard or settings.train.use_dora):
        what = "use_dora" if kind.can_shard else kind.name
        raise ConfigError(f"the launcher asks for FSDP, with which {what} is not possible; use multi_gpu.yaml, or no launcher")
    kept = config.load(folder / "config.yaml") if (folder / "config.yaml").exists() else settings
    chosen = settings.train.model_copy(update={name: getattr(kept.train, name) for name in ("dtype", "device", "compile")})
    if launched.is_alone():
        watcher.stage(
            "warning: the launcher was asked for several processes and started this one alone, which trains the same adapter; "
            "on a CPU: torchrun --nproc_per_node 2 -m fulcrum train ..."
        )
    watcher.stage(f"loading {settings.model}")
    loaded = model.load(settings.model, chosen, trust_remote_code=settings.trust_remote_code)
    watcher.stage("reading data")
    among = choose_from(arms, settings)
    apart = kind.has_dev_apart
    if apart:
        rows = [material.prepare(settings, loaded.tokenizer, loaded.context, seed, choose_from=among) for seed in seeds]
    else:
        most = largest_mixture(settings)
        rows = material.of_seeds(settings, loaded.tokenizer, loaded.context, seeds, mixed_rows=most, choose_from=among)
    cells = [
        (each.at(size), arm)
        for each in rows for arm in arms for size in ((each.longest,) if apart else sizes_of(settings, arm, each.longest))
    ]  # fmt: skip
    for each, arm in cells:
        trials(each, arm, settings)  # wrong epochs are refused now, not hours later
    if any(arm.trained for arm in arms):
        for arm in arms:  # as are modules that the model does not have
            adapter.new_adapter(loaded, cell.own_settings(settings.train, arm, Setting()), 0)
        adapter.drop_adapter(loaded)
    tokens = sum(planned_tokens(each, loaded.tokenizer, [arm], settings) for each, arm in cells)
    if compiled.wanted(loaded, chosen, tokens):
        watcher.stage("compiling the model's layers")
        shortest = min(rows[0].tasks[0].train, key=lambda row: sum(len(message.content) for message in row.messages))
        compiled.switch_on(loaded, chosen, shortest)
    if launched.writes():
        run_folder.open_run(folder, manifest(kind.name, settings, loaded, rows), resume=resume)
        probed = {
            "dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type,
            "compile": "always" if loaded.compiled else "never",
        }  # fmt: skip
        resolved = settings.model_copy(update={"train": settings.train.model_copy(update=probed)})
        store.write_bytes(folder / "config.yaml", config.dump(resolved).encode())
    launched.processes().wait_for_everyone()
    return loaded, rows, folder


def train_arm(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, folder: Path, watcher: Watcher
) -> ArmResult:  # fmt: skip
    """Train every trial of an arm, put the adapter on the model that was best on dev, and score it once on test."""
    started, seed = time.perf_counter(), settings.seed
    dev = cell.tokenised(loaded, rows.tasks, arm, settings, "dev")
    found: list[tuple[State, TrialResult]] = []
    results: list[Tried] = []
    for setting in trials(rows, arm, settings):
        label = f"{arm.name}-seed{seed}-{setting.name}"
        found.append(
            training.train(
                loaded, stream(rows, loaded.tokenizer, arm, settings, setting.repeats, seed), lambda: dev_loss(loaded, dev),
                cell.own_settings(settings.train, arm, setting), seed=store.seed_for(seed, "train"), repeats=setting.repeats,
                checkpoint=folder / "checkpoints" / label,
                progress=cell.tell(watcher, label, folder / store.EVENTS if launched.writes() else None), say=watcher.stage,
            )
        )  # fmt: skip
        tried = Tried(setting, min(loss for _, loss in found[-1][1].dev_nll), found[-1][1].train_tokens, found[-1][1].seconds)
        results.append(tried)
    chosen = min(range(len(results)), key=lambda k: results[k].dev_nll)
    state, trained = found[chosen]
    adapter.use(loaded, state, settings.train)
    scored = cell.score(rows, rows.tasks, loaded, arm, settings, f"{arm.name}-seed{seed}", watcher)
    # Of a resumed training the trials know the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, sum(tried.seconds for tried in results))
    return replace(scored, size=rows.n_task, seed=seed, tried=tuple(results), chosen=chosen, training=trained, seconds=seconds)


def dev_loss(loaded: LoadedModel, dev: Sequence[Sequence[Tokens]]) -> float:
    """Nats per answer token, averaged over tasks so that a large one does not decide alone."""
    return float(np.mean([generate.mean_nats(loaded, rows) for rows in dev]))


def finish(
    kind: RunKind, settings: Settings, folder: Path, loaded: LoadedModel, materials: Sequence[Material],
    arms: Sequence[ArmResult], differences: Sequence[Difference], started: float, more_notes: Sequence[str] = (),
) -> Results:  # fmt: skip
    """Write results.json, predictions.jsonl, report.html and, if the run keeps adapters, the model card; return the results."""
    first = materials[0]
    chosen = dict.fromkeys((a.arm, a.size, a.training.repeats) for a in arms if a.training is not None)
    plans = [
        (name, stream(first.at(size), loaded.tokenizer, arm_of(settings, name), settings, repeats, 0).plan)
        for name, size, repeats in chosen
    ]
    notes = [
        *first.notes,
        *more_notes,
        *(fact for fact in loaded.facts if any(told in fact for told in _TOLD)),
    ]
    notes += idle(arms)
    if kind.has_mix_advice:
        notes += [f"{name}: {text}" for name, plan in plans for text in mix.warnings(plan, settings.train.batch_size)]
    shots: dict[tuple[str, int], list[int]] = {}
    for result in arms:
        if result.setting is not None and result.setting.shots:
            shots.setdefault((result.arm, result.size), []).append(result.setting.shots)
    notes += [f"{arm} of {n} rows: examples in the prompt, by seed: {', '.join(map(str, k))}" for (arm, n), k in shots.items()]
    size = shown_size(arms, settings)
    results = Results(
        kind=kind.name, settings=settings.model_dump(mode="json"), environment=environment(loaded),
        tasks=material.facts(first, loaded.tokenizer), notes=tuple(notes), rejects=first.rejects,
        arms=tuple(replace(arm, predictions={}, general={}) for arm in arms),
        differences=tuple(differences), forgetting=tuple(forgetting([arm for arm in arms if arm.size in (0, size)])),
        step_cap=max(rows.at(size or rows.longest).step_cap for rows in materials),
        seconds=time.perf_counter() - started, peak_memory_bytes=peak_memory_bytes(), size=size,
    )  # fmt: skip
    lines = [
        {"arm": arm.arm, "size": arm.size, "seed": arm.seed, "task": task, **store.plain(prediction)}
        for arm in arms
        for task, predictions in (*arm.predictions.items(), *((f"general: {name}", p) for name, p in arm.general.items()))
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


def idle(arms: Sequence[ArmResult]) -> Iterator[str]:
    """Warnings about trained arms whose test rows all have an untrained arm's very losses: no adapter was at work there."""
    for arm in arms:
        own = losses(arm)
        for other in arms if arm.training is not None and own else ():
            if other.training is None and losses(other) == own:
                yield (
                    f"{arm.arm} (seed {arm.seed}) has the loss of {other.arm}, untrained, in every test row: its adapter "
                    "was not applied, or learned nothing"
                )


def losses(arm: ArmResult) -> list[float]:
    """The summed nats of every test row of every task."""
    return [row.nll_sum for rows in arm.predictions.values() for row in rows]


def shown_size(arms: Sequence[ArmResult], settings: Settings) -> int:
    """The size at which arms are set against each other: the most task rows that an arm with general rows had, else any arm."""
    sizes = {arm_of(settings, arm.arm).mixes: 0 for arm in arms}
    for arm in arms:
        kind = arm_of(settings, arm.arm).mixes
        sizes[kind] = max(sizes[kind], arm.size)
    return sizes.get(True) or sizes.get(False, 0)


def forgetting(arms: Sequence[ArmResult]) -> Iterator[Difference]:
    """How far each arm's loss on held-out general rows lies above the untouched model's, paired by row."""
    base = next((arm for arm in arms if arm.training is None and arm.general), None)
    if base is None:
        return
    for name in dict.fromkeys(arm.arm for arm in arms if arm.arm != base.arm and arm.general):
        for source, rows in base.general.items():
            own = [[row.nll_sum for row in arm.general[source]] for arm in arms if arm.arm == name]
            found = scoring.paired(source, "nll", name, base.arm, own, [[row.nll_sum for row in rows]], [rows])
            if found is not None:
                yield found
