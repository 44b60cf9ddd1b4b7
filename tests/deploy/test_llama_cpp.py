"""Without llama.cpp: what is asked of `llama-cpp-python`, by a stand-in, and what is said where it
crashes or refuses."""

from pathlib import Path

import numpy as np
import pytest

from fulcrum.core.errors import ModelError
from fulcrum.core.types import Message
from fulcrum.deploy import llama_cpp

# A model that finds the token after the last one likeliest, over ten tokens, of which 9 ends an
# answer.
STANDS_IN = """
import os
import numpy as np

__version__ = "0.0"


class Llama:
    def __init__(self, file, n_ctx, logits_all, verbose, n_threads, n_threads_batch):
        if "refused" in file:
            raise ValueError("unknown model architecture")
        self.model, self.metadata, self.n_tokens = "model", {"tokenizer.chat_template": "T"}, 0
        self.scores = np.zeros((n_ctx, 10), np.float32)

    def token_bos(self):
        return 1

    def token_eos(self):
        return -1

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        if 0 in tokens:
            os.abort()
        for token in tokens:
            self.scores[self.n_tokens] = 5.0 * (np.arange(10) == token + 1)
            self.n_tokens += 1

    def tokenize(self, text, add_bos, special):
        assert add_bos and special
        return [1, *(int(byte) - 48 for byte in text)]

    def detokenize(self, tokens):
        return b" ".join(str(token).encode() for token in tokens)


def llama_model_get_vocab(model):
    return model


def llama_vocab_get_text(vocabulary, token):
    return {1: b"<s>"}[token]


def llama_vocab_get_add_bos(vocabulary):
    return True


def llama_vocab_is_eog(vocabulary, token):
    return token == 9
"""
WRITES = """
class Jinja2ChatFormatter:
    def __init__(self, template, bos_token, eos_token):
        assert (template, bos_token, eos_token) == ("T", "<s>", "")

    def __call__(self, messages):
        contents = [each["content"] for each in messages]
        return type("Written", (), {"prompt": "<s>" + "".join(contents)})
"""


@pytest.fixture(scope="module", autouse=True)
def _stand_in(tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("stand-in")
    (place / "llama_cpp").mkdir()
    (place / "llama_cpp" / "__init__.py").write_text(STANDS_IN)
    (place / "llama_cpp" / "llama_chat_format.py").write_text(WRITES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        yield


def test_a_model_is_read_spoken_to_and_asked_in_another_process(tmp_path: Path) -> None:
    assert llama_cpp.is_installed()
    reader = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 32, 1)
    assert reader.name == "llama.cpp (llama-cpp-python 0.0)"
    # Its tokenizer begins a text by itself: the template's own beginning goes, or there would be
    # two.
    assert reader.prompt((Message("user", "34"),)) == [1, 3, 4]
    assert reader.answer([1, 3, 4], 64) == "5 6 7 8"
    assert reader.answer([1, 3, 4], 2) == "5 6"
    assert (reader.stops_at(9), reader.stops_at(1)) == (True, False)
    nats, likeliest = reader.read(np.array([1, 3, 4, 2]), np.array([2, 3]))
    assert likeliest.tolist() == [4, 5]
    np.testing.assert_allclose(nats, np.log(np.exp(5.0) + 9) - np.array([5.0, 0.0]))
    with pytest.raises(
        ModelError,
        match=r"llama\.cpp crashed on model\.gguf: .*CMAKE_ARGS=-DGGML_NATIVE=OFF pip install",
    ):
        reader.read(np.array([1, 0]), np.array([1]))


def test_a_file_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"llama-cpp-python 0\.0 cannot load refused\.gguf: unknown model "
            r"architecture; a newer"
        ),
    ):
        llama_cpp.LlamaCpp(tmp_path / "refused.gguf", 32, 1)
