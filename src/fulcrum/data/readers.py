"""Open files, folders, globs and hub data sets as `Table`s of raw rows.

A source opens as one table for each file or hub data set; a row is converted when it is asked for.
Its origin is ``file:line`` (text), ``file:row`` (lists and tables) or ``hub id:row``, counted from
1. Text is parsed here, so that an error can name its line; .parquet, .arrow and hub data sets are
memory-mapped by `datasets`.

Invariant: a file that is missing, empty or broken as a file is refused with its place and a remedy;
it is never read in part.
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from fulcrum.config.base import DataSource
from fulcrum.core import store, user_paths
from fulcrum.core.errors import DataError, UnreachableError, nearest
from fulcrum.core.types import Example, Reject
from fulcrum.data.formats import Layout, Unread, convert, find_layout, unread_column

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
BUILTIN = {"builtin": "builtin_pool.jsonl.gz", "builtin_eval": "builtin_eval.jsonl.gz"}

# Files that `datasets` writes next to the rows when it saves a data set to disk.
SAVED_META = ("dataset_info.json", "state.json", "dataset_dict.json")

# Rows in a batch of the Arrow cache. Opening touches some pages of each batch: 240 MiB for 10^7
# rows in batches of 1,000.
_BATCH_ROWS = 10_000

_EXCEL = re.compile(r"sep=(.)\r?\n?$", re.IGNORECASE)
_LONGEST_FIELD = 2**30  # characters of a CSV field; Python's own limit is 131,072
_NAMES_SHOWN = 8  # files of a folder that an error names

Row = tuple[int, Mapping[str, Any]]  # line or row number from 1, columns


@dataclass(frozen=True)
class Table:
    """The rows of one file or hub data set; `table[i]` is an Example or Reject."""

    name: str
    size: int  # rows
    fetch: Callable[[int], Row] = field(repr=False)  # gives raw row i
    layout: Layout
    unread: Unread = field(default_factory=Counter)  # in the rows converted so far

    def __getitem__(self, index: int) -> Example | Reject:
        """Convert row `index`, 0 <= index < size."""
        line, row = self.fetch(index)
        return convert(row, self.layout, f"{self.name}:{line}", self.unread)


def open_tables(
    source: DataSource, *, group: str | None = None, answered: bool = True
) -> list[Table]:
    """Open a source's files (sorted by name) or its hub data set; text files are read into memory.

    If rows are not `answered`, they are inputs. Raises DataError for what is missing, empty,
    broken, or has columns that fit no format.
    """
    named = files(source.path)
    if named is None:
        data = hub(source.path, source.name, source.split, source.revision)
        return [_arrow_table(source.path, data, source, group, answered)]
    if source.name or source.revision or source.split != "train":
        raise DataError(
            f"{source.path}: name, split and revision belong to hub data sets, this is a file; "
            "use `limit:`"
        )
    tables = []
    for name, path in named:
        if suffix(path) in TEXT_SUFFIXES:
            tables.append(_text_table(name, path, source, group, answered))
        else:
            tables.append(_arrow_table(name, _open_arrow(path), source, group, answered))
    return tables


def require_some(name: str, size: int) -> None:
    """Raise DataError if a file holds no rows."""
    if not size:
        raise DataError(f"{name}: is empty, it holds no rows; write at least one, or leave it out")


def fitting_layout(
    name: str,
    shapes: Mapping[frozenset[str], int],
    source: DataSource,
    group: str | None = None,
    answered: bool = True,
) -> Layout:
    """Return the layout of a file whose rows have these sets of columns, each first in that line.

    Raises DataError if all columns together fit no single format, or if the file holds rows of
    several formats.
    """
    columns = frozenset().union(*shapes)
    try:
        return find_layout(columns, source.columns, group, name, answered=answered)
    except DataError:
        places = _places_of_formats(name, shapes, source, answered)
        if len(places) > 1:
            raise DataError(
                f"{name}: rows of {len(places)} formats stand in this file: "
                f"{' and '.join(places)}; make a file of each"
            ) from None
        raise


def suffix(path: Path) -> str | None:
    """Return the ending that tells a file's kind, as ".jsonl.gz"; None if the kind is not read."""
    for ending in SUFFIXES:
        if path.name.lower().endswith(ending):
            return ending
    return None


def files(text: str) -> list[tuple[str, Path]] | None:
    """Return (name in origins, file) of all files that a path names; None if it must be a hub id.

    Raises DataError if there are none, or if one is of a kind that is not read.
    """
    if text in BUILTIN:
        return [(text, _builtin(text))]
    path = Path(user_paths.expanded(text))
    if path.is_dir():
        paths = _files_in_folder(path, text)
    elif path.is_file():
        paths = [path]
    elif any(character in text for character in "*?["):
        paths = _files_of_pattern(path, text)
    elif _is_hub_id(path, text):
        return None
    else:
        is_bare = path.name == text and suffix(path) is None
        raise DataError(f"{text}: {_missing(path, BUILTIN if is_bare else ())}")
    for file in paths:
        if store.is_lfs_pointer(file):
            raise DataError(
                f"{file}: is a Git LFS pointer, which stands for the file; fetch it: git lfs pull"
            )
        if suffix(file) is None:
            raise DataError(
                f"{file}: unknown kind of file {file.suffix!r}; give one of {', '.join(SUFFIXES)}"
            )
        if not _is_utf8(str(file)):
            raise DataError(f"{str(file)!r}: its name is not valid UTF-8; rename it")
    return [(str(file), file) for file in paths]


def unread_names(text: str) -> list[str]:
    """Return the names of a folder's entries that are not read, except hidden ones.

    These are other kinds of file, folders and broken links. If the path is no folder, there are
    none.
    """
    path = Path(user_paths.expanded(text))
    if not path.is_dir():
        return []
    read = {file.name for _, file in files(text) or ()}
    return [name for name in _visible_names(path) if name not in read and name not in SAVED_META]


def text_rows(path: Path, start: int = 0, stop: int | None = None, first: int = 1) -> Iterator[Row]:
    """Yield (line or row number, columns) of a .jsonl, .json or .csv file, gzipped or not.

    Of a .jsonl file only the lines are read that begin in the bytes from `start` to `stop`; `first`
    is the number of the first of these. Raises DataError with file:line for invalid UTF-8, broken
    JSON or CSV, and what is not an object.
    """
    kind = str(suffix(path)).removesuffix(".gz")
    if kind == ".csv":
        yield from _csv_rows(path)
    elif kind == ".json":
        yield from _json_rows(path)
    else:
        for number, line in _lines(path, start, stop, first):
            if line.strip():
                value = _parse_json(line.rstrip("\r\n"), path, number)
                yield number, _require_object(value, f"{path}:{number}")


@contextmanager
def refuse_unreadable(path: Path | str) -> Iterator[None]:
    """Turn what the readers of tables raise for a damaged file into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers raise anything for damaged files
        kind = Path(path).suffix[1:]
        raise DataError(
            f"{path}: not readable as {kind}: {cause_of(error)}; write the file again"
        ) from error


def hub(
    name: str, config: str | None, split: str, revision: str | None, *, stream: bool = False
) -> Any:
    """Load a hub data set as a `datasets.Dataset`, or as an `IterableDataset` to `stream` it.

    Code in it is never run. Raises DataError with what to do; UnreachableError if there is no
    connection.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=stream)
    except Exception as error:  # errors of four libraries come through here
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = (
            "check the id, `name:`, `split:` and `revision:`; without a network, download it "
            "elsewhere and give its files"
        )
        if "gated" in cause.lower() or "authenticated" in cause.lower():
            remedy = "accept its terms on its hub page, then run `hf auth login`"
        if not Path(name).exists():
            remedy += f"; as a path: {_missing(Path(name))}"
        kind = UnreachableError if isinstance(error, ConnectionError | TimeoutError) else DataError
        raise kind(f"{name}: cannot be loaded as a hub data set: {cause}; {remedy}") from error


def hub_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub data set's revision now; None if the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # any error of the hub's client or the network: a commit is not required
        return None


def cause_of(error: BaseException) -> str:
    """Return the first line of the innermost error: `datasets` wraps what a file's reader said."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _text_table(
    name: str, path: Path, source: DataSource, group: str | None, answered: bool
) -> Table:
    rows = list(text_rows(path))
    require_some(name, len(rows))
    shapes: dict[frozenset[str], int] = {}
    for line, row in rows:
        shapes.setdefault(frozenset(row), line)
    layout = fitting_layout(name, shapes, source, group, answered)
    return Table(name, len(rows), rows.__getitem__, layout)


def _arrow_table(
    name: str, data: Any, source: DataSource, group: str | None, answered: bool
) -> Table:
    """Wrap a `datasets.Dataset`, with the columns in use only: no other (an image) is decoded."""
    require_some(name, len(data))
    layout = find_layout(data.column_names, source.columns, group, name, answered=answered)
    used = data.select_columns(sorted(set(layout.columns.values())))
    labels = label_names(used.features)
    unread: Unread = Counter()
    for column in layout.unread(data.column_names):
        missing = data.data.column(column).null_count if len(data.data) == len(data) else 0
        unread[unread_column(column, layout)] = len(data) - missing

    def fetch(index: int) -> Row:
        return index + 1, named_labels(used[index], labels)

    return Table(name, len(used), fetch, layout, +unread)


def label_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the classes of each column of class numbers (ClassLabel)."""
    import datasets

    names = {}
    for column, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            names[column] = list(feature.names)
    return names


def named_labels(row: Mapping[str, Any], labels: Mapping[str, list[str]]) -> Mapping[str, Any]:
    """Return the row with class names instead of class numbers; -1 says that there is no label."""
    if not labels:
        return row
    named = dict(row)
    for column, names in labels.items():
        number = named.get(column)
        if isinstance(number, int):
            named[column] = names[number] if number >= 0 else None
    return named


def _open_arrow(path: Path) -> Any:
    """Open .parquet or .arrow memory-mapped, through the Arrow cache of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    # Otherwise it tells the hub of every local file that is read.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    kind = path.suffix[1:].lower()
    with refuse_unreadable(path):
        return datasets.load_dataset(
            kind, data_files=str(path), split="train", writer_batch_size=_BATCH_ROWS
        )


def _places_of_formats(
    name: str, shapes: Mapping[frozenset[str], int], source: DataSource, answered: bool
) -> list[str]:
    """Describe the first row of each format that the rows of a file fit, in the order of lines."""
    places: dict[tuple[str, ...], str] = {}
    for columns, line in sorted(shapes.items(), key=lambda shape: shape[1]):
        try:
            layout = find_layout(columns, source.columns, None, name, answered=answered)
        except DataError:
            continue
        place = f"{layout.format} ({', '.join(sorted(columns))}; {name}:{line})"
        places.setdefault(tuple(sorted(layout.columns.values())), place)
    return list(places.values())


def _builtin(text: str) -> Path:
    path = Path(str(resources.files("fulcrum.data"))) / "builtin" / BUILTIN[text]
    if not path.exists():
        raise DataError(
            f"{text}: this installation lacks its data file {BUILTIN[text]}; reinstall fulcrum-llm"
        )
    return path


def _files_in_folder(folder: Path, text: str) -> list[Path]:
    files = []
    for path in sorted(folder.iterdir()):
        is_hidden = path.name.startswith(".")
        if path.is_file() and not is_hidden and suffix(path) and path.name not in SAVED_META:
            files.append(path)
    if not files:
        names = sorted(path.name for path in folder.iterdir())
        raise DataError(
            f"{text}: this folder holds no data files ({', '.join(SUFFIXES)}); "
            f"it holds: {', '.join(names[:_NAMES_SHOWN]) or 'nothing'}"
        )
    return files


def _files_of_pattern(path: Path, text: str) -> list[Path]:
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    files = sorted(p for p in matches if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(
            f"{text}: no file matches this pattern; relative patterns start at {Path.cwd()}"
        )
    return files


def _is_hub_id(path: Path, text: str) -> bool:
    """Tell whether a path without a file can be a hub id: "org/name", and no folder "org"."""
    if suffix(path) is not None or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        return False
    return not (path.parent.name and path.parent.is_dir())


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _visible_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _missing(path: Path, others: Collection[str] = ()) -> str:
    """Say that nothing is at `path`, and name the nearest of its folder's files and of `others`."""
    if not path.parent.is_dir():
        return f"no such file: there is no folder {path.parent}"
    names = [*others, *_visible_names(path.parent)]
    near = get_close_matches(path.name, names, cutoff=0.5) or names[:_NAMES_SHOWN]
    message = "no such file"
    if others:
        message += " (and a hub id is written org/name)"
    if not near:
        return f"{message}; the folder {path.parent} is empty"
    return message + nearest(path.name, near)


def _lines(
    path: Path, start: int = 0, stop: int | None = None, first: int = 1
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of lines. Only a line feed ends one: JSON may hold other breaks."""
    number = first - 1
    place = start
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
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1}); "
            "save it as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    value = _parse_json(text, path, 1)
    if not isinstance(value, list):
        kind = _kind(value)
        if isinstance(value, dict):
            kind += f" with the keys {', '.join(map(repr, value))}"
        raise DataError(
            f"{path}: expected a list of objects, found {kind}; write the list of rows alone"
        )
    for number, row in enumerate(value, 1):
        yield number, _require_object(row, f"{path}:{number}")


def _parse_json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: broken JSON: {error.msg} at column {error.colno}; "
            "mend the line (.jsonl: one object a line, .json: one list of objects)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: broken JSON: {error}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number or truth value")


def _require_object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected an object with named columns, found {_kind(row)}: {row!r:.60}"
        )
    return row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    named = _EXCEL.match(first)  # Excel's own first line, which names the separator
    before = 1 if named else 0  # lines that the reader does not see
    separator = named[1] if named else ","
    rest = lines if named else chain([first], lines)
    reader = csv.reader(rest, strict=True, delimiter=separator)
    start = 1 + before  # line in which a row begins
    try:
        header = next(reader, None)
        if not header:
            return
        _check_header(path, header)
        start = reader.line_num + 1 + before
        for fields in reader:
            if fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}:{start}: {len(fields)} fields, but the header has {len(header)}; "
                        "quote fields with commas"
                    )
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1 + before
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: broken CSV: {error}; quote the field, double the quotes inside"
        ) from None


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) == 1:
        for separator in ";\t|":
            if separator in header[0]:
                raise DataError(
                    f"{path}:1: one column named {json.dumps(header[0], ensure_ascii=False)}: are "
                    f"the columns separated by {json.dumps(separator)}? Save the file with commas"
                )
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: the header names a column twice: {', '.join(header)}")
