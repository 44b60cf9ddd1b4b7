"""In which skills the gain of general data lies: answers clustered by what they would teach, and what each arm learned of each.

Quanta discovery (Michaud et al. 2023, arXiv 2303.13506): tokens whose gradients point the same way exercise the same skill.
Gradients are of the LoRA-B matrices of a fresh adapter, on the base model, so that no arm has a part in them; items are of test
rows and of held-out general rows, which nothing is trained on. Then SFT and TELL are trained alike but for the general rows,
and every item's loss is taken along the way.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum import adapter, cell, clusters, generate, ladder, probe, store, training
from fulcrum.arms import anchor_of, chosen_arms, own_arm, stream
from fulcrum.cell import Silent, Watcher
from fulcrum.config import Arm, Settings
from fulcrum.items import Item, draw
from fulcrum.launched import writes
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.quanta_report import QUANTA
from fulcrum.records import ArmResult, FloatArray, Results, TrainPoint
from fulcrum.run import begin, claimed, finish
from fulcrum.store import seed_for

_LABEL = "answers whose gradients are taken"
_LOSSES = "losses"  # folder of a run with the items' losses, by arm and step


def quanta(settings: Settings, *, resume: bool = False, watcher: Watcher | None = None) -> Results:
    """Cluster answers by their gradients, train SFT and TELL at equal showings of the task rows, and ask whether the gain of a
    cluster rises with its share of general data; fill the run folder with `quanta.json`, an explorer page, results and report.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    watcher, started = watcher or Silent(), time.perf_counter()
    settings = ladder.paired(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        loaded, (rows,), folder = begin(QUANTA, settings, arms, settings.seeds, resume, watcher)
        rows = rows.at(settings.quanta.rows or rows.longest)
        items = _items(rows, loaded, settings)
        gradients, seconds = probe.in_blocks(
            loaded, [item.tokens for item in items], [item.key for item in items],
            partial(adapter.new_adapter, loaded, settings.train, seed_for(settings.seed, "quanta")),
            folder / store.MADE / "gradients" if writes() else None,
            budget=settings.train.pack_tokens, seed=settings.seed, count=partial(watcher.count, _LABEL), unit=True,
        )  # fmt: skip
        taught = np.flatnonzero(gradients.any(axis=1))  # where nothing is left to teach, there is no direction
        without, gradients = len(items) - len(taught), gradients[taught]
        items = [items[k] for k in taught]
        before = generate.nats(loaded, [item.tokens for item in items])[0] / [item.tokens.n_loss for item in items]
        watcher.stage("clusters, and how stable they are")
        most = max(2, min(settings.quanta.most, len(items) // 2 - 1))  # of few items only few clusters can be told
        found = clusters.find(gradients.astype(np.float64), most=most, seed=settings.seed)
        results, losses = [], {}
        for arm in arms:
            result, losses[arm.name] = _trained(rows, loaded, arm, items, settings, folder, watcher)
            results.append(result)
        if writes():
            store.write_json(
                folder / store.QUANTA, record(items, before, losses, found, settings, seconds, without), indent=None
            )
        return finish(QUANTA, settings, folder, loaded, [rows], results, (), started)


def _items(rows: Material, loaded: LoadedModel, settings: Settings) -> list[Item]:
    """Half of them of test rows, asked as the arms are, half of general rows that are kept out of the mix."""
    mixed, wanted = own_arm(settings), settings.quanta.items // 2
    own = [(row, anchor_of(mixed, task)) for task in rows.tasks for row in task.test]
    general = [(row, None) for row in rows.held_out.get("pool", ())]
    seed, unit = seed_for(settings.seed, "items"), settings.quanta.unit
    return [
        *draw(own, loaded.tokenizer, unit, wanted, general=False, seed=seed),
        *draw(general, loaded.tokenizer, unit, wanted, general=True, seed=seed),
    ]


def _trained(
    rows: Material, loaded: LoadedModel, arm: Arm, items: Sequence[Item], settings: Settings, folder: Path, watcher: Watcher
) -> tuple[ArmResult, dict[int, FloatArray]]:
    """Train an arm; its test scores, and every item's loss (nats per token) by step: (items,)."""
    own = stream(rows, loaded.tokenizer, arm, settings, settings.quanta.repeats, settings.seed)
    steps, losses = own.steps(settings.train.batch_size), dict[int, FloatArray]()
    moments = sorted({max(1, round(steps * k / settings.quanta.points)) for k in range(1, settings.quanta.points + 1)})
    counts = np.array([item.tokens.n_loss for item in items])
    told = cell.tell(watcher, arm.name, folder / store.EVENTS if writes() else None)
    place = folder / _LOSSES / arm.name

    def looked(point: TrainPoint, every: int, newest: float | None) -> None:
        told(point, every, newest)
        if point.step in moments:
            found = generate.nats(loaded, [item.tokens for item in items])[0] / counts
            if writes():
                store.write_arrays(place / f"{point.step:06}.npz", losses=found)
            losses[point.step] = found

    _, trained = training.train(
        loaded, own, None, settings.train, seed=seed_for(settings.seed, "train"), repeats=settings.quanta.repeats,
        checkpoint=folder / "checkpoints" / arm.name, progress=looked, say=watcher.stage,
    )  # fmt: skip
    for step in moments:  # those of an earlier sitting, which a checkpoint is beyond
        if step not in losses:
            with np.load(place / f"{step:06}.npz") as kept:
                losses[step] = kept["losses"]
    scored = cell.score(rows, rows.tasks, loaded, arm, settings, arm.name, watcher)
    adapter.drop_adapter(loaded)
    result = replace(scored, size=rows.longest, seed=settings.seed, training=trained, seconds=trained.seconds)
    return result, {step: losses[step] for step in moments}


def record(
    items: Sequence[Item], before: FloatArray, losses: Mapping[str, Mapping[int, FloatArray]], found: clusters.Clusters,
    settings: Settings, seconds: float, without: int,
) -> dict[str, Any]:  # fmt: skip
    """What `quanta.json` holds: every item with its cluster and losses, what clusters there are, and the test of the
    hypothesis; `without` items had no gradient and are not among them."""
    plain, mixed = list(losses)
    last = [found_[max(found_)] for found_ in losses.values()]
    labels = found.labels
    test = None
    if labels is not None:
        general = np.array([item.general for item in items])
        weights = np.where(general, 1 / general.sum(), 1 / (~general).sum())  # each kind weighs as much
        test = clusters.density_test(
            labels, general, ~general, last[0] - last[1], weights=weights, before=before, seed=settings.seed
        )
    return {
        "version": 1, "unit": settings.quanta.unit, "seed": settings.seed, "arms": [plain, mixed],
        "steps": {arm: list(own) for arm, own in losses.items()},
        "gradient_seconds": seconds, "tokens": sum(len(item.tokens) for item in items),
        "without_gradient": without,
        "clusters": {
            "k": found.k, "stability": found.stability, "eigenvalues": found.eigenvalues.tolist(),
            "candidates": store.plain(found.candidates),
        },
        "test": None if test is None else store.plain(test),
        "items": [
            {
                "general": item.general, "origin": item.origin, "group": item.group, "before": item.before, "text": item.text,
                "after": item.after, "cluster": None if labels is None else int(labels[k]), "untrained": float(before[k]),
                "losses": {arm: [float(own[step][k]) for step in own] for arm, own in losses.items()},
            }
            for k, item in enumerate(items)
        ],
    }  # fmt: skip
