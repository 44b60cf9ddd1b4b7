"""Whole runs and comparisons on a tiny model: what they write, that killed ones go on to the same
results, what they refuse."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulcrum import api
from fulcrum.config import arms as registry
from fulcrum.config.base import DataSource
from fulcrum.config.settings import Settings, load_settings, settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, FulcrumError, ModelError, StoreError
from fulcrum.core.progress import Silent
from fulcrum.core.types import Anchor, Hyperparameters, Message, Prediction
from fulcrum.data import encode, run_data, task_data
from fulcrum.experiments import lifecycle, scoring
from fulcrum.experiments.arm_data import planned_tokens, resolve
from fulcrum.experiments.compare import run_comparison
from fulcrum.experiments.train import run_training
from fulcrum.report import run_report
from fulcrum.report.run_kinds import COMPARE
from fulcrum.stats.certificate import Certificate
from fulcrum.training import compile, loop
from helpers.runs import KillAfter, Killed, lines, settings, timeless
from helpers.tiny import CONTEXT, WORDS, save_tiny, tiny_tokenizer, write_rows

ARMS = ("base", "base_anchor", "sft", "sft_anchor", "mix", "tell")
COLOURS = ("red", "blue", "green", "grey")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two small tasks and a pool."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny(folder / "model")
    rows = [(f"colour {word}", COLOURS[i % 4]) for i, word in enumerate(WORDS)]
    write_rows(folder / "train.jsonl", rows[:6])
    write_rows(folder / "dev.jsonl", rows[6:9])
    write_rows(folder / "test.jsonl", rows[9:])
    write_rows(folder / "sizes.jsonl", [(f"size {word}", str(len(word))) for word in WORDS])
    write_rows(
        folder / "pool.jsonl",
        [(f"say {word} and {other}", f"{other} {word}") for word in WORDS for other in WORDS],
    )
    return folder


@pytest.fixture(autouse=True)
def _own_arrow_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "arrow")


# One run.


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    run_training(settings(place, folder, mix__repeats="auto"))
    return folder


def answers(folder: Path) -> list[dict[str, Any]]:
    """The trained arm's predictions on test rows."""
    return [
        row
        for row in lines(folder / "predictions.jsonl")
        if (row["arm"], row["task"]) == ("tell", "task")
    ]


def test_a_run_fills_its_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "manifest.json",
        "checkpoints",
        "adapter",
        "predictions.jsonl",
        "results.json",
        "report.html",
        "README.md",
    }
    assert "Name it." in (finished / "README.md").read_text()
    assert "<html" in (finished / "report.html").read_text()


def test_a_runs_results(finished: Path, place: Path) -> None:
    results = run_report.load(finished)
    assert results["kind"] == "train"
    assert json.loads((finished / "manifest.json").read_text())["left_out"] == [results["rejects"]]
    assert [arm["arm"] for arm in results["arms"]] == ["base_anchor", "tell"]
    base, tell = results["arms"]
    assert (base["size"], base["tried"], base["chosen"], base["training"]) == (0, [], None, None)
    assert (tell["size"], results["size"]) == (6, 6)
    assert [tried["setting"]["repeats"] for tried in tell["tried"]] == [1, 2, 4, 8]
    best = min(tried["dev_nll"] for tried in tell["tried"])
    chosen, trained = tell["tried"][tell["chosen"]], tell["training"]
    assert chosen["dev_nll"] == best == dict(trained["dev_nll"])[trained["best_step"]]
    assert (trained["repeats"], trained["train_tokens"]) == (
        chosen["setting"]["repeats"],
        chosen["train_tokens"],
    )
    assert trained["share"]["task_examples"] == 6 * trained["repeats"]
    assert trained["share"]["general_examples"] == 12 * trained["repeats"]
    assert (
        trained["history"][-1]["tokens"]
        == trained["train_tokens"]
        == trained["share"]["total_tokens"]
    )
    last = {event["run"]: event for event in lines(finished / "events.jsonl")}
    for tried in tell["tried"]:
        repeats = tried["setting"]["repeats"]
        event = last[f"tell-seed0-repeats{repeats}"]
        assert event["step"] == event["steps"] == -(-18 * repeats // 4)
        assert event["tokens"] == tried["train_tokens"]
    assert results["step_cap"] == 36
    (facts,) = results["tasks"]
    assert (facts["train"], facts["dev"], facts["test"], facts["test_groups"]) == (6, 3, 7, 7)
    assert (facts["anchor"], facts["placement"]) == ("Name it.", "user_prefix")
    assert set(tell["general_nll"]) == {"builtin", "pool"}
    rises = {(d["arm"], d["reference"], d["task"]): d for d in results["forgetting"]}
    assert set(rises) == {("tell", "base_anchor", "builtin"), ("tell", "base_anchor", "pool")}
    for (*_, source), rise in rises.items():
        assert rise["estimate"] == pytest.approx(
            tell["general_nll"][source]["value"] - base["general_nll"][source]["value"]
        )
        assert rise["low"] <= rise["estimate"] <= rise["high"]
    scores = {
        arm["arm"]: {score["metric"]: score for score in arm["scores"]["task"]}
        for arm in results["arms"]
    }
    assert scores["tell"]["nll"]["value"] < scores["base_anchor"]["nll"]["value"] - 1
    assert scores["tell"]["nll"]["n"] == 7


def test_a_runs_predictions_are_the_scores(finished: Path) -> None:
    results = run_report.load(finished)
    rows = answers(finished)
    assert {(row["prompt"], row["gold"]) for row in rows} == {
        (f"colour {WORDS[i]}", COLOURS[i % 4]) for i in range(9, 16)
    }
    nll, match = results["arms"][1]["scores"]["task"]
    np.testing.assert_allclose(
        sum(row["nll_sum"] for row in rows) / sum(row["n_tokens"] for row in rows), nll["value"]
    )
    np.testing.assert_allclose(
        np.mean([row["output"].strip() == row["gold"] for row in rows]), match["value"]
    )


def test_the_adapter_folder_works_without_fulcrum(finished: Path, place: Path) -> None:
    """Plain Transformers and PEFT, the saved chat template, and the loss that predictions.jsonl
    states."""
    causal = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(causal, finished / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "adapter")
    for row in answers(finished):
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert (
            text
            == f"<|im_start|>user\nName it.\n\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt = tokenizer(text)["input_ids"]
        answer = [*tokenizer(row["gold"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(
                peft(input_ids=ids).logits[0, len(prompt) - 1 : -1],
                ids[0, len(prompt) :],
                reduction="sum",
            )
        np.testing.assert_allclose(float(nats), row["nll_sum"], rtol=1e-4)
        out = peft.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        assert (
            tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()
            == row["output"]
        )


def test_a_finished_run_is_loaded_and_used(finished: Path) -> None:
    adapter = api.load_adapter(finished)
    rows = answers(finished)
    assert adapter.answer([row["prompt"] for row in rows]) == [row["output"] for row in rows]
    conversation = [
        Message("user", rows[0]["prompt"]),
        Message("assistant", "red"),
        Message("user", "again"),
    ]
    assert len(adapter.reply([conversation])) == 1
    with pytest.raises(ConfigError, match="no task 'tickets' in this run; known: task"):
        adapter.answer(["x"], task="tickets")


def test_a_finished_run_is_evaluated_again(finished: Path, place: Path) -> None:
    scores, predictions = api.evaluate(finished)
    expected = run_report.load(finished)["arms"][1]["scores"]["task"]
    assert [(score.metric, score.value) for score in scores] == [
        (score["metric"], score["value"]) for score in expected
    ]
    (score,), predictions = api.evaluate(
        finished, data=str(place / "dev.jsonl"), metric_names=["nll"]
    )
    assert (score.n, len(predictions), predictions[0].output) == (3, 3, None)


def test_test_rows_that_changed_since_the_run_are_refused(place: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    shutil.copy(place / "test.jsonl", test)
    run_training(settings(place, tmp_path / "r", task__test=str(test), mix__repeats=1))
    api.evaluate(tmp_path / "r")
    test.write_text(test.read_text().replace("red", "blue", 1))
    with pytest.raises(
        DataError, match=r"the test rows of 'task' changed since the run.*with --data FILE"
    ):
        api.evaluate(tmp_path / "r")


def test_a_run_without_test_rows_of_its_own_is_evaluated_on_those_it_held_out(
    place: Path, tmp_path: Path
) -> None:
    changes = {
        "task__train": str(place / "sizes.jsonl"),
        "task__dev": None,
        "task__test": None,
        "mix__repeats": 1,
    }
    results = run_training(settings(place, tmp_path / "r", **changes, task__test_limit=3))
    scores, predictions = api.evaluate(tmp_path / "r")
    expected = results.arms[1].scores["task"]
    assert [(score.metric, score.value, score.n) for score in scores] == [
        (s.metric, s.value, 3) for s in expected
    ]
    assert [row.origin for row in predictions] == [row["origin"] for row in answers(tmp_path / "r")]


def test_a_truncated_adapter_says_so(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "r")
    file = tmp_path / "r" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        StoreError,
        match=r"adapter: adapter_model\.safetensors changed or missing since training; make",
    ):
        api.load_adapter(tmp_path / "r")


def test_a_folder_that_holds_no_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a run folder \(no config\.yaml\)"):
        api.load_adapter(tmp_path)
    with pytest.raises(StoreError, match="holds the arm 'tell' only, not 'sft'"):
        api.load_adapter(finished, arm="sft")
    shutil.copy(finished / "config.yaml", tmp_path)
    with pytest.raises(StoreError, match="no trained adapter in it; finish the run with --resume"):
        api.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "arm", "shown"),
    [
        ({"mix__general_per_task": 0}, "sft_anchor", 12),
        ({"mix__general_per_task": 0, "task__anchor": None}, "sft", 12),
        ({"task__anchor": None}, "mix", 36),
    ],
)
def test_settings_without_anchor_or_general_data_are_the_other_arms(
    place: Path, tmp_path: Path, changes: dict, arm: str, shown: int
) -> None:
    results = run_training(settings(place, tmp_path / "r", **changes))
    assert [a.arm for a in results.arms] == ["base_anchor" if "anchor" in arm else "base", arm]
    (tried,), trained = results.arms[1].tried, results.arms[1].training
    assert tried.setting == Hyperparameters(2)
    assert trained.share.task_examples + trained.share.general_examples == shown


@pytest.mark.parametrize("steps", [5, 9])
def test_a_killed_run_goes_on_to_the_same_bits(place: Path, tmp_path: Path, steps: int) -> None:
    """Killed in the middle of training, and right before the last checkpoint."""
    dropout = {"train__lora_dropout": 0.2}
    run_training(settings(place, tmp_path / "whole", **dropout))
    with pytest.raises(Killed):
        run_training(settings(place, tmp_path / "killed", **dropout), progress=KillAfter(steps))
    assert not (tmp_path / "killed" / "results.json").exists()
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        run_training(settings(place, tmp_path / "killed", **dropout))
    run_training(settings(place, tmp_path / "killed", **dropout), resume=True)
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert timeless(run_report.load(whole)) == timeless(run_report.load(resumed))


def test_equal_seeds_give_equal_adapters_and_others_do_not(place: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_training(settings(place, tmp_path / name, seed=seed))
    first, again, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc"
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_the_notebook_face(place: Path, tmp_path: Path) -> None:
    import fulcrum

    given = settings(place, tmp_path / "r", mix__repeats=1).model_dump()
    results = fulcrum.train(**given)
    assert results.kind == "train"
    assert fulcrum.load_adapter(tmp_path / "r").anchor() == Anchor("Name it.")


# What a run refuses, before it trains.


@pytest.fixture
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("trained in spite of bad input")

    monkeypatch.setattr(loop, "train", trained)


BAD: list[tuple[dict[str, Any], type[FulcrumError], str]] = [
    ({"model": "no/where/model"}, ModelError, "model"),
    ({"task__train": "missing.jsonl"}, DataError, r"missing\.jsonl"),
    (
        {"task__test": "{place}/train.jsonl"},
        DataError,
        r"6 of 6 test rows have content of the training rows .*remove them",
    ),
    ({"task__dev": "{place}/test.jsonl"}, DataError, r"7 of 7 test rows have content of"),
    (
        {"task__anchor": "say ant"},
        DataError,
        r"pool\.jsonl:\d+: this general row holds the anchor's text 'say ant'",
    ),
    (
        {"mix__general_per_task": 40},
        DataError,
        r"the mix needs 480 general rows, the pool has 256 usable \(of 256\), and 2 of these "
        r"are held out for measuring "
        r"forgetting; set mix\.general_per_task to 21\.16 or less, lower mix\.repeats, .*or "
        r"add rows",
    ),
    ({"task__metrics": ["nll", "acuracy"]}, ConfigError, "acuracy.*did you mean 'accuracy'"),
    (
        {"train__max_length": 16, "train__too_long": "error"},
        DataError,
        r"jsonl:\d+: train row of \d+ tokens is over the limit of 16 \(6 of 6 rows are\); set "
        r"train\.max_length to \d+ or more",
    ),
    ({"train__max_length": 16}, DataError, r"over the limit of 16"),
    ({"task__group": "customer"}, DataError, "no column 'customer'"),
    ({"general": "nothing/*.jsonl"}, DataError, "nothing"),
    (
        {"general": []},
        ConfigError,
        r"mix\.general_per_task is 2 and `general:` names no data; name some, or set it to 0",
    ),
]


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("changes", "kind", "message"), BAD, ids=[next(iter(changes)) for changes, _, _ in BAD]
)
def test_bad_input_is_refused_before_training(
    place: Path, tmp_path: Path, changes: dict, kind: type[FulcrumError], message: str
) -> None:
    changes = {
        key: value.format(place=place) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(kind, match=message):
        run_training(settings(place, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("_no_training")
def test_a_full_disk_is_refused_before_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    with pytest.raises(
        StoreError,
        match=r"needs \d+ MiB, the disk has 1 MiB free; free some space or set output_dir",
    ):
        run_training(settings(place, tmp_path / "r"))


@pytest.mark.usefixtures("_no_training")
def test_a_folder_of_another_run_is_refused(place: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match="already holds a run; resume it"):
        run_training(settings(place, finished))
    with pytest.raises(
        StoreError,
        match=r"cannot resume, .*settings\.train\.lora_r \(4 -> 8\).* changed since it started",
    ):
        run_training(settings(place, finished, mix__repeats="auto", train__lora_r=8), resume=True)
    with pytest.raises(
        StoreError,
        match=r"cannot resume, .*kind \('train' -> 'compare'\).* changed since it started",
    ):
        run_comparison(settings(place, finished, mix__repeats="auto"), resume=True)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("_no_training")
def test_changed_data_are_refused_on_resume(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    shutil.copy(place / "train.jsonl", data)
    given = settings(place, tmp_path / "r", task__train=str(data))
    with pytest.raises(AssertionError, match="trained in spite"):
        run_training(given)
    data.write_text(data.read_text().replace("red", "Red", 1))
    with pytest.raises(
        StoreError, match=r"cannot resume, data\.task train changed since it started"
    ):
        run_training(given, resume=True)


# The rows of a run.


def prepared(place: Path, tmp_path: Path, **changes: Any) -> run_data.RunData:
    given = settings(place, tmp_path / "r", **changes)
    return run_data.prepare(given, tiny_tokenizer(), CONTEXT, given.seed)


def met_on_the_way(size: int, usable: int) -> int:
    """How many unusable pool rows (numbers from `usable` on) the seeded walk meets before it has
    every usable one."""
    order = np.random.default_rng(store.seed_for(0, "general")).permutation(size)
    return int((order[: np.flatnonzero(order < usable).max()] >= usable).sum())


def test_long_rows_are_dropped_and_counted(place: Path, tmp_path: Path) -> None:
    long = "x" * 600
    train = write_rows(tmp_path / "train.jsonl", [("a b", "c"), ("d", "e"), (long, "f")])
    test = write_rows(tmp_path / "test.jsonl", [("g", "h"), ("i " + long, "j")])
    pool = write_rows(
        tmp_path / "pool.jsonl",
        [(f"say {i}", "so") for i in range(12)] + [(f"k {i}", long) for i in range(4)],
    )
    rows = prepared(
        place,
        tmp_path,
        task__train=train,
        task__test=test,
        general=pool,
        eval__general_rows=0,
        mix__repeats=1,
        mix__general_per_task=6,
    )
    assert (rows.n_task, len(rows.tasks[0].test), len(rows.general)) == (2, 1, 12)
    assert rows.rejects["train: over 512 tokens (train.too_long: drop)"] == 1
    assert rows.rejects["test: over 512 tokens (train.too_long: drop)"] == 1
    assert rows.rejects.get("general: over 512 tokens", 0) == met_on_the_way(16, 12) > 0


def test_a_limit_is_filled_with_rows_that_fit(place: Path, tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train.jsonl", [(f"{i} " + "x" * (600 if i % 2 else 1), "c") for i in range(12)]
    )
    rows = prepared(
        place, tmp_path, task__train=train, task__train_limit=6, task__test_limit=5, mix__repeats=1
    )
    assert (rows.n_task, len(rows.tasks[0].test)) == (6, 5)
    assert all(len(row.question) < 600 for row in rows.tasks[0].train)


@pytest.mark.parametrize(("metric", "kept"), [(["nll"], 2), (["nll", "exact_match"], 1)])
def test_a_test_row_without_room_for_an_answer_is_counted(
    place: Path, tmp_path: Path, metric: list[str], kept: int
) -> None:
    test = write_rows(tmp_path / "test.jsonl", [("g", "h"), ("x" * 440, "j")])
    rows = prepared(
        place, tmp_path, task__test=test, task__max_new_tokens=100, task__metrics=metric
    )
    assert len(rows.tasks[0].test) == kept
    assert rows.rejects.get("test: over 512 tokens (train.too_long: drop)", 0) == 2 - kept


@pytest.mark.parametrize("part", ["dev", "test"])
def test_a_file_without_a_usable_row_names_its_faults(
    place: Path, tmp_path: Path, part: str
) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [("a", ""), ("b", "")])
    with pytest.raises(
        DataError,
        match=r"bad\.jsonl: 0 usable of 2 rows read, at least 1 .* rejected: 2 empty answer",
    ):
        prepared(place, tmp_path, **{f"task__{part}": file})


def test_one_tasks_test_rows_are_not_anothers_training_rows(place: Path, tmp_path: Path) -> None:
    data = two_tasks(place, tmp_path / "r").model_dump(mode="json")
    data["tasks"][1]["test"] = write_rows(
        tmp_path / "both.jsonl", [("colour bee", "3"), ("size of it", "2")]
    )
    message = (
        r"1 of 2 size test rows have content of the colour training rows \(1 the same prompt\): "
        r".*both\.jsonl:1 = "
    )
    with pytest.raises(DataError, match=message):
        run_data.prepare(settings_from_dict(data), tiny_tokenizer(), CONTEXT, 0)


def test_an_anchor_after_the_last_question_changes_no_target(place: Path, tmp_path: Path) -> None:
    """Only last answers see it: then no arm trains on others."""
    turns = [
        [("user", f"colour {word}"), ("assistant", "what?"), ("user", "it"), ("assistant", "red")]
        for word in WORDS[:4]
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for placement, answers in (("user_suffix", ["red"]), ("user_prefix", ["what?", "red"])):
        anchor = {"text": "Name it.", "placement": placement}
        given = settings(
            place, tmp_path / "r", task__train=str(tmp_path / "train.jsonl"), task__anchor=anchor
        )
        found = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)
        for arm in ("sft", "sft_anchor", "mix", "tell"):
            for row in (
                resolve(registry.ARMS[arm], found, given).stream(tiny_tokenizer(), 2, 0).task
            ):
                assert tiny_tokenizer().decode(row.ids[row.loss_mask]) == "".join(
                    f"{text}<|im_end|>" for text in answers
                )


def test_sft_tries_as_much_as_tell_and_few_epochs_too(place: Path, tmp_path: Path) -> None:
    given = settings(place, tmp_path / "r", mix__repeats="auto", mix__general_per_task=4)
    rows = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)
    assert rows.step_cap == 60  # 6 rows x 8 x (1 + 4), 4 a step
    assert resolve(registry.ARMS["tell"], rows, given).trials == tuple(
        map(Hyperparameters, (1, 2, 4, 8))
    )
    assert resolve(registry.ARMS["sft"], rows, given).trials == tuple(
        map(Hyperparameters, (1, 3, 12, 40))
    )  # 60 steps of 4: 40 epochs of 6


def test_dev_and_test_are_held_out_where_none_are_given(place: Path, tmp_path: Path) -> None:
    sizes = str(place / "sizes.jsonl")
    parts = [
        prepared(place, tmp_path, task__train=sizes, task__dev=None, task__test=None, seed=seed)
        for seed in (0, 1)
    ]
    for rows in parts:
        task = rows.tasks[0]
        assert (len(task.train), len(task.dev), len(task.test)) == (
            10,
            2,
            4,
        )  # 16 rows: a quarter, then a fifth of 12
        assert (
            len({row.question for part in (task.train, task.dev, task.test) for row in part}) == 16
        )
    assert parts[0].tasks[0].test == parts[1].tasks[0].test  # whatever the seed


def test_general_rows_are_neither_task_rows_nor_held_out_ones(place: Path, tmp_path: Path) -> None:
    pool = write_rows(
        tmp_path / "pool.jsonl",
        [("colour ant", "red"), ("colour jay", "blue")] + [(f"say {i}", "so") for i in range(30)],
    )
    rows = prepared(
        place, tmp_path, general=pool, eval__general_rows=4, mix__repeats=1, mix__general_per_task=4
    )
    assert len(rows.general) == 24
    held_out = {row.question for row in rows.held_out["pool"]}
    assert len(held_out) == 4
    assert not held_out & {row.question for row in rows.general}
    assert not {"colour ant", "colour jay"} & {
        row.question for row in (*rows.general, *rows.held_out["pool"])
    }


def test_twins_of_held_out_rows_are_not_trained_on(place: Path, tmp_path: Path) -> None:
    """The same texts in another file, and rows of the packaged held-out set in the user's own
    pool."""
    pairs = [(f"say {i}", "so") for i in range(28)]
    packaged, _ = task_data.read([DataSource(path="builtin_eval")])
    own = [
        {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
        for row in packaged[:4]
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    pools = [
        *(write_rows(tmp_path / name, pairs) for name in ("a.jsonl", "b.jsonl")),
        str(tmp_path / "c.jsonl"),
    ]
    rows = prepared(
        place,
        tmp_path,
        general=pools,
        eval__general_rows=4,
        mix__repeats=1,
        mix__general_per_task=4,
    )
    held_out = {source: {row.question for row in part} for source, part in rows.held_out.items()}
    assert [len(held_out[source]) for source in ("builtin", "pool")] == [4, 4]
    general = {row.question for row in rows.general}
    assert len(general) == len(rows.general) == 24  # all that is left
    assert not general & (held_out["builtin"] | held_out["pool"])
    assert not held_out["builtin"] & held_out["pool"]
    assert rows.rejects["general: held out for measuring forgetting"] > 0


def test_rows_that_the_chat_template_refuses_are_counted(place: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny_tokenizer().chat_template
    )
    pool = tmp_path / "pool.jsonl"
    with_system = [
        {"system": "Be brief.", "prompt": f"hey {i}", "completion": "so"} for i in range(5)
    ]
    pool.write_text(
        "".join(
            json.dumps({"system": "", "prompt": f"say {i}", "completion": "so"}) + "\n"
            for i in range(24)
        )
    )
    pool.write_text(pool.read_text() + "".join(json.dumps(row) + "\n" for row in with_system))
    given = settings(place, tmp_path / "r", general=str(pool), eval__general_rows=0)
    rows = run_data.prepare(given, tokenizer, CONTEXT, 0)
    assert len(rows.general) == 24
    assert not any(row.messages[0].role == "system" for row in rows.general)
    assert (
        rows.rejects.get("general: refused by the model's chat template", 0)
        == met_on_the_way(29, 24)
        > 0
    )


@pytest.mark.parametrize("general_rows", [0, 16])
def test_a_mix_in_tokens_is_counted_in_tokens(
    place: Path, tmp_path: Path, general_rows: int
) -> None:
    rows = prepared(
        place,
        tmp_path,
        mix__unit="tokens",
        mix__general_per_task=2,
        eval__general_rows=general_rows,
    )
    tokenizer = tiny_tokenizer()
    own = [
        len(encode.encode(row, encode.make_format(tokenizer, Anchor("Name it."))))
        for row in rows.tasks[0].train
    ]
    other = [len(encode.encode(row, encode.make_format(tokenizer, None))) for row in rows.general]
    assert sum(other) == pytest.approx(2 * 2 * sum(own), rel=0.15)
    assert len(rows.general) != 24  # which two rows a row would have been


def test_every_arm_sees_the_same_task_rows_and_smaller_trials_are_nested(
    place: Path, tmp_path: Path
) -> None:
    from fulcrum.model import base_model

    given = settings(place, tmp_path / "r", mix__repeats="auto")
    loaded = base_model.load(given.model, given.train)
    rows = run_data.prepare(given, loaded.tokenizer, loaded.context, 0)
    for repeats in (1, 2, 4, 8):
        found = resolve(registry.ARMS["tell"], rows, given).stream(loaded.tokenizer, repeats, 0)
        assert len(found.general) == 12 * repeats
        is_task, ids = found.plan.slice(0, len(found.plan))
        assert np.bincount(ids[is_task]).tolist() == [repeats] * 6
        assert sorted(ids[~is_task]) == list(range(12 * repeats))
    plain, anchored = (
        resolve(registry.ARMS[name], rows, given).stream(loaded.tokenizer, 1, 0).task
        for name in ("mix", "tell")
    )
    prefix = loaded.tokenizer("Name it.\n\n")["input_ids"]
    assert all(len(a) == len(p) + len(prefix) for p, a in zip(plain, anchored, strict=True))
    assert all("Name it." not in loaded.tokenizer.decode(row.ids) for row in found.general)


# Comparisons.


def two_tasks(place: Path, output: Path, **changes: Any) -> Settings:
    shared = {"max_new_tokens": 3, "train_limit": 4, "dev_limit": 2, "test_limit": 4}
    tasks = [
        {
            "name": "colour",
            "train": str(place / "train.jsonl"),
            "dev": str(place / "dev.jsonl"),
            "test": str(place / "test.jsonl"),
            "anchor": "Name it.",
            **shared,
        },
        {
            "name": "size",
            "train": str(place / "sizes.jsonl"),
            "anchor": {"text": "COUNT: ", "placement": "response_prefix"},
            **shared,
        },
    ]
    data = settings(place, output).model_dump(mode="json")
    data |= {"tasks": tasks, "compare": {"arms": list(ARMS), "seeds": [0, 1]}, **changes}
    return settings_from_dict(data)


@pytest.fixture(scope="session")
def compared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "six"
    run_comparison(two_tasks(place, folder))
    return folder


def test_a_comparison_has_every_arm_at_every_seed(compared: Path) -> None:
    results = run_report.load(compared)
    assert results["kind"] == "compare"
    found = [(arm["arm"], arm["size"], arm["seed"]) for arm in results["arms"]]
    # Four training and two dev rows of each task; the second has no test file, so that every arm is
    # asked anew at each seed.
    assert sorted(found) == sorted(
        (arm, 6 if arm in ARMS[2:] else 0, seed) for arm in ARMS for seed in (0, 1)
    )
    assert results["size"] == 6
    assert [(task["train"], task["dev"], task["test"]) for task in results["tasks"]] == [
        (6, 0, 4)
    ] * 2
    for arm in results["arms"]:
        assert set(arm["scores"]) == {"colour", "size"}
        assert [score["n"] for scores in arm["scores"].values() for score in scores] == [4] * 4
        assert set(arm["general_nll"]) == {"builtin", "pool"}
    assert [task["name"] for task in results["tasks"]] == ["colour", "size"]
    rows = lines(compared / "predictions.jsonl")
    assert len(rows) == 6 * 2 * (
        2 * 4 + 2 * 2
    )  # cells x (rows of two tasks, and of two held-out sources)
    for origin in {row["origin"] for row in rows}:
        assert (
            len({row["n_tokens"] for row in rows if row["origin"] == origin}) == 1
        )  # also after "COUNT: "
    rises = {(d["arm"], d["task"]): d["n_seeds"] for d in results["forgetting"]}
    assert rises == {(arm, source): 2 for arm in ARMS[1:] for source in ("builtin", "pool")}
    assert (compared / "report.html").exists()


def test_p_values_of_several_tasks_are_adjusted_for_their_number(compared: Path) -> None:
    known = {
        task: Certificate.read(compared / "certificates" / task / "certificate.json")
        for task in ("colour", "size")
    }
    single = {task: sealed.answer.p for task, sealed in known.items()}
    low, high = sorted(single, key=lambda task: single[task])
    expected = {low: min(1.0, 2 * single[low]), high: max(min(1.0, 2 * single[low]), single[high])}
    for sealed in known.values():
        assert sealed.inputs.adjusted_p == pytest.approx(expected)


def test_no_arm_uses_more_steps_than_tell(compared: Path) -> None:
    results = run_report.load(compared)
    assert results["step_cap"] == 18  # 2 x 12 task rows + 48 general ones, 4 a step
    tried = {
        (arm["arm"], arm["seed"]): [t["setting"]["repeats"] for t in arm["tried"]]
        for arm in results["arms"]
    }
    for seed in (0, 1):
        assert (
            tried["sft", seed] == tried["sft_anchor", seed] == [1, 2, 6]
        )  # 18 steps of 4 hold 6 epochs of 12 rows
        assert tried["mix", seed] == tried["tell", seed] == [2]
    assert tried["base", 0] == tried["base_anchor", 0] == [1]  # scored on dev rows, not trained
    last = {event["run"]: event for event in lines(compared / "events.jsonl")}
    for arm in results["arms"]:
        name = f"{arm['arm']}-6-seed{arm['seed']}"
        if arm["arm"] in ARMS[:2]:
            assert arm["training"] is None
            assert not any(run.startswith(f"{arm['arm']}-") for run in last)
            continue
        repeats, once = arm["training"]["repeats"], 12 if arm["arm"].startswith("sft") else 36
        assert arm["training"]["steps"] == last[name]["steps"] == once * repeats // 4 <= 18
        for number in tried[arm["arm"], arm["seed"]]:
            folds = [last[f"{name}-repeats{number}-fold{fold}"] for fold in range(3)]
            assert [fold["steps"] for fold in folds] == [
                once * 2 // 3 * number // 4
            ] * 3  # two of three parts of the rows
            for event in folds:
                assert event["learning_rate"] == pytest.approx(
                    1e-3
                )  # each decays fully within its own steps
        assert arm["training"]["history"][-1]["learning_rate"] == pytest.approx(1e-3)
        assert (
            arm["training"]["best_step"] == arm["training"]["steps"]
        )  # no row is left to choose a step by
        assert arm["training"]["dev_nll"] == []


def test_arms_differ_in_their_tokens_only_as_they_say(compared: Path) -> None:
    trials = {
        arm["arm"]: arm["training"] for arm in run_report.load(compared)["arms"] if arm["training"]
    }
    assert (
        trials["sft"]["share"]["general_examples"]
        == trials["sft_anchor"]["share"]["general_examples"]
        == 0
    )
    assert (
        trials["mix"]["share"]["general_examples"]
        == trials["tell"]["share"]["general_examples"]
        == 48
    )
    assert trials["tell"]["share"]["task_examples"] == trials["mix"]["share"]["task_examples"] == 24
    assert trials["tell"]["train_tokens"] > trials["mix"]["train_tokens"]


def test_paired_differences_are_those_of_the_predictions(compared: Path) -> None:
    results = run_report.load(compared)
    pairs = {(d["task"], d["metric"], d["arm"], d["reference"]): d for d in results["differences"]}
    assert len(pairs) == len(results["differences"]) == 12 * 2 * 2
    rows = lines(compared / "predictions.jsonl")

    def mean(arm: str, task: str) -> float:
        chosen = [row for row in rows if (row["arm"], row["task"]) == (arm, task)]
        return sum(row["nll_sum"] for row in chosen) / sum(row["n_tokens"] for row in chosen)

    for task in ("colour", "size"):
        for arm, reference in (("tell", "sft_anchor"), ("mix", "sft")):
            found = pairs[task, "nll", arm, reference]
            np.testing.assert_allclose(
                found["estimate"], mean(arm, task) - mean(reference, task), rtol=1e-6
            )
            assert found["low"] < found["estimate"] < found["high"]
            assert (found["n_seeds"], found["higher_is_better"]) == (2, False)
        assert pairs[task, "exact_match", "tell", "sft"]["higher_is_better"]


@pytest.mark.parametrize(
    ("metric", "own", "other", "expected"),
    [
        (
            "json_valid",
            [[1.0] * 4],
            [[0.0] * 4],
            (1.0, 0.025**0.25, 1.0),
        ),  # all four differ: that is no lack of a difference
        ("exact_match", [[0.0] * 4], [[0.0] * 4], (0.0, 0.025**0.25 - 1, 1 - 0.025**0.25)),
        ("chrf", [[3.0] * 4], [[3.0] * 4], (0.0, None, None)),  # no share: nothing bounds it
    ],
)
def test_differences_of_shares_that_never_varied_are_bounded(
    metric: str, own: list, other: list, expected: tuple
) -> None:
    rows = [Prediction(str(k), str(k), "", "", "", 0.0, 1) for k in range(4)]
    found = scoring.paired("task", metric, "tell", "base", own, other, [rows])
    assert (found.estimate, store.plain(found.low), store.plain(found.high)) == pytest.approx(
        expected
    )


def test_each_tasks_anchor_has_its_own_template_in_the_shared_adapter(compared: Path) -> None:
    assert {path.name for path in (compared / "adapters").iterdir()} == {
        "sft",
        "sft_anchor",
        "mix",
        "tell",
    }
    turns = [{"role": "user", "content": "size ant"}]
    tokenizer = AutoTokenizer.from_pretrained(compared / "adapters" / "tell")
    shown = {
        name: tokenizer.apply_chat_template(
            turns, chat_template=name, tokenize=False, add_generation_prompt=True
        )
        for name in ("colour", "size", "default")
    }
    assert (
        shown["colour"]
        == "<|im_start|>user\nName it.\n\nsize ant<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown["size"] == "<|im_start|>user\nsize ant<|im_end|>\n<|im_start|>assistant\nCOUNT:"
    assert shown["default"] == "<|im_start|>user\nsize ant<|im_end|>\n<|im_start|>assistant\n"


def test_a_compared_adapter_answers_as_predicted(compared: Path) -> None:
    rows = [
        r
        for r in lines(compared / "predictions.jsonl")
        if (r["arm"], r["task"], r["seed"]) == ("tell", "size", 0)
    ]
    adapter = api.load_adapter(compared)
    assert adapter.answer([row["prompt"] for row in rows], task="size", max_new_tokens=3) == [
        row["output"] for row in rows
    ]
    with pytest.raises(StoreError, match="no adapter of arm 'tel'; did you mean 'tell'"):
        api.load_adapter(compared, arm="tel")


def test_a_comparison_killed_twice_goes_on_to_the_same_results(
    place: Path, compared: Path, tmp_path: Path
) -> None:
    """Killed in the second fold of an arm's second trial (6 + 4 steps before it), and at the
    second seed (180 before it)."""
    folder = tmp_path / "six"
    with pytest.raises(Killed):
        run_comparison(two_tasks(place, folder), progress=KillAfter(12))
    with pytest.raises(Killed):
        run_comparison(two_tasks(place, folder), resume=True, progress=KillAfter(188))
    finished_cells = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert finished_cells
    run_comparison(two_tasks(place, folder), resume=True)
    assert (
        finished_cells.items()
        <= {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}.items()
    )
    assert timeless(run_report.load(folder)) == timeless(run_report.load(compared))
    proofs = [
        Path("certificates") / task / name
        for task in ("colour", "size")
        for name in ("certificate.json", "outcomes.jsonl")
    ]
    for name in (Path("predictions.jsonl"), *proofs):
        assert (folder / name).read_bytes() == (compared / name).read_bytes()
    for arm in ARMS[2:]:
        name = Path("adapters") / arm / "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (compared / name).read_bytes()


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compare": {"arms": ["sft", "telll"]}},
            r"compare\.arms: no arm 'telll'; did you mean 'tell'",
        ),
        ({"compare": {"arms": []}}, r"compare\.arms: .*at least 1"),
        ({"compare": {"arms": ["tell", "sft", "tell"]}}, r"compare\.arms: 'tell' is listed twice"),
        ({"compare": {"seeds": [0, 1, 0]}}, r"compare\.seeds: 0 is listed twice"),
        (
            {"compare": {"arms": list(ARMS), "sft_epochs": [1, 7]}},
            r"7 epochs of 12 rows are over TELL's 18 steps; use at most 6",
        ),
        (
            {"mix": {"general_per_task": 0, "repeats": 2}},
            r"mix\.general_per_task is 0, so mix, tell would have no general data",
        ),
    ],
)
def test_a_comparison_that_cannot_be_fair_is_refused(
    place: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_comparison(two_tasks(place, tmp_path / "r", **changes))


@pytest.mark.usefixtures("_no_training")
def test_anchored_arms_need_an_anchor(place: Path, tmp_path: Path) -> None:
    given = settings(place, tmp_path / "r", task__anchor=None)
    with pytest.raises(
        ConfigError, match="base_anchor, sft_anchor, tell need an anchor and no task has one"
    ):
        run_comparison(given)


def test_a_damaged_cell_says_so(place: Path, compared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "six"
    shutil.copytree(compared, folder)
    for name in ("tell-6-seed0", "tell-6-seed0-repeats2"):
        cell = folder / "cells" / f"{name}.json"
        whole = cell.read_text()
        for content in ('{"arm": "tell"', '{"arm": "tell"}', "[1]"):
            cell.write_text(content)
            with pytest.raises(StoreError, match=rf"{name}\.json"):
                run_comparison(two_tasks(place, folder), resume=True)
        cell.write_text(whole)
    run_comparison(two_tasks(place, folder), resume=True)


def test_a_model_that_cannot_pack_is_compared_too(place: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "lfm2", "lfm2")
    given = two_tasks(
        place,
        tmp_path / "r",
        model=str(tmp_path / "lfm2"),
        compare={"arms": ["sft", "tell"], "seeds": [0]},
    )
    results = run_comparison(given)
    assert "packed False" in results.environment["probes"]
    assert any("one example per row: packed examples differ" in note for note in results.notes)
    assert [arm.arm for arm in results.arms] == ["sft", "tell"]


def test_a_seed_draws_rows_and_order_anew_and_leaves_what_is_measured_on(
    place: Path, tmp_path: Path
) -> None:
    given = settings(place, tmp_path / "r", task__train_limit=4)
    first, other = (run_data.prepare(given, tiny_tokenizer(), CONTEXT, seed) for seed in (0, 1))
    assert first.tasks[0].train != other.tasks[0].train
    assert first.general != other.general
    assert (first.tasks[0].dev, first.tasks[0].test) == (other.tasks[0].dev, other.tasks[0].test)
    assert first.held_out == other.held_out
    streams = [
        resolve(registry.ARMS["tell"], first, given).stream(tiny_tokenizer(), 2, seed)
        for seed in (0, 1)
    ]
    assert streams[0].plan.fingerprint != streams[1].plan.fingerprint
    again = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)
    assert (again.tasks[0].train, again.general) == (first.tasks[0].train, first.general)


def test_rows_without_general_data_are_shuffled_anew_in_each_epoch(
    place: Path, tmp_path: Path
) -> None:
    given = settings(place, tmp_path / "r", mix__order="random")
    rows = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)
    _, ids = (
        resolve(registry.ARMS["sft"], rows, given).stream(tiny_tokenizer(), 5, 0).plan.slice(0, 30)
    )
    epochs = ids.reshape(5, 6)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [[0, 1, 2, 3, 4, 5]] * 5
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


@pytest.mark.parametrize(
    ("order", "batch", "expected"),
    [
        ("auto", 4, "epoch_stratified"),
        ("auto", 1, "random"),
        ("random", 4, "random"),
        ("task_then_general", 4, "task_then_general"),
    ],
)
def test_short_mixtures_are_stratified_unless_another_order_is_asked_for(
    place: Path, tmp_path: Path, order: str, batch: int, expected: str
) -> None:
    changes = {
        "mix__repeats": 12,
        "mix__general_per_task": 2,
        "train__batch_size": batch,
        "mix__order": order,
    }
    given = settings(place, tmp_path / "r", **changes)
    rows = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)
    plan = resolve(registry.ARMS["tell"], rows, given).stream(tiny_tokenizer(), 12, 0).plan
    assert (len(plan), plan.order) == (
        216,
        expected,
    )  # 12 x 6 x (1 + 2) rows: 54 steps of 4, 216 of 1


def test_auto_leaves_out_repeats_that_the_pool_cannot_feed_and_says_so(
    place: Path, tmp_path: Path
) -> None:
    changes = {"mix__repeats": "auto", "mix__general_per_task": 12, "eval__general_rows": 2}
    given = settings(place, tmp_path / "r", **changes)
    rows = run_data.prepare(
        given, tiny_tokenizer(), CONTEXT, 0
    )  # 6 rows x 12 = 72 general ones a repeat; 256 in the pool
    assert rows.repeats == (1, 2)
    assert len(rows.general) == 144
    assert resolve(registry.ARMS["tell"], rows, given).trials == (
        Hyperparameters(1),
        Hyperparameters(2),
    )
    assert rows.notes == (
        "mix.repeats: auto tries 1, 2 instead of 1, 2, 4, 8: the general data have 254 usable rows",
    )
    assert rows.general_count(1) == 72
    given = settings(place, tmp_path / "r", **{**changes, "mix__general_per_task": 50})
    with pytest.raises(
        DataError,
        match=r"the mix needs 300 general rows, .*set mix\.general_per_task to 42\.33 or less",
    ):
        run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0)


def test_where_one_anchor_allows_last_answers_only_no_task_trains_on_others(
    place: Path, tmp_path: Path
) -> None:
    turns = [("user", "colour ant"), ("assistant", "red"), ("user", "again"), ("assistant", "blue")]
    messages = [{"role": role, "content": text} for role, text in turns]
    file = tmp_path / "turns.jsonl"
    lines = [
        {"messages": [{**messages[0], "content": f"colour x{i}"}, *messages[1:]]} for i in range(4)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = two_tasks(place, tmp_path / "r").model_dump()
    given["tasks"][0].update(
        train=str(file), anchor={"text": "Name it.", "placement": "user_prefix"}
    )
    for placement, trained in (("user_prefix", [True, True]), ("user_suffix", [False, True])):
        given["tasks"][1]["anchor"] = {"text": "Size it.", "placement": placement}
        rows = run_data.prepare(settings_from_dict(given), tiny_tokenizer(), CONTEXT, 0)
        assert [
            m.train for m in rows.tasks[0].train[0].messages if m.role == "assistant"
        ] == trained


def test_other_weights_or_code_are_no_resume(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    given = settings(place, tmp_path / "r", model=str(tmp_path / "model"), mix__repeats=1)
    run_training(given)
    weights = tmp_path / "model" / "model.safetensors"
    save_file(
        {name: tensor * 1.3 for name, tensor in load_file(weights).items()},
        weights,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        StoreError, match=r"cannot resume, environment\.weights \(.*changed since it started"
    ):
        run_training(given, resume=True)
    shutil.copy(place / "model" / "model.safetensors", weights)
    run_training(given, resume=True)
    monkeypatch.setattr("fulcrum.core.store.code", lambda: "edited")
    with pytest.raises(StoreError, match=r"cannot resume, environment\.code \("):
        run_training(given, resume=True)


def test_planned_tokens_count_every_trial_of_every_arm(place: Path, tmp_path: Path) -> None:
    chosen = settings(place, tmp_path / "out", compare={"sft_epochs": [1, 3]})
    known = [registry.ARMS["sft"], registry.ARMS["tell"]]
    session, (rows,) = lifecycle.begin(COMPARE, chosen, known, [0], False, Silent())
    loaded = session.model
    found = sum(planned_tokens(resolve(arm, rows, chosen), loaded.tokenizer) for arm in known)
    streams = [
        resolve(registry.ARMS["sft"], rows, chosen).stream(loaded.tokenizer, repeats, 0)
        for repeats in (1, 3)
    ]
    streams.append(
        resolve(registry.ARMS["mix"], rows, chosen).stream(loaded.tokenizer, 2, 0)
    )  # an anchor is not counted
    assert found == pytest.approx(sum(stream.share().total_tokens for stream in streams), rel=0.02)


@pytest.mark.skipif(compile._compiler() is None, reason="no C++ compiler")
def test_a_run_writes_down_that_it_compiled_and_scores_without(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = loop.row_loss

    def watched(loaded, row, weights, *, kl):
        seen.append(len(loaded.compiled))
        return real(loaded, row, weights, kl=kl)

    monkeypatch.setattr("fulcrum.training.loop.row_loss", watched)
    out = tmp_path / "out"
    result = run_training(settings(place, out, train={"compile": "always"}))
    assert set(seen) == {1}
    assert load_settings(out / "config.yaml").train.compile == "always"
    assert "layers compiled True" in result.environment["probes"]
    state = store.read_json(out / "results.json")
    assert state["settings"]["train"]["compile"] == "always"
    assert (
        run_training(settings(place, tmp_path / "plain", train={"compile": "auto"}))
        .environment["probes"]
        .endswith("False")
    )
    assert load_settings(tmp_path / "plain" / "config.yaml").train.compile == "never"


def test_rivals_of_tell_run_and_are_set_against_it(place: Path, tmp_path: Path) -> None:
    own = {"name": "mine", "anchored": True, "general": "pool", "order": "task_then_general"}
    names = ["sft", "tell", "general_then_task", "placebo_permuted", "mine"]
    given = settings(
        place, tmp_path / "r", compare={"arms": [*names[:-1], own]}, task__metrics=["nll"]
    )
    found = run_comparison(given)
    assert [arm.arm for arm in found.arms] == names
    steps = {arm.arm: arm.training.steps for arm in found.arms}
    assert (
        steps["tell"] == max(steps.values()) == found.step_cap == 14
    )  # 9 rows twice, and 36 general ones, 4 a step
    assert [d.reference for d in found.differences if d.arm == "tell"] == ["sft", *names[2:]]


def test_examples_in_the_prompt_are_an_arm_of_each_seed_and_use_no_adapter(
    place: Path, tmp_path: Path
) -> None:
    names = ["base", "sft", "kshot"]  # after an adapter was trained, which must not stay in use
    given = settings(
        place,
        tmp_path / "r",
        compare={"arms": names, "seeds": [0, 1]},
        task__metrics=["nll", "exact_match"],
    )
    results = run_comparison(given)
    found = {(arm.arm, arm.seed): arm for arm in results.arms}
    assert sorted(found) == [("base", 0), ("kshot", 0), ("kshot", 1), ("sft", 0), ("sft", 1)]
    alone = settings(
        place,
        tmp_path / "alone",
        compare={"arms": ["kshot", "base"]},
        task__metrics=["nll", "exact_match"],
    )
    again = next(arm for arm in run_comparison(alone).arms if arm.arm == "kshot")
    assert [tried.setting.shots for tried in again.tried] == [
        1,
        2,
        4,
    ]  # 9 rows in 3 folds: 6 are left
    assert again.setting == found["kshot", 0].setting
    assert again.scores == found["kshot", 0].scores
    losses = {
        key: [tried.dev_nll for tried in found[key].tried] for key in (("kshot", 0), ("base", 0))
    }
    assert [tried.dev_nll for tried in again.tried] == losses["kshot", 0]
    assert again.tried[again.chosen].dev_nll == min(losses["kshot", 0])
    assert losses["base", 0][0] not in losses["kshot", 0]
    notes = json.loads((tmp_path / "r" / "results.json").read_text())["notes"]
    numbers = f"{found['kshot', 0].setting.shots}, {found['kshot', 1].setting.shots}"
    assert f"kshot of 9 rows: examples in the prompt, by seed: {numbers}" in notes
    pairs = {(d.arm, d.reference): d.n_seeds for d in results.differences}
    assert pairs == {("sft", "kshot"): 2, ("sft", "base"): 2, ("kshot", "base"): 2}
