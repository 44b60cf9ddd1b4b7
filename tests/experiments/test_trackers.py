"""Trackers hold what the run folder holds, begin no other run when it goes on, and end none by
failing.

TensorBoard is installed here, and its own reader reads its files. For the other three packages
stand in (`stand_ins`).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fulcrum import api
from fulcrum.config.settings import load_settings, settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.core.progress import Silent
from fulcrum.core.types import TrainPoint
from fulcrum.experiments import trackers
from fulcrum.report import run_report, summary, verify
from helpers import stand_ins
from helpers.tiny import comparison_settings, save_task

Told = list[list[Any]]


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def step(self, label: str, point: TrainPoint, steps: int, dev: float | None) -> None:
        self.steps.append((label, point.step))


def settings_of(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Keywords of `finished.train` for a tiny run of four steps."""
    data = comparison_settings(place, output, mix={"general_per_task": 1, "repeats": 1}).model_dump(
        mode="json"
    )
    return {**data, **changes}


def point(step: int, loss: float = 1.0) -> TrainPoint:
    return TrainPoint(step, loss, None, 1e-3, 10 * step, 1.0)


def read(folder: Path) -> dict[str, EventAccumulator]:
    """What TensorBoard's own reader finds, by run."""
    places = (folder / store.TRACKERS / "tensorboard").iterdir()
    return {place.name: EventAccumulator(str(place)).Reload() for place in places}


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("task"), 16, 6)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run folder whose training was reported to TensorBoard; nobody changes it."""
    api.train(**settings_of(place, place / "run", report_to="tensorboard"))
    return place / "run"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder that a run has begun."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / store.MANIFEST).write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Told]:
    """Stand-ins for the packages that are not installed here; gives what they were told."""
    for name in ("trackio", "wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in (
        "WANDB_MODE",
        "WANDB_PROJECT",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(str(stand_ins.write(tmp_path / "packages")))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.jsonl"))
    return lambda: [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]


def test_curves_are_those_of_the_events(finished: Path) -> None:
    runs, events = (
        read(finished),
        [json.loads(line) for line in (finished / store.EVENTS).read_text().splitlines()],
    )
    labels = {event["run"] for event in events}
    assert set(runs) == {*labels, trackers.RESULTS}
    names = {
        "loss/task": "task_loss",
        "loss/general": "general_loss",
        "loss/dev": "dev_nll",
        "tokens": "tokens",
        "learning_rate": "learning_rate",
    }
    for label in labels:
        assert set(runs[label].Tags()["scalars"]) == set(names)
        for tag, name in names.items():
            known = [
                (one["step"], pytest.approx(one[name]))
                for one in events
                if one["run"] == label and one[name] is not None
            ]
            assert scalars(runs[label], tag) == known
            assert known


def test_scores_are_those_of_the_results_and_files_are_those_of_the_folder(finished: Path) -> None:
    events, results = read(finished)[trackers.RESULTS], run_report.load(finished)
    known = {arm["arm"]: arm["scores"]["task"][0] for arm in results["arms"]}
    assert set(known) == {"base_anchor", "tell"}
    for arm, score in known.items():
        for tag, value in (
            ("", score["value"]),
            (" low", score["low"]),
            (" high", score["high"]),
            (" n", 6),
            (" seeds", 1),
        ):
            assert scalars(events, f"task/{arm}/nll{tag}") == [(0, pytest.approx(value))]
    for name in ("config.yaml", "manifest.json"):
        (text,) = events.Tensors(f"{name}/text_summary")
        assert (
            text.tensor_proto.string_val[0].decode() == f"```\n{(finished / name).read_text()}\n```"
        )


def test_a_run_goes_on_with_other_trackers_and_its_identity_knows_none(
    finished: Path, place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    settings = store.read_json(folder / store.MANIFEST)["settings"]
    assert "report_to" not in settings
    assert load_settings(folder / "config.yaml").report_to == ("tensorboard",)
    shutil.rmtree(folder / store.TRACKERS)
    api.train(**settings_of(place, folder, report_to=[]), resume=True)
    assert store.read_json(folder / store.MANIFEST)["settings"] == settings
    assert load_settings(folder / "config.yaml").report_to == ()
    assert not (folder / store.TRACKERS).exists()


def test_a_copy_that_a_tracker_keeps_is_no_certificate_of_the_run(
    finished: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(finished, tmp_path / "copied")
    (copied / store.TRACKERS / "mlflow").mkdir()
    (copied / store.TRACKERS / "mlflow" / "certificate.json").write_text("{}")
    assert verify.verify_run(copied).wrong == []


def test_settings_name_trackers_once_and_the_nearest_for_another(place: Path) -> None:
    def given(value: Any) -> tuple[str, ...]:
        return settings_from_dict(settings_of(place, place / "none", report_to=value)).report_to

    assert given("wandb") == ("wandb",)
    assert given("mlflow, trackio") == ("mlflow", "trackio")
    assert given(["tensorboard", "tensorboard"]) == ("tensorboard",)
    assert given("none") == given(None) == given([]) == ()
    assert set(given(list(trackers.TOOLS))) == set(trackers.TOOLS)
    with pytest.raises(
        ConfigError, match=r"report_to: no tracker 'tensorbord'; did you mean 'tensorboard'\?"
    ):
        given("tensorbord")


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"wandb is not installed; pip install 'fulcrum-llm\[wandb\]'"
    ):
        api.train(**settings_of(place, tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any) -> Any:
        raise OSError("no room\nleft")

    tool = trackers._Tool(broken, str, trackers._texts)
    monkeypatch.setattr(trackers, "TOOLS", {**trackers.TOOLS, "trackio": tool})
    heard = Heard()
    both = trackers.Trackers(heard, ["trackio", "tensorboard"], begun)
    for step in (1, 2):
        both.step("a", point(step), 2, None)
    both.close()
    assert heard.stages == [
        "warning: trackio: no room left; nothing more is reported to it, and the run goes on"
    ]
    assert heard.steps == [("a", 1), ("a", 2)]
    assert scalars(read(begun)["a"], "loss/task") == [(1, 1.0), (2, 1.0)]


def test_nobody_who_watches_is_warned_by_python(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.Trackers, "_open", lambda *_: 1 / 0)
    alone = trackers.Trackers(None, ["tensorboard"], begun)

    def sent() -> None:
        alone.step("a", point(1), 1, None)
        alone.close()

    with pytest.warns(
        UserWarning, match="^tensorboard: division by zero; nothing more is reported"
    ):
        sent()


def test_steps_told_again_after_a_kill_stand_once(begun: Path) -> None:
    for steps, loss in (((1, 2, 3), 1.0), ((2, 3, 4), 2.0)):
        sitting = trackers.Trackers(None, ["tensorboard"], begun)
        for step in steps:
            sitting.step("a", point(step, loss), 9, None)
        sitting.close()
    assert scalars(read(begun)["a"], "loss/task") == [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_what_comes_before_the_folder_is_begun_and_what_is_not_written_down_is_passed_on_alone(
    tmp_path: Path,
) -> None:
    heard = Heard()
    early = trackers.Trackers(heard, ["tensorboard"], tmp_path)
    early.step("a pilot's", point(1), 4, None)
    early.close()
    assert heard.steps == [("a pilot's", 1)]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / store.MANIFEST).write_text("{}")
    long = trackers.Trackers(heard, ["tensorboard"], tmp_path)
    for step in (1, 2, 3, 4, 5, 6):
        long.step("long", point(step), 2000, 0.5 if step == 3 else None)
    long.close()
    assert [step for step, _ in scalars(read(tmp_path)["long"], "loss/task")] == [1, 3, 4]
    assert len(heard.steps) == 7


def test_only_the_process_that_writes_reports(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "writes", lambda: False)
    settings, heard = (
        settings_from_dict(settings_of(place, tmp_path, report_to="tensorboard")),
        Heard(),
    )
    with trackers.reporting(settings, heard) as progress:
        assert progress is heard


@pytest.mark.parametrize("tool", ["trackio", "wandb", "mlflow"])
def test_every_training_is_a_run_of_its_own_also_where_several_go_on_at_once(
    tool: str, begun: Path, told: Callable[[], Told]
) -> None:
    """In two sittings: the second goes on with the runs of the first."""
    with trackers._offline(trackers._place(begun)):
        for steps in ((1, 2), (3, 4)):
            sitting = trackers.Trackers(None, [tool], begun)
            for step in steps:
                for label, loss in (("a", 1.0), ("b", 2.0)):
                    sitting.step(label, point(step, loss), 4, 0.5 if step == 4 else None)
            sitting.close()
    for label, loss in (("a", 1.0), ("b", 2.0)):
        own = [one for one in told() if one[1] in (f"run/{label}", None)]
        logged = [
            (step, values["loss/task"], values.get("loss/dev"))
            for what, _, step, values in _of(own, "log")
        ]
        assert logged == [(1, loss, None), (2, loss, None), (3, loss, None), (4, loss, 0.5)]
        assert [one[2]["again"] for one in _of(own, "begin")] == [False, True]
        assert [what for what, *_ in own if what != "log"] == ["begin", "finish", "begin", "finish"]


def _of(said: Told, what: str) -> Told:
    return [one for one in said if one[0] == what]


@pytest.mark.parametrize("tool", ["trackio", "wandb", "mlflow"])
def test_a_run_reports_scores_and_files_and_sends_nothing_away(
    tool: str, finished: Path, place: Path, tmp_path: Path, told: Callable[[], Told]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "my run")
    shutil.rmtree(folder / store.TRACKERS)
    certificate = folder / "certificates" / "task" / "certificate.json"
    certificate.parent.mkdir(parents=True)
    certificate.write_text('{"sealed": true}')
    before = dict(os.environ)
    with trackers.reporting(settings_from_dict(settings_of(place, folder, report_to=tool)), None):
        pass
    assert dict(os.environ) == before
    ((_, name, facts),) = _of(told(), "begin")
    assert (name, facts["project"], facts["away"]) == ("my run/results", "fulcrum", False)
    assert tool == "trackio" or str(folder / store.TRACKERS) in unquote(facts["dir"])
    ((_, _, step, values),) = _of(told(), "log")
    assert (step, values) == (0, trackers.scores(run_report.load(folder)))
    files = {file: text for one in _of(told(), "files") for file, text in one[2].items()}
    names = ("config.yaml", "manifest.json", "certificates/task/certificate.json")
    assert files == {file: (folder / file).read_text() for file in names}
    assert told()[-1] == ["finish", "my run/results"]


@pytest.mark.parametrize(
    ("tool", "variable", "value"),
    [("wandb", "WANDB_MODE", "online"), ("mlflow", "MLFLOW_TRACKING_URI", "http://tracker")],
)
def test_the_environment_says_where_else(
    tool: str,
    variable: str,
    value: str,
    begun: Path,
    told: Callable[[], Told],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    with trackers._offline(trackers._place(begun)):
        away = trackers.Trackers(None, [tool], begun)
        away.step("a", point(1), 1, None)
        away.close()
    ((_, _, facts),) = _of(told(), "begin")
    assert facts["away"]
    assert tool == "wandb" or facts["dir"] is None  # files are the server's


def test_scores_are_over_seeds_at_the_size_that_is_compared() -> None:
    def arm(seed: int, value: float, size: int = 8) -> dict[str, Any]:
        score = {
            "metric": "exact_match",
            "value": value,
            "low": 0.0,
            "high": 1.0,
            "n": 10,
            "higher_is_better": True,
        }
        return {"arm": "tell", "size": size, "seed": seed, "scores": {"task": [score]}}

    results = {
        "size": 8,
        "tasks": [{"name": "task"}],
        "arms": [arm(0, 0.2), arm(1, 0.4), arm(0, 0.9, size=4)],
    }
    found = trackers.scores(results)
    assert found["task/tell/exact_match"] == pytest.approx(0.3)
    assert found["task/tell/exact_match seeds"] == 2
    assert found["task/tell/exact_match n"] == 10
    interval = summary.seed_interval([0.2, 0.4])
    assert found["task/tell/exact_match low"] == pytest.approx(interval.low)
    one = trackers.scores(
        {
            **results,
            "arms": [
                {
                    **arm(0, 0.2),
                    "scores": {"task": [{**arm(0, 0.2)["scores"]["task"][0], "low": None}]},
                }
            ],
        }
    )
    assert "task/tell/exact_match low" not in one
