"""Anchors in words: what templates say of rows, what is asked of a writer, and what is no
anchor."""

import pytest

from fulcrum.anchors import propose
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode
from helpers.tiny import tiny_tokenizer

FORM = encode.make_format(tiny_tokenizer(), None)


def row(question: str, answer: str, k: int = 0) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"g{k}", f"o:{k}")


BASH = [row(f"find files in directory number {k}", f"find . -name {k}", k) for k in range(12)]
JSON = [
    row(f"book table {k}", f'{{"intent": "book", "slots": {{"n": {k}}}}}', k) for k in range(12)
]
LABELS = [row(f"ticket {k}", ("refund", "login")[k % 2], k) for k in range(12)]


def test_templates_say_what_inputs_and_answers_look_like() -> None:
    found = propose.templates(BASH, "nl2bash", "user_prefix")
    assert found[0] == "Read the input and give the answer only, without any explanation."
    assert found[1] == (
        'For example, "find files in directory number 0" is answered with "find . -name 0". Do '
        "it like that."
    )
    assert found[2] == (
        "Answer the input with a short text that mostly begins with find, as all answers here do."
    )
    assert found[3] == (
        "Each input is a request about directory, files, number. Give a short text and do not "
        "explain it."
    )
    assert (
        "one JSON object with the keys intent, slots"
        in propose.templates(JSON, "snips", "system")[2]
    )
    assert "one of these labels: login, refund" in propose.templates(LABELS, "t", "user_prefix")[2]
    assert len(set(found)) == len(found) >= 8


def test_a_response_prefix_leads_over_to_the_answer() -> None:
    for text in propose.templates(BASH, "nl2bash", "response_prefix"):
        assert text.endswith((" ", "\n"))
        assert len(text) > 10
    assert len(propose.templates(BASH, "x", "response_prefix")) >= 6


def test_lengths_are_said_only_where_answers_have_about_as_many_words() -> None:
    assert propose._length(BASH) == " of about 4 words"
    assert propose._length([row("q", "a " * k, k) for k in range(1, 20)]) == ""
    assert propose._length(LABELS) == ""


def test_a_writer_is_shown_some_rows_and_no_other() -> None:
    assert propose.source_rows(BASH) == BASH[:3]  # a quarter of twelve
    assert len(propose.source_rows(BASH * 10)) == 8
    (asked,) = propose.question(BASH[:2], "user_prefix")
    assert "Input: find files in directory number 1\nAnswer: find . -name 1" in asked.content
    assert "number 2" not in asked.content
    assert asked.role == "user"
    assert "ending with a colon" in propose.question(BASH[:2], "response_prefix")[0].content


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ('1. "Turn the request into JSON."\nMore of it.', "Turn the request into JSON."),
        ("Instruction: Sort it. And then", "Sort it."),
        ("\n\n**Answer the question in one word**", "Answer the question in one word"),
        ("...\n - ", ""),
        ("The sentence: Give the form of the word.", "Give the form of the word."),
    ],
)
def test_what_stands_around_an_anchor_goes(said: str, text: str) -> None:
    assert propose.clean(said, "user_prefix") == text


def test_a_written_response_prefix_ends_with_a_colon() -> None:
    assert propose.clean("The command is", "response_prefix") == "The command is: "
    assert propose.clean("The command is:", "response_prefix") == "The command is: "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Answer the question that somebody asks with one command.", None),
        ("Short.", "shorter than 8 tokens"),
        ("Sort every ticket that comes in. " * 20, "longer than 64 tokens"),
        ("Stop after <|im_end|> and go on then with the rest of it.", "holds a special token"),
        ("Answer the quest\ufffdion that somebody asks with one command.", "garbled"),
        ("go go go go go go go go go go go go go go", "repeats itself"),
        ("find files in directory number 3", "stands in the rows"),
        ("You should please find files in old directory number 7 now.", None),
    ],
)
def test_what_is_no_anchor_has_its_reason(text: str, reason: str | None) -> None:
    assert propose.fault(Anchor(text), BASH, FORM, written=True) == reason


def test_a_writer_may_not_copy_an_input_and_a_template_may_give_one() -> None:
    rows = [row("list all the files that were changed since last monday morning", "ls", 1)]
    text = "Please list all the files that were changed since last monday morning, then stop."
    assert propose.fault(Anchor(text), rows, FORM, written=True) == "copies a row"
    assert propose.fault(Anchor(text), rows, FORM, written=False) is None
