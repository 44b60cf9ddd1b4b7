"""The folder in which the page works: uploaded data, settings, runs. Names in, files out.

    data/ID.jsonl, data/ID.about        an upload, named here, and what the user called it
    runs/ID/run.yaml, about.json        a run: its settings (paths relative to this folder), title
    runs/ID/out/                        its run folder
    runs/ID/jobs/                       commands that were run for it (`jobs`)
    others/ID/jobs/                     the same for a run folder of the user's, never written to

Invariant: clients name things by an id, which is matched against a pattern and then looked up,
never by a path. Paths inside settings are looked up too: uploaded files, packaged data, hub ids,
models named at the start.
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
_FIRST_BYTES = 2**22  # of the longest first line by which a file's kind is recognized


@dataclass(frozen=True)
class Data:
    """An uploaded file."""

    id: str
    name: str  # as the user called it
    path: str  # as settings name it
    size: int  # bytes


@dataclass(frozen=True)
class Run:
    """A run that may be shown."""

    id: str
    title: str
    folder: Path  # the run folder
    desk: Path  # the folder with what the page keeps for the run
    is_own: bool  # made by the page
    made: float = 0.0  # seconds since the epoch
    data: str = ""  # the id of its uploaded file

    def job(self, name: str) -> Job:
        """Return a command of this run."""
        return Job(self.desk / "jobs", name)

    @property
    def settings(self) -> Path:
        """Return the file of the settings: as the user wrote them, or else the run folder's."""
        return self.desk / YAML if self.is_own else self.folder / "config.yaml"


class Workspace:
    """The page's folder.

    `runs` are folders of the user's with further runs, `models` folders of models that may be used.
    """

    def __init__(
        self, folder: Path, runs: Sequence[Path] = (), models: Sequence[Path] = ()
    ) -> None:
        self.folder = folder.expanduser().absolute()
        self.others = [path.expanduser().absolute() for path in runs]
        self.models = [str(path.expanduser().absolute()) for path in models]
        for path in (*self.others, *map(Path, self.models)):
            if not path.exists():
                raise ConfigError(f"{path}: no such folder; name one that is there")
        self._writing = threading.RLock()  # settings are read, changed and written in one go
        for part in ("data", "runs"):
            try:
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: cannot write: {error.strerror}; choose another --folder"
                ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Return a context in which this folder belongs to this process alone.

        Raise StoreError if another page uses it.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{self.folder}: another page is at work on it; "
                "open the address that its terminal shows, end it, or choose another --folder"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def check_trusted(self, run: Run) -> None:
        """Raise ConfigError for a run of the user's folders whose model brings code of its own.

        The page may not run that code.
        """
        if not run.is_own and load_settings(run.folder / "config.yaml").trust_remote_code:
            raise ConfigError(
                f"{run.title}: trust_remote_code: not from the page; "
                "use fulcrum serve, chat or export in a terminal"
            )

    def place(self, run: Run) -> Path:
        """Return the folder that relative paths of a run's settings start from."""
        return self.folder if run.is_own else Path.cwd()

    def in_words(self, text: str) -> str:
        """Return a command's output with uploaded files called as the user called them."""
        if "data/" in text:
            for data in self.data():
                text = text.replace(data.path, data.name)
        return text

    # ---- data

    def add_data(self, name: str, parts: Iterable[bytes]) -> Data:
        """Keep an uploaded file under a name of our own.

        Raise DataError if it is too large or holds no rows.
        """
        new_id = secrets.token_hex(6)
        folder = self.folder / "data"
        partial = folder / f".{new_id}{store.PARTIAL}"
        try:
            with partial.open("wb") as stream:
                _copy(parts, stream)
            file = f"{new_id}{kind_of(partial, name)}"
            size = partial.stat().st_size
            about = {"name": shown(name), "file": file, "size": size}
            store.write_json(folder / f"{new_id}.about", about)
            partial.rename(folder / file)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot write: {error.strerror}; {store.ELSEWHERE}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return Data(new_id, shown(name), f"data/{file}", size)

    def data(self) -> list[Data]:
        """Return the uploaded files that are there, the newest first."""
        abouts = list((self.folder / "data").glob("*.about"))
        abouts.sort(key=lambda path: -path.stat().st_mtime_ns)
        uploads = []
        for about in abouts:
            data = self._data(about) if ID.fullmatch(about.stem) else None
            if data is not None:
                uploads.append(data)
        return uploads

    def datum(self, asked: str) -> Data:
        """Return the uploaded file with an id. Raise DataError if there is none."""
        about = self.folder / "data" / f"{asked}.about"
        data = self._data(about) if ID.fullmatch(asked) else None
        if data is None:
            raise DataError("no such data here; choose a file again")
        return data

    def _data(self, about: Path) -> Data | None:
        known = store.recalled(about)
        file = str(known.get("file", ""))
        is_named = re.fullmatch(rf"{about.stem}\.(jsonl|json|csv|parquet)", file)
        if not is_named or not (about.parent / file).is_file():
            return None
        name = str(known.get("name", file))
        return Data(about.stem, name, f"data/{file}", int(known.get("size", 0)))

    # ---- runs

    def runs(self) -> list[Run]:
        """Return the page's own runs and then those of the user's folders, the newest first."""
        own = []
        for path in (self.folder / "runs").iterdir():
            run = self._own(path.name)
            if run is not None:
                own.append(run)
        own.sort(key=lambda run: -run.made)
        return [*own, *sorted(self._others(), key=lambda run: -run.made)]

    def run(self, asked: str) -> Run:
        """Return the run with an id. Raise StoreError if there is none."""
        own = self._own(asked)
        if own is not None:
            return own
        for run in self._others():
            if run.id == asked:
                return run
        raise StoreError("no such run here; look at the list of runs")

    def new_run(self, title: str, data: Data) -> Run:
        """Make a run on uploaded data, which has no settings yet."""
        new_id = secrets.token_hex(6)
        with self._writing:
            about = {"title": shown(title), "data": self.datum(data.id).id, "made": time.time()}
            store.write_json(self.folder / "runs" / new_id / "about.json", about)
        return self.run(new_id)

    def again(self, run: Run) -> Run:
        """Make another run with the settings of one.

        Raise ConfigError if it has none that the page may use.
        """
        with self._writing:
            data = parsing.parse(self.text(run), YAML)
            self.check(data, run)  # before a run is made that would have no settings
            copy = self.new_run(f"{run.title} (again)", self.datum(run.data))
            self.write(copy, data)
        return copy

    def remove(self, run: Run) -> None:
        """Remove an own run, all that was made for it, and uploads that no other run names.

        Raise StoreError if a process works in its folder or the disk refuses.
        """
        with self._writing, run_folder.held(run.folder):
            unneeded = self._named(run)
            for other in self.runs():
                if other.id != run.id:
                    unneeded -= self._named(other)
            if not store.drop_folder(run.desk):
                raise StoreError(
                    f"{run.desk}: not all of it could be removed; look who may write there"
                )
            for data in self.data():
                if data.id in unneeded:
                    (self.folder / "data" / f"{data.id}.about").unlink(missing_ok=True)
                    (self.folder / data.path).unlink(missing_ok=True)

    def _named(self, run: Run) -> set[str]:
        """Return the ids of the uploaded files that a run is about, or names in its settings."""
        text = ""
        try:
            if run.settings.is_file():
                text = run.settings.read_text(encoding="utf-8", errors="replace")
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
        return Run(
            id=asked,
            title=str(about.get("title", asked)),
            folder=place / "out",
            desk=place,
            is_own=True,
            made=float(about.get("made", 0.0)),
            data=str(about.get("data", "")),
        )

    def _others(self) -> Iterator[Run]:
        for root in self.others:
            for folder in _run_folders(root, _DEPTH):
                run_id = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
                yield Run(
                    id=run_id,
                    title=shown(str(folder.relative_to(root.parent))),
                    folder=folder,
                    desk=self.folder / "others" / run_id,
                    is_own=False,
                    made=(folder / store.MANIFEST).stat().st_mtime,
                )

    # ---- settings

    def text(self, run: Run) -> str:
        """Return a run's settings as they are written. Raise StoreError if it has none."""
        try:
            return run.settings.read_text(encoding="utf-8")
        except OSError:
            raise StoreError(f"{run.title}: has no settings; choose its data again") from None

    def save(self, run: Run, text: str) -> Settings:
        """Write settings as the user wrote them. Raise ConfigError if the page may not use them."""
        with self._writing:
            settings = self.values(run, text)
            store.write_bytes(run.settings, text.encode())
        return settings

    def change(self, run: Run, changes: dict[str, Any]) -> Settings:
        """Set `a.b: value` in a run's settings, and write them again. Raise ConfigError."""
        with self._writing:
            data = parsing.rename(parsing.parse(self.text(run), YAML))
            for dotted, value in changes.items():
                parsing.put(data, dotted, value)
            return self.write(run, data)

    def write(self, run: Run, data: Any) -> Settings:
        """Write settings from plain values; `output_dir` is the page's to choose.

        Raise ConfigError.
        """
        if isinstance(data, dict):
            data = {**data, "output_dir": self._out(run)}
        with self._writing:
            settings = self.check(data, run)
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
            store.write_bytes(run.settings, text.encode())
        return settings

    def check(self, data: Any, run: Run) -> Settings:
        """Return the settings, after looking up every path in them.

        Raise ConfigError naming the setting and what it may hold.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{YAML}: expected a mapping of settings")
        settings = settings_from_dict(data, YAML)
        if settings.output_dir != self._out(run):
            raise ConfigError(
                f"{YAML}: output_dir: this run is kept in {self._out(run)}; "
                f"leave it so (got {settings.output_dir!r})"
            )
        if settings.trust_remote_code or settings.teacher is not None:
            name = "trust_remote_code" if settings.trust_remote_code else "teacher"
            raise ConfigError(
                f"{YAML}: {name}: not from the page; run these settings from a terminal"
            )
        self.model(settings.model)
        for name, source in _sources(settings):
            self._look_up(name, source)
        return settings

    def _out(self, run: Run) -> str:
        return run.folder.relative_to(self.folder).as_posix()

    def values(self, run: Run, text: str) -> Settings:
        """Return written settings, with defaults filled in. Raise ConfigError."""
        return self.check(parsing.parse(text, YAML), run)

    def model(self, name: str) -> str:
        """Return a model's name. Raise ConfigError for one that may not be used."""
        from fulcrum.model import registry

        if name in registry.BUILTIN or name in self.models or self._is_hub_id(name):
            return name
        known = ", ".join((*registry.BUILTIN, *self.models))
        raise ConfigError(
            f"{YAML}: model: {name!r} is neither a hub id (org/name) nor one of {known}; "
            "folders are named at the start: fulcrum ui --model FOLDER"
        )

    def _look_up(self, name: str, source: DataSource) -> None:
        if source.path in PACKAGED or self._is_hub_id(source.path):
            return
        if any(data.path == source.path for data in self.data()):
            return
        raise ConfigError(
            f"{YAML}: {name}: {source.path!r} is no uploaded file, no hub id (org/name) "
            "and not builtin; upload it first"
        )

    def _is_hub_id(self, text: str) -> bool:
        """Return whether a text is a hub id, and no path from the folder in which commands run."""
        return bool(_HUB_ID.fullmatch(text)) and not (self.folder / text.partition("/")[0]).exists()


def _sources(settings: Settings) -> Iterator[tuple[str, DataSource]]:
    """Yield every source of data in settings, by the name of its setting."""
    for task in settings.tasks:
        for part in ("train", "dev", "test", "unlabeled"):
            for source in getattr(task, part):
                yield f"task.{part}", source
    for source in settings.general:
        yield "general", source
    for arm in settings.compare.arms:
        if isinstance(arm, Arm):
            for source in arm.pool:
                yield "compare.arms", source


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the run folders at or below a folder, none of them inside another."""
    if (folder / store.MANIFEST).is_file():
        yield folder
    elif depth:
        try:
            paths = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        except OSError:
            return
        for path in paths:
            if not path.name.startswith("."):
                yield from _run_folders(path, depth - 1)


def _copy(parts: Iterable[bytes], stream: IO[bytes]) -> None:
    size = 0
    for part in parts:
        size += len(part)
        if size > MOST_BYTES:
            raise DataError(
                f"the file has more than {MOST_BYTES // 2**20} MiB; "
                "give its path to `fulcrum init` in a terminal"
            )
        stream.write(part)


def kind_of(file: Path, name: str = "") -> str:
    """Return the extension for a file's content, or for its name if the content fits several.

    Raise DataError for a file that holds no rows of text.
    """
    with file.open("rb") as stream:
        head = stream.readline(_FIRST_BYTES)
        head += stream.read(65_536)
        is_all = not stream.read(1)
        stream.seek(max(0, file.stat().st_size - 4))
        foot = stream.read()
    if head[:4] == b"PAR1" and foot == b"PAR1":
        return ".parquet"
    try:
        # Incremental: a character may be cut in two at the end.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=is_all)
    except UnicodeDecodeError:
        raise DataError(
            "the file is no text in UTF-8 and no Parquet; "
            "give .jsonl, .json, .csv or .parquet, unpacked"
        ) from None
    if "\0" in text or not text.strip():
        raise DataError("the file is empty or no text; give .jsonl, .json, .csv or .parquet")
    text = text.lstrip()
    if text[0] == "[":
        return ".json"
    if name.lower().endswith(".jsonl"):  # even if its first line is broken
        return ".jsonl"
    if text[0] != "{":
        return ".csv"
    first_line = text.split("\n", 1)[0]
    return ".jsonl" if _is_object(first_line) else ".json"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def shown(name: str) -> str:
    """Return a name to show: one line, no control characters, not long, never empty."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    text = " ".join(printable.split())
    return text[:_SHOWN] or "data"
