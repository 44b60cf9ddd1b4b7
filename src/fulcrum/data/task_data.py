"""Sources -> Examples and reasoned rejects; then splits, subsets and checks by content.

Content is what `Example.group` names: rows of equal groups are never put on two sides of a split. The order in which groups are
drawn is that of a hash of (purpose, seed, group), so it depends neither on the order of the rows nor on which other groups
there are.

Invariant: rows in = kept + rejected.

Labelled rows: files -> tasks, split by content, short enough, as many as asked for.

Needs a tokenizer (to know how long a row is) and no model. Invariant: no training row's content stands among dev or test rows,
of its own task or another.
"""

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest

import numpy as np

from fulcrum.config.base import DataSource
from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.store import seed_for
from fulcrum.core.types import Anchor, Example, Reject, Task
from fulcrum.data import encode, filters
from fulcrum.data.formats import content_key, digest
from fulcrum.data.readers import open_tables
from fulcrum.stats import metrics


def read(
    sources: Sequence[DataSource], *, group: str | None = None, seed: int = 0, answered: bool = True
) -> tuple[list[Example], list[Reject]]:
    """Read all rows of the sources, in order: every row is in exactly one of the two lists returned.

    `group` names the column whose equal values belong together; without it a column called ``group`` is used, else a hash of
    the prompt's text. A source's `limit` draws rows by `seed` (they stay in file order). A later row with the same normalised
    texts as an earlier one is rejected as ``duplicate``. Rows that are not `answered` are inputs: they end with the user's
    message. Raises DataError for missing, empty or broken files and wrong columns.
    """
    examples: list[Example] = []
    rejects: list[Reject] = []
    first: dict[str, str] = {}
    for place, source in enumerate(sources):
        tables = open_tables(source, group=group, answered=answered)
        for table, ids in zip(
            tables, draw([table.size for table in tables], source.limit, (seed, place)), strict=True
        ):
            for row in (table[int(index)] for index in ids):
                if isinstance(row, Reject):
                    rejects.append(row)
                elif (key := content_key(row)) in first:
                    rejects.append(Reject(row.origin, "duplicate", f"same as {first[key]}"))
                else:
                    first[key] = row.origin
                    examples.append(row)
    return examples, rejects


def draw(sizes: Sequence[int], limit: int | None, key: tuple[int, ...]) -> list[Sequence[int]]:
    """Draw `limit` rows of tables with these sizes, seeded by `key`: ascending row ids for each table, nested in `limit`."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return [range(size) for size in sizes]
    chosen = np.sort(np.random.default_rng(key).permutation(total)[:limit]).astype(np.int64)
    ends = list(accumulate(sizes))
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [
        (part - (end - size)).tolist() for part, end, size in zip(parts, ends, sizes, strict=True)
    ]


def require_rows(examples: Sequence[Example], rejects: Sequence[Reject], minimum: int = 2) -> None:
    """Raise DataError, counting the rejects by reason, where fewer than `minimum` rows are usable."""
    if len(examples) >= minimum:
        return
    files = sorted(
        {
            origin.rpartition(":")[0]
            for origin in [e.origin for e in examples] + [r.origin for r in rejects]
        }
    )
    counts = Counter(reject.reason for reject in rejects).most_common()
    reasons = (
        f"; rejected: {', '.join(f'{count} {reason}' for reason, count in counts)}"
        if rejects
        else ""
    )
    first = f" (first: {rejects[0].origin} {rejects[0].detail})" if rejects else ""
    raise DataError(
        f"{', '.join(files) or 'no source'}: {len(examples)} usable of {len(examples) + len(rejects)} rows read, "
        f"at least {minimum} are needed{reasons}{first}; add rows or mend these"
    )


def _seeded_groups(
    examples: Sequence[Example], purpose: str, seed: int
) -> dict[str, list[Example]]:
    """Rows by group, groups in seeded order, rows of a group in the order given."""
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.group, []).append(example)
    order = sorted(
        members, key=lambda group: hashlib.sha256(f"{purpose}\0{seed}\0{group}".encode()).digest()
    )
    return {group: members[group] for group in order}


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out `share` (in (0, 1)) of the groups, at least one and never all: returns (rest, held out), in the order given.

    Raises DataError where there are fewer than two groups.
    """
    groups = list(_seeded_groups(examples, "split", seed))
    _require_two(examples, groups)
    held = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    return [e for e in examples if e.group not in held], [e for e in examples if e.group in held]


def fold(
    examples: Sequence[Example], number: int, count: int
) -> tuple[list[Example], list[Example]]:
    """Hold out the groups of one of `count` folds (fewer, where there are fewer groups): returns (rest, held out), in the
    order given. Every group is in one fold; the largest are dealt out first, each to the fold that has fewest rows.

    Raises DataError where there are fewer than two groups, or fewer than the fold's number says.
    """
    from sklearn.model_selection import GroupKFold

    groups = _seeded_groups(examples, "split", 0)
    _require_two(examples, list(groups))
    if number >= len(groups):
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s): without a test file each of {count} seeds holds out other "
            f"groups; use at most {len(groups)} seeds, give a `test:` file, or name another column with `group:`"
        )
    place = {group: k for k, group in enumerate(groups)}
    folds = GroupKFold(min(count, len(groups))).split(
        examples, groups=[place[e.group] for e in examples]
    )
    rest, held = next(itertools.islice(folds, number, None))
    return [examples[k] for k in rest], [examples[k] for k in held]


def _require_two(examples: Sequence[Example], groups: Sequence[str]) -> None:
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s) cannot be split by content: two groups are needed; "
            "give `dev:` and `test:` files, add rows with other content, or name another column with `group:`"
        )


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return `limit` rows (all, where there are fewer): the first ones of a single seeded order.

    The order takes one row of every group, then a second one of those that have it, and so on: few rows still cover as many
    groups as they can. Subsets are nested: a smaller one is the beginning of a larger one.
    """
    rounds = zip_longest(*_seeded_groups(examples, "subset", seed).values())
    return [example for row in rounds for example in row if example is not None][:limit]


def check_overlap(
    train: Sequence[Example],
    held_out: Sequence[Example],
    name: str,
    *,
    of: str = "training",
    by_group: bool = True,
) -> None:
    """Refuse held-out rows (`name`: dev or test) whose content is in `train` (`of`: its name). Raises DataError with places.

    Content is the same where the normalised prompt is the same (its turns in one text, the system's included), or prompt and
    answer together, or, with `by_group`, the group. Switch `by_group` off where group values were not meant to be compared
    between files, as where each file numbers its groups from 0.
    """

    def keys(example: Example) -> list[str]:
        texts = [message.content for message in example.messages]
        found = ["prompt " + digest(" ".join(texts[:-1])), "text " + digest(" ".join(texts))]
        return [*found, "group " + example.group] if by_group else found

    known = {key: example.origin for example in reversed(train) for key in keys(example)}
    hits = [(row, next((key for key in keys(row) if key in known), None)) for row in held_out]
    shared = [(row, key) for row, key in hits if key is not None]
    if shared:
        kinds = Counter(key.split()[0] for _, key in shared)
        pairs = ", ".join(f"{row.origin} = {known[key]}" for row, key in shared[:3])
        raise DataError(
            f"{len(shared)} of {len(held_out)} {name} rows have content of the {of} rows "
            f"({', '.join(f'{count} the same {kind}' for kind, count in kinds.items())}): {pairs}"
            f"{' ...' if len(shared) > 3 else ''}; remove them from one side, "
            f"or leave `{name}:` out, and rows are held out by content"
            + (
                "; if group values restart in every file, make them unique"
                if kinds["group"]
                else ""
            )
        )


ANCHOR_TOKENS = 64  # beyond which an anchor is long
_BLOCK = 4096  # rows that are encoded together


def read_tasks(
    settings: TaskSettings, seed: int, outer: tuple[int, int] | None = None, near: float = 0.0
) -> tuple[Task, list[Reject]]:
    """Read one task whole and split it by content: files, and hold-outs where dev or test are not given (the same for every
    seed; `seed` draws the rows that a source's own `limit` leaves). With `outer`, the number of a fold and how many there are,
    that fold is the test rows that are not given. Unlabelled inputs that a row asks too, or that are at least `near` (above 0)
    like a dev or test row's, are left out.

    Raises DataError where rows are missing, unusable, or stand on two sides.
    """
    metrics.needs_generation(settings.metrics)  # unknown names are refused before anything is read
    by_group = (
        settings.group is not None
    )  # files that number their groups from 0 each do not mean the same groups
    train, rejects = read(settings.train, group=settings.group, seed=seed)
    require_rows(train, rejects, minimum=2)
    parts: dict[str, list[Example]] = {}
    for name, sources, part_of_train in (("test", settings.test, 0.25), ("dev", settings.dev, 0.2)):
        if sources:
            parts[name], refused = read(sources, group=settings.group, seed=seed)
            require_rows(parts[name], refused, minimum=1)
            rejects += refused
            check_overlap(train, parts[name], name, by_group=by_group)
        elif name == "test" and outer is not None:
            train, parts[name] = fold(train, *outer)
        else:
            train, parts[name] = split(train, part_of_train, seed=0)
    check_overlap(parts["dev"], parts["test"], "test", of="dev", by_group=by_group)
    unlabeled, refused = _unlabeled(settings, seed, train, [*parts["dev"], *parts["test"]], near)
    return Task(
        settings.name, tuple(train), tuple(parts["dev"]), tuple(parts["test"]),
        settings.anchor_value(), settings.metrics, settings.max_new_tokens, unlabeled,
    ), rejects + refused  # fmt: skip


def _unlabeled(
    settings: TaskSettings,
    seed: int,
    train: Sequence[Example],
    held_out: Sequence[Example],
    near: float,
) -> tuple[tuple[Example, ...], list[Reject]]:
    """The inputs without answers, and those not used: no arm may learn the answers that another gives to test rows."""
    if not settings.unlabeled:
        return (), []
    found, rejects = read(settings.unlabeled, seed=seed, answered=False)
    require_rows(found, rejects, minimum=1)
    asked = filters.TaskText([[replace(row, messages=row.prompt) for row in held_out]], near)
    labelled = {said for row in train if (said := _question(row))}
    kept = []
    for row in found:
        refused = (
            Reject(row.origin, "labelled already", row.question)
            if _question(row) in labelled
            else asked.shared(row)
        )
        if refused is None:
            kept.append(row)
        else:
            rejects.append(replace(refused, reason=f"unlabeled: {refused.reason}"))
    if not kept:
        reason, count = Counter(reject.reason for reject in rejects).most_common(1)[0]
        raise DataError(
            f"task.unlabeled: none of {len(rejects):,} inputs is left, mostly since: {reason} ({count:,}); give inputs that "
            "are not asked in labelled, dev or test rows"
        )
    return tuple(kept), rejects


def _question(row: Example) -> str:
    """What a row's user says, in words: the same question with another system text, or other punctuation, is the same."""
    return " ".join(
        word
        for message in row.messages
        if message.role == "user"
        for word in filters.words(message.content)
    )


def check_anchor(
    anchor: Anchor, task: Task, settings: Settings, tokenizer: encode.Tokenizer, where: str
) -> list[str]:
    """What to know of an anchor on a task's rows. `where` names the setting that gave it.

    Raises ConfigError where it holds a special token, leaves no room for a row, stands in most rows already, or takes a part
    of the answers that the metrics would miss.
    """
    plain, text = encode.make_format(tokenizer, None), anchor.text.strip()
    if found := plain.special.search(anchor.text):
        raise ConfigError(
            f"{where}: holds {found.group()!r}, a special token of the model; write it without"
        )
    rows = (*task.train, *task.dev, *task.test)
    at_answer = anchor.placement == "response_prefix"
    holding = [
        row for row in rows
        if (row.answer.lstrip().startswith(text) if at_answer else any(text in message.content for message in row.prompt))
    ]  # fmt: skip
    held = "begin their answers with" if at_answer else "hold"
    told = f"{len(holding):,} of {task.name}'s {len(rows):,} rows {held} its text"
    if 2 * len(holding) >= len(rows):
        raise ConfigError(
            f"{where}: {told} already ({holding[0].origin}), and would have it twice; take it out of them, or out"
        )
    if (
        at_answer
        and set(task.metrics) & {"json_valid", "json_fields"}
        and any(mark in text for mark in "{[")
    ):
        raise ConfigError(
            f"{where}: begins the JSON of the answers, which json_valid and json_fields would judge without it; use a prefix "
            "without brackets, or another placement"
        )
    length = len(
        plain.tokenizer(anchor.text, add_special_tokens=False, split_special_tokens=False)[
            "input_ids"
        ]
    )
    if length >= settings.train.max_length:
        raise ConfigError(
            f"{where}: of {length:,} tokens, train.max_length ({settings.train.max_length:,}) leaves no room"
        )
    notes = [f"{where}: {told}; there it stands twice"] if holding else []
    if length > ANCHOR_TOKENS:
        notes.append(
            f"{where}: {length:,} tokens, which every row of {task.name} pays for; 8 to {ANCHOR_TOKENS} are usual"
        )
    return notes


def check_answers(task: Task, tokenizer: encode.Tokenizer) -> list[str]:
    """What to say of test rows whose answers cannot be given within `max_new_tokens`: they are wrong, whatever is learned."""
    if not metrics.needs_generation(task.metrics):
        return []
    form = encode.make_format(tokenizer, None)
    lengths = [encode.answer_length(row, form) - len(form.end_ids) for row in task.test]
    cut = [length for length in lengths if length > task.max_new_tokens]
    if not cut:
        return []
    return [
        f"{task.name}: {len(cut):,} of {len(lengths):,} test answers are longer than max_new_tokens ({task.max_new_tokens}), "
        f"so that none generated can equal them; set task.max_new_tokens to {max(cut)} or more"
    ]


def check_between(tasks: Sequence[Task]) -> None:
    """Tasks share one adapter: what one trains on must not be what another is scored on."""
    for task in tasks:
        for other in tasks:
            if other is not task:
                for name, rows in (("dev", other.dev), ("test", other.test)):
                    check_overlap(
                        task.train,
                        rows,
                        f"{other.name} {name}",
                        of=f"{task.name} training",
                        by_group=False,
                    )


def longest(settings: Settings, context: int | None) -> int:
    """Tokens that a training row may have."""
    return min(settings.train.max_length, context or settings.train.max_length)


def limited(
    task: Task,
    limits: TaskSettings,
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seed: int,
) -> tuple[Task, list[Reject]]:
    """The rows of a task that a run uses: short enough, then as many as its limits say, in seeded nested order.

    Training and dev rows follow `too_long`; test rows are bounded by the model's context only.
    """
    form = encode.make_format(tokenizer, task.anchor)
    rejects: list[Reject] = []
    parts: dict[str, tuple[Example, ...]] = {}
    for name, rows, wanted, order in (
        ("train", task.train, limits.train_limit, seed_for(seed, "data")),
        ("dev", task.dev, limits.dev_limit, 0),
        ("test", task.test, limits.test_limit, 0),
    ):
        limit = longest(settings, context) if name != "test" else context or sys.maxsize
        answer_room = (
            task.max_new_tokens if name == "test" and metrics.needs_generation(task.metrics) else 0
        )
        kept, over = fitting(
            subset(rows, len(rows), order), form, limit, wanted or len(rows), answer_room
        )
        minimum = 2 if name == "train" else 1
        if over and (settings.train.too_long == "error" or len(kept) < minimum):
            example, length = max(over, key=lambda pair: pair[1])
            raise DataError(
                f"{example.origin}: {name} row of {length} tokens is over the limit of {limit} ({len(over)} of "
                f"{len(over) + len(kept)} rows are); set train.max_length to {length} or more (the model's context is "
                f"{context}), or shorten them"
            )
        parts[name] = tuple(kept)
        rejects += [
            Reject(e.origin, f"{name}: over {limit} tokens (train.too_long: drop)", f"{n} tokens")
            for e, n in over
        ]
    inputs = []
    for row in subset(task.unlabeled, len(task.unlabeled), seed_for(seed, "unlabeled")):
        length = len(encode.prompt_ids(row.messages, form)) + task.max_new_tokens
        if length <= longest(settings, context):
            inputs.append(row)
        else:
            rejects.append(
                Reject(
                    row.origin,
                    f"unlabeled: over {longest(settings, context)} tokens with its answer",
                    f"{length}",
                )
            )
    return replace(
        task, train=parts["train"], dev=parts["dev"], test=parts["test"], unlabeled=tuple(inputs)
    ), rejects


def fitting(
    examples: Sequence[Example], form: encode.Format, limit: int, wanted: int, answer_room: int
) -> tuple[list[Example], list[tuple[Example, int]]]:
    """The first `wanted` examples of at most `limit` tokens, and the longer ones met on the way with their lengths.

    `answer_room`: tokens that a generated answer may need beside the prompt.
    """
    kept: list[Example] = []
    over: list[tuple[Example, int]] = []
    for place, example in enumerate(examples):
        if len(kept) == wanted:
            break
        if place % _BLOCK == 0:
            block = examples[place : place + min(_BLOCK, wanted - len(kept))]
            encode.encode_ahead(
                [encode.scored(row) for row in block] if answer_room else block, form
            )
        tokens = encode.final_answer(example, form) if answer_room else encode.encode(example, form)
        length = max(len(tokens), len(tokens) - tokens.n_loss + answer_room)
        if length > limit:
            over.append((example, length))
        else:
            kept.append(example)
    return kept, over


def last_trained(example: Example) -> Example:
    """The row with the last of its trained answers as the only one."""
    trained = [
        place
        for place, message in enumerate(example.messages)
        if message.role == "assistant" and message.train
    ]
    messages = (
        replace(m, train=m.train and place in trained[-1:])
        for place, m in enumerate(example.messages)
    )
    return replace(example, messages=tuple(messages))


def joined(task: Task, seed: int) -> Task:
    """The task with its dev rows among the training rows, in an order drawn by seed."""
    rows = (*task.train, *task.dev)
    order = np.random.default_rng(seed_for(seed, "sizes")).permutation(len(rows))
    return replace(task, train=tuple(rows[k] for k in order), dev=())


def folds(task: Task, count: int, seed: int) -> list[Task]:
    """Cut the training rows `count` times into rows to train on and dev rows, by content group; each is a dev row once. Fewer
    groups are fewer folds. Raises DataError where there is a single group.
    """
    from sklearn.model_selection import GroupKFold

    groups = [row.group for row in task.train]
    count = min(count, len(set(groups)))
    if count < 2:
        raise DataError(
            f"{task.name}: its {len(groups)} rows are one content group ({groups[0]!r:.60}), so none can be set apart to "
            "choose settings by; name another column in task.group, or use more rows"
        )
    cuts = GroupKFold(count, shuffle=True, random_state=seed).split(groups, groups=groups)
    return [
        replace(
            task, train=tuple(task.train[k] for k in own), dev=tuple(task.train[k] for k in dev)
        )
        for own, dev in cuts
    ]
