"""Scoring and generating: examples -> nats of their gold answers; prompts -> texts.

Scoring uses the training path (packed rows), generation Transformers' own `generate` with padding, longest prompts first, so
that a batch holds prompts of like length and an out-of-memory shows at once. What all prompts begin with is computed once.

The text of an answer while its tokens come.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from fulcrum.core.types import FloatArray, IntArray, Tokens
from fulcrum.data.encode import Format
from fulcrum.data.formats import sentences
from fulcrum.model.adapter import no_dropout
from fulcrum.model.base_model import LoadedModel, generation_attention
from fulcrum.model.loss import Row, row_kl, row_nats, rows, set_checkpointing
from fulcrum.model.packing import BLOCK, common, shared


class Answer:
    """The text of an answer, token by token: never half a character, nor the beginning of a stop text."""

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str], *, strip: bool
    ) -> None:
        self.decode, self.stop, self.strip = decode, stop, strip
        self.ids: list[int] = []
        self._from, self._read = (
            0,
            0,
        )  # ids before `_read` are text already; decoding begins at `_from`, as spaces need it
        self._held = ""
        self._silent = True
        self.stopped = False  # a stop text ended the answer

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        new = self._new()
        if not new.endswith("\ufffd"):  # else bytes of a character are missing
            self._held += new
            self._from, self._read = self._read, len(self.ids)
        return self._certain()

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        self._held += self._new()
        self._from = self._read = len(self.ids)
        text = self._certain()
        return text if self.stopped else text + self._stripped(self._held)

    def _new(self) -> str:
        return self.decode(self.ids[self._from :])[
            len(self.decode(self.ids[self._from : self._read])) :
        ]

    def _certain(self) -> str:
        ends = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._stripped(self._held[: min(ends)]), ""
            return text
        kept = max((_overlap(self._held, text) for text in self.stop), default=0)
        sure = self._held[: len(self._held) - kept]
        sure = sure.rstrip() if self.strip else sure  # what follows may be the end
        self._held = self._held[len(sure) :]
        text = self._stripped(sure)
        self._silent = self._silent and not text
        return text

    def _stripped(self, text: str) -> str:
        """A part of the answer without the white space around the whole, once nothing follows."""
        if not self.strip:
            return text
        return text.strip() if self._silent else text.rstrip()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(
        (k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0
    )


def nats(
    loaded: LoadedModel, examples: Sequence[Tokens], *, budget: int = 2048
) -> tuple[FloatArray, IntArray]:
    """Summed nats of each example's supervised tokens, and their number; both (examples,)."""
    found, counts = nats_at(loaded, examples, (1.0,), budget=budget)
    return found[:, 0], counts


def nats_at(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    temperatures: Sequence[float],
    *,
    budget: int = 2048,
) -> tuple[FloatArray, IntArray]:
    """Summed nats of each example's supervised tokens at each temperature (examples, temperatures), and their number
    (examples,).

    Rows hold `budget` tokens, or twice what all examples begin with, where that is more (many shots in the prompt): a beginning
    that fills its row would be computed for every example.
    """
    return _summed(
        loaded, examples, lambda row: row_nats(loaded, row, temperatures), len(temperatures), budget
    )


def divergence(
    loaded: LoadedModel, examples: Sequence[Tokens], *, budget: int = 2048
) -> tuple[FloatArray, IntArray]:
    """Summed KL(base || adapted) over each example's supervised tokens, in nats, and their number; both (examples,)."""
    found, counts = _summed(loaded, examples, lambda row: row_kl(loaded, row)[:, None], 1, budget)
    return found[:, 0], counts


def _summed(
    loaded: LoadedModel,
    examples: Sequence[Tokens],
    measure: Callable[[Row], Tensor],
    width: int,
    budget: int,
) -> tuple[FloatArray, IntArray]:
    no_dropout(loaded)
    budget = max(budget, 2 * common([example.ids for example in examples]))
    total = np.zeros((len(examples), width))
    count = np.zeros(len(examples), dtype=np.int64)
    for row in rows(examples, loaded, budget):
        owner = row.owner.cpu().numpy()
        np.add.at(total, owner, measure(row).cpu().double().numpy())
        np.add.at(count, owner, 1)
    return total, count


def mean_nats(loaded: LoadedModel, examples: Sequence[Tokens]) -> float:
    """Nats per supervised token over all examples together."""
    total, count = nats(loaded, examples)
    return float(total.sum() / count.sum())


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    form: Format,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int], None] | None = None,
    sample: int | None = None,
    temperature: float = 1.0,
    whole: bool = False,
    told: Callable[[str], None] | None = None,
) -> list[str]:
    """Answers to tokenised prompts, in their order, without the end token and special tokens.

    Greedy, or with `sample`, a seed, drawn at a `temperature` of tokens of probability 3e-4 or more (epsilon sampling, Hewitt
    et al. 2022, arXiv 2210.15191; the likeliest 95% would sort a vocabulary at every step). `batch_tokens` bounds
    prompts x (longest prompt + answer) of a batch. `progress` is told how many prompts are done. With `whole`, an answer
    that did not end within `max_new_tokens` ends after its last whole sentence (empty where it has none). `told` hears the
    text of a single prompt's answer as it comes.
    """
    if sample is not None:
        torch.manual_seed(sample)
    decode = partial(_until_end, loaded, whole=whole)
    drawn: dict[str, Any] = {"do_sample": sample is not None}
    if sample is not None:
        drawn |= {"temperature": temperature, "top_p": 1.0, "top_k": 0, "epsilon_cutoff": 3e-4}
    if told is not None:
        drawn["streamer"] = _Streamer(loaded, told)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    no_dropout(loaded)
    set_checkpointing(loaded, False)  # a layer that recomputes would drop the key/value cache
    training = generation_attention(loaded)
    stop = sorted({*form.end_ids, *end_ids(loaded)})
    # Transformers takes what a call leaves open from the model's own configuration, whose penalties are no part of greedy.
    shipped, loaded.causal.generation_config = loaded.causal.generation_config, GenerationConfig()
    try:
        beginning = _beginning(loaded, prompts, max_new_tokens)
        start = 0
        while start < len(order):
            longest = len(prompts[order[start]])
            size = max(1, batch_tokens // (longest + max_new_tokens))
            batch = order[start : start + size]
            answers = _batch(
                loaded, [prompts[i] for i in batch], beginning, stop, max_new_tokens, drawn
            )
            for index, ids in zip(batch, answers, strict=True):
                texts[index] = decode(ids, stop)
            start += len(batch)
            if progress is not None:
                progress(start)
    finally:
        loaded.causal.generation_config = shipped
        if loaded.packed:
            loaded.causal.set_attn_implementation(training)
    return texts


@dataclass(frozen=True)
class _Beginning:
    """What all prompts begin with: `length` tokens, and their keys and values (one sequence)."""

    length: int = 0
    cache: Any = None


def _beginning(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], longest_answer: int
) -> _Beginning:
    """Compute the prompts' common beginning (template header, anchor) once for all batches, where that pays and is exact.

    Padding will stand between it and the rest of a prompt. Positions do not count it, but a sliding window does.
    """
    if not loaded.shares or len(prompts) < 2:
        return _Beginning()
    first, last = (
        min(map(tuple, prompts)),
        max(map(tuple, prompts)),
    )  # in the order of ids: what these share, all share
    length = min(
        shared(first, last), *(len(prompt) - 1 for prompt in prompts)
    )  # each prompt has a token left to go on from
    config = loaded.causal.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if length < BLOCK or (window and max(map(len, prompts)) + longest_answer > window):
        return _Beginning()
    cache = DynamicCache(config=config)
    with loaded.precision():
        loaded.body(
            input_ids=torch.tensor([first[:length]], device=loaded.device),
            past_key_values=cache,
            use_cache=True,
        )
    return _Beginning(length, cache)


def _batch(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], beginning: _Beginning, stop: Sequence[int], max_new_tokens: int,
    drawn: Mapping[str, Any],
) -> list[list[int]]:  # fmt: skip
    longest, done = max(len(prompt) for prompt in prompts), beginning.length
    pad = stop[0] if loaded.tokenizer.pad_token_id is None else loaded.tokenizer.pad_token_id
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64, device=loaded.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        rest = longest - len(prompt) + done
        for target, part in ((slice(done), prompt[:done]), (slice(rest, None), prompt[done:])):
            ids[i, target] = torch.as_tensor(part, dtype=torch.int64, device=loaded.device)
            mask[i, target] = 1
    past = {}
    if beginning.cache is not None:
        past["past_key_values"] = copy.deepcopy(beginning.cache)
        past["past_key_values"].batch_repeat_interleave(len(prompts))
    with loaded.precision():
        output = loaded.causal.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **drawn,
            eos_token_id=stop, pad_token_id=pad, **past,
        )  # fmt: skip
    answers: list[list[int]] = output[:, longest:].tolist()
    return answers


class _Streamer:
    """Passes on what Transformers' generation tells of a single prompt: its ids, then a token at a time."""

    def __init__(self, loaded: LoadedModel, told: Callable[[str], None]) -> None:
        self.answer = Answer(
            lambda ids: str(loaded.tokenizer.decode(ids, skip_special_tokens=True)), (), strip=True
        )
        self.told, self.begun = told, False

    def put(self, ids: Tensor) -> None:
        """As Transformers' streamers."""
        for token in ids.flatten().tolist() if self.begun else ():
            self.told(self.answer.add(token))
        self.begun = True

    def end(self) -> None:
        """As Transformers' streamers."""
        self.told(self.answer.end())


def end_ids(loaded: LoadedModel) -> list[int]:
    """The tokens that end an answer by the model's own account."""
    configured = loaded.causal.generation_config.eos_token_id
    if configured is None:
        return []
    return (
        [int(token) for token in configured]
        if isinstance(configured, list | tuple)
        else [int(configured)]
    )


def _until_end(loaded: LoadedModel, ids: list[int], stop: Sequence[int], *, whole: bool) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    text = str(loaded.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
    return text if end < len(ids) or not whole else sentences(text)
