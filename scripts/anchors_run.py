"""Write the settings of a comparison of anchors, by a rule that is fixed before any is trained.

    fulcrum anchor score TASK.yaml CANDIDATES.jsonl --out scores.json
    python scripts/anchors_run.py TASK.yaml scores.json --out run.yaml

Trained are: every anchor written by hand; of the templates the one of the lowest and of the median
loss before training; of the model's own those of the lowest and of the highest; and random tokens.
`auto`, which knows no anchor written by hand, would choose `by_template` or `by_model`; the file
says which. All are TELL arms, alike but for the anchor.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from fulcrum.anchors import score
from fulcrum.core import store
from fulcrum.core.types import AnchorScore, AnchorScores


def main() -> None:
    """Write the settings file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    given: dict[str, Any] = yaml.safe_load(args.settings.read_text(encoding="utf-8"))
    (known,) = store.read_as(args.scores, tuple[AnchorScores, ...])
    scores = list(known.scores)
    chosen = trained(scores)
    made = [score for score in scores if score.source in ("template", "model")]
    best = made[score.choose(made)]
    auto = next(name for name, score in chosen.items() if score.text == best.text)
    given["compare"]["arms"] = ["base", *(arm(name, score) for name, score in chosen.items())]
    text = (
        "# Made by scripts/anchors_run.py; `anchor: auto` without anchors by hand would choose "
        f"`{auto}`.\n"
    )
    args.out.write_text(
        text + yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=160),
        encoding="utf-8",
    )
    print(f"{args.out}: {len(chosen)} anchors; auto: {auto}")


def trained(scores: list[AnchorScore]) -> dict[str, AnchorScore]:
    """The anchors that are trained, by the name of their arm."""

    def by(source: str) -> list[AnchorScore]:
        return sorted(
            (score for score in scores if score.source == source), key=lambda score: score.loss
        )

    templates, own = by("template"), by("model")
    hands = [score for score in scores if score.source in ("the task's", "given")]
    found = {f"by_hand_{place}": score for place, score in enumerate(hands, 1)}
    found |= {"by_template": templates[0], "by_template_2": templates[len(templates) // 2]}
    found |= {"by_model": own[0], "by_model_last": own[-1]}
    return found | {
        "random_tokens": next(score for score in scores if score.source == "control: random tokens")
    }


def arm(name: str, score: AnchorScore) -> dict[str, Any]:
    """A TELL arm with an anchor of its own."""
    return {
        "name": name,
        "anchored": True,
        "general": "pool",
        "anchor": {"text": score.text, "placement": score.placement},
    }


if __name__ == "__main__":
    main()
