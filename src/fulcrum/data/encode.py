"""Conversations -> token ids and loss mask. The contract that keeps training and inference alike:

- A prompt (with a response prefix) is one string and is tokenised as one; an answer is tokenised apart and ends with the
  template's end-of-turn token, which is trained.
- Template markers become special ids; the same characters inside a user's text stay plain text, so a row that contains
  ``<|im_end|>`` cannot end a turn.
- The anchor is part of the template (`anchor.bake`), for training and inference alike.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message, Tokens
from fulcrum.data import anchor_template

# For base models, whose tokenizers bring no chat template: a plain question-and-answer layout that any text model has seen.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'Output:\\n' + message['content'] + eos_token + '\\n\\n' -}}"
    "{%- else -%}{{- 'Input:\\n' + message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Output:\\n' -}}{%- endif -%}"
)

# Noncharacters (Unicode reserves them for internal use) stand in for special-token text while a template is rendered.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


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
class Format:
    """How one tokenizer writes conversations with one anchor (or none). `make_format` gives the same one for the same."""

    tokenizer: Tokenizer
    template: str
    anchor: Anchor | None
    end_ids: tuple[int, ...]
    end_text: str
    special: re.Pattern[str] = field(repr=False)
    special_names: tuple[str, ...] = field(repr=False)
    known: dict[Example, Tokens] = field(
        repr=False, default_factory=dict
    )  # arms, trials and previews ask for rows again


def plain_template(adds_bos: bool) -> str:
    """The template given to tokenizers that have none; `adds_bos`: the tokenizer starts plain text with its BOS token."""
    return ("{{- bos_token -}}" if adds_bos else "") + PLAIN_TEMPLATE


def make_format(tokenizer: Tokenizer, anchor: Anchor | None) -> Format:
    """Prepare encoding. Raises ModelError where the chat template cannot render one question and answer."""
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            "the tokenizer has no chat template (or several); load the model through `fulcrum.model.base_model.load`"
        )
    return _format(tokenizer, len(tokenizer), tokenizer.chat_template, anchor)


@functools.lru_cache(maxsize=64)  # one for each anchor: `encode` keeps rows by it
def _format(tokenizer: Tokenizer, size: int, template: str, anchor: Anchor | None) -> Format:
    return Format(
        tokenizer,
        anchor_template.bake(template, anchor),
        anchor,
        *_markers(tokenizer, size, template),
    )


@functools.lru_cache(
    maxsize=4
)  # Gemma has 6,249 special tokens; size and template are part of the key: both can be changed
def _markers(
    tokenizer: Tokenizer, size: int, template: str
) -> tuple[tuple[int, ...], str, re.Pattern[str], tuple[str, ...]]:
    """The end of a turn (ids, text) and the special tokens (pattern, names) that the tokenizer has with this template."""
    # `all_special_tokens` lists those with a role (BOS, EOS ...) only; most chat markers are merely added as special.
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = tuple(
        sorted(
            {str(token) for token in (*tokenizer.all_special_tokens, *added) if str(token)},
            key=len,
            reverse=True,
        )
    )
    special = re.compile("|".join(re.escape(name) for name in names) or r"(?!)")
    end = _end_of_turn(tokenizer, special)
    _check_start(tokenizer)
    return *end, special, names


def _end_of_turn(tokenizer: Tokenizer, special: re.Pattern[str]) -> tuple[tuple[int, ...], str]:
    """The special token that the template writes after an answer; the tokenizer's EOS where it writes none."""
    probe = "fulcrumprobe"
    try:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}],
                tokenize=False,
            )
        )
    except Exception as error:  # Jinja raises many kinds, and templates raise their own
        raise ModelError(
            f"the model's chat template cannot render a question and an answer: {error}"
        ) from error
    found = special.match(text.rpartition(probe)[2].lstrip())
    if found:
        return (int(tokenizer.convert_tokens_to_ids(found.group())),), found.group()
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "neither the chat template nor the tokenizer has an end token; set tokenizer.eos_token and save the model"
        )
    return (tokenizer.eos_token_id,), str(tokenizer.decode([tokenizer.eos_token_id]))


def _check_start(tokenizer: Tokenizer) -> None:
    """Raise ModelError where the template begins a conversation with the beginning-of-text token twice: nobody trained that."""
    start = tokenizer.special_tokens_map.get("bos_token")
    try:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # as above
        raise ModelError(
            f"the model's chat template cannot render a question alone: {error}"
        ) from error
    if start and text.startswith(2 * str(start)):
        raise ModelError(
            f"the model's chat template begins with {start!r} twice; take one out of it and save the tokenizer"
        )


def _hide(text: str, form: Format) -> str:
    """The text with its special-token texts, and what would be read as the mark of one, marked by their numbers."""
    text = text.replace(_OPEN, f"{_OPEN}{len(form.special_names)}{_CLOSE}")
    return form.special.sub(
        lambda found: f"{_OPEN}{form.special_names.index(found.group())}{_CLOSE}", text
    )


def _show(text: str, form: Format) -> str:
    names = (*form.special_names, _OPEN)
    return _MARKED.sub(
        lambda found: (
            names[int(found.group(1))] if int(found.group(1)) < len(names) else found.group()
        ),
        text,
    )


def _ids(text: str, form: Format, *, plain: bool = False) -> list[int]:
    found = form.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return [int(token) for token in found]


def _render(prompts: Sequence[Sequence[Message]], form: Format) -> list[str]:
    """Rendered prompts; special-token text of the user stands hidden in them."""
    turns = [
        [{"role": message.role, "content": _hide(message.content, form)} for message in prompt]
        for prompt in prompts
    ]
    try:
        found = form.tokenizer.apply_chat_template(
            turns, chat_template=form.template, add_generation_prompt=True, tokenize=False
        )  # fmt: skip
    except TemplateError:
        raise
    except (
        Exception
    ) as error:  # what a template computes may fail in any way, for one row and not for another
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return [str(text) for text in found]


def _prompt_text(messages: Sequence[Message], form: Format) -> str:
    return _render([messages], form)[0]


def _prompt_ids(text: str, form: Format) -> list[int]:
    if _OPEN not in text:
        return _ids(text, form)
    ids: list[int] = []
    end = 0
    for marker in form.special.finditer(text):
        ids += _ids(_show(text[end : marker.start()], form), form, plain=True)
        ids.append(int(form.tokenizer.convert_tokens_to_ids(marker.group())))
        end = marker.end()
    return ids + _ids(_show(text[end:], form), form, plain=True)


def prompt_ids(messages: Sequence[Message], form: Format) -> list[int]:
    """Token ids of a prompt (messages without the final answer), the generation prompt and response prefix included.

    Raises DataError where the model's chat template refuses the messages, or they are no Unicode.
    """
    try:
        text = _prompt_text(messages, form)
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses these messages: {error}") from error
    with unicode_only():
        return _prompt_ids(text, form)


@contextmanager
def unicode_only() -> Iterator[None]:
    """Around tokenizing: raise DataError where tokenizers raise what they do for halves of surrogate pairs."""
    try:
        yield
    except (TypeError, UnicodeError) as error:
        raise DataError("the text is not valid Unicode") from error


def opening_ids(form: Format) -> list[int]:
    """Token ids of all that the template writes before a user's first words; none where it writes nothing."""
    probe = "fulcrumprobe"
    return _prompt_ids(_prompt_text([Message("user", probe)], form).partition(probe)[0], form)


def _answer(answer: str, form: Format) -> str:
    return anchor_template.answer_lead(form.anchor) + answer


def _answer_ids(answer: str, form: Format) -> list[int]:
    text = _answer(answer, form)
    return _ids(text, form, plain=form.special.search(text) is not None) + list(form.end_ids)


def answer_length(example: Example, form: Format) -> int:
    """Tokens of the final answer and its end token, without the white space that a response prefix left to it.

    This is what a summed loss is divided by: the same number in arms with and without an anchor.
    """
    answer = example.answer
    return len(_ids(answer, form, plain=form.special.search(answer) is not None)) + len(
        form.end_ids
    )


def encode(example: Example, form: Format, *, keep: bool = True) -> Tokens:
    """Return ids and loss mask of one conversation; every trained answer and its end token is a target.

    Earlier answers of a multi-turn row are trained too, where the template renders a conversation so far as the beginning of
    the longer one (some drop reasoning from past turns: there, and for anchors that stand after the last question, only the
    last answer is). An answer that stands before any question is context. Raises DataError where no answer may be trained,
    and where the model's chat template refuses the row. With `keep`, the row is known when it is asked for again.
    """
    found = form.known.get(example)
    if found is None:
        trained = _trained(example, form)
        if not trained:
            raise DataError(
                f"{example.origin}: no answer to train (every assistant message has weight 0); drop the row"
            )
        try:
            parts = _parts(
                example.messages, trained, form, lambda messages: _prompt_text(messages, form)
            )
        except TemplateError as error:
            raise DataError(
                f"{example.origin}: the model's chat template refuses this row: {error}"
            ) from error
        found = _joined(
            [(_prompt_ids(prompt, form), _answer_ids(answer, form)) for prompt, answer in parts]
        )
        if keep:
            _keep({example: found}, form)
    return found


def encode_ahead(examples: Sequence[Example], form: Format) -> None:
    """Encode rows that will be asked for, all at once: three times as fast. What cannot be encoded waits to be asked for."""
    _keep(_together(examples, form), form)


def encode_many(examples: Sequence[Example], form: Format) -> list[Tokens]:
    """`encode` for each example, all at once and without keeping them. Raises DataError."""
    found = _together(examples, form)
    return [
        found[example] if example in found else encode(example, form, keep=False)
        for example in examples
    ]


def _together(examples: Sequence[Example], form: Format) -> dict[Example, Tokens]:
    """Encode those rows that are not known yet and hold no special token's text, in two calls of the tokenizer."""
    rows = {
        example: trained
        for example in examples
        if example not in form.known and (trained := _trained(example, form))
    }
    prompts = list(
        dict.fromkeys(row.messages[:i] for row, trained in rows.items() for i in trained)
    )
    try:
        texts = dict(zip(prompts, _render(prompts, form), strict=True)) if prompts else {}
    except TemplateError:
        return {}
    plain = {
        row: _parts(row.messages, trained, form, texts.__getitem__) for row, trained in rows.items()
    }
    plain = {
        row: [(prompt, _answer(answer, form)) for prompt, answer in parts]
        for row, parts in plain.items()
        if not any(
            _OPEN in prompt or form.special.search(_answer(answer, form))
            for prompt, answer in parts
        )
    }
    wanted = list({text for parts in plain.values() for part in parts for text in part})
    options = {"add_special_tokens": False, "split_special_tokens": False}  # as in `_ids`
    ids = (
        dict(zip(wanted, form.tokenizer(wanted, **options)["input_ids"], strict=True))
        if wanted
        else {}
    )
    end = list(form.end_ids)
    return {
        row: _joined([(ids[prompt], ids[answer] + end) for prompt, answer in parts])
        for row, parts in plain.items()
    }


_KNOWN = 2**15  # rows that a format keeps


def _keep(found: Mapping[Example, Tokens], form: Format) -> None:
    if len(form.known) + len(found) > _KNOWN:
        form.known.clear()
    form.known.update(found)


def _trained(example: Example, form: Format) -> list[int]:
    """The places of the answers that are trained."""
    question = next(
        (i for i, message in enumerate(example.messages) if message.role == "user"),
        len(example.messages),
    )
    answers = [
        i
        for i, message in enumerate(example.messages)
        if message.role == "assistant" and i > question
    ]
    trained = [i for i in answers if example.messages[i].train]
    return trained[-1:] if anchor_template.last_answer_only(form.anchor) else trained


def _parts(
    messages: tuple[Message, ...],
    trained: Sequence[int],
    form: Format,
    render: Callable[[tuple[Message, ...]], str],
) -> list[tuple[str, str]]:
    """The text before each of the `trained` answers (places in `messages`), from the end of the one before, and the answer."""
    parts: list[tuple[str, str]] = []
    done = ""
    for i in trained:
        text = render(messages[:i])
        if not text.startswith(done):
            return _parts(messages, trained[-1:], form, render)
        parts.append((text[len(done) :], messages[i].content))
        done = text + _hide(messages[i].content, form) + form.end_text
    return parts


def _joined(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tokens:
    """Token ids of prompts and answers, laid end to end; the answers are targets."""
    ids = [token for pair in parts for part in pair for token in part]
    mask = [
        target
        for prompt, answer in parts
        for target in [False] * len(prompt) + [True] * len(answer)
    ]
    return Tokens(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.bool_))


def final_answer(example: Example, form: Format) -> Tokens:
    """Like `encode`, but only the final answer is a target: what is scored."""
    return encode(scored(example), form)


def scored(example: Example) -> Example:
    """The row as it is scored: its final answer is the only target."""
    *earlier, last = example.messages
    silent = tuple(Message(message.role, message.content, train=False) for message in earlier)
    return Example((*silent, Message(last.role, last.content)), example.group, example.origin)
