"""Every arm of finished comparisons against the arms without general data: the tables of LOG.md's map.

    python scripts/arms_table.py certificates/map/*/ --size 32

A row an arm: its score, what it is better by than the best arm without general data (above 0 is better), p adjusted over
the run's arms (Holm), how many rows that reference needs to be as good (where it clearly gets better with its rows), and the
repeats that were chosen for it.
"""

import argparse
from pathlib import Path
from typing import Any

from fulcrum import certificate, metrics, outcomes, row_savings, store
from fulcrum.certificate import Question


def main() -> None:
    """Print the tables of every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--size", type=int, required=True, help="task rows at which arms are compared")
    args = parser.parse_args()
    for folder in args.folders:
        found = outcomes.read(folder / "outcomes.jsonl")
        repeats = chosen_repeats(folder)
        names = [name for name in found.values if not certificate.is_side_effect(name)]
        asked = store.read_json(folder / "certificate.json")["question"]
        mixed = sorted({arm for arm, _ in found.points(names[0])} - set(asked["references"]))
        lower = tuple(name for name in names if not metrics.HIGHER_IS_BETTER.get(name))
        for metric in names:
            answers = {
                arm: certificate.certify(found, Question(arm, tuple(asked["references"]), (metric,), lower, "", notes=()))[
                    "answers"
                ][0]
                for arm in mixed
            }
            print(f"\n**{folder.name}, {metric}** ({'lower' if metric in lower else 'higher'} is better)\n")
            print_table(answers, asked["references"], args.size, repeats)


def print_table(answers: dict[str, dict[str, Any]], references: list[str], size: int, repeats: dict[str, str]) -> None:
    """Print one metric's table."""
    print("| arm | rows | score | better by | p (Holm) | worth rows | repeats |\n|---|---|---|---|---|---|---|")
    first = next(iter(answers.values()))
    sign = -1 if first["lower_is_better"] else 1
    for point in first["points"]:
        if point["arm"] in references:
            print(f"| `{point['arm']}` | {point['size'] or ''} | {span(point['score'], sign)} | | | | |")
    known = {arm: answer["difference"]["p"] for arm, answer in answers.items() if answer["difference"]["p"] is not None}
    adjusted = dict(zip(known, row_savings.holm(list(known.values())), strict=True))
    for arm, answer in sorted(answers.items(), key=lambda item: -item[1]["difference"]["estimate"]):
        score = next(point["score"] for point in answer["points"] if (point["arm"], point["size"]) == (arm, size))
        gain = next((gain for gain in answer["gain"] if gain["size"] == size), None)
        p = f"{adjusted[arm]:.3f}" if arm in adjusted else ""
        worth = "" if gain is None else rows_of(gain["rows"], size) if gain["identifiable"] else "not identifiable"
        cells = (f"`{arm}`", size, span(score, sign), span(answer["difference"], 1), p, worth, repeats.get(arm, ""))
        print(f"| {' | '.join(map(str, cells))} |")


def span(interval: dict[str, Any], sign: int) -> str:
    """An estimate with its interval, turned back where lower is better."""
    estimate, low, high = (sign * interval[key] if interval[key] is not None else None for key in ("estimate", "low", "high"))
    if low is None or high is None:
        return f"{estimate:.3f}"
    return f"{estimate:.3f} [{min(low, high):.3f}, {max(low, high):.3f}]"


def rows_of(gain: dict[str, Any], size: int) -> str:
    """How many rows of the reference an arm's are worth."""

    least, most = (f"{gain[key] * size:.0f}" for key in ("least", "most"))

    def end(value: float | str | None) -> str:
        if value is None:
            return "?"
        if value == "under" or (isinstance(value, float) and value < gain["least"]):
            return f"under {least}"
        return f"over {most}" if isinstance(value, str) or value >= gain["most"] else f"{value * size:.0f}"

    return f"{end(gain['estimate'])} [{end(gain['low'])}, {end(gain['high'])}]"


def chosen_repeats(folder: Path) -> dict[str, str]:
    """The repeats that an arm's final trainings took, by arm."""
    described = store.read_json(folder / "certificate.json")["inputs"].get("settings chosen", {})
    found: dict[str, set[int]] = {}
    for name, setting in described.items():
        if setting is not None:
            found.setdefault(name.partition(" at ")[0], set()).add(setting["repeats"])
    return {arm: ", ".join(map(str, sorted(numbers))) for arm, numbers in found.items()}


if __name__ == "__main__":
    main()
