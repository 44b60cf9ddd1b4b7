"""One raw row (a mapping of columns) -> one `Example`, or a `Reject` that says why not.

Formats are recognised by their column names (`FORMATS`); a `Layout` says which column fills which slot. Where the names allow
no reading, or more than one, the user is asked (DataError with the YAML to write), never guessed for. A row that is well formed
but unusable becomes a `Reject` whose reason is short and can be counted.

Numbers and truth values stand for their JSON text (0 -> "0", true -> "true"), since labels are often written so; lists and
objects are no text.

Invariant: an Example's last message is the assistant's, no user or assistant message is blank, a system message stands first,
at least one answer is trained, and every text is valid Unicode.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import regex

from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import Example, Message, Reject, Role

# Format -> the slots it needs -> the column names that fill a slot (aliases as in ms-swift).
FORMATS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "ShareGPT": {"conversations": ("conversations",)},
    "prompt+completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "Alpaca": {"instruction": ("instruction",), "output": ("output",)},
    "query+response": {
        "query": ("query", "question", "problem"),
        "response": ("response", "answer", "output", "target", "solution"),
    },
}
# The same for inputs that nobody has answered yet; an answer beside them is not read.
INPUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "input": {"prompt": ("prompt", "instruction", "query", "question", "text")},
    "input messages": {"messages": ("messages", "conversations")},
}
OPTIONAL = ("system", "history", "group", "tools", "input")
SLOTS = (*dict.fromkeys(slot for slots in FORMATS.values() for slot in slots), *OPTIONAL)
ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}


_INVISIBLE = regex.compile(r"\p{Cf}+")


class _RowError(Exception):
    """Why a row cannot become an Example; never leaves this module."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Layout:
    """Which format a row has, and the file's column for each slot it fills."""

    format: str
    columns: Mapping[str, str]


def folded(text: str) -> str:
    """Return the text casefolded, in one Unicode form (NFKC) and without characters that nobody sees (category Cf)."""
    if text.isascii():
        return text.casefold()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()


def normalise(text: str) -> str:
    """Return the text folded, with white space collapsed: the form in which texts are compared."""
    return " ".join(folded(text).split())


def in_two(text: str) -> tuple[str, str]:
    """Cut a text after its first sentence, or in its middle where it has one only."""
    text = text.strip()
    end = re.search(r"[.!?][\"')]?\s+(?=\S)|\n(?=\S)", text)  # a run of line breaks is tried once
    if end is None:
        words = text.split()
        return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    return text[: end.end()].strip(), text[end.end() :].strip()


def sentences(text: str) -> str:
    """A text up to the end of its last whole sentence or line; empty where none ends."""
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’)\]]*(?=\s|$)|\n", text)]
    return text[: ends[-1]].strip() if ends else ""


def digest(*texts: str) -> str:
    """Return a short hash (32 hex digits of SHA-256) of texts in their normalised form."""
    return hashlib.sha256("\0".join(normalise(text) for text in texts).encode()).hexdigest()[:32]


def content_key(example: Example) -> str:
    """Return a hash that is equal for rows with the same normalised roles and texts, and for no others."""
    return digest(
        *(part for message in example.messages for part in (message.role, message.content))
    )


def layout(
    columns: Collection[str],
    mapping: Mapping[str, str],
    group: str | None,
    where: str,
    *,
    answered: bool = True,
) -> Layout:
    """Find the one format that `columns` fit. `mapping` is our name -> the file's column; `group` names the group column.
    Where rows are not `answered`, a column with the prompt does.

    Mapped names decide; aliases fill only the slots that are left. Raises DataError, beginning with `where`, for unknown or
    missing columns, for names that fit no format, and for names that fit more than one.
    """
    present = ", ".join(sorted(columns)) or "none"
    for slot, column in mapping.items():
        if slot not in SLOTS:
            raise DataError(
                f"{where}: `columns:` names an unknown slot {slot!r}{nearest(slot, SLOTS)}"
            )
        if column not in columns:
            raise DataError(
                f"{where}: `columns:` maps {slot} to {column!r}, which is not there; the columns are: {present}"
            )
    if group is not None and mapping.get("group", group) != group:
        raise DataError(
            f"{where}: `group: {group}` and `columns: {{group: {mapping['group']}}}` differ; keep one of them"
        )
    if group is not None and group not in columns:
        raise DataError(f"{where}: no column {group!r} for `group:`; the columns are: {present}")
    free = set(columns) - set(mapping.values())
    formats = FORMATS if answered else INPUTS
    fitting = list(_readings(free, mapping, formats))
    if len(fitting) != 1:
        raise DataError(
            f"{where}: " + (_ask(fitting) if fitting else _none_fits(present, free, formats))
        )
    name, slots = fitting[0]
    extras = {slot: mapping.get(slot, slot) for slot in OPTIONAL if slot in mapping or slot in free}
    return Layout(name, {**extras, **({"group": group} if group else {}), **slots})


def _readings(
    free: set[str], mapping: Mapping[str, str], formats: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> list[tuple[str, dict[str, str]]]:
    """All ways to fill a format's slots; a format must use every slot that the user mapped."""
    mapped = set(mapping) - {"system", "history", "group", "tools"}  # these go with every format
    found = []
    for name, slots in formats.items():
        if mapped <= ({*slots, "input"} if name in ("Alpaca", "input") else set(slots)):
            options = [
                [mapping[slot]] if slot in mapping else [a for a in slots[slot] if a in free]
                for slot in slots
            ]
            found += [(name, dict(zip(slots, choice, strict=True))) for choice in product(*options)]
    return found


def _ask(fitting: Sequence[tuple[str, dict[str, str]]]) -> str:
    choices = [
        "columns: {" + ", ".join(f"{slot}: {column}" for slot, column in slots.items()) + "}"
        for _, slots in fitting
    ]
    option = ",".join(f"{slot}={column}" for slot, column in fitting[0][1].items())
    return (
        f"the columns can be read in {len(fitting)} ways; say which, under the source's `path:`: {'  or  '.join(choices)} "
        f"(`fulcrum init` takes --columns {option})"
    )


def _none_fits(
    present: str, free: set[str], formats: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> str:
    accepted = "; ".join(f"{name} ({', '.join(slots)})" for name, slots in formats.items())
    if formats is INPUTS:
        return (
            f"no column holds inputs; the columns are: {present}. Accepted: {accepted}. For another name, write under the "
            "source's `path:`: columns: {prompt: YOUR_COLUMN}"
        )
    if free == {"text"}:
        return (
            "a `text` column is running text, not a conversation, so there is no answer to train on; "
            f"the columns are: {present}. Split it into columns of one of these formats: {accepted}"
        )
    return (
        f"no row format fits the columns: {present}. Accepted: {accepted}. "
        "For other names, write under the source's `path:`: columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN} "
        "(`fulcrum init` takes --columns prompt=YOUR_COLUMN,completion=YOUR_COLUMN)"
    )


def convert(row: Mapping[str, Any], shape: Layout, origin: str) -> Example | Reject:
    """Turn one row into an Example, or into a Reject with a countable reason. A missing column counts as an empty value.

    Without a group column the group is a hash of the prompt's text (all turns but the system's): the same question asked twice
    is the same content.
    """
    value = {slot: row.get(column) for slot, column in shape.columns.items()}
    try:
        messages = _with_system(_BUILDERS[shape.format](value), value.get("system"))
        _check(messages, answered=shape.format not in INPUTS)
        asked = messages if shape.format in INPUTS else messages[:-1]
        group = (
            _group(value["group"])
            if "group" in value
            else digest(*(m.content for m in asked if m.role != "system"))
        )
    except _RowError as error:
        return Reject(origin, error.reason, error.detail)
    return Example(tuple(messages), group, origin)


def _string(value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise _RowError("not text", f"{what} is {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowError(
            "invalid Unicode", f"{what} holds half of a surrogate pair: {value!r:.60}"
        ) from None
    return value


def _trained(message: Mapping[str, Any]) -> bool:
    flags = [message[key] for key in ("weight", "loss") if message.get(key) is not None]
    if any(not isinstance(flag, int | float) or flag not in (0, 1) for flag in flags):
        raise _RowError("weight is not 0 or 1", f"got {flags}")
    return all(flags)


def _conversation(value: Any, what: str) -> list[Message]:
    """Read [{role, content}] or [{from, value}], or the JSON text of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (
            ValueError,
            RecursionError,
        ):  # the latter where lists stand in lists by the thousand
            raise _RowError("not a list of messages", f"{what} is no JSON: {value!r:.60}") from None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise _RowError("not a list of messages", f"{what} is {value!r:.60}")
    messages = []
    for item in value:
        name = item.get("role") or item.get("from")
        if not isinstance(name, str) or name not in ROLES:
            raise _RowError("unknown role", f"{name!r}; known: {', '.join(ROLES)}")
        if item.get("tool_calls"):
            raise _RowError("tool calls are not supported", f"in {what}")
        text = item["content"] if item.get("content") is not None else item.get("value")
        messages.append(Message(ROLES[name], _string(text, "content"), _trained(item)))
    return messages


def _history(value: Any) -> list[Message]:
    """Read [[question, answer], ...]; nothing where there is none."""
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise _RowError("history is not a list of [question, answer]", f"got {value!r:.60}")
    roles: tuple[Role, Role] = ("user", "assistant")
    return [
        Message(role, _string(text, "history"))
        for pair in value
        for role, text in zip(roles, pair, strict=True)
    ]


def _from_messages(value: Mapping[str, Any]) -> list[Message]:
    if value.get("tools") not in (None, [], "", "[]"):
        raise _RowError("tools are not supported", f"got {value['tools']!r:.60}")
    slot = "messages" if "messages" in value else "conversations"
    return _history(value.get("history")) + _conversation(value[slot], slot)


def _from_pair(value: Mapping[str, Any]) -> list[Message]:
    """Prompt and completion, each a text or a message list (TRL). A prompt's own answers are context, not trained."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list):
        before = [
            replace(m, train=False) if m.role == "assistant" else m
            for m in _conversation(prompt, "prompt")
        ]
    else:
        before = [Message("user", _string(prompt, "prompt"))]
    if isinstance(completion, list):
        after = _conversation(completion, "completion")
    else:
        after = [Message("assistant", _string(completion, "completion"))]
    return _history(value.get("history")) + before + after


def _from_question(question: str, answer: Any, history: Any) -> list[Message]:
    return [
        *_history(history),
        Message("user", question),
        Message("assistant", _string(answer, "answer")),
    ]


def _from_alpaca(value: Mapping[str, Any]) -> list[Message]:
    parts = [_string(value.get(slot), slot) for slot in ("instruction", "input")]
    return _from_question(
        "\n".join(part for part in parts if part.strip()), value["output"], value.get("history")
    )


def _from_query(value: Mapping[str, Any]) -> list[Message]:
    return _from_question(_string(value["query"], "query"), value["response"], value.get("history"))


def _from_input(value: Mapping[str, Any]) -> list[Message]:
    """A prompt, a text or a message list, up to what the user said last."""
    if "messages" in value:
        messages = _history(value.get("history")) + _conversation(value["messages"], "messages")
    elif isinstance(value["prompt"], list):
        messages = _history(value.get("history")) + _conversation(value["prompt"], "prompt")
    else:
        parts = [_string(value.get(slot), slot) for slot in ("prompt", "input")]
        text = "\n".join(part for part in parts if part.strip())
        return [*_history(value.get("history")), Message("user", text)]
    last = max(
        (place for place, message in enumerate(messages) if message.role == "user"), default=-1
    )
    return messages[: last + 1]


_BUILDERS = {
    "input": _from_input,
    "input messages": _from_input,
    "messages": _from_messages,
    "ShareGPT": _from_messages,
    "prompt+completion": _from_pair,
    "Alpaca": _from_alpaca,
    "query+response": _from_query,
}


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    text = _string(system, "system")
    if not text.strip():
        return messages
    if any(message.role == "system" for message in messages):
        raise _RowError("two system texts", "one in the column `system`, one among the messages")
    return [Message("system", text), *messages]


def _check(messages: Sequence[Message], *, answered: bool) -> None:
    if not any(message.role == "user" for message in messages):
        raise _RowError("empty prompt", "no user message")
    if answered and messages[-1].role != "assistant":
        raise _RowError("last message is not the assistant's", f"it is the {messages[-1].role}'s")
    for place, message in enumerate(messages, 1):
        if message.role == "system" and place > 1:
            raise _RowError(
                "system message is not first", f"it is message {place} of {len(messages)}"
            )
        if message.role in ("user", "assistant") and not message.content.strip():
            raise _RowError(
                "empty prompt" if message.role == "user" else "empty answer",
                f"message {place} of {len(messages)}",
            )
    if answered and not any(message.train for message in messages if message.role == "assistant"):
        raise _RowError("every answer has weight 0")


def _group(value: Any) -> str:
    if isinstance(value, list | Mapping):
        raise _RowError("group is not a plain value", f"got {value!r:.60}")
    if value is None or not str(value).strip():
        raise _RowError("empty group")
    return _string(str(value), "group")
