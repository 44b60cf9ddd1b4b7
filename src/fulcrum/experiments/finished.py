"""Use a finished run folder: its adapter answers, and is scored on its own or other rows."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

_SAMPLE = 8  # rows on which an adapter must change a loss, or it is idle


@dataclass(frozen=True)
class Adapter:
    """A base model with one trained adapter on it, and how it was trained."""

    loaded: LoadedModel
    settings: Settings  # of its run
    arm: str  # that it was trained as
    anchors: dict[str, Anchor | None]  # by task
    folder: Path  # with its weights, in PEFT's format
    train: TrainSettings  # with the arm's rank and scale
    notes: tuple[str, ...] = ()  # what differs from the run's training, in words

    def anchor(self, task: str | None = None) -> Anchor | None:
        """Return the anchor of a task (the first by default). Raises ConfigError if unknown."""
        name = task or next(iter(self.anchors))
        if name not in self.anchors:
            raise ConfigError(f"no task {name!r} in this run{nearest(name, self.anchors)}")
        return self.anchors[name]

    def answer(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Return greedy answers to single questions (or to one), asked with the task's anchor."""
        questions = [texts] if isinstance(texts, str) else texts
        conversations = [(Message("user", text),) for text in questions]
        return self.reply(conversations, task=task, max_new_tokens=max_new_tokens)

    def reply(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Return greedy answers to conversations that end with a user's turn."""
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


@dataclass(frozen=True)
class Evaluation:
    """Scores and predictions of an adapter on some rows."""

    scores: tuple[Score, ...]
    predictions: tuple[Prediction, ...]
    file: Path  # of the predictions
    rejects: Mapping[str, int]  # rows that were not scored, by reason
    notes: tuple[str, ...]  # what to know about the scores, in words


def load_adapter(folder: Path | str, *, arm: str | None = None) -> Adapter:
    """Load the base model and the adapter of a run folder onto this machine's own device.

    A comparison holds several: `arm` names one (default: the first of tell, mix, sft_anchor, sft).
    Raises StoreError if the folder holds no finished run or no such arm, or if files were changed.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    weights, own = _adapter_folder(folder, arm, settings)
    state = read_state(weights)
    loaded = load_base(settings)
    trained = as_saved(weights, settings.train, own)
    adapter.use(loaded, state, trained)
    anchors = {task.name: task_anchor(task, own, settings) for task in settings.tasks}
    notes = tuple(other_base(folder, loaded))
    return Adapter(loaded, settings, own.name, anchors, weights, trained, notes)


def evaluate(
    folder: Path | str,
    *,
    data: str | None = None,
    arm: str | None = None,
    task: str | None = None,
    metric_names: Sequence[str] = (),
    out: Path | str | None = None,
) -> Evaluation:
    """Score an adapter on `data` (default: the task's own test rows), and write its predictions.

    They are JSON lines in `out` (default: a new file in the run folder's eval/). Raises DataError
    (also for rows that the adapter was trained on), ConfigError or StoreError.
    """
    folder = Path(folder)
    adapter = load_adapter(folder, arm=arm)
    own = _task_settings(adapter, task)
    names = tuple(metric_names) or own.metrics
    rejects: list[Reject] = []
    notes = list(adapter.notes)
    if data:
        source = DataSource(path=data, columns=(own.test or own.train)[0].columns)
        examples, rejects, unread = task_data.read_rows((source,), group=own.group)
        task_data.require_rows(examples, rejects, minimum=1)
        notes += unread
        notes += _check_unseen(folder, adapter, own, examples, data)
    else:
        examples = _test_rows(folder, adapter, own)
    form = encode.make_format(adapter.loaded.tokenizer, adapter.anchor(own.name))
    _check_lengths(adapter, own, names, examples, form)
    scored = Task(
        own.name, (), (), tuple(examples), adapter.anchor(own.name), names, own.max_new_tokens
    )
    predictions = scoring.predict(
        adapter.loaded, scored, examples, batch_tokens=adapter.settings.eval.batch_tokens
    )
    sample = [encode.final_answer(example, form) for example in examples[:_SAMPLE]]
    if _is_idle(adapter.loaded, sample):
        notes.append(
            f"{folder}: with the adapter these rows have the base model's very losses: it is not "
            "applied, or idle"
        )
    file = Path(out) if out is not None else _new_file(folder, data, adapter.arm, own.name)
    # Written before they are scored: a metric that fails loses no answers.
    store.write_jsonl(file, predictions)
    scores = metrics.score(predictions, names, draws=adapter.settings.eval.draws)
    by_reason = Counter(reject.reason for reject in rejects)
    return Evaluation(scores, predictions, file, by_reason, tuple(notes))


def rows_to_check(folder: Path, adapter: Adapter, task: str, most: int) -> list[Example]:
    """Return up to `most` rows on which an adapter can be compared with its export.

    They are the task's dev rows, or training rows if it has none. Rows that hold a special token's
    text are skipped: other programs read it as the token, Fulcrum as text. Raises DataError if
    none is left, or if the run's files are gone.
    """
    named = tuple(item for item in adapter.settings.tasks if item.name == task)
    try:
        (own,), _ = _own_rows(folder, adapter, named)
    except DataError as error:
        raise DataError(
            f"{error}; export where {folder} was trained, with its rows there, or write it "
            "unchecked (--rows 0)"
        ) from error
    special = encode.make_format(adapter.loaded.tokenizer, None).special
    rows = []
    for row in own.dev or own.train:
        if not any(special.search(message.content) for message in row.messages):
            rows.append(row)
    if not rows:
        raise DataError(
            f"{folder}: no dev or training row of {task!r} to score the export on; write it "
            "unchecked (--rows 0)"
        )
    return rows[:most]


# Reading a run folder.


def read_settings(folder: Path) -> Settings:
    """Read the settings of a run folder. Raises StoreError if it is none."""
    if not (folder / "config.yaml").exists():
        raise StoreError(
            f"{folder}: not a run folder (no config.yaml); give the output_dir of `fulcrum train` "
            "or `compare`"
        )
    return load_settings(folder / "config.yaml")


def load_base(settings: Settings) -> LoadedModel:
    """Load the base model of a run onto this machine's own device."""
    # The run's device may have been another machine's GPU.
    here = settings.train.model_copy(update={"device": "auto"})
    return base_model.load_for(settings, here)


def read_state(weights: Path) -> adapter.State:
    """Read an adapter's weights. Raises StoreError if its files are not those that were trained."""
    damaged = store.damaged(weights)
    if damaged:
        raise StoreError(
            f"{weights}: {', '.join(damaged)} changed or missing since training; make it again "
            "with --resume"
        )
    return load_file(weights / "adapter_model.safetensors")


def other_base(folder: Path, loaded: LoadedModel) -> Iterator[str]:
    """Give what differs between the base model here and the one in the run's manifest, in words."""
    trained = store.read_json(folder / store.MANIFEST)["environment"]
    here = environment(loaded)
    parts = {"weights": "files", "prompt": "chat template, or the date that it writes,"}
    for key, part in parts.items():
        if trained[key] != here[key]:
            yield (
                f"{loaded.name}: its {part} differ here from those of training: answers may be "
                "others"
            )


def task_anchor(task: TaskSettings, own: Arm, settings: Settings) -> Anchor | None:
    """Return the anchor with which an arm is asked."""
    return inference_anchor(own, Task(task.name, (), (), (), task.anchor_value()), settings)


def as_saved(weights: Path, settings: TrainSettings, own: Arm) -> TrainSettings:
    """Return the settings with the arm's own, and with the saved rank and scale.

    Averaged adapters have others than the arm.
    """
    saved = store.read_json(weights / "adapter_config.json")
    settings = cell.own_settings(settings, own, Hyperparameters())
    return settings.model_copy(update={"lora_r": saved["r"], "lora_alpha": saved["lora_alpha"]})


def adapter_folders(folder: Path, settings: Settings) -> dict[str, Path]:
    """Return the trained adapters of a run folder by their arms, the default one first.

    Raises StoreError if there is none.
    """
    if (folder / "adapter").is_dir():
        return {own_arm(settings).name: folder / "adapter"}
    own = [arm.name for arm in settings.compare.arms if isinstance(arm, Arm)]
    folders: dict[str, Path] = {}
    for name in (*by_use(), *own):
        place = folder / "adapters" / name
        if (place / "adapter_model.safetensors").exists():
            folders[name] = place
    if not folders:
        raise StoreError(f"{folder}: no trained adapter in it; finish the run with --resume")
    return folders


def _adapter_folder(folder: Path, arm: str | None, settings: Settings) -> tuple[Path, Arm]:
    folders = adapter_folders(folder, settings)
    if (folder / "adapter").is_dir():
        own = own_arm(settings)
        if arm not in (None, own.name):
            raise StoreError(f"{folder}: holds the arm {own.name!r} only, not {arm!r}")
        return folder / "adapter", own
    name = arm or next(iter(folders))
    if name not in folders:
        raise StoreError(f"{folder}: no adapter of arm {name!r}{nearest(name, folders)}")
    return folders[name], arm_of(settings, name)


# Scoring.


def _task_settings(adapter: Adapter, task: str | None) -> TaskSettings:
    """Return the settings of a task (the first by default). Raises ConfigError if unknown."""
    adapter.anchor(task)  # raises
    tasks = adapter.settings.tasks
    return next(item for item in tasks if item.name == (task or tasks[0].name))


def _check_lengths(
    adapter: Adapter,
    task: TaskSettings,
    names: Sequence[str],
    examples: Sequence[Example],
    form: encode.PromptFormat,
) -> None:
    """Raise DataError if a row, with room for an answer by metric `names`, exceeds the context."""
    context = adapter.loaded.context
    room = task.max_new_tokens if metrics.needs_generation(names) else 0
    _, over = task_data.take_fitting(examples, form, context or sys.maxsize, len(examples), room)
    if over:
        row, needed = over[0]
        raise DataError(
            f"{row.origin}: needs {needed} tokens with its answer, the model's context is "
            f"{context} ({len(over)} such rows); shorten or remove them, or lower "
            f"task.max_new_tokens ({task.max_new_tokens})"
        )


def _is_idle(loaded: LoadedModel, rows: Sequence[Tokens]) -> bool:
    """Return whether the adapter changes the loss of none of the rows."""
    with adapter.without(loaded):
        base, _ = generate.nats(loaded, rows)
    adapted, _ = generate.nats(loaded, rows)
    return bool((base == adapted).all())


def _new_file(folder: Path, data: str | None, arm: str, task: str) -> Path:
    """Return a file in eval/ that does not exist yet, named after what is scored."""
    rows = starter.stem(data) if data else "test"
    stem = f"{rows}-{arm}-{task}"
    file = folder / "eval" / f"{stem}.jsonl"
    number = 1
    while file.exists():
        number += 1
        file = folder / "eval" / f"{stem}-{number}.jsonl"
    return file


# The run's own rows.


def _own_rows(
    folder: Path, adapter: Adapter, tasks: tuple[TaskSettings, ...]
) -> tuple[tuple[Task, ...], list[str]]:
    """Return the rows of the run's `tasks` as their files hold them today, and what changed.

    That is a list of parts (`colour train`) whose rows are not those of the run.
    """
    settings, loaded = adapter.settings, adapter.loaded
    without_pool = settings.model_copy(
        update={
            "tasks": tasks,
            "mix": settings.mix.model_copy(update={"general_per_task": 0.0}),
            "general": (),
            "eval": settings.eval.model_copy(update={"general_rows": 0}),
        }
    )
    if (folder / "adapter").is_dir():
        rows = run_data.prepare(without_pool, loaded.tokenizer, loaded.context, settings.seed)
        used = rows
    else:  # a comparison, which keeps the adapters of its first seed
        rows = run_data.of_seeds(
            without_pool, loaded.tokenizer, loaded.context, settings.seeds, mixed_rows=None
        )[0]
        arm = arm_of(settings, adapter.arm)
        used = rows.at(max(sizes_of(settings, arm, rows.longest)))
    recorded = store.read_json(folder / store.MANIFEST)["data"]
    changed = []
    for task in tasks:
        for part in (f"{task.name} train", f"{task.name} dev", f"{task.name} test"):
            if rows.fingerprints[part] not in recorded[part]:
                changed.append(part)
    return used.tasks, changed


def _test_rows(folder: Path, adapter: Adapter, task: TaskSettings) -> list[Example]:
    """Return the test rows that the run scored. Raises DataError if their files changed."""
    (own,), changed = _own_rows(folder, adapter, (task,))
    if f"{task.name} test" in changed:
        raise DataError(
            f"{folder}: the test rows of {task.name!r} changed since the run, so their scores "
            "could not be compared with its own; restore the files, or score other rows with "
            "--data FILE"
        )
    return list(own.test)


def _check_unseen(
    folder: Path, adapter: Adapter, task: TaskSettings, rows: Sequence[Example], data: str
) -> list[str]:
    """Raise DataError for rows that the run trained on; return warnings about its dev rows."""
    try:
        tasks, changed = _own_rows(folder, adapter, adapter.settings.tasks)
    except FulcrumError as error:  # the run may have come from another machine, without its data
        return [f"{data}: not checked against the run's training rows: {error}"]
    notes = []
    lost = ", ".join(part for part in changed if not part.endswith(" test"))
    if lost:
        notes.append(
            f"{data}: checked against rows ({lost}) that changed since the run; it may hold rows "
            "trained on"
        )
    for own in tasks:
        by_group = own.name == task.name and task.group is not None
        shared = _shared(own.train, rows, f"{own.name} training", by_group)
        if shared:
            raise DataError(
                f"{data}: {shared}; the adapter was trained on them: remove them, and score rows "
                "that it never saw"
            )
        shared = _shared(own.dev, rows, f"{own.name} dev", by_group)
        if shared:
            notes.append(
                f"{data}: {shared}; these chose the checkpoint, so their scores flatter the adapter"
            )
    return notes


def _shared(own: Sequence[Example], rows: Sequence[Example], of: str, by_group: bool) -> str:
    """Say what `rows` have in common with the run's `own` ones; empty if nothing."""
    try:
        task_data.check_overlap(own, rows, "given", of=of, by_group=by_group)
    except DataError as error:
        return str(error).partition("; ")[0]  # the remedy is one for settings files
    return ""
