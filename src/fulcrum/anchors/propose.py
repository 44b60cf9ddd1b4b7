"""Anchors in words: filled in from a task's rows, or asked of a model or person, and checked.

No model is needed. Candidates must not be scored on the rows that they were made from
(`source_rows`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np

from fulcrum.core.types import Anchor, Example, Message, Placement
from fulcrum.data import encode, filters, starter
from fulcrum.data.formats import whole_sentences

FEWEST, MOST = 8, 64  # tokens of a proposed anchor
SHOWN = 8  # training rows that a proposal may be made from

_COMMON = 0.3  # share of the inputs that hold a word which is named
_NAMED = 4  # words, at most
_ROW_CHARACTERS = 240  # of a row's part in the prompt that asks for anchors
_COPIED = 8  # words in a row that are a copy of a row's
_LEAD = re.compile(
    r"^(?:[-*•#>\s]+|\d+[.)]\s*"
    r"|(?:the\s+)?(?:instruction|sentence|answer|output|task|prompt|description)s?\s*:\s*)+",
    re.IGNORECASE,
)


def source_rows(rows: Sequence[Example]) -> list[Example]:
    """Return the rows that proposals may be made from: the first few, at most a quarter of all."""
    return list(rows[: min(SHOWN, max(1, len(rows) // 4))])


def templates(rows: Sequence[Example], name: str, placement: Placement) -> list[str]:
    """Return anchors that say what the training rows' inputs and answers look like.

    They are at most a dozen, varied, the plainest first. The answer continues a response prefix, so
    that one leads over to it instead of asking.
    """
    form = _form(rows)
    task = re.sub(r"[\W_]+", " ", name).strip()
    words = _words(rows)
    topic = f" about {', '.join(words)}" if words else ""
    if placement == "response_prefix":
        return [
            f"Here is {form} for the input above, and nothing else: ",
            f"Having read the whole input{topic}, I answer:\n",
            f"Task: {task}. The answer, which is {form}, follows here:\n",
            f"### {task}: {form} ###\n",
            f"The answer to this input{topic} is {form}{_length(rows)} and reads as follows: ",
            "Sure, here is the answer that was asked for: ",
        ]
    long_form = form + _length(rows)
    example = source_rows(rows)[0]
    texts = [
        starter.guess(rows).anchor,
        f'For example, "{_short(example.question)}" is answered with '
        f'"{_short(example.answer)}". Do it like that.',
    ]
    beginnings = _beginnings(rows)
    if beginnings:
        texts.append(
            f"Answer the input with {form} that mostly begins with {' or '.join(beginnings)}, "
            "as all answers here do."
        )
    return [
        *texts,
        f"Each input is a request{topic}. Give {form} and do not explain it.",
        f"You are an expert in {task}. Answer with {long_form} and add nothing to it.",
        f"### {task} ### input: a request{topic}; output: {long_form}",
        f"What follows is one input of the task {task}. Its answer is always {long_form}.",
        f"Do not explain and do not repeat the input, just write {long_form}.",
        f"Task: {task}. Read the input and answer with {form}.",
    ]


def question(rows: Sequence[Example], placement: Placement) -> tuple[Message, ...]:
    """Return a prompt that shows some training rows and asks for one sentence of instruction."""
    shown = []
    for row in rows:
        shown.append(f"Input: {_short(row.question)}\nAnswer: {_short(row.answer)}")
    examples = "\n\n".join(shown)
    wish = (
        "Write one sentence that tells somebody who sees an input like these how to answer it. "
        "Write that sentence only."
    )
    if placement == "response_prefix":
        wish = (
            "Write a few words that lead over from such an input to its answer, ending with a "
            "colon. Write these words only."
        )
    text = f"Here are some inputs with the answers that are wanted.\n\n{examples}\n\n{wish}"
    return (Message("user", text),)


def clean(text: str, placement: Placement) -> str:
    """Return the anchor in a written text: the whole sentences of its first line with words.

    Lead-ins such as "Instruction:", list marks and quotes are dropped.
    """
    first = ""
    for line in text.splitlines():
        bare = _LEAD.sub("", line).strip().strip("\"'`“”*_ ").strip()
        if filters.words(bare):
            first = bare
            break
    if placement == "response_prefix":
        return first.rstrip(" .:") + ": " if first else ""
    return whole_sentences(first) or first


def fault(
    anchor: Anchor, rows: Sequence[Example], form: encode.PromptFormat, *, written: bool
) -> str | None:
    """Return why a proposed text is no anchor for these rows, in words that can be counted.

    None means that it is one. A text that is `written`, by a model, may neither refuse nor copy an
    input; a template that gives an example copies on purpose.
    """
    text = anchor.text.strip()
    encoded = form.tokenizer(text, add_special_tokens=False, split_special_tokens=False)
    tokens = encoded["input_ids"]
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
    if _stands_in(text, rows):
        return "stands in the rows"
    if written and filters.refuses(anchor.text):
        return "refusal"
    if written and _copies(words, rows):
        return "copies a row"
    return None


def _stands_in(text: str, rows: Sequence[Example]) -> bool:
    for row in rows:
        for message in row.messages:
            if text in message.content:
                return True
    return False


def _copies(words: Sequence[str], rows: Sequence[Example]) -> bool:
    """Return whether `_COPIED` words in a row are those of a row's input."""
    runs = _runs(words)
    return any(runs & _runs(filters.words(row.question)) for row in rows)


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[k : k + _COPIED]) for k in range(len(words) - _COPIED + 1)}


def _form(rows: Sequence[Example]) -> str:
    """Return what the answers are, in a few words."""
    answers = [row.answer.strip() for row in rows]
    keys = starter.json_keys(answers)
    if keys is not None:
        named = f" with the keys {', '.join(keys)}" if 0 < len(keys) <= 6 else ""
        return f"one JSON object{named}"
    labels = sorted(set(answers))
    if len(labels) <= min(12, len(answers) // 3) and max(map(len, labels)) <= 40:
        return f"one of these labels: {', '.join(labels)}"
    middle = median(len(answer.split()) for answer in answers)
    if middle <= 1:
        return "one word"
    return "a short text" if middle <= 12 else "a text"


def _length(rows: Sequence[Example]) -> str:
    """Return how many words the answers have, if most have about as many, else nothing."""
    low, middle, high = np.quantile([len(row.answer.split()) for row in rows], [0.1, 0.5, 0.9])
    if middle > 1 and low >= 0.6 * middle and high <= 1.6 * middle:
        return f" of about {middle:.0f} words"
    return ""


def _words(rows: Sequence[Example]) -> list[str]:
    """Return the commonest words of the inputs that are no stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts = Counter[str]()
    for row in rows:
        for word in set(filters.words(row.question)):
            if len(word) > 2 and word.isalpha() and word not in ENGLISH_STOP_WORDS:
                counts[word] += 1
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    common = [word for word in by_count if counts[word] >= _COMMON * len(rows)]
    return common[:_NAMED]


def _beginnings(rows: Sequence[Example]) -> list[str]:
    """Return the two commonest first words of longer answers, if these open most answers."""
    firsts = Counter[str]()
    for row in rows:
        words = row.answer.split()
        if len(words) > 1:
            firsts[words[0]] += 1
    common = dict(firsts.most_common(2))
    return list(common) if sum(common.values()) > len(rows) / 2 else []


def _short(text: str) -> str:
    return " ".join(text.split())[:_ROW_CHARACTERS]
