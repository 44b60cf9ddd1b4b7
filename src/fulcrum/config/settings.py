"""The settings of a whole run: one YAML file, over which flags (`a.b=value`) take precedence.

Unknown keys are errors that name the nearest known key. The key names of other trainers are
accepted (`parsing.ALIASES`); they are renamed before validation, so the resolved settings in a run
folder always use Fulcrum's own names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from fulcrum.config import parsing
from fulcrum.config.base import (
    GeneralSource,
    GeneralSources,
    Section,
    UserPath,
    as_sources,
    may_hold_secret,
)
from fulcrum.config.experiments import CompareSettings, QuantaSettings, ScaleSettings
from fulcrum.config.sections import (
    CleanSettings,
    EvalSettings,
    MixSettings,
    TaskSettings,
    TeacherSettings,
    TrainSettings,
)
from fulcrum.core.errors import ConfigError, nearest

MIN_FOLDS = 4  # of the rows that seeds hold out
_DATA = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".arrow")  # no settings file
TemplateValue = bool | int | float | str | None
_TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


class Settings(Section):
    """A whole run."""

    model: UserPath = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="hub id, folder, .gguf file or a name from `fulcrum models`",
    )
    trust_remote_code: bool = Field(
        False, description="run code that comes with a hub model; off unless you read that code"
    )
    template: dict[str, TemplateValue] = Field(
        default_factory=dict,
        description="arguments of the chat template, as {enable_thinking: false}; `name` chooses "
        "one of several",
    )
    tasks: tuple[TaskSettings, ...] = Field(
        min_length=1, description="one task (`task:`) or several that share one adapter"
    )
    general: GeneralSources = Field((GeneralSource(path="builtin"),), description="general data")
    teacher: TeacherSettings | None = Field(
        None, description="who answers unlabelled inputs, if an arm asks for it"
    )
    clean: CleanSettings = CleanSettings()
    mix: MixSettings = MixSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    compare: CompareSettings = CompareSettings()
    scale: ScaleSettings = ScaleSettings()
    quanta: QuantaSettings = QuantaSettings()
    output_dir: UserPath = Field("runs/run", min_length=1, description="run folder")
    seed: int = Field(
        0,
        ge=0,
        description="root of all seeds: data, mix, initialisation, training; a comparison may "
        "have several",
    )

    report_to: tuple[str, ...] = Field(
        (),
        description="trackers that are sent curves, scores and certificates: "
        f"{', '.join(_TRACKERS)}; none: events.jsonl alone",
    )

    _sources = field_validator("general", mode="before")(as_sources)

    @field_validator("template")
    @classmethod
    def _check_arguments(cls, value: dict[str, TemplateValue]) -> dict[str, TemplateValue]:
        for name in value:
            if not name.isidentifier() or name in ("messages", "add_generation_prompt"):
                raise ValueError(f"{name!r} cannot be an argument of a chat template")
        if not isinstance(value.get("name", ""), str):
            raise ValueError(f"name: expected a template's name, got {value['name']!r}")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _accept_none(cls, value: Any) -> Any:
        return () if value in (None, "none", ["none"]) else value

    @field_validator("report_to")
    @classmethod
    def _check_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in _TRACKERS:
                raise ValueError(f"no tracker {name!r}{nearest(name, _TRACKERS)}")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _check_consistency(self) -> "Settings":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks need different names, got {names}; set tasks[i].name")
        if self.teacher is not None and may_hold_secret(self.teacher.endpoint):
            raise ValueError(
                "teacher.endpoint is written down, so it may hold no password; "
                "put the key into a variable"
            )
        weighted = {source.weight is not None: source.path for source in self.general}
        if len(weighted) == 2:
            raise ValueError(
                f"general: weight is given for {weighted[True]} and not for {weighted[False]}; "
                "give every source one, or none"
            )
        if self.mix.per_task > 0 and not self.general:
            raise ValueError(
                f"mix.general_per_task is {self.mix.per_task:g} and `general:` names no data; "
                "name some, or set it to 0"
            )
        return self

    def described(self) -> dict[str, Any]:
        """Return what numbers may depend on, as JSON holds it.

        That is all but where the run is written and which trackers it is reported to.
        """
        return self.model_dump(mode="json", exclude={"output_dir", "report_to"})

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of a comparison's chains: those given, else the run's own."""
        return self.compare.seeds or (self.seed,)

    @property
    def outer_folds(self) -> int:
        """Folds of the rows, of which each seed holds out one; 0 if each task has a test file."""
        return 0 if all(task.test for task in self.tasks) else max(MIN_FOLDS, len(self.seeds))

    def refuse_choosing_by(self, key: str, what: str, remedy: str) -> None:
        """Raise ConfigError if a comparison's seeds hold out each other's rows.

        Then no seed's task rows may choose anything for all seeds.
        """
        if self.outer_folds and len(self.seeds) > 1:
            raise ConfigError(
                f"{key}: without a test file the first seed's task rows are the other seeds' test "
                f"rows, which must not choose {what}; {remedy}, or give a test file"
            )


def load_settings(
    path: Path | str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> Settings:
    """Read a YAML file, then apply `overrides` and `options`.

    An override is `a.b=value`, with the value in YAML; options are values by our own names. Raises
    ConfigError if the file is missing or broken, a key is unknown or given twice, or a value does
    not fit.
    """
    file = Path(path)
    # Renamed before the flags, which may use our name for what the file calls otherwise.
    data = parsing.rename(_read_mapping(file))
    flags: dict[str, str] = {}
    for override in overrides:
        key, value = parsing.override(override)
        parsing.put(data, key, value)
        flags[key] = f"--set {override!r}"
    for key, value in (options or {}).items():
        parsing.put(data, key, value)
        flags[key] = f"--{key.replace('_', '-')}"
    return settings_from_dict(data, str(file), flags)


def settings_from_dict(
    data: Mapping[str, Any], where: str = "settings", flags: Mapping[str, str] | None = None
) -> Settings:
    """Validate nested settings; `flags` says by which flag a dotted name was set.

    Raises ConfigError naming the flag or `where`, the key, the value and the nearest known name.
    """
    if "task" not in data and "tasks" not in data:
        raise ConfigError(
            f"{where}: no `task:` section; write one, or start from `fulcrum init DATA_FILE`"
        )
    renamed = parsing.rename(data)
    if "task" in renamed:
        if "tasks" in renamed:
            raise ConfigError(
                "both `task` and `tasks` are given; use `task` for one, `tasks` for several"
            )
        task = renamed.pop("task")
        if isinstance(task, str | list):
            raise ConfigError(
                f"{where}: task is a mapping: write `task: {{train: {task}}}` (got {task!r:.200})"
            )
        renamed["tasks"] = [task]
    try:
        return Settings.model_validate(renamed)
    except ValidationError as error:
        raise parsing.explain(error, Settings, where, flags or {}) from None


def dump_settings(settings: Settings) -> str:
    """Return the resolved settings as YAML; `load_settings` of it gives equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_mapping(file: Path) -> dict[str, Any]:
    if file.name.lower().endswith(_DATA) and file.exists():
        raise ConfigError(
            f"{file}: is a data file, and this command takes a settings file, which says how the "
            f"rows are used; `fulcrum init {file}` writes one"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such settings file; write one with `fulcrum init DATA_FILE`"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{file}: is a folder; give a settings file, such as `fulcrum init DATA_FILE` writes"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: not readable as UTF-8 ({error.reason} at byte {error.start + 1})"
        ) from None
    content = parsing.parse(text, str(file))
    if content is None:
        raise ConfigError(f"{file}: is empty; write settings with `fulcrum init DATA_FILE`")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"{content!r:.60}"
        raise ConfigError(
            f"{file}: expected a mapping of settings, found {kind}; "
            "`fulcrum init DATA_FILE` writes one"
        )
    return content
