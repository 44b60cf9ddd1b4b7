"""An adapter (or none) -> predictions and scores on test rows, and the loss on general rows that shows forgetting."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fulcrum.core.progress import Count, after
from fulcrum.core.types import Difference, Example, Prediction, Score, Task
from fulcrum.data import encode
from fulcrum.model import generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import intervals, metrics, row_savings


def predict(
    loaded: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    temperature: float | None = None,
    count: Count | None = None,
) -> tuple[Prediction, ...]:
    """The final answer's loss on every row, asked with the task's anchor (with a `temperature` at that too), and the generated
    answer where a metric of the task needs one."""
    form = encode.make_format(loaded.tokenizer, task.anchor)
    at = (1.0,) if temperature is None else (1.0, temperature)
    nats, _ = generate.nats_at(
        loaded, [encode.final_answer(example, form) for example in examples], at
    )
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
    return tuple(
        Prediction(
            e.origin,
            e.group,
            e.question,
            e.answer,
            output,
            float(own[0]),
            encode.answer_length(e, form),
            *own[1:].tolist(),
        )
        for e, output, own in zip(examples, outputs, nats, strict=True)
    )


def general_predictions(
    loaded: LoadedModel,
    held_out: Mapping[str, Sequence[Example]],
    left_out: Callable[[str], None] | None = None,
) -> dict[str, tuple[Prediction, ...]]:
    """Loss on general rows that no arm was trained on, without any anchor: what an adapter forgot is its rise over base.

    Rows over the model's context cannot be scored, and `left_out` is told how many there are (the same in every arm).
    """
    plain = encode.make_format(loaded.tokenizer, None)
    limit = loaded.context or sys.maxsize
    found: dict[str, tuple[Prediction, ...]] = {}
    for name, examples in held_out.items():
        tokens = [(e, t) for e in examples if len(t := encode.final_answer(e, plain)) <= limit]
        over = len(examples) - len(tokens)
        if over and left_out is not None:
            left_out(
                f"general: {over} of {len(examples)} held-out rows ({name}) are over the model's context ({limit} tokens)"
            )
        nats, counts = generate.nats(loaded, [t for _, t in tokens])
        if tokens:
            found[name] = tuple(
                Prediction(e.origin, e.group, e.question, e.answer, None, float(nat), int(number))
                for (e, _), nat, number in zip(tokens, nats, counts, strict=True)
            )
    return found


def outcomes(
    predictions: Sequence[Prediction], scores: Sequence[Score], metric: str
) -> tuple[float, ...]:
    """One number a row whose mean (for `nll`: sum over tokens) is the metric; empty for metrics of a whole corpus."""
    if metric == "nll":
        return tuple(prediction.nll_sum for prediction in predictions)
    return next(score.outcomes for score in scores if score.metric == metric)


def paired(
    task: str, metric: str, arm: str, reference: str,
    own: Sequence[Sequence[float]], other: Sequence[Sequence[float]], rows: Sequence[Sequence[Prediction]],
) -> Difference | None:  # fmt: skip
    """Difference of two arms (arm minus reference) on the same `rows`, from their `outcomes` at each seed.

    An untrained arm has one cell, which stands for all seeds. Groups and seeds are resampled as `intervals.paired_over_seeds`
    says; with one seed the interval is given this seed. Where each seed has test rows of its own, the seeds' differences
    hold what rows and seeds do: their interval is Student's, widened since folds train on each other's test rows. None for
    metrics without an outcome a row.
    """
    n_seeds = max(len(own), len(other))
    if not all(map(len, own)) or not all(map(len, other)):
        return None
    by_seed = [np.subtract(own[i % len(own)], other[i % len(other)]) for i in range(n_seeds)]
    tokens = [
        np.asarray([row.n_tokens if metric == "nll" else 1 for row in part], dtype=float)
        for part in rows
    ]
    if len({tuple(row.origin for row in part) for part in rows}) > 1:
        interval = intervals.seed_interval(
            [float(d.sum() / n.sum()) for d, n in zip(by_seed, tokens, strict=True)]
        )
        every = len({row.origin for part in rows for row in part})
        wider = math.sqrt(
            1 + n_seeds * row_savings.shared_variance(float(np.mean([*map(len, rows)])), every)
        )
        interval = intervals.Interval(
            interval[0], *(interval[0] + wider * (end - interval[0]) for end in interval[1:])
        )
    else:
        differences, groups = np.asarray(by_seed), [row.group for row in rows[0]]
        interval = intervals.paired_over_seeds(differences, groups, denominators=tokens[0])
        if (
            metric in metrics.SHARES
            and np.ptp(differences) == 0
            and interval.estimate in (-1.0, 0.0, 1.0)
        ):
            interval = intervals.certain_only(interval.estimate, len(set(groups)), lowest=-1.0)
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
