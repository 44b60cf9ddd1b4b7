"""Two processes under a launcher train one adapter into one run folder: the losses of one process, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from fulcrum import run_folder, store, use
from fulcrum.errors import ConfigError
from tiny import save_tiny, write_rows

SECONDS = 240  # a bound for a hang, not a claim about speed
EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"
TWO = ["--config_file", str(EXAMPLES / "cpu.yaml")]


def start(launcher: list[str], *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "fulcrum", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What it says on both streams until it ends."""
    with process:
        try:
            return process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def losses(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Task, general and dev loss of every step, as it was trained last."""
    events = [json.loads(line) for line in (folder / store.EVENTS).read_text().splitlines()]
    names = ("task_loss", "general_loss", "dev_nll")
    return {(one["run"], one["step"]): [one[name] for name in names if one[name] is not None] for one in events}


def assert_same(one: Path, two: Path) -> None:
    alone, together = losses(one), losses(two)
    assert len(alone) == 32
    assert alone.keys() == together.keys()
    assert all(together[place] == pytest.approx(known, abs=1e-4) for place, known in alone.items())
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a training of 32 steps that saves itself after each."""
    place = tmp_path_factory.mktemp("processes")
    return {
        "model": str(save_tiny(place / "model")),
        "task": {
            "train": write_rows(place / "train.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(32)]),
            "dev": write_rows(place / "dev.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(32, 36)]),
            "test": write_rows(place / "test.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(36, 40)]),
            "metrics": ["nll"],
            "anchor": "Name it.",
        },
        "general": write_rows(place / "pool.jsonl", [(f"say word {i}", f"so it is {i}") for i in range(60)]),
        "mix": {"repeats": 1, "general_per_task": 1},
        "train": {"dtype": "float32", "device": "cpu", "compile": "never", "batch_size": 2, "save_every": 1},
        "eval": {"general_rows": 0},
        "output_dir": str(place / "one"),
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any]) -> Path:
    """The run of one process, without any launcher."""
    use.train(**settings)
    return Path(settings["output_dir"])


@pytest.fixture(scope="module")
def file(settings: dict[str, Any]) -> str:
    path = Path(settings["output_dir"]).with_name("run.yaml")
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_two_processes_of_which_one_is_killed_give_the_losses_of_one(alone: Path, file: str, tmp_path: Path) -> None:
    two = tmp_path / "two"
    process = start(TWO, file, "--output-dir", str(two))
    while not list(two.glob("checkpoints/*/checkpoint-*")):
        assert process.poll() is None, ended(process)
        time.sleep(0.001)  # a step takes many times as long
    os.kill(store.read_json(two / run_folder._OWNER)["pid"], signal.SIGKILL)
    ended(process)
    assert process.returncode != 0
    trained = len(losses(two))
    assert 0 < trained < 32
    process = start(TWO, file, "--output-dir", str(two), "--resume")
    said, errors = ended(process)
    assert process.returncode == 0, errors
    assert said.count("report: ") == 1  # one of the two speaks
    told = [json.loads(line)["step"] for line in (two / store.EVENTS).read_text().splitlines()]
    assert len(told) <= 32 + 1, "only the step that was not saved is trained again"
    assert_same(alone, two)


def test_a_launcher_that_starts_one_process_of_two_trains_the_same_and_is_told_of(
    alone: Path, file: str, tmp_path: Path
) -> None:
    """Accelerate 1.15 leaves the others to MPI where it is asked for CPUs."""
    process = start(["--cpu", "--num_processes", "2"], file, "--output-dir", str(tmp_path / "two"))
    said, errors = ended(process)
    assert process.returncode == 0, errors
    assert "asked for several processes and started this one alone" in " ".join(said.split())
    assert_same(alone, tmp_path / "two")


@pytest.mark.parametrize("name", ["cpu", "multi_gpu", "fsdp"])
def test_the_example_is_one_that_accelerate_reads(name: str) -> None:
    path = EXAMPLES / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert found.num_processes == 2
    assert str(found.distributed_type).endswith("FSDP" if name == "fsdp" else "MULTI_GPU")
    assert found.use_cpu == (name == "cpu")
    assert ("not yet measured on a gpu" in path.read_text().lower()) == (name != "cpu")


def test_sharding_is_refused_before_anything_is_done(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="the launcher asks for FSDP"):
        use.train(**{**settings, "output_dir": str(tmp_path / "sharded")})
    assert not (tmp_path / "sharded").exists()
