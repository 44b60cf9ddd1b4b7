"""Arms: the ways of training that are compared, and for each the streams that it trains on. No torch: previews need them too.

Arms differ in what an `Arm` says and in nothing else: the same task rows, the same plan of trials, the same checkpoint rule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fulcrum import encode, mix, store, tokens
from fulcrum.config import Settings
from fulcrum.errors import ConfigError, nearest
from fulcrum.material import Material
from fulcrum.mix import Plan
from fulcrum.records import BoolArray, Share, Tokens

_STRATIFIED = 200  # steps; shorter mixed streams are stratified by epoch


@dataclass(frozen=True)
class Arm:
    """One way of training that is compared. Arms differ in these things and in nothing else."""

    name: str
    trained: bool
    anchored: bool
    general: bool


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", trained=False, anchored=False, general=False),
        Arm("base_anchor", trained=False, anchored=True, general=False),
        Arm("sft", trained=True, anchored=False, general=False),
        Arm("sft_anchor", trained=True, anchored=True, general=False),
        Arm("mix", trained=True, anchored=False, general=True),
        Arm("tell", trained=True, anchored=True, general=True),
    )
}


def chosen_arms(settings: Settings) -> list[Arm]:
    """The arms asked for. Raises ConfigError for unknown names and for arms that these settings cannot make different."""
    unknown = [name for name in settings.compare.arms if name not in ARMS]
    if unknown:
        raise ConfigError(f"compare.arms: no arm {unknown[0]!r}{nearest(unknown[0], ARMS)}")
    arms = [ARMS[name] for name in settings.compare.arms]
    if len(arms) < 2:
        raise ConfigError(f"compare.arms: {arms[0].name} alone has nothing to be compared with; name a second arm")
    if not any(task.anchor for task in settings.tasks):
        named = [arm.name for arm in arms if arm.anchored]
        if named:
            raise ConfigError(
                f"compare.arms: {', '.join(named)} need an anchor and no task has one; set task.anchor or leave them out"
            )
    if settings.mix.general_per_task == 0 and any(arm.general for arm in arms):
        raise ConfigError(
            "compare: mix.general_per_task is 0, so mix and tell would be SFT; set it above 0 or leave these arms out"
        )
    return arms


@dataclass(frozen=True)
class Stream:
    """A plan with the tokens of the rows that it orders. `task` and `general` are indexed by the plan's row ids."""

    plan: Plan
    task: Sequence[Tokens]
    general: Sequence[Tokens]

    def step(self, index: int, batch_size: int) -> tuple[list[Tokens], BoolArray]:
        """The examples of one optimizer step in order, and which of them are task rows."""
        start = index * batch_size
        is_task, ids = self.plan.slice(start, min(start + batch_size, len(self.plan)))
        return [(self.task if own else self.general)[row] for own, row in zip(is_task, ids, strict=True)], is_task

    def steps(self, batch_size: int) -> int:
        """Number of optimizer steps; the last may be smaller."""
        return math.ceil(len(self.plan) / batch_size)

    def share(self, positions: int | None = None) -> Share:
        """Realised task shares in examples, tokens and loss tokens, counted over the first `positions` (none: all)."""
        is_task, ids = self.plan.slice(0, len(self.plan) if positions is None else min(positions, len(self.plan)))
        examples = [(self.task if own else self.general)[row] for own, row in zip(is_task, ids, strict=True)]
        return mix.share(is_task, np.array([len(e) for e in examples]), np.array([e.n_loss for e in examples]))


def own_arm(settings: Settings) -> Arm:
    """The arm that the settings describe: TELL where there is an anchor and general data, else what is left of it."""
    anchored = any(task.anchor is not None for task in settings.tasks)
    general = settings.mix.general_per_task > 0
    return next(a for a in ARMS.values() if a.trained and a.anchored == anchored and a.general == general)


def stream(rows: Material, tokenizer: encode.Tokenizer, arm: Arm, settings: Settings, repeats: int, seed: int) -> Stream:
    """The token stream of one trial: the same task rows in every arm, with or without anchor and general rows."""
    plain = encode.make_format(tokenizer, None)
    own: list[Tokens] = []
    for task in rows.tasks:
        form = encode.make_format(tokenizer, task.anchor) if arm.anchored else plain
        encode.encode_ahead(task.train, form)
        own += [encode.encode(example, form) for example in task.train]
    count = rows.general_count(repeats) if arm.general else 0
    plan = mix.plan(
        len(own), count, repeats=repeats, general_per_task=count / (repeats * len(own)),
        order=_order(settings, repeats * len(own), count), seed=store.seed_for(seed, "mix"),
    )  # fmt: skip
    return Stream(plan, own, tokens.tokenised(rows.general, plain)[:count])


def planned_tokens(rows: Material, tokenizer: encode.Tokenizer, arms: Sequence[Arm], settings: Settings) -> int:
    """About how many tokens all trials of the arms train on at one seed, from the lengths of a few rows (anchors left out)."""
    plain = encode.make_format(tokenizer, None)
    total = 0.0
    task = [row for each in rows.tasks for row in each.train]
    for part, own in ((task, True), (rows.general, False)):
        length = float(np.mean([len(encode.encode(row, plain)) for row in part[:: max(1, len(part) // 64)]])) if part else 0.0
        for arm in arms:
            for repeats in trials(rows, arm, settings) if arm.trained else ():
                total += length * (repeats * len(part) if own else rows.general_count(repeats) * arm.general)
    return round(total)


def _order(settings: Settings, shown: int, general: int) -> str:
    """Task rows alone are shuffled anew in each epoch, as everyone does; in a short mixture stratification avoids clumps."""
    if general == 0:
        return "epoch_stratified"
    if settings.mix.order != "auto":
        return settings.mix.order
    return "epoch_stratified" if shown + general < _STRATIFIED * settings.train.batch_size else "random"


def trials(rows: Material, arm: Arm, settings: Settings) -> tuple[int, ...]:
    """The repeats (epochs) that an arm tries. Without general data: up to the most epochs that TELL's steps allow.

    Each trial's learning rate decays fully within its own steps. Raises ConfigError for epochs beyond the cap.
    """
    wanted = settings.compare.sft_epochs
    if arm.general or (settings.mix.general_per_task == 0 and wanted is None):
        return rows.repeats
    cap = max(1, rows.step_cap * settings.train.batch_size // rows.n_task)
    if wanted is None:
        # At least as many trials as TELL has; a single pass and the cap are always among them.
        return tuple(sorted({int(n) for n in np.geomspace(1, cap, max(3, len(rows.repeats))).round()}))
    if settings.mix.general_per_task > 0 and max(wanted) > cap:
        raise ConfigError(
            f"compare.sft_epochs: {max(wanted)} epochs of {rows.n_task} rows are over TELL's {rows.step_cap} steps; "
            f"use at most {cap}"
        )
    return wanted
