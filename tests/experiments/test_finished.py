"""A finished run in use: which rows it may be scored on, where predictions go, on which device, and
what its errors say."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fulcrum
from fulcrum import api
from fulcrum.config.settings import settings_from_dict
from fulcrum.core.errors import ConfigError, DataError, ModelError, StoreError
from fulcrum.core.types import Example, Message
from fulcrum.data import run_data
from fulcrum.experiments import finished, scoring
from fulcrum.model import adapter
from fulcrum.report import run_report
from helpers.finished_runs import settings
from helpers.tiny import CONTEXT, load_tiny, save_tiny, tiny_settings, tiny_tokenizer, write_rows

WORDS = (
    "ant",
    "bee",
    "cow",
    "dog",
    "eel",
    "fox",
    "gnu",
    "hen",
    "ibis",
    "jay",
    "kiwi",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pig",
)
ROWS = [(f"colour {word}", ("red", "blue")[i % 2]) for i, word in enumerate(WORDS)]


@pytest.fixture(autouse=True)
def _own_arrow_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two small tasks, and rows that no run has seen."""
    folder = tmp_path_factory.mktemp("use")
    save_tiny(folder / "model")
    write_rows(folder / "train.jsonl", ROWS[:8])
    write_rows(folder / "dev.jsonl", ROWS[8:10])
    write_rows(folder / "test.jsonl", ROWS[10:13])
    write_rows(folder / "new.jsonl", [*ROWS[13:], ROWS[13], ("colour yak", "")])
    write_rows(folder / "sizes.jsonl", [(f"size {word}", str(len(word))) for word in WORDS])
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    fulcrum.train(**settings(place, folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for tests that change it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# ---- which rows


def test_rows_that_the_adapter_was_trained_on_are_refused(run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "mixed.jsonl", [ROWS[13], ("Colour  ant", "green"), ROWS[3]])
    with pytest.raises(DataError) as error:
        finished.evaluate(run, data=data)
    message = str(error.value)
    assert message.startswith(
        f"{data}: 2 of 3 given rows have content of the colour training rows (2 the same prompt): "
    )
    assert message.endswith(
        "the adapter was trained on them: remove them, and score rows that it never saw"
    )
    assert not (run / "eval").exists()


def test_rows_that_chose_the_checkpoint_are_scored_and_named(run: Path, place: Path) -> None:
    found = finished.evaluate(run, data=str(place / "dev.jsonl"), metric_names=["nll"])
    (note,) = found.notes
    assert "2 of 2 given rows have content of the colour dev rows" in note
    assert note.endswith("these chose the checkpoint, so their scores flatter the adapter")
    assert finished.evaluate(run, data=str(place / "test.jsonl"), metric_names=["nll"]).notes == ()


def test_rejected_rows_are_counted(run: Path, place: Path) -> None:
    found = finished.evaluate(run, data=str(place / "new.jsonl"), metric_names=["nll"])
    assert (len(found.predictions), found.rejects, found.notes) == (
        3,
        {"duplicate": 1, "empty answer": 1},
        (),
    )
    with pytest.warns(UserWarning, match="rows left out") as told:
        fulcrum.evaluate(run, data=str(place / "new.jsonl"), metric_names=["nll"])
    assert [str(warning.message) for warning in told if warning.category is UserWarning] == [
        f"{place / 'new.jsonl'}: 1 rows left out: duplicate",
        f"{place / 'new.jsonl'}: 1 rows left out: empty answer",
    ]


def test_only_rows_that_were_trained_on_are_refused(place: Path, tmp_path: Path) -> None:
    """Not those beyond `train_limit`, which differ by seed: a comparison keeps its first seed's
    adapters."""
    given = settings(
        place,
        tmp_path / "r",
        task={"train_limit": 4},
        compare={"arms": ["base", "sft"], "seeds": [3, 0]},
    )
    fulcrum.compare(**given)
    prepared = [
        run_data.prepare(settings_from_dict(given), tiny_tokenizer(), CONTEXT, seed).tasks[0]
        for seed in (3, 0)
    ]
    trained, other = ({row.question for row in task.train} for task in prepared)
    assert trained != other
    rest = write_rows(tmp_path / "rest.jsonl", [row for row in ROWS[:8] if row[0] not in trained])
    found = finished.evaluate(tmp_path / "r", data=rest, metric_names=["nll"])
    assert (len(found.predictions), found.notes) == (4, ())
    with pytest.raises(
        DataError, match="4 of 8 given rows have content of the colour training rows"
    ):
        finished.evaluate(tmp_path / "r", data=str(place / "train.jsonl"))


def test_rows_that_another_task_was_trained_on_are_refused(place: Path, tmp_path: Path) -> None:
    given = settings(place, tmp_path / "r")
    sizes = {"name": "size", "train": str(place / "sizes.jsonl"), "metrics": ["nll"]}
    given["tasks"] = [given.pop("task") | {"metrics": ["nll"]}, sizes]
    fulcrum.train(**given)
    with pytest.raises(
        DataError, match=r"\d of 16 given rows have content of the size training rows"
    ):
        finished.evaluate(tmp_path / "r", data=str(place / "sizes.jsonl"), task="colour")


def test_a_run_without_its_data_is_scored_with_a_warning(run: Path, place: Path) -> None:
    """A run folder that came from another machine."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(place / "train.jsonl"), "gone/train.jsonl"))
    found = finished.evaluate(run, data=str(place / "new.jsonl"), metric_names=["nll"])
    (note,) = found.notes
    assert note.startswith(
        f"{place / 'new.jsonl'}: not checked against the run's training rows: gone/train.jsonl"
    )
    assert len(found.predictions) == 3


def test_training_rows_that_changed_since_the_run_are_said(
    run: Path, place: Path, tmp_path: Path
) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace(str(place / "train.jsonl"), write_rows(tmp_path / "train.jsonl", ROWS[:6]))
    )
    (note,) = finished.evaluate(run, data=str(place / "new.jsonl"), metric_names=["nll"]).notes
    assert note.endswith(
        "checked against rows (colour train) that changed since the run; it may hold rows "
        "trained on"
    )


# ---- where predictions go


def test_predictions_are_saved_and_never_overwritten(
    run: Path, place: Path, tmp_path: Path
) -> None:
    first = finished.evaluate(run)
    assert first.file == run / "eval" / "test-sft_anchor-colour.jsonl"
    before = first.file.read_bytes()
    prompts = [json.loads(line)["prompt"] for line in before.decode().splitlines()]
    assert sorted(prompts) == ["colour kiwi", "colour lynx", "colour mole"]
    again = [finished.evaluate(run, metric_names=["nll"]).file.name for _ in range(2)]
    assert again == ["test-sft_anchor-colour-2.jsonl", "test-sft_anchor-colour-3.jsonl"]
    assert first.file.read_bytes() == before
    named = finished.evaluate(run, data=str(place / "new.jsonl"), metric_names=["nll"])
    assert named.file == run / "eval" / "new-sft_anchor-colour.jsonl"
    with warnings.catch_warnings(action="error", category=UserWarning):
        _, predictions = fulcrum.evaluate(run, out=tmp_path / "mine.jsonl")
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == len(predictions) == 3
    assert len(list((run / "eval").iterdir())) == 4


# ---- which adapter, on which device


def test_the_device_is_this_machines_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was trained on a GPU, on a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    resolved["train"] |= {"device": "cuda", "dtype": "bfloat16"}
    (run / "config.yaml").write_text(yaml.safe_dump(resolved))
    loaded = api.load_adapter(run).loaded
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.bfloat16)


def test_the_default_arm_is_the_nearest_to_tell(trained: Path, tmp_path: Path) -> None:
    for name in ("adapters/sft", "adapters/sft_anchor"):
        shutil.copytree(trained / "adapter", tmp_path / name)
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(trained / name, tmp_path)
    assert api.load_adapter(tmp_path).arm == "sft_anchor"
    assert api.load_adapter(tmp_path, arm="sft").anchor() is None
    shutil.copytree(trained / "adapter", tmp_path / "adapters" / "mix")
    assert api.load_adapter(tmp_path).arm == "mix"
    with pytest.raises(StoreError, match="no adapter of arm 'tell'; known: mix, sft, sft_anchor"):
        api.load_adapter(tmp_path, arm="tell")


def test_devices_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ModelError,
        match=r"device 'mps' was asked for and PyTorch sees no Apple GPU; set train\.device to",
    ):
        load_tiny(tmp_path, device="mps")


# ---- notebooks


@pytest.mark.e2e
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_notebooks_resume_too(place: Path, tmp_path: Path, verb: str) -> None:
    call = getattr(fulcrum, verb)
    given = settings(place, tmp_path / "r", compare={"arms": ["base", "sft"]})
    call(**given)
    with pytest.raises(StoreError, match="already holds a run"):
        call(**given)
    (tmp_path / "r" / "results.json").unlink()
    call(**given, resume=True)
    assert run_report.load(tmp_path / "r")["kind"] == verb


# ---- target modules, held-out rows


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        (
            "llama",
            ("q_proj", "foo"),
            "'foo' names no module of .*; known: all-linear, down_proj, gate_proj, k_proj, lm_head",
        ),
        ("gpt2", ("c_atn",), "'c_atn' names no module of .*; did you mean 'c_attn'"),
        (
            "llama",
            ("mlp",),
            "'mlp' names what is no layer with a weight matrix of .*; known: all-linear, down_proj",
        ),
        ("llama", ("input_layernorm",), "'input_layernorm' names what is no layer"),
        (
            "llama",
            "q_proj",
            r"'q_proj' names no module .*a pattern for whole names; .* write \[q_proj\]",
        ),
        (
            "llama",
            "*proj",
            r"'\*proj' is no pattern \(nothing to repeat at position 0\); use a list of names",
        ),
    ],
)
def test_wrong_target_modules_are_refused_before_training(
    tmp_path: Path, kind: str, targets: Any, said: str
) -> None:
    loaded = load_tiny(tmp_path, kind)
    with pytest.raises(ConfigError, match=rf"^train\.lora_target_modules: {said}"):
        adapter.lora_config(loaded, tiny_settings(lora_target_modules=targets))


def test_target_modules_that_peft_refuses(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, "mamba")
    with pytest.raises(
        ConfigError,
        match=r"^train\.lora_target_modules: PEFT refuses \('out_proj',\): .*incompatible",
    ):
        adapter.new_adapter(loaded, tiny_settings(lora_target_modules=("out_proj",)), 0)


@pytest.mark.parametrize(
    ("targets", "tensors"),
    [(r".*\.1\.self_attn\.[qk]_proj", 4), (("q_proj", "lm_head"), 6), (("0.mlp.up_proj",), 2)],
)
def test_target_modules_are_read_as_peft_reads_them(
    tmp_path: Path, targets: Any, tensors: int
) -> None:
    loaded = load_tiny(tmp_path)
    adapter.new_adapter(loaded, tiny_settings(lora_target_modules=targets), 0)
    assert len([name for name in adapter.adapter_state(loaded) if "lora_" in name]) == tensors


def test_held_out_rows_over_the_context_are_said(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    rows = [
        Example((Message("user", "say " * n), Message("assistant", "so")), f"g{n}", f"f:{n}")
        for n in (2, CONTEXT, 3)
    ]
    told: list[str] = []
    found = scoring.general_predictions(loaded, {"pool": rows, "own": rows[:1]}, told.append)
    assert {name: [row.origin for row in part] for name, part in found.items()} == {
        "pool": ["f:2", "f:3"],
        "own": ["f:2"],
    }
    assert told == [
        "general: 1 of 3 held-out rows (pool) are over the model's context (512 tokens)"
    ]
