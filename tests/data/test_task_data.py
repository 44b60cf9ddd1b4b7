"""Row formats, files, hub data sets, splits and the check for overlap: literal rows in, literal
examples or errors out."""

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fulcrum.config.base import DataSource
from fulcrum.core.errors import DataError
from fulcrum.core.types import Example, Message, Reject
from fulcrum.data import readers
from fulcrum.data.task_data import check_overlap, read, require_rows, split, subset


@pytest.fixture(autouse=True)
def _own_arrow_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("arrow"))


def jsonl(path: Path, *rows: object) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def turns(example: Example) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in example.messages]


def example(
    question: str,
    answer: str = "a",
    group: str | None = None,
    origin: str = "x:1",
    system: str = "",
) -> Example:
    before = (Message("system", system),) if system else ()
    return Example(
        (*before, Message("user", question), Message("assistant", answer)),
        group or question,
        origin,
    )


def pair(question: str, answer: str | None) -> dict[str, object]:
    return {"prompt": question, "completion": answer}


# --- row formats
# --------------------------------------------------------------------------------------------------

QA = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "2+2?"},
                    {"role": "assistant", "content": "4"},
                ]
            },
            QA,
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            QA,
        ),
        ({"prompt": "2+2?", "completion": "4", "family": "sums"}, QA),
        (
            {
                "prompt": [{"role": "user", "content": "2+2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            QA,
        ),
        ({"instruction": "2+2?", "input": "", "output": "4"}, QA),
        ({"instruction": "2+2?", "output": "4", "text": "2+2? 4"}, QA),
        (
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            [("user", "Add.\n2 2"), ("assistant", "4")],
        ),
        ({"query": "2+2?", "response": "4"}, QA),
        ({"question": "2+2?", "answer": "4"}, QA),
        ({"problem": "2+2?", "solution": "4"}, QA),
        (
            {"query": "2+2?", "target": "4", "system": "Be short.", "history": None},
            [("system", "Be short."), *QA],
        ),
        (
            {"query": "2+2?", "response": "4", "history": [["Hi", "Hello"]]},
            [("user", "Hi"), ("assistant", "Hello"), *QA],
        ),
        (
            {
                "messages": [{"role": "human", "content": "2+2?"}, {"role": "gpt", "content": "4"}],
                "system": "S",
            },
            [("system", "S"), *QA],
        ),
    ],
)
def test_each_format_is_recognised(tmp_path, row, expected):
    examples, rejects = read([jsonl(tmp_path / "a.jsonl", row)])
    assert rejects == []
    assert [turns(e) for e in examples] == [expected]
    assert examples[0].origin == f"{tmp_path / 'a.jsonl'}:1"


@pytest.mark.parametrize("key", ["weight", "loss"])
def test_weight_zero_and_a_prompts_own_answers_are_not_trained(tmp_path, key):
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in chat]
    weighted = [messages[0], {**messages[1], key: 0}, messages[2], {**messages[3], key: 1}]
    for row in ({"messages": weighted}, {"prompt": messages[:3], "completion": messages[3:]}):
        (only,), _ = read([jsonl(tmp_path / "a.jsonl", row)])
        assert [m.train for m in only.messages if m.role == "assistant"] == [False, True]


def user_says(*rest: dict[str, object]) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, *rest]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("q", ""), "empty answer"),
        (pair("q", None), "empty answer"),
        (pair(" \n", "a"), "empty prompt"),
        ({"messages": []}, "empty prompt"),
        ({"prompt": "q", "completion": {"a": 4}}, "not text"),
        ({"prompt": ["q"], "completion": "a"}, "not a list of messages"),
        ({"messages": "user: hi"}, "not a list of messages"),
        (user_says(), "last message is not the assistant's"),
        (user_says({"role": "boss", "content": "a"}), "unknown role"),
        (
            user_says({"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}),
            "message part is not text",
        ),
        (
            user_says({"role": "assistant", "content": "a", "weight": 0}),
            "every answer has weight 0",
        ),
        (user_says({"role": "assistant", "content": "a", "weight": 0.5}), "weight is not 0 or 1"),
        (
            user_says({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}),
            "message key tool_calls is not supported",
        ),
        (
            {**user_says({"role": "assistant", "content": "a"}), "tools": [{"name": "f"}]},
            "tools are not supported",
        ),
        (
            user_says({"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}),
            "system message is not first",
        ),
        (
            {"query": "q", "response": "a", "history": "before"},
            "history is not a list of [question, answer]",
        ),
        (pair("q", "\ud800"), "invalid Unicode"),
    ],
)
def test_unusable_rows_are_rejected_with_a_reason(tmp_path, row, reason):
    examples, rejects = read([jsonl(tmp_path / "a.jsonl", row, row)])
    assert examples == []
    assert [(r.reason, r.origin) for r in rejects] == [
        (reason, f"{tmp_path / 'a.jsonl'}:{line}") for line in (1, 2)
    ]


def test_a_row_without_a_column_that_others_have_is_rejected_alone(tmp_path):
    examples, rejects = read(
        [
            jsonl(
                tmp_path / "a.jsonl",
                {"prompt": "q"},
                {**pair("r", "a"), "system": "s"},
                pair("s", "a"),
            )
        ]
    )
    assert [r.reason for r in rejects] == ["empty answer"]
    assert [len(e.messages) for e in examples] == [3, 2]


def test_two_system_texts_are_rejected(tmp_path):
    row = {
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "q"}],
        "system": "y",
    }
    assert read([jsonl(tmp_path / "a.jsonl", row)])[1][0].reason == "two system texts"


# --- columns
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (
            {"question": "q", "answer": "a", "output": "b"},
            ["columns: {query: question, response: answer}", "response: output}"],
        ),
        (
            {"messages": [], "prompt": "q", "completion": "a"},
            ["columns: {messages: messages}", "{prompt: prompt, completion: comp"],
        ),
    ],
)
def test_more_than_one_reading_is_asked_about_with_the_yaml_to_write(tmp_path, row, answers):
    with pytest.raises(DataError, match="can be read in 2 ways") as error:
        read([jsonl(tmp_path / "a.jsonl", row)])
    assert all(answer in str(error.value) for answer in answers)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"query": "question", "response": "answer"}, QA),
        ({"response": "answer"}, QA),
        ({"prompt": "question", "completion": "output"}, [("user", "2+2?"), ("assistant", "four")]),
        (
            {"instruction": "question", "input": "more", "output": "output"},
            [("user", "2+2?\nplease"), ("assistant", "four")],
        ),
        (
            {"response": "output", "system": "more"},
            [("system", "please"), ("user", "2+2?"), ("assistant", "four")],
        ),
    ],
)
def test_mapped_columns_decide(tmp_path, columns, expected):
    source = jsonl(
        tmp_path / "a.jsonl",
        {"question": "2+2?", "answer": "4", "output": "four", "more": "please"},
    )
    (only,), _ = read([source.model_copy(update={"columns": columns})])
    assert turns(only) == expected


@pytest.mark.parametrize(
    ("row", "columns", "group", "message"),
    [
        (
            {"x": "q", "y": "a"},
            {},
            None,
            r"no row format fits the columns: x, y\. Accepted: messages \(messages\); ShareGPT",
        ),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            {},
            None,
            "columns: {prompt: YOUR_COLUMN",
        ),
        ({"text": "words"}, {}, None, "running text, not a conversation"),
        (
            {"x": "q", "y": "a"},
            {"prompt": "x", "completion": "z"},
            None,
            "maps completion to 'z', which is not there; .* x, y",
        ),
        ({"x": "q", "y": "a"}, {"promt": "x"}, None, "unknown slot 'promt'; did you mean 'prompt'"),
        (pair("q", "a"), {"input": "prompt"}, None, "no row format fits"),
        (
            pair("q", "a"),
            {},
            "doc",
            "no column 'doc' for `group:`; the columns are: completion, prompt",
        ),
        ({**pair("q", "a"), "u": 1, "v": 2}, {"group": "u"}, "v", "differ; keep one"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, row, columns, group, message):
    source = jsonl(tmp_path / "a.jsonl", row).model_copy(update={"columns": columns})
    with pytest.raises(DataError, match=message):
        read([source], group=group)


@pytest.mark.parametrize(
    ("group", "reason"), [(None, "empty group"), ([1], "group is not a plain value")]
)
def test_rows_without_a_usable_value_of_the_named_group_are_rejected(tmp_path, group, reason):
    row = {**pair("q", "a"), "group": group}
    _, rejects = read([jsonl(tmp_path / "a.jsonl", row)], group="group")
    assert [reject.reason for reject in rejects] == [reason]


def test_groups_come_from_the_named_column_else_from_the_prompt(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {**pair("q", "a"), "doc": 7, "group": "g"})
    assert read([source], group="doc")[0][0].group == "7"
    assert read([source])[0][0].group not in ("g", "7")
    assert read([source.model_copy(update={"columns": {"group": "doc"}})])[0][0].group == "7"
    same = read(
        [
            jsonl(
                tmp_path / "b.jsonl",
                pair("Two  words", "a"),
                pair("two words ", "b"),
                {**pair("two words ", "c"), "system": "about another document"},
                pair("w", "a"),
            )
        ]
    )[0]
    assert same[0].group == same[1].group
    assert len({row.group for row in same}) == 3


# --- files
# --------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes | str) -> DataSource:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return DataSource(path=str(path))


def test_every_kind_of_file_gives_the_same_rows_with_its_places(tmp_path):
    rows = [pair("q1", 'a, "b"\nc'), pair("q2", "NA"), pair("q3", "2020-01-01")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    sources = [
        write(tmp_path / "a.jsonl", "\ufeff" + lines.replace("\n", "\r\n")),
        write(tmp_path / "b.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "c.json", json.dumps(rows)),
        write(
            tmp_path / "d.csv", '\ufeffprompt,completion\nq1,"a, ""b""\nc"\nq2,NA\nq3,2020-01-01\n'
        ),
        DataSource(path=str(tmp_path / "e.parquet")),
        DataSource(path=str(tmp_path / "f.arrow")),
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.ipc.new_stream(tmp_path / "f.arrow", table.schema) as stream:
        stream.write_table(table)
    places = {"d.csv": [2, 4, 5]}
    for source in sources:
        examples, rejects = read([source])
        assert rejects == []
        assert [(e.question, e.answer) for e in examples] == [
            ("q1", 'a, "b"\nc'),
            ("q2", "NA"),
            ("q3", "2020-01-01"),
        ]
        lines_of = places.get(Path(source.path).name, [1, 2, 3])
        assert [e.origin for e in examples] == [f"{source.path}:{line}" for line in lines_of]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", "", "a.jsonl: is empty"),
        ("a.jsonl", "\n\n", "a.jsonl: is empty"),
        ("a.json", "", "a.json: is empty"),
        ("a.json", "[]", "a.json: is empty"),
        ("a.csv", "prompt,completion\n", "a.csv: is empty"),
        (
            "a.jsonl",
            '{"prompt": "q", "completion": "a"}\n{"prompt": "q",\n',
            r"a\.jsonl:2: broken JSON: .* at column",
        ),
        (
            "a.jsonl",
            '{"prompt": "q", "completion": "a"}\n["q", "a"]\n',
            r"a\.jsonl:2: expected an object .* found a list",
        ),
        ("a.json", '[{"prompt": "q"},\n {"prompt" "q"}]', r"a\.json:2: broken JSON"),
        (
            "a.json",
            '{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "b"}',
            r"a\.json:2: .*Extra data.*one object a line",
        ),
        (
            "a.json",
            '{"data": [{"prompt": "q"}]}',
            "expected a list of objects, found an object with the keys 'data'; write the list",
        ),
        ("a.json", '[{"prompt": "q", "completion": "a"}, 3]', r"a\.json:2: expected an object"),
        (
            "a.jsonl",
            b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xff"}\n',
            r"a\.jsonl:2: not UTF-8 .* save it as UTF-8",
        ),
        ("a.csv", b"prompt,completion\nq,\xe9\n", r"a\.csv:2: not UTF-8"),
        ("a.csv", "prompt,completion\nq,a\nq,a,b\n", r"a\.csv:3: 3 fields, but the header has 2"),
        ("a.csv", 'prompt,completion\nq,"a\n', r"a\.csv:2: broken CSV"),
        ("a.csv", "prompt,prompt\nq,a\n", "names a column twice"),
        ("a.jsonl.gz", "not gzip", "cannot be read: .*gzip"),
        ("a.parquet", "not parquet", "a.parquet: not readable as parquet"),
        ("a.txt", "words", r"a\.txt: unknown kind of file '\.txt'; give one of \.jsonl"),
    ],
)
def test_broken_files_are_refused_with_their_place(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        read([write(tmp_path / name, data)])


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", pair("q", "a"))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty" / "notes.md", "x")
    for path, message in [
        ("trian.jsonl", "no such file; did you mean 'train.jsonl'"),
        ("nowhere/train.jsonl", "there is no folder"),
        ("empty", r"holds no data files \(.*\); it holds: notes.md"),
        ("*.csv", "no file matches this pattern"),
    ]:
        with pytest.raises(DataError, match=message):
            read([DataSource(path=str(tmp_path / path))])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        read([DataSource(path="train.json")])


def test_folders_and_globs_read_their_files_by_name(tmp_path):
    jsonl(tmp_path / "b.jsonl", pair("q2", "a"))
    jsonl(tmp_path / "a.jsonl", pair("q1", "a"))
    write(tmp_path / "c.csv", "prompt,completion\nq3,a\n")
    write(tmp_path / "dataset_info.json", "{}")
    assert [e.question for e in read([DataSource(path=str(tmp_path))])[0]] == ["q1", "q2", "q3"]
    assert [e.question for e in read([DataSource(path=str(tmp_path / "*.jsonl"))])[0]] == [
        "q1",
        "q2",
    ]


def test_builtin_names_lead_into_the_package(tmp_path, monkeypatch):
    (tmp_path / "builtin").mkdir()
    monkeypatch.setattr(readers.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"lacks its data file builtin_pool\.jsonl\.gz"):
        read([DataSource(path="builtin")])
    for name in ("pool", "eval"):
        write(
            tmp_path / "builtin" / f"builtin_{name}.jsonl.gz",
            gzip.compress(json.dumps(pair(name, "a")).encode()),
        )
    assert [
        (e.question, e.origin)
        for e in read([DataSource(path="builtin"), DataSource(path="builtin_eval")])[0]
    ] == [
        ("pool", "builtin:1"),
        ("eval", "builtin_eval:1"),
    ]


def test_limit_draws_seeded_rows_in_file_order_and_nested(tmp_path):
    jsonl(tmp_path / "a.jsonl", *[pair(f"q{i}", "a") for i in range(30)])
    jsonl(tmp_path / "b.jsonl", *[pair(f"q{i}", "a") for i in range(30, 60)])

    def drawn(limit: int, seed: int) -> list[int]:
        examples, _ = read([DataSource(path=str(tmp_path), limit=limit)], seed=seed)
        return [int(e.question[1:]) for e in examples]

    assert len(drawn(10, 0)) == 10
    assert drawn(10, 0) == sorted(drawn(10, 0)) != list(range(10))
    assert set(drawn(10, 0)) < set(drawn(20, 0))
    assert drawn(10, 0) != drawn(10, 1)
    assert drawn(99, 0) == list(range(60))


def test_hub_options_on_a_file_are_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", pair("q", "a")).model_copy(update={"split": "train[:1%]"})
    with pytest.raises(DataError, match="split and revision belong to hub data sets"):
        read([source])


# --- hub data sets
# --------------------------------------------------------------------------------------------------


def test_a_hub_data_set_is_read_like_a_file(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", {**pair("q1", "a"), "n": 1}, {**pair("q2", ""), "n": 2})
    jsonl(tmp_path / "test.jsonl", {**pair("q3", "a"), "n": 3})
    data = readers.hub(str(tmp_path), None, "train[:1]", None)
    assert data.to_dict() == {"prompt": ["q1"], "completion": ["a"], "n": [1]}
    monkeypatch.setattr(
        readers,
        "hub",
        lambda name, config, split, revision: _load(str(tmp_path), config, split, revision),
    )
    examples, rejects = read(
        [DataSource(path="org/name"), DataSource(path="org/name", split="test")]
    )
    assert [(e.question, e.origin) for e in examples] == [
        ("q1", "org/name:1"),
        ("q3", "org/name:1"),
    ]
    assert [(r.reason, r.origin) for r in rejects] == [("empty answer", "org/name:2")]


_load = readers.hub


def test_hub_failures_say_what_to_do(monkeypatch, tmp_path):
    import datasets

    calls = []

    def fail(error: Exception):
        def load(*args: object, **options: object) -> None:
            calls.append((args, options))
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)

    gated = (
        "Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    fail(datasets.exceptions.DatasetNotFoundError(gated))
    with pytest.raises(DataError, match=r"org/name: .*gated.* accept its terms .* `hf auth login`"):
        read([DataSource(path="org/name", name="en", revision="v1")])
    fail(ConnectionError("Couldn't reach 'org/trian' on the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(
        DataError, match=r"org/trian: .*Couldn't reach .* without a network, download it"
    ):
        read([DataSource(path="org/trian")])
    with pytest.raises(
        DataError,
        match=r"trian: no such file \(and a hub id is written org/name\); did you mean 'train'",
    ):
        read([DataSource(path="trian")])
    assert calls == [
        (("org/name", "en"), {"split": "train", "revision": "v1", "streaming": False}),
        (("org/trian", None), {"split": "train", "revision": None, "streaming": False}),
    ]


# --- counting, splitting, checking
# -----------------------------------------------------------------------------------


def test_duplicates_are_rejected_over_all_sources_and_nothing_vanishes(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", pair("q", "A b"), pair("q", "other"), pair("", "x"))
    second = jsonl(tmp_path / "b.jsonl", pair("Q ", "a  B"), pair("r", "a"))
    examples, rejects = read([first, second, first])
    assert [e.answer for e in examples] == ["A b", "other", "a"]
    assert [r.reason for r in rejects] == [
        "empty prompt",
        "duplicate",
        "duplicate",
        "duplicate",
        "empty prompt",
    ]
    assert rejects[1] == Reject(f"{second.path}:1", "duplicate", f"same as {first.path}:1")
    assert len(examples) + len(rejects) == 3 + 2 + 3


def test_too_few_rows_say_what_was_read_and_rejected(tmp_path):
    examples, rejects = read(
        [jsonl(tmp_path / "a.jsonl", pair("q", "a"), pair("r", ""), pair("s", ""), pair("q", "a"))]
    )
    with pytest.raises(
        DataError,
        match=(
            r"a\.jsonl: 1 usable of 4 rows read, at least 2 .* 2 empty answer, 1 duplicate "
            r"\(first: .*:2"
        ),
    ):
        require_rows(examples, rejects)
    with pytest.raises(DataError, match="no source: 0 usable of 0 rows"):
        require_rows([], [])
    require_rows(examples, rejects, minimum=1)


def test_split_holds_out_whole_groups_whatever_the_order_of_the_rows():
    rows = [example(f"q{i}", group=f"g{i // 3}") for i in range(30)]
    rest, held = split(rows, 0.2, seed=1)
    assert {e.group for e in rest}.isdisjoint({e.group for e in held})
    assert (len(rest), len(held)) == (24, 6)
    assert sorted(rest + held, key=rows.index) == rows
    assert {e.question for e in split(rows[::-1], 0.2, seed=1)[1]} == {e.question for e in held}
    assert len({tuple(e.question for e in split(rows, 0.2, seed=s)[1]) for s in range(5)}) > 1


@pytest.mark.parametrize(("share", "sizes"), [(0.01, (1, 1)), (0.99, (1, 1))])
def test_split_leaves_a_group_on_each_side(share, sizes):
    rest, held = split([example("a"), example("b")], share, seed=0)
    assert (len(rest), len(held)) == sizes


def test_split_of_one_group_is_refused():
    with pytest.raises(
        DataError, match=r"3 rows in 1 group\(s\) cannot be split by content.*`group:`"
    ):
        split([example(q, group="g") for q in "abc"], 0.5, seed=0)


def test_subsets_are_nested_and_exact():
    rows = [example(f"q{i}", group=f"g{i // 3}") for i in range(30)]
    chain = [subset(rows, limit, seed=3) for limit in (1, 4, 16, 30, 99)]
    assert [len(s) for s in chain] == [1, 4, 16, 30, 30]
    assert all(large[: len(small)] == small for small, large in pairwise(chain))
    assert [len({e.group for e in s}) for s in chain] == [
        1,
        4,
        10,
        10,
        10,
    ]  # a row of every group, before a second of any
    assert sorted(Counter(e.group for e in chain[2]).values()) == [1] * 4 + [2] * 6
    assert subset(rows, 4, seed=3) != subset(rows, 4, seed=4)


def test_a_large_group_leaves_room_for_the_small_ones():
    rows = [example(f"q{i}", group="large") for i in range(8)] + [
        example("a", group="b"),
        example("c", group="d"),
    ]
    for seed in range(10):
        assert {e.group for e in subset(rows, 3, seed=seed)} == {"large", "b", "d"}
        assert Counter(e.group for e in subset(rows, 5, seed=seed)) == {"large": 3, "b": 1, "d": 1}


@pytest.mark.parametrize(
    ("test_row", "message"),
    [
        (
            example("Q  one", "new", group="g9"),
            "1 of 2 test rows .*1 the same prompt.*: t:1 = a:1; .* leave `test:` out",
        ),
        (example("one", "new", group="g9", system="q"), "1 the same prompt"),
        (example("q one a", "1", group="g9"), "1 the same text"),
        (example("q3", group="g2"), "1 the same group.*: t:1 = a:2; .*group values restart"),
    ],
)
def test_test_rows_inside_train_are_refused(test_row, message):
    train = [
        example("q one", "a 1", group="g1", origin="a:1"),
        example("q2", group="g2", origin="a:2"),
    ]
    test_row = Example(test_row.messages, test_row.group, "t:1")
    with pytest.raises(DataError, match=message):
        check_overlap(train, [test_row, example("clean")], "test")
    check_overlap(train, [example("clean")], "test")


def test_groups_can_be_left_out_of_the_check():
    check_overlap([example("q", group="0")], [example("r", group="0")], "test", by_group=False)
