"""Settings as people write them: YAML text and `a.b=value` flags.

Text becomes nested data, in which the key names of other trainers are replaced by ours; what
pydantic finds wrong becomes a sentence. Invariant: no key is read twice and no value is lost
silently; whatever is refused is named with its place.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fulcrum.core.errors import ConfigError

# Names that people bring from TRL, LLaMA-Factory, Axolotl, ms-swift and Hugging Face -> ours
# (dotted).
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

# Settings that had other names before -> theirs now; the old names are refused.
RENAMED: Mapping[str, str] = {
    "settings_of": "hyperparameters_of",
    "shots": "few_shot",
    "words": "tfidf",
}

# What PyYAML says -> what people most often have to do about it; the first that fits is used.
_YAML_REMEDIES = (
    ("mapping values are not allowed", "put quotes around a text that holds ': '"),
    ("'\\t'", "indent with spaces, not with tabs"),
    ("cannot start any token", "put quotes around a text that begins so"),
    ("undefined alias", "put quotes around a text that begins with *"),
    ("stream end", "a bracket is not closed"),
    ("end of stream", "a quote is not closed"),
)

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

_TAGS = ("arm by name", "arm in full")  # of items that are a name or a section

_BOUNDS: Mapping[str, str] = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "too_short": "needs at least 1 entry",
    "string_too_short": "must not be empty",
}


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; here the second is an error."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = (
                    f"{key.value!r} is given twice, first in line {lines[key.value]}; keep one"
                )
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def parse(text: str, where: str) -> Any:
    """Read YAML.

    Raises ConfigError as ``where:line:column: problem`` if it is not YAML or a key is given twice.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        remedy = ""
        for part, advice in _YAML_REMEDIES:
            if part in str(error.problem):
                remedy = f"; {advice}"
                break
        raise ConfigError(f"{place}: {error.problem}{remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}") from None


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, and make those that are missing.

    Raises ConfigError if a plain value is in the way.
    """
    *parents, last = dotted.split(".")
    for key in parents:
        child = data.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{dotted}: {key!r} already holds {child!r} and cannot take "
                f"{last!r}; give {key} as a mapping"
            )
        data = child
    data[last] = value


def rename(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replace other trainers' key names by ours.

    Raises ConfigError if a setting is then given twice.
    """
    result: dict[str, Any] = {}
    aliased: dict[str, Any] = {}
    for written, value in data.items():
        key = str(written).replace("-", "_")
        own = dict(value) if isinstance(value, dict) else value
        if key in ALIASES:
            aliased[key] = own
        else:
            result[key] = own
    for key, value in aliased.items():
        section, _, last = ALIASES[key].rpartition(".")
        place = result.get(section) if section else result
        if isinstance(place, dict) and last in place:
            raise ConfigError(
                f"{key!r} and {ALIASES[key]!r} (or another name of it) are both given; keep one"
            )
        put(result, ALIASES[key], value)
    return result


def override(text: str) -> tuple[str, Any]:
    """Return our dotted name and the value of ``a.b=value`` (the value is YAML).

    Raises ConfigError if there is no ``=`` or no name.
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
    """Return what pydantic found first in plain words; a misspelt name comes before all else.

    `flags`: dotted name -> the flag that set it; a finding there is the flag's, any other is that
    of the file `where`.
    """
    findings = error.errors()
    misspelt = [finding for finding in findings if finding["type"] == "extra_forbidden"]
    first = misspelt[0] if misspelt else findings[0]
    dotted, section = _place(first["loc"], settings)
    plain = re.sub(r"\[\d+\]", "", dotted)
    for name, flag in flags.items():
        if f"{plain}.".startswith(f"{name}."):
            where = flag
            break
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{where}: unknown setting {dotted!r}{_near(first['loc'], settings)}")
    if first["type"] == "missing":
        return ConfigError(
            f"{where}: {dotted!r} is missing; write it, or start from `fulcrum init DATA_FILE`"
        )
    # A setting that may be of several kinds has one finding for each.
    phrases = []
    for finding in findings:
        if _place(finding["loc"], settings)[0] == dotted:
            phrases.append(_phrase(finding, section))
    message = phrases[0]
    if all(text.startswith("expected ") for text in phrases):
        expected = dict.fromkeys(text.removeprefix("expected ") for text in phrases)
        message = f"expected {' or '.join(expected)}"
    if not dotted:
        return ConfigError(f"{where}: settings: {message}")
    given = "nothing" if first["input"] in (None, "", (), []) else f"{first['input']!r:.200}"
    return ConfigError(f"{where}: {dotted}: {message} (got {given})")


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
    section = settings
    for place, part in enumerate(location):
        if isinstance(part, int):
            dotted += f"[{part}]"
            continue
        if part in _TAGS and place and isinstance(location[place - 1], int):
            continue  # pydantic's name for the kind of an item
        dotted += f".{part}"
        field = section.model_fields.get(part)
        below = None if field is None else _section(field.annotation)
        if below is None:
            # What follows are positions in a list, or pydantic's name for a kind of value.
            for rest in location[place + 1 :]:
                if isinstance(rest, int):
                    dotted += f"[{rest}]"
            return _as_written(dotted), None
        section = below
    return _as_written(dotted), section


def _as_written(dotted: str) -> str:
    return re.sub(r"^\.tasks\[0\]", ".task", dotted).removeprefix(".")


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation such as ``tuple[DataSource, ...]``, if any."""
    is_class = isinstance(annotation, type) and get_origin(annotation) is None
    if is_class and issubclass(annotation, BaseModel):
        return cast(type[BaseModel], annotation)
    for part in get_args(annotation):
        section = _section(part)
        if section is not None:
            return section
    return None


def _names(section: type[BaseModel], prefix: str) -> dict[str, str]:
    """Return full dotted name -> last part, of all settings below a section."""
    names: dict[str, str] = {}
    for field_name, field in section.model_fields.items():
        last = "task" if field_name == "tasks" else field_name
        names[prefix + last] = last
        inner = _section(field.annotation)
        if inner is not None:
            names |= _names(inner, f"{prefix}{last}.")
    return names


def _near(location: Sequence[int | str], settings: type[BaseModel]) -> str:
    """Return which settings an unknown name may mean, as the end of a message.

    Another trainer's name comes first, then the same name elsewhere, then a similar one in the
    same section.
    """
    *parents, wrong = location
    word = str(wrong).replace("-", "_")
    dotted, section = _place(parents, settings)
    if section is not None and RENAMED.get(word) in section.model_fields:
        return f"; it is called {RENAMED[word]!r} now"
    if word in ALIASES:
        meant = [ALIASES[word]]
    else:
        meant = [name for name, last in _names(settings, "").items() if last == word]
    if not meant and section is not None:
        siblings: dict[str, str] = {}
        for last in section.model_fields:
            if last != "tasks":
                siblings[last] = f"{dotted}.{last}".lstrip(".")
        if not parents:
            siblings |= {**ALIASES, "task": "task"}
        near = get_close_matches(word, siblings, n=3, cutoff=0.5)
        meant = list(dict.fromkeys(siblings[last] for last in near))
        if not meant:
            known = {*section.model_fields}
            if not parents:
                known.add("task")
            return f"; known: {', '.join(sorted(known))}"
    return "; did you mean " + " or ".join(repr(name) for name in meant[:3]) + "?"
