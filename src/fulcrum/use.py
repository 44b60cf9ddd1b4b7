"""A finished run folder in use: answers, a conversation, scores on other rows. Also the face for notebooks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from fulcrum import adapter as adapters
from fulcrum import comparison, config, encode, generate, ingest, material, metrics, model, scoring, store
from fulcrum import run as running
from fulcrum.config import DataSource, Settings, TaskSettings
from fulcrum.errors import ConfigError, DataError, StoreError, nearest
from fulcrum.model import LoadedModel
from fulcrum.records import Anchor, Example, Message, Prediction, Results, Score, Task


@dataclass(frozen=True)
class Adapter:
    """A base model with one trained adapter on it, and the settings of its run."""

    loaded: LoadedModel
    settings: Settings
    anchors: dict[str, Anchor | None]

    def anchor(self, task: str | None = None) -> Anchor | None:
        """The anchor of a task (the only or first one by default). Raises ConfigError for an unknown task."""
        name = task or next(iter(self.anchors))
        if name not in self.anchors:
            raise ConfigError(f"no task {name!r} in this run{nearest(name, self.anchors)}")
        return self.anchors[name]

    def answer(self, texts: Sequence[str], *, task: str | None = None, max_new_tokens: int | None = None) -> list[str]:
        """Greedy answers to single questions, with the task's anchor, in the order of `texts`."""
        return self.reply([(Message("user", text),) for text in texts], task=task, max_new_tokens=max_new_tokens)

    def reply(
        self, conversations: Sequence[Sequence[Message]], *, task: str | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """Greedy answers to conversations that end with a user's turn."""
        form = encode.make_format(self.loaded.tokenizer, self.anchor(task))
        longest = max_new_tokens or max(item.max_new_tokens for item in self.settings.tasks)
        prompts = [encode.prompt_ids(messages, form) for messages in conversations]
        return generate.generate(
            self.loaded, prompts, form, max_new_tokens=longest, batch_tokens=self.settings.eval.batch_tokens
        )


def load_adapter(folder: Path | str, *, arm: str | None = None) -> Adapter:
    """Load the base model and the adapter of a run folder; of a comparison, the adapter of `arm` (default: tell).

    Raises StoreError where the folder holds no finished run or no such arm.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise StoreError(f"{folder}: not a run folder (no config.yaml); give the output_dir of `fulcrum train` or `compare`")
    settings = config.load(folder / "config.yaml")
    weights, anchored = _adapter_folder(folder, arm, settings)
    loaded = model.load(settings.model, settings.train, trust_remote_code=settings.trust_remote_code)
    file = weights / "adapter_model.safetensors"
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file}: not a whole adapter ({error}); run the training again with --resume") from error
    adapters.use(loaded, state, settings.train)
    return Adapter(loaded, settings, {task.name: task.anchor_value() if anchored else None for task in settings.tasks})


def _adapter_folder(folder: Path, arm: str | None, settings: Settings) -> tuple[Path, bool]:
    if (folder / "adapter").is_dir():
        own = running.own_arm(settings)
        if arm not in (None, own.name):
            raise StoreError(f"{folder}: holds the arm {own.name!r} only, not {arm!r}")
        return folder / "adapter", own.anchored
    found = sorted(path.name for path in (folder / "adapters").glob("*") if (path / "adapter_model.safetensors").exists())
    if not found:
        raise StoreError(f"{folder}: no trained adapter in it; finish the run with --resume")
    name = arm or ("tell" if "tell" in found else found[0])
    if name not in found:
        raise StoreError(f"{folder}: no adapter of arm {name!r}{nearest(name, found)}")
    return folder / "adapters" / name, running.ARMS[name].anchored


def evaluate_run(
    folder: Path | str, *, data: str | None = None, arm: str | None = None, task: str | None = None,
    metric_names: Sequence[str] = (),
) -> tuple[tuple[Score, ...], tuple[Prediction, ...]]:  # fmt: skip
    """Score an adapter on `data` (default: the task's own test rows). Raises DataError, ConfigError or StoreError."""
    adapter = load_adapter(folder, arm=arm)
    adapter.anchor(task)
    wanted = next(item for item in adapter.settings.tasks if item.name == (task or adapter.settings.tasks[0].name))
    names = tuple(metric_names) or wanted.metrics
    form = encode.make_format(adapter.loaded.tokenizer, adapter.anchor(task))
    if data:
        source = DataSource(path=data, columns=(wanted.test or wanted.train)[0].columns)
        examples, rejects = ingest.read((source,), group=wanted.group)
        ingest.require_rows(examples, rejects, minimum=1)
    else:
        examples = _test_rows(Path(folder), adapter, wanted)
    room = wanted.max_new_tokens if metrics.needs_generation(names) else 0
    over = material.fitting(examples, form, adapter.loaded.context or sys.maxsize, len(examples), room)[1]
    if over:
        raise DataError(
            f"{over[0][0].origin}: needs {over[0][1]} tokens with its answer, the model's context is {adapter.loaded.context} "
            f"({len(over)} such rows); shorten or remove them, or lower task.max_new_tokens ({wanted.max_new_tokens})"
        )
    scored = Task(wanted.name, (), (), tuple(examples), adapter.anchor(task), names, wanted.max_new_tokens)
    predictions = scoring.predict(
        adapter.loaded, scored, examples, anchored=scored.anchor is not None, batch_tokens=adapter.settings.eval.batch_tokens
    )
    return metrics.score(predictions, names, draws=adapter.settings.eval.draws), predictions


def _test_rows(folder: Path, adapter: Adapter, task: TaskSettings) -> list[Example]:
    """The test rows that the run scored. Raises DataError where their files hold others today."""
    settings, loaded = adapter.settings, adapter.loaded
    whole, _ = material.read_task(task, settings.seed)
    rows = material.choose(whole, task, settings, loaded.tokenizer, loaded.context, settings.seed)[0].test
    if store.fingerprint(rows) not in store.read_json(folder / store.MANIFEST)["data"][f"{task.name} test"]:
        raise DataError(
            f"{folder}: the test rows of {task.name!r} changed since the run, so their scores would not stand beside its own; "
            "restore the files, or score other rows with --data FILE"
        )
    return list(rows)


def train(**settings: Any) -> Results:
    """Train one adapter; the keywords are the keys of the YAML file (`model=`, `task=`, `general=`, `mix=` ...)."""
    return running.run(config.from_dict(settings))


def compare(**settings: Any) -> Results:
    """Compare arms; the keywords are the keys of the YAML file (`model=`, `task=`, `compare=` ...)."""
    return comparison.compare(config.from_dict(settings))
