"""General data: a pool that stays on disk, and the selection of rows from it that may stand beside a task.

A `Pool` holds memory-mapped tables and converts a row when asked for it: texts stay on disk. Row numbers do not where a
`limit` draws some of them, and while `select` draws (8 bytes a row of the pool). Text files are parsed once into an Arrow cache
of (line number, row as JSON), which keeps the file's own types. `select` walks a seeded permutation of the pool, so a smaller
selection is the beginning of a larger one.

Invariants: rows looked at = kept + rejected. No kept row repeats another, shares an n-gram with task data, or holds an anchor.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.config import DataSource
from fulcrum.errors import DataError
from fulcrum.ingest import draw
from fulcrum.records import Anchor, Example, IntArray, Reject
from fulcrum.rows import content_key, normalise
from fulcrum.tables import Held, Row, Table, open_tables, text_rows

NGRAM, SHORT_NGRAM = 13, 8  # words; 13 as in GPT-3's decontamination (arXiv 2005.14165, appendix C), 8 for short tasks
WORD = re.compile(r"\w+")


class Pool:
    """Rows of several tables end to end. `len(pool)` counts them; `pool[i]` converts one to an Example or a Reject."""

    def __init__(self, tables: Sequence[Table], ids: Sequence[Sequence[int]]) -> None:
        """Join `tables`, of each of which only the rows in `ids` (ascending) are used."""
        self._tables, self._ids = tables, ids
        self._ends = list(accumulate(len(chosen) for chosen in ids))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example | Reject:
        """Convert row `index`, 0 <= index < len; IndexError beyond."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        chosen = self._ids[place]
        return self._tables[place][int(chosen[index - self._ends[place]])]  # counted from the table's end: index < end


def open_pool(sources: Sequence[DataSource], seed: int) -> Pool:
    """Open general data without reading their texts into memory; a source's `limit` draws rows by `seed`.

    The first opening of a text file writes its Arrow cache (where `datasets` keeps its own). Raises DataError for missing,
    empty or broken files, and for columns that fit no format.
    """
    tables: list[Table] = []
    ids: list[Sequence[int]] = []
    for place, source in enumerate(sources):
        opened = open_tables(source, _on_disk)
        tables += opened
        ids += draw([table.size for table in opened], source.limit, (seed, place))
    return Pool(tables, ids)


def _on_disk(path: Path) -> Held:
    """Parse a text file into an Arrow cache, once for each state (size, time of change) of the file.

    The last stored row holds all rows' column names: they are known only at the end of the file.
    """
    import datasets

    datasets.disable_progress_bars()
    state = path.stat()
    try:
        data = datasets.Dataset.from_generator(
            _numbered_json,
            features=datasets.Features({"line": datasets.Value("int64"), "row": datasets.Value("large_string")}),
            gen_kwargs={"path": str(path.absolute()), "state": f"{state.st_size} {state.st_mtime_ns}"},
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        remedy = "free some space, or set HF_DATASETS_CACHE to a folder on another disk"
        raise DataError(f"{path}: its Arrow cache cannot be written: {error.__cause__ or error}; {remedy}") from error
    size = len(data) - 1
    return set(_fetch(data, size)[1]), size, partial(_fetch, data)


def _numbered_json(path: str, state: str) -> Iterator[dict[str, Any]]:
    columns: dict[str, None] = {}
    for line, row in text_rows(Path(path)):
        columns.update(dict.fromkeys(row))
        yield {"line": line, "row": json.dumps(row)}
    yield {"line": 0, "row": json.dumps(columns)}


def _fetch(data: Any, index: int) -> Row:
    stored = data[index]
    return stored["line"], json.loads(stored["row"])


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """General rows that may be used, with their pool ids (same length), and why the others looked at were not kept.

    `exhausted` is True where the pool ended before enough rows were found.
    """

    examples: list[Example]
    ids: IntArray
    rejects: list[Reject]
    exhausted: bool


class _TaskText:
    """The n-grams of task messages: 13 words; 8 words of messages under 13; rows whose every message is under 8, whole.

    Message by message: a short question and its answer must not hide in the n-grams of the two together.
    """

    def __init__(self, rows: Iterable[Example]) -> None:
        self._known: dict[int, set[str]] = {NGRAM: set(), SHORT_NGRAM: set()}
        self._whole: set[str] = set()
        for row in rows:
            messages = _words(row)
            for words in messages:
                if len(words) >= SHORT_NGRAM:
                    n = NGRAM if len(words) >= NGRAM else SHORT_NGRAM
                    self._known[n].update(_ngrams(words, n))
            if all(len(words) < SHORT_NGRAM for words in messages):
                self._whole.add(_whole(messages))

    def shared(self, row: Example) -> Reject | None:
        """Return why a general row is too near to task data, or None."""
        messages = _words(row)
        for n, known in self._known.items():
            grams = [gram for words in messages for gram in _ngrams(words, n)] if known else []
            if not known.isdisjoint(grams):
                article = "an" if n == SHORT_NGRAM else "a"
                hit = next(gram for gram in grams if gram in known)
                return Reject(row.origin, f"shares {article} {n}-gram with task or held-out data", hit)
        if (text := _whole(messages)) in self._whole:
            return Reject(row.origin, "is a task or held-out row", text)
        return None


def _words(row: Example) -> list[list[str]]:
    """The words of each message."""
    return [WORD.findall(message.content.casefold()) for message in row.messages]


def _whole(messages: Sequence[Sequence[str]]) -> str:
    return " ".join(word for words in messages for word in words)


def _ngrams(words: Sequence[str], n: int) -> list[str]:
    """All runs of n words, as slices of the joined text: several times faster than joining each run."""
    text = " ".join(words)
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    return [text[start : end - 1] for start, end in zip(starts, starts[n:], strict=False)]


def select(
    pool: Pool,
    count: int,
    *,
    seed: int,
    fits: Callable[[Example], str | None],
    task_rows: Sequence[Example],
    held_out_rows: Sequence[Example],
    anchors: Sequence[Anchor],
) -> Selection:
    """Keep the first `count` rows of a seeded permutation of the pool that may stand beside the tasks.

    A row looked at and not kept is a Reject: not usable, ``duplicate`` of a kept one, sharing text with `task_rows` or
    `held_out_rows` (dev and test), or whatever reason `fits` returns (None: it fits). Words are runs of letters and digits,
    casefolded; texts without spaces between words are compared in whole runs. Raises DataError where a row holds an anchor's
    text: that would teach the task's behaviour on general data, so it is refused rather than skipped.
    """
    task_text = _TaskText([*task_rows, *held_out_rows])
    anchor_texts = [normalise(anchor.text) for anchor in anchors if anchor.text.strip()]
    examples: list[Example] = []
    ids: list[int] = []
    rejects: list[Reject] = []
    seen: dict[str, str] = {}
    for index in np.random.default_rng(seed).permutation(len(pool)) if count > 0 else ():
        row = pool[int(index)]
        if isinstance(row, Example):
            _refuse_anchors(row, anchor_texts)
            key = content_key(row)
            row = _reject(row, seen.get(key), task_text, fits) or row
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        seen[key] = row.origin
        examples.append(row)
        ids.append(int(index))
        if len(examples) == count:
            break
    return Selection(examples, np.array(ids, dtype=np.int64), rejects, exhausted=len(examples) < count)


def _reject(row: Example, twin: str | None, task_text: _TaskText, fits: Callable[[Example], str | None]) -> Reject | None:
    if twin is not None:
        return Reject(row.origin, "duplicate", f"same as {twin}")
    if shared := task_text.shared(row):
        return shared
    reason = fits(row)
    return None if reason is None else Reject(row.origin, reason)


def _refuse_anchors(row: Example, anchor_texts: Sequence[str]) -> None:
    text = normalise(" ".join(message.content for message in row.messages))
    for anchor in anchor_texts:
        if anchor in text:
            raise DataError(
                f"{row.origin}: this general row holds the anchor's text {anchor!r:.120}, which only task rows may carry; "
                "remove every such row from the general data, or choose another anchor"
            )
