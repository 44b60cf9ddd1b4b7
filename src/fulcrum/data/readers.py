"""Files, folders, globs and hub data sets -> `Table`s: raw rows with their places, converted when asked for.

A source opens as one table for each file or hub data set. A row's origin is ``file:line`` (text), ``file:row`` (lists and
tables) or ``hub id:row``, counted from 1. Text is parsed here, so that an error has its line; .parquet, .arrow and hub data
sets are memory-mapped by `datasets`.

Invariant: a file that is missing, empty or broken as a file is refused with its place and a remedy; it is never read in part.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from fulcrum.config.base import DataSource
from fulcrum.core.errors import DataError, UnreachableError, nearest
from fulcrum.core.types import Example, Reject
from fulcrum.data.formats import Layout, convert, find_layout

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
BUILTIN = {"builtin": "builtin_pool.jsonl.gz", "builtin_eval": "builtin_eval.jsonl.gz"}
SAVED_META = (
    "dataset_info.json",
    "state.json",
    "dataset_dict.json",
)  # beside the rows in what `datasets` saves to disk

# Rows in a batch of the Arrow cache. Opening touches some pages of each batch: 240 MiB for 10^7 rows in batches of 1,000.
_BATCH_ROWS = 10_000

_LONGEST_FIELD = 2**30  # characters of a CSV field; Python's own limit is 131,072

Row = tuple[int, Mapping[str, Any]]  # line or row number from 1, columns


@dataclass(frozen=True)
class Table:
    """The rows of one file or hub data set. `fetch(i)` gives raw row i; `table[i]` gives its Example or Reject."""

    name: str
    size: int
    fetch: Callable[[int], Row] = field(repr=False)
    layout: Layout

    def __getitem__(self, index: int) -> Example | Reject:
        """Convert row `index`, 0 <= index < size."""
        line, row = self.fetch(index)
        return convert(row, self.layout, f"{self.name}:{line}")


def open_tables(
    source: DataSource, *, group: str | None = None, answered: bool = True
) -> list[Table]:
    """Open a source's files (sorted by name) or hub data set; text files are read into memory. Rows are `answered`, or inputs.

    Raises DataError for what is missing, empty, broken, or has columns that fit no format.
    """
    found = files(source.path)
    if found is None:
        return [
            _arrow_table(
                source.path,
                hub(source.path, source.name, source.split, source.revision),
                source,
                group,
                answered,
            )
        ]
    if source.name or source.revision or source.split != "train":
        raise DataError(
            f"{source.path}: name, split and revision belong to hub data sets, this is a file; use `limit:`"
        )
    tables = []
    for name, path in found:
        if suffix(path) in TEXT_SUFFIXES:
            rows = list(text_rows(path))
            require_some(name, len(rows))
            shapes = {frozenset(row): line for line, row in reversed(rows)}
            tables.append(
                Table(
                    name,
                    len(rows),
                    rows.__getitem__,
                    fitting_layout(name, shapes, source, group, answered),
                )
            )
        else:
            tables.append(_arrow_table(name, _arrow(path), source, group, answered))
    return tables


def require_some(name: str, size: int) -> None:
    """Raise DataError where a file holds no rows."""
    if not size:
        raise DataError(f"{name}: is empty, it holds no rows; write at least one, or leave it out")


def fitting_layout(
    name: str,
    shapes: Mapping[frozenset[str], int],
    source: DataSource,
    group: str | None = None,
    answered: bool = True,
) -> Layout:
    """The layout of a text file in whose rows these sets of columns occur, each first in that line.

    Raises DataError where all columns together fit no one format, or where rows of several formats stand in one file.
    """
    try:
        return find_layout(
            frozenset().union(*shapes), source.columns, group, name, answered=answered
        )
    except DataError:
        first: dict[tuple[str, ...], str] = {}
        for names, line in sorted(shapes.items(), key=lambda shape: shape[1]):
            try:
                found = find_layout(names, source.columns, None, name, answered=answered)
            except DataError:
                continue
            place = f"{found.format} ({', '.join(sorted(names))}; {name}:{line})"
            first.setdefault(tuple(sorted(found.columns.values())), place)
        if len(first) > 1:
            formats = " and ".join(first.values())
            raise DataError(
                f"{name}: rows of {len(first)} formats stand in this file: {formats}; make a file of each"
            ) from None
        raise


def suffix(path: Path) -> str | None:
    """The ending by which a file's kind is known, as ".jsonl.gz"; None for a kind that is not read."""
    return next((ending for ending in SUFFIXES if path.name.lower().endswith(ending)), None)


def files(text: str) -> list[tuple[str, Path]] | None:
    """Resolve a path to (name in origins, file); None where it can only be a hub id."""
    if text in BUILTIN:
        packaged = Path(str(resources.files("fulcrum.data"))) / "builtin" / BUILTIN[text]
        if not packaged.exists():
            raise DataError(
                f"{text}: this installation lacks its data file {BUILTIN[text]}; reinstall fulcrum-llm"
            )
        return [(text, packaged)]
    path = Path(text).expanduser()
    if path.is_dir():
        visible = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        found = sorted(p for p in visible if suffix(p) and p.name not in SAVED_META)
        if not found:
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise DataError(
                f"{text}: this folder holds no data files ({', '.join(SUFFIXES)}); it holds: {inside}"
            )
    elif path.is_file():
        found = [path]
    elif any(character in text for character in "*?["):
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        found = sorted(p for p in matches if p.is_file() and not p.name.startswith("."))
        if not found:
            raise DataError(
                f"{text}: no file matches this pattern; relative patterns start at {Path.cwd()}"
            )
    elif (
        suffix(path) is None
        and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text)
        and not (path.parent.name and path.parent.is_dir())
    ):
        return None
    else:
        raise DataError(
            f"{text}: {_missing(path, BUILTIN if path.name == text and suffix(path) is None else ())}"
        )
    for file in found:
        if suffix(file) is None:
            raise DataError(
                f"{file}: unknown kind of file {file.suffix!r}; give one of {', '.join(SUFFIXES)}"
            )
        if not _sayable(str(file)):
            raise DataError(f"{str(file)!r}: its name is not valid UTF-8; rename it")
    return [(str(file), file) for file in found]


def _sayable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def passed_over(text: str) -> list[str]:
    """Names of a folder's entries that are not read, hidden ones aside: other kinds of file, folders, links to nothing."""
    path = Path(text).expanduser()
    read = {file.name for _, file in files(text) or ()} if path.is_dir() else set()
    inside = path.iterdir() if path.is_dir() else ()
    return sorted(
        p.name for p in inside if not p.name.startswith(".") and p.name not in {*read, *SAVED_META}
    )


def _missing(path: Path, others: Collection[str] = ()) -> str:
    """Say that nothing is at `path`, with the nearest of its folder's files and of the `others` that it could mean."""
    if not path.parent.is_dir():
        return f"no such file: there is no folder {path.parent}"
    names = [*others, *sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))]
    near = get_close_matches(path.name, names, cutoff=0.5) or names[:8]
    hub = " (and a hub id is written org/name)" if others else ""
    return f"no such file{hub}" + (
        nearest(path.name, near) if near else f"; the folder {path.parent} is empty"
    )


def text_rows(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[Row]:
    """Yield (line or row number, columns) of a .jsonl, .json or .csv file, gzipped or not.

    Of a .jsonl file only the lines that begin in the bytes from `start` to `stop`, the first of which has number `first`.

    Raises DataError with file:line for invalid UTF-8, broken JSON or CSV, and what is not an object.
    """
    kind = str(suffix(path)).removesuffix(".gz")
    if kind == ".csv":
        yield from _csv(path)
    elif kind == ".json":
        text = "".join(line for _, line in _lines(path))
        value = _json(text, path, 1) if text.strip() else []
        if not isinstance(value, list):
            keys = (
                f" with the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else ""
            )
            raise DataError(
                f"{path}: expected a list of objects, found {_kind(value)}{keys}; write the list of rows alone"
            )
        for number, row in enumerate(value, 1):
            yield number, _object(row, f"{path}:{number}")
    else:
        for number, line in _lines(path, start, stop, first):
            if line.strip():
                yield number, _object(_json(line.rstrip("\r\n"), path, number), f"{path}:{number}")


def _lines(
    path: Path, start: int = 0, stop: int | None = None, first: int = 1
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines, which end in a line feed only: JSON strings may hold other separators."""
    number, place = first - 1, start
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            stream.seek(start)
            for number, raw in enumerate(stream, first):
                if stop is not None and place >= stop:
                    return
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                place += len(raw)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = (
            f"{path}:{line + error.lineno - 1}: broken JSON: {error.msg} at column {error.colno}"
        )
        raise DataError(
            f"{place}; mend the line (.jsonl: one object a line, .json: one list of objects)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: broken JSON: {error}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number or truth value")


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected an object with named columns, found {_kind(row)}: {row!r:.60}"
        )
    return row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            if header is None:
                header = fields
                if len(header) == 1 and (
                    separator := next((c for c in ";\t|" if c in header[0]), None)
                ):
                    raise DataError(
                        f"{path}:1: one column named {json.dumps(header[0], ensure_ascii=False)}: are the columns separated "
                        f"by {json.dumps(separator)}? Save the file with commas"
                    )
                if len(set(header)) < len(header):
                    raise DataError(
                        f"{path}:1: the header names a column twice: {', '.join(header)}"
                    )
            elif fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}:{start}: {len(fields)} fields, but the header has {len(header)}; quote fields with commas"
                    )
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: broken CSV: {error}; quote the field, double the quotes inside"
        ) from None


def _arrow_table(
    name: str, data: Any, source: DataSource, group: str | None, answered: bool
) -> Table:
    """Wrap a `datasets.Dataset`. Only the columns in use are kept, so that no other (an image ...) is ever decoded."""
    require_some(name, len(data))
    shape = find_layout(data.column_names, source.columns, group, name, answered=answered)
    used = data.select_columns(sorted(set(shape.columns.values())))
    return Table(name, len(used), lambda index: (index + 1, used[index]), shape)


def _arrow(path: Path) -> Any:
    """Open .parquet or .arrow memory-mapped, through the Arrow cache of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = (
        False  # it would tell the hub of every local file that is read
    )
    with unreadable(path):
        kind = path.suffix[1:].lower()
        return datasets.load_dataset(
            kind, data_files=str(path), split="train", writer_batch_size=_BATCH_ROWS
        )


@contextmanager
def unreadable(path: Path | str) -> Iterator[None]:
    """Turn what the readers of tables raise for a damaged file into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever the readers of damaged files raise
        kind = Path(path).suffix[1:]
        raise DataError(
            f"{path}: not readable as {kind}: {cause_of(error)}; write the file again"
        ) from error


def hub(
    name: str, config: str | None, split: str, revision: str | None, *, stream: bool = False
) -> Any:
    """Load a hub data set as a `datasets.Dataset`, to `stream` it as an `IterableDataset`. Code in it is never run.

    Raises DataError with what to do; UnreachableError where there is no connection.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=stream)
    except Exception as error:  # errors of four libraries come through here
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check the id, `name:`, `split:` and `revision:`; without a network, download it elsewhere and give its files"
        if "gated" in cause.lower() or "authenticated" in cause.lower():
            remedy = "accept its terms on its hub page, then run `hf auth login`"
        path = "" if Path(name).exists() else f"; as a path: {_missing(Path(name))}"
        kind = UnreachableError if isinstance(error, ConnectionError | TimeoutError) else DataError
        raise kind(
            f"{name}: cannot be loaded as a hub data set: {cause}; {remedy}{path}"
        ) from error


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub data set's revision stands for now; None where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # those of the hub's client and of what it connects by; without a commit a stream goes by its description
        return None


def cause_of(error: BaseException) -> str:
    """First line of the innermost error: `datasets` wraps what the reader of a file said."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
