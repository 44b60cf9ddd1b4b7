"""Outputs and gold answers become scores: a value, its interval over content groups, and an outcome a row where one exists.

Every metric is a statistic of sums over rows (`fulcrum.intervals`): it turns each prediction into k numbers that add up, and a
function reads the value off the totals. So one bootstrap serves all, and corpus metrics are resampled as what they are,
not as means of rows.

Names. An asterisk marks metrics that need generated outputs; the scale is [0, 1] where nothing else is said.

- ``nll``: nats per token of the gold answer, sum over sum; lower is better. Its outcomes are nats per token of each row.
- ``exact_match`` *: output equals gold after Unicode NFC and stripping outer white space; nothing else is forgiven.
- ``token_f1`` *: bag-of-words F1 after SQuAD normalisation (lower case; ASCII punctuation and a/an/the dropped).
- ``rouge_l`` *: ROUGE-L F-measure as rouge-score computes it, no stemmer. Its tokens are ASCII letters and digits only.
- ``chrf`` *: mean of sentence chrF2 of sacrebleu, 0 to 100.
- ``bleu`` *: corpus BLEU of sacrebleu (tokenizer 13a, exponential smoothing), 0 to 100.
- ``json_valid`` *: share of outputs that are one strict JSON value and nothing else but outer white space.
- ``json_fields`` *: mean F1 over (path, value) leaves of output and gold JSON; an invalid output scores 0.
- ``accuracy``, ``balanced_accuracy``, ``mcc`` *: labels equal after NFC, stripping and case folding. An output that is no gold
  label is wrong, and counts as one further class ``other``. Balanced accuracy is the mean recall of the classes in the gold.

Invariant: every prediction given counts in every score; a row that cannot be scored is an error that names it.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, nearest
from fulcrum.core.types import Example, FloatArray, Prediction, Score
from fulcrum.stats import intervals


def score(
    predictions: Sequence[Prediction], metrics: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> tuple[Score, ...]:
    """Score all predictions by each metric, in the order asked, with 95% bootstrap intervals over content groups.

    With one content group `low` and `high` are nan (see `intervals.bootstrap`). `outcomes` is empty for the corpus metrics
    bleu, balanced_accuracy and mcc. Equal seeds draw equal groups for every metric.

    Raises `ConfigError` for an unknown metric, or one that needs outputs where there are none; `DataError` for no predictions,
    an unusable likelihood, or gold answers that the metric cannot read.
    """
    generation = needs_generation(metrics)
    if not predictions:
        raise DataError(f"no predictions to score by {', '.join(metrics)}: the test data are empty")
    if generation and (silent := [p.origin for p in predictions if p.output is None]):
        names = ", ".join(name for name in metrics if name != "nll")
        raise ConfigError(
            f"{len(silent)} of {len(predictions)} predictions have no output (the first: {silent[0]}), which {names} need; "
            "generate outputs, or ask for nll only"
        )
    groups = [p.group for p in predictions]
    return tuple(_score(name, predictions, groups, draws, seed) for name in metrics)


def needs_generation(metrics: Sequence[str]) -> bool:
    """Whether any of the metrics reads generated outputs; all but nll do. Raises `ConfigError` for an unknown name."""
    for name in metrics:
        if name not in METRICS:
            hint = nearest(name, METRICS)
            listing = "" if "known:" in hint else f" Known: {', '.join(METRICS)}"
            raise ConfigError(f"unknown metric {name!r}{hint}{listing}")
    return any(name != "nll" for name in metrics)


def check_gold(metrics: Sequence[str], examples: Sequence[Example]) -> None:
    """Raise DataError where a metric cannot read the gold answers: said before anything is trained."""
    rows = [_Row("", example.answer, example.origin) for example in examples]
    for name in metrics:
        if name in ("json_fields", "rouge_l"):
            list(_ROW[name](rows))


class _Row(NamedTuple):
    output: str
    gold: str
    origin: str


LABELS = ("accuracy", "balanced_accuracy", "mcc")  # of answers that are labels
SHARES = (
    "exact_match",
    "token_f1",
    "rouge_l",
    "json_valid",
    "json_fields",
    "accuracy",
)  # row values in [0, 1]


class _Sums(NamedTuple):
    """A metric before it is resampled: per-row statistics (rows, k), how to read a value off them, and outcomes a row."""

    sums: FloatArray
    statistic: Callable[[FloatArray], FloatArray]
    outcomes: tuple[float, ...] = ()


def _score(
    name: str, predictions: Sequence[Prediction], groups: Sequence[str], draws: int, seed: int
) -> Score:
    if name == "nll":
        parts = _nll(predictions)
    else:
        rows = [_Row(p.output or "", p.gold, p.origin) for p in predictions]
        parts = _CORPUS[name](rows) if name in _CORPUS else _mean(_ROW[name](rows))
    interval = intervals.bootstrap(parts.sums, groups, parts.statistic, draws=draws, seed=seed)
    n_groups = len(set(groups))
    if name in SHARES and interval.estimate in (0.0, 1.0):
        interval = intervals.certain_only(interval.estimate, n_groups)
    return Score(
        name, *interval, len(predictions), n_groups, HIGHER_IS_BETTER[name], parts.outcomes
    )


def _mean(values: Iterable[float]) -> _Sums:
    outcomes = tuple(float(value) for value in values)
    return _Sums(np.column_stack([outcomes, np.ones(len(outcomes))]), intervals.ratio, outcomes)


def _nll(predictions: Sequence[Prediction]) -> _Sums:
    for p in predictions:
        if p.n_tokens < 1 or not math.isfinite(p.nll_sum):
            raise DataError(
                f"{p.origin}: nll needs a finite sum over at least one answer token, got {p.nll_sum} over {p.n_tokens}; "
                "an empty gold answer or a diverged model gives this"
            )
    sums = np.array([(p.nll_sum, p.n_tokens) for p in predictions], dtype=np.float64)
    return _Sums(sums, intervals.ratio, tuple(p.nll_sum / p.n_tokens for p in predictions))


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _exact_match(rows: Sequence[_Row]) -> Iterable[float]:
    return (_canonical(row.output) == _canonical(row.gold) for row in rows)


def _squad_tokens(text: str) -> list[str]:
    """Normalise as the SQuAD evaluation script does (Rajpurkar et al. 2016), in its order."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _token_f1(rows: Sequence[_Row]) -> Iterable[float]:
    for row in rows:
        output, gold = _squad_tokens(row.output), _squad_tokens(row.gold)
        overlap = (Counter(output) & Counter(gold)).total()
        # Nothing left of both is agreement, of one a miss (SQuAD 2.0).
        yield 2 * overlap / (len(output) + len(gold)) if output or gold else 1.0


def _rouge_l(rows: Sequence[_Row]) -> Iterable[float]:
    if not any(re.search("[a-z0-9]", row.gold.lower()) for row in rows):
        where = f"no gold answer has any (the first: {rows[0].origin})"
        raise DataError(
            f"rouge_l reads ASCII letters and digits only, and {where}: it would always be 0. Use chrf"
        )
    return (
        _lcs_f1(*(re.findall("[a-z0-9]+", text.lower()) for text in (row.output, row.gold)))
        for row in rows
    )


def _lcs_f1(output: Sequence[str], gold: Sequence[str]) -> float:
    """F-measure of the longest common subsequence (Lin 2004): 2 L / (m + n)."""
    longest = [0] * (len(gold) + 1)  # of the output so far and of the gold up to each word
    for word in output:
        before = longest
        longest = [0]
        for k, other in enumerate(gold):
            longest.append(before[k] + 1 if word == other else max(before[k + 1], longest[k]))
    precision, recall = longest[-1] / max(len(output), 1), longest[-1] / max(len(gold), 1)
    return 2 * precision * recall / (precision + recall) if longest[-1] else 0.0


def _chrf(rows: Sequence[_Row]) -> Iterable[float]:
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    return (chrf.sentence_score(row.output, [row.gold]).score for row in rows)


def _bleu(rows: Sequence[_Row]) -> _Sums:
    from sacrebleu.metrics import BLEU

    # effective_order changes a sentence's score, not its counts, and spares a warning about sentence scores.
    bleu = BLEU(tokenize="13a", effective_order=True)
    sentences = [bleu.sentence_score(row.output, [row.gold]) for row in rows]
    orders = len(sentences[0].counts)
    sums = np.array(
        [(*s.counts, *s.totals, s.sys_len, s.ref_len) for s in sentences], dtype=np.float64
    )

    def corpus(totals: FloatArray) -> FloatArray:
        draws = totals.astype(np.int64).tolist()
        scores = (
            BLEU.compute_bleu(
                d[:orders], d[orders:-2], d[-2], d[-1], smooth_method="exp", max_ngram_order=orders
            )
            for d in draws
        )
        return np.array([s.score for s in scores])

    return _Sums(sums, corpus)


def _parse(text: str) -> object:
    return store.strict_json(_canonical(text))


def _leaves(value: object) -> set[tuple[object, ...]]:
    """Flatten JSON to (path, kind, value); list positions and empty containers count. No recursion: outputs can be deep."""
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
            # The kind keeps true apart from 1, which Python holds equal; 1 and 1.0 are one JSON number.
            leaves.add(
                (path, "number" if type(node) in (int, float) else type(node).__name__, node)
            )
    return leaves


def _json_valid(rows: Sequence[_Row]) -> Iterable[float]:
    for row in rows:
        try:
            _parse(row.output)
            yield 1.0
        except ValueError:
            yield 0.0


def _json_fields(rows: Sequence[_Row]) -> Iterable[float]:
    for row in rows:
        try:
            gold = _leaves(_parse(row.gold))
        except ValueError as error:
            where = (
                f"{row.origin}: json_fields needs JSON as the gold answer, got {row.gold[:80]!r}"
            )
            raise DataError(f"{where} ({error})") from None
        try:
            output = _leaves(_parse(row.output))
        except ValueError:
            yield 0.0
            continue
        yield 2 * len(output & gold) / (len(output) + len(gold))


def _label(text: str) -> str:
    return _canonical(text).casefold()


def _accuracy(rows: Sequence[_Row]) -> Iterable[float]:
    return (_label(row.output) == _label(row.gold) for row in rows)


def _label_sums(rows: Sequence[_Row]) -> tuple[FloatArray, int]:
    """Count for each row [right by class | gold by class | output by class and other]: (rows, 3C + 1), and C.

    Balanced accuracy and MCC need these margins of the confusion matrix only, not its C² cells.
    """
    classes = {label: i for i, label in enumerate(sorted({_label(row.gold) for row in rows}))}
    n = len(classes)
    gold = np.array([classes[_label(row.gold)] for row in rows])
    output = np.array([classes.get(_label(row.output), n) for row in rows])
    truth, answer = np.eye(n)[gold], np.eye(n + 1)[output]
    return np.hstack([truth * answer[:, :n], truth, answer]), n


def _balanced_accuracy(rows: Sequence[_Row]) -> _Sums:
    sums, n = _label_sums(rows)

    def mean_recall(totals: FloatArray) -> FloatArray:
        right, gold = totals[:, :n], totals[:, n : 2 * n]
        # A class that a draw happens to leave out has no recall there, and is left out as scikit-learn does.
        recall = right / np.maximum(gold, 1)
        value: FloatArray = recall.sum(axis=1) / (gold > 0).sum(axis=1)
        return value

    return _Sums(sums, mean_recall)


def _mcc(rows: Sequence[_Row]) -> _Sums:
    sums, n = _label_sums(rows)

    def correlation(totals: FloatArray) -> FloatArray:
        """Multi-class R_K (Gorodkin 2004); 0 where gold or output is constant, as in scikit-learn."""
        right, gold, output = totals[:, :n].sum(axis=1), totals[:, n : 2 * n], totals[:, 2 * n :]
        size = gold.sum(axis=1)
        covariance = right * size - (gold * output[:, :n]).sum(axis=1)
        spread = (size**2 - (gold**2).sum(axis=1)) * (size**2 - (output**2).sum(axis=1))
        value: FloatArray = np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0)
        return value

    return _Sums(sums, correlation)


_ROW: Mapping[str, Callable[[Sequence[_Row]], Iterable[float]]] = {
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

METRICS: tuple[str, ...] = ("nll", *_ROW, *_CORPUS)
HIGHER_IS_BETTER: Mapping[str, bool] = {name: name != "nll" for name in METRICS}
HAS_OUTCOMES: Mapping[str, bool] = {
    name: name not in _CORPUS for name in METRICS
}  # a value for each row
