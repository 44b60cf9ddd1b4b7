"""The text of an answer while its tokens come."""

from collections.abc import Callable, Sequence


class Answer:
    """The text of an answer, token by token: never half a character, nor the beginning of a stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], *, strip: bool) -> None:
        self.decode, self.stop, self.strip = decode, stop, strip
        self.ids: list[int] = []
        self._from, self._read = 0, 0  # ids before `_read` are text already; decoding begins at `_from`, as spaces need it
        self._held = ""
        self._silent = True
        self.stopped = False  # a stop text ended the answer

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        new = self._new()
        if not new.endswith("\ufffd"):  # else bytes of a character are missing
            self._held += new
            self._from, self._read = self._read, len(self.ids)
        return self._certain()

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        self._held += self._new()
        self._from = self._read = len(self.ids)
        text = self._certain()
        return text if self.stopped else text + self._stripped(self._held)

    def _new(self) -> str:
        return self.decode(self.ids[self._from :])[len(self.decode(self.ids[self._from : self._read])) :]

    def _certain(self) -> str:
        ends = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._stripped(self._held[: min(ends)]), ""
            return text
        kept = max((_overlap(self._held, text) for text in self.stop), default=0)
        sure = self._held[: len(self._held) - kept]
        sure = sure.rstrip() if self.strip else sure  # what follows may be the end
        self._held = self._held[len(sure) :]
        text = self._stripped(sure)
        self._silent = self._silent and not text
        return text

    def _stripped(self, text: str) -> str:
        """A part of the answer without the white space around the whole, once nothing follows."""
        if not self.strip:
            return text
        return text.strip() if self._silent else text.rstrip()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
