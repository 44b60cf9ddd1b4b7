"""What OpenAI's clients send and expect, as typed values: requests, answers, errors.

A field that would change the answer and is not supported is refused by name, never ignored. Fields
that change nothing are accepted, as are fields at the value that means "off".
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fulcrum.core.types import Message

_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
}
_OFF: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "reasoning_effort": ("none",),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "chat_template_kwargs": ({},),
}
MAX_CHOICES = 16
_MAX_PARTS = 2_000  # messages of a conversation, parts of a message
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine that no other one reaches


class _Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message; what clients send back of an answer (`refusal: null`) is accepted if empty."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=_MAX_PARTS, fail_fast=True)]

    @model_validator(mode="after")
    def _refuse_other_content(self) -> "Turn":
        for name, value in (self.model_extra or {}).items():
            if value and name not in ("name", "id"):
                raise ValueError(
                    f"{name!r} is not supported in a message; send its text as content"
                )
        return self

    def message(self) -> Message:
        """Return the message as the model reads it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        return Message(role, "".join(part.text for part in self.content))


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "GenerationRequest":
        for name, value in (self.model_extra or {}).items():
            if name not in _WITHOUT_EFFECT and value is not None and not _is_off(name, value):
                raise ValueError(f"{name!r} is not supported by this server; leave it out")
        return self

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 4 or not all(texts):
            raise ValueError("at most four texts, none of them empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts at which an answer ends."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())


class ChatRequest(GenerationRequest):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=_MAX_PARTS, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _check_last(cls, value: list[Turn]) -> list[Turn]:
        if value[-1].role != "user":
            raise ValueError(f"the last message must be the user's, it is the {value[-1].role}'s")
        return value


class CompletionRequest(GenerationRequest):
    """A request to /v1/completions: one text or several to continue."""

    prompt: str | Annotated[list[str], Field(max_length=MAX_CHOICES, fail_fast=True)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _refuse_token_ids(cls, value: Any) -> Any:
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, int | list):
            raise ValueError("token ids are not supported; send the prompt as text")
        return value

    @property
    def prompts(self) -> list[str]:
        """Return the texts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


def _is_off(name: str, value: Any) -> bool:
    """Return whether a field has the value that means "off"; false is not the number 0."""
    is_bool = isinstance(value, bool)
    return any(value == off and is_bool == isinstance(off, bool) for off in _OFF.get(name, ()))


class Envelope:
    """Writes the answers to one request."""

    def __init__(self, kind: str, number: str, model: str) -> None:
        """`kind`: chat or completion; `number`: the request's own."""
        self.kind = kind
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self.head = {"id": f"{prefix}-{number}", "created": int(time.time()), "model": model}

    def whole(self, texts: list[str], ends: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """Return all answers, in one piece."""
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            content: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, "logprobs": None, "finish_reason": end, **content})
        return {**self.head, "object": self._object(""), "choices": choices, "usage": usage}

    def part(
        self, index: int, text: str, end: str | None, *, first: bool = False
    ) -> dict[str, Any]:
        """Return a part of one answer."""
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            delta = {"role": "assistant"} if first else {}
            if text or first:
                delta["content"] = text
            content = {"delta": delta}
        choice = {"index": index, "logprobs": None, "finish_reason": end, **content}
        return {**self.head, "object": self._object(".chunk"), "choices": [choice]}

    def with_usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the last part of a stream whose client asked for its usage."""
        return {**self.head, "object": self._object(".chunk"), "choices": [], "usage": usage}

    def _object(self, chunk: str) -> str:
        return f"chat.completion{chunk}" if self.kind == "chat" else "text_completion"


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return the numbers of tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error(
    text: str,
    kind: str = "invalid_request_error",
    *,
    field: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Return an error as clients read it."""
    return {"error": {"message": text, "type": kind, "param": field, "code": code}}
