"""What was changed after the fact is named: an outcome, a setting, a data row, a file.

On a comparison of a tiny model.
"""

import json
import shutil
from pathlib import Path

import pytest

from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.experiments.compare import run_comparison
from fulcrum.report import verify
from fulcrum.stats import outcomes
from helpers.tiny import comparison_settings, save_task

pytestmark = pytest.mark.e2e  # of a whole comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the comparison of it."""
    folder = save_task(tmp_path_factory.mktemp("sealed"), 10, 6)
    compare = {
        "arms": ["base", "sft", "tell"],
        "seeds": [0, 1],
        "sizes": [4, 8],
        "folds": 2,
        "sft_epochs": [1],
    }
    run_comparison(comparison_settings(folder, folder / "out", compare=compare))
    return folder


@pytest.fixture
def copied(finished: Path) -> Path:
    """The run folder as it was; whatever a test does to the data is undone."""
    kept = {
        path: path.read_bytes()
        for path in [*finished.glob("*.jsonl"), *(finished / "out").glob("*.json*")]
    }
    yield finished / "out"
    for path, content in kept.items():
        path.write_bytes(content)


def wrong(folder: Path) -> list[str]:
    return verify.verify(folder / "certificate.json").wrong


def test_nothing_is_wrong_and_nothing_unchecked_where_all_is_there(copied: Path) -> None:
    assert verify.verify(copied / "certificate.json") == ([], [])


def test_a_changed_outcome_is_named_with_its_cell(copied: Path) -> None:
    file = copied / "outcomes.jsonl"
    lines = file.read_text().splitlines()
    place = next(
        k for k, line in enumerate(lines) if '"metric": "nll"' in line and '"arm": "tell"' in line
    )
    changed = {**json.loads(lines[place]), "outcome": 0.0}
    file.write_text("\n".join([*lines[:place], json.dumps(changed), *lines[place + 1 :]]) + "\n")
    cell = f"{changed['arm']} at {changed['size']} rows, seed {changed['seed']}, nll"
    assert f"outcomes.jsonl: outcomes of {cell}: changed" in wrong(copied)


def test_outcomes_are_read_from_gzip_too(copied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(copied, tmp_path / "packed")
    found = outcomes.read(folder / "outcomes.jsonl")
    for place in (folder / "outcomes.jsonl.gz", folder / "again" / "outcomes.jsonl.gz"):
        outcomes.write(place, found)
    packed = (folder / "outcomes.jsonl.gz").read_bytes()
    assert packed == (folder / "again" / "outcomes.jsonl.gz").read_bytes()
    (folder / "outcomes.jsonl").unlink()
    assert verify.verify(folder / "certificate.json").wrong == []
    (folder / "outcomes.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        DataError, match=r"outcomes\.jsonl\.gz: cannot be read: Compressed file ended"
    ):
        verify.verify(folder / "certificate.json")


@pytest.mark.parametrize("file", ["certificate.json", "manifest.json"])
def test_a_changed_setting_is_named(copied: Path, file: str) -> None:
    content = json.loads((copied / file).read_text())
    (content["inputs"] if file == "certificate.json" else content)["settings"]["train"][
        "learning_rate"
    ] = 0.5
    (copied / file).write_text(json.dumps(content))
    found = wrong(copied)
    assert any(text.startswith("settings.train.learning_rate (") for text in found)
    assert (f"{copied / file}: changed since it was sealed" in found) == (
        file == "certificate.json"
    )


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_changed_data_row_is_named(copied: Path, part: str) -> None:
    file = copied.parent / f"{part}.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join(
            [lines[0], lines[1].replace('"completion": "', '"completion": "dark '), *lines[2:]]
        )
        + "\n"
    )
    assert wrong(copied) == [f"data row {file}:2: changed", f"data file {file}: changed"]


def test_a_row_taken_away_is_named(copied: Path) -> None:
    file = copied.parent / "test.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + "\n")
    assert f"data row {file}:6: no longer there, or a duplicate of another now" in wrong(copied)


def test_changed_general_data_are_named(copied: Path) -> None:
    file = copied.parent / "pool.jsonl"
    file.write_text(file.read_text().replace("say ant and bee 0", "say ant and eel 9"))
    assert wrong(copied) == [f"data file {file}: changed"]


def test_a_certificate_elsewhere_says_what_it_could_not_check(copied: Path, tmp_path: Path) -> None:
    for name in ("certificate.json", "outcomes.jsonl"):
        shutil.copy(copied / name, tmp_path / name)
    (copied.parent / "pool.jsonl").rename(tmp_path / "pool.jsonl")
    found = verify.verify(tmp_path / "certificate.json")
    shutil.move(tmp_path / "pool.jsonl", copied.parent / "pool.jsonl")
    assert found.wrong == []
    assert found.unchecked == [
        f"settings: no {store.MANIFEST} of the run next to the certificate",
        f"data file {copied.parent / 'pool.jsonl'}: not here (paths are as they were given to "
        "the run)",
    ]


def test_rows_that_a_model_made_and_an_arms_own_pool_are_inputs_too(tmp_path: Path) -> None:
    folder = save_task(tmp_path / "data", 10, 6)
    (folder / "own.jsonl").write_text((folder / "pool.jsonl").read_text())
    arm = {"name": "other", "general": "pool", "pool": [{"path": str(folder / "own.jsonl")}]}
    settings = comparison_settings(folder, folder / "out", compare={"arms": ["sft", "tell", arm]})
    store.write_json(folder / "out" / store.MADE / "selfgen-seed0.json", {"rows": ["one"]})
    store.write_json(folder / "out" / store.MANIFEST, {"settings": settings.described()})
    known = verify.describe_inputs(settings, settings.tasks[0].name, ())
    assert list(known.made) == ["selfgen-seed0.json"]

    def checked() -> tuple[list[str], list[str]]:
        return verify.check_inputs(known, settings.tasks[0].name, folder / "out")

    assert checked() == ([], [])
    store.write_json(folder / "out" / store.MADE / "selfgen-seed0.json", {"rows": ["two"]})
    (folder / "own.jsonl").write_text("{}")
    changed = f"data file {folder / 'own.jsonl'}: changed"
    assert checked() == (["made rows general/selfgen-seed0.json: changed", changed], [])
    (folder / "out" / store.MADE / "selfgen-seed0.json").unlink()
    assert checked() == ([changed], ["made rows general/selfgen-seed0.json: not here"])
