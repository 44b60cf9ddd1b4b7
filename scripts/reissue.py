"""Issue stored certificates of formats 1 and 2 again, in format 3, from their stored outcomes.

    python scripts/reissue.py RUN_FOLDER ...            # compare only
    python scripts/reissue.py RUN_FOLDER ... --write    # and write, where every number is equal

A folder holds `certificate.json` and `outcomes.jsonl` (or `.jsonl.gz`). The old certificate is
translated into format 3: keys renamed, values turned into the metric's own sign, sentences read
back into codes and numbers. The new one is computed from the outcomes and the same question. A
table says for each folder how many numbers were compared, how many are equal, and how many codes
and hashes; below it every difference is named. A folder with any difference is not written.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from fulcrum.core import store
from fulcrum.stats import certificate, certification, outcomes
from fulcrum.stats.certificate import Certificate, Design, Inputs, Question

_TOLERANCE = 1e-9  # relative: other processors add in another order
_VERDICTS = {
    "gain": "gain",
    "loss": "loss",
    "no gain shown": "no_gain",
    "cannot be said": "unknown",
}
_CHOICES = {
    "general data": "general_data",
    "labelling": "labelling",
    "cannot be told apart": "undecided",
}
_UNMEASURED = "cannot be said: the reference was not measured with so many"
_PARTS = {
    "mixing (mix - sft)": "mixing",
    "anchor within the mix (tell - mix)": "anchor_within_mix",
    "interaction of anchor and mix": "interaction",
    "shuffle (tell - general_then_task)": "shuffle",
    "equal exposures (tell - sft_matched)": "equal_exposures",
    "transfer (tell - placebo_permuted)": "transfer_over_permuted",
    "transfer (tell - placebo_own_answers)": "transfer_over_own_answers",
}
_CONTRADICTIONS = {
    "verdicts": r"(.*) is better, and (.*) is worse",
    "savings": r"the row savings by (.*) and by (.*) contradict each other",
    "gains": r"the row gains by (.*) and by (.*) contradict each other",
}
# Notes of format 2 that format 3 does not hold, since they follow from what it holds.
_IMPLIED = (
    r"The reference is the best arm without general data by its test scores.*",
    r"nll_tempered is the loss once each arm's logits are divided by a temperature.*",
    r"More settings were tried for .* than for other trained arms, which favours them\.",
    r"\d+ seeds?: fewer than the 5 that intervals need to be narrow\.",
)
_CELL = re.compile(r"(.*) at (\d+) rows, seed (\d+)(?:, (.*))?")
_NOTHING: dict[str, float | None] = {"estimate": None, "low": None, "high": None}


# Why certificates of a format may differ from what their outcomes give today.
_WHY = {
    1: "format 1 was issued before today's statistics: the reference was the best of whichever "
    "arms stood at a size (today its curve is always of the same arms, which moves slopes, gains "
    "and what more rows bring), and side effects were not computed",
}


class Compared(NamedTuple):
    """How an old certificate compares with the one that its outcomes give today."""

    folder: Path
    old_format: int
    numbers: int
    equal_numbers: int
    same_bits: int  # of the equal numbers
    others: int  # codes, names and hashes
    equal_others: int
    differences: list[str]
    run_notes: list[str]  # notes of the run that a certificate no longer holds
    new: Certificate


def main() -> None:
    """Compare the folders, print the table, and write what is equal if that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    compared = [compare(folder) for folder in args.folders]
    print_table(compared)
    for one in compared:
        print_details(one)
    if args.write:
        for one in compared:
            if not one.differences:
                certificate.save(one.folder / certificate.FILE, one.new)
    sys.exit(any(one.differences for one in compared))


def compare(folder: Path) -> Compared:
    """Translate a folder's certificate, compute it again, and compare the two."""
    old = store.read_json(folder / certificate.FILE)
    found = outcomes.read(outcomes.file_in(folder))
    design, run_notes = design_of(old)
    question = question_of(old, design)
    new = replace(
        certification.certify(found, question),
        inputs=inputs_of(old),
        outcomes=certification.hashes(found),
    )
    new = certificate.sealed(new)
    stated, computed = dict(leaves(translated(old))), dict(leaves(_computed(new)))
    numbers = equal_numbers = same_bits = others = equal_others = 0
    differences = []
    for place in dict.fromkeys([*stated, *computed]):
        before, after = stated.get(place, "nothing"), computed.get(place, "nothing")
        if _is_number(before) or _is_number(after):
            numbers += 1
            is_equal = _are_close(before, after)
            equal_numbers += is_equal
            same_bits += before == after
        else:
            others += 1
            is_equal = before == after
            equal_others += is_equal
        if not is_equal and place in stated and place in computed:
            differences.append(f"{place}: stored {before}, today {after}")
    differences += [f"{part}: stored, not computed today" for part in _lacking(stated, computed)]
    differences += [f"{part}: not stored, computed today" for part in _lacking(computed, stated)]
    return Compared(
        folder,
        old["format"],
        numbers,
        equal_numbers,
        same_bits,
        others,
        equal_others,
        differences,
        run_notes,
        new,
    )


def _computed(new: Certificate) -> dict[str, Any]:
    """Return what the outcomes determine of a new certificate."""
    plain = new.plain()
    return {key: plain[key] for key in ("contradiction", "answers", "side_effects", "outcomes")}


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """List every number, code and name of plain values with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}[{_name_of(item, number)}]")
    else:
        yield place, value


def _lacking(there: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name the parts of one that the other wholly lacks: each once, by its outermost place."""
    parts: dict[str, None] = {}
    for place in there:
        if place in other:
            continue
        ends = [match.start() for match in re.finditer(r"[.\[]", place) if match.start()]
        for end in [*ends, len(place)]:
            part = place[:end]
            if not any(
                known == part or known.startswith((f"{part}.", f"{part}[")) for known in other
            ):
                parts[part] = None
                break
    return list(parts)


def _name_of(item: Any, number: int) -> str:
    """Name an item of a list by what tells it apart, so that a missing one moves no other."""
    if not isinstance(item, Mapping):
        return str(number)
    keys = [key for key in ("metric", "arm", "size", "seed", "code") if key in item]
    if "shares" in item:
        keys = ["size"]  # a reference: which arm it is may differ
    return " ".join(str(item[key]) for key in keys) or str(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_close(before: Any, after: Any) -> bool:
    if not (_is_number(before) and _is_number(after)):
        return False
    return math.isclose(before, after, rel_tol=_TOLERANCE, abs_tol=1e-12)


# ---- formats 1 and 2 in format 3


def translated(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the outcomes determine of an old certificate, as format 3 holds it."""
    return {
        "contradiction": _contradiction(old["contradiction"]),
        "answers": [_answer(answer) for answer in old["answers"]],
        "side_effects": old.get("side_effects", []),
        "outcomes": [_cell_hash(name, sha256) for name, sha256 in old["outcomes"].items()],
    }


def _contradiction(sentence: str | None) -> dict[str, Any] | None:
    for code, pattern in _CONTRADICTIONS.items():
        if sentence is not None and (match := re.fullmatch(pattern, sentence)):
            return {"code": code, "metrics": list(match.groups())}
    return None


def _answer(old: Mapping[str, Any]) -> dict[str, Any]:
    sign = -1 if old["lower_is_better"] else 1
    points = []
    for point in old["points"]:
        by_seed = [sign * score for score in point["by_seed"]]
        points.append({**point, "by_seed": by_seed, "score": _turned(point["score"], sign)})
    chosen = old.get("reference_chosen", {})
    references = []
    for size, shares in sorted(old["reference"].items(), key=lambda item: int(item[0])):
        references.append({"size": int(size), "arm": chosen.get(size), "shares": shares})
    gains = [_worth(gain, gain["size"], gain.get("identifiable")) for gain in old["gain"]]
    attribution = []
    for part in old["attribution"]:
        attribution.append({"code": _PARTS[part["name"]], "difference": _turned(part, sign)})
    return {
        "metric": old["metric"],
        "lower_is_better": old["lower_is_better"],
        "rows": old["rows"],
        "seeds": old["seeds"],
        "test_groups": old["test_groups"],
        "points": points,
        "references": references,
        "selected_on": old["selected_on"].partition(",")[0],
        "difference": _turned(old["difference"], sign),
        "p": old["difference"]["p"],
        "slope": _turned(old["slope"], sign),
        "slope_towards_rows": _turned(old.get("slope_towards_rows", _NOTHING), sign),
        "saving": _worth(old["saving"], old["rows"], old["identifiable"]),
        "gains": gains,
        "verdict": _VERDICTS[old["verdict"]],
        "more_rows": _more_rows(old["more_rows"], sign),
        "attribution": attribution,
    }


def _turned(ends: Mapping[str, float | None], sign: int) -> dict[str, float | None]:
    """Turn an interval into the metric's own sign."""
    estimate, low, high = (ends[key] for key in ("estimate", "low", "high"))
    if sign < 0:
        low, high = high, low
    turned = [None if end is None else sign * end for end in (estimate, low, high)]
    return dict(zip(("estimate", "low", "high"), turned, strict=True))


def _worth(old: Mapping[str, Any], size: int, identifiable: bool | None) -> dict[str, Any]:
    units = {"rows": old["rows"], "tokens": old.get("tokens")}
    return {"size": size, "identifiable": identifiable, **units}


def _more_rows(old: Mapping[str, Any], sign: int) -> dict[str, Any]:
    is_unmeasured = old["answer"] == _UNMEASURED
    return {
        "rows": old["rows"],
        "choice": "unmeasured" if is_unmeasured else _CHOICES[old["answer"]],
        "references": old.get("by", []),
        "labelling": _turned(old.get("labelling", _NOTHING), sign),
        "advantage": _turned(old.get("advantage", _NOTHING), sign),
    }


def _cell_hash(name: str, sha256: str) -> dict[str, Any]:
    arm, size, seed, metric = _CELL.fullmatch(name).groups()  # type: ignore[union-attr]
    return {"arm": arm, "size": int(size), "seed": int(seed), "metric": metric, "sha256": sha256}


def inputs_of(old: Mapping[str, Any]) -> Inputs:
    """Return what an old certificate says its outcomes rest on."""
    known = old["inputs"]
    hyperparameters = []
    for name, values in known.get("settings chosen", {}).items():
        cell = _cell_hash(name, "")
        place = {key: cell[key] for key in ("arm", "size", "seed")}
        hyperparameters.append({**place, "values": values})
    plain = {
        "outcomes_file": known.get("outcomes file"),
        "settings": known.get("settings", {}),
        "rows": known.get("rows", {}),
        "files": known.get("files", {}),
        "made": known.get("made", {}),
        "general_rows": known.get("general rows", {}),
        "environment": known.get("environment", {}),
        "hyperparameters": hyperparameters,
        "adjusted_p": known.get("p over all tasks (Holm)", {}),
    }
    return TypeAdapter(Inputs).validate_python(plain)


def question_of(old: Mapping[str, Any], design: Design | None) -> Question:
    """Return an old certificate's question, with its notes as a design."""
    asked = {key: value for key, value in old["question"].items() if key != "notes"}
    return replace(TypeAdapter(Question).validate_python(asked), design=design)


def design_of(old: Mapping[str, Any]) -> tuple[Design | None, list[str]]:
    """Read the notes of an old certificate back into numbers; and return those of the run alone."""
    values: dict[str, Any] = {"trials": {}, "at_end": [], "diverged": []}
    run_notes = []
    for note in old["question"]["notes"]:
        if not _read_note(note, values) and not _matches_any(note, _IMPLIED):
            run_notes.append(note)
    if "folds" not in values:
        return None, run_notes
    values["trained"] = _trained(old["inputs"], values["trials"])
    return TypeAdapter(Design).validate_python(values), run_notes


def _matches_any(note: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, note) for pattern in patterns)


def _read_note(note: str, values: dict[str, Any]) -> bool:
    """Read one note into the values of a design; return whether it is known."""
    cross_validation = (
        r"Settings were chosen by (\d+)-fold cross-validation inside the task rows of "
    )
    if match := re.match(cross_validation, note):
        values["folds"] = int(match[1])
        values["tune"] = "first" if "of the first seed" in note else "each"
    elif match := re.fullmatch(r"Settings tried: (.*)\.", note):
        for each in match[1].split(", "):
            arm, _, number = each.rpartition(" ")
            values["trials"][arm] = int(number)
    elif match := re.fullmatch(r"What was chosen is an end of what was tried.*?: (.*)\.", note):
        values["at_end"] = [_at_end(each) for each in match[1].split("; ")]
    elif match := re.fullmatch(r"(.*) at (\d+) rows, seed (\d+): the .* with (\S+), which.*", note):
        arm, size, seed, trial = match.groups()
        cell = {"arm": arm, "size": int(size), "seed": int(seed), "trial": trial}
        values["diverged"].append(cell)
    elif match := re.match(r"(\d+) rows are all that there are", note):
        values["all_rows"] = int(match[1])
    elif match := re.match(r"No test file: (\d+) of the rows were test rows", note):
        values["test_rows"] = int(match[1])
    elif match := re.fullmatch(r"Left out for the time budget of (\d+) minutes: (.*)\.", note):
        values["budget"] = {"seconds": 60.0 * int(match[1]), "left_out": match[2].split("; ")}
    else:
        return False
    return True


def _at_end(text: str) -> dict[str, Any]:
    pattern = r"(.*) at (\d+) rows, (passes|learning rate) (\S+) of (\S+) to (\S+)"
    match = re.fullmatch(pattern, text)
    assert match is not None, text
    arm, size, unit, chosen, least, most = match.groups()
    name = "repeats" if unit == "passes" else "learning_rate"
    ends = {"chosen": float(chosen), "least": float(least), "most": float(most)}
    return {"arm": arm, "size": int(size), "name": name, **ends}


def _trained(inputs: Mapping[str, Any], trials: Mapping[str, int]) -> list[str]:
    """Return the arms that are trained: not the untrained model, nor examples in the prompt."""
    sizes: dict[str, set[int]] = {}
    shots: set[str] = set()
    for name, values in inputs.get("settings chosen", {}).items():
        cell = _cell_hash(name, "")
        sizes.setdefault(cell["arm"], set()).add(cell["size"])
        if values is not None and values.get("shots"):
            shots.add(cell["arm"])
    return [arm for arm in trials if max(sizes.get(arm, {0})) > 0 and arm not in shots]


# ---- what is printed


def print_table(compared: Sequence[Compared]) -> None:
    """Print a row for each certificate."""
    print("| certificate | format | numbers | equal | same bits | codes and hashes | equal |")
    print("|---|---|---|---|---|---|---|")
    for one in compared:
        counts = (one.numbers, one.equal_numbers, one.same_bits, one.others, one.equal_others)
        cells = " | ".join(f"{count:,}" for count in counts)
        print(f"| {one.folder} | {one.old_format} | {cells} |")


def print_details(one: Compared) -> None:
    """Print what differs, and the notes that stay with the run."""
    for text in one.run_notes:
        print(f"{one.folder}: a note of the run, not of its certificate: {text}")
    if one.differences:
        why = _WHY.get(one.old_format, "the outcomes or the certificate were changed")
        print(f"{one.folder}: not written, {len(one.differences)} differences; {why}:")
    for text in one.differences:
        print(f"  {text}")


if __name__ == "__main__":
    main()
