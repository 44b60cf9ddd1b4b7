"""A conversation in a terminal or a pipe, with one model or with several side by side. Each remembers its own answers."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fulcrum.cli.terminal import console, say, visible
from fulcrum.core.errors import DataError
from fulcrum.core.types import Message

HELP = "/anchor on|off puts the anchor in or leaves it out, /history shows what was said, /reset begins anew, /quit ends"
_NARROWEST = 30  # characters that a column of several models needs


class Told(Protocol):
    """Who hears an answer as it comes."""

    def __call__(self, text: str) -> None:
        """Hear the next part."""


class Speak(Protocol):
    """Who answers a conversation by a model's name (`speakers.Speakers.speak`)."""

    def __call__(
        self,
        name: str,
        messages: Sequence[Message],
        told: Told | None = None,
        *,
        anchored: bool = True,
    ) -> str:
        """Answer."""


class Talk:
    """Reads questions, one a line, typed or piped in, and commands that begin with a slash, until the end of input or `/quit`.

    Answers go to stdout, as they come where it is a terminal; everything else goes to `notes`. Several models answer in columns
    where the terminal is wide enough, else each below its name.
    """

    def __init__(self, notes: Console, speak: Speak, anchors: Mapping[str, str]) -> None:
        """`anchors`: what to say of each model's anchor, by the names of all that are asked."""
        self.notes, self.speak, self.anchors = notes, speak, anchors
        self.names = list(anchors)
        self.said: dict[str, tuple[Message, ...]] = dict.fromkeys(self.names, ())
        self.anchored = True
        self.out = console()

    def run(self) -> None:
        """Talk."""
        if sys.stdin.isatty():
            with suppress(ImportError):  # Windows' Python has none
                import_module("readline")  # what was typed comes back by the arrow keys
            say(self.notes, HELP, "dim")
        while True:
            try:
                line = input("› " if sys.stdin.isatty() else "").removeprefix("\ufeff").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.said = dict.fromkeys(self.names, ())
            say(self.notes, "the conversation begins anew")
        elif line == "/history":
            for name in self.names:
                for message in self.said[name]:
                    say(
                        self.notes,
                        f"{name}: {message.content}"
                        if message.role == "assistant"
                        else f"› {message.content}",
                    )
        elif line in ("/anchor on", "/anchor off"):
            self.anchored = line.endswith("on")
            say(
                self.notes,
                "anchors are put in"
                if self.anchored
                else "no anchor is put in; /anchor on puts it in again",
            )
        else:
            say(self.notes, f"{line.split()[0]}: no such command; {HELP}", "yellow")

    def _ask(self, question: str) -> None:
        asked = {name: (*self.said[name], Message("user", question)) for name in self.names}
        wide = (
            len(self.names) > 1
            and self.out.is_terminal
            and self.out.width >= _NARROWEST * len(self.names)
        )
        try:
            answers = self._in_columns(asked) if wide else self._in_turn(asked)
        except KeyboardInterrupt:
            self.out.file.write("\n")
            say(self.notes, "broken off; the question is forgotten, /quit ends", "yellow")
            return
        except DataError as error:
            say(self.notes, str(error), "yellow")
            return
        self.said = {
            name: (*asked[name], Message("assistant", answers[name])) for name in self.names
        }

    def _in_turn(self, asked: Mapping[str, Sequence[Message]]) -> dict[str, str]:
        """One below the other; a single model without its name. Text is made safe for a terminal, and left alone in a pipe."""
        answers = {}

        def told(text: str) -> None:
            self.out.file.write(visible(text))
            self.out.file.flush()

        for name in self.names:
            if len(self.names) > 1:
                self.out.print(Text(f"{name}: ", style="bold cyan"), end="")
            answers[name] = self.speak(
                name, asked[name], told if self.out.is_terminal else None, anchored=self.anchored
            )
            self.out.file.write("\n" if self.out.is_terminal else answers[name] + "\n")
            self.out.file.flush()
        return answers

    def _in_columns(self, asked: Mapping[str, Sequence[Message]]) -> dict[str, str]:
        heard = dict.fromkeys(self.names, "")

        def drawn() -> Table:
            table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
            for name in self.names:
                table.add_column(Text(name, style="bold cyan"), ratio=1, overflow="fold")
            table.add_row(*(Text(visible(text)) for text in heard.values()))
            return table

        answers = {}
        with Live(
            drawn(), console=self.out, refresh_per_second=8, vertical_overflow="visible"
        ) as live:
            for name in self.names:

                def told(text: str, name: str = name) -> None:
                    heard[name] += text
                    live.update(drawn())

                answers[name] = self.speak(name, asked[name], told, anchored=self.anchored)
        return answers
