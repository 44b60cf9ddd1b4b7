"""The pool stays on disk and gives the rows that `read` gives; selection counts every row and
plants no leak."""

import json
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fulcrum.config.base import GeneralSource
from fulcrum.core.errors import DataError, StoreError
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import filters
from fulcrum.data import pool as pools
from fulcrum.data.pool import Exclusions, open_pool, select
from fulcrum.data.task_data import read


@pytest.fixture(autouse=True)
def _own_arrow_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path_factory.mktemp("cache")))


def jsonl(path, *pairs):
    path.write_text(
        "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs),
        encoding="utf-8",
    )
    return GeneralSource(path=str(path))


def task(prompt, answer):
    return Example((Message("user", prompt), Message("assistant", answer)), prompt, "task:1")


def pick(
    pool,
    count,
    *,
    seed=0,
    fits=lambda row: None,
    task_rows=(),
    held_out_rows=(),
    anchors=(),
    near=0.0,
):
    exclusions = Exclusions([[*task_rows, *held_out_rows]], anchors, near=near)
    return select(pool, count, exclusions, seed=seed, fits=fits)


LEAKS = {
    13: "shares a 13-gram with task or held-out data",
    "asked": "asks what a task or held-out row asks",
}


def test_the_pool_gives_what_read_gives(tmp_path):
    text = jsonl(tmp_path / "a.jsonl", ("q1", "NA"), ("q2", ""), ("q3", "2020-01-01"))
    (tmp_path / "b.csv").write_text("prompt,completion\nq4,5\n")
    pq.write_table(
        pa.Table.from_pylist(
            [{"instruction": "q5", "output": "a"}, {"instruction": "q6", "output": "a"}]
        ),
        tmp_path / "c.parquet",
    )
    sources = [
        text,
        GeneralSource(path=str(tmp_path / "b.csv")),
        GeneralSource(path=str(tmp_path / "c.parquet")),
    ]
    pool = open_pool(sources, seed=0)
    examples, rejects = read(sources)
    assert [pool[i] for i in range(len(pool))] == examples
    assert (pool.left_out, pool.shown) == ({"empty answer": 1}, rejects)
    assert [examples[1].origin, examples[2].answer] == [f"{text.path}:3", "5"]
    with pytest.raises(IndexError):
        pool[5]


def test_a_changed_file_is_parsed_again_and_limits_are_seeded(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ("old", "a"))
    assert open_pool([source], seed=0)[0].question == "old"
    jsonl(tmp_path / "a.jsonl", ("new", "a"))
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert open_pool([source], seed=0)[0].question == "new"
    jsonl(tmp_path / "a.jsonl", *[(f"question {i}", "a") for i in range(20)])
    drawn = open_pool([source.model_copy(update={"limit": 5})], seed=0)
    assert [row.origin for row in drawn] == [
        row.origin for row in read([source.model_copy(update={"limit": 5})])[0]
    ]
    assert drawn.left_out["not drawn (limit)"] == len(open_pool([source], seed=0)) - 5
    assert len(drawn) == 5


def test_rows_with_different_columns_share_one_reading(tmp_path):
    rows = [
        {"query": "q1", "response": "a"},
        {"query": "q2", "response": "a", "system": "s", "history": [["x", "y"]]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [
        len(row.messages)
        for row in open_pool([GeneralSource(path=str(tmp_path / "a.jsonl"))], seed=0)
    ] == [2, 5]


def test_broken_and_empty_files_are_refused_as_when_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        open_pool([GeneralSource(path=str(tmp_path / "a.jsonl"))], seed=0)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl: is empty"):
        open_pool([GeneralSource(path=str(tmp_path / "a.jsonl"))], seed=0)
    assert len(open_pool([], seed=0)) == 0


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        StoreError,
        match=r"the pool's cache cannot be used: Not a directory; set FULCRUM_CACHE to another",
    ):
        open_pool([jsonl(tmp_path / "a.jsonl", ("q", "a"))], seed=0)


WORDS = [f"{letter}{letter}" for letter in "abcdefghijklmnopqr"]


NUMBERS = "one two three four five six seven eight nine ten eleven twelve"


def test_every_planted_fault_is_counted_with_its_reason(tmp_path):
    """N-grams are those of one message: 13 words, 8 in messages under 13; rows with less everywhere
    are compared whole."""
    thirteen, twelve = " ".join(WORDS[:13]), " ".join(WORDS[1:13])
    pool = open_pool(
        [
            jsonl(
                tmp_path / "a.jsonl",
                ("fine", "kept"),
                ("Fine ", "KEPT"),
                ("no answer", ""),
                ("Say:", f"so {thirteen.upper()}, yes"),
                ("half here: " + " ".join(WORDS[:6]), " ".join(WORDS[6:13])),
                ("near miss", twelve),
                (NUMBERS.replace(" ", ", ") + "?", "another answer"),
                ("eight:", "five six seven eight nine ten eleven twelve"),
                ("seven:", "six seven eight nine ten eleven twelve"),
                ("Capital of Iceland?", "Reykjavik!"),
                ("capital of Iceland", "Reykjavik, a city"),
                ("what is the capital of Iceland", "Reykjavik, a city"),
                ("held out", "test words that nobody may ever see in any training row at all"),
                ("a long one", "x " * 50),
            )
        ],
        seed=0,
    )
    rows = [
        task(f"please do {thirteen}", "yes"),
        task(NUMBERS, "thirteen"),
        task("capital of iceland", "reykjavik"),
    ]
    held = [task("so these are", "test words that nobody may ever see in any training row at all")]
    chosen = pick(
        pool,
        99,
        task_rows=rows,
        held_out_rows=held,
        fits=lambda row: "too long" if len(row.answer) > 90 else None,
    )
    kept = {e.question.strip().casefold().partition(":")[0] for e in chosen.examples}
    assert kept == {"fine", "half here", "near miss", "seven", "what is the capital of iceland"}
    assert Counter(r.reason for r in chosen.rejects) == {
        "shares a 13-gram with task or held-out data": 2,
        "shares an 8-gram with task or held-out data": 2,
        "is a task or held-out row": 1,
        "asks what a task or held-out row asks": 1,
        "too long": 1,
    }
    assert pool.left_out == {"duplicate": 1, "empty answer": 1}
    assert len(chosen.examples) + len(chosen.rejects) == len(pool) == 12
    assert chosen.exhausted


@pytest.mark.parametrize("words", range(8, 16))
def test_a_task_rows_prompt_is_found_whatever_the_answers_are(tmp_path, words):
    """A short prompt and its answer together are 13 words and more: that must not hide the
    prompt."""
    question = " ".join(WORDS[:words])
    pool = open_pool(
        [jsonl(tmp_path / "a.jsonl", (question.title(), "quite another answer"))], seed=0
    )
    chosen = pick(pool, 1, task_rows=[task(question, "the answer has five words")])
    assert [r.reason.partition(" with ")[2] for r in chosen.rejects] == ["task or held-out data"]


@pytest.mark.parametrize(
    ("held", "general"),
    [
        ("café à la crème", "cafe\u0301 a\u0300 la cre\u0300me"),  # composed, decomposed
        ("plain words", "pla\u00adin wo\u200brds"),  # a soft hyphen, a space of no width
        ("ABC 12", "ＡＢＣ １２"),  # letters of full width
        ("हिन्दी भाषा", "हिन्दी, भाषा!"),  # vowel signs are no letters, and belong to words
    ],
)
def test_the_same_text_in_another_form_is_the_same(tmp_path, held, general):
    """As a leak, and as a repeat within the pool (where it is only punctuation that differs, it
    is none)."""
    pool = open_pool([jsonl(tmp_path / "a.jsonl", (general, "yes"), (held, "yes"))], seed=0)
    assert len(pool) == (2 if "!" in general else 1)
    chosen = pick(pool, 9, held_out_rows=[task(held, "yes")])
    assert {r.reason for r in chosen.rejects} == {"is a task or held-out row"}
    assert chosen.examples == []


def test_scripts_without_spaces_are_compared_letter_by_letter(tmp_path):
    held = "今日はとても天気がいいので公園を散歩します"
    inside = f"日記：{held}。明日も。"
    pool = open_pool(
        [
            jsonl(
                tmp_path / "a.jsonl",
                ("書いて", inside),
                ("書いて", "今日は雨です"),
                ("พูด", "ประเทศไทย"),
            )
        ],
        seed=0,
    )
    chosen = pick(pool, 9, held_out_rows=[task("言って", held)])
    assert sorted(row.answer for row in chosen.examples) == ["ประเทศไทย", "今日は雨です"]
    assert chosen.rejects[0].reason == "shares a 13-gram with task or held-out data"
    assert filters.words("ไทย cafe\u0301 北京2026") == ["ไ", "ท", "ย", "café", "北", "京", "2026"]


SHARED = (
    "You are a helpful assistant who answers every question with great care and in full sentences, "
    "as its user asks."
)


def spoken(*texts, system=None):
    roles = ("user", "assistant") * (len(texts) // 2)
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        *({"role": role, "content": text} for role, text in zip(roles, texts, strict=True)),
    ]


def example(*texts, system=None):
    return Example(tuple(Message(**turn) for turn in spoken(*texts, system=system)), "g", "o")


def conversations(path, *rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return GeneralSource(path=str(path))


def test_a_system_text_that_rows_share_makes_them_no_repeats_and_no_leaks(tmp_path):
    rows = [spoken(f"what is {k}", f"it is {k}", system=SHARED) for k in range(4)]
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0, near=0.5)
    assert (len(pool), pool.left_out) == (4, {})
    task_rows = [example(f"how old is {k}", f"{k} years", system=SHARED) for k in range(3)]
    assert len(pick(pool, 4, task_rows=task_rows, near=0.5).examples) == 4


def test_a_system_text_that_few_rows_share_is_content(tmp_path):
    pages = [" ".join(f"{word}{k}" for word in WORDS) for k in range(3)]
    rows = [spoken("what is this about", "it is about letters", system=page) for page in pages]
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0, near=0.5)
    assert len(pool) == 3
    held = [
        example(f"tell me {what}", "letters and numbers", system=page)
        for page in pages[:2]
        for what in ("this", "that")
    ]
    held += [example(f"how old is {k}", f"{k} years") for k in range(20)]
    found = pick(pool, 3, held_out_rows=held)
    assert (len(found.examples), {reject.reason for reject in found.rejects}) == (1, {LEAKS[13]})


def test_a_question_is_found_inside_a_longer_conversation(tmp_path):
    rows = [
        spoken("good morning", "hello", "where is Oslo", "up north"),
        spoken("good morning", "hello", "and where", "there"),
    ]
    found = pick(
        open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0),
        2,
        held_out_rows=[task("Where is Oslo?", "x")],
    )
    assert [(reject.origin[-2:], reject.reason) for reject in found.rejects] == [
        (":1", LEAKS["asked"])
    ]


def test_what_holds_no_words_is_compared_as_it_is(tmp_path):
    pool = open_pool(
        [jsonl(tmp_path / "a.jsonl", ("🙂", "👍"), ("🙁", "👎"), ("🙂", " 👍"))], seed=0, near=0.5
    )
    assert (len(pool), pool.left_out) == (2, {"duplicate": 1})
    assert len(pick(pool, 2, held_out_rows=[task("?", "!")]).examples) == 2
    assert pick(pool, 2, anchors=[Anchor("\u200b")]).rejects == []


def test_underscores_part_words():
    assert (
        filters.words("the_cat __sat__ on_2")
        == filters.words("the cat sat on 2")
        == ["the", "cat", "sat", "on", "2"]
    )
    assert filters.words("snake_där 今_日") == ["snake", "där", "今", "日"]


def test_a_check_looks_at_rows_as_the_weights_say(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", *[(f"leak {k}", "a") for k in range(50)]).model_copy(
        update={"weight": 1.0}
    )
    two = jsonl(tmp_path / "b.jsonl", *[(f"fine {k}", "a") for k in range(50)]).model_copy(
        update={"weight": 9.0}
    )
    pool = open_pool([one, two], seed=0)
    none_leak = pools.check(pool, 20, Exclusions([], []), seed=0)
    assert none_leak == (20, {}, [])
    # No row of the heavier source is allowed: it stays behind its part.
    held = Exclusions([[task(f"fine {k}", "b") for k in range(50)]], [])
    assert pools.check(pool, 40, held, seed=0)[1] == {LEAKS["asked"]: 40 - 1}
    assert pools.check(pool, 1000, held, seed=0)[:2] == (50, {LEAKS["asked"]: 50})


def test_a_selection_is_seeded_and_the_beginning_of_a_larger_one(tmp_path):
    pool = open_pool(
        [jsonl(tmp_path / "a.jsonl", *[(f"q{i}", "a" if i % 5 else "") for i in range(50)])], seed=0
    )
    small, large = pick(pool, 10), pick(pool, 20)
    assert not small.exhausted
    assert large.ids[:10].tolist() == small.ids.tolist()
    assert small.ids.dtype == np.int64
    assert [pool[int(i)] for i in small.ids] == small.examples
    assert pick(pool, 10, seed=1).ids.tolist() != small.ids.tolist()
    everything = pick(pool, 41)
    assert (len(everything.examples), len(everything.rejects), everything.exhausted) == (
        40,
        0,
        True,
    )
    assert pool.left_out == {"empty answer": 10}
    nothing = pick(pool, 0)
    assert (nothing.examples, nothing.rejects, nothing.exhausted) == ([], [], False)


@pytest.mark.parametrize("place", ["prompt", "answer"])
def test_a_general_row_with_the_anchors_text_is_refused(tmp_path, place):
    text = "please ANSWER  with\none word now"
    source = jsonl(
        tmp_path / "a.jsonl", ("q", "a"), (text, "a") if place == "prompt" else ("r", text)
    )
    pool = open_pool([source], seed=0)
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:2: .*anchor's text 'answer with one word'.* remove every such row",
    ):
        pick(pool, 2, anchors=[Anchor("Answer with one word")])
    assert len(pick(pool, 2, anchors=[Anchor("Answer with two words"), Anchor(" ")]).examples) == 2


@pytest.mark.e2e
def test_all_repeats_and_leaks_planted_in_a_hundred_thousand_rows_are_found(tmp_path):
    """1,000 exact repeats (other case and spacing), and texts of 60 task and held-out rows in
    300 rows; nothing else goes."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{k}" for k in range(20_000)])
    texts = [" ".join(row) for row in words[rng.integers(len(words), size=(98_700, 12))]]
    rows = [(text, f"answer {k}") for k, text in enumerate(texts)]
    repeats = [
        (f" {rows[k][0].upper()}", rows[k][1].title())
        for k in rng.choice(len(rows), 1000, replace=False)
    ]
    own = [
        task(
            f"own {' '.join(rng.choice(words, 4 if k % 3 == 0 else 9 if k % 3 == 1 else 20))}", "so"
        )
        for k in range(60)
    ]
    leaks = []
    for k, row in enumerate(own):
        said = row.question.split()
        part = {0: said, 1: said[1:9], 2: said[4:17]}[k % 3]  # whole, 8 of 10 words, 13 of 21
        around = ("", "") if k % 3 == 0 else (f"{rows[k][0]} ", f" {rows[k + 100][0]}")
        for n in range(5):  # in another case, in another place of the row
            text = around[0] + " ".join(part).title() + around[1]
            leaks.append(
                (f"x{k} x{n}", text)
                if k % 3 and n % 2
                else (text, "So" if k % 3 == 0 else f"other {n}")
            )
    leaks = [
        (a, b) if a.casefold() != own[k // 5].question else (a + "?" * (k % 5), b)
        for k, (a, b) in enumerate(leaks)
    ]
    everything = [*rows, *repeats, *leaks]
    where = rng.permutation(len(everything) - len(rows)) + len(
        rows
    )  # originals stand before what repeats them
    pool = open_pool([jsonl(tmp_path / "a.jsonl", *rows, *(everything[k] for k in where))], seed=0)
    assert len(everything) == 100_000
    assert pool.left_out == {"duplicate": 1000}
    chosen = pick(pool, len(everything), task_rows=own[::2], held_out_rows=own[1::2])
    assert Counter(r.reason.partition(" with ")[0] for r in chosen.rejects) == {
        "is a task or held-out row": 100,
        "shares an 8-gram": 100,
        "shares a 13-gram": 100,
    }
    assert {e.question for e in chosen.examples} == set(texts)


HEADER = (
    "below is an instruction that describes what is wanted so write a response that fits it well:"
)
SYSTEMS = [
    f"you are a helpful assistant of kind {k} who thinks step by step and explains every "
    "answer very carefully"
    for k in range(3)
]


def test_rows_held_out_of_a_pool_do_not_take_it_with_them(tmp_path):
    """What most rows of a pool begin with is in the held-out ones too."""
    rows = [
        spoken(f"{HEADER} name thing {k}", f"thing {k}", system=SYSTEMS[k % 3]) for k in range(200)
    ]
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0)
    apart = [pool[k] for k in range(40)]
    own = [task(f"which colour has {word}", "red") for word in WORDS]
    given = {"seed": 0, "fits": lambda row: None}
    found = select(pool, 160, Exclusions([own], [], apart, near=0.8), **given)
    assert len(found.examples) == 160
    twin = example(
        "which song is it that the old sailor sings every evening at the harbour",
        "a shanty of the sea",
    )
    near = example(
        "which song is it that the old sailor sings every evening at the harbour",
        "a shanty of the seas",
    )
    pool = open_pool(
        [conversations(tmp_path / "b.jsonl", spoken(*(m.content for m in near.messages)))], seed=0
    )
    found = select(pool, 1, Exclusions([own], [], [twin], near=0.8), **given)
    assert [reject.reason for reject in found.rejects] == [
        "shares a 13-gram with held-out general data"
    ]


def test_what_a_held_out_row_alone_says_is_kept_out_of_the_mix(tmp_path):
    page = (
        "the lighthouse was lit in the year of the great storm by a keeper who had come from the "
        "north"
    )
    apart = [
        example(f"{page} what was lit", "the lighthouse"),
        example(f"{HEADER} where is it", "there"),
        example("who goes", "we"),
    ]
    apart += [example(f"{HEADER} what is {word}", word) for word in WORDS]
    apart = [Example(row.messages, f"g{k}", f"o{k}") for k, row in enumerate(apart)]
    rows = [
        spoken(f"{page} when was that", "then"),
        spoken("who goes", "they"),
        spoken(f"{HEADER} who is {WORDS[0]}", "me"),
        spoken("where to", "home", "who goes there now", "nobody"),
    ]
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0)
    found = select(pool, 4, Exclusions([], [], apart), seed=0, fits=lambda row: None)
    assert sorted(reject.reason for reject in found.rejects) == [
        "asks what a held-out general row asks",
        "shares a 13-gram with held-out general data",
    ]
    assert len(found.examples) == 2


def test_an_instruction_before_each_question_is_no_content_and_a_page_is(tmp_path):
    page = (
        "the harbour was built by forty men in the year of the great storm and stood for two "
        "hundred years"
    )
    rows = [spoken(f"{HEADER} what is number {k} good for", f"for {k}") for k in range(5)]
    rows.append(spoken(f"{page} who built it", "men"))
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0)
    own = [task(f"{HEADER} which way leads to town {k}", f"way {k}") for k in range(40)]
    own += [
        task(f"{HEADER} {page} {what}", "x") for what in ("how many men", "which year", "how long")
    ]
    found = pick(pool, 6, held_out_rows=own)
    assert [row.messages[0].content[-5:] for row in found.examples].count("d for") == 5
    assert {reject.reason for reject in found.rejects} == {LEAKS[13]}


def test_instructions_are_those_of_a_task_and_parts_of_a_system_text(tmp_path):
    dated = "you answer for the shop of the old town as kindly as you can and today is the day {k}"
    pool = open_pool(
        [
            conversations(
                tmp_path / "a.jsonl", spoken("hello you there", "hi", system=dated.format(k=900))
            )
        ],
        seed=0,
    )
    small = [
        example(f"where is {word}", "there", system=dated.format(k=k))
        for k, word in enumerate(WORDS)
    ]
    large = [task(f"count to {k} please", f"{k}") for k in range(1000)]
    found = select(pool, 1, Exclusions([small, large], []), seed=0, fits=lambda row: None)
    assert len(found.examples) == 1


def test_the_end_of_a_longer_test_conversation_is_found(tmp_path):
    rows = [
        spoken("and where is Oslo", "in Norway"),
        spoken("thanks", "you are welcome"),
        spoken("where to", "go there now"),
    ]
    pool = open_pool([conversations(tmp_path / "a.jsonl", *rows)], seed=0)
    held = [
        example("good morning", "hello", "and where is Oslo", "up north"),
        example("hello", "hi", "thanks", "welcome"),
        example("hello", "hi", "where to", "go there now"),
    ]
    found = pick(pool, 3, held_out_rows=held)
    assert [row.question for row in found.examples] == ["thanks"]
    assert sorted(reject.reason for reject in found.rejects) == [
        LEAKS["asked"],
        "is a task or held-out row",
    ]


def test_sources_that_end_before_others_are_said_also_where_all_end(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", *[(f"one {k}", "a") for k in range(30)]).model_copy(
        update={"weight": 1.0}
    )
    two = jsonl(tmp_path / "b.jsonl", *[(f"two {k}", "a") for k in range(10)]).model_copy(
        update={"weight": 1.0}
    )
    pool = open_pool([one, two], seed=0)
    assert pick(pool, 99).dry == (two.path,)
    assert pick(pool, 30).dry == (two.path,)
    assert pick(pool, 20).dry == ()
    assert pick(open_pool([jsonl(tmp_path / "c.jsonl", ("q", "a"))], seed=0), 9).dry == ()
