"""The models that can be asked of some runs: one base model in memory, their adapters on it, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fulcrum.config.arms import arm_of, own_arm
from fulcrum.config.sections import TrainSettings
from fulcrum.config.settings import Settings
from fulcrum.core.errors import ConfigError, DataError, ModelError, nearest
from fulcrum.core.types import Message
from fulcrum.data import encode
from fulcrum.deploy.engine import Speaker, TooLongError, check_room
from fulcrum.experiments import finished
from fulcrum.model import adapter, generate
from fulcrum.model.base_model import LoadedModel

BASE = "base"  # by this name the model without an adapter is asked, and without an anchor


@dataclass(frozen=True)
class Speakers:
    """A base model with adapters on it, and by which names they are asked; `notes`: what differs from their training."""

    loaded: LoadedModel
    known: Mapping[str, Speaker]
    notes: tuple[str, ...]

    def speak(
        self,
        name: str,
        messages: Sequence[Message],
        told: Callable[[str], None] | None = None,
        *,
        anchored: bool = True,
    ) -> str:
        """The greedy answer of one of them to a conversation that ends with a question; `told` hears it as it comes. Raises
        DataError for what is no Unicode or too long."""
        speaker = self.known[name]
        form = speaker.form if anchored else encode.make_format(self.loaded.tokenizer, None)
        prompt = encode.prompt_ids(messages, form)
        try:
            check_room(prompt, speaker.longest, self.loaded.context)
        except TooLongError as error:
            raise DataError(f"{error}; /reset begins anew") from None
        with adapter.active(self.loaded, speaker.adapter):
            return generate.generate_one(
                self.loaded, prompt, form, max_new_tokens=speaker.longest, on_text=told
            )


def load(folders: Sequence[Path | str], wanted: Sequence[str] = ()) -> Speakers:
    """Load the base model once, and all adapters of some run folders, or those of the arms `wanted` (`base` is always there).

    An adapter is called by its arm, with several tasks `ARM/TASK`, of several runs `RUN/ARM`. Raises StoreError; ConfigError
    for an arm that no run has; ModelError where the runs' base models differ.
    """
    runs = {Path(folder): finished.read_settings(Path(folder)) for folder in folders}
    first, *others = runs
    for folder in others:
        if runs[folder].model != runs[first].model:
            raise ModelError(
                f"{folder} is a run of {runs[folder].model!r}, {first} of {runs[first].model!r}: serve them by two servers"
            )
    found = {
        folder: finished.adapter_folders(folder, settings) for folder, settings in runs.items()
    }
    there = {name for arms_there in found.values() for name in arms_there}
    for name in wanted:
        if name not in {BASE, *there}:
            raise ConfigError(
                f"no adapter of arm {name!r} in {', '.join(map(str, runs))}{nearest(name, {BASE, *there})}"
            )
    loaded = finished.load_base(runs[first])
    longest = max(task.max_new_tokens for settings in runs.values() for task in settings.tasks)
    known = {BASE: Speaker(adapter.BASE, encode.make_format(loaded.tokenizer, None), longest)}
    states: dict[str, tuple[adapter.State, TrainSettings]] = {}
    for folder, settings in runs.items():
        for name, weights in found[folder].items():
            if wanted and name not in wanted:
                continue
            key = f"adapter{len(states)}"  # an arm's own name may hold a dot, which PEFT's must not
            arm = arm_of(settings, name) if weights.name != "adapter" else own_arm(settings)
            states[key] = (
                finished.read_state(weights),
                finished.as_saved(weights, settings.train, arm),
            )
            for task, called in _names(folder, name, settings, several=len(runs) > 1).items():
                if called in known:
                    raise ConfigError(
                        f"two adapters would be called {called!r}; rename a folder, or an arm"
                    )
                own = next(one for one in settings.tasks if one.name == task)
                form = encode.make_format(
                    loaded.tokenizer, finished.task_anchor(own, arm, settings)
                )
                known[called] = Speaker(key, form, own.max_new_tokens)
    adapter.put_on(loaded, states)
    return Speakers(
        loaded,
        known,
        tuple(note for folder in runs for note in finished.other_base(folder, loaded)),
    )


def side_by_side(
    folder: Path, arm: str | None, others: Sequence[str], task: str | None
) -> tuple[Speakers, list[str]]:
    """The adapter of an arm (default: the first that the run has) and others beside it, and by which names they are asked for a
    task (default: the first). Raises as `load`, and ConfigError for an unknown task."""
    settings = finished.read_settings(folder)
    tasks = [one.name for one in settings.tasks]
    if task is not None and task not in tasks:
        raise ConfigError(f"no task {task!r} in this run{nearest(task, tasks)}")
    first = arm or next(iter(finished.adapter_folders(folder, settings)))
    wanted = list(dict.fromkeys([first, *others]))
    named = {
        name: name if name == BASE or len(tasks) == 1 else f"{name}/{task or tasks[0]}"
        for name in wanted
    }
    return load([folder], wanted), list(named.values())


def _names(folder: Path, arm: str, settings: Settings, *, several: bool) -> dict[str, str]:
    """By which name an adapter is asked, for each task."""
    run = [folder.resolve().name] if several else []
    tasks = settings.tasks
    return {
        task.name: "/".join([*run, arm, *([task.name] if len(tasks) > 1 else [])]) for task in tasks
    }
