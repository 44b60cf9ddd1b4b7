"""A folder holds one run, a file is whole or as it was, and equal values have equal fingerprints."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulcrum import store
from fulcrum.errors import StoreError
from fulcrum.records import Anchor, Message

IDENTITY = {"settings": {"seed": 0, "arms": ("sft", "tell")}, "data": ["abc"]}


@dataclass(frozen=True)
class Pair:
    left: object
    right: object


def test_records_become_plain() -> None:
    value = Pair((1, Message("user", "é")), {"path": Path("a/b"), 3: [math.nan, math.inf, 0.5]})
    assert store.plain(value) == {
        "left": [1, {"role": "user", "content": "é", "train": True}],
        "right": {"path": "a/b", "3": [None, None, 0.5]},
    }


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j])
def test_what_has_no_plain_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="no plain form for"):
        store.plain({"a": [value]})


def test_a_fingerprint_is_the_hash_of_canonical_json() -> None:
    assert store.fingerprint({"b": 1, "a": [True, None, "é"]}) == store.fingerprint({"a": (True, None, "é"), "b": 1})
    # printf '{"a":[true,null,"\xc3\xa9"],"b":1}' | sha256sum
    assert store.fingerprint({"b": 1, "a": [True, None, "é"]}) == (
        "17c8c6f7f948ee1c9b93b1bc35f6edc29cbaf3022bff7d076d1c4831dd8a44a2"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.5),
        ("1", 1),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ({"a": None}, {}),
        (True, 1),
        (Anchor("a"), Anchor("a", "system")),
    ],
)
def test_other_values_have_other_fingerprints(one: object, other: object) -> None:
    assert store.fingerprint(one) != store.fingerprint(other)


def test_seeds_are_split_by_name() -> None:
    assert store.seed_for(0, "mix") == store.seed_for(0, "mix")
    assert len({store.seed_for(root, purpose) for root in (0, 1) for purpose in ("mix", "data", "train")}) == 6
    assert all(0 <= store.seed_for(root, "mix") < 2**32 for root in range(50))


def test_a_files_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert store.file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TEXT = st.text(st.characters(exclude_categories=("Cs",)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trip.json"
    store.write_json(path, value)
    assert store.read_json(path) == value


def test_json_lines(tmp_path: Path) -> None:
    store.write_jsonl(tmp_path / "new" / "rows.jsonl", [Message("user", "a\nb\u2028"), {"x": math.nan}])
    lines = (tmp_path / "new" / "rows.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"role": "user", "content": "a\nb\u2028", "train": True}, {"x": None}]
    assert lines[-1] == ""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store.write_bytes(tmp_path / "f", b"before")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(StoreError, match="f: cannot write: No space left on device; free some space or set output_dir"):
        store.write_bytes(tmp_path / "f", b"after")
    assert (tmp_path / "f").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(tmp_path / "f", b"after")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        store.write_bytes(tmp_path / "file" / "inside", b"")


def test_a_missing_file_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"results\.json: no such file; is .* a finished run folder\?"):
        store.read_json(tmp_path / "results.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_damaged_file_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"f\.json: not readable as JSON .*the file was changed or damaged"):
        store.read_json(tmp_path / "f.json")
