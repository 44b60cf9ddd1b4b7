"""Prove that two checkouts of Fulcrum behave the same: each command, each public Python function.

    python validation/same_behaviour.py OLD_CHECKOUT NEW_CHECKOUT                # about 10 minutes
    python validation/same_behaviour.py OLD_CHECKOUT NEW_CHECKOUT --part tiny    # about 6
    python validation/same_behaviour.py OLD_CHECKOUT NEW_CHECKOUT --verbose --keep /tmp/kept

Both run the same commands on the same rows, models and seeds, in float32, with one thread and
nothing compiled, each in a folder of its own. Compared are exit codes and every file that a command
writes: each tensor, each array, each value of JSON, YAML and Parquet. Words for people (messages,
reports, cards) are not; `--verbose` lists where they differ. The tables below say what is renamed,
changed on purpose, or different each time; whatever stands in none of them must be equal.

The part `real` needs `fulcrum models pull smollm2-135m-instruct` once.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from platformdirs import user_cache_dir
from safetensors.torch import load_file

from same_behaviour_data import save_model, save_rows
from same_behaviour_steps import ALL_SETTINGS, REAL, TINY, Step


@dataclass(frozen=True)
class Renamed:
    """A key of the old checkout that the new one calls otherwise, or no longer has.

    files: pattern of the files' names
    old: regular expression, replaced in paths such as `arms[2].scores.nll`
    new: what takes its place; None if the value is gone
    """

    files: str
    old: str
    new: str | None
    reason: str


RENAMED = (
    Renamed(
        "*anchors.json",
        r"\.(separation|percentile|separates|agreement)$|^\[\d+\]\.general$",
        None,
        "S_sep and S_conf went: they told nothing of what training brought",
    ),
    Renamed("*", r"(arms\[\d+\])\.shots$", r"\1.few_shot", "the field's term"),
    Renamed("*", r"(arms\[\d+\])\.words$", r"\1.tfidf", "the field's term"),
    Renamed("*", r"(arms\[\d+\])\.settings_of$", r"\1.hyperparameters_of", "the field's term"),
)

# Step -> the arguments of the new checkout (None: it has no such command), and the reason.
COMMANDS: Mapping[str, tuple[str | None, str]] = {}

# Regular expression in settings files -> what the new checkout calls it, and the reason.
SETTINGS: Mapping[str, tuple[str, str]] = {}

# Values that differ from run to run or with the code: pattern of their paths -> the reason.
VOLATILE = {
    r"(^|[._])seconds$": "time",
    r"(^|\.)peak_memory_bytes$": "memory",
    r"(^|\.)environment\.code$": "hash of the source",
    r"^(outputs|inputs\.made)\.": "hashes of files that hold times",
    r"^sha256$": "seal of a certificate, which covers the environment",
}

# Values that only the new checkout has: pattern of their paths -> the reason.
ADDED = {
    r"^differences\.[^.]+ tell - ": "TELL is compared with one's own mixtures too",
}

# Values that are sentences for people.
WORDS = r"(^|\.)(notes?|headline|sentence|why)(\[|$)"

# Words of certificates of format 2 -> codes of format 3.
CODES = {
    "no gain shown": "no_gain",
    "cannot be said": "unknown",
    "general data": "general_data",
    "cannot be told apart": "undecided",
    "cannot be said: the reference was not measured with so many": "unmeasured",
    "test, which favours the reference": "test",
    "mixing (mix - sft)": "mixing",
    "anchor within the mix (tell - mix)": "anchor_within_mix",
    "interaction of anchor and mix": "interaction",
    "shuffle (tell - general_then_task)": "shuffle",
    "equal exposures (tell - sft_matched)": "equal_exposures",
    "transfer (tell - placebo_permuted)": "transfer_over_permuted",
    "transfer (tell - placebo_own_answers)": "transfer_over_own_answers",
}

# Files that are not compared.
SKIPPED = {
    "cache/*": "converted data under names that cover the code; seen through what is made of it",
    "material/*": "given, not made",
    "settings/*": "given, not made",
    "*.html": "words",
    "*.md": "words",
    "*.log": "words",
    "*.lock": "empty",
    "*SHA256SUMS": "hashes of files that hold words",
    "*inputs.cdx.json": "list of materials; its content goes into the model card",
}

TENSORS = (".safetensors", ".gguf", ".npy", ".npz")
Values = dict[str, Any]


def main() -> None:
    """Run both checkouts and print the table; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--part", choices=("tiny", "real", "all"), default="all")
    parser.add_argument("--verbose", action="store_true", help="list differences of words")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for what is made")
    given = parser.parse_args()
    steps = [*(TINY if given.part != "real" else ()), *(REAL if given.part != "tiny" else ())]
    scratch = given.keep or Path(tempfile.mkdtemp(prefix="same-behaviour-"))
    try:
        old, new = make_sides(given.old.resolve(), given.new.resolve(), scratch.resolve())
        runs = [
            start(old, [(step, step.args) for step in steps]),
            start(new, [(step, args) for step in steps if (args := new_args(step)) is not None]),
        ]
        codes = [run.wait() for run in runs]
        for code, side in zip(codes, (old, new), strict=True):
            if code != 0:
                sys.exit(f"{side.checkout}: the steps could not be run")
            side.ended = {one["step"]: one for one in json.loads(side.report.read_text())}
        differs = print_table(steps, old, new, verbose=given.verbose)
    finally:
        if given.keep is None:
            shutil.rmtree(scratch)
    sys.exit(differs)


@dataclass
class Side:
    """One checkout, the folder in which its commands run, and how they ended (by step)."""

    checkout: Path
    folder: Path
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The file in which the run of all steps says how they ended."""
        return self.folder.with_suffix(".json")


def make_sides(old: Path, new: Path, scratch: Path) -> tuple[Side, Side]:
    """Make a folder for each checkout, with the same model, rows and settings.

    Each has a cache of its own, which has the models of the user's one and nothing else of it.
    """
    cache = Path(os.environ.get("FULCRUM_CACHE") or user_cache_dir("fulcrum", appauthor=False))
    save_model(scratch / "given" / "model")
    save_rows(scratch / "given")
    sides = Side(old, scratch / "old"), Side(new, scratch / "new")
    for side in sides:
        shutil.copytree(scratch / "given", side.folder / "material")
        (side.folder / "cache").mkdir()
        for name in ("models", "gguf", "terms"):
            if (cache / name).is_dir():
                (side.folder / "cache" / name).symlink_to(cache / name)
        for name, values in ALL_SETTINGS.items():
            text = yaml.safe_dump(values, sort_keys=False)
            if side is sides[1]:
                for pattern, (replacement, _) in SETTINGS.items():
                    text = re.sub(pattern, replacement, text)
            file = side.folder / "settings" / f"{name}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return sides


def new_args(step: Step) -> str | None:
    """Return the arguments of a step in the new checkout, None if it has no such command."""
    return COMMANDS[step.name][0] if step.name in COMMANDS else step.args


def start(side: Side, steps: Sequence[tuple[Step, str]]) -> "subprocess.Popen[str]":
    """Begin to run the steps of one checkout, with one thread."""
    described = [
        {"name": step.name, "args": args.split(), "stdin": step.stdin, "act": step.act}
        for step, args in steps
    ]
    runner = Path(__file__).with_name("same_behaviour_run.py")
    process = subprocess.Popen(
        [sys.executable, runner, side.folder, side.report],
        env={
            **os.environ,
            "PYTHONPATH": str(side.checkout / "src"),
            "PYTHONUNBUFFERED": "1",
            "FULCRUM_CACHE": str(side.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        },
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(described))
    process.stdin.close()
    return process


def print_table(steps: Sequence[Step], old: Side, new: Side, *, verbose: bool) -> bool:
    """Print a line for each step, and return whether anything differs."""
    any_differs = False
    print(f"{'step':22} {'files':>5} {'values':>7} {'tensors':>7}  equal?  first difference")
    for step in steps:
        if step.name not in new.ended:
            print(f"{step.name:22} {'':21}  gone    {COMMANDS[step.name][1]}")
            continue
        seen = compare_step(step, old, new)
        any_differs |= bool(seen.different)
        verdict = f"NO ({len(seen.different)})" if seen.different else "yes"
        first = seen.different[0] if seen.different else ""
        print(
            f"{step.name:22} {seen.files:5} {seen.values:7} {seen.tensors:7}  {verdict:7} {first}"
        )
        for line in seen.words if verbose else ():
            print(f"{'':22} words: {line}")
    print("something differs" if any_differs else "all equal")
    return any_differs


@dataclass
class Seen:
    """What was compared of one step, and what differs."""

    files: int = 0
    values: int = 0
    tensors: int = 0
    different: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


def compare_step(step: Step, old: Side, new: Side) -> Seen:
    """Compare exit codes, what was printed, and all files that the step was the first to write."""
    before, after = old.ended[step.name], new.ended[step.name]
    seen = Seen()
    if before["code"] != step.code:
        seen.different.append(
            f"the old ends with {before['code']}, not {step.code}: {last_line(before)}"
        )
    if before["code"] != after["code"]:
        seen.different.append(f"exit {before['code']} -> {after['code']}: {last_line(after)}")
    found = printed(step, before["stdout"], old), printed(step, after["stdout"], new)
    seen.values += len(found[0])
    seen.different += differences("stdout", *found)
    for stream in ("stdout", "stderr") if step.stdout == "text" else ("stderr",):
        seen.words += other_words(stream, before[stream], after[stream])
    for name in sorted({*before["files"], *after["files"]}):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in SKIPPED):
            compare_file(name, old, new, seen)
    return seen


def other_words(name: str, old: str, new: str) -> Iterator[str]:
    """Yield lines that one of two texts has alone, whatever the numbers in them."""
    before, after = shapes(old), shapes(new)
    for sign, own, other in (("-", before, after), ("+", after, before)):
        for shape, line in own.items():
            if shape not in other:
                yield f"{name}: {sign} {line}"


def shapes(text: str) -> dict[str, str]:
    """Return the lines of a text by what is left of them without numbers."""
    return {re.sub(r"\W*\d[\W\d]*", " # ", line).strip(): line for line in text.splitlines()}


def last_line(ended: Mapping[str, Any]) -> str:
    """Return the last line that a step printed."""
    said: list[str] = (ended["stderr"].strip() or ended["stdout"].strip()).splitlines()
    return said[-1][:200] if said else ""


def compare_file(name: str, old: Side, new: Side, seen: Seen) -> None:
    """Compare one file; what is seen is added to `seen`."""
    for side in (old, new):
        if not (side.folder / name).is_file():
            seen.different.append(f"{name}: not written by the {side.folder.name} checkout")
            return
    found = read(old.folder / name), read(new.folder / name)
    values = [without_paths(one, side) for one, side in zip(found, (old, new), strict=True)]
    before = renamed(name, values[0], is_new=False)
    after = renamed(name, values[1], is_new=True)
    seen.files += 1
    if Path(name).suffix in TENSORS:
        seen.tensors += len(before)
    else:
        seen.values += len(before)
    for one in (before, after):
        for key in [key for key in one if any(re.search(pattern, key) for pattern in VOLATILE)]:
            del one[key]
    for key in [key for key in after if key not in before]:
        if any(re.search(pattern, key) for pattern in ADDED):
            del after[key]
    words = [
        {key: one.pop(key) for key in list(one) if re.search(WORDS, key)} for one in (before, after)
    ]
    seen.words += differences(name, *words)
    if name.endswith("certificate.json") and before.get("format") != after.get("format"):
        before, after = by_section(before), by_section(after)
        # What format 2 held as keys, such as sizes, format 3 holds as values.
        after = {key: min(after.get(key, 0), count) for key, count in before.items()}
    seen.different += differences(name, before, after)


def by_section(values: Values) -> Values:
    """Return how often each number and code stands in each section of a certificate.

    Signs and keys do not count: format 3 holds values in the metric's own sign, so that differences
    of a metric that is better when lower change their sign, and their ends change places. It holds
    codes instead of sentences.
    """
    counts: Counter[str] = Counter()
    for key, value in values.items():
        section = "outcomes" if key.startswith("outcomes") else key.split(".")[0]
        if section in ("contradiction", "format", "inputs"):
            continue
        if isinstance(value, str):
            counts[f"{section}: {CODES.get(value, value)}"] += 1
        elif isinstance(value, int | float):
            counts[f"{section}: {float(abs(value))}"] += 1
    return dict(counts)


def differences(name: str, old: Values, new: Values) -> Iterator[str]:
    """Yield where two mappings differ, with both values."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, "(nothing)"), new.get(key, "(nothing)")
        if repr(before) != repr(after):  # so that -0.0 is not 0.0, nor 1 True, and nan is nan
            yield f"{name}: {key}: {before!r:.60} -> {after!r:.60}"


def renamed(name: str, values: Values, *, is_new: bool) -> Values:
    """Return values without those that are gone, those of the old checkout under their new keys."""
    for change in RENAMED:
        if not fnmatch.fnmatch(name, change.files):
            continue
        if change.new is None:
            values = {key: value for key, value in values.items() if not re.search(change.old, key)}
        elif not is_new:
            values = {re.sub(change.old, change.new, key): value for key, value in values.items()}
    return values


def without_paths(values: Values, side: Side) -> Values:
    """Return the values without the names of a side's own folders."""
    changed = {}
    for key, value in values.items():
        for place, name in ((side.folder, "FOLDER"), (side.checkout, "CHECKOUT")):
            key = key.replace(str(place), name)
            value = value.replace(str(place), name) if isinstance(value, str) else value
        changed[key] = value
    return changed


def printed(step: Step, stdout: str, side: Side) -> Values:
    """Return what is compared of a step's stdout."""
    if step.stdout == "exact":
        return lines(stdout)
    if step.stdout == "yaml":
        return without_paths(leaves(yaml.safe_load(stdout)), side)
    if step.stdout == "numbers":
        return dict(Counter(re.findall(r"\d[\d,]*(?:\.\d+)?", stdout)))
    return {}


def lines(text: str) -> Values:
    """Return the lines of a text by number."""
    return {f"line {number}": line for number, line in enumerate(text.splitlines(), 1)}


def read(file: Path) -> Values:
    """Return what a file holds, by path: its values or hashes of its tensors, else its own hash."""
    kind = file.suffix
    if kind == ".safetensors":
        return dict(_safetensors(file))
    if kind == ".gguf":
        return dict(_gguf(file))
    if kind == ".npy":
        return {"array": _hash(np.load(file))}
    if kind == ".npz":
        return {name: _hash(array) for name, array in np.load(file).items()}
    if kind == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "results.json":
            content["differences"] = by_pair(content["differences"])
        return leaves(content)
    if kind == ".jsonl":
        rows = [json.loads(row) for row in file.read_text(encoding="utf-8").split("\n") if row]
        if file.name == "events.jsonl":
            rows.sort(key=lambda row: str(row.get("run")))  # trainings at once take turns by chance
        return leaves(rows)
    if kind in (".yaml", ".yml"):
        return leaves(yaml.safe_load(file.read_text(encoding="utf-8")))
    if kind == ".parquet":
        import pyarrow.parquet

        return leaves(pyarrow.parquet.read_table(file).to_pylist())
    if kind == ".jinja" or file.name.startswith("Modelfile"):
        return lines(file.read_text(encoding="utf-8"))
    return {"bytes": hashlib.sha256(file.read_bytes()).hexdigest()}


def by_pair(differences: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the paired differences of a run by what they compare; their order is free."""
    named = {}
    for one in differences:
        named[f"{one['task']} {one['metric']} {one['arm']} - {one['reference']}"] = one
    return named


def leaves(value: Any, path: str = "") -> Values:
    """Return the values inside lists and mappings by their paths."""
    found: Values = {}
    if isinstance(value, dict) and value:
        for key, item in value.items():
            found |= leaves(item, f"{path}.{key}".lstrip("."))
        return found
    if isinstance(value, list) and value:
        for number, item in enumerate(value):
            found |= leaves(item, f"{path}[{number}]")
        return found
    return {path: value}


def _safetensors(file: Path) -> Iterator[tuple[str, str]]:
    for name, tensor in load_file(file).items():
        data = tensor.flatten().view(torch.uint8).numpy()  # NumPy knows no bfloat16
        yield name, f"{tensor.dtype} {tuple(tensor.shape)} {_hash(data)}"


def _gguf(file: Path) -> Iterator[tuple[str, str]]:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for tensor in reader.tensors:
        yield tensor.name, f"{tensor.tensor_type.name} {_hash(np.asarray(tensor.data))}"
    for name, entry in reader.fields.items():
        yield f"field {name}", " ".join(_hash(np.asarray(part)) for part in entry.parts)


def _hash(array: Any) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest[:16]}"


if __name__ == "__main__":
    main()
