"""Read labelled task rows and split them by content into train, dev and test rows of a `Task`.

Rows whose `Example.group` is equal have the same content and never land on two sides of a split.
Groups are drawn in the order of a hash of (purpose, seed, group), so a draw depends neither on the
order of the rows nor on which other groups exist. Row lengths need a tokenizer; no model is loaded.

Invariants: rows read = rows kept + rejects. No training row has the content of a dev or test row,
of its own task or of another.
"""

import hashlib
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fulcrum.config.base import DataSource
from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.store import seed_for
from fulcrum.core.types import Anchor, Example, Reject, Task
from fulcrum.data import encode, filters
from fulcrum.data.formats import content_key, digest, unread_note
from fulcrum.data.readers import BUILTIN, open_tables
from fulcrum.stats import metrics

_TEST_SHARE = 0.25  # of the training groups, if a task names no test files
_DEV_SHARE = 0.2  # of the groups that are left, if it names no dev files
_LONG_ANCHOR = 64  # tokens
_BLOCK = 4096  # rows that are encoded together
_ASKING = ("system", "user")
_SHOWN = 3  # pairs of overlapping rows that an error names


class ReadRows(NamedTuple):
    """Rows of sources; each is in exactly one of the two lists."""

    examples: list[Example]
    rejects: list[Reject]
    notes: list[str]  # columns and keys that are not read, counted for each file


def read(
    sources: Sequence[DataSource], *, group: str | None = None, seed: int = 0, answered: bool = True
) -> tuple[list[Example], list[Reject]]:
    """Read all rows of the sources, in order; each row is in exactly one of the two lists returned.

    What rows hold and is not read is said by a warning for each file. Otherwise as `read_rows`.
    """
    rows = read_rows(sources, group=group, seed=seed, answered=answered)
    for note in rows.notes:
        warnings.warn(note, stacklevel=2)
    return rows.examples, rows.rejects


def read_rows(
    sources: Sequence[DataSource], *, group: str | None = None, seed: int = 0, answered: bool = True
) -> ReadRows:
    """Read all rows of the sources, in order.

    `group` names the column whose equal values belong together. Without it rows with the same
    prompt do. A source's `limit` draws rows by `seed`
    (they stay in file order). A row with the same normalised texts as an earlier one is rejected as
    ``duplicate``. If rows are not `answered`, they are inputs that end with the user's message.
    Raises DataError for missing, empty or broken files and for columns that fit no format.
    """
    examples: list[Example] = []
    rejects: list[Reject] = []
    notes: list[str] = []
    first_origin: dict[str, str] = {}  # content key -> origin
    for place, source in enumerate(sources):
        tables = open_tables(source, group=group, answered=answered)
        drawn = _draw_rows([table.size for table in tables], source.limit, (seed, place))
        for table, ids in zip(tables, drawn, strict=True):
            for index in ids:
                row = table[index]
                if isinstance(row, Reject):
                    rejects.append(row)
                    continue
                key = content_key(row)
                if key in first_origin:
                    rejects.append(Reject(row.origin, "duplicate", f"same as {first_origin[key]}"))
                    continue
                first_origin[key] = row.origin
                examples.append(row)
            if table.unread and source.path not in BUILTIN:
                notes.append(unread_note(table.name, table.unread, len(ids)))
    return ReadRows(examples, rejects, notes)


def require_rows(examples: Sequence[Example], rejects: Sequence[Reject], minimum: int = 2) -> None:
    """Raise DataError, counting the rejects by reason, if fewer than `minimum` rows are usable."""
    if len(examples) >= minimum:
        return
    origins = [row.origin for row in examples]
    origins += [reject.origin for reject in rejects]
    files = ", ".join(sorted({origin.rpartition(":")[0] for origin in origins}))
    why = ""
    if rejects:
        first = rejects[0]
        reasons = ", ".join(f"{count} {reason}" for reason, count in _count_reasons(rejects))
        why = f"; rejected: {reasons} (first: {first.origin} {first.detail})"
    raise DataError(
        f"{files or 'no source'}: {len(examples)} usable of {len(origins)} rows read, "
        f"at least {minimum} are needed{why}; add rows or mend these"
    )


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (rest, held out): `share` (in (0, 1)) of the groups is held out.

    At least one group is held out, never all. Rows stay in the order given. Raises DataError if
    there are fewer than two groups.
    """
    groups = list(_seeded_groups(examples, "split", seed))
    _require_two(examples, groups)
    count = min(max(round(share * len(groups)), 1), len(groups) - 1)
    held_groups = set(groups[:count])
    rest: list[Example] = []
    held: list[Example] = []
    for example in examples:
        side = held if example.group in held_groups else rest
        side.append(example)
    return rest, held


def fold(
    examples: Sequence[Example], number: int, count: int
) -> tuple[list[Example], list[Example]]:
    """Return (rest, held out): the groups of fold `number` of `count` are held out.

    There are fewer folds if there are fewer groups. Every group is in one fold; the largest groups
    are dealt out first, each to the fold that has fewest rows. Rows stay in the order given. Raises
    DataError if there are fewer than two groups, or no more groups than `number`.
    """
    from sklearn.model_selection import GroupKFold

    groups = list(_seeded_groups(examples, "split", 0))
    _require_two(examples, groups)
    if number >= len(groups):
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s): without a test file each of {count} "
            f"seeds holds out other groups; use at most {len(groups)} seeds, give a `test:` file, "
            "or name another column with `group:`"
        )
    place_of = {group: place for place, group in enumerate(groups)}
    places = [place_of[example.group] for example in examples]
    cuts = GroupKFold(min(count, len(groups))).split(examples, groups=places)
    rest, held = next(itertools.islice(cuts, number, None))
    return _take(examples, rest), _take(examples, held)


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return the first `limit` rows of a single seeded order (all rows, if there are fewer).

    The order takes one row of every group, then a second one of those that have it, and so on: few
    rows still cover as many groups as they can. A smaller subset is the beginning of a larger one.
    """
    ordered: list[Example] = []
    groups = _seeded_groups(examples, "subset", seed).values()
    for round_of_rows in itertools.zip_longest(*groups):
        for row in round_of_rows:
            if row is not None:
                ordered.append(row)
    return ordered[:limit]


def check_overlap(
    train: Sequence[Example],
    held_out: Sequence[Example],
    name: str,
    *,
    of: str = "training",
    by_group: bool = True,
) -> None:
    """Raise DataError if held-out rows have content of `train`.

    The error calls the two `name` rows (dev or test) and `of` rows.

    Content is the same if the normalised prompt is the same (its turns as one text, the system's
    included), or prompt and answer together, or, with `by_group`, the group. Switch `by_group` off
    if group values are not comparable between files, as when each file numbers its groups from 0.
    """
    train_origin: dict[str, str] = {}  # content key -> the first row's origin
    for row in train:
        for key in _overlap_keys(row, by_group):
            train_origin.setdefault(key, row.origin)
    kinds: Counter[str] = Counter()
    pairs: list[str] = []
    for row in held_out:
        shared = [key for key in _overlap_keys(row, by_group) if key in train_origin]
        if shared:
            kinds[shared[0].split()[0]] += 1
            pairs.append(f"{row.origin} = {train_origin[shared[0]]}")
    if not pairs:
        return
    counts = ", ".join(f"{count} the same {kind}" for kind, count in kinds.items())
    shown = ", ".join(pairs[:_SHOWN])
    if len(pairs) > _SHOWN:
        shown += " ..."
    remedy = f"remove them from one side, or leave `{name}:` out, and rows are held out by content"
    if kinds["group"]:
        remedy += "; if group values restart in every file, make them unique"
    raise DataError(
        f"{len(pairs)} of {len(held_out)} {name} rows have content of the {of} rows "
        f"({counts}): {shown}; {remedy}"
    )


def check_between(tasks: Sequence[Task]) -> None:
    """Raise DataError if one task trains on what another is scored on: tasks share one adapter."""
    for task, other in itertools.permutations(tasks, 2):
        for name, rows in (("dev", other.dev), ("test", other.test)):
            check_overlap(
                task.train,
                rows,
                f"{other.name} {name}",
                of=f"{task.name} training",
                by_group=False,
            )


def read_task(
    settings: TaskSettings, seed: int, outer: tuple[int, int] | None = None, near: float = 0.0
) -> tuple[Task, list[Reject], list[str]]:
    """Read one task whole and split it by content; also return its rejects and what is not read.

    If the task names no test (dev) files, rows are held out of its training rows, the same for
    every seed; `seed` draws the rows that a source's own `limit` leaves. With `outer`, (number of a
    fold, count of folds), that fold becomes the test rows instead. Unlabelled inputs are rejected
    if a labelled row asks the same, or if they are at least `near` (above 0) like a dev or test
    row. Raises DataError if rows are missing, unusable, or on two sides.
    """
    metrics.needs_generation(settings.metrics)  # refuse unknown names before anything is read
    # Without a group column, files that each number their groups from 0 mean different groups.
    by_group = settings.group is not None
    train, rejects, notes = read_rows(settings.train, group=settings.group, seed=seed)
    require_rows(train, rejects, minimum=2)

    if settings.test:
        test, refused, unread = _read_held_out("test", settings.test, settings, seed, train)
        rejects += refused
        notes += unread
    elif outer is not None:
        train, test = fold(train, *outer)
    else:
        train, test = split(train, _TEST_SHARE, seed=0)

    if settings.dev:
        dev, refused, unread = _read_held_out("dev", settings.dev, settings, seed, train)
        rejects += refused
        notes += unread
    else:
        train, dev = split(train, _DEV_SHARE, seed=0)

    check_overlap(dev, test, "test", of="dev", by_group=by_group)
    unlabeled, refused, unread = _read_unlabeled(settings, seed, train, [*dev, *test], near)
    task = Task(
        name=settings.name,
        train=tuple(train),
        dev=tuple(dev),
        test=tuple(test),
        anchor=settings.anchor_value(),
        metrics=settings.metrics,
        max_new_tokens=settings.max_new_tokens,
        unlabeled=unlabeled,
    )
    return task, rejects + refused, notes + unread


def check_anchor(
    anchor: Anchor, task: Task, settings: Settings, tokenizer: encode.Tokenizer, where: str
) -> list[str]:
    """Return notes for the user on an anchor and a task's rows.

    `where` names the setting that gave the anchor. Raises ConfigError if the anchor holds a special
    token, leaves no room for a row, is in most rows already, or takes a part of the answers that
    the metrics would miss.
    """
    plain = encode.make_format(tokenizer, None)
    special = plain.special.search(anchor.text)
    if special is not None:
        raise ConfigError(
            f"{where}: holds {special.group()!r}, a special token of the model; write it without"
        )

    rows = (*task.train, *task.dev, *task.test)
    holding = [row for row in rows if _holds_anchor(row, anchor)]
    at_answer = anchor.placement == "response_prefix"
    held = "begin their answers with" if at_answer else "hold"
    count = f"{len(holding):,} of {task.name}'s {len(rows):,} rows {held} its text"
    if 2 * len(holding) >= len(rows):
        raise ConfigError(
            f"{where}: {count} already ({holding[0].origin}), and would have it twice; "
            "take it out of them, or out"
        )

    judges_json = not {"json_valid", "json_fields"}.isdisjoint(task.metrics)
    if at_answer and judges_json and not {"{", "["}.isdisjoint(anchor.text):
        raise ConfigError(
            f"{where}: begins the JSON of the answers, which json_valid and json_fields would "
            "judge without it; use a prefix without brackets, or another placement"
        )

    encoded = plain.tokenizer(anchor.text, add_special_tokens=False, split_special_tokens=False)
    length = len(encoded["input_ids"])
    limit = settings.train.max_length
    if length >= limit:
        raise ConfigError(
            f"{where}: of {length:,} tokens, train.max_length ({limit:,}) leaves no room"
        )

    notes = []
    if holding:
        notes.append(f"{where}: {count}; there it stands twice")
    if length > _LONG_ANCHOR:
        notes.append(
            f"{where}: {length:,} tokens, which every row of {task.name} pays for; "
            f"8 to {_LONG_ANCHOR} are usual"
        )
    return notes


def check_answers(task: Task, tokenizer: encode.Tokenizer) -> list[str]:
    """Return notes on answers that no model can give, or that teach nothing.

    Test answers may be longer than `max_new_tokens`, or hold what the tokenizer writes otherwise.
    """
    notes = []
    if len({row.answer.strip() for row in (*task.train, *task.dev)}) == 1:
        notes.append(
            f"{task.name}: all training answers are the same ({task.train[0].answer.strip()!r:.60})"
            ": there is nothing to learn or to compare"
        )
    if not metrics.needs_generation(task.metrics):
        return notes
    form = encode.make_format(tokenizer, None)
    changed = [row for row in task.test if encode.written_answer(row, form) != row.answer.strip()]
    if changed:
        notes.append(
            f"{task.name}: {len(changed):,} of {len(task.test):,} test answers are written "
            f"otherwise by the model's tokenizer ({changed[0].answer.strip()!r:.40} becomes "
            f"{encode.written_answer(changed[0], form)!r:.40}), so that no generated answer can "
            "equal them; write the rows in the tokenizer's form"
        )
    lengths = [encode.answer_length(row, form) - len(form.end_ids) for row in task.test]
    cut = [length for length in lengths if length > task.max_new_tokens]
    if cut:
        notes.append(
            f"{task.name}: {len(cut):,} of {len(lengths):,} test answers are longer than "
            f"max_new_tokens ({task.max_new_tokens}), so that none generated can equal them; "
            f"set task.max_new_tokens to {max(cut)} or more"
        )
    return notes


def check_turns(task: Task, tokenizer: encode.Tokenizer) -> list[str]:
    """Return notes on answers of earlier turns that the chat template changes."""
    form = encode.make_format(tokenizer, task.anchor)
    untrained = trimmed = 0
    for row in task.train:
        one, other = encode.changed_answers(row, form)
        untrained += one
        trimmed += other
    notes = []
    if untrained:
        notes.append(
            f"{task.name}: {untrained:,} answers of earlier turns are not trained, since the chat "
            "template rewrites earlier turns (as thoughts are dropped); for each, write a row that "
            "ends with it"
        )
    if trimmed:
        notes.append(
            f"{task.name}: {trimmed:,} answers of earlier turns are trained without white space "
            "around them, which the chat template trims"
        )
    return notes


def max_row_tokens(settings: Settings, context: int | None) -> int:
    """Return how many tokens a training row may have."""
    return min(settings.train.max_length, context or settings.train.max_length)


def apply_limits(
    task: Task,
    limits: TaskSettings,
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seed: int,
) -> tuple[Task, list[Reject]]:
    """Return the task with the rows that a run uses, and the rows that are too long.

    Rows are taken in a seeded, nested order until a limit is full. `too_long` decides about
    training and dev rows; test rows are bounded by the model's context only. Raises DataError if
    rows are too long and may not be dropped, or if too few are left.
    """
    form = encode.make_format(tokenizer, task.anchor)
    row_limit = max_row_tokens(settings, context)
    rejects: list[Reject] = []
    parts: dict[str, tuple[Example, ...]] = {}
    for name, rows, wanted, order_seed in (
        ("train", task.train, limits.train_limit, seed_for(seed, "data")),
        ("dev", task.dev, limits.dev_limit, 0),
        ("test", task.test, limits.test_limit, 0),
    ):
        limit = row_limit
        answer_room = 0
        if name == "test":
            limit = context or sys.maxsize
            if metrics.needs_generation(task.metrics):
                answer_room = task.max_new_tokens
        ordered = subset(rows, len(rows), order_seed)
        kept, over = take_fitting(ordered, form, limit, wanted or len(rows), answer_room)
        minimum = 2 if name == "train" else 1
        if over and (settings.train.too_long == "error" or len(kept) < minimum):
            example, length = max(over, key=lambda pair: pair[1])
            raise DataError(
                f"{example.origin}: {name} row of {length} tokens is over the limit of {limit} "
                f"({len(over)} of {len(over) + len(kept)} rows are); set train.max_length to "
                f"{length} or more (the model's context is {context}), or shorten them"
            )
        parts[name] = tuple(kept)
        reason = f"{name}: over {limit} tokens (train.too_long: drop)"
        for example, length in over:
            rejects.append(Reject(example.origin, reason, f"{length} tokens"))
    inputs, refused = _take_fitting_inputs(task, form, row_limit, seed)
    limited = replace(
        task, unlabeled=inputs, train=parts["train"], dev=parts["dev"], test=parts["test"]
    )
    return limited, rejects + refused


def take_fitting(
    examples: Sequence[Example],
    form: encode.PromptFormat,
    limit: int,
    wanted: int,
    answer_room: int,
) -> tuple[list[Example], list[tuple[Example, int]]]:
    """Return the first `wanted` examples of at most `limit` tokens, and the longer ones on the way.

    The longer ones come with their lengths. `answer_room` is the number of tokens that a generated
    answer may need after the prompt; above 0 only the last answer of a row counts.
    """
    kept: list[Example] = []
    over: list[tuple[Example, int]] = []
    for place, example in enumerate(examples):
        if len(kept) == wanted:
            break
        if place % _BLOCK == 0:
            block = examples[place : place + min(_BLOCK, wanted - len(kept))]
            if answer_room:
                block = [encode.scored(row) for row in block]
            encode.encode_ahead(block, form)
        tokens = encode.final_answer(example, form) if answer_room else encode.encode(example, form)
        length = max(len(tokens), len(tokens) - tokens.n_loss + answer_room)
        if length > limit:
            over.append((example, length))
        else:
            kept.append(example)
    return kept, over


def last_trained(example: Example) -> Example:
    """Return the row with only the last of its trained answers left to train."""
    last = -1
    for place, message in enumerate(example.messages):
        if message.role == "assistant" and message.train:
            last = place
    messages = []
    for place, message in enumerate(example.messages):
        messages.append(replace(message, train=message.train and place == last))
    return replace(example, messages=tuple(messages))


def join_dev_rows(task: Task, seed: int) -> Task:
    """Return the task with its dev rows among the training rows, in an order drawn by `seed`."""
    rows = (*task.train, *task.dev)
    order = np.random.default_rng(seed_for(seed, "sizes")).permutation(len(rows))
    return replace(task, train=tuple(_take(rows, order)), dev=())


def folds(task: Task, count: int, seed: int) -> list[Task]:
    """Cut the training rows `count` times into training and dev rows, by content group.

    Each row is a dev row once. Fewer groups give fewer folds. Raises DataError if there is a single
    group.
    """
    from sklearn.model_selection import GroupKFold

    groups = [row.group for row in task.train]
    count = min(count, len(set(groups)))
    if count < 2:
        raise DataError(
            f"{task.name}: its {len(groups)} rows are one content group ({groups[0]!r:.60}), so "
            "none can be set apart to choose settings by; name another column in task.group, or "
            "use more rows"
        )
    cuts = GroupKFold(count, shuffle=True, random_state=seed).split(groups, groups=groups)
    tasks = []
    for train_places, dev_places in cuts:
        train = _take(task.train, train_places)
        dev = _take(task.train, dev_places)
        tasks.append(replace(task, train=tuple(train), dev=tuple(dev)))
    return tasks


def _draw_rows(
    sizes: Sequence[int], limit: int | None, key: tuple[int, ...]
) -> list[Sequence[int]]:
    """Draw `limit` rows of tables with these sizes, seeded by `key`.

    Returns ascending row ids for each table. A smaller limit draws some of the same rows.
    """
    total = sum(sizes)
    if limit is None or limit >= total:
        return [range(size) for size in sizes]
    chosen = np.sort(np.random.default_rng(key).permutation(total)[:limit])
    drawn: list[Sequence[int]] = []
    start = 0
    for size in sizes:
        low, high = np.searchsorted(chosen, (start, start + size))
        drawn.append((chosen[low:high] - start).tolist())
        start += size
    return drawn


def _count_reasons(rejects: Iterable[Reject]) -> list[tuple[str, int]]:
    """Return (reason, count), the most common first."""
    return Counter(reject.reason for reject in rejects).most_common()


def _take(rows: Sequence[Example], places: Iterable[int]) -> list[Example]:
    return [rows[place] for place in places]


def _seeded_groups(
    examples: Sequence[Example], purpose: str, seed: int
) -> dict[str, list[Example]]:
    """Return rows by group: groups in seeded order, rows of a group in the order given."""
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.group, []).append(example)

    def rank(group: str) -> bytes:
        return hashlib.sha256(f"{purpose}\0{seed}\0{group}".encode()).digest()

    return {group: members[group] for group in sorted(members, key=rank)}


def _require_two(examples: Sequence[Example], groups: Sequence[str]) -> None:
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s) cannot be split by content: two "
            "groups are needed; give `dev:` and `test:` files, add rows with other content, or "
            "name another column with `group:`"
        )


def _overlap_keys(row: Example, by_group: bool) -> list[str]:
    """Return the row's content as keys, each "KIND VALUE"."""
    texts = [message.content for message in row.messages]
    keys = ["prompt " + digest(" ".join(texts[:-1])), "text " + digest(" ".join(texts))]
    if by_group:
        keys.append("group " + row.group)
    return keys


def _read_held_out(
    name: str,
    sources: Sequence[DataSource],
    settings: TaskSettings,
    seed: int,
    train: Sequence[Example],
) -> ReadRows:
    held_out = read_rows(sources, group=settings.group, seed=seed)
    require_rows(held_out.examples, held_out.rejects, minimum=1)
    check_overlap(train, held_out.examples, name, by_group=settings.group is not None)
    return held_out


def _read_unlabeled(
    settings: TaskSettings,
    seed: int,
    train: Sequence[Example],
    held_out: Sequence[Example],
    near: float,
) -> tuple[tuple[Example, ...], list[Reject], list[str]]:
    """Return the inputs without answers, the rejected ones, and what is not read of them.

    Inputs that dev or test rows ask are rejected, so that no arm learns the answers that another
    arm gives to test rows.
    """
    if not settings.unlabeled:
        return (), [], []
    inputs, rejects, notes = read_rows(settings.unlabeled, seed=seed, answered=False)
    require_rows(inputs, rejects, minimum=1)
    held_out_prompts = [replace(row, messages=row.prompt) for row in held_out]
    overlap = filters.OverlapFilter([held_out_prompts], near)
    labelled = {_question(row, roles) for row in train for roles in (("user",), _ASKING)} - {""}
    kept = []
    for row in inputs:
        refused = overlap.shared(row)
        if _question(row, _ASKING) in labelled:
            refused = Reject(row.origin, "labelled already", row.question)
        if refused is None:
            kept.append(row)
        else:
            rejects.append(replace(refused, reason=f"unlabeled: {refused.reason}"))
    if not kept:
        reason, count = _count_reasons(rejects)[0]
        raise DataError(
            f"task.unlabeled: none of {len(rejects):,} inputs is left, mostly since: {reason} "
            f"({count:,}); give inputs that are not asked in labelled, dev or test rows"
        )
    return tuple(kept), rejects, notes


def _question(row: Example, roles: Collection[str]) -> str:
    """Return the words of some roles; questions that differ in punctuation alone are the same.

    One without a system text is that of a labelled row, whatever its system text.
    """
    words: list[str] = []
    for message in row.messages:
        if message.role in roles:
            words += filters.words(message.content)
    return " ".join(words)


def _holds_anchor(row: Example, anchor: Anchor) -> bool:
    text = anchor.text.strip()
    if anchor.placement == "response_prefix":
        return row.answer.lstrip().startswith(text)
    return any(text in message.content for message in row.prompt)


def _take_fitting_inputs(
    task: Task, form: encode.PromptFormat, limit: int, seed: int
) -> tuple[tuple[Example, ...], list[Reject]]:
    """Return the inputs that fit together with an answer, in seeded order, and the longer ones."""
    inputs: list[Example] = []
    rejects: list[Reject] = []
    reason = f"unlabeled: over {limit} tokens with its answer"
    for row in subset(task.unlabeled, len(task.unlabeled), seed_for(seed, "unlabeled")):
        length = len(encode.prompt_ids(row.messages, form)) + task.max_new_tokens
        if length <= limit:
            inputs.append(row)
        else:
            rejects.append(Reject(row.origin, reason, f"{length}"))
    return tuple(inputs), rejects
