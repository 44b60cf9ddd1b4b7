"""The sections that settings of a single run have: data, mixture, trainer, scoring, teacher.

Every field is documented here and nowhere else; the reference of settings is generated from it.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fulcrum.config.base import AnchorSettings, Section, Sources, as_anchor, as_sources
from fulcrum.core.types import Anchor

Select = Literal["random", "similar", "gradient", "diverse"]
Order = Literal["auto", "random", "epoch_stratified", "general_then_task", "task_then_general"]

# General rows for each shown task row that the pilot of `general_per_task: auto` tries.
PILOT_RATIOS = (0.0, 1.0, 4.0, 16.0)


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
        description="rows scored once at the end; none: a quarter of the training groups is held "
        "out, in a comparison another fold of them at each seed",
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
    _anchor = field_validator("anchor", mode="before")(as_anchor)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w. -]*", value) or value == "default":
            raise ValueError(
                "a name is letters, digits, '_', '-', '.' and spaces, and not 'default'; "
                "it names a chat template"
            )
        return value

    def anchor_value(self) -> Anchor | None:
        """Return the anchor as a plain record; None if `auto` has yet to choose one."""
        return None if self.anchor is None or self.anchor.is_auto else self.anchor.value


class CleanSettings(Section):
    """What is removed from general data.

    Exact duplicates, damaged rows and text shared with task, dev or test rows are removed anyway.
    """

    near_duplicates: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="rows are near-duplicates from this Jaccard similarity of word triples on; "
        "0: not looked for",
    )


class MixSettings(Section):
    """How task rows and general rows become one stream."""

    general_per_task: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        4.0,
        description="general per shown task row, in `unit`; 0 is plain SFT; auto: a pilot "
        "chooses, 0 included",
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
        description="which general rows: any; with the task's words; whose gradients are the "
        "task's; of every kind",
    )
    choose_from: int = Field(
        8192,
        ge=1,
        description="rows drawn from the pool, from which every `select` but random chooses",
    )
    anchor_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the showings of task rows that lack the anchor"
    )
    anchor_cooldown: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="last part of the stream, whose task rows all lack the anchor "
        "(after MeCo, arXiv 2501.01956)",
    )

    @field_validator("repeats")
    @classmethod
    def _check_repeats(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"repeats is {value}; every task row must be shown at least once")
        return value

    @model_validator(mode="after")
    def _check_unit(self) -> "MixSettings":
        if self.general_per_task == "auto" and self.unit == "tokens":
            raise ValueError(
                "general_per_task: auto counts examples; leave `unit: tokens` out, or give a number"
            )
        return self

    @property
    def per_task(self) -> float:
        """`general_per_task` as a number; for `auto`, before a pilot chose, the most it tries."""
        return PILOT_RATIOS[-1] if self.general_per_task == "auto" else self.general_per_task

    @property
    def candidates(self) -> tuple[int, ...]:
        """Return the numbers of repeats to try."""
        return (1, 2, 4, 8) if self.repeats == "auto" else (self.repeats,)


class TrainSettings(Section):
    """The trainer.

    Defaults follow 'LoRA Without Regret': all linear layers, high learning rate, small batch.
    """

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
        "auto", description="auto: a GPU if there is one"
    )


class EvalSettings(Section):
    """How adapters are scored."""

    batch_tokens: int = Field(
        4096, ge=64, description="tokens in one generation batch, answers included"
    )
    general_rows: int = Field(
        64,
        ge=0,
        description="held-out rows of the pool, and as many of a packaged set, to measure "
        "forgetting",
    )
    draws: int = Field(2000, ge=100, description="bootstrap draws")
    anchored: bool = Field(
        True,
        description="whether a model trained with an anchor is asked with it; false: it is "
        "scored, used and saved without, for which anchor_dropout or anchor_cooldown prepare it",
    )


class TeacherSettings(Section):
    """A model behind an OpenAI-compatible endpoint, which answers for the arm pseudo_teacher.

    It answers the inputs of `task.unlabeled`.
    """

    endpoint: str = Field(min_length=1, description="address; ends in /v1")
    model: str = Field(min_length=1, description="the model's name there")
    instruction: str | None = Field(
        None, description="what it is told before each input; none: the task's anchor"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="environment variable with the key; no key is ever written down",
    )
