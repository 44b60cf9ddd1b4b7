"""Make a tokenizer's chat template fit for training: one template, which loses nothing.

Everything that renders a conversation uses the adapted template, and it is saved with adapters and
exports: choices and arguments hold there too. What is changed, and why:

- of several named templates one is chosen, as Transformers does, or by `template: {name: ...}`;
- arguments (`template: {enable_thinking: false}`) are written into it;
- `{% generation %}` marks, which plain Jinja does not know, become conditions that are true;
- if it expects messages as lists of parts, texts are made such lists;
- if its generation prompt opens a block (`<think>`), the opening is taken out: else every answer
  would stand inside a thought. Rows with thoughts open them themselves.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulcrum.core.errors import ModelError, nearest

_NAME = "name"  # the key of the settings that chooses a template; others are arguments
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_OPENED = re.compile(r"<([A-Za-z_]\w*)>\s*\Z")
_PARTS = (
    "{%- set fulcrum_parts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set fulcrum_parts.messages = fulcrum_parts.messages + "
    "[dict(message, content=[dict(type='text', text=message['content'])])] -%}"
    "{%- else -%}"
    "{%- set fulcrum_parts.messages = fulcrum_parts.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = fulcrum_parts.messages -%}{{- '' }}"
)
_CUT = (
    "{% set fulcrum_text %}{{ '' }}TEMPLATE{{ '' }}{% endset %}"
    "{{- fulcrum_text[:-LENGTH] if add_generation_prompt and fulcrum_text.endswith(OPENING) "
    "else fulcrum_text -}}"
)
_REFUSED = "anything"
_QUESTION, _ANSWER, _NEXT = (f"fulcrum{part}probe" for part in ("ask", "ans", "nx"))


def adapt(tokenizer: Any, choice: Mapping[str, Any]) -> list[str]:
    """Set the tokenizer's chat template to the adapted one; return what a run should say about it.

    `choice` is the settings' `template:`. Raises ModelError if it names a template that is not
    there, or if the template loses what users or assistants say.
    """
    facts: list[str] = []
    template = _chosen(tokenizer.chat_template, choice.get(_NAME), facts)
    template = _GENERATION.sub(_condition, template)
    arguments = {key: value for key, value in choice.items() if key != _NAME}
    if arguments:
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        facts.append(f"arguments of the chat template: {said}")
        template = _with_arguments(template, arguments)
    tokenizer.chat_template = template
    lost = _first_lost(tokenizer, template)
    if lost is not None and _first_lost(tokenizer, _PARTS + template) is None:
        template = _PARTS + template
        facts.append("the chat template expects lists of parts: texts are made such lists")
    elif lost is not None and lost != _REFUSED:  # why it refuses is said by `make_format`
        raise ModelError(
            f"the model's chat template does not write {lost}; choose another with "
            "`template: {name: ...}`, or another model"
        )
    opening = _opened_block(tokenizer, template)
    if opening:
        facts.append(
            f"the chat template's generation prompt opens {opening.strip()}, which is taken out: "
            "answers stand outside of it, unless rows open it themselves"
        )
        template = _without_opening(template, opening)
    tokenizer.chat_template = template
    return facts


def missing_text(
    turns: Sequence[tuple[str, str]],
    rendered: str,
    written: Callable[[str], str] = lambda text: text,
) -> tuple[str, str] | None:
    """Return the first of `turns` (role, text) that a rendered conversation lacks, or None.

    Texts, `written` as the template is given them, must stand in it in order, but for outer white
    space, for the system's place, and for thoughts (what precedes `</think>`) of earlier answers.
    """
    place = 0
    for role, text in turns:
        forms = {written(text.strip())}
        if role == "assistant":
            forms.add(written(text.rpartition("</think>")[2].strip()))
        start = 0 if role == "system" else place
        ends = []
        for wanted in forms:
            found = rendered.find(wanted, start)
            if found >= 0:
                ends.append(found + len(wanted))
        if not ends:
            return role, text
        if role != "system":
            place = min(ends)
    return None


def _chosen(templates: Any, name: str | None, facts: list[str]) -> str:
    """Return one of a tokenizer's templates (a text, or texts by name)."""
    if isinstance(templates, str):
        if name is not None:
            raise ModelError(
                f"template: name: {name!r} is asked for, and the tokenizer has a single template "
                "without a name; take `name` out"
            )
        return templates
    named = {str(key): str(text) for key, text in templates.items()}
    chosen = name or "default"
    if chosen not in named:
        raise ModelError(
            f"the tokenizer has chat templates named {', '.join(named)}, and none called "
            f"{chosen!r}{nearest(chosen, named)}; choose one with `template: {{name: ...}}`"
        )
    facts.append(f"of the chat templates {', '.join(named)}, {chosen!r} is used")
    return named[chosen]


def _condition(mark: re.Match[str]) -> str:
    before, end, after = mark.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


def _with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    sets = []
    for name, value in arguments.items():
        sets.append(f"{{%- set {name} = {_literal(value)} -%}}")
    return "".join(sets) + "{{- '' }}" + template


def _literal(value: Any) -> str:
    """Return a value in Jinja; its literals are JSON's, but for None."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _first_lost(tokenizer: Any, template: str) -> str | None:
    """Return what a template does not write of a small conversation, or None.

    Templates that refuse a conversation say so for each row; that is not losing it.
    """
    names = {"user": "what users say", "assistant": "earlier answers"}
    turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]
    if _render(tokenizer, template, turns[:1]) is None:
        return _REFUSED
    for conversation in (turns[:1], turns):
        text = _render(tokenizer, template, conversation)
        lost = missing_text(conversation, text) if text is not None else None
        if lost is not None:
            return names[lost[0]]
    return None


def _opened_block(tokenizer: Any, template: str) -> str:
    """Return the end of a generation prompt that opens a block around the answer, or ""."""
    question = [("user", _QUESTION)]
    prompt = _render(tokenizer, template, question) or ""
    alone = _render(tokenizer, template, question, prompted=False) or ""
    opened = _OPENED.search(prompt.removeprefix(alone))
    if opened is None:
        return ""
    answered = [*question, ("assistant", _ANSWER)]
    before, _, _ = (_render(tokenizer, template, answered, prompted=False) or "").partition(_ANSWER)
    header = _OPENED.search(before)  # also before a finished answer: it names who speaks
    if header is not None and header[1] == opened[1]:
        return ""
    return opened[0]


def _without_opening(template: str, opening: str) -> str:
    # Jinja drops one newline at the end of a template; here it is no longer the end.
    cut = _CUT.replace("LENGTH", str(len(opening))).replace("OPENING", _literal(opening))
    return cut.replace("TEMPLATE", template.removesuffix("\n"))


def _render(
    tokenizer: Any, template: str, turns: Sequence[tuple[str, str]], *, prompted: bool = True
) -> str | None:
    """Render a conversation; None if the template refuses it."""
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=prompted,
                tokenize=False,
            )
        )
    except Exception:  # what a template computes may fail in any way
        return None
