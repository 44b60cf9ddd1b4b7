"""The sections that settings of experiments have: arms and their comparison, `scale` and `quanta`.

`scale` asks how the gain grows with general data, `quanta` in which skills it lies.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from fulcrum.config import parsing
from fulcrum.config.base import AnchorSettings, GeneralSources, Section, as_anchor, as_sources
from fulcrum.config.sections import Order, Select, TrainSettings

Design = Literal["exposures", "steps", "permuted"]
Sizes = tuple[int, ...]


class Arm(Section):
    """One way of training that is compared.

    Arms differ in these things and in nothing else; a YAML file may add its own.
    """

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$",
        description="small letters, digits and _; used in tables and file names",
    )
    trained: bool = Field(True, description="false: the model stays as it is")
    anchored: bool = Field(
        False, description="whether task rows carry the anchor, in training and in inference"
    )
    anchor: AnchorSettings | None = Field(
        None, description="instead of the task's own (of every task, if there are several)"
    )
    anchor_dropout: float | None = Field(
        None, ge=0, lt=1, description="instead of mix.anchor_dropout"
    )
    anchor_cooldown: float | None = Field(
        None, ge=0, lt=1, description="instead of mix.anchor_cooldown"
    )
    asked_anchored: bool | None = Field(None, description="instead of eval.anchored")
    task_rows: bool = Field(True, description="false: trains on general rows alone")
    general: Literal[
        "none",
        "pool",
        "permuted",
        "own_answers",
        "self_made",
        "unlabeled",
        "pseudo_self",
        "pseudo_teacher",
    ] = Field(
        "none",
        description="general rows: none; the pool's; these with each other's answers, or with the "
        "base model's own; rows that the base model made from nothing; unlabelled inputs as "
        "texts, or answered by adapters or by the teacher",
    )
    pool: GeneralSources = Field(
        (), description="general data of its own; none: `general:` of the run"
    )
    order: Order | None = Field(None, description="instead of mix.order")
    select: Select | None = Field(None, description="instead of mix.select")
    general_per_task: float | None = Field(
        None, gt=0, description="in examples, instead of mix.general_per_task"
    )
    general_rows: int | None = Field(
        None, ge=1, description="so many general rows, however often the task rows repeat"
    )
    repeats: int | None = Field(
        None, ge=1, description="times each task row is shown; none: tuned, as the other arms' are"
    )
    few_shot: bool = Field(
        False, description="task rows are put into the prompt; nothing is trained"
    )
    kl: bool = Field(
        False,
        description="whether the distance to the base model (KL divergence) is part of the loss, "
        "tuned",
    )
    members: int = Field(
        1, ge=1, le=16, description="adapters of as many trainings, averaged, their scale tuned"
    )
    tfidf: bool = Field(
        False,
        description="no language model: TF-IDF and logistic regression over answers as labels",
    )
    hyperparameters_of: str | None = Field(
        None,
        description="the arm whose chosen hyperparameters it takes instead of trying any: "
        "a diagnostic, never a reference",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="trainer settings of its own, as in `train:`"
    )

    _sources = field_validator("pool", mode="before")(as_sources)
    _anchor = field_validator("anchor", mode="before")(as_anchor)

    @model_validator(mode="after")
    def _check_consistency(self) -> "Arm":
        self._check_anchor()
        self._check_general()
        self._check_training()
        return self

    def _check_anchor(self) -> None:
        own = (self.anchor, self.anchor_dropout, self.anchor_cooldown, self.asked_anchored)
        if not self.anchored and any(value is not None for value in own):
            raise ValueError(
                f"{self.name}: carries no anchor, so nothing of anchors can be set; "
                "add anchored: true"
            )
        if self.anchor is not None and self.anchor.is_auto:
            raise ValueError(f"{self.name}: an arm's own anchor is a text; auto is for the task's")
        if not self.trained and (self.anchor_dropout or self.anchor_cooldown):
            raise ValueError(
                f"{self.name}: is not trained, so no showing of a row can lack the anchor"
            )

    def _check_general(self) -> None:
        amount = self.general_per_task or self.general_rows
        chosen = self.pool or self.order or self.select or amount or not self.task_rows
        if chosen and not self.uses_general_data:
            raise ValueError(
                f"{self.name}: without general rows (general: pool) there is no pool, order or "
                "ratio to set"
            )
        if self.general_per_task and self.general_rows:
            raise ValueError(
                f"{self.name}: general_per_task and general_rows both say how many general rows; "
                "keep one"
            )
        if self.select and not self.can_select:
            raise ValueError(
                f"{self.name}: rows are selected from the run's own pool; leave `select:` out"
            )

    def _check_training(self) -> None:
        own = self.uses_general_data or self.kl or self.members > 1 or self.train or self.repeats
        if not self.trained and (own or self.hyperparameters_of):
            raise ValueError(
                f"{self.name}: is not trained (trained: false), so nothing of training can be set"
            )
        if self.few_shot + self.tfidf + self.trained > 1:
            raise ValueError(
                f"{self.name}: is trained, few_shot or tfidf, one of these (add trained: false)"
            )
        if self.hyperparameters_of and own:
            raise ValueError(
                f"{self.name}: takes another arm's hyperparameters, so it has no general rows, KL, "
                "members, repeats, train of its own"
            )
        try:
            TrainSettings.model_validate(self.train)
        except ValidationError as error:
            where = f"{self.name}: train"
            raise ValueError(str(parsing.explain(error, TrainSettings, where, {}))) from None

    @property
    def uses_general_data(self) -> bool:
        """Return whether it trains on general rows."""
        return self.general != "none"

    @property
    def depends_on_seed(self) -> bool:
        """Return whether another seed, with its other task rows, gives another result."""
        return self.trained or self.few_shot or self.tfidf

    @property
    def is_reference(self) -> bool:
        """Return whether TELL has to beat it: no general data, hyperparameters of its own."""
        return not self.uses_general_data and self.hyperparameters_of is None

    @property
    def uses_pool(self) -> bool:
        """Return whether it trains on rows of the pool with the pool's own answers."""
        return self.general == "pool"

    @property
    def can_select(self) -> bool:
        """Return whether it may choose among the rows of the run's pool."""
        return self.general in ("pool", "permuted") and not self.pool

    @property
    def is_capped_by_pool(self) -> bool:
        """Return whether its general rows are at most those drawn for the longest mixture."""
        return self.general in ("pool", "permuted", "own_answers", "self_made")

    @property
    def makes_rows(self) -> bool:
        """Return whether the base model writes its general rows, or their answers."""
        return self.general in ("own_answers", "self_made")

    @property
    def uses_unlabeled(self) -> bool:
        """Return whether its general rows are inputs of the task that nobody labelled."""
        return self.general in ("unlabeled", "pseudo_self", "pseudo_teacher")

    @property
    def asks_adapters(self) -> bool:
        """Return whether adapters trained on its task rows answer the unlabelled inputs."""
        return self.general == "pseudo_self"

    @property
    def asks_teacher(self) -> bool:
        """Return whether the teacher answers the unlabelled inputs."""
        return self.general == "pseudo_teacher"


def _kind_of_arm(value: Any) -> str | None:
    if isinstance(value, str):
        return "arm by name"
    if isinstance(value, Mapping | Arm):
        return "arm in full"
    return None


_ArmOrName = Annotated[
    Annotated[str, Tag("arm by name")] | Annotated[Arm, Tag("arm in full")],
    Discriminator(
        _kind_of_arm,
        custom_error_type="no_arm",
        custom_error_message="expected an arm's name, or a mapping that describes one "
        "(name, anchored, general ...)",
    ),
]


class CompareSettings(Section):
    """Which arms, at how many task rows, and how many seeds.

    Dev rows count as task rows: settings are chosen inside them.
    """

    arms: tuple[_ArmOrName, ...] = Field(
        ("base", "base_anchor", "kshot", "sft", "sft_anchor", "mix", "tell"),
        min_length=1,
        description="arms to run: names that README.md lists, or arms of your own",
    )
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="whole chains (subset, order, ...); none: `seed`"
    )
    sizes: Sizes | None = Field(
        None, min_length=1, description="numbers of task rows, nested; none: all train and dev rows"
    )
    sizes_of: dict[str, Sizes] = Field(
        default_factory=dict,
        description="sizes of single arms instead, as {sft: [16, 32, 64, 128]}: a dense curve "
        "where it is cheap",
    )
    folds: int = Field(
        3,
        ge=2,
        description="of the cross-validation inside the task rows that chooses an arm's settings",
    )
    tune: Literal["each", "first"] = Field(
        "each",
        description="choose settings for each seed, or once, by the first seed's rows, for all "
        "seeds",
    )
    sft_epochs: tuple[int, ...] | None = Field(
        None,
        description="epochs tried for arms without general data; none: from 1 to what TELL's "
        "steps allow, evenly in the log, as many as TELL's repeats tried and at least 3",
    )
    extra_trials: int = Field(
        0,
        ge=0,
        description="further settings that arms without general data try, for what was tried "
        "before; auto's pilot sets it",
    )
    learning_rates: tuple[float, ...] | None = Field(
        None, min_length=1, description="tried by every arm; none: train's"
    )
    weight_decays: tuple[float, ...] | None = Field(
        None, min_length=1, description="tried by every arm; none: train's"
    )

    @field_validator("arms", "seeds", "sizes")
    @classmethod
    def _check_distinct(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        names = [item.name if isinstance(item, Arm) else item for item in value or ()]
        _refuse_duplicates(names)
        return value

    @field_validator("sizes_of", mode="before")
    @classmethod
    def _list_single_sizes(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: [sizes] if isinstance(sizes, int) else sizes for name, sizes in value.items()}

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, value: Sizes | None) -> Sizes | None:
        _refuse_small(value or ())
        return value

    @field_validator("sizes_of")
    @classmethod
    def _check_sizes_of(cls, value: dict[str, Sizes]) -> dict[str, Sizes]:
        for sizes in value.values():
            if not sizes:
                raise ValueError(
                    "an arm without any size; name one, or leave the arm out of sizes_of"
                )
            _refuse_duplicates(sizes)
            _refuse_small(sizes)
        return value


class ScaleSettings(Section):
    """How much general data each training gets, and what is held fixed meanwhile.

    Seeds are those of `compare`, else five.
    """

    ratios: tuple[float, ...] = Field(
        (0, 0.5, 1, 2, 4, 8, 16, 32, 64),
        min_length=3,
        description="general rows for each shown task row, ascending",
    )
    designs: tuple[Design, ...] = Field(
        ("exposures", "steps"),
        min_length=1,
        description="exposures: each task row is shown `repeats` times, and trainings grow; "
        "steps: all trainings are as long, and task rows are shown less often; "
        "permuted: as exposures, general rows with each other's answers",
    )
    rows: int | None = Field(
        None, ge=4, description="task rows of each task; none: all, train and dev"
    )
    repeats: int = Field(
        4, ge=1, description="times each task row is shown, if exposures are fixed"
    )
    passes: int | None = Field(
        None,
        ge=2,
        description="length of each training in passes over the task rows, if steps are fixed; "
        "none: so that the largest ratio shows each row once",
    )

    @field_validator("ratios")
    @classmethod
    def _check_ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[0] != 0 or any(b <= a for a, b in pairwise(value)):
            given = ", ".join(f"{ratio:g}" for ratio in value)
            raise ValueError(f"ratios begin with 0 (no general data) and ascend, got {given}")
        return value

    @field_validator("designs")
    @classmethod
    def _check_distinct(cls, value: tuple[Design, ...]) -> tuple[Design, ...]:
        _refuse_duplicates(value)
        return value


class QuantaSettings(Section):
    """Which answers are looked at, and how their clusters are found.

    The method is that of Michaud et al. 2023, arXiv 2303.13506.
    """

    unit: Literal["tokens", "rows"] = Field(
        "tokens", description="what is clustered: single answer tokens, or whole answers"
    )
    items: int = Field(
        1000,
        ge=40,
        description="how many of them, half of the task's test rows, half of held-out general rows",
    )
    repeats: int = Field(4, ge=1, description="times each task row is shown, in both arms")
    points: int = Field(
        6,
        ge=1,
        description="moments of a training at which every item's loss is taken, its end among them",
    )
    most: int = Field(64, ge=2, description="clusters at most")
    rows: int | None = Field(
        None, ge=4, description="task rows to train on; none: all, train and dev"
    )


def _refuse_duplicates(values: Sequence[Hashable]) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(
                f"{value!r} is listed twice; remove one (a duplicate would make intervals too "
                "narrow)"
            )


def _refuse_small(sizes: Sizes) -> None:
    for size in sizes:
        if size < 4:
            raise ValueError(f"{size} rows cannot be cut into folds; use 4 or more")
