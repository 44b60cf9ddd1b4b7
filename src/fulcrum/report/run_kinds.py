"""What tells one kind of run from another: how settings are chosen, what stays in the folder, how its report ends.

Each experiment hands its own `RunKind` to the stages that all runs share. Who reads a finished folder looks the kind up by the
name in ``results.json``, in a mapping that is handed down from above: this module knows the kinds whose report is about their
arms alone, and none of those that add a chapter of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulcrum.core.errors import StoreError
from fulcrum.report import summary
from fulcrum.report.summary import Record

# Dev rows apart from the rows that train; cross-validation inside the task rows; nothing is chosen.
Selection = Literal["dev", "cross-validation", "none"]
Kinds = Mapping[str, "RunKind"]  # by name


@dataclass(frozen=True)
class Chapter:
    """What only one kind of run has to show: parts of its report, as HTML."""

    opening: str  # in place of the claims about arms
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
    selection: Selection  # of settings and of the step whose weights are kept
    adapters: str | None = (
        None  # where kept adapters lie in the run folder, {arm} being the arm's name
    )
    can_shard: bool = False  # whether it trains under a launcher that shards the model (FSDP)
    has_mix_advice: bool = True  # whether warnings about a mixture's shares are notes of the run
    write_chapter: Callable[[Path, Record, Sequence[Record]], Chapter] | None = (
        None  # from results and predictions
    )
    sentences: Callable[[Path, Record], list[str]] = claim  # what was found, for a terminal
    pages: tuple[str, ...] = ()  # files that the chapter writes for a reader, next to report.html

    @property
    def has_dev_apart(self) -> bool:
        """Whether dev rows are kept out of the rows that train."""
        return self.selection == "dev"


TRAIN = RunKind("train", "Training run", "dev", adapters="adapter", can_shard=True)
COMPARE = RunKind("compare", "Comparison of arms", "cross-validation", adapters="adapters/{arm}")


def kind_of(results: Record, kinds: Kinds) -> RunKind:
    """Return the kind of a run, which its results and its manifest name. Raises StoreError if it is none of `kinds`."""
    name = results["kind"]
    if name not in kinds:
        known = ", ".join(kinds)
        raise StoreError(
            f"unknown kind of run {name!r}, this Fulcrum knows {known}; use the Fulcrum that wrote it"
        )
    return kinds[name]
