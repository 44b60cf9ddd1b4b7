"""A GGUF file in llama.cpp, by `llama-cpp-python`: spoken to as llama.cpp's own server does, in a process of its own.

llama.cpp is native code, which ends its process where its kernels and the machine disagree (ggml-org/llama.cpp#20824); whoever
asks lives on to say so. This file loads no torch: the two libraries bring an OpenMP runtime each.
"""

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulcrum.core import processes
from fulcrum.core.errors import ModelError
from fulcrum.core.types import FloatArray, IntArray, Message


def is_installed() -> bool:
    """Whether `llama-cpp-python` is."""
    return find_spec("llama_cpp") is not None


def told(scores: npt.NDArray[np.float32], targets: IntArray) -> tuple[FloatArray, IntArray]:
    """The nats of tokens, and the token that is likeliest in place of each; `scores` are (tokens, vocabulary)."""
    own = scores.astype(np.float64)
    top = own.max(axis=1)
    nats = (
        top + np.log(np.exp(own - top[:, None]).sum(axis=1)) - own[np.arange(len(targets)), targets]
    )
    return nats, own.argmax(axis=1)


class LlamaCpp:
    """A GGUF file in llama.cpp (an `artefact.Reader`). Whatever it is asked raises ModelError where llama.cpp crashes."""

    def __init__(self, file: Path, longest: int, threads: int) -> None:
        """Load the file with room for `longest` tokens. Raises ModelError where llama.cpp cannot."""
        self._file = file
        self._process = processes.start(1)
        self.name = (
            f"llama.cpp (llama-cpp-python {self._asked(_load, str(file), longest, threads)})"
        )

    def _asked(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return self._process.submit(function, *given).result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"llama.cpp crashed on {self._file.name}: its build and this machine may not agree; build it for any machine "
                "(CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python)"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """As `Reader`'s."""
        found: list[int] = self._asked(
            _prompt, [{"role": each.role, "content": each.content} for each in messages]
        )
        return found

    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """As `Reader`'s."""
        found: tuple[FloatArray, IntArray] = self._asked(_read, ids, places)
        return found

    def answer(self, prompt: list[int], most: int) -> str:
        """As `Reader`'s."""
        return str(self._asked(_answer, prompt, most))

    def stops_at(self, token: int) -> bool:
        """As `Reader`'s."""
        return bool(self._asked(_ends, token))


_held: dict[str, Any] = {}  # of the process that has the model


def _load(file: str, longest: int, threads: int) -> str:
    """Load the model of this process; returns the library's version."""
    import jinja2
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        llama = llama_cpp.Llama(
            file, n_ctx=longest, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
        )  # fmt: skip
        vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
        begin, end = (
            "" if token < 0 else llama_cpp.llama_vocab_get_text(vocabulary, token).decode()
            for token in (llama.token_bos(), llama.token_eos())
        )
        template = llama.metadata.get("tokenizer.chat_template", "")
        written = Jinja2ChatFormatter(template=template, bos_token=begin, eos_token=end)
    except (ValueError, jinja2.TemplateError) as error:
        raise ModelError(
            f"llama-cpp-python {llama_cpp.__version__} cannot load {Path(file).name}: {error}; a newer one may"
        ) from None
    _held.update(
        library=llama_cpp, llama=llama, vocabulary=vocabulary, begin=begin, written=written
    )
    return str(llama_cpp.__version__)


def _prompt(turns: list[dict[str, str]]) -> list[int]:
    text = str(_held["written"](messages=turns).prompt)
    if _held["library"].llama_vocab_get_add_bos(
        _held["vocabulary"]
    ):  # the tokenizer begins every text with it
        text = text.removeprefix(_held["begin"])
    return [
        int(token) for token in _held["llama"].tokenize(text.encode(), add_bos=True, special=True)
    ]


def _read(ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
    llama = _held["llama"]
    llama.reset()
    llama.eval(ids.tolist())
    return told(llama.scores[places - 1], ids[places])


def _answer(prompt: list[int], most: int) -> str:
    llama, found = _held["llama"], list[int]()
    llama.reset()
    llama.eval(prompt)
    while len(found) < most:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if _ends(token):
            break
        found.append(token)
        llama.eval([token])
    return str(llama.detokenize(found).decode(errors="replace")).strip()


def _ends(token: int) -> bool:
    return bool(_held["library"].llama_vocab_is_eog(_held["vocabulary"], token))
