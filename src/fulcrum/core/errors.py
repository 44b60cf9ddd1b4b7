"""Every error that a user can cause: one base and few kinds.

A message says what is wrong, the values, where, and the nearest remedy. `FulcrumError` reaches the
terminal as one line with exit code 2. Anything else is a fault of ours: one line that says so with
exit code 1, and its traceback with `--debug`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FulcrumError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(FulcrumError):
    """A setting is unknown, of the wrong type or contradicts another."""


class DivergedError(ConfigError):
    """A training's loss or gradient is NaN: the learning rate is too high, or a row is broken."""


class DataError(FulcrumError):
    """A data file or a row cannot be used as it is."""


class UnreachableError(DataError):
    """The hub does not answer; what was read of it before may be used instead."""


class ModelError(FulcrumError):
    """A model cannot be found, downloaded, trusted or loaded."""


class StoreError(FulcrumError):
    """A run folder or a checkpoint cannot be written, read or resumed."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message: ``; did you mean 'x' or 'y'?``, or all choices."""
    names = sorted(set(choices))
    close = get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known: " + ", ".join(names)
