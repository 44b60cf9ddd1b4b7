"""The planted sub-skill: its rows are what the control says they are, and its judgement can
fail."""

import re
from typing import Any

import planted


def test_what_the_test_asks_for_stands_in_general_rows_alone() -> None:
    rows = planted.rows()
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 16,
        "test": 48,
        "pool": 1740,
    }
    pairs = [*rows["train"], *rows["test"]]
    tickets = [(prompt.split()[-1], re.findall("[A-Z]+", answer)[0]) for prompt, answer in pairs]
    codes = dict(tickets)
    assert len(codes) == len(set(codes.values())) == len(planted.WORDS) == 10
    assert all(codes[word] == code for word, code in tickets)
    known, asked = ({prompt.split()[-1] for prompt, _ in rows[part]} for part in ("train", "test"))
    assert (len(known), len(asked), known & asked) == (4, 6, set())
    for prompt, answer in rows["pool"]:
        named = [word for word in planted.WORDS if re.search(rf"\b{word}\b", prompt)]
        assert sorted(answer.split(", ")) == sorted(codes[word] for word in named)
        assert "*" not in answer  # the form of a ticket stands in task rows alone
    assert planted.rows() == rows != planted.rows(seed=1)


def found(exact: float, wrong: float, loss: float, still: float) -> dict[str, Any]:
    """Three seeds that change so much from no general rows to the most."""
    designs = []
    for name, right in (("exposures", exact), ("permuted", wrong)):
        metrics = [
            {
                "metric": metric,
                "by_seed": [
                    [base, base + change + off]
                    for base, off in ((1.0, 0.0), (1.1, 0.02), (0.9, -0.02))
                ],
            }
            for metric, change in (("nll", loss), ("exact_match", right))
        ]
        metrics[0]["still"] = still
        designs.append({"design": name, "metrics": metrics})
    return {"tasks": [{"designs": designs}]}


def test_each_of_the_three_conditions_can_fail() -> None:
    def held(*given: float) -> list[bool]:
        return list(planted.judge(found(*given)).values())

    assert held(0.9, 0.05, -2.0, 1e-6) == [True, True, True]
    assert held(0.9, 0.8, -2.0, 1e-6) == [True, True, False]  # wrong answers would teach the skill
    assert held(0.0, 0.0, -2.0, 1e-6) == [
        False,
        True,
        False,
    ]  # the loss falls, and no code is right
    assert held(0.9, 0.05, 0.1, 0.3) == [False, False, True]
