"""Describe what differs between kinds of run: selection, what stays in the folder, the report.

Each experiment passes its own `RunKind` to the stages that all runs share. Code that reads a
finished folder looks the kind up by the name in ``results.json``, in a mapping that its caller
passes. Only the kinds whose report is about their arms alone are defined here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulcrum.core.errors import StoreError
from fulcrum.report import summary
from fulcrum.report.summary import Record

# dev: on dev rows, apart from the rows that train; cross-validation: inside the task rows;
# none: nothing is chosen.
Selection = Literal["dev", "cross-validation", "none"]
Kinds = Mapping[str, "RunKind"]  # by name


@dataclass(frozen=True)
class Chapter:
    """What the report of one kind of run shows beyond others, as HTML."""

    opening: str  # replaces the claims about arms
    link: str = ""  # to the section, for the list of sections
    section: str = ""  # before the scores


def claim(folder: Path, results: Record) -> list[str]:
    """Return what the arms' scores show, in one sentence a task."""
    return [summary.headline(results)]


@dataclass(frozen=True)
class RunKind:
    """A kind of run, as the experiment that makes it describes it."""

    name: str  # in manifest.json and results.json
    title: str  # of its report
    selection: Selection  # of hyperparameters and of the step whose weights are kept
    # Where kept adapters are in the run folder, {arm} being the arm's name; None: none are kept.
    adapters: str | None = None
    can_shard: bool = False  # whether it trains under a launcher that shards the model (FSDP)
    has_mix_advice: bool = True  # whether warnings about a mixture's shares are notes of the run
    # Writes the chapter from the folder, its results and predictions.
    write_chapter: Callable[[Path, Record, Sequence[Record]], Chapter] | None = None
    sentences: Callable[[Path, Record], list[str]] = claim  # the result, for a terminal
    pages: tuple[str, ...] = ()  # files that the chapter writes for a reader, next to report.html

    @property
    def has_dev_apart(self) -> bool:
        """Return whether dev rows are kept out of the rows that train."""
        return self.selection == "dev"


TRAIN = RunKind("train", "Training run", "dev", adapters="adapter", can_shard=True)
COMPARE = RunKind("compare", "Comparison of arms", "cross-validation", adapters="adapters/{arm}")


def kind_of(results: Record, kinds: Kinds) -> RunKind:
    """Return the kind of a run, which its results and its manifest name.

    Raises StoreError if it is none of `kinds`.
    """
    name = results["kind"]
    if name not in kinds:
        known = ", ".join(kinds)
        raise StoreError(
            f"unknown kind of run {name!r}, this Fulcrum knows {known}; use the Fulcrum that wrote "
            "it"
        )
    return kinds[name]
