"""Make settings of comparisons, and count what they do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fulcrum.config.settings import Settings, load_settings
from fulcrum.core.progress import Silent
from fulcrum.core.types import TrainPoint
from helpers.runs import settings as run_settings
from helpers.tiny import WORDS, save_tiny, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a task of two labels and two pools."""
    folder = tmp_path_factory.mktemp("comparison")
    save_tiny(folder / "model")
    pairs = [(f"colour {word}", ("red", "blue")[k % 2]) for k, word in enumerate(WORDS)]
    for name, part in (("train", pairs[:6]), ("dev", pairs[6:9]), ("test", pairs[9:])):
        write_rows(folder / f"{name}.jsonl", part)
    write_rows(
        folder / "pool.jsonl",
        [(f"say {word} and {other}", f"{other} {word}") for word in WORDS for other in WORDS],
    )
    write_rows(
        folder / "other.jsonl",
        [(f"sing {word} {k}", f"la {word}") for word in WORDS for k in range(4)],
    )
    return folder


@pytest.fixture(autouse=True)
def _own_arrow_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "arrow")


def settings(place: Path, output: Path, **changes: Any) -> Settings:
    """Nine task rows, shown once in a mixture, with two general rows each."""
    return run_settings(
        place,
        output,
        **{"mix__repeats": 1, "task__metrics": ["nll"], "eval__general_rows": 0, **changes},
    )


class Counting(Silent):
    """Counts optimizer steps."""

    steps = 0

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.steps += 1


# Arms of a file's own.


def written(place: Path, folder: Path, own: list[Any], **changes: Any) -> Settings:
    """Settings with arms, through a YAML file."""
    data = settings(place, folder / "r", **changes).model_dump(mode="json")
    data["compare"]["arms"] = own
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    return load_settings(folder / "run.yaml")
