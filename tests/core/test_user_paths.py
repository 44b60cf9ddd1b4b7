"""`~` and environment variables hold in every path that a user gives; no folder is named so."""

import json
from pathlib import Path

import pytest

from fulcrum import api
from fulcrum.config.settings import settings_from_dict
from fulcrum.core import user_paths
from fulcrum.core.errors import ConfigError, StoreError
from fulcrum.data.readers import files
from helpers.commands import done, refused


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", str(tmp_path / "rows"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    return tmp_path


def test_paths_are_expanded_once(home: Path) -> None:
    assert user_paths.expanded("~/a") == f"{home}/a"
    assert user_paths.expanded("$ROWS/a") == user_paths.expanded("${ROWS}/a") == f"{home}/rows/a"
    (home / "a$b").touch()
    assert user_paths.expanded("a$b") == "a$b"
    with pytest.raises(ConfigError, match="variable NOWHERE is not set"):
        user_paths.expanded("$NOWHERE/a")


def test_in_settings(home: Path) -> None:
    settings = settings_from_dict(
        {
            "model": "~/model",
            "task": {"train": "$ROWS/a.jsonl", "test": "~/b.jsonl"},
            "general": {"path": "~/pool"},
            "output_dir": "~/runs/x",
        }
    )
    assert settings.model == f"{home}/model"
    assert settings.tasks[0].train[0].path == f"{home}/rows/a.jsonl"
    assert settings.tasks[0].test[0].path == f"{home}/b.jsonl"
    assert settings.general[0].path == f"{home}/pool"
    assert settings.output_dir == f"{home}/runs/x"
    with pytest.raises(ConfigError, match=r"output_dir: .*NOWHERE is not set"):
        settings_from_dict({"task": {"train": "a"}, "output_dir": "$NOWHERE/x"})


def test_in_flags_and_python(home: Path) -> None:
    lines = [json.dumps({"prompt": f"q{k}", "completion": f"a{k % 2}"}) for k in range(8)]
    (home / "rows" / "a.jsonl").write_text("\n".join(lines))
    assert [name for name, _ in files("~/rows/a.jsonl") or ()] == [f"{home}/rows/a.jsonl"]
    done("init", "$ROWS/a.jsonl", "--out=~/made.yaml")
    assert (home / "made.yaml").exists()
    assert f"{home}/none: not a run folder" in refused("eval", "~/none").replace("\n", "")
    with pytest.raises(StoreError, match=f"{home}/none"):
        api.load_adapter("~/none")
    assert not (home / "~").exists()
