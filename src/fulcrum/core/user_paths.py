"""Paths as users write them: with `~` and environment variables."""

import os
import re
from pathlib import Path

from fulcrum.core.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(path: Path | str) -> str:
    """Return a path that a user gave, with `~` and environment variables replaced.

    Raises ConfigError if there is no such home, or if a variable is not set and no file has such a
    name.
    """
    text = str(path)
    full = os.path.expandvars(text)
    if full.startswith("~"):
        try:
            full = str(Path(full).expanduser())
        except RuntimeError:
            raise ConfigError(f"{text}: nobody here has such a home; write the path out") from None
    unset = _VARIABLE.search(full)
    if unset is not None and unset.group() in text and not os.path.lexists(full):
        raise ConfigError(
            f"{text}: the environment variable {unset[1] or unset[2]} is not set; set it, or write "
            "the path out"
        )
    return full
