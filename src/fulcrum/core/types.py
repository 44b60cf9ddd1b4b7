"""The plain values that travel between the stages: frozen, without torch.

Flow: files -> `Example` -> plan -> `Tokens` -> `PackedRow` -> adapter -> `Prediction` -> `Score` ->
results.json -> report.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
Placement = Literal["system", "user_prefix", "user_suffix", "response_prefix"]
SourceKind = Literal["task", "general"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    train: bool = True  # False if its row says that this answer must not be learned (weight 0)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, whose last message is the assistant's answer.

    That of an unlabelled input is the user's message instead.
    """

    messages: tuple[Message, ...]
    group: str  # of its content; equal ones are never split, and are resampled together
    origin: str  # where the row came from, as ``file:line``

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Return all messages before the final answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Return the final answer's text."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """Return the last user message's text (empty if there is none)."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.content
        return ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was read and not kept."""

    origin: str  # ``file:line``
    reason: str  # short, so that equal ones can be counted
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Text that every row of one task carries, and no general row.

    Its tokens are the same in training and inference.
    """

    text: str
    placement: Placement = "user_prefix"

    @property
    def sha256(self) -> str:
        """Hash of text and placement, in hex."""
        return hashlib.sha256(f"{self.placement}\0{self.text}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its rows, split by content, its anchor and how it is scored."""

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]  # count as task data too
    test: tuple[Example, ...]
    anchor: Anchor | None = None
    metrics: tuple[str, ...] = ("nll", "exact_match")
    max_new_tokens: int = 64
    unlabeled: tuple[Example, ...] = ()  # inputs without answers


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A tokenised example."""

    ids: IntArray  # (n,)
    loss_mask: BoolArray  # (n,), True if the token is a training target

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_loss(self) -> int:
        """Number of supervised tokens."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples laid end to end in one training row, isolated from each other."""

    members: tuple[int, ...]  # places in the caller's list
    length: int  # in tokens


@dataclass(frozen=True, slots=True)
class Share:
    """What part of a stream is task data, counted three ways, and the absolute counts."""

    examples: float  # in [0, 1], as the next two
    tokens: float
    loss_tokens: float
    task_examples: int
    general_examples: int
    total_tokens: int
    total_loss_tokens: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered on one row, and how likely the gold answer was."""

    origin: str  # ``file:line``
    group: str
    prompt: str
    gold: str
    output: str | None  # None if nothing was generated
    nll_sum: float  # nats of the gold answer, over its `n_tokens` tokens
    n_tokens: int
    # These nats at the temperature that suited the arm best on rows it was not trained on; None if
    # none was fitted.
    tempered: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A metric with its 95% bootstrap interval over content groups."""

    metric: str
    value: float
    low: float | None  # None or nan if there is one group only; so is `high`
    high: float | None
    n: int  # rows
    n_groups: int
    higher_is_better: bool
    outcomes: tuple[float, ...] = field(default=(), repr=False)  # by row, if such values exist


@dataclass(frozen=True, slots=True)
class TrainPoint:
    """The log line of one optimizer step."""

    step: int
    task_loss: float | None  # nats per supervised token; None if the step had no such row
    general_loss: float | None  # the same
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What an arm tunes; None means the value of the trainer's settings."""

    repeats: int = 1  # times each task row is shown
    learning_rate: float | None = None
    weight_decay: float | None = None
    shots: int = 0  # training rows in the prompt
    kl: float = 0.0  # weight of the divergence from the base model
    scale: float = 1.0  # of the adapter, once it is trained

    @property
    def name(self) -> str:
        """Return what differs from the default, for file names: "repeats4-learning_rate0.001"."""
        if self.shots:
            return f"shots{self.shots}"
        parts = [f"repeats{self.repeats}"]
        defaults = {"learning_rate": None, "weight_decay": None, "kl": 0.0, "scale": 1.0}
        for key, default in defaults.items():
            value = getattr(self, key)
            if value != default:
                parts.append(f"{key}{value:g}")
        return "-".join(parts)


@dataclass(frozen=True, slots=True)
class Trial:
    """Hyperparameters with their loss on dev rows, and what it cost to measure it."""

    setting: Hyperparameters
    dev_nll: float  # nats per answer token, averaged over tasks
    train_tokens: int
    seconds: float
    temperature: float = 1.0  # divides the logits: the one with the least loss on these rows


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What one training did, from its first step to the weights that were kept."""

    repeats: int
    steps: int
    best_step: int  # the one whose weights were kept
    dev_nll: tuple[tuple[int, float], ...]  # (step, nats per answer token), if it was measured
    history: tuple[TrainPoint, ...]
    share: Share
    train_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm at one size and seed: what was tried and chosen, and how that did on test rows."""

    arm: str
    size: int  # task rows that it was given; 0 for an untrained arm
    seed: int
    tried: tuple[Trial, ...]
    chosen: int | None  # place in `tried`
    training: TrainingRun | None  # of the scored adapter, or of the first of several averaged ones
    scores: Mapping[str, tuple[Score, ...]]  # by task
    predictions: Mapping[str, tuple[Prediction, ...]] = field(repr=False)  # by task
    general: Mapping[str, tuple[Prediction, ...]] = field(repr=False)  # by source of held-out rows
    general_nll: Mapping[str, Score]  # of `general`, nats per answer token
    seconds: float  # of the training on all rows and of the test
    # Predictions that show side effects (`cell.probe`), by what was changed.
    probes: Mapping[str, tuple[Prediction, ...]] = field(default_factory=dict, repr=False)

    @property
    def setting(self) -> Hyperparameters | None:
        """Return what was chosen; None if there was nothing to choose."""
        return None if self.chosen is None else self.tried[self.chosen].setting


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired difference of two arms on the same test rows: arm minus reference."""

    task: str
    metric: str
    arm: str
    reference: str
    estimate: float
    low: float | None  # of the 95% interval, as `high`
    high: float | None
    n_seeds: int
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What a report says about a task's data."""

    name: str
    anchor: str | None
    placement: str | None
    train: int  # rows, as the next two
    dev: int
    test: int
    test_groups: int
    train_tokens: int


@dataclass(frozen=True, slots=True)
class Pilot:
    """How much general data a pilot found best."""

    ratios: tuple[float, ...]  # general rows to each shown task row
    losses: tuple[float, ...]  # of each ratio, cross-validated, nats per answer token
    errors: tuple[float, ...]  # standard errors of their differences to no general rows
    chosen: float  # ratio
    rows: int  # task rows
    repeats: int  # times each of them was shown
    alone: int  # times that were best without general rows
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AnchorScore:
    """What the frozen model makes of an anchor, before any training."""

    text: str  # empty for the control without an anchor
    placement: Placement
    source: str  # who made it: "given", "template", "model", "endpoint", or "control: ..."
    tokens: int  # of the text
    loss: float  # nats per answer token (S_loss)
    low: float | None  # of the 95% interval of the loss minus that without an anchor, as `high`
    high: float | None
    chosen: bool = False  # by `anchor: auto`

    @property
    def is_control(self) -> bool:
        """Return whether it is there for comparison only, and cannot be chosen."""
        return self.source.startswith("control")


@dataclass(frozen=True, slots=True)
class AnchorScores:
    """The scores of a task's anchors."""

    task: str
    scores: tuple[AnchorScore, ...]
    rows: int  # training rows that they were scored on
    left_out: Mapping[str, int]  # proposals that were no anchors, counted by reason
    seconds: float  # of proposing and scoring


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that results.json holds and the report needs.

    Predictions are apart, in predictions.jsonl.
    """

    kind: str  # the name of its `RunKind`
    settings: Mapping[str, object]
    environment: Mapping[str, str]
    tasks: tuple[TaskFacts, ...]
    notes: tuple[str, ...]
    rejects: Mapping[str, int]
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    forgetting: tuple[Difference, ...]  # to the untrained arm; `task` is the held-out rows' source
    step_cap: int
    seconds: float
    peak_memory_bytes: int
    size: int  # task rows at which arms are compared; the certificate has the other sizes
    version: int = 3
