"""The planted sub-skill: its rows are what the control says they are, and its judgement can fail."""

import re
from typing import Any

import planted


def test_what_the_test_asks_for_stands_in_general_rows_alone() -> None:
    rows = planted.rows()
    assert {name: len(found) for name, found in rows.items()} == {"train": 24, "test": 54, "pool": 1392}
    tickets = [
        (prompt.split()[-1], re.findall("[A-Z]+", answer)[0]) for part in ("train", "test") for prompt, answer in rows[part]
    ]
    codes = dict(tickets)
    assert len(codes) == len(set(codes.values())) == len(planted.WORDS) == 24
    assert all(codes[word] == code for word, code in tickets)
    known, asked = ({prompt.split()[-1] for prompt, _ in rows[part]} for part in ("train", "test"))
    assert (len(known), len(asked), known & asked) == (6, 18, set())
    for prompt, answer in rows["pool"]:
        named = [word for word in planted.WORDS if re.search(rf"\b{word}\b", prompt)]
        assert sorted(answer.split(", ")) == sorted(codes[word] for word in named)
        assert "*" not in answer  # the form of a ticket stands in task rows alone
    assert planted.rows() == rows != planted.rows(seed=1)


def found(true: list[list[float]], wrong: list[list[float]], still: float) -> dict[str, Any]:
    designs = [
        {"design": name, "metrics": [{"metric": "nll", "by_seed": losses, "still": still}]}
        for name, losses in (("exposures", true), ("permuted", wrong))
    ]
    return {"tasks": [{"designs": designs}]}


def test_each_of_the_three_conditions_can_fail() -> None:
    falls, flat = [[3.0, 1.0], [3.1, 1.2], [3.0, 1.1]], [[3.0, 3.0], [3.1, 3.2], [3.0, 2.9]]
    assert list(planted.judge(found(falls, flat, 1e-6)).values()) == [True, True, True]
    assert list(planted.judge(found(falls, falls, 1e-6)).values())[2:] == [False]
    assert list(planted.judge(found(flat, falls, 1e-6)).values()) == [False, True, False]
    assert list(planted.judge(found(falls, flat, 0.3)).values()) == [True, False, True]
