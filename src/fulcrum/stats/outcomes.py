"""Per-row outcomes of a comparison, whoever trained: what a certificate is computed from, as JSON lines (or gzip of them).

A *cell* is one arm at one size (number of task rows) and one seed. There is one line for each test row of a cell, and for each
metric; further lines may say of a cell by what score it was selected (`dev`) and how many task tokens its rows have:

    {"arm": "sft", "size": 64, "seed": 0, "row": "t17", "metric": "exact_match", "outcome": 1, "group": "doc3"}
    {"arm": "sft", "size": 64, "seed": 0, "metric": "nll", "row": "t17", "outcome": 5.2, "weight": 7, "group": "doc3"}
    {"arm": "sft", "size": 64, "seed": 0, "dev": 0.71, "tokens": 5321}

A cell's score is the sum of outcomes over the sum of weights (1 where none is given): a mean, or for summed nats with the
number of answer tokens as weight nats per token. (An outcome is not multiplied by its weight.) Rows with equal `group` are
resampled together; without one a row is a group of its own.

Invariant: every cell of a metric has the same rows with the same groups and weights, each once; what does not is refused. Only
seeds may differ, where each has test rows of its own (outer cross-validation): then all cells of a seed have the same rows.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulcrum.core import store
from fulcrum.core.errors import DataError, nearest
from fulcrum.core.types import FloatArray

_KEYS = ("arm", "size", "seed", "row", "metric", "outcome", "group", "weight", "dev", "tokens")
FILE = "outcomes.jsonl"  # next to a certificate, or with the suffix `.gz`
_GZIP = ".gz"
METRIC = "score"  # the name of a metric that has none

Cell = tuple[str, int, int]  # arm, size, seed


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """`values[metric][cell]` are outcomes in the order of `rows[metric]`, nan where a row was no test row at that seed;
    `groups` and `weights` likewise by metric.

    `dev` and `tokens` hold what is known of cells: dev scores (higher is better) and task tokens.
    """

    rows: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, FloatArray]
    values: Mapping[str, Mapping[Cell, FloatArray]]
    dev: Mapping[Cell, float]
    tokens: Mapping[Cell, float]

    def points(self, metric: str) -> list[tuple[str, int]]:
        """The arms and sizes that were measured, sorted: the order of a file's lines must not matter."""
        return sorted({(arm, size) for arm, size, _ in self.values[metric]})

    def seeds(self, metric: str, arm: str, size: int) -> list[int]:
        """The seeds at which a point was measured, ascending."""
        return sorted(seed for a, s, seed in self.values[metric] if (a, s) == (arm, size))

    def matrix(self, metric: str, arm: str, size: int) -> FloatArray:
        """Outcomes of a point: (seeds, rows)."""
        return np.array(
            [self.values[metric][arm, size, seed] for seed in self.seeds(metric, arm, size)]
        )


def read(path: Path) -> Outcomes:
    """Read a file of outcomes, ``.jsonl`` or ``.jsonl.gz``.

    Raises DataError with file:line for what is broken, twice there or missing.
    """
    found = _Collected()
    opened = gzip.open if path.suffix == _GZIP else open
    try:
        with opened(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    found.add(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return found.finish(str(path))


def collect(given: Iterable[Mapping[str, Any]], name: str) -> Outcomes:
    """Outcomes from lines with the right keys, such as a file holds. Raises DataError, beginning with `name`."""
    found = _Collected()
    for line in given:
        found.add(line, name)
    return found.finish(name)


def write(path: Path, outcomes: Outcomes) -> None:
    """Write outcomes as `read` reads them, in a canonical order; equal ones as equal bytes.

    Raises StoreError if the disk refuses.
    """
    data = "".join(f"{json.dumps(line)}\n" for line in lines(outcomes)).encode()
    store.write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == _GZIP else data)


def file_in(folder: Path) -> Path:
    """Return the file of outcomes in a folder, compressed or not."""
    packed = folder / f"{FILE}{_GZIP}"
    return packed if packed.exists() else folder / FILE


def lines(outcomes: Outcomes) -> Iterable[dict[str, Any]]:
    """The lines of a file, in a canonical order."""
    for metric, cells in outcomes.values.items():
        for cell in sorted(cells):
            named = dict(zip(("arm", "size", "seed"), cell, strict=True))
            for k in np.flatnonzero(~np.isnan(cells[cell])):
                row = outcomes.rows[metric][k]
                line = {**named, "metric": metric, "row": row, "outcome": float(cells[cell][k])}
                yield line | {
                    "group": outcomes.groups[metric][k],
                    "weight": float(outcomes.weights[metric][k]),
                }
    for cell in sorted({*outcomes.dev, *outcomes.tokens}):
        line = dict(zip(("arm", "size", "seed"), cell, strict=True))
        for name, known in (("dev", outcomes.dev), ("tokens", outcomes.tokens)):
            if cell in known:
                line[name] = known[cell]
        yield line


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        line = store.strict_json(text)
    except ValueError as error:
        raise DataError(f"{where}: broken JSON: {error}; write one object a line") from None
    if not isinstance(line, dict):
        raise DataError(f"{where}: expected an object, found {text.strip():.60}")
    for key in line:
        if key not in _KEYS:
            raise DataError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
    for key, kind in (("arm", str), ("size", int), ("seed", int)):
        if not isinstance(line.get(key), kind) or isinstance(line.get(key), bool):
            raise DataError(
                f"{where}: {key} must be {'a name' if kind is str else 'a whole number'}, got {line.get(key)!r:.60}"
            )
    if line["size"] < 0:
        raise DataError(f"{where}: size is a number of task rows, got {line['size']}")
    for key in ("row", "metric", "group"):
        if line.get(key) is None:  # as pandas writes what is missing
            line.pop(key, None)
        elif not isinstance(line[key], str):
            raise DataError(
                f"{where}: {key} must be a text, got {line[key]!r:.60}; write it in quotes"
            )
    if "row" not in line and ("outcome" in line or "weight" in line):
        raise DataError(f"{where}: an outcome without a row; name the test row")
    if "row" not in line and not {"dev", "tokens"} & line.keys():
        raise DataError(f"{where}: a line has a row and its outcome, or dev or tokens of its cell")
    return line


def _number(line: Mapping[str, Any], key: str, where: str) -> float:
    value = line.get(key, 1.0 if key == "weight" else None)
    known = (
        isinstance(value, int | float)
        and not (isinstance(value, bool) and key != "outcome")
        and abs(value) < 1e300
    )
    if not known or not math.isfinite(value) or (key in ("weight", "tokens") and value <= 0):
        wanted = "a number above 0" if key in ("weight", "tokens") else "a finite number"
        raise DataError(f"{where}: {key} must be {wanted}, got {value!r:.60}")
    return float(value)


class _Collected:
    """Lines as they come; `finish` checks that all cells fit together."""

    def __init__(self) -> None:
        self.places: dict[str, dict[str, int]] = {}  # metric -> row -> place
        self.about: dict[str, list[tuple[str, float]]] = {}  # metric -> group and weight by place
        self.cells: dict[str, dict[Cell, dict[int, float]]] = {}
        self.known: dict[str, dict[Cell, float]] = {"dev": {}, "tokens": {}}

    def add(self, line: Mapping[str, Any], where: str) -> None:
        """Take one parsed line."""
        cell = (line["arm"], line["size"], line["seed"])
        for name, known in self.known.items():
            if name in line:
                value = _number(line, name, where)
                if known.setdefault(cell, value) != value:
                    raise DataError(
                        f"{where}: {name} of {_said(cell)} is {value:g}, an earlier line said {known[cell]:g}"
                    )
        if "row" not in line:
            return
        metric, row = line.get("metric", METRIC), line["row"]
        places = self.places.setdefault(metric, {})
        about = (line.get("group", row), _number(line, "weight", where))
        place = places.setdefault(row, len(places))
        if place == len(self.about.setdefault(metric, [])):
            self.about[metric].append(about)
        elif self.about[metric][place] != about:
            raise DataError(
                f"{where}: row {row!r} has group and weight {about}, an earlier line said {self.about[metric][place]}"
            )
        values = self.cells.setdefault(metric, {}).setdefault(cell, {})
        if place in values:
            raise DataError(
                f"{where}: row {row!r} of {_said(cell)} is there twice ({metric}); a row counts once"
            )
        values[place] = _number(line, "outcome", where)

    def finish(self, name: str) -> Outcomes:
        """Check that every cell has every row of its seed."""
        if not self.cells:
            raise DataError(
                f"{name}: holds no outcomes; write a line for each test row of each cell (`fulcrum certify --help`)"
            )
        for metric, cells in self.cells.items():
            rows = list(self.places[metric])
            by_seed: dict[int, set[int]] = {}
            # An untrained arm with one cell stands for all seeds.
            once = {
                c for c in cells if c[1] == 0 and sum(other[:2] == c[:2] for other in cells) == 1
            }
            for cell, values in cells.items():
                if cell not in once:
                    by_seed.setdefault(cell[2], set()).update(values)
            for cell, values in cells.items():
                wanted = set(range(len(rows))) if cell in once else by_seed[cell[2]]
                if missing := sorted(wanted - values.keys()):
                    raise DataError(
                        f"{name}: {_said(cell)} lacks {len(missing)} of {len(wanted)} rows ({metric}), the first is "
                        f"{rows[missing[0]]!r}; every cell of a seed is scored on the same rows"
                    )
        return Outcomes(
            {metric: tuple(places) for metric, places in self.places.items()},
            {metric: tuple(group for group, _ in about) for metric, about in self.about.items()},
            {metric: np.array([weight for _, weight in about]) for metric, about in self.about.items()},
            {
                metric: {
                    cell: np.array([values.get(k, np.nan) for k in range(len(self.places[metric]))])
                    for cell, values in cells.items()
                }
                for metric, cells in self.cells.items()
            },
            self.known["dev"], self.known["tokens"],
        )  # fmt: skip


def _said(cell: Cell) -> str:
    return f"{cell[0]} at {cell[1]} rows, seed {cell[2]}"
