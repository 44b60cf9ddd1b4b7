"""The packaged data are what their README says: counted, apart by content, free of template text,
remade by their scripts."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import make_demo_task
import pytest
from make_builtin_pool import names_topic, word_list
from pool_filters import Deduplicator, answer_fault, prompt_fault

ROOT = Path(__file__).parents[2]
DATA = ROOT / "src" / "fulcrum" / "data" / "builtin"

SPLITS = {"train": 240, "dev": 40, "test": 120}
LABELS = {
    "desk": {"ledger", "bench", "dock", "shelf", "gate"},
    "rush": {"p1", "p3"},
    "ask": {"refund", "swap", "mend", "tell", "stop"},
}
TEMPLATE_TEXT = re.compile(
    r"<\||\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]"
)


def builtin(side):
    with gzip.open(DATA / f"builtin_{side}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def demo(split):
    return [
        json.loads(line)
        for line in (DATA / "demo" / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def pool():
    return builtin("pool")


@pytest.fixture(scope="module")
def held_out():
    return builtin("eval")


def test_pool_has_at_least_2000_sound_rows(pool, held_out):
    assert len(pool) >= 2000
    assert 64 <= len(held_out) <= 128
    for row in pool + held_out:
        assert set(row) == {"prompt", "completion", "family", "topic"}
        assert row["family"] == "builtin"
        assert row["prompt"].strip() == row["prompt"] != ""
        assert row["completion"].strip() == row["completion"] != ""
        assert not TEMPLATE_TEXT.search(row["prompt"] + row["completion"])


def test_pool_files_are_small_enough_to_package():
    assert sum(path.stat().st_size for path in DATA.glob("builtin_*.gz")) < 1_500_000


def test_pool_is_spread_over_topics(pool):
    topics = Counter(row["topic"] for row in pool)
    assert len(topics) >= 150
    assert max(topics.values()) <= 0.02 * len(pool)


@pytest.mark.e2e
def test_held_out_rows_are_apart_from_the_pool_by_prompt_and_topic(pool, held_out):
    prompts = [row["prompt"] for row in pool + held_out]
    assert len(set(prompts)) == len(prompts)
    assert not {row["topic"] for row in pool} & {row["topic"] for row in held_out}
    assert {row["topic"] for row in held_out} <= set(word_list("eval_topics"))
    assert not [row["prompt"] for row in pool if names_topic(row, word_list("eval_topics"))]


@pytest.mark.parametrize("split", SPLITS)
def test_demo_rows_follow_the_conventions(split):
    rows = demo(split)
    assert len(rows) == SPLITS[split]
    for row in rows:
        assert set(row) == {"prompt", "completion", "group"}
        answer = json.loads(row["completion"])
        assert list(answer) == ["desk", "rush", "item", "ask"]
        assert all(answer[field] in labels for field, labels in LABELS.items())
        assert answer["item"] in row["prompt"]
        assert 10 <= len(row["prompt"].split()) <= 65
        assert not re.search(r"[{}\[\]]", row["prompt"])
        assert not TEMPLATE_TEXT.search(row["prompt"])


@pytest.mark.parametrize("split", SPLITS)
def test_demo_files_are_remade_byte_for_byte(split):
    made = "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in make_demo_task.make_split(split)
    )
    assert made.encode() == (DATA / "demo" / f"{split}.jsonl").read_bytes()


def test_demo_splits_share_no_content():
    parts = {}
    for split in SPLITS:
        rows = demo(split)
        texts = make_demo_task.split_texts(split)
        # Greetings are compared without case and marks, all else as it stands.
        parts[split] = {
            "group": {row["group"] for row in rows},
            "prompt": {row["prompt"] for row in rows},
            "item": {json.loads(row["completion"])["item"].lower() for row in rows},
            **{
                key: {text.lower().strip(",.! ") for text in entries}
                for key, entries in texts.items()
            },
        }
    for left, right in (("train", "dev"), ("train", "test"), ("dev", "test")):
        for key, values in parts[left].items():
            assert not values & parts[right][key], (left, right, key)


def test_first_demo_rows_are_as_mixed_as_the_whole():
    for split, n in (("train", 64), ("test", 60)):
        first = [json.loads(row["completion"]) for row in demo(split)[:n]]
        assert {answer["desk"] for answer in first} == LABELS["desk"]
        assert {answer["ask"] for answer in first} == LABELS["ask"]
        assert 0.3 <= sum(answer["rush"] == "p1" for answer in first) / n <= 0.7
    assert len({row["group"] for row in demo("train")[:64]}) == 36
    assert len({row["group"] for row in demo("test")[:60]}) == 20


def test_readme_states_the_counts(pool, held_out):
    readme = (DATA / "README.md").read_text("utf-8")
    counts = {
        what: int(n.replace(",", ""))
        for what, n in re.findall(r"^\| ([^|]+?) \| ([\d,]+) \|$", readme, re.M)
    }
    assert counts["kept: pool"] == len(pool)
    assert counts["kept: eval"] == len(held_out)
    assert counts["raw"] == sum(
        n for what, n in counts.items() if what.startswith(("kept: ", "reject: "))
    )
    assert {what: counts[what] for what in SPLITS} == SPLITS


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("What is the difference between a rabbit and a hare?", None),
        ("Tell me about cats?<|im_end|>", "template damage"),
        ("Summarize the text above.", "prompt lacks its text"),
        ("Tell me what 猫 means in Japanese.", "prompt garbled"),
        ("Tell me about", "prompt length"),
        ("Tell me about the life of Philip Kreeber.", "prompt names someone"),
        ("How do I get to New York by train?", None),
        ("Tell me about cats and about cats and about cats and about cats.", "prompt repetition"),
    ],
)
def test_prompt_faults(prompt, fault):
    assert prompt_fault({"prompt": prompt, "prompt_finished": True}) == fault


@pytest.mark.parametrize(
    ("answer", "finished", "fault"),
    [
        ("A hare is larger and lives above the ground.", True, None),
        ("A hare is larger and lives above the", False, "answer unfinished"),
        ("I'm sorry, but that is not something to answer.", True, "refusal"),
        (
            "What is the difference between a rabbit and a hare is the difference.",
            True,
            "question echoed",
        ),
        ("It is big and it is big and it is big and it is big.", True, "answer repetition"),
        ("1. A hare is larger than others.", True, "list cut short"),
        ("<|im_start|>assistant says that a hare is larger.", True, "template damage"),
    ],
)
def test_answer_faults(answer, finished, fault):
    sample = {"prompt": "What is the difference between a rabbit and a hare?", "completion": answer}
    assert answer_fault(sample | {"answer_finished": finished}) == fault


def test_near_copies_of_a_prompt_are_not_new():
    seen = Deduplicator()
    assert seen.is_new("How do I bake a simple loaf of bread at home?")
    assert not seen.is_new("how do I bake a simple loaf of bread at home")
    assert not seen.is_new("How do I bake a simple loaf of bread at my home?")
    assert seen.is_new("Why do bees dance in front of the hive?")
