"""Examples in the prompt instead of training: what a few rows bring a model whose weights stay as they are.

A row is scored as the last turn of a conversation whose earlier turns are training rows with their answers. How many is
tuned, as epochs are for trained arms. The shots come first, in one order for all rows, so that they are computed once.
"""

from collections.abc import Sequence
from dataclasses import replace

from fulcrum import encode
from fulcrum.errors import ConfigError
from fulcrum.records import Example, Task

TRIED = (1, 2, 4, 8, 16, 32)


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """The row after the shots' turns. Its own system text stays first; those of the shots, mostly the same, are left out."""
    system = tuple(message for message in example.messages if message.role == "system")
    turns = tuple(message for row in (*shots, example) for message in row.messages if message.role != "system")
    return replace(example, messages=system + turns)


def prompted(task: Task, number: int) -> Task:
    """The task with the first `number` of its training rows before every dev and test row."""
    shots = task.train[:number]
    dev, test = (tuple(with_shots(row, shots) for row in rows) for rows in (task.dev, task.test))
    return replace(task, dev=dev, test=test)


def numbers(tasks: Sequence[Task], form: encode.Format, context: int | None) -> list[int]:
    """The numbers of shots that can be tried: as many rows as every task has, in prompts that the model's context holds.

    Raises ConfigError where not even one fits.
    """
    most = min(len(task.train) for task in tasks)
    found = []
    for number in TRIED:
        if number > most or (context is not None and _longest(tasks, number, form) > context):
            break
        found.append(number)
    if not found:
        raise ConfigError(f"kshot: not even one example fits into the model's context of {context} tokens; leave this arm out")
    return found


def _longest(tasks: Sequence[Task], number: int, form: encode.Format) -> int:
    """Tokens of the longest row with its shots, with its own answer or the longest that may be generated."""
    longest = 0
    for task in tasks:
        changed = prompted(task, number)
        rows = [encode.scored(row) for row in (*changed.dev, *changed.test)]
        encode.encode_ahead(rows, form)
        for tokens in (encode.encode(row, form) for row in rows):
            longest = max(longest, len(tokens), len(tokens) - tokens.n_loss + task.max_new_tokens)
    return longest
