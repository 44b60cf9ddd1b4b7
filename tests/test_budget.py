"""What a time budget buys: designs from the richest to the least, their predicted cost, and what a quick look says."""

import json
from pathlib import Path
from typing import Any

import pytest

from fulcrum import arms, budget, cli_budget, comparison, config, material, model, verification
from fulcrum.cell import Cell
from fulcrum.errors import ConfigError
from fulcrum.records import Hyperparameters, Trial
from fulcrum.units import ComparisonPlan, Job, Speed
from test_cli import done, refused
from tiny import comparison_settings, save_task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("budget"), 40, 8, pool=7)


def settings(place: Path, output: Path, **changes: Any) -> config.Settings:
    return comparison_settings(place, output, **{"mix": {"general_per_task": 1}, **changes})


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("1h30m", 5400), ("90m", 5400), ("600s", 600), ("0.5h", 1800)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert budget.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "soon", "-1h", "0m", "2h nonsense"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write hours, minutes and seconds as 2h, 1h30m, 90m or 600s"):
        budget.parse(text)


def test_the_richest_design_of_many_rows(place: Path) -> None:
    richest, left_out = next(budget.designs(settings(place, place / "x"), 256, quick=False))
    assert left_out == []
    compare = richest.compare
    assert (compare.sizes, compare.sizes_of) == ((64, 256), {"sft": (16, 32, 64, 128, 256)})
    assert (richest.seeds, compare.tune) == ((0, 1, 2, 3, 4), "first")
    assert [arm.name for arm in arms.chosen_arms(richest)][-3:] == ["tell", "general_then_task", "placebo_permuted"]
    few, _ = next(budget.designs(settings(place, place / "x"), 64, quick=False))
    assert len(few.seeds) == 8  # at most 64 rows: eight, since their draw matters more


def test_each_design_costs_no_more_and_says_what_it_left_out(place: Path) -> None:
    given = settings(place, place / "x")
    loaded = model.load(given.model, given.train)
    rows = material.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    costs, said = [], []
    for design, left_out in budget.designs(given, 40, quick=False):
        costs.append(budget.predict(design, rows, loaded, Speed())[1])
        said.append(len(left_out))
        assert {"sft", "sft_anchor", "tell"} <= {arm.name for arm in arms.chosen_arms(design)}  # never the strongest rivals
    assert costs == sorted(costs, reverse=True)
    assert said == sorted(said)  # of one thing (seeds, test rows) the last word counts
    assert len({*said}) > 8
    assert len(design.seeds) == 2


def test_fewer_rows_are_preferred_to_two_seeds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(place, place / "x")
    loaded = model.load(given.model, given.train)
    rows = material.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    monkeypatch.setattr(budget, "measure", lambda *_: Speed(task=100, general=100))
    every = len(rows.tasks[0].train)

    def cost(number: int, seeds: int) -> float:
        """Of the least design with so many rows and seeds."""
        found = [design for design, _ in budget.designs(given, number, quick=False) if len(design.seeds) == seeds]
        return budget.predict(found[-1], rows, loaded, Speed(task=100, general=100))[1]

    found = budget.plan(given, 1.3 * cost(every, 2))  # enough for all rows with two seeds, and not with three
    assert cost(every, 3) > 1.2 * cost(every, 2)
    assert len(found.settings.seeds) >= 3
    assert max(found.settings.compare.sizes) < every
    assert any(text.startswith(f"task rows beyond {max(found.settings.compare.sizes)} of {every}") for text in found.left_out)
    least = budget.plan(given, 1.3 * cost(budget._fewer(every)[-1], 2))
    assert len(least.settings.seeds) == 2


def test_rows_are_tried_down_to_a_few_in_small_steps() -> None:
    assert budget._fewer(100) == [100, 71, 50, 35, 25, 18, 12, 9]
    assert budget._fewer(5) == [5]


def test_what_the_settings_fix_is_kept(place: Path) -> None:
    fixed = {"arms": ["sft", "tell"], "seeds": [3, 4], "sizes": [8, 16], "sizes_of": {"sft": [8, 16, 32]}}
    for design, _ in budget.designs(settings(place, place / "x", compare=fixed), 40, quick=False):
        compare = design.compare
        assert (compare.arms, compare.seeds, compare.sizes) == (("sft", "tell"), (3, 4), (8, 16))
        assert compare.sizes_of == {"sft": (8, 16, 32)}


def test_a_units_cost_in_seconds(place: Path) -> None:
    """20 rows, one general row each, twice: 40 + 40 trained; three folds train two thirds three times."""
    given = settings(
        place, place / "x", mix={"general_per_task": 1, "repeats": 2}, compare={"arms": ["sft", "tell"], "folds": 3}
    )
    loaded = model.load(given.model, given.train)
    rows = material.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    study = ComparisonPlan(given, {0: rows}, place, Speed(task=1, general=10, scored=0.5, answered=100, start=7))
    tell, setting = arms.ARMS["tell"], Hyperparameters(repeats=2)
    assert study.cost(Job(Cell(tell, 20, 0), setting)) == 2 * (40 + 400) + 3 * 7 + 20 * 0.5
    final = study.cost(Job(Cell(tell, 20, 0), None, (Trial(setting, 1.0, 0, 0.0),)))
    assert final == 440 + 7 + (8 + 4) * 0.5  # 8 test rows and 2 + 2 held out; 20 of 40 rows are not probed


def test_speed_is_measured_on_the_rows_of_the_run(place: Path) -> None:
    given = settings(place, place / "x")
    loaded = model.load(given.model, given.train)
    rows = material.prepare(given, loaded.tokenizer, loaded.context, 0, dev_apart=False)
    found = budget.measure(rows, loaded, given)
    assert min(found.task, found.scored, found.answered) > 0
    assert min(found.general, found.start) >= 0
    assert loaded.peft is None


def test_a_budget_that_buys_nothing_names_what_would(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"the least design takes about \d+ minutes .*, the budget has 0; raise it"):
        budget.plan(settings(place, place / "x"), 0.001)


def test_a_comparison_by_budget_says_what_was_left_out_and_goes_on_with_its_design(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = tmp_path / "run.yaml"
    file.write_text(config.dump(settings(place, out, mix={"general_per_task": 1, "repeats": 1})))
    changes = ["--set", "compare.seeds=[0,1]", "--set", "compare.sizes=[8,16]", "--set", "compare.arms=[base,sft,tell]"]
    message = refused("compare", file, "--budget", "1h", *changes)
    assert "--budget asks before it starts, and nobody can answer here; give -y" in message
    assert not out.exists()
    shown = done("compare", file, "--budget", "1h", "-y", *changes)
    assert "What the budget buys" in shown
    planned = json.loads((out / "budget.json").read_text())
    assert planned["seconds"] == 3600
    for given in (["--budget", "1h", "-y"], []):  # without the changes, and the budget: the plan stands in the folder
        assert "What the budget buys" not in done("compare", file, *given, "--resume")
    assert verification.verify(out / "certificate.json") == ([], [])


def test_whole_seeds_are_dropped_rather_than_the_budget_overrun(place: Path, tmp_path: Path) -> None:
    compare = {
        "arms": ["base", "sft", "tell"],
        "seeds": [0, 1, 2, 3],
        "sizes": [8],
        "sft_epochs": [1],
        "tune": "first",
        "folds": 2,
    }
    given = settings(place, tmp_path / "out", compare=compare, mix={"general_per_task": 1, "repeats": 1})
    comparison.compare(given, budget=1e-6, left_out=["mix"])
    sealed = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert {(p["arm"], len(p["by_seed"])) for p in sealed["answers"][0]["points"]} == {("base", 2), ("sft", 2), ("tell", 2)}
    assert (
        "Left out for the time budget of 0 minutes: mix; seeds after 1, for which there was no time."
        in sealed["question"]["notes"]
    )


def answer(verdict: str, slope: tuple, difference: tuple, seeds: int = 2) -> dict[str, Any]:
    ends = [dict(zip(("estimate", "low", "high"), values, strict=True)) for values in (slope, difference)]
    return {"slope": ends[0], "difference": ends[1], "verdict": verdict, "rows": 64, "seeds": seeds, "metric": "nll"}


@pytest.mark.parametrize(
    ("found", "start"),
    [
        (answer("gain", (0.2, 0.1, 0.3), (0.1, 0.05, 0.15)), "Go: without general data each doubling of rows brings +0.200"),
        (answer("gain", (0.0, -0.1, 0.1), (0.1, 0.05, 0.15)), "Go for the gain; no factor in rows will be identifiable: "),
        (answer("loss", (0.2, 0.1, 0.3), (-0.1, -0.2, -0.05)), "No go: "),
        (answer("no gain shown", (0.2, 0.1, 0.3), (0.0, -0.1, 0.1)), "Not known yet: "),
        (answer("no gain shown", (0.0, -0.1, 0.1), (0.0, -0.1, 0.1)), "Not known yet, nor whether more rows bring anything: "),
        (
            answer("no gain shown", (-0.1, -0.2, -0.01), (0.0, -0.1, 0.1)),
            "No go, since more rows bring nothing, so that none can be saved: ",
        ),
        (answer("cannot be said", (None, None, None), (0.0, None, None)), "Not known: "),
    ],
)
def test_what_a_quick_look_says(found: dict[str, Any], start: str) -> None:
    assert cli_budget.quick_answer(found).startswith(start)


def test_a_quick_look_says_how_sure_it_is() -> None:
    """Half width 0.1 with 2 seeds (t 12.706) is 0.1 * sqrt(2 / 5) * 2.776 / 12.706 = 0.0138 with 5."""
    text = cli_budget.quick_answer(answer("gain", (0.2, 0.1, 0.3), (0.1, 0.0, 0.2)))
    assert text.endswith("How sure: 2 seeds leave ±0.100; 5 would leave ±0.014 at best.")


@pytest.mark.parametrize(("difference", "sure"), [((0.0, -0.1, 0.1), "±0.100"), ((0.0, None, None), "no interval here")])
def test_a_quick_look_at_one_size_gives_no_numbers_that_are_none(difference: tuple, sure: str) -> None:
    text = cli_budget.quick_answer(answer("cannot be said", (None, None, None), difference))
    assert text.startswith(
        "Not known: of one number of rows alone nobody knows what more of them bring; the general data bring +0"
    )
    assert f"How sure: 2 seeds leave {sure}" in text
    assert "nan" not in text
