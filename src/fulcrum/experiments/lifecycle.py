"""The frame of every run: claim the folder, begin, and finish with results, report and manifest.

An experiment calls these one after another, with its own trainings between `begin` and `finish`:

    files -> RunData (rows split and cleaned) -> Session -> [trainings] -> results.json, report.html

The manifest holds everything that a run's numbers depend on: settings, data, weights, code and
versions. A run is resumed only if all of it is unchanged.
"""

import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fulcrum.config.arms import arm_of, choose_from, largest_mixture, sizes_of
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings, dump_settings, load_settings
from fulcrum.core import run_folder, store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import ProgressListener
from fulcrum.core.types import ArmResult, Difference, Example, Hyperparameters, Prediction, Results
from fulcrum.data import mix, run_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell, scoring
from fulcrum.experiments.arm_data import ArmPlan, planned_tokens, resolve
from fulcrum.experiments.cell import Session
from fulcrum.model import adapter, base_model, distributed, save
from fulcrum.model.base_model import LoadedModel
from fulcrum.report import run_report
from fulcrum.report.run_kinds import RunKind
from fulcrum.training import compile

# A report repeats those facts about a model that hold one of these.
_REPORTED_FACTS = ("one example per row", "could not be compiled", "are spread over")


@contextmanager
def claimed(settings: Settings, *, resume: bool) -> Iterator[None]:
    """Hold the output folder for this run alone. Raises StoreError if another run has it."""
    folder = Path(settings.output_dir)
    if not distributed.writes():
        yield
        return
    run_folder.check_free(folder, resume=resume)  # before a lock is put into a foreign folder
    with run_folder.held(folder):
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

    The folder is touched only after every check has passed. What the probes chose (dtype, device,
    compilation) is written to the folder's config.yaml, and a resumed run takes it from there.
    """
    _check_launcher(kind, settings, progress)
    folder = Path(settings.output_dir)
    train_settings = settings.train
    if (folder / "config.yaml").exists():
        stored = load_settings(folder / "config.yaml").train
        probed = {name: getattr(stored, name) for name in ("dtype", "device", "compile")}
        train_settings = train_settings.model_copy(update=probed)
    progress.stage(f"loading {settings.model}")
    loaded = base_model.load_for(settings, train_settings)
    progress.stage("reading data")
    rows = _read_rows(kind, settings, loaded, arms, seeds)
    plans = _resolve_all(kind, settings, rows, arms)
    _check_arms(settings, loaded, arms, plans)
    tokens = sum(planned_tokens(plan, loaded.tokenizer) for plan in plans)
    if compile.wanted(loaded, train_settings, tokens):
        progress.stage("compiling the model's layers")
        compile.switch_on(loaded, train_settings, shortest(rows[0].tasks[0].train))
    if distributed.writes():
        run_folder.open_run(folder, _manifest(kind.name, settings, loaded, rows), resume=resume)
        probed = {
            "dtype": _dtype(loaded),
            "device": loaded.device.type,
            "compile": "always" if loaded.compiled else "never",
        }
        resolved = settings.model_copy(update={"train": settings.train.model_copy(update=probed)})
        store.write_bytes(folder / "config.yaml", dump_settings(resolved).encode())
    distributed.processes().wait_for_everyone()
    return Session(loaded, settings, folder, progress), rows


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
    settings, first = session.settings, rows[0]
    size = shown_size(arms, settings)
    step_caps = [each.at(size or each.longest).step_cap for each in rows]
    results = Results(
        kind=kind.name,
        settings=settings.model_dump(mode="json"),
        environment=environment(session.model),
        tasks=run_data.facts(first, session.model.tokenizer),
        notes=(*first.notes, *notes, *_notes_on_arms(kind, session, first, arms)),
        rejects=first.rejects,
        arms=tuple(replace(arm, predictions={}, general={}) for arm in arms),
        differences=tuple(differences),
        forgetting=tuple(_forgetting([arm for arm in arms if arm.size in (0, size)])),
        step_cap=max(step_caps),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        size=size,
    )
    if distributed.writes():
        folder = Path(settings.output_dir)
        store.write_jsonl(folder / "predictions.jsonl", _prediction_lines(arms))
        store.write_json(folder / "results.json", results)
        run_report.write(folder, kind)
        if kind.adapters is not None:
            card = run_report.card(run_report.load(folder), kind, save.NOTE)
            store.write_bytes(folder / "README.md", card.encode())
        run_folder.seal(folder)
    distributed.processes().wait_for_everyone()
    return results


def environment(loaded: LoadedModel) -> dict[str, str]:
    """Return the versions, code, weights and probed choices that a number depends on."""
    libraries = ("fulcrum-llm", "torch", "transformers", "peft", "accelerate", "numpy")
    probes = (
        f"packed {loaded.packed}",
        f"prefixes shared {loaded.shares}",
        f"head apart {loaded.split_head}",
        f"layers compiled {bool(loaded.compiled)}",
    )
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in libraries},
        "code": store.code(),
        "model": loaded.name,
        "weights": loaded.fingerprint(),
        "parameters": str(loaded.parameters),
        "prompt": _prompt_hash(loaded),
        "device": str(loaded.device),
        "dtype": _dtype(loaded),
        "probes": ", ".join(probes),
    }


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def shown_size(arms: Sequence[ArmResult], settings: Settings) -> int:
    """Return the size at which arms are compared: the most task rows of a mixture, else of any."""
    mixed = [arm.size for arm in arms if arm_of(settings, arm.arm).uses_general_data]
    return max(mixed, default=0) or max((arm.size for arm in arms), default=0)


def shortest(rows: Sequence[Example]) -> Example:
    """Return the row with the fewest characters, on which compiled layers are tried."""

    def characters(row: Example) -> int:
        return sum(len(message.content) for message in row.messages)

    return min(rows, key=characters)


# Begin.


def _check_launcher(kind: RunKind, settings: Settings, progress: ProgressListener) -> None:
    """Raise ConfigError if the launcher shards and this run cannot; warn if it started one only."""
    if distributed.wants_shards() and (not kind.can_shard or settings.train.use_dora):
        obstacle = "use_dora" if kind.can_shard else kind.name
        raise ConfigError(
            f"the launcher asks for FSDP, with which {obstacle} is not possible; use "
            "multi_gpu.yaml, or no launcher"
        )
    if distributed.is_alone():
        progress.stage(
            "warning: the launcher was asked for several processes and started this one alone, "
            "which trains the same adapter; "
            "on a CPU: torchrun --nproc_per_node 2 -m fulcrum train ..."
        )


def _read_rows(
    kind: RunKind,
    settings: Settings,
    loaded: LoadedModel,
    arms: Sequence[Arm],
    seeds: Sequence[int],
) -> list[RunData]:
    """Read the rows of every seed."""
    candidates = choose_from(arms, settings)
    if not kind.has_dev_apart:
        return run_data.of_seeds(
            settings,
            loaded.tokenizer,
            loaded.context,
            seeds,
            mixed_rows=largest_mixture(settings),
            choose_from=candidates,
        )
    rows = []
    for seed in seeds:
        rows.append(
            run_data.prepare(
                settings, loaded.tokenizer, loaded.context, seed, choose_from=candidates
            )
        )
    return rows


def _resolve_all(
    kind: RunKind, settings: Settings, rows: Sequence[RunData], arms: Sequence[Arm]
) -> list[ArmPlan]:
    """Return the plan of every arm, at every seed and size."""
    plans = []
    for each in rows:
        for arm in arms:
            sizes: tuple[int, ...] = (each.longest,)
            if not kind.has_dev_apart:
                sizes = sizes_of(settings, arm, each.longest)
            plans += [resolve(arm, each.at(size), settings) for size in sizes]
    return plans


def _check_arms(
    settings: Settings, loaded: LoadedModel, arms: Sequence[Arm], plans: Sequence[ArmPlan]
) -> None:
    """Refuse now, not hours later, epochs beyond the cap and modules that the model lacks."""
    for plan in plans:
        _ = plan.trials  # raises ConfigError
    if not any(arm.trained for arm in arms):
        return
    for arm in arms:
        adapter.new_adapter(loaded, cell.own_settings(settings.train, arm, Hyperparameters()), 0)
    adapter.drop_adapter(loaded)


def _manifest(
    kind: str, settings: Settings, loaded: LoadedModel, rows: Sequence[RunData]
) -> dict[str, Any]:
    """Return what makes a run this run; it is kept in the folder and compared on resume."""
    data = {}
    for part in rows[0].fingerprints:
        data[part] = [each.fingerprints[part] for each in rows]
    return {
        "kind": kind,
        "settings": settings.described(),
        "data": data,
        "left_out": [dict(sorted(each.rejects.items())) for each in rows],  # rows, by reason
        "environment": environment(loaded),
    }


def _prompt_hash(loaded: LoadedModel) -> str:
    """Return a hash of a rendered prompt: templates that write the date change it every day."""
    turns = [{"role": "user", "content": "x"}]
    return store.fingerprint(
        loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.dtype).removeprefix("torch.")


# Finish.


def _notes_on_arms(
    kind: RunKind, session: Session, rows: RunData, arms: Sequence[ArmResult]
) -> list[str]:
    """Return what a report says about the model and the arms' trainings."""
    notes = []
    for fact in session.model.facts:
        if any(words in fact for words in _REPORTED_FACTS):
            notes.append(fact)
    notes += _idle_adapters(arms)
    if kind.has_mix_advice:
        for name, plan in _mixtures(session, rows, arms):
            warnings = mix.warnings(plan, session.settings.train.batch_size)
            notes += [f"{name}: {warning}" for warning in warnings]
    return notes + _numbers_of_shots(arms)


def _mixtures(
    session: Session, rows: RunData, arms: Sequence[ArmResult]
) -> Iterator[tuple[str, mix.Plan]]:
    """Give the mixture of each training that differs in arm, size or repeats."""
    keys = [(arm.arm, arm.size, arm.training.repeats) for arm in arms if arm.training is not None]
    for name, size, repeats in dict.fromkeys(keys):
        arm = arm_of(session.settings, name)
        plan = resolve(arm, rows.at(size), session.settings)
        yield name, plan.stream(session.model.tokenizer, repeats, 0).plan


def _numbers_of_shots(arms: Sequence[ArmResult]) -> list[str]:
    """Say how many examples each arm without training put into the prompt, by seed."""
    shots: dict[tuple[str, int], list[int]] = {}
    for result in arms:
        if result.setting is not None and result.setting.shots:
            shots.setdefault((result.arm, result.size), []).append(result.setting.shots)
    notes = []
    for (arm, size), numbers in shots.items():
        by_seed = ", ".join(map(str, numbers))
        notes.append(f"{arm} of {size} rows: examples in the prompt, by seed: {by_seed}")
    return notes


def _idle_adapters(arms: Sequence[ArmResult]) -> Iterator[str]:
    """Warn of trained arms with the very losses of an untrained one: no adapter was applied."""
    untrained = [arm for arm in arms if arm.training is None]
    for arm in arms:
        losses = _test_losses(arm)
        if arm.training is None or not losses:
            continue
        for other in untrained:
            if _test_losses(other) == losses:
                yield (
                    f"{arm.arm} (seed {arm.seed}) has the loss of {other.arm}, untrained, in every "
                    "test row: its adapter was not applied, or learned nothing"
                )


def _test_losses(arm: ArmResult) -> list[float]:
    """Return the loss of every test row of every task, in nats."""
    losses = []
    for rows in arm.predictions.values():
        losses += _losses(rows)
    return losses


def _forgetting(arms: Sequence[ArmResult]) -> Iterator[Difference]:
    """Give each arm's loss on held-out general rows minus the untouched model's; rows are paired.

    Nothing is given without an untouched model.
    """
    scored = [arm for arm in arms if arm.general]
    base = next((arm for arm in scored if arm.training is None), None)
    if base is None:
        return
    by_name: dict[str, list[ArmResult]] = {}
    for arm in scored:
        if arm.arm != base.arm:
            by_name.setdefault(arm.arm, []).append(arm)
    for name, results in by_name.items():
        for source, rows in base.general.items():
            own = [_losses(result.general[source]) for result in results]
            difference = scoring.paired(source, "nll", name, base.arm, own, [_losses(rows)], [rows])
            if difference is not None:
                yield difference


def _losses(rows: Sequence[Prediction]) -> list[float]:
    return [row.nll_sum for row in rows]


def _prediction_lines(arms: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """Return the lines of predictions.jsonl: test rows by task, then held-out general rows."""
    lines = []
    for arm in arms:
        parts = list(arm.predictions.items())
        parts += [(f"general: {source}", rows) for source, rows in arm.general.items()]
        key = {"arm": arm.arm, "size": arm.size, "seed": arm.seed}
        for task, rows in parts:
            lines += [{**key, "task": task, **store.plain(row)} for row in rows]
    return lines
