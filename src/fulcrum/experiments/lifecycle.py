"""One run on one page: every stage in order, from files to a scored adapter.

No stage calls the next; this file does.

files -> material (rows split and cleaned) -> tokens -> plan -> adapter, once per trial -> the trial
best on dev -> test scores

What makes a run this run, and what its numbers depend on: settings, data, weights, code, versions, probes.
"""

import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from fulcrum.core.types import ArmResult, Difference, Hyperparameters, Results
from fulcrum.data import mix, run_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell, scoring
from fulcrum.experiments.arm_data import planned_tokens, resolve
from fulcrum.experiments.cell import Session
from fulcrum.model import adapter, base_model, distributed, save
from fulcrum.model.base_model import LoadedModel
from fulcrum.report import run_report
from fulcrum.report.run_kinds import RunKind
from fulcrum.training import compile


def manifest(
    kind: str, settings: Settings, loaded: LoadedModel, materials: Sequence[RunData]
) -> dict[str, Any]:
    """What makes a run this run: settings, every data row, model and versions. Kept in the folder, compared at resume."""
    return {
        "kind": kind,
        "settings": settings.described(),
        "data": {
            part: [rows.fingerprints[part] for rows in materials]
            for part in materials[0].fingerprints
        },
        "left_out": [
            dict(sorted(rows.rejects.items())) for rows in materials
        ],  # rows read and not used, by reason
        "environment": environment(loaded),
    }


def environment(loaded: LoadedModel) -> dict[str, str]:
    """Versions, code, weights and choices that a number depends on."""
    libraries = ("fulcrum-llm", "torch", "transformers", "peft", "accelerate", "numpy")
    return {
        "python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in libraries}, "code": store.code(), "model": loaded.name,
        "weights": loaded.fingerprint(), "parameters": str(loaded.parameters),
        "prompt": _prompt(loaded), "device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch."),
        "probes": f"packed {loaded.packed}, prefixes shared {loaded.shares}, head apart {loaded.split_head}, "
        f"layers compiled {bool(loaded.compiled)}",
    }  # fmt: skip


def _prompt(loaded: LoadedModel) -> str:
    """A hash of a rendered prompt: some templates write the date, and then tomorrow's tokens are others."""
    turns = [{"role": "user", "content": "x"}]
    return store.fingerprint(
        loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


# What of a model's facts a report says.
_TOLD = (
    "one example per row",
    "could not be compiled",
    "are spread over",
)


@contextmanager
def claimed(settings: Settings, *, resume: bool) -> Iterator[None]:
    """Inside, the output folder is this run's alone. Raises StoreError where it cannot be."""
    folder = Path(settings.output_dir)
    if distributed.writes():
        # Before a lock is put into somebody else's folder.
        run_folder.check_free(folder, resume=resume)
    with run_folder.held(folder) if distributed.writes() else nullcontext():
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
    if distributed.wants_shards() and (not kind.can_shard or settings.train.use_dora):
        what = "use_dora" if kind.can_shard else kind.name
        raise ConfigError(
            f"the launcher asks for FSDP, with which {what} is not possible; use multi_gpu.yaml, "
            "or no launcher"
        )
    kept = load_settings(folder / "config.yaml") if (folder / "config.yaml").exists() else settings
    chosen = settings.train.model_copy(
        update={name: getattr(kept.train, name) for name in ("dtype", "device", "compile")}
    )
    if distributed.is_alone():
        progress.stage(
            "warning: the launcher was asked for several processes and started this one alone, "
            "which trains the same adapter; "
            "on a CPU: torchrun --nproc_per_node 2 -m fulcrum train ..."
        )
    progress.stage(f"loading {settings.model}")
    loaded = base_model.load(settings.model, chosen, trust_remote_code=settings.trust_remote_code)
    progress.stage("reading data")
    among = choose_from(arms, settings)
    apart = kind.has_dev_apart
    if apart:
        rows = [
            run_data.prepare(settings, loaded.tokenizer, loaded.context, seed, choose_from=among)
            for seed in seeds
        ]
    else:
        most = largest_mixture(settings)
        rows = run_data.of_seeds(
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
    if compile.wanted(loaded, chosen, tokens):
        progress.stage("compiling the model's layers")
        shortest = min(
            rows[0].tasks[0].train,
            key=lambda row: sum(len(message.content) for message in row.messages),
        )
        compile.switch_on(loaded, chosen, shortest)
    if distributed.writes():
        run_folder.open_run(folder, manifest(kind.name, settings, loaded, rows), resume=resume)
        probed = {
            "dtype": str(loaded.dtype).removeprefix("torch."),
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
        tasks=run_data.facts(first, loaded.tokenizer),
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
    if distributed.writes():
        store.write_jsonl(folder / "predictions.jsonl", lines)
        store.write_json(folder / "results.json", results)
        run_report.write(folder, kind)
        if kind.adapters is not None:
            card = run_report.card(run_report.load(folder), kind, save.NOTE)
            store.write_bytes(folder / "README.md", card.encode())
        run_folder.seal(folder)
    distributed.processes().wait_for_everyone()
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
