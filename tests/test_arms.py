"""Arms are values: what each one's stream holds, and that none may use more steps than TELL."""

from collections import Counter

import pytest

from fulcrum import arms, config, encode
from fulcrum.material import Material
from fulcrum.records import Anchor, Example, Message, Setting, Task
from tiny import tiny_tokenizer

ANCHOR = Anchor("Name it.")


def rows(kind: str, number: int) -> tuple[Example, ...]:
    return tuple(
        Example((Message("user", f"{kind} {k}"), Message("assistant", f"{kind} answer {k}")), f"{kind}{k}", f"{kind}:{k}")
        for k in range(number)
    )


@pytest.fixture
def given() -> config.Settings:
    data = {"task": {"train": "rows.jsonl", "anchor": "Name it."}, "mix": {"general_per_task": 4}, "train": {"batch_size": 4}}
    return config.from_dict(data)


@pytest.fixture
def material() -> Material:
    """Six task rows and what TELL's eight repeats of them need: 60 steps of 4."""
    task = Task("task", rows("own", 6), rows("dev", 2), rows("test", 2), ANCHOR)
    return Material((task,), rows("general", 192), {}, {}, (1, 2, 4, 8), general_for=6, batch_size=4)


def texts(stream: arms.Stream) -> tuple[list[str], list[str]]:
    """What is trained on at the stream's task positions and at its general ones, in order."""
    is_task, ids = stream.plan.slice(0, len(stream.plan))
    decode = tiny_tokenizer().decode
    own = [decode(stream.task[k].ids) for k in ids[is_task]]
    return own, [decode(stream.general[k].ids) for k in ids[~is_task]]


def made(material: Material, given: config.Settings, name: str, repeats: int = 2) -> arms.Stream:
    return arms.stream(material, tiny_tokenizer(), arms.ARMS[name], given, repeats, 0)


@pytest.mark.parametrize("name", ["general_then_task", "task_then_general"])
def test_one_after_the_other_has_tells_rows_and_steps(material: Material, given: config.Settings, name: str) -> None:
    tell, other = made(material, given, "tell"), made(material, given, name)
    assert [Counter(part) for part in texts(other)] == [Counter(part) for part in texts(tell)]
    assert other.steps(4) == tell.steps(4) == 15
    is_task, _ = other.plan.slice(0, 60)
    first = name == "task_then_general"
    assert is_task[:12].all() == first
    assert is_task[-12:].all() != first
    assert arms.trials(material, arms.ARMS[name], given) == arms.trials(material, arms.ARMS["tell"], given)


def test_replay_is_a_tenth_of_the_stream_and_tunes_its_epochs_within_tells_steps(
    material: Material, given: config.Settings
) -> None:
    tried = arms.trials(material, arms.ARMS["replay_10"], given)
    epochs = (1, 3, 11, 36)  # 60 steps of 4 hold 36 epochs of 6 rows and a ninth of general ones
    assert tried == tuple(Setting(repeats) for repeats in epochs)
    for repeats in epochs:
        stream = made(material, given, "replay_10", repeats)
        assert stream.plan.task_share == pytest.approx(0.9, abs=0.1 if repeats == 1 else 0.02)
        assert stream.steps(4) <= material.step_cap


def test_the_placebo_has_tells_prompts_and_answers_none_with_its_own(material: Material, given: config.Settings) -> None:
    permuted = arms._permuted(material.general, 7)
    assert [row.prompt for row in permuted] == [row.prompt for row in material.general]
    assert Counter(row.answer for row in permuted) == Counter(row.answer for row in material.general)
    assert all(a.answer != b.answer for a, b in zip(permuted, material.general, strict=True))
    assert arms._permuted(material.general, 7) == permuted != arms._permuted(material.general, 8)
    (own, placebo), (tells, _) = texts(made(material, given, "placebo_permuted")), texts(made(material, given, "tell"))
    assert own == tells  # the same task rows at the same places
    plain = encode.make_format(tiny_tokenizer(), None)
    whole = {tiny_tokenizer().decode(encode.encode(row, plain).ids) for row in material.general}
    assert len(placebo) == 48
    assert whole.isdisjoint(placebo)


def test_tokens_are_planned_as_they_are_trained(material: Material, given: config.Settings) -> None:
    for name in ("tell", "placebo_permuted", "replay_10", "sft"):
        arm = arms.ARMS[name]
        planned = arms.planned_tokens(material, tiny_tokenizer(), [arm], given)
        streams = [made(material, given, name, setting.repeats) for setting in arms.trials(material, arm, given)]
        anchors = sum(stream.plan.task_positions for stream in streams) * len(tiny_tokenizer()("Name it.\n\n")["input_ids"])
        trained = sum(stream.share().total_tokens for stream in streams) - anchors * arm.anchored
        assert planned == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize(
    ("anchor", "general", "name"),
    [("Name it.", 4, "tell"), ("none", 4, "mix"), ("Name it.", 0, "sft_anchor"), ("none", 0, "sft")],
)
def test_a_single_run_is_the_arm_that_its_settings_describe(anchor: str, general: float, name: str) -> None:
    data = {"task": {"train": "rows.jsonl", "anchor": anchor}, "mix": {"general_per_task": general}}
    assert arms.own_arm(config.from_dict(data)).name == name
