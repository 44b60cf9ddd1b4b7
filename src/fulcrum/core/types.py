"""The plain values that travel between the stages. Frozen, without behaviour beyond reading themselves, without torch.

Flow: files -> `Example` -> plan -> `Tokens` -> `PackedRow` -> adapter -> `Prediction` -> `Score` -> results.json -> report.
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
    """One turn of a conversation. `train` is False where a row says that this answer must not be learned (weight 0)."""

    role: Role
    content: str
    train: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation whose last message is the assistant's answer (of an unlabelled input: the user's message).

    `group` names the content (equal groups are never split over train, dev and test, and are resampled together);
    `origin` says where the row came from, as ``file:line``.
    """

    messages: tuple[Message, ...]
    group: str
    origin: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the final answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The final answer's text."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """The last user message's text (empty if there is none)."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was read and not kept, with its place, a short reason that can be counted, and the details."""

    origin: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Text that every row of one task carries, and no general row; the same tokens in training and inference."""

    text: str
    placement: Placement = "user_prefix"

    @property
    def sha256(self) -> str:
        """Hash over text and placement, in hex."""
        return hashlib.sha256(f"{self.placement}\0{self.text}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its rows, split by content, its anchor and how it is scored. Dev rows count as task data.

    `unlabeled` are inputs without answers.
    """

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    anchor: Anchor | None = None
    metrics: tuple[str, ...] = ("nll", "exact_match")
    max_new_tokens: int = 64
    unlabeled: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A tokenised example: `ids` (length n) and `loss_mask` (length n, True where the token is a training target)."""

    ids: IntArray
    loss_mask: BoolArray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_loss(self) -> int:
        """Number of supervised tokens."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples laid end to end in one training row, isolated from each other. `members` index the caller's list."""

    members: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class Share:
    """What part of a stream is task data, counted three ways, each in [0, 1], beside the absolute counts."""

    examples: float
    tokens: float
    loss_tokens: float
    task_examples: int
    general_examples: int
    total_tokens: int
    total_loss_tokens: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model said on one row, and how likely the gold answer was: summed nats over `n_tokens` answer tokens.

    `tempered` are these nats at the temperature that suited the arm best on rows it was not trained on; None where none was
    fitted.
    """

    origin: str
    group: str
    prompt: str
    gold: str
    output: str | None
    nll_sum: float
    n_tokens: int
    tempered: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A metric with its 95% bootstrap interval over content groups (None or nan where one group only gives none).

    `outcomes` holds one value a row where that exists.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    n_groups: int
    higher_is_better: bool
    outcomes: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class TrainPoint:
    """One optimizer step's log line: mean loss (nats per supervised token) per source, None where a step had no such row."""

    step: int
    task_loss: float | None
    general_loss: float | None
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
        """What differs from the default, as a part of file names: "repeats4-learning_rate0.001"."""
        if self.shots:
            return f"shots{self.shots}"
        others = (("learning_rate", None), ("weight_decay", None), ("kl", 0.0), ("scale", 1.0))
        found = [
            f"{key}{getattr(self, key):g}" for key, usual in others if getattr(self, key) != usual
        ]
        return "-".join([f"repeats{self.repeats}", *found])


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
    best_step: int  # whose weights were kept
    dev_nll: tuple[tuple[int, float], ...]  # (step, nats per answer token), if it was measured
    history: tuple[TrainPoint, ...]
    share: Share
    train_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm at one size and seed: what was tried, which of it was chosen, and how that did on test rows.

    `size` is the number of task rows that it was given, 0 for an untrained arm. `training` made the adapter that was scored
    (of several that were averaged, the first). `predictions` are by task, `general` by source of the held-out rows;
    `general_nll` are the scores of the latter. `probes` are predictions that show side effects (`cell.probe`), by what was
    changed. `seconds` count the training on all rows and the test.
    """

    arm: str
    size: int
    seed: int
    tried: tuple[Trial, ...]
    chosen: int | None
    training: TrainingRun | None
    scores: Mapping[str, tuple[Score, ...]]
    predictions: Mapping[str, tuple[Prediction, ...]] = field(repr=False)
    general: Mapping[str, tuple[Prediction, ...]] = field(repr=False)
    general_nll: Mapping[str, Score]
    seconds: float
    probes: Mapping[str, tuple[Prediction, ...]] = field(default_factory=dict, repr=False)

    @property
    def setting(self) -> Hyperparameters | None:
        """What was chosen; None where there was nothing to choose."""
        return None if self.chosen is None else self.tried[self.chosen].setting


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired difference of two arms on the same test rows (arm minus reference), with its 95% interval."""

    task: str
    metric: str
    arm: str
    reference: str
    estimate: float
    low: float | None
    high: float | None
    n_seeds: int
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What a report says about a task's data."""

    name: str
    anchor: str | None
    placement: str | None
    train: int
    dev: int
    test: int
    test_groups: int
    train_tokens: int


@dataclass(frozen=True, slots=True)
class Pilot:
    """How much general data a pilot found best: `losses` (nats per answer token, cross-validated) of `ratios` of general rows
    to each shown task row, with the standard `errors` of their differences to none, on `rows` task rows shown `repeats` times
    each; without general rows they were best shown `alone` times.
    """

    ratios: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    chosen: float
    rows: int
    repeats: int
    alone: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AnchorScore:
    """What the frozen model makes of an anchor, before any training.

    text: empty for the control without an anchor
    source: who made it: "given", "template", "model", "endpoint", or "control: ..."
    tokens: of the text
    loss: nats per answer token (S_loss)
    low, high: ends of the 95% interval of the loss minus that without an anchor; None if unknown
    chosen: whether `anchor: auto` takes it
    """

    text: str
    placement: Placement
    source: str
    tokens: int
    loss: float
    low: float | None
    high: float | None
    chosen: bool = False

    @property
    def is_control(self) -> bool:
        """Tell whether it is there for comparison only, and cannot be chosen."""
        return self.source.startswith("control")


@dataclass(frozen=True, slots=True)
class AnchorScores:
    """The scores of a task's anchors.

    rows: training rows that they were scored on
    left_out: proposals that were no anchors, counted by reason
    seconds: what proposing and scoring took
    """

    task: str
    scores: tuple[AnchorScore, ...]
    rows: int
    left_out: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that results.json holds and the report needs. Predictions are apart, in predictions.jsonl.

    `forgetting` are paired differences to the untrained arm on held-out general rows; their `task` is the rows' source.
    `size` is the number of task rows at which arms are set against each other; other sizes stand in the certificate.
    """

    kind: str  # the name of its `RunKind`
    settings: Mapping[str, object]
    environment: Mapping[str, str]
    tasks: tuple[TaskFacts, ...]
    notes: tuple[str, ...]
    rejects: Mapping[str, int]
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    forgetting: tuple[Difference, ...]
    step_cap: int
    seconds: float
    peak_memory_bytes: int
    size: int
    version: int = 3
