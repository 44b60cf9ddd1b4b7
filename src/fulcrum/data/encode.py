"""Turn conversations into token ids and loss masks, alike in training and inference.

- The ids of a prompt are the beginning of the ids that train its answer, in every turn: training,
  scoring and answering build them in the same steps (`_ids_of_turns`). A first prompt (with a
  response prefix) is tokenised as one string; an answer apart, ending with the template's
  end-of-turn token, which is trained.
- What messages and the anchor say must stand in the rendered text, else the row is refused.
- Template markers become special ids; the same characters inside a user's text stay plain text, so
  a row that contains ``<|im_end|>`` cannot end a turn.
- The anchor is part of the template (`anchor_template.bake`).
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message, Tokens
from fulcrum.data import anchor_template, chat_template

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
_PROBE, _PROBE_ANSWER = "fulcrumprobe", "fulcrumreply"  # texts that no template writes
_QUESTION = {"role": "user", "content": _PROBE}
_ANSWER = {"role": "assistant", "content": _PROBE_ANSWER}
_TO_COME = Message("assistant", "")  # an answer that is yet to be given
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
    around: tuple[str, str]  # white space that the template writes before and after an answer
    # For tokenizers that cut a text otherwise alone than after other text (SentencePiece's blank at
    # a beginning, tokens that swallow white space): what stands before every answer; else "".
    context: str
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
        turns = _turns(example.messages, trained[-1], form, partial(_render_one, form))
    except TemplateError as error:
        raise DataError(
            f"{example.origin}: the model's chat template refuses this row: {error}{_remedy(form)}"
        ) from error
    tokens = _join(_ids_of_turns(turns, form), trained)
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


def written_answer(example: Example, form: PromptFormat) -> str:
    """Return the final answer as the tokenizer writes it, without outer white space.

    It is the best that a model can generate; tokenizers that normalise text write another one.
    """
    return str(form.tokenizer.decode(_text_ids(example.answer, form))).strip()


def prompt_ids(messages: Sequence[Message], form: PromptFormat) -> list[int]:
    """Return the token ids of a prompt (messages without the final answer).

    The generation prompt and a response prefix are included. Raises DataError if the model's chat
    template refuses the messages, or if they are not valid Unicode.
    """
    try:
        turns = _turns((*messages, _TO_COME), len(messages), form, partial(_render_one, form))
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses these messages: {error}") from error
    with unicode_only():
        *earlier, last = _ids_of_turns(turns, form)
    ids: list[int] = []
    for part in earlier:
        ids += [*part.prompt, *part.answer]
    return ids + last.prompt


def changed_answers(example: Example, form: PromptFormat) -> tuple[int, int]:
    """Return how many trained answers of a row the template changes once they are earlier turns.

    First those that are not trained, since it rewrites the turns before a later answer; then those
    that are trained without their outer white space, which it trims. Raises DataError as `encode`.
    """
    places = _trained_places(example, form)
    if len(places) < 2:
        return 0, 0
    try:
        turns = _turns(example.messages, places[-1], form, partial(_render_one, form))
    except TemplateError as error:
        raise DataError(
            f"{example.origin}: the model's chat template refuses this row: {error}{_remedy(form)}"
        ) from error
    kept = {turn.place: turn.answer for turn in turns}
    trained = [place for place in places if place in kept]
    trimmed = [place for place in trained if kept[place] != example.messages[place].content]
    return len(places) - len(trained), len(trimmed)


def opening_ids(form: PromptFormat) -> list[int]:
    """Return the token ids of all that the template writes before a user's first words."""
    (text,) = _render([[Message("user", _PROBE)]], form)
    return _prompt_ids(text.partition(_PROBE)[0], form)


def _remedy(form: PromptFormat) -> str:
    if form.anchor is not None and form.anchor.placement == "system":
        return "; the anchor is placed in a system turn: try `placement: user_prefix`"
    return ""


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
        around=markers.around,
        context=markers.context,
        special=markers.special,
        special_names=markers.special_names,
    )


@dataclass(frozen=True)
class _Markers:
    """Special tokens of a tokenizer with one template, as in `PromptFormat`."""

    end_ids: tuple[int, ...]
    end_text: str
    around: tuple[str, str]
    context: str
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
    prompt = _prompt_of_probe(tokenizer)
    try:
        whole = str(tokenizer.apply_chat_template([_QUESTION, _ANSWER], tokenize=False))
    except Exception as error:  # Jinja raises many kinds, and templates raise their own
        raise ModelError(
            f"the model's chat template cannot render a question and an answer: {error}"
        ) from error
    after = whole.rpartition(_PROBE_ANSWER)[2]
    end_ids, end_text = _end_of_turn(tokenizer, special, after)
    before = whole[len(prompt) :].partition(_PROBE_ANSWER)[0] if whole.startswith(prompt) else ""
    trail = after.partition(end_text)[0] if end_text in after else ""
    around = tuple("" if text.strip() else text for text in (before, trail))
    context = prompt.partition(_PROBE)[2] or "\n"
    if not _depends_on_context(tokenizer, context, end_text):
        context = ""
    return _Markers(end_ids, end_text, (around[0], around[1]), context, special, longest_first)


def _end_of_turn(
    tokenizer: Tokenizer, special: re.Pattern[str], after: str
) -> tuple[tuple[int, ...], str]:
    """Return the special token that the template writes `after` an answer, else the EOS token."""
    end = special.match(after.lstrip())
    if end:
        return (int(tokenizer.convert_tokens_to_ids(end.group())),), end.group()
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "neither the chat template nor the tokenizer has an end token; set "
            "tokenizer.eos_token and save the model"
        )
    return (tokenizer.eos_token_id,), str(tokenizer.decode([tokenizer.eos_token_id]))


def _depends_on_context(tokenizer: Tokenizer, context: str, end_text: str) -> bool:
    """Return whether a text is cut otherwise after other text than alone."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for before, texts in ((context, ("x", " x", "1")), ("x" + end_text, ("\n", "\n\nx", " x"))):
        head = ids(before)
        for text in texts:
            whole = ids(before + text)
            if whole[: len(head)] == head and whole[len(head) :] != ids(text):
                return True
    return False


def _prompt_of_probe(tokenizer: Tokenizer) -> str:
    """Return a question with the generation prompt.

    Raises ModelError if it cannot be rendered, or if the template writes the BOS token twice: no
    model was trained on that.
    """
    start = tokenizer.special_tokens_map.get("bos_token")
    try:
        text = str(
            tokenizer.apply_chat_template([_QUESTION], tokenize=False, add_generation_prompt=True)
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
    return text


def _encode_together(examples: Sequence[Example], form: PromptFormat) -> dict[Example, Tokens]:
    """Encode rows in one call of the template and one of the tokenizer.

    Rows that are remembered, hold a special token's text or have no answer to train are skipped,
    and so are all if answers are cut in their context.
    """
    if form.context:
        return {}
    trained_places = {}
    for example in examples:
        if example not in form.encoded:
            trained = _trained_places(example, form)
            if trained:
                trained_places[example] = trained
    prompts: dict[Messages, None] = {}  # an ordered set
    for row, trained in trained_places.items():
        for place in _answer_places(row.messages, trained[-1]):
            prompts[row.messages[:place]] = None
    if not prompts:
        return {}
    try:
        rendered = dict(zip(prompts, _render(list(prompts), form), strict=True))
    except TemplateError:
        return {}
    texts: dict[Example, list[tuple[int, str, str]]] = {}
    for row, trained in trained_places.items():
        try:
            turns = _turns(row.messages, trained[-1], form, partial(_look_up, form, rendered))
        except TemplateError:
            continue
        parts = [(turn.place, turn.since, _answer_text(turn.answer, form)) for turn in turns]
        if not any(_holds_special(prompt, answer, form) for _, prompt, answer in parts):
            texts[row] = parts
    ids = _ids_by_text(texts.values(), form)
    end = list(form.end_ids)
    tokens = {}
    for row, parts in texts.items():
        pieces = [_Part(place, ids[prompt], ids[answer] + end) for place, prompt, answer in parts]
        tokens[row] = _join(pieces, trained_places[row])
    return tokens


def _holds_special(prompt: str, answer: str, form: PromptFormat) -> bool:
    return _OPEN in prompt or form.special.search(answer) is not None


def _ids_by_text(
    rows: Iterable[Sequence[tuple[int, str, str]]], form: PromptFormat
) -> dict[str, list[int]]:
    """Tokenise all texts of rows in one call."""
    texts: set[str] = set()
    for parts in rows:
        for _, prompt, answer in parts:
            texts.update((prompt, answer))
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


@dataclass(frozen=True)
class _Turn:
    """An answer in a rendered conversation."""

    place: int  # of the answer among the messages
    prompt: str  # the conversation up to it
    since: str  # what of that comes after the answer before
    answer: str

    def with_answer(self, form: PromptFormat) -> str:
        """Return the conversation up to the end of this answer."""
        lead, trail = _around(form)
        return self.prompt + lead + _hide(self.answer, form) + trail + form.end_text


@dataclass(frozen=True)
class _Part:
    """The token ids of a turn."""

    place: int  # of the answer among the messages
    prompt: list[int]  # since the answer before
    answer: list[int]


def _answer_places(messages: Messages, last: int) -> list[int]:
    """Return the places of the answers to questions, up to `last`, which counts in any case."""
    places = []
    asked = False
    for place, message in enumerate(messages[:last]):
        if message.role == "user":
            asked = True
        elif message.role == "assistant" and asked:
            places.append(place)
    return [*places, last]


def _turns(
    messages: Messages, last: int, form: PromptFormat, render: Callable[[Messages], str]
) -> list[_Turn]:
    """Return the turns up to the answer at `last`.

    They begin anew if the template renders earlier turns otherwise than they were as the last one;
    only outer white space that it trims is taken from an earlier answer.
    """
    turns: list[_Turn] = []
    for place in _answer_places(messages, last):
        prompt = render(messages[:place])
        since = prompt
        if turns:
            since = ""
            before = turns.pop()
            for earlier in (before, replace(before, answer=before.answer.strip())):
                done = earlier.with_answer(form)
                if prompt.startswith(done):
                    turns.append(earlier)
                    since = prompt[len(done) :]
                    break
            else:
                turns = []
                since = prompt
        turns.append(_Turn(place, prompt, since, messages[place].content))
    return turns


def _ids_of_turns(turns: Sequence[_Turn], form: PromptFormat) -> list[_Part]:
    """Tokenise turns.

    If texts are cut otherwise in context, a later prompt is cut as a whole, unless it then does not
    begin with the ids of the turns before.
    """
    parts = []
    done: list[int] = []
    for turn in turns:
        prompt = _prompt_ids(turn.since, form)
        if form.context and done:
            whole = _prompt_ids(turn.prompt, form)
            if whole[: len(done)] == done:
                prompt = whole[len(done) :]
        answer = _answer_ids(turn.answer, form)
        parts.append(_Part(turn.place, prompt, answer))
        done += [*prompt, *answer]
    return parts


def _join(parts: Sequence[_Part], trained: Collection[int]) -> Tokens:
    """Lay the ids of turns end to end; the answers at `trained` places are targets."""
    ids: list[int] = []
    mask: list[bool] = []
    for part in parts:
        ids += [*part.prompt, *part.answer]
        mask += [False] * len(part.prompt) + [part.place in trained] * len(part.answer)
    return Tokens(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.bool_))


def _render_one(form: PromptFormat, prompt: Messages) -> str:
    """Render a prompt. Raises TemplateError if something that is said in it is not written."""
    (text,) = _render([prompt], form)
    _check_said(prompt, text, form)
    return text


def _look_up(form: PromptFormat, rendered: Mapping[Messages, str], prompt: Messages) -> str:
    """Return a prompt that was rendered before. Raises TemplateError as `_render_one`."""
    text = rendered[prompt]
    _check_said(prompt, text, form)
    return text


def _check_said(prompt: Messages, text: str, form: PromptFormat) -> None:
    turns = [(message.role, message.content) for message in prompt]
    missing = chat_template.missing_text(turns, text, lambda said: _hide(said, form))
    if missing is not None:
        role, said = missing
        raise TemplateError(f"it does not write what its {role} message says, {said!r:.60}")
    if form.anchor is not None and form.anchor.text.strip() not in text:
        raise TemplateError(f"it does not write the anchor, {form.anchor.text!r:.60}")


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


def _around(form: PromptFormat) -> tuple[str, str]:
    """Return the white space before and after an answer."""
    if form.anchor is not None and form.anchor.placement == "response_prefix":
        return anchor_template.answer_lead(form.anchor), form.around[1]
    return form.around


def _answer_text(answer: str, form: PromptFormat) -> str:
    lead, trail = _around(form)
    return lead + answer + trail


def _answer_ids(answer: str, form: PromptFormat) -> list[int]:
    return _text_ids(_answer_text(answer, form), form) + list(form.end_ids)


def _text_ids(text: str, form: PromptFormat) -> list[int]:
    """Tokenise an answer's text, in which special-token text is plain text."""
    if form.special.search(text) is not None:
        return _ids(text, form, plain=True)
    if form.context:
        head = _ids(form.context, form)
        whole = _ids(form.context + text, form)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _ids(text, form)


def _ids(text: str, form: PromptFormat, *, plain: bool = False) -> list[int]:
    ids = form.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return list(map(int, ids))
