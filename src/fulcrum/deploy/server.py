"""An OpenAI-compatible server for the adapters of some runs.

It adds the anchor itself: clients send the question. Every request is checked before the model sees
any of it (key, host, size, fields). What cannot be done is answered by a 4xx that says why. A
client that leaves frees its slots. `engine` computes the answers; for heavy traffic there is vLLM.
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
from fulcrum.deploy.engine import (
    STOPPED,
    AnswerDelta,
    BusyError,
    Engine,
    Question,
    ServedModel,
    TooLongError,
)
from fulcrum.deploy.openai_api import (
    LOOPBACK,
    ChatRequest,
    CompletionRequest,
    Envelope,
    GenerationRequest,
)

T = TypeVar("T")

_BODY_SECONDS = 30.0  # within which each part of a body must come
_FINAL_SECONDS = 5  # for telling clients whose answers were broken off when the server ends
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds, of the histograms
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health")
_HEADERS = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}  # by status


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 1_000_000  # bytes
    tokens: int = 1_024  # of an answer
    seconds: float = 120.0  # until the answer ends


def application(
    engine: Engine, *, limits: Limits, key: str | None = None, hosts: Sequence[str] = LOOPBACK
) -> ASGIApp:
    """Return the server's application around a running engine.

    `hosts`: names that a request's Host may have (none: any). `key`: what every request but /health
    must bring.
    """
    # The pages of `docs_url` and `redoc_url` would load scripts from the internet.
    app = FastAPI(title="Fulcrum", docs_url=None, redoc_url=None)
    metrics = Metrics(engine)
    handler = _Handler(engine, limits, metrics)
    _add_answers(app, handler)
    _add_state(app, handler)
    _add_errors(app)
    return Gate(app, hosts=hosts, key=key, limit=limits.body, metrics=metrics)


def run(app: ASGIApp, engine: Engine, listening: socket, grace: int) -> None:
    """Serve on a socket until SIGINT or SIGTERM; open answers then have `grace` seconds more.

    The engine runs inside.
    """
    # uvicorn's own logging setup would close the handlers of others in this process.
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=grace + _FINAL_SECONDS,
        lifespan="off",
    )
    with engine:
        _Server(settings, engine, grace).run(sockets=[listening])


class RequestError(HTTPException):
    """A request that is answered by an error.

    A kind of Starlette's HTTPException, which FastAPI lets through from everywhere.
    """

    def __init__(
        self,
        status: int,
        text: str,
        kind: str = "invalid_request_error",
        *,
        field: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(status, text)
        self.body = openai_api.error(text, kind, field=field, code=code)

    def response(self) -> JSONResponse:
        """Return the error as its client reads it."""
        return JSONResponse(self.body, self.status_code, _HEADERS.get(self.status_code, {}))


class Metrics:
    """What Prometheus asks for: requests by how they ended, times, and what the engine counts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fulcrum_requests", "Requests by status.", ["path", "status"], registry=self.registry
        )
        self.first = Histogram(
            "fulcrum_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "fulcrum_answer_seconds",
            "Seconds from a request to its last token.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine counts, as Prometheus' collectors do."""
        running, waiting = self.engine.open
        counts = self.engine.counts
        yield GaugeMetricFamily("fulcrum_running", "Answers under way.", running)
        yield GaugeMetricFamily("fulcrum_waiting", "Questions that wait for a slot.", waiting)
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
    """Lets requests in: to the allowed hosts, with the key, not too large.

    Pure ASGI, so that a client that leaves is still noticed.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], key: str | None, limit: int, metrics: Metrics
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.key = key
        self.limit = limit  # bytes of a body
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as ASGI's applications do."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        headers = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1")] = value.decode("latin-1")
        try:
            self._admit(headers, scope["path"])
        except RequestError as error:
            await error.response()(scope, receive, counting_send)
            return
        await self.app(scope, _LimitedReceive(receive, self.limit), counting_send)

    def _admit(self, headers: dict[str, str], path: str) -> None:
        host = _hostname(headers.get("host", ""))
        # Refuse a page under another name that resolves to this machine (DNS rebinding).
        if self.hosts and host not in self.hosts:
            names = " or ".join(self.hosts)
            raise RequestError(421, f"host {host!r} is not served here; use {names}")
        if path != "/health" and not self._has_key(headers.get("authorization", "")):
            text = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise RequestError(401, text, "authentication_error", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limit:
            text = f"the body has {int(length):,} bytes, {self.limit:,} are allowed"
            raise RequestError(413, text, code="too_large")

    def _has_key(self, authorization: str) -> bool:
        if self.key is None:
            return True
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key.encode())


class _LimitedReceive:
    """ASGI's `receive` of one request; refuses a body that is too large or comes too slowly."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive = receive
        self.limit = limit  # bytes
        self.read = 0
        self.is_complete = False

    async def __call__(self) -> Message:
        seconds = None if self.is_complete else _BODY_SECONDS
        try:
            message = await asyncio.wait_for(self.receive(), seconds)
        except TimeoutError:
            text = f"the body did not come within {_BODY_SECONDS:g} seconds"
            raise RequestError(408, text) from None
        self.is_complete = self.is_complete or not message.get("more_body", False)
        self.read += len(message.get("body", b""))
        if self.read > self.limit:
            raise RequestError(413, f"the body is over {self.limit:,} bytes", code="too_large")
        return message


def _hostname(host: str) -> str:
    """Return the name in a Host header, without its port; "" if there is none."""
    with suppress(ValueError):
        return urlsplit(f"//{host}").hostname or ""
    return ""


class _AnswerQueue:
    """The parts of all answers to one request, from the engine's thread to the server's loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[int, AnswerDelta]] = asyncio.Queue()  # answer number, part
        self.loop = asyncio.get_running_loop()

    def writer(self, index: int) -> Callable[[AnswerDelta], None]:
        """Return the function that takes the parts of one answer."""

        def deliver(piece: AnswerDelta) -> None:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, piece))

        return deliver


@dataclass(frozen=True)
class _Exchange:
    """A request whose questions are with the engine."""

    envelope: Envelope
    answers: _AnswerQueue
    questions: Sequence[Question]
    prompt_tokens: int  # of each prompt once, however many answers
    reports_usage: bool  # in a stream

    def cancel(self) -> None:
        """Give up what is not answered yet."""
        for question in self.questions:
            question.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events. However the stream ends, nothing more is computed for it."""

    def __init__(self, events: AsyncIterator[str], exchange: _Exchange) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.cancel()


class _Handler:
    """Turns requests into questions, and the engine's answers into responses."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        # Encoding switches a tokenizer's handling of special tokens, so one request at a time.
        self.lock = threading.Lock()

    def served(self, name: str) -> ServedModel:
        """Return a model by its name."""
        served_models = self.engine.served_models
        if name not in served_models:
            text = f"no model {name!r} here{nearest(name, served_models)}"
            raise RequestError(404, text, field="model", code="model_not_found")
        return served_models[name]

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        served = self.served(body.model)
        messages = [turn.message() for turn in body.messages]
        prompt = await self._tokenize(lambda: encode.prompt_ids(messages, served.form))
        limit = body.max_completion_tokens or body.max_tokens
        limit = limit or self._default_limit(served.longest, [prompt])
        return await self._answer("chat", body, [prompt], limit, request)

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text as it is, markers of the template included: its writer rendered it."""
        self.served(body.model)
        number = len(body.prompts) * (body.n or 1)
        if not 0 < number <= openai_api.MAX_CHOICES:
            raise RequestError(
                400, f"{number} answers were asked for, 1 to {openai_api.MAX_CHOICES} are allowed"
            )
        tokenizer = self.engine.loaded.tokenizer
        prompts = await self._tokenize(lambda: [_raw_ids(tokenizer, t) for t in body.prompts])
        limit = body.max_tokens or self._default_limit(16, prompts)
        return await self._answer("completion", body, prompts, limit, request)

    def _default_limit(self, usual: int, prompts: list[list[int]]) -> int:
        """Return the most answer tokens of a request that names no number.

        It is `usual`, or less if a limit or the context leaves less.
        """
        room = usual
        if self.engine.context is not None:
            room = self.engine.context - max(map(len, prompts))
        return max(1, min(usual, self.limits.tokens, room))

    async def _tokenize(self, tokenize: Callable[[], T]) -> T:
        def locked() -> T:
            with self.lock:
                return tokenize()

        try:
            return await asyncio.to_thread(locked)
        except DataError as error:
            raise RequestError(400, str(error)) from error

    async def _answer(
        self,
        kind: str,
        body: GenerationRequest,
        prompts: list[list[int]],
        limit: int,
        request: Request,
    ) -> Response:
        if limit > self.limits.tokens:
            text = f"{limit} answer tokens were asked for, {self.limits.tokens} are allowed"
            raise RequestError(400, text, field="max_tokens")
        answers = _AnswerQueue()
        exchange = _Exchange(
            envelope=Envelope(kind, secrets.token_hex(12), body.model),
            answers=answers,
            questions=self._questions(kind, body, prompts, limit, answers),
            prompt_tokens=sum(map(len, prompts)),
            reports_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        self._submit(exchange)
        if body.stream:
            return _EventStream(self._events(exchange), exchange)
        return await self._whole(exchange, request)

    def _questions(
        self,
        kind: str,
        body: GenerationRequest,
        prompts: list[list[int]],
        limit: int,
        answers: _AnswerQueue,
    ) -> list[Question]:
        questions: list[Question] = []
        for prompt in prompts:
            for _ in range(body.n or 1):
                index = len(questions)
                question = Question(
                    body.model,
                    prompt,
                    limit,
                    answers.writer(index),
                    temperature=body.temperature or 0.0,
                    top_p=body.top_p or 1.0,
                    seed=None if body.seed is None else (body.seed + index) % 2**63,
                    stop=body.stops,
                    strip=kind == "chat",
                    seconds=self.limits.seconds,
                )
                questions.append(question)
        return questions

    def _submit(self, exchange: _Exchange) -> None:
        """Ask all questions, or, if one is refused, none."""
        try:
            for question in exchange.questions:
                self.engine.submit(question)
        except BusyError as error:
            exchange.cancel()
            raise RequestError(429, str(error), "rate_limit_error") from error
        except DataError as error:
            exchange.cancel()
            code = "context_length_exceeded" if isinstance(error, TooLongError) else None
            raise RequestError(400, str(error), code=code) from error

    async def _pieces(self, exchange: _Exchange) -> AsyncIterator[tuple[int, AnswerDelta]]:
        """Yield the parts as they come, until all answers ended.

        Raise RequestError if one was broken off.
        """
        begun = exchange.questions[0].begun
        open_answers = len(exchange.questions)
        is_silent = True
        while open_answers:
            index, piece = await exchange.answers.queue.get()
            if is_silent and piece.tokens:
                self.metrics.first.observe(time.monotonic() - begun)
                is_silent = False
            if piece.finish == "timeout":
                text = f"not answered within {self.limits.seconds:g} seconds"
                raise RequestError(504, text, "timeout")
            if piece.finish in ("error", "cancelled"):
                status = 503 if piece.wrong == STOPPED else 500
                raise RequestError(status, piece.wrong or "broken off", "server_error")
            if piece.finish is not None:
                open_answers -= 1
            yield index, piece
        self.metrics.whole.observe(time.monotonic() - begun)

    async def _whole(self, exchange: _Exchange, request: Request) -> Response:
        """Return all answers at once, or stop when the client leaves."""
        texts = [""] * len(exchange.questions)
        ends = [""] * len(exchange.questions)
        tokens = 0

        async def gather() -> None:
            nonlocal tokens
            async for index, piece in self._pieces(exchange):
                texts[index] += piece.text
                ends[index] = piece.finish or ""
                tokens += piece.tokens

        async def disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        gathering = asyncio.ensure_future(gather())
        leaving = asyncio.ensure_future(disconnect())
        try:
            await asyncio.wait((gathering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                return Response(status_code=499)  # nobody reads it
            gathering.result()
        finally:
            for task in (gathering, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            exchange.cancel()
        usage = openai_api.usage(exchange.prompt_tokens, tokens)
        return JSONResponse(exchange.envelope.whole(texts, ends, usage))

    async def _events(self, exchange: _Exchange) -> AsyncIterator[str]:
        """Yield the answers as server-sent events."""
        envelope = exchange.envelope
        if envelope.kind == "chat":
            for index in range(len(exchange.questions)):
                yield _event(envelope.part(index, "", None, first=True))
        tokens = 0
        try:
            async for index, piece in self._pieces(exchange):
                tokens += piece.tokens
                if piece.text or piece.finish:
                    yield _event(envelope.part(index, piece.text, piece.finish))
        except RequestError as error:
            yield _event(error.body)
            return
        if exchange.reports_usage:
            yield _event(envelope.with_usage(openai_api.usage(exchange.prompt_tokens, tokens)))
        yield "data: [DONE]\n\n"


def _raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text with its markers, begun once as the tokenizer begins texts."""
    with encode.unicode_only():
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
    start = tokenizer.bos_token_id
    if start is not None and ids[:2] == [start, start]:
        return ids[1:]
    return ids


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _add_answers(app: FastAPI, handler: _Handler) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        return await handler.chat(body, request)

    @app.post("/v1/completions")
    async def complete(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        return await handler.completion(body, request)


def _add_state(app: FastAPI, handler: _Handler) -> None:
    engine = handler.engine
    began = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "fulcrum"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in engine.served_models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        handler.served(name)
        return describe(name)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        if engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine stopped"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content = generate_latest(handler.metrics.registry)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # For a value of several possible types pydantic names each: not a name the client sent.
        parts = []
        for part in first["loc"][1:]:
            if isinstance(part, int) or (part.isidentifier() and part != "str"):
                parts.append(str(part))
        place = ".".join(parts)
        text = str(first["msg"]).removeprefix("Value error, ")
        if not place:
            return JSONResponse(openai_api.error(text), 400)
        return JSONResponse(openai_api.error(f"{place}: {text}", field=place), 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        body = openai_api.error(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(body, error.status_code, error.headers)


class _Server(uvicorn.Server):
    """uvicorn, which tells the engine at once when it is asked to end.

    It then tells the clients whose answers cannot be finished in time.
    """

    def __init__(self, settings: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(settings)
        self.engine = engine
        self.grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal as uvicorn does, and stop the engine."""
        if not self.should_exit:
            threading.Thread(target=self.engine.stop, args=(self.grace,), daemon=True).start()
        super().handle_exit(sig, frame)
