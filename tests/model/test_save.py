"""What is saved serves on another machine: it names its base model, and the model card's own lines
load it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fulcrum.core.types import Anchor, Message
from fulcrum.data import encode
from fulcrum.model import download, save
from fulcrum.report import run_report
from fulcrum.report.run_kinds import COMPARE
from helpers.reports import make
from helpers.saved_adapters import saved
from helpers.tiny import load_tiny


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "org/name", "models/some.gguf"])
def test_the_base_model_has_the_name_as_written_and_no_path_of_this_machine(
    tmp_path: Path, name: str
) -> None:
    loaded = replace(load_tiny(tmp_path), name=name)  # `path` is a folder, as a converted model's
    folder = saved(loaded, tmp_path / "adapter", {"task": None})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert [
        file.name for file in folder.iterdir() if str(tmp_path).encode() in file.read_bytes()
    ] == []


def test_a_local_folder_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `models/tiny` would be taken for a hub id elsewhere."""
    loaded = load_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = saved(replace(loaded, name="tiny-llama"), tmp_path / "adapter", {"task": None})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "tiny-llama")


@pytest.mark.parametrize("kind", ["folder", "wheel"])
@pytest.mark.parametrize("tasks", [("tickets",), ("tickets", "mails")])
def test_the_lines_of_the_model_card_give_fulcrums_tokens_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tasks: tuple[str, ...]
) -> None:
    loaded = load_tiny(tmp_path)
    monkeypatch.setattr(download, "prepare", {"smollm2-135m-instruct": loaded.path}.__getitem__)
    anchors = {task: Anchor(f"ABOUT {task}.") for task in tasks}
    saved(loaded, tmp_path / "run" / "adapters" / "tell", dict(anchors))
    model = loaded.path if kind == "folder" else "smollm2-135m-instruct"
    card = run_report.card(
        make(tasks=tasks, settings={"model": model, "tasks": [{"max_new_tokens": 3}]}),
        COMPARE,
        save.NOTE,
    )
    (snippet,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "run")
    found: dict = {}
    exec(snippet, found)
    expected = encode.prompt_ids(
        (Message("user", "..."),), encode.make_format(loaded.tokenizer, anchors["tickets"])
    )
    assert found["inputs"]["input_ids"].tolist() == [expected]
    assert 1 <= found["output"].shape[1] - len(expected) <= 3
    with torch.no_grad():
        ours = loaded.causal(input_ids=found["inputs"]["input_ids"]).logits
        theirs = found["model"].float()(input_ids=found["inputs"]["input_ids"]).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
