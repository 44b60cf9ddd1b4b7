"""The models of some runs: one base model in memory, with their adapters on it, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulcrum.config.arms import arm_of, own_arm
from fulcrum.config.sections import TrainSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, DataError, ModelError, nearest
from fulcrum.core.types import Message
from fulcrum.data import encode
from fulcrum.deploy.engine import ServedModel, TooLongError, check_room
from fulcrum.experiments import finished
from fulcrum.model import adapter, generate
from fulcrum.model.base_model import LoadedModel

BASE = "base"  # the name of the model without an adapter, and without an anchor


@dataclass(frozen=True)
class ServedModels:
    """A base model with adapters on it."""

    loaded: LoadedModel
    by_name: Mapping[str, ServedModel]
    notes: tuple[str, ...]  # what differs from their training, in words

    def speak(
        self,
        name: str,
        messages: Sequence[Message],
        on_text: Callable[[str], None] | None = None,
        *,
        anchored: bool = True,
    ) -> str:
        """Return a model's greedy answer to a conversation that ends with a question.

        `on_text` is called with the answer's parts as they come. Raise DataError for a text that is
        no Unicode or too long.
        """
        served = self.by_name[name]
        form = served.form if anchored else encode.make_format(self.loaded.tokenizer, None)
        prompt = encode.prompt_ids(messages, form)
        try:
            check_room(prompt, served.longest, self.loaded.context)
        except TooLongError as error:
            raise DataError(f"{error}; /reset begins anew") from None
        with adapter.active(self.loaded, served.adapter):
            return generate.generate_one(
                self.loaded, prompt, form, max_new_tokens=served.longest, on_text=on_text
            )


def load(folders: Sequence[Path | str], wanted: Sequence[str] = ()) -> ServedModels:
    """Load the base model once, with the adapters of run folders, or only of the arms `wanted`.

    `base` is always there. An adapter is called by its arm; with several tasks `ARM/TASK`; with
    several runs `RUN/ARM`. Raise StoreError; ConfigError for an arm that no run has; ModelError if
    the runs' base models differ.
    """
    runs = {Path(folder): finished.read_settings(Path(folder)) for folder in folders}
    _check_same_base(runs)
    weights = {}
    for folder, settings in runs.items():
        weights[folder] = finished.adapter_folders(folder, settings)
    _check_arms(wanted, weights)
    loaded = finished.load_base(next(iter(runs.values())))
    longest = max(task.max_new_tokens for settings in runs.values() for task in settings.tasks)
    served_models = {
        BASE: ServedModel(adapter.BASE, encode.make_format(loaded.tokenizer, None), longest)
    }
    states: dict[str, tuple[adapter.State, TrainSettings]] = {}
    for folder, settings in runs.items():
        run_name = folder.resolve().name if len(runs) > 1 else None
        for arm_name, place in weights[folder].items():
            if wanted and arm_name not in wanted:
                continue
            key = f"adapter{len(states)}"  # an arm's name may hold a dot, which PEFT's must not
            arm = own_arm(settings) if place.name == "adapter" else arm_of(settings, arm_name)
            train = finished.as_saved(place, settings.train, arm)
            states[key] = (finished.read_state(place), train)
            for task in settings.tasks:
                name = _served_name(run_name, arm_name, task.name, settings)
                if name in served_models:
                    raise ConfigError(
                        f"two adapters would be called {name!r}; rename a folder, or an arm"
                    )
                anchor = finished.task_anchor(task, arm, settings)
                form = encode.make_format(loaded.tokenizer, anchor)
                served_models[name] = ServedModel(key, form, task.max_new_tokens)
    adapter.put_on(loaded, states)
    notes: list[str] = []
    for folder in runs:
        notes += finished.other_base(folder, loaded)
    return ServedModels(loaded, served_models, tuple(notes))


def side_by_side(
    folder: Path, arm: str | None, others: Sequence[str], task: str | None
) -> tuple[ServedModels, list[str]]:
    """Load the adapter of an arm and others to compare it with; return also their names.

    Defaults: the first arm that the run has, and its first task. Raise as `load`, and ConfigError
    for an unknown task.
    """
    settings = finished.read_settings(folder)
    tasks = [one.name for one in settings.tasks]
    if task is not None and task not in tasks:
        raise ConfigError(f"no task {task!r} in this run{nearest(task, tasks)}")
    first = arm or next(iter(finished.adapter_folders(folder, settings)))
    wanted = list(dict.fromkeys([first, *others]))
    names = []
    for name in wanted:
        if name == BASE:
            names.append(BASE)
        else:
            names.append(_served_name(None, name, task or tasks[0], settings))
    return load([folder], wanted), names


def _check_same_base(runs: Mapping[Path, Settings]) -> None:
    first, *others = runs
    for folder in others:
        if runs[folder].model != runs[first].model:
            raise ModelError(
                f"{folder} is a run of {runs[folder].model!r}, {first} of {runs[first].model!r}: "
                "serve them by two servers"
            )


def _check_arms(wanted: Sequence[str], weights: Mapping[Path, Mapping[str, Path]]) -> None:
    """Raise ConfigError for an arm that no run has; `weights`: adapter folders by run and arm."""
    names = {BASE}
    for by_arm in weights.values():
        names |= by_arm.keys()
    for name in wanted:
        if name not in names:
            folders = ", ".join(map(str, weights))
            raise ConfigError(f"no adapter of arm {name!r} in {folders}{nearest(name, names)}")


def _served_name(run: str | None, arm: str, task: str, settings: Settings) -> str:
    """Return the name of an adapter for one of its tasks; `run`: None if there is one run alone."""
    parts = [arm] if run is None else [run, arm]
    if len(settings.tasks) > 1:
        parts.append(task)
    return "/".join(parts)
