"""Examples in the prompt: which turns stand before a row, how many fit, and that the rows left out
of folds choose."""

from pathlib import Path

import pytest

from fulcrum.config.arms import ARMS
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example, Hyperparameters, Message, Task, Trial
from fulcrum.data import encode
from fulcrum.data.run_data import RunData
from fulcrum.experiments import baselines, cell, scoring
from fulcrum.experiments.arm_data import resolve
from fulcrum.experiments.cell import Cell
from fulcrum.model import generate
from helpers.tiny import load_tiny, session, tiny_tokenizer


def row(name: str, *, system: str | None = None) -> Example:
    turns = [Message("user", f"ask {name}"), Message("assistant", f"say {name}")]
    return Example(tuple([Message("system", system)] * bool(system) + turns), name, f"rows:{name}")


def task(train: int = 5, answer_room: int = 4) -> Task:
    return Task(
        "task",
        tuple(row(f"a{k}") for k in range(train)),
        (row("d"),),
        (row("x"), row("y")),
        max_new_tokens=answer_room,
    )


def said(example: Example) -> list[str]:
    return [f"{message.role}: {message.content}" for message in example.messages]


def test_shots_stand_before_a_rows_own_turns_and_after_its_system_text() -> None:
    found = baselines.with_shots(
        row("x", system="Be brief."), [row("a", system="Be long."), row("b")]
    )
    assert said(found) == [
        "system: Be brief.",
        "user: ask a",
        "assistant: say a",
        "user: ask b",
        "assistant: say b",
        "user: ask x",
        "assistant: say x",
    ]
    assert (found.group, found.origin, found.answer, found.question) == (
        "x",
        "rows:x",
        "say x",
        "ask x",
    )


def test_a_task_has_the_same_shots_before_every_row_and_keeps_its_training_rows() -> None:
    own = task()
    found = baselines.add_shots(own, 2)
    assert found.train == own.train
    for example in (*found.dev, *found.test):
        assert said(example)[:4] == [
            "user: ask a0",
            "assistant: say a0",
            "user: ask a1",
            "assistant: say a1",
        ]


def test_only_the_own_answer_is_scored() -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    found, alone = (
        encode.final_answer(each, form)
        for each in (baselines.with_shots(row("x"), [row("a")]), row("x"))
    )
    assert found.ids[found.loss_mask].tolist() == alone.ids[alone.loss_mask].tolist()
    assert len(found) > len(alone)


def test_as_many_are_tried_as_there_are_rows_and_as_the_context_holds() -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    own = task()
    assert baselines.shot_counts([own], form, None) == [1, 2, 4]
    assert baselines.shot_counts([own, task(train=2)], form, None) == [1, 2]
    longest = max(
        len(encode.final_answer(example, form)) for example in baselines.add_shots(own, 2).test
    )
    assert baselines.shot_counts([own], form, longest) == [1, 2]
    assert baselines.shot_counts([own], form, longest - 1) == [1]
    answer = encode.final_answer(row("x"), form).n_loss
    assert baselines.shot_counts([task(answer_room=answer + 1)], form, longest) == [1]
    with pytest.raises(
        ConfigError, match="kshot: not even one example fits into the model's context of 9 tokens"
    ):
        baselines.shot_counts([own], form, 9)


def material(train: int = 6) -> RunData:
    return RunData((task(train),), (), {}, {}, (1,), general_for=train, batch_size=4)


KSHOT = ARMS["kshot"]


def given(folds: int = 3) -> Settings:
    task = {"train": "rows.jsonl", "metrics": ["nll"]}
    return settings_from_dict({"task": task, "compare": {"folds": folds}, "eval": {"draws": 100}})


@pytest.mark.parametrize(
    ("train", "folds", "numbers"), [(6, 3, (1, 2, 4)), (6, 2, (1, 2)), (5, 3, (1, 2)), (2, 3, (1,))]
)
def test_as_many_are_tried_as_the_smallest_fold_leaves(
    tmp_path: Path, train: int, folds: int, numbers: tuple
) -> None:
    found = cell.few_shot_trials(
        load_tiny(tmp_path), resolve(KSHOT, material(train), given(folds)), 0
    )
    assert found == tuple(
        Hyperparameters(shots=number) for number in numbers
    )  # 5 rows in 3 folds: 2, 2 and 1, so 3 are left


def test_rows_outside_a_fold_judge_a_number(tmp_path: Path) -> None:
    loaded, form = load_tiny(tmp_path), encode.make_format(tiny_tokenizer(), None)
    plan = resolve(KSHOT, material(), given())
    found = cell.tune(session(loaded, given()), plan, Cell(KSHOT, 0, 0), Hyperparameters(shots=2))
    scored = []
    for fold in material().folds(3, cell.store.seed_for(0, "folds")):
        (own,) = fold.tasks
        scored += [
            encode.final_answer(baselines.with_shots(row, own.train[:2]), form) for row in own.dev
        ]
    assert (len(scored), found.setting, found.train_tokens) == (6, Hyperparameters(shots=2), 0)
    assert found.dev_nll == pytest.approx(generate.mean_loss(loaded, scored), rel=1e-6)


def test_the_best_number_is_used_on_test_rows(tmp_path: Path) -> None:
    loaded, settings = load_tiny(tmp_path), given()
    tried = [
        Trial(Hyperparameters(shots=number), loss, 0, 0.0)
        for number, loss in ((1, 0.5), (2, 0.2), (4, 0.3))
    ]
    plan = resolve(KSHOT, material(), settings)
    found = cell.final(session(loaded, settings), plan, Cell(KSHOT, 0, 7), tried)
    assert (found.chosen, found.setting, found.training) == (1, Hyperparameters(shots=2), None)
    assert (found.arm, found.size, found.seed) == ("kshot", 6, 7)
    prompted = baselines.add_shots(material().tasks[0], 2)
    expected = scoring.predict(
        loaded, prompted, prompted.test, batch_tokens=settings.eval.batch_tokens
    )
    assert [row.nll_sum for row in found.predictions["task"]] == [row.nll_sum for row in expected]
