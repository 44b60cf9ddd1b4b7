"""Two processes under a launcher train one adapter into one run folder: the losses of one process,
also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from fulcrum import api
from fulcrum.core import run_folder, store
from fulcrum.core.errors import ConfigError
from fulcrum.model import distributed
from helpers.tiny import save_tiny, write_rows

SECONDS = 240  # a bound for a hang, not a claim about speed
EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
TWO = ["--config_file", str(EXAMPLES / "cpu.yaml")]


def told_of(example: str) -> dict[str, str]:
    """What Accelerate's launcher tells its processes of FSDP, by an example that it would refuse on
    a machine without GPUs."""
    given = launch.launch_command_parser().parse_args(
        ["--config_file", str(EXAMPLES / example), "-m", "fulcrum"]
    )
    told = prepare_multi_gpu_env(launch._validate_launch_command(given)[0])
    return {name: value for name, value in told.items() if "FSDP" in name}


SHARDS = told_of("fsdp.yaml")
STEPS = 22  # 64 examples
SHARES = str(Path(__file__).parents[1] / "helpers" / "shares.py")
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(launcher: list[str], *arguments: str, **told: str) -> "subprocess.Popen[str]":
    environment = {**QUIET, **told}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launcher,
            "-m",
            "fulcrum",
            "train",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


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
    return {
        (one["run"], one["step"]): [one[name] for name in names if one[name] is not None]
        for one in events
    }


def assert_same(one: Path, two: Path) -> None:
    alone, together = losses(one), losses(two)
    assert len(alone) == STEPS
    assert alone.keys() == together.keys()
    assert all(together[place] == pytest.approx(known, abs=1e-4) for place, known in alone.items())
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a training that saves itself after each step, of three examples in a row each: two
    processes have 2 and 1 of them, and of the last step 1 and none."""
    place = tmp_path_factory.mktemp("processes")
    return {
        "model": str(save_tiny(place / "model")),
        "task": {
            "train": write_rows(
                place / "train.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(32)]
            ),
            "dev": write_rows(
                place / "dev.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(32, 36)]
            ),
            "test": write_rows(
                place / "test.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(36, 40)]
            ),
            "metrics": ["nll"],
            "anchor": "Name it.",
        },
        "general": write_rows(
            place / "pool.jsonl", [(f"say word {i}", f"so it is {i}") for i in range(60)]
        ),
        "mix": {"repeats": 1, "general_per_task": 1},
        "train": {
            "dtype": "float32",
            "device": "cpu",
            "compile": "never",
            "batch_size": 3,
            "pack_tokens": 32,
            "save_every": 1,
        },
        "eval": {"general_rows": 0},
        "output_dir": str(place / "one"),
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any]) -> Path:
    """The run of one process, without any launcher."""
    api.train(**settings)
    return Path(settings["output_dir"])


@pytest.fixture(scope="module")
def file(settings: dict[str, Any]) -> str:
    path = Path(settings["output_dir"]).with_name("run.yaml")
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("told", [{}, SHARDS], ids=["whole", "sharded"])
def test_two_processes_of_which_one_is_killed_give_the_losses_of_one(
    told: dict[str, str], alone: Path, file: str, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    process = start(TWO, file, "--output-dir", str(two), **told)
    while not list(two.glob("checkpoints/*/checkpoint-*")):
        assert process.poll() is None, ended(process)
        time.sleep(0.001)  # a step takes many times as long
    os.kill(store.read_json(two / run_folder._OWNER)["pid"], signal.SIGKILL)
    ended(process)
    assert process.returncode != 0
    trained = len(losses(two))
    assert 0 < trained < STEPS
    process = start(TWO, file, "--output-dir", str(two), "--resume", **told)
    said, errors = ended(process)
    assert process.returncode == 0, errors
    assert said.count("reading data") == said.count("report: ") == 1  # one of the two speaks
    notes = store.read_json(two / "results.json")["notes"]
    assert ("layers are spread over 2 processes" in notes) == bool(told)
    trained_steps = [
        json.loads(line)["step"] for line in (two / store.EVENTS).read_text().splitlines()
    ]
    assert len(trained_steps) <= STEPS + 1, "only the step that was not saved is trained again"
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


def test_each_process_holds_its_share_of_the_layers_and_says_what_one_process_says(
    settings: dict[str, Any],
) -> None:
    """The whole of a layer is there while it runs: losses, answers and the way back to the base
    model are those of one."""
    known = subprocess.run(
        [sys.executable, SHARES, settings["model"]],
        capture_output=True,
        text=True,
        check=True,
        env=QUIET,
    )
    two = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            SHARES,
            settings["model"],
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**QUIET, **SHARDS},
    )
    (whole,), parts = (
        [json.loads(line) for line in done.stdout.splitlines()] for done in (known, two)
    )
    assert len(parts) == 2
    assert sum(part["held"] for part in parts) == whole["held"]
    assert all(part["held"] == whole["held"] // 2 for part in parts)
    for part in parts:
        assert part["nats"] == pytest.approx(whole["nats"], abs=1e-5)
        assert part["answer"] == whole["answer"]
        assert part["facts"] == [*whole["facts"], "layers are spread over 2 processes"]


@pytest.mark.parametrize(
    ("told", "settled", "words"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP with fsdp_version: 1;"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP with fsdp_offload_params: true;"),
        (
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "FSDP with fsdp_cpu_ram_efficient_loading: true;",
        ),
        ({}, {"use_dora": True}, "with which use_dora is not possible"),
    ],
)
def test_a_kind_of_sharding_that_is_not_done_is_refused(
    told: dict[str, str],
    settled: dict[str, Any],
    words: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes are pretended here: it is refused before they would meet."""
    monkeypatch.setattr(
        distributed, "processes", lambda: SimpleNamespace(num_processes=2, is_main_process=True)
    )
    for name, value in {**SHARDS, **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        api.train(
            **{
                **settings,
                "train": {**settings["train"], **settled},
                "output_dir": str(tmp_path / "sharded"),
            }
        )


def test_only_the_example_of_sharding_asks_for_it() -> None:
    assert SHARDS["ACCELERATE_USE_FSDP"] == "true"
    assert told_of("multi_gpu.yaml") == {}


def test_one_process_shares_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SHARDS.items():
        monkeypatch.setenv(name, value)
    assert not distributed.wants_shards()
