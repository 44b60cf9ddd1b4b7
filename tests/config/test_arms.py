"""Arms are values: what each one's stream holds, and that none may use more steps than TELL."""

from collections import Counter
from dataclasses import replace

import pytest

from fulcrum.config.arms import ARMS, by_use, own_arm
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Example, Hyperparameters, Message, Task
from fulcrum.data import encode
from fulcrum.data.run_data import RunData
from fulcrum.data.token_stream import Stream
from fulcrum.experiments import arm_data
from fulcrum.experiments.arm_data import planned_tokens, resolve
from helpers.tiny import arm_named, tiny_tokenizer

ANCHOR = Anchor("Name it.")


def rows(kind: str, number: int) -> tuple[Example, ...]:
    return tuple(
        Example(
            (Message("user", f"{kind} {k}"), Message("assistant", f"{kind} answer {k}")),
            f"{kind}{k}",
            f"{kind}:{k}",
        )
        for k in range(number)
    )


@pytest.fixture
def given() -> Settings:
    data = {
        "task": {"train": "rows.jsonl", "anchor": "Name it."},
        "mix": {"general_per_task": 4},
        "train": {"batch_size": 4},
    }
    return settings_from_dict(data)


@pytest.fixture
def material() -> RunData:
    """Six task rows and what TELL's eight repeats of them need: 60 steps of 4."""
    task = Task("task", rows("own", 6), rows("dev", 2), rows("test", 2), ANCHOR)
    return RunData((task,), rows("general", 192), {}, {}, (1, 2, 4, 8), general_for=6, batch_size=4)


def test_what_is_known_of_built_in_arms_is_whole_and_stays_out_of_files() -> None:
    """Every reference has its advice, ranks are no two arms', and a run folder holds what a user
    may set only."""
    known = ARMS.values()
    assert {arm.name for arm in known if arm.advice} == {
        arm.name for arm in known if arm.is_reference
    }
    assert by_use()[:4] == ["tell", "mix", "sft_anchor", "sft"]
    ranks = [arm.use_rank for arm in known if arm.use_rank is not None]
    assert sorted(ranks) == list(range(len(ranks)))
    for arm in known:
        assert Arm(**arm.model_dump()).model_dump() == arm.model_dump()


def texts(stream: Stream) -> tuple[list[str], list[str]]:
    """What is trained on at the stream's task positions and at its general ones, in order."""
    is_task, ids = stream.plan.slice(0, len(stream.plan))
    decode = tiny_tokenizer().decode
    own = [decode(stream.task[k].ids) for k in ids[is_task]]
    return own, [decode(stream.general[k].ids) for k in ids[~is_task]]


def made(material: RunData, given: Settings, name: str, repeats: int = 2) -> Stream:
    return resolve(arm_named(name), material, given).stream(tiny_tokenizer(), repeats, 0)


@pytest.mark.parametrize("name", ["general_then_task", "task_then_general"])
def test_one_after_the_other_has_tells_rows_and_steps(
    material: RunData, given: Settings, name: str
) -> None:
    tell, other = made(material, given, "tell"), made(material, given, name)
    assert [Counter(part) for part in texts(other)] == [Counter(part) for part in texts(tell)]
    assert other.steps(4) == tell.steps(4) == 15
    is_task, _ = other.plan.slice(0, 60)
    first = name == "task_then_general"
    assert is_task[:12].all() == first
    assert is_task[-12:].all() != first
    assert (
        resolve(arm_named(name), material, given).trials
        == resolve(ARMS["tell"], material, given).trials
    )


def test_replay_is_a_tenth_of_the_stream_and_tunes_its_epochs_within_tells_steps(
    material: RunData, given: Settings
) -> None:
    tried = resolve(arm_named("replay_10"), material, given).trials
    epochs = (1, 3, 11, 36)  # 60 steps of 4 hold 36 epochs of 6 rows and a ninth of general ones
    assert tried == tuple(Hyperparameters(repeats) for repeats in epochs)
    for repeats in epochs:
        stream = made(material, given, "replay_10", repeats)
        assert stream.plan.task_share == pytest.approx(0.9, abs=0.1 if repeats == 1 else 0.02)
        assert stream.steps(4) <= material.step_cap


def test_the_placebo_has_tells_prompts_and_answers_none_with_its_own(
    material: RunData, given: Settings
) -> None:
    permuted = arm_data._permuted(material.general, 7)
    assert [row.prompt for row in permuted] == [row.prompt for row in material.general]
    assert Counter(row.answer for row in permuted) == Counter(
        row.answer for row in material.general
    )
    assert all(a.answer != b.answer for a, b in zip(permuted, material.general, strict=True))
    assert (
        arm_data._permuted(material.general, 7)
        == permuted
        != arm_data._permuted(material.general, 8)
    )
    (own, placebo), (tells, _) = (
        texts(made(material, given, "placebo_permuted")),
        texts(made(material, given, "tell")),
    )
    assert own == tells  # the same task rows at the same places
    plain = encode.make_format(tiny_tokenizer(), None)
    whole = {tiny_tokenizer().decode(encode.encode(row, plain).ids) for row in material.general}
    assert len(placebo) == 48
    assert whole.isdisjoint(placebo)


def test_tokens_are_planned_as_they_are_trained(material: RunData, given: Settings) -> None:
    for name in ("tell", "placebo_permuted", "replay_10", "sft"):
        planned = planned_tokens(resolve(arm_named(name), material, given), tiny_tokenizer())
        streams = [
            made(material, given, name, setting.repeats)
            for setting in resolve(arm_named(name), material, given).trials
        ]
        anchors = sum(stream.plan.task_positions for stream in streams) * len(
            tiny_tokenizer()("Name it.\n\n")["input_ids"]
        )
        trained = (
            sum(stream.share().total_tokens for stream in streams)
            - anchors * arm_named(name).anchored
        )
        assert planned == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize(
    ("anchor", "general", "name"),
    [
        ("Name it.", 4, "tell"),
        ("none", 4, "mix"),
        ("Name it.", 0, "sft_anchor"),
        ("none", 0, "sft"),
    ],
)
def test_a_single_run_is_the_arm_that_its_settings_describe(
    anchor: str, general: float, name: str
) -> None:
    data = {"task": {"train": "rows.jsonl", "anchor": anchor}, "mix": {"general_per_task": general}}
    assert own_arm(settings_from_dict(data)).name == name


def test_what_else_is_tuned_takes_the_place_of_epochs(material: RunData, given: Settings) -> None:
    """TELL tries four numbers of repeats; an arm with a second setting has two numbers of epochs
    and two of that."""
    tried = {
        name: resolve(ARMS[name], material, given).trials
        for name in ("tell", "sft", "sft_kl", "soup")
    }
    assert tried["tell"] == tuple(map(Hyperparameters, (1, 2, 4, 8)))
    assert tried["sft"] == tuple(
        map(Hyperparameters, (1, 3, 12, 40))
    )  # 60 steps of 4 hold 40 epochs of 6 rows
    assert tried["sft_kl"] == tuple(
        Hyperparameters(epochs, kl=kl) for epochs in (6, 40) for kl in (0.1, 1.0)
    )
    assert tried["soup"] == tuple(
        Hyperparameters(epochs, scale=scale) for epochs in (4, 13) for scale in (1.0, 0.5)
    )  # of three
    assert [
        setting.name for setting in (tried["sft"][1], tried["sft_kl"][0], *tried["soup"][:2])
    ] == [
        "repeats3",
        "repeats6-kl0.1",
        "repeats4",
        "repeats4-scale0.5",
    ]


def test_every_arm_tries_the_learning_rates_and_decays_that_are_given(material: RunData) -> None:
    data = {"task": {"train": "rows.jsonl", "anchor": "Name it."}, "train": {"batch_size": 4}}
    compare = {"learning_rates": [1e-4, 1e-3], "weight_decays": [0.0, 0.1], "sft_epochs": [2]}
    given = settings_from_dict({**data, "compare": compare})
    grid = [(rate, decay) for rate in (1e-4, 1e-3) for decay in (0.0, 0.1)]
    assert resolve(ARMS["sft"], material, given).trials == tuple(
        Hyperparameters(2, rate, decay) for rate, decay in grid
    )
    found = resolve(ARMS["tell"], material, given).trials
    assert found == tuple(
        Hyperparameters(repeats, rate, decay) for repeats in (1, 2, 4, 8) for rate, decay in grid
    )
    assert len({setting.name for setting in found}) == 16
    assert found[1].name == "repeats1-learning_rate0.0001-weight_decay0.1"


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("general_then_task", (12, 3)),
        ("task_then_general", (3, 12)),
        ("tell", (15,)),
        ("sft", (3,)),
        ("general_only", (12,)),
    ],
)
def test_a_source_after_the_other_is_a_phase_of_its_own(
    material: RunData, given: Settings, name: str, phases: tuple[int, ...]
) -> None:
    assert made(material, given, name).phases(4) == phases  # 12 task positions and 48 general ones


def test_an_arm_of_ones_own_has_its_order_ratio_and_pool(
    material: RunData, given: Settings
) -> None:
    mine = Arm(name="mine", general="pool", order="random", general_per_task=2.0)
    own = replace(material, own_general={"mine": rows("other", 30)})
    for each, kind in ((material, "general"), (own, "other")):
        stream = resolve(mine, each, given).stream(tiny_tokenizer(), 2, 0)
        assert (
            stream.plan.order,
            stream.share().task_examples,
            stream.share().general_examples,
        ) == ("random", 12, 24)
        assert all(f"{kind} answer" in text for text in texts(stream)[1])
    assert [setting.repeats for setting in resolve(mine, material, given).trials] == [
        1,
        2,
        6,
        13,
    ]  # 240 rows hold 13 x 18


def test_a_ratio_that_is_asked_for_is_kept_or_refused(material: RunData, given: Settings) -> None:
    """192 rows were drawn: of a ratio of 12 they feed two repeats of six rows, of 40 none."""
    more = Arm(name="more", general="pool", general_per_task=12.0)
    tried = [setting.repeats for setting in resolve(more, material, given).trials]
    assert tried == [1, 2]
    for repeats in tried:
        share = resolve(more, material, given).stream(tiny_tokenizer(), repeats, 0).share()
        assert share.general_examples == 12 * share.task_examples
    with pytest.raises(
        ConfigError, match="more: 40 general rows for each task row are more than the 192 drawn"
    ):
        _ = resolve(more.model_copy(update={"general_per_task": 40.0}), material, given).trials
