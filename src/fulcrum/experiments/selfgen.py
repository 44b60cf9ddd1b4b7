"""General data out of a model alone, for whoever may not or cannot bring any: questions with answers, or texts in two parts.

A chat model continues its template's opening of a user's turn, and then answers (Magpie, arXiv 2406.08464). A base model, which
has no turns, writes texts; the first part of each is asked, the rest is the answer. An OpenAI-compatible endpoint does for a
model that is not here. What is too short, garbled, a refusal, repetitive, in another language or there already is left out and
counted.

Invariant: batch n is a pure function of (recipe, writer, n), and the rows are one of all batches up to the last; so a
killed run goes on with the batches that are there, to the same rows (of an endpoint as far as it keeps its seeds).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fulcrum.config.base import GeneralSource
from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.progress import Count
from fulcrum.core.types import Example, Message
from fulcrum.data import encode, filters
from fulcrum.data.formats import content_key, split_in_two
from fulcrum.model import adapter, generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.endpoint import WORKERS, Endpoint

QUESTION_TOKENS, ANSWER_TOKENS = 48, 64  # most
VERSION = 3  # raise it where the same recipe would give other rows
BATCH = 64  # rows that are asked for at once
_DRY = 8  # batches in a row without a new row: the model repeats itself
_FEWEST = 3  # words in a question
_SQUEEZED = (
    0.35  # of its length a text of `_LONG` characters may be compressed to; below it repeats itself
)
_LONG = 200

_SUBJECTS = (
    "cooking", "animals", "travel", "history", "mathematics", "health", "sport", "music", "language", "work", "school",
    "nature", "money", "computers", "the home", "law", "art", "science", "the weather", "books", "cities", "machines",
    "families", "games",
)  # fmt: skip
Pair = tuple[str, str]  # what is asked, and the answer


@dataclass(frozen=True)
class Recipe:
    """What is to be made. `language`: ISO 639-1 code that rows must be in, none: any."""

    rows: int
    seed: int = 0
    temperature: float = 1.0
    language: str | None = None


class Writer(Protocol):
    """Who writes: `described` is what its rows depend on."""

    @property
    def described(self) -> Mapping[str, str]:
        """Name and weights."""

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """About `count` pairs; what is not `sound` to ask is not answered (its answer is empty)."""


@dataclass(frozen=True)
class OfModel:
    """A loaded model, chat or base."""

    loaded: LoadedModel
    batch_tokens: int = 4096

    @property
    def described(self) -> Mapping[str, str]:
        """Name and weights."""
        dtype, device = str(self.loaded.dtype).removeprefix("torch."), self.loaded.device.type
        return {
            "model": self.loaded.name, "weights": self.loaded.fingerprint(), "dtype": dtype, "device": device,
            "batch_tokens": str(self.batch_tokens),
        }  # fmt: skip

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """Questions with greedy answers, or texts in two parts."""
        adapter.drop_adapter(self.loaded)
        form = encode.make_format(self.loaded.tokenizer, None)
        opening = encode.opening_ids(form)
        answer = partial(generate.generate, self.loaded, batch_tokens=self.batch_tokens)
        drawn = generate.Decoding(seed, temperature, whole=True)
        if not self._answers(opening):
            tokenizer = self.loaded.tokenizer
            start = [
                tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ]
            texts = answer(
                [start] * count,
                form,
                max_new_tokens=QUESTION_TOKENS + ANSWER_TOKENS,
                decoding=drawn,
            )
            return [split_in_two(text) for text in texts]
        asked = answer([opening] * count, form, max_new_tokens=QUESTION_TOKENS, decoding=drawn)
        asked = [text.strip() for text in asked]
        prompts = [
            encode.prompt_ids((Message("user", text),), form) for text in asked if sound(text)
        ]
        answers: list[str] = []
        if prompts:
            greedy = generate.Decoding(whole=True)
            answers = answer(prompts, form, max_new_tokens=ANSWER_TOKENS, decoding=greedy)
        remaining = iter(answers)
        return [(text, next(remaining) if sound(text) else "") for text in asked]

    def _answers(self, opening: Sequence[int]) -> bool:
        """Whether the model has turns: a template of its own that opens one, not the plain one that base models are given."""
        plain = {encode.plain_template(adds_bos=adds) for adds in (True, False)}
        return bool(opening) and self.loaded.tokenizer.chat_template not in plain


@dataclass(frozen=True)
class OfEndpoint:
    """A model behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint

    @property
    def described(self) -> Mapping[str, str]:
        """Where and who."""
        return {"endpoint": self.endpoint.url, "model": self.endpoint.model}

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """Questions on subjects in turn, and their answers."""

        def pair(number: int) -> Pair:
            subject = _SUBJECTS[(seed + number) % len(_SUBJECTS)]
            wish = f"Write one question or request about {subject} that somebody might put to an assistant. Write nothing else."
            asked = self.endpoint.say(
                [Message("user", wish)], QUESTION_TOKENS, temperature, seed + number, whole=True
            )
            if not asked or not sound(asked):
                return asked or "", ""
            return asked, self.endpoint.say(
                [Message("user", asked)], ANSWER_TOKENS, 0.0, seed + number, whole=True
            ) or ""

        with ThreadPoolExecutor(WORKERS) as threads:
            return list(threads.map(pair, range(count)))


def fault(question: str, answer: str | None, language: str | None) -> str | None:
    """Why a row is not kept, in words that can be counted; None where it is. Without an answer only the question is judged."""
    texts = [question] if answer is None else [question, answer]
    if len(filters.words(question)) < _FEWEST:
        return "question too short"
    if answer is not None and not filters.words(answer):
        return "no answer"
    if answer is not None and filters.refuses(answer):
        return "refusal"
    if any(_repeats(text) for text in texts):
        return "repeats itself"
    row = Example(
        tuple(Message("user", text) for text in texts), "", ""
    )  # who says it does not matter here
    if damage := filters.unfit(
        row, GeneralSource(path="made", languages=(language,) if language else ())
    ):
        return damage.reason
    return None


def _repeats(text: str) -> bool:
    raw = text.encode()
    return len(raw) >= _LONG and len(zlib.compress(raw)) < _SQUEEZED * len(raw)


def batch(writer: Writer, recipe: Recipe, number: int, size: int = BATCH) -> list[Pair]:
    """Batch `number` of a recipe."""
    seed = store.seed_for(recipe.seed, f"batch {number}")
    return writer.write(
        size, seed, recipe.temperature, lambda text: fault(text, None, recipe.language) is None
    )


def made(
    writer: Writer, recipe: Recipe, folder: Path | None, count: Count
) -> tuple[tuple[Example, ...], dict[str, int]]:
    """Rows as the recipe asks, and those left out by reason; fewer where `_DRY` batches bring nothing new.

    Batches are kept in `folder` and read back. Raises StoreError where it holds another recipe's.
    """
    if folder is not None:
        _own(folder, {"version": VERSION, "rows are of": {**writer.described}, "seed": recipe.seed,
                      "temperature": recipe.temperature, "language": recipe.language})  # fmt: skip
    found: dict[str, Example] = {}
    left_out, dry, number = Counter[str](), 0, 0
    while len(found) < recipe.rows and dry < _DRY:
        before = len(found)
        for question, answer in _kept(folder, number, partial(batch, writer, recipe, number)):
            reason = fault(question, None, recipe.language) or fault(
                question, answer, recipe.language
            )
            row = Example(
                (Message("user", question), Message("assistant", answer)),
                f"made {len(found)}",
                f"made:{len(found) + 1}",
            )
            if reason is None and content_key(row) in found:
                reason = "duplicate"
            if reason is not None:
                left_out[reason] += 1
            elif len(found) < recipe.rows:
                found[content_key(row)] = row
        dry = dry + 1 if len(found) == before else 0
        number += 1
        count(len(found), recipe.rows)
    return tuple(found.values()), dict(left_out)


def _own(folder: Path, identity: Mapping[str, Any]) -> None:
    file = folder / "recipe.json"
    if file.exists() and (known := store.read_json(file)) != store.plain(identity):
        raise StoreError(
            f"{folder}: holds rows of another recipe ({known}); delete it, or name another file"
        )
    if not file.exists():
        store.write_json(file, identity)


def _kept(folder: Path | None, number: int, make: Callable[[], list[Pair]]) -> list[Pair]:
    file = None if folder is None else folder / f"{number:05}.json"
    if file is not None and file.exists():
        try:
            return [(str(question), str(answer)) for question, answer in store.read_json(file)]
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{file}: not a batch of rows, the file was changed or damaged; delete it"
            ) from error
    pairs = make()
    if file is not None:
        store.write_json(file, pairs, indent=None)
    return pairs
