"""Settings: one YAML file describes a run, flags (`a.b=value`) beat it. Every field is documented here and nowhere else.

Unknown keys are errors that name the nearest known key. The key names of other trainers are accepted (`settings_file.ALIASES`);
they are renamed before validation, so the resolved settings in a run folder always use Fulcrum's own names.

Settings of the experiments on the mechanism itself: how the gain grows with general data (`scale`), and in which skills it
lies (`quanta`).
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from fulcrum.config import parsing
from fulcrum.config.base import (
    AnchorSettings,
    GeneralSource,
    GeneralSources,
    Section,
    Sources,
    as_anchor,
    as_sources,
    may_hold_secret,
)
from fulcrum.core.errors import ConfigError, nearest
from fulcrum.core.types import Anchor

Design = Literal["exposures", "steps", "permuted"]


class ScaleSettings(Section):
    """How much general data each training gets, and what is held fixed meanwhile. Seeds are those of `compare`, else five."""

    ratios: tuple[float, ...] = Field(
        (0, 0.5, 1, 2, 4, 8, 16, 32, 64),
        min_length=3,
        description="general rows for each shown task row, ascending",
    )
    designs: tuple[Design, ...] = Field(
        ("exposures", "steps"),
        min_length=1,
        description="exposures: each task row is shown `repeats` times, and trainings grow; steps: all trainings are as long, "
        "and task rows are shown less often; permuted: as exposures, general rows with each other's answers",
    )
    rows: int | None = Field(
        None, ge=4, description="task rows of each task; none: all, train and dev"
    )
    repeats: int = Field(
        4, ge=1, description="times each task row is shown, where exposures are fixed"
    )
    passes: int | None = Field(
        None,
        ge=2,
        description="length of each training in passes over the task rows, where steps are fixed; none: so that the largest "
        "ratio shows each row once",
    )

    @field_validator("ratios")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[0] != 0 or any(b <= a for a, b in pairwise(value)):
            raise ValueError(
                f"ratios begin with 0 (no general data) and ascend, got {', '.join(f'{r:g}' for r in value)}"
            )
        return value

    @field_validator("designs")
    @classmethod
    def _once(cls, value: tuple[Design, ...]) -> tuple[Design, ...]:
        if len(set(value)) < len(value):
            raise ValueError(
                f"a design is given twice in {', '.join(value)}; one curve counted as two would feign certainty"
            )
        return value


class QuantaSettings(Section):
    """Which answers are looked at, and how their clusters are found (after Michaud et al. 2023, arXiv 2303.13506)."""

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


Select = Literal["random", "similar", "gradient", "diverse"]
Order = Literal["auto", "random", "epoch_stratified", "general_then_task", "task_then_general"]


class TaskSettings(Section):
    """The user's few rows and how they are scored."""

    name: str = Field("task", description="a short name, used in tables and file names")
    train: Sources = Field(min_length=1, description="training rows")
    dev: Sources = Field(
        (),
        description="rows for choosing settings; none: a fifth of the training groups is held out",
    )
    test: Sources = Field(
        (),
        description="rows scored once at the end; none: a quarter of the training groups is held out, in a "
        "comparison another fold of them at each seed",
    )
    unlabeled: Sources = Field(
        (),
        description="inputs without answers, for the arms unlabeled, pseudo_self, pseudo_teacher",
    )
    group: str | None = Field(
        None, description="column whose equal values belong together (document, customer ...)"
    )
    anchor: AnchorSettings | None = Field(
        None, description="text, {text, placement}, auto, or none"
    )
    metrics: tuple[str, ...] = Field(
        ("nll", "exact_match"), description="see `fulcrum eval --help` for the names"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer, in tokens")
    train_limit: int | None = Field(
        None, ge=1, description="use this many training rows (nested subsets, drawn by seed)"
    )
    dev_limit: int | None = Field(None, ge=1, description="use at most this many dev rows")
    test_limit: int | None = Field(None, ge=1, description="use at most this many test rows")

    _sources = field_validator("train", "dev", "test", "unlabeled", mode="before")(as_sources)

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w. -]*", value) or value == "default":
            raise ValueError(
                "a name is letters, digits, '_', '-', '.' and spaces, and not 'default'; it names a chat template"
            )
        return value

    _given = field_validator("anchor", mode="before")(as_anchor)

    def anchor_value(self) -> Anchor | None:
        """The anchor as a plain record; of one yet to be chosen (`auto`) none."""
        return None if self.anchor is None or self.anchor.is_auto else self.anchor.value


PILOT_RATIOS = (
    0.0,
    1.0,
    4.0,
    16.0,
)  # general rows for each shown task row that the pilot of `auto` tries


class MixSettings(Section):
    """How task rows and general rows become one stream."""

    general_per_task: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        4.0,
        description="general per shown task row, in `unit`; 0 is plain SFT; auto: a pilot chooses, 0 included",
    )
    pilot_tokens: int = Field(
        400_000, ge=1000, description="tokens that the pilot of `auto` trains on"
    )
    unit: Literal["examples", "tokens"] = Field(
        "examples", description="what `general_per_task` counts"
    )
    repeats: int | Literal["auto"] = Field(
        "auto", description="times each task row is shown; auto: tuned over 1, 2, 4, 8"
    )
    order: Order = Field(
        "auto",
        description="of mixed arms; auto: epoch_stratified below 200 steps, random from there on",
    )
    select: Select = Field(
        "random",
        description="which general rows: any; with the task's words; whose gradients are the task's; of every kind",
    )
    choose_from: int = Field(
        8192,
        ge=1,
        description="rows drawn from the pool, among which the others than random choose",
    )
    anchor_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the showings of task rows that lack the anchor"
    )
    anchor_cooldown: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="last part of the stream, whose task rows all lack the anchor (after MeCo, arXiv 2501.01956)",
    )

    @field_validator("repeats")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"repeats is {value}; every task row must be shown at least once")
        return value

    @model_validator(mode="after")
    def _counted(self) -> "MixSettings":
        if self.general_per_task == "auto" and self.unit == "tokens":
            raise ValueError(
                "general_per_task: auto counts examples; leave `unit: tokens` out, or give a number"
            )
        return self

    @property
    def per_task(self) -> float:
        """`general_per_task` as a number: of `auto`, before a pilot chose, the most that it tries."""
        return PILOT_RATIOS[-1] if self.general_per_task == "auto" else self.general_per_task

    @property
    def candidates(self) -> tuple[int, ...]:
        """The numbers of repeats to try."""
        return (1, 2, 4, 8) if self.repeats == "auto" else (self.repeats,)


class CleanSettings(Section):
    """What is removed from general data beside exact duplicates, damaged rows and text shared with task, dev or test rows."""

    near_duplicates: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="rows are near-duplicates from this Jaccard similarity of word triples on; 0: not looked for",
    )


LEAST_FOLDS = 4  # of rows that seeds hold out


class TrainSettings(Section):
    """The trainer. Defaults follow 'LoRA Without Regret' (all linear layers, high learning rate, small batch)."""

    learning_rate: float = Field(5e-4, gt=0, description="peak of the schedule")
    batch_size: int = Field(
        8, ge=1, description="examples in one optimizer step (consecutive plan positions)"
    )
    max_length: int = Field(
        1024, ge=8, description="longest row in tokens; longer ones follow `too_long`"
    )
    too_long: Literal["drop", "error"] = Field(
        "drop", description="rows over `max_length`: dropped and counted, or refused"
    )
    lora_r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: float = Field(
        32.0, gt=0, description="scale of the adapters; keep it when changing the rank"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the adapters")
    lora_target_modules: str | tuple[str, ...] = Field("all-linear", description="as in PEFT")
    use_rslora: bool = Field(False, description="rank-stabilised scaling")
    use_dora: bool = Field(False, description="weight-decomposed adapters")
    load_in_4bit: bool = Field(
        False, description="4-bit base through bitsandbytes; GPU only, not yet measured"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's second beta (the first is 0.9)")
    warmup: float = Field(
        0.05, ge=0, description="below 1 a share of the steps, else a number of steps"
    )
    final_lr: float = Field(
        0.1, ge=0, le=1, description="the linear decay ends at this share of the peak"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    task_weight: float = Field(1.0, gt=0, description="weight of task rows' tokens in the loss")
    evaluations: int = Field(
        8, ge=1, description="dev evaluations in a run; the best one's weights are kept"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one"
    )
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    share_prefixes: bool = Field(
        True, description="compute what examples of a packed row begin with in common once"
    )
    pack_tokens: int = Field(
        1536, ge=8, description="tokens in a packed row; examples are isolated from each other"
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile; auto: if training is long enough"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="matrix products; auto: bf16 where it is faster"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto: a GPU where there is one"
    )


class EvalSettings(Section):
    """How adapters are scored."""

    batch_tokens: int = Field(
        4096, ge=64, description="tokens in one generation batch, answers included"
    )
    general_rows: int = Field(
        64,
        ge=0,
        description="held-out rows of the pool, and as many of a packaged set, to measure forgetting",
    )
    draws: int = Field(2000, ge=100, description="bootstrap draws")
    anchored: bool = Field(
        True,
        description="whether a model trained with an anchor is asked with it; false: it is scored, used and saved without, for "
        "which anchor_dropout or anchor_cooldown prepare it",
    )


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
        None, description="instead of the task's own (of every task, where there are several)"
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
        description="general rows: none; the pool's; these with each other's answers, or with the base model's own; rows "
        "that the base model made from nothing; unlabelled inputs as texts, or answered by adapters or by the teacher",
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
        description="whether the distance to the base model (KL divergence) is part of the loss, tuned",
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
        description="the arm whose chosen hyperparameters it takes instead of trying any: a diagnostic, never a reference",
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="trainer settings of its own, as in `train:`"
    )

    _sources = field_validator("pool", mode="before")(as_sources)
    _given = field_validator("anchor", mode="before")(as_anchor)

    @model_validator(mode="after")
    def _consistent(self) -> "Arm":
        """Refuse what contradicts itself, with the line of the YAML file that would."""
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
        """Whether it trains on general rows."""
        return self.general != "none"

    @property
    def depends_on_seed(self) -> bool:
        """Whether another seed, with its other task rows, gives another result."""
        return self.trained or self.few_shot or self.tfidf

    @property
    def is_reference(self) -> bool:
        """Whether TELL has to beat it: without general data, with hyperparameters it chose."""
        return not self.uses_general_data and self.hyperparameters_of is None

    @property
    def uses_pool(self) -> bool:
        """Whether it trains on rows of the pool with the pool's own answers."""
        return self.general == "pool"

    @property
    def can_select(self) -> bool:
        """Whether it may choose among the rows of the run's pool."""
        return self.general in ("pool", "permuted") and not self.pool

    @property
    def is_capped_by_pool(self) -> bool:
        """Whether it has at most as many general rows as were drawn for the longest mixture."""
        return self.general in ("pool", "permuted", "own_answers", "self_made")

    @property
    def makes_rows(self) -> bool:
        """Whether the base model writes its general rows, or their answers, before training."""
        return self.general in ("own_answers", "self_made")

    @property
    def uses_unlabeled(self) -> bool:
        """Whether its general rows are inputs of the task that nobody labelled."""
        return self.general in ("unlabeled", "pseudo_self", "pseudo_teacher")

    @property
    def asks_adapters(self) -> bool:
        """Whether adapters trained on its task rows answer the unlabelled inputs."""
        return self.general == "pseudo_self"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher answers the unlabelled inputs."""
        return self.general == "pseudo_teacher"


Sizes = tuple[int, ...]


def _kind_of_arm(value: Any) -> str | None:
    if isinstance(value, str):
        return "arm by name"
    return "arm in full" if isinstance(value, Mapping | Arm) else None


_NO_ARM = "expected an arm's name, or a mapping that describes one (name, anchored, general ...)"


class CompareSettings(Section):
    """Which arms, at how many task rows, and how many seeds. Dev rows count as task rows: settings are chosen inside them."""

    arms: tuple[
        Annotated[
            Annotated[str, Tag("arm by name")] | Annotated[Arm, Tag("arm in full")],
            Discriminator(_kind_of_arm, custom_error_type="no_arm", custom_error_message=_NO_ARM),
        ],
        ...,
    ] = Field(
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
        description="sizes of single arms instead, as {sft: [16, 32, 64, 128]}: a dense curve where it is cheap",
    )
    folds: int = Field(
        3,
        ge=2,
        description="of the cross-validation inside the task rows that chooses an arm's settings",
    )
    tune: Literal["each", "first"] = Field(
        "each",
        description="choose settings for each seed, or once, by the first seed's rows, for all seeds",
    )
    sft_epochs: tuple[int, ...] | None = Field(
        None,
        description="epochs tried for arms without general data; none: from 1 to what TELL's steps allow, evenly in the log, "
        "as many as TELL's repeats tried and at least 3",
    )
    extra_trials: int = Field(
        0,
        ge=0,
        description="settings more that arms without general data try, for what was tried before; auto's pilot sets it",
    )
    learning_rates: tuple[float, ...] | None = Field(
        None, min_length=1, description="tried by every arm; none: train's"
    )
    weight_decays: tuple[float, ...] | None = Field(
        None, min_length=1, description="tried by every arm; none: train's"
    )

    @field_validator("arms", "seeds", "sizes")
    @classmethod
    def _once(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        names = [item.name if isinstance(item, Arm) else item for item in value or ()]
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(
                f"{twice[0]!r} is given twice; one cell counted as two would feign certainty"
            )
        return value

    @field_validator("sizes_of", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: [sizes] if isinstance(sizes, int) else sizes for name, sizes in value.items()}

    @field_validator("sizes", "sizes_of")
    @classmethod
    def _cut(cls, value: Any) -> Any:
        for sizes in value.values() if isinstance(value, dict) else (value or (4,),):
            if not sizes:
                raise ValueError(
                    "an arm without any size; name one, or leave the arm out of sizes_of"
                )
            if twice := [size for place, size in enumerate(sizes) if size in sizes[:place]]:
                raise ValueError(
                    f"{twice[0]} is given twice; one cell counted as two would feign certainty"
                )
            if small := [size for size in sizes if size < 4]:
                raise ValueError(f"{small[0]} rows cannot be cut into folds; use 4 or more")
        return value


class TeacherSettings(Section):
    """A model behind an OpenAI-compatible endpoint, which answers `task.unlabeled` for the arm pseudo_teacher."""

    endpoint: str = Field(min_length=1, description="address; ends in /v1")
    model: str = Field(min_length=1, description="the model's name there")
    instruction: str | None = Field(
        None, description="what it is told before each input; none: the task's anchor"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="environment variable with the key; no key is ever written down",
    )


_TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


class Settings(Section):
    """A whole run."""

    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="hub id, folder, .gguf file or a name from `fulcrum models`",
    )
    trust_remote_code: bool = Field(
        False, description="run code that comes with a hub model; off unless you read that code"
    )
    tasks: tuple[TaskSettings, ...] = Field(
        min_length=1, description="one task (`task:`) or several that share one adapter"
    )
    general: GeneralSources = Field((GeneralSource(path="builtin"),), description="general data")
    teacher: TeacherSettings | None = Field(
        None, description="who answers unlabelled inputs, where an arm asks for it"
    )
    clean: CleanSettings = CleanSettings()
    mix: MixSettings = MixSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    compare: CompareSettings = CompareSettings()
    scale: ScaleSettings = ScaleSettings()
    quanta: QuantaSettings = QuantaSettings()
    output_dir: str = Field("runs/run", min_length=1, description="run folder")
    seed: int = Field(
        0,
        ge=0,
        description="root of all seeds: data, mix, initialisation, training; a comparison may have several",
    )

    report_to: tuple[str, ...] = Field(
        (),
        description=f"trackers that are sent curves, scores and certificates: {', '.join(_TRACKERS)}; none: events.jsonl alone",
    )

    _sources = field_validator("general", mode="before")(as_sources)

    @field_validator("report_to", mode="before")
    @classmethod
    def _nobody(cls, value: Any) -> Any:
        return () if value in (None, "none", ["none"]) else value

    @field_validator("report_to")
    @classmethod
    def _trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in _TRACKERS:
                raise ValueError(f"no tracker {name!r}{nearest(name, _TRACKERS)}")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _names(self) -> "Settings":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks need different names, got {names}; set tasks[i].name")
        if self.teacher is not None and may_hold_secret(self.teacher.endpoint):
            raise ValueError(
                "teacher.endpoint is written down, so it may hold no password; put the key into a variable"
            )
        weighted = {source.weight is not None: source.path for source in self.general}
        if len(weighted) == 2:
            raise ValueError(
                f"general: weight is given for {weighted[True]} and not for {weighted[False]}; give every source one, or none"
            )
        if self.mix.per_task > 0 and not self.general:
            raise ValueError(
                f"mix.general_per_task is {self.mix.per_task:g} and `general:` names no data; name some, or set it to 0"
            )
        return self

    def described(self) -> dict[str, Any]:
        """What numbers may depend on, as JSON holds it: all but where the run is written and whom it is reported to."""
        return self.model_dump(mode="json", exclude={"output_dir", "report_to"})

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of a comparison's chains: those given, else the run's own."""
        return self.compare.seeds or (self.seed,)

    @property
    def outer_folds(self) -> int:
        """Folds of the rows that seeds hold out one each, where a comparison has no test file; 0 where each task has one."""
        return 0 if all(task.test for task in self.tasks) else max(LEAST_FOLDS, len(self.seeds))

    def refuse_choosing_by(self, key: str, what: str, remedy: str) -> None:
        """Raise ConfigError where a comparison's seeds hold out each other's rows: none of them may choose for the rest."""
        if self.outer_folds and len(self.seeds) > 1:
            raise ConfigError(
                f"{key}: without a test file the first seed's task rows are the other seeds' test rows, which must not choose "
                f"{what}; {remedy}, or give a test file"
            )


def settings_from_dict(
    data: Mapping[str, Any], where: str = "settings", flags: Mapping[str, str] | None = None
) -> Settings:
    """Validate nested settings; `flags` says by which flag a dotted name was set.

    Raises ConfigError naming the flag or `where`, the key, the value and the nearest known name.
    """
    if "task" not in data and "tasks" not in data:
        raise ConfigError(
            f"{where}: no `task:` section; write one, or start from `fulcrum init DATA_FILE`"
        )
    renamed = parsing.rename(data)
    if "task" in renamed:
        if "tasks" in renamed:
            raise ConfigError(
                "both `task` and `tasks` are given; use `task` for one, `tasks` for several"
            )
        task = renamed.pop("task")
        if isinstance(task, str | list):
            raise ConfigError(
                f"{where}: task is a mapping: write `task: {{train: {task}}}` (got {task!r:.200})"
            )
        renamed["tasks"] = [task]
    try:
        return Settings.model_validate(renamed)
    except ValidationError as error:
        raise parsing.explain(error, Settings, where, flags or {}) from None


def load_settings(
    path: Path | str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> Settings:
    """Read a YAML file, then apply `a.b=value` overrides (values are YAML) and `options` (of our own names, as they are).

    Raises ConfigError where the file is missing or broken, a key is unknown or given twice, or a value does not fit.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such settings file; write one with `fulcrum init DATA_FILE`"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{file}: is a folder; give a settings file, such as `fulcrum init DATA_FILE` writes"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: not readable as UTF-8 ({error.reason} at byte {error.start + 1})"
        ) from None
    given = parsing.parse(text, str(file))
    if given is None:
        raise ConfigError(f"{file}: is empty; write settings with `fulcrum init DATA_FILE`")
    if not isinstance(given, dict):
        kind = "a list" if isinstance(given, list) else f"{given!r:.60}"
        raise ConfigError(
            f"{file}: expected a mapping of settings, found {kind}; `fulcrum init DATA_FILE` writes one"
        )
    data = parsing.rename(
        given
    )  # before the flags, which may use our names for what the file calls otherwise
    flags: dict[str, str] = {}
    for override in overrides:
        key, value = parsing.override(override)
        parsing.put(data, key, value)
        flags[key] = f"--set {override!r}"
    for key, value in (options or {}).items():
        parsing.put(data, key, value)
        flags[key] = f"--{key.replace('_', '-')}"
    return settings_from_dict(data, str(file), flags)


def dump_settings(settings: Settings) -> str:
    """Return the resolved settings as YAML; `load` of it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
