"""Terminals of any kind: what a row holds makes no command fail."""

import io
import sys

import pytest

from fulcrum.cli import main as cli
from fulcrum.cli import terminal


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", "\\xbd \\u2192"), ("cp1252", "½ \\u2192"), ("utf-8", "½ →")]
)
def test_characters_that_a_terminal_lacks_are_numbers(
    monkeypatch: pytest.MonkeyPatch, encoding: str, written: str
) -> None:
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, streams[name])

    def speaks(**_: object) -> None:
        for stderr in (False, True):
            terminal.say(terminal.console(stderr=stderr), "½ → [link]")

    monkeypatch.setattr(cli, "app", speaks)
    cli.main()
    for stream in streams.values():
        stream.flush()
        said = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert written in said
