"""Settings as people write them: YAML text and `a.b=value` flags, and messages about them.

Texts become nested data, and pydantic's findings become sentences. The settings themselves are in
`settings`; here they are only "a pydantic model". Other trainers' names become ours here, before
validation.

Invariant: no key is read twice and no value is lost silently; whatever is refused is named with its
place.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fulcrum.core.errors import ConfigError

# Names in TRL, LLaMA-Factory, Axolotl, ms-swift and Hugging Face -> ours (dotted).
ALIASES: Mapping[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "lr": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "mix.repeats",
    "per_device_train_batch_size": "train.batch_size",
    "batch_size": "train.batch_size",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "train.max_length",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "lora_r": "train.lora_r",
    "lora_rank": "train.lora_r",
    "lora_alpha": "train.lora_alpha",
    "lora_dropout": "train.lora_dropout",
    "lora_target_modules": "train.lora_target_modules",
    "use_rslora": "train.use_rslora",
    "use_dora": "train.use_dora",
    "max_new_tokens": "task.max_new_tokens",
    "early_stopping_patience": "train.early_stopping_patience",
    "data_seed": "seed",
}

# Former names of settings -> today's; the former ones are refused.
RENAMED: Mapping[str, str] = {
    "settings_of": "hyperparameters_of",
    "shots": "few_shot",
    "words": "tfidf",
}

# A part of PyYAML's message -> what most often has to be done; the first that fits is used.
_YAML_REMEDIES = (
    ("mapping values are not allowed", "put quotes around a text that holds ': '"),
    ("'\\t'", "indent with spaces, not with tabs"),
    ("cannot start any token", "put quotes around a text that begins so"),
    ("undefined alias", "put quotes around a text that begins with *"),
    ("stream end", "a bracket is not closed"),
    ("end of stream", "a quote is not closed"),
)

# pydantic's types of errors -> what was expected.
_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}

_BOUNDS: Mapping[str, str] = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "too_short": "needs at least 1 entry",
    "string_too_short": "must not be empty",
}

# pydantic's names for the kinds of an item that is either a name or a section.
_TAGS = ("arm by name", "arm in full")


def parse(text: str, where: str) -> Any:
    """Read YAML.

    Raises ConfigError as ``where:line:column: problem`` if it is no YAML or gives a key twice.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        remedy = _yaml_remedy(str(error.problem))
        raise ConfigError(f"{place}: {error.problem}{remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}") from None


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, adding those that are missing.

    Raises ConfigError if a plain value is in the way.
    """
    *parents, last = dotted.split(".")
    for key in parents:
        child = data.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{dotted}: {key!r} already holds {child!r} and cannot take {last!r}; "
                f"give {key} as a mapping"
            )
        data = child
    data[last] = value


def rename(data: Mapping[str, Any]) -> dict[str, Any]:
    """Move what other trainers' names hold to ours.

    Raises ConfigError if a setting is then given twice.
    """
    result: dict[str, Any] = {}
    foreign: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        target = foreign if name in ALIASES else result
        target[name] = dict(value) if isinstance(value, dict) else value
    for name, value in foreign.items():
        section, _, last = ALIASES[name].rpartition(".")
        place = result.get(section) if section else result
        if isinstance(place, dict) and last in place:
            raise ConfigError(
                f"{name!r} and {ALIASES[name]!r} (or another name of it) are both given; keep one"
            )
        put(result, ALIASES[name], value)
    return result


def override(text: str) -> tuple[str, Any]:
    """Read ``a.b=value`` into our dotted name and the value, which is YAML.

    Raises ConfigError if it is something else.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(
            f"--set {text!r}: expected key=value, e.g. --set train.learning_rate=2e-4"
        )
    return ALIASES.get(key.replace("-", "_"), key), parse(value, f"--set {text!r}: value")


def explain(
    error: ValidationError, settings: type[BaseModel], where: str, flags: Mapping[str, str]
) -> ConfigError:
    """Say in plain words what pydantic found first, a misspelt name before all else.

    `flags` maps a dotted name to the flag that set it. A finding at such a name is the flag's, any
    other is the file's, which `where` names.
    """
    findings = error.errors()
    misspelt = [finding for finding in findings if finding["type"] == "extra_forbidden"]
    first = (misspelt or findings)[0]
    dotted, _ = _place(first["loc"], settings)
    where = _flag_of(dotted, flags) or where
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{where}: unknown setting {dotted!r}{_hint(first['loc'], settings)}")
    if first["type"] == "missing":
        return ConfigError(
            f"{where}: {dotted!r} is missing; write it, or start from `fulcrum init DATA_FILE`"
        )
    message = _message(findings, dotted, settings)
    if not dotted:
        return ConfigError(f"{where}: settings: {message}")
    given = "nothing" if first["input"] in (None, "", (), []) else f"{first['input']!r:.200}"
    return ConfigError(f"{where}: {dotted}: {message} (got {given})")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation such as ``tuple[DataSource, ...]``."""
    # `list[str]` counts as a type, and is none that `issubclass` takes.
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    for part in get_args(annotation):
        section = section_in(part)
        if section is not None:
            return section
    return None


def dotted_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    """List the full dotted names of all settings below a section."""
    names = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{'task' if name == 'tasks' else name}"
        names.append(dotted)
        inner = section_in(field.annotation)
        if inner is not None:
            names += dotted_names(inner, f"{dotted}.")
    return names


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; here the second is an error."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = (
                    f"{key.value!r} is given twice, first in line {first[key.value]}; keep one"
                )
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node


def _yaml_remedy(problem: str) -> str:
    for part, remedy in _YAML_REMEDIES:
        if part in problem:
            return f"; {remedy}"
    return ""


def _flag_of(dotted: str, flags: Mapping[str, str]) -> str | None:
    """Return the flag that set a name, or a section that holds it."""
    plain = re.sub(r"\[\d+\]", "", dotted)
    for name, flag in flags.items():
        if f"{plain}.".startswith(f"{name}."):
            return flag
    return None


def _message(findings: Sequence[Any], dotted: str, settings: type[BaseModel]) -> str:
    """Say what is wrong with a setting. One that may be of several kinds has a finding for each."""
    phrases = []
    for finding in findings:
        name, section = _place(finding["loc"], settings)
        if name == dotted:
            phrases.append(_phrase(finding, section))
    if not all(phrase.startswith("expected ") for phrase in phrases):
        return phrases[0]
    kinds = [phrase.removeprefix("expected ") for phrase in phrases]
    return f"expected {' or '.join(dict.fromkeys(kinds))}"


def _phrase(finding: Any, section: type[BaseModel] | None) -> str:
    kind = finding["type"]
    context = finding.get("ctx", {})
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}"
    if kind == "literal_error":
        return f"expected {context['expected']}"
    if kind in ("model_type", "model_attributes_type") and section is not None:
        return f"expected a mapping with {', '.join(list(section.model_fields)[:3])} ..."
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    return str(finding["msg"]).removeprefix("Value error, ")


def _place(
    location: Sequence[int | str], settings: type[BaseModel]
) -> tuple[str, type[BaseModel] | None]:
    """Return the dotted name of a finding, and the section that it is (None: a plain value)."""
    dotted = ""
    section: type[BaseModel] | None = settings
    for place, part in enumerate(location):
        if isinstance(part, int):
            dotted += f"[{part}]"
        elif section is None:
            continue  # pydantic's name for a kind of value
        elif part not in _TAGS or not place or not isinstance(location[place - 1], int):
            dotted += f".{part}"
            field = section.model_fields.get(part)
            section = None if field is None else section_in(field.annotation)
    return re.sub(r"^\.tasks\[0\]", ".task", dotted).removeprefix("."), section


def _hint(location: Sequence[int | str], settings: type[BaseModel]) -> str:
    """Return which settings an unknown name may mean.

    That is another trainer's name, the same name elsewhere, or a similar one in its section.
    """
    *parents, wrong = location
    word = str(wrong).replace("-", "_")
    dotted, section = _place(parents, settings)
    if section is not None and RENAMED.get(word) in section.model_fields:
        return f"; it is called {RENAMED[word]!r} now"
    names = _same_name(word, settings)
    if not names and section is not None:
        neighbours = _neighbours(section, dotted)
        close = get_close_matches(word, neighbours, n=3, cutoff=0.5)
        names = list(dict.fromkeys(neighbours[name] for name in close))
        if not names:
            known = {*section.model_fields}
            if not parents:
                known.add("task")
            return f"; known: {', '.join(sorted(known))}"
    return "; did you mean " + " or ".join(map(repr, names[:3])) + "?"


def _same_name(word: str, settings: type[BaseModel]) -> list[str]:
    """List the dotted names that a word is another trainer's name of, or the last part of."""
    if word in ALIASES:
        return [ALIASES[word]]
    return [name for name in dotted_names(settings) if name.rpartition(".")[2] == word]


def _neighbours(section: type[BaseModel], dotted: str) -> dict[str, str]:
    """Map what could be meant in a section to its dotted name; at the top aliases too."""
    names = {}
    for name in section.model_fields:
        if name != "tasks":
            names[name] = f"{dotted}.{name}".lstrip(".")
    if not dotted:
        names.update(ALIASES)
        names["task"] = "task"
    return names
