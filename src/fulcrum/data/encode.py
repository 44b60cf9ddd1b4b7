"""Turn conversations into token ids and loss masks, alike in training and inference.

- A prompt (with a response prefix) is one string and is tokenised as one; an answer is tokenised
  apart and ends with the template's end-of-turn token, which is trained.
- Template markers become special ids; the same characters inside a user's text stay plain text, so
  a row that contains ``<|im_end|>`` cannot end a turn.
- The anchor is part of the template (`anchor_template.bake`).
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message, Tokens
from fulcrum.data import anchor_template

Messages = tuple[Message, ...]

# For base models, whose tokenizers bring no chat template: a plain question-and-answer layout that
# any text model has seen.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'Output:\\n' + message['content'] + eos_token + '\\n\\n' -}}"
    "{%- else -%}{{- 'Input:\\n' + message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Output:\\n' -}}{%- endif -%}"
)

# Noncharacters (Unicode reserves them for internal use) replace special-token text while a template
# is rendered.
_OPEN = "\ufdd0"
_CLOSE = "\ufdd1"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PROBE = "fulcrumprobe"  # a text that no template writes
_MOST_ENCODED = 2**15  # rows that a format remembers


class Tokenizer(Protocol):
    """What encoding needs of a Transformers tokenizer; its methods are Transformers' own."""

    chat_template: Any
    eos_token_id: int | None
    all_special_tokens: Sequence[str]
    added_tokens_decoder: Mapping[int, Any]
    special_tokens_map: Mapping[str, Any]

    def __call__(self, text: str | list[str], **options: Any) -> Mapping[str, Any]:
        """Tokenise a text, or several."""

    def __hash__(self) -> int: ...

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Sequence[Any], **options: Any) -> Any:
        """Render a conversation, or several, by the chat template."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """Look a token up."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> Any:
        """Turn ids into text."""


@dataclass(frozen=True, eq=False)
class PromptFormat:
    """How one tokenizer writes conversations with one anchor (or none); see `make_format`."""

    tokenizer: Tokenizer
    template: str  # the anchor included
    anchor: Anchor | None
    end_ids: tuple[int, ...]  # of the token that ends a turn
    end_text: str
    special: re.Pattern[str] = field(repr=False)  # finds the text of any special token
    special_names: tuple[str, ...] = field(repr=False)
    # Arms, trials and previews ask for the same rows again.
    encoded: dict[Example, Tokens] = field(repr=False, default_factory=dict)


def plain_template(adds_bos: bool) -> str:
    """Return the template for tokenizers that have none.

    `adds_bos` says whether the tokenizer starts plain text with its BOS token.
    """
    return ("{{- bos_token -}}" if adds_bos else "") + PLAIN_TEMPLATE


def make_format(tokenizer: Tokenizer, anchor: Anchor | None) -> PromptFormat:
    """Prepare encoding; equal arguments give the same object.

    Raises ModelError if the chat template cannot render one question and answer.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            "the tokenizer has no chat template (or several); load the model through "
            "`fulcrum.model.base_model.load`"
        )
    return _format(tokenizer, len(tokenizer), tokenizer.chat_template, anchor)


def encode(example: Example, form: PromptFormat, *, keep: bool = True) -> Tokens:
    """Return ids and loss mask of one conversation.

    Every trained answer and its end token is a target. Earlier answers of a multi-turn row are
    trained only if the template renders the conversation up to them as the beginning of the longer
    one (some drop reasoning from past turns), and if the anchor does not come after the last
    question. An answer before any question is context. With `keep`, the row is remembered. Raises
    DataError if no answer may be trained, or if the chat template refuses the row.
    """
    known = form.encoded.get(example)
    if known is not None:
        return known
    trained = _trained_places(example, form)
    if not trained:
        raise DataError(
            f"{example.origin}: no answer to train (every assistant message has weight 0); "
            "drop the row"
        )
    try:
        texts = _split(example.messages, trained, form, lambda prompt: _render([prompt], form)[0])
    except TemplateError as error:
        raise DataError(
            f"{example.origin}: the model's chat template refuses this row: {error}"
        ) from error
    parts = []
    for prompt, answer in texts:
        parts.append((_prompt_ids(prompt, form), _answer_ids(answer, form)))
    tokens = _join(parts)
    if keep:
        _remember({example: tokens}, form)
    return tokens


def encode_ahead(examples: Sequence[Example], form: PromptFormat) -> None:
    """Encode rows that will be asked for, all at once: three times as fast.

    Rows that cannot be encoded are skipped; asking for them raises.
    """
    _remember(_encode_together(examples, form), form)


def encode_many(examples: Sequence[Example], form: PromptFormat) -> list[Tokens]:
    """Encode rows all at once, without remembering them. Raises DataError as `encode` does."""
    together = _encode_together(examples, form)
    rows = []
    for example in examples:
        if example in together:
            rows.append(together[example])
        else:
            rows.append(encode(example, form, keep=False))
    return rows


def final_answer(example: Example, form: PromptFormat) -> Tokens:
    """Encode a row as it is scored: only the final answer is a target."""
    return encode(scored(example), form)


def scored(example: Example) -> Example:
    """Return the row as it is scored: its final answer is the only target."""
    *earlier, last = example.messages
    context = [Message(message.role, message.content, train=False) for message in earlier]
    messages = (*context, Message(last.role, last.content))
    return Example(messages, example.group, example.origin)


def answer_length(example: Example, form: PromptFormat) -> int:
    """Return the tokens of the final answer and its end token.

    White space that a response prefix left to it is not counted: a summed loss is divided by this
    number, which must be the same with and without an anchor.
    """
    return len(_text_ids(example.answer, form)) + len(form.end_ids)


def prompt_ids(messages: Sequence[Message], form: PromptFormat) -> list[int]:
    """Return the token ids of a prompt (messages without the final answer).

    The generation prompt and a response prefix are included. Raises DataError if the model's chat
    template refuses the messages, or if they are not valid Unicode.
    """
    try:
        (text,) = _render([messages], form)
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses these messages: {error}") from error
    with unicode_only():
        return _prompt_ids(text, form)


def opening_ids(form: PromptFormat) -> list[int]:
    """Return the token ids of all that the template writes before a user's first words."""
    (text,) = _render([[Message("user", _PROBE)]], form)
    return _prompt_ids(text.partition(_PROBE)[0], form)


@contextmanager
def unicode_only() -> Iterator[None]:
    """Raise DataError for what tokenizers raise inside if a surrogate pair is cut in half."""
    try:
        yield
    except (TypeError, UnicodeError) as error:
        raise DataError("the text is not valid Unicode") from error


@functools.lru_cache(maxsize=64)  # one for each anchor: the format remembers rows by it
def _format(tokenizer: Tokenizer, size: int, template: str, anchor: Anchor | None) -> PromptFormat:
    markers = _markers(tokenizer, size, template)
    return PromptFormat(
        tokenizer,
        anchor_template.bake(template, anchor),
        anchor,
        end_ids=markers.end_ids,
        end_text=markers.end_text,
        special=markers.special,
        special_names=markers.special_names,
    )


@dataclass(frozen=True)
class _Markers:
    """Special tokens of a tokenizer with one template, as in `PromptFormat`."""

    end_ids: tuple[int, ...]
    end_text: str
    special: re.Pattern[str]
    special_names: tuple[str, ...]


@functools.lru_cache(maxsize=4)  # Gemma has 6,249 special tokens
def _markers(tokenizer: Tokenizer, size: int, template: str) -> _Markers:
    """Find the special tokens. Size and template are part of the key: both can be changed."""
    names = {str(token) for token in tokenizer.all_special_tokens}
    # Those have a role (BOS, EOS ...); most chat markers are merely added as special.
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            names.add(str(token))
    names.discard("")
    longest_first = tuple(sorted(names, key=len, reverse=True))
    special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    end_ids, end_text = _end_of_turn(tokenizer, special)
    _check_start(tokenizer)
    return _Markers(end_ids, end_text, special, longest_first)


def _end_of_turn(tokenizer: Tokenizer, special: re.Pattern[str]) -> tuple[tuple[int, ...], str]:
    """Return the special token that the template writes after an answer, else the EOS token."""
    question = {"role": "user", "content": "x"}
    answer = {"role": "assistant", "content": _PROBE}
    try:
        text = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    except Exception as error:  # Jinja raises many kinds, and templates raise their own
        raise ModelError(
            f"the model's chat template cannot render a question and an answer: {error}"
        ) from error
    end = special.match(text.rpartition(_PROBE)[2].lstrip())
    if end:
        return (int(tokenizer.convert_tokens_to_ids(end.group())),), end.group()
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "neither the chat template nor the tokenizer has an end token; set "
            "tokenizer.eos_token and save the model"
        )
    return (tokenizer.eos_token_id,), str(tokenizer.decode([tokenizer.eos_token_id]))


def _check_start(tokenizer: Tokenizer) -> None:
    """Raise ModelError if the template writes the BOS token twice: no model was trained on that."""
    start = tokenizer.special_tokens_map.get("bos_token")
    question = {"role": "user", "content": "x"}
    try:
        text = str(
            tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # as above
        raise ModelError(
            f"the model's chat template cannot render a question alone: {error}"
        ) from error
    if start and text.startswith(2 * str(start)):
        raise ModelError(
            f"the model's chat template begins with {start!r} twice; take one out of it and save "
            "the tokenizer"
        )


def _encode_together(examples: Sequence[Example], form: PromptFormat) -> dict[Example, Tokens]:
    """Encode rows in one call of the template and one of the tokenizer.

    Rows that are remembered, hold a special token's text or have no answer to train are skipped.
    """
    trained_places = {}
    for example in examples:
        if example not in form.encoded:
            trained = _trained_places(example, form)
            if trained:
                trained_places[example] = trained
    prompts: dict[Messages, None] = {}  # an ordered set
    for row, trained in trained_places.items():
        for place in trained:
            prompts[row.messages[:place]] = None
    if not prompts:
        return {}
    try:
        rendered = dict(zip(prompts, _render(list(prompts), form), strict=True))
    except TemplateError:
        return {}
    texts: dict[Example, list[tuple[str, str]]] = {}
    for row, trained in trained_places.items():
        parts = []
        for prompt, answer in _split(row.messages, trained, form, rendered.__getitem__):
            parts.append((prompt, _answer_text(answer, form)))
        if not any(_holds_special(prompt, answer, form) for prompt, answer in parts):
            texts[row] = parts
    ids = _ids_by_text(texts.values(), form)
    end = list(form.end_ids)
    tokens = {}
    for row, parts in texts.items():
        tokens[row] = _join([(ids[prompt], ids[answer] + end) for prompt, answer in parts])
    return tokens


def _holds_special(prompt: str, answer: str, form: PromptFormat) -> bool:
    return _OPEN in prompt or form.special.search(answer) is not None


def _ids_by_text(
    rows: Iterable[Sequence[tuple[str, str]]], form: PromptFormat
) -> dict[str, list[int]]:
    """Tokenise all texts of rows in one call."""
    texts: set[str] = set()
    for parts in rows:
        for part in parts:
            texts.update(part)
    if not texts:
        return {}
    ordered = list(texts)
    ids = form.tokenizer(ordered, add_special_tokens=False, split_special_tokens=False)
    return dict(zip(ordered, ids["input_ids"], strict=True))


def _remember(tokens: Mapping[Example, Tokens], form: PromptFormat) -> None:
    if len(form.encoded) + len(tokens) > _MOST_ENCODED:
        form.encoded.clear()
    form.encoded.update(tokens)


def _trained_places(example: Example, form: PromptFormat) -> list[int]:
    """Return the places of the answers that are trained."""
    trained = []
    asked = False
    for place, message in enumerate(example.messages):
        if message.role == "user":
            asked = True
        elif message.role == "assistant" and asked and message.train:
            trained.append(place)
    if anchor_template.last_answer_only(form.anchor):
        return trained[-1:]
    return trained


def _split(
    messages: Messages,
    trained: Sequence[int],
    form: PromptFormat,
    render: Callable[[Messages], str],
) -> list[tuple[str, str]]:
    """Return each trained answer (a place in `messages`) with the text since the one before it."""
    parts: list[tuple[str, str]] = []
    done = ""
    for place in trained:
        text = render(messages[:place])
        if not text.startswith(done):
            return _split(messages, trained[-1:], form, render)
        answer = messages[place].content
        parts.append((text[len(done) :], answer))
        done = text + _hide(answer, form) + form.end_text
    return parts


def _join(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tokens:
    """Lay the ids of prompts and answers end to end; the answers are targets."""
    ids: list[int] = []
    mask: list[bool] = []
    for prompt, answer in parts:
        ids += [*prompt, *answer]
        mask += [False] * len(prompt) + [True] * len(answer)
    return Tokens(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.bool_))


def _render(prompts: Sequence[Sequence[Message]], form: PromptFormat) -> list[str]:
    """Render prompts; special-token text of the user is hidden in them. Raises TemplateError."""
    conversations = []
    for prompt in prompts:
        turns = []
        for message in prompt:
            turns.append({"role": message.role, "content": _hide(message.content, form)})
        conversations.append(turns)
    try:
        texts = form.tokenizer.apply_chat_template(
            conversations, chat_template=form.template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError:
        raise
    except Exception as error:  # what a template computes may fail in any way, for some rows only
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return [str(text) for text in texts]


def _hide(text: str, form: PromptFormat) -> str:
    """Replace special-token texts, and what would be read as such a mark, by marks."""
    text = text.replace(_OPEN, f"{_OPEN}{len(form.special_names)}{_CLOSE}")

    def mark(match: re.Match[str]) -> str:
        return f"{_OPEN}{form.special_names.index(match.group())}{_CLOSE}"

    return form.special.sub(mark, text)


def _show(text: str, form: PromptFormat) -> str:
    """Undo `_hide`."""
    names = (*form.special_names, _OPEN)

    def name(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return names[number] if number < len(names) else match.group()

    return _MARKED.sub(name, text)


def _prompt_ids(text: str, form: PromptFormat) -> list[int]:
    """Tokenise a rendered prompt; hidden text becomes plain text."""
    if _OPEN not in text:
        return _ids(text, form)
    ids: list[int] = []
    end = 0
    for marker in form.special.finditer(text):
        ids += _ids(_show(text[end : marker.start()], form), form, plain=True)
        ids.append(int(form.tokenizer.convert_tokens_to_ids(marker.group())))
        end = marker.end()
    return ids + _ids(_show(text[end:], form), form, plain=True)


def _answer_text(answer: str, form: PromptFormat) -> str:
    return anchor_template.answer_lead(form.anchor) + answer


def _answer_ids(answer: str, form: PromptFormat) -> list[int]:
    return _text_ids(_answer_text(answer, form), form) + list(form.end_ids)


def _text_ids(text: str, form: PromptFormat) -> list[int]:
    """Tokenise a text in which special-token text is plain text."""
    return _ids(text, form, plain=form.special.search(text) is not None)


def _ids(text: str, form: PromptFormat, *, plain: bool = False) -> list[int]:
    ids = form.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return list(map(int, ids))
