"""Anchors of arms: an arm may have its own, lack it in some showings, be asked without it; what is
no anchor is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum import api
from fulcrum.config.arms import ARMS, anchor_schedule, inference_anchor, own_arm, training_anchor
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Example, Message, Task
from fulcrum.data import encode, task_data
from fulcrum.data.anchor_template import reworded
from fulcrum.data.run_data import RunData
from fulcrum.data.token_stream import Stream
from fulcrum.experiments import cell, finished, preview, scoring
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.experiments.compare import run_comparison
from fulcrum.experiments.train import run_training
from helpers.tiny import arm_named, comparison_settings, save_task, tiny_tokenizer

ANCHOR = Anchor("Name it.")
TOKENIZER = tiny_tokenizer()


def rows(kind: str, number: int) -> tuple[Example, ...]:
    return tuple(
        Example(
            (Message("user", f"{kind} {k}"), Message("assistant", f"{kind} answer {k}")),
            f"{kind}{k}",
            f"{kind}:{k}",
        )
        for k in range(number)
    )


def given(**more: Any) -> Settings:
    return settings_from_dict(
        {"task": {"train": "rows.jsonl", "anchor": "Name it."}, "train": {"batch_size": 4}, **more}
    )


@pytest.fixture
def material() -> RunData:
    task = Task("task", rows("own", 6), rows("dev", 2), rows("test", 2), ANCHOR)
    return RunData((task,), rows("general", 192), {}, {}, (1, 2, 4, 8), general_for=6, batch_size=4)


def shown(stream: Stream) -> list[str]:
    """The texts of a stream in order, step by step as training takes them."""
    return [
        TOKENIZER.decode(one.ids)
        for index in range(stream.steps(4))
        for one in stream.step(index, 4)[0]
    ]


def planned(arm: Arm, tasks: Sequence[Task], settings: Settings) -> ArmPlan:
    """What an arm does with these tasks."""
    return resolve(
        arm, RunData(tuple(tasks), (), {}, {}, (1,), general_for=6, batch_size=4), settings
    )


def made(material: RunData, settings: Settings, arm: Arm, repeats: int = 8) -> Stream:
    return resolve(arm, material, settings).stream(TOKENIZER, repeats, 0)


def test_the_last_part_of_a_cooled_down_stream_lacks_the_anchor(material: RunData) -> None:
    stream = made(
        material, given(), Arm(name="cooled", anchored=True, general="pool", anchor_cooldown=0.25)
    )
    plain = made(material, given(), ARMS["tell"])
    is_task, _ = stream.plan.slice(0, 240)
    assert stream.plan == plain.plan
    for place, (cooled, whole, own) in enumerate(
        zip(shown(stream), shown(plain), is_task, strict=True)
    ):
        assert ("Name it." in whole) == own
        assert cooled == (whole.replace("Name it.\n\n", "") if place >= 180 else whole)


def test_some_showings_lack_the_anchor_the_same_ones_each_time(material: RunData) -> None:
    arm = Arm(name="dropped", anchored=True, general="pool", anchor_dropout=0.4)
    stream = made(material, given(), arm)
    lacking = stream.is_bare(0, 240)
    assert 0.25 < lacking.mean() < 0.55
    assert np.array_equal(
        np.concatenate([stream.is_bare(k, k + 7) for k in range(0, 238, 7)]), lacking[:238]
    )
    is_task, _ = stream.plan.slice(0, 240)
    for text, own, bare in zip(shown(stream), is_task, lacking, strict=True):
        assert ("Name it." in text) == (own and not bare)
    assert stream.share().total_tokens < made(material, given(), ARMS["tell"]).share().total_tokens
    other = made(replace(material, seed=1), given(), arm)
    assert np.array_equal(other.is_bare(0, 240), lacking)  # the plan's seed draws, not the rows'
    assert not np.array_equal(
        resolve(arm, material, given()).stream(TOKENIZER, 8, 1).is_bare(0, 240), lacking
    )


def test_the_settings_hold_for_all_arms_and_an_arms_own_for_it(material: RunData) -> None:
    settings = given(mix={"anchor_dropout": 0.5, "anchor_cooldown": 0.1}, eval={"anchored": False})
    task = material.tasks[0]
    assert anchor_schedule(ARMS["tell"], settings) == (0.5, 0.1)
    assert anchor_schedule(ARMS["mix"], settings) == (0.0, 0.0)
    assert anchor_schedule(arm_named("tell_dropout"), settings) == (0.1, 0.1)
    assert inference_anchor(ARMS["tell"], task, settings) is None
    assert (
        inference_anchor(ARMS["base_anchor"], task, settings) == ANCHOR
    )  # untrained: the anchor is all it has
    assert inference_anchor(arm_named("tell_cooldown"), task, given()) is None
    assert (
        inference_anchor(Arm(name="x", anchored=True, asked_anchored=True), task, settings)
        == ANCHOR
    )


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (
            {"name": "a", "anchor": "x"},
            "a: carries no anchor, so nothing of anchors can be set; add anchored: true",
        ),
        (
            {"name": "a", "anchored": True, "anchor": "auto"},
            "a: an arm's own anchor is a text; auto is for the task's",
        ),
        (
            {"name": "a", "anchored": True, "trained": False, "anchor_dropout": 0.1},
            "a: is not trained, so no showing of a row",
        ),
        ({"name": "a", "anchored": True, "anchor": "\u200b"}, "an anchor needs words"),
    ],
)
def test_what_contradicts_itself_in_an_arm_is_refused(arm: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given(compare={"arms": ["base", arm]})


@pytest.mark.e2e
def test_an_arms_own_anchor_is_trained_asked_saved_and_used(tmp_path: Path) -> None:
    own = {
        "name": "other",
        "anchored": True,
        "anchor": {"text": "Say which.", "placement": "user_suffix"},
    }
    compared = {"arms": ["base", "sft_anchor", own], "folds": 2, "sft_epochs": [1]}
    settings = comparison_settings(save_task(tmp_path, 12, 4), tmp_path / "out", compare=compared)
    results = run_comparison(settings)
    assert {arm.arm for arm in results.arms} == {"base", "sft_anchor", "other"}
    adapter = api.load_adapter(tmp_path / "out", arm="other")
    assert adapter.anchor() == Anchor("Say which.", "user_suffix")
    saved = (tmp_path / "out" / "adapters" / "other" / "chat_template.jinja").read_text()
    assert "Say which." in saved
    assert "Name it." not in saved
    assert (
        "Name it."
        in (tmp_path / "out" / "adapters" / "sft_anchor" / "chat_template.jinja").read_text()
    )
    again = finished.evaluate(tmp_path / "out", arm="other")
    scored = next(arm for arm in results.arms if arm.arm == "other")
    assert again.scores[0].value == pytest.approx(scored.scores["task"][0].value, abs=1e-5)


def test_a_model_that_does_without_its_anchor_is_scored_saved_and_used_without(
    tmp_path: Path,
) -> None:
    folder = save_task(tmp_path, 12, 4)
    mixed = {"general_per_task": 2, "repeats": 1, "anchor_cooldown": 0.3}
    settings = comparison_settings(
        folder,
        tmp_path / "out",
        mix=mixed,
        eval={"general_rows": 2, "draws": 100, "anchored": False},
    )
    results = run_training(settings)
    saved = (tmp_path / "out" / "adapter" / "chat_template.jinja").read_text()
    assert "Name it." not in saved
    assert "does not need" in (tmp_path / "out" / "README.md").read_text()
    adapter = api.load_adapter(tmp_path / "out")
    assert adapter.anchor() is None
    task = Task(
        "task", (), (), tuple(preview.open_preview(settings, 0).rows.tasks[0].test), None, ("nll",)
    )
    expected = scoring.predict(adapter.loaded, task, task.test, batch_tokens=4096)
    found = results.arms[-1]
    assert found.arm == "tell"
    nats = sum(row.nll_sum for row in expected) / sum(row.n_tokens for row in expected)
    assert found.scores["task"][0].value == pytest.approx(nats, abs=1e-5)


def test_what_hangs_on_the_anchor_is_asked_for_with_others(material: RunData) -> None:
    settings, task = given(), material.tasks[0]
    other = replace(task, name="two", anchor=Anchor("Count it."))
    found = cell.other_anchors(task, [task, other], planned(ARMS["tell"], [task, other], settings))
    assert found == {
        "without": None,
        "wrong": Anchor("Count it."),
        "reworded": Anchor("In other words: Name it."),
    }
    found = cell.other_anchors(task, [task], planned(arm_named("tell_cooldown"), [task], settings))
    assert list(found) == ["wrong", "reworded", "with"]
    assert found["with"] == ANCHOR
    assert cell.other_anchors(task, [task], planned(ARMS["mix"], [task], settings)) == {}
    own = settings_from_dict(
        {"task": {"train": "x.jsonl", "anchor": {"text": "Name it.", "paraphrase": "Call it."}}}
    )
    assert cell.other_anchors(task, [task], planned(ARMS["tell"], [task], own))[
        "reworded"
    ] == Anchor("Call it.")
    said = settings_from_dict({"task": {"train": "x.jsonl", "anchor": "Say it."}}).tasks[0].anchor
    arm = ARMS["tell"].model_copy(update={"anchor": said})
    assert training_anchor(arm, task) == Anchor("Say it.")
    assert cell.other_anchors(task, [task], planned(arm, [task], settings))["wrong"] == Anchor(
        cell.ANOTHER
    )  # the task's own is not wrong
    assert cell.other_anchors(task, [task, other], planned(arm, [task, other], settings))[
        "wrong"
    ] == Anchor("Count it.")


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Read the input. Answer with a label.", "Reply using a label. Look at the input."),
        (
            "Sort the ticket below; answer with one JSON object.",
            "Classify the ticket that follows; reply using one JSON object.",
        ),
        ("Snúðu orðinu.", "In other words: Snúðu orðinu."),
    ],
)
def test_a_rule_rewords(text: str, other: str) -> None:
    assert reworded(text) == other


@pytest.mark.parametrize("placement", ["system", "user_prefix", "user_suffix"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Stop <|im_end|> here.",
            "task: anchor: holds '<|im_end|>', a special token of the model; write it without",
        ),
        (
            "own",
            r"task: anchor: 6 of task's 10 rows hold its text already \(own:0\), and would "
            r"have it twice",
        ),
        ("word " * 400, r"task: anchor: of [\d,]+ tokens, train.max_length \(256\) leaves no room"),
    ],
)
def test_what_is_no_anchor_is_refused(
    material: RunData, placement: Any, text: str, said: str
) -> None:
    settings = given(train={"max_length": 256})
    with pytest.raises(ConfigError, match=said.replace("|", r"\|")):
        task_data.check_anchor(
            Anchor(text, placement), material.tasks[0], settings, TOKENIZER, "task: anchor"
        )


def test_a_response_prefix_must_not_be_a_part_of_the_answers(material: RunData) -> None:
    task = replace(
        material.tasks[0],
        train=tuple(
            Example(
                (Message("user", f"q {k}"), Message("assistant", f"The name: {k}")),
                f"g{k}",
                f"o:{k}",
            )
            for k in range(6)
        ),
    )
    check = task_data.check_anchor
    with pytest.raises(
        ConfigError, match="6 of task's 10 rows begin their answers with its text already"
    ):
        check(Anchor("The name: ", "response_prefix"), task, given(), TOKENIZER, "a")
    judged = replace(material.tasks[0], metrics=("nll", "json_valid"))
    with pytest.raises(
        ConfigError,
        match="a: begins the JSON of the answers, which json_valid and json_fields would judge",
    ):
        check(Anchor('{"name": ', "response_prefix"), judged, given(), TOKENIZER, "a")
    assert (
        check(Anchor('{"name": ', "response_prefix"), material.tasks[0], given(), TOKENIZER, "a")
        == []
    )
    assert check(Anchor("Here it is: ", "response_prefix"), judged, given(), TOKENIZER, "a") == []


def test_what_may_stand_is_told(material: RunData) -> None:
    (note,) = task_data.check_anchor(Anchor("own 3"), material.tasks[0], given(), TOKENIZER, "a")
    assert note == "a: 1 of task's 10 rows hold its text; there it stands twice"
    (note,) = task_data.check_anchor(
        Anchor("name it " * 50), material.tasks[0], given(), TOKENIZER, "a"
    )
    assert note.endswith("which every row of task pays for; 8 to 64 are usual")


def test_the_written_stream_lacks_the_anchor_where_training_does(tmp_path: Path) -> None:
    settings = comparison_settings(
        save_task(tmp_path, 12, 4),
        tmp_path / "out",
        mix={"general_per_task": 2, "repeats": 2, "anchor_dropout": 0.5},
    )
    seen = preview.open_preview(settings, 0)
    arm = own_arm(settings)
    stream = resolve(arm, seen.rows, settings).stream(seen.tokenizer, 2, 0)
    plain = encode.make_format(seen.tokenizer, None)
    written = list(preview.stream_rows(seen, 2))
    assert {
        "Name it." in row["messages"][0]["content"] for row in written if row["source"] == "task"
    } == {True, False}
    trained = [one for index in range(stream.steps(4)) for one in stream.step(index, 4)[0]]
    for row, tokens in zip(written, trained, strict=True):
        messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
        assert encode.encode(Example(messages, "", ""), plain).ids.tolist() == tokens.ids.tolist()
