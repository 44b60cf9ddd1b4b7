"""Ids are those of the model's own template over the whole conversation, in the shapes of the chat
templates that are most used; each difference is listed with its reason.

The templates here are small ones of our own: roles, markers, trimming and thoughts stand where the
models' have them. `eos_token` is the end marker.
"""

from typing import Any

import pytest

from fulcrum.core.errors import DataError
from fulcrum.core.types import Example, Message
from fulcrum.data import chat_template, encode
from helpers.tokenizer_kinds import byte_level

PROMPT = "{%- if add_generation_prompt -%}{{- 'HEADER' -}}{%- endif -%}"


def each(header: str, body: str, prompt: str, *, before: str = "") -> str:
    """A template that writes a header, the content and an end for each message."""
    return (
        before
        + "{%- for message in messages -%}{{- "
        + header
        + " -}}{{- "
        + body
        + " -}}{%- endfor -%}"
        + PROMPT.replace("HEADER", prompt)
    )


CHATML = "'<|im_start|>' + message['role'] + '\\n'"
BEFORE_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nBe helpful.' + eos_token "
    "+ '\\n' -}}{%- endif -%}"
)
# Thoughts are dropped from all answers but the last, which gets an empty one if it has none.
QWEN3 = (
    "{%- for message in messages -%}{%- set text = message['content'] -%}{%- set thought = '' -%}"
    "{%- if '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' and loop.last -%}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- text + eos_token + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"
)
GEMMA = (
    "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) -}}"
    "{{- '\\n' + (first if loop.first else '') + message['content'] | trim + eos_token + '\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '[SYS]' + message['content'] + '[/SYS]' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '[INST]' + message['content'] + '[/INST]' -}}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
DEEPSEEK = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<User>' + message['content'] -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] -}}"
    "{%- else -%}{{- '<Assistant>' + message['content'].split('</think>')[-1] + eos_token -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<Assistant><think>\\n' -}}{%- endif -%}"
)
SHAPES = {
    "Llama 3": each(
        "'<header>' + message['role'] + '</header>\\n\\n'",
        "message['content'] | trim + eos_token",
        "<header>assistant</header>\\n\\n",
        before="{{- bos_token -}}",
    ),
    "Qwen 2.5": each(
        CHATML,
        "message['content'] + eos_token + '\\n'",
        "<|im_start|>assistant\\n",
        before=BEFORE_SYSTEM,
    ),
    "Qwen 3": QWEN3,
    "Gemma 3": GEMMA,
    "Mistral": MISTRAL,
    "Phi 4": each(
        "'<|im_start|>' + message['role'] + '<sep>'",
        "message['content'] + eos_token",
        "<|im_start|>assistant<sep>",
    ),
    "SmolLM 3": each(
        CHATML,
        "message['content'] + eos_token + '\\n'",
        "<|im_start|>assistant\\n<think>\\n\\n</think>\\n",
        before=BEFORE_SYSTEM,
    ),
    "OLMo": each(
        "'<|' + message['role'] + '|>\\n'",
        "message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\\n'",
        "<|assistant|>\\n",
        before="{{- bos_token -}}",
    ),
    "DeepSeek distils": DEEPSEEK,
    "Granite": each(
        "'<role>' + message['role'] + '</role>'",
        "message['content'] + eos_token + '\\n'",
        "<role>assistant</role>",
    ),
}
ASK = [("user", "Where is my kettle?"), ("assistant", "refund")]
ROWS = {
    "one turn": ASK,
    "system": [("system", "Be brief."), *ASK],
    "two turns": [*ASK, ("user", "And the lamp?"), ("assistant", "delivery 2")],
    "thought": [("user", "Half of 4?"), ("assistant", "<think>4 over 2</think>2")],
    "special text": [("user", "What is <|im_end|>?"), ("assistant", "an end")],
    "white space": [("user", "Price?"), ("assistant", "0 euro\n")],
}
THOUGHT = "the whole conversation holds a thought, or none, that the prompt at use does not hold"
TEXT = "special-token text of users stays text"
TRIMMED = "the template trims the answer, which is trained as it is"
DIFFERENT = {
    ("Qwen 3", "one turn"): THOUGHT,
    ("Qwen 3", "system"): THOUGHT,
    ("Qwen 3", "two turns"): THOUGHT,
    ("Qwen 3", "thought"): THOUGHT,
    ("Qwen 3", "white space"): THOUGHT,
    ("SmolLM 3", "one turn"): THOUGHT,
    ("SmolLM 3", "system"): THOUGHT,
    ("SmolLM 3", "two turns"): THOUGHT,
    ("SmolLM 3", "thought"): THOUGHT,
    ("SmolLM 3", "white space"): THOUGHT,
    ("DeepSeek distils", "thought"): THOUGHT,
    ("Llama 3", "white space"): TRIMMED,
    ("Gemma 3", "white space"): TRIMMED,
    **{(shape, "special text"): TEXT for shape in SHAPES},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_the_whole_conversation_or_the_reason_is_listed(
    shape: str, kind: str
) -> None:
    tokenizer = byte_level(SHAPES[shape])
    messages = tuple(Message(role, text) for role, text in ROWS[kind])  # type: ignore[arg-type]
    turns: Any = [{"role": message.role, "content": message.content} for message in messages]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    chat_template.adapt(tokenizer, {})
    form = encode.make_format(tokenizer, None)
    row = Example(messages, "g", "f:1")
    try:
        tokens = encode.encode(row, form)
    except DataError as error:
        pytest.fail(str(error))
    ids = tokens.ids.tolist()
    is_same = ids == whole[: len(ids)] and not tokenizer.decode(whole[len(ids) :]).strip()
    assert is_same == ((shape, kind) not in DIFFERENT), tokenizer.decode(ids)
    # Whatever differs: the prompt at use is the beginning, and the answer stands whole.
    start = len(ids) - (encode.answer_length(row, form) + sum(map(len, form.around)))
    assert encode.prompt_ids(messages[:-1], form) == ids[:start]
    assert tokenizer.decode(ids[start:]).strip() == messages[-1].content + form.end_text
