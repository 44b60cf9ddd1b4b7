"""Answers to the task's unlabelled inputs, from which an arm learns as from general data: those of
adapters trained on its task rows (self-training), or of a teacher behind an endpoint.

Invariant: adapters that answer are trained on exactly the task rows that the arm is trained on (a
fold's, in cross-validation), so that no dev or test answer comes back through them; a teacher sees
no row of the task.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import numpy as np

from fulcrum import adapter, cell, clean, encode, generate, store
from fulcrum.adapter import State
from fulcrum.arm_data import ArmPlan, resolve
from fulcrum.arms import MEMBERS, plain_sft
from fulcrum.cell import Session
from fulcrum.endpoint import WORKERS, Endpoint
from fulcrum.errors import ConfigError
from fulcrum.material import RunData
from fulcrum.progress import after
from fulcrum.records import Example, Hyperparameters, Message, Task
from fulcrum.selfmade import read_rows

EPOCHS = 8  # of the adapters that answer
_AT_ONCE = 64  # inputs that a teacher answers between two writes

Asked = tuple[Task, Example]  # an input, and whose it is


def with_answers(session: Session, rows: RunData, plans: Sequence[ArmPlan]) -> RunData:
    """Return `rows` with the answers on which arms train.

    Adapters answer for every plan (a size, a fold), the teacher for the whole.

    Kept in the folder, and read back when resumed. Raises ConfigError if nothing usable comes.
    """
    own, notes = dict(rows.own_general), list[str]()
    for plan in plans:
        name = plan.general_name
        file = None
        if session.kept is not None:
            file = session.kept / store.MADE / f"{name.replace(' ', '-')}-seed{rows.seed}.json"
        if file is not None and file.exists():
            note, own[name] = read_rows(file)
        else:
            note, made = _answers(session, plan)
            own[name] = tuple(made)
            if file is not None:
                store.write_json(file, {"note": note, "rows": [store.plain(row) for row in made]})
        notes.append(note)
    return replace(rows, own_general=own, notes=(*rows.notes, *notes))


def _answers(session: Session, plan: ArmPlan) -> tuple[str, list[Example]]:
    """Have the arm's inputs answered; return a note on it, and the answered rows.

    Raises ConfigError if there are none.
    """
    started, name = time.perf_counter(), plan.arm.name
    inputs = list(_inputs(plan))
    if plan.arm.asks_adapters:
        made, how = _by_adapters(session, plan, inputs)
    else:
        made, how = _by_teacher(session, inputs)
    if not made:
        raise ConfigError(
            f"{name}: none of {len(inputs)} unlabelled inputs got an answer; leave this arm out"
        )
    took = time.perf_counter() - started
    return f"{name}: {len(made)} of {len(inputs)} inputs answered by {how}, {took:.0f} s", made


def _inputs(plan: ArmPlan) -> Iterator[Asked]:
    """Give inputs of all tasks in turn, as many as the longest mixture holds."""
    wanted = plan.arm.general_rows or len(plan.rows.general)
    by_task = [[(task, row) for row in task.unlabeled] for task in plan.rows.tasks]
    found = [pair for turn in zip_longest(*by_task) for pair in turn if pair is not None]
    yield from found[:wanted]


def _answered(row: Example, answer: str) -> Example:
    return replace(row, messages=(*row.messages, Message("assistant", answer)))


def _by_adapters(
    session: Session, plan: ArmPlan, inputs: Sequence[Asked]
) -> tuple[list[Example], str]:
    """Return each input with its likeliest answer, and how these were found.

    `MEMBERS` adapters answer; of an input's answers the likeliest to all of them together is taken.
    """
    model, chosen = session.model, Hyperparameters(EPOCHS)
    own = {"anchor": plan.arm.anchor}
    alone = resolve(plain_sft(plan.arm).model_copy(update=own), plan.rows, plan.settings)
    trainer = replace(session, folder=None)  # nothing of these trainings is kept
    states, tokens = list[State](), 0
    given: list[set[str]] = [set() for _ in inputs]
    for member in range(MEMBERS):
        label = f"{plan.arm.name}: adapter {member + 1} of {MEMBERS}"
        runs = cell.fit(
            trainer, alone, chosen, store.seed_for(plan.rows.seed, f"answers {member}"), label
        )
        tokens += sum(run.train_tokens for run in runs)
        states.append(adapter.adapter_state(model))
        for place, answer in _generated(session, plan, inputs, label):
            given[place] |= {answer} - {""}
    options = [
        (k, _answered(inputs[k][1], answer))
        for k in range(len(inputs))
        for answer in sorted(given[k])
    ]
    nats = np.zeros(len(options))
    if options:
        forms = _forms(session, plan)
        scored = [encode.final_answer(row, forms[inputs[k][0].name]) for k, row in options]
        settings = cell.own_settings(session.settings.train, alone.arm, chosen)
        for state in states:
            adapter.use(model, state, settings)
            nats += generate.nats(model, scored)[0]
    adapter.drop_adapter(model)
    best: dict[int, tuple[float, Example]] = {}
    for (k, row), value in zip(options, nats.tolist(), strict=True):
        if k not in best or value < best[k][0]:
            best[k] = value, row
    alike = sum(len(answers) == 1 for answers in given)
    how = f"{MEMBERS} adapters of {EPOCHS} epochs ({tokens:,} tokens), which agreed on {alike}"
    return [best[k][1] for k in sorted(best)], how


def _forms(session: Session, plan: ArmPlan) -> dict[str, encode.Format]:
    return {
        name: encode.make_format(session.model.tokenizer, anchor)
        for name, anchor in plan.train_anchors.items()
    }


def _generated(
    session: Session, plan: ArmPlan, inputs: Sequence[Asked], label: str
) -> Iterator[tuple[int, str]]:
    """Give the place of each input, and the answer of the adapter that is on the model."""
    forms = _forms(session, plan)
    for task in plan.rows.tasks:
        places = [k for k, (asked, _) in enumerate(inputs) if asked.name == task.name]
        form = forms[task.name]
        count = partial(session.progress.count, f"{label}, answers to {task.name}")
        answers = generate.generate(
            session.model,
            [encode.prompt_ids(inputs[k][1].messages, form) for k in places],
            form,
            max_new_tokens=task.max_new_tokens,
            batch_tokens=session.settings.eval.batch_tokens,
            progress=after(0, len(places), count),
        )
        yield from zip(places, answers, strict=True)


def _by_teacher(session: Session, inputs: Sequence[Asked]) -> tuple[list[Example], str]:
    """Return the inputs with the teacher's answers, and how these were found.

    Each is asked for once, for all seeds, and those that came are kept if a run is killed.
    """
    settings, teacher = session.settings, session.settings.teacher
    assert teacher is not None  # chosen_arms refuses the arm without one
    endpoint = Endpoint(teacher.endpoint, teacher.model, os.environ.get(teacher.key_variable))
    file = None if session.kept is None else session.kept / store.MADE / "teacher.json"
    known: dict[str, str] = store.read_json(file) if file is not None and file.exists() else {}

    def conversation(task: Task, row: Example) -> list[Message]:
        told = teacher.instruction or (task.anchor.text if task.anchor else "")
        if told and row.messages[0].role != "system":
            return [Message("system", told), *row.messages]
        return list(row.messages)

    def key(task: Task, row: Example) -> str:
        return store.fingerprint(
            [teacher.endpoint, teacher.model, task.max_new_tokens, *conversation(task, row)]
        )

    def ask(pair: Asked) -> str:
        task, row = pair
        return endpoint.say(conversation(task, row), task.max_new_tokens, 0.0, settings.seed) or ""

    missing = [pair for pair in inputs if key(*pair) not in known]
    with ThreadPoolExecutor(WORKERS) as threads:
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            known |= zip((key(*pair) for pair in part), threads.map(ask, part), strict=True)
            if file is not None:
                store.write_json(file, known)
            session.progress.count(f"answers of {teacher.model}", start + len(part), len(missing))
    answered = [(row, known[key(task, row)]) for task, row in inputs]
    refused = sum(clean.refuses(answer) for _, answer in answered)
    how = f"{teacher.model!r} at {teacher.endpoint}"
    if refused:
        how += f" ({refused} refusals left out)"
    found = [
        _answered(row, answer) for row, answer in answered if answer and not clean.refuses(answer)
    ]
    return found, how
