"""Arms x seeds on the same rows: the untouched model, plain SFT and TELL side by side, with intervals.

A cell is one arm at one seed (all its trials). Each finished cell is stored at once, so a killed comparison goes on without
redoing it. All cells share the base model; only adapters change.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fulcrum import export, scoring, store
from fulcrum.arms import Arm, chosen_arms
from fulcrum.config import Settings
from fulcrum.errors import StoreError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import ArmResult, Difference, Results
from fulcrum.run import Silent, Watcher, begin, finish, run_arm, writes

# Which pairs answer a question: what did TELL bring over X, mixing alone, the anchor alone, training at all?
_REFERENCES = ("sft_anchor", "sft", "kshot", "base_anchor", "base")  # without general data
_RIVALS = ("mix", "general_then_task", "task_then_general", "replay_10", "placebo_permuted")  # with general data
_PAIRS = (
    *(("tell", name) for name in _REFERENCES), *(("tell", name) for name in _RIVALS), *(("mix", name) for name in _REFERENCES),
    ("sft_anchor", "sft"), ("sft", "kshot"), ("sft", "base"), ("kshot", "base"), ("base_anchor", "base"),
)  # fmt: skip


def compare(settings: Settings, *, resume: bool = False, watcher: Watcher | None = None) -> Results:
    """Run every arm at every seed, and fill the run folder with results, predictions, adapters and report.

    Fairness: the same task rows in all arms; no arm may use more optimizer steps than TELL; SFT's epochs are tuned, its
    learning rate decaying fully within them; one checkpoint rule (best on dev); test is scored once per arm and seed.
    Raises ConfigError, DataError, ModelError or StoreError.
    """
    watcher, started = watcher or Silent(), time.perf_counter()
    arms, seeds = chosen_arms(settings), settings.seeds
    loaded, rows, folder = begin("compare", settings, arms, seeds, resume, watcher)
    # The untouched model does not depend on the seed: the first seed's cell stands for all.
    cells = [(arm, place) for place in range(len(seeds)) for arm in arms if arm.seeded or place == 0]
    results: list[ArmResult] = []
    for arm, place in cells:
        watcher.stage(f"{arm.name}, seed {seeds[place]} (cell {len(results) + 1} of {len(cells)})")
        results.append(_cell(rows[place], loaded, arm, settings, seeds[place], folder, watcher))
    differences = paired_differences(results, settings)
    return finish("compare", settings, folder, loaded, rows, results, differences, started)


def _cell(
    rows: Material, loaded: LoadedModel, arm: Arm, settings: Settings, seed: int, folder: Path, watcher: Watcher
) -> ArmResult:
    """One arm at one seed: read back if it is finished, else run and stored. The first seed's adapters are kept."""
    file = folder / "cells" / f"{arm.name}-seed{seed}.json"
    if file.exists():
        try:
            return TypeAdapter(ArmResult).validate_python(store.read_json(file))
        except ValidationError as error:
            raise StoreError(
                f"{file}: not a finished cell, the file was changed or damaged; delete it to run it anew"
            ) from error
    result, state = run_arm(rows, loaded, arm, settings, seed, folder, watcher)
    if writes() and state is not None and seed == settings.seeds[0]:
        anchors = {task.name: task.anchor if arm.anchored else None for task in rows.tasks}
        export.save_adapter(loaded, folder / "adapters" / arm.name, anchors)
    if writes():
        store.write_json(file, result)
        for trial in (folder / "checkpoints").glob(f"{arm.name}-seed{seed}-*"):
            shutil.rmtree(trial)  # a finished cell is never trained again
    return result


def paired_differences(results: Sequence[ArmResult], settings: Settings) -> list[Difference]:
    """Paired test differences of the telling pairs, for every task and every metric that is a mean over rows."""
    by_arm: dict[str, list[ArmResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    found = []
    for arm, reference in _PAIRS:
        for task in settings.tasks if arm in by_arm and reference in by_arm else ():
            for metric in task.metrics:
                own, other = (
                    [scoring.outcomes(cell.predictions[task.name], cell.scores[task.name], metric) for cell in by_arm[name]]
                    for name in (arm, reference)
                )
                rows = by_arm[arm][0].predictions[task.name]
                found.append(scoring.paired(task.name, metric, arm, reference, own, other, rows))
    return [difference for difference in found if difference is not None]
