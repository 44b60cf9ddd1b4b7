"""`init` writes settings that run as they are, however many rows there are."""

from pathlib import Path

import pytest

from fulcrum.config.base import DataSource
from fulcrum.config.settings import load_settings
from fulcrum.data import run_data, starter, task_data
from helpers.tiny import tiny_tokenizer, write_rows


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("rows", "per_task", "repeats"), [(40, 4, (1, 2, 4, 8)), (240, 4, (1, 2, 4)), (3000, 1.2, (1,))]
)
def test_what_init_writes_can_be_fed_by_the_packaged_pool(
    tmp_path: Path, rows: int, per_task: float, repeats: tuple
) -> None:
    file = write_rows(
        tmp_path / "mine.jsonl", [(f"weigh item number {i}", f"{i} grams") for i in range(rows)]
    )
    source = DataSource(path=str(file))
    examples, _ = task_data.read([source])
    text = starter.write_yaml(
        starter.guess(examples), train=source, test=None, model="tiny", n_rows=len(examples)
    )
    (tmp_path / "run.yaml").write_text(text)
    settings = load_settings(tmp_path / "run.yaml")
    assert settings.mix.general_per_task == per_task
    found = run_data.prepare(settings, tiny_tokenizer(), None, 0)
    assert found.repeats == repeats
    assert bool(found.notes) == (repeats != (1, 2, 4, 8))
