"""Metrics: outputs and gold answers in, scores out.

A score is a value with its interval over content groups, and an outcome by row if one exists.
Every metric is a statistic of sums over rows (`fulcrum.stats.intervals`): it turns each prediction
into k numbers that add up, and a function reads the value off the totals. So one bootstrap serves
all, and corpus metrics are resampled as what they are, not as means of rows.

Metrics with an asterisk need generated outputs; the scale is [0, 1] unless another is given.

- ``nll``: loss (nats) per token of the gold answer, sum over sum; lower is better. Its outcomes are
  the loss per token of each row.
- ``exact_match`` *: output equals gold after Unicode NFC and stripping outer white space; nothing
  else is forgiven.
- ``token_f1`` *: bag-of-words F1 after SQuAD normalisation (lower case; ASCII punctuation and
  a/an/the dropped).
- ``rouge_l`` *: ROUGE-L F-measure as rouge-score computes it, no stemmer. Its tokens are ASCII
  letters and digits only.
- ``chrf`` *: mean of sentence chrF2 of sacrebleu, 0 to 100.
- ``bleu`` *: corpus BLEU of sacrebleu (tokenizer 13a, exponential smoothing), 0 to 100.
- ``json_valid`` *: share of outputs that are one strict JSON value and nothing else but outer white
  space.
- ``json_fields`` *: mean F1 over (path, value) leaves of output and gold JSON; an invalid output
  scores 0.
- ``accuracy``, ``balanced_accuracy``, ``mcc`` *: labels equal after NFC, stripping and case
  folding. An output that is no gold label is wrong, and counts as one further class ``other``.
  Balanced accuracy is the mean recall of the classes in the gold.

Invariant: every prediction counts in every score; a row that cannot be scored is an error that
names it.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, nearest
from fulcrum.core.types import Example, FloatArray, Prediction, Score
from fulcrum.stats import intervals

if TYPE_CHECKING:
    from sacrebleu.metrics import CHRF

LABELS = ("accuracy", "balanced_accuracy", "mcc")  # metrics of answers that are labels
# Metrics whose values by row are in [0, 1].
SHARES = ("exact_match", "token_f1", "rouge_l", "json_valid", "json_fields", "accuracy")


def score(
    predictions: Sequence[Prediction], metrics: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> tuple[Score, ...]:
    """Score all predictions by each metric, in order, with 95% bootstrap intervals over groups.

    With one content group `low` and `high` are nan (see `intervals.bootstrap`). `outcomes` is empty
    for the corpus metrics bleu, balanced_accuracy and mcc. Equal seeds draw equal groups for every
    metric.

    Raises `ConfigError` for an unknown metric, or one that needs outputs if there are none;
    `DataError` for no predictions, an unusable likelihood, or gold answers that the metric cannot
    read.
    """
    needs_outputs = needs_generation(metrics)
    if not predictions:
        raise DataError(f"no predictions to score by {', '.join(metrics)}: the test data are empty")
    silent = [p.origin for p in predictions if p.output is None]
    if needs_outputs and silent:
        names = ", ".join(name for name in metrics if name != "nll")
        raise ConfigError(
            f"{len(silent)} of {len(predictions)} predictions have no output (the first: "
            f"{silent[0]}), which {names} need; generate outputs, or ask for nll only"
        )
    return tuple(_score(name, predictions, draws, seed) for name in metrics)


def needs_generation(metrics: Sequence[str]) -> bool:
    """Return whether any of the metrics reads generated outputs; all but nll do.

    Raises `ConfigError` for an unknown name.
    """
    for name in metrics:
        if name not in METRICS:
            hint = nearest(name, METRICS)
            listing = "" if "known:" in hint else f" Known: {', '.join(METRICS)}"
            raise ConfigError(f"unknown metric {name!r}{hint}{listing}")
    return any(name != "nll" for name in metrics)


def check_gold(metrics: Sequence[str], examples: Sequence[Example]) -> None:
    """Raise DataError if a metric cannot read the gold answers, before anything is trained."""
    rows = [_Row("", example.answer, example.origin) for example in examples]
    for name in metrics:
        if name == "rouge_l":
            _check_rouge_gold(rows)
        elif name == "json_fields":
            for row in rows:
                _gold_leaves(row)


class _Row(NamedTuple):
    output: str
    gold: str
    origin: str


class _Sums(NamedTuple):
    """A metric before it is resampled.

    sums: (rows, k), statistics of each row that add up
    statistic: maps totals (draws, k) to values (draws,)
    outcomes: (rows,) or empty
    """

    sums: FloatArray
    statistic: Callable[[FloatArray], FloatArray]
    outcomes: tuple[float, ...] = ()


def _score(name: str, predictions: Sequence[Prediction], draws: int, seed: int) -> Score:
    groups = [p.group for p in predictions]
    parts = _nll(predictions) if name == "nll" else _output_sums(name, predictions)
    interval = intervals.bootstrap(parts.sums, groups, parts.statistic, draws=draws, seed=seed)
    n_groups = len(set(groups))
    if name in SHARES and interval.estimate in (0.0, 1.0):
        interval = intervals.certain_only(interval.estimate, n_groups)
    return Score(
        metric=name,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        n=len(predictions),
        n_groups=n_groups,
        higher_is_better=HIGHER_IS_BETTER[name],
        outcomes=parts.outcomes,
    )


def _nll(predictions: Sequence[Prediction]) -> _Sums:
    for p in predictions:
        if p.n_tokens < 1 or not math.isfinite(p.nll_sum):
            raise DataError(
                f"{p.origin}: nll needs a finite sum over at least one answer token, "
                f"got {p.nll_sum} over {p.n_tokens}; an empty gold answer or a diverged model "
                "gives this"
            )
    sums = np.array([(p.nll_sum, p.n_tokens) for p in predictions], dtype=np.float64)
    return _Sums(sums, intervals.ratio, tuple(p.nll_sum / p.n_tokens for p in predictions))


def _output_sums(name: str, predictions: Sequence[Prediction]) -> _Sums:
    rows = [_Row(p.output or "", p.gold, p.origin) for p in predictions]
    if name in _CORPUS:
        return _CORPUS[name](rows)
    if name == "rouge_l":
        _check_rouge_gold(rows)
    outcomes = tuple(_BY_ROW[name](row) for row in rows)
    sums = np.column_stack([outcomes, np.ones(len(outcomes))])
    return _Sums(sums, intervals.ratio, outcomes)


# Texts.


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _exact_match(row: _Row) -> float:
    return float(_canonical(row.output) == _canonical(row.gold))


def _token_f1(row: _Row) -> float:
    output = _squad_tokens(row.output)
    gold = _squad_tokens(row.gold)
    if not output and not gold:
        return 1.0  # nothing left of both is agreement, of one a miss (SQuAD 2.0)
    overlap = (Counter(output) & Counter(gold)).total()
    return 2 * overlap / (len(output) + len(gold))


def _squad_tokens(text: str) -> list[str]:
    """Normalise as the SQuAD evaluation script does (Rajpurkar et al. 2016), in its order."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _check_rouge_gold(rows: Sequence[_Row]) -> None:
    if not any(_rouge_tokens(row.gold) for row in rows):
        raise DataError(
            "rouge_l reads ASCII letters and digits only, and no gold answer has any (the first: "
            f"{rows[0].origin}): it would always be 0. Use chrf"
        )


def _rouge_l(row: _Row) -> float:
    """Return the F-measure of the longest common subsequence (Lin 2004): 2 L / (m + n)."""
    output = _rouge_tokens(row.output)
    gold = _rouge_tokens(row.gold)
    longest = [0] * (len(gold) + 1)  # of the output so far and of the gold up to each word
    for word in output:
        before = longest
        longest = [0]
        for k, other in enumerate(gold):
            longest.append(before[k] + 1 if word == other else max(before[k + 1], longest[k]))
    if not longest[-1]:
        return 0.0
    precision = longest[-1] / len(output)
    recall = longest[-1] / len(gold)
    return 2 * precision * recall / (precision + recall)


def _rouge_tokens(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _chrf(row: _Row) -> float:
    value: float = _chrf_scorer().sentence_score(row.output, [row.gold]).score
    return value


@cache
def _chrf_scorer() -> "CHRF":
    from sacrebleu.metrics import CHRF

    return CHRF()


def _bleu(rows: Sequence[_Row]) -> _Sums:
    from sacrebleu.metrics import BLEU

    # effective_order changes a sentence's score, not its counts, and spares a warning about
    # sentence scores.
    bleu = BLEU(tokenize="13a", effective_order=True)
    sums = []
    for row in rows:
        sentence = bleu.sentence_score(row.output, [row.gold])
        lengths = (sentence.sys_len, sentence.ref_len)
        sums.append((*sentence.counts, *sentence.totals, *lengths))
    orders = bleu.max_ngram_order

    def corpus(totals: FloatArray) -> FloatArray:
        values = []
        for draw in totals.astype(np.int64).tolist():
            result = BLEU.compute_bleu(
                draw[:orders],
                draw[orders:-2],
                *draw[-2:],
                smooth_method="exp",
                max_ngram_order=orders,
            )
            values.append(result.score)
        return np.array(values)

    return _Sums(np.array(sums, dtype=np.float64), corpus)


# JSON.


def _json_valid(row: _Row) -> float:
    return float(_output_leaves(row) is not None)


def _json_fields(row: _Row) -> float:
    gold = _gold_leaves(row)
    output = _output_leaves(row)
    if output is None:
        return 0.0
    return 2 * len(output & gold) / (len(output) + len(gold))


def _gold_leaves(row: _Row) -> set[tuple[object, ...]]:
    try:
        return _leaves(_parse(row.gold))
    except ValueError as error:
        raise DataError(
            f"{row.origin}: json_fields needs JSON as the gold answer, got {row.gold[:80]!r} "
            f"({error})"
        ) from None


def _output_leaves(row: _Row) -> set[tuple[object, ...]] | None:
    """Return the leaves of an output; None if it is no JSON."""
    try:
        return _leaves(_parse(row.output))
    except ValueError:
        return None


def _parse(text: str) -> object:
    return store.strict_json(_canonical(text))


def _leaves(value: object) -> set[tuple[object, ...]]:
    """Flatten JSON to (path, kind, value); list positions and empty containers count.

    There is no recursion: outputs can be deep.
    """
    leaves: set[tuple[object, ...]] = set()
    stack: list[tuple[tuple[str | int, ...], object]] = [((), value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and node:
            stack.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list) and node:
            stack.extend(((*path, i), child) for i, child in enumerate(node))
        elif isinstance(node, dict | list):
            leaves.add((path, type(node).__name__))
        else:
            # The kind keeps true apart from 1, which Python holds equal; 1 and 1.0 are one JSON
            # number.
            kind = "number" if type(node) in (int, float) else type(node).__name__
            leaves.add((path, kind, node))
    return leaves


# Labels.


def _label(text: str) -> str:
    return _canonical(text).casefold()


def _accuracy(row: _Row) -> float:
    return float(_label(row.output) == _label(row.gold))


def _label_sums(rows: Sequence[_Row]) -> tuple[FloatArray, int]:
    """Return (rows, 3C + 1) and C: right by class | gold by class | output by class and other.

    Balanced accuracy and MCC need these margins of the confusion matrix only, not its C² cells.
    """
    labels = [_label(row.gold) for row in rows]
    classes = {label: i for i, label in enumerate(sorted(set(labels)))}
    n = len(classes)
    gold = np.zeros((len(rows), n))
    output = np.zeros((len(rows), n + 1))
    for k, row in enumerate(rows):
        gold[k, classes[labels[k]]] = 1
        output[k, classes.get(_label(row.output), n)] = 1
    return np.hstack([gold * output[:, :n], gold, output]), n


def _balanced_accuracy(rows: Sequence[_Row]) -> _Sums:
    sums, n = _label_sums(rows)

    def mean_recall(totals: FloatArray) -> FloatArray:
        right = totals[:, :n]
        gold = totals[:, n : 2 * n]
        # A class that a draw happens to lack has no recall there; scikit-learn skips it too.
        recall = right / np.maximum(gold, 1)
        value: FloatArray = recall.sum(axis=1) / (gold > 0).sum(axis=1)
        return value

    return _Sums(sums, mean_recall)


def _mcc(rows: Sequence[_Row]) -> _Sums:
    sums, n = _label_sums(rows)

    def correlation(totals: FloatArray) -> FloatArray:
        """Return multi-class R_K (Gorodkin 2004); as in scikit-learn 0 if either is constant."""
        right = totals[:, :n].sum(axis=1)
        gold = totals[:, n : 2 * n]
        output = totals[:, 2 * n :]
        size = gold.sum(axis=1)
        covariance = right * size - (gold * output[:, :n]).sum(axis=1)
        spread = (size**2 - (gold**2).sum(axis=1)) * (size**2 - (output**2).sum(axis=1))
        value: FloatArray = np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)
        return value

    return _Sums(sums, correlation)


_BY_ROW: Mapping[str, Callable[[_Row], float]] = {
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
    "json_valid": _json_valid,
    "json_fields": _json_fields,
    "accuracy": _accuracy,
}
_CORPUS: Mapping[str, Callable[[Sequence[_Row]], _Sums]] = {
    "bleu": _bleu,
    "balanced_accuracy": _balanced_accuracy,
    "mcc": _mcc,
}

METRICS: tuple[str, ...] = ("nll", *_BY_ROW, *_CORPUS)
HIGHER_IS_BETTER: Mapping[str, bool] = {name: name != "nll" for name in METRICS}
# Whether a metric has a value for each row.
HAS_OUTCOMES: Mapping[str, bool] = {name: name not in _CORPUS for name in METRICS}
