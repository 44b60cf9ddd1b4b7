"""What OpenAI's clients send and expect, as typed values: requests, answers, errors. Nothing here computes.

A field that would change the answer and is not supported is refused by name, never passed over. Those that change nothing are
let through, as are fields at the value that means "off".
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fulcrum.core.types import Message

_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
}  # fmt: skip
_OFF: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "modalities": (["text"],), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "reasoning_effort": ("none",), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "chat_template_kwargs": ({},),
}  # fmt: skip
MOST_CHOICES = 16
_MOST_PARTS = 2_000  # messages of a conversation, parts of a message; a list with mistakes is left at the first of them
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine that no other one reaches


class _Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message. What clients send back of an answer (`refusal: null` and the like) is let through where it is empty."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=_MOST_PARTS, fail_fast=True)]

    @model_validator(mode="after")
    def _nothing_else(self) -> "Turn":
        for name, value in (self.model_extra or {}).items():
            if value and name not in ("name", "id"):
                raise ValueError(
                    f"{name!r} is not supported in a message; send its text as content"
                )
        return self

    def message(self) -> Message:
        """As the model is asked."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        role = "system" if self.role == "developer" else self.role
        return Message(role, text)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _nothing_is_passed_over(self) -> "Asked":
        for name, value in (self.model_extra or {}).items():
            if name not in _WITHOUT_EFFECT and value is not None and not _is_off(name, value):
                raise ValueError(f"{name!r} is not supported by this server; leave it out")
        return self

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        given = [value] if isinstance(value, str) else value or []
        if len(given) > 4 or not all(given):
            raise ValueError("at most four texts, none of them empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Chat(Asked):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=_MOST_PARTS, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, value: list[Turn]) -> list[Turn]:
        if value[-1].role != "user":
            raise ValueError(f"the last message must be the user's, it is the {value[-1].role}'s")
        return value


class Completion(Asked):
    """A request to /v1/completions: one text or several to continue."""

    prompt: str | Annotated[list[str], Field(max_length=MOST_CHOICES, fail_fast=True)]

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
    """Whether a field has the value that means "off"; false is no number."""
    return any(
        value == off and isinstance(value, bool) == isinstance(off, bool)
        for off in _OFF.get(name, ())
    )


class Envelope:
    """Writes the answers to one request."""

    def __init__(self, kind: str, number: str, model: str) -> None:
        """`kind`: chat or completion; `number`: the request's own."""
        self.kind = kind
        self.head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{number}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], ends: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """All answers, in one piece."""
        said: list[dict[str, Any]] = [
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.kind == "chat"
            else {"text": text}
            for text in texts
        ]
        choices = [
            {"index": k, "logprobs": None, "finish_reason": ends[k], **one}
            for k, one in enumerate(said)
        ]
        return {**self.head, "object": self._object(""), "choices": choices, "usage": usage}

    def part(
        self, index: int, text: str, end: str | None, *, first: bool = False
    ) -> dict[str, Any]:
        """A part of one answer."""
        role = {"role": "assistant"} if first else {}
        said = (
            {"delta": {**role, **({"content": text} if text or first else {})}}
            if self.kind == "chat"
            else {"text": text}
        )
        choice = {"index": index, "logprobs": None, "finish_reason": end, **said}
        return {**self.head, "object": self._object(".chunk"), "choices": [choice]}

    def counted(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream whose client asked for its usage."""
        return {**self.head, "object": self._object(".chunk"), "choices": [], "usage": usage}

    def _object(self, chunk: str) -> str:
        return f"chat.completion{chunk}" if self.kind == "chat" else "text_completion"


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error(
    text: str,
    kind: str = "invalid_request_error",
    *,
    field: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error as clients read it."""
    return {"error": {"message": text, "type": kind, "param": field, "code": code}}
