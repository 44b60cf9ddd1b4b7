"""Scoring and generating: examples -> losses of their gold answers; prompts -> texts.

Scoring takes the training path (packed rows); losses are in nats. Generation is Transformers' own
`generate` with padding. Longest prompts come first, so that a batch holds prompts of similar length
and running out of memory shows at once. What all prompts begin with is computed once.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from fulcrum.core.types import FloatArray, IntArray, Tokens
from fulcrum.data.encode import PromptFormat
from fulcrum.data.formats import whole_sentences
from fulcrum.model.adapter import no_dropout
from fulcrum.model.base_model import LoadedModel, generation_attention
from fulcrum.model.loss import Row, row_kl, row_nats, rows, set_checkpointing
from fulcrum.model.packing import BLOCK, common, shared

_LEAST_PROBABLE = 3e-4  # tokens below are not drawn; the likeliest 95% would need a sort each step


def nats(
    loaded: LoadedModel, examples: Sequence[Tokens], *, budget: int = 2048
) -> tuple[FloatArray, IntArray]:
    """Return the summed loss of each example's supervised tokens, and their number.

    Both have the shape (examples,).
    """
    sums, counts = losses_at(loaded, examples, (1.0,), budget=budget)
    return sums[:, 0], counts


def losses_at(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    temperatures: Sequence[float],
    *,
    budget: int = 2048,
) -> tuple[FloatArray, IntArray]:
    """Return the summed loss of each example's supervised tokens at each temperature.

    The losses are (examples, temperatures); the tokens' numbers (examples,). Rows hold `budget`
    tokens, or twice what all examples begin with if that is more (many shots in the prompt): a
    beginning that fills its row would be computed again for every example.
    """

    def measure(row: Row) -> Tensor:
        return row_nats(loaded, row, temperatures)

    return _sums(loaded, examples, measure, len(temperatures), budget)


def divergence(
    loaded: LoadedModel, examples: Sequence[Tokens], *, budget: int = 2048
) -> tuple[FloatArray, IntArray]:
    """Return KL(base || adapted), in nats, summed over each example's supervised tokens.

    Their number comes second; both have the shape (examples,).
    """

    def measure(row: Row) -> Tensor:
        return row_kl(loaded, row)[:, None]

    sums, counts = _sums(loaded, examples, measure, 1, budget)
    return sums[:, 0], counts


def mean_loss(loaded: LoadedModel, examples: Sequence[Tokens]) -> float:
    """Return the loss per supervised token over all examples together."""
    sums, counts = nats(loaded, examples)
    return float(sums.sum() / counts.sum())


def _sums(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    measure: Callable[[Row], Tensor],
    width: int,
    budget: int,
) -> tuple[FloatArray, IntArray]:
    """Return what `measure` says of a row's targets (targets, width), summed by example."""
    no_dropout(loaded)
    budget = max(budget, 2 * common([example.ids for example in examples]))
    sums = np.zeros((len(examples), width))
    counts = np.zeros(len(examples), dtype=np.int64)
    for row in rows(examples, loaded, budget):
        owner = row.owner.cpu().numpy()
        np.add.at(sums, owner, measure(row).cpu().double().numpy())
        np.add.at(counts, owner, 1)
    return sums, counts


@dataclass(frozen=True)
class Decoding:
    """How an answer's tokens are chosen, and where an unfinished answer ends. Greedy by default.

    Drawn tokens have a probability of 3e-4 or more: epsilon sampling, Hewitt et al. 2022 (arXiv
    2210.15191).
    """

    seed: int | None = None  # of drawn tokens; None: the likeliest ones
    temperature: float = 1.0  # of drawn tokens
    whole: bool = False  # an unfinished answer ends after its last whole sentence; empty if none


GREEDY = Decoding()


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    form: PromptFormat,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    decoding: Decoding = GREEDY,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the answers to tokenised prompts, in their order, without end and special tokens.

    `batch_tokens` bounds prompts x (longest prompt + answer) of a batch. `progress` is called with
    the number of prompts done.
    """
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]), reverse=True)
    texts = [""] * len(prompts)
    options = _options(loaded, form, max_new_tokens, decoding)
    with _ready(loaded):
        beginning = _beginning(loaded, prompts, max_new_tokens)
        start = 0
        while start < len(order):
            longest = len(prompts[order[start]])
            size = max(1, batch_tokens // (longest + max_new_tokens))
            batch = order[start : start + size]
            answers = _batch(loaded, [prompts[k] for k in batch], beginning, options)
            for index, ids in zip(batch, answers, strict=True):
                texts[index] = _text(loaded, ids, options["eos_token_id"], whole=decoding.whole)
            start += len(batch)
            if progress is not None:
                progress(start)
    return texts


@torch.no_grad()
def generate_one(
    loaded: LoadedModel,
    prompt: Sequence[int],
    form: PromptFormat,
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the greedy answer to a tokenised prompt; `on_text` is given its parts as they come."""
    options = _options(loaded, form, max_new_tokens, GREEDY)
    if on_text is not None:
        options["streamer"] = _Streamer(loaded, on_text)
    with _ready(loaded):
        (ids,) = _batch(loaded, [prompt], _Beginning(), options)
    return _text(loaded, ids, options["eos_token_id"], whole=False)


def end_ids(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end an answer according to the model's own settings."""
    configured = loaded.causal.generation_config.eos_token_id
    if configured is None:
        return []
    if isinstance(configured, list | tuple):
        return [int(token) for token in configured]
    return [int(configured)]


def _options(
    loaded: LoadedModel, form: PromptFormat, max_new_tokens: int, decoding: Decoding
) -> dict[str, Any]:
    """Return what Transformers' `generate` is told, and seed its draws."""
    stop = sorted({*form.end_ids, *end_ids(loaded)})
    pad = loaded.tokenizer.pad_token_id
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop,
        "pad_token_id": stop[0] if pad is None else pad,
        "do_sample": decoding.seed is not None,
    }
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
        options["temperature"] = decoding.temperature
        options["epsilon_cutoff"] = _LEAST_PROBABLE
        options["top_p"] = 1.0
        options["top_k"] = 0
    return options


@contextmanager
def _ready(loaded: LoadedModel) -> Iterator[None]:
    """Inside, the model generates: with a key/value cache, and no settings but the call's."""
    no_dropout(loaded)
    set_checkpointing(loaded, False)  # a layer that recomputes would drop the key/value cache
    training = generation_attention(loaded)
    # What a call leaves open Transformers takes from here: penalties, which greedy does not have.
    shipped = loaded.causal.generation_config
    loaded.causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        loaded.causal.generation_config = shipped
        if loaded.packed:
            loaded.causal.set_attn_implementation(training)


@dataclass(frozen=True)
class _Beginning:
    """What all prompts begin with."""

    length: int = 0  # tokens
    cache: Any = None  # their keys and values, as one sequence


def _beginning(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> _Beginning:
    """Compute the prompts' common beginning (template header, anchor) once for all batches.

    Nothing is shared if that does not pay or is not exact: padding will separate the beginning from
    the rest of a prompt, and a sliding window counts it, unlike positions.
    """
    if not loaded.shares or len(prompts) < 2:
        return _Beginning()
    # What the first and the last in the order of ids share, all share.
    first = min(map(tuple, prompts))
    last = max(map(tuple, prompts))
    lengths = [len(prompt) for prompt in prompts]
    length = min(shared(first, last), min(lengths) - 1)  # each keeps a token to continue from
    config = loaded.causal.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if length < BLOCK or (window and max(lengths) + max_new_tokens > window):
        return _Beginning()
    cache = DynamicCache(config=config)
    ids = torch.tensor([first[:length]], device=loaded.device)
    with loaded.precision():
        loaded.body(input_ids=ids, past_key_values=cache, use_cache=True)
    return _Beginning(length, cache)


def _batch(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    beginning: _Beginning,
    options: dict[str, Any],
) -> list[list[int]]:
    """Return the answers' ids, up to the longest one's end; each is padded before and after."""
    longest = max(len(prompt) for prompt in prompts)
    done = beginning.length
    shape = (len(prompts), longest)
    ids = torch.full(shape, options["pad_token_id"], dtype=torch.int64, device=loaded.device)
    mask = torch.zeros_like(ids)
    for k, prompt in enumerate(prompts):
        rest = longest - len(prompt) + done
        for place, part in ((slice(done), prompt[:done]), (slice(rest, None), prompt[done:])):
            ids[k, place] = torch.as_tensor(part, dtype=torch.int64, device=loaded.device)
            mask[k, place] = 1
    past = {}
    if beginning.cache is not None:
        past["past_key_values"] = copy.deepcopy(beginning.cache)
        past["past_key_values"].batch_repeat_interleave(len(prompts))
    with loaded.precision():
        output = loaded.causal.generate(input_ids=ids, attention_mask=mask, **options, **past)
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


def _text(loaded: LoadedModel, ids: list[int], stop: Sequence[int], *, whole: bool) -> str:
    """Return the text of an answer's ids before the first stop token."""
    end = 0
    while end < len(ids) and ids[end] not in stop:
        end += 1
    text = str(loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
    if whole and end == len(ids):
        return whole_sentences(text)
    return text


class Answer:
    """The text of an answer while its tokens come.

    What is returned is final: never half a character, nor the beginning of a stop text.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str], *, strip: bool
    ) -> None:
        self.decode = decode
        self.stop = stop
        self.strip = strip  # drop white space around the whole answer
        self.ids: list[int] = []
        self.stopped = False  # a stop text ended the answer
        self._read = 0  # ids that are text already
        self._from = 0  # where decoding begins: before `_read`, as spaces need the token before
        self._held = ""  # text that may belong to a stop text
        self._silent = True  # nothing was returned yet

    def add(self, token: int) -> str:
        """Add a token, and return the text that is certain now."""
        self.ids.append(token)
        new = self._new()
        if not new.endswith("\ufffd"):  # else bytes of a character are missing
            self._held += new
            self._from = self._read
            self._read = len(self.ids)
        return self._certain()

    def end(self) -> str:
        """End the answer, and return what was held back."""
        if self.stopped:
            return ""
        self._held += self._new()
        self._from = self._read = len(self.ids)
        text = self._certain()
        return text if self.stopped else text + self._stripped(self._held)

    def _new(self) -> str:
        known = self.decode(self.ids[self._from : self._read])
        return self.decode(self.ids[self._from :])[len(known) :]

    def _certain(self) -> str:
        places = [self._held.find(text) for text in self.stop]
        ends = [place for place in places if place >= 0]
        if ends:
            self.stopped = True
            text = self._stripped(self._held[: min(ends)])
            self._held = ""
            return text
        overlap = max((_overlap(self._held, text) for text in self.stop), default=0)
        certain = self._held[: len(self._held) - overlap]
        if self.strip:
            certain = certain.rstrip()  # white space may be the end
        self._held = self._held[len(certain) :]
        text = self._stripped(certain)
        self._silent = self._silent and not text
        return text

    def _stripped(self, text: str) -> str:
        """Return the last part of an answer without the white space around the whole."""
        if not self.strip:
            return text
        return text.strip() if self._silent else text.rstrip()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _Streamer:
    """What Transformers calls while it generates: with the prompt's ids, then a token at a time."""

    def __init__(self, loaded: LoadedModel, on_text: Callable[[str], None]) -> None:
        def decode(ids: list[int]) -> str:
            return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))

        self.answer = Answer(decode, (), strip=True)
        self.on_text = on_text
        self.has_prompt = False

    def put(self, ids: Tensor) -> None:
        if self.has_prompt:
            for token in ids.flatten().tolist():
                self.on_text(self.answer.add(token))
        self.has_prompt = True

    def end(self) -> None:
        self.on_text(self.answer.end())
