"""What newcomers' files hold: other separators, two formats in one file, labels that are numbers,
misspelt names."""

import json
from pathlib import Path

import pytest

from fulcrum.config.base import DataSource
from fulcrum.core.errors import DataError
from fulcrum.core.types import Example, Reject
from fulcrum.data import readers, task_data
from fulcrum.data.formats import Layout, convert


def read(path: Path, text: str, **more: object) -> list[Example]:
    path.write_text(text)
    return task_data.read([DataSource(path=str(path), **more)])[0]


@pytest.mark.parametrize(("separator", "written"), [(";", '";"'), ("\t", r'"\\t"'), ("|", r'"\|"')])
def test_another_separator_is_recognised(tmp_path: Path, separator: str, written: str) -> None:
    text = f"prompt{separator}completion\nHello, you{separator}a\n"
    with pytest.raises(
        DataError,
        match=rf"a\.csv:1: one column named .*: are the columns separated by {written}\? Save",
    ):
        read(tmp_path / "a.csv", text)


def test_a_file_that_mixes_formats_says_so(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "r", "completion": "b", "note": "x"},
        {"instruction": "q", "output": "a"},
        {"other": 1},
    ]
    file = tmp_path / "a.jsonl"
    with pytest.raises(DataError) as error:
        read(file, "".join(json.dumps(row) + "\n" for row in rows))
    assert str(error.value) == (
        f"{file}: rows of 2 formats stand in this file: prompt+completion (completion, prompt; "
        f"{file}:1) and "
        f"Alpaca (instruction, output; {file}:3); make a file of each"
    )


def test_columns_that_can_be_read_in_two_ways_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"in 2 ways; .*\(`fulcrum init` takes --columns query=question,response=answer\)",
    ):
        read(tmp_path / "a.jsonl", json.dumps({"question": "q", "answer": "a", "output": "b"}))


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (0, "0"),
        (-12, "-12"),
        (2.5, "2.5"),
        (True, "true"),
        (False, "false"),
        (1e-7, "1e-07"),
        ("0", "0"),
    ],
)
def test_numbers_and_truth_values_are_their_json_text(label: object, text: str) -> None:
    shape = Layout("prompt+completion", {"prompt": "prompt", "completion": "completion"})
    found = convert({"prompt": 7, "completion": label}, shape, "f:1")
    assert isinstance(found, Example)
    assert (found.question, found.answer) == ("7", text)


@pytest.mark.parametrize("label", [["a"], {"a": 1}, float("inf")])
def test_what_is_no_text_stays_rejected(label: object) -> None:
    shape = Layout("prompt+completion", {"prompt": "prompt", "completion": "completion"})
    found = convert({"prompt": "q", "completion": label}, shape, "f:1")
    assert isinstance(found, Reject)
    assert found.reason in ("not text", "not a list of messages")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("builtn", "'builtin' or 'builtin_eval'"),
        ("ticket", "'tickets.jsonl'"),
        ("built_eval", "'builtin_eval' or 'builtin'"),
    ],
)
def test_a_bare_name_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(readers, "hub", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.jsonl").touch()
    with pytest.raises(
        DataError,
        match=rf"^{name}: no such file \(and a hub id is .*\); did you mean {near}\?$",
    ):
        task_data.read([DataSource(path=name)])
