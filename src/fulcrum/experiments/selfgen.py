"""General data made by a model alone, for those who may not or cannot bring any.

A chat model continues its template's opening of a user's turn, and then answers (Magpie, arXiv
2406.08464). A base model, which has no turns, writes texts; the first part of each is the question,
the rest is the answer. An OpenAI-compatible endpoint replaces a model that is not on this machine.
Rows that are too short, garbled, a refusal, repetitive, in another language or duplicates are
skipped and counted.

Invariant: batch n is a pure function of (recipe, writer, n), and the rows are one of all batches up
to the last. So a killed run continues with the stored batches, to the same rows (with an endpoint
as far as it respects its seeds).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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

QUESTION_TOKENS = 48  # longest question
ANSWER_TOKENS = 64  # longest answer
VERSION = 3  # raise it if the same recipe would give other rows
BATCH = 64  # rows that are asked for at once

_DRY = 8  # batches in a row without a new row: the model repeats itself
_FEWEST = 3  # words in a question
_LONG = 200  # bytes; shorter texts are not tested for repetition
_SQUEEZED = 0.35  # of its length; a text that compresses below it repeats itself
_SUBJECTS = (
    "cooking",
    "animals",
    "travel",
    "history",
    "mathematics",
    "health",
    "sport",
    "music",
    "language",
    "work",
    "school",
    "nature",
    "money",
    "computers",
    "the home",
    "law",
    "art",
    "science",
    "the weather",
    "books",
    "cities",
    "machines",
    "families",
    "games",
)

Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class Recipe:
    """What is to be made."""

    rows: int
    seed: int = 0
    temperature: float = 1.0
    language: str | None = None  # ISO 639-1 code that rows must be in; None: any


class Writer(Protocol):
    """Who writes the rows."""

    @property
    def described(self) -> Mapping[str, str]:
        """Return what its rows depend on: name and weights."""

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """Return about `count` pairs; the answer is empty if the question is not `sound`."""


@dataclass(frozen=True)
class OfModel:
    """A loaded model, chat or base."""

    loaded: LoadedModel
    batch_tokens: int = 4096

    @property
    def described(self) -> Mapping[str, str]:
        """Name, weights, and what rounding depends on."""
        return {
            "model": self.loaded.name,
            "weights": self.loaded.fingerprint(),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "device": self.loaded.device.type,
            "batch_tokens": str(self.batch_tokens),
        }

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """Return sampled questions with greedy answers, or texts in two parts."""
        adapter.drop_adapter(self.loaded)
        form = encode.make_format(self.loaded.tokenizer, None)
        opening = encode.opening_ids(form)
        sampled = generate.Decoding(seed, temperature, whole=True)
        if not self._has_turns(opening):
            start = [self._start_ids()] * count
            texts = self._generate(start, form, QUESTION_TOKENS + ANSWER_TOKENS, sampled)
            return [split_in_two(text) for text in texts]
        texts = self._generate([opening] * count, form, QUESTION_TOKENS, sampled)
        questions = [text.strip() for text in texts]
        asked = [text for text in questions if sound(text)]
        prompts = [encode.prompt_ids((Message("user", text),), form) for text in asked]
        answers: list[str] = []
        if prompts:
            greedy = generate.Decoding(whole=True)
            answers = self._generate(prompts, form, ANSWER_TOKENS, greedy)
        remaining = iter(answers)
        return [(text, next(remaining) if sound(text) else "") for text in questions]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        form: encode.PromptFormat,
        max_new_tokens: int,
        decoding: generate.Decoding,
    ) -> list[str]:
        return generate.generate(
            self.loaded,
            prompts,
            form,
            max_new_tokens=max_new_tokens,
            batch_tokens=self.batch_tokens,
            decoding=decoding,
        )

    def _start_ids(self) -> list[int]:
        """Return the prompt from which a base model begins a text."""
        tokenizer = self.loaded.tokenizer
        if tokenizer.bos_token_id is None:
            return [tokenizer.eos_token_id]
        return [tokenizer.bos_token_id]

    def _has_turns(self, opening: Sequence[int]) -> bool:
        """Return whether its template is one of its own that opens a user's turn.

        Base models are given a plain template.
        """
        plain = {encode.plain_template(adds_bos=adds) for adds in (True, False)}
        return bool(opening) and self.loaded.tokenizer.chat_template not in plain


@dataclass(frozen=True)
class OfEndpoint:
    """A model behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint

    @property
    def described(self) -> Mapping[str, str]:
        """Address and model."""
        return {"endpoint": self.endpoint.url, "model": self.endpoint.model}

    def write(
        self, count: int, seed: int, temperature: float, sound: Callable[[str], bool]
    ) -> list[Pair]:
        """Return questions on subjects in turn, with their answers."""

        def write_pair(number: int) -> Pair:
            subject = _SUBJECTS[(seed + number) % len(_SUBJECTS)]
            wish = (
                f"Write one question or request about {subject} that somebody might put to an "
                "assistant. Write nothing else."
            )
            question = self._say(wish, QUESTION_TOKENS, temperature, seed + number)
            if not question or not sound(question):
                return question, ""
            return question, self._say(question, ANSWER_TOKENS, 0.0, seed + number)

        with ThreadPoolExecutor(WORKERS) as threads:
            return list(threads.map(write_pair, range(count)))

    def _say(self, text: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        messages = [Message("user", text)]
        return self.endpoint.say(messages, max_new_tokens, temperature, seed, whole=True) or ""


def make(
    writer: Writer, recipe: Recipe, folder: Path | None, count: Count
) -> tuple[tuple[Example, ...], dict[str, int]]:
    """Return rows as the recipe asks, and the number of skipped ones by reason.

    They are fewer than asked if `_DRY` batches in a row bring nothing new. Batches are stored in
    `folder` and read back. Raises StoreError if it holds another recipe's.
    """
    if folder is not None:
        _claim(folder, writer, recipe)
    rows: dict[str, Example] = {}  # by content
    rejects = Counter[str]()
    dry = 0
    number = 0
    while len(rows) < recipe.rows and dry < _DRY:
        before = len(rows)
        for question, answer in _load_or_write(writer, recipe, folder, number):
            messages = (Message("user", question), Message("assistant", answer))
            row = Example(messages, f"made {len(rows)}", f"made:{len(rows) + 1}")
            reason = fault(question, None, recipe.language)
            if reason is None:
                reason = fault(question, answer, recipe.language)
            if reason is None and content_key(row) in rows:
                reason = "duplicate"
            if reason is not None:
                rejects[reason] += 1
            elif len(rows) < recipe.rows:
                rows[content_key(row)] = row
        dry = dry + 1 if len(rows) == before else 0
        number += 1
        count(len(rows), recipe.rows)
    return tuple(rows.values()), dict(rejects)


def fault(question: str, answer: str | None, language: str | None) -> str | None:
    """Return why a row is skipped, in words that can be counted; None if it is kept.

    Without an answer only the question is judged.
    """
    texts = [question] if answer is None else [question, answer]
    if len(filters.words(question)) < _FEWEST:
        return "question too short"
    if answer is not None and not filters.words(answer):
        return "no answer"
    if answer is not None and filters.refuses(answer):
        return "refusal"
    if any(_repeats(text) for text in texts):
        return "repeats itself"
    messages = tuple(Message("user", text) for text in texts)  # roles do not matter here
    languages = (language,) if language else ()
    damage = filters.unfit(
        Example(messages, "", ""), GeneralSource(path="made", languages=languages)
    )
    return damage.reason if damage else None


def _repeats(text: str) -> bool:
    raw = text.encode()
    return len(raw) >= _LONG and len(zlib.compress(raw)) < _SQUEEZED * len(raw)


def _claim(folder: Path, writer: Writer, recipe: Recipe) -> None:
    """Write the recipe into its folder. Raises StoreError if another one is there."""
    identity = {
        "version": VERSION,
        "rows are of": dict(writer.described),
        "seed": recipe.seed,
        "temperature": recipe.temperature,
        "language": recipe.language,
    }
    file = folder / "recipe.json"
    if not file.exists():
        store.write_json(file, identity)
        return
    stored = store.read_json(file)
    if stored != store.plain(identity):
        raise StoreError(
            f"{folder}: holds rows of another recipe ({stored}); delete it, or name another file"
        )


def _load_or_write(writer: Writer, recipe: Recipe, folder: Path | None, number: int) -> list[Pair]:
    """Return batch `number`: as it is stored, else written and stored."""
    file = None if folder is None else folder / f"{number:05}.json"
    if file is not None and file.exists():
        try:
            return [(str(question), str(answer)) for question, answer in store.read_json(file)]
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{file}: not a batch of rows, the file was changed or damaged; delete it"
            ) from error
    pairs = _write_batch(writer, recipe, number)
    if file is not None:
        store.write_json(file, pairs, indent=None)
    return pairs


def _write_batch(writer: Writer, recipe: Recipe, number: int) -> list[Pair]:
    def is_sound(question: str) -> bool:
        return fault(question, None, recipe.language) is None

    seed = store.seed_for(recipe.seed, f"batch {number}")
    return writer.write(BATCH, seed, recipe.temperature, is_sound)
