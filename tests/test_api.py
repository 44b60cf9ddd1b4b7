"""Fulcrum as Python code uses it: rows as objects, and errors that name what Python can do."""

from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

import fulcrum
from fulcrum.config.base import GeneralSource
from fulcrum.core.errors import ConfigError, DataError, StoreError
from fulcrum.data.python_rows import as_source
from fulcrum.data.task_data import read_rows
from helpers.tiny import save_tiny

TEST = [{"prompt": "shape 1", "completion": "red"}]
ROWS = [{"prompt": f"colour {k}", "completion": "red" if k % 2 else "blue"} for k in range(12)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


def test_wrong_keywords_are_said_as_in_a_settings_file() -> None:
    with pytest.raises(
        ConfigError, match=r"^Task: unknown setting 'metric'; did you mean 'metrics'"
    ):
        fulcrum.Task(train="a.jsonl", metric=["nll"])
    with pytest.raises(
        ConfigError, match=r"^Mix: unknown setting 'repeat'; did you mean 'repeats'"
    ):
        fulcrum.Mix(repeat=3)
    with pytest.raises(ConfigError, match=r"^Task: 'train' is missing"):
        fulcrum.Task()
    with pytest.raises(ConfigError, match=r"^Mix: general_per_task: .*\(got -1\)"):
        fulcrum.Mix(general_per_task=-1)


@pytest.mark.parametrize("make", [list, tuple, pd.DataFrame, datasets.Dataset.from_list])
def test_rows_may_be_objects(make: Any) -> None:
    task = fulcrum.Task(train=make(ROWS), name="colours")
    examples, rejects, _ = read_rows(task.train)
    assert rejects == []
    assert [(row.question, row.answer) for row in examples] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    assert fulcrum.Task(train=make(ROWS)).train == task.train  # the same file


def test_a_missing_value_of_a_frame_is_missing_and_classes_have_names() -> None:
    frame = pd.DataFrame([{"instruction": "a", "input": float("nan"), "output": "b"}])
    (row,) = read_rows(fulcrum.Task(train=frame).train).examples
    assert (row.question, row.answer) == ("a", "b")
    names = datasets.ClassLabel(names=["refund", "login"])
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": names})
    rows = {"prompt": ["a", "b"], "completion": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    found = read_rows(fulcrum.Task(train=data).train).examples
    assert [row.answer for row in found] == ["login", "refund"]


def test_paths_and_sources_stay_what_they_are() -> None:
    assert as_source("a.jsonl") == "a.jsonl"
    assert as_source(["a.jsonl", "b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    sources = [{"path": "a.jsonl", "columns": {"prompt": "text"}}]
    assert as_source(sources) == sources
    written_out = [GeneralSource(path="a.jsonl", weight=2).model_dump()]
    assert as_source(written_out) == written_out
    with pytest.raises(DataError, match="no text, number or list: set"):
        as_source([{"prompt": {1}, "completion": "a"}])


@pytest.mark.e2e
def test_a_run_of_objects_and_a_second_call(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(save_tiny(tmp_path / "model")),
        "task": {"train": ROWS, "test": pd.DataFrame(TEST), "metrics": ["nll"]},
        "general": [{"prompt": f"say {k}", "completion": f"so {k}"} for k in range(40)],
        "mix": {"general_per_task": 1, "repeats": 1},
        "train": {"dtype": "float32", "device": "cpu", "compile": "never"},
        "eval": {"general_rows": 0},
        "output_dir": str(tmp_path / "run"),
    }
    fulcrum.train(**settings)
    with pytest.raises(StoreError, match=r"resume it \(resume=True\) .*\(another output_dir\)"):
        fulcrum.train(**settings)
    fulcrum.train(resume=True, **settings)
    adapter = fulcrum.load_adapter(tmp_path / "run")
    assert adapter.answer("colour 3") == adapter.answer(["colour 3"])
