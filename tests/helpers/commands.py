"""Run `fulcrum` commands in this process and look at what they print."""

from typer.testing import CliRunner, Result

from fulcrum.cli.main import app


def fulcrum(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def done(*words: object, stdin: str | None = None) -> str:
    """Run a command that must succeed; returns what it printed."""
    result = fulcrum(*words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    """Run a command that must fail as users' errors do: exit code 2 and one line, which is
    returned."""
    result = fulcrum(*words)
    assert result.exit_code == 2, result.output
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    assert sum(text.startswith("error: ") for text in result.stderr.splitlines()) == 1
    return line
