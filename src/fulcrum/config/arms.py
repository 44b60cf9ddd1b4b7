"""The registry of arms: the built-in ones with their attributes, and which ones a file asks for.

Arms differ in what an `Arm` says and in nothing else: they get the same task rows and as many
trials, and keep the last step's weights. What follows from an arm once its rows are known (general
rows, trials, streams) is in `experiments.arm_data`.
"""

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, nearest
from fulcrum.core.types import Anchor, Task
from fulcrum.stats import metrics

MEMBERS = 3  # adapters that answer unlabelled inputs together


class BuiltInArm(Arm):
    """An arm that is built in, with what other parts have to know of it."""

    colour: str = Field(
        "", exclude=True, description="of its marks in plots; none: the colour of unnamed arms"
    )
    advice: str = Field(
        "", exclude=True, description="what to do if TELL does not beat this reference"
    )
    use_rank: int | None = Field(
        None,
        exclude=True,
        description="place in the order in which adapters of a comparison are used by default",
    )


# In the order in which TELL is compared with them, the most informative first. The colours are
# those of Okabe & Ito 2008, "Color Universal Design", which colour-blind people can tell apart.
_BUILT_IN = (
    BuiltInArm(
        name="sft_anchor",
        anchored=True,
        colour="#d55e00",
        advice="Use SFT with the anchor",
        use_rank=2,
    ),
    BuiltInArm(
        name="sft",
        colour="#e69f00",
        advice="Use SFT",
        use_rank=3,
    ),
    BuiltInArm(
        name="sft_kl",
        anchored=True,
        kl=True,
        advice="Use SFT with the anchor, held near the base model",
    ),
    BuiltInArm(
        name="soup",
        anchored=True,
        members=3,
        advice="Use the average of several SFT adapters",
    ),
    BuiltInArm(
        name="kshot",
        trained=False,
        few_shot=True,
        advice="Use the base model with examples in the prompt, untrained",
    ),
    BuiltInArm(
        name="tfidf",
        trained=False,
        tfidf=True,
        advice="Use TF-IDF with logistic regression",
    ),
    BuiltInArm(
        name="base_anchor",
        trained=False,
        anchored=True,
        colour="#999999",
        advice="Use the base model with the anchor, untrained",
    ),
    BuiltInArm(
        name="base",
        trained=False,
        colour="#5f5f5f",
        advice="Use the base model untrained",
    ),
    # As many passes over the task rows as TELL: what general rows bring at equal exposures (a
    # diagnostic).
    BuiltInArm(name="sft_matched", anchored=True, hyperparameters_of="tell", use_rank=4),
    BuiltInArm(name="mix", general="pool", colour="#56b4e9", use_rank=1),
    BuiltInArm(name="tell", anchored=True, general="pool", colour="#0072b2", use_rank=0),
    # TELL's own rows, one source after the other: what shuffling brings.
    BuiltInArm(
        name="general_then_task",
        anchored=True,
        general="pool",
        order="general_then_task",
    ),
    BuiltInArm(name="placebo_permuted", anchored=True, general="permuted"),
    BuiltInArm(name="placebo_own_answers", anchored=True, general="own_answers"),
    BuiltInArm(name="selfgen", anchored=True, general="self_made"),
    # Inputs of the task that nobody labelled: as texts, or as task rows that adapters or a teacher
    # answered.
    BuiltInArm(name="unlabeled", anchored=True, general="unlabeled"),
    BuiltInArm(name="pseudo_self", anchored=True, general="pseudo_self"),
    BuiltInArm(name="pseudo_teacher", anchored=True, general="pseudo_teacher"),
)
ARMS: Mapping[str, BuiltInArm] = {arm.name: arm for arm in _BUILT_IN}

# Arms that were built in until they became one line of YAML (docs/recipes/arms.md): what each sets
# in addition to TELL's fields.
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


def by_use() -> list[str]:
    """Return the names of the built-in arms, the one that is used first in front."""

    def rank(name: str) -> float:
        own = ARMS[name].use_rank
        return math.inf if own is None else own

    return sorted(ARMS, key=rank)


def name_of(arm: str | Arm) -> str:
    """Return the name of an arm as `compare.arms` holds it."""
    return arm if isinstance(arm, str) else arm.name


def arm_of(settings: Settings, name: str) -> Arm:
    """Return the arm of this name: the file's own, else the built-in one.

    Raises ConfigError for unknown names.
    """
    own = {arm.name: arm for arm in settings.compare.arms if isinstance(arm, Arm)}
    if name in own:
        return own[name]
    if name in ARMS:
        return ARMS[name]
    if name in RECIPES:
        raise ConfigError(f"compare.arms: {name!r} is not built in; write {recipe(name)} instead")
    raise ConfigError(f"compare.arms: no arm {name!r}{nearest(name, {*own, *ARMS})}")


def own_arm(settings: Settings) -> Arm:
    """Return the built-in arm these settings amount to: sft, sft_anchor, mix or tell."""
    anchored = any(task.anchor is not None for task in settings.tasks)
    if settings.mix.per_task > 0:
        return ARMS["tell" if anchored else "mix"]
    return ARMS["sft_anchor" if anchored else "sft"]


def plain_sft(arm: Arm) -> Arm:
    """Return SFT, with the anchor if `arm` carries one: what an arm is without its general rows."""
    return ARMS["sft_anchor" if arm.anchored else "sft"]


def untrained(arm: Arm) -> Arm:
    """Return the base model, with the anchor if `arm` carries one."""
    return ARMS["base_anchor" if arm.anchored else "base"]


def chosen_arms(settings: Settings) -> list[Arm]:
    """Return the arms asked for.

    Raises ConfigError for unknown names, and for arms that cannot run with these settings or would
    not differ.
    """
    for arm in settings.compare.arms:
        if isinstance(arm, Arm) and arm.name in ARMS:
            raise ConfigError(
                f"compare.arms: {arm.name!r} is an arm that is there already; give yours another "
                "name"
            )
    arms = [arm_of(settings, name_of(arm)) for arm in settings.compare.arms]
    _check_training(settings, arms)
    _check_general_rows(settings, arms)
    names = [arm.name for arm in arms]
    for name in settings.compare.sizes_of:
        if name not in names:
            raise ConfigError(
                f"compare.sizes_of: {name!r} is not among compare.arms{nearest(name, names)}"
            )
    for arm in arms:
        _check_source(settings, arm, arms)
    if len(arms) < 2:
        raise ConfigError(
            f"compare.arms: {names[0]} alone has nothing to be compared with; name a second arm"
        )
    _check_anchors(settings, arms)
    _check_ratio(settings, arms)
    return arms


def sizes_of(settings: Settings, arm: Arm, every: int) -> tuple[int, ...]:
    """Return the numbers of task rows that an arm is run with, ascending; `every` means all."""
    sizes = settings.compare.sizes_of.get(arm.name) or settings.compare.sizes or (every,)
    return tuple(sorted(sizes))


def largest_mixture(settings: Settings) -> int | None:
    """Return the most task rows that an arm with general rows is given; None means all."""
    largest = []
    for arm in chosen_arms(settings):
        if arm.uses_general_data:
            largest.append(max(sizes_of(settings, arm, 0)))
    return None if 0 in largest else max(largest, default=4)


def training_anchor(arm: Arm, task: Task) -> Anchor | None:
    """Return the anchor that an arm's rows of a task are trained with."""
    if not arm.anchored:
        return None
    return task.anchor if arm.anchor is None else arm.anchor.value


def inference_anchor(arm: Arm, task: Task, settings: Settings) -> Anchor | None:
    """Return the anchor that an arm is asked with: its own, unless it was trained to do without."""
    asked = settings.eval.anchored if arm.asked_anchored is None else arm.asked_anchored
    if arm.trained and not asked:
        return None
    return training_anchor(arm, task)


def anchor_schedule(arm: Arm, settings: Settings) -> tuple[float, float]:
    """Return (anchor_dropout, anchor_cooldown) for this arm."""
    if not arm.anchored:
        return 0.0, 0.0
    dropout = settings.mix.anchor_dropout if arm.anchor_dropout is None else arm.anchor_dropout
    cooldown = settings.mix.anchor_cooldown if arm.anchor_cooldown is None else arm.anchor_cooldown
    return dropout, cooldown


def selects(arm: Arm, settings: Settings) -> str:
    """Return how an arm chooses its general rows."""
    if not arm.can_select:
        return "random"
    return arm.select or settings.mix.select


def by_task_rows(arm: Arm, settings: Settings) -> bool:
    """Return whether an arm's general rows depend on the task rows that it is trained on."""
    return selects(arm, settings) != "random" or arm.asks_adapters


def choose_from(arms: Sequence[Arm], settings: Settings) -> int:
    """Return how many rows of the pool the arms choose from; 0 if none chooses."""
    if all(selects(arm, settings) == "random" for arm in arms):
        return 0
    return settings.mix.choose_from


def _check_training(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError for adapters that cannot be averaged, and for tfidf without labels."""
    for arm in arms:
        if arm.members > 1 and arm.train.get("use_dora", settings.train.use_dora):
            raise ConfigError(
                f"compare.arms: {arm.name}: weight-decomposed adapters (use_dora) cannot be "
                "averaged; leave it out"
            )
    if not any(arm.tfidf for arm in arms):
        return
    for task in settings.tasks:
        if set(task.metrics).isdisjoint(metrics.LABELS):
            raise ConfigError(
                f"compare.arms: tfidf is for answers that are labels, and {task.name} has no "
                f"metric of labels ({', '.join(metrics.LABELS)}); add one to task.metrics, or "
                "leave this arm out"
            )


def _check_general_rows(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError for arms whose general rows these settings do not provide."""
    has_inputs = any(task.unlabeled for task in settings.tasks)
    for arm in arms:
        if arm.uses_unlabeled and not has_inputs:
            raise ConfigError(
                f"compare.arms: {arm.name} needs inputs without answers; give some in "
                "task.unlabeled"
            )
    for arm in arms:
        if arm.general == "own_answers" and settings.mix.select != "random":
            raise ConfigError(
                f"compare.arms: {arm.name} answers rows of the pool as they are drawn, and "
                f"mix.select: {settings.mix.select} gives the others chosen ones; leave it out, "
                "or set `select:` in single arms"
            )
    for arm in arms:
        if arm.asks_teacher and settings.teacher is None:
            raise ConfigError(
                f"compare.arms: {arm.name} needs somebody to ask; set teacher.endpoint and "
                "teacher.model"
            )


def _check_anchors(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError for arms that would carry an anchor if there was one."""
    named = [arm.name for arm in arms if arm.anchored and arm.anchor is None]
    if named and not any(task.anchor for task in settings.tasks):
        raise ConfigError(
            f"compare.arms: {', '.join(named)} need an anchor and no task has one; set task.anchor "
            "or leave them out"
        )


def _check_ratio(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise ConfigError for arms with general data if there is to be none."""
    mixed = [arm.name for arm in arms if arm.uses_general_data]
    if settings.mix.per_task == 0 and mixed:
        raise ConfigError(
            f"compare: mix.general_per_task is 0, so {', '.join(mixed)} would have no general "
            "data; set it above 0 or leave these arms out"
        )


def _check_source(settings: Settings, arm: Arm, arms: Sequence[Arm]) -> None:
    """Raise ConfigError if `hyperparameters_of` names an arm that cannot give any.

    That arm is missing, tunes nothing or something else, or runs at other sizes.
    """
    if arm.hyperparameters_of is None:
        return
    source = {other.name: other for other in arms}.get(arm.hyperparameters_of)
    where = f"compare.arms: {arm.name} takes the hyperparameters of {arm.hyperparameters_of!r}"
    if source is None:
        raise ConfigError(f"{where}, which is not among the arms; add it, or leave {arm.name} out")
    if not source.trained or source.hyperparameters_of:
        raise ConfigError(f"{where}, which chooses none itself")
    if source.kl or source.members > 1:
        raise ConfigError(f"{where}, which tunes what {arm.name} has not")
    missing = set(sizes_of(settings, arm, 0)) - set(sizes_of(settings, source, 0))
    if missing:
        numbers = ", ".join(map(str, sorted(missing)))
        raise ConfigError(f"{where}, which does not run at its sizes ({numbers} rows)")
