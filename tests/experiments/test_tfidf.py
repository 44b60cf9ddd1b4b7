"""TF-IDF and logistic regression: scikit-learn itself is the oracle; what was never seen has a
known price."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from fulcrum.core.types import Example, Message, Task
from fulcrum.experiments import baselines

TRAIN = [
    ("where is my parcel", "delivery"),
    ("my parcel is late", "delivery"),
    ("I want my money", "refund"),
    ("money back please", "refund"),
    ("cannot sign in", "login"),
]
ASKED = ["my parcel", "the money", "sign in"]


def row(text: str, label: str, *, system: str | None = None) -> Example:
    turns = [Message("system", system)] * bool(system) + [
        Message("user", text),
        Message("assistant", label),
    ]
    return Example(tuple(turns), text, f"rows:{text}")


def rows(pairs: list[tuple[str, str]]) -> list[Example]:
    return [row(text, label) for text, label in pairs]


def oracle(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """scikit-learn's labels and probabilities (rows, labels), counts and weights apart."""
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    weigh = TfidfTransformer(sublinear_tf=True)
    seen = weigh.fit_transform(counts.fit_transform([text for text, _ in TRAIN]))
    model = LogisticRegression(C=10.0, max_iter=1000).fit(seen, [label for _, label in TRAIN])
    return list(model.classes_), model.predict_proba(weigh.transform(counts.transform(texts)))


@pytest.mark.parametrize("label", ["delivery", "login", "refund", "refund "])
def test_labels_and_their_nats_are_scikit_learns(label: str) -> None:
    """Of five rows: five sixths of the probability are the known labels'."""
    labels, likely = oracle(ASKED)
    found, nats = baselines.classify(rows(TRAIN), rows([(text, label) for text in ASKED]))
    assert found == ["delivery", "refund", "login"] == [labels[k] for k in likely.argmax(axis=1)]
    np.testing.assert_allclose(
        nats, -np.log(likely[:, labels.index(label.strip())] * 5 / 6), rtol=1e-9
    )


def test_an_unseen_label_costs_what_laplace_says() -> None:
    found, nats = baselines.classify(
        rows(TRAIN), rows([("my parcel", "complaint"), ("the money", "praise")])
    )
    assert found == ["delivery", "refund"]
    np.testing.assert_allclose(nats, [np.log(6), np.log(6)])  # five rows and one


def test_each_rows_probabilities_sum_to_one() -> None:
    labels = ("delivery", "refund", "login", "never heard of")
    for text in (*ASKED, "", "words that no row has"):
        _, nats = baselines.classify(rows(TRAIN), rows([(text, label) for label in labels]))
        assert float(np.exp(-nats).sum()) == pytest.approx(1)


def test_all_of_the_prompt_is_read_and_nothing_of_the_answer() -> None:
    train = [row("a", "yes", system="up"), row("a", "no", system="down")]
    assert baselines.classify(train, [row("a", "no", system="up"), row("a", "yes", system="down")])[
        0
    ] == ["yes", "no"]


@pytest.mark.parametrize(
    "train", [TRAIN[:2], [("?", "delivery"), ("!", "delivery"), ("...", "delivery")]]
)
def test_where_nothing_can_be_told_apart_the_most_frequent_label_is_said(train: list) -> None:
    """One label, or prompts without a word: its share times n / (n + 1), and 1 / (n + 1) for what
    is unheard of."""
    outputs, nats = baselines.classify(
        rows(train), rows([("my parcel", "delivery"), ("the money", "complaint")])
    )
    n = len(train)
    assert outputs == ["delivery", "delivery"]
    np.testing.assert_allclose(nats, [-np.log(n / (n + 1)), np.log(n + 1)])


def test_prompts_without_words_leave_the_shares_of_the_labels() -> None:
    outputs, nats = baselines.classify(
        rows([("?", "a"), ("!", "a"), (".", "b")]), rows([("-", "b")])
    )
    assert outputs == ["a"]
    np.testing.assert_allclose(nats, [-np.log(1 / 3 * 3 / 4)])


def test_no_rows_are_no_error() -> None:
    assert baselines.classify(rows(TRAIN), [])[0] == []


def test_predictions_are_divided_by_answer_tokens_as_in_every_arm() -> None:
    test = [row("my parcel", " delivery"), row("the money", "complaint")]
    task = Task("task", tuple(rows(TRAIN)), (), tuple(test))
    found = baselines.predict(task, lambda example: len(example.answer))
    outputs, nats = baselines.classify(task.train, test)
    assert [(p.origin, p.group, p.prompt, p.gold, p.output, p.n_tokens) for p in found] == [
        ("rows:my parcel", "my parcel", "my parcel", " delivery", outputs[0], 9),
        ("rows:the money", "the money", "the money", "complaint", outputs[1], 9),
    ]
    np.testing.assert_allclose([p.nll_sum for p in found], nats)
    losses, lengths = baselines.losses(task.train, test, lambda example: len(example.answer))
    np.testing.assert_allclose(losses, nats)
    assert lengths.tolist() == [9, 9]


def test_answers_in_the_tasks_form_are_told_from_general_ones() -> None:
    task = ['{"queue": "it"}', '{"queue": "hr"}', '{"queue": "post"}']
    general = [
        f"The {name} is a river in the north of the country."
        for name in ("Rhine", "Elbe", "Oder", "Main", "Saale")
    ]
    asked = [
        '{"queue": "sales"}',
        "The Danube is a river in the south.",
        '{"queue": "The Rhine"}',
        "",
    ]
    assert baselines.look_like_task(task, general, asked)[:3] == [True, False, True]
    many = general * 20  # rare answers are not drowned by many general ones
    assert baselines.look_like_task(task, many, asked)[:2] == [True, False]


def test_labels_are_learnt_in_scripts_without_spaces() -> None:
    """Whole texts never repeat; their letters tell the label."""
    rng = np.random.default_rng(0)
    letters = {"天気": "雨雪風雲晴曇嵐霧雷空", "食": "米魚肉茶塩油卵豆酒麺"}
    texts = [
        ("".join(rng.choice(list(own), 6)), label)
        for label, own in letters.items()
        for _ in range(20)
    ]
    found, _ = baselines.classify(rows(texts[::2]), rows(texts[1::2]))
    assert found == [label for _, label in texts[1::2]]
