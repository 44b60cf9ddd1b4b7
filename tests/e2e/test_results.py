"""What is stored in `results/` follows from what is next to it, and the table says the same."""

from pathlib import Path

import pytest
import recompute
import results_table

from fulcrum.config.settings import load_settings
from fulcrum.core import run_folder
from fulcrum.core.errors import ConfigError
from fulcrum.report import certificate_page, verify
from helpers.commands import done, refused

RESULTS = Path(__file__).parents[2] / "results"
CERTIFIED = sorted(path.parent for path in RESULTS.rglob("certificate.json"))
STORED = sorted(path.parent for path in RESULTS.rglob("manifest.json"))
# One of their arms has the order `ramp`, which only the commit in their manifests has.
RAMPED = ("map/inflect-icelandic-gemma", "map/inflect-icelandic-smollm2")
KEPT = {
    "run.yaml",
    "manifest.json",
    "certificate.json",
    "outcomes.jsonl.gz",
    "scaling.json",
    "quanta.json.gz",
    "pilot.json",
    "anchors.json",
    "candidates.jsonl",
    "scores.json",
}


def names(folder: Path) -> str:
    return folder.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("folder", CERTIFIED, ids=names)
def test_every_number_of_a_certificate_follows_from_its_outcomes(folder: Path) -> None:
    assert verify.verify_run(folder).wrong == []


@pytest.mark.parametrize("folder", STORED, ids=names)
def test_a_result_holds_what_cannot_be_made_again_and_no_more(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= KEPT
    assert run_folder.unsealed(folder) == []
    assert "\n# Command: fulcrum " in (folder / "run.yaml").read_text()
    if names(folder) in RAMPED:
        with pytest.raises(ConfigError, match=r"compare\.arms\[4\]\.order: .* \(got 'ramp'\)"):
            load_settings(folder / "run.yaml")
    else:
        assert load_settings(folder / "run.yaml").tasks


def test_verdicts_without_a_certificate_are_computed_again() -> None:
    found = list(recompute.verdicts(RESULTS))
    assert len(found) == 19
    assert [one.result for one in found if not one.is_equal] == []


def test_the_table_says_what_is_stored() -> None:
    text = (RESULTS / "README.md").read_text()
    assert results_table.with_table(text, RESULTS) == text


def test_a_report_is_made_of_a_certificate_and_refused_without_one(tmp_path: Path) -> None:
    (stored,) = (folder for folder in CERTIFIED if names(folder) == "map/confirm-gemma")
    folder = tmp_path / "result"
    folder.mkdir()
    for name in ("certificate.json", "manifest.json", "outcomes.jsonl.gz"):
        (folder / name).write_bytes((stored / name).read_bytes())
    assert f"report: {folder / certificate_page.REPORT}" in done("report", folder)
    (folder / "certificate.json").unlink()
    (folder / certificate_page.REPORT).unlink()
    said = refused("report", folder)
    assert "no results.json and no certificate.json; a report is made from one of them" in said


def test_all_of_it_is_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6
