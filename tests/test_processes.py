"""Two processes under a launcher train one adapter into one run folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tiny import save_tiny, write_rows

SECONDS = 240  # a bound for a hang, not a claim about speed


def launch(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment,
    ) as process:  # fmt: skip
        try:
            said, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors
    return said


def test_two_processes_fill_one_folder_with_the_adapter_of_one(tmp_path: Path) -> None:
    settings = {
        "model": str(save_tiny(tmp_path / "model")),
        "task": {
            "train": str(write_rows(tmp_path / "train.jsonl", [(f"colour {i}", f"red {i % 3}") for i in range(16)])),
            "metrics": ["nll"],
            "anchor": "Name it.",
        },
        "general": str(write_rows(tmp_path / "pool.jsonl", [(f"say word {i}", f"so it is {i}") for i in range(60)])),
        "mix": {"repeats": 1, "general_per_task": 1},
        "train": {"dtype": "float32", "device": "cpu"},
        "eval": {"general_rows": 0},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    one, two = tmp_path / "one", tmp_path / "two"
    launch(["fulcrum", "train", str(file), "--output-dir", str(one)])
    said = launch(
        [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "fulcrum",
            "train",
            str(file),
            f"--output-dir={two}",
        ]
    )
    assert said.count("report: ") == 1
    alone, together = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys()
    assert all(torch.allclose(alone[name], together[name], atol=1e-5) for name in alone)
