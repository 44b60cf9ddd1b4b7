"""One folder holds one run, and one process works on it; what a run made is sealed, and what was
killed leaves no litter."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from fulcrum.core import run_folder, store
from fulcrum.core.errors import StoreError

IDENTITY = {"settings": {"seed": 0, "arms": ("sft", "tell")}, "data": ["abc"]}


def test_a_new_folder_is_taken_and_goes_on_only_when_asked(tmp_path: Path) -> None:
    folder = run_folder.open_run(tmp_path / "a" / "run", IDENTITY, resume=False)
    assert store.read_json(folder / "manifest.json") == store.plain(IDENTITY)
    assert run_folder.open_run(folder, IDENTITY, resume=True) == folder
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        run_folder.open_run(folder, IDENTITY, resume=False)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, IDENTITY, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, IDENTITY, resume=False)
    other = {**IDENTITY, "data": ["abd"]}
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        run_folder.open_run(tmp_path, other, resume=False)
    with pytest.raises(
        StoreError,
        match="cannot resume, data changed since it started; undo that, or begin another run",
    ):
        run_folder.open_run(tmp_path, other, resume=True)


def test_changed_data_is_named(tmp_path: Path) -> None:
    run_folder.open_run(
        tmp_path, {"data": {"general": ["a"], "tickets train": ["b", "c"]}}, resume=False
    )
    with pytest.raises(StoreError, match=r"cannot resume, data\.tickets train changed since"):
        run_folder.open_run(
            tmp_path, {"data": {"general": ["a"], "tickets train": ["b", "d"]}}, resume=True
        )


def test_a_changed_setting_is_named(tmp_path: Path) -> None:
    run_folder.open_run(
        tmp_path, {"settings": {"seed": 0, "train": {"lora_r": 16, "beta2": 0.99}}}, resume=False
    )
    with pytest.raises(StoreError, match=r"settings\.train\.lora_r \(16 -> 8\)"):
        run_folder.open_run(
            tmp_path, {"settings": {"seed": 0, "train": {"lora_r": 8, "beta2": 0.99}}}, resume=True
        )


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(StoreError, match="not empty and not a run folder"):
        run_folder.open_run(tmp_path, IDENTITY, resume=True)
    with pytest.raises(StoreError, match="is a file; set output_dir to a folder"):
        run_folder.open_run(tmp_path / "thesis.docx", IDENTITY, resume=False)


def test_a_damaged_manifest_is_not_taken_for_another_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"settings')
    with pytest.raises(StoreError, match="not readable as JSON"):
        run_folder.open_run(tmp_path, IDENTITY, resume=True)


@pytest.mark.parametrize("content", ["[1]", "null", "[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_an_error_in_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json: .*the file was changed or damaged"):
        run_folder.open_run(tmp_path, IDENTITY, resume=True)
    with pytest.raises(StoreError, match=r"manifest\.json: .*the file was changed or damaged"):
        run_folder.unsealed(tmp_path)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 5 * 2**20))
    with pytest.raises(
        StoreError,
        match=(
            r"a run folder needs 64 MiB, the disk has 5 MiB free; free some space or set "
            r"output_dir"
        ),
    ):
        run_folder.open_run(tmp_path / "new" / "run", IDENTITY, resume=False)
    assert list(tmp_path.iterdir()) == []


# One process.

HOLDER = """
import sys
from pathlib import Path
from fulcrum.core import run_folder
with run_folder.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=-1, stdout=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_pid_and_time_until_the_first_is_gone(
    tmp_path: Path,
) -> None:
    first = holder(tmp_path / "run")
    with (
        pytest.raises(
            StoreError,
            match=(
                rf"run: process {first.pid} on \S+ has been working on it since \d{{4}}-\d\d-\d\d "
                r".* UTC"
            ),
        ),
        run_folder.held(tmp_path / "run"),
    ):
        pass
    (tmp_path / "run" / "manifest.json").write_text(
        "{}"
    )  # the same command again, which does not ask to go on
    with pytest.raises(
        StoreError, match=rf"run: process {first.pid} on \S+ has been working on it since \d{{4}}-"
    ):
        run_folder.check_free(tmp_path / "run", resume=False)
    first.kill()
    first.wait()
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        run_folder.check_free(tmp_path / "run", resume=False)
    with run_folder.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".owner.json").read_text())["pid"] == os.getpid()


def test_a_folder_that_no_run_came_of_is_gone_again(tmp_path: Path) -> None:
    with run_folder.held(tmp_path / "run"):
        run_folder.check_free(tmp_path / "run", resume=False)  # its lock is nobody's run
    assert list(tmp_path.iterdir()) == []
    with run_folder.held(tmp_path / "run"):
        run_folder.open_run(tmp_path / "run", IDENTITY, resume=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "manifest.json"]


def test_a_kill_before_there_is_a_manifest_leaves_a_folder_that_a_run_may_take(
    tmp_path: Path,
) -> None:
    for name in (".lock", ".owner.json", ".manifest.json.x1y2.partial"):
        (tmp_path / name).write_text("{")
    run_folder.check_free(tmp_path, resume=False)
    with run_folder.held(tmp_path):
        run_folder.open_run(tmp_path, IDENTITY, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json"]
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "notes.partial").touch()  # somebody's own
    with pytest.raises(StoreError, match="not empty and not a run folder"):
        run_folder.check_free(tmp_path, resume=False)


def test_what_a_killed_process_left_half_written_is_dropped(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / "a" / ".checkpoint-3.partial"
    half.mkdir(parents=True)
    (half / "adapter.safetensors").write_bytes(b"x")
    (tmp_path / ".results.json.abc.partial").write_bytes(b"{")
    (tmp_path / "events.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    with run_folder.held(tmp_path):
        assert [path.name for path in tmp_path.rglob("*.partial")] == []
        assert (tmp_path / "events.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_that_may_only_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StoreError, match="run: cannot write: Not a directory"),
        run_folder.held(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("there", "found"), [((), "run"), (("run",), "run-2"), (("run", "run-2", "run-4"), "run-3")]
)
def test_a_new_run_finds_a_place_beside(tmp_path: Path, there: tuple[str, ...], found: str) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    assert run_folder.first_free(tmp_path / "run") == tmp_path / found


# The seal.


def test_what_a_run_made_is_sealed(tmp_path: Path) -> None:
    run_folder.open_run(tmp_path, IDENTITY, resume=False)
    with pytest.raises(StoreError, match="its manifest names no outputs: the run is not finished"):
        run_folder.unsealed(tmp_path)
    for name in (
        "adapter/adapter_model.safetensors",
        "results.json",
        "checkpoints/a/adapter_model.safetensors",
    ):
        store.write_bytes(tmp_path / name, name.encode())
    run_folder.seal(tmp_path)
    known = store.read_json(tmp_path / "manifest.json")["outputs"]
    assert known == {
        "adapter/adapter_model.safetensors": store.file_sha256(
            tmp_path / "adapter" / "adapter_model.safetensors"
        ),
        "results.json": store.file_sha256(tmp_path / "results.json"),
    }
    assert run_folder.unsealed(tmp_path) == []
    assert (
        run_folder.open_run(tmp_path, IDENTITY, resume=True) == tmp_path
    )  # the seal is no part of what makes it this run
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    (tmp_path / "results.json").unlink()
    assert run_folder.unsealed(tmp_path) == [
        "adapter/adapter_model.safetensors: changed",
        "results.json: missing",
    ]
