"""An exported model scored again, by what will load it: is it still the model that was trained?

"Good in the notebook, garbage elsewhere" has five causes, and each shows here: another template (the prompt's tokens differ),
an end of answers that is not known there (they would go on), weights lost on the way, or in merging, or in rounding (the losses
of the same gold answers differ). The two models read the same rows; prompts are each one's own, from the messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fulcrum.core.errors import ModelError
from fulcrum.core.progress import Count
from fulcrum.core.types import Example, FloatArray, IntArray, Message, Prediction
from fulcrum.data import encode
from fulcrum.deploy import llama_cpp
from fulcrum.deploy.llama_cpp import LlamaCpp, told
from fulcrum.model import gguf
from fulcrum.model.adapter import no_dropout
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.generate import generate
from fulcrum.stats import metrics

LEAST_AGREEMENT = 0.95  # of answer tokens: both models find the same one likeliest
MOST_NATS = {
    "adapter": 0.02,
    "merged": 0.02,
    "f16": 0.02,
    "q8_0": 0.05,
}  # per answer token, of the mean loss


class Reader(Protocol):
    """A model with its tokenizer, as something loads it."""

    name: str

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with a question, as its own chat template writes it."""

    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Of the tokens of a text at `places`: their nats, and the token that is found likeliest there."""

    def answer(self, prompt: list[int], most: int) -> str:
        """The greedy answer to a prompt, of at most so many tokens."""

    def stops_at(self, token: int) -> bool:
        """Whether its answers end with this token."""


@dataclass
class Trained:
    """The adapter as it was trained and tested."""

    loaded: LoadedModel
    form: encode.Format
    name: str = "the trained adapter"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """As `Reader`'s."""
        return encode.prompt_ids(messages, self.form)

    @torch.no_grad()
    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """As `Reader`'s."""
        no_dropout(self.loaded)
        with self.loaded.precision():
            given = torch.tensor(ids[None], device=self.loaded.device)
            found = self.loaded.causal(input_ids=given, use_cache=False).logits[0]
        return told(found.float().cpu().numpy()[places - 1], ids[places])

    def answer(self, prompt: list[int], most: int) -> str:
        """As `Reader`'s."""
        return generate(self.loaded, [prompt], self.form, max_new_tokens=most, batch_tokens=1)[0]

    def stops_at(self, token: int) -> bool:
        """As `Reader`'s."""
        return token in self.form.end_ids


@dataclass
class Plain:
    """A model and its tokenizer in plain Transformers, without anything of Fulcrum."""

    causal: Any
    tokenizer: Any
    name: str = "Transformers"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """As `Reader`'s."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        found = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )
        return [int(token) for token in found["input_ids"]]

    @torch.no_grad()
    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """As `Reader`'s."""
        found = self.causal(input_ids=torch.tensor(ids[None]), use_cache=False).logits[0]
        return told(found.float().numpy()[places - 1], ids[places])

    @torch.no_grad()
    def answer(self, prompt: list[int], most: int) -> str:
        """As `Reader`'s."""
        given = torch.tensor([prompt])
        found = self.causal.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return str(self.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)).strip()

    def stops_at(self, token: int) -> bool:
        """As `Reader`'s."""
        ends = self.causal.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list | tuple) else [ends])


def of_gguf(file: Path, longest: int) -> Reader:
    """llama.cpp with the file where it is installed; else Transformers, which reads the same weights and another tokenizer.
    Raises ModelError where the file cannot be loaded."""
    if llama_cpp.is_installed():
        return LlamaCpp(file, longest, torch.get_num_threads())
    tokenizer, causal = gguf.read(file, torch.float32)
    return Plain(causal.eval(), tokenizer, "Transformers (llama-cpp-python is not installed)")


@dataclass(frozen=True)
class Measured:
    """What a model makes of rows: its prompts, and of the gold answers' tokens, all rows end to end, the nats and the likeliest
    token there; its own answers, where they were asked for."""

    prompts: tuple[tuple[int, ...], ...]
    nats: FloatArray
    likeliest: IntArray
    answers: tuple[str, ...]


def measure(
    reader: Reader,
    rows: Sequence[Example],
    form: encode.Format,
    most: int,
    count: Count | None = None,
) -> Measured:
    """Read rows; `most` is the longest answer in tokens, 0: none is asked for. Gold answers follow the run's own prompt, so
    that a template that differs is no part of the losses."""
    prompts, answers, nats, likeliest = [], [], [], []
    for number, row in enumerate(rows, 1):
        prompt, gold = reader.prompt(row.prompt), encode.final_answer(row, form)
        prompts.append(tuple(prompt))
        own, top = reader.read(np.asarray(gold.ids, dtype=np.int64), np.flatnonzero(gold.loss_mask))
        nats.append(own)
        likeliest.append(top)
        answers += [reader.answer(prompt, most)] if most else []
        if count is not None:
            count(number, len(rows))
    return Measured(tuple(prompts), np.concatenate(nats), np.concatenate(likeliest), tuple(answers))


def misspoken(
    trained: Measured, reader: Reader, rows: Sequence[Example], form: encode.Format
) -> str:
    """How an exported model is spoken to otherwise than the trained one was, in words ("": not at all): prompts have other
    tokens, or the end of answers is not known."""
    differ: list[str] = []
    for row, own in zip(rows, trained.prompts, strict=True):
        try:
            differ += [row.origin] * (tuple(reader.prompt(row.prompt)) != own)
        except ModelError:  # a crash
            raise
        except Exception as error:  # Jinja raises many kinds, and templates raise their own
            return f"template: {reader.name} cannot lay out {row.origin}: {error}; do not use it"
    if differ:
        return (
            f"template: the prompts of {len(differ)} of {len(rows)} rows have other tokens than in training, the first is that "
            f"of {differ[0]}; do not use it"
        )
    if not any(reader.stops_at(token) for token in form.end_ids):
        return (
            f"ending: {reader.name} does not stop at {form.end_text!r}, with which each answer ends; name it as the "
            "tokenizer's eos_token in the model's folder, and train again"
        )
    return ""


@dataclass(frozen=True)
class Check:
    """How far an exported model is from the trained one on `rows` rows with `tokens` answer tokens: mean nats of both, the
    share of tokens of which both find the same likeliest, the share of equal answers (None where none were asked for), every
    metric's value of both, and what is wrong, in words ("": nothing)."""

    reader: str
    rows: int
    tokens: int
    nats: tuple[float, float]
    agreement: float
    same_answers: float | None
    scores: tuple[tuple[str, float, float], ...]
    wrong: str


def compared(
    trained: Measured, found: Measured, exact: Measured | None, rows: Sequence[Example], wanted: Sequence[str], kind: str,
    reader: str, lost: Callable[[], str],
) -> Check:  # fmt: skip
    """Hold an exported model (`kind` as in `MOST_NATS`) against the trained one. `exact` is the merged model before it was
    rounded or quantised, which tells which of the two lost what is missing; `lost`, asked where they differ, says in words
    which tensors are not the merged model's ("": none)."""
    asked = [name for name in wanted if name != "nll"] if found.answers else []
    values = [
        [score.value for score in metrics.score(_predictions(rows, each.answers), asked, draws=2)]
        if asked
        else []
        for each in (trained, found)
    ]
    return Check(
        reader=reader,
        rows=len(rows),
        tokens=len(trained.nats),
        nats=(float(trained.nats.mean()), float(found.nats.mean())),
        agreement=_agreement(trained, found),
        same_answers=_same(trained.answers, found.answers) if found.answers else None,
        scores=tuple(zip(asked, *values, strict=True)),
        wrong=_wrong(trained, found, exact, kind, lost),
    )


def _same(one: Sequence[str], other: Sequence[str]) -> float:
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))


def _agreement(one: Measured, other: Measured) -> float:
    return float((one.likeliest == other.likeliest).mean())


def _wrong(
    trained: Measured, found: Measured, exact: Measured | None, kind: str, lost: Callable[[], str]
) -> str:
    why = _apart(trained, found, kind)
    if not why:
        return ""
    if exact is not None and _apart(trained, exact, "merged"):
        return f"merging: {why}, and the merged model has as much before it is rounded; use the adapter itself (--to adapter)"
    if which := lost():
        return f"weights: {why}, and {which}; do not use it"
    remedy = (
        "--dtype float32"
        if kind == "merged"
        else "--quantization f16"
        if kind == "q8_0"
        else "--to merged"
    )
    return f"{'quantisation' if kind in ('f16', 'q8_0') else 'precision'}: {why}; try {remedy}"


def _apart(trained: Measured, found: Measured, kind: str) -> str:
    nats, agreement = float(found.nats.mean() - trained.nats.mean()), _agreement(trained, found)
    if not abs(nats) <= MOST_NATS[kind]:
        return f"the loss is {nats:+.3f} nats a token beside the trained adapter's ({MOST_NATS[kind]} is allowed)"
    if agreement < LEAST_AGREEMENT:
        return f"{agreement:.1%} of the answers' tokens agree with the trained adapter's ({LEAST_AGREEMENT:.0%} is asked for)"
    return ""


def _predictions(rows: Sequence[Example], answers: Sequence[str]) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(row.origin, row.group, row.question, row.answer, answer, 0.0, 1)
        for row, answer in zip(rows, answers, strict=True)
    )
