"""General data become shards once: rows counted, cut anywhere, resumed, by several processes; the
same in every form."""

import gzip
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from fulcrum.config.base import GeneralSource
from fulcrum.config.settings import settings_from_dict
from fulcrum.core.errors import ConfigError, DataError, UnreachableError
from fulcrum.core.types import Example, Message
from fulcrum.data import filters, readers, shards, sources
from fulcrum.data.pool import Exclusions, open_pool, select
from helpers.commands import done, refused
from helpers.shards import read, rows, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))


def forms(folder: Path, content: list[dict[str, str]]) -> dict[str, Path]:
    """The same rows in every kind of file."""
    table = pa.Table.from_pylist(content)
    text = "".join(json.dumps(row) + "\n" for row in content)
    found = {
        name: folder / f"rows.{name}"
        for name in ("jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "stream.arrow")
    }
    found["jsonl"].write_text("\ufeff" + text)
    found["jsonl.gz"].write_bytes(gzip.compress(text.encode()))
    found["json"].write_text(json.dumps(content))
    found["csv"].write_text(
        "prompt,completion,kind\n" + "".join(",".join(row.values()) + "\n" for row in content)
    )
    pq.write_table(table, found["parquet"], row_group_size=7)
    with pa.ipc.new_file(found["arrow"], table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pa.ipc.new_stream(found["stream.arrow"], table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return found


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "stream.arrow"]
)
def test_every_form_cut_anywhere_gives_the_same_rows_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(sources, "PART_ROWS", 8)
    monkeypatch.setattr(sources, "_PART_BYTES", 300)
    monkeypatch.setattr(sources, "_BATCH", 3)
    monkeypatch.setattr(shards, "_BATCH_ROWS", 3)
    content = rows(40)
    content[5]["completion"] = ""
    path = forms(tmp_path, content)[form]
    found = open_pool([GeneralSource(path=str(path))], seed=0)
    texts = [(row.question, row.answer) for row in (found[k] for k in range(len(found)))]
    assert texts == [(row["prompt"], row["completion"]) for row in content if row["completion"]]
    # A row's number is its line in text, its row in lists and tables; a CSV file has a header.
    assert [found[k].origin.rpartition(":")[2] for k in (0, 38)] == (
        ["2", "41"] if form == "csv" else ["1", "40"]
    )
    assert found.left_out == {"empty answer": 1}
    assert (
        len(list(shards.folder(sources.origins(GeneralSource(path=str(path)))[0]).glob("*.arrow")))
        >= 3
    )


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz"])
def test_a_killed_conversion_goes_on_and_converts_no_part_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", 200)
    monkeypatch.setattr(sources, "PART_ROWS", 6)
    content = rows(60)
    save(tmp_path / "a.jsonl", content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    source = GeneralSource(path=str(tmp_path / name))
    write, written = shards._write, list[int]()

    def counted(origin, where, shape, part, *own):
        if len(written) == 4 and not resumed:
            (where / f".{part.place:05}.arrow.1.partial").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(part.place)
        return write(origin, where, shape, part, *own)

    monkeypatch.setattr(shards, "_write", counted)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        open_pool([source], seed=0)
    assert written == [0, 1, 2, 3]
    resumed = True
    found = read(source)
    assert read(source) == found  # now from the cache
    assert written == list(range(len(written)))
    assert not list(Path(os.environ["FULCRUM_CACHE"]).rglob("*.partial"))
    assert len(written) > 6
    assert [row.question for row in found] == [row["prompt"] for row in content]


@pytest.mark.e2e
def test_several_processes_give_what_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", 300)
    alike = [
        {"prompt": "one two three four five six " * 2 + f"word {k}", "completion": "so"}
        for k in range(2)
    ]
    source = save(tmp_path / "a.jsonl", [*rows(30), *alike])
    pool = open_pool([source], seed=0, near=0.5, jobs=2)
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "other"))
    alone = open_pool([source], seed=0, near=0.5)
    assert [pool[k] for k in range(len(pool))] == [alone[k] for k in range(len(alone))]
    assert pool.left_out == alone.left_out == {"near-duplicate": 1}
    assert [row.origin for row in map(alone.__getitem__, range(30))] == [
        f"{source.path}:{k}" for k in range(1, 31)
    ]


def test_a_copy_elsewhere_and_another_weight_convert_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.jsonl", rows(5))
    read(source)
    save(tmp_path / "b.jsonl", rows(5))
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("converted anew"))
    assert {
        row.origin for row in read(GeneralSource(path=str(tmp_path / "b.jsonl"), weight=2))
    } == {f"{tmp_path / 'b.jsonl'}:{k}" for k in range(1, 6)}
    with pytest.raises(pytest.fail.Exception):
        read(source.model_copy(update={"min_words": 1}))  # uses other rows


def test_rows_are_chosen_by_columns_language_and_length(tmp_path: Path) -> None:
    content = [
        {
            "prompt": "Where does the river that crosses this town come from?",
            "completion": "From the hills.",
            "family": "qa",
        },
        {
            "prompt": "Hvaðan kemur áin sem rennur í gegnum þennan bæ á sumrin?",
            "completion": "Frá fjöllunum.",
            "family": "qa",
        },
        {
            "prompt": "Summarise the story of the two brothers and the fox.",
            "completion": "They part.",
            "family": "summary/1",
        },
        {"prompt": "Say yes.", "completion": "Yes.", "family": "other"},
        {
            "prompt": "No family is given in this one, so that it is in none.",
            "completion": "Right.",
        },
    ]
    source = save(tmp_path / "a.jsonl", content)

    def left(**changes: object) -> tuple[list[int], dict[str, int]]:
        pool = open_pool([GeneralSource.model_validate({"path": source.path, **changes})], seed=0)
        return [int(pool[k].origin.rpartition(":")[2]) for k in range(len(pool))], dict(
            pool.left_out
        )

    assert left(include={"family": ["qa", "summary/*"]}) == (
        [1, 2, 3],
        {"not among include: family": 2},
    )
    assert left(exclude={"family": "qa"}) == ([3, 4, 5], {"among exclude: family": 2})
    assert left(languages=["en"]) == ([1, 3, 4, 5], {"not in en": 1})  # two words tell no language
    assert left(languages=["is", "en"]) == ([1, 2, 3, 4, 5], {})
    told = (
        "You are a helpful assistant who answers in the language of the question, briefly and with "
        "great care, as asked."
    )
    save(
        tmp_path / "a.jsonl", [{**row, "system": told} for row in content]
    )  # a system text tells no row's language
    assert left(languages=["is"]) == ([2, 4], {"not in is": 3})
    save(tmp_path / "a.jsonl", content)
    assert left(min_words=5, max_words=13) == ([1, 2, 3], {"under 5 words": 1, "over 13 words": 1})
    with pytest.raises(
        ValidationError,
        match="lang: YAML reads yes, no, on, off and true, false as truth values; quote them",
    ):
        left(include={"lang": ["en", False]})
    save(
        tmp_path / "a.jsonl",
        [{**row, "keep": k % 2 == 0, "year": 2020.0 + k} for k, row in enumerate(content)],
    )
    assert left(include={"keep": "true"}) == ([1, 3, 5], {"not among include: keep": 2})
    assert left(exclude={"keep": "false", "year": 2020}) == (
        [3, 5],
        {"among exclude: keep": 2, "among exclude: year": 1},
    )
    save(tmp_path / "a.jsonl", content)
    with pytest.raises(
        DataError,
        match=r"a\.jsonl: `include:` names 'famly', which is no column; did you mean 'family'\?",
    ):
        left(include={"famly": "qa"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<|im_start|>user", "holds a template's marker"),
        ("tell me [/INST] yes", "holds a template's marker"),
        ("fine</s>", "holds a template's marker"),
        ("x\n### Response:\ny", "holds a template's marker"),
        ("a <start_of_turn>b", "holds a template's marker"),
        ("caf\ufffd", "holds broken characters"),
        ("nul\x00", "holds broken characters"),
        ("a <|> b, 3 < 4 || 5 > 4, <s>struck</s> out, a[0]/INST", None),
        ("tab\tand\nline", None),
    ],
)
def test_damage_is_seen_and_ordinary_text_is_not_taken_for_it(
    text: str, reason: str | None
) -> None:
    row = Example((Message("user", "q"), Message("assistant", text)), "g", "f:1")
    found = filters.unfit(row, GeneralSource(path="f"))
    assert (found.reason if found else None) == reason


def test_weights_divide_the_mix_by_rows_or_tokens_and_nest(tmp_path: Path) -> None:
    long = [{"prompt": f"long {k}", "completion": "w " * 9} for k in range(200)]
    sources = [
        save(tmp_path / "a.jsonl", rows(200)).model_copy(update={"weight": 3.0}),
        save(tmp_path / "b.jsonl", long).model_copy(update={"weight": 1.0}),
    ]
    pool = open_pool(sources, seed=0)

    def pick(count: int, size=lambda row: 1):
        return select(pool, count, Exclusions((), ()), seed=4, fits=lambda _: None, size=size)

    names = [row.origin.split("/")[-1][0] for row in pick(100).examples]
    assert Counter(names) == {"a": 75, "b": 25}
    assert all(abs(names[:k].count("b") - k / 4) <= 1 for k in range(1, 100))
    assert [row.origin for row in pick(40).examples] == [
        row.origin for row in pick(100).examples[:40]
    ]
    by_tokens = pick(120, lambda row: 10 if row.question.startswith("long") else 2).examples
    tokens = Counter[str]()
    for row in by_tokens:
        tokens[row.origin.split("/")[-1][0]] += 10 if row.question.startswith("long") else 2
    assert tokens["a"] / tokens["b"] == pytest.approx(3, abs=0.3)
    everything = pick(400)
    assert (len(everything.examples), everything.exhausted) == (400, False)
    assert everything.dry == (sources[0].path,)  # a ran out; b gave the rest, and that is said
    assert pick(200).dry == ()


def similar_pair(
    rng: np.random.Generator, words: list[str], length: int, changes: int
) -> tuple[list[str], list[str]]:
    text = list(rng.choice(words, length))
    other = list(text)
    for place in rng.choice(length, changes, replace=False):
        other[place] = "changed" + str(place)
    return text, other


def test_near_duplicates_are_found_at_the_stated_recall_and_none_is_invented(
    tmp_path: Path,
) -> None:
    """Of pairs whose similarity is 0.8 or more at least 98% go; of others none does, since
    similarity is computed exactly."""
    rng = np.random.default_rng(0)
    vocabulary = [f"w{k}" for k in range(3000)]
    pairs = [
        similar_pair(rng, vocabulary, 60, changes)
        for changes in [1] * 150 + [2] * 150 + [3] * 150 + [6] * 150
    ]
    content = [{"prompt": " ".join(a), "completion": "same answer"} for a, _ in pairs]
    content += [{"prompt": " ".join(b), "completion": "same answer"} for _, b in pairs]
    content += [
        {"prompt": " ".join(rng.choice(vocabulary, 60)), "completion": "same answer"}
        for _ in range(1000)
    ]
    pool = open_pool([save(tmp_path / "a.jsonl", content)], seed=0, near=0.8)
    gone = set(range(len(content))) - {
        int(pool[k].origin.rpartition(":")[2]) - 1 for k in range(len(pool))
    }

    def similarity(k: int) -> float:
        a, b = (filters.shingles([text, "same answer"]) for text in map(" ".join, pairs[k]))
        return len(a & b) / len(a | b)

    alike = {len(pairs) + k for k in range(len(pairs)) if similarity(k) >= 0.8}
    assert len(alike) >= 280
    assert gone <= alike
    assert len(gone) >= 0.98 * len(alike)
    assert pool.left_out == {"near-duplicate": len(gone)}
    assert pool.shown[0].detail.endswith("a.jsonl:1")
    assert len(open_pool([GeneralSource(path=str(tmp_path / "a.jsonl"))], seed=0)) == len(content)


@pytest.mark.e2e
def test_near_duplicates_are_found_among_rows_of_one_template() -> None:
    """All rows are alike by 0.78, and so share bands with hundreds of others: those alike by more
    than 0.8 are found still."""
    rng = np.random.default_rng(0)
    template = [f"t{k}" for k in range(100)]
    texts = [[*template, *(f"w{k}" for k in rng.integers(0, 50_000, 14))] for _ in range(2500)]
    for k in range(0, 1000, 10):  # one word of the last 14 changed
        place = 100 + int(rng.integers(14))
        texts.append([*texts[k][:place], "changed", *texts[k][place + 1 :]])
    order = rng.permutation(len(texts))
    rows = [filters.shingles([" ".join(texts[k])]) for k in order]
    found = filters.near_duplicates(filters.bands(rows, 0.8), lambda row: (rows[row],), 0.8)
    assert (
        98
        <= sum(max(order[later], order[earlier]) >= 2500 for later, earlier, _ in found)
        <= len(found)
        == 100
    )
    assert all(
        similarity == len(rows[a] & rows[b]) / len(rows[a] | rows[b]) >= 0.8
        for a, b, similarity in found
    )
    assert {(min(order[a], order[b])) for a, b, _ in found} == set(range(0, 1000, 10))


def test_a_cluster_keeps_its_first_row() -> None:
    """A thousand rows that differ in one word each: all but the first go, though most of their
    neighbours are gone."""
    rows = [
        filters.shingles([" ".join([*(f"w{k}" for k in range(40)), f"own{row}"])])
        for row in range(1000)
    ]
    found = filters.near_duplicates(filters.bands(rows, 0.8), lambda row: (rows[row],), 0.8)
    assert [(later, earlier) for later, earlier, _ in found] == [(row, 0) for row in range(1, 1000)]


def test_repeats_within_and_between_sources_keep_the_first(tmp_path: Path) -> None:
    one = save(
        tmp_path / "a.jsonl", [*rows(5), {"prompt": "QUESTION  1", "completion": "Answer 1"}]
    )
    two = save(tmp_path / "b.jsonl", [*rows(4, start=3), *rows(1, start=9)])
    pool = open_pool([one, two], seed=0)
    assert [pool[k].question for k in range(len(pool))] == [
        f"question {k}" for k in (0, 1, 2, 3, 4, 5, 6, 9)
    ]
    assert pool.left_out == {"duplicate": 3}
    assert {(r.origin, r.detail) for r in pool.shown} == {
        (f"{one.path}:6", f"same as {one.path}:2"),
        (f"{two.path}:1", f"same as {one.path}:4"),
        (f"{two.path}:2", f"same as {one.path}:5"),
    }
    assert [(part.start, part.stop) for part in pool.stretches] == [(0, 5), (5, 8)]


def test_beyond_a_million_rows_exact_repeats_alone_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "NEAR_ROWS", 3)
    text = " ".join(f"w{k}" for k in range(40))
    source = save(
        tmp_path / "a.jsonl", [{"prompt": f"{text} {k}", "completion": "a"} for k in range(5)]
    )
    pool = open_pool([source], seed=0, near=0.8)
    assert len(pool) == 5
    assert pool.notes == (
        "near-duplicates are sought in pools of up to 3 rows; this one has 5: exact ones only",
    )
    drawn = open_pool([source.model_copy(update={"limit": 3})], seed=0, near=0.8)
    assert (len(drawn), drawn.left_out) == (1, {"not drawn (limit)": 2, "near-duplicate": 2})
    monkeypatch.setattr(filters, "NEAR_ROWS", 5)
    pool = open_pool([source], seed=0, near=0.8)
    assert (len(pool), pool.notes) == (1, ())


def test_a_hub_data_set_is_converted_whole_or_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = datasets.Dataset.from_list(rows(30))
    asked: list[bool] = []

    def load(name, config, split, revision, *, stream=False):
        asked.append(stream)
        assert (name, split) == ("some/thing", "train")
        return data.to_iterable_dataset() if stream else data

    monkeypatch.setattr(sources, "hub", load)
    monkeypatch.setattr(sources, "PART_ROWS", 8)
    whole = read(GeneralSource(path="some/thing", exclude={"kind": "a"}))
    assert [row.origin for row in whole[:2]] == ["some/thing:2", "some/thing:3"]
    assert (len(whole), any(asked)) == (20, False)
    monkeypatch.setattr(sources, "_BUFFER", 30)
    streamed = read(GeneralSource(path="some/thing", stream=True, limit=12))
    assert len(streamed) == 12
    assert any(
        int(b.question.split()[1]) < int(a.question.split()[1]) for a, b in pairwise(streamed)
    )  # shuffled
    assert asked[-1]

    def unreachable(*given, **named):
        raise UnreachableError("no network")

    monkeypatch.setattr(sources, "hub", unreachable)  # what was converted stays usable
    assert read(GeneralSource(path="some/thing", stream=True, limit=12)) == streamed
    with pytest.raises(DataError, match="no network"):
        read(GeneralSource(path="some/thing", stream=True, limit=13))
    monkeypatch.setattr(sources, "hub", load)
    commits = iter(["one", "one", "two"])
    monkeypatch.setattr(sources, "hub_commit", lambda name, revision: next(commits))
    source = GeneralSource(path="some/thing", stream=True, limit=12)
    (first,), (again,), (moved,) = (sources.origins(source) for _ in range(3))
    assert shards.folder(first) == shards.folder(again) != shards.folder(moved)


def test_a_file_that_keeps_its_size_and_time_is_read_again(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", rows(3))
    assert read(source)[0].question == "question 0"
    before = (tmp_path / "a.jsonl").stat()
    (tmp_path / "a.jsonl").write_text(
        (tmp_path / "a.jsonl").read_text().replace("question 0", "question 7")
    )
    os.utime(tmp_path / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(source)[0].question == "question 7"


def test_a_copy_of_another_kind_is_not_taken_for_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", rows(2))
    assert len(read(source)) == 2
    (tmp_path / "a.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"a\.json:2: broken JSON"):
        read(GeneralSource(path=str(tmp_path / "a.json")))


def test_an_unknown_language_is_named_before_anything_is_converted(tmp_path: Path) -> None:
    source = save(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(DataError, match=r"languages: 'EN' is no code that can be told"):
        read(source.model_copy(update={"languages": ("EN",)}))


def test_rows_of_two_formats_and_broken_tables_are_refused(tmp_path: Path) -> None:
    mixed = save(
        tmp_path / "a.jsonl", [{"query": "q", "response": "a"}, {"instruction": "i", "output": "o"}]
    )
    with pytest.raises(
        DataError,
        match=r"rows of 2 formats stand in this file: query\+response .*a\.jsonl:1\) and Alpaca",
    ):
        read(mixed)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"b\.parquet: not readable as parquet: "):
        read(GeneralSource(path=str(tmp_path / "b.parquet")))
    assert readers.suffix(Path("x.JSONL.GZ")) == ".jsonl.gz"


def test_the_pool_commands_count_show_and_check(tmp_path: Path) -> None:
    source = save(
        tmp_path / "pool.jsonl",
        [*rows(20), rows(1)[0], {"prompt": "p", "completion": "<|im_end|>"}],
    )
    text = done("pool", "build", source.path, "--jobs", "1")
    assert "20 rows; left out: 2" in text
    assert "1 × duplicate" in text
    assert "1 × holds a template's marker" in text
    assert "median 4" in done("pool", "info", source.path)
    shown = done("pool", "sample", source.path, "-n", "2", "--seed", "1")
    assert shown.count("user: question") == shown.count("assistant: answer") == 2
    assert shown != done("pool", "sample", source.path, "-n", "2", "--seed", "2")
    leak = "which of these many questions was asked in the test of the task today"
    save(
        tmp_path / "pool.jsonl",
        [*rows(20), {"prompt": f"Tell me {leak}", "completion": "that one"}],
    )
    for name in ("train", "test"):
        save(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"{name} {k}", "completion": "x"} for k in range(4)],
        )
    save(tmp_path / "test.jsonl", [{"prompt": leak, "completion": "yes"}])
    (tmp_path / "run.yaml").write_text(
        f"task: {{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl, anchor: Say "
        f"it.}}\ngeneral: {source.path}\n"
    )
    text = done("pool", "check", tmp_path / "run.yaml")
    assert "beside the tasks: 20 rows may stand, 1 may not" in text
    assert f"shares a 13-gram with task or held-out data: {source.path}:21: which of these" in text
    assert "which says what the task rows are" in refused("pool", "check", source.path)
    assert "no such file" in refused("pool", "build", tmp_path / "nothing.jsonl")
    for command in ("build", "info", "sample", "check"):
        assert "run.yaml: `general:` names no data" in refused(
            "pool",
            command,
            tmp_path / "run.yaml",
            "--set",
            "general=[]",
            "--set",
            "mix.general_per_task=0",
        )
    assert "--set changes a settings file" in refused(
        "pool", "info", source.path, "--set", "seed=1"
    )
    assert "21 rows" in done(
        "pool", "info", tmp_path / "run.yaml", "--set", "clean.near_duplicates=0", "--set", "seed=3"
    )


def test_weights_are_given_to_all_sources_or_to_none(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", rows(3))
    given = {"task": {"train": "t.jsonl"}, "general": [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]}
    with pytest.raises(
        ConfigError,
        match=r"weight is given for a\.jsonl and not for b\.jsonl; give every source one, or none",
    ):
        settings_from_dict(given)


def test_near_duplicates_are_sought_among_drawn_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit saves the time that the other rows would take."""
    source = save(tmp_path / "a.jsonl", rows(60)).model_copy(update={"limit": 20})
    looked: list[int] = []
    bands = filters.bands

    def spied(given, threshold):
        given = list(given)
        looked.append(len(given))
        return bands(given, threshold)

    monkeypatch.setattr(filters, "bands", spied)
    pool = open_pool([source], seed=0, near=0.8)
    assert (sum(looked), len(pool)) == (20, 20)
