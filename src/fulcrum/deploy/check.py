"""Score an exported model again, by what will load it: is it still the model that was trained?

Five things can go wrong, and each shows here: another chat template (the prompt's tokens differ),
an end of answers that is not known there (they would not stop), and weights lost on the way, in
merging, or in rounding (the losses of the same gold answers differ). Both models read the same
rows; each lays out the prompts itself, from the messages.
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
from fulcrum.deploy.llama_cpp import LlamaCpp, token_losses
from fulcrum.model import gguf
from fulcrum.model.adapter import no_dropout
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.generate import generate
from fulcrum.stats import metrics

LEAST_AGREEMENT = 0.95  # share of answer tokens for which both models find the same one likeliest
# Largest difference of the mean loss, in nats per answer token.
MAX_LOSS_DIFFERENCE = {"adapter": 0.02, "merged": 0.02, "f16": 0.02, "q8_0": 0.05}


class Reader(Protocol):
    """A model with its tokenizer, as some program loads it."""

    name: str

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that ends with a question, by its own template."""

    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Return the losses (nats) of tokens at `places`, and the likeliest tokens there."""

    def answer(self, prompt: list[int], most: int) -> str:
        """Return the greedy answer to a prompt, of at most so many tokens."""

    def stops_at(self, token: int) -> bool:
        """Return whether its answers end with this token."""


@dataclass
class Trained:
    """The adapter as it was trained and tested (a `Reader`)."""

    loaded: LoadedModel
    form: encode.PromptFormat
    name: str = "the trained adapter"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids."""
        return encode.prompt_ids(messages, self.form)

    @torch.no_grad()
    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Return losses and likeliest tokens."""
        no_dropout(self.loaded)
        with self.loaded.precision():
            given = torch.tensor(ids[None], device=self.loaded.device)
            logits = self.loaded.causal(input_ids=given, use_cache=False).logits[0]
        return token_losses(logits.float().cpu().numpy()[places - 1], ids[places])

    def answer(self, prompt: list[int], most: int) -> str:
        """Return the greedy answer."""
        return generate(self.loaded, [prompt], self.form, max_new_tokens=most, batch_tokens=1)[0]

    def stops_at(self, token: int) -> bool:
        """Return whether answers end with this token."""
        return token in self.form.end_ids


@dataclass
class Plain:
    """A model and its tokenizer in plain Transformers, with nothing of Fulcrum (a `Reader`)."""

    causal: Any
    tokenizer: Any
    name: str = "Transformers"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        encoded = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        )
        return [int(token) for token in encoded["input_ids"]]

    @torch.no_grad()
    def read(self, ids: IntArray, places: IntArray) -> tuple[FloatArray, IntArray]:
        """Return losses and likeliest tokens."""
        logits = self.causal(input_ids=torch.tensor(ids[None]), use_cache=False).logits[0]
        return token_losses(logits.float().numpy()[places - 1], ids[places])

    @torch.no_grad()
    def answer(self, prompt: list[int], most: int) -> str:
        """Return the greedy answer."""
        given = torch.tensor([prompt])
        generated = self.causal.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answer = generated[0, len(prompt) :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def stops_at(self, token: int) -> bool:
        """Return whether answers end with this token."""
        ends = self.causal.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list | tuple) else [ends])


def gguf_reader(file: Path, longest: int) -> Reader:
    """Load a GGUF file in llama.cpp if that is installed, else in Transformers.

    Transformers reads the same weights, but with another tokenizer. Raise ModelError if the file
    cannot be loaded.
    """
    if llama_cpp.is_installed():
        return LlamaCpp(file, longest, torch.get_num_threads())
    tokenizer, causal = gguf.read(file, torch.float32)
    return Plain(causal.eval(), tokenizer, "Transformers (llama-cpp-python is not installed)")


@dataclass(frozen=True)
class Measured:
    """What a model makes of rows."""

    reader: str  # its name
    prompts: tuple[tuple[int, ...], ...]  # token ids, one a row
    nats: FloatArray  # (gold answer tokens of all rows,), their losses
    likeliest: IntArray  # (gold answer tokens of all rows,), the token it finds likeliest there
    answers: tuple[str, ...]  # its own, one a row; empty if none were asked for


def measure(
    reader: Reader,
    rows: Sequence[Example],
    form: encode.PromptFormat,
    most: int,
    count: Count | None = None,
) -> Measured:
    """Read rows; `most` is the longest answer in tokens (0: do not ask for answers).

    Gold answers follow the run's own prompt, so that another template does not affect the losses.
    """
    prompts = []
    answers = []
    nats = []
    likeliest = []
    for number, row in enumerate(rows, 1):
        prompt = reader.prompt(row.prompt)
        gold = encode.final_answer(row, form)
        places = np.flatnonzero(gold.loss_mask)
        losses, top = reader.read(np.asarray(gold.ids, dtype=np.int64), places)
        prompts.append(tuple(prompt))
        nats.append(losses)
        likeliest.append(top)
        if most:
            answers.append(reader.answer(prompt, most))
        if count is not None:
            count(number, len(rows))
    return Measured(
        reader.name, tuple(prompts), np.concatenate(nats), np.concatenate(likeliest), tuple(answers)
    )


def prompt_mismatch(
    trained: Measured, reader: Reader, rows: Sequence[Example], form: encode.PromptFormat
) -> str:
    """Say how an exported model's prompts or ends of answers differ from training; "" if not."""
    differing: list[str] = []
    for row, trained_prompt in zip(rows, trained.prompts, strict=True):
        try:
            prompt = tuple(reader.prompt(row.prompt))
        except ModelError:  # a crash
            raise
        except Exception as error:  # Jinja raises many kinds, and templates raise their own
            return f"template: {reader.name} cannot lay out {row.origin}: {error}; do not use it"
        if prompt != trained_prompt:
            differing.append(row.origin)
    if differing:
        return (
            f"template: the prompts of {len(differing)} of {len(rows)} rows have other tokens than "
            f"in training, the first is that of {differing[0]}; do not use it"
        )
    if not any(reader.stops_at(token) for token in form.end_ids):
        return (
            f"ending: {reader.name} does not stop at {form.end_text!r}, with which each answer "
            "ends; name it as the tokenizer's eos_token in the model's folder, and train again"
        )
    return ""


@dataclass(frozen=True)
class Check:
    """How far an exported model is from the trained one; pairs are (trained, exported)."""

    reader: str  # what loaded the export
    rows: int
    tokens: int  # of gold answers
    nats: tuple[float, float]  # mean loss per answer token
    agreement: float  # share of tokens for which both find the same one likeliest
    same_answers: float | None  # share of equal answers; None if none were asked for
    scores: tuple[tuple[str, float, float], ...]  # metric, its two values
    wrong: str  # what is wrong, in words; "" if nothing is


def compare(
    trained: Measured,
    exported: Measured,
    rows: Sequence[Example],
    metric_names: Sequence[str],
    kind: str,
    *,
    exact: Measured | None,
    find_lost: Callable[[], str],
) -> Check:
    """Compare an exported model (`kind` as in `MAX_LOSS_DIFFERENCE`) with the trained one.

    `exact` is the merged model before it was rounded or quantised: it tells whether merging or
    rounding lost what is missing. `find_lost`, called if the models differ, says which tensors are
    not the merged model's ("": none).
    """
    same_answers = None
    scores: list[tuple[str, float, float]] = []
    if exported.answers:
        same_answers = _equal_share(trained.answers, exported.answers)
        names = [name for name in metric_names if name != "nll"]
        before = _score(rows, trained.answers, names)
        after = _score(rows, exported.answers, names)
        scores = list(zip(names, before, after, strict=True))
    return Check(
        reader=exported.reader,
        rows=len(rows),
        tokens=len(trained.nats),
        nats=(float(trained.nats.mean()), float(exported.nats.mean())),
        agreement=_agreement(trained, exported),
        same_answers=same_answers,
        scores=tuple(scores),
        wrong=_wrong(trained, exported, exact, kind, find_lost),
    )


def _equal_share(one: Sequence[str], other: Sequence[str]) -> float:
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))


def _agreement(one: Measured, other: Measured) -> float:
    return float((one.likeliest == other.likeliest).mean())


def _score(rows: Sequence[Example], answers: Sequence[str], names: Sequence[str]) -> list[float]:
    if not names:
        return []
    predictions = []
    for row, answer in zip(rows, answers, strict=True):
        predictions.append(
            Prediction(row.origin, row.group, row.question, row.answer, answer, 0.0, 1)
        )
    return [score.value for score in metrics.score(tuple(predictions), names, draws=2)]


def _wrong(
    trained: Measured,
    exported: Measured,
    exact: Measured | None,
    kind: str,
    find_lost: Callable[[], str],
) -> str:
    difference = _difference(trained, exported, kind)
    if not difference:
        return ""
    if exact is not None and _difference(trained, exact, "merged"):
        return (
            f"merging: {difference}, and the merged model has as much before it is rounded; "
            "use the adapter itself (--to adapter)"
        )
    lost = find_lost()
    if lost:
        return f"weights: {difference}, and {lost}; do not use it"
    if kind == "q8_0":
        return f"quantisation: {difference}; try --quantization f16"
    if kind == "f16":
        return f"quantisation: {difference}; try --to merged"
    remedy = "--dtype float32" if kind == "merged" else "--to merged"
    return f"precision: {difference}; try {remedy}"


def _difference(trained: Measured, other: Measured, kind: str) -> str:
    """Say by how much a model differs from the trained one; "" if no more than is allowed."""
    loss = float(other.nats.mean() - trained.nats.mean())
    allowed = MAX_LOSS_DIFFERENCE[kind]
    if not abs(loss) <= allowed:  # also true of NaN
        return (
            f"the loss is {loss:+.3f} nats a token compared with the trained adapter's "
            f"({allowed} is allowed)"
        )
    agreement = _agreement(trained, other)
    if agreement < LEAST_AGREEMENT:
        return (
            f"{agreement:.1%} of the answers' tokens agree with the trained adapter's "
            f"({LEAST_AGREEMENT:.0%} is asked for)"
        )
    return ""
