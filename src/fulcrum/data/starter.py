"""Write a commented settings file to start from, guessed from a data file and marked as a guess."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulcrum.config.base import DataSource
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Example
from fulcrum.data.readers import open_tables
from fulcrum.stats import metrics

_MOST_LABELS = 20
_MOST_LABEL_CHARACTERS = 40
_LONG_CHARACTERS = 200  # answers with more, in the median, are long text
_BYTES_PER_TOKEN = 3
_MOST_ANSWER_TOKENS = 1024
_PACKAGED = 2_200  # rows of the packaged pool, without those held out or too near to a task
_GENERAL_PER_TASK = 4

TEMPLATE = """\
# A run of Fulcrum: `fulcrum check` shows what the model will see, `fulcrum train` makes an adapter,
# and `fulcrum compare` measures what mixing brings against plain fine-tuning.
model: {model}  # a name from `fulcrum models`, hub id, folder or .gguf file
task:
  name: {name}
  train: {train}
  dev: null  # null: a fifth of the rows left for training is held out, in whole content groups
  test: {test}  # null: a quarter of the training rows is held out, in whole content groups
  # The anchor is added to every row of the task and to no other. This one is a guess: say in your
  # own words what the task is.
  anchor: {anchor}
  metrics: [{metrics}]  # guessed from the answers: {why}
  max_new_tokens: {max_new_tokens}  # of an answer: a generous guess from the longest one
general:
  - path: builtin  # rows that keep what the model can do; or a file, folder or hub id
mix:
  general_per_task: {general_per_task}  # general rows for each task row shown; {why_so_many}
  # How often each task row is shown: 1, 2, 4 and 8 are tried if there are enough general rows, and
  # dev rows decide.
  repeats: auto
output_dir: {output_dir}
seed: 0
"""


@dataclass(frozen=True)
class Guess:
    """Settings that follow from what the answers look like."""

    why: str  # what they look like
    metrics: tuple[str, ...]
    anchor: str
    max_new_tokens: int


def stem(data: str) -> str:
    """Name a task, its settings file and run folder after a file, folder, pattern or hub id."""
    name = re.sub(r"[^\w-]+", "_", Path(data).name.split(".")[0]).strip("_-")
    return "task" if name in ("", "default") else name


def read_columns(text: str) -> dict[str, str | None]:
    """Read ``ours=theirs,ours=theirs``; ``ours=`` says that no column is. Raises ConfigError."""
    columns: dict[str, str | None] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        ours, equals, theirs = part.partition("=")
        if not ours.strip() or not equals:
            raise ConfigError(
                f"--columns {part!r}: expected ours=theirs, e.g. "
                "--columns prompt=text,completion=label"
            )
        columns[ours.strip()] = theirs.strip() or None
    return columns


def formats(source: DataSource) -> str:
    """Return the row formats of a source's files. Raises DataError for what cannot be read."""
    names = [table.layout.format for table in open_tables(source)]
    return " and ".join(dict.fromkeys(names))


def guess(examples: Sequence[Example]) -> Guess:
    """Guess metrics, anchor and answer length from the answers of at least one row."""
    answers = [example.answer.strip() for example in examples]
    why, names, anchor = _guess_kind(answers)
    try:
        metrics.check_gold(names, examples)
    except DataError as error:  # of JSON that is odd, as with a key twice
        why = f"{why}, but {error}"
        names = tuple(name for name in names if name != "json_fields")
    longest = max(len(answer.encode()) for answer in answers) / _BYTES_PER_TOKEN
    tokens = math.ceil((1.25 * longest + 8) / 16) * 16
    return Guess(why, names, anchor, min(tokens, _MOST_ANSWER_TOKENS))


def _guess_kind(answers: Sequence[str]) -> tuple[str, tuple[str, ...], str]:
    """Return what the answers look like, the metrics and the anchor."""
    keys = json_keys(answers)
    if keys is not None:
        named = f" with the keys {_list(keys)}" if 0 < len(keys) <= _MOST_LABELS else ""
        anchor = f"Read the input and answer with one JSON object{named}."
        return "all are JSON objects", ("nll", "json_valid", "json_fields", "exact_match"), anchor
    labels = sorted({" ".join(answer.split()) for answer in answers})
    few = len(labels) <= min(_MOST_LABELS, len(answers) // 3)
    if few and max(map(len, labels)) <= _MOST_LABEL_CHARACTERS:
        anchor = f"Read the input and answer with exactly one of these labels: {_list(labels)}."
        if len(labels) == 1:
            why = f"all are the same ({labels[0]!r}): there is nothing to learn or to compare"
            return why, ("nll", "accuracy"), anchor
        return f"{len(labels)} labels", ("nll", "accuracy", "balanced_accuracy"), anchor
    if statistics.median(map(len, answers)) > _LONG_CHARACTERS:
        anchor = "Read the input and write the whole answer that it asks for."
        # ROUGE-L reads ASCII words only and refuses data without any.
        if any(re.search("[a-zA-Z0-9]", answer) for answer in answers):
            return "long text", ("nll", "rouge_l", "chrf"), anchor
        return "long text", ("nll", "chrf"), anchor
    anchor = "Read the input and give the answer only, without any explanation."
    return "short text", ("nll", "exact_match", "token_f1"), anchor


def json_keys(answers: Sequence[str]) -> list[str] | None:
    """Return the keys in order of appearance if every answer is a JSON object, else None."""
    keys: dict[str, None] = {}
    for answer in answers:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        keys.update(dict.fromkeys(value))
    return list(keys)


def write_yaml(
    guessed: Guess, *, train: DataSource, test: DataSource | None, model: str, n_rows: int
) -> str:
    """Return the YAML text that `load_settings` reads; the training file has `n_rows`."""
    name = stem(train.path)
    n_train = n_rows * 0.8 * (0.75 if test is None else 1)
    if _GENERAL_PER_TASK * n_train <= _PACKAGED:
        per_task: float = _GENERAL_PER_TASK
        why = "0 is plain fine-tuning"
    else:
        per_task = max(math.floor(10 * _PACKAGED / n_train) / 10, 0.1)
        why = (
            f"`builtin` has about {_PACKAGED:,}: name larger data and raise this to "
            f"{_GENERAL_PER_TASK}"
        )
    return TEMPLATE.format(
        model=_quote(model),
        name=_quote(name),
        anchor=_quote(guessed.anchor),
        train=_quote(_source(train)),
        test=_quote(None if test is None else _source(test)),
        output_dir=_quote(f"runs/{name}"),
        metrics=", ".join(guessed.metrics),
        why=guessed.why,
        max_new_tokens=guessed.max_new_tokens,
        general_per_task=f"{per_task:g}",
        why_so_many=why,
    )


def _source(source: DataSource) -> object:
    if source.columns:
        return {"path": source.path, "columns": source.columns}
    return source.path


def _quote(value: object) -> str:
    """Write a value as JSON, which is YAML whatever its strings hold."""
    return json.dumps(value, ensure_ascii=False)


def _list(names: Sequence[str]) -> str:
    return ", ".join("".join(filter(str.isprintable, name)) for name in names)
