"""Ask a model behind an OpenAI-compatible endpoint; retry what may pass, else say what is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import urllib3

from fulcrum.config.base import may_hold_secret
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Message
from fulcrum.data.formats import whole_sentences

WORKERS = 8  # requests at once
_PATIENCE = 120  # seconds for an answer
# Status of a conversation that an endpoint refuses while it answers others.
_REFUSED = (400, 413, 422)
_RETRIED = (408, 429, 500, 502, 503, 504)
_RETRIES = 5  # after 0, 2, 4, 8 ... seconds or as long as the endpoint says


def _connections() -> urllib3.PoolManager:
    retries = urllib3.Retry(
        _RETRIES,
        backoff_factor=1,
        status_forcelist=_RETRIED,
        allowed_methods=None,
        raise_on_status=False,
    )
    return urllib3.PoolManager(maxsize=WORKERS, timeout=_PATIENCE, retries=retries)


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers. Safe to use from several threads."""

    url: str  # ends in /v1
    model: str
    key: str | None = field(default=None, repr=False)  # sent as a bearer token
    _answered: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
    _pool: urllib3.PoolManager = field(
        default_factory=_connections, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if may_hold_secret(self.url):
            raise ConfigError(
                "an endpoint's address is written down, so it may hold no password; put the key "
                "into a variable"
            )

    def say(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        *,
        whole: bool = False,
    ) -> str | None:
        """Return the answer to a conversation; None if an endpoint that answers others refuses it.

        With `whole`, an answer that `max_new_tokens` cut off ends after its last whole sentence.
        Raises ConfigError if no answer comes.
        """
        body = {
            "model": self.model,
            "messages": [{"role": one.role, "content": one.content} for one in messages],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        received = ""
        try:
            response = self._pool.request(
                "POST", f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers
            )
            received = response.data.decode(errors="replace")
            if response.status in _REFUSED and self._answered:
                return None
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            choice = response.json()["choices"][0]
            answer = str(choice["message"]["content"] or "").strip()
            self._answered.append(True)
        except (urllib3.exceptions.HTTPError, ValueError, LookupError, TypeError) as error:
            detail = str(error)
            if received:
                detail += f": {self._hide_key(received)[:200]}"
            raise ConfigError(
                f"{self.url}: no answer from {self.model!r}: {detail}; check the address (it ends "
                "in /v1), the model's name and the key"
            ) from error
        is_cut = choice.get("finish_reason") == "length"
        return whole_sentences(answer) if whole and is_cut else answer

    def _hide_key(self, text: str) -> str:
        """Return the text without the key: some endpoints repeat what they were sent."""
        return text.replace(self.key, "(the key)") if self.key else text
