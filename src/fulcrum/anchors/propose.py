"""Anchors in words: filled in from a task's rows, or asked of whoever can write; and what is no anchor. No model needed.

Whoever scores candidates must not score them on the rows that these were made from (`shown`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np

from fulcrum.core.types import Anchor, Example, Message, Placement
from fulcrum.data import encode, filters, starter
from fulcrum.data.formats import sentences

FEWEST, MOST = 8, 64  # tokens of a proposed anchor
SHOWN = 8  # training rows that a proposal may be made from

_COMMON = 0.3  # share of the inputs that hold a word which is named
_NAMED = 4  # words, at most
_ROW_CHARACTERS = 240  # of a row's part in the prompt that asks for anchors
_COPIED = 8  # words in a row that are a copy of a row's
_LEAD = re.compile(
    r"^(?:[-*•#>\s]+|\d+[.)]\s*|(?:the\s+)?(?:instruction|sentence|answer|output|task|prompt|description)s?\s*:\s*)+",
    re.IGNORECASE,
)


def shown(rows: Sequence[Example]) -> list[Example]:
    """The rows that proposals may be made from: the first few, at most a quarter of all, which leaves some to score."""
    return list(rows[: min(SHOWN, max(1, len(rows) // 4))])


def templates(rows: Sequence[Example], name: str, placement: Placement) -> list[str]:
    """Anchors that say what the rows' inputs and answers look like: at most a dozen, varied, the plainest first.

    `rows` are training rows. Of a response prefix the answer is the continuation, so it leads over instead of asking.
    """
    kind, form, long = starter.guess(rows), _form(rows), _length(rows)
    about, task = _words(rows), re.sub(r"[\W_]+", " ", name).strip()
    topic = f" about {', '.join(about)}" if about else ""
    if placement == "response_prefix":
        return [
            f"Here is {form} for the input above, and nothing else: ", f"Having read the whole input{topic}, I answer:\n",
            f"Task: {task}. The answer, which is {form}, follows here:\n", f"### {task}: {form} ###\n",
            f"The answer to this input{topic} is {form}{long} and reads as follows: ",
            "Sure, here is the answer that was asked for: ",
        ]  # fmt: skip
    example = shown(rows)[0]
    found = [
        kind.anchor, f'For example, "{_short(example.question)}" is answered with "{_short(example.answer)}". Do it like that.',
        f"Each input is a request{topic}. Give {form} and do not explain it.",
        f"You are an expert in {task}. Answer with {form}{long} and add nothing to it.",
        f"### {task} ### input: a request{topic}; output: {form}{long}",
        f"What follows is one input of the task {task}. Its answer is always {form}{long}.",
        f"Do not explain and do not repeat the input, just write {form}{long}.",
        f"Task: {task}. Read the input and answer with {form}.",
    ]  # fmt: skip
    if begins := _beginnings(rows):
        found.insert(
            2,
            f"Answer the input with {form} that mostly begins with {' or '.join(begins)}, as all answers here do.",
        )
    return found


def _form(rows: Sequence[Example]) -> str:
    """What the answers are, in a few words."""
    answers = [row.answer.strip() for row in rows]
    if (keys := starter.json_keys(answers)) is not None:
        return "one JSON object" + (
            f" with the keys {', '.join(keys)}" if 0 < len(keys) <= 6 else ""
        )
    labels = sorted(set(answers))
    if len(labels) <= min(12, len(answers) // 3) and max(map(len, labels)) <= 40:
        return f"one of these labels: {', '.join(labels)}"
    middle = median(len(answer.split()) for answer in answers)
    return "one word" if middle <= 1 else "a short text" if middle <= 12 else "a text"


def _length(rows: Sequence[Example]) -> str:
    """How many words the answers have, where most have about as many; nothing where that differs."""
    low, middle, high = np.quantile([len(row.answer.split()) for row in rows], [0.1, 0.5, 0.9])
    return (
        f" of about {middle:.0f} words"
        if middle > 1 and low >= 0.6 * middle and high <= 1.6 * middle
        else ""
    )


def _words(rows: Sequence[Example]) -> list[str]:
    """The commonest words of the inputs that say something."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts = Counter(
        word
        for row in rows
        for word in set(filters.words(row.question))
        if len(word) > 2 and word.isalpha() and word not in ENGLISH_STOP_WORDS
    )
    common = [
        word
        for word in sorted(counts, key=lambda word: (-counts[word], word))
        if counts[word] >= _COMMON * len(rows)
    ]
    return common[:_NAMED]


def _beginnings(rows: Sequence[Example]) -> list[str]:
    """The commonest first words of answers of several words, where they open most of them."""
    firsts = Counter(words[0] for row in rows if len(words := row.answer.split()) > 1)
    common = firsts.most_common(2)
    return [word for word, _ in common] if sum(count for _, count in common) > len(rows) / 2 else []


def _short(text: str) -> str:
    return " ".join(text.split())[:_ROW_CHARACTERS]


def question(rows: Sequence[Example], placement: Placement) -> tuple[Message, ...]:
    """What somebody who writes is asked: some training rows, and for one sentence that says what is wanted."""
    told = "\n\n".join(
        f"Input: {_short(row.question)}\nAnswer: {_short(row.answer)}" for row in rows
    )
    wish = "Write one sentence that tells somebody who sees an input like these how to answer it. Write that sentence only."
    if placement == "response_prefix":
        wish = "Write a few words that lead over from such an input to its answer, ending with a colon. Write these words only."
    return (
        Message(
            "user", f"Here are some inputs with the answers that are wanted.\n\n{told}\n\n{wish}"
        ),
    )


def cleaned(text: str, placement: Placement) -> str:
    """A written anchor without what stands around it: its first line that says something, whole sentences, no quotes."""
    lines = [_LEAD.sub("", line).strip().strip("\"'`“”*_ ").strip() for line in text.splitlines()]
    line = next((line for line in lines if filters.words(line)), "")
    if placement == "response_prefix":
        return line.rstrip(" .:") + ": " if line else ""
    return sentences(line) or line


def fault(
    anchor: Anchor, rows: Sequence[Example], form: encode.Format, *, written: bool
) -> str | None:
    """Say why a proposed text is no anchor for these rows, in words that can be counted, or None.

    A `written` one, by a model, may neither refuse nor copy an input; a template that gives an
    example copies on purpose.
    """
    tokens = form.tokenizer(
        anchor.text.strip(), add_special_tokens=False, split_special_tokens=False
    )["input_ids"]
    words = filters.words(anchor.text)
    if form.special.search(anchor.text):
        return "holds a special token"
    if "\ufffd" in anchor.text or not anchor.text.replace("\n", " ").isprintable():
        return "garbled"
    if len(tokens) < FEWEST:
        return f"shorter than {FEWEST} tokens"
    if len(tokens) > MOST:
        return f"longer than {MOST} tokens"
    if len(set(words)) < max(3, len(words) // 3):
        return "repeats itself"
    if any(anchor.text.strip() in message.content for row in rows for message in row.messages):
        return "stands in the rows"
    if written and filters.refuses(anchor.text):
        return "refusal"
    runs = {tuple(words[k : k + _COPIED]) for k in range(len(words) - _COPIED + 1)}
    for row in rows if written else ():
        own = filters.words(row.question)
        if any(tuple(own[k : k + _COPIED]) in runs for k in range(len(own) - _COPIED + 1)):
            return "copies a row"
    return None
