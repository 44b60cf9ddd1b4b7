"""A merged model as a GGUF file: read back it is that model, in llama.cpp's order, with the
source's metadata."""

from pathlib import Path
from typing import Any

import gguf as gguf_format
import pytest
import torch

from fulcrum.core.errors import ModelError
from fulcrum.core.types import Anchor
from fulcrum.data import encode
from fulcrum.model import gguf
from helpers.gguf_files import write_gemma, write_gguf

TEMPLATE = "{% for m in messages %}<turn>{{ m['content'] }}<end>{% endfor %}ANCHOR"
SPEECH = {"tokenizer.chat_template": TEMPLATE}


def states(source: Path, *changed: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base model's state in float32, and one with `changed` tensors moved."""
    base = {name: tensor.float() for name, tensor in gguf.read(source)[1].state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.items()
        if name.endswith(changed)
    }
    return base, {name: tensor + moved.get(name, 0) for name, tensor in base.items()}


ADAPTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "down_proj.weight")


@pytest.mark.parametrize(("kind", "off"), [("f16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize(("write", "layers"), [(write_gguf, 2), (write_gemma, 6)])
def test_what_is_written_reads_back_as_the_merged_model(
    tmp_path: Path, write: Any, layers: int, kind: Any, off: float
) -> None:
    source = write(tmp_path / "source.gguf")
    base, merged = states(source, *ADAPTED)
    assert gguf.write(source, tmp_path / "out.gguf", base, merged, kind, SPEECH) == 5 * layers
    tokenizer, model = gguf.read(tmp_path / "out.gguf", torch.float32)
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= off * merged[name].abs().max(), name
    assert tokenizer.chat_template == TEMPLATE
    ids = torch.tensor([[5, 17, 40, 41, 60, 7, 9, 30, 31, 8]])
    expected = gguf.read(source, torch.float32)[1]
    expected.load_state_dict(merged)
    found, wanted = (
        each.eval()(input_ids=ids).logits.log_softmax(-1) for each in (model, expected)
    )
    assert (found - wanted).abs().mean() < 10 * off


def test_the_sources_metadata_stay_but_for_type_and_template(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf")
    gguf.write(source, tmp_path / "out.gguf", *states(source, "q_proj.weight"), "q8_0", SPEECH)
    before, after = (
        {
            key: field.contents()
            for key, field in gguf_format.GGUFReader(tmp_path / f"{name}.gguf").fields.items()
        }
        for name in ("source", "out")
    )
    for count in ("GGUF.kv_count", "GGUF.tensor_count", "GGUF.version"):
        before.pop(count), after.pop(count)
    assert after.pop("tokenizer.chat_template") == TEMPLATE != before.pop("tokenizer.chat_template")
    assert after.pop("general.file_type") == gguf_format.LlamaFileType.MOSTLY_Q8_0
    assert after.pop("general.quantization_version") == gguf_format.GGML_QUANT_VERSION
    assert before == after


def test_vectors_stay_exact_and_rows_that_blocks_do_not_divide_are_in_16_bits(
    tmp_path: Path,
) -> None:
    source = write_gguf(tmp_path / "source.gguf")
    gguf.write(source, tmp_path / "out.gguf", *states(source), "q8_0", SPEECH)
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf_format.GGUFReader(tmp_path / "out.gguf").tensors
    }
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # 48 wide


def test_another_source_file_is_refused(tmp_path: Path) -> None:
    """Else the changed tensors of one model would stand among the others of another."""
    source = write_gguf(tmp_path / "source.gguf")
    base, merged = states(source, "layers.1.self_attn.k_proj.weight")
    for each in (base, merged):
        each["model.layers.1.self_attn.k_proj.weight"] = (
            1.1 * each["model.layers.1.self_attn.k_proj.weight"]
        )
    with pytest.raises(
        ModelError,
        match=r"blk\.1\.attn_k\.weight of source\.gguf: the base model's own tensor is not what",
    ):
        gguf.write(source, tmp_path / "out.gguf", base, merged, "f16", SPEECH)


def test_a_tensor_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf")  # its head is its embedding
    base, merged = states(source)
    merged = {**merged, "lm_head.weight": base["lm_head.weight"] + 1}
    with pytest.raises(
        ModelError,
        match=r"source\.gguf has no tensor output\.weight, which the adapter changed \(lm_head",
    ):
        gguf.write(source, tmp_path / "out.gguf", base, merged, "f16", SPEECH)


def facts(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf_format.GGUFReader(file).fields.items()}


def test_llama_cpp_is_told_where_an_answer_ends_and_that_nothing_is_put_before_the_template(
    tmp_path: Path,
) -> None:
    """The file's own end is <turn>, the template's is <end>; its server would begin a text with
    <turn>, training did not."""
    source = write_gguf(tmp_path / "source.gguf")
    tokenizer, _ = gguf.read(source)
    for template, begins in (
        (tokenizer.chat_template, True),
        (tokenizer.chat_template.replace("<turn>", "Q: "), False),
    ):
        tokenizer.chat_template = template
        speech = gguf.speech_of(encode.make_format(tokenizer, Anchor("say:", "user_prefix")))
        gguf.write(source, tmp_path / "out.gguf", *states(source), "q8_0", speech)
        found = facts(tmp_path / "out.gguf")
        assert "say:" in found["tokenizer.chat_template"]
        assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (
            1,
            0,
        )
        assert found.get("tokenizer.ggml.add_bos_token") is (None if begins else False)


def test_templates_for_other_uses_do_not_come_along(tmp_path: Path) -> None:
    """llama.cpp would choose `tool_use` where tools are given, and the anchor is not in it."""
    source = write_gguf(
        tmp_path / "source.gguf", more={"tokenizer.chat_template.tool_use": "{{ tools }}"}
    )
    assert "tokenizer.chat_template.tool_use" in facts(source)
    gguf.write(source, tmp_path / "out.gguf", *states(source), "q8_0", SPEECH)
    assert [key for key in facts(tmp_path / "out.gguf") if "template" in key] == [
        "tokenizer.chat_template"
    ]
