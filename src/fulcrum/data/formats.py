"""Convert one raw row (a mapping of columns) to an `Example`, or to a `Reject` that says why not.

Formats are recognised by their column names (`FORMATS`). A `Layout` says which column fills which
slot. If the names fit no format, or several, the user is asked with a DataError that holds the YAML
to write; nothing is guessed. A well-formed but unusable row becomes a `Reject` with a short reason
that can be counted.

Numbers and truth values become their JSON text (0 -> "0", true -> "true"), since labels are often
written so; lists and objects are not text. What a row holds beside what is read is counted by name
(`Unread`), so that it can be said; what would change the conversation is refused by name.

Invariant: an Example's last message is the assistant's, no user or assistant message is blank, a
system message comes first, at least one answer is trained, and every text is valid Unicode.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import regex

from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import Example, Message, Reject, Role

FormatTable = Mapping[str, Mapping[str, tuple[str, ...]]]

# Format -> the slots it needs -> the column names that fill a slot (aliases as in ms-swift).
FORMATS: FormatTable = {
    "messages": {"messages": ("messages",)},
    "ShareGPT": {"conversations": ("conversations",)},
    "prompt+completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "Alpaca": {"instruction": ("instruction",), "output": ("output",)},
    "query+response": {
        "query": ("query", "question", "problem"),
        "response": ("response", "answer", "output", "target", "solution"),
    },
}
# The same for inputs without answers; an answer column in such a file is not read.
INPUTS: FormatTable = {
    "input": {"prompt": ("prompt", "instruction", "query", "question", "text")},
    "input messages": {"messages": ("messages", "conversations")},
}
# What stands beside a question and is asked with it, as Alpaca's `input` is.
BESIDE = ("input", "context")
OPTIONAL = ("system", "history", "tools")  # used if a column has this name
NAMED = ("group", "weight")  # used only if the user names a column
SLOTS = (
    *dict.fromkeys(slot for slots in FORMATS.values() for slot in slots),
    *OPTIONAL,
    "input",
    *NAMED,
)
ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Keys of a message that say whether it is trained: 0 or false says no.
TRAINED = ("train", "trainable", "weight", "loss")
# Keys of a message that would change what is said, and what to do about them.
_REFUSED_KEYS = {
    "tool_calls": "write calls into `content` as your model writes them",
    "function_call": "write calls into `content` as your model writes them",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "write the thought into `content` as your model writes it (<think>...</think>), "
        "or take the key out",
    ),
    **dict.fromkeys(
        ("images", "image", "audio", "audios", "videos", "video"), "only text can be trained"
    ),
}
_READ_KEYS = {"role", "from", "content", "value", *TRAINED}

_INVISIBLE = regex.compile(r"\p{Cf}+")
_SENTENCE_BREAK = re.compile(r"[.!?][\"')]?\s+(?=\S)|\n(?=\S)")  # tries a run of newlines once
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*(?=\s|$)|\n")


Unread = Counter[str]  # name of what is not read, a column or a key of messages -> rows with it


@dataclass(frozen=True, slots=True)
class Layout:
    """Which format a row has, and the file's column for each slot it fills."""

    format: str
    columns: Mapping[str, str]

    def unread(self, columns: Iterable[str]) -> list[str]:
        """Return those of `columns` that fill no slot."""
        used = set(self.columns.values())
        return [column for column in columns if column not in used]


class _RowError(Exception):
    """Why a row cannot become an Example; never leaves this module."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail


def fold_text(text: str) -> str:
    """Return the text casefolded, in Unicode form NFKC, without invisible characters (Cf)."""
    if text.isascii():
        return text.casefold()
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()


def normalise(text: str) -> str:
    """Return the text folded, with white space collapsed: the form in which texts are compared."""
    return " ".join(fold_text(text).split())


def digest(*texts: str) -> str:
    """Return a short hash (32 hex digits of SHA-256) of texts in their normalised form."""
    joined = "\0".join(normalise(text) for text in texts)
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


def content_key(example: Example) -> str:
    """Return a hash that is equal only for rows with the same normalised roles and texts."""
    parts: list[str] = []
    for message in example.messages:
        parts += [message.role, message.content]
    return digest(*parts)


def split_in_two(text: str) -> tuple[str, str]:
    """Cut a text after its first sentence, or in the middle if it has only one."""
    text = text.strip()
    end = _SENTENCE_BREAK.search(text)
    if end is not None:
        return text[: end.end()].strip(), text[end.end() :].strip()
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last whole sentence or line; empty if none ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def find_layout(
    columns: Collection[str],
    mapping: Mapping[str, str | None],
    group: str | None,
    where: str,
    *,
    answered: bool = True,
) -> Layout:
    """Find the one format that `columns` fit.

    `mapping` is our name -> the file's column, or None if no column fills the slot. Mapped names
    decide; aliases fill only the slots that are left. `group` names the group column. If rows are
    not `answered`, a column with the prompt is enough. Raises DataError, beginning with `where`,
    for unknown or missing columns, for names that fit no format, and for names that fit more than
    one.
    """
    present = ", ".join(sorted(columns)) or "none"
    for slot, column in mapping.items():
        if slot not in SLOTS:
            raise DataError(
                f"{where}: `columns:` names an unknown slot {slot!r}{nearest(slot, SLOTS)}"
            )
        if column is not None and column not in columns:
            raise DataError(
                f"{where}: `columns:` maps {slot} to {column!r}, which is not there; "
                f"the columns are: {present}"
            )
    if group is not None and mapping.get("group", group) != group:
        raise DataError(
            f"{where}: `group: {group}` and `columns: {{group: {mapping['group']}}}` differ; "
            "keep one of them"
        )
    if group is not None and group not in columns:
        raise DataError(f"{where}: no column {group!r} for `group:`; the columns are: {present}")
    empty = {slot for slot, column in mapping.items() if column is None}
    named = {slot: column for slot, column in mapping.items() if column is not None}
    free = set(columns) - set(named.values())
    formats = FORMATS if answered else INPUTS
    readings = _readings(free, named, empty, formats)
    if not readings:
        raise DataError(f"{where}: {_none_fits(present, free, formats)}")
    if len(readings) > 1:
        raise DataError(f"{where}: {_several_fit(readings)}")
    name, slots = readings[0]
    filled: dict[str, str] = {}
    for slot in OPTIONAL:
        if slot in free and slot not in empty:
            filled[slot] = slot
    for slot in (*OPTIONAL, *NAMED):
        if slot in named:
            filled[slot] = named[slot]
    if group:
        filled["group"] = group
    return Layout(name, {**filled, **slots})


def convert(
    row: Mapping[str, Any], layout: Layout, origin: str, unread: Unread | None = None
) -> Example | Reject:
    """Convert one row to an Example, or to a Reject with a countable reason.

    A missing column counts as an empty value. Without a group column the group is a hash of the
    prompt's text: the same question about another document or under another system text is other
    content. Values that are not read are counted by name in `unread`.
    """
    value = {slot: row.get(column) for slot, column in layout.columns.items()}
    answered = layout.format not in INPUTS
    if unread is not None:
        _count_unread(row, value, layout, unread)
    try:
        _check_row(value)
        messages = _with_system(_BUILDERS[layout.format](value), value.get("system"))
        _check(messages, answered=answered)
        if "group" in value:
            group = _group(value["group"])
        else:
            prompt = messages[:-1] if answered else messages
            group = digest(*[turn.content for turn in prompt])
    except _RowError as error:
        return Reject(origin, error.reason, error.detail)
    return Example(tuple(messages), group, origin)


def unread_column(column: str, layout: Layout) -> str:
    """Return what to call a column that fills no slot, with the setting that would read it."""
    can_have_input = layout.format in _WITH_INPUT and "input" not in layout.columns
    slot = "input" if can_have_input else "group"
    if column in NAMED:
        slot = column
    return f"column {column} (columns: {{{slot}: {column}}} would read it)"


def unread_note(name: str, unread: Mapping[str, int], rows: int) -> str:
    """Return what to tell the user of a file's `rows` rows that hold what is not read."""
    found = [f"{what} in {count:,} of {rows:,} rows" for what, count in sorted(unread.items())]
    return f"{name}: not read: {'; '.join(found)}"


def _count_unread(
    row: Mapping[str, Any], value: Mapping[str, Any], layout: Layout, unread: Unread
) -> None:
    """Count the columns and the keys of messages that hold something and are not read."""
    for column in layout.unread(row):
        if _holds_something(row[column]):
            unread[unread_column(column, layout)] += 1
    keys: set[str] = set()
    for slot in ("messages", "conversations", "prompt", "completion"):
        items = value.get(slot)
        if isinstance(items, list):
            for item in items:
                if isinstance(item, Mapping):
                    keys.update(key for key in item if _holds_something(item[key]))
    for key in keys - _READ_KEYS:
        unread[f"message key {key}"] += 1


def _holds_something(value: Any) -> bool:
    """Return whether a value is more than a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return value not in ("", [], {})


def _readings(
    free: set[str], mapping: Mapping[str, str], empty: Collection[str], formats: FormatTable
) -> list[tuple[str, dict[str, str]]]:
    """List all ways to fill a format's slots; a format must use every slot that the user mapped.

    Slots in `empty` stay without a column.
    """
    mapped = set(mapping) - {*OPTIONAL, *NAMED}  # these go with every format
    readings: list[tuple[str, dict[str, str]]] = []
    for name, slots in formats.items():
        usable = set(slots)
        if name in _WITH_INPUT:
            usable.add("input")
        if not mapped <= usable:
            continue
        filled = dict(slots)
        if name in _WITH_INPUT and "input" not in empty:
            beside = [alias for alias in BESIDE if alias in free]
            if "input" in mapping or beside:
                filled["input"] = tuple(beside)
        options: list[list[str]] = []
        for slot, aliases in filled.items():
            if slot in mapping:
                options.append([mapping[slot]])
            else:
                options.append([alias for alias in aliases if alias in free and slot not in empty])
        for choice in product(*options):
            readings.append((name, dict(zip(filled, choice, strict=True))))
    return readings


def _several_fit(readings: Sequence[tuple[str, dict[str, str]]]) -> str:
    choices: list[str] = []
    for _, slots in readings:
        pairs = ", ".join(f"{slot}: {column}" for slot, column in slots.items())
        choices.append(f"columns: {{{pairs}}}")
    option = ",".join(f"{slot}={column}" for slot, column in readings[0][1].items())
    return (
        f"the columns can be read in {len(readings)} ways; say which, under the source's `path:`: "
        f"{'  or  '.join(choices)} (`fulcrum init` takes --columns {option})"
    )


def _none_fits(present: str, free: set[str], formats: FormatTable) -> str:
    accepted = "; ".join(f"{name} ({', '.join(slots)})" for name, slots in formats.items())
    if formats is INPUTS:
        return (
            f"no column holds inputs; the columns are: {present}. Accepted: {accepted}. "
            "For another name, write under the source's `path:`: columns: {prompt: YOUR_COLUMN}"
        )
    if free == {"text"}:
        return (
            "a `text` column is running text, not a conversation, so there is no answer to train "
            f"on; the columns are: {present}. Split it into columns of one of these formats: "
            f"{accepted}"
        )
    return (
        f"no row format fits the columns: {present}. Accepted: {accepted}. "
        "For other names, write under the source's `path:`: "
        "columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN} "
        "(`fulcrum init` takes --columns prompt=YOUR_COLUMN,completion=YOUR_COLUMN)"
    )


def _string(value: Any, what: str) -> str:
    if not _holds_something(value) and not isinstance(value, list | Mapping):
        return ""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise _RowError("not text", f"{what} is {type(value).__name__}: {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        detail = f"{what} holds half of a surrogate pair: {value!r:.60}"
        raise _RowError("invalid Unicode", detail) from None
    return value


def _is_trained(message: Mapping[str, Any]) -> bool:
    flags = {key: message[key] for key in TRAINED if message.get(key) is not None}
    for key, flag in flags.items():
        if not isinstance(flag, int | float) or flag not in (0, 1):
            raise _RowError("weight is not 0 or 1", f"{key} is {flag!r:.60}")
    if len(set(flags.values())) > 1:
        said = ", ".join(f"{key}: {flag!r}" for key, flag in flags.items())
        raise _RowError("keys differ on whether a message is trained", said)
    return all(flags.values())


def _check_row(value: Mapping[str, Any]) -> None:
    """Raise _RowError for a row whose slots say that it cannot be trained."""
    if value.get("tools") not in (None, [], "", "[]"):
        raise _RowError("tools are not supported", f"got {value['tools']!r:.60}")
    weight = value.get("weight")
    if not _holds_something(weight):
        return
    if weight in ("0", "1"):  # as CSV holds it
        weight = int(weight)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise _RowError("weight is not 0 or 1", f"got {weight!r:.60}")
    if not weight:
        raise _RowError("weight 0")


def _conversation(value: Any, what: str) -> list[Message]:
    """Read [{role, content}] or [{from, value}], or the JSON text of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # the latter for lists nested by the thousand
            raise _RowError("not a list of messages", f"{what} is no JSON: {value!r:.60}") from None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise _RowError("not a list of messages", f"{what} is {value!r:.60}")
    messages: list[Message] = []
    for item in value:
        for key, remedy in _REFUSED_KEYS.items():
            if _holds_something(item.get(key)):
                raise _RowError(f"message key {key} is not supported", remedy)
        messages.append(Message(_role(item), _content(item), _is_trained(item)))
    return messages


def _role(message: Mapping[str, Any]) -> Role:
    names = [message[key] for key in ("role", "from") if message.get(key)]
    for name in names or [None]:
        if not isinstance(name, str) or name not in ROLES:
            raise _RowError("unknown role", f"{name!r:.60}; known: {', '.join(ROLES)}")
    if len({ROLES[name] for name in names}) > 1:
        raise _RowError("two roles in a message", f"`role` {names[0]!r}, `from` {names[1]!r}")
    return ROLES[names[0]]


def _content(message: Mapping[str, Any]) -> str:
    """Return a message's text; parts of text are joined."""
    texts = []
    for key in ("content", "value"):
        if message.get(key) is not None:
            texts.append(_joined_parts(message[key]))
    if len(set(texts)) > 1:
        raise _RowError("two texts in a message", "`content` and `value` differ")
    return texts[0] if texts else ""


def _joined_parts(content: Any) -> str:
    """Return a text, or the texts of a list of parts laid end to end, as chat templates do."""
    if not isinstance(content, list):
        return _string(content, "content")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(_string(part, "content"))
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            others = [key for key in part if key not in ("type", "text")]
            held = [key for key in others if _holds_something(part[key])]
            if held or part.get("type", "text") != "text":
                raise _RowError("message part is more than text", f"{part!r:.60}")
            texts.append(_string(part["text"], "content"))
        else:
            raise _RowError("message part is not text", f"{part!r:.60}")
    return "".join(texts)


def _history(value: Any) -> list[Message]:
    """Read [[question, answer], ...]; return nothing if there is none."""
    if value in (None, "", []):
        return []
    is_list = isinstance(value, list)
    if not is_list or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise _RowError("history is not a list of [question, answer]", f"got {value!r:.60}")
    messages: list[Message] = []
    for question, answer in value:
        messages.append(Message("user", _string(question, "history")))
        messages.append(Message("assistant", _string(answer, "history")))
    return messages


def _from_messages(value: Mapping[str, Any]) -> list[Message]:
    slot = "messages" if "messages" in value else "conversations"
    return _history(value.get("history")) + _conversation(value[slot], slot)


def _from_pair(value: Mapping[str, Any]) -> list[Message]:
    """Read prompt and completion, each a text or a message list (TRL).

    A prompt's own answers are context, not trained.
    """
    prompt = value["prompt"]
    completion = value["completion"]
    before: list[Message] = []
    if isinstance(prompt, list):
        _refuse_input(value)
        for message in _conversation(prompt, "prompt"):
            is_answer = message.role == "assistant"
            before.append(replace(message, train=False) if is_answer else message)
    else:
        before.append(Message("user", _joined_slots(value, ("prompt", "input"))))
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
    question = _joined_slots(value, ("instruction", "input"))
    return _from_question(question, value["output"], value.get("history"))


def _from_query(value: Mapping[str, Any]) -> list[Message]:
    question = _joined_slots(value, ("query", "input"))
    return _from_question(question, value["response"], value.get("history"))


def _from_input(value: Mapping[str, Any]) -> list[Message]:
    """Read a prompt, a text or a message list, up to the last user message."""
    if "messages" in value:
        messages = _history(value.get("history")) + _conversation(value["messages"], "messages")
    elif isinstance(value["prompt"], list):
        _refuse_input(value)
        messages = _history(value.get("history")) + _conversation(value["prompt"], "prompt")
    else:
        question = _joined_slots(value, ("prompt", "input"))
        return [*_history(value.get("history")), Message("user", question)]
    while messages and messages[-1].role != "user":
        messages.pop()
    return messages


def _refuse_input(value: Mapping[str, Any]) -> None:
    if _holds_something(value.get("input")):
        raise _RowError(
            "input beside a list of messages",
            f"{value['input']!r:.60}; write it into a message, or `columns: {{input: null}}`",
        )


def _joined_slots(value: Mapping[str, Any], slots: Sequence[str]) -> str:
    """Join the texts of slots by newlines, without the blank ones; a list is a text a line."""
    texts: list[str] = []
    for slot in slots:
        held = value.get(slot)
        items = held if slot == "input" and isinstance(held, list) else [held]
        texts += [_string(item, slot) for item in items]
    return "\n".join(text for text in texts if text.strip())


_WITH_INPUT = ("prompt+completion", "Alpaca", "query+response", "input")
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
    for number, message in enumerate(messages, 1):
        place = f"message {number} of {len(messages)}"
        if message.role == "system" and number > 1:
            raise _RowError("system message is not first", f"it is {place}")
        if message.content.strip():
            continue
        if message.role == "user":
            raise _RowError("empty prompt", place)
        if message.role == "assistant":
            raise _RowError("empty answer", place)
    if answered and not any(message.train for message in messages if message.role == "assistant"):
        raise _RowError("every answer has weight 0")


def _group(value: Any) -> str:
    if isinstance(value, list | Mapping):
        raise _RowError("group is not a plain value", f"got {value!r:.60}")
    if value is None or not str(value).strip():
        raise _RowError("empty group")
    return _string(str(value), "group")
