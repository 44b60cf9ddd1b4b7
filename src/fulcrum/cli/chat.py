"""A conversation in a terminal or a pipe, with one model or several next to each other.

Each remembers its own answers.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fulcrum.cli.terminal import console, say, visible
from fulcrum.core.errors import DataError
from fulcrum.core.types import Message

HELP = (
    "/anchor on|off puts the anchor in or leaves it out, /history shows what was said, "
    "/reset begins anew, /quit ends"
)
_NARROWEST = 30  # characters that a column of several models needs


class Speak(Protocol):
    """A function that answers a conversation by a model's name (`models.Speakers.speak`)."""

    def __call__(
        self,
        name: str,
        messages: Sequence[Message],
        on_text: Callable[[str], None] | None = None,
        *,
        anchored: bool = True,
    ) -> str:
        """Answer; `on_text` is called with each part of the answer as it comes."""


class Talk:
    """Reads questions and commands until the end of input or `/quit`.

    A question is a line, typed or piped in; commands begin with a slash. Answers go to stdout, as
    they come if it is a terminal; everything else goes to `notes`. Several models answer in columns
    if the terminal is wide enough, else each below its name.
    """

    def __init__(self, notes: Console, speak: Speak, anchors: Mapping[str, str]) -> None:
        """`anchors`: each model's anchor in words, by the names of all that are asked."""
        self.notes = notes
        self.speak = speak
        self.anchors = anchors
        self.names = list(anchors)
        self.history: dict[str, tuple[Message, ...]] = dict.fromkeys(self.names, ())
        self.anchored = True
        self.out = console()

    def run(self) -> None:
        """Read lines and answer them."""
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
            self.history = dict.fromkeys(self.names, ())
            say(self.notes, "the conversation begins anew")
        elif line == "/history":
            for name in self.names:
                for message in self.history[name]:
                    prefix = f"{name}:" if message.role == "assistant" else "›"
                    say(self.notes, f"{prefix} {message.content}")
        elif line in ("/anchor on", "/anchor off"):
            self.anchored = line.endswith("on")
            if self.anchored:
                say(self.notes, "anchors are put in")
            else:
                say(self.notes, "no anchor is put in; /anchor on puts it in again")
        else:
            say(self.notes, f"{line.split()[0]}: no such command; {HELP}", "yellow")

    def _ask(self, question: str) -> None:
        conversations = {}
        for name in self.names:
            conversations[name] = (*self.history[name], Message("user", question))
        several = len(self.names) > 1
        is_wide = self.out.is_terminal and self.out.width >= _NARROWEST * len(self.names)
        try:
            answers = (
                self._in_columns(conversations)
                if several and is_wide
                else self._in_turn(conversations)
            )
        except KeyboardInterrupt:
            self.out.file.write("\n")
            say(self.notes, "broken off; the question is forgotten, /quit ends", "yellow")
            return
        except DataError as error:
            say(self.notes, str(error), "yellow")
            return
        for name in self.names:
            self.history[name] = (*conversations[name], Message("assistant", answers[name]))

    def _in_turn(self, conversations: Mapping[str, Sequence[Message]]) -> dict[str, str]:
        """Print one answer below the other; a single model's without its name.

        Text is made safe for a terminal, and left alone in a pipe.
        """
        answers = {}

        def show(text: str) -> None:
            self.out.file.write(visible(text))
            self.out.file.flush()

        on_text = show if self.out.is_terminal else None
        for name in self.names:
            if len(self.names) > 1:
                self.out.print(Text(f"{name}: ", style="bold cyan"), end="")
            answers[name] = self.speak(name, conversations[name], on_text, anchored=self.anchored)
            self.out.file.write("\n" if self.out.is_terminal else answers[name] + "\n")
            self.out.file.flush()
        return answers

    def _in_columns(self, conversations: Mapping[str, Sequence[Message]]) -> dict[str, str]:
        texts = dict.fromkeys(self.names, "")  # so far

        def draw() -> Table:
            table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
            for name in self.names:
                table.add_column(Text(name, style="bold cyan"), ratio=1, overflow="fold")
            table.add_row(*(Text(visible(text)) for text in texts.values()))
            return table

        answers = {}
        with Live(
            draw(), console=self.out, refresh_per_second=8, vertical_overflow="visible"
        ) as live:

            def show(name: str, text: str) -> None:
                texts[name] += text
                live.update(draw())

            for name in self.names:
                on_text = partial(show, name)
                answers[name] = self.speak(
                    name, conversations[name], on_text, anchored=self.anchored
                )
        return answers
