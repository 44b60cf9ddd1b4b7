"""The anchor prompt: text that every row of one task carries, and no general row.

`bake` writes the anchor into a chat template, and everything that renders a conversation here (training, scoring, generation,
the saved tokenizer, other people's `apply_chat_template` with it) uses that one template, so the tokens cannot differ between
training and use. `apply` writes the same text into the messages themselves. It serves `fulcrum mix` only, whose rows go to
trainers with templates of their own.
"""

import json
import re
from dataclasses import replace

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Message

SEPARATOR = "\n\n"
ANOTHER = "Name the river that flows through the city below."  # some other task's anchor, where there is no other task

# Walks the messages once and rebuilds them. `users` counts its user turns; a system anchor joins the row's own
# system text, or becomes it.
_PREAMBLE = """\
{%- set fulcrum = namespace(messages=[], users=0, user=0) -%}
{%- for message in messages if message['role'] == 'user' -%}{%- set fulcrum.users = fulcrum.users + 1 -%}{%- endfor -%}
{%- for message in messages -%}
{%- set fulcrum.user = fulcrum.user + (1 if message['role'] == 'user' else 0) -%}
CASES
{%- endfor -%}
{%- set messages = fulcrum.messages -%}{{- '' }}"""

_KEEP = "{%- set fulcrum.messages = fulcrum.messages + [message] -%}"
_CHANGE = "{%- set fulcrum.messages = fulcrum.messages + [dict(message, content=CONTENT)] -%}"

_SYSTEM = (
    "{%- if loop.first -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set fulcrum.messages = [dict(message, content=ANCHOR + SEPARATOR + message['content'])] -%}"
    "{%- else -%}{%- set fulcrum.messages = [dict(role='system', content=ANCHOR), message] -%}{%- endif -%}"
    "{%- else -%}" + _KEEP + "{%- endif -%}"
)
_PREFIX = (
    "{%- if message['role'] == 'user' and fulcrum.user == 1 -%}"
    + _CHANGE.replace("CONTENT", "ANCHOR + SEPARATOR + message['content']")
    + "{%- else -%}"
    + _KEEP
    + "{%- endif -%}"
)
_SUFFIX = (
    "{%- if message['role'] == 'user' and fulcrum.user == fulcrum.users -%}"
    + _CHANGE.replace("CONTENT", "message['content'] + SEPARATOR + ANCHOR")
    + "{%- else -%}"
    + _KEEP
    + "{%- endif -%}"
)
_CASES = {"system": _SYSTEM, "user_prefix": _PREFIX, "user_suffix": _SUFFIX}


def _literal(text: str) -> str:
    """A Jinja string literal. JSON's escapes are Jinja's, as long as characters beyond ASCII stay as they are."""
    return json.dumps(text, ensure_ascii=False)


def bake(chat_template: str, anchor: Anchor | None) -> str:
    """Return a chat template (Jinja) that adds `anchor` to every conversation, exactly once; None leaves it as it is.

    A `response_prefix` stands after the generation prompt, without its trailing white space, which belongs to the answer
    (`answer_lead`): tokenizers join a space with the word after it.
    """
    if anchor is None:
        return chat_template
    if anchor.placement == "response_prefix":
        # Jinja drops one newline at the end of a template; here it is no longer the end.
        tail = "{%- if add_generation_prompt -%}{{- TEXT -}}{%- endif -%}".replace(
            "TEXT", _literal(anchor.text.rstrip())
        )
        return chat_template.removesuffix("\n") + "{{ '' }}" + tail
    cases = (
        _CASES[anchor.placement]
        .replace("ANCHOR", _literal(anchor.text))
        .replace("SEPARATOR", _literal(SEPARATOR))
    )
    return _PREAMBLE.replace("CASES", cases) + chat_template


def answer_lead(anchor: Anchor | None) -> str:
    """White space that an answer starts with: what `bake` took from the end of a response prefix."""
    if anchor is None or anchor.placement != "response_prefix":
        return ""
    return anchor.text[len(anchor.text.rstrip()) :]


def last_answer_only(anchor: Anchor | None) -> bool:
    """True where only the last answer of a multi-turn row sees the anchor, so that only it may be trained."""
    return anchor is not None and anchor.placement in ("user_suffix", "response_prefix")


_SYNONYMS = (
    ("answer", "reply"), ("give", "provide"), ("write", "produce"), ("read", "look at"), ("sort", "classify"),
    ("choose", "pick"), ("translate", "render"), ("find", "determine"), ("say", "state"), ("return", "output"),
    ("only", "nothing but"), ("exactly", "precisely"), ("with", "using"), ("below", "that follows"), ("for", "regarding"),
)  # fmt: skip


def reworded(text: str) -> str:
    """An anchor in other words, by rule: sentences change places, common words give way to others; where none is there,
    "In other words" stands before it.

    Tells whether a trained model needs the anchor's wording or its meaning. Languages other than English keep their words.
    """
    swapped = {old: new for pair in _SYNONYMS for old, new in (pair, pair[::-1])}

    def other(found: re.Match[str]) -> str:
        word = swapped[found.group().lower()]
        return word[0].upper() + word[1:] if found.group()[0].isupper() else word

    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    words = re.compile(
        r"\b(?:" + "|".join(sorted(map(re.escape, swapped), key=len, reverse=True)) + r")\b",
        re.IGNORECASE,
    )
    found = words.sub(other, " ".join(sentences[::-1]))
    return found if found != text.strip() else f"In other words: {text.strip()}"


def apply(messages: tuple[Message, ...], anchor: Anchor | None) -> tuple[Message, ...]:
    """Return the messages with the anchor written into them, for trainers with a template of their own.

    The rendered text equals that of `bake`, but for `response_prefix`, which here becomes the answer's beginning.
    """
    if anchor is None:
        return messages
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if anchor.placement == "system":
        if messages[0].role == "system":
            return (
                replace(messages[0], content=anchor.text + SEPARATOR + messages[0].content),
                *messages[1:],
            )
        return (Message("system", anchor.text), *messages)
    if anchor.placement == "response_prefix":
        return (*messages[:-1], replace(messages[-1], content=anchor.text + messages[-1].content))
    if not users:
        raise ConfigError(
            f"anchor: placement {anchor.placement!r} needs a user turn, the row has none; use placement 'system'"
        )
    place = users[0] if anchor.placement == "user_prefix" else users[-1]
    text = messages[place].content
    text = (
        anchor.text + SEPARATOR + text
        if anchor.placement == "user_prefix"
        else text + SEPARATOR + anchor.text
    )
    return (*messages[:place], replace(messages[place], content=text), *messages[place + 1 :])
