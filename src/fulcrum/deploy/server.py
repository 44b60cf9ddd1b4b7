"""An OpenAI-compatible server for the adapters of some runs. The anchor is put in by the server: clients send the question.

Every request is looked at before the model sees any of it (key, host, size, fields), and what cannot be done is answered by a
4xx that says why. A client that leaves frees its slots. The work is `engine`'s; for heavy traffic there is vLLM.
"""

import asyncio
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from socket import socket
from types import FrameType
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fulcrum.core.errors import DataError, nearest
from fulcrum.data import encode
from fulcrum.deploy import openai_api
from fulcrum.deploy.engine import STOPPED, BusyError, Engine, Piece, Question, Speaker, TooLongError
from fulcrum.deploy.openai_api import LOOPBACK, Asked, Chat, Completion, Envelope

Made = TypeVar("Made")

_BODY_SECONDS = 30.0  # within which each part of a body must come
_LAST_SECONDS = 5  # in which those are told whose answers were broken off at the end
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # bounds of the histograms


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: bytes of its body, tokens of an answer, seconds until it ends."""

    body: int = 1_000_000
    tokens: int = 1_024
    seconds: float = 120.0


class Refused(HTTPException):
    """A request that is answered by an error. A kind of Starlette's, which FastAPI lets through from everywhere."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status, body["error"]["message"])
        self.body = body


class Metrics:
    """What Prometheus asks for: requests by how they ended, times, and what the engine counts."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self.requests = Counter(
            "fulcrum_requests", "Requests by status.", ["path", "status"], registry=self.registry
        )
        first, whole = (
            "Seconds from a request to its first token.",
            "Seconds from a request to its last token.",
        )
        self.first = Histogram(
            "fulcrum_first_token_seconds", first, buckets=_SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "fulcrum_answer_seconds", whole, buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """As Prometheus' collectors do."""
        running, waiting = self.engine.open
        yield GaugeMetricFamily("fulcrum_running", "Answers under way.", running)
        yield GaugeMetricFamily("fulcrum_waiting", "Questions that wait for a slot.", waiting)
        counts = self.engine.counts
        yield CounterMetricFamily("fulcrum_steps", "Forward steps.", counts.steps)
        yield CounterMetricFamily(
            "fulcrum_prompt_tokens", "Prompt tokens, reused ones among them.", counts.prompt_tokens
        )
        yield CounterMetricFamily(
            "fulcrum_reused_tokens",
            "Prompt tokens whose keys were there already.",
            counts.reused_tokens,
        )
        yield CounterMetricFamily("fulcrum_answer_tokens", "Answer tokens.", counts.answer_tokens)


class Gate:
    """Lets requests in: of the hosts that may be named, with the key, not too large. Pure ASGI, so that a client that leaves is
    still noticed."""

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], key: str | None, limit: int, metrics: Metrics
    ) -> None:
        self.app, self.hosts, self.key, self.limit, self.metrics = app, hosts, key, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI's."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = scope["path"] in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/models",
            "/metrics",
            "/health",
        )
        read, is_read = 0, False

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(
                    scope["path"] if known else "other", str(message["status"])
                ).inc()
            await send(message)

        async def limited() -> Message:
            nonlocal read, is_read
            try:
                message = await asyncio.wait_for(receive(), None if is_read else _BODY_SECONDS)
            except TimeoutError:
                raise Refused(
                    408, openai_api.error(f"the body did not come within {_BODY_SECONDS:g} seconds")
                ) from None
            is_read = is_read or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.limit:
                raise Refused(
                    413,
                    openai_api.error(f"the body is over {self.limit:,} bytes", code="too_large"),
                )
            return message

        try:
            self._admit(
                {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]},
                scope["path"],
            )
        except Refused as refused:
            await _refusal(refused)(scope, receive, counted)
            return
        await self.app(scope, limited, counted)

    def _admit(self, headers: dict[str, str], path: str) -> None:
        host = _hostname(headers.get("host", ""))
        if (
            self.hosts and host not in self.hosts
        ):  # a page of another name that resolves to this machine (DNS rebinding)
            raise Refused(
                421,
                openai_api.error(
                    f"host {host!r} is not served here; use {' or '.join(self.hosts)}"
                ),
            )
        scheme, _, given = headers.get("authorization", "").partition(" ")
        isnt_let_in = scheme.lower() != "bearer" or not hmac.compare_digest(
            given.encode(), (self.key or "").encode()
        )
        if self.key is not None and path != "/health" and isnt_let_in:
            text = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise Refused(
                401, openai_api.error(text, "authentication_error", code="invalid_api_key")
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limit:
            text = f"the body has {int(length):,} bytes, {self.limit:,} are allowed"
            raise Refused(413, openai_api.error(text, code="too_large"))


def _hostname(host: str) -> str:
    """The name in a Host header, without its port; '' where it is none."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


def _refusal(refused: Refused) -> JSONResponse:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(
        refused.status_code, {}
    )
    return JSONResponse(refused.body, refused.status_code, headers)


class _Heard:
    """The parts of all answers to one request, brought from the engine's thread into the server's loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def to(self, index: int) -> Callable[[Piece], None]:
        """Who takes the parts of one answer."""

        def deliver(piece: Piece) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

        return deliver


class _Stream(StreamingResponse):
    """Server-sent events. However it ends, nothing is computed for it any more."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI's."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


class _Desk:
    """Turns requests into questions, and what the engine says into answers."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.lock = (
            threading.Lock()
        )  # tokenizers are told by a switch of theirs to leave special tokens alone

    def speaker(self, name: str) -> Speaker:
        """A model by its name."""
        known = self.engine.speakers
        if name not in known:
            text = f"no model {name!r} here{nearest(name, known)}"
            raise Refused(404, openai_api.error(text, field="model", code="model_not_found"))
        return known[name]

    async def chat(self, asked: Chat, request: Request) -> Response:
        """Answer a conversation."""
        speaker = self.speaker(asked.model)
        messages = [turn.message() for turn in asked.messages]
        prompt = await self._tokens(lambda: encode.prompt_ids(messages, speaker.form))
        most = asked.max_completion_tokens or asked.max_tokens
        return await self._answer(
            "chat", asked, [prompt], most or self._usual(speaker.longest, [prompt]), request
        )

    async def completion(self, asked: Completion, request: Request) -> Response:
        """Continue a text as it is, markers of the template included: its writer rendered it."""
        self.speaker(asked.model)
        tokenizer = self.engine.loaded.tokenizer
        number = len(asked.prompts) * (asked.n or 1)
        if not 0 < number <= openai_api.MOST_CHOICES:
            text = f"{number} answers were asked for, 1 to {openai_api.MOST_CHOICES} are allowed"
            raise Refused(400, openai_api.error(text))
        prompts = await self._tokens(lambda: [_raw(tokenizer, text) for text in asked.prompts])
        limit = asked.max_tokens or self._usual(16, prompts)
        return await self._answer("completion", asked, prompts, limit, request)

    def _usual(self, most: int, prompts: list[list[int]]) -> int:
        """The answer tokens of a request that names no number: fewer than usual where a limit or the context leaves fewer."""
        room = most if self.engine.context is None else self.engine.context - max(map(len, prompts))
        return max(1, min(most, self.limits.tokens, room))

    async def _tokens(self, make: Callable[[], Made]) -> Made:
        def locked() -> Made:
            with self.lock:
                return make()

        try:
            return await asyncio.to_thread(locked)
        except DataError as error:
            raise Refused(400, openai_api.error(str(error))) from error

    async def _answer(
        self, kind: str, asked: Asked, prompts: list[list[int]], most: int, request: Request
    ) -> Response:
        if most > self.limits.tokens:
            text = f"{most} answer tokens were asked for, {self.limits.tokens} are allowed"
            raise Refused(400, openai_api.error(text, field="max_tokens"))
        heard, questions = _Heard(), list[Question]()
        options: dict[str, Any] = {
            "temperature": asked.temperature or 0.0,
            "top_p": asked.top_p or 1.0,
            "stop": asked.stops,
        }
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.n or 1)):
            seed = None if asked.seed is None else (asked.seed + index) % 2**63
            more = {
                **options,
                "seed": seed,
                "strip": kind == "chat",
                "seconds": self.limits.seconds,
            }
            questions.append(Question(asked.model, prompt, most, heard.to(index), **more))
        try:
            for question in questions:
                self.engine.submit(question)
        except BusyError as error:
            self._leave(questions)
            raise Refused(429, openai_api.error(str(error), "rate_limit_error")) from error
        except DataError as error:
            self._leave(questions)
            code = "context_length_exceeded" if isinstance(error, TooLongError) else None
            raise Refused(400, openai_api.error(str(error), code=code)) from error
        read = sum(map(len, prompts))  # once, however many answers
        envelope = Envelope(kind, secrets.token_hex(12), asked.model)
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        if asked.stream:
            events = self._events(envelope, heard, questions, read if counted else None)
            return _Stream(events, lambda: self._leave(questions))
        return await self._whole(envelope, heard, questions, read, request)

    @staticmethod
    def _leave(questions: Sequence[Question]) -> None:
        for question in questions:
            question.cancel()

    async def _parts(
        self, heard: _Heard, questions: Sequence[Question]
    ) -> AsyncIterator[tuple[int, Piece]]:
        """The parts as they come, until all answers ended. Raises Refused where one was broken off."""
        left, begun = len(questions), questions[0].begun
        silent = True
        while left:
            index, piece = await heard.queue.get()
            if silent and piece.tokens:
                self.metrics.first.observe(time.monotonic() - begun)
                silent = False
            if piece.finish == "timeout":
                raise Refused(
                    504,
                    openai_api.error(
                        f"not answered within {self.limits.seconds:g} seconds", "timeout"
                    ),
                )
            if piece.finish in ("error", "cancelled"):
                status = 503 if piece.wrong == STOPPED else 500
                raise Refused(status, openai_api.error(piece.wrong or "broken off", "server_error"))
            left -= piece.finish is not None
            yield index, piece
        self.metrics.whole.observe(time.monotonic() - begun)

    async def _whole(
        self,
        envelope: Envelope,
        heard: _Heard,
        questions: Sequence[Question],
        read: int,
        request: Request,
    ) -> Response:
        texts, ends, tokens = [""] * len(questions), [""] * len(questions), 0

        async def gather() -> None:
            nonlocal tokens
            async for index, piece in self._parts(heard, questions):
                texts[index] += piece.text
                ends[index] = piece.finish or ""
                tokens += piece.tokens

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answered, left = asyncio.ensure_future(gather()), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((answered, left), return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                return Response(status_code=499)  # nobody reads it
            answered.result()
        finally:
            for task in (answered, left):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            self._leave(questions)
        return JSONResponse(envelope.whole(texts, ends, openai_api.usage(read, tokens)))

    async def _events(
        self, envelope: Envelope, heard: _Heard, questions: Sequence[Question], read: int | None
    ) -> AsyncIterator[str]:
        """Server-sent events; `read`: prompt tokens, where the client asked to be told."""
        for index in range(len(questions)) if envelope.kind == "chat" else ():
            yield _event(envelope.part(index, "", None, first=True))
        tokens = 0
        try:
            async for index, piece in self._parts(heard, questions):
                tokens += piece.tokens
                if piece.text or piece.finish:
                    yield _event(envelope.part(index, piece.text, piece.finish))
        except Refused as refused:
            yield _event(refused.body)
            return
        if read is not None:
            yield _event(envelope.counted(openai_api.usage(read, tokens)))
        yield "data: [DONE]\n\n"


def _raw(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with its markers, begun as the tokenizer begins texts, once."""
    with encode.unicode_only():
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def application(
    engine: Engine, *, limits: Limits, key: str | None = None, hosts: Sequence[str] = LOOPBACK
) -> ASGIApp:
    """The server's application around a running engine. `hosts`: names that a request's Host may have (none: any); `key`: what
    every request but /health must bring."""
    app = FastAPI(
        title="Fulcrum", docs_url=None, redoc_url=None
    )  # their pages would come from the internet
    metrics = Metrics(engine)
    desk = _Desk(engine, limits, metrics)
    began = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Annotated[Chat, Body()]) -> Response:
        return await desk.chat(asked, request)

    @app.post("/v1/completions")
    async def complete(request: Request, asked: Annotated[Completion, Body()]) -> Response:
        return await desk.completion(asked, request)

    def shown(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "fulcrum"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [shown(name) for name in engine.speakers]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        desk.speaker(name)
        return shown(name)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok" if engine.alive else "the engine stopped"}, 200 if engine.alive else 503
        )

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(
            generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Of a value of several possible types pydantic names each type: no name that the client sent.
        parts = []
        for part in first["loc"][1:]:
            if isinstance(part, int) or (part.isidentifier() and part != "str"):
                parts.append(str(part))
        place = ".".join(parts)
        text = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse(
            openai_api.error(f"{place}: {text}" if place else text, field=place or None), 400
        )

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        body = openai_api.error(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(body, error.status_code, error.headers)

    return Gate(app, hosts=hosts, key=key, limit=limits.body, metrics=metrics)


class _Server(uvicorn.Server):
    """uvicorn, which tells the engine at once that it was asked to end, so that what cannot be answered in time is told so."""

    def __init__(self, settings: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(settings)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, of a signal."""
        if not self.should_exit:
            threading.Thread(target=self.engine.stop, args=(self.grace,), daemon=True).start()
        super().handle_exit(sig, frame)


def run(app: ASGIApp, engine: Engine, listening: socket, grace: int) -> None:
    """Answer on a socket until SIGINT or SIGTERM, and then `grace` seconds more what is under way. The engine runs inside."""
    # uvicorn's own logging setup would close the handlers of others in this process.
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=grace + _LAST_SECONDS,
        lifespan="off",
    )
    with engine:
        _Server(settings, engine, grace).run(sockets=[listening])
