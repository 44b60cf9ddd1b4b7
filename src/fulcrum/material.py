"""Files -> the rows of one run at one seed: split by content, cleaned against each other, short enough, counted.

Needs a tokenizer (to know how long a row is) and no model. Dev and test rows are set apart, checked for overlap and used to
clean the general rows before anything is mixed.
"""

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fulcrum import encode, ingest, metrics, pool
from fulcrum.config import DataSource, Settings, TaskSettings
from fulcrum.errors import DataError
from fulcrum.records import Example, Reject, Task, TaskFacts
from fulcrum.store import fingerprint, seed_for

_LENGTH_SAMPLE = 256  # general rows whose mean length stands for all, where a mix counts tokens


@dataclass(frozen=True)
class Material:
    """All rows of one run at one seed.

    `general` are the rows that the longest plan needs; `held_out` are general rows that no arm trains on, by source name
    (forgetting is measured on them); `step_cap` is the number of optimizer steps of the longest plan, the most that any arm
    may use; `rejects` counts the rows not used, by reason.
    """

    tasks: tuple[Task, ...]
    general: tuple[Example, ...]
    held_out: Mapping[str, tuple[Example, ...]]
    rejects: Mapping[str, int]
    step_cap: int

    @property
    def n_task(self) -> int:
        """Training rows of all tasks together."""
        return sum(len(task.train) for task in self.tasks)

    @property
    def fingerprint(self) -> str:
        """Hash over every row."""
        return fingerprint([self.tasks, self.general, self.held_out])

    def general_count(self, repeats: int, settings: Settings) -> int:
        """General rows that a plan with `repeats` uses: in proportion to the longest candidate's."""
        return round(len(self.general) * repeats / max(settings.mix.candidates))


def read_task(settings: TaskSettings, seed: int) -> tuple[Task, list[Reject]]:
    """Read and split one task: files, hold-outs where dev or test are not given, nested subsets, overlap checks.

    Splits depend on the files alone (seed 0); which training rows a `train_limit` leaves depends on `seed`.
    """
    train, rejects = ingest.read(settings.train, group=settings.group)
    ingest.require_rows(train, rejects, minimum=2)
    parts = {}
    for name, sources, part_of_train in (("test", settings.test, 0.25), ("dev", settings.dev, 0.2)):
        if sources:
            parts[name], refused = ingest.read(sources, group=settings.group)
            rejects += refused
            ingest.check_overlap(train, parts[name], name, by_group=settings.group is not None)
        else:
            train, parts[name] = ingest.split(train, part_of_train, seed=0)
    ingest.check_overlap(parts["dev"], parts["test"], "test", by_group=settings.group is not None)
    train = ingest.subset(train, settings.train_limit or len(train), seed_for(seed, "data"))
    dev = ingest.subset(parts["dev"], settings.dev_limit or len(parts["dev"]), 0)
    test = ingest.subset(parts["test"], settings.test_limit or len(parts["test"]), 0)
    task = Task(
        settings.name, tuple(train), tuple(dev), tuple(test),
        settings.anchor_value(), settings.metrics, settings.max_new_tokens,
    )  # fmt: skip
    metrics.needs_generation(task.metrics)  # unknown names are refused before anything is trained
    return task, rejects


def prepare(settings: Settings, tokenizer: encode.Tokenizer, context: int | None, seed: int) -> Material:
    """Read everything, drop what cannot be trained (counted), and choose the general rows that the longest plan needs.

    `context` is the model's longest row in tokens (None: no limit). Raises DataError and ConfigError for what cannot be used.
    """
    tasks: list[Task] = []
    rejects: list[Reject] = []
    for task_settings in settings.tasks:
        task, refused = read_task(task_settings, seed)
        task, too_long = _fit_task(task, settings, tokenizer, context)
        tasks.append(task)
        rejects += refused + too_long
    held_out: dict[str, tuple[Example, ...]] = {}
    general: list[Example] = []
    if settings.eval.general_rows > 0:
        own, _ = ingest.read([DataSource(path="builtin_eval")])
        held_out["builtin"] = tuple(own[: settings.eval.general_rows])
    if settings.general and (settings.mix.general_per_task > 0 or settings.eval.general_rows > 0):
        cleaner = _Cleaner(settings, tokenizer, context, tasks)
        held_out["pool"] = tuple(cleaner.take(settings.eval.general_rows, seed_for(settings.seed, "held out")).examples)
        wanted = cleaner.wanted()
        chosen = cleaner.take(wanted, seed_for(seed, "general"), {example.origin for example in held_out["pool"]})
        general = chosen.examples
        rejects += [Reject(r.origin, f"general: {r.reason}", r.detail) for r in chosen.rejects]
        if len(general) < wanted:
            fewer = settings.mix.general_per_task * len(general) / wanted
            raise DataError(
                f"general: the mix needs {wanted} general rows, the pool has {len(general)} usable (of {len(cleaner.pool)}); "
                f"set mix.general_per_task to {np.floor(fewer * 100) / 100:g} or less, lower mix.repeats, or add rows"
            )
    rows = max(settings.mix.candidates) * sum(len(task.train) for task in tasks) + len(general)
    cap = -(-rows // settings.train.batch_size)
    return Material(tuple(tasks), tuple(general), held_out, dict(Counter(reject.reason for reject in rejects)), cap)


def _limit(settings: Settings, context: int | None) -> int:
    return min(settings.train.max_length, context or settings.train.max_length)


def _fit_task(task: Task, settings: Settings, tokenizer: encode.Tokenizer, context: int | None) -> tuple[Task, list[Reject]]:
    """Apply `too_long` to training and dev rows; test rows are bounded by the model's context only."""
    form = encode.make_format(tokenizer, task.anchor)
    rejects: list[Reject] = []
    parts: dict[str, tuple[Example, ...]] = {}
    for name, examples in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        limit = _limit(settings, context) if name != "test" else context or sys.maxsize
        lengths = [len(encode.encode(example, form)) for example in examples]
        over = [(e, n) for e, n in zip(examples, lengths, strict=True) if n > limit]
        parts[name] = tuple(e for e, n in zip(examples, lengths, strict=True) if n <= limit)
        if over and (settings.train.too_long == "error" or not parts[name]):
            example, length = max(over, key=lambda pair: pair[1])
            raise DataError(
                f"{example.origin}: {name} row of {length} tokens is over the limit of {limit} ({len(over)} of {len(examples)} "
                f"rows are); set train.max_length to {length} or more (the model's context is {context}), or shorten them"
            )
        rejects += [Reject(e.origin, f"{name}: over {limit} tokens (train.too_long: drop)", f"{n} tokens") for e, n in over]
    return replace(task, train=parts["train"], dev=parts["dev"], test=parts["test"]), rejects


class _Cleaner:
    """Draws general rows that are not too long, overlap no task's rows and hold no anchor's text."""

    def __init__(self, settings: Settings, tokenizer: encode.Tokenizer, context: int | None, tasks: Sequence[Task]) -> None:
        self.settings, self.tasks = settings, tasks
        self.limit = _limit(settings, context)
        self.plain = encode.make_format(tokenizer, None)
        self.pool = pool.open_pool(settings.general, seed=settings.seed)

    def take(self, count: int, seed: int, outside: Collection[str] = ()) -> pool.Selection:
        """Up to `count` rows in seeded order, none whose origin is in `outside`."""

        def fits(example: Example) -> str | None:
            if example.origin in outside:
                return "held out for measuring forgetting"
            try:
                return f"over {self.limit} tokens" if len(encode.encode(example, self.plain)) > self.limit else None
            except DataError:
                return "refused by the model's chat template"

        return pool.select(
            self.pool, count, seed=seed, fits=fits,
            task_rows=[row for task in self.tasks for row in task.train],
            held_out_rows=[row for task in self.tasks for row in (*task.dev, *task.test)],
            anchors=[task.anchor for task in self.tasks if task.anchor is not None],
        )  # fmt: skip

    def wanted(self) -> int:
        """General rows for the longest plan. In `unit: tokens` the mean lengths of task rows and of a sample decide."""
        shown = max(self.settings.mix.candidates) * sum(len(task.train) for task in self.tasks)
        per_task = self.settings.mix.general_per_task
        if self.settings.mix.unit == "tokens":
            sample = self.take(_LENGTH_SAMPLE, seed_for(self.settings.seed, "lengths")).examples
            forms = [(task, encode.make_format(self.plain.tokenizer, task.anchor)) for task in self.tasks]
            own = np.mean([len(encode.encode(row, form)) for task, form in forms for row in task.train])
            per_task *= float(own / np.mean([len(encode.encode(row, self.plain)) for row in sample])) if sample else 1
        return round(per_task * shown)


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
