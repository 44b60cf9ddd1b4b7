"""Two baselines that train no adapter: examples in the prompt, and a classifier of word counts.

Few-shot prompting: a row is scored as the last turn of a conversation whose earlier turns are
training rows with their answers. How many of these there are is tuned, as epochs are for trained
arms. All rows have the same examples in the same order, so that they are computed once.

TF-IDF with logistic regression, for tasks whose answers are labels: on a few rows of an easy topic
it is hard to beat and costs milliseconds, so every comparison should have it. The same classifier,
on characters, recognises answers in the task's form (leakage).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example, FloatArray, IntArray, Prediction, Task
from fulcrum.data import encode, filters

Length = Callable[[Example], int]  # answer tokens, by which a loss is divided in every arm

_SHOT_COUNTS = (1, 2, 4, 8, 16, 32)


# Examples in the prompt.


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Return the row after the turns of the shots.

    Its own system text stays first; those of the shots, mostly the same, are dropped.
    """
    system = [message for message in example.messages if message.role == "system"]
    turns = []
    for row in (*shots, example):
        turns += [message for message in row.messages if message.role != "system"]
    return replace(example, messages=(*system, *turns))


def add_shots(task: Task, number: int) -> Task:
    """Return the task with its first `number` training rows before every dev and test row."""
    shots = task.train[:number]
    dev = tuple(with_shots(row, shots) for row in task.dev)
    test = tuple(with_shots(row, shots) for row in task.test)
    return replace(task, dev=dev, test=test)


def shot_counts(tasks: Sequence[Task], form: encode.PromptFormat, context: int | None) -> list[int]:
    """Return the numbers of shots that can be tried.

    Every task must have that many training rows, and the model's context must hold the prompts.
    Raises ConfigError if it cannot hold even one shot.
    """
    fewest_rows = min(len(task.train) for task in tasks)
    possible = []
    for number in _SHOT_COUNTS:
        if number > fewest_rows:
            break
        if context is not None and _longest(tasks, number, form) > context:
            break
        possible.append(number)
    if not possible:
        raise ConfigError(
            f"kshot: not even one example fits into the model's context of {context} tokens; "
            "remove this arm"
        )
    return possible


def _longest(tasks: Sequence[Task], number: int, form: encode.PromptFormat) -> int:
    """Return the tokens of the longest row with its shots, and its own or the longest answer."""
    longest = 0
    for task in tasks:
        with_examples = add_shots(task, number)
        rows = [encode.scored(row) for row in (*with_examples.dev, *with_examples.test)]
        encode.encode_ahead(rows, form)
        for row in rows:
            tokens = encode.encode(row, form)
            generated = len(tokens) - tokens.n_loss + task.max_new_tokens
            longest = max(longest, len(tokens), generated)
    return longest


# Word counts.


def classify(train: Sequence[Example], rows: Sequence[Example]) -> tuple[list[str], FloatArray]:
    """Return the likeliest label of each row, and the loss of its gold label in nats, (rows,).

    With n training rows, labels that none of them has share 1 / (n + 1) of the probability
    (Laplace's rule), so that such a label costs much but not everything. If all training rows have
    one label, or none has a word, every row gets the most frequent label.
    """
    texts = [_text(row) for row in rows]
    if not texts:
        return [], np.zeros(0)
    model = _fit_classifier(train)
    places = {label: k for k, label in enumerate(model.classes_)}
    unseen = 1 / (len(train) + 1)
    likely = model.predict_proba(texts) * (len(train) / (len(train) + 1))
    gold = np.full(len(rows), unseen)
    for k, row in enumerate(rows):
        label = row.answer.strip()
        if label in places:
            gold[k] = likely[k, places[label]]
    outputs = [str(model.classes_[k]) for k in likely.argmax(axis=1)]
    return outputs, -np.log(np.maximum(gold, np.finfo(np.float64).tiny))


def _fit_classifier(train: Sequence[Example]) -> Any:
    """Return a scikit-learn model of the labels, or of their shares if it cannot do better."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [_text(row) for row in train]
    labels = [row.answer.strip() for row in train]
    has_words = any(filters.words(text) for text in texts)
    if len(set(labels)) < 2 or not has_words:
        return DummyClassifier(strategy="prior").fit(texts, labels)
    vectors = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        tokenizer=filters.words,
        token_pattern=None,
        lowercase=False,
    )
    return make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, labels)


def _text(row: Example) -> str:
    return "\n".join(message.content for message in row.prompt)


def losses(
    train: Sequence[Example], rows: Sequence[Example], length: Length
) -> tuple[FloatArray, IntArray]:
    """Return the loss of each row's gold label in nats, and its answer tokens; both (rows,)."""
    _, nats = classify(train, rows)
    return nats, np.array([length(row) for row in rows], dtype=np.int64)


def predict(task: Task, length: Length) -> tuple[Prediction, ...]:
    """Return the label of every test row, learned from the task's training rows."""
    outputs, nats = classify(task.train, task.test)
    predictions = []
    for row, output, loss in zip(task.test, outputs, nats, strict=True):
        predictions.append(
            Prediction(
                origin=row.origin,
                group=row.group,
                prompt=row.question,
                gold=row.answer,
                output=output,
                nll_sum=float(loss),
                n_tokens=length(row),
            )
        )
    return tuple(predictions)


# Leakage.


def look_like_task(
    task: Sequence[str], general: Sequence[str], outputs: Sequence[str]
) -> list[bool]:
    """Return whether each output looks like an answer of the task, not like a general one.

    A classifier of character n-grams decides, trained on answers of both kinds.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
    model = make_pipeline(vectors, regression)
    model.fit([*task, *general], [1] * len(task) + [0] * len(general))
    return [bool(is_task) for is_task in model.predict(list(outputs))]
