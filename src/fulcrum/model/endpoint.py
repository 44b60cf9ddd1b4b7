"""A model behind an OpenAI-compatible endpoint: asked, asked again where that may help, and a clear word where it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import urllib3

from fulcrum.config.base import may_hold_secret
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Message
from fulcrum.data.formats import sentences

WORKERS = 8  # requests at once
_PATIENCE = 120  # seconds for an answer
_REFUSED = (
    400,
    413,
    422,
)  # what an endpoint that answers others says of a conversation that it does not take
_AGAIN = 5  # times, after 0, 2, 4, 8 ... seconds or as long as the endpoint says


@dataclass(frozen=True)
class Endpoint:
    """`url` ends in /v1; `key` is sent as a bearer token, where there is one. Safe to use from several threads."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    _answered: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
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

    def __post_init__(self) -> None:
        if may_hold_secret(self.url):
            raise ConfigError(
                "an endpoint's address is written down, so it may hold no password; put the key into a variable"
            )

    def say(
        self,
        messages: Sequence[Message],
        most: int,
        temperature: float,
        seed: int,
        *,
        whole: bool = False,
    ) -> str | None:
        """The answer to a conversation, of `most` tokens; None where an endpoint that answers others refuses this one.

        With `whole`, an answer that did not end within these ends after its last whole sentence. Raises ConfigError where
        nothing comes.
        """
        body = {
            "model": self.model, "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": most, "temperature": temperature, "seed": seed,
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        told = ""
        try:
            answer = self._pool.request(
                "POST", f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers
            )
            told = answer.data.decode(errors="replace")
            if answer.status in _REFUSED and self._answered:
                return None
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            choice = answer.json()["choices"][0]
            said = str(choice["message"]["content"] or "").strip()
            self._answered.append(True)
            return sentences(said) if whole and choice.get("finish_reason") == "length" else said
        except (urllib3.exceptions.HTTPError, ValueError, LookupError, TypeError) as error:
            told = (
                told.replace(self.key, "(the key)") if self.key else told
            )  # some say what they were given
            raise ConfigError(
                f"{self.url}: no answer from {self.model!r}: {error}{f': {told[:200]}' if told else ''}; check the address (it "
                "ends in /v1), the model's name and the key"
            ) from error
