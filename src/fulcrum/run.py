"""One run on one page: every stage in order, from files to a scored adapter. No stage calls the next; this file does.

files -> material (rows split and cleaned) -> tokens -> plan -> adapter, once per trial -> the trial best on dev -> test scores
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState

from fulcrum import (
    adapter,
    compiled,
    config,
    encode,
    export,
    generate,
    material,
    metrics,
    mix,
    model,
    report,
    scoring,
    shots,
    store,
    training,
)
from fulcrum.adapter import State
from fulcrum.arms import ARMS, Arm, own_arm, planned_tokens, stream, trials
from fulcrum.config import Settings
from fulcrum.identity import environment, manifest, peak_memory_bytes
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import ArmResult, Difference, Results, Task, Tokens, TrainPoint, TrialResult


class Watcher(Protocol):
    """Who is told how a run goes on: the terminal, a notebook, nobody."""

    def stage(self, text: str) -> None:
        """Something began."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """An optimizer step ended."""

    def count(self, label: str, done: int, total: int) -> None:
        """`done` of `total` are finished."""


class Silent:
    """The watcher that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        """Say nothing."""

    def count(self, label: str, done: int, total: int) -> None:
        """Say nothing."""


def run(settings: Settings, *, resume: bool = False, watcher: Watcher | None = None) -> Results:
    """Train one adapter as the settings say, score it beside the untouched model, and fill the run folder.

    Raises ConfigError, DataError, ModelError or StoreError, each naming the remedy.
    """
    watcher, started = watcher or Silent(), time.perf_counter()
    arm = own_arm(settings)
    loaded, (rows,), folder = begin("train", settings, [arm], [settings.seed], resume, watcher)
    base = replace(ARMS["base"], anchored=arm.anchored, name="base_anchor" if arm.anchored else "base")
    results = [run_arm(rows, loaded, base, settings, settings.seed, None, watcher)[0]]
    trained, state = run_arm(rows, loaded, arm, settings, settings.seed, folder, watcher)
    results.append(trained)
    adapter.use(loaded, state, settings.train)
    if writes():
        export.save_adapter(loaded, folder / "adapter", {t.name: t.anchor if arm.anchored else None for t in rows.tasks})
    return finish("train", settings, folder, loaded, [rows], results, (), started)


def begin(
    kind: str, settings: Settings, arms: Sequence[Arm], seeds: Sequence[int], resume: bool, watcher: Watcher
) -> tuple[LoadedModel, list[Material], Path]:
    """Load the model, read the rows of every seed, and make the output folder this run's, once nothing speaks against it.

    What the probes chose is written to the folder's config.yaml, and a resumed run takes it from there.
    """
    folder = Path(settings.output_dir)
    if writes():
        store.check_free(folder, resume=resume)  # before anything slow
    kept = config.load(folder / "config.yaml") if (folder / "config.yaml").exists() else settings
    chosen = settings.train.model_copy(update={name: getattr(kept.train, name) for name in ("dtype", "device", "compile")})
    watcher.stage(f"loading {settings.model}")
    loaded = model.load(settings.model, chosen, trust_remote_code=settings.trust_remote_code)
    watcher.stage("reading data")
    rows = [material.prepare(settings, loaded.tokenizer, loaded.context, seed) for seed in seeds]
    for each in rows:
        for arm in arms:
            trials(each, arm, settings)  # wrong epochs are refused now, not hours later
    if any(arm.trained for arm in arms):
        adapter.new_adapter(loaded, settings.train, 0)  # as are modules that the model does not have
        adapter.drop_adapter(loaded)
    tokens = sum(planned_tokens(each, loaded.tokenizer, arms, settings) for each in rows)
    if compiled.wanted(loaded, chosen, tokens):
        watcher.stage("compiling the model's layers")
        shortest = min(rows[0].tasks[0].train, key=lambda row: sum(len(message.content) for message in row.messages))
        compiled.switch_on(loaded, chosen, shortest)
    if writes():
        store.open_run(folder, manifest(kind, settings, loaded, rows), resume=resume)
        probed = {
            "dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type,
            "compile": "always" if loaded.compiled else "never",
        }  # fmt: skip
        resolved = settings.model_copy(update={"train": settings.train.model_copy(update=probed)})
        store.write_bytes(folder / "config.yaml", config.dump(resolved).encode())
    _processes().wait_for_everyone()
    return loaded, rows, folder


def writes() -> bool:
    """Whether this process is the one that writes files (a launcher may have started several)."""
    return bool(_processes().is_main_process)


def _processes() -> Any:
    return PartialState(cpu=not torch.cuda.is_available())  # the first call decides, and must not wait for a GPU


def run_arm(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, seed: int, folder: Path | None, watcher: Watcher
) -> tuple[ArmResult, State | None]:
    """Train every trial of an arm, keep the one that is best on dev, and score it once on test."""
    started = time.perf_counter()
    results: list[TrialResult] = []
    best: State | None = None
    chosen: int | None = None
    forms = {t.name: encode.make_format(loaded.tokenizer, t.anchor if arm.anchored else None) for t in rows.tasks}
    number, tasks = 0, rows.tasks
    if arm.shots:
        adapter.use(loaded, None, settings.train)
        plain = encode.make_format(loaded.tokenizer, None)
        number, tasks = shots.choose(tasks, plain, loaded.context, lambda tried: dev_loss(loaded, _scored(tried, forms)))
    dev = _scored(tasks, forms)
    for repeats in trials(rows, arm, settings) if arm.trained else ():
        cell = f"{arm.name}-seed{seed}-repeats{repeats}"
        state, result = training.train(
            loaded, stream(rows, loaded.tokenizer, arm, settings, repeats, seed), lambda: dev_loss(loaded, dev), settings.train,
            seed=store.seed_for(seed, "train"), repeats=repeats,
            checkpoint=None if folder is None else folder / "checkpoints" / cell,
            progress=_tell(watcher, cell, folder),
        )  # fmt: skip
        results.append(result)
        if chosen is None or result.best_dev_nll < results[chosen].best_dev_nll:
            best, chosen = state, len(results) - 1
    adapter.use(loaded, best, settings.train)
    dev_nll = dev_loss(loaded, dev) if chosen is None else results[chosen].best_dev_nll
    scores, predictions = {}, {}
    for task in tasks:
        label = f"{arm.name} seed {seed}: answers to {task.name}"
        predictions[task.name] = scoring.predict(
            loaded, task, task.test, anchored=arm.anchored, batch_tokens=settings.eval.batch_tokens,
            count=partial(watcher.count, label),
        )  # fmt: skip
        scores[task.name] = metrics.score(predictions[task.name], task.metrics, draws=settings.eval.draws)
    general = scoring.general_predictions(loaded, rows.held_out, watcher.stage)
    general_nll = {name: metrics.score(found, ["nll"], draws=settings.eval.draws)[0] for name, found in general.items()}
    # Of a resumed training the trials know the seconds of earlier processes.
    seconds = max(time.perf_counter() - started, sum(result.seconds for result in results))
    found = ArmResult(
        arm.name, seed, tuple(results), chosen, dev_nll, scores, predictions, general, general_nll, seconds, number
    )  # fmt: skip
    return found, best


def _scored(tasks: Sequence[Task], forms: Mapping[str, encode.Format]) -> list[list[Tokens]]:
    """The dev rows of every task as they are scored."""
    return [[encode.final_answer(example, forms[task.name]) for example in task.dev] for task in tasks]


def dev_loss(loaded: LoadedModel, dev: Sequence[Sequence[Tokens]]) -> float:
    """Nats per answer token, averaged over tasks so that a large one does not decide alone."""
    return float(np.mean([generate.mean_nats(loaded, rows) for rows in dev]))


def _tell(watcher: Watcher, cell: str, folder: Path | None) -> training.Progress:
    """Report steps to the watcher, and to events.jsonl for anyone who looks on from outside."""

    def tell(point: TrainPoint, steps: int, newest: float | None) -> None:
        watcher.step(cell, point, steps, newest)
        if folder is not None and writes():
            store.append_jsonl(folder / "events.jsonl", {"run": cell, "steps": steps, "dev_nll": newest, **store.plain(point)})

    return tell


def finish(
    kind: Any, settings: Settings, folder: Path, loaded: LoadedModel, materials: Sequence[Material],
    arms: Sequence[ArmResult], differences: Sequence[Difference], started: float,
) -> Results:  # fmt: skip
    """Write results.json, predictions.jsonl, report.html and the model card; returns the results."""
    first = materials[0]
    chosen = dict.fromkeys((arm.arm, arm.trials[arm.chosen].repeats) for arm in arms if arm.chosen is not None)
    plans = [(name, stream(first, loaded.tokenizer, ARMS[name], settings, repeats, 0).plan) for name, repeats in chosen]
    notes = [*first.notes, *(fact for fact in loaded.facts if "one example per row" in fact or "could not be compiled" in fact)]
    notes += [f"{name}: {text}" for name, plan in plans for text in mix.warnings(plan, settings.train.batch_size)]
    notes += [f"{a.arm}, seed {a.seed}: {a.shots} examples in the prompt, chosen on dev" for a in arms if a.shots]
    results = Results(
        kind=kind, settings=settings.model_dump(mode="json"), environment=environment(loaded),
        tasks=material.facts(first, loaded.tokenizer), notes=tuple(notes), rejects=first.rejects,
        arms=tuple(replace(arm, predictions={}, general={}) for arm in arms),
        differences=tuple(differences), forgetting=tuple(forgetting(arms)),
        step_cap=max(rows.step_cap for rows in materials),
        seconds=time.perf_counter() - started, peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip
    lines = [
        {"arm": arm.arm, "seed": arm.seed, "task": task, **store.plain(prediction)}
        for arm in arms
        for task, predictions in (*arm.predictions.items(), *((f"general: {name}", p) for name, p in arm.general.items()))
        for prediction in predictions
    ]
    if writes():
        store.write_jsonl(folder / "predictions.jsonl", lines)
        store.write_json(folder / "results.json", results)
        report.write(folder)
        store.write_bytes(folder / "README.md", report.card(report.load(folder), export.NOTE).encode())
    _processes().wait_for_everyone()
    return results


def forgetting(arms: Sequence[ArmResult]) -> Iterator[Difference]:
    """How far each arm's loss on held-out general rows lies above the untouched model's, paired by row."""
    base = next((arm for arm in arms if arm.chosen is None), None)
    if base is None:
        return
    for name in dict.fromkeys(arm.arm for arm in arms if arm.arm != base.arm):
        for source, rows in base.general.items():
            own = [[row.nll_sum for row in arm.general[source]] for arm in arms if arm.arm == name]
            found = scoring.paired(source, "nll", name, base.arm, own, [[row.nll_sum for row in rows]], rows)
            if found is not None:
                yield found
