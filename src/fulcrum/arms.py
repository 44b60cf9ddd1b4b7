"""The arms that are compared, by name, and for each the settings it tries and the streams that it trains on. No torch:
previews need them too.

Arms differ in what an `Arm` says and in nothing else: the same task rows, as many trials, the last step's weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fulcrum import choose, encode, metrics, mix, store, tokens
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError, nearest
from fulcrum.material import Material
from fulcrum.mix import Plan
from fulcrum.records import Anchor, BoolArray, Example, Message, Setting, Share, Task, Tokens
from fulcrum.rows import content_key, in_two

UNLABELED = ("unlabeled", "pseudo_self", "pseudo_teacher")
MEMBERS = 3  # adapters that answer unlabelled inputs together

_DRAWN = ("pool", "permuted", "own_answers", "self_made")  # kinds of general rows of which there are as many as TELL's
_STRATIFIED = 200  # steps; shorter mixed streams are stratified by epoch


ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name="base", trained=False),
        Arm(name="base_anchor", trained=False, anchored=True),
        Arm(name="kshot", trained=False, shots=True),
        Arm(name="tfidf", trained=False, words=True),
        Arm(name="sft"),
        Arm(name="sft_anchor", anchored=True),
        # As many passes over the task rows as TELL's: what general rows bring at equal exposures (a diagnostic).
        Arm(name="sft_matched", anchored=True, settings_of="tell"),
        Arm(name="sft_kl", anchored=True, kl=True),
        Arm(name="soup", anchored=True, members=3),
        Arm(name="mix", general="pool"),
        Arm(name="tell", anchored=True, general="pool"),
        # TELL's own rows, one source after the other: what the shuffle brings.
        Arm(name="general_then_task", anchored=True, general="pool", order="general_then_task"),
        Arm(name="placebo_permuted", anchored=True, general="permuted"),
        Arm(name="placebo_own_answers", anchored=True, general="own_answers"),
        Arm(name="selfgen", anchored=True, general="self_made"),
        # The task's inputs that nobody labelled: as texts, or as rows of the task with answers of adapters, or of a teacher.
        Arm(name="unlabeled", anchored=True, general="unlabeled"),
        Arm(name="pseudo_self", anchored=True, general="pseudo_self"),
        Arm(name="pseudo_teacher", anchored=True, general="pseudo_teacher"),
    )
}

# Arms that were built in until they became one line of YAML (docs/recipes/arms.md): what each sets besides TELL's fields.
RECIPES: Mapping[str, str] = {
    "tell_similar": "select: similar",
    "tell_gradient": "select: gradient",
    "tell_diverse": "select: diverse",
    "tell_dropout": "anchor_dropout: 0.1, asked_anchored: false",
    "tell_cooldown": "anchor_cooldown: 0.1, asked_anchored: false",
    "task_then_general": "order: task_then_general",
    "replay_10": "general_per_task: 0.1111",
    "general_only": "task_rows: false",
}


def recipe(name: str) -> str:
    """Return the line of `compare.arms` that describes an arm which is no longer built in."""
    return f"{{name: {name}, anchored: true, general: pool, {RECIPES[name]}}}"


def arm_of(settings: Settings, name: str) -> Arm:
    """Return the arm of this name: the file's own, else the built-in one. Raises ConfigError for unknown names."""
    own = {arm.name: arm for arm in settings.compare.arms if isinstance(arm, Arm)}
    if name in own:
        return own[name]
    if name in ARMS:
        return ARMS[name]
    if name in RECIPES:
        raise ConfigError(f"compare.arms: {name!r} is not built in; write {recipe(name)} instead")
    raise ConfigError(f"compare.arms: no arm {name!r}{nearest(name, {*own, *ARMS})}")


def chosen_arms(settings: Settings) -> list[Arm]:
    """The arms asked for. Raises ConfigError for unknown names and for arms that these settings cannot make different."""
    for arm in settings.compare.arms:
        if isinstance(arm, Arm) and arm.name in ARMS:
            raise ConfigError(f"compare.arms: {arm.name!r} is an arm that is there already; give yours another name")
    arms = [arm_of(settings, arm.name if isinstance(arm, Arm) else arm) for arm in settings.compare.arms]
    for arm in arms:
        if arm.members > 1 and arm.train.get("use_dora", settings.train.use_dora):
            raise ConfigError(
                f"compare.arms: {arm.name}: weight-decomposed adapters (use_dora) cannot be averaged; leave it out"
            )
    odd = [task.name for task in settings.tasks if not set(task.metrics) & set(metrics.LABELS)]
    if odd and any(arm.words for arm in arms):
        raise ConfigError(
            f"compare.arms: tfidf is for answers that are labels, and {odd[0]} has no metric of labels "
            f"({', '.join(metrics.LABELS)}); add one to task.metrics, or leave this arm out"
        )
    if (asking := [arm for arm in arms if arm.general in UNLABELED]) and not any(task.unlabeled for task in settings.tasks):
        raise ConfigError(f"compare.arms: {asking[0].name} needs inputs without answers; give some in task.unlabeled")
    if settings.mix.select != "random" and (own := [arm for arm in arms if arm.general == "own_answers"]):
        raise ConfigError(
            f"compare.arms: {own[0].name} answers rows of the pool as they are drawn, and mix.select: {settings.mix.select} "
            "gives the others chosen ones; leave it out, or set `select:` in single arms"
        )
    if settings.teacher is None and (taught := [arm for arm in arms if arm.general == "pseudo_teacher"]):
        raise ConfigError(f"compare.arms: {taught[0].name} needs somebody to ask; set teacher.endpoint and teacher.model")
    if odd := [name for name in settings.compare.sizes_of if name not in {arm.name for arm in arms}]:
        raise ConfigError(
            f"compare.sizes_of: {odd[0]!r} is not among compare.arms{nearest(odd[0], [arm.name for arm in arms])}"
        )
    for arm in arms:
        _check_source(settings, arm, arms)
    if len(arms) < 2:
        raise ConfigError(f"compare.arms: {arms[0].name} alone has nothing to be compared with; name a second arm")
    if not any(task.anchor for task in settings.tasks):
        named = [arm.name for arm in arms if arm.anchored and arm.anchor is None]
        if named:
            raise ConfigError(
                f"compare.arms: {', '.join(named)} need an anchor and no task has one; set task.anchor or leave them out"
            )
    if settings.mix.per_task == 0 and (mixed := [arm.name for arm in arms if arm.mixes]):
        raise ConfigError(
            f"compare: mix.general_per_task is 0, so {', '.join(mixed)} would have no general data; set it above 0 or leave "
            "these arms out"
        )
    return arms


def _check_source(settings: Settings, arm: Arm, arms: Sequence[Arm]) -> None:
    """Raise ConfigError where the arm whose settings an arm takes is not there, has none, or stands at other sizes."""
    if arm.settings_of is None:
        return
    source = next((other for other in arms if other.name == arm.settings_of), None)
    where = f"compare.arms: {arm.name} takes the settings of {arm.settings_of!r}"
    if source is None:
        raise ConfigError(f"{where}, which is not among the arms; add it, or leave {arm.name} out")
    if not source.trained or source.settings_of:
        raise ConfigError(f"{where}, which chooses none itself")
    if source.kl or source.members > 1:
        raise ConfigError(f"{where}, which tunes what {arm.name} has not")
    if missing := set(sizes_of(settings, arm, 0)) - set(sizes_of(settings, source, 0)):
        raise ConfigError(f"{where}, which does not stand at its sizes ({', '.join(map(str, sorted(missing)))} rows)")


def sizes_of(settings: Settings, arm: Arm, every: int) -> tuple[int, ...]:
    """The numbers of task rows at which an arm is run, ascending; `every` are all there are."""
    return tuple(sorted(settings.compare.sizes_of.get(arm.name) or settings.compare.sizes or (every,)))


def largest_mixture(settings: Settings) -> int | None:
    """The most task rows that an arm with general rows is given; None for all there are."""
    found = [max(sizes_of(settings, arm, 0)) for arm in chosen_arms(settings) if arm.mixes]
    return None if 0 in found else max(found, default=4)


@dataclass(frozen=True)
class Stream:
    """A plan with the tokens of the rows that it orders. `task` and `general` are indexed by the plan's row ids.

    `bare` are the task rows without their anchor: so a share of `dropout` of their showings is, and all of the last part,
    `cooldown`, of the stream.
    """

    plan: Plan
    task: Sequence[Tokens]
    general: Sequence[Tokens]
    bare: Sequence[Tokens] = ()
    dropout: float = 0.0
    cooldown: float = 0.0
    shown: tuple[Sequence[Example], Sequence[Example]] | None = None  # the rows that `task` and `general` are the tokens of

    def step(self, index: int, batch_size: int) -> tuple[list[Tokens], BoolArray]:
        """The examples of one optimizer step in order, and which of them are task rows."""
        start = index * batch_size
        return self._shown(start, min(start + batch_size, len(self.plan)))

    def _shown(self, start: int, stop: int) -> tuple[list[Tokens], BoolArray]:
        is_task, ids = self.plan.slice(start, stop)
        sources = {(True, False): self.task, (True, True): self.bare, (False, False): self.general, (False, True): self.general}
        bare = self.is_bare(start, stop)
        return [sources[bool(own), bool(lacks)][row] for own, lacks, row in zip(is_task, bare, ids, strict=True)], is_task

    def origins(self, index: int, batch_size: int) -> list[str]:
        """Where the rows of one optimizer step come from, in order."""
        is_task, ids = self.plan.slice(index * batch_size, min((index + 1) * batch_size, len(self.plan)))
        pairs = zip(is_task.tolist(), ids.tolist(), strict=True)
        if self.shown is None:
            return [f"{'task' if of_task else 'general'} row {row}" for of_task, row in pairs]
        own, general = self.shown
        return [(own if of_task else general)[row].origin for of_task, row in pairs]

    def is_bare(self, start: int, stop: int) -> BoolArray:
        """Whether a task row at each of these positions lacks its anchor: (stop - start,)."""
        dropped = mix.chances(start, stop, self.plan.seed, "anchor") < self.dropout
        return dropped | (np.arange(start, stop) >= round(len(self.plan) * (1 - self.cooldown)))

    def steps(self, batch_size: int) -> int:
        """Number of optimizer steps; the last may be smaller."""
        return math.ceil(len(self.plan) / batch_size)

    def phases(self, batch_size: int) -> tuple[int, ...]:
        """Steps of each phase that has a learning rate schedule of its own: two where one source comes after the other."""
        steps, first = self.steps(batch_size), 0
        if self.plan.order in ("general_then_task", "task_then_general"):
            ahead = self.plan.general_used if self.plan.order == "general_then_task" else self.plan.task_positions
            first = round(ahead / batch_size)
        return (first, steps - first) if 0 < first < steps else (steps,)

    def share(self, positions: int | None = None) -> Share:
        """Realised task shares in examples, tokens and loss tokens, counted over the first `positions` (none: all)."""
        examples, is_task = self._shown(0, len(self.plan) if positions is None else min(positions, len(self.plan)))
        return mix.share(is_task, np.array([len(e) for e in examples]), np.array([e.n_loss for e in examples]))


def own_arm(settings: Settings) -> Arm:
    """The arm that the settings describe: TELL where there is an anchor and general data, else what is left of it."""
    anchored = any(task.anchor is not None for task in settings.tasks)
    general = settings.mix.per_task > 0
    return ARMS[
        {(False, False): "sft", (True, False): "sft_anchor", (False, True): "mix", (True, True): "tell"}[anchored, general]
    ]


def stream(rows: Material, tokenizer: encode.Tokenizer, arm: Arm, settings: Settings, repeats: int, seed: int) -> Stream:
    """The token stream of one training: the same task rows in every arm, with or without anchor and general rows."""
    plain = encode.make_format(tokenizer, None)
    dropout, cooldown = lacking(arm, settings)
    own: list[Tokens] = []
    bare: list[Tokens] = []
    shown = [example for task in rows.tasks if arm.task_rows for example in task.train]
    for task in rows.tasks if arm.task_rows else ():
        form = encode.make_format(tokenizer, anchor_of(arm, task))
        for wanted, found in ((form, own), (plain, bare if dropout or cooldown else None)):
            if found is not None:
                encode.encode_ahead(task.train, wanted)
                found += [encode.encode(example, wanted) for example in task.train]
    available = general_rows(rows, arm, settings)
    count = min(general_count(rows, arm, repeats), len(available))
    mixed_seed = store.seed_for(seed, "mix")
    if own:
        plan = mix.plan(
            len(own), count, repeats=repeats, general_per_task=count / (repeats * len(own)),
            order=_order(settings, arm, repeats * len(own), count), seed=mixed_seed,
        )  # fmt: skip
    else:
        plan = Plan(0, count, 1, count, "random", mixed_seed)
    general = available[:count]
    if arm.general == "permuted":
        general = _permuted(general, store.seed_for(seed, "placebo"))
    if arm.anchored and arm.general in ("pseudo_self", "pseudo_teacher"):  # these are rows of the task
        forms = {
            row.origin: encode.make_format(tokenizer, anchor_of(arm, task)) for task in rows.tasks for row in task.unlabeled
        }
        answered = [encode.encode(row, forms.get(row.origin, plain)) for row in general]
        return Stream(plan, own, answered, bare, dropout, cooldown, (shown, general))
    return Stream(plan, own, tokens.tokenised(general, plain), bare, dropout, cooldown, (shown, general))


def anchor_of(arm: Arm, task: Task) -> Anchor | None:
    """The anchor that an arm's rows of a task are trained with."""
    if not arm.anchored:
        return None
    return task.anchor if arm.anchor is None else arm.anchor.value


def asked_anchor(arm: Arm, task: Task, settings: Settings) -> Anchor | None:
    """The anchor that a trained arm is asked with: its own, unless it is to do without."""
    asked = settings.eval.anchored if arm.asked_anchored is None else arm.asked_anchored
    return anchor_of(arm, task) if asked or not arm.trained else None


def lacking(arm: Arm, settings: Settings) -> tuple[float, float]:
    """Which share of an arm's showings of task rows lacks the anchor, and of which last part of its stream all do."""
    mixed = settings.mix
    dropout = mixed.anchor_dropout if arm.anchor_dropout is None else arm.anchor_dropout
    cooldown = mixed.anchor_cooldown if arm.anchor_cooldown is None else arm.anchor_cooldown
    return (dropout, cooldown) if arm.anchored else (0.0, 0.0)


def general_rows(rows: Material, arm: Arm, settings: Settings) -> tuple[Example, ...]:
    """The general rows that an arm's streams begin with: the run's own, those of the arm, or those that it chooses by the task
    rows of `rows`."""
    how = selects(arm, settings)
    if arm.general == "unlabeled":
        return _as_texts([row for task in rows.tasks for row in task.unlabeled])
    if (name := own_name(arm, rows)) in rows.own_general or how == "random":
        return rows.own_general.get(name, rows.general)  # of what a model has yet to make, a preview counts the pool's
    task_rows = [row for task in rows.tasks for row in task.train]
    if how == "diverse":
        order = choose.diverse(rows.candidates, rows.seed)
    else:
        order = choose.similar(rows.candidates, task_rows, rows.seed)
    if how == "gradient" and rows.gradients:  # previews have no model: they count the most similar rows instead
        order = order[: _scored(rows, arm)]
        general = np.stack([rows.gradients[probe_key(rows.candidates[k], None)] for k in order])
        pairs = [(row, anchor_of(arm, task)) for task in rows.tasks for row in task.train]
        order = order[choose.by_gradient(general, np.stack([rows.gradients[probe_key(*pair)] for pair in pairs]))]
    return tuple(rows.candidates[k] for k in order[: len(rows.general)])


def own_name(arm: Arm, rows: Material) -> str:
    """By which name `Material.own_general` has an arm's rows; answers of adapters are by the task rows that taught them."""
    if arm.general != "pseudo_self":
        return arm.name
    return f"{arm.name} by {store.fingerprint([row.origin for task in rows.tasks for row in task.train])[:16]}"


def _as_texts(inputs: Sequence[Example]) -> tuple[Example, ...]:
    """Inputs as rows of language modelling: what stands first is asked, the rest is the answer."""
    cut = [(row, *in_two(row.question)) for row in inputs]
    return tuple(
        replace(row, messages=(Message("user", first), Message("assistant", rest)))
        for row, first, rest in cut
        if first and rest
    )


def selects(arm: Arm, settings: Settings) -> str:
    """How an arm chooses its general rows."""
    chooses = arm.general in ("pool", "permuted") and not arm.pool
    return (arm.select or settings.mix.select) if chooses else "random"


def by_task_rows(arm: Arm, settings: Settings) -> bool:
    """Whether an arm's general rows depend on the task rows that it is trained on."""
    return selects(arm, settings) != "random" or arm.general == "pseudo_self"


def choose_from(arms: Sequence[Arm], settings: Settings) -> int:
    """How many rows of the pool the arms choose from; 0 where none chooses."""
    return settings.mix.choose_from if any(selects(arm, settings) != "random" for arm in arms) else 0


def probe_key(row: Example, anchor: Anchor | None) -> str:
    """By which `Material.gradients` has a row's: what the model sees of it."""
    return f"{content_key(row)} {anchor.sha256 if anchor else 'plain'}"


def to_probe(rows: Material, arm: Arm, settings: Settings) -> dict[str, tuple[Example, Anchor | None]]:
    """Rows whose gradients decide which general rows an arm trains on, with their anchors, by key: task rows, and the
    candidates most similar to them."""
    if selects(arm, settings) != "gradient":
        return {}
    pairs = [(row, anchor_of(arm, task)) for task in rows.tasks for row in task.train]
    order = choose.similar(rows.candidates, [row for row, _ in pairs], rows.seed)[: _scored(rows, arm)]
    found: list[tuple[Example, Anchor | None]] = [*pairs, *((rows.candidates[k], None) for k in order)]
    return {probe_key(row, anchor): (row, anchor) for row, anchor in found}


def _scored(rows: Material, arm: Arm) -> int:
    """How many of the most similar candidates an arm compares by gradient."""
    return choose.SCORED * (arm.general_rows or len(rows.general))


def general_count(rows: Material, arm: Arm, repeats: int) -> int:
    """General rows that a stream of so many repeats asks for."""
    if not arm.mixes:
        return 0
    if arm.general_rows is not None:
        return round(arm.general_rows * rows.kept)  # a fold tries what the whole will be, smaller
    if arm.general_per_task is None:
        return rows.general_count(repeats)
    return round(arm.general_per_task * repeats * rows.n_task)


def _permuted(rows: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """The rows with each other's answers: along one cycle through all of them, so that none keeps its own."""
    cycle = np.random.default_rng(seed).permutation(len(rows))
    found = list(rows)
    for place, after in zip(cycle, np.roll(cycle, -1), strict=True):
        row = rows[place]
        found[place] = replace(row, messages=(*row.prompt, replace(row.messages[-1], content=rows[after].answer)))
    return tuple(found)


def planned_tokens(rows: Material, tokenizer: encode.Tokenizer, arms: Sequence[Arm], settings: Settings) -> int:
    """About how many tokens one training of every setting of the arms takes, from the lengths of a few rows."""
    plain = encode.make_format(tokenizer, None)
    total = 0.0
    task = [row for each in rows.tasks for row in each.train]
    for part, own in ((task, True), (rows.general, False)):
        length = float(np.mean([len(encode.encode(row, plain)) for row in part[:: max(1, len(part) // 64)]])) if part else 0.0
        for arm in arms:
            for setting in trials(rows, arm, settings) if arm.trained else ():
                shown = setting.repeats * len(part) * arm.task_rows if own else general_count(rows, arm, setting.repeats)
                total += length * arm.members * shown
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


def trials(rows: Material, arm: Arm, settings: Settings) -> tuple[Setting, ...]:
    """The settings that an arm tries: its repeats (epochs), times what `compare` gives of learning rates and weight decays.

    With few general data or none: up to the most epochs that TELL's steps allow. Each training's learning rate decays fully
    within its own steps. What else an arm tunes (the weight of KL, the adapter's scale) takes the place of some epochs, so that
    all arms have as many trials. For an arm that takes another's settings: what that one tries. Raises ConfigError for epochs
    beyond the cap.
    """
    if arm.settings_of is not None:
        return trials(rows, arm_of(settings, arm.settings_of), settings)
    rates, decays = settings.compare.learning_rates or (None,), settings.compare.weight_decays or (None,)
    halves = [(0.0, 1.0)]  # weight of KL, scale of the adapter
    if arm.kl:
        halves = [(0.1, 1.0), (1.0, 1.0)]
    elif arm.members > 1:
        halves = [(0.0, 1.0), (0.0, 0.5)]
    return tuple(
        Setting(repeats, rate, decay, kl=kl, scale=scale)
        for repeats in _repeats(rows, arm, settings, len(halves)) for kl, scale in halves for rate in rates for decay in decays
    )  # fmt: skip


def _extra_trials(settings: Settings) -> int:
    """Settings more that arms without general data try: all that the others' side tries counts as trials.

    To score so many rows for each that is trained on costs about as many trainings; adapters that answer inputs are trained.
    """
    arms = [arm_of(settings, arm.name if isinstance(arm, Arm) else arm) for arm in settings.compare.arms]
    spent = [choose.SCORED * (selects(arm, settings) == "gradient") + MEMBERS * (arm.general == "pseudo_self") for arm in arms]
    return settings.compare.extra_trials + max(spent)


def _fed(rows: Material, arm: Arm, repeats: int) -> bool:
    """Whether there are general rows enough for a mixture with so many repeats."""
    return general_count(rows, arm, repeats) <= len(rows.general)


def _repeats(rows: Material, arm: Arm, settings: Settings, halves: int) -> tuple[int, ...]:
    wanted = None if arm.mixes else settings.compare.sft_epochs
    batch = arm.train.get("batch_size", settings.train.batch_size)
    if batch < settings.train.batch_size and arm.mixes and arm.general_per_task is None:
        raise ConfigError(
            f"compare.arms: {arm.name}: batches of {batch} rows would take more steps than TELL's of "
            f"{settings.train.batch_size}; use larger ones"
        )
    if arm.repeats is not None:
        every = arm.repeats * rows.n_task * arm.task_rows + general_count(rows, arm, arm.repeats)
        if every * arm.members > rows.step_cap * batch or (arm.general in _DRAWN and not _fed(rows, arm, arm.repeats)):
            raise ConfigError(
                f"compare.arms: {arm.name}: {arm.repeats} repeats make {every:,} rows in all, the run's longest mixture has "
                f"{rows.step_cap * batch:,}, {len(rows.general):,} of them general; lower them, or raise mix.general_per_task"
            )
        return (arm.repeats,)
    if arm.general_rows is not None:
        left = rows.step_cap * batch - arm.general_rows
        fitting = tuple(repeats for repeats in rows.repeats if repeats * rows.n_task <= left)
        if not fitting or arm.general_rows > len(rows.general):
            raise ConfigError(
                f"compare.arms: {arm.name}: {arm.general_rows:,} general rows and {rows.n_task} task rows are more than the "
                f"longest mixture of the run ({rows.step_cap:,} steps, {len(rows.general):,} general rows); lower general_rows "
                "or raise mix.general_per_task"
            )
        return fitting
    if arm.mixes and arm.general_per_task is None:
        return rows.repeats
    if arm.general in _DRAWN and not _fed(rows, arm, 1):
        raise ConfigError(
            f"compare.arms: {arm.name}: {arm.general_per_task:g} general rows for each task row are more than the "
            f"{len(rows.general):,} drawn for the longest mixture; lower general_per_task, or raise mix.general_per_task"
        )
    if settings.mix.per_task == 0:  # there is no TELL to be fair to
        return tuple(sorted(set(wanted or rows.repeats)))
    shown = rows.n_task * (1 + (arm.general_per_task or 0.0) * arm.mixes) * arm.members
    cap = max(1, math.floor(rows.step_cap * batch / shown))
    if arm.general in _DRAWN:  # none is shown twice, and a ratio that is asked for is kept
        cap = max((epochs for epochs in range(1, cap + 1) if _fed(rows, arm, epochs)), default=1)
    if wanted is None:
        # At least as many trials as TELL has; a single pass and the cap are always among them.
        count = math.ceil((max(3, len(rows.repeats)) + _extra_trials(settings)) / halves)
        return tuple(sorted({int(n) for n in np.geomspace(1, cap, count + (halves > 1)).round()}))[-count:]
    if arm.members == 1 and max(wanted) > cap:
        raise ConfigError(
            f"compare.sft_epochs: {max(wanted)} epochs of {rows.n_task} rows are over TELL's {rows.step_cap} steps; "
            f"use at most {cap}"
        )
    return tuple(sorted({min(epochs, cap) for epochs in wanted}))
