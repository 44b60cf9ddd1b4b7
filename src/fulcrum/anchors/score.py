"""Score anchors on the frozen model, before any training, next to controls, and choose one of them.

The score is S_loss: nats per answer token of training rows asked with the anchor. The lower it is,
the less training has to change (SAPO, arXiv 2606.01967: what has a low loss before training forgets
and generalises best). No dev or test row of a run is seen, and the model is not changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fulcrum.core import store
from fulcrum.core.progress import Count
from fulcrum.core.types import Anchor, AnchorScore, Example, FloatArray
from fulcrum.data import encode
from fulcrum.data.anchor_template import ANOTHER
from fulcrum.model import adapter, generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import intervals

MAX_ROWS = 128  # training rows that anchors are scored on
LABEL = "anchors scored"

_TIE = 2  # decimals of S_loss that tell two anchors apart
_DRAWS = 1000
_ATTEMPTS = 8  # random texts from which the one nearest to the wanted length is taken


@dataclass(frozen=True)
class Candidate:
    """An anchor (None: the control without one) and who made it."""

    anchor: Anchor | None
    source: str


def controls(
    candidates: Sequence[Candidate], loaded: LoadedModel, other: str | None, seed: int
) -> list[Candidate]:
    """Return what anchors are compared with: none, random rare tokens, and another task's anchor.

    The random one has as many tokens as the median candidate.
    """
    anchors = [candidate.anchor for candidate in candidates if candidate.anchor is not None]
    placement = anchors[0].placement
    length = int(np.median([count_tokens(anchor, loaded) for anchor in anchors]))
    random = random_text(loaded, length, seed)
    return [
        Candidate(None, "control: none"),
        Candidate(Anchor(random, placement), "control: random tokens"),
        Candidate(Anchor(other or ANOTHER, placement), "control: another task's"),
    ]


def count_tokens(anchor: Anchor | None, loaded: LoadedModel) -> int:
    """Count the tokens of an anchor's text by itself."""
    return 0 if anchor is None else len(_ids(anchor.text.strip(), loaded))


def random_text(loaded: LoadedModel, length: int, seed: int) -> str:
    """Draw a text of rare tokens (of the later half of the vocabulary), about `length` tokens long.

    Decoding joins some tokens, so several texts are drawn and the one nearest to that length is
    returned.
    """
    tokenizer = loaded.tokenizer
    rng = np.random.default_rng(store.seed_for(seed, f"random strings of {length}"))
    size = len(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    best = "?"
    least_miss = length + 1
    for _ in range(_ATTEMPTS):
        drawn = rng.integers(size // 2, size, 2 * length).tolist()
        ids = [token for token in drawn if token not in special][:length]
        read = _ids(_printable(tokenizer.decode(ids)), loaded)
        text = _printable(tokenizer.decode(read[:length]))
        miss = abs(len(_ids(text, loaded)) - length)
        if text and miss < least_miss:
            best = text
            least_miss = miss
    return best


def score(
    candidates: Sequence[Candidate],
    rows: Sequence[Example],
    loaded: LoadedModel,
    *,
    seed: int,
    count: Count,
) -> list[AnchorScore]:
    """Score candidates on the first `MAX_ROWS` of `rows`, and return the scores in their order.

    `rows` are training rows of the task from which no candidate was made. One candidate must be the
    control without an anchor. Losses are kept in the cache, and read back when the same anchor is
    scored again.
    """
    rows = rows[:MAX_ROWS]
    adapter.drop_adapter(loaded)
    plain = encode.make_format(loaded.tokenizer, None)
    lengths = np.array([encode.answer_length(row, plain) for row in rows], dtype=np.float64)
    losses = []
    for done, candidate in enumerate(candidates, 1):
        losses.append(_row_losses(candidate.anchor, rows, loaded))
        count(done, len(candidates))
    without = next(k for k, candidate in enumerate(candidates) if candidate.anchor is None)
    scores = []
    for candidate, loss in zip(candidates, losses, strict=True):
        anchor = candidate.anchor
        low, high = None, None
        if anchor is not None:
            low, high = _difference(loss, losses[without], lengths, rows, seed)
        scores.append(
            AnchorScore(
                text="" if anchor is None else anchor.text,
                placement="user_prefix" if anchor is None else anchor.placement,
                source=candidate.source,
                tokens=count_tokens(anchor, loaded),
                loss=float(loss.sum() / lengths.sum()),
                low=low,
                high=high,
            )
        )
    return scores


def choose(scores: Sequence[AnchorScore]) -> int:
    """Return the place of the candidate with the lowest loss.

    Of equal ones (to 0.01 nats) the one with the fewest tokens is chosen; controls never are.
    """
    candidates = [k for k, score in enumerate(scores) if not score.is_control]
    return min(candidates, key=lambda k: (round(scores[k].loss, _TIE), scores[k].tokens, k))


def sort_scores(scores: Sequence[AnchorScore], chosen: int | None) -> tuple[AnchorScore, ...]:
    """Sort scores by loss, controls last, with the `chosen` one marked."""
    marked = [replace(score, chosen=k == chosen) for k, score in enumerate(scores)]
    return tuple(sorted(marked, key=lambda score: (score.is_control, score.loss)))


def _ids(text: str, loaded: LoadedModel) -> list[int]:
    tokenizer = loaded.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False)
    return list(encoded["input_ids"])


def _printable(text: str) -> str:
    """Return a decoded text on one line, without invisible characters and halves of characters."""
    shown = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in text)
    return " ".join(shown.split())


def _row_losses(anchor: Anchor | None, rows: Sequence[Example], loaded: LoadedModel) -> FloatArray:
    """Return the loss of each row's answer, in nats, asked with the anchor; kept in the cache."""
    file = _cache_file(anchor, rows, loaded)
    stored = store.recalled(file)
    if stored:
        return np.array(stored["nats"], dtype=np.float64)
    form = encode.make_format(loaded.tokenizer, anchor)
    nats, _ = generate.nats(loaded, [encode.final_answer(row, form) for row in rows])
    store.write_json(file, {"nats": nats.tolist()}, indent=None)
    return nats


def _cache_file(anchor: Anchor | None, rows: Sequence[Example], loaded: LoadedModel) -> Path:
    model = [loaded.fingerprint(), str(loaded.dtype), str(loaded.device)]
    key = store.fingerprint([store.code(), *model, rows, anchor])
    return store.cache_dir() / "anchors" / f"{key[:32]}.json"


def _difference(
    own: FloatArray, none: FloatArray, lengths: FloatArray, rows: Sequence[Example], seed: int
) -> tuple[float | None, float | None]:
    """Return the 95% interval of loss(with anchor) - loss(without), resampling content groups."""
    sums = np.stack([own - none, lengths], axis=1)
    groups = [row.group for row in rows]
    interval = intervals.bootstrap(sums, groups, intervals.ratio, draws=_DRAWS, seed=seed)
    return (None, None) if np.isnan(interval.low) else (interval.low, interval.high)
