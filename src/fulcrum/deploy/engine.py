"""Answers to many at once: questions come from any thread, one thread owns the model, and every step serves all that are open.

A question waits for a slot (`slots`), is read in pieces, so that nobody's answer stands still behind a long prompt, and then
gets a token a step, beside everybody else's. What all prompts of a model begin with (the template's header, the anchor) is
computed once and copied. Answers are greedy unless a temperature is asked for: so they were trained and scored.

Invariant: an answer depends on its own question, model and seed alone, up to the rounding of sums of another batch.
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
from fulcrum.data.encode import Format
from fulcrum.deploy.kv_cache import Slots
from fulcrum.model.adapter import BASE
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.generate import Answer, end_ids
from fulcrum.model.packing import BLOCK, shared

STOPPED = "the server stopped"  # why an answer was broken off
_LOG = logging.getLogger(__name__)
_GREEDY = 1e-4  # temperatures below it are none: their quotients would overflow
_PIECE = 256  # tokens of a prompt read in one step
_READ = 1024  # tokens of all prompts, with their padding, read in one step


class BusyError(FulcrumError):
    """As many wait as may, or the engine stops."""


class TooLongError(DataError):
    """A prompt leaves no room for its answer."""


def check_room(prompt: Sequence[int], most: int, context: int | None) -> None:
    """Raise TooLongError where a prompt with an answer of so many tokens exceeds the context (None: there is no limit)."""
    if context is not None and len(prompt) + most > context:
        raise TooLongError(
            f"{len(prompt)} prompt tokens and {most} answer tokens exceed the context ({context})"
        )


@dataclass(frozen=True)
class Speaker:
    """A model that can be asked: an adapter (`adapter.BASE`: none), how conversations are written for it, and the most tokens
    of an answer where a question names no other number."""

    adapter: str
    form: Format
    longest: int

    def beginning(self) -> list[int]:
        """What its prompts of a single question begin with."""
        one, other = (
            encode.prompt_ids([Message("user", text)], self.form) for text in ("a", "Z 9")
        )
        return one[: shared(one, other)]


@dataclass(frozen=True)
class Piece:
    """Part of an answer: its text, how many tokens were added, and, with the last part, why it ended: `stop` (an end token or a
    stop text), `length`, `timeout`, `cancelled`, or `error`, whose text is then in `wrong`."""

    text: str
    tokens: int
    finish: str | None = None
    wrong: str = ""


@dataclass(eq=False)
class Question:
    """What is asked of which model. `deliver` is called from the engine's thread with each part of the answer.

    `most`: answer tokens; `top_p` keeps the likeliest tokens that hold this share (Holtzman et al. 2020, arXiv 1904.09751);
    `seconds` from now until it is given up; `strip`: without white space around the answer, as answers are scored.
    """

    model: str
    prompt: Sequence[int]
    most: int
    deliver: Callable[[Piece], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    strip: bool = True
    seconds: float = float("inf")
    begun: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its slot is free from the next step on."""
        self.cancelled = True


@dataclass(eq=False)
class _Turn:
    """A question in a slot: tokens that the model has yet to read, and the answer so far."""

    question: Question
    adapter: str
    unread: list[int]
    answer: Answer
    generator: torch.Generator | None


@dataclass
class Counts:
    """What an engine did since it began: steps, the questions that had part in them, tokens."""

    steps: int = 0
    parts: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0


class Engine:
    """Answers questions to `speakers`, up to `slots` at once, while up to `waiting` wait. A context manager, it runs inside."""

    def __init__(
        self, loaded: LoadedModel, speakers: Mapping[str, Speaker], *, slots: int = 32, waiting: int = 256,
        context: int | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        """`context`: tokens of a prompt and its answer (None: the model's own limit). Every slot has room for as many as the
        longest so far, which takes memory. `threads`: of the model (None: as many as PyTorch takes). Raises ModelError where
        the model cannot answer several at once (`slots.Slots`), or PEFT not with these adapters."""
        _check_mixing(loaded, speakers)
        self.loaded, self.speakers, self.slots, self.most_waiting = (
            loaded,
            dict(speakers),
            slots,
            waiting,
        )
        self.context = min(
            (limit for limit in (context, loaded.context) if limit is not None), default=None
        )
        self.threads, self.counts = threads, Counts()
        self._waiting: deque[Question] = deque()
        self._turns: list[_Turn] = []  # the k-th stands in slot k
        self._wake = threading.Condition()
        self._until: float | None = None  # when what still runs is broken off, once it stops
        # A prompt's last piece may be padded beyond the context, by less than a piece.
        self._cache = Slots(
            loaded, slots + len(speakers), None if self.context is None else self.context + _PIECE
        )
        self._stop_ids = {
            name: {*speaker.form.end_ids, *end_ids(loaded)} for name, speaker in speakers.items()
        }
        self._beginnings: dict[str, tuple[int, list[int]]] = {}
        for place, (name, speaker) in enumerate(self.speakers.items(), start=slots):
            self._keep(name, speaker, place)
        self._thread = threading.Thread(target=self._run, name="fulcrum-engine", daemon=True)

    def _keep(self, name: str, speaker: Speaker, slot: int) -> None:
        beginning = speaker.beginning()
        if len(beginning) >= BLOCK:  # as elsewhere: less does not pay
            self._cache.extend([slot], [beginning], [speaker.adapter])
            self._beginnings[name] = slot, beginning

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0)
        self._cache.close()

    def stop(self, grace: float) -> None:
        """Take no more questions, let open answers go on for so many seconds, then break them off. Returns once all ended."""
        with self._wake:
            self._until = time.monotonic() + grace
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    @property
    def open(self) -> tuple[int, int]:
        """How many are being answered, and how many wait."""
        return len(self._turns), len(self._waiting)

    def submit(self, question: Question) -> None:
        """Ask. Raises BusyError where too many wait or the engine stops, TooLongError where the prompt leaves no room for it,
        DataError where it is empty."""
        if not question.prompt:
            raise DataError("the prompt is empty: there is nothing to go on from")
        check_room(question.prompt, question.most, self.context)
        with self._wake:
            if self._until is not None:
                raise BusyError("the server stops; ask again in a while")
            if len(self._waiting) >= self.most_waiting + self.slots - len(
                self._turns
            ):  # free slots are taken from there too
                raise BusyError(
                    f"{len(self._waiting)} questions wait already; ask again in a while"
                )
            self._waiting.append(question)
            self._wake.notify()

    def _run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(
                self.threads
            )  # here, since OpenMP counts for each thread that begins something
        while self._next():
            try:
                self._admit()
                self._step()
            except Exception as error:  # of the model or the device, in mid-step: these answers are lost, others not
                _LOG.exception("a step failed; %d answers are lost", len(self._turns))
                for turn in self._turns:
                    _deliver(
                        turn.question, Piece("", 0, "error", f"{type(error).__name__}: {error}")
                    )
                self._turns.clear()

    def _next(self) -> bool:
        """Wait for something to do. False once all is done."""
        with self._wake:
            while not self._turns and not self._waiting and self._until is None:
                self._wake.wait()
            if self._until is not None:
                self._end(self._waiting, "error", STOPPED)
                self._waiting.clear()
                if time.monotonic() >= self._until:
                    self._end((turn.question for turn in self._turns), "error", STOPPED)
                    self._turns.clear()
                return bool(self._turns)
        return True

    def _admit(self) -> None:
        """Give free slots to those who wait, in the order in which they came; let those go who wait no more."""
        now = time.monotonic()
        with self._wake:
            for one in [
                one for one in self._waiting if one.cancelled or now > one.begun + one.seconds
            ]:
                self._waiting.remove(one)
                _deliver(one, Piece("", 0, "cancelled" if one.cancelled else "timeout"))
            coming = [
                self._waiting.popleft()
                for _ in range(min(len(self._waiting), self.slots - len(self._turns)))
            ]
        for question in coming:
            try:
                self._begin(question)
            except Exception as error:  # as in a step
                _LOG.exception("a question could not be begun")
                _deliver(question, Piece("", 0, "error", f"{type(error).__name__}: {error}"))

    def _end(self, questions: Iterable[Question], finish: str, wrong: str) -> None:
        for question in questions:
            _deliver(question, Piece("", 0, finish, wrong))

    def _begin(self, question: Question) -> None:
        speaker, slot = self.speakers[question.model], len(self._turns)
        self._cache.clear(slot)
        reused = 0
        if question.model in self._beginnings:
            source, beginning = self._beginnings[question.model]
            reused = min(
                shared(beginning, question.prompt), len(question.prompt) - 1
            )  # a token is left to go on from
            self._cache.copy(source, slot, reused)
        self.counts.prompt_tokens += len(question.prompt)
        self.counts.reused_tokens += reused
        answer = Answer(self._decode, question.stop, strip=question.strip)
        generator = None
        if question.temperature > 0:
            generator = torch.Generator(self.loaded.device)
            _ = generator.seed() if question.seed is None else generator.manual_seed(question.seed)
        self._turns.append(
            _Turn(question, speaker.adapter, list(question.prompt[reused:]), answer, generator)
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True))

    def _step(self) -> None:
        """Read more of the prompts that are not read yet, and give every other answer a token."""
        now = time.monotonic()
        for turn in list(self._turns):
            question = turn.question
            if question.cancelled or now > question.begun + question.seconds:
                self._finish(
                    turn,
                    Piece(turn.answer.end(), 0, "cancelled" if question.cancelled else "timeout"),
                )
        reading: list[_Turn] = []
        for turn in self._turns:
            longest = max((min(len(other.unread), _PIECE) for other in (*reading, turn)), default=0)
            if len(turn.unread) > 1 and (not reading or longest * (len(reading) + 1) <= _READ):
                reading.append(turn)
        for part in (
            reading,
            [turn for turn in self._turns if len(turn.unread) == 1 and turn not in reading],
        ):
            if part:
                self._advance(part)
        self.counts.steps += 1

    def _advance(self, turns: list[_Turn]) -> None:
        """Let the model read a piece of each turn, and add a token to those answers whose prompt is read."""
        places = {id(turn): slot for slot, turn in enumerate(self._turns)}
        pieces = [turn.unread[:_PIECE] for turn in turns]
        logits = self._cache.extend(
            [places[id(turn)] for turn in turns], pieces, [turn.adapter for turn in turns]
        )
        likeliest, broken = logits.argmax(dim=-1).tolist(), logits.isnan().any(dim=-1).tolist()
        self.counts.parts += len(turns)
        for turn, piece, own, token, is_broken in zip(
            turns, pieces, logits, likeliest, broken, strict=True
        ):
            turn.unread = turn.unread[len(piece) :]
            if is_broken:  # its keys would spoil whoever comes to this slot
                self._cache.erase(self._turns.index(turn))
                self._finish(
                    turn, Piece("", 0, "error", "the model's numbers are none for this question")
                )
            elif not turn.unread:
                self._say(
                    turn,
                    int(token)
                    if turn.generator is None
                    else _draw(own, turn.question, turn.generator),
                )

    def _say(self, turn: _Turn, token: int) -> None:
        question = turn.question
        self.counts.answer_tokens += 1
        if token in self._stop_ids[question.model]:
            self._finish(turn, Piece(turn.answer.end(), 1, "stop"))
            return
        text = turn.answer.add(token)
        if turn.answer.stopped or len(turn.answer.ids) >= question.most:
            text += turn.answer.end()
            self._finish(turn, Piece(text, 1, "stop" if turn.answer.stopped else "length"))
            return
        turn.unread = [token]
        _deliver(question, Piece(text, 1))

    def _finish(self, turn: _Turn, last: Piece) -> None:
        """Free a slot: the last one's conversation moves into it, so that those in use stand side by side."""
        place, end = self._turns.index(turn), len(self._turns) - 1
        if place != end:
            self._cache.copy(end, place, self._cache.lengths[end])
            self._turns[place] = self._turns[end]
        self._turns.pop()
        _deliver(turn.question, last)


def _check_mixing(loaded: LoadedModel, speakers: Mapping[str, Speaker]) -> None:
    for name, speaker in speakers.items() if loaded.peft is not None else ():
        if speaker.adapter != BASE and loaded.peft.peft_config[speaker.adapter].use_dora:
            raise ModelError(
                f"{name}: PEFT cannot mix adapters of DoRA in a batch; train without train.use_dora, or export it"
            )


def _deliver(question: Question, piece: Piece) -> None:
    """Hand a part over; who cannot take it any more has left."""
    try:
        question.deliver(piece)
    except (
        Exception
    ):  # whatever: its loop was closed, or its own code failed; others must still be served
        question.cancel()


def _draw(logits: Tensor, question: Question, generator: torch.Generator) -> int:
    """A token drawn at the question's temperature, of the likeliest ones that together hold `top_p`."""
    if question.temperature < _GREEDY:
        return int(logits.argmax())
    chances = torch.softmax((logits - logits.max()) / question.temperature, dim=-1)
    if question.top_p < 1:
        ordered, order = chances.sort(descending=True)
        ordered[1:][(ordered.cumsum(dim=0) - ordered)[1:] >= question.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(chances, 1, generator=generator))
