"""A model behind an OpenAI-compatible endpoint: asked, asked again where that may help, and a clear word where it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import urllib3

from fulcrum.errors import ConfigError
from fulcrum.records import Message

WORKERS = 8  # requests at once
_PATIENCE = 120  # seconds for an answer
_AGAIN = 5  # times, after 0, 2, 4, 8 ... seconds or as long as the endpoint says


@dataclass(frozen=True)
class Endpoint:
    """`url` ends in /v1; `key` is sent as a bearer token, where there is one. Safe to use from several threads."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    _pool: urllib3.PoolManager = field(
        default_factory=lambda: urllib3.PoolManager(
            maxsize=WORKERS, timeout=_PATIENCE,
            retries=urllib3.Retry(
                _AGAIN, backoff_factor=1, status_forcelist=(408, 429, 500, 502, 503, 504), allowed_methods=None,
                raise_on_status=False,
            ),
        ),
        init=False, repr=False, compare=False,
    )  # fmt: skip

    def say(self, messages: Sequence[Message], most: int, temperature: float, seed: int) -> str:
        """The answer to a conversation, of `most` tokens. Raises ConfigError where none comes."""
        body = {
            "model": self.model, "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": most, "temperature": temperature, "seed": seed,
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        told = ""
        try:
            answer = self._pool.request("POST", f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers)
            told = answer.data.decode(errors="replace")
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            said: str = answer.json()["choices"][0]["message"]["content"] or ""
            return said.strip()
        except (urllib3.exceptions.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{self.url}: no answer from {self.model!r}: {error}{f': {told[:200]}' if told else ''}; check the address (it "
                "ends in /v1), the model's name and the key"
            ) from error
