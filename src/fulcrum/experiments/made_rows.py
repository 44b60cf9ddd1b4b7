"""General rows that a run makes or needs a model to choose: gradients, made rows, answers.

The rows an arm trains on next to its task rows may come from four places besides a pool:

- the base model's own answers to the pool's prompts. The model knew them already, so they transfer
  nothing and only hold it where it is: a placebo for the pool's answers;
- rows that the base model writes from nothing, which need no pool (as in Magpie, arXiv 2406.08464:
  sampling continues the chat template's opening of a user's turn);
- answers to the task's unlabelled inputs by adapters trained on its task rows (self-training);
- answers to these inputs by a teacher behind an endpoint.

All are stored in the run folder and read back on resume.

Invariant: adapters that answer are trained on exactly the task rows that their arm is trained on
(in cross-validation a fold's), so that no dev or test answer leaks through them. A teacher sees no
labelled row of the task.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from fulcrum.config.arms import MEMBERS, plain_sft
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TeacherSettings, TrainSettings
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

ANSWER_TOKENS = 64  # longest own answer; it is cut there

_LABEL = "general rows that the model makes itself"
_WARM_UP = 128  # general rows on which an adapter is trained before gradients are taken
_EPOCHS = 8  # of the adapters that answer
_AT_ONCE = 64  # inputs that a teacher answers between two writes

Input = tuple[Task, Example]  # an unlabelled input, with its task


def with_gradients(session: Session, rows: RunData, plans: Sequence[ArmPlan]) -> RunData:
    """Return `rows` with the gradients by which arms choose, for every plan (a size, a fold).

    The adapter is warmed up on the pool's own rows, so that one set of gradients serves all plans,
    and none sees what it must not. Task rows are taken with their anchors if the arm has one.
    Gradients are stored block by block, and read back on resume.
    """
    wanted: dict[str, tuple[Example, Anchor | None]] = {}
    for plan in plans:
        wanted |= rows_to_probe(plan)
    if not wanted:
        return rows
    examples = _encode_by_key(wanted, session.model.tokenizer)
    name = f"gradients-seed{rows.seed}"
    sketches, seconds = sketch_in_blocks(
        session.model,
        list(examples.items()),
        SketchOptions(session.settings.train.pack_tokens, rows.seed),
        put_adapter=partial(_warm_up, session.model, rows, session.settings),
        folder=None if session.kept is None else session.kept / store.MADE / name,
        count=partial(session.progress.count, GRADIENTS_LABEL),
    )
    tokens = sum(map(len, examples.values()))
    note = (
        f"seed {rows.seed}: to choose general rows the gradients of {len(examples):,} rows were "
        f"taken, {tokens:,} tokens, {seconds:.0f} s"
    )
    gradients = dict(zip(examples, sketches, strict=True))
    return replace(rows, gradients=gradients, notes=(*rows.notes, note))


def with_made_rows(
    session: Session, rows: Mapping[int, RunData], arms: Sequence[Arm]
) -> dict[int, RunData]:
    """Return the rows of every seed with those that the base model makes for the arms."""
    result = dict(rows)
    for arm in arms:
        if not arm.makes_rows:
            continue
        for seed, data in rows.items():
            name = f"{arm.name}-seed{seed}"
            _, made = _load_or_make(session, name, partial(_make_rows, session, arm, data))
            wanted = arm.general_rows or len(_pool_rows(arm, data))
            notes = result[seed].notes
            if len(made) < wanted:
                notes = (*notes, f"{arm.name}: the model made {len(made)} of {wanted} general rows")
            own_general = {**result[seed].own_general, arm.name: made}
            result[seed] = replace(result[seed], own_general=own_general, notes=notes)
    return result


def with_answers(session: Session, rows: RunData, plans: Sequence[ArmPlan]) -> RunData:
    """Return `rows` with the answered inputs on which arms train.

    Adapters answer for every plan (a size, a fold), the teacher for the whole. Raises ConfigError
    if no input gets a usable answer.
    """
    own_general = dict(rows.own_general)
    notes = list(rows.notes)
    for plan in plans:
        name = f"{plan.general_name.replace(' ', '-')}-seed{rows.seed}"
        note, answered = _load_or_make(session, name, partial(_answer_inputs, session, plan))
        own_general[plan.general_name] = answered
        notes.append(note)
    return replace(rows, own_general=own_general, notes=tuple(notes))


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
    answered = []
    for row, answer in zip(rows, answers, strict=True):
        if answer:
            message = replace(row.messages[-1], content=answer)
            answered.append(replace(row, messages=(*row.prompt, message)))
    return tuple(answered)


def from_nothing(session: Session, arm: Arm, data: RunData, count: Count) -> tuple[Example, ...]:
    """Have the model write as many rows as the run's mixtures hold.

    Raises ConfigError if it writes none that is usable.
    """
    model, seed = session.model, data.seed
    wanted = arm.general_rows or len(data.general) or data.general_count(max(data.repeats))
    folder = None if session.kept is None else session.kept / store.MADE / f"{arm.name}-seed{seed}"
    recipe = selfgen.Recipe(wanted, store.seed_for(seed, "self made"))
    writer = selfgen.OfModel(model, session.settings.eval.batch_tokens)
    rows, rejects = selfgen.make(writer, recipe, folder, count)
    if not rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in rejects.items())
        raise ConfigError(
            f"{arm.name}: {model.name!r} made no usable row ({reasons}); leave this arm out"
        )
    return rows


# Stored rows.


def _load_or_make(
    session: Session, name: str, make: Callable[[], tuple[str, Sequence[Example]]]
) -> tuple[str, tuple[Example, ...]]:
    """Return a note and rows: those stored under `name`, else those of `make`, now stored."""
    file = None if session.kept is None else session.kept / store.MADE / f"{name}.json"
    if file is not None and file.exists():
        return _read_rows(file)
    note, rows = make()
    if file is not None:
        store.write_json(file, {"note": note, "rows": [store.plain(row) for row in rows]})
    return note, tuple(rows)


def _read_rows(file: Path) -> tuple[str, tuple[Example, ...]]:
    rows = []
    try:
        content = store.read_json(file)
        note = str(content["note"])
        for row in content["rows"]:
            messages = tuple(Message(**message) for message in row["messages"])
            rows.append(Example(messages, row["group"], row["origin"]))
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{file}: not the rows that were made, the file was changed or damaged; delete it"
        ) from error
    return note, tuple(rows)


# Gradients.


def _encode_by_key(
    wanted: Mapping[str, tuple[Example, Anchor | None]], tokenizer: encode.Tokenizer
) -> dict[str, Tokens]:
    """Return the tokens of rows with their anchors, in the order of their keys."""
    forms: dict[Anchor | None, encode.PromptFormat] = {}
    examples: dict[str, Tokens] = {}
    for key in sorted(wanted):
        row, anchor = wanted[key]
        if anchor not in forms:
            forms[anchor] = encode.make_format(tokenizer, anchor)
        examples[key] = encode.encode(row, forms[anchor])
    return examples


def _warm_up(loaded: LoadedModel, rows: RunData, settings: Settings) -> None:
    """Train an adapter on the first general rows.

    Gradients of a fresh one say little about where training goes (LESS, 3.1).
    """
    general = rows.candidates[:_WARM_UP]
    seed = store.seed_for(rows.seed, "warm up")
    plan = mix.Plan(0, len(general), 1, len(general), "random", seed)
    plain = encode.make_format(loaded.tokenizer, None)
    stream = Stream(plan, [], token_stream.tokenised(general, plain))
    train_settings = settings.train.model_copy(update={"early_stopping_patience": None})
    loop.train(loaded, stream, loop.Recipe(train_settings, seed, repeats=1))


# Rows that the base model makes.


def _pool_rows(arm: Arm, data: RunData) -> tuple[Example, ...]:
    return data.own_general.get(arm.name, data.general)


def _make_rows(session: Session, arm: Arm, data: RunData) -> tuple[str, tuple[Example, ...]]:
    """Have the base model answer the pool's prompts, or write rows of its own; there is no note."""
    adapter.drop_adapter(session.model)
    count = partial(session.progress.count, _LABEL)
    if arm.general != "own_answers":
        return "", from_nothing(session, arm, data, count)
    batch_tokens = session.settings.eval.batch_tokens
    return "", own_answers(session.model, _pool_rows(arm, data), batch_tokens, count)


# Answers to unlabelled inputs.


def _answer_inputs(session: Session, plan: ArmPlan) -> tuple[str, list[Example]]:
    """Have the arm's inputs answered; return a note about it, and the answered rows.

    Raises ConfigError if there are none.
    """
    started = time.perf_counter()
    name = plan.arm.name
    inputs = _inputs(plan)
    if plan.arm.asks_adapters:
        answered, how = _ask_adapters(session, plan, inputs)
    else:
        answered, how = _ask_teacher(session, inputs)
    if not answered:
        raise ConfigError(
            f"{name}: none of {len(inputs)} unlabelled inputs got an answer; leave this arm out"
        )
    seconds = time.perf_counter() - started
    note = f"{name}: {len(answered)} of {len(inputs)} inputs answered by {how}, {seconds:.0f} s"
    return note, answered


def _inputs(plan: ArmPlan) -> list[Input]:
    """Return inputs of all tasks in turn, as many as the longest mixture holds."""
    by_task = []
    for task in plan.rows.tasks:
        by_task.append([(task, row) for row in task.unlabeled])
    inputs: list[Input] = []
    for turn in zip_longest(*by_task):
        inputs += filter(None, turn)  # tasks with fewer inputs run out first
    return inputs[: plan.arm.general_rows or len(plan.rows.general)]


def _with_answer(row: Example, answer: str) -> Example:
    return replace(row, messages=(*row.messages, Message("assistant", answer)))


def _ask_adapters(
    session: Session, plan: ArmPlan, inputs: Sequence[Input]
) -> tuple[list[Example], str]:
    """Return each input with the answer that all adapters together find likeliest.

    `MEMBERS` adapters are trained, and each answers every input. With the rows comes a description
    of who answered.
    """
    model = session.model
    sft = plain_sft(plan.arm).model_copy(update={"anchor": plan.arm.anchor})
    sft_plan = resolve(sft, plan.rows, plan.settings)
    hyperparameters = Hyperparameters(_EPOCHS)
    trainer = replace(session, folder=None)  # nothing of these trainings is kept
    states: list[State] = []
    tokens = 0
    answers_to: list[set[str]] = [set() for _ in inputs]
    for member in range(MEMBERS):
        label = f"{plan.arm.name}: adapter {member + 1} of {MEMBERS}"
        seed = store.seed_for(plan.rows.seed, f"answers {member}")
        runs = cell.fit(trainer, sft_plan, hyperparameters, seed, label)
        tokens += sum(run.train_tokens for run in runs)
        states.append(adapter.adapter_state(model))
        for place, answer in _generate_answers(session, plan, inputs, label):
            if answer:
                answers_to[place].add(answer)
    candidates = []
    for place, answers in enumerate(answers_to):
        candidates += [(place, answer) for answer in sorted(answers)]
    train_settings = cell.own_settings(session.settings.train, sft, hyperparameters)
    losses = _total_losses(session, plan, inputs, candidates, (states, train_settings))
    adapter.drop_adapter(model)
    agreed = sum(len(answers) == 1 for answers in answers_to)
    how = f"{MEMBERS} adapters of {_EPOCHS} epochs ({tokens:,} tokens), which agreed on {agreed}"
    return _choose_likeliest(inputs, candidates, losses), how


def _forms(session: Session, plan: ArmPlan) -> dict[str, encode.PromptFormat]:
    """Return the prompt format of each task, with the anchor that its rows are trained with."""
    tokenizer = session.model.tokenizer
    return {
        name: encode.make_format(tokenizer, anchor) for name, anchor in plan.train_anchors.items()
    }


def _generate_answers(
    session: Session, plan: ArmPlan, inputs: Sequence[Input], label: str
) -> Iterator[tuple[int, str]]:
    """Give the place of each input, and the answer of the adapter that is on the model."""
    forms = _forms(session, plan)
    for task in plan.rows.tasks:
        form = forms[task.name]
        places = [k for k, (owner, _) in enumerate(inputs) if owner.name == task.name]
        prompts = [encode.prompt_ids(inputs[k][1].messages, form) for k in places]
        count = partial(session.progress.count, f"{label}, answers to {task.name}")
        answers = generate.generate(
            session.model,
            prompts,
            form,
            max_new_tokens=task.max_new_tokens,
            batch_tokens=session.settings.eval.batch_tokens,
            progress=after(0, len(places), count),
        )
        yield from zip(places, answers, strict=True)


def _total_losses(
    session: Session,
    plan: ArmPlan,
    inputs: Sequence[Input],
    candidates: Sequence[tuple[int, str]],
    adapters: tuple[Sequence[State], TrainSettings],
) -> list[float]:
    """Return the loss of each candidate answer (place of its input, text), summed over adapters."""
    if not candidates:
        return []
    forms = _forms(session, plan)
    tokens = []
    for place, answer in candidates:
        task, row = inputs[place]
        tokens.append(encode.final_answer(_with_answer(row, answer), forms[task.name]))
    losses = np.zeros(len(candidates))
    states, train_settings = adapters
    for state in states:
        adapter.use(session.model, state, train_settings)
        losses += generate.nats(session.model, tokens)[0]
    return losses.tolist()


def _choose_likeliest(
    inputs: Sequence[Input], candidates: Sequence[tuple[int, str]], losses: Sequence[float]
) -> list[Example]:
    """Return the inputs that have candidate answers, each with the one of least loss."""
    best: dict[int, tuple[float, str]] = {}
    for (place, answer), loss in zip(candidates, losses, strict=True):
        if place not in best or loss < best[place][0]:
            best[place] = loss, answer
    return [_with_answer(inputs[place][1], best[place][1]) for place in sorted(best)]


def _ask_teacher(session: Session, inputs: Sequence[Input]) -> tuple[list[Example], str]:
    """Return the inputs with the teacher's answers, and a description of who answered.

    Each input is sent once for all seeds. Answers are stored as they come, for a killed run.
    """
    teacher = session.settings.teacher
    assert teacher is not None  # chosen_arms refuses the arm without one
    endpoint = Endpoint(teacher.endpoint, teacher.model, os.environ.get(teacher.key_variable))
    file = None if session.kept is None else session.kept / store.MADE / "teacher.json"
    known: dict[str, str] = {}
    if file is not None and file.exists():
        known = store.read_json(file)

    def ask(pair: Input) -> str:
        messages = _teacher_prompt(teacher, pair)
        seed = session.settings.seed
        return endpoint.say(messages, pair[0].max_new_tokens, 0.0, seed) or ""

    missing = [pair for pair in inputs if _teacher_key(teacher, pair) not in known]
    with ThreadPoolExecutor(WORKERS) as threads:
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            for pair, answer in zip(part, threads.map(ask, part), strict=True):
                known[_teacher_key(teacher, pair)] = answer
            if file is not None:
                store.write_json(file, known)
            session.progress.count(f"answers of {teacher.model}", start + len(part), len(missing))
    answered = []
    refused = 0
    for pair in inputs:
        answer = known[_teacher_key(teacher, pair)]
        if filters.refuses(answer):
            refused += 1
        elif answer:
            answered.append(_with_answer(pair[1], answer))
    how = f"{teacher.model!r} at {teacher.endpoint}"
    if refused:
        how += f" ({refused} refusals skipped)"
    return answered, how


def _teacher_prompt(teacher: TeacherSettings, pair: Input) -> list[Message]:
    """Return what the teacher is sent: the input after its instruction or the task's anchor."""
    task, row = pair
    instruction = teacher.instruction or (task.anchor.text if task.anchor else "")
    if instruction and row.messages[0].role != "system":
        return [Message("system", instruction), *row.messages]
    return list(row.messages)


def _teacher_key(teacher: TeacherSettings, pair: Input) -> str:
    """Return the key under which the answer to an input is stored."""
    messages = _teacher_prompt(teacher, pair)
    return store.fingerprint([teacher.endpoint, teacher.model, pair[0].max_new_tokens, *messages])
