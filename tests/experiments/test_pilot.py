"""How much general data: the choice from a curve, and a pilot on a tiny model that is resolved once
and kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.config.sections import PILOT_RATIOS
from fulcrum.config.settings import Settings, load_settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import Silent
from fulcrum.core.types import Hyperparameters, Pilot
from fulcrum.data import run_data
from fulcrum.experiments import pilot
from fulcrum.experiments.arm_data import ArmPlan
from fulcrum.experiments.cell import Session
from fulcrum.experiments.compare import run_comparison
from fulcrum.experiments.train import run_training
from helpers.tiny import comparison_settings, save_task


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pilot tried is kept in the cache; no test may live on another's."""
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("losses", "errors", "chosen"),
    [
        ([1.0, 0.8, 0.7, 0.9], [0, 0.05, 0.05, 0.05], (2, 6)),  # the bottom of a bowl
        (
            [1.0, 0.9, 0.8, 0.7],
            [0, 0.05, 0.05, 0.05],
            (16, 16),
        ),  # the most that was tried, and no further
        ([1.0, 1.2, 1.4, 1.6], [0, 0.05, 0.05, 0.05], (0, 0)),
        ([1.0, 0.92, 0.93, 1.1], [0, 0.05, 0.05, 0.05], (0, 0)),  # better by less than two errors
        ([1.0, 0.7, 0.9, 1.1], [0, 0.05, 0.05, 0.05], (1, 3)),
        (
            [1.0, 0.6, 0.62, 0.595],
            [0, 0.05, 0.05, 0.05],
            (4, 16),
        ),  # its neighbours are those beside it
    ],
)
def test_the_choice_is_the_bowls_lowest_point_or_none(
    losses: list[float], errors: list[float], chosen: tuple[float, float]
) -> None:
    found = pilot.choose(PILOT_RATIOS, np.array(losses), np.array(errors))
    assert chosen[0] <= found <= chosen[1]


def settings_of(folder: Path, **mix: object) -> Settings:
    compare = {"arms": ["base", "sft", "tell"], "folds": 2, "sizes": [8]}
    given = {"general_per_task": "auto", "repeats": 1, "pilot_tokens": 16000, **mix}
    return comparison_settings(
        save_task(folder, 16, 4, pool=2), folder / "out", compare=compare, mix=given
    )


@pytest.mark.e2e
def test_a_pilot_is_run_once_kept_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)
    results = run_comparison(settings)
    known = json.loads((tmp_path / "out" / store.PILOT).read_text())
    assert (known["ratios"], known["repeats"]) == ([0, 1, 4, 16], 1)
    assert 8 <= known["rows"] <= 16
    assert 8000 < known["tokens"] <= 16000
    assert known["errors"][0] == 0 < min(known["errors"][1:])
    assert results.notes[0].startswith(f"mix.general_per_task: auto chose {known['chosen']:g}")
    assert load_settings(tmp_path / "out" / "config.yaml").mix.general_per_task == known["chosen"]
    monkeypatch.setattr(pilot, "run", lambda *_: pytest.fail("run again"))
    run_comparison(settings, resume=True)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("chosen", "arms"), [(4.0, {"base", "sft", "tell"}), (0.0, {"base", "sft"})]
)
def test_what_it_chose_is_what_is_compared_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: float, arms: set[str]
) -> None:
    found = Pilot(
        PILOT_RATIOS, (1.0, 1.0, 1.0, 1.0), (0.0, 0.1, 0.1, 0.1), chosen, 8, 1, 5, 100, 1.0
    )
    monkeypatch.setattr(pilot, "run", lambda *_: found)
    settings = settings_of(tmp_path)
    results = run_comparison(settings)
    assert {arm.arm for arm in results.arms} == arms
    page = (tmp_path / "out" / "report.html").read_text()
    said = "It chose 4 general rows for each" if chosen else "It chose none: no amount"
    assert said in page
    assert f"chosen: {chosen:g} </text>" in page
    trained = run_training(settings.model_copy(update={"output_dir": str(tmp_path / "own")}))
    general = trained.arms[1].training.share.general_examples
    assert (trained.arms[1].arm, general > 0) == (
        ("tell", True) if chosen else ("sft_anchor", False)
    )
    assert store.read_json(tmp_path / "own" / store.PILOT)["chosen"] == chosen
    # Alone, as often as the pilot found best is tried too.
    assert [tried.setting.repeats for tried in trained.arms[1].tried] == ([1] if chosen else [1, 5])


@pytest.mark.e2e
def test_task_rows_alone_may_use_the_steps_of_the_mixtures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []
    held_out = pilot._held_out

    def watched(session: Session, plan: ArmPlan, chosen: Hyperparameters) -> object:
        tried.append((plan.arm.name, chosen.repeats))
        return held_out(session, plan, chosen)

    monkeypatch.setattr(pilot, "_held_out", watched)
    settings = settings_of(tmp_path, repeats=2, pilot_tokens=30_000)
    save_task(tmp_path, 16, 4, pool=3)
    resolved, found = pilot.resolve(settings, compared=True, progress=Silent())
    assert tried == [*(("sft_anchor", shown) for shown in (2, 10, 34)), *[("tell", 2)] * 3]
    assert found.alone in (2, 10, 34)
    assert resolved.compare.extra_trials == 4
    assert resolved.compare.sft_epochs == (
        None if found.chosen else tuple(sorted({2, min(found.alone, 32)}))
    )


@pytest.mark.e2e
def test_a_killed_pilot_goes_on_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures that were tried are not tried again, wherever the run is to stand; another seed
    tries its own."""
    settings = settings_of(tmp_path)
    held_out, tried = pilot._held_out, list[int]()

    def watched(*given: Any) -> object:
        if len(tried) == stop:
            raise KeyboardInterrupt
        tried.append(given[2].repeats)
        return held_out(*given)

    def found(**changes: object) -> Pilot:
        resolved = pilot.resolve(
            settings.model_copy(update=changes), compared=True, progress=Silent()
        )[1]
        assert resolved is not None
        return resolved

    monkeypatch.setattr(pilot, "_held_out", watched)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        found()
    tried, stop = [], 99
    again = found(output_dir=str(tmp_path / "elsewhere"))
    assert len(tried) == 4
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "empty"))
    tried = []
    whole = found()
    assert len(tried) == 6
    assert replace(again, seconds=0) == replace(whole, seconds=0)
    tried = []
    found(compare=settings.compare.model_copy(update={"seeds": (5,)}))
    assert len(tried) == 6


def test_too_few_tokens_are_refused_with_how_many_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"1,000 pilot tokens buy mixtures of \d task rows, 8 are needed; set mix.pilot_tokens "
            r"to"
        ),
    ):
        run_comparison(settings_of(tmp_path, pilot_tokens=1000))


def test_a_pilot_sees_no_test_row_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a test file a training holds out a quarter, a comparison another fold at each
    seed."""
    seen: list[set[str]] = []
    found = Pilot(PILOT_RATIOS, (1.0, 1.0, 1.0, 1.0), (0.0, 0.1, 0.1, 0.1), 1.0, 8, 1, 5, 100, 1.0)

    def watched(session: Session, rows: run_data.RunData, *given: object) -> Pilot:
        seen.append({row.origin for task in rows.tasks for row in task.train})
        return found

    monkeypatch.setattr(pilot, "run", watched)
    settings = settings_of(tmp_path)
    save_task(tmp_path, 48, 4, pool=2)
    task = settings.tasks[0].model_copy(update={"test": ()})
    alone = settings.model_copy(
        update={"tasks": (task,), "seed": 3, "output_dir": str(tmp_path / "own")}
    )
    run_training(alone)
    tested = {
        json.loads(line)["origin"]
        for line in (tmp_path / "own" / "predictions.jsonl").open()
        if '"task"' in line
    }
    assert len(seen[0]) >= 20
    assert not seen[0] & tested
    compare = settings.compare.model_copy(update={"seeds": (0, 1)})
    with pytest.raises(
        ConfigError,
        match=r"auto: without a test file the first seed's task rows are the other seeds' test",
    ):
        run_comparison(settings.model_copy(update={"tasks": (task,), "compare": compare}))


@pytest.mark.e2e
def test_what_is_left_out_for_a_zero_is_said_and_takes_its_settings_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Pilot(PILOT_RATIOS, (1.0, 1.0, 1.0, 1.0), (0.0, 0.1, 0.1, 0.1), 0.0, 8, 1, 5, 100, 1.0)
    monkeypatch.setattr(pilot, "run", lambda *_: found)
    settings = settings_of(tmp_path)
    changes = {
        "arms": ("base", "sft_anchor", "tell", "sft_matched"),
        "sizes_of": {"tell": (8,), "sft_anchor": (4, 8)},
    }
    results = run_comparison(
        settings.model_copy(update={"compare": settings.compare.model_copy(update=changes)})
    )
    assert {arm.arm for arm in results.arms} == {"base", "sft_anchor"}
    assert "Left out, since nothing is to be mixed: tell, sft_matched." in results.notes


def test_a_pool_that_cannot_feed_the_pilot_is_named(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, repeats=4)
    with pytest.raises(
        ConfigError,
        match=r"auto: its pilot mixes up to 16 general rows .* and the pool has 512 rows",
    ):
        run_comparison(settings)
