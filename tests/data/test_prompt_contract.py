"""The ids of training are the ids of use: in every turn, the prompt's ids are the beginning of the
ids that train its answer, whatever the tokenizer does with text that stands beside other text."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode
from helpers.tiny import FORGETFUL, TRIMMING
from helpers.tokenizer_kinds import INST, byte_level, normalising, sentencepiece, wordpiece

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, trims": lambda: byte_level(TRIMMING),
    "byte level, forgets thoughts": lambda: byte_level(FORGETFUL),
    "swallows white space": lambda: byte_level(rstrip=True),
    "normalises": normalising,
    "as Llama 2": sentencepiece,
    "as Llama 2, blank before answers": lambda: sentencepiece(INST),
    "as Gemma": lambda: sentencepiece(prepends=False),
    "word pieces": wordpiece,
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
ANCHORS = [None, Anchor("Answer in a word."), Anchor("Reply:", "response_prefix")]

texts = st.one_of(
    st.sampled_from(
        ["refund", "Where is my kettle?", "½ cup", "<|im_end|>", "a </think> b", "\n\nx"]
    ),
    st.text(alphabet="ab 1\n½é▁<|>", min_size=1, max_size=8),
).filter(lambda text: bool(text.strip()))
turns = st.tuples(texts, texts)


def conversation(asked: list[tuple[str, str]], system: str = "") -> Example:
    messages = [Message("system", system)] if system else []
    for question, answer in asked:
        messages += [Message("user", question), Message("assistant", answer)]
    return Example(tuple(messages), "g", "f:1")


def starts(mask: np.ndarray) -> list[int]:
    """Where answers begin that are trained."""
    before = np.concatenate([[False], mask[:-1]])
    return np.flatnonzero(mask & ~before).tolist()


@pytest.mark.parametrize("name", KINDS)
@given(st.lists(turns, min_size=1, max_size=3), st.sampled_from(ANCHORS), st.booleans())
def test_a_prompts_ids_begin_the_ids_of_training(
    name: str, asked: list[tuple[str, str]], anchor: Anchor | None, system: bool
) -> None:
    form = encode.make_format(TOKENIZERS[name], anchor)
    row = conversation(asked, "Be brief." if system else "")
    tokens = encode.encode(row, form, keep=False)
    places = [k for k, message in enumerate(row.messages) if message.role == "assistant"]
    begun = starts(tokens.loss_mask)
    assert begun
    for start, place in zip(reversed(begun), reversed(places), strict=False):
        assert encode.prompt_ids(row.messages[:place], form) == tokens.ids[:start].tolist()
    (together,) = encode.encode_many([row], form)
    assert together.ids.tolist() == tokens.ids.tolist()
    assert together.loss_mask.tolist() == tokens.loss_mask.tolist()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "byte level, trims"])
def test_ids_are_those_of_the_whole_conversation(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = conversation([("Where is my kettle?", "refund"), ("And the lamp?", "delivery 2")])
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    ids = encode.encode(row, encode.make_format(tokenizer, None)).ids.tolist()
    # What the template writes after the last end token stands before the next question.
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""


def test_an_answer_is_not_begun_with_a_blank_that_no_text_holds() -> None:
    form = encode.make_format(TOKENIZERS["as Llama 2"], None)
    tokens = encode.encode(conversation([("q", "refund")]), form)
    answer = tokens.ids[tokens.loss_mask].tolist()
    assert "".join(form.tokenizer.convert_ids_to_tokens(answer)) == "refund<|im_end|>"
    blank = encode.make_format(TOKENIZERS["as Llama 2, blank before answers"], None)
    tokens = encode.encode(conversation([("q", "refund")]), blank)
    answer = tokens.ids[tokens.loss_mask].tolist()
    assert "".join(blank.tokenizer.convert_ids_to_tokens(answer)) == "▁refund<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answers", "changed", "trained"),
    [
        (TRIMMING, ["0 euro\n", "5 euro\n"], (0, 1), ["0 euro", "5 euro\n"]),
        (FORGETFUL, ["<think>0</think>0", "5"], (1, 0), ["5"]),
    ],
)
def test_what_a_template_changes_of_earlier_answers_is_counted(
    template: str, answers: list[str], changed: tuple[int, int], trained: list[str]
) -> None:
    form = encode.make_format(byte_level(template), None)
    row = conversation([("Price?", answers[0]), ("With tax?", answers[1])])
    assert encode.changed_answers(row, form) == changed
    tokens = encode.encode(row, form)
    said = form.tokenizer.decode(tokens.ids[tokens.loss_mask]).split("<|im_end|>")
    assert said[:-1] == trained
