"""A finished run folder in use: answers, a conversation, scores on other rows."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from safetensors.torch import load_file

from fulcrum.config.arms import arm_of, by_use, inference_anchor, own_arm, sizes_of
from fulcrum.config.base import DataSource
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TaskSettings, TrainSettings
from fulcrum.config.settings import Settings, load_settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, FulcrumError, StoreError, nearest
from fulcrum.core.types import (
    Anchor,
    Example,
    Hyperparameters,
    Message,
    Prediction,
    Reject,
    Score,
    Task,
    Tokens,
)
from fulcrum.data import encode, run_data, starter, task_data
from fulcrum.experiments import cell, scoring
from fulcrum.experiments.lifecycle import environment
from fulcrum.model import adapter, base_model, generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.stats import metrics

_ASKED = 8  # rows by which an adapter is seen to be at work


@dataclass(frozen=True)
class Adapter:
    """A base model with one trained adapter on it, the settings of its run and the arm that it was trained as."""

    loaded: LoadedModel
    settings: Settings
    arm: str
    anchors: dict[str, Anchor | None]
    folder: Path  # with its weights, in PEFT's format
    train: TrainSettings  # with the arm's rank and scale
    notes: tuple[str, ...] = ()  # what differs from the run's training, in words

    def anchor(self, task: str | None = None) -> Anchor | None:
        """The anchor of a task (the only or first one by default). Raises ConfigError for an unknown task."""
        name = task or next(iter(self.anchors))
        if name not in self.anchors:
            raise ConfigError(f"no task {name!r} in this run{nearest(name, self.anchors)}")
        return self.anchors[name]

    def answer(
        self, texts: Sequence[str], *, task: str | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers to single questions, with the task's anchor, in the order of `texts`."""
        return self.reply(
            [(Message("user", text),) for text in texts], task=task, max_new_tokens=max_new_tokens
        )

    def reply(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Greedy answers to conversations that end with a user's turn."""
        form = encode.make_format(self.loaded.tokenizer, self.anchor(task))
        longest = max_new_tokens or max(item.max_new_tokens for item in self.settings.tasks)
        prompts = [encode.prompt_ids(messages, form) for messages in conversations]
        return generate.generate(
            self.loaded,
            prompts,
            form,
            max_new_tokens=longest,
            batch_tokens=self.settings.eval.batch_tokens,
        )


def load_adapter(folder: Path | str, *, arm: str | None = None) -> Adapter:
    """Load the base model and the adapter of a run folder; of a comparison, the adapter of `arm` (default: the first of tell,
    mix, sft_anchor, sft in it). The device is this machine's own: a GPU if there is one.

    Raises StoreError if the folder holds no finished run or no such arm, or if its files were changed.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    weights, own = _adapter_folder(folder, arm, settings)
    state = read_state(weights)
    loaded = load_base(settings)
    trained = as_saved(weights, settings.train, own)
    adapter.use(loaded, state, trained)
    anchors = {task.name: task_anchor(task, own, settings) for task in settings.tasks}
    return Adapter(
        loaded, settings, own.name, anchors, weights, trained, tuple(other_base(folder, loaded))
    )


def read_settings(folder: Path) -> Settings:
    """Read the settings of a run folder. Raises StoreError if it is none."""
    if not (folder / "config.yaml").exists():
        raise StoreError(
            f"{folder}: not a run folder (no config.yaml); give the output_dir of `fulcrum train` or `compare`"
        )
    return load_settings(folder / "config.yaml")


def load_base(settings: Settings) -> LoadedModel:
    """Load the base model of a run onto this machine's own device."""
    here = settings.train.model_copy(
        update={"device": "auto"}
    )  # the run's device may have been another machine's GPU
    return base_model.load(settings.model, here, trust_remote_code=settings.trust_remote_code)


def read_state(weights: Path) -> adapter.State:
    """Read an adapter's weights. Raises StoreError if its files are not those that were trained."""
    if damaged := store.damaged(weights):
        raise StoreError(
            f"{weights}: {', '.join(damaged)} changed or missing since training; make it again with --resume"
        )
    return load_file(weights / "adapter_model.safetensors")


def other_base(folder: Path, loaded: LoadedModel) -> Iterator[str]:
    """Yield what differs between the base model here and the one in the run's manifest, in words."""
    known, here = store.read_json(folder / store.MANIFEST)["environment"], environment(loaded)
    for name, what in (
        ("weights", "files"),
        ("prompt", "chat template, or the date that it writes,"),
    ):
        if known[name] != here[name]:
            yield f"{loaded.name}: its {what} differ here from those of training: answers may be others"


def task_anchor(task: TaskSettings, own: Arm, settings: Settings) -> Anchor | None:
    """Return the anchor with which an arm is asked."""
    return inference_anchor(own, Task(task.name, (), (), (), task.anchor_value()), settings)


def as_saved(weights: Path, settings: TrainSettings, own: Arm) -> TrainSettings:
    """Return the settings with the arm's own, and with the rank and scale that were saved: averaged adapters have others."""
    saved = store.read_json(weights / "adapter_config.json")
    settings = cell.own_settings(settings, own, Hyperparameters())
    return settings.model_copy(update={"lora_r": saved["r"], "lora_alpha": saved["lora_alpha"]})


def adapter_folders(folder: Path, settings: Settings) -> dict[str, Path]:
    """Return the trained adapters of a run folder by their arms, first the one that is used if none is named.

    Raises StoreError if there is none.
    """
    if (folder / "adapter").is_dir():
        return {own_arm(settings).name: folder / "adapter"}
    own = [arm.name for arm in settings.compare.arms if isinstance(arm, Arm)]
    places = {name: folder / "adapters" / name for name in (*by_use(), *own)}
    found = {
        name: place
        for name, place in places.items()
        if (place / "adapter_model.safetensors").exists()
    }
    if not found:
        raise StoreError(f"{folder}: no trained adapter in it; finish the run with --resume")
    return found


def _adapter_folder(folder: Path, arm: str | None, settings: Settings) -> tuple[Path, Arm]:
    found = adapter_folders(folder, settings)
    if (folder / "adapter").is_dir():
        own = own_arm(settings)
        if arm not in (None, own.name):
            raise StoreError(f"{folder}: holds the arm {own.name!r} only, not {arm!r}")
        return folder / "adapter", own
    name = arm or next(iter(found))
    if name not in found:
        raise StoreError(f"{folder}: no adapter of arm {name!r}{nearest(name, found)}")
    return found[name], arm_of(settings, name)


@dataclass(frozen=True)
class Evaluation:
    """An adapter on some rows: scores, predictions and their file, the rows rejected by reason, and what to know about it."""

    scores: tuple[Score, ...]
    predictions: tuple[Prediction, ...]
    file: Path
    rejects: Mapping[str, int]
    notes: tuple[str, ...]


def evaluate(
    folder: Path | str,
    *,
    data: str | None = None,
    arm: str | None = None,
    task: str | None = None,
    metric_names: Sequence[str] = (),
    out: Path | str | None = None,
) -> Evaluation:
    """Score an adapter on `data` (default: the task's own test rows), and write the predictions to `out`, as JSON lines.

    `out` is a new file in the run folder's eval/ by default. Raises DataError (also for rows that the adapter was trained on),
    ConfigError or StoreError.
    """
    folder = Path(folder)
    adapter = load_adapter(folder, arm=arm)
    anchor = adapter.anchor(task)
    wanted = next(
        item
        for item in adapter.settings.tasks
        if item.name == (task or adapter.settings.tasks[0].name)
    )
    names = tuple(metric_names) or wanted.metrics
    form = encode.make_format(adapter.loaded.tokenizer, anchor)
    rejects: list[Reject] = []
    notes = [*adapter.notes]
    if data:
        source = DataSource(path=data, columns=(wanted.test or wanted.train)[0].columns)
        examples, rejects = task_data.read((source,), group=wanted.group)
        task_data.require_rows(examples, rejects, minimum=1)
        notes += _known_rows(folder, adapter, wanted, examples, data)
    else:
        examples = _test_rows(folder, adapter, wanted)
    room = wanted.max_new_tokens if metrics.needs_generation(names) else 0
    over = task_data.take_fitting(
        examples, form, adapter.loaded.context or sys.maxsize, len(examples), room
    )[1]
    if over:
        raise DataError(
            f"{over[0][0].origin}: needs {over[0][1]} tokens with its answer, the model's context is {adapter.loaded.context} "
            f"({len(over)} such rows); shorten or remove them, or lower task.max_new_tokens ({wanted.max_new_tokens})"
        )
    scored = Task(wanted.name, (), (), tuple(examples), anchor, names, wanted.max_new_tokens)
    predictions = scoring.predict(
        adapter.loaded, scored, examples, batch_tokens=adapter.settings.eval.batch_tokens
    )
    if _is_idle(
        adapter.loaded, [encode.final_answer(example, form) for example in examples[:_ASKED]]
    ):
        notes.append(
            f"{folder}: with the adapter these rows have the base model's very losses: it is not applied, or idle"
        )
    file = (
        Path(out) if out is not None else _new_file(folder / "eval", data, adapter.arm, wanted.name)
    )
    store.write_jsonl(
        file, predictions
    )  # before they are scored: a metric that fails loses no answers
    scores = metrics.score(predictions, names, draws=adapter.settings.eval.draws)
    return Evaluation(
        scores, predictions, file, Counter(reject.reason for reject in rejects), tuple(notes)
    )


def rows_to_check(folder: Path, adapter: Adapter, task: str, most: int) -> list[Example]:
    """Up to `most` rows on which an adapter can be compared with itself: the task's dev rows, or training rows where it has
    none. Left out are rows that hold a special token's text, which Fulcrum alone reads as text. Raises DataError where none is
    left, or the run's files are gone."""
    try:
        ((own,), _) = _own_rows(
            folder, adapter, tuple(item for item in adapter.settings.tasks if item.name == task)
        )
    except DataError as error:
        raise DataError(
            f"{error}; export where {folder} was trained, with its rows there, or write it unchecked (--rows 0)"
        ) from error
    special = encode.make_format(adapter.loaded.tokenizer, None).special
    found = [
        row
        for row in (own.dev or own.train)
        if not any(special.search(message.content) for message in row.messages)
    ]
    if not found:
        raise DataError(
            f"{folder}: no dev or training row of {task!r} to score the export on; write it unchecked (--rows 0)"
        )
    return found[:most]


def _is_idle(loaded: LoadedModel, rows: Sequence[Tokens]) -> bool:
    """Whether the adapter changes no loss of some rows."""
    with adapter.without(loaded):
        base, _ = generate.nats(loaded, rows)
    return bool((base == generate.nats(loaded, rows)[0]).all())


def _new_file(folder: Path, data: str | None, arm: str, task: str) -> Path:
    """A file that is not there yet, named after what is scored."""
    stem = f"{starter.stem(data) if data else 'test'}-{arm}-{task}"
    names = (f"{stem}.jsonl" if number == 1 else f"{stem}-{number}.jsonl" for number in count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _own_rows(
    folder: Path, adapter: Adapter, tasks: tuple[TaskSettings, ...]
) -> tuple[tuple[Task, ...], list[str]]:
    """The rows of the run's `tasks` as their files hold them today, and which parts (`colour train`) changed since the run."""
    settings, loaded = adapter.settings, adapter.loaded
    no_pool = {"mix": settings.mix.model_copy(update={"general_per_task": 0.0}), "general": ()}
    no_pool |= {"eval": settings.eval.model_copy(update={"general_rows": 0})}
    # A comparison keeps the adapters of its first seed.
    apart = (folder / "adapter").is_dir()
    changed = settings.model_copy(update={"tasks": tasks, **no_pool})
    if apart:
        rows = run_data.prepare(changed, loaded.tokenizer, loaded.context, settings.seed)
    else:
        rows = run_data.of_seeds(
            changed, loaded.tokenizer, loaded.context, settings.seeds, mixed_rows=None
        )[0]
    arm = arm_of(settings, adapter.arm)
    used = rows if apart else rows.at(max(sizes_of(settings, arm, rows.longest)))
    recorded = store.read_json(folder / store.MANIFEST)["data"]
    parts = [f"{task.name} {part}" for task in tasks for part in ("train", "dev", "test")]
    return used.tasks, [part for part in parts if rows.fingerprints[part] not in recorded[part]]


def _known_rows(
    folder: Path, adapter: Adapter, task: TaskSettings, rows: Sequence[Example], data: str
) -> list[str]:
    """Warnings about `rows` that the run used to choose its checkpoint. Raises DataError for rows that it trained on."""
    try:
        tasks, changed = _own_rows(folder, adapter, adapter.settings.tasks)
    except FulcrumError as error:  # the run may have come from another machine, without its data
        return [f"{data}: not checked against the run's training rows: {error}"]
    lost = ", ".join(part for part in changed if not part.endswith(" test"))
    notes = (
        [
            f"{data}: checked against rows ({lost}) that changed since the run; it may hold rows trained on"
        ]
        if lost
        else []
    )
    for own in tasks:
        by_group = own.name == task.name and task.group is not None
        if shared := _shared(own.train, rows, f"{own.name} training", by_group):
            raise DataError(
                f"{data}: {shared}; the adapter was trained on them: remove them, and score rows that it never saw"
            )
        if shared := _shared(own.dev, rows, f"{own.name} dev", by_group):
            notes.append(
                f"{data}: {shared}; these chose the checkpoint, so their scores flatter the adapter"
            )
    return notes


def _shared(own: Sequence[Example], rows: Sequence[Example], of: str, by_group: bool) -> str:
    """What `rows` have in common with the run's `own` ones, or ''."""
    try:
        task_data.check_overlap(own, rows, "given", of=of, by_group=by_group)
    except DataError as error:
        return str(error).partition("; ")[0]  # the remedy is one for settings files
    return ""


def _test_rows(folder: Path, adapter: Adapter, task: TaskSettings) -> list[Example]:
    """The test rows that the run scored. Raises DataError where their files hold others today."""
    (own,), changed = _own_rows(folder, adapter, (task,))
    if f"{task.name} test" in changed:
        raise DataError(
            f"{folder}: the test rows of {task.name!r} changed since the run, so their scores would not stand beside its own; "
            "restore the files, or score other rows with --data FILE"
        )
    return list(own.test)
