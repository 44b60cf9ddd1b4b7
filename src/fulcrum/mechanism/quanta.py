"""In which skills the gain of general data lies: answers clustered by what they would teach, and
what each arm learned of each.

Quanta discovery (Michaud et al. 2023, arXiv 2303.13506): tokens whose gradients point the same way
exercise the same skill. Gradients are of the LoRA-B matrices of a fresh adapter, on the base model,
so that no arm has a part in them; items are of test rows and of held-out general rows, which
nothing is trained on. Then SFT and TELL are trained alike but for the general rows, and every
item's loss is taken along the way.

What `quanta` clusters: single answer tokens, each in its row, or whole answers; of the task's test rows and of general rows.

An item is an example whose loss is that of this token alone: the row up to it, with one target. Its gradient is then that of
the token, and rows share what they begin with, so that scoring all items costs little more than scoring their rows.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.config.arms import chosen_arms, own_arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.core.progress import ProgressListener, Silent
from fulcrum.core.store import seed_for
from fulcrum.core.types import Anchor, ArmResult, Example, FloatArray, Results, Tokens, TrainPoint
from fulcrum.data import encode
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Session
from fulcrum.experiments.lifecycle import begin, claimed, finish
from fulcrum.mechanism import clusters, scale_arms
from fulcrum.mechanism.quanta_report import QUANTA
from fulcrum.model import adapter, generate
from fulcrum.training import gradients as gradient_sketches
from fulcrum.training import loop
from fulcrum.training.gradients import SketchOptions

_BEFORE, _AFTER = 32, 12  # tokens of context that a reader is shown


@dataclass(frozen=True)
class Item:
    """An answer token (or answer) of a row, its context in words, and the example whose only loss it is."""

    general: bool
    origin: str
    group: str
    before: str
    text: str
    after: str
    tokens: Tokens

    @property
    def key(self) -> str:
        """By which its gradient is kept."""
        return f"{self.origin} {len(self.tokens)} {self.tokens.n_loss} {'general' if self.general else 'task'}"


def draw(
    rows: Sequence[tuple[Example, Anchor | None]],
    tokenizer: encode.Tokenizer,
    unit: str,
    wanted: int,
    *,
    general: bool,
    seed: int,
) -> list[Item]:
    """Up to `wanted` items of these rows, each asked with its anchor, drawn without replacement, in the order of the rows.

    Raises DataError where there are fewer than 20.
    """
    found: list[
        tuple[Example, Tokens, int]
    ] = []  # row, its tokens, the place of the token (of the first, for whole answers)
    for row, anchor in rows:
        tokens = encode.final_answer(row, encode.make_format(tokenizer, anchor))
        places = np.flatnonzero(tokens.loss_mask)
        found += [
            (row, tokens, int(place)) for place in (places if unit == "tokens" else places[:1])
        ]
    kind = "held-out general rows" if general else "test rows"
    if len(found) < 20:
        raise DataError(
            f"quanta: {len(found)} {unit} in the answers of {len(rows)} {kind} are too few to cluster; give more rows "
            f"({'eval.general_rows' if general else 'task.test'}){'' if unit == 'tokens' else ', or set quanta.unit: tokens'}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(found))[:wanted])
    return [_item(found[k], tokenizer, whole=unit == "rows", general=general) for k in chosen]


def _item(
    found: tuple[Example, Tokens, int], tokenizer: encode.Tokenizer, *, whole: bool, general: bool
) -> Item:
    row, tokens, place = found
    end = len(tokens) if whole else place + 1
    mask = tokens.loss_mask[:end].copy()
    if not whole:
        mask[:place] = False

    def words(start: int, stop: int) -> str:
        return str(tokenizer.decode(tokens.ids[max(start, 0) : stop].tolist()))

    return Item(
        general, row.origin, row.group, words(place - _BEFORE, place), words(place, end), words(end, end + _AFTER),
        Tokens(tokens.ids[:end], mask),
    )  # fmt: skip


_LABEL = "answers whose gradients are taken"
_LOSSES = "losses"  # folder of a run with the items' losses, by arm and step


def run_quanta(
    settings: Settings, *, resume: bool = False, progress: ProgressListener | None = None
) -> Results:
    """Cluster answers by their gradients, and ask where general data helped.

    SFT and TELL are trained at equal showings of the task rows: does the gain of a cluster rise
    with its share of general data? Fill the run folder with `quanta.json`, an explorer page,
    results and report.

    Raises ConfigError, DataError, ModelError or StoreError.
    """
    progress, started = progress or Silent(), time.perf_counter()
    settings = scale_arms.paired(settings)
    with claimed(settings, resume=resume):
        arms = chosen_arms(settings)
        session, (rows,) = begin(QUANTA, settings, arms, settings.seeds, resume, progress)
        rows = rows.at(settings.quanta.rows or rows.longest)
        items = _items(session, rows)
        fresh_seed = seed_for(settings.seed, "quanta")
        gradients, seconds = gradient_sketches.sketch_in_blocks(
            session.model,
            {item.key: item.tokens for item in items},
            SketchOptions(settings.train.pack_tokens, settings.seed, normalise=True),
            put_adapter=partial(adapter.new_adapter, session.model, settings.train, fresh_seed),
            folder=None if session.kept is None else session.kept / store.MADE / "gradients",
            count=partial(progress.count, _LABEL),
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

    _, trained = loop.train(
        session.model,
        stream,
        loop.Recipe(settings.train, seed_for(settings.seed, "train"), settings.quanta.repeats),
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
