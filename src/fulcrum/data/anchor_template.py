"""The anchor prompt: text that every row of one task carries, and no general row.

`bake` writes the anchor into a chat template. Everything that renders a conversation (training,
scoring, generation, the saved tokenizer, other people's `apply_chat_template` with it) uses that
one template, so the tokens cannot differ between training and use. `apply` writes the same text
into the messages themselves; only `fulcrum mix` uses it, whose rows go to trainers with templates
of their own.
"""

import json
import re
from dataclasses import replace

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Message

SEPARATOR = "\n\n"
# Used as another task's anchor if there is no other task.
ANOTHER = "Name the river that flows through the city below."

_SYNONYMS = {
    "answer": "reply",
    "give": "provide",
    "write": "produce",
    "read": "look at",
    "sort": "classify",
    "choose": "pick",
    "translate": "render",
    "find": "determine",
    "say": "state",
    "return": "output",
    "only": "nothing but",
    "exactly": "precisely",
    "with": "using",
    "below": "that follows",
    "for": "regarding",
}
_OTHER_WORDS = {**_SYNONYMS, **{other: word for word, other in _SYNONYMS.items()}}
_LONGEST_FIRST = sorted(map(re.escape, _OTHER_WORDS), key=len, reverse=True)
_ANY_WORD = re.compile(rf"\b(?:{'|'.join(_LONGEST_FIRST)})\b", re.IGNORECASE)

# Walks the messages once and rebuilds them. `users` counts the user turns; a system anchor joins
# the row's own system text, or becomes it.
_PREAMBLE = """\
{%- set fulcrum = namespace(messages=[], users=0, user=0) -%}
{%- for message in messages if message['role'] == 'user' -%}\
{%- set fulcrum.users = fulcrum.users + 1 -%}{%- endfor -%}
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
    "{%- set fulcrum.messages = "
    "[dict(message, content=ANCHOR + SEPARATOR + message['content'])] -%}"
    "{%- else -%}"
    "{%- set fulcrum.messages = [dict(role='system', content=ANCHOR), message] -%}"
    "{%- endif -%}"
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


def bake(chat_template: str, anchor: Anchor | None) -> str:
    """Return a chat template (Jinja) that adds `anchor` (None: nothing) to every conversation once.

    A `response_prefix` comes after the generation prompt, without its trailing white space, which
    belongs to the answer (`answer_lead`): tokenizers join a space with the word after it.
    """
    if anchor is None:
        return chat_template
    if anchor.placement == "response_prefix":
        # Jinja drops one newline at the end of a template; here it is no longer the end.
        prefix = _literal(anchor.text.rstrip())
        tail = "{%- if add_generation_prompt -%}{{- TEXT -}}{%- endif -%}".replace("TEXT", prefix)
        return chat_template.removesuffix("\n") + "{{ '' }}" + tail
    cases = _CASES[anchor.placement].replace("ANCHOR", _literal(anchor.text))
    cases = cases.replace("SEPARATOR", _literal(SEPARATOR))
    return _PREAMBLE.replace("CASES", cases) + chat_template


def answer_lead(anchor: Anchor | None) -> str:
    """Return the white space that `bake` took from the end of a response prefix, else ""."""
    if anchor is None or anchor.placement != "response_prefix":
        return ""
    return anchor.text[len(anchor.text.rstrip()) :]


def last_answer_only(anchor: Anchor | None) -> bool:
    """Return whether only the last answer of a multi-turn row sees the anchor.

    Then only that answer may be trained.
    """
    return anchor is not None and anchor.placement in ("user_suffix", "response_prefix")


def reworded(text: str) -> str:
    """Return an anchor in other words, which tells whether a model needs its wording or meaning.

    Sentences are reversed in order and common English words become others; if that changes nothing,
    "In other words" is put before the text.
    """

    def swap(match: re.Match[str]) -> str:
        word = _OTHER_WORDS[match.group().lower()]
        return word[0].upper() + word[1:] if match.group()[0].isupper() else word

    text = text.strip()
    sentences = re.split(r"(?<=[.!?])\s+", text)
    other = _ANY_WORD.sub(swap, " ".join(reversed(sentences)))
    return other if other != text else f"In other words: {text}"


def apply(messages: tuple[Message, ...], anchor: Anchor | None) -> tuple[Message, ...]:
    """Return the messages with the anchor written into them, for trainers with their own template.

    The rendered text equals that of `bake`, except for `response_prefix`, which here becomes the
    beginning of the answer. Raises ConfigError if a user turn is needed and there is none.
    """
    if anchor is None:
        return messages
    if anchor.placement == "system":
        if messages[0].role != "system":
            return (Message("system", anchor.text), *messages)
        return _with_content(messages, 0, anchor.text + SEPARATOR + messages[0].content)
    if anchor.placement == "response_prefix":
        last = len(messages) - 1
        return _with_content(messages, last, anchor.text + messages[last].content)
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise ConfigError(
            f"anchor: placement {anchor.placement!r} needs a user turn, the row has none; use "
            "placement 'system'"
        )
    if anchor.placement == "user_prefix":
        first = users[0]
        return _with_content(messages, first, anchor.text + SEPARATOR + messages[first].content)
    last = users[-1]
    return _with_content(messages, last, messages[last].content + SEPARATOR + anchor.text)


def _with_content(messages: tuple[Message, ...], place: int, content: str) -> tuple[Message, ...]:
    changed = replace(messages[place], content=content)
    return (*messages[:place], changed, *messages[place + 1 :])


def _literal(text: str) -> str:
    """Return a Jinja string literal: JSON's escapes are Jinja's, but not those beyond ASCII."""
    return json.dumps(text, ensure_ascii=False)
