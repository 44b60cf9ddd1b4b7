"""The text of an answer while its tokens come."""

from collections.abc import Callable, Sequence


class Answer:
    """The text of an answer, token by token: never half a character, nor the beginning of a stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], *, strip: bool) -> None:
        self.decode, self.stop, self.strip = decode, stop, strip
        self.ids: list[int] = []
        self._from, self._read = 0, 0  # ids before `_read` are text already; decoding begins at `_from`, as spaces need it
        self._held = ""
        self._silent, self._stopped = True, False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop text ended the answer."""
        self.ids.append(token)
        new = self._new()
        if not new.endswith("\ufffd"):  # else bytes of a character are missing
            self._held += new
            self._from, self._read = self._read, len(self.ids)
        return self._certain(), self._stopped

    def end(self) -> str:
        """What was held back."""
        self._held += self._new()
        self._from = self._read = len(self.ids)
        text = self._certain() if not self._stopped else ""
        if not self._stopped:
            text += self._held.rstrip() if self.strip else self._held
        return text

    def _new(self) -> str:
        return self.decode(self.ids[self._from :])[len(self.decode(self.ids[self._from : self._read])) :]

    def _certain(self) -> str:
        if self.strip and self._silent:
            self._held = self._held.lstrip()
        ends = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if ends:
            self._stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text.rstrip() if self.strip else text
        kept = max((_overlap(self._held, text) for text in self.stop), default=0)
        sure = self._held[: len(self._held) - kept]
        sure = sure.rstrip() if self.strip else sure
        self._held = self._held[len(sure) :]
        self._silent = self._silent and not sure
        return sure


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
