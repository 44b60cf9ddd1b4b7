"""Print every arm of finished comparisons against the arms without general data, as tables.

    python scripts/arms_table.py results/map/*/ --size 32

A row an arm: its score, its difference to the best arm without general data, p adjusted over the
run's arms (Holm), how many rows that reference needs to be as good (where it clearly gets better
with its rows), and the repeats that were chosen for it.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fulcrum.report import wording
from fulcrum.stats import certificate, certification, metrics, outcomes, row_savings
from fulcrum.stats.certificate import Answer, Certificate, Question


def main() -> None:
    """Print the tables of every folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(
        "--size", type=int, required=True, help="task rows at which arms are compared"
    )
    args = parser.parse_args()
    for folder in args.folders:
        known = Certificate.read(folder / certificate.FILE)
        found = outcomes.read(outcomes.file_in(folder))
        references = known.question.references
        repeats = chosen_repeats(known)
        names = [name for name in found.values if not certificate.is_side_effect(name)]
        mixed = sorted({arm for arm, _ in found.points(names[0])} - set(references))
        lower = tuple(name for name in names if not metrics.HIGHER_IS_BETTER.get(name))
        for metric in names:
            asked = Question("", references, (metric,), lower)
            answers = {}
            for arm in mixed:
                answers[arm] = certification.certify(found, replace(asked, arm=arm)).answer
            direction = wording.direction(next(iter(answers.values())))
            print(f"\n**{folder.name}, {metric}** ({direction})\n")
            print_table(answers, references, args.size, repeats)


def print_table(
    answers: Mapping[str, Answer],
    references: Sequence[str],
    size: int,
    repeats: Mapping[str, str],
) -> None:
    """Print one metric's table."""
    print("| arm | rows | score | difference | p (Holm) | worth rows | repeats |")
    print("|---|---|---|---|---|---|---|")
    first = next(iter(answers.values()))
    for point in first.points:
        if point.arm in references:
            score = wording.with_interval(point.score)
            print(f"| `{point.arm}` | {point.size or ''} | {score} | | | | |")
    known = {arm: answer.p for arm, answer in answers.items() if answer.p is not None}
    adjusted = dict(zip(known, row_savings.holm(list(known.values())), strict=True))
    best_first = sorted(
        answers.items(), key=lambda item: -item[1].improvement(item[1].difference).estimate
    )
    for arm, answer in best_first:
        point = next(own for own in answer.points if (own.arm, own.size) == (arm, size))
        cells = (
            f"`{arm}`",
            size,
            wording.with_interval(point.score),
            wording.difference(answer.difference),
            f"{adjusted[arm]:.3f}" if arm in adjusted else "",
            worth_of(answer, size),
            repeats.get(arm, ""),
        )
        print(f"| {' | '.join(map(str, cells))} |")


def worth_of(answer: Answer, size: int) -> str:
    """Say how many rows of the reference an arm's are worth."""
    gain = next((gain for gain in answer.gains if gain.size == size), None)
    if gain is None:
        return ""
    if not gain.identifiable:
        return "not identifiable"
    texts = []
    for end in (gain.rows.estimate, gain.rows.low, gain.rows.high):
        if math.isnan(end):
            texts.append("?")
        elif end < gain.rows.least:
            texts.append(f"under {gain.rows.least * size:.0f}")
        elif end >= gain.rows.most:
            texts.append(f"over {gain.rows.most * size:.0f}")
        else:
            texts.append(f"{end * size:.0f}")
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def chosen_repeats(known: Certificate) -> dict[str, str]:
    """Return the repeats that an arm's final trainings took, by arm."""
    found: dict[str, set[int]] = {}
    for cell in known.inputs.hyperparameters:
        if cell.values is not None:
            found.setdefault(cell.arm, set()).add(cell.values["repeats"])
    return {arm: ", ".join(map(str, sorted(numbers))) for arm, numbers in found.items()}


if __name__ == "__main__":
    main()
