"""General rows that the base model makes itself: its own answers to the pool's prompts, or questions and answers from nothing.

What they bring is not transfer from other data: the model knew it. Own answers hold the model where it is (a placebo for the
pool's answers); rows from nothing need no pool at all (as in Magpie, arXiv 2406.08464: the chat template's opening of a user's
turn is continued by sampling).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fulcrum import adapter, encode, generate, selfgen, store
from fulcrum.config import Arm, Settings
from fulcrum.errors import ConfigError, StoreError
from fulcrum.material import Material
from fulcrum.model import LoadedModel
from fulcrum.records import Example, Message

ANSWER_TOKENS = 64  # most; what is longer ends there

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
            file = None if folder is None else folder / store.MADE / f"{arm.name}-seed{seed}.json"
            made = read_rows(file)[1] if file is not None and file.exists() else None
            if made is None:
                adapter.drop_adapter(loaded)
                budget = settings.eval.batch_tokens
                if arm.general == "own_answers":
                    made = own_answers(loaded, material.own_general.get(arm.name, material.general), budget, count)
                else:
                    made = from_nothing(loaded, arm, material, seed, budget, folder, count)
                if file is not None:
                    store.write_json(file, {"note": "", "rows": [store.plain(row) for row in made]})
            asked = arm.general_rows or len(material.own_general.get(arm.name, material.general))
            few = [f"{arm.name}: the model made {len(made)} of {asked} general rows"] if len(made) < asked else []
            own = {**found[seed].own_general, arm.name: made}
            found[seed] = replace(found[seed], own_general=own, notes=(*found[seed].notes, *few))
    return found


def read_rows(file: Path) -> tuple[str, tuple[Example, ...]]:
    """A note on rows that were made, and the rows. Raises StoreError."""
    try:
        content = store.read_json(file)
        return str(content["note"]), tuple(
            Example(tuple(Message(**message) for message in row["messages"]), row["group"], row["origin"])
            for row in content["rows"]
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


def from_nothing(
    loaded: LoadedModel, arm: Arm, rows: Material, seed: int, batch_tokens: int, folder: Path | None, count: Count
) -> tuple[Example, ...]:
    """As many rows as the run's mixtures hold. Raises ConfigError where the model makes none."""
    wanted = arm.general_rows or len(rows.general) or rows.general_count(max(rows.repeats))
    place = None if folder is None else folder / store.MADE / f"{arm.name}-seed{seed}"
    recipe = selfgen.Recipe(wanted, store.seed_for(seed, "self made"))
    found, left_out = selfgen.made(selfgen.OfModel(loaded, batch_tokens), recipe, place, count)
    if not found:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise ConfigError(f"{arm.name}: {loaded.name!r} made no usable row ({reasons}); leave this arm out")
    return found
