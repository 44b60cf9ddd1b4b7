"""In which skills the gain of general data lies: answers clustered by what they would teach, and
what each arm learned of each.

Quanta discovery (Michaud et al. 2023, arXiv 2303.13506): tokens whose gradients point the same way
exercise the same skill. Gradients are of the LoRA-B matrices of a fresh adapter, on the base model,
so that no arm has a part in them; items are of test rows and of held-out general rows, which
nothing is trained on. Then SFT and TELL are trained alike but for the general rows, and every
item's loss is taken along the way.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum import adapter, cell, clusters, generate, ladder, probe, store, training
from fulcrum.arm_data import ArmPlan, resolve
from fulcrum.arms import chosen_arms, own_arm
from fulcrum.cell import Session
from fulcrum.config import Settings
from fulcrum.items import Item, draw
from fulcrum.material import RunData
from fulcrum.progress import ProgressListener, Silent
from fulcrum.quanta_report import QUANTA
from fulcrum.records import ArmResult, FloatArray, Results, TrainPoint
from fulcrum.run import begin, claimed, finish
from fulcrum.store import seed_for

_LABEL = "answers whose gradients are taken"
_LOSSES = "losses"  # folder of a run with the items' losses, by arm and step


def quanta(
    settings: Settings, *, resume: bool = False, progress: ProgressListener | None = None
) -> Results:
    """Cluster answers by their gradients, and ask where general data helped.

    SFT and TELL are trained at equal showings of the task rows: does the gain of a cluster rise
    with its share of general data? Fill the run folder with `quanta.json`, an explorer page,
    results and report.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    progress, started = progress or Silent(), time.perf_counter()
    settings = ladder.paired(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        session, (rows,) = begin(QUANTA, settings, arms, settings.seeds, resume, progress)
        rows = rows.at(settings.quanta.rows or rows.longest)
        items = _items(session, rows)
        gradients, seconds = probe.in_blocks(
            session.model,
            {item.key: item.tokens for item in items},
            partial(
                adapter.new_adapter,
                session.model,
                settings.train,
                seed_for(settings.seed, "quanta"),
            ),
            None if session.kept is None else session.kept / store.MADE / "gradients",
            budget=settings.train.pack_tokens,
            seed=settings.seed,
            count=partial(progress.count, _LABEL),
            unit=True,
        )
        # If nothing is left to teach, there is no direction.
        taught = np.flatnonzero(gradients.any(axis=1))
        without, gradients = len(items) - len(taught), gradients[taught]
        items = [items[k] for k in taught]
        before = _losses(session, items)
        progress.stage("clusters, and how stable they are")
        # Of few items only few clusters can be told.
        most = max(2, min(settings.quanta.most, len(items) // 2 - 1))
        found = clusters.find(gradients.astype(np.float64), most=most, seed=settings.seed)
        results, losses = [], {}
        for arm in arms:
            result, losses[arm.name] = _trained(session, resolve(arm, rows, settings), items)
            results.append(result)
        if session.kept is not None:
            content = record(items, before, losses, found, settings, seconds, without)
            store.write_json(session.kept / store.QUANTA, content, indent=None)
        return finish(QUANTA, session, [rows], results, started)


def _items(session: Session, rows: RunData) -> list[Item]:
    """Draw half of the items from test rows, half from general rows kept out of the mix."""
    settings, tokenizer = session.settings, session.model.tokenizer
    anchors = resolve(own_arm(settings), rows, settings).train_anchors
    own = [(row, anchors[task.name]) for task in rows.tasks for row in task.test]
    general = [(row, None) for row in rows.held_out.get("pool", ())]
    seed, unit, wanted = (
        seed_for(settings.seed, "items"),
        settings.quanta.unit,
        settings.quanta.items // 2,
    )
    return [
        *draw(own, tokenizer, unit, wanted, general=False, seed=seed),
        *draw(general, tokenizer, unit, wanted, general=True, seed=seed),
    ]


def _losses(session: Session, items: Sequence[Item]) -> FloatArray:
    """Return each item's loss with what is on the model, in nats per token: (items,)."""
    nats, counts = generate.nats(session.model, [item.tokens for item in items])
    losses: FloatArray = nats / counts
    return losses


def _trained(
    session: Session, plan: ArmPlan, items: Sequence[Item]
) -> tuple[ArmResult, dict[int, FloatArray]]:
    """Train an arm; return its test scores, and the items' losses by step: (items,) each."""
    settings, name = session.settings, plan.arm.name
    stream = plan.stream(session.model.tokenizer, settings.quanta.repeats, settings.seed)
    steps, points = stream.steps(settings.train.batch_size), settings.quanta.points
    moments = sorted({max(1, round(steps * k / points)) for k in range(1, points + 1)})
    losses: dict[int, FloatArray] = {}
    tell = session.listener(name)
    place = Path(settings.output_dir) / _LOSSES / name

    def look(point: TrainPoint, every: int, newest: float | None) -> None:
        tell(point, every, newest)
        if point.step in moments:
            losses[point.step] = _losses(session, items)
            if session.kept is not None:
                store.write_arrays(place / f"{point.step:06}.npz", losses=losses[point.step])

    _, trained = training.train(
        session.model,
        stream,
        None,
        settings.train,
        seed=seed_for(settings.seed, "train"),
        repeats=settings.quanta.repeats,
        checkpoint=session.checkpoint(name),
        progress=look,
        say=session.progress.stage,
    )
    for step in moments:  # those of an earlier sitting, which a checkpoint is beyond
        if step not in losses:
            with np.load(place / f"{step:06}.npz") as kept:
                losses[step] = kept["losses"]
    scored = cell.score(session, plan, plan.rows.tasks, name)
    adapter.drop_adapter(session.model)
    result = replace(
        scored,
        size=plan.rows.longest,
        seed=settings.seed,
        training=trained,
        seconds=trained.seconds,
    )
    return result, {step: losses[step] for step in moments}


def record(
    items: Sequence[Item],
    before: FloatArray,
    losses: Mapping[str, Mapping[int, FloatArray]],
    found: clusters.Clusters,
    settings: Settings,
    seconds: float,
    without: int,
) -> dict[str, Any]:
    """Return what `quanta.json` holds: items, clusters, and the test of the hypothesis.

    Each item has its cluster and losses; `without` items had no gradient and are not among them.
    """
    plain, mixed = list(losses)
    labels = found.labels
    test = None
    if labels is not None:
        general = np.array([item.general for item in items])
        last = [by_step[max(by_step)] for by_step in losses.values()]
        each_kind_alike = np.where(general, 1 / general.sum(), 1 / (~general).sum())
        test = clusters.density_test(
            labels,
            general,
            ~general,
            last[0] - last[1],
            weights=each_kind_alike,
            before=before,
            seed=settings.seed,
        )
    described = []
    for place, item in enumerate(items):
        by_arm = {}
        for arm, by_step in losses.items():
            by_arm[arm] = [float(by_step[step][place]) for step in by_step]
        described.append(
            {
                "general": item.general,
                "origin": item.origin,
                "group": item.group,
                "before": item.before,
                "text": item.text,
                "after": item.after,
                "cluster": None if labels is None else int(labels[place]),
                "untrained": float(before[place]),
                "losses": by_arm,
            }
        )
    return {
        "version": 1,
        "unit": settings.quanta.unit,
        "seed": settings.seed,
        "arms": [plain, mixed],
        "steps": {arm: list(by_step) for arm, by_step in losses.items()},
        "gradient_seconds": seconds,
        "tokens": sum(len(item.tokens) for item in items),
        "without_gradient": without,
        "clusters": {
            "k": found.k,
            "stability": found.stability,
            "eigenvalues": found.eigenvalues.tolist(),
            "candidates": store.plain(found.candidates),
        },
        "test": None if test is None else store.plain(test),
        "items": described,
    }
