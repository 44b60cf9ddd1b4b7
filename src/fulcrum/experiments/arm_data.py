"""Derive what an arm does with its rows: anchors, general rows, trials, token streams.

`resolve` returns all of it as an `ArmPlan`, which is what training, scoring and counting take. No
torch is loaded here, so that previews are quick.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fulcrum.config.arms import (
    MEMBERS,
    anchor_schedule,
    arm_of,
    inference_anchor,
    name_of,
    selects,
    training_anchor,
)
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Example, Hyperparameters, IntArray, Message, Tokens
from fulcrum.data import encode, mix, selection, token_stream
from fulcrum.data.formats import content_key, split_in_two
from fulcrum.data.mix import Plan
from fulcrum.data.run_data import RunData
from fulcrum.data.token_stream import Stream

_STRATIFIED = 200  # steps; shorter mixed streams are stratified by epoch


@dataclass(frozen=True)
class ArmPlan:
    """One arm on the rows of one size and seed, or of a fold of these. Make it with `resolve`.

    What takes time is computed when it is first needed, and kept.
    """

    arm: Arm
    rows: RunData
    settings: Settings
    train_anchors: Mapping[str, Anchor | None]  # by task: what its rows are trained with
    ask_anchors: Mapping[str, Anchor | None]  # by task: what the arm is asked with
    anchor_dropout: float  # share of the showings of task rows that lack the anchor
    anchor_cooldown: float  # last part of the stream, whose task rows all lack it
    selection: str  # how general rows are chosen: random, similar, gradient or diverse

    @property
    def members(self) -> int:
        """Return the number of adapters that are trained and averaged."""
        return self.arm.members if self.arm.trained else 0

    @property
    def task_rows(self) -> tuple[Example, ...]:
        """Return the task rows that it trains on, of all tasks."""
        return _train_rows(self.rows) if self.arm.task_rows else ()

    @cached_property
    def general_rows(self) -> tuple[Example, ...]:
        """Return the general rows that its streams take from, first ones first.

        They are the run's, the arm's own, or chosen among the candidates.
        """
        if self.arm.general == "unlabeled":
            inputs: list[Example] = []
            for task in self.rows.tasks:
                inputs += task.unlabeled
            return _as_texts(inputs)
        own = self.rows.own_general
        if self.general_name in own or self.selection == "random":
            # A preview counts the pool's, if rows are yet to be made.
            return own.get(self.general_name, self.rows.general)
        candidates = self.rows.candidates
        return tuple(candidates[k] for k in _ranked(self)[: len(self.rows.general)])

    @property
    def general_name(self) -> str:
        """Return the key of its rows in `RunData.own_general`.

        If adapters answer its rows, the key names the task rows that these were trained on.
        """
        if not self.arm.asks_adapters:
            return self.arm.name
        origins = [row.origin for row in _train_rows(self.rows)]
        return f"{self.arm.name} by {store.fingerprint(origins)[:16]}"

    def general_count(self, repeats: int) -> int:
        """Return how many general rows a stream with so many repeats needs."""
        if not self.arm.uses_general_data:
            return 0
        if self.arm.general_rows is not None:
            # A fold has the same share of general rows as all task rows will have.
            return round(self.arm.general_rows * self.rows.kept)
        if self.arm.general_per_task is None:
            return self.rows.general_count(repeats)
        return round(self.arm.general_per_task * repeats * self.rows.n_task)

    @cached_property
    def trials(self) -> tuple[Hyperparameters, ...]:
        """Return the hyperparameters it tries: repeats (epochs) x learning rates x weight decays.

        Arms with few general rows or none try up to the most epochs that TELL's steps allow. Each
        training's learning rate decays fully within its own steps. If an arm tunes anything else
        (the weight of KL, the adapter's scale), it tries fewer epochs, so that all arms have as
        many trials. An arm that takes another's hyperparameters tries what that one tries. Raises
        ConfigError for epochs beyond the cap.
        """
        if self.arm.hyperparameters_of is not None:
            source = arm_of(self.settings, self.arm.hyperparameters_of)
            return resolve(source, self.rows, self.settings).trials
        compare = self.settings.compare
        variants = [(0.0, 1.0)]  # weight of KL, scale of the adapter
        if self.arm.kl:
            variants = [(0.1, 1.0), (1.0, 1.0)]
        elif self.arm.members > 1:
            variants = [(0.0, 1.0), (0.0, 0.5)]
        rates = compare.learning_rates or (None,)
        decays = compare.weight_decays or (None,)
        trials = []
        for repeats in _repeats(self, len(variants)):
            for (kl, scale), rate, decay in itertools.product(variants, rates, decays):
                trials.append(Hyperparameters(repeats, rate, decay, kl=kl, scale=scale))
        return tuple(trials)

    def order(self, repeats: int, general: int) -> str:
        """Return the order of a stream; short ones are stratified by epoch, to avoid clumps."""
        if general == 0:
            return "epoch_stratified"  # task rows alone are shuffled anew in each epoch
        order = self.arm.order or self.settings.mix.order
        if order != "auto":
            return order
        positions = repeats * len(self.task_rows) + general
        is_short = positions < _STRATIFIED * self.settings.train.batch_size
        return "epoch_stratified" if is_short else "random"

    def stream(self, tokenizer: encode.Tokenizer, repeats: int, seed: int) -> Stream:
        """Return the token stream of one training.

        Every arm has the same task rows, with or without anchor and general rows.
        """
        plain = encode.make_format(tokenizer, None)
        has_bare = self.anchor_dropout > 0 or self.anchor_cooldown > 0
        task: list[Tokens] = []
        bare: list[Tokens] = []
        for own in self.rows.tasks if self.arm.task_rows else ():
            form = encode.make_format(tokenizer, self.train_anchors[own.name])
            task += _encode_all(own.train, form)
            if has_bare:
                bare += _encode_all(own.train, plain)
        general = self.general_rows[: self.general_count(repeats)]
        if self.arm.general == "permuted":
            general = _permuted(general, store.seed_for(seed, "placebo"))
        return Stream(
            self._plan(repeats, len(general), store.seed_for(seed, "mix")),
            task,
            self._general_tokens(general, tokenizer),
            bare,
            self.anchor_dropout,
            self.anchor_cooldown,
            (self.task_rows, general),
        )

    def _plan(self, repeats: int, general: int, seed: int) -> Plan:
        number = len(self.task_rows)
        if number == 0:
            return Plan(0, general, 1, general, "random", seed)
        return mix.plan(
            number,
            general,
            repeats=repeats,
            general_per_task=general / (repeats * number),
            order=self.order(repeats, general),
            seed=seed,
        )

    def _general_tokens(
        self, general: tuple[Example, ...], tokenizer: encode.Tokenizer
    ) -> Sequence[Tokens]:
        plain = encode.make_format(tokenizer, None)
        labels_task_inputs = self.arm.asks_adapters or self.arm.asks_teacher
        if not (self.arm.anchored and labels_task_inputs):
            return token_stream.tokenised(general, plain)
        # These are rows of the task, and have its anchor.
        forms: dict[str, encode.PromptFormat] = {}
        for task in self.rows.tasks:
            form = encode.make_format(tokenizer, self.train_anchors[task.name])
            for row in task.unlabeled:
                forms[row.origin] = form
        return [encode.encode(row, forms.get(row.origin, plain)) for row in general]

    def folds(self, count: int, seed: int) -> "list[ArmPlan]":
        """Return the plan on each fold of the task rows (`RunData.folds`)."""
        return [replace(self, rows=rows) for rows in self.rows.folds(count, seed)]


def resolve(arm: Arm, rows: RunData, settings: Settings) -> ArmPlan:
    """Return what an arm does with these rows, under these settings."""
    dropout, cooldown = anchor_schedule(arm, settings)
    return ArmPlan(
        arm=arm,
        rows=rows,
        settings=settings,
        train_anchors={task.name: training_anchor(arm, task) for task in rows.tasks},
        ask_anchors={task.name: inference_anchor(arm, task, settings) for task in rows.tasks},
        anchor_dropout=dropout,
        anchor_cooldown=cooldown,
        selection=selects(arm, settings),
    )


def _train_rows(rows: RunData) -> tuple[Example, ...]:
    return tuple(row for task in rows.tasks for row in task.train)


def _encode_all(examples: Sequence[Example], form: encode.PromptFormat) -> list[Tokens]:
    encode.encode_ahead(examples, form)
    return [encode.encode(example, form) for example in examples]


# General rows.


def _as_texts(inputs: Sequence[Example]) -> tuple[Example, ...]:
    """Return inputs as rows of language modelling: first part the prompt, the rest the answer."""
    texts = []
    for row in inputs:
        first, rest = split_in_two(row.question)
        if first and rest:
            messages = (Message("user", first), Message("assistant", rest))
            texts.append(replace(row, messages=messages))
    return tuple(texts)


def _permuted(rows: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """Return the rows with their answers shifted along one random cycle: none keeps its own."""
    cycle = np.random.default_rng(seed).permutation(len(rows))
    permuted = list(rows)
    for place, after in zip(cycle, np.roll(cycle, -1), strict=True):
        row = rows[place]
        answer = replace(row.messages[-1], content=rows[after].answer)
        permuted[place] = replace(row, messages=(*row.prompt, answer))
    return tuple(permuted)


def _ranked(plan: ArmPlan) -> IntArray:
    """Return the candidates in the order in which the arm takes them: indices, best first."""
    rows = plan.rows
    if plan.selection == "diverse":
        return selection.diverse(rows.candidates, rows.seed)
    order = selection.similar(rows.candidates, list(_train_rows(rows)), rows.seed)
    # Previews have no model: they count the most similar rows.
    if plan.selection == "similar" or not rows.gradients:
        return order
    order = order[: _compared(plan)]
    general = [rows.gradients[gradient_key(rows.candidates[k], None)] for k in order]
    task = [rows.gradients[gradient_key(row, anchor)] for row, anchor in _anchored_rows(plan)]
    return order[selection.by_gradient(np.stack(general), np.stack(task))]


def _anchored_rows(plan: ArmPlan) -> list[tuple[Example, Anchor | None]]:
    pairs = []
    for task in plan.rows.tasks:
        anchor = plan.train_anchors[task.name]
        pairs += [(row, anchor) for row in task.train]
    return pairs


def _compared(plan: ArmPlan) -> int:
    """Return how many of the most similar candidates are compared by gradient."""
    return selection.SCORED * (plan.arm.general_rows or len(plan.rows.general))


def gradient_key(row: Example, anchor: Anchor | None) -> str:
    """Return the key of a row in `RunData.gradients`: what the model sees of it."""
    return f"{content_key(row)} {anchor.sha256 if anchor else 'plain'}"


def rows_to_probe(plan: ArmPlan) -> dict[str, tuple[Example, Anchor | None]]:
    """Return the rows whose gradients decide, with their anchors, by `gradient_key`.

    They are the task rows, and the candidates most similar to them; empty if the arm does not
    choose by gradients.
    """
    if plan.selection != "gradient":
        return {}
    rows = plan.rows
    pairs = _anchored_rows(plan)
    order = selection.similar(rows.candidates, [row for row, _ in pairs], rows.seed)
    pairs += [(rows.candidates[k], None) for k in order[: _compared(plan)]]
    return {gradient_key(row, anchor): (row, anchor) for row, anchor in pairs}


# Trials.


def planned_tokens(plan: ArmPlan, tokenizer: encode.Tokenizer) -> int:
    """Return about how many tokens the trials train on, from the lengths of a few rows."""
    if not plan.arm.trained:
        return 0
    plain = encode.make_format(tokenizer, None)
    task = _mean_length(plan.task_rows, plain)
    general = _mean_length(plan.rows.general, plain)
    total = 0.0
    for trial in plan.trials:
        shown = task * trial.repeats * len(plan.task_rows)
        total += plan.members * (shown + general * plan.general_count(trial.repeats))
    return round(total)


def _mean_length(rows: Sequence[Example], form: encode.PromptFormat) -> float:
    if not rows:
        return 0.0
    sample = rows[:: max(1, len(rows) // 64)]
    return float(np.mean([len(encode.encode(row, form)) for row in sample]))


def _extra_trials(settings: Settings) -> int:
    """Return how many more trials the arms without general data get, for what the others spent.

    Selection by gradient scores `selection.SCORED` rows for each that is chosen, which costs about
    as many trainings. Adapters that answer inputs are trained, too.
    """
    spent = []
    for named in settings.compare.arms:
        arm = arm_of(settings, name_of(named))
        by_gradient = selection.SCORED if selects(arm, settings) == "gradient" else 0
        spent.append(by_gradient + (MEMBERS if arm.asks_adapters else 0))
    return settings.compare.extra_trials + max(spent)


def _is_fed(plan: ArmPlan, repeats: int) -> bool:
    """Return whether there are enough general rows for a mixture with so many repeats."""
    return not plan.arm.is_capped_by_pool or plan.general_count(repeats) <= len(plan.rows.general)


def _repeats(plan: ArmPlan, variants: int) -> tuple[int, ...]:
    """Return the numbers of repeats to try, each with so many `variants` of what else is tuned."""
    arm, rows, settings = plan.arm, plan.rows, plan.settings
    batch = arm.train.get("batch_size", settings.train.batch_size)
    has_own_ratio = not arm.uses_general_data or arm.general_per_task is not None
    if batch < settings.train.batch_size and not has_own_ratio:
        raise ConfigError(
            f"compare.arms: {arm.name}: batches of {batch} rows would take more steps than TELL's "
            f"of {settings.train.batch_size}; use larger ones"
        )
    if arm.repeats is not None:
        return _fixed_repeats(plan, arm.repeats, batch)
    if arm.general_rows is not None:
        return _repeats_next_to(plan, arm.general_rows, batch)
    if not has_own_ratio:
        return rows.repeats
    if not _is_fed(plan, 1):
        raise ConfigError(
            f"compare.arms: {arm.name}: {arm.general_per_task:g} general rows for each task row "
            f"are more than the {len(rows.general):,} drawn for the longest mixture; lower "
            "general_per_task, or raise mix.general_per_task"
        )
    return _epochs(plan, variants, batch)


def _fixed_repeats(plan: ArmPlan, repeats: int, batch: int) -> tuple[int, ...]:
    """Return the arm's own number of repeats.

    Raises ConfigError if the run's longest mixture is shorter.
    """
    rows = plan.rows
    every = repeats * len(plan.task_rows) + plan.general_count(repeats)
    if every * plan.arm.members > rows.step_cap * batch or not _is_fed(plan, repeats):
        raise ConfigError(
            f"compare.arms: {plan.arm.name}: {repeats} repeats make {every:,} rows in all, the "
            f"run's longest mixture has {rows.step_cap * batch:,}, {len(rows.general):,} of them "
            "general; lower them, or raise mix.general_per_task"
        )
    return (repeats,)


def _repeats_next_to(plan: ArmPlan, general: int, batch: int) -> tuple[int, ...]:
    """Return the repeats that fit into TELL's steps next to so many general rows.

    Raises ConfigError if none does.
    """
    rows = plan.rows
    room = rows.step_cap * batch - general  # for task rows
    fitting = tuple(repeats for repeats in rows.repeats if repeats * rows.n_task <= room)
    if not fitting or general > len(rows.general):
        raise ConfigError(
            f"compare.arms: {plan.arm.name}: {general:,} general rows and {rows.n_task} task rows "
            f"are more than the longest mixture of the run ({rows.step_cap:,} steps, "
            f"{len(rows.general):,} general rows); lower general_rows or raise "
            "mix.general_per_task"
        )
    return fitting


def _epochs(plan: ArmPlan, variants: int, batch: int) -> tuple[int, ...]:
    """Return the epochs to try within TELL's steps.

    They are those that the settings list, else from 1 to the most, evenly in the log. Raises
    ConfigError if a listed number is above the most.
    """
    arm, rows, settings = plan.arm, plan.rows, plan.settings
    wanted = None if arm.uses_general_data else settings.compare.sft_epochs
    if settings.mix.per_task == 0:  # there is no TELL to be fair to
        return tuple(sorted(set(wanted or rows.repeats)))
    ratio = arm.general_per_task or 0.0
    cap = max(1, math.floor(rows.step_cap * batch / (rows.n_task * (1 + ratio) * arm.members)))
    if arm.is_capped_by_pool:  # no general row is shown twice, and the arm's ratio is kept
        enough = [epochs for epochs in range(1, cap + 1) if _is_fed(plan, epochs)]
        cap = max(enough, default=1)
    if wanted is None:
        # At least as many trials as TELL has; a single pass and the cap are always among them.
        count = math.ceil((max(3, len(rows.repeats)) + _extra_trials(settings)) / variants)
        spaced = np.geomspace(1, cap, count + (variants > 1)).round()
        return tuple(sorted({int(number) for number in spaced}))[-count:]
    if arm.members == 1 and max(wanted) > cap:
        raise ConfigError(
            f"compare.sft_epochs: {max(wanted)} epochs of {rows.n_task} rows are over TELL's "
            f"{rows.step_cap} steps; use at most {cap}"
        )
    return tuple(sorted({min(epochs, cap) for epochs in wanted}))
