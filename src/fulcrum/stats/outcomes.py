"""Outcomes by row of a comparison, whoever trained: what a certificate is computed from.

They are stored as JSON lines (or gzip of them). A *cell* is one arm at one size (number of task
rows) and one seed. There is one line for each test row of a cell and each metric. Further lines may
say of a cell by what score it was selected (`dev`) and how many task tokens its rows have:

    {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "metric": "exact_match", "outcome": 1,
     "group": "doc3"}
    {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "metric": "nll", "outcome": 5.2,
     "weight": 7, "group": "doc3"}
    {"arm": "sft", "size": 64, "seed": 0, "dev": 0.71, "tokens": 5321}

A cell's score is the sum of its outcomes over the sum of weights (1 if none is given): a mean, or,
for summed losses with the number of answer tokens as weight, a loss per token. (An outcome is not
multiplied by its weight.) Rows with equal `group` are resampled together; without one a row is a
group of its own.

Invariant: every cell of a metric has the same rows with the same groups and weights, each once;
anything else is refused. Only seeds may differ, if each has its own test rows (outer
cross-validation): then all cells of a seed have the same rows.
"""

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import FloatArray

FILE = "outcomes.jsonl"  # next to a certificate, or with the suffix `.gz`
METRIC = "score"  # the name of a metric that has none

_GZIP = ".gz"
_KEYS = ("arm", "size", "seed", "row", "metric", "outcome", "group", "weight", "dev", "tokens")
_ABOVE_ZERO = ("weight", "tokens")
_LARGEST = 1e300  # absolute value of a number

Cell = tuple[str, int, int]  # arm, size, seed


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Outcomes by metric, cell and row; the fields but the last two are by metric.

    rows: names of the test rows
    groups: content group of each row
    weights: (rows,)
    values: cell -> outcomes (rows,), nan if a row was no test row at that seed
    dev: cell -> dev score, higher is better, if it is known
    tokens: cell -> task tokens of its rows, if they are known
    """

    rows: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, FloatArray]
    values: Mapping[str, Mapping[Cell, FloatArray]]
    dev: Mapping[Cell, float]
    tokens: Mapping[Cell, float]

    def points(self, metric: str) -> list[tuple[str, int]]:
        """Return the arms and sizes that were measured, sorted.

        The order of a file's lines must not matter.
        """
        return sorted({(arm, size) for arm, size, _ in self.values[metric]})

    def seeds(self, metric: str, arm: str, size: int) -> list[int]:
        """Return the seeds at which a point was measured, ascending."""
        return sorted(cell[2] for cell in self.values[metric] if cell[:2] == (arm, size))

    def matrix(self, metric: str, arm: str, size: int) -> FloatArray:
        """Return the outcomes of a point: (seeds, rows)."""
        cells = self.values[metric]
        return np.array([cells[arm, size, seed] for seed in self.seeds(metric, arm, size)])


def read(path: Path) -> Outcomes:
    """Read a file of outcomes, ``.jsonl`` or ``.jsonl.gz``.

    Raises DataError with file:line for what is broken, given twice or missing.
    """
    collector = _Collector()
    open_text = gzip.open if path.suffix == _GZIP else open
    try:
        with open_text(path, "rt", encoding="utf-8") as stream:
            for number, text in enumerate(stream, 1):
                if text.strip():
                    place = f"{path}:{number}"
                    collector.add(_parse(text, place), place)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return collector.finish(str(path))


def collect(given: Iterable[Mapping[str, Any]], name: str) -> Outcomes:
    """Return outcomes from lines with the right keys, such as a file holds.

    Raises DataError with a message that begins with `name`.
    """
    collector = _Collector()
    for line in given:
        collector.add(line, name)
    return collector.finish(name)


def write(path: Path, outcomes: Outcomes) -> None:
    """Write outcomes as `read` reads them, in a canonical order: equal ones as equal bytes.

    Raises StoreError if the disk refuses.
    """
    texts = [f"{json.dumps(line)}\n" for line in lines(outcomes)]
    data = "".join(texts).encode()
    if path.suffix == _GZIP:
        data = gzip.compress(data, mtime=0)
    store.write_bytes(path, data)


def file_in(folder: Path) -> Path:
    """Return the file of outcomes in a folder, compressed or not."""
    packed = folder / f"{FILE}{_GZIP}"
    return packed if packed.exists() else folder / FILE


def lines(outcomes: Outcomes) -> Iterable[dict[str, Any]]:
    """Yield the lines of a file, in a canonical order."""
    for metric, cells in outcomes.values.items():
        for cell in sorted(cells):
            values = cells[cell]
            for k in np.flatnonzero(~np.isnan(values)):
                yield _cell_keys(cell) | {
                    "metric": metric,
                    "row": outcomes.rows[metric][k],
                    "outcome": float(values[k]),
                    "group": outcomes.groups[metric][k],
                    "weight": float(outcomes.weights[metric][k]),
                }
    for cell in sorted({*outcomes.dev, *outcomes.tokens}):
        line = _cell_keys(cell)
        if cell in outcomes.dev:
            line["dev"] = outcomes.dev[cell]
        if cell in outcomes.tokens:
            line["tokens"] = outcomes.tokens[cell]
        yield line


def _cell_keys(cell: Cell) -> dict[str, Any]:
    arm, size, seed = cell
    return {"arm": arm, "size": size, "seed": seed}


def _parse(text: str, place: str) -> dict[str, Any]:
    """Parse a line. Raises DataError if its keys, names or whole numbers are wrong."""
    try:
        line = store.strict_json(text)
    except ValueError as error:
        raise DataError(f"{place}: broken JSON: {error}; write one object a line") from None
    if not isinstance(line, dict):
        raise DataError(f"{place}: expected an object, found {text.strip():.60}")
    for key in line:
        if key not in _KEYS:
            raise DataError(f"{place}: unknown key {key!r}{nearest(key, _KEYS)}")
    for key, kind, wanted in (
        ("arm", str, "a name"),
        ("size", int, "a whole number"),
        ("seed", int, "a whole number"),
    ):
        value = line.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{place}: {key} must be {wanted}, got {value!r:.60}")
    if line["size"] < 0:
        raise DataError(f"{place}: size is a number of task rows, got {line['size']}")
    for key in ("row", "metric", "group"):
        if line.get(key) is None:  # as pandas writes what is missing
            line.pop(key, None)
        elif not isinstance(line[key], str):
            raise DataError(
                f"{place}: {key} must be a text, got {line[key]!r:.60}; write it in quotes"
            )
    if "row" not in line and ("outcome" in line or "weight" in line):
        raise DataError(f"{place}: an outcome without a row; name the test row")
    if "row" not in line and not {"dev", "tokens"} & line.keys():
        raise DataError(f"{place}: a line has a row and its outcome, or dev or tokens of its cell")
    return line


def _number(line: Mapping[str, Any], key: str, place: str) -> float:
    value = line.get(key, 1.0 if key == "weight" else None)
    if not _is_number(value, key):
        wanted = "a number above 0" if key in _ABOVE_ZERO else "a finite number"
        raise DataError(f"{place}: {key} must be {wanted}, got {value!r:.60}")
    return float(value)


def _is_number(value: Any, key: str) -> bool:
    if not isinstance(value, int | float):
        return False
    if isinstance(value, bool) and key != "outcome":
        return False
    if not abs(value) < _LARGEST:  # before isfinite, which refuses huge whole numbers
        return False
    return math.isfinite(value) and (value > 0 or key not in _ABOVE_ZERO)


class _Collector:
    """Lines as they come; `finish` checks that all cells fit together."""

    def __init__(self) -> None:
        self.places: dict[str, dict[str, int]] = {}  # metric -> row -> place
        self.about: dict[str, list[tuple[str, float]]] = {}  # metric -> group and weight by place
        self.cells: dict[str, dict[Cell, dict[int, float]]] = {}  # metric -> cell -> place -> value
        self.dev: dict[Cell, float] = {}
        self.tokens: dict[Cell, float] = {}

    def add(self, line: Mapping[str, Any], where: str) -> None:
        """Take one parsed line."""
        cell = (line["arm"], line["size"], line["seed"])
        for key, known in (("dev", self.dev), ("tokens", self.tokens)):
            if key not in line:
                continue
            value = _number(line, key, where)
            before = known.setdefault(cell, value)
            if before != value:
                raise DataError(
                    f"{where}: {key} of {_name(cell)} is {value:g}, an earlier line said {before:g}"
                )
        if "row" not in line:
            return
        metric = line.get("metric", METRIC)
        row = line["row"]
        place = self._place(metric, row, line, where)
        values = self.cells.setdefault(metric, {}).setdefault(cell, {})
        if place in values:
            raise DataError(
                f"{where}: row {row!r} of {_name(cell)} is there twice ({metric}); "
                "a row counts once"
            )
        values[place] = _number(line, "outcome", where)

    def finish(self, name: str) -> Outcomes:
        """Check that every cell has every row of its seed, and return the outcomes."""
        if not self.cells:
            raise DataError(
                f"{name}: holds no outcomes; write a line for each test row of each cell "
                "(`fulcrum certify --help`)"
            )
        rows = {}
        groups = {}
        weights = {}
        values: dict[str, dict[Cell, FloatArray]] = {}
        for metric, cells in self.cells.items():
            self._check_rows(metric, name)
            rows[metric] = tuple(self.places[metric])
            groups[metric] = tuple(group for group, _ in self.about[metric])
            weights[metric] = np.array([weight for _, weight in self.about[metric]])
            values[metric] = {}
            for cell, by_place in cells.items():
                outcomes = np.full(len(rows[metric]), np.nan)
                outcomes[list(by_place)] = list(by_place.values())
                values[metric][cell] = outcomes
        return Outcomes(rows, groups, weights, values, self.dev, self.tokens)

    def _place(self, metric: str, row: str, line: Mapping[str, Any], where: str) -> int:
        """Return the place of a row, a new one if it is new; its group and weight must not vary."""
        places = self.places.setdefault(metric, {})
        all_about = self.about.setdefault(metric, [])
        about = (line.get("group", row), _number(line, "weight", where))
        place = places.setdefault(row, len(places))
        if place == len(all_about):
            all_about.append(about)
        elif all_about[place] != about:
            raise DataError(
                f"{where}: row {row!r} has group and weight {about}, "
                f"an earlier line said {all_about[place]}"
            )
        return place

    def _check_rows(self, metric: str, name: str) -> None:
        rows = list(self.places[metric])
        cells = self.cells[metric]
        n_cells = Counter(cell[:2] for cell in cells)
        by_seed: dict[int, set[int]] = {}
        once = set()  # an untrained arm with one cell, which counts for all seeds
        for cell, values in cells.items():
            if cell[1] == 0 and n_cells[cell[:2]] == 1:
                once.add(cell)
            else:
                by_seed.setdefault(cell[2], set()).update(values)
        for cell, values in cells.items():
            wanted = set(range(len(rows))) if cell in once else by_seed[cell[2]]
            missing = sorted(wanted - values.keys())
            if missing:
                raise DataError(
                    f"{name}: {_name(cell)} lacks {len(missing)} of {len(wanted)} rows ({metric}), "
                    f"the first is {rows[missing[0]]!r}; every cell of a seed is scored on the "
                    "same rows"
                )


def _name(cell: Cell) -> str:
    return f"{cell[0]} at {cell[1]} rows, seed {cell[2]}"
