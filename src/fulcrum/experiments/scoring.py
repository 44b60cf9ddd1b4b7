"""Score whatever adapter is on the model (or none), and compare two arms' scores row by row.

Test rows give predictions with losses and, if a metric needs them, generated answers. Held-out
general rows give losses: how much they rise over the base model's is what an adapter forgot.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fulcrum.core.progress import Count, after
from fulcrum.core.types import Difference, Example, FloatArray, Prediction, Score, Task
from fulcrum.data import encode
from fulcrum.model import generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import intervals, metrics, row_savings
from fulcrum.stats.intervals import Interval


def predict(
    loaded: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    temperature: float | None = None,
    count: Count | None = None,
) -> tuple[Prediction, ...]:
    """Return each row's loss of its final answer, and an answer if a metric of the task needs one.

    Rows are asked with the task's anchor. With a `temperature` they have their loss at it too.
    """
    form = encode.make_format(loaded.tokenizer, task.anchor)
    answers = [encode.final_answer(example, form) for example in examples]
    temperatures = (1.0,) if temperature is None else (1.0, temperature)
    nats, _ = generate.losses_at(loaded, answers, temperatures)
    outputs: Sequence[str | None] = [None] * len(examples)
    if metrics.needs_generation(task.metrics):
        prompts = [encode.prompt_ids(example.prompt, form) for example in examples]
        outputs = generate.generate(
            loaded,
            prompts,
            form,
            max_new_tokens=task.max_new_tokens,
            batch_tokens=batch_tokens,
            progress=None if count is None else after(0, len(prompts), count),
        )
    predictions = []
    for example, output, losses in zip(examples, outputs, nats, strict=True):
        predictions.append(
            Prediction(
                origin=example.origin,
                group=example.group,
                prompt=example.question,
                gold=example.answer,
                output=output,
                nll_sum=float(losses[0]),
                n_tokens=encode.answer_length(example, form),
                tempered=None if temperature is None else float(losses[1]),
            )
        )
    return tuple(predictions)


def general_predictions(
    loaded: LoadedModel,
    held_out: Mapping[str, Sequence[Example]],
    warn: Callable[[str], None] | None = None,
) -> dict[str, tuple[Prediction, ...]]:
    """Return the losses on general rows that no arm was trained on, without an anchor, by source.

    Rows longer than the model's context are skipped, the same in every arm; `warn` is called with
    their number.
    """
    plain = encode.make_format(loaded.tokenizer, None)
    limit = loaded.context or sys.maxsize
    by_source: dict[str, tuple[Prediction, ...]] = {}
    for name, examples in held_out.items():
        fitting = []
        for example in examples:
            tokens = encode.final_answer(example, plain)
            if len(tokens) <= limit:
                fitting.append((example, tokens))
        skipped = len(examples) - len(fitting)
        if skipped and warn is not None:
            warn(
                f"general: {skipped} of {len(examples)} held-out rows ({name}) are over the "
                f"model's context ({limit} tokens)"
            )
        nats, counts = generate.nats(loaded, [tokens for _, tokens in fitting])
        predictions = []
        for (row, _), loss, number in zip(fitting, nats, counts, strict=True):
            predictions.append(
                Prediction(
                    origin=row.origin,
                    group=row.group,
                    prompt=row.question,
                    gold=row.answer,
                    output=None,
                    nll_sum=float(loss),
                    n_tokens=int(number),
                )
            )
        if predictions:
            by_source[name] = tuple(predictions)
    return by_source


def outcomes(
    predictions: Sequence[Prediction], scores: Sequence[Score], metric: str
) -> tuple[float, ...]:
    """Return one number per row whose mean is the metric (for `nll`: its sum over tokens).

    It is empty for metrics of a whole corpus.
    """
    if metric == "nll":
        return tuple(prediction.nll_sum for prediction in predictions)
    return next(score.outcomes for score in scores if score.metric == metric)


def paired(
    task: str,
    metric: str,
    arm: str,
    reference: str,
    own: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    rows: Sequence[Sequence[Prediction]],
) -> Difference | None:
    """Return the difference of two arms (arm minus reference) on the same rows.

    `own` and `other` are their `outcomes`, by seed and row; `rows` are the arm's predictions, by
    seed. An untrained arm has one entry, which is used for all seeds. Returns None for metrics that
    have no outcomes.
    """
    n_seeds = max(len(own), len(other))
    if not all(map(len, own)) or not all(map(len, other)):
        return None
    differences = []
    for k in range(n_seeds):
        differences.append(np.subtract(own[k % len(own)], other[k % len(other)]))
    tested = {tuple(row.origin for row in part) for part in rows}
    if len(tested) > 1:
        interval = _interval_across_folds(metric, differences, rows)
    else:
        interval = _interval_on_shared_rows(metric, differences, rows[0])
    return Difference(
        task,
        metric,
        arm,
        reference,
        interval.estimate,
        interval.low,
        interval.high,
        n_seeds,
        metrics.HIGHER_IS_BETTER[metric],
    )


def _interval_across_folds(
    metric: str, differences: Sequence[FloatArray], rows: Sequence[Sequence[Prediction]]
) -> Interval:
    """Return Student's interval over seeds that have test rows of their own.

    The seeds' differences then vary with both rows and seeds. The interval is widened since the
    folds train on each other's test rows.
    """
    means = []
    for difference, part in zip(differences, rows, strict=True):
        means.append(float(difference.sum() / _weights(part, metric).sum()))
    estimate, low, high = intervals.seed_interval(means)
    test_rows = float(np.mean([len(part) for part in rows]))
    origins = {row.origin for part in rows for row in part}
    shared = row_savings.shared_variance(test_rows, len(origins))
    wider = math.sqrt(1 + len(differences) * shared)
    low = estimate + wider * (low - estimate)
    high = estimate + wider * (high - estimate)
    return Interval(estimate, low, high)


def _interval_on_shared_rows(
    metric: str, differences: Sequence[FloatArray], rows: Sequence[Prediction]
) -> Interval:
    """Return the interval over content groups and seeds (`intervals.paired_over_seeds`).

    With one seed it holds for this seed only.
    """
    matrix = np.asarray(differences)
    groups = [row.group for row in rows]
    weights = _weights(rows, metric)
    interval = intervals.paired_over_seeds(matrix, groups, denominators=weights)
    is_constant = np.ptp(matrix) == 0 and interval.estimate in (-1.0, 0.0, 1.0)
    if metric in metrics.SHARES and is_constant:
        return intervals.certain_only(interval.estimate, len(set(groups)), lowest=-1.0)
    return interval


def _weights(rows: Sequence[Prediction], metric: str) -> FloatArray:
    """Return the answer tokens of each row for the loss, else ones: float64, (rows,)."""
    if metric == "nll":
        return np.asarray([row.n_tokens for row in rows], dtype=float)
    return np.ones(len(rows))
