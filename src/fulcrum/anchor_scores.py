"""What the frozen model makes of anchors, before any training: three scores, controls, and the rule that chooses by them.

- `S_loss`: nats per answer token of training rows asked with the anchor. The lower, the less there is to be trained (SAPO,
  arXiv 2606.01967: what has a low loss before training forgets and generalises best).
- `S_sep`: how far task prompts with the anchor lie from general prompts: the Fisher ratio of their hidden states along a
  direction learned on other rows. Any constant text separates, so its percentile among random strings of its length is told.
- `S_conf`: the cosine of the mean gradients of task rows and of general rows: whether they pull the adapter one way.

No dev or test row of a run is seen, and nothing of the model changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fulcrum import adapter, encode, generate, probe, stats, store
from fulcrum.anchor import ANOTHER
from fulcrum.config import TrainSettings
from fulcrum.model import LoadedModel
from fulcrum.progress import Count
from fulcrum.records import Anchor, AnchorScore, Example, FloatArray

RANDOM = 20  # strings of an anchor's length, to which its separation is compared
LOSS_ROWS, GENERAL_ROWS = 128, 256  # at most so many training and general rows are scored
LABEL = "anchors scored"

_SEPARATED, _GRADIENTS = 48, 32  # rows, of the task and of the pool each, whose states and gradients are taken
_DIMENSIONS, _FOLDS = 32, 5
_TIE = 2  # decimals of S_loss that tell two anchors apart
_DRAWS = 1000
States = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """An anchor (None: the control without one) and who made it."""

    anchor: Anchor | None
    source: str


def controls(candidates: Sequence[Candidate], loaded: LoadedModel, other: str | None, seed: int) -> list[Candidate]:
    """What anchors are compared with: none, rare tokens at random (as many as the median candidate has), another task's."""
    anchors = [candidate.anchor for candidate in candidates if candidate.anchor is not None]
    placement = anchors[0].placement
    length = int(np.median([tokens_of(anchor, loaded) for anchor in anchors]))
    return [
        Candidate(None, "control: none"),
        Candidate(Anchor(random_strings(loaded, length, 1, seed)[0], placement), "control: random tokens"),
        Candidate(Anchor(other or ANOTHER, placement), "control: another task's"),
    ]


def tokens_of(anchor: Anchor | None, loaded: LoadedModel) -> int:
    """Tokens of an anchor's text by itself."""
    if anchor is None:
        return 0
    return len(loaded.tokenizer(anchor.text.strip(), add_special_tokens=False, split_special_tokens=False)["input_ids"])


def random_strings(loaded: LoadedModel, length: int, count: int, seed: int) -> list[str]:
    """Texts of rare tokens (of the later half of the vocabulary) that are `length` tokens when they are read again, or nearly:
    decoding joins some."""
    tokenizer, rng = loaded.tokenizer, np.random.default_rng(store.seed_for(seed, f"random strings of {length}"))
    size, special = len(tokenizer), set(tokenizer.all_special_ids) | {*tokenizer.added_tokens_decoder}
    found: list[str] = []
    while len(found) < count:
        best, off = "", length + 1
        for _ in range(8):
            ids = [int(k) for k in rng.integers(size // 2, size, 2 * length) if int(k) not in special][:length]
            read = tokenizer(_printable(tokenizer.decode(ids)), add_special_tokens=False)["input_ids"]
            cut = _printable(tokenizer.decode(read[:length]))
            miss = abs(len(tokenizer(cut, add_special_tokens=False)["input_ids"]) - length)
            if cut and miss < off:
                best, off = cut, miss
        found.append(best or "?")
    return found


def _printable(text: Any) -> str:
    """A decoded text in one line, without what shows nothing or was half a character."""
    return " ".join("".join(c if c.isprintable() and c != "\ufffd" else " " for c in str(text)).split())


def score(
    candidates: Sequence[Candidate], rows: Sequence[Example], general: Sequence[Example], loaded: LoadedModel,
    settings: TrainSettings, *, seed: int, count: Count,
) -> list[AnchorScore]:  # fmt: skip
    """Scores of candidates, in their order; one without an anchor must be among them. What was scored before is not again.

    `rows` are training rows of the task, none of which a candidate was made from; `general` are rows of the pool.
    """
    rows, general = rows[:LOSS_ROWS], general[:GENERAL_ROWS]
    work = _Work(rows, general, loaded, settings, seed)
    lengths = {c.anchor: tokens_of(c.anchor, loaded) for c in candidates}
    strings = {(_matched(lengths[a]), a.placement) for a in lengths if a is not None}
    total, done = len(candidates) + len(strings), 0
    measured, random = [], {}
    for candidate in candidates:
        measured.append(work.measured(candidate.anchor))
        done += 1
        count(done, total)
    for length, placement in sorted(strings):
        random[length, placement] = work.random_separations(length, placement)
        done += 1
        count(done, total)
    none = next(m for m, c in zip(measured, candidates, strict=True) if c.anchor is None)
    found = []
    for candidate, own in zip(candidates, measured, strict=True):
        anchor, is_none = candidate.anchor, candidate.anchor is None
        low, high = (None, None) if is_none else work.loss_difference(own, none)
        others = [] if anchor is None else random[_matched(lengths[anchor]), anchor.placement]
        found.append(
            AnchorScore(
                anchor.text if anchor else "", anchor.placement if anchor else "user_prefix", candidate.source,
                lengths[anchor], float(np.sum(own.nats) / np.sum(work.lengths)), low, high, own.separation,
                float(np.mean([other < own.separation for other in others])) if others else None,
                not is_none and work.separates(own, none), own.agreement,
            )
        )  # fmt: skip
    return found


def _matched(length: int) -> int:
    """The length of the random strings to which an anchor of `length` tokens is compared: the same within 7%, so that anchors
    of nearly the same length share them."""
    return max(1, round(1.15 ** round(math.log(max(1, length)) / math.log(1.15))))


def choose(scores: Sequence[AnchorScore]) -> int:
    """Which candidate is chosen, by its place: of those that separate the task from general prompts better than no anchor does
    (of all, where none does) the one of the lowest loss; of equal ones (to 0.01 nats) that of the higher agreement, then of
    fewer tokens. Controls are never chosen."""
    able = [k for k, score in enumerate(scores) if not score.is_control]
    able = [k for k in able if scores[k].separates] or able
    return min(able, key=lambda k: (round(scores[k].loss, _TIE), -(scores[k].agreement or 0.0), scores[k].tokens, k))


@dataclass(frozen=True)
class _Measured:
    """Of one anchor: nats of each row, projections of task and general prompts (layers, prompts), and two of the scores."""

    nats: FloatArray
    task: FloatArray
    general: FloatArray
    separation: float
    agreement: float | None


@dataclass
class _Work:
    """Rows on which anchors are scored, with what is the same for all of them."""

    rows: Sequence[Example]
    general: Sequence[Example]
    loaded: LoadedModel
    settings: TrainSettings
    seed: int

    def __post_init__(self) -> None:
        loaded = self.loaded
        plain = encode.make_format(loaded.tokenizer, None)
        adapter.drop_adapter(loaded)
        self.lengths = np.array([encode.answer_length(row, plain) for row in self.rows], dtype=np.float64)
        self._plain_prompts = [encode.prompt_ids(row.prompt, plain) for row in self.general]
        self._key = [
            store.code(), loaded.fingerprint(), str(loaded.dtype), str(loaded.device), self.seed, self.rows, self.general,
            self.settings.model_dump(mode="json"),
        ]  # fmt: skip
        self._general_states: States | None = None
        self._general_gradient: FloatArray | None = None

    def measured(self, anchor: Anchor | None) -> _Measured:
        """Everything of one anchor; kept in the cache."""
        known = self._recalled("anchor", anchor)
        if known:
            arrays = {name: np.array(known[name]) for name in ("nats", "task", "general")}
            return _Measured(**arrays, separation=known["separation"], agreement=known["agreement"])
        form = encode.make_format(self.loaded.tokenizer, anchor)
        tokens = [encode.final_answer(row, form) for row in self.rows]
        task, general, ratio = self._separation(anchor)
        found = _Measured(generate.nats(self.loaded, tokens)[0], task, general, ratio, self._agreement(tokens))
        self._remember(
            "anchor", anchor, nats=found.nats.tolist(), task=task.tolist(), general=general.tolist(), separation=ratio,
            agreement=found.agreement,
        )  # fmt: skip
        return found

    def random_separations(self, length: int, placement: Any) -> list[float]:
        """Separations of `RANDOM` random strings; kept in the cache."""
        known = self._recalled("random", [length, placement])
        if known:
            return [float(value) for value in known["separations"]]
        found = [
            self._separation(Anchor(text, placement))[2] for text in random_strings(self.loaded, length, RANDOM, self.seed)
        ]
        self._remember("random", [length, placement], separations=found)
        return found

    def loss_difference(self, own: _Measured, none: _Measured) -> tuple[float | None, float | None]:
        """95% interval of the difference of losses to none, by content group."""
        sums = np.stack([own.nats - none.nats, self.lengths], axis=1)
        interval = stats.bootstrap(sums, [row.group for row in self.rows], stats.ratio, draws=_DRAWS, seed=self.seed)
        return (None, None) if np.isnan(interval.low) else (interval.low, interval.high)

    def separates(self, own: _Measured, none: _Measured) -> bool:
        """Whether its separation is above that of no anchor in 97.5% of bootstrap draws of prompts."""
        rng = np.random.default_rng(store.seed_for(self.seed, "separates"))
        n, m = own.task.shape[1], own.general.shape[1]
        above = 0
        for _ in range(_DRAWS):
            task, general = rng.integers(0, n, n), rng.integers(0, m, m)
            ratios = [np.mean(_fisher(each.task[:, task], each.general[:, general])) for each in (own, none)]
            above += bool(ratios[0] > ratios[1])
        return above >= 0.975 * _DRAWS

    def _separation(self, anchor: Anchor | None) -> tuple[FloatArray, FloatArray, float]:
        form = encode.make_format(self.loaded.tokenizer, anchor)
        part = self.rows[:_SEPARATED]
        own = generate.states(self.loaded, [encode.prompt_ids(row.prompt, form) for row in part])
        if self._general_states is None:
            self._general_states = generate.states(self.loaded, self._plain_prompts)
        groups = [row.group for row in part]
        pairs = [projections(own[:, k], self._general_states[:, k], groups, self.seed) for k in range(2)]
        task, general = (np.stack(parts) for parts in zip(*pairs, strict=True))
        return task, general, float(np.mean(_fisher(task, general)))

    def _agreement(self, tokens: Sequence[Any]) -> float | None:
        """None where there are no general rows to agree with."""
        if not self.general:
            return None
        adapter.new_adapter(self.loaded, self.settings, store.seed_for(self.seed, "gradients"))
        budget = self.settings.pack_tokens
        if self._general_gradient is None:
            plain = encode.make_format(self.loaded.tokenizer, None)
            wanted = [encode.encode(row, plain) for row in self.general[:_GRADIENTS]]
            self._general_gradient = probe.gradients(self.loaded, wanted, budget=budget, seed=self.seed).mean(axis=0)
        own = probe.gradients(self.loaded, tokens[:_GRADIENTS], budget=budget, seed=self.seed).mean(axis=0)
        adapter.drop_adapter(self.loaded)
        size = float(np.linalg.norm(own) * np.linalg.norm(self._general_gradient))
        return float(own @ self._general_gradient / size) if size else 0.0

    def _file(self, kind: str, what: Any) -> Any:
        return store.cache_dir() / "anchors" / f"{store.fingerprint([*self._key, kind, what])[:32]}.json"

    def _recalled(self, kind: str, what: Any) -> dict[str, Any]:
        return store.recalled(self._file(kind, what))

    def _remember(self, kind: str, what: Any, **values: Any) -> None:
        store.write_json(self._file(kind, what), values, indent=None)


def projections(task: States, general: States, groups: Sequence[str], seed: int) -> tuple[FloatArray, FloatArray]:
    """States (task rows, d) and (general rows, d) -> where each lies on the line that tells the two apart best, in standard
    deviations: (task rows,), (general rows,). The line of each fold is fitted on the other folds, whole content groups apart.

    PCA to 32 dimensions, then linear discriminant analysis with Ledoit-Wolf shrinkage (scikit-learn).
    """
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import GroupKFold, KFold

    count = min(_FOLDS, len(set(groups)), len(general))
    own, other = np.zeros(len(task)), np.zeros(len(general))
    if count < 2:
        return own, other
    by_group = GroupKFold(count, shuffle=True, random_state=seed % 2**32).split(task, groups=groups)
    by_row = KFold(count, shuffle=True, random_state=seed % 2**32).split(general)
    for (train, held), (general_train, general_held) in zip(by_group, by_row, strict=True):
        fitted = np.concatenate([task[train], general[general_train]])
        labels = np.arange(len(fitted)) < len(train)
        reduced = PCA(min(_DIMENSIONS, len(fitted) - 1, fitted.shape[1]), random_state=0).fit(fitted)
        line = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(reduced.transform(fitted), labels)
        known = line.decision_function(reduced.transform(fitted))
        middle = (known[labels].mean() + known[~labels].mean()) / 2
        spread = np.sqrt((known[labels].var() + known[~labels].var()) / 2) or 1.0
        own[held] = (line.decision_function(reduced.transform(task[held])) - middle) / spread
        other[general_held] = (line.decision_function(reduced.transform(general[general_held])) - middle) / spread
    return own, other


def _fisher(task: FloatArray, general: FloatArray) -> FloatArray:
    """Squared distance of the means over the sum of variances, along the last axis; 0 where nothing varies."""
    spread = task.var(axis=-1) + general.var(axis=-1)
    distance = (task.mean(axis=-1) - general.mean(axis=-1)) ** 2
    return np.asarray(np.divide(distance, spread, out=np.zeros_like(distance), where=spread > 0))


def chosen_first(scores: Sequence[AnchorScore], place: int) -> tuple[AnchorScore, ...]:
    """The scores by loss, with the chosen one marked."""
    marked = [replace(score, chosen=k == place) for k, score in enumerate(scores)]
    return tuple(sorted(marked, key=lambda score: (score.is_control, score.loss)))
