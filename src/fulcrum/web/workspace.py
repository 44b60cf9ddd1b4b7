"""The folder in which the page works: uploaded data, settings, runs. Names in, files out.

    data/ID.jsonl, data/ID.about        what was uploaded, under a name made here, and what the user called it
    runs/ID/run.yaml, about.json        one run: its settings (as written; paths are relative to the folder), what it is
    runs/ID/out/                        its run folder
    runs/ID/jobs/                       commands that were run for it (`jobs`)
    others/ID/jobs/                     the same for a run folder of the user's, in which nothing is ever written

Invariant: whoever asks names things by an id, which is matched against a pattern and then looked up among what is there, and
never by a path. Paths inside settings are looked up too: uploaded files, packaged data, hub ids, models named at the start.
"""

import codecs
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from fulcrum.config import parsing
from fulcrum.config.base import DataSource
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings, load_settings, settings_from_dict
from fulcrum.core import run_folder, store
from fulcrum.core.errors import ConfigError, DataError, StoreError
from fulcrum.web.jobs import Job

ID = re.compile(r"[0-9a-f]{12}")
YAML = "run.yaml"
PACKAGED = ("builtin", "builtin_eval")
MOST_BYTES = 256 * 2**20  # of one uploaded file
_UPLOADED = re.compile(r"data/([0-9a-f]{12})\.")
_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_DEPTH = 3  # folders below one that is given, in which run folders are looked for
_SHOWN = 80  # characters of a name
_FIRST_BYTES = 2**22  # of the longest first line by which a file is known


@dataclass(frozen=True)
class Data:
    """An uploaded file: `path` is how settings name it, `name` what the user called it."""

    id: str
    name: str
    path: str
    size: int  # bytes


@dataclass(frozen=True)
class Run:
    """A run that may be shown: its run folder, and its desk, where what is done for it is kept. `is_own`: made by the page."""

    id: str
    title: str
    folder: Path
    desk: Path
    is_own: bool
    made: float = 0.0  # seconds since the epoch
    data: str = ""

    def job(self, name: str) -> Job:
        """A command of this run."""
        return Job(self.desk / "jobs", name)

    @property
    def settings(self) -> Path:
        """Its settings as the user wrote them, of an own run; else those in the run folder."""
        return self.desk / YAML if self.is_own else self.folder / "config.yaml"


class Workspace:
    """The page's folder; `runs` are folders of the user's with further runs, `models` folders of models that may be used."""

    def __init__(
        self, folder: Path, runs: Sequence[Path] = (), models: Sequence[Path] = ()
    ) -> None:
        self.folder = folder.expanduser().absolute()
        self.others = [path.expanduser().absolute() for path in runs]
        self.models = [str(path.expanduser().absolute()) for path in models]
        for path in (*self.others, *map(Path, self.models)):
            if not path.exists():
                raise ConfigError(f"{path}: no such folder; name one that is there")
        self._writing = threading.RLock()  # what changes settings reads them first
        for part in ("data", "runs"):
            try:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: cannot write: {error.strerror}; choose another --folder"
                ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, this folder is this process's alone. Raises StoreError where another page is at work on it."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            text = f"{self.folder}: another page is at work on it; open the address that its terminal shows, end it, or "
            raise StoreError(f"{text}choose another --folder") from None
        try:
            yield
        finally:
            lock.release()

    def check_trusted(self, run: Run) -> None:
        """Raise ConfigError for a run of the user's folders whose model brings code of its own: no page may have that run."""
        if not run.is_own and load_settings(run.folder / "config.yaml").trust_remote_code:
            raise ConfigError(
                f"{run.title}: trust_remote_code: not from the page; use fulcrum serve, chat or export in a terminal"
            )

    def place(self, run: Run) -> Path:
        """The folder that relative paths of a run's settings start from."""
        return self.folder if run.is_own else Path.cwd()

    def in_words(self, text: str) -> str:
        """What a command said, with uploaded files called as the user called them."""
        for data in self.data() if "data/" in text else ():
            text = text.replace(data.path, data.name)
        return text

    # ---- data

    def add_data(self, name: str, parts: Iterable[bytes]) -> Data:
        """Keep an uploaded file under a name of our own. Raises DataError for what is too large or no table of rows."""
        made = secrets.token_hex(6)
        partial = self.folder / "data" / f".{made}{store.PARTIAL}"
        try:
            with partial.open("wb") as stream:
                _pour(parts, stream)
            ending = kind_of(partial, name)
            size, path = partial.stat().st_size, f"data/{made}{ending}"
            store.write_json(
                self.folder / "data" / f"{made}.about",
                {"name": shown(name), "file": f"{made}{ending}", "size": size},
            )
            partial.rename(self.folder / path)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot write: {error.strerror}; {store.ELSEWHERE}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return Data(made, shown(name), path, size)

    def data(self) -> list[Data]:
        """What was uploaded and is there, the newest first."""
        abouts = sorted(
            (self.folder / "data").glob("*.about"), key=lambda path: -path.stat().st_mtime_ns
        )
        return [
            found
            for about in abouts
            if ID.fullmatch(about.stem) and (found := self._data(about)) is not None
        ]

    def datum(self, asked: str) -> Data:
        """The uploaded file with an id. Raises DataError where there is none."""
        about = self.folder / "data" / f"{asked}.about"
        found = self._data(about) if ID.fullmatch(asked) else None
        if found is None:
            raise DataError("no such data here; choose a file again")
        return found

    def _data(self, about: Path) -> Data | None:
        known = store.recalled(about)
        file = str(known.get("file", ""))
        if (
            not re.fullmatch(rf"{about.stem}\.(jsonl|json|csv|parquet)", file)
            or not (about.parent / file).is_file()
        ):
            return None
        return Data(
            about.stem, str(known.get("name", file)), f"data/{file}", int(known.get("size", 0))
        )

    # ---- runs

    def runs(self) -> list[Run]:
        """All runs, the page's own before those of the user's folders, each the newest first."""
        own = [
            found
            for path in (self.folder / "runs").iterdir()
            if (found := self._own(path.name)) is not None
        ]
        return [
            *sorted(own, key=lambda run: -run.made),
            *sorted(self._others(), key=lambda run: -run.made),
        ]

    def run(self, asked: str) -> Run:
        """The run with an id. Raises StoreError where there is none."""
        found = self._own(asked) or next((run for run in self._others() if run.id == asked), None)
        if found is None:
            raise StoreError("no such run here; look at the list of runs")
        return found

    def new_run(self, title: str, data: Data) -> Run:
        """A run on uploaded data, without settings as yet."""
        made = secrets.token_hex(6)
        with self._writing:
            about = {"title": shown(title), "data": self.datum(data.id).id, "made": time.time()}
            store.write_json(self.folder / "runs" / made / "about.json", about)
        return self.run(made)

    def again(self, run: Run) -> Run:
        """Another run with the settings of one. Raises ConfigError where it has none that the page may use."""
        with self._writing:
            data = parsing.parse(self.text(run), YAML)
            self.checked(data, run)  # before a run is made that would have no settings
            made = self.new_run(f"{run.title} (again)", self.datum(run.data))
            self.write(made, data)
        return made

    def remove(self, run: Run) -> None:
        """Remove an own run with all that was made for it, and the uploaded files that no other run names. Raises StoreError
        where a process works in its folder, or where the disk refuses."""
        with self._writing, run_folder.held(run.folder):
            needed = {
                name for other in self.runs() if other.id != run.id for name in self._named(other)
            }
            mine = self._named(run) - needed
            if not store.drop_folder(run.desk):
                raise StoreError(
                    f"{run.desk}: not all of it could be removed; look who may write there"
                )
            for data in self.data():
                if data.id in mine:
                    (self.folder / "data" / f"{data.id}.about").unlink(missing_ok=True)
                    (self.folder / data.path).unlink(missing_ok=True)

    def _named(self, run: Run) -> set[str]:
        """Ids of the uploaded files that a run is about, or names in its settings."""
        try:
            text = (
                run.settings.read_text(encoding="utf-8", errors="replace")
                if run.settings.is_file()
                else ""
            )
        except OSError as error:
            raise StoreError(
                f"{run.settings}: {error.strerror}: which uploaded files it needs is not known"
            ) from error
        return {run.data, *_UPLOADED.findall(text)}

    def _own(self, asked: str) -> Run | None:
        place = self.folder / "runs" / asked
        if not ID.fullmatch(asked) or not (place / "about.json").is_file():
            return None
        about = store.recalled(place / "about.json")
        title, made = str(about.get("title", asked)), float(about.get("made", 0.0))
        return Run(asked, title, place / "out", place, True, made, str(about.get("data", "")))

    def _others(self) -> Iterator[Run]:
        for root in self.others:
            for folder in _run_folders(root, _DEPTH):
                made = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
                title = shown(str(folder.relative_to(root.parent)))
                since = (folder / store.MANIFEST).stat().st_mtime
                yield Run(made, title, folder, self.folder / "others" / made, False, since)

    # ---- settings

    def text(self, run: Run) -> str:
        """A run's settings as they are written. Raises StoreError where it has none."""
        try:
            return run.settings.read_text(encoding="utf-8")
        except OSError:
            raise StoreError(f"{run.title}: has no settings; choose its data again") from None

    def save(self, run: Run, text: str) -> Settings:
        """Write settings that the user wrote, as they are, if they may be. Raises ConfigError."""
        with self._writing:
            found = self.values(run, text)
            store.write_bytes(run.settings, text.encode())
        return found

    def change(self, run: Run, changes: dict[str, Any]) -> Settings:
        """Set `a.b: value` in a run's settings, and write them anew. Raises ConfigError."""
        with self._writing:
            data = parsing.rename(parsing.parse(self.text(run), YAML))
            for dotted, value in changes.items():
                parsing.put(data, dotted, value)
            return self.write(run, data)

    def write(self, run: Run, data: Any) -> Settings:
        """Write settings from plain values; where the run writes is not the user's to choose. Raises ConfigError."""
        if isinstance(data, dict):
            data = {**data, "output_dir": self._out(run)}
        with self._writing:
            found = self.checked(data, run)
            store.write_bytes(
                run.settings,
                yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100).encode(),
            )
        return found

    def checked(self, data: Any, run: Run) -> Settings:
        """Settings whose every path was looked up. Raises ConfigError naming the setting and what it may hold."""
        if not isinstance(data, dict):
            raise ConfigError(f"{YAML}: expected a mapping of settings")
        found = settings_from_dict(data, YAML)
        if found.output_dir != self._out(run):
            raise ConfigError(
                f"{YAML}: output_dir: this run is kept in {self._out(run)}; leave it so (got {found.output_dir!r})"
            )
        if found.trust_remote_code or found.teacher is not None:
            name = "trust_remote_code" if found.trust_remote_code else "teacher"
            raise ConfigError(
                f"{YAML}: {name}: not from the page; run these settings from a terminal"
            )
        self.model(found.model)
        for name, source in _sources(found):
            self._look_up(name, source)
        return found

    def _out(self, run: Run) -> str:
        return run.folder.relative_to(self.folder).as_posix()

    def values(self, run: Run, text: str) -> Settings:
        """Settings that are written, in full. Raises ConfigError."""
        return self.checked(parsing.parse(text, YAML), run)

    def model(self, name: str) -> str:
        """A model that may be used, by its name. Raises ConfigError for any other."""
        from fulcrum.model import registry

        if name in registry.BUILTIN or name in self.models or self._is_hub_id(name):
            return name
        known = ", ".join((*registry.BUILTIN, *self.models))
        raise ConfigError(
            f"{YAML}: model: {name!r} is neither a hub id (org/name) nor one of {known}; folders are named at the start: "
            "fulcrum ui --model FOLDER"
        )

    def _look_up(self, name: str, source: DataSource) -> None:
        if (
            source.path in PACKAGED
            or source.path in {data.path for data in self.data()}
            or self._is_hub_id(source.path)
        ):
            return
        raise ConfigError(
            f"{YAML}: {name}: {source.path!r} is no uploaded file, no hub id (org/name) and not builtin; upload it first"
        )

    def _is_hub_id(self, text: str) -> bool:
        """Whether a text is a hub id, and no path from the folder in which commands run."""
        return bool(_HUB_ID.fullmatch(text)) and not (self.folder / text.partition("/")[0]).exists()


def _sources(found: Settings) -> Iterator[tuple[str, DataSource]]:
    """Every source of data in settings, by the name of its setting."""
    for task in found.tasks:
        for part in ("train", "dev", "test", "unlabeled"):
            yield from ((f"task.{part}", source) for source in getattr(task, part))
    yield from (("general", source) for source in found.general)
    for arm in found.compare.arms:
        yield from (
            ("compare.arms", source) for source in (arm.pool if isinstance(arm, Arm) else ())
        )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Run folders at or below a folder, none of them inside of another."""
    if (folder / store.MANIFEST).is_file():
        yield folder
    elif depth:
        try:
            below = sorted(
                path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        except OSError:
            return
        for path in below:
            yield from _run_folders(path, depth - 1)


def _pour(parts: Iterable[bytes], stream: IO[bytes]) -> None:
    size = 0
    for part in parts:
        size += len(part)
        if size > MOST_BYTES:
            raise DataError(
                f"the file has more than {MOST_BYTES // 2**20} MiB; give its path to `fulcrum init` in a terminal"
            )
        stream.write(part)


def kind_of(file: Path, name: str = "") -> str:
    """The ending that a file's content asks for, and its name where the content may be several. Raises DataError for what holds
    no rows of text."""
    with file.open("rb") as stream:
        head = stream.readline(_FIRST_BYTES)
        head += stream.read(65_536)
        is_all = not stream.read(1)
        stream.seek(max(0, file.stat().st_size - 4))
        foot = stream.read()
    if head[:4] == b"PAR1" and foot == b"PAR1":
        return ".parquet"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(
            head, final=is_all
        )  # a letter may be cut in two at the end
    except UnicodeDecodeError:
        raise DataError(
            "the file is no text in UTF-8 and no Parquet; give .jsonl, .json, .csv or .parquet, unpacked"
        ) from None
    if "\0" in text or not text.strip():
        raise DataError("the file is empty or no text; give .jsonl, .json, .csv or .parquet")
    if text.lstrip()[0] == "[":
        return ".json"
    if name.lower().endswith(".jsonl"):  # whose first line may be broken
        return ".jsonl"
    return (
        (".jsonl" if _is_object(text.lstrip().split("\n", 1)[0]) else ".json")
        if text.lstrip()[0] == "{"
        else ".csv"
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def shown(name: str) -> str:
    """A name as it may stand on a page: one line, no control characters, not long, never empty."""
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return text[:_SHOWN] or "data"
