"""Examples in the prompt instead of training: what a few rows bring a model whose weights stay as they are.

A row is scored as the last turn of a conversation whose earlier turns are training rows with their answers. How many is
tuned, as epochs are for trained arms. The shots come first, in one order for all rows, so that they are computed once.

TF-IDF and logistic regression: a rival without a language model for tasks whose answers are labels, and an eye for leakage.

On few rows of an easy topic the rival is hard to beat, and it costs milliseconds; a comparison without it flatters everyone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example, FloatArray, IntArray, Prediction, Task
from fulcrum.data import encode, filters

TRIED = (1, 2, 4, 8, 16, 32)


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """The row after the shots' turns. Its own system text stays first; those of the shots, mostly the same, are left out."""
    system = tuple(message for message in example.messages if message.role == "system")
    turns = tuple(
        message for row in (*shots, example) for message in row.messages if message.role != "system"
    )
    return replace(example, messages=system + turns)


def prompted(task: Task, number: int) -> Task:
    """The task with the first `number` of its training rows before every dev and test row."""
    shots = task.train[:number]
    dev, test = (tuple(with_shots(row, shots) for row in rows) for rows in (task.dev, task.test))
    return replace(task, dev=dev, test=test)


def numbers(tasks: Sequence[Task], form: encode.Format, context: int | None) -> list[int]:
    """The numbers of shots that can be tried: as many rows as every task has, in prompts that the model's context holds.

    Raises ConfigError where not even one fits.
    """
    most = min(len(task.train) for task in tasks)
    found = []
    for number in TRIED:
        if number > most or (context is not None and _longest(tasks, number, form) > context):
            break
        found.append(number)
    if not found:
        raise ConfigError(
            f"kshot: not even one example fits into the model's context of {context} tokens; leave this arm out"
        )
    return found


def _longest(tasks: Sequence[Task], number: int, form: encode.Format) -> int:
    """Tokens of the longest row with its shots, with its own answer or the longest that may be generated."""
    longest = 0
    for task in tasks:
        changed = prompted(task, number)
        rows = [encode.scored(row) for row in (*changed.dev, *changed.test)]
        encode.encode_ahead(rows, form)
        for tokens in (encode.encode(row, form) for row in rows):
            longest = max(longest, len(tokens), len(tokens) - tokens.n_loss + task.max_new_tokens)
    return longest


Length = Callable[[Example], int]  # answer tokens, by which a loss is divided in every arm


def classify(train: Sequence[Example], rows: Sequence[Example]) -> tuple[list[str], FloatArray]:
    """The likeliest label of each row, and the nats of its gold label: -log p, (rows,).

    Labels that no training row has share one n-th of the probability, n being training rows plus one (Laplace's rule), so
    that an unheard-of one costs much and not everything. Where training rows hold one label only, or no word, the most frequent
    label is all that is known.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels = [row.answer.strip() for row in train]
    known_share = len(train) / (len(train) + 1)
    vectors = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        tokenizer=filters.words,
        token_pattern=None,
        lowercase=False,
    )
    has_words = any(filters.words(_text(row)) for row in train)
    if len(set(labels)) < 2 or not has_words:
        model: Any = DummyClassifier(strategy="prior")
    else:
        model = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
    if not rows:
        return [], np.zeros(0)
    model.fit([_text(row) for row in train], labels)
    likely = model.predict_proba([_text(row) for row in rows]) * known_share
    place = {label: k for k, label in enumerate(model.classes_)}
    gold = [place.get(row.answer.strip()) for row in rows]
    known = np.array(
        [likely[k, at] if at is not None else 1 / (len(train) + 1) for k, at in enumerate(gold)]
    )
    return [str(model.classes_[k]) for k in likely.argmax(axis=1)], -np.log(
        np.maximum(known, np.finfo(np.float64).tiny)
    )


def _text(row: Example) -> str:
    return "\n".join(message.content for message in row.prompt)


def in_form_of(task: Sequence[str], general: Sequence[str], outputs: Sequence[str]) -> list[bool]:
    """Whether each output looks like an answer of the task rather than a general one, by its character n-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    model = make_pipeline(
        vectors, LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    )
    model.fit([*task, *general], [1] * len(task) + [0] * len(general))
    return [bool(kind) for kind in model.predict(list(outputs))]


def nats(
    train: Sequence[Example], rows: Sequence[Example], length: Length
) -> tuple[FloatArray, IntArray]:
    """Nats of each row's gold label, and its answer tokens; both (rows,)."""
    return classify(train, rows)[1], np.array([length(row) for row in rows], dtype=np.int64)


def predict(task: Task, length: Length) -> tuple[Prediction, ...]:
    """The label of every test row, from the task's training rows."""
    outputs, losses = classify(task.train, task.test)
    return tuple(
        Prediction(e.origin, e.group, e.question, e.answer, output, float(loss), length(e))
        for e, output, loss in zip(task.test, outputs, losses, strict=True)
    )
