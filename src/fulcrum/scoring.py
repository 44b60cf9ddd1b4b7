"""An adapter (or none) -> predictions and scores on test rows, and the loss on general rows that shows forgetting."""

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fulcrum import encode, generate, metrics, stats
from fulcrum.model import LoadedModel
from fulcrum.records import Difference, Example, Prediction, Score, Task

Count = Callable[[int, int], None]  # done, total


def predict(
    loaded: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    *,
    anchored: bool,
    batch_tokens: int,
    count: Count | None = None,
) -> tuple[Prediction, ...]:
    """The final answer's loss on every row, and the generated answer where a metric of the task needs one."""
    form = encode.make_format(loaded.tokenizer, task.anchor if anchored else None)
    nats, _ = generate.nats(loaded, [encode.final_answer(example, form) for example in examples])
    outputs: Sequence[str | None] = [None] * len(examples)
    if metrics.needs_generation(task.metrics):
        prompts = [encode.prompt_ids(example.prompt, form) for example in examples]
        outputs = generate.generate(
            loaded, prompts, form, max_new_tokens=task.max_new_tokens, batch_tokens=batch_tokens,
            progress=None if count is None else lambda done: count(done, len(prompts)),
        )  # fmt: skip
    return tuple(
        Prediction(e.origin, e.group, e.question, e.answer, output, float(nat), encode.answer_length(e, form))
        for e, output, nat in zip(examples, outputs, nats, strict=True)
    )


def general_predictions(
    loaded: LoadedModel, held_out: Mapping[str, Sequence[Example]], left_out: Callable[[str], None] | None = None
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
            left_out(f"general: {over} of {len(examples)} held-out rows ({name}) are over the model's context ({limit} tokens)")
        nats, counts = generate.nats(loaded, [t for _, t in tokens])
        if tokens:
            found[name] = tuple(
                Prediction(e.origin, e.group, e.question, e.answer, None, float(nat), int(number))
                for (e, _), nat, number in zip(tokens, nats, counts, strict=True)
            )
    return found


def outcomes(predictions: Sequence[Prediction], scores: Sequence[Score], metric: str) -> tuple[float, ...]:
    """One number a row whose mean (for `nll`: sum over tokens) is the metric; empty for metrics of a whole corpus."""
    if metric == "nll":
        return tuple(prediction.nll_sum for prediction in predictions)
    return next(score.outcomes for score in scores if score.metric == metric)


def paired(
    task: str, metric: str, arm: str, reference: str,
    own: Sequence[Sequence[float]], other: Sequence[Sequence[float]], rows: Sequence[Prediction],
) -> Difference | None:  # fmt: skip
    """Difference of two arms (arm minus reference) on the same `rows`, from their `outcomes` at each seed.

    An untrained arm has one cell, which stands for all seeds. Groups and seeds are resampled as `stats.paired_over_seeds`
    says; with one seed the interval is given this seed. None for metrics without an outcome a row.
    """
    n_seeds = max(len(own), len(other))
    if not all(map(len, own)) or not all(map(len, other)):
        return None
    mine, theirs = (np.asarray([values[i % len(values)] for i in range(n_seeds)], dtype=float) for values in (own, other))
    tokens = np.asarray([row.n_tokens for row in rows], dtype=float) if metric == "nll" else None
    differences, groups = mine - theirs, [row.group for row in rows]
    interval = stats.paired_over_seeds(differences, groups, denominators=tokens)
    if metric in metrics.SHARES and np.ptp(differences) == 0 and interval.estimate in (-1.0, 0.0, 1.0):
        interval = stats.certain_only(interval.estimate, len(set(groups)), lowest=-1.0)
    return Difference(
        task, metric, arm, reference, interval.estimate, interval.low, interval.high, n_seeds, metrics.HIGHER_IS_BETTER[metric]
    )
