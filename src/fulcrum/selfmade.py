"""General rows that the base model makes itself: its own answers to the pool's prompts, or questions and answers from nothing.

What they bring is not transfer from other data: the model knew it. Own answers hold the model where it is (a placebo for the
pool's answers); rows from nothing need no pool at all (as in Magpie, arXiv 2406.08464: the chat template's opening of a user's
turn is continued by sampling).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fulcrum import adapter, encode, generate, store
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError, StoreError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import Example, Message
from fulcrum.rows import content_key

QUESTION_TOKENS, ANSWER_TOKENS = 48, 64  # most; what is longer ends there
_ROUNDS = 6  # of sampling, until there are enough different questions

Count = Callable[[int, int], None]


def with_made_rows(
    rows: Mapping[int, Material], loaded: LoadedModel, arms: Sequence[Arm], settings: Settings, folder: Path | None,
    count: Count,
) -> dict[int, Material]:  # fmt: skip
    """The rows of every seed with those that arms need and the model made; kept in the folder, and read back when resumed."""
    found = dict(rows)
    for arm in arms:
        if arm.general not in ("own_answers", "self_made"):
            continue
        for seed, material in rows.items():
            file = None if folder is None else folder / "general" / f"{arm.name}-seed{seed}.json"
            made = _read(file) if file is not None and file.exists() else None
            if made is None:
                adapter.drop_adapter(loaded)
                budget = settings.eval.batch_tokens
                if arm.general == "own_answers":
                    made = own_answers(loaded, material.own_general.get(arm.name, material.general), budget, count)
                else:
                    wanted = len(material.general) or material.general_count(max(material.repeats))
                    made = from_nothing(loaded, wanted, store.seed_for(seed, "self made"), budget, count)
                if file is not None:
                    store.write_json(file, [store.plain(row) for row in made])
            asked = len(material.own_general.get(arm.name, material.general))
            few = [f"{arm.name}: the model made {len(made)} of {asked} general rows"] if len(made) < asked else []
            own = {**found[seed].own_general, arm.name: made}
            found[seed] = replace(found[seed], own_general=own, notes=(*found[seed].notes, *few))
    return found


def _read(file: Path) -> tuple[Example, ...]:
    try:
        return tuple(
            Example(tuple(Message(**message) for message in row["messages"]), row["group"], row["origin"])
            for row in store.read_json(file)
        )
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file}: not the rows that were made, the file was changed or damaged; delete it") from error


def own_answers(loaded: LoadedModel, rows: Sequence[Example], batch_tokens: int, count: Count) -> tuple[Example, ...]:
    """The rows with the model's own greedy answers; those that it answers with nothing are left out."""
    form = encode.make_format(loaded.tokenizer, None)
    prompts = [encode.prompt_ids(row.prompt, form) for row in rows]
    answers = generate.generate(
        loaded, prompts, form, max_new_tokens=ANSWER_TOKENS, batch_tokens=batch_tokens,
        progress=lambda done: count(done, len(prompts)),
    )  # fmt: skip
    return tuple(
        replace(row, messages=(*row.prompt, replace(row.messages[-1], content=answer)))
        for row, answer in zip(rows, answers, strict=True)
        if answer
    )


def from_nothing(loaded: LoadedModel, wanted: int, seed: int, batch_tokens: int, count: Count) -> tuple[Example, ...]:
    """At most `wanted` different questions, sampled, with greedy answers. Raises ConfigError where the model asks nothing."""
    form = encode.make_format(loaded.tokenizer, None)
    opening = encode.opening_ids(form)
    if not opening:
        raise ConfigError(
            f"selfgen: the chat template of {loaded.name!r} opens no user's turn to go on from; leave this arm out"
        )
    asked: dict[str, Example] = {}
    for attempt in range(_ROUNDS):
        if len(asked) >= wanted:
            break
        questions = generate.generate(
            loaded, [opening] * (wanted - len(asked)), form, max_new_tokens=QUESTION_TOKENS, batch_tokens=batch_tokens,
            sample=store.seed_for(seed, f"questions {attempt}"),
        )  # fmt: skip
        for text in filter(None, questions):
            row = Example((Message("user", text), Message("assistant", "")), f"made {len(asked)}", f"made:{len(asked)}")
            asked.setdefault(content_key(row), row)
    rows = own_answers(loaded, list(asked.values())[:wanted], batch_tokens, count)
    if not rows:
        raise ConfigError(f"selfgen: {loaded.name!r} made no question that it answers; leave this arm out")
    return rows
