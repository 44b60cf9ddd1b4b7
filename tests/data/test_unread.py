"""What a row holds is trained, refused by name, or said not to be read: never lost."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulcrum.config.base import DataSource, GeneralSource
from fulcrum.core.errors import DataError
from fulcrum.core.types import Example
from fulcrum.data import pool
from fulcrum.data.formats import FORMATS, Layout, Unread, convert, find_layout
from fulcrum.data.task_data import read, read_rows


def written(path: Path, *rows: object, **more: Any) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path), **more)


# --- columns
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "How many?", "context": "CREATE TABLE t", "answer": "a"}, "CREATE TABLE t"),
        ({"prompt": "How many?", "input": "rows of t", "completion": "a"}, "rows of t"),
        ({"instruction": "How many?", "context": "rows of t", "output": "a"}, "rows of t"),
        ({"query": "How many?", "input": None, "response": "a"}, None),
        ({"instruction": "How many?", "input": float("nan"), "output": "a"}, None),
    ],
)
def test_what_stands_beside_a_question_is_asked_with_it(
    tmp_path: Path, row: dict[str, Any], asked: str | None
) -> None:
    rows = read_rows([written(tmp_path / "a.jsonl", row)])
    assert rows.examples[0].question == ("How many?" if asked is None else f"How many?\n{asked}")
    assert rows.notes == []


def test_two_columns_that_may_stand_beside_a_question_are_asked_about(tmp_path: Path) -> None:
    row = {"question": "q", "context": "c", "input": "i", "answer": "a"}
    source = written(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=r"read in 2 ways.*input: input.*input: context"):
        read_rows([source])
    chosen = read_rows([source.model_copy(update={"columns": {"input": "context"}})])
    assert chosen.examples[0].question == "q\nc"
    assert chosen.notes == [
        f"{source.path}: not read: column input (columns: {{group: input}} would read it) "
        "in 1 of 1 rows"
    ]


def test_a_column_can_be_kept_from_a_slot(tmp_path: Path) -> None:
    row = {"question": "q", "context": {"title": ["t"]}, "answer": "a"}
    source = written(tmp_path / "a.jsonl", row, columns={"input": None})
    rows = read_rows([source])
    assert rows.examples[0].question == "q"
    assert "column context" in rows.notes[0]


def test_columns_that_are_not_read_are_counted_with_the_setting_that_reads_them(
    tmp_path: Path,
) -> None:
    first = {"question": "q0", "answer": "a", "choices": ["a", "b"], "weight": 0, "id": ""}
    second = {"question": "q1", "answer": "b", "choices": None, "weight": 1, "group": "g"}
    source = written(tmp_path / "a.jsonl", first, second)
    assert read_rows([source]).notes == [
        f"{source.path}: not read: "
        "column choices (columns: {input: choices} would read it) in 1 of 2 rows; "
        "column group (columns: {group: group} would read it) in 1 of 2 rows; "
        "column weight (columns: {weight: weight} would read it) in 2 of 2 rows"
    ]
    with pytest.warns(UserWarning, match="not read: column choices"):
        read([source])
    columns = {"input": "choices", "weight": "weight"}
    used = read_rows([source.model_copy(update={"columns": columns})])
    assert [row.question for row in used.examples] == ["q1"]
    assert [(reject.reason) for reject in used.rejects] == ["weight 0"]
    only = read_rows([source.model_copy(update={"columns": {"input": "choices"}})])
    assert only.examples[0].question == "q0\na\nb"


def test_columns_of_tables_are_counted_without_being_loaded(tmp_path: Path) -> None:
    rows = {"prompt": ["p", "q"], "completion": ["a", "b"], "picture": [None, b"\x89PNG"]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    note = "not read: column picture (columns: {input: picture} would read it) in"
    assert read_rows([DataSource(path=str(path))]).notes == [f"{path}: {note} 1 of 2 rows"]
    (found,) = pool.open_pool([GeneralSource(path=str(path))], seed=0).notes
    assert found.startswith(f"{path}: {note}")


def test_general_rows_obey_the_same_rules(tmp_path: Path) -> None:
    kept = {"question": "q", "context": "c", "answer": "a", "kind": "x", "level": 3}
    path = Path(written(tmp_path / "a.jsonl", kept).path)
    source = GeneralSource(path=str(path), include={"kind": "x"})
    opened = pool.open_pool([source], seed=0)
    assert opened[0].question == "q\nc"
    assert opened.notes == (
        f"{path}: not read: column level (columns: {{group: level}} would read it) in 1 of 1 rows",
    )
    assert pool.open_pool([source], seed=0).notes == opened.notes  # from the cache too


def test_class_numbers_become_class_names(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["refund", "delivery"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    columns = {"prompt": "text", "completion": "label"}
    found = read_rows([DataSource(path=str(path), columns=columns)])
    assert [row.answer for row in found.examples] == ["refund", "delivery"]
    assert [reject.reason for reject in found.rejects] == ["empty answer"]
    opened = pool.open_pool([GeneralSource(path=str(path), columns=columns)], seed=0)
    assert [opened[place].answer for place in range(len(opened))] == ["refund", "delivery"]


# --- messages
# --------------------------------------------------------------------------------------------------


def conversation(**answer: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", **answer},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"},
        ]
    }


@pytest.mark.parametrize("key", ["train", "trainable", "weight", "loss"])
@pytest.mark.parametrize(
    ("value", "trained"), [(False, False), (0, False), (True, True), (1, True)]
)
def test_keys_say_what_is_trained(tmp_path: Path, key: str, value: object, trained: bool) -> None:
    rows = read_rows([written(tmp_path / "a.jsonl", conversation(**{key: value}))])
    assert rows.examples[0].messages[1].train is trained
    assert rows.notes == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"train": True, "weight": 0}, "keys differ on whether a message is trained"),
        ({"train": "no"}, "weight is not 0 or 1"),
        ({"reasoning_content": "t"}, "message key reasoning_content is not supported"),
        ({"thinking": "t"}, "message key thinking is not supported"),
        ({"function_call": {"name": "f"}}, "message key function_call is not supported"),
        ({"tool_calls": [{"id": 1}]}, "message key tool_calls is not supported"),
        ({"value": "other"}, "two texts in a message"),
        ({"from": "human"}, "two roles in a message"),
        ({"content": [{"type": "image", "url": "u"}]}, "message part is not text"),
        ({"content": [{"type": "text", "text": "a", "bold": True}]}, "message part is more than"),
    ],
)
def test_what_would_change_a_conversation_is_refused_by_name(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    rows = read_rows([written(tmp_path / "a.jsonl", conversation(**more))])
    assert rows.examples == []
    assert rows.rejects[0].reason.startswith(reason)


def test_other_keys_are_counted_and_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, "two"]
    first = conversation(content=parts, name="ann", thinking="", tool_calls=None)
    rows = read_rows([written(tmp_path / "a.jsonl", first, conversation(content="c"))])
    assert rows.examples[0].messages[1].content == "one two"
    assert rows.notes == [f"{tmp_path}/a.jsonl: not read: message key name in 1 of 2 rows"]


# --- any row at all: what goes in is trained, refused or said
# --------------------------------------------------------------------------------------------------

words = st.text(alphabet="abcdefg ", min_size=1, max_size=6).filter(str.strip)
values = st.one_of(
    words, st.none(), st.integers(0, 3), st.booleans(), st.lists(words, max_size=2), st.just("")
)
keys = st.sampled_from(
    ["role", "from", "content", "value", "name", "train", "weight", "thinking", "tool_calls", "x"]
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": words}
).flatmap(
    lambda fixed: st.dictionaries(keys, values, max_size=3).map(lambda more: {**more, **fixed})
)
columns = st.sampled_from(
    ["system", "history", "group", "tools", "input", "context", "choices", "weight", "id", "text"]
)


@given(
    st.sampled_from([name for name in FORMATS if name not in ("messages", "ShareGPT")]),
    st.dictionaries(columns, values, max_size=4),
    words,
    words,
)
def test_every_column_is_trained_refused_or_said(
    name: str, more: dict[str, Any], question: str, answer: str
) -> None:
    asked, answered = (aliases[0] for aliases in FORMATS[name].values())
    row = {**more, asked: question, answered: answer}
    try:
        layout = find_layout(list(row), {}, None, "f")
    except DataError:
        return  # refused by name
    unread: Unread = Unread()
    found = convert(row, layout, "f:1", unread)
    if not isinstance(found, Example):
        return  # refused by name
    said = " ".join(unread)
    trained = "\n".join(message.content for message in found.messages)
    for column, value in row.items():
        if value in (None, "", []):
            continue
        texts = value if isinstance(value, list) else [value]
        is_trained = all(str(text) in trained or json.dumps(text) in trained for text in texts)
        assert is_trained or f"column {column} " in said


@given(st.lists(messages, min_size=1, max_size=4))
def test_every_key_of_a_message_is_trained_refused_or_said(turns: list[dict[str, Any]]) -> None:
    unread: Unread = Unread()
    found = convert({"messages": turns}, Layout("messages", {"messages": "messages"}), "f", unread)
    if not isinstance(found, Example):
        return
    for turn, message in zip(turns, found.messages, strict=True):
        assert message.content == turn["content"]
        for key, value in turn.items():
            if value in (None, "", []) or key in ("role", "content"):
                continue
            if key == "value":
                assert str(value) == turn["content"]
            elif key == "from":
                assert value in ("user", "assistant", "system", "human", "gpt")
            elif key in ("train", "weight"):
                assert message.train is bool(value)
            else:
                assert f"message key {key}" in unread
