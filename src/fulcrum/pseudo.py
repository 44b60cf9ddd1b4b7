"""Answers to the task's unlabelled inputs, from which an arm learns as from general data: those of adapters trained on its task
rows (self-training), or of a teacher behind an endpoint.

Invariant: adapters that answer are trained on exactly the task rows that the arm is trained on (a fold's, in
cross-validation), so that no dev or test answer comes back through them; a teacher sees no row of the task.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from fulcrum import adapter, cell, clean, encode, generate, store
from fulcrum.arms import ARMS, MEMBERS, anchor_of, own_name
from fulcrum.cell import Watcher
from fulcrum.config import Arm, Settings
from fulcrum.endpoint import WORKERS, Endpoint
from fulcrum.errors import ConfigError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import Example, Message, Setting, Task
from fulcrum.selfmade import read_rows

EPOCHS = 8  # of the adapters that answer
_AT_ONCE = 64  # inputs that a teacher answers between two writes

Asked = tuple[Task, Example]  # an input, and whose it is


def with_answers(
    rows: Material, loaded: LoadedModel, views: Sequence[tuple[Material, Arm]], arms: Sequence[Arm], settings: Settings,
    folder: Path | None, watcher: Watcher,
) -> Material:  # fmt: skip
    """`rows` with the answers that arms train on: of adapters for every view (a size, a fold), of the teacher once.

    Kept in the folder, and read back when resumed. Raises ConfigError where nothing usable comes.
    """
    own, notes = dict(rows.own_general), list[str]()
    asked = [(view, arm) for view, arm in views if arm.general == "pseudo_self"]
    asked += [(rows, arm) for arm in arms if arm.general == "pseudo_teacher"]
    for view, arm in asked:
        name, started = own_name(arm, view), time.perf_counter()
        file = None if folder is None else folder / store.MADE / f"{name.replace(' ', '-')}-seed{rows.seed}.json"
        if file is None or not file.exists():
            inputs = list(_inputs(view, arm))
            if arm.general == "pseudo_self":
                made, how = _by_adapters(inputs, view, loaded, arm, settings, watcher)
            else:
                made, how = _by_teacher(inputs, settings, folder, watcher)
            if not made:
                raise ConfigError(f"{arm.name}: none of {len(inputs)} unlabelled inputs got an answer; leave this arm out")
            took = time.perf_counter() - started
            note, own[name] = f"{arm.name}: {len(made)} of {len(inputs)} inputs answered by {how}, {took:.0f} s", tuple(made)
            if file is not None:
                store.write_json(file, {"note": note, "rows": [store.plain(row) for row in made]})
        else:
            note, own[name] = read_rows(file)
        notes.append(note)
    return replace(rows, own_general=own, notes=(*rows.notes, *notes))


def _inputs(rows: Material, arm: Arm) -> Iterator[Asked]:
    """Inputs of all tasks in turn, as many as the longest mixture holds."""
    wanted = arm.general_rows or len(rows.general)
    turns = zip_longest(*([(task, row) for row in task.unlabeled] for task in rows.tasks))
    yield from [pair for turn in turns for pair in turn if pair is not None][:wanted]


def _answered(row: Example, answer: str) -> Example:
    return replace(row, messages=(*row.messages, Message("assistant", answer)))


def _by_adapters(
    inputs: Sequence[Asked], view: Material, loaded: LoadedModel, arm: Arm, settings: Settings, watcher: Watcher
) -> tuple[list[Example], str]:
    """Of the answers that `MEMBERS` adapters give, each input's that all of them together find likeliest."""
    alone = ARMS["sft_anchor" if arm.anchored else "sft"].model_copy(update={"anchor": arm.anchor})
    forms = {task.name: encode.make_format(loaded.tokenizer, anchor_of(arm, task)) for task in view.tasks}
    states, tokens = [], 0
    given: list[set[str]] = [set() for _ in inputs]
    for member in range(MEMBERS):
        seed, label = store.seed_for(view.seed, f"answers {member}"), f"{arm.name}: adapter {member + 1} of {MEMBERS}"
        trained = cell.fit(view, loaded, alone, settings, Setting(EPOCHS), seed, label, None, watcher)
        tokens += sum(result.train_tokens for result in trained)
        states.append(adapter.adapter_state(loaded))
        for task in view.tasks:
            own = [(k, row) for k, (asked, row) in enumerate(inputs) if asked.name == task.name]
            said = generate.generate(
                loaded, [encode.prompt_ids(row.messages, forms[task.name]) for _, row in own], forms[task.name],
                max_new_tokens=task.max_new_tokens, batch_tokens=settings.eval.batch_tokens,
                progress=partial(_tell, watcher, f"{label}, answers to {task.name}", len(own)),
            )  # fmt: skip
            for (k, _), answer in zip(own, said, strict=True):
                given[k] |= {answer} - {""}
    options = [(k, _answered(inputs[k][1], answer)) for k in range(len(inputs)) for answer in sorted(given[k])]
    scored = [encode.final_answer(row, forms[inputs[k][0].name]) for k, row in options]
    nats = np.zeros(len(options))
    for state in states if options else ():
        adapter.use(loaded, state, cell.own_settings(settings.train, alone, Setting(EPOCHS)))
        nats += generate.nats(loaded, scored)[0]
    adapter.drop_adapter(loaded)
    best: dict[int, tuple[float, Example]] = {}
    for (k, row), value in zip(options, nats.tolist(), strict=True):
        if k not in best or value < best[k][0]:
            best[k] = value, row
    alike = sum(len(answers) == 1 for answers in given)
    how = f"{MEMBERS} adapters of {EPOCHS} epochs ({tokens:,} tokens), which agreed on {alike}"
    return [best[k][1] for k in sorted(best)], how


def _tell(watcher: Watcher, label: str, total: int, done: int) -> None:
    watcher.count(label, done, total)


def _by_teacher(
    inputs: Sequence[Asked], settings: Settings, folder: Path | None, watcher: Watcher
) -> tuple[list[Example], str]:
    """The teacher's answers; each is asked for once, for all seeds, and those that came stay where a run is killed."""
    teacher = settings.teacher
    assert teacher is not None  # chosen_arms refuses the arm without one
    endpoint = Endpoint(teacher.endpoint, teacher.model, os.environ.get(teacher.key_variable))
    file = None if folder is None else folder / store.MADE / "teacher.json"
    known: dict[str, str] = store.read_json(file) if file is not None and file.exists() else {}

    def conversation(task: Task, row: Example) -> list[Message]:
        told = teacher.instruction or (task.anchor.text if task.anchor else "")
        return [*([Message("system", told)] if told and row.messages[0].role != "system" else []), *row.messages]

    def key(task: Task, row: Example) -> str:
        return store.fingerprint([teacher.endpoint, teacher.model, task.max_new_tokens, *conversation(task, row)])

    def ask(task: Task, row: Example) -> str:
        return endpoint.say(conversation(task, row), task.max_new_tokens, 0.0, settings.seed) or ""

    missing = [pair for pair in inputs if key(*pair) not in known]
    with ThreadPoolExecutor(WORKERS) as threads:
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            known |= zip((key(*pair) for pair in part), threads.map(lambda pair: ask(*pair), part), strict=True)
            if file is not None:
                store.write_json(file, known)
            watcher.count(f"answers of {teacher.model}", start + len(part), len(missing))
    told = [(row, known[key(task, row)]) for task, row in inputs]
    refused = sum(clean.refuses(answer) for _, answer in told)
    how = f"{teacher.model!r} at {teacher.endpoint}" + (f" ({refused} refusals left out)" if refused else "")
    return [_answered(row, answer) for row, answer in told if answer and not clean.refuses(answer)], how
