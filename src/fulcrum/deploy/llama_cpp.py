"""Read a GGUF file in llama.cpp, by `llama-cpp-python`, in a process of its own.

It is used as llama.cpp's own server uses it. llama.cpp is native code, which ends its process if
its kernels and the machine disagree (ggml-org/llama.cpp#20824); the calling process survives to say
so. This file does not load torch: the two libraries bring an OpenMP runtime each.
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
    """Return whether `llama-cpp-python` is installed."""
    return find_spec("llama_cpp") is not None


def token_losses(logits: npt.NDArray[np.float32], targets: IntArray) -> tuple[FloatArray, IntArray]:
    """Return the losses (nats) of tokens, and the likeliest tokens in place of each.

    `logits`: (tokens, vocabulary).
    """
    exact = logits.astype(np.float64)
    top = exact.max(axis=1)
    log_sums = top + np.log(np.exp(exact - top[:, None]).sum(axis=1))
    losses = log_sums - exact[np.arange(len(targets)), targets]
    return losses, exact.argmax(axis=1)


class LlamaCpp:
    """A GGUF file in llama.cpp (a `check.Reader`).

    Every call raises ModelError if llama.cpp crashes.
    """

    def __init__(self, file: Path, longest: int, threads: int) -> None:
        """Load the file with room for `longest` tokens. Raise ModelError if llama.cpp cannot."""
        self._file = file
        self._process = processes.start(1)
        version = self._call(_load, str(file), longest, threads)
        self.name = f"llama.cpp (llama-cpp-python {version})"

    def _call(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return self._process.submit(function, *given).result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"llama.cpp crashed on {self._file.name}: its build and this machine may not "
                "agree; build it for any machine (CMAKE_ARGS=-DGGML_NATIVE=OFF pip install "
                "--force-reinstall --no-cache-dir llama-cpp-python)"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        ids: list[int] = self._call(_prompt, turns)
        return ids

    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Return losses and likeliest tokens."""
        losses_and_likeliest: tuple[FloatArray, IntArray] = self._call(_read, ids, places)
        return losses_and_likeliest

    def answer(self, prompt: list[int], most: int) -> str:
        """Return the greedy answer."""
        return str(self._call(_answer, prompt, most))

    def stops_at(self, token: int) -> bool:
        """Return whether answers end with this token."""
        return bool(self._call(_is_end, token))


_held: dict[str, Any] = {}  # the model, in the process that has loaded it


def _load(file: str, longest: int, threads: int) -> str:
    """Load the model of this process; return the library's version."""
    import jinja2
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        llama = llama_cpp.Llama(
            file,
            n_ctx=longest,
            logits_all=True,
            verbose=False,
            n_threads=threads,
            n_threads_batch=threads,
        )
        vocabulary = llama_cpp.llama_model_get_vocab(llama.model)

        def text_of(token: int) -> str:
            if token < 0:
                return ""
            return str(llama_cpp.llama_vocab_get_text(vocabulary, token).decode())

        begin = text_of(llama.token_bos())
        end = text_of(llama.token_eos())
        template = llama.metadata.get("tokenizer.chat_template", "")
        formatter = Jinja2ChatFormatter(template=template, bos_token=begin, eos_token=end)
    except (ValueError, jinja2.TemplateError) as error:
        library = f"llama-cpp-python {llama_cpp.__version__}"
        raise ModelError(
            f"{library} cannot load {Path(file).name}: {error}; a newer one may"
        ) from None
    _held["library"] = llama_cpp
    _held["llama"] = llama
    _held["vocabulary"] = vocabulary
    _held["begin"] = begin
    _held["formatter"] = formatter
    return str(llama_cpp.__version__)


def _prompt(turns: list[dict[str, str]]) -> list[int]:
    text = str(_held["formatter"](messages=turns).prompt)
    # The tokenizer may begin every text itself: then the template must not do so too.
    if _held["library"].llama_vocab_get_add_bos(_held["vocabulary"]):
        text = text.removeprefix(_held["begin"])
    ids = _held["llama"].tokenize(text.encode(), add_bos=True, special=True)
    return [int(token) for token in ids]


def _read(ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
    llama = _held["llama"]
    llama.reset()
    llama.eval(ids.tolist())
    return token_losses(llama.scores[places - 1], ids[places])


def _answer(prompt: list[int], most: int) -> str:
    llama = _held["llama"]
    llama.reset()
    llama.eval(prompt)
    answer: list[int] = []
    while len(answer) < most:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if _is_end(token):
            break
        answer.append(token)
        llama.eval([token])
    return str(llama.detokenize(answer).decode(errors="replace")).strip()


def _is_end(token: int) -> bool:
    return bool(_held["library"].llama_vocab_is_eog(_held["vocabulary"], token))
