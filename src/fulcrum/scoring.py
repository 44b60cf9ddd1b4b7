"""An adapter (or none) -> predictions and scores on test rows, and the loss on general rows that shows forgetting."""

import sys
from collections.abc import Callable, Mapping, Sequence

from fulcrum import encode, generate, metrics
from fulcrum.model import LoadedModel
from fulcrum.records import Example, Prediction, Score, Task

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
    nats, counts = generate.nats(loaded, [encode.final_answer(example, form) for example in examples])
    outputs: Sequence[str | None] = [None] * len(examples)
    if metrics.needs_generation(task.metrics):
        prompts = [encode.prompt_ids(example.prompt, form) for example in examples]
        outputs = generate.generate(
            loaded, prompts, form, max_new_tokens=task.max_new_tokens, batch_tokens=batch_tokens,
            progress=None if count is None else lambda done: count(done, len(prompts)),
        )  # fmt: skip
    return tuple(
        Prediction(e.origin, e.group, e.question, e.answer, output, float(nat), int(tokens))
        for e, output, nat, tokens in zip(examples, outputs, nats, counts, strict=True)
    )


def general_loss(loaded: LoadedModel, held_out: Mapping[str, Sequence[Example]], *, draws: int) -> dict[str, Score]:
    """Loss on general rows that no arm was trained on, without any anchor: what an adapter forgot is its rise over base."""
    plain = encode.make_format(loaded.tokenizer, None)
    limit = loaded.context or sys.maxsize
    scores = {}
    for name, examples in held_out.items():
        tokens = [(e, t) for e in examples if len(t := encode.final_answer(e, plain)) <= limit]
        if not tokens:
            continue
        nats, counts = generate.nats(loaded, [t for _, t in tokens])
        rows = [
            Prediction(e.origin, e.group, "", "", None, float(nat), int(count))
            for (e, _), nat, count in zip(tokens, nats, counts, strict=True)
        ]
        (scores[name],) = metrics.score(rows, ["nll"], draws=draws)
    return scores
