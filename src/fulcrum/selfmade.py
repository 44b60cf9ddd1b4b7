"""General rows that the base model makes itself: its own answers to the pool's prompts, or
questions and answers from nothing.

What they bring is not transfer from other data: the model knew it. Own answers hold the model where
it is (a placebo for the pool's answers); rows from nothing need no pool at all (as in Magpie, arXiv
2406.08464: the chat template's opening of a user's turn is continued by sampling).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fulcrum import adapter, encode, generate, selfgen, store
from fulcrum.cell import Session
from fulcrum.config import Arm
from fulcrum.errors import ConfigError, StoreError
from fulcrum.material import RunData
from fulcrum.model import LoadedModel
from fulcrum.progress import Count, after
from fulcrum.records import Example, Message

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
