"""What tokenizers, models and files of odd kinds make impossible is said before training."""

import json
from pathlib import Path

import pytest

from fulcrum.config.settings import load_settings
from fulcrum.core.errors import ConfigError, DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message, Task
from fulcrum.data import encode, readers, starter, task_data
from fulcrum.model import adapter, base_model, download, registry
from helpers.tiny import CHATML, save_tiny, tiny_settings
from helpers.tokenizer_kinds import byte_level, normalising

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123456\n"


def rows(*answers: str) -> tuple[Example, ...]:
    made = []
    for place, answer in enumerate(answers):
        messages = (Message("user", f"q{place}"), Message("assistant", answer))
        made.append(Example(messages, f"g{place}", f"f:{place}"))
    return tuple(made)


def test_answers_that_a_tokenizer_writes_otherwise_are_counted() -> None:
    task = Task("cups", rows("1 cup", "2"), (), rows("½ cup", "1 cup", "² cups"))
    (note,) = task_data.check_answers(task, normalising())
    assert note.startswith("cups: 2 of 3 test answers are written otherwise by the model's tok")
    assert "('½ cup' becomes '1⁄2 cup')" in note
    assert task_data.check_answers(task, byte_level()) == []


def test_answers_of_one_kind_are_called_that() -> None:
    (note,) = task_data.check_answers(Task("x", rows("a", "a "), (), rows("a")), byte_level())
    assert "all training answers are the same ('a')" in note
    assert "all are the same ('a')" in starter.guess(rows(*"aaaaaa")).why


def test_init_proposes_only_metrics_that_read_the_answers() -> None:
    twice = rows(*[f'{{"item": "a", "item": "b{k}"}}' for k in range(6)])
    found = starter.guess(twice)
    assert "json_fields" not in found.metrics
    assert "json_valid" in found.metrics
    assert "the same key twice" in found.why


def test_pointers_of_git_lfs_are_called_that(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_text(POINTER)
    with pytest.raises(DataError, match=r"a\.parquet: is a Git LFS pointer.*git lfs pull"):
        readers.files(str(file))
    model = save_tiny(tmp_path / "model")
    (Path(model) / "model.safetensors").write_text(POINTER)
    with pytest.raises(ModelError, match=r"model\.safetensors: is a Git LFS pointer"):
        registry.locate(str(model))


def test_ids_beyond_the_embedding_are_refused_with_and_without_weights(tmp_path: Path) -> None:
    model = Path(save_tiny(tmp_path / "model"))
    known = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer, _, _ = download.load_tokenizer(str(model), {})
    tokenizer.add_tokens(["<refund>", "<login>"])
    tokenizer.save_pretrained(model)
    message = rf"2 of its tokenizer's [\d,]+ tokens \(<refund>, <login>\) .*which has {known}"
    with pytest.raises(ModelError, match=message):
        download.load_tokenizer(str(model), {})
    with pytest.raises(ModelError, match=message):
        base_model.load(str(model), tiny_settings())


def test_excels_line_of_the_separator_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('sep=;\nprompt;completion\n"a;b";c\n\nd;e\n')
    assert list(readers.text_rows(file)) == [
        (3, {"prompt": "a;b", "completion": "c"}),
        (5, {"prompt": "d", "completion": "e"}),
    ]


def test_a_data_file_in_place_of_settings_is_called_that(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl: is a data file, .*`fulcrum init "):
        load_settings(file)


def test_the_setting_that_peft_refuses_is_named() -> None:
    settings = tiny_settings(lora_dropout=0.1)
    said = adapter._refusal(settings, "lora.ParamWrapper does not work with lora_dropout != 0.")
    assert said.startswith("train.lora_dropout: PEFT refuses 0.1 for this model: ")
    assert said.endswith("set it to 0")


def test_a_system_anchor_names_its_placement_where_the_template_has_no_system_turn() -> None:
    refuses = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('none here') -}}"
    tokenizer = byte_level(refuses + "{%- endif -%}" + CHATML)
    form = encode.make_format(tokenizer, Anchor("Be brief.", "system"))
    with pytest.raises(DataError, match=r"f:0: .*none here; the anchor is placed in a system turn"):
        encode.encode(rows("a")[0], form)
