"""Token streams: a plan together with the tokens of its rows, and tokenised general rows on disk.

General rows are written once, memory-mapped, and shared by the cells of a comparison and by later
runs. A file is named by all that its tokens depend on (tokenizer, template, rows), so it is never
out of date. Arrow handles the format.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from fulcrum.core import store
from fulcrum.core.store import fingerprint
from fulcrum.core.types import BoolArray, Example, Share, Tokens
from fulcrum.data import encode, mix
from fulcrum.data.encode import PromptFormat, Tokenizer
from fulcrum.data.mix import Plan

SMALLEST = 512  # rows; encoding fewer again is faster than opening a file
KEPT_BYTES = 4 * 2**30  # of all files; beyond that those unused for longest are deleted
_BLOCK = 4096  # rows encoded and written at a time
_SCHEMA = pa.schema({"ids": pa.list_(pa.int32()), "loss": pa.list_(pa.bool_())})


@dataclass(frozen=True)
class Stream:
    """A plan with the tokens of the rows that it orders."""

    plan: Plan
    task: Sequence[Tokens]  # by the plan's task row ids
    general: Sequence[Tokens]  # by the plan's general row ids
    bare: Sequence[Tokens] = ()  # the task rows without their anchor
    dropout: float = 0.0  # share of the showings of task rows that lack the anchor
    cooldown: float = 0.0  # last part of the stream, whose task rows all lack it
    rows: tuple[Sequence[Example], Sequence[Example]] | None = None  # of `task` and `general`

    def step(self, index: int, batch_size: int) -> tuple[list[Tokens], BoolArray]:
        """Return the examples of one optimizer step in order, and which of them are task rows."""
        start = index * batch_size
        return self._examples(start, min(start + batch_size, len(self.plan)))

    def _examples(self, start: int, stop: int) -> tuple[list[Tokens], BoolArray]:
        is_task, ids = self.plan.slice(start, stop)
        examples = []
        for of_task, bare, row in zip(is_task, self.is_bare(start, stop), ids, strict=True):
            if not of_task:
                examples.append(self.general[row])
            elif bare:
                examples.append(self.bare[row])
            else:
                examples.append(self.task[row])
        return examples, is_task

    def origins(self, index: int, batch_size: int) -> list[str]:
        """Return where the rows of one optimizer step come from, in order."""
        start = index * batch_size
        is_task, ids = self.plan.slice(start, min(start + batch_size, len(self.plan)))
        origins = []
        for of_task, row in zip(is_task.tolist(), ids.tolist(), strict=True):
            if self.rows is None:
                origins.append(f"{'task' if of_task else 'general'} row {row}")
            else:
                task, general = self.rows
                source = task if of_task else general
                origins.append(source[row].origin)
        return origins

    def is_bare(self, start: int, stop: int) -> BoolArray:
        """Return whether a task row at each position would lack its anchor: (stop - start,)."""
        dropped = mix.chances(start, stop, self.plan.seed, "anchor") < self.dropout
        return dropped | (np.arange(start, stop) >= round(len(self.plan) * (1 - self.cooldown)))

    def steps(self, batch_size: int) -> int:
        """Return the number of optimizer steps; the last may be smaller."""
        return math.ceil(len(self.plan) / batch_size)

    def phases(self, batch_size: int) -> tuple[int, ...]:
        """Return the steps of each learning rate schedule: two if one source follows the other."""
        steps = self.steps(batch_size)
        if self.plan.order == "general_then_task":
            first = round(self.plan.general_used / batch_size)
        elif self.plan.order == "task_then_general":
            first = round(self.plan.task_positions / batch_size)
        else:
            return (steps,)
        return (first, steps - first) if 0 < first < steps else (steps,)

    def share(self, positions: int | None = None) -> Share:
        """Return the task's share of the first `positions` (None: of all)."""
        stop = len(self.plan) if positions is None else min(positions, len(self.plan))
        examples, is_task = self._examples(0, stop)
        n_tokens = np.array([len(example) for example in examples])
        n_loss = np.array([example.n_loss for example in examples])
        return mix.share(is_task, n_tokens, n_loss)


class Stored(Sequence[Tokens]):
    """The tokens of many rows, read from a memory-mapped file as they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @classmethod
    def open(cls, file: Path) -> "Stored":
        """Map a file. Raises OSError or ArrowInvalid if it is missing or damaged."""
        return cls(pa.ipc.open_file(pa.memory_map(str(file))).read_all())

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "Tokens | Stored":
        """Return a row as `encode.encode` gives it, or a range of rows, still mapped."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"rows are sliced in their order, got step {step}")
            return Stored(self._table.slice(start, max(stop - start, 0)))
        ids = self._table.column("ids")[int(index)].values
        loss = self._table.column("loss")[int(index)].values
        return Tokens(ids.to_numpy().astype(np.int64), loss.to_numpy(zero_copy_only=False))


@lru_cache(maxsize=4)  # trials and arms ask for the same rows again
def tokenised(examples: tuple[Example, ...], form: PromptFormat) -> Sequence[Tokens]:
    """Return the tokens of `examples`: few from memory, many from a file of the cache.

    A missing file is written. If the cache cannot be written (a full disk, a read-only
    folder), the rows are encoded in memory. Raises DataError as `encode.encode` does.
    """
    # A template that writes the date gives other tokens tomorrow.
    many = len(examples) >= SMALLEST and "strftime_now" not in form.template
    tokenizer = _tokenizer_hash(form.tokenizer, len(form.tokenizer)) if many else None
    if tokenizer is None:
        encode.encode_ahead(examples, form)
        return [encode.encode(example, form) for example in examples]
    file = store.cache_dir() / "tokens" / f"{_name(examples, form, tokenizer)}.arrow"
    try:
        if not _is_whole(file, len(examples)):
            _write(file, examples, form)
        stored = Stored.open(file)
    except OSError:
        return encode.encode_many(examples, form)
    with suppress(OSError):  # a folder that can only be read, or another process that prunes too
        os.utime(file)
        _prune(file.parent)
    return stored


def _name(examples: Sequence[Example], form: PromptFormat, tokenizer: str) -> str:
    """Hash all that the tokens depend on; templates write the special tokens' text."""
    special = form.tokenizer.special_tokens_map.items()
    roles = sorted((name, str(token)) for name, token in special)
    texts = [example.messages for example in examples]
    parts = [tokenizer, roles, form.template, form.anchor, form.end_ids, texts]
    return fingerprint(parts)[:32]


@lru_cache(maxsize=4)
def _tokenizer_hash(tokenizer: Tokenizer, size: int) -> str | None:
    """Return a hash over a tokenizer's vocabulary and merges; None if it does not write itself."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else fingerprint([backend.to_str(), size])


def _is_whole(file: Path, rows: int) -> bool:
    """Return whether Arrow can open the file: one that is cut off is written again."""
    try:
        return len(Stored.open(file)) == rows
    except (OSError, pa.ArrowInvalid):
        return False


def _write(file: Path, examples: Sequence[Example], form: PromptFormat) -> None:
    """Write another file in the folder and rename it, so that racing processes find it whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for start in range(0, len(examples), _BLOCK):
                rows = encode.encode_many(examples[start : start + _BLOCK], form)
                ids = pa.array([row.ids for row in rows], _SCHEMA.field("ids").type)
                loss = pa.array([row.loss_mask for row in rows], _SCHEMA.field("loss").type)
                writer.write_batch(pa.record_batch([ids, loss], _SCHEMA))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _prune(folder: Path) -> None:
    """Delete the files unused for longest, until the rest is within `KEPT_BYTES`."""
    files = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime, reverse=True)
    newest, *older = files
    total = newest.stat().st_size
    for file in older:
        total += file.stat().st_size
        if total > KEPT_BYTES:
            file.unlink(missing_ok=True)
