"""General rows that the base model makes itself: its own answers to the pool's prompts, or
questions and answers from nothing.

What they bring is not transfer from other data: the model knew it. Own answers hold the model where
it is (a placebo for the pool's answers); rows from nothing need no pool at all (as in Magpie, arXiv
2406.08464: the chat template's opening of a user's turn is continued by sampling).

Answers to the task's unlabelled inputs, from which an arm learns as from general data: those of
adapters trained on its task rows (self-training), or of a teacher behind an endpoint.

Invariant: adapters that answer are trained on exactly the task rows that the arm is trained on (a
fold's, in cross-validation), so that no dev or test answer comes back through them; a teacher sees
no row of the task.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from fulcrum.config.arms import MEMBERS, plain_sft
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, StoreError
from fulcrum.core.progress import Count, after
from fulcrum.core.types import Anchor, Example, Hyperparameters, Message, Task, Tokens
from fulcrum.data import encode, filters, mix, token_stream
from fulcrum.data.run_data import RunData
from fulcrum.data.token_stream import Stream
from fulcrum.experiments import cell, selfgen
from fulcrum.experiments.arm_data import ArmPlan, resolve, rows_to_probe
from fulcrum.experiments.cell import Session
from fulcrum.model import adapter, generate
from fulcrum.model.adapter import State
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.endpoint import WORKERS, Endpoint
from fulcrum.training import loop
from fulcrum.training.gradients import GRADIENTS_LABEL, SketchOptions, sketch_in_blocks

WARM_UP = 128  # general rows on which an adapter is trained before gradients are taken


def with_gradients(session: Session, rows: RunData, plans: Sequence[ArmPlan]) -> RunData:
    """Return `rows` with the gradients by which arms choose, for every plan (a size, a fold).

    The adapter is warmed up on the pool's own rows, so that one set of gradients serves all plans,
    and none sees what it must not. Task rows are taken with their anchors if the arm has one.
    Blocks of rows are kept in the folder as they are done, and read back when resumed.
    """
    wanted: dict[str, tuple[Example, Anchor | None]] = {}
    for plan in plans:
        wanted |= rows_to_probe(plan)
    if not wanted:
        return rows
    model, settings = session.model, session.settings
    anchors = {anchor for _, anchor in wanted.values()}
    forms = {anchor: encode.make_format(model.tokenizer, anchor) for anchor in anchors}
    examples: dict[str, Tokens] = {}
    for key in sorted(wanted):
        row, anchor = wanted[key]
        examples[key] = encode.encode(row, forms[anchor])
    name = f"gradients-seed{rows.seed}"
    found, seconds = sketch_in_blocks(
        model,
        examples,
        SketchOptions(settings.train.pack_tokens, rows.seed),
        put_adapter=partial(_warm_up, model, rows, settings),
        folder=None if session.kept is None else session.kept / store.MADE / name,
        count=partial(session.progress.count, GRADIENTS_LABEL),
    )
    note = (
        f"seed {rows.seed}: to choose general rows the gradients of {len(examples):,} rows were "
        "taken, "
        f"{sum(map(len, examples.values())):,} tokens, {seconds:.0f} s"
    )
    return replace(
        rows, gradients=dict(zip(examples, found, strict=True)), notes=(*rows.notes, note)
    )


def _warm_up(loaded: LoadedModel, rows: RunData, settings: Settings) -> None:
    """Train an adapter on the first general rows.

    Gradients of a fresh one say little of where training goes (LESS, 3.1).
    """
    general = rows.candidates[:WARM_UP]
    plain = encode.make_format(loaded.tokenizer, None)
    plan = mix.Plan(
        0, len(general), 1, len(general), "random", store.seed_for(rows.seed, "warm up")
    )
    own = settings.train.model_copy(update={"early_stopping_patience": None})
    stream = Stream(plan, [], token_stream.tokenised(general, plain))
    loop.train(loaded, stream, loop.Recipe(own, store.seed_for(rows.seed, "warm up"), repeats=1))


ANSWER_TOKENS = 64  # most; what is longer ends there
LABEL = "general rows that the model makes itself"


def with_made_rows(
    session: Session, rows: Mapping[int, RunData], arms: Sequence[Arm]
) -> dict[int, RunData]:
    """Return the rows of every seed with those that the model made for arms.

    Made rows are kept in the folder, and read back when resumed.
    """
    found = dict(rows)
    for arm in arms:
        if not arm.makes_rows:
            continue
        for seed, data in rows.items():
            file = (
                None
                if session.kept is None
                else session.kept / store.MADE / f"{arm.name}-seed{seed}.json"
            )
            if file is not None and file.exists():
                made = read_rows(file)[1]
            else:
                made = _made(session, arm, data)
                if file is not None:
                    store.write_json(file, {"note": "", "rows": [store.plain(row) for row in made]})
            notes = found[seed].notes
            asked = arm.general_rows or len(_pool_rows(arm, data))
            if len(made) < asked:
                notes = (*notes, f"{arm.name}: the model made {len(made)} of {asked} general rows")
            own = {**found[seed].own_general, arm.name: made}
            found[seed] = replace(found[seed], own_general=own, notes=notes)
    return found


def _pool_rows(arm: Arm, data: RunData) -> tuple[Example, ...]:
    """Return the rows of the arm's pool."""
    return data.own_general.get(arm.name, data.general)


def _made(session: Session, arm: Arm, data: RunData) -> tuple[Example, ...]:
    """Have the base model answer the pool's prompts, or write rows of its own."""
    adapter.drop_adapter(session.model)
    count = partial(session.progress.count, LABEL)
    if arm.general == "own_answers":
        return own_answers(
            session.model, _pool_rows(arm, data), session.settings.eval.batch_tokens, count
        )
    return from_nothing(session, arm, data, count)


def read_rows(file: Path) -> tuple[str, tuple[Example, ...]]:
    """A note on rows that were made, and the rows. Raises StoreError."""
    try:
        content = store.read_json(file)
        return str(content["note"]), tuple(
            Example(
                tuple(Message(**message) for message in row["messages"]),
                row["group"],
                row["origin"],
            )
            for row in content["rows"]
        )
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{file}: not the rows that were made, the file was changed or damaged; delete it"
        ) from error


def own_answers(
    model: LoadedModel, rows: Sequence[Example], batch_tokens: int, count: Count
) -> tuple[Example, ...]:
    """Return the rows with the model's own greedy answers; empty answers are skipped."""
    form = encode.make_format(model.tokenizer, None)
    prompts = [encode.prompt_ids(row.prompt, form) for row in rows]
    answers = generate.generate(
        model,
        prompts,
        form,
        max_new_tokens=ANSWER_TOKENS,
        batch_tokens=batch_tokens,
        progress=after(0, len(prompts), count),
    )
    return tuple(
        replace(row, messages=(*row.prompt, replace(row.messages[-1], content=answer)))
        for row, answer in zip(rows, answers, strict=True)
        if answer
    )


def from_nothing(session: Session, arm: Arm, data: RunData, count: Count) -> tuple[Example, ...]:
    """Have the model write as many rows as the run's mixtures hold.

    Raises ConfigError if it makes none.
    """
    model, seed = session.model, data.seed
    wanted = arm.general_rows or len(data.general) or data.general_count(max(data.repeats))
    place = None if session.kept is None else session.kept / store.MADE / f"{arm.name}-seed{seed}"
    recipe = selfgen.Recipe(wanted, store.seed_for(seed, "self made"))
    writer = selfgen.OfModel(model, session.settings.eval.batch_tokens)
    found, refused = selfgen.made(writer, recipe, place, count)
    if not found:
        reasons = ", ".join(f"{number} {reason}" for reason, number in refused.items())
        raise ConfigError(
            f"{arm.name}: {model.name!r} made no usable row ({reasons}); leave this arm out"
        )
    return found


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
    refused = sum(filters.refuses(answer) for _, answer in answered)
    how = f"{teacher.model!r} at {teacher.endpoint}"
    if refused:
        how += f" ({refused} refusals left out)"
    found = [
        _answered(row, answer) for row, answer in answered if answer and not filters.refuses(answer)
    ]
    return found, how
