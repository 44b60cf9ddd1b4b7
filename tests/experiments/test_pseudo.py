"""Unlabelled inputs as general data: read and cleaned, as texts, answered by adapters of the arm's
own rows or by a teacher."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.config.arms import ARMS, chosen_arms
from fulcrum.config.base import DataSource
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Message
from fulcrum.data import encode, run_data, task_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import made_rows
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.cell import Session
from fulcrum.experiments.compare import run_comparison
from fulcrum.model import generate
from fulcrum.model.endpoint import Endpoint
from helpers import answering
from helpers.answering import Asked
from helpers.tiny import (
    CONTEXT,
    WORDS,
    arm_named,
    comparison_settings,
    load_tiny,
    save_task,
    session,
    tiny_tokenizer,
)

INPUTS = [f"shade {word} of the {other}" for word in WORDS[:4] for other in WORDS[:3]]


def write_inputs(path: Path, texts: Sequence[str], column: str = "prompt") -> str:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def settings_of(
    folder: Path, names: Sequence[str], texts: Sequence[str] = INPUTS, **changes: Any
) -> Settings:
    save_task(folder, 8, 4)
    task = {
        "train": str(folder / "train.jsonl"),
        "test": str(folder / "test.jsonl"),
        "anchor": "Name it.",
        "metrics": ["nll"],
        "max_new_tokens": 4,
        "unlabeled": write_inputs(folder / "inputs.jsonl", texts),
    }
    compare = {"arms": ["sft", *names], "folds": 2, "sft_epochs": [1]}
    mix = {"general_per_task": 1, "repeats": 1}
    return comparison_settings(
        folder, folder / "out", task=task, compare=compare, mix=mix, **changes
    )


def prepared(settings: Settings) -> RunData:
    return run_data.prepare(settings, tiny_tokenizer(), CONTEXT, 0, dev_apart=False)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "how far?"}, ["how far?"]),
        ({"text": "how far?", "completion": "not read"}, ["how far?"]),
        ({"instruction": "Say how far.", "input": "Oslo", "output": "no"}, ["Say how far.\nOslo"]),
        ({"question": "how far?", "system": "Be kind."}, ["Be kind.", "how far?"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a b"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            ["a b"],
        ),
        ({"prompt": [{"role": "user", "content": "a b"}]}, ["a b"]),
    ],
)
def test_inputs_need_no_answers(tmp_path: Path, row: dict[str, Any], asked: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (found,), rejects = task_data.read(
        [DataSource(path=str(tmp_path / "rows.jsonl"))], answered=False
    )
    assert [message.content for message in found.messages] == asked
    assert found.messages[-1].role == "user"
    assert rejects == []


def test_a_file_without_inputs_says_which_columns_do(tmp_path: Path) -> None:
    source = DataSource(path=write_inputs(tmp_path / "rows.jsonl", ["x"], "utterance"))
    with pytest.raises(
        DataError,
        match=(
            r"no column holds inputs; the columns are: utterance\..*columns: \{prompt: "
            r"YOUR_COLUMN\}"
        ),
    ):
        task_data.read([source], answered=False)
    mapped = source.model_copy(update={"columns": {"prompt": "utterance"}})
    assert [row.question for row in task_data.read([mapped], answered=False)[0]] == ["x"]


def test_what_is_labelled_already_or_asked_in_test_is_left_out_and_counted(tmp_path: Path) -> None:
    save_task(tmp_path, 8, 4)
    rows = [
        json.loads(line)["prompt"]
        for name in ("train", "test")
        for line in (tmp_path / f"{name}.jsonl").open()
    ]
    settings = settings_of(
        tmp_path, ["unlabeled"], [*INPUTS, rows[0].upper(), rows[-1], INPUTS[0], "far " * 600]
    )
    found = prepared(settings)
    assert sorted(row.question for row in found.tasks[0].unlabeled) == sorted(INPUTS)
    reasons = {
        reason: count
        for reason, count in found.rejects.items()
        if "unlabeled" in reason or reason == "duplicate"
    }
    assert reasons == {
        "unlabeled: labelled already": 1,
        "unlabeled: is a task or held-out row": 1,
        "duplicate": 1,
        "unlabeled: over 512 tokens with its answer": 1,
    }


HEADER = (
    "You are asked for the colour of a thing that is named after this sentence, which all inputs "
    "begin with:"
)


def headed(folder: Path, inputs: Sequence[str], **columns: str) -> Settings:
    """Settings of a task whose prompts all begin alike; `columns` are further ones of its labelled
    rows."""
    settings = settings_of(folder, ["unlabeled"], inputs)
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        lines = (
            json.dumps({**row, "prompt": f"{HEADER} {row['prompt']}", **columns}) + "\n"
            for row in rows
        )
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return settings


def test_an_instruction_before_all_inputs_leaves_none_out(tmp_path: Path) -> None:
    found = prepared(headed(tmp_path, [f"{HEADER} {text}" for text in INPUTS]))
    assert len(found.tasks[0].unlabeled) == len(INPUTS)


def test_what_is_labelled_under_a_system_text_is_labelled(tmp_path: Path) -> None:
    settings = headed(tmp_path, [], system="Answer in one word.")
    rows = [
        json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    write_inputs(tmp_path / "inputs.jsonl", [*INPUTS, *(f"{text}!" for text in rows)])
    found = prepared(settings)
    assert len(found.tasks[0].unlabeled) == len(INPUTS)
    refused = {
        reason: count for reason, count in found.rejects.items() if reason.startswith("unlabeled")
    }
    assert refused["unlabeled: labelled already"] == 6
    assert sum(refused.values()) == len(rows)  # two of them are dev rows


def test_inputs_of_which_none_is_left_are_an_error(tmp_path: Path) -> None:
    settings = headed(tmp_path, [])
    rows = [
        json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    write_inputs(tmp_path / "inputs.jsonl", rows)
    with pytest.raises(
        DataError,
        match=(
            r"task\.unlabeled: none of 8 inputs is left, mostly since: unlabeled: labelled already "
            r"\(6\)"
        ),
    ):
        prepared(settings)


def test_inputs_are_texts_in_two_parts_of_an_arm(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, ["unlabeled"])
    found = prepared(settings)
    rows = resolve(ARMS["unlabeled"], found, settings).general_rows
    assert sorted((row.question, row.answer) for row in rows) == sorted(
        (" ".join(text.split()[:2]), " ".join(text.split()[2:])) for text in INPUTS
    )
    stream = resolve(ARMS["unlabeled"], found, settings).stream(tiny_tokenizer(), 1, 0)
    assert stream.plan.general_used == 8  # one for each task row


def test_arms_that_need_inputs_or_a_teacher_say_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, ["pseudo_teacher"])
    with pytest.raises(
        ConfigError, match=r"pseudo_teacher needs somebody to ask; set teacher\.endpoint"
    ):
        chosen_arms(settings)
    without = settings.tasks[0].model_copy(update={"unlabeled": ()})
    with pytest.raises(
        ConfigError,
        match=r"pseudo_teacher needs inputs without answers; give some in task\.unlabeled",
    ):
        chosen_arms(settings.model_copy(update={"tasks": (without,)}))


@pytest.mark.e2e
def test_adapters_that_answer_are_trained_on_the_arms_own_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[str]] = []
    fit = made_rows.cell.fit

    def watched(session: Session, plan: ArmPlan, *given: Any) -> Any:
        trained.append({row.origin for row in plan.rows.tasks[0].train})
        return fit(session, plan, *given)

    monkeypatch.setattr(made_rows.cell, "fit", watched)
    settings = settings_of(tmp_path, ["pseudo_self"])
    loaded, found = load_tiny(tmp_path / "other"), prepared(settings)
    arm = ARMS["pseudo_self"]
    plans = [resolve(arm, view, settings) for view in (found, *found.folds(2, 0))]
    kept = session(loaded, settings, tmp_path / "kept")
    answered = made_rows.with_answers(kept, found, plans)
    own = [{row.origin for row in plan.rows.tasks[0].train} for plan in plans]
    assert trained == [origins for origins in own for _ in range(3)]
    for plan in plans:
        informed = replace(plan, rows=replace(plan.rows, own_general=answered.own_general))
        rows = informed.general_rows
        assert {row.question for row in rows} <= set(INPUTS)
        assert all(row.messages[-1].role == "assistant" and row.answer for row in rows)
        # They are rows of the task: with its anchor, as in inference.
        stream = informed.stream(loaded.tokenizer, 1, 0)
        form = encode.make_format(loaded.tokenizer, found.tasks[0].anchor)
        assert stream.general[0].ids.tolist() == encode.encode(rows[0], form).ids.tolist()
    monkeypatch.setattr(made_rows.cell, "fit", lambda *given: pytest.fail("trained again"))
    again = made_rows.with_answers(kept, found, plans)
    assert (again.own_general, again.notes) == (answered.own_general, answered.notes)
    assert "8 of 8 inputs answered by 3 adapters of 8 epochs" in answered.notes[-3]


def test_of_the_adapters_answers_the_likeliest_to_all_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, ["pseudo_self"], INPUTS[:2])
    loaded, found = load_tiny(tmp_path / "other"), prepared(settings)
    said = iter([["red", "red"], ["blue", ""], ["green", "red"]])
    monkeypatch.setattr(made_rows.cell, "fit", lambda *given: [])
    monkeypatch.setattr(made_rows.adapter, "adapter_state", lambda loaded: {})
    monkeypatch.setattr(made_rows.adapter, "use", lambda *given: None)
    monkeypatch.setattr(generate, "generate", lambda *given, **named: next(said))
    # Nats of (first: blue, green, red; second: red) by three adapters: blue is no adapter's sure
    # loser, and the sum's best.
    nats = iter([[2.0, 9.0, 1.0, 1.0], [1.0, 9.0, 8.0, 1.0], [2.0, 1.0, 8.0, 1.0]])
    monkeypatch.setattr(generate, "nats", lambda *given: (np.array(next(nats)), None))
    arm = ARMS["pseudo_self"]
    answered = made_rows.with_answers(
        session(loaded, settings), found, [resolve(arm, found, settings)]
    )
    rows = resolve(arm, answered, settings).general_rows
    assert [row.answer for row in rows] == ["blue", "red"]


@pytest.fixture
def endpoint() -> Iterator[tuple[str, Asked]]:
    """Answers "blue"; is busy at first; refuses what is asked about cows."""

    def said(body: dict[str, Any], number: int) -> tuple[int, str]:
        text = body["messages"][-1]["content"]
        answer = {"long": "It is so. It is"}.get(
            text, "I'm sorry, I cannot." if "cow" in text else " blue "
        )
        return 400 if text == "forbidden" else 429 if number == 1 else 200, answer

    with answering.endpoint(said) as (url, asked):
        yield url, asked


@pytest.mark.e2e
def test_a_teacher_answers_once_and_again_after_it_was_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: tuple[str, Asked]
) -> None:
    url, asked = endpoint
    monkeypatch.setenv("MY_KEY", "a secret")
    teacher = {"endpoint": url, "model": "wise", "key_variable": "MY_KEY"}
    settings = settings_of(tmp_path, ["pseudo_teacher"], teacher=teacher)
    results = run_comparison(settings)
    out = Path(settings.output_dir)
    rows = store.read_json(out / "general" / "pseudo_teacher-seed0.json")["rows"]
    assert len(asked) == 8 + 1
    assert {one["messages"][0]["content"] for one in asked} == {"Name it."}
    assert {row["messages"][-1]["content"] for row in rows} == {"blue"}
    refused = sum("cow" in one["messages"][-1]["content"] for one in asked[1:])
    assert len(rows) == 8 - refused
    assert any("inputs answered by 'wise' at http://127" in note for note in results.notes)
    assert all(
        "a secret" not in file.read_text(errors="ignore")
        for file in out.rglob("*")
        if file.is_file()
    )
    for file in (out / "cells").glob("pseudo_teacher*"):
        file.unlink()
    (out / "general" / "pseudo_teacher-seed0.json").unlink()
    run_comparison(settings, resume=True)
    assert len(asked) == 8 + 1  # what was answered is not asked again


@pytest.mark.parametrize(
    "address",
    ["http://me:secret@somewhere/v1", "me:secret@somewhere/v1", "http://somewhere/v1?key=secret"],
)
def test_an_address_with_a_password_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="may hold no password") as error:
        Endpoint(address, "m")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="may hold no password") as error:
        comparison_settings(tmp_path, tmp_path / "r", teacher={"endpoint": address, "model": "m"})
    assert "secret" not in str(error.value)


def test_a_conversation_that_is_refused_stops_no_others(endpoint: tuple[str, Asked]) -> None:
    url, _ = endpoint
    teacher = Endpoint(url, "strict")
    with pytest.raises(ConfigError, match=r"status 400: .*; check the address"):
        teacher.say(
            [Message("user", "forbidden")], 4, 0.0, 0
        )  # nothing was answered yet: it may be the address
    assert teacher.say([Message("user", "fine")], 4, 0.0, 0) == "blue"
    assert teacher.say([Message("user", "forbidden")], 4, 0.0, 0) is None
    assert teacher.say([Message("user", "long")], 4, 0.0, 0) == "It is so. It is"
    assert teacher.say([Message("user", "long")], 4, 0.0, 0, whole=True) == "It is so."


def test_an_endpoint_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulcrum.model.endpoint._RETRIES", 0)
    with pytest.raises(
        ConfigError, match=r"http://127\.0\.0\.1:9/v1: no answer from 'm': .*check the address"
    ):
        Endpoint("http://127.0.0.1:9/v1", "m").say([Message("user", "x")], 4, 0.0, 0)


@pytest.mark.e2e
def test_a_comparison_trains_on_answers_of_its_own_adapters_and_goes_on(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, ["unlabeled", "pseudo_self"], [*INPUTS, INPUTS[0]])
    results = run_comparison(settings)
    assert {arm.arm for arm in results.arms} == {"sft", "unlabeled", "pseudo_self"}
    assert store.read_json(tmp_path / "out" / "manifest.json")["left_out"][0]["duplicate"] == 1
    before = (tmp_path / "out" / "certificate.json").read_bytes()
    for cell in (tmp_path / "out" / "cells").glob("pseudo_self-*"):
        cell.unlink()
    run_comparison(settings, resume=True)
    assert (tmp_path / "out" / "certificate.json").read_bytes() == before


def test_what_the_others_side_spends_gives_sft_more_trials(tmp_path: Path) -> None:
    def tried(names: Sequence[Any], **changes: Any) -> int:
        settings = settings_of(tmp_path, names)
        compare = settings.compare.model_copy(update={"sft_epochs": None, **changes})
        settings = settings.model_copy(
            update={"compare": compare, "mix": settings.mix.model_copy(update={"repeats": 8})}
        )
        return len(resolve(ARMS["sft"], prepared(settings), settings).trials)

    assert tried(["tell"]) == 3
    assert tried([arm_named("tell_gradient")]) == 7
    assert tried(["pseudo_self"]) == 6
    assert tried(["tell"], extra_trials=4) == 7
