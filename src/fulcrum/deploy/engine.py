"""Answer many questions at once: they come from any thread, and one thread owns the model.

A question waits for a slot (`kv_cache`) and is read in pieces, so that no answer has to wait for a
long prompt; then each step adds a token to every open answer. What all prompts of a model begin
with (the template's header, the anchor) is computed once and copied. Answers are greedy unless a
temperature is asked for, as they were in training and scoring.

Invariant: an answer depends on its own question, model and seed alone, up to the rounding of sums
in another batch.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fulcrum.core.errors import DataError, FulcrumError, ModelError
from fulcrum.core.types import Message
from fulcrum.data import encode
from fulcrum.data.encode import PromptFormat
from fulcrum.deploy.kv_cache import KVCache
from fulcrum.model.adapter import BASE
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.generate import Answer, end_ids
from fulcrum.model.packing import BLOCK, shared

STOPPED = "the server stopped"  # why an answer was broken off
_LOG = logging.getLogger(__name__)
_NAN = "the model produced NaN for this prompt"
_GREEDY = 1e-4  # lower temperatures count as 0: their quotients would overflow
_PIECE = 256  # tokens of a prompt read in one step
_READ = 1024  # tokens of all prompts, with their padding, read in one step


class BusyError(FulcrumError):
    """Too many questions wait, or the engine stops."""


class TooLongError(DataError):
    """A prompt leaves no room for its answer."""


def check_room(prompt: Sequence[int], most: int, context: int | None) -> None:
    """Raise TooLongError if a prompt and an answer of so many tokens exceed the context.

    None: there is no limit.
    """
    if context is not None and len(prompt) + most > context:
        raise TooLongError(
            f"{len(prompt)} prompt tokens and {most} answer tokens exceed the context ({context})"
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked."""

    adapter: str  # `adapter.BASE`: none
    form: PromptFormat  # how conversations are written for it
    longest: int  # tokens of an answer if a question names no other number

    def beginning(self) -> list[int]:
        """Return what its prompts of a single question begin with."""
        one = encode.prompt_ids([Message("user", "a")], self.form)
        other = encode.prompt_ids([Message("user", "Z 9")], self.form)
        return one[: shared(one, other)]


@dataclass(frozen=True)
class AnswerDelta:
    """Part of an answer."""

    text: str
    tokens: int  # that were added
    # Why the answer ended, with its last part: `stop` (an end token or a stop text), `length`,
    # `timeout`, `cancelled` or `error`.
    finish: str | None = None
    wrong: str = ""  # the text of an error


@dataclass(eq=False)
class Question:
    """What is asked of which model."""

    model: str
    prompt: Sequence[int]
    most: int  # answer tokens
    deliver: Callable[[AnswerDelta], None]  # called from the engine's thread with each part
    temperature: float = 0.0
    # Keep the likeliest tokens that hold this share (Holtzman et al. 2020, arXiv 1904.09751).
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    strip: bool = True  # white space around the answer, as answers are scored
    seconds: float = float("inf")  # from `begun` until it is given up
    begun: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        """Give the question up: its slot is free from the next step on."""
        self.cancelled = True

    def given_up(self, now: float) -> str | None:
        """Return `cancelled` or `timeout` if nobody waits for the answer any more, else None."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if now > self.begun + self.seconds else None


@dataclass(eq=False)
class _Turn:
    """A question in a slot."""

    question: Question
    adapter: str
    unread: list[int]  # tokens that the model has yet to read
    answer: Answer  # so far
    generator: torch.Generator | None  # None: greedy


@dataclass
class Counts:
    """What an engine did since it began."""

    steps: int = 0
    parts: int = 0  # questions, summed over the steps that they had part in
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of prompts, copied rather than computed
    answer_tokens: int = 0


class Engine:
    """Answers questions to `served_models`, up to `slots` at once, while up to `waiting` wait.

    Use it as a context manager: it runs inside.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        served_models: Mapping[str, ServedModel],
        *,
        slots: int = 32,
        waiting: int = 256,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Prepare the model.

        Raise ModelError if it cannot answer several at once (`kv_cache.KVCache`).

        `context`: tokens of a prompt and its answer (None: the model's own limit). Every slot has
        room for as many as the longest so far, which takes memory. `threads`: of the model (None:
        as many as PyTorch takes).
        """
        _check_mixing(loaded, served_models)
        self.loaded = loaded
        self.served_models = dict(served_models)
        self.slots = slots
        self.most_waiting = waiting
        limits = [limit for limit in (context, loaded.context) if limit is not None]
        self.context = min(limits, default=None)
        self.threads = threads
        self.counts = Counts()
        self._waiting: deque[Question] = deque()
        self._turns: list[_Turn] = []  # by slot
        self._wake = threading.Condition()
        self._until: float | None = None  # once it stops: when open answers are broken off
        # A prompt's last piece may be padded beyond the context, by less than a piece.
        most = None if self.context is None else self.context + _PIECE
        self._cache = KVCache(loaded, slots + len(served_models), most)
        self._stop_ids: dict[str, set[int]] = {}
        self._beginnings: dict[str, tuple[int, list[int]]] = {}  # slot and tokens, by model
        for slot, (name, served) in enumerate(self.served_models.items(), start=slots):
            self._stop_ids[name] = {*served.form.end_ids, *end_ids(loaded)}
            self._keep_beginning(name, served, slot)
        self._thread = threading.Thread(target=self._run, name="fulcrum-engine", daemon=True)

    def _keep_beginning(self, name: str, served: ServedModel, slot: int) -> None:
        beginning = served.beginning()
        if len(beginning) >= BLOCK:  # less does not pay
            self._cache.extend([slot], [beginning], [served.adapter])
            self._beginnings[name] = slot, beginning

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0)
        self._cache.close()

    def stop(self, grace: float) -> None:
        """Take no more questions, and break off open answers after so many seconds.

        Return once all ended.
        """
        with self._wake:
            self._until = time.monotonic() + grace
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Return whether it answers."""
        return self._thread.is_alive()

    @property
    def open(self) -> tuple[int, int]:
        """Return how many questions are being answered, and how many wait."""
        return len(self._turns), len(self._waiting)

    def submit(self, question: Question) -> None:
        """Ask.

        Raise BusyError if too many wait or the engine stops, TooLongError if the prompt leaves no
        room for the answer, DataError if it is empty.
        """
        if not question.prompt:
            raise DataError("the prompt is empty: there is nothing to go on from")
        check_room(question.prompt, question.most, self.context)
        with self._wake:
            if self._until is not None:
                raise BusyError("the server stops; ask again in a while")
            free = self.slots - len(self._turns)  # the next step fills them from those who wait
            if len(self._waiting) >= self.most_waiting + free:
                raise BusyError(
                    f"{len(self._waiting)} questions wait already; ask again in a while"
                )
            self._waiting.append(question)
            self._wake.notify()

    def _run(self) -> None:
        if self.threads is not None:
            # Set it in this thread: OpenMP counts for each thread that begins something.
            torch.set_num_threads(self.threads)
        while self._wait():
            try:
                self._admit()
                self._step()
            except Exception as error:  # of the model or the device: only these answers are lost
                _LOG.exception("a step failed; %d answers are lost", len(self._turns))
                self._break_off([turn.question for turn in self._turns], _describe(error))
                self._turns.clear()

    def _wait(self) -> bool:
        """Wait for something to do. Return False once all is done."""
        with self._wake:
            while not self._turns and not self._waiting and self._until is None:
                self._wake.wait()
            if self._until is None:
                return True
            self._break_off(self._waiting, STOPPED)
            self._waiting.clear()
            if time.monotonic() >= self._until:
                self._break_off([turn.question for turn in self._turns], STOPPED)
                self._turns.clear()
            return bool(self._turns)

    def _admit(self) -> None:
        """Drop those who wait no more, and give free slots to the others in the order they came."""
        now = time.monotonic()
        admitted: list[Question] = []
        with self._wake:
            for question in list(self._waiting):
                reason = question.given_up(now)
                if reason is not None:
                    self._waiting.remove(question)
                    _deliver(question, AnswerDelta("", 0, reason))
            free = self.slots - len(self._turns)
            while self._waiting and len(admitted) < free:
                admitted.append(self._waiting.popleft())
        for question in admitted:
            try:
                self._begin(question)
            except Exception as error:  # as in a step
                _LOG.exception("a question could not be begun")
                self._break_off([question], _describe(error))

    @staticmethod
    def _break_off(questions: Iterable[Question], wrong: str) -> None:
        for question in questions:
            _deliver(question, AnswerDelta("", 0, "error", wrong))

    def _begin(self, question: Question) -> None:
        """Put a question into the next free slot."""
        served = self.served_models[question.model]
        slot = len(self._turns)
        self._cache.clear(slot)
        reused = 0
        if question.model in self._beginnings:
            source, beginning = self._beginnings[question.model]
            # At least one token must be left to read, for its logits.
            reused = min(shared(beginning, question.prompt), len(question.prompt) - 1)
            self._cache.copy(source, slot, reused)
        self.counts.prompt_tokens += len(question.prompt)
        self.counts.reused_tokens += reused
        answer = Answer(self._decode, question.stop, strip=question.strip)
        generator = None
        if question.temperature > 0:
            generator = torch.Generator(self.loaded.device)
            if question.seed is None:
                generator.seed()
            else:
                generator.manual_seed(question.seed)
        unread = list(question.prompt[reused:])
        self._turns.append(_Turn(question, served.adapter, unread, answer, generator))

    def _decode(self, ids: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True))

    def _step(self) -> None:
        """Read more of the prompts that are not read yet, and add a token to every other answer."""
        now = time.monotonic()
        for turn in list(self._turns):
            reason = turn.question.given_up(now)
            if reason is not None:
                self._finish(turn, AnswerDelta(turn.answer.end(), 0, reason))
        reading = self._prompts_to_read()
        answering = [turn for turn in self._turns if len(turn.unread) == 1]
        if reading:
            self._advance(reading)
        if answering:
            self._advance(answering)
        self.counts.steps += 1

    def _prompts_to_read(self) -> list[_Turn]:
        """Return the turns whose next pieces, padded to the longest, fit into `_READ` tokens."""
        reading: list[_Turn] = []
        longest = 0
        for turn in self._turns:
            if len(turn.unread) <= 1:
                continue
            width = max(longest, min(len(turn.unread), _PIECE))
            if not reading or width * (len(reading) + 1) <= _READ:
                reading.append(turn)
                longest = width
        return reading

    def _advance(self, turns: list[_Turn]) -> None:
        """Read a piece of each turn, and add a token to those answers whose prompt is then read."""
        slots = [self._turns.index(turn) for turn in turns]
        pieces = [turn.unread[:_PIECE] for turn in turns]
        logits = self._cache.extend(slots, pieces, [turn.adapter for turn in turns])
        likeliest = logits.argmax(dim=-1).tolist()
        has_nan = logits.isnan().any(dim=-1).tolist()
        self.counts.parts += len(turns)
        for k, turn in enumerate(turns):
            turn.unread = turn.unread[len(pieces[k]) :]
            if has_nan[k]:  # its keys would spoil the slot for the next question
                self._cache.erase(self._turns.index(turn))
                self._finish(turn, AnswerDelta("", 0, "error", _NAN))
            elif turn.unread:
                continue
            elif turn.generator is None:
                self._add(turn, int(likeliest[k]))
            else:
                self._add(turn, _draw(logits[k], turn.question, turn.generator))

    def _add(self, turn: _Turn, token: int) -> None:
        """Add a token to an answer."""
        question = turn.question
        self.counts.answer_tokens += 1
        if token in self._stop_ids[question.model]:
            self._finish(turn, AnswerDelta(turn.answer.end(), 1, "stop"))
            return
        text = turn.answer.add(token)
        if turn.answer.stopped or len(turn.answer.ids) >= question.most:
            text += turn.answer.end()
            self._finish(turn, AnswerDelta(text, 1, "stop" if turn.answer.stopped else "length"))
            return
        turn.unread = [token]
        _deliver(question, AnswerDelta(text, 1))

    def _finish(self, turn: _Turn, last: AnswerDelta) -> None:
        """Free a slot; the last conversation moves into it, so that those in use stay adjacent."""
        slot = self._turns.index(turn)
        end = len(self._turns) - 1
        if slot != end:
            self._cache.copy(end, slot, self._cache.lengths[end])
            self._turns[slot] = self._turns[end]
        self._turns.pop()
        _deliver(turn.question, last)


def _check_mixing(loaded: LoadedModel, served_models: Mapping[str, ServedModel]) -> None:
    if loaded.peft is None:
        return
    for name, served in served_models.items():
        if served.adapter != BASE and loaded.peft.peft_config[served.adapter].use_dora:
            raise ModelError(
                f"{name}: PEFT cannot mix adapters of DoRA in a batch; "
                "train without train.use_dora, or export it"
            )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _deliver(question: Question, piece: AnswerDelta) -> None:
    """Hand a part over; if that fails, give the question up, so that others are still served."""
    try:
        question.deliver(piece)
    except Exception:  # its loop was closed, or its own code failed
        question.cancel()


def _draw(logits: Tensor, question: Question, generator: torch.Generator) -> int:
    """Draw a token at the question's temperature, of the likeliest ones that hold `top_p`."""
    if question.temperature < _GREEDY:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / question.temperature, dim=-1)
    if question.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=0) - ordered  # the share of all likelier tokens
        ordered[1:][before[1:] >= question.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
