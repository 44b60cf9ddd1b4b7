"""Settings as people write them: YAML text and `a.b=value` flags -> nested data; pydantic's findings -> sentences.

The settings themselves are `config`'s; here they are only "a pydantic model". Names of other trainers are renamed here, before
validation. Invariant: no key is read twice and no value is lost silently; whatever is refused is named with its place.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fulcrum.core.errors import ConfigError

# Names that people bring from TRL, LLaMA-Factory, Axolotl, ms-swift and Hugging Face -> ours (dotted).
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
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "a text", "tuple_type": "a list", "dict_type": "a mapping",
}  # fmt: skip

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
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in first:
                problem = (
                    f"{key.value!r} is given twice, first in line {first[key.value]}; keep one"
                )
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node


def parse(text: str, where: str) -> Any:
    """Read YAML. Raises ConfigError as ``where:line:column: problem`` for what is not YAML and for a key given twice."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        remedy = next(
            (f"; {remedy}" for part, remedy in _YAML_REMEDIES if part in str(error.problem)), ""
        )
        raise ConfigError(f"{place}: {error.problem}{remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}") from None


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, making those that lack. Raises ConfigError where a plain value is in the way."""
    *parents, last = dotted.split(".")
    for key in parents:
        child = data.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{dotted}: {key!r} already holds {child!r} and cannot take {last!r}; give {key} as a mapping"
            )
        data = child
    data[last] = value


def rename(data: Mapping[str, Any]) -> dict[str, Any]:
    """Move what stands under other trainers' names to ours. Raises ConfigError where a setting is then given twice."""
    given = {
        str(key).replace("-", "_"): dict(value) if isinstance(value, dict) else value
        for key, value in data.items()
    }
    result = {key: value for key, value in given.items() if key not in ALIASES}
    for key in [key for key in given if key in ALIASES]:
        section, _, last = ALIASES[key].rpartition(".")
        place = result.get(section) if section else result
        if isinstance(place, dict) and last in place:
            raise ConfigError(
                f"{key!r} and {ALIASES[key]!r} (or another name of it) are both given; keep one"
            )
        put(result, ALIASES[key], given[key])
    return result


def override(text: str) -> tuple[str, Any]:
    """Read ``a.b=value`` (the value is YAML) into our dotted name and the value. Raises ConfigError."""
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

    `flags`: dotted name -> the flag that set it; a finding there is the flag's, any other is that of the file `where`.
    """
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    dotted, section = _place(first["loc"], settings)
    plain = re.sub(r"\[\d+\]", "", dotted)
    where = next(
        (flag for name, flag in flags.items() if f"{plain}.".startswith(f"{name}.")), where
    )
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{where}: unknown setting {dotted!r}{_near(first['loc'], settings)}")
    if first["type"] == "missing":
        return ConfigError(
            f"{where}: {dotted!r} is missing; write it, or start from `fulcrum init DATA_FILE`"
        )
    # A setting that may be of several kinds has one finding for each.
    same = [_phrase(one, section) for one in found if _place(one["loc"], settings)[0] == dotted]
    expected = [text.removeprefix("expected ") for text in same if text.startswith("expected ")]
    message = (
        f"expected {' or '.join(dict.fromkeys(expected))}"
        if len(expected) == len(same)
        else same[0]
    )
    given = "nothing" if first["input"] in (None, "", (), []) else f"{first['input']!r:.200}"
    return ConfigError(
        f"{where}: {dotted or 'settings'}: {message}" + (f" (got {given})" if dotted else "")
    )


def _phrase(found: Any, section: type[BaseModel] | None) -> str:
    kind, context = found["type"], found.get("ctx", {})
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}"
    if kind == "literal_error":
        return f"expected {context['expected']}"
    if kind in ("model_type", "model_attributes_type") and section is not None:
        return f"expected a mapping with {', '.join(list(section.model_fields)[:3])} ..."
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    return str(found["msg"]).removeprefix("Value error, ")


def _place(
    location: Sequence[int | str], settings: type[BaseModel]
) -> tuple[str, type[BaseModel] | None]:
    """The dotted name of a finding, and the section that it is (None: a plain value)."""
    dotted, section = "", settings
    for place, part in enumerate(location):
        if isinstance(part, int):
            dotted += f"[{part}]"
            continue
        if part in _TAGS and place and isinstance(location[place - 1], int):
            continue  # pydantic's name for the kind of an item
        dotted += f".{part}"
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        if (
            below := _section(inner)
        ) is None:  # what follows are positions in a list, or pydantic's name for a kind of value
            dotted += "".join(
                f"[{rest}]" for rest in location[place + 1 :] if isinstance(rest, int)
            )
            return _named(dotted), None
        section = below
    return _named(dotted), section


def _named(dotted: str) -> str:
    return re.sub(r"^\.tasks\[0\]", ".task", dotted).removeprefix(".")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as ``tuple[DataSource, ...]``."""
    if (
        isinstance(annotation, type)
        and get_origin(annotation) is None
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def _names(section: type[BaseModel], prefix: str) -> dict[str, str]:
    """Full dotted name -> last part, of all settings below a section."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{'task' if name == 'tasks' else name}"
        found[dotted] = dotted.rpartition(".")[2]
        if (inner := _section(field.annotation)) is not None:
            found |= _names(inner, f"{dotted}.")
    return found


def _near(location: Sequence[int | str], settings: type[BaseModel]) -> str:
    """Which settings an unknown name may mean: another trainer's name, the same name elsewhere, a near one beside it."""
    *parents, wrong = location
    word = str(wrong).replace("-", "_")
    dotted, section = _place(parents, settings)
    if section is not None and RENAMED.get(word) in section.model_fields:
        return f"; it is called {RENAMED[word]!r} now"
    everywhere = _names(settings, "")
    exact = (
        [ALIASES[word]]
        if word in ALIASES
        else [name for name, last in everywhere.items() if last == word]
    )
    if not exact and section is not None:
        beside = {
            last: f"{dotted}.{last}".lstrip(".") for last in section.model_fields if last != "tasks"
        }
        beside |= {} if parents else {**ALIASES, "task": "task"}
        exact = list(
            dict.fromkeys(beside[last] for last in get_close_matches(word, beside, n=3, cutoff=0.5))
        )
        if not exact:
            return f"; known: {', '.join(sorted({*section.model_fields, *({} if parents else {'task': ''})}))}"
    return "; did you mean " + " or ".join(repr(name) for name in exact[:3]) + "?"
