"""What a scaling run's curves say, from results and predictions alone: planted jumps, smooth
curves, hard metrics, rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.config.experiments import ScaleSettings
from fulcrum.config.settings import Settings, dump_settings, settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.mechanism import scale_arms, scale_report
from fulcrum.mechanism.scale import _designs, plan, run_scale
from fulcrum.report import run_report
from helpers.commands import done, refused
from helpers.runs import KillAfter, Killed, timeless
from helpers.tiny import comparison_settings, save_task

RATIOS = [0, 0.5, 1, 2, 4, 8, 16, 32, 64]
SEEDS = (0, 1, 2, 3)


def run(
    loss: Callable[[float], float],
    hard: Callable[[float], float] | None = None,
    noise: float = 0.01,
    rows: int = 12,
    **asked: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and predictions of a scaling run whose scores are functions of the ratio, with noise
    of each seed and level."""
    rng = np.random.default_rng(7)
    asked = {"ratios": RATIOS, "designs": ["exposures"], "repeats": 2, **asked}
    task = {"name": "t", "train": "x", "anchor": "a", "metrics": ["nll", "exact_match"]}
    settings = scale_arms.prepared(
        settings_from_dict(
            {"task": task, "general": "p", "scale": asked, "compare": {"seeds": SEEDS}}
        )
    )
    arms, lines = [], []
    for level in {level.arm: level for level in scale_arms.levels(settings)}.values():
        for seed in SEEDS:
            value = loss(level.ratio) + noise * rng.standard_normal()
            scores = [{"metric": "nll", "value": value, "higher_is_better": False}]
            exact = (hard(level.ratio) if hard else 0.1) + noise * rng.standard_normal()
            scores.append({"metric": "exact_match", "value": exact, "higher_is_better": True})
            arms.append({"arm": level.arm, "size": 8, "seed": seed, "scores": {"t": scores}})
            for row in range(rows):
                own = {
                    "arm": level.arm,
                    "seed": seed,
                    "task": "t",
                    "origin": f"r{row}",
                    "n_tokens": 2,
                }
                lines.append({**own, "nll_sum": 2 * (value + 0.02 * rng.standard_normal())})
    return {"kind": "scale", "settings": settings.model_dump(mode="json"), "arms": arms}, lines


def step(ratio: float) -> float:
    return 2.0 if ratio < 4 else 1.2


def design(found: dict[str, Any], place: int = 0) -> dict[str, Any]:
    return dict(found["tasks"][0]["designs"][place])


def test_a_planted_jump_of_the_loss_is_found_where_it_is() -> None:
    found = design(scale_report.analyse(*run(step)))
    nll = found["metrics"][0]
    assert found["word"] == "jump"
    said = (
        r"From none to 64 general rows .* from (1\.9|2\.0)\d\d to 1\.[12]\d\d nats per token "
        r"\(-0\.[78]\d\d; -.*4 seeds\)"
    )
    assert re.match(said, found["sentence"])
    assert nll["between"] == [2, 4]
    assert nll["size"] == pytest.approx(-0.8, abs=0.05)
    assert np.shape(nll["by_seed"]) == (4, 9)
    assert found["rows"]["jumps"] == 12  # all rows fall by 0.8 there
    assert dict(map(tuple, found["rows"]["places"])) == {
        "0 to 0.5": 0,
        "0.5 to 1": 0,
        "1 to 2": 0,
        "2 to 4": 12,
        "4 to 8": 0,
        "8 to 16": 0,
        "16 to 32": 0,
        "32 to 64": 0,
    }


def test_a_power_law_is_smooth_and_a_hard_metric_that_jumps_beside_it_an_artefact() -> None:
    def law(ratio: float) -> float:
        return 1.0 + (1 + ratio) ** -0.5

    smooth = design(scale_report.analyse(*run(law)))
    assert smooth["word"] == "smooth"
    assert smooth["metrics"][0]["best"] == "power"
    assert smooth["metrics"][0]["fits"]["power"]["parameters"]["beta"] == pytest.approx(
        0.5, abs=0.1
    )
    assert smooth["rows"]["jumps"] == 0
    assert (
        design(scale_report.analyse(*run(law, hard=lambda ratio: float(ratio >= 4))))["word"]
        == "metric artefact"
    )


def test_few_amounts_are_not_enough_data() -> None:
    found = design(scale_report.analyse(*run(step, ratios=RATIOS[:6])))
    assert found["word"] == "not enough data"
    assert found["metrics"][0]["p"] is None
    assert "6 amounts are too few" in found["rows"]["sentence"]
    results, _ = run(step)
    assert (
        "no predictions are stored" in design(scale_report.analyse(results, []))["rows"]["sentence"]
    )  # they were taken away


def test_a_jump_in_one_design_alone_is_said_to_be_one_of_length() -> None:
    asked = {"designs": ["exposures", "steps"], "ratios": RATIOS}
    both = scale_report.analyse(*run(step, **asked))["tasks"][0]
    assert [one["word"] for one in both["designs"]] == ["jump", "jump"]
    assert "neither" in both["sentence"]
    results, lines = run(step, **asked)
    rng = np.random.default_rng(3)
    for arm in results["arms"]:
        if arm["arm"].startswith("steps"):
            arm["scores"]["t"][0]["value"] = 1.5 + 0.01 * rng.standard_normal()
    alone = scale_report.analyse(results, lines)["tasks"][0]
    assert [one["word"] for one in alone["designs"]] == ["jump", "smooth"]
    assert "not with fixed steps: it may come of the length of training" in alone["sentence"]
    assert (
        "No change with general data is shown" in alone["designs"][1]["sentence"]
    )  # flat, and known well


def test_what_designs_say_of_each_other() -> None:
    def one(
        design: str, word: str, size: float, place: float, losses: list[list[float]] | None = None
    ) -> dict[str, Any]:
        nll = {
            "metric": "nll",
            "location": place,
            "size": size,
            "improves": size < 0,
            "by_seed": losses or [[2.0, 1.0]] * 3,
        }
        return {"design": design, "word": word, "ratios": [0, 64], "metrics": [nll]}

    def said(*designs: dict[str, Any]) -> str:
        return " ".join(filter(None, scale_report._together(designs)))

    jump, unknown = one("exposures", "jump", -0.8, 3), one("steps", "not enough data", 0, 3)
    assert said(jump, unknown) == (
        "The jump is there with fixed exposures; whether it is with fixed steps could not be told."
    )
    assert "neither length" in said(jump, one("steps", "jump", -0.5, 5))
    assert "not alike (-0.8 at ratio 3 with exposures fixed, +0.8 at 27.8" in said(
        jump, one("steps", "jump", 0.8, 27.8)
    )
    assert "not alike" in said(jump, one("steps", "jump", -0.8, 27.8))
    true = one("exposures", "smooth", 0, 3, [[2.0, 1.0], [2.1, 1.2], [2.2, 1.1]])
    same = one("permuted", "smooth", 0, 3, [[2.0, 1.1], [2.1, 1.1], [2.2, 1.1]])
    none = one("permuted", "smooth", 0, 3, [[2.0, 2.1], [2.1, 2.3], [2.2, 2.0]])
    assert "it is not shown that their answers matter, so the change may be no transfer" in said(
        true, same
    )
    part = one("permuted", "smooth", 0, 3, [[2.0, 1.5], [2.1, 1.6], [2.2, 1.7]])
    assert said(true, none).endswith(
        "with wrong answers nothing is gained, so what general rows teach is in their answers."
    )
    assert said(true, part).endswith(
        "that much is in their answers, the rest is there with wrong ones too (form, words, "
        "length)."
    )
    assert (
        "change the loss by -1.000 (-1.248 to -0.752), with each other's answers by +0.033"
        in said(true, none)
    )


def test_a_worsening_jump_is_shown_as_one() -> None:
    results, lines = run(lambda ratio: 3.2 - step(ratio))
    found = scale_report.analyse(results, lines)
    shown = scale_report.shown(found)[0]["designs"][0]
    assert (shown["word"], shown["loss"]["improves"], shown["loss"]["failed"]) == (
        "jump",
        False,
        ["direction"],
    )
    assert shown["sentence"].partition("nats per token")[2].count("A worsening jump") == 1
    assert "jump at" in shown["plot"]


def test_only_what_is_right_or_wrong_can_be_an_artefact_and_a_metric_without_a_value_is_named() -> (
    None
):
    results, lines = run(
        lambda ratio: 1.0 + (1 + ratio) ** -0.5, hard=lambda ratio: float(ratio >= 4)
    )
    for arm in results["arms"]:
        arm["scores"]["t"][1]["metric"] = "chrf"
    assert design(scale_report.analyse(results, lines))["word"] == "smooth"
    results["arms"][3]["scores"]["t"][1]["value"] = None
    found = design(scale_report.analyse(results, lines))
    assert [one["metric"] for one in found["metrics"]] == ["nll"]
    assert "Not looked at, for lack of a value in some training: chrf" in found["sentence"]


def test_seeds_that_agree_are_not_called_one_seed() -> None:
    found = design(scale_report.analyse(*run(lambda ratio: 1.0 + 1 / (1 + ratio), noise=0.0)))
    assert re.search(r"\(-0\.985; -0\.985 to -0\.985, 4 seeds\)", found["sentence"])


def test_a_run_without_one_whole_seed_says_so() -> None:
    results, lines = run(step)
    results["arms"] = [arm for arm in results["arms"] if arm["arm"] != "exposures_64"]
    with pytest.raises(DataError, match="no seed has all of its trainings"):
        scale_report.analyse(results, lines)


def test_seeds_that_a_budget_cut_short_are_left_out() -> None:
    results, lines = run(step)
    results["arms"] = [
        arm for arm in results["arms"] if (arm["arm"], arm["seed"]) != ("exposures_64", 3)
    ]
    found = scale_report.analyse(results, lines)
    assert found["seeds"] == [0, 1, 2]
    assert np.shape(design(found)["metrics"][0]["by_seed"]) == (3, 9)


def test_fitted_curves_go_through_their_levels() -> None:
    one = design(scale_report.analyse(*run(lambda ratio: 1.0 + (1 + ratio) ** -0.5, noise=0.0)))[
        "metrics"
    ][0]
    fine = dict(zip(np.round(one["fine"], 6).tolist(), one["fits"]["power"]["fine"], strict=True))
    assert fine[0.0] == pytest.approx(2.0, abs=1e-3)
    assert fine[64.0] == pytest.approx(1.0 + 65**-0.5, abs=1e-3)


# The run.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("scale"), 8, 8, pool=3)


def asked(place: Path, output: Path, **changes: Any) -> Settings:
    scaled = {"ratios": [0, 1, 2], "repeats": 1, "designs": ["exposures", "permuted"]}
    return comparison_settings(
        place, output, **{"scale": scaled, "compare": {"seeds": [0, 1]}, **changes}
    )


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done") / "run"
    run_scale(asked(place, output))
    return output


@pytest.mark.e2e
def test_every_amount_is_trained_once_at_every_seed_and_nothing_is_tuned(finished: Path) -> None:
    results = run_report.load(finished)
    trained = [
        (arm["arm"], arm["seed"], arm["training"]["steps"], arm["training"]["share"])
        for arm in results["arms"]
    ]
    names = ["exposures_0", "exposures_1", "exposures_2", "permuted_1", "permuted_2"]
    assert [(arm, seed) for arm, seed, *_ in trained] == [
        (arm, seed) for seed in (0, 1) for arm in names
    ]
    assert [steps for _, _, steps, _ in trained[:5]] == [2, 4, 6, 4, 6]
    assert [(share["task_examples"], share["general_examples"]) for *_, share in trained[:5]] == [
        (8, 0),
        (8, 8),
        (8, 16),
        (8, 8),
        (8, 16),
    ]
    assert all(arm["tried"] == [] and arm["chosen"] is None for arm in results["arms"])
    assert not (finished / "adapters").exists()
    said = scale_report.read_sentences(finished, results)
    assert said[0].startswith("task, exposures fixed: not enough data")
    assert "Exposures fixed: not enough data" in (finished / "report.html").read_text()


@pytest.mark.e2e
def test_a_killed_run_ends_in_the_same_numbers(finished: Path, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_scale(asked(place, tmp_path / "run"), progress=KillAfter(9))
    run_scale(asked(place, tmp_path / "run"), resume=True)
    before, after = (
        timeless(json.loads((folder / "results.json").read_text()))
        for folder in (finished, tmp_path / "run")
    )
    assert before == after


@pytest.mark.e2e
def test_workers_give_the_same_numbers(
    finished: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    run_scale(asked(place, tmp_path / "run"), jobs=2)
    before, after = (
        (folder / store.SCALING).read_text() for folder in (finished, tmp_path / "run")
    )
    assert before == after


def test_a_pool_that_cannot_feed_the_longest_training_is_refused(
    place: Path, tmp_path: Path
) -> None:
    scaled = {"ratios": [0, 1, 500], "repeats": 1, "rows": 8}
    with pytest.raises(
        ConfigError, match=r"takes 4,000 general rows, and the pool has 768, .*lower scale.ratios"
    ):
        run_scale(asked(place, tmp_path / "r", scale=scaled))


@pytest.mark.e2e
def test_the_command_line_plans_shows_and_keeps_to_a_budget(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_settings(asked(place, tmp_path / "run", compare={})))
    dry = done("scale", tmp_path / "run.yaml", "--dry-run")
    assert "5 seeds: 25 training runs" in dry
    assert "permuted_2" in dry
    assert not (tmp_path / "run").exists()
    assert "--budget asks for confirmation" in refused(
        "scale", tmp_path / "run.yaml", "--budget", "1h"
    )
    said = done(
        "scale", tmp_path / "run.yaml", "--budget", "1h", "-y", "--set", "compare.seeds=[0,1]"
    )
    assert "ratios, exposures" in said
    assert "exposures fixed: not enough data" in said
    assert "exposures fixed: not enough data" in done(
        "scale", tmp_path / "run.yaml", "--resume"
    )  # as the budget planned it


def test_a_plan_leaves_out_what_a_budget_does_not_buy(place: Path, tmp_path: Path) -> None:
    wide = asked(place, tmp_path / "r", scale={"ratios": RATIOS, "repeats": 1}, compare={})
    rich = plan(wide, 100_000)
    assert rich.left_out == ()
    assert rich.trainings == 5 * (9 + 9)
    with pytest.raises(
        ConfigError, match=r"the smallest scaling run takes about (\d+) min .*use --budget \1m"
    ):
        plan(wide, 0.001)
    some = plan(wide, rich.seconds * 0.35)
    assert some.left_out[0] == "3 seeds"
    assert len(some.settings.seeds) == 3
    assert some.seconds <= rich.seconds * 0.35


def test_a_plan_gives_up_fixed_steps_before_ratios_and_keeps_what_the_settings_name(
    place: Path, tmp_path: Path
) -> None:
    def plans(scaled: dict[str, Any]) -> list[tuple[int, int]]:
        """Designs and ratios of every plan, from the richest to the least."""
        settings = asked(place, tmp_path / "r", compare={})
        found = settings.model_copy(update={"scale": ScaleSettings(**scaled)})
        return [(len(one.scale.designs), len(one.scale.ratios)) for one, _ in _designs(found)]

    free = plans({})
    assert free.index((2, 9)) < free.index((1, 9)) < free.index((1, 8)) < free.index((1, 7))
    assert {ratios for _, ratios in plans({"ratios": RATIOS})} == {9}
    assert {designs for designs, _ in plans({"designs": ("exposures", "steps")})} == {2}
    settings = asked(place, tmp_path / "r", compare={}).model_copy(
        update={"scale": ScaleSettings()}
    )
    assert "seven amounts hardly show a jump" in list(_designs(settings))[-1][1][-1]
