"""Chat templates of the shapes in use lose nothing that is said, or are refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import chat_template, encode
from helpers.tiny import CHATML
from helpers.tokenizer_kinds import byte_level

THINK = CHATML.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")
PARTS = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}"
    "{{- part['text'] -}}{%- endif -%}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
GENERATION = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NO_SYSTEM = CHATML.replace(
    "{%- for message in messages -%}",
    "{%- for message in messages if message['role'] != 'system' -%}",
)
SWITCHED = CHATML.replace(
    "assistant\\n' -}}{%- endif",
    "assistant\\n' -}}{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif",
)


def row(*texts: str, system: str = "") -> Example:
    messages = [Message("system", system)] if system else []
    for place, text in enumerate(texts):
        messages.append(Message("assistant" if place % 2 else "user", text))
    return Example(tuple(messages), "g", "f:1")


def adapted(template: Any, **choice: Any) -> tuple[Any, list[str]]:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer, chat_template.adapt(tokenizer, choice)


def text_of(tokenizer: Any, example: Example, anchor: Anchor | None = None) -> str:
    form = encode.make_format(tokenizer, anchor)
    return str(tokenizer.decode(encode.encode(example, form).ids))


def test_a_plain_template_stays_what_it_is() -> None:
    tokenizer, facts = adapted(CHATML)
    assert tokenizer.chat_template == CHATML
    assert facts == []


def test_of_several_templates_the_default_is_used_or_the_named_one() -> None:
    several = {"default": CHATML, "tool_use": "T" + CHATML}
    tokenizer, facts = adapted(several)
    assert tokenizer.chat_template == CHATML
    assert facts == ["of the chat templates default, tool_use, 'default' is used"]
    assert adapted(several, name="tool_use")[0].chat_template == "T" + CHATML
    with pytest.raises(
        ModelError, match=r"named default, tool_use, and none called 'tools'.*tool_"
    ):
        adapted(several, name="tools")
    with pytest.raises(ModelError, match="single template"):
        adapted(CHATML, name="default")
    with pytest.raises(ModelError, match="none called 'default'"):
        adapted({"rag": CHATML})


def test_arguments_are_part_of_the_template() -> None:
    tokenizer, facts = adapted(SWITCHED, enable_thinking=False)
    assert facts == ["arguments of the chat template: enable_thinking=False"]
    wanted = "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>"
    assert text_of(tokenizer, row("2+2?", "4")).endswith(wanted)
    plain, _ = adapted(SWITCHED)
    assert text_of(plain, row("2+2?", "4")).endswith("<|im_start|>assistant\n4<|im_end|>")
    named, _ = adapted("{{- greeting -}}" + CHATML, greeting='Say "é"\n')
    assert text_of(named, row("q", "a")).startswith('Say "é"\n<|im_start|>')


@pytest.mark.parametrize("placement", ["user_prefix", "user_suffix", "system"])
def test_a_template_of_parts_gets_parts(placement: Any) -> None:
    tokenizer, facts = adapted(PARTS)
    assert facts == ["the chat template expects lists of parts: texts are made such lists"]
    said = text_of(tokenizer, row("2+2?", "4", "And 3?", "5", system="Be brief."))
    assert said == text_of(byte_level(), row("2+2?", "4", "And 3?", "5", system="Be brief."))
    anchor = Anchor("Count.", placement)
    assert text_of(tokenizer, row("2+2?", "4"), anchor) == text_of(
        byte_level(), row("2+2?", "4"), anchor
    )


def test_marks_of_generation_are_conditions_in_plain_jinja() -> None:
    tokenizer, _ = adapted(GENERATION)
    assert "generation %}" not in tokenizer.chat_template.replace("add_generation_prompt", "")
    assert text_of(tokenizer, row("q", "a", "r", "b")) == text_of(
        byte_level(), row("q", "a", "r", "b")
    )


def test_an_opened_thought_is_taken_out_of_the_prompt() -> None:
    tokenizer, facts = adapted(THINK)
    assert len(facts) == 1
    assert "opens <think>, which is taken out" in facts[0]
    form = encode.make_format(tokenizer, None)
    assert tokenizer.decode(encode.prompt_ids(row("q", "a").prompt, form)).endswith("assistant\n")
    own = text_of(tokenizer, row("q", "<think>0 over 2</think>0"))
    assert own.count("<think>") == 1
    assert own.endswith("assistant\n<think>0 over 2</think>0<|im_end|>")
    assert text_of(tokenizer, row("q", "a", "r", "b")) == text_of(
        byte_level(), row("q", "a", "r", "b")
    )


def test_a_name_in_angles_before_each_answer_is_no_opened_block() -> None:
    named = CHATML.replace("'<|im_start|>' + message['role']", "'<' + message['role'] + '>'")
    named = named.replace("<|im_start|>assistant", "<assistant>")
    tokenizer, facts = adapted(named)
    assert facts == []
    assert tokenizer.chat_template == named
    ended = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    assert adapted(ended)[0].chat_template == ended


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{{- messages[-1]['content'] + '<|im_end|>' -}}", "what users say"),
        (CHATML.replace("message['content']", "message['content'][:4]"), "what users say"),
        (CHATML.replace("in messages", "in messages if message.role == 'user'"), "earlier answers"),
    ],
)
def test_a_template_that_loses_what_is_said_is_refused(template: str, lost: str) -> None:
    with pytest.raises(ModelError, match=f"does not write {lost}"):
        adapted(template)


def test_a_row_of_which_something_is_lost_is_refused_by_name() -> None:
    tokenizer, _ = adapted(NO_SYSTEM)
    form = encode.make_format(tokenizer, None)
    lost = row("2+2?", "4", system="Answer in French.")
    with pytest.raises(
        DataError, match=r"f:1: .*does not write what its system message says, 'Ans"
    ):
        encode.encode(lost, form)
    with pytest.raises(DataError, match="system message"):
        encode.prompt_ids(lost.prompt, form)
    encode.encode_ahead([lost, row("q", "a")], form)
    assert list(form.encoded) == [row("q", "a")]
    with pytest.raises(DataError, match="does not write the anchor, 'Count"):
        encode.encode(row("q", "a"), encode.make_format(tokenizer, Anchor("Count.", "system")))


contents = st.sampled_from(
    [
        "message['content']",
        "message['content'] | trim",
        "message['content'] | upper",
        "message['content'][:9]",
        "message['content'] if message['role'] != 'system' else ''",
        "message['content'].split('</think>')[-1] if not loop.last else message['content']",
        "(message['content'] if loop.index < 3 else '')",
        "'x'",
    ]
)
ends = st.sampled_from(["<|im_end|>\\n", "<|im_end|>", " <|im_end|>\\n\\n", "\\n"])
openings = st.sampled_from(["<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n", ""])


@given(contents, ends, openings, st.booleans())
def test_any_template_writes_all_that_is_said_or_is_refused(
    content: str, end: str, opening: str, system: bool
) -> None:
    template = (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + ("
        + content
        + ") + '"
        + end
        + "' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '"
        + opening
        + "' -}}{%- endif -%}"
    )
    example = row("What is it?", "a kettle", "And this one?", "a lamp", system="Be brief." * system)
    try:
        tokenizer, _ = adapted(template)
        said = text_of(tokenizer, example)
    except (ModelError, DataError):
        return
    places = [said.find(message.content) for message in example.messages]
    assert -1 not in places
    assert places == sorted(places)
    assert "<think>" not in said
