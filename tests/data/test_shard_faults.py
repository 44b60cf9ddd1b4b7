"""Pools in trouble: killed, full, damaged, changed, out of reach; what is said and what is left."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from fulcrum.config.base import GeneralSource
from fulcrum.core import processes, store
from fulcrum.core.errors import DataError, StoreError, UnreachableError
from fulcrum.data import shards, sources
from fulcrum.data.pool import Exclusions, open_pool, select
from helpers.shards import read, rows, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))


def cached(pattern: str) -> list[Path]:
    return sorted(Path(os.environ["FULCRUM_CACHE"]).rglob(pattern))


SCRIPT = """
import sys
from fulcrum.data import sources
from fulcrum.data.pool import open_pool
from fulcrum.config.base import GeneralSource

if __name__ == "__main__":
    sources._PART_BYTES = 30_000
    tell = lambda label, done, total: print(label, done, flush=True)
    open_pool([GeneralSource(path=sys.argv[1])], seed=0, jobs=2, progress=tell)
"""


@pytest.mark.e2e
def test_a_killed_build_of_two_processes_leaves_none_of_them_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.jsonl", rows(30_000))
    (tmp_path / "build.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "build.py"), source.path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("converting") and line.endswith(" 3\n"))
    process.send_signal(signal.SIGKILL)
    process.communicate(
        timeout=60
    )  # ends when the last process ends that holds the pipe: its workers do too
    before = {
        file: file.stat().st_mtime_ns
        for file in cached("0*.arrow")
        if file.with_suffix(".json").exists()
    }
    assert len(before) >= 3
    assert cached("whole.json") == []
    monkeypatch.setattr(sources, "_PART_BYTES", 30_000)
    found = open_pool([source], seed=0, jobs=2)
    assert len(cached("0*.arrow")) > len(before)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert cached("*.partial") == []
    assert [found[k].question for k in (0, 15_000, 29_999)] == [
        "question 0",
        "question 15000",
        "question 29999",
    ]
    assert len(found) == 30_000


def test_who_finds_another_at_it_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.jsonl", rows(3))
    monkeypatch.setattr(store, "_LOCK_WAIT", 0.0)
    where = shards.folder(sources.origins(source)[0])
    where.mkdir(parents=True)
    other, said = FileLock(where / ".lock"), list[tuple[str, int]]()
    other.acquire()

    def tell(label: str, done: int, total: int) -> None:
        said.append((label, done))
        if other.is_locked:
            other.release()

    assert len(open_pool([source], seed=0, progress=tell)) == 3
    waiting = f"waiting for another process that is converting {source.path}"
    assert said[:2] == [(waiting, 0), (waiting, 1)]


def test_a_file_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, raw = save(tmp_path / "a.jsonl", rows(5)), sources.rows

    def while_it_grows(*given: Any) -> Iterator[Any]:
        yield from raw(*given)
        with Path(source.path).open("a") as stream:
            stream.write(json.dumps(rows(1, start=9)[0]) + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "rows", while_it_grows)
        with pytest.raises(
            DataError,
            match=r"a\.jsonl: changed or vanished while it was converted; run again once it is",
        ):
            read(source)
    assert cached("*.arrow") == cached("*.partial") == []
    assert len(read(source)) == 6


@pytest.mark.parametrize(
    "damage",
    ["cut", "gone", "whole.json", "00000.json", "rows.npy", "empty", "left_out.json", "known"],
)
def test_what_is_damaged_in_the_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    source = save(tmp_path / "a.jsonl", [*rows(5), rows(1)[0]])
    whole = read(source)
    (arrow,) = cached("*.arrow")
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:-9])
    elif damage == "gone":
        arrow.unlink()
    elif damage == "empty":
        cached("rows.npy")[0].write_bytes(b"")
    else:
        (file,) = cached("known/*.json") if damage == "known" else cached(damage)
        file.write_text("{")
    assert read(source) == whole
    assert len(whole) == 5
    assert len(open_pool([source], seed=0)) == 5


@pytest.mark.parametrize("what", ["duplicates are looked for", "a row is read"])
def test_a_shard_that_is_damaged_at_its_full_size_is_said_and_then_made_anew(
    tmp_path: Path, what: str
) -> None:
    source = save(tmp_path / "a.jsonl", rows(5))
    whole = read(source)
    (arrow,) = cached("*.arrow")
    arrow.write_bytes(bytes(arrow.stat().st_size))
    if what == "duplicates are looked for":
        cached("rows.npy")[0].unlink()
    with pytest.raises(
        StoreError, match=r"00000\.arrow: damaged \(.*\); run again, it is converted anew then"
    ):
        read(source)
    assert read(source) == whole


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            OSError(28, "No space left on device"),
            "free some space, or set FULCRUM_CACHE to another folder",
        ),
        (
            OSError(13, "Permission denied"),
            "mend its permissions, or set FULCRUM_CACHE to another folder",
        ),
        (OSError(30, "Read-only file system"), "; set FULCRUM_CACHE to another folder"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_remedies_are_those_of_the_error(tmp_path: Path, error: OSError, remedy: str) -> None:
    assert str(shards.unwritable(tmp_path, error)).endswith(remedy)


def test_long_rows_fill_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 300)
    texts = ["a" * length for length in (100, 100, 400, 1, 1, 1)]
    source = save(
        tmp_path / "a.jsonl",
        [{"prompt": f"p{k}", "completion": text} for k, text in enumerate(texts)],
    )
    assert [row.answer for row in read(source)] == texts
    (arrow,) = cached("*.arrow")
    reader = pa.ipc.open_file(arrow)
    assert [reader.get_batch(k).num_rows for k in range(reader.num_record_batches)] == [2, 1, 3]


def test_a_whole_pool_is_opened_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.jsonl", rows(5))
    whole = read(source)

    def refused(*_: Any) -> None:
        raise StoreError("read-only")

    monkeypatch.setattr(store, "_write", refused)
    monkeypatch.setattr(store, "locked", refused)
    assert read(source) == whole
    for known in cached("known/*.json"):
        known.unlink()  # the file is then hashed again, each time
    assert read(source) == whole


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.jsonl", rows(5))

    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write_batch(self, batch: pa.RecordBatch) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", lambda *_: Full())
        with pytest.raises(
            StoreError,
            match=r"cannot be used: No space left on device; free some space, or set FULCRUM_CACHE",
        ):
            read(source)
    assert cached("*.arrow") == cached("*.partial") == []
    assert len(read(source)) == 5


def test_a_dead_worker_and_an_unreadable_file_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", 100)
    source = save(tmp_path / "a.jsonl", rows(9))

    class Dead:
        def map(self, *_: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self, **_: Any) -> None: ...

    @contextmanager
    def start(jobs: int) -> Iterator[Dead]:
        yield Dead()

    with monkeypatch.context() as patch:
        patch.setattr(processes, "start", start)
        with pytest.raises(
            StoreError,
            match=r"a\.jsonl: a process that converts it died .* what is converted is kept",
        ):
            open_pool([source], seed=0, jobs=2)
        assert len(open_pool([source], seed=0)) == 9  # converted by one
        with pytest.raises(StoreError, match=r"looking for near-duplicates: a process died"):
            open_pool([source], seed=0, near=0.9, jobs=2)
    unreadable = Path(source.path)

    def forbidden(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "file_sha256", forbidden)
    unreadable.write_text(unreadable.read_text() + "\n")
    with pytest.raises(
        DataError, match=r"a\.jsonl: cannot be read: Permission denied; check its permissions"
    ):
        read(source)


class Broken:
    """A stream from the hub that gives some rows and then none."""

    def shuffle(self, **_: Any) -> "Broken":
        return self

    info = "described"
    features = None

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from rows(105)
        raise ConnectionError("reset by peer")


def test_a_stream_is_pinned_and_its_limit_counts_usable_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets.Dataset.from_list(
        [{**row, "completion": "" if k % 3 else "x"} for k, row in enumerate(rows(90))]
    )
    asked: list[tuple[str | None, bool]] = []

    def load(
        name: str, config: str | None, split: str, revision: str | None, *, stream: bool = False
    ) -> Any:
        asked.append((revision, stream))
        return data.to_iterable_dataset()

    monkeypatch.setattr(sources, "hub", load)
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision: "abc123")
    monkeypatch.setattr(sources, "PART_ROWS", 20)
    monkeypatch.setattr(sources, "_BUFFER", 1)
    source = GeneralSource(path="some/thing", stream=True, limit=13)
    found = open_pool([source], seed=0)
    assert len(found) == 13
    assert found.left_out == {"empty answer": 24}  # of rows 0 to 36
    assert set(asked) == {("abc123", True)}
    (whole,) = cached("whole.json")
    assert json.loads(whole.read_text())["commit"] == "abc123"
    whole.unlink()
    cached("00001.json")[0].unlink()  # killed in its second part: the first is read and passed over
    again = open_pool([source], seed=0)
    assert [again[k] for k in range(13)] == [found[k] for k in range(13)]
    everything = open_pool([source.model_copy(update={"limit": 500})], seed=0)
    assert (len(everything), everything.left_out) == (30, {"empty answer": 60})

    # The hub answers without saying the commit: the one that is known is read, and stays known.
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision: None)
    assert open_pool([source], seed=0).notes == (
        "some/thing: the hub does not say its commit; the last one known is read, abc123",
        "some/thing: not read: column kind (columns: {input: kind} would read it) in 37 of 37 rows",
    )
    assert asked[-1] == ("abc123", True)

    def unreachable(*given: Any, **named: Any) -> None:
        raise UnreachableError("no network")

    monkeypatch.setattr(sources, "hub", unreachable)
    assert open_pool([source], seed=0).notes == (
        "some/thing: the hub cannot be reached; what was last read of it (commit abc123) is used",
        "some/thing: not read: column kind (columns: {input: kind} would read it) in 37 of 37 rows",
    )

    def gone(*given: Any, **named: Any) -> None:
        raise DataError("some/thing: gated")

    monkeypatch.setattr(
        sources, "hub", gone
    )  # an answer, if no welcome one: what was known must not hide it
    with pytest.raises(DataError, match="some/thing: gated"):
        open_pool([source], seed=0)
    monkeypatch.setattr(sources, "hub", lambda *_, **__: Broken())
    with pytest.raises(
        DataError,
        match=r"some/thing: the stream broke off: reset by peer; run again: what was converted is",
    ):
        open_pool([source.model_copy(update={"limit": 300})], seed=0)
    assert len(cached("00004.json")) == 2  # the other is of the stream of 90 rows


def test_a_stream_that_became_shorter_is_refused_and_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(90)
    monkeypatch.setattr(
        sources, "hub", lambda *_, **__: datasets.Dataset.from_list(given).to_iterable_dataset()
    )
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision: "abc123")
    monkeypatch.setattr(sources, "PART_ROWS", 20)
    source = GeneralSource(path="some/thing", stream=True, limit=80)
    assert len(open_pool([source], seed=0)) == 80
    cached("whole.json")[0].unlink()
    given = rows(30)
    with pytest.raises(
        DataError, match=r"some/thing: gives fewer rows than when its conversion began; run again"
    ):
        open_pool([source], seed=0)
    assert len(open_pool([source], seed=0)) == 30


def test_what_a_limit_leaves_undrawn_makes_no_other_row_a_repeat(tmp_path: Path) -> None:
    one = save(tmp_path / "a.jsonl", rows(50)).model_copy(update={"limit": 10})
    two = save(tmp_path / "b.jsonl", rows(50))
    for near in (0.0, 0.9):
        found = open_pool([one, two], seed=0, near=near)
        assert len({found[k].question for k in range(len(found))}) == len(found) == 50
        assert found.left_out == {"not drawn (limit)": 40, "duplicate": 10}
        assert [part.stop - part.start for part in found.stretches] == [10, 40]
    more = open_pool([one.model_copy(update={"limit": 20})], seed=0)
    assert {found[k].origin for k in range(10)} < {more[k].origin for k in range(20)}  # nested


def test_no_general_data_is_a_pool_of_none_for_several_processes_too() -> None:
    assert len(open_pool([], seed=0, near=0.8, jobs=2)) == 0


def test_patterns_are_stars_and_question_marks_and_fit_any_of_a_list(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [
            {"prompt": f"p{k}", "completion": "a", "tags": tags, "kind": kind, "more": {"a": k}}
            for k, (tags, kind) in enumerate(
                [(["x", "y"], "[a]"), (["z"], "a"), ([], "[b]"), (None, None)]
            )
        ]
    )
    pq.write_table(table, tmp_path / "a.parquet")

    def left(**changes: Any) -> list[str]:
        return [
            row.question for row in read(GeneralSource(path=str(tmp_path / "a.parquet"), **changes))
        ]

    assert left(include={"tags": ("y", "z")}) == ["p0", "p1"]
    assert left(exclude={"tags": ("y",)}) == ["p1", "p2", "p3"]
    assert left(include={"kind": ("[a]",)}) == ["p0"]
    assert left(include={"kind": ("[?]",)}) == ["p0", "p2"]
    with pytest.raises(DataError, match=r"include: more: its values are objects"):
        left(include={"more": ("*",)})


def test_settings_that_use_other_rows_are_other_pools(tmp_path: Path) -> None:
    content = [{**row, "answer": f"other {k}"} for k, row in enumerate(rows(30))]
    source = save(tmp_path / "a.jsonl", content)
    columns = {"prompt": "prompt", "completion": "answer"}
    given: list[dict[str, Any]] = [
        {"exclude": {"kind": "a"}},
        {"exclude": {"kind": "b"}},
        {"columns": columns},
        {"min_words": 5},
    ]
    texts = []
    for changes in given:
        own = open_pool([GeneralSource.model_validate({"path": source.path, **changes})], seed=0)
        texts.append([(own[k].question, own[k].answer) for k in range(len(own))])
    assert list(map(len, texts)) == [20, 20, 30, 0]
    assert texts[0] != texts[1]
    assert texts[2][3] == ("question 3", "other 3")
    limited = source.model_copy(update={"limit": 10})
    drawn = [
        {row.origin for row in map(own.__getitem__, range(10))}
        for own in (open_pool([limited], seed=s) for s in (0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_that_may_not_stand_beside_the_task_take_no_part_of_a_weight(tmp_path: Path) -> None:
    leaks = [{"prompt": f"leak {k}", "completion": "a"} for k in range(60)]
    sources = [
        save(tmp_path / "a.jsonl", [*leaks, *rows(40)]).model_copy(update={"weight": 1.0}),
        save(tmp_path / "b.jsonl", rows(60, start=100)).model_copy(update={"weight": 1.0}),
    ]
    chosen = select(
        open_pool(sources, seed=0),
        60,
        Exclusions((), ()),
        seed=0,
        fits=lambda row: "leak" if "leak" in row.question else None,
    )
    assert sum(row.origin.startswith(sources[0].path) for row in chosen.examples) == 30


def test_folders_say_what_they_do_not_read_and_odd_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "A.JSONL.GZ").write_bytes(gzip.compress(json.dumps(rows(1)[0]).encode()))
    (folder / "b.csv").write_text(f"prompt,completion\nlong,{'x' * 200_000}\n")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pq.write_table(pa.table({"messages": [json.dumps(turns), "[1", "{}"]}), folder / "c.parquet")
    (folder / "notes.txt").write_text("not data")
    (folder / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    found = open_pool([GeneralSource(path=str(folder))], seed=0)
    assert [(found[k].question, len(found[k].answer)) for k in range(len(found))] == [
        ("question 0", 8),
        ("long", 200_000),
        ("hi", 2),
    ]
    assert found.left_out == {"not a list of messages": 2}
    assert found.notes == (
        f"{folder}/A.JSONL.GZ: not read: column kind (columns: {{input: kind}} would read it) "
        "in 1 of 1 rows",
        f"{folder}: not read, being no data files: gone.jsonl, notes.txt",
    )
    (folder / "b.csv").rename(folder / os.fsdecode(b"\xff.csv"))
    with pytest.raises(DataError, match=r"its name is not valid UTF-8; rename it"):
        open_pool([GeneralSource(path=str(folder))], seed=0)
