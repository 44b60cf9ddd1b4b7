"""A folder holds one run, a file is whole or as it was, and equal values have equal
fingerprints."""

import hashlib
import json
import math
import os
import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st

import fulcrum
from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import Anchor, Message

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
    assert store.fingerprint({"b": 1, "a": [True, None, "é"]}) == store.fingerprint(
        {"a": (True, None, "é"), "b": 1}
    )
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
    assert (
        len(
            {
                store.seed_for(root, purpose)
                for root in (0, 1)
                for purpose in ("mix", "data", "train")
            }
        )
        == 6
    )
    assert all(0 <= store.seed_for(root, "mix") < 2**32 for root in range(50))


PACKAGE = Path(fulcrum.__file__).parent
PARTS = sorted({file.parent.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")})


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's source."""
    copy = tmp_path / "fulcrum"
    for file in PACKAGE.rglob("*.py"):
        target = copy / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return copy


def test_the_code_of_a_run_is_the_source_of_the_whole_package(package: Path) -> None:
    assert {".", "core", "cli", "experiments", "web"} < set(PARTS)
    assert store.source_hash(package) == store.code()
    (package / "notes.txt").write_text("no source")
    assert store.source_hash(package) == store.code()


@pytest.mark.parametrize("part", PARTS)
def test_a_change_in_any_package_changes_the_code(package: Path, part: str) -> None:
    file = min((package / part).glob("*.py"))
    file.write_text(file.read_text() + "# changed\n")
    assert store.source_hash(package) != store.code()


def test_a_moved_file_changes_the_code(package: Path) -> None:
    (package / "core" / "store.py").rename(package / "config" / "store.py")
    assert store.source_hash(package) != store.code()


def test_a_files_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        store.file_sha256(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


TEXT = st.text(st.characters(exclude_categories=("Cs",)))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trip.json"
    store.write_json(path, value)
    assert store.read_json(path) == value


def test_json_lines(tmp_path: Path) -> None:
    store.write_jsonl(
        tmp_path / "new" / "rows.jsonl", [Message("user", "a\nb\u2028"), {"x": math.nan}]
    )
    lines = (tmp_path / "new" / "rows.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"role": "user", "content": "a\nb\u2028", "train": True},
        {"x": None},
    ]
    assert lines[-1] == ""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store.write_bytes(tmp_path / "f", b"before")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(
        StoreError,
        match="f: cannot write: No space left on device; free some space or set output_dir",
    ):
        store.write_bytes(tmp_path / "f", b"after")
    assert (tmp_path / "f").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(
        StoreError, match=r"results\.json: no such file; is .* a finished run folder\?"
    ):
        store.read_json(tmp_path / "results.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_a_damaged_file_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(
        StoreError, match=r"f\.json: not readable as JSON .*the file was changed or damaged"
    ):
        store.read_json(tmp_path / "f.json")


# Folders.


def fill(place: Path) -> None:
    (place / "inside").mkdir()
    (place / "a.txt").write_bytes(b"one")
    (place / "inside" / "b.txt").write_bytes(b"two")


def test_a_folder_is_written_whole_with_its_hashes(tmp_path: Path) -> None:
    store.write_folder(tmp_path / "deep" / "f", fill)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["f"]
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert (
        tmp_path / "deep" / "f" / "SHA256SUMS"
    ).read_text() == f"{one}  a.txt\n{two}  inside/b.txt\n"
    assert store.damaged(tmp_path / "deep" / "f") == []


def test_a_folder_takes_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    store.write_folder(tmp_path / "f", fill)
    (tmp_path / ".f.partial").mkdir()  # what a killed process left
    (tmp_path / ".f.partial" / "old").touch()
    store.write_folder(tmp_path / "f", lambda place: (place / "c.txt").write_text("x"))
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["SHA256SUMS", "c.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_folder_that_cannot_be_filled_leaves_what_was_there(
    tmp_path: Path, error: BaseException
) -> None:
    store.write_folder(tmp_path / "f", fill)

    def fails(place: Path) -> None:
        (place / "half").touch()
        raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)) as raised:
        store.write_folder(tmp_path / "f", fails)
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"{tmp_path / 'f'}: cannot write: No space left on device; free some space or set "
            "output_dir (or FULCRUM_CACHE, "
            "for models and pools) to another disk"
        )
    assert store.damaged(tmp_path / "f") == []
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_everything_in_a_folder_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(store, "_flush", lambda path: flushed.append(path.name))
    store.write_folder(tmp_path / "f", fill)
    assert set(flushed[:-2]) == {"a.txt", "inside", "b.txt", "SHA256SUMS"}
    assert flushed[-2:] == [".f.partial", tmp_path.name]


def test_what_is_changed_or_missing_is_named(tmp_path: Path) -> None:
    store.write_folder(tmp_path / "f", fill)
    (tmp_path / "f" / "a.txt").write_bytes(b"ONE")
    assert store.damaged(tmp_path / "f") == ["a.txt"]
    (tmp_path / "f" / "inside" / "b.txt").unlink()
    assert store.damaged(tmp_path / "f") == ["a.txt", "inside/b.txt"]
    (tmp_path / "f" / "SHA256SUMS").write_bytes(b"\xff")
    assert store.damaged(tmp_path / "f") == ["SHA256SUMS"]
    (tmp_path / "f" / "SHA256SUMS").write_bytes(b"")
    assert store.damaged(tmp_path / "f") == ["SHA256SUMS"]
    assert store.damaged(tmp_path / "none") == ["SHA256SUMS"]


def test_a_list_of_hashes_that_lacks_a_file_vouches_for_none(tmp_path: Path) -> None:
    store.write_folder(
        tmp_path / "f",
        lambda place: [(place / name).write_text("x") for name in ("a.json", "b.safetensors")],
    )
    (tmp_path / "f" / "lora.gguf").touch()  # what somebody made of it
    assert store.damaged(tmp_path / "f") == []
    sums = tmp_path / "f" / "SHA256SUMS"
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])
    assert store.damaged(tmp_path / "f") == ["SHA256SUMS"]


# Bytes as they stand.


def test_json_is_written_as_people_read_it(tmp_path: Path) -> None:
    store.write_json(
        tmp_path / "new" / "er" / "a.json", {"name": "é", "list": [1], "none": math.nan}
    )
    assert (tmp_path / "new" / "er" / "a.json").read_text(
        "utf-8"
    ) == '{\n "name": "é",\n "list": [\n  1\n ],\n "none": null\n}\n'
    store.write_json(tmp_path / "a.json", {"a": 1}, indent=None)
    assert (tmp_path / "a.json").read_bytes() == b'{"a": 1}\n'
    store.write_jsonl(tmp_path / "a.jsonl", [{"a": "é"}, {"a": math.inf}])
    assert (tmp_path / "a.jsonl").read_bytes() == '{"a": "é"}\n{"a": null}\n'.encode()


def test_a_fingerprint_is_of_utf_8() -> None:
    assert (
        store.fingerprint({"b": "é", "a": 1})
        == hashlib.sha256('{"a":1,"b":"é"}'.encode()).hexdigest()
    )


def test_arrays(tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3)
    store.write_array(tmp_path / "x" / "a.npy", values)
    assert np.array_equal(np.load(tmp_path / "x" / "a.npy"), values)
    store.write_arrays(tmp_path / "b.npz", one=values, two=values[0])
    with np.load(tmp_path / "b.npz") as found:
        assert sorted(found) == ["one", "two"]
        assert np.array_equal(found["one"], values)
        assert np.array_equal(found["two"], values[0])


def test_a_half_written_file_is_beside_its_place_and_named_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    replace = Path.replace

    def look(self: Path, target: Path) -> Path:
        seen.append(self)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    store.write_bytes(tmp_path / "a.txt", b"x")
    assert seen[0].parent == tmp_path
    assert seen[0].name.startswith(".a.txt.")
    assert seen[0].suffix == ".partial"


def test_a_half_written_file_that_is_gone_already_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Path, target: Path) -> None:
        self.unlink()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", gone)
    with pytest.raises(StoreError, match="cannot write: Input/output error"):
        store.write_bytes(tmp_path / "a.txt", b"x")


# Logs.


def test_lines_are_added_to_a_log_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    store.mend_log(log)
    assert not log.exists()
    for row in ({"a": "é"}, {"b": math.nan}):
        store.append_jsonl(log, row)
    assert log.read_bytes() == '{"a": "é"}\n{"b": null}\n'.encode()
    store.mend_log(log)
    assert log.read_bytes() == '{"a": "é"}\n{"b": null}\n'.encode()
    with log.open("ab") as stream:
        stream.write(b'{"c"')
    store.mend_log(log)
    assert log.read_bytes() == '{"a": "é"}\n{"b": null}\n'.encode()
    log.write_bytes(b"half")
    store.mend_log(log)
    assert log.read_bytes() == b""


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(
        StoreError,
        match=r"log\.jsonl: cannot write: Is a directory; free some space or set output_dir",
    ):
        store.append_jsonl(tmp_path / "log.jsonl", {})


# Reading, differences, places.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "NaN is not JSON"),
        ('[{"a": -Infinity}]', "-Infinity is not JSON"),
        ('{"a": 1, "a": 2}', "^an object holds the same key twice$"),
        ("[" * 100_000, "^nested too deeply$"),
        ("{", "Expecting"),
    ],
)
def test_strict_json(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        store.strict_json(text)


def test_strict_json_of_what_is_right() -> None:
    assert store.strict_json('{"a": [1.5, null], "b": {"a": "é"}}') == {
        "a": [1.5, None],
        "b": {"a": "é"},
    }


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", None])
def test_what_can_be_made_anew_is_recalled_only_whole(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert store.recalled(tmp_path / "a.json") == {}
    store.write_json(tmp_path / "a.json", {"a": 1})
    assert store.recalled(tmp_path / "a.json") == {"a": 1}


def test_what_differs_is_named() -> None:
    before = {"a": {"x": 1, "y": [1, 2]}, "b": "s", "gone": 1}
    after = {"a": {"x": 2, "y": [1, 3]}, "b": "s", "new": None, "more": {"z": 1}}
    assert store.changes(before, after) == ["a.x (1 -> 2)", "a.y", "gone (1 -> None)", "more"]
    assert store.changes(before, before) == []
    assert store.changes([1], [2]) == ["manifest.json"]
    assert store.changes("x" * 90, "y", "a") == [f"a ('{'x' * 39} -> 'y')"]
    assert store.changes({"a": {"b": 1}}, {"a": 5}, "top") == ["top.a"]


def test_the_cache_is_where_the_user_says_or_where_the_system_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_dir() == tmp_path / "somewhere"
    monkeypatch.setenv("FULCRUM_CACHE", "near")
    assert store.cache_dir() == Path.cwd() / "near"
    monkeypatch.delenv("FULCRUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store.cache_dir().name == "fulcrum"
    assert store.cache_dir().is_relative_to(tmp_path)


def test_space_is_asked_of_the_nearest_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    usage = namedtuple("usage", "total used free")

    def space(folder: Path) -> usage:
        asked.append(Path(folder))
        return usage(2**40, 2**40, 5 * 2**20)

    monkeypatch.setattr(shutil, "disk_usage", space)
    store.require_space(tmp_path / "a" / "b", 5 * 2**20, "a thing")
    with pytest.raises(
        StoreError, match=r"b: a thing needs 6 MiB, the disk has 5 MiB free; free some space"
    ):
        store.require_space(tmp_path / "a" / "b", 6 * 2**20, "a thing")
    assert asked == [tmp_path, tmp_path]


def test_a_lock_is_waited_for_and_the_waiting_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_LOCK_WAIT", 0.01)
    told: list[int] = []
    first = FileLock(tmp_path / "f" / ".lock")
    with store.locked(tmp_path / "f", told.append):
        assert told == []
        with pytest.raises(Timeout):
            first.acquire(timeout=0)
    first.acquire()

    def waiting(done: int) -> None:
        told.append(done)
        if len(told) == 2:
            first.release()

    with store.locked(tmp_path / "f", waiting):
        assert told == [0, 0, 1]


def test_a_folder_half_removed_does_not_have_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it drops an old checkpoint must not leave a damaged one behind."""
    old = tmp_path / "checkpoint-4"
    store.write_folder(old, lambda place: (place / "state.json").write_text("{}"))
    real = shutil.rmtree

    def killed(path: Path, **options: object) -> None:
        if Path(path).exists():
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.drop_folder(old)
    (left,) = tmp_path.iterdir()
    assert left.name == f".checkpoint-4.dropped{store.PARTIAL}"
    old.mkdir()
    store.drop_folder(old)
    store.drop_folder(old)  # which is not there any more
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_written_anew_is_never_half_removed_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    store.write_folder(folder, lambda place: (place / "weights").write_text("old"))
    dropped: list[str] = []
    monkeypatch.setattr(
        store, "drop_folder", lambda path: dropped.append(path.name) or shutil.rmtree(path)
    )
    store.write_folder(folder, lambda place: (place / "weights").write_text("new"))
    assert dropped == ["adapter"]
    assert (folder / "weights").read_text() == "new"
