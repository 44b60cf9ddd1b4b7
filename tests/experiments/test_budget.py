"""Presets and time budgets: designs, their cost, the choice among them, and what `quick` says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fulcrum.cli import budget as budget_options
from fulcrum.config.arms import ARMS, chosen_arms
from fulcrum.config.experiments import CompareSettings
from fulcrum.config.settings import Settings, dump_settings
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Hyperparameters, Trial
from fulcrum.data import run_data
from fulcrum.experiments import budget, presets
from fulcrum.experiments.cell import Cell
from fulcrum.experiments.compare import run_comparison
from fulcrum.experiments.units import ComparisonPlan, Job, Speed
from fulcrum.model import base_model
from fulcrum.report import verify, wording
from fulcrum.stats.certificate import Budget, Certificate
from helpers.commands import done, refused
from helpers.tiny import comparison_settings, save_task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("budget"), 40, 8, pool=7)


def settings(place: Path, output: Path, **changes: Any) -> Settings:
    return comparison_settings(place, output, **{"mix": {"general_per_task": 1}, **changes})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("1h30m", 5400), ("90m", 5400), ("600s", 600), ("0.5h", 1800)],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert budget_options.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "soon", "-1h", "0m", "2h nonsense"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match="write hours, minutes and seconds as 2h, 1h30m, 90m or 600s"
    ):
        budget_options.parse_duration(text)


def test_quick_is_a_preset_with_ten_minutes() -> None:
    assert budget_options.read_request("", "", quick=False) is None
    assert budget_options.read_request("", "", quick=True) == budget_options.Request(
        "--quick", "quick", 600
    )
    assert budget_options.read_request("quick", "20m", quick=True) == budget_options.Request(
        "--quick", "quick", 1200
    )
    assert budget_options.read_request("full", "", quick=False) == budget_options.Request(
        "--preset", "full", None
    )
    assert budget_options.read_request("", "2h", quick=False) == budget_options.Request(
        "--budget", None, 7200
    )


def test_presets_that_are_not_there_or_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no preset 'fulll'; did you mean 'full'\?"):
        budget_options.read_request("fulll", "", quick=False)
    with pytest.raises(
        ConfigError, match="--quick stands for --preset quick; leave it out, or --preset full"
    ):
        budget_options.read_request("full", "", quick=True)


# ---- presets


def test_each_preset_on_many_rows(place: Path) -> None:
    given = settings(place, place / "x", mix={"general_per_task": 1}, eval={"general_rows": 2})
    quick, standard, full = (
        presets.apply(preset, given, 256) for preset in presets.PRESETS.values()
    )
    assert (full.compare.sizes, full.compare.sizes_of) == (
        (64, 256),
        {"sft_anchor": (16, 32, 64, 128, 256)},
    )
    assert (full.seeds, full.compare.tune, full.mix.candidates) == (
        (0, 1, 2, 3, 4),
        "first",
        (1, 2, 4, 8),
    )
    assert [arm.name for arm in chosen_arms(full)][-3:] == [
        "tell",
        "general_then_task",
        "placebo_permuted",
    ]
    assert (standard.compare.sizes, standard.compare.sizes_of) == (
        (256,),
        {"sft_anchor": (64, 128, 256)},
    )
    assert (standard.seeds, standard.mix.candidates, standard.compare.sft_epochs) == (
        (0, 1, 2),
        (4,),
        (4, 8),
    )
    assert (standard.tasks[0].test_limit, standard.eval.general_rows) == (300, 2)
    assert (quick.seeds, quick.tasks[0].test_limit, quick.eval.general_rows) == ((0, 1), 100, 0)
    assert quick.compare.arms == ("base", "sft_anchor", "tell")


def test_the_arms_of_a_preset_are_the_defaults_and_more() -> None:
    """A default arm that is added or renamed is one of `standard` too."""
    assert presets.STANDARD.arms == CompareSettings().arms


def test_quick_scores_one_metric_and_those_of_labels(place: Path) -> None:
    given = settings(place, place / "x")
    wide = given.tasks[0].model_copy(update={"metrics": ("bleu", "nll", "exact_match", "mcc")})
    found = presets.apply(presets.QUICK, given.model_copy(update={"tasks": (wide,)}), 40)
    assert found.tasks[0].metrics == ("nll", "mcc")  # BLEU has no value for a row


@pytest.mark.parametrize("preset", presets.PRESETS.values())
def test_what_the_settings_fix_is_kept(place: Path, preset: presets.Preset) -> None:
    fixed = {
        "arms": ["sft", "tell"],
        "seeds": [3, 4],
        "sizes": [8, 16],
        "sizes_of": {"sft": [8, 16, 32]},
    }
    compare = presets.apply(preset, settings(place, place / "x", compare=fixed), 40).compare
    assert (compare.arms, compare.seeds, compare.sizes) == (("sft", "tell"), (3, 4), (8, 16))
    assert compare.sizes_of == {"sft": (8, 16, 32)}


def test_sizes_of_an_arm_that_a_preset_does_not_run_go_with_it(place: Path) -> None:
    given = settings(place, place / "x", compare={"sizes_of": {"sft": [8], "tell": [16]}})
    assert presets.apply(presets.QUICK, given, 40).compare.sizes_of == {"tell": (16,)}
    without_sft = settings(place, place / "x", compare={"arms": ["base", "mix"]})
    assert presets.apply(presets.FULL, without_sft, 40).compare.sizes_of == {}


def test_the_curve_holds_the_sizes_that_the_settings_fix(place: Path) -> None:
    given = settings(place, place / "x", compare={"arms": ["sft", "tell"], "sizes": [8, 24]})
    assert presets.apply(presets.FULL, given, 40).compare.sizes_of == {"sft": (8, 16, 24)}


def test_without_a_test_file_settings_are_chosen_at_each_seed(place: Path) -> None:
    """The first seed's task rows are other seeds' test rows, and must not choose for them."""
    given = settings(place, place / "x")
    task = given.tasks[0].model_copy(update={"test": ()})
    found = presets.apply(presets.STANDARD, given.model_copy(update={"tasks": (task,)}), 40)
    assert found.compare.tune == "each"


def test_what_a_preset_has_less_of_is_said(place: Path) -> None:
    given = settings(place, place / "x")
    full = presets.apply(presets.FULL, given, 256)
    assert presets.reductions(full, full, 500) == []
    assert presets.reductions(presets.apply(presets.QUICK, given, 256), full, 500) == [
        "2 of 5 seeds",
        "3 of 9 arms",
        "1 of 2 mix sizes",
        "3 of 5 sizes of sft_anchor",
        "fewer settings tried",
        "at most 100 test rows",
        "no side-effect checks",
    ]
    standard = presets.reductions(presets.apply(presets.STANDARD, given, 256), full, 8)
    assert "at most 300 test rows" not in standard  # there are 8


# ---- what fits


SPEED = Speed(task=1, general=1)


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measure", lambda *_: SPEED)


def costs(plan: budget.Plan) -> dict[str, float]:
    return {design.preset: design.seconds for design in plan.designs}


def test_richer_presets_cost_more(place: Path, known_speed: None) -> None:
    found = budget.plan(settings(place, place / "x"), preset="full")
    assert list(costs(found)) == ["quick", "standard", "full"]
    quick, standard, full = costs(found).values()
    assert quick < standard < full < math.inf
    assert found.design == found.designs[-1]
    assert found.left_out == ()


def test_the_richest_preset_that_fits_is_chosen(place: Path, known_speed: None) -> None:
    """Measuring counts too; speeds are such that it does not matter."""
    given = settings(place, place / "x")
    known = costs(budget.plan(given, preset="full"))
    for name in presets.PRESETS:
        found = budget.plan(given, seconds=known[name] / budget.PLANNED + 100)
        assert found.design.preset == name
        assert found.design.rows == 40
    assert (
        "2 of 5 seeds" in budget.plan(given, seconds=known["quick"] / budget.PLANNED + 100).left_out
    )


def test_if_none_fits_quick_has_fewer_rows(place: Path, known_speed: None) -> None:
    given = settings(place, place / "x")
    seconds = costs(budget.plan(given, preset="quick"))["quick"]
    found = budget.plan(given, seconds=0.7 * seconds)
    assert found.design.preset == "quick"
    rows = found.design.rows
    assert found.design.settings.compare.sizes == (rows,)
    assert rows in budget._fewer(40)
    assert found.left_out[0] == f"{rows} of 40 task rows"
    assert found.design.seconds <= budget.PLANNED * 0.7 * seconds


def test_a_preset_that_is_asked_for_keeps_its_seeds_and_has_fewer_rows(
    place: Path, known_speed: None
) -> None:
    given = settings(place, place / "x")
    seconds = costs(budget.plan(given, preset="full"))["full"]
    found = budget.plan(given, preset="full", seconds=0.8 * seconds)
    assert (found.design.preset, len(found.design.settings.seeds)) == ("full", 5)
    assert found.design.rows < 40


def test_rows_that_the_settings_fix_are_not_reduced(place: Path, known_speed: None) -> None:
    given = settings(place, place / "x", compare={"sizes": [16, 40]})
    seconds = costs(budget.plan(given, preset="quick"))["quick"]
    with pytest.raises(ConfigError, match="the smallest design, quick, takes about"):
        budget.plan(given, seconds=0.7 * seconds)


def test_rows_are_reduced_down_to_a_few_in_small_steps() -> None:
    assert budget._fewer(100) == [71, 50, 35, 25, 18, 12, 9]
    assert budget._fewer(5) == []


def test_a_budget_that_nothing_fits_names_one_that_would(place: Path) -> None:
    match = (
        r"the smallest design, quick with 10 of 40 task rows, takes about (\d+) min .* --budget \1m"
    )
    with pytest.raises(ConfigError, match=match):
        budget.plan(settings(place, place / "x"), seconds=0.001)


def test_a_pool_that_cannot_feed_a_preset_is_said(place: Path, known_speed: None) -> None:
    given = settings(place, place / "x", mix={"general_per_task": 10})
    with pytest.raises(
        ConfigError,
        match=r"--preset full: it needs about 3,2\d\d general rows, the pool has [\d,]+;",
    ):
        budget.plan(given, preset="full")
    assert budget.plan(given, seconds=1e6).design.preset == "standard"


def test_a_number_of_general_rows_must_be_known(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"mix\.general_per_task is auto; set a number"):
        budget.plan(settings(place, place / "x", mix={"general_per_task": "auto"}), preset="quick")


def test_a_units_cost_in_seconds(place: Path) -> None:
    """20 rows, one general row each, twice: 40 + 40 trained; three folds train two thirds three
    times."""
    given = settings(
        place,
        place / "x",
        mix={"general_per_task": 1, "repeats": 2},
        compare={"arms": ["sft", "tell"], "folds": 3},
    )
    loaded = base_model.load(given.model, given.train)
    rows = run_data.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    study = ComparisonPlan(
        given, {0: rows}, place, Speed(task=1, general=10, scored=0.5, answered=100, start=7)
    )
    tell, setting = ARMS["tell"], Hyperparameters(repeats=2)
    assert study.cost(Job(Cell(tell, 20, 0), setting)) == 2 * (40 + 400) + 3 * 7 + 20 * 0.5
    final = study.cost(Job(Cell(tell, 20, 0), None, (Trial(setting, 1.0, 0, 0.0),)))
    assert (
        final == 440 + 7 + (8 + 4) * 0.5
    )  # 8 test rows and 2 + 2 held out; 20 of 40 rows are not probed


def test_speed_is_measured_on_the_rows_of_the_run(place: Path) -> None:
    given = settings(place, place / "x")
    loaded = base_model.load(given.model, given.train)
    rows = run_data.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    found = budget.measure(rows, loaded, given)
    assert min(found.task, found.scored, found.answered) > 0
    assert min(found.general, found.start) >= 0
    assert loaded.peft is None


@pytest.mark.e2e
def test_a_planned_comparison_says_what_it_leaves_out_and_resumes_with_its_design(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    file = tmp_path / "run.yaml"
    file.write_text(dump_settings(settings(place, out, mix={"general_per_task": 1, "repeats": 1})))
    values = ["compare.seeds=[0,1]", "compare.sizes=[8,16]", "compare.arms=[base,sft,tell]"]
    changes = [word for value in values for word in ("--set", value)]
    message = refused("compare", file, "--budget", "1h", *changes)
    assert "--budget asks for confirmation, but this is not a terminal; add --yes" in message
    assert not out.exists()
    shown = done("compare", file, "--budget", "1h", "--yes", *changes)
    assert "Presets for these rows on this machine" in shown
    assert "Preset full: about 1 minute of the 60 minutes given." in shown
    assert json.loads((out / "budget.json").read_text())["seconds"] == 3600
    for given in (
        ["--budget", "1h", "--yes"],
        [],
    ):  # without the changes, and the budget: the plan stands in the folder
        assert "Presets for" not in done("compare", file, *given, "--resume")
    assert verify.verify(out / "certificate.json") == ([], [])


@pytest.mark.e2e
def test_a_preset_without_a_budget_has_no_limit(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = tmp_path / "run.yaml"
    compare = {"arms": ["sft", "tell"], "sizes": [8], "seeds": [0, 1]}
    file.write_text(
        dump_settings(
            settings(place, out, mix={"general_per_task": 1, "repeats": 1}, compare=compare)
        )
    )
    shown = done("compare", file, "--preset", "quick", "--yes")
    assert "Preset quick: about 1 minute." in shown
    assert "Compared with the full design: " in shown
    planned = json.loads((out / "budget.json").read_text())
    assert planned["seconds"] is None
    sealed = Certificate.read(out / "certificate.json")
    assert f"Compared with the full design: {', '.join(planned['left_out'])}." in wording.notes(
        sealed
    )
    assert wording.quick_answer(sealed.answer)[:40] in shown
    done("compare", file, "--resume")


@pytest.mark.e2e
def test_whole_seeds_are_dropped_rather_than_the_budget_overrun(
    place: Path, tmp_path: Path
) -> None:
    compare = {
        "arms": ["base", "sft", "tell"],
        "seeds": [0, 1, 2, 3],
        "sizes": [8],
        "sft_epochs": [1],
        "tune": "first",
        "folds": 2,
    }
    given = settings(
        place, tmp_path / "out", compare=compare, mix={"general_per_task": 1, "repeats": 1}
    )
    run_comparison(given, budget=Budget(1e-6, ("8 of 40 task rows",)))
    sealed = Certificate.read(tmp_path / "out" / "certificate.json")
    assert {(p.arm, len(p.by_seed)) for p in sealed.answer.points} == {
        ("base", 2),
        ("sft", 2),
        ("tell", 2),
    }
    assert "To fit 0 minutes: 8 of 40 task rows, no seeds after 1." in wording.notes(sealed)
