"""Arms: the ways of training that are compared, and for each the streams that it trains on. No torch: previews need them too.

Arms differ in what an `Arm` says and in nothing else: the same task rows, the same plan of trials, the same checkpoint rule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fulcrum import encode, mix, store, tokens
from fulcrum.config import Settings
from fulcrum.errors import ConfigError, nearest
from fulcrum.material import Material
from fulcrum.mix import Plan
from fulcrum.records import BoolArray, Example, Share, Tokens

_STRATIFIED = 200  # steps; shorter mixed streams are stratified by epoch


@dataclass(frozen=True)
class Arm:
    """One way of training that is compared: a value. Arms differ in these things and in nothing else.

    `general`: none; the pool's rows; or these with their answers permuted, a placebo: what it brings too is no transfer.
    `order` and `general_per_task` (in examples) stand for the settings' own where they are given. `shots`: training rows stand
    in the prompt.
    """

    name: str
    trained: bool = True
    anchored: bool = False
    general: Literal["none", "pool", "permuted"] = "none"
    order: str | None = None
    general_per_task: float | None = None
    shots: bool = False

    @property
    def seeded(self) -> bool:
        """Whether another seed, with its other rows, gives another result."""
        return self.trained or self.shots

    @property
    def mixes(self) -> bool:
        """Whether it trains on general rows."""
        return self.general != "none"


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", trained=False),
        Arm("base_anchor", trained=False, anchored=True),
        Arm("kshot", trained=False, shots=True),
        Arm("sft"),
        Arm("sft_anchor", anchored=True),
        Arm("mix", general="pool"),
        Arm("tell", anchored=True, general="pool"),
        # TELL's own rows, one source after the other: what the shuffle brings.
        Arm("general_then_task", anchored=True, general="pool", order="general_then_task"),
        Arm("task_then_general", anchored=True, general="pool", order="task_then_general"),
        # General rows as a tenth of the stream, which is how replay against forgetting is done.
        Arm("replay_10", anchored=True, general="pool", general_per_task=1 / 9),
        Arm("placebo_permuted", anchored=True, general="permuted"),
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
    if settings.mix.general_per_task == 0 and (mixed := [arm.name for arm in arms if arm.mixes]):
        raise ConfigError(
            f"compare: mix.general_per_task is 0, so {', '.join(mixed)} would have no general data; set it above 0 or leave "
            "these arms out"
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
    return ARMS[
        {(False, False): "sft", (True, False): "sft_anchor", (False, True): "mix", (True, True): "tell"}[anchored, general]
    ]


def stream(rows: Material, tokenizer: encode.Tokenizer, arm: Arm, settings: Settings, repeats: int, seed: int) -> Stream:
    """The token stream of one trial: the same task rows in every arm, with or without anchor and general rows."""
    plain = encode.make_format(tokenizer, None)
    own: list[Tokens] = []
    for task in rows.tasks:
        form = encode.make_format(tokenizer, task.anchor) if arm.anchored else plain
        encode.encode_ahead(task.train, form)
        own += [encode.encode(example, form) for example in task.train]
    count = _general_count(rows, arm, repeats)
    plan = mix.plan(
        len(own), count, repeats=repeats, general_per_task=count / (repeats * len(own)),
        order=_order(settings, arm, repeats * len(own), count), seed=store.seed_for(seed, "mix"),
    )  # fmt: skip
    if arm.general == "permuted":
        return Stream(plan, own, tokens.tokenised(_permuted(rows.general[:count], store.seed_for(seed, "placebo")), plain))
    return Stream(plan, own, tokens.tokenised(rows.general, plain)[:count])


def _general_count(rows: Material, arm: Arm, repeats: int) -> int:
    """General rows in a stream of so many repeats."""
    if not arm.mixes:
        return 0
    if arm.general_per_task is None:
        return rows.general_count(repeats)
    return min(round(arm.general_per_task * repeats * rows.n_task), len(rows.general))


def _permuted(rows: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """The rows with each other's answers: along one cycle through all of them, so that none keeps its own."""
    cycle = np.random.default_rng(seed).permutation(len(rows))
    found = list(rows)
    for place, after in zip(cycle, np.roll(cycle, -1), strict=True):
        row = rows[place]
        found[place] = replace(row, messages=(*row.prompt, replace(row.messages[-1], content=rows[after].answer)))
    return tuple(found)


def planned_tokens(rows: Material, tokenizer: encode.Tokenizer, arms: Sequence[Arm], settings: Settings) -> int:
    """About how many tokens all trials of the arms train on at one seed, from the lengths of a few rows (anchors left out)."""
    plain = encode.make_format(tokenizer, None)
    total = 0.0
    task = [row for each in rows.tasks for row in each.train]
    for part, own in ((task, True), (rows.general, False)):
        length = float(np.mean([len(encode.encode(row, plain)) for row in part[:: max(1, len(part) // 64)]])) if part else 0.0
        for arm in arms:
            for repeats in trials(rows, arm, settings) if arm.trained else ():
                total += length * (repeats * len(part) if own else _general_count(rows, arm, repeats))
    return round(total)


def _order(settings: Settings, arm: Arm, shown: int, general: int) -> str:
    """Task rows alone are shuffled anew in each epoch, as everyone does; in a short mixture stratification avoids clumps."""
    if general == 0:
        return "epoch_stratified"
    if arm.order is not None:
        return arm.order
    if settings.mix.order != "auto":
        return settings.mix.order
    return "epoch_stratified" if shown + general < _STRATIFIED * settings.train.batch_size else "random"


def trials(rows: Material, arm: Arm, settings: Settings) -> tuple[int, ...]:
    """The repeats (epochs) that an arm tries. With few general data or none: up to the most epochs that TELL's steps allow.

    Each trial's learning rate decays fully within its own steps. Raises ConfigError for epochs beyond the cap.
    """
    wanted = None if arm.mixes else settings.compare.sft_epochs
    if (arm.mixes and arm.general_per_task is None) or (settings.mix.general_per_task == 0 and wanted is None):
        return rows.repeats
    shown = rows.n_task * (1 + (arm.general_per_task or 0.0) * arm.mixes)
    cap = max(1, math.floor(rows.step_cap * settings.train.batch_size / shown))
    if wanted is None:
        # At least as many trials as TELL has; a single pass and the cap are always among them.
        return tuple(sorted({int(n) for n in np.geomspace(1, cap, max(3, len(rows.repeats))).round()}))
    if settings.mix.general_per_task > 0 and max(wanted) > cap:
        raise ConfigError(
            f"compare.sft_epochs: {max(wanted)} epochs of {rows.n_task} rows are over TELL's {rows.step_cap} steps; "
            f"use at most {cap}"
        )
    return wanted
