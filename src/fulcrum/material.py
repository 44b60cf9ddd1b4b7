"""Files -> the rows of one run at one seed: split by content, cleaned against each other, short enough, counted.

Needs a tokenizer (to know how long a row is) and no model. Dev and test rows are set apart, checked for overlap and used to
clean the general rows before anything is mixed.
"""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np

from fulcrum import choose as choose_rows
from fulcrum import clean, encode, ingest, metrics, pool
from fulcrum.anchor import last_answer_only
from fulcrum.config import Settings, TaskSettings
from fulcrum.errors import DataError
from fulcrum.records import Example, FloatArray, Reject, Task, TaskFacts
from fulcrum.rows import content_key
from fulcrum.sections import DataSource, GeneralSource
from fulcrum.store import fingerprint, seed_for

_BLOCK = 4096  # rows that are encoded together
_LENGTH_SAMPLE = 256  # general rows whose mean length stands for all, where a mix counts tokens


@dataclass(frozen=True)
class Material:
    """All rows of one run at one seed.

    `general` are the rows that the longest plan of `general_for` task rows needs, `own_general` those of arms with a pool (or
    rows made) of their own; `candidates` are the pool's rows among which arms choose, which begin with `general`, and
    `gradients` what some of them and of the task rows would teach, by origin; `held_out` are general rows that no arm trains
    on, by source name (forgetting is measured on them); `repeats` are the numbers of repeats that mixed arms try; `kept` is
    the part of the training rows that a fold trains on; `rejects` counts the rows not used, by reason.
    """

    tasks: tuple[Task, ...]
    general: tuple[Example, ...]
    held_out: Mapping[str, tuple[Example, ...]]
    rejects: Mapping[str, int]
    repeats: tuple[int, ...]
    general_for: int
    batch_size: int
    notes: tuple[str, ...] = ()
    own_general: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    candidates: tuple[Example, ...] = ()
    gradients: Mapping[str, FloatArray] = field(default_factory=dict)
    seed: int = 0
    kept: float = 1.0

    @property
    def n_task(self) -> int:
        """Training rows of all tasks together."""
        return sum(len(task.train) for task in self.tasks)

    @property
    def longest(self) -> int:
        """Training rows of the task that has most."""
        return max(len(task.train) for task in self.tasks)

    @property
    def step_cap(self) -> int:
        """Optimizer steps of the longest plan, the most that any arm may use."""
        rows = max(self.repeats) * self.n_task + self.general_count(max(self.repeats))
        return -(-rows // self.batch_size)

    def at(self, size: int) -> "Material":
        """The same with the first `size` rows of every task: nested subsets, since their order is the seed's."""
        return replace(self, tasks=tuple(replace(task, train=task.train[:size]) for task in self.tasks))

    def folds(self, count: int, seed: int) -> list["Material"]:
        """Cut the training rows `count` times into rows to train on and dev rows, by content group; each is a dev row once.

        A task with fewer groups has fewer folds; in those beyond, none of its rows is a dev row. Raises DataError where a task
        has a single group.
        """
        cuts = [_folds(task, count, seed) for task in self.tasks]
        whole = self.n_task
        found = [
            replace(self, tasks=tuple(own or replace(task, dev=()) for task, own in zip(self.tasks, fold, strict=True)))
            for fold in zip_longest(*cuts)
        ]
        return [replace(fold, kept=fold.n_task / whole) for fold in found]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """A hash over every row of each part, by the part's name, so that a refusal can say which data changed."""
        parts: dict[str, object] = {"general": self.general, "candidates": self.candidates[len(self.general) :]}
        parts |= {f"general of {name}": rows for name, rows in self.own_general.items()}
        parts |= {f"{task.name} unlabeled": task.unlabeled for task in self.tasks if task.unlabeled}
        parts |= {f"held out: {name}": rows for name, rows in self.held_out.items()}
        parts |= {f"{task.name} {part}": getattr(task, part) for task in self.tasks for part in ("train", "dev", "test")}
        return {name: fingerprint(rows) for name, rows in parts.items()}

    def general_count(self, repeats: int) -> int:
        """General rows of a plan with `repeats`, whether there are so many or not: in proportion to the longest candidate's."""
        return round(len(self.general) * repeats * self.n_task / (max(self.repeats) * self.general_for))


def _folds(task: Task, count: int, seed: int) -> list[Task]:
    from sklearn.model_selection import GroupKFold

    groups = [row.group for row in task.train]
    count = min(count, len(set(groups)))
    if count < 2:
        raise DataError(
            f"{task.name}: its {len(groups)} rows are one content group ({groups[0]!r:.60}), so none can be set apart to "
            "choose settings by; name another column in task.group, or use more rows"
        )
    folds = GroupKFold(count, shuffle=True, random_state=seed).split(groups, groups=groups)
    return [replace(task, train=tuple(task.train[k] for k in own), dev=tuple(task.train[k] for k in dev)) for own, dev in folds]


def read_task(
    settings: TaskSettings, seed: int, outer: tuple[int, int] | None = None, near: float = 0.0
) -> tuple[Task, list[Reject]]:
    """Read one task whole and split it by content: files, and hold-outs where dev or test are not given (the same for every
    seed; `seed` draws the rows that a source's own `limit` leaves). With `outer`, the number of a fold and how many there are,
    that fold is the test rows that are not given. Unlabelled inputs that a row asks too, or that are at least `near` (above 0)
    like a dev or test row's, are left out.

    Raises DataError where rows are missing, unusable, or stand on two sides.
    """
    metrics.needs_generation(settings.metrics)  # unknown names are refused before anything is read
    by_group = settings.group is not None  # files that number their groups from 0 each do not mean the same groups
    train, rejects = ingest.read(settings.train, group=settings.group, seed=seed)
    ingest.require_rows(train, rejects, minimum=2)
    parts: dict[str, list[Example]] = {}
    for name, sources, part_of_train in (("test", settings.test, 0.25), ("dev", settings.dev, 0.2)):
        if sources:
            parts[name], refused = ingest.read(sources, group=settings.group, seed=seed)
            ingest.require_rows(parts[name], refused, minimum=1)
            rejects += refused
            ingest.check_overlap(train, parts[name], name, by_group=by_group)
        elif name == "test" and outer is not None:
            train, parts[name] = ingest.fold(train, *outer)
        else:
            train, parts[name] = ingest.split(train, part_of_train, seed=0)
    ingest.check_overlap(parts["dev"], parts["test"], "test", of="dev", by_group=by_group)
    unlabeled, refused = _unlabeled(settings, seed, train, [*parts["dev"], *parts["test"]], near)
    return Task(
        settings.name, tuple(train), tuple(parts["dev"]), tuple(parts["test"]),
        settings.anchor_value(), settings.metrics, settings.max_new_tokens, unlabeled,
    ), rejects + refused  # fmt: skip


def _unlabeled(
    settings: TaskSettings, seed: int, train: Sequence[Example], held_out: Sequence[Example], near: float
) -> tuple[tuple[Example, ...], list[Reject]]:
    """The inputs without answers, and those not used: no arm may learn the answers that another gives to test rows."""
    if not settings.unlabeled:
        return (), []
    found, rejects = ingest.read(settings.unlabeled, seed=seed, answered=False)
    ingest.require_rows(found, rejects, minimum=1)
    asked = clean.TaskText([replace(row, messages=row.prompt) for row in held_out], near)
    labelled = {content_key(replace(row, messages=row.prompt)) for row in train}
    kept = []
    for row in found:
        refused = Reject(row.origin, "labelled already", row.question) if content_key(row) in labelled else asked.shared(row)
        if refused is None:
            kept.append(row)
        else:
            rejects.append(replace(refused, reason=f"unlabeled: {refused.reason}"))
    return tuple(kept), rejects


def prepare(
    settings: Settings, tokenizer: encode.Tokenizer, context: int | None, seed: int, *, dev_apart: bool = True,
    by_fold: bool | None = None, mixed_rows: int | None = None, choose_from: int = 0,
) -> Material:  # fmt: skip
    """Read everything, drop what cannot be trained (counted), and choose the general rows that the longest plan needs.

    `context` is the model's longest row in tokens (None: no limit). In a comparison dev rows are task rows like others
    (`dev_apart` False): they join the training rows, in an order drawn by seed; `mixed_rows` of each task (none: all) are in
    the largest mixture. `choose_from` rows of the pool are candidates for arms that choose theirs. Where a comparison has no
    test rows of its own each seed holds out another fold of the rows, so that no row is a test row twice (`by_fold`; None: in a
    comparison only). Raises DataError and
    ConfigError for what cannot be used.
    """
    tasks: list[Task] = []
    rejects: list[Reject] = []
    place = settings.seeds.index(seed) if seed in settings.seeds else 0
    outer = (place, settings.outer_folds) if (not dev_apart if by_fold is None else by_fold) else None
    whole = [read_task(task, settings.seed, outer, settings.clean.near_duplicates) for task in settings.tasks]
    _check_between_tasks([task for task, _ in whole])
    for task_settings, (task, refused) in zip(settings.tasks, whole, strict=True):
        chosen, too_long = choose(task, task_settings, settings, tokenizer, context, seed)
        metrics.check_gold(task.metrics, chosen.test)
        tasks.append(chosen)
        rejects += refused + too_long
    if any(last_answer_only(task.anchor) for task in tasks):
        # Where some anchor lets only last answers be trained, no arm and no task trains on others.
        tasks = [replace(task, train=tuple(map(_last_answer_only, task.train))) for task in tasks]
    n_task = sum(len(task.train) for task in tasks)
    if not dev_apart:
        tasks = [_joined(task, seed) for task in tasks]
        for task in tasks:
            _check_sizes(settings, task)
        n_task = sum(len(task.train[:mixed_rows]) for task in tasks)
    repeats, notes = settings.mix.candidates, list[str]()
    if settings.mix.general_per_task == "auto":
        notes.append(
            f"mix.general_per_task: auto is settled by a pilot; this is the most that it tries, {settings.mix.per_task:g}"
        )
    left_out: dict[str, int] = {}
    own_general: dict[str, tuple[Example, ...]] = {}
    held_out: dict[str, tuple[Example, ...]] = {}
    general: list[Example] = []
    candidates: tuple[Example, ...] = ()
    if settings.eval.general_rows > 0:
        own, _ = ingest.read([DataSource(path="builtin_eval")])
        held_out["builtin"] = tuple(own[: settings.eval.general_rows])
    if settings.general and (settings.mix.per_task > 0 or settings.eval.general_rows > 0):
        cleaner = _Cleaner(settings, tokenizer, context, [task for task, _ in whole])
        outside = {content_key(example) for example in held_out.get("builtin", ())}
        held_out["pool"] = tuple(
            cleaner.take(settings.eval.general_rows, seed_for(settings.seed, "held out"), outside).examples
        )
        outside |= {content_key(example) for example in held_out["pool"]}
        wanted = cleaner.wanted(tasks, n_task)
        # Where rows are chosen there are always several times as many candidates.
        most = max(choose_from, choose_rows.SCORED * max(wanted.values())) if choose_from else max(wanted.values())
        selection = cleaner.take(most, seed_for(seed, "general"), outside, held_out["pool"])
        left_out = {f"general: {reason}": count for reason, count in cleaner.pool.left_out.items()}
        rejects += [Reject(r.origin, f"general: {r.reason}", r.detail) for r in selection.rejects]
        notes += [f"{name}: too few usable rows for its weight; the other sources gave the rest" for name in selection.dry]
        notes += [f"general: {note}" for note in cleaner.pool.notes]
        left = len(selection.examples)
        repeats = tuple(number for number in wanted if wanted[number] <= left)
        if not repeats:
            raise DataError(_too_small(settings, min(wanted.values()), left, len(held_out["pool"]), len(cleaner.pool)))
        if len(repeats) < len(wanted):
            tried, all_of = (", ".join(map(str, numbers)) for numbers in (repeats, wanted))
            notes.append(f"mix.repeats: auto tries {tried} instead of {all_of}: the general data have {left:,} usable rows")
        general = selection.examples[: wanted[max(repeats)]]
        candidates = tuple(selection.examples) if choose_from else ()
        if choose_from and len(candidates) < 2 * len(general):
            notes.append(
                f"general: rows were chosen among {len(candidates):,} that are usable, for mixtures of up to {len(general):,}: "
                "that is hardly a choice"
            )
        for arm in () if dev_apart else settings.compare.arms:
            if not isinstance(arm, str) and arm.pool:
                other = _Cleaner(settings, tokenizer, context, [task for task, _ in whole], arm.pool)
                found = other.take(len(general), seed_for(seed, "general"), outside, held_out["pool"])
                if len(found.examples) < len(general):
                    raise DataError(
                        f"compare.arms: {arm.name}: the mix needs {len(general)} general rows, its pool has "
                        f"{len(found.examples)} usable (of {len(other.pool)}); lower mix.general_per_task, or add rows"
                    )
                own_general[arm.name] = tuple(found.examples)
                left_out |= {f"general of {arm.name}: {reason}": count for reason, count in other.pool.left_out.items()}
                rejects += [Reject(r.origin, f"general of {arm.name}: {r.reason}", r.detail) for r in found.rejects]
                notes += [f"{arm.name}: {name}: too few usable rows for its weight" for name in found.dry]
                notes += [f"{arm.name}: {note}" for note in other.pool.notes]
    counts = dict(Counter(reject.reason for reject in rejects) + Counter(left_out))
    return Material(
        tuple(tasks),
        tuple(general),
        held_out,
        counts,
        repeats,
        n_task,
        settings.train.batch_size,
        tuple(notes),
        own_general,
        candidates,
        seed=seed,
    )


def of_seeds(
    settings: Settings,
    tokenizer: encode.Tokenizer,
    context: int | None,
    seeds: Sequence[int],
    *,
    mixed_rows: int | None,
    choose_from: int = 0,
) -> list[Material]:
    """The rows of a comparison at every seed (`prepare`): of each task as many training rows, since folds differ in size."""
    rows = [
        prepare(settings, tokenizer, context, seed, dev_apart=False, mixed_rows=mixed_rows, choose_from=choose_from)
        for seed in seeds
    ]
    most = [max(map(len, parts)) for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)]
    fewest = [min(map(len, parts)) for parts in zip(*([task.train for task in each.tasks] for each in rows), strict=True)]
    cut = [
        f"{task.name}: every seed trains on {few} rows, the fewest that a fold leaves (another leaves {many}): its content "
        "groups differ much in size"
        for task, few, many in zip(rows[0].tasks, fewest, most, strict=True) if few < 0.9 * many
    ]  # fmt: skip
    return [
        replace(
            each, notes=(*each.notes, *cut),
            tasks=tuple(replace(task, train=task.train[:n]) for task, n in zip(each.tasks, fewest, strict=True)),
        )
        for each in rows
    ]  # fmt: skip


def _joined(task: Task, seed: int) -> Task:
    rows = (*task.train, *task.dev)
    order = np.random.default_rng(seed_for(seed, "sizes")).permutation(len(rows))
    return replace(task, train=tuple(rows[k] for k in order), dev=())


def _check_sizes(settings: Settings, task: Task) -> None:
    every = [settings.compare.sizes or (), *settings.compare.sizes_of.values()]
    largest = max((size for sizes in every for size in sizes), default=0)
    if largest > len(task.train):
        raise DataError(
            f"compare.sizes: {largest} rows are asked for, {task.name} has {len(task.train)} (train and dev together); lower "
            "the sizes or add rows"
        )


def _last_answer_only(example: Example) -> Example:
    """The row with the last of its trained answers as the only one."""
    trained = [place for place, message in enumerate(example.messages) if message.role == "assistant" and message.train]
    messages = (replace(m, train=m.train and place in trained[-1:]) for place, m in enumerate(example.messages))
    return replace(example, messages=tuple(messages))


def _too_small(settings: Settings, wanted: int, left: int, held_out: int, size: int) -> str:
    """Say that the pool has too few rows, and what can be done about it with these settings."""
    fewer = np.floor(settings.mix.per_task * left / wanted * 100) / 100
    remedies = [f"set mix.general_per_task to {fewer:g} or less"] if fewer > 0 else []
    remedies += ["lower mix.repeats"] if min(settings.mix.candidates) > 1 else []
    remedies += [f"lower eval.general_rows ({settings.eval.general_rows})"] if held_out else []
    remedies += [] if any(source.path == "builtin" for source in settings.general) else ["use `general: builtin`"]
    kept = f", and {held_out} of these are held out for measuring forgetting" if held_out else ""
    return (
        f"general: the mix needs {wanted} general rows, the pool has {left + held_out} usable (of {size}){kept}; "
        f"{', '.join([*remedies, 'or add rows'])}"
    )


def _check_between_tasks(tasks: Sequence[Task]) -> None:
    """Tasks share one adapter: what one trains on must not be what another is scored on."""
    for task in tasks:
        for other in tasks:
            if other is not task:
                for name, rows in (("dev", other.dev), ("test", other.test)):
                    ingest.check_overlap(task.train, rows, f"{other.name} {name}", of=f"{task.name} training", by_group=False)


def _limit(settings: Settings, context: int | None) -> int:
    return min(settings.train.max_length, context or settings.train.max_length)


def choose(
    task: Task, limits: TaskSettings, settings: Settings, tokenizer: encode.Tokenizer, context: int | None, seed: int
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
        limit = _limit(settings, context) if name != "test" else context or sys.maxsize
        answer_room = task.max_new_tokens if name == "test" and metrics.needs_generation(task.metrics) else 0
        kept, over = fitting(ingest.subset(rows, len(rows), order), form, limit, wanted or len(rows), answer_room)
        minimum = 2 if name == "train" else 1
        if over and (settings.train.too_long == "error" or len(kept) < minimum):
            example, length = max(over, key=lambda pair: pair[1])
            raise DataError(
                f"{example.origin}: {name} row of {length} tokens is over the limit of {limit} ({len(over)} of "
                f"{len(over) + len(kept)} rows are); set train.max_length to {length} or more (the model's context is "
                f"{context}), or shorten them"
            )
        parts[name] = tuple(kept)
        rejects += [Reject(e.origin, f"{name}: over {limit} tokens (train.too_long: drop)", f"{n} tokens") for e, n in over]
    inputs = []
    for row in ingest.subset(task.unlabeled, len(task.unlabeled), seed_for(seed, "unlabeled")):
        length = len(encode.prompt_ids(row.messages, form)) + task.max_new_tokens
        if length <= _limit(settings, context):
            inputs.append(row)
        else:
            rejects.append(
                Reject(row.origin, f"unlabeled: over {_limit(settings, context)} tokens with its answer", f"{length}")
            )
    return replace(task, train=parts["train"], dev=parts["dev"], test=parts["test"], unlabeled=tuple(inputs)), rejects


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
            encode.encode_ahead([encode.scored(row) for row in block] if answer_room else block, form)
        tokens = encode.final_answer(example, form) if answer_room else encode.encode(example, form)
        length = max(len(tokens), len(tokens) - tokens.n_loss + answer_room)
        if length > limit:
            over.append((example, length))
        else:
            kept.append(example)
    return kept, over


class _Cleaner:
    """Draws general rows that are not too long, overlap no task's rows and hold no anchor's text."""

    def __init__(
        self, settings: Settings, tokenizer: encode.Tokenizer, context: int | None, tasks: Sequence[Task],
        sources: Sequence[GeneralSource] = (),
    ) -> None:  # fmt: skip
        # All rows of the tasks, also those that a limit leaves out: an arm must not meet them in the pool.
        self.settings, self.tasks = settings, tasks
        self.limit = _limit(settings, context)
        self.plain = encode.make_format(tokenizer, None)
        near = settings.clean.near_duplicates
        self.pool = pool.open_pool(sources or settings.general, seed=settings.seed, near=near)

    def take(self, count: int, seed: int, outside: Collection[str] = (), apart: Sequence[Example] = ()) -> pool.Selection:
        """Up to `count` rows in seeded order, none whose content is in `outside`, or that shares text with rows of `apart`."""

        def fits(example: Example) -> str | None:
            if content_key(example) in outside:
                return "held out for measuring forgetting"
            try:
                tokens = encode.encode(example, self.plain)
                return f"over {self.limit} tokens" if len(tokens) > self.limit else None
            except DataError:
                return "refused by the model's chat template"

        return pool.select(
            self.pool, count, seed=seed, fits=fits,
            task_rows=[row for task in self.tasks for row in task.train],
            held_out_rows=[*(row for task in self.tasks for row in (*task.dev, *task.test)), *apart],
            anchors=[task.anchor for task in self.tasks if task.anchor is not None],
            near=self.settings.clean.near_duplicates, size=self._size,
        )  # fmt: skip

    def _size(self, row: Example) -> int:
        """What a source's weight counts."""
        return len(encode.encode(row, self.plain)) if self.settings.mix.unit == "tokens" else 1

    def wanted(self, tasks: Sequence[Task], once: int) -> dict[int, int]:
        """General rows for `once` task rows, by the number of repeats. In `unit: tokens` the mean lengths of task rows and of a
        sample decide."""
        per_task = self.settings.mix.per_task
        if self.settings.mix.unit == "tokens":
            sample = self.take(_LENGTH_SAMPLE, seed_for(self.settings.seed, "lengths")).examples
            forms = [(task, encode.make_format(self.plain.tokenizer, task.anchor)) for task in tasks]
            own = np.mean([len(encode.encode(row, form)) for task, form in forms for row in task.train])
            per_task *= float(own / np.mean([len(encode.encode(row, self.plain)) for row in sample])) if sample else 1
        return {repeats: round(per_task * repeats * once) for repeats in self.settings.mix.candidates}


def facts(material: Material, tokenizer: encode.Tokenizer) -> tuple[TaskFacts, ...]:
    """What the report says about each task's data; tokens are counted once per row, with the anchor."""
    described: list[TaskFacts] = []
    for task in material.tasks:
        form = encode.make_format(tokenizer, task.anchor)
        described.append(
            TaskFacts(
                task.name, task.anchor.text if task.anchor else None, task.anchor.placement if task.anchor else None,
                len(task.train), len(task.dev), len(task.test), len({row.group for row in task.test}),
                sum(len(encode.encode(row, form)) for row in task.train),
            )
        )  # fmt: skip
    return tuple(described)
