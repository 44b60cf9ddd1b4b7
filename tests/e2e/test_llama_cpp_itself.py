"""An exported GGUF file in llama.cpp itself; collected only where `llama-cpp-python` is installed
(CONTRIBUTING.md)."""

from pathlib import Path
from typing import Any

import gguf as gguf_format
import numpy as np
import pytest

from fulcrum.core.errors import ModelError
from fulcrum.core.types import Message
from fulcrum.data import encode
from fulcrum.deploy import check, export, llama_cpp
from fulcrum.deploy.export import Wanted
from fulcrum.model import gguf
from helpers.exports import trained
from helpers.gguf_files import write_gguf

pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is an extra that compiles for half an hour"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULCRUM_CACHE", str(place / "cache"))
        patch.setattr(
            check, "LEAST_AGREEMENT", 0.8
        )  # of a random model's tokens some are near ties
        patch.setattr(check, "MAX_LOSS_DIFFERENCE", {"merged": 0.05, "f16": 0.05, "q8_0": 0.3})
        task = {"anchor": "say:", "metrics": ["nll", "exact_match"]}
        yield trained(
            place,
            write_gguf(place / "model.gguf"),
            task=task,
            eval={"general_rows": 0, "draws": 100},
        )


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_llama_cpp_finds_the_adapter_with_its_anchor(
    run: Path, tmp_path: Path, quantization: str
) -> None:
    check = export.export(run, Wanted("gguf", quantization), out=tmp_path / "g").check
    assert check is not None
    assert check.reader.startswith("llama.cpp (llama-cpp-python ")
    assert (check.rows, check.wrong) == (3, "")


def test_it_tells_the_losses_of_the_tensors_in_the_file(tmp_path: Path) -> None:
    """Held against Transformers, which reads the same file."""
    file = write_gguf(tmp_path / "model.gguf")
    tokenizer, causal = gguf.read(file)
    ours, theirs = check.Plain(causal.float().eval(), tokenizer), llama_cpp.LlamaCpp(file, 64, 1)
    asked = (Message("user", "a ant? a"),)
    ids = np.array(theirs.prompt(asked))
    assert ids.tolist() == ours.prompt(asked)
    places = np.arange(1, len(ids))
    found, expected = theirs.read(ids, places), ours.read(ids, places)
    np.testing.assert_allclose(found[0], expected[0], atol=0.02)
    assert found[1].tolist() == expected[1].tolist()


def test_an_answer_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    """The source's own end is <turn>, 1; what the template writes is <end>, 0, which llama.cpp does
    not know by itself."""
    source = write_gguf(tmp_path / "source.gguf")
    assert not llama_cpp.LlamaCpp(source, 64, 1).stops_at(0)
    tokenizer, causal = gguf.read(source)
    speech = gguf.speech_of(encode.make_format(tokenizer, None))
    state = causal.float().state_dict()
    gguf.write(source, tmp_path / "out.gguf", state, state, "f16", speech)
    assert llama_cpp.LlamaCpp(tmp_path / "out.gguf", 64, 1).stops_at(0)


def test_a_template_that_lost_the_anchor_is_named_as_the_cause(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real = gguf.speech_of
    monkeypatch.setattr(
        gguf, "speech_of", lambda form: real(encode.make_format(form.tokenizer, None))
    )
    with pytest.raises(
        ModelError, match=r"not written: template: the prompts of 3 of 3 rows have other tokens"
    ):
        export.export(run, Wanted("gguf", "f16"), out=tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_zeros_is_named_as_lost_weights(
    run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real = gguf.write

    def zeroed(source: Path, target: Path, *rest: Any) -> int:
        found = real(source, target, *rest)
        for tensor in gguf_format.GGUFReader(target, "r+").tensors:
            if tensor.name == "blk.1.ffn_down.weight":
                tensor.data[:] = 0
        return found

    monkeypatch.setattr(gguf, "write", zeroed)
    with pytest.raises(ModelError, match=r"not written: weights: the loss is .* nats a token"):
        export.export(run, Wanted("gguf", "f16"), out=tmp_path / "g")


def test_a_file_cut_short_is_one_line(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ModelError, match=r"llama-cpp-python [\d.]+ cannot load model\.gguf: "):
        llama_cpp.LlamaCpp(file, 64, 1)
