"""Run `quanta`: cluster answers by what they would teach, and show what each arm learned of each.

Quanta discovery (Michaud et al. 2023, arXiv 2303.13506): tokens whose gradients point the same way
exercise the same skill. An item is a single answer token in its row, or a whole answer; half of the
items are from the task's test rows, half from held-out general rows, so nothing is trained on any
of them. Gradients are of the LoRA-B matrices of a fresh adapter on the base model, so no arm has a
part in them. Then SFT and TELL are trained alike except for the general rows, and every item's loss
is measured along the way.

For a token, the example is the row up to it, with that one target. Its gradient is then the
token's own. Such examples share what their rows begin with, so scoring all items costs little more
than scoring their rows.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulcrum.config.arms import chosen_arms, own_arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.store import seed_for
from fulcrum.core.types import (
    Anchor,
    ArmResult,
    Example,
    FloatArray,
    IntArray,
    Results,
    Tokens,
    TrainPoint,
)
from fulcrum.data import encode
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Session
from fulcrum.experiments.lifecycle import begin, claimed, finish
from fulcrum.mechanism import cluster_gains, clusters, scale_arms
from fulcrum.mechanism.quanta_report import QUANTA
from fulcrum.model import adapter, generate
from fulcrum.training import gradients as gradient_sketches
from fulcrum.training import loop
from fulcrum.training.gradients import SketchOptions

_BEFORE = 32  # tokens of context that a reader is shown
_AFTER = 12
_FEWEST = 20  # answers that can be clustered
_LABEL = "answers whose gradients are taken"
_LOSSES = "losses"  # folder of a run with the items' losses, by arm and step


@dataclass(frozen=True)
class Item:
    """An answer token of a row, or a whole answer."""

    general: bool  # of a general row, not of the task
    origin: str
    group: str
    before: str  # context, in words
    text: str
    after: str  # context, in words
    tokens: Tokens  # the example whose only loss is the item's

    @property
    def key(self) -> str:
        """Under which its gradient is stored."""
        kind = "general" if self.general else "task"
        return f"{self.origin} {len(self.tokens)} {self.tokens.n_loss} {kind}"


def run_quanta(
    settings: Settings, *, resume: bool = False, progress: ProgressListener | None = None
) -> Results:
    """Cluster answers by their gradients, and test where general data helped.

    SFT and TELL see each task row equally often. Does the gain of a cluster rise with its share of
    general data? The run folder gets `quanta.json`, an explorer page, results and report.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    settings = scale_arms.paired(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        session, (rows,) = begin(QUANTA, settings, arms, settings.seeds, resume, progress)
        rows = rows.at(settings.quanta.rows or rows.longest)
        items = _items(session, rows)
        fresh_seed = seed_for(settings.seed, "quanta")
        gradients, seconds = gradient_sketches.sketch_in_blocks(
            session.model,
            [(item.key, item.tokens) for item in items],
            SketchOptions(settings.train.pack_tokens, settings.seed, normalise=True),
            put_adapter=partial(adapter.new_adapter, session.model, settings.train, fresh_seed),
            folder=None if session.kept is None else session.kept / store.MADE / "gradients",
            count=partial(progress.count, _LABEL),
        )
        # If nothing is left to teach, there is no direction.
        taught = np.flatnonzero(gradients.any(axis=1))
        without_gradient = len(items) - len(taught)
        gradients = gradients[taught]
        items = [items[k] for k in taught]
        before = _losses(session, items)
        progress.stage("clusters, and how stable they are")
        # Of few items only few clusters can be told.
        most = max(2, min(settings.quanta.most, len(items) // 2 - 1))
        clustering = clusters.find(gradients.astype(np.float64), most=most, seed=settings.seed)
        results = []
        losses: dict[str, dict[int, FloatArray]] = {}
        for arm in arms:
            result, losses[arm.name] = _train(session, resolve(arm, rows, settings), items)
            results.append(result)
        if session.kept is not None:
            content = record(items, before, losses, clustering, settings, seconds, without_gradient)
            store.write_json(session.kept / store.QUANTA, content, indent=None)
        return finish(QUANTA, session, [rows], results, started)


def draw(
    rows: Sequence[tuple[Example, Anchor | None]],
    tokenizer: encode.Tokenizer,
    unit: str,
    wanted: int,
    *,
    general: bool,
    seed: int,
) -> list[Item]:
    """Draw up to `wanted` items of these rows, each with its anchor, without replacement.

    Items are in the order of the rows. Raises DataError if there are fewer than 20.
    """
    answers: list[_Answer] = []
    for row, anchor in rows:
        tokens = encode.final_answer(row, encode.make_format(tokenizer, anchor))
        places = np.flatnonzero(tokens.loss_mask).tolist()
        for place in places[:1] if unit == "rows" else places:
            end = len(tokens) if unit == "rows" else place + 1
            answers.append(_Answer(row, tokens, place, end))
    if len(answers) < _FEWEST:
        kind, key = "test rows", "task.test"
        if general:
            kind, key = "held-out general rows", "eval.general_rows"
        other = "" if unit == "tokens" else ", or set quanta.unit: tokens"
        raise DataError(
            f"quanta: {len(answers)} {unit} in the answers of {len(rows)} {kind} are too few to "
            f"cluster; give more rows ({key}){other}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(answers))[:wanted])
    return [_item(answers[k], tokenizer, general) for k in chosen]


def record(
    items: Sequence[Item],
    before: FloatArray,
    losses: Mapping[str, Mapping[int, FloatArray]],
    clustering: clusters.Clusters,
    settings: Settings,
    gradient_seconds: float,
    without_gradient: int,
) -> dict[str, Any]:
    """Return what `quanta.json` holds: items, clusters, and the test of the hypothesis.

    `before` (items,) are the losses before training, `losses` those of each arm by step.
    `without_gradient` more items had no gradient and are not among these.
    """
    labels = clustering.labels
    test = None
    if labels is not None:
        test = _density_test(items, labels, before, losses, settings.seed)
    described = []
    for place, item in enumerate(items):
        by_arm = {}
        for arm, by_step in losses.items():
            by_arm[arm] = [float(of_items[place]) for of_items in by_step.values()]
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
        "arms": list(losses),
        "steps": {arm: list(by_step) for arm, by_step in losses.items()},
        "gradient_seconds": gradient_seconds,
        "tokens": sum(len(item.tokens) for item in items),
        "without_gradient": without_gradient,
        "clusters": {
            "k": clustering.k,
            "stability": clustering.stability,
            "eigenvalues": clustering.eigenvalues.tolist(),
            "candidates": store.plain(clustering.candidates),
        },
        "test": None if test is None else store.plain(test),
        "items": described,
    }


class _Answer(NamedTuple):
    """A part of a row's answer that can become an item."""

    row: Example
    tokens: Tokens  # of the whole row
    start: int  # the answer's, or the token's
    end: int


def _item(answer: _Answer, tokenizer: encode.Tokenizer, general: bool) -> Item:
    row, tokens, start, end = answer
    mask = tokens.loss_mask[:end].copy()
    mask[:start] = False

    def words(start: int, stop: int) -> str:
        return str(tokenizer.decode(tokens.ids[max(start, 0) : stop].tolist()))

    return Item(
        general=general,
        origin=row.origin,
        group=row.group,
        before=words(start - _BEFORE, start),
        text=words(start, end),
        after=words(end, end + _AFTER),
        tokens=Tokens(tokens.ids[:end], mask),
    )


def _items(session: Session, rows: RunData) -> list[Item]:
    """Draw half of the items from test rows, half from general rows kept out of the mix."""
    settings, tokenizer = session.settings, session.model.tokenizer
    anchors = resolve(own_arm(settings), rows, settings).train_anchors
    own = [(row, anchors[task.name]) for task in rows.tasks for row in task.test]
    held_out = [(row, None) for row in rows.held_out.get("pool", ())]
    seed = seed_for(settings.seed, "items")
    unit = settings.quanta.unit
    wanted = settings.quanta.items // 2
    return [
        *draw(own, tokenizer, unit, wanted, general=False, seed=seed),
        *draw(held_out, tokenizer, unit, wanted, general=True, seed=seed),
    ]


def _losses(session: Session, items: Sequence[Item]) -> FloatArray:
    """Return each item's loss with what is on the model, in nats per token: (items,)."""
    nats, counts = generate.nats(session.model, [item.tokens for item in items])
    losses: FloatArray = nats / counts
    return losses


def _train(
    session: Session, plan: ArmPlan, items: Sequence[Item]
) -> tuple[ArmResult, dict[int, FloatArray]]:
    """Train an arm; return its test scores, and the items' losses by step: (items,) each."""
    settings, name = session.settings, plan.arm.name
    stream = plan.stream(session.model.tokenizer, settings.quanta.repeats, settings.seed)
    moments = _moments(stream.steps(settings.train.batch_size), settings.quanta.points)
    losses: dict[int, FloatArray] = {}
    tell = session.listener(name)
    place = Path(settings.output_dir) / _LOSSES / name

    def look(point: TrainPoint, every: int, newest: float | None) -> None:
        tell(point, every, newest)
        if point.step in moments:
            losses[point.step] = _losses(session, items)
            if session.kept is not None:
                store.write_arrays(place / f"{point.step:06}.npz", losses=losses[point.step])

    _, run = loop.train(
        session.model,
        stream,
        loop.Recipe(settings.train, seed_for(settings.seed, "train"), settings.quanta.repeats),
        checkpoint=session.checkpoint(name),
        progress=look,
        say=session.progress.stage,
    )
    for step in moments:
        if step not in losses:  # measured before the run was resumed from a later checkpoint
            with np.load(place / f"{step:06}.npz") as kept:
                losses[step] = kept["losses"]
    result = replace(
        cell.score(session, plan, plan.rows.tasks, name),
        size=plan.rows.longest,
        seed=settings.seed,
        training=run,
        seconds=run.seconds,
    )
    adapter.drop_adapter(session.model)
    return result, {step: losses[step] for step in moments}


def _moments(steps: int, points: int) -> list[int]:
    """Return the steps, evenly spaced up to the last, after which losses are measured."""
    return sorted({max(1, round(steps * k / points)) for k in range(1, points + 1)})


def _density_test(
    items: Sequence[Item],
    labels: IntArray,
    before: FloatArray,
    losses: Mapping[str, Mapping[int, FloatArray]],
    seed: int,
) -> cluster_gains.DensityTest:
    """Test whether the gain at the last step rises with a cluster's share of general items.

    General items together weigh as much as those of the task.
    """
    general = np.array([item.general for item in items])
    plain, mixed = (by_step[max(by_step)] for by_step in losses.values())
    described = cluster_gains.summarise(
        labels,
        general,
        ~general,
        plain - mixed,
        weights=np.where(general, 1 / general.sum(), 1 / (~general).sum()),
        before=before,
    )
    return cluster_gains.density_test(described, seed=seed)
