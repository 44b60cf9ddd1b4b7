"""The anchor stands in every conversation of its task exactly once, and `bake` and `apply` put it
in the same place."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Message, Placement
from fulcrum.data import anchor_template
from fulcrum.data.encode import plain_template
from helpers.tiny import CHATML, FORGETFUL, TRIMMING, tiny_tokenizer

PLACEMENTS = get_args(Placement)
SYSTEM, ASK, ANSWER, AGAIN, LAST = (
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
    Message("assistant", "2"),
)
SINGLE, MULTI = (ASK,), (ASK, ANSWER, AGAIN)
TOKENIZER = tiny_tokenizer()


def render(template: str, messages: tuple[Message, ...], generation_prompt: bool = True) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return TOKENIZER.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
    )


ANCHORED = {
    "system": (
        "<|im_start|>system\nSORT.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "user_prefix": "<|im_start|>user\nSORT.\n\nOne?<|im_end|>\n<|im_start|>assistant\n",
    "user_suffix": "<|im_start|>user\nOne?\n\nSORT.<|im_end|>\n<|im_start|>assistant\n",
    "response_prefix": "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nSORT.",
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_single_question(placement: Placement) -> None:
    assert (
        render(anchor_template.bake(CHATML, Anchor("SORT.", placement)), SINGLE)
        == ANCHORED[placement]
    )


ANCHORED_MULTI = {
    "system": (
        "<|im_start|>system\nSORT.\n\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "user_prefix": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSORT.\n\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "user_suffix": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?\n\n"
        "SORT.<|im_end|>\n<|im_start|>assistant\n"
    ),
    "response_prefix": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\nSORT."
    ),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_conversation_with_a_system_text(placement: Placement) -> None:
    assert (
        render(anchor_template.bake(CHATML, Anchor("SORT.", placement)), (SYSTEM, *MULTI))
        == ANCHORED_MULTI[placement]
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "template",
    [CHATML, CHATML + "\n", TRIMMING, FORGETFUL, plain_template(True), plain_template(False)],
)
@pytest.mark.parametrize("messages", [SINGLE, MULTI, (SYSTEM, *SINGLE), (SYSTEM, *MULTI)])
def test_the_anchor_stands_exactly_once(
    template: str, placement: Placement, messages: tuple[Message, ...]
) -> None:
    plain = render(template, messages)
    text = render(anchor_template.bake(template, Anchor("SORT.", placement)), messages)
    assert text.count("SORT.") == 1
    if placement != "system" or messages[0].role == "system":
        assert text.replace("SORT.\n\n", "").replace("\n\nSORT.", "").replace("SORT.", "") == plain
    if placement == "response_prefix":
        assert text == plain + "SORT."


@pytest.mark.parametrize("placement", ["system", "user_prefix", "user_suffix"])
@pytest.mark.parametrize("messages", [SINGLE, MULTI, (SYSTEM, *MULTI)])
def test_apply_writes_what_bake_renders(
    placement: Placement, messages: tuple[Message, ...]
) -> None:
    anchor = Anchor("SORT.", placement)
    applied = anchor_template.apply((*messages, LAST), anchor)
    assert applied[-1] == LAST
    assert render(CHATML, applied[:-1]) == render(anchor_template.bake(CHATML, anchor), messages)
    assert [m.role for m in messages] == [
        m.role for m in applied[:-1] if m.role != "system" or messages[0].role == "system"
    ]


def test_apply_writes_a_response_prefix_into_the_answer() -> None:
    assert anchor_template.apply((ASK, LAST), Anchor("Label: ", "response_prefix")) == (
        ASK,
        Message("assistant", "Label: 2"),
    )


def test_apply_keeps_what_a_message_says_about_training() -> None:
    untrained = Message("assistant", "1", train=False)
    assert anchor_template.apply((ASK, untrained, AGAIN, LAST), Anchor("SORT."))[1] == untrained


@pytest.mark.parametrize("placement", ["user_prefix", "user_suffix"])
def test_apply_needs_a_user_turn(placement: Placement) -> None:
    with pytest.raises(
        ConfigError,
        match=f"placement '{placement}' needs a user turn, the row has none; use",
    ):
        anchor_template.apply((SYSTEM, LAST), Anchor("SORT.", placement))


def test_no_anchor_changes_nothing() -> None:
    assert anchor_template.bake(CHATML, None) == CHATML
    assert anchor_template.apply((ASK, LAST), None) == (ASK, LAST)
    assert anchor_template.answer_lead(None) == ""
    assert not anchor_template.last_answer_only(None)


def test_white_space_at_a_response_prefixs_end_goes_to_the_answer() -> None:
    anchor = Anchor("Label: \n", "response_prefix")
    assert anchor_template.answer_lead(anchor) == " \n"
    assert render(anchor_template.bake(CHATML, anchor), SINGLE).endswith(
        "<|im_start|>assistant\nLabel:"
    )
    assert anchor_template.answer_lead(Anchor("Label: \n", "user_prefix")) == ""


def test_a_response_prefix_needs_a_generation_prompt() -> None:
    baked = anchor_template.bake(CHATML, Anchor("Label:", "response_prefix"))
    assert render(baked, (ASK, LAST), generation_prompt=False) == render(
        CHATML, (ASK, LAST), generation_prompt=False
    )


def test_only_anchors_after_the_last_question_leave_earlier_answers_out() -> None:
    assert [
        anchor_template.last_answer_only(Anchor("SORT.", placement)) for placement in PLACEMENTS
    ] == [False, False, True, True]


NASTY = st.text(
    st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12
) | st.sampled_from(
    [
        "{{ x }}",
        "{% endif %}",
        "{# no #}",
        "\"quoted\" 'twice'",
        "back\\slash\\n",
        "two\nlines",
        "\r\n",
        "line\u2028",
        "😀",
        "-%}",
        "{%- raw -%}",
    ]
)


@settings(max_examples=60, deadline=None)
@given(text=NASTY, placement=st.sampled_from(PLACEMENTS))
def test_any_text_is_rendered_as_it_is(text: str, placement: Placement) -> None:
    marked = "<" + text + ">"
    rendered = render(anchor_template.bake(CHATML, Anchor(marked, placement)), SINGLE)
    assert rendered == ANCHORED[placement].replace("SORT.", marked)


def test_the_hash_covers_text_and_placement() -> None:
    assert Anchor("a", "system").sha256 != Anchor("a", "user_prefix").sha256
    assert Anchor("a").sha256 == Anchor("a", "user_prefix").sha256
