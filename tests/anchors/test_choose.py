"""`anchor: auto`: proposed, scored and chosen from training rows alone, kept, read back, and shown;
and the commands for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fulcrum import api
from fulcrum.anchors import choose
from fulcrum.anchors import score as scoring
from fulcrum.config.settings import Settings, dump_settings, load_settings, settings_from_dict
from fulcrum.core.errors import ConfigError, DataError, StoreError
from fulcrum.core.progress import Silent
from fulcrum.experiments.compare import run_comparison
from fulcrum.experiments.train import run_training
from fulcrum.report import anchor_validity
from helpers import answering
from helpers.answering import Asked
from helpers.commands import done, refused
from helpers.tiny import comparison_settings, save_task, write_rows

AUTO = {
    "text": "auto",
    "placement": "user_suffix",
    "candidates": ["Say red, green or blue, whichever it is, and nothing else."],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


def settings_of(folder: Path, anchor: Any = AUTO, **more: Any) -> Settings:
    place = folder if (folder / "train.jsonl").exists() else save_task(folder, 32, 4)
    task = {
        "train": str(place / "train.jsonl"),
        "test": str(place / "test.jsonl"),
        "anchor": anchor,
        "metrics": ["nll"],
        "max_new_tokens": 4,
    }
    return comparison_settings(place, place / "out", task=task, **more)


@pytest.mark.e2e
def test_a_run_chooses_keeps_says_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run_training(settings_of(tmp_path))
    (known,) = json.loads((tmp_path / "out" / "anchors.json").read_text())
    own = [score for score in known["scores"] if not score["source"].startswith("control")]
    (chosen,) = [score for score in own if score["chosen"]]
    assert round(chosen["loss"], 2) == min(round(score["loss"], 2) for score in own)
    assert {score["placement"] for score in own} == {"user_suffix"}
    assert AUTO["candidates"][0] in {score["text"] for score in own if score["source"] == "given"}
    assert sum(score["source"] == "template" for score in own) == 6
    assert sorted(score["source"] for score in known["scores"] if score not in own) == [
        "control: another task's",
        "control: none",
        "control: random tokens",
    ]
    assert (
        known["rows"] == 26 - 6
    )  # a fifth of 32 rows are dev rows; a quarter of the rest was shown
    assert results.notes[0].startswith(f"task: of {len(own)} anchors {chosen['text']!r}")
    kept = load_settings(tmp_path / "out" / "config.yaml").tasks[0].anchor
    assert kept is not None
    assert (kept.text, kept.placement, kept.candidates) == (chosen["text"], "user_suffix", ())
    assert api.load_adapter(tmp_path / "out").anchor().text == chosen["text"]
    page = api.write_report(tmp_path / "out").read_text()
    assert '<h2 id="anchors">Anchors</h2>' in page
    assert page.count("<strong>(chosen)</strong>") == 1
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("scored again"))
    run_training(settings_of(tmp_path), resume=True)
    other = {**AUTO, "candidates": ["Name a colour, as you would name a friend."]}
    with pytest.raises(
        StoreError, match="cannot resume, the candidates of task's anchor changed since it started"
    ):
        run_training(settings_of(tmp_path, other), resume=True)
    (tmp_path / "out" / "anchors.json").write_text(
        "[]"
    )  # taken away: nothing is chosen anew in silence
    with pytest.raises(StoreError, match="cannot resume"):
        run_training(settings_of(tmp_path), resume=True)


@pytest.mark.e2e
def test_a_comparison_chooses_by_its_smallest_size_and_sees_no_test_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    score = scoring.score

    def spied(*given: Any, **more: Any) -> Any:
        seen.append([row.origin for row in given[1]])
        return score(*given, **more)

    monkeypatch.setattr(scoring, "score", spied)
    one = {
        "name": "one",
        "anchored": True,
        "general": "pool",
        "anchor": "Is it red or blue or green?",
    }
    compared = {
        "arms": ["base", "tell", one],
        "sizes": [16],
        "sizes_of": {"tell": [12, 16]},
        "folds": 2,
    }
    settings = settings_of(tmp_path, compare=compared)
    results = run_comparison(settings)
    (rows,) = seen
    assert len(rows) == 9  # of twelve, three were shown to whoever proposes
    assert not {
        row.origin for arm in results.arms for row in arm.predictions.get("task", ())
    } & set(rows)
    assert all("train.jsonl" in origin for origin in rows)
    (known,) = json.loads((tmp_path / "out" / "anchors.json").read_text())
    assert "given: arm one" in {score["source"] for score in known["scores"]}
    (group,) = anchor_validity.read_groups(tmp_path / "out")
    assert [one.arm for one in group.anchors] == ["tell", "one"]
    text = done("anchor", "outcome", tmp_path / "out")
    assert (
        "Selection unproven: 2 trained anchors, and 4 of one task are needed to rank them." in text
    )
    assert "Selection unproven" in (tmp_path / "out" / "report.html").read_text()


def test_arms_with_anchors_of_their_own_are_scored_without_auto(tmp_path: Path) -> None:
    one = {"name": "one", "anchored": True, "anchor": "Is it red or blue or green?"}
    settings = settings_of(
        tmp_path, "Name it.", compare={"arms": ["base", one], "sizes": [16], "folds": 2}
    )
    resolved, (found,) = choose.resolve(settings, compared=True, progress=Silent())
    assert resolved == settings  # nothing was to be chosen
    assert [score.source for score in found.scores if not score.is_control] == [
        "given",
        "given: arm one",
    ] or [score.source for score in found.scores if not score.is_control] == [
        "given: arm one",
        "given",
    ]
    assert not any(score.chosen for score in found.scores)


def test_scores_that_choose_nothing_stop_no_comparison_of_few_rows(tmp_path: Path) -> None:
    one = {"name": "one", "anchored": True, "anchor": "Is it red or blue or green?"}
    said: list[str] = []

    class Told(Silent):
        def stage(self, text: str) -> None:
            said.append(text)

    settings = settings_of(
        tmp_path, "Name it.", compare={"arms": ["base", one], "sizes": [8], "folds": 2}
    )
    run_comparison(settings, progress=Told())
    assert "task: its anchors are not scored, which takes 8 training rows and an anchor" in said
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert not (tmp_path / "out" / "anchors.json").exists()


@pytest.mark.e2e
def test_where_nothing_is_proposed_the_reasons_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose.propose, "fault", lambda *_, **__: "garbled")
    with pytest.raises(
        DataError,
        match=r"task: no anchor to score; proposals were none, by reason: 8 × template: garbled, ",
    ):
        run_training(settings_of(tmp_path, "auto"))


def test_too_few_rows_and_rows_that_are_others_test_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="anchors are scored on training rows that none was made from; 6 of 8 are left",
    ):
        run_comparison(
            settings_of(tmp_path, compare={"arms": ["base", "tell"], "sizes": [8], "folds": 2})
        )
    task = {"train": str(tmp_path / "train.jsonl"), "anchor": "auto", "metrics": ["nll"]}
    compared = {"arms": ["base", "tell"], "seeds": [0, 1], "folds": 2}
    with pytest.raises(
        ConfigError,
        match=r"task\.anchor: auto: without a test file the first seed's task rows are the other",
    ):
        run_comparison(
            comparison_settings(tmp_path, tmp_path / "other", task=task, compare=compared)
        )


def test_candidates_are_for_auto() -> None:
    with pytest.raises(ConfigError, match="candidates are for `text: auto`"):
        settings_from_dict(
            {
                "task": {
                    "train": "x.jsonl",
                    "anchor": {"text": "Name it.", "candidates": ["Say it."]},
                }
            }
        )
    given = settings_from_dict(
        {
            "task": {
                "train": "x.jsonl",
                "anchor": {"text": "auto", "candidates": "Say it, then stop."},
            }
        }
    )
    assert given.tasks[0].anchor is not None
    assert given.tasks[0].anchor.candidates == (
        "Say it, then stop.",
    )  # a sentence with a comma is one
    assert given.tasks[0].anchor_value() is None


def yaml_of(folder: Path, **task: Any) -> Path:
    given = settings_of(folder, task.pop("anchor", "Name it."))
    (folder / "run.yaml").write_text(dump_settings(given))
    return folder / "run.yaml"


def test_propose_and_score_on_the_command_line(tmp_path: Path) -> None:
    file, out = yaml_of(tmp_path), tmp_path / "anchors.jsonl"
    text = done(
        "anchor",
        "propose",
        file,
        "--out",
        out,
        "-n",
        3,
        "--by",
        "template",
        "--placement",
        "system",
        "--placement",
        "response_prefix",
        "--text",
        "Say which colour the animal has.",
    )
    assert f"next: fulcrum anchor score {file} {out}" in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["placement"] for row in rows] == [
        "system",
        "response_prefix",
        *["system"] * 3,
        *["response_prefix"] * 3,
    ]
    assert [row["source"] for row in rows] == ["given", "given", *["template"] * 6]
    assert rows[0].keys() == {"text", "placement", "source", "tokens"}
    text = done("anchor", "score", file, out, "--out", tmp_path / "scores.json")
    assert "Name it." in text  # the task's own stands among them
    assert "control: random tokens" in text
    assert "is chosen, by its loss before training" in text
    (known,) = json.loads((tmp_path / "scores.json").read_text())
    assert len(known["scores"]) == 8 + 1 + 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "oracle"], "'oracle' is not known here; known: template, model, endpoint"),
        (["--placement", "middle"], "'middle' is not known here; known: system"),
        (["--by", "endpoint"], "--by endpoint needs --endpoint, its address"),
        (["--task", "nothing", "--by", "template"], "--task nothing: no such task; known: task"),
    ],
)
def test_a_wrong_proposal_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in refused(
        "anchor", "propose", yaml_of(tmp_path), "--out", tmp_path / "a.jsonl", *words
    )
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "a.jsonl:1: no anchor: '{'"),
        ('{"words": "x"}', "a.jsonl:1: no anchor"),
        ('{"text": "x", "placement": "middle"}', "a.jsonl:1: placement 'middle'"),
        ('{"text": " "}', "or text ' ' is none"),
        ("", "holds no anchor"),
    ],
)
def test_a_file_that_holds_no_anchors_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert said in refused("anchor", "score", yaml_of(tmp_path), tmp_path / "a.jsonl")


def test_what_a_run_has_to_settle_cannot_be_written_before(tmp_path: Path) -> None:
    file = yaml_of(tmp_path, anchor="auto")
    assert "task.anchor is auto, which a run settles" in refused(
        "mix", file, "--out", tmp_path / "stream.jsonl"
    )
    assert "anchor: auto is chosen by a run; the rows here have none" in done("check", file)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, Asked]]:
    texts = [
        "Name the colour that this animal has today.",
        "- Name the colour that this animal has today.",
        "I'm sorry, but I cannot do that for you today.",
        "Tell which of three colours goes with the animal.",
    ]
    said = iter(texts * 9)
    with answering.endpoint(lambda *_: (200, next(said))) as (url, asked):
        yield url, asked


def test_an_endpoint_proposes(tmp_path: Path, endpoint: tuple[str, Asked]) -> None:
    url, asked = endpoint
    out = tmp_path / "a.jsonl"
    options = ["--by", "endpoint", "--endpoint", url, "--endpoint-model", "m", "-n", 2]
    text = done("anchor", "propose", yaml_of(tmp_path), "--out", out, *options)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [
        "Name the colour that this animal has today.",
        "Tell which of three colours goes with the animal.",
    ]
    assert "1 × endpoint: proposed twice" in text
    assert "1 × endpoint: refusal" in text
    questions = [each["messages"][0]["content"] for each in asked]
    train = [
        json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    test = [
        json.loads(line)["prompt"] for line in (tmp_path / "test.jsonl").read_text().splitlines()
    ]
    assert all(any(f"Input: {prompt}\n" in question for prompt in train) for question in questions)
    assert not any(f"Input: {prompt}\n" in question for prompt in test for question in questions)


def test_answers_that_all_begin_with_the_prefix_are_refused_before_anything_is_scored(
    tmp_path: Path,
) -> None:
    place = save_task(tmp_path, 32, 4)
    write_rows(place / "train.jsonl", ((f"q {k}", f"The answer: {k}") for k in range(32)))
    task = {
        "train": str(place / "train.jsonl"),
        "test": str(place / "test.jsonl"),
        "metrics": ["nll"],
        "anchor": {"text": "The answer: ", "placement": "response_prefix"},
    }
    with pytest.raises(ConfigError, match="begin their answers with its text already"):
        run_training(comparison_settings(place, place / "out", task=task))
    assert not (place / "out").exists()
