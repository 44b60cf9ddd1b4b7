"""A certificate of format 2 becomes one of format 3 with every number equal, or stays as it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reissue

from fulcrum.report import verify, wording
from fulcrum.stats.certificate import AtEnd, Certificate, Chosen, Diverged

# As the code before format 3 wrote it.
OLD = Path(__file__).parents[1] / "data" / "certificate-format-2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(OLD, tmp_path / "stored")


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, reissue.__file__, str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_number_is_equal_in_the_metrics_own_sign(folder: Path) -> None:
    old = json.loads((folder / "certificate.json").read_text())
    compared = reissue.compare(folder)
    assert compared.differences == []
    assert compared.numbers == compared.equal_numbers > 300
    assert compared.others == compared.equal_others > 200
    assert compared.run_notes == ["general: a note of the run"]
    before, after = old["answers"][0]["difference"], compared.new.answer.difference
    assert after.estimate == pytest.approx(-before["estimate"])
    assert (after.low, after.high) == pytest.approx((-before["high"], -before["low"]))


def test_notes_become_a_design(folder: Path) -> None:
    new = reissue.compare(folder).new
    design = new.question.design
    assert design is not None
    assert (design.folds, design.tune) == (2, "first")
    assert design.trials == {"base": 1, "sft": 4, "tell": 2}
    assert design.trained == ("sft", "tell")
    assert design.at_end == (
        AtEnd("sft", 32, "repeats", 8, 1, 8),
        AtEnd("tell", 64, "learning_rate", 1e-3, 1e-4, 1e-3),
    )
    assert design.diverged == (Diverged("sft", 64, 2, "repeats8-learning_rate0.01"),)
    favoured = "More settings were tried for sft than for other trained arms, which favours them."
    assert favoured in wording.notes(new)
    assert new.inputs.hyperparameters[0] == Chosen("base", 0, 0, None)
    assert new.inputs.adjusted_p == {"small": 0.01}


def test_it_is_written_where_all_is_equal(folder: Path) -> None:
    done = run(folder, "--write")
    assert done.returncode == 0
    assert "| 2 | 386 | 386 |" in done.stdout
    assert Certificate.read(folder / "certificate.json").format == 3
    assert verify.verify(folder / "certificate.json").wrong == []


def test_a_certificate_that_was_changed_stays_as_it_was(folder: Path) -> None:
    file = folder / "certificate.json"
    old = json.loads(file.read_text())
    old["answers"][0]["slope"]["low"] += 0.1
    file.write_text(json.dumps(old))
    before = file.read_bytes()
    done = run(folder, "--write")
    assert done.returncode == 1
    why = "not written, 1 differences; the outcomes or the certificate were changed:"
    assert why in done.stdout
    assert "answers[nll].slope.high: stored" in done.stdout
    assert file.read_bytes() == before
