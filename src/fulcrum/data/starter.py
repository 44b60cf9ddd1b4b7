"""A data file -> a commented YAML file to start from. What is guessed from the answers is said to be a guess."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulcrum.config.base import DataSource
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example
from fulcrum.data.readers import open_tables

LABELS, LABEL_CHARACTERS, LONG_CHARACTERS = 20, 40, 200
BYTES_PER_TOKEN, LONGEST_ANSWER = 3, 1024
_PACKAGED = 2_200  # rows of the packaged pool, less what is held out or too near to a task

TEMPLATE = """\
# A run of Fulcrum: `fulcrum check` shows what the model will see, `fulcrum train` makes an adapter,
# and `fulcrum compare` measures what mixing brings against plain fine-tuning.
model: {model}  # a name from `fulcrum models`, hub id, folder or .gguf file
task:
  name: {name}
  train: {train}
  dev: null  # null: a fifth of the rows left for training is held out, in whole content groups
  test: {test}  # null: a quarter of the training rows is held out, in whole content groups
  # The anchor stands in every row of the task and in no other. This one is a guess: say in your own words what the task is.
  anchor: {anchor}
  metrics: [{metrics}]  # guessed from the answers: {why}
  max_new_tokens: {max_new_tokens}  # longest answer, in tokens: a generous guess from the characters
general:
  - path: builtin  # rows that keep what the model can do; or a file, folder or hub id
mix:
  general_per_task: {general_per_task}  # general rows for each task row shown; {why_so_many}
  repeats: auto  # how often each task row is shown: 1, 2, 4 and 8 are tried where the general data suffice, dev rows decide
output_dir: {output_dir}
seed: 0
"""


@dataclass(frozen=True)
class Guess:
    """What the answers look like, and what follows from it."""

    why: str
    metrics: tuple[str, ...]
    anchor: str
    max_new_tokens: int


def stem(data: str) -> str:
    """A name after a data file, folder, pattern or hub id: for the task, its settings file and its run folder."""
    name = re.sub(r"[^\w-]+", "_", Path(data).name.split(".")[0]).strip("_-")
    return "task" if name in ("", "default") else name


def read_columns(text: str) -> dict[str, str]:
    """Read ``ours=theirs,ours=theirs``. Raises ConfigError."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if wrong := [
        f"{ours}{sign}{theirs}"
        for ours, sign, theirs in pairs
        if not (ours.strip() and theirs.strip())
    ]:
        raise ConfigError(
            f"--columns {wrong[0]!r}: expected ours=theirs, e.g. --columns prompt=text,completion=label"
        )
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def formats(source: DataSource) -> str:
    """The row formats that the files of a source have. Raises DataError for what cannot be read."""
    return " and ".join(dict.fromkeys(table.layout.format for table in open_tables(source)))


def guess(examples: Sequence[Example]) -> Guess:
    """Guess metrics, anchor and answer length from the answers of at least one row."""
    answers = [example.answer.strip() for example in examples]
    longest = max(len(answer.encode()) for answer in answers) / BYTES_PER_TOKEN
    tokens = min(math.ceil((1.25 * longest + 8) / 16) * 16, LONGEST_ANSWER)
    if (keys := json_keys(answers)) is not None:
        named = f" with the keys {_listed(keys)}" if 0 < len(keys) <= LABELS else ""
        anchor = f"Read the input and answer with one JSON object{named}."
        return Guess(
            "all are JSON objects",
            ("nll", "json_valid", "json_fields", "exact_match"),
            anchor,
            tokens,
        )
    labels = sorted({" ".join(answer.split()) for answer in answers})
    if len(labels) <= min(LABELS, len(answers) // 3) and max(map(len, labels)) <= LABEL_CHARACTERS:
        anchor = f"Read the input and answer with exactly one of these labels: {_listed(labels)}."
        return Guess(
            f"{len(labels)} labels", ("nll", "accuracy", "balanced_accuracy"), anchor, tokens
        )
    if statistics.median(map(len, answers)) > LONG_CHARACTERS:
        # ROUGE-L reads ASCII words only and refuses data without any.
        ascii_words = any(re.search("[a-zA-Z0-9]", answer) for answer in answers)
        return Guess(
            "long text",
            ("nll", "rouge_l", "chrf") if ascii_words else ("nll", "chrf"),
            "Read the input and write the whole answer that it asks for.",
            tokens,
        )
    anchor = "Read the input and give the answer only, without any explanation."
    return Guess("short text", ("nll", "exact_match", "token_f1"), anchor, tokens)


def json_keys(answers: Sequence[str]) -> list[str] | None:
    """The keys in order of appearance where every answer is a JSON object, else None."""
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join("".join(c for c in name if c.isprintable()) for name in names)


def write_yaml(
    guessed: Guess, *, train: DataSource, test: DataSource | None, model: str, n_rows: int
) -> str:
    """Return the YAML text that `config.load` reads; `n_rows` stand in the training file."""
    name = stem(train.path)
    n_train = n_rows * 0.8 * (0.75 if test is None else 1)
    per_task = (
        4.0 if 4 * n_train <= _PACKAGED else max(math.floor(10 * _PACKAGED / n_train) / 10, 0.1)
    )
    why = (
        "0 is plain fine-tuning"
        if per_task == 4
        else f"`builtin` has about {_PACKAGED:,}: name larger data and raise this to 4"
    )
    values: dict[str, object] = {
        "model": model,
        "name": name,
        "anchor": guessed.anchor,
        "output_dir": f"runs/{name}",
    }
    for part, source in (("train", train), ("test", test)):
        values[part] = source and (
            {"path": source.path, "columns": source.columns} if source.columns else source.path
        )
    # JSON is YAML, whatever its strings hold.
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return TEMPLATE.format(
        **quoted, metrics=", ".join(guessed.metrics), why=guessed.why, max_new_tokens=guessed.max_new_tokens,
        general_per_task=f"{per_task:g}", why_so_many=why,
    )  # fmt: skip
