"""Examples in the prompt: which turns stand before a row, how many fit, and that dev chooses."""

import pytest

from fulcrum import encode, shots
from fulcrum.errors import ConfigError
from fulcrum.records import Example, Message, Task
from tiny import tiny_tokenizer


def row(name: str, *, system: str | None = None) -> Example:
    turns = [Message("user", f"ask {name}"), Message("assistant", f"say {name}")]
    return Example(tuple([Message("system", system)] * bool(system) + turns), name, f"rows:{name}")


def task(train: int = 5, answer_room: int = 4) -> Task:
    return Task("t", tuple(row(f"a{k}") for k in range(train)), (row("d"),), (row("x"), row("y")), max_new_tokens=answer_room)


def said(example: Example) -> list[str]:
    return [f"{message.role}: {message.content}" for message in example.messages]


def test_shots_stand_before_a_rows_own_turns_and_after_its_system_text() -> None:
    found = shots.with_shots(row("x", system="Be brief."), [row("a", system="Be long."), row("b")])
    assert said(found) == [
        "system: Be brief.", "user: ask a", "assistant: say a", "user: ask b", "assistant: say b",
        "user: ask x", "assistant: say x",
    ]  # fmt: skip
    assert (found.group, found.origin, found.answer, found.question) == ("x", "rows:x", "say x", "ask x")


def test_a_task_has_the_same_shots_before_every_row_and_keeps_its_training_rows() -> None:
    own = task()
    found = shots.prompted(own, 2)
    assert found.train == own.train
    for example in (*found.dev, *found.test):
        assert said(example)[:4] == ["user: ask a0", "assistant: say a0", "user: ask a1", "assistant: say a1"]


def test_only_the_own_answer_is_scored() -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    found, alone = (encode.final_answer(each, form) for each in (shots.with_shots(row("x"), [row("a")]), row("x")))
    assert found.ids[found.loss_mask].tolist() == alone.ids[alone.loss_mask].tolist()
    assert len(found) > len(alone)


def test_as_many_are_tried_as_there_are_rows_and_as_the_context_holds() -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    own = task()
    assert shots.numbers([own], form, None) == [1, 2, 4]
    assert shots.numbers([own, task(train=2)], form, None) == [1, 2]
    longest = max(len(encode.final_answer(example, form)) for example in shots.prompted(own, 2).test)
    assert shots.numbers([own], form, longest) == [1, 2]
    assert shots.numbers([own], form, longest - 1) == [1]
    answer = encode.final_answer(row("x"), form).n_loss
    assert shots.numbers([task(answer_room=answer + 1)], form, longest) == [1]
    with pytest.raises(ConfigError, match="kshot: not even one example fits into the model's context of 9 tokens"):
        shots.numbers([own], form, 9)


def test_dev_chooses_the_number() -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    losses = {1: 0.5, 2: 0.2, 4: 0.3}

    def dev_loss(tasks: tuple[Task, ...]) -> float:
        return losses[(len(tasks[0].dev[0].messages) - 2) // 2]

    number, (found,) = shots.choose([task()], form, None, dev_loss)
    assert number == 2
    assert found == shots.prompted(task(), 2)
