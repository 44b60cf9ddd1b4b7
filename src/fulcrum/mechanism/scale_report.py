"""What the curves of a scaling run say: fits, jumps and verdicts, from results.json and predictions.jsonl alone.

So an old run can be judged anew, and other trainers' numbers by the same functions (`fulcrum.mechanism.jumps`).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray
from fulcrum.mechanism import curve_fits, jumps
from fulcrum.mechanism.jumps import LEAST_LEVELS, JumpTest, row_jumps
from fulcrum.report import certificate_page, research_plots, summary
from fulcrum.report.run_kinds import Chapter, RunKind
from fulcrum.report.summary import Record
from fulcrum.stats.intervals import Interval, seed_interval

if TYPE_CHECKING:
    from fulcrum.mechanism.scale_arms import Level

CONTINUOUS = "nll"
WORTH = 0.5  # nats per answer token: a jump that matters, of the mean as of a single row
_FINE = 65  # points of a fitted curve
# What the plot shows: a form that cannot jump, and one that can.
_NAMES = {"power": "power law", "sigmoid": "sigmoid"}
_HELD = {
    "exposures": "each task row shown as often, trainings grow",
    "steps": "trainings equally long, task rows shown less often",
    "permuted": "as exposures, general rows with each other's answers",
}

_STEPWISE = {
    "exact_match",
    "accuracy",
    "balanced_accuracy",
    "mcc",
    "json_valid",
    "json_fields",
}  # a row is right or wrong

_FIXED = {"exposures": "exposures fixed", "steps": "steps fixed", "permuted": "answers permuted"}


def analyse(results: Record, predictions: Sequence[Record]) -> dict[str, Any]:
    """Every task's curves in every design: what `scaling.json` holds. Seeds that a budget cut short are left out."""
    from fulcrum.mechanism.scale_arms import levels

    settings = Settings.model_validate(results["settings"])
    ladder = levels(settings)
    by_arm: dict[str, dict[int, Record]] = {}
    for arm in results["arms"]:
        by_arm.setdefault(arm["arm"], {})[arm["seed"]] = arm
    seeds = sorted(set.intersection(*(set(by_arm.get(level.arm, {})) for level in ladder)))
    if not seeds:
        raise DataError(
            "scale: no seed has all of its trainings, so that there is no curve; finish the run with --resume"
        )
    losses = _losses(predictions, seeds)
    tasks = []
    for task in settings.tasks:
        designs = []
        for design in settings.scale.designs:
            own = [level for level in ladder if level.design == design]
            designs.append(_design(task.name, own, by_arm, seeds, losses.get(task.name, {})))
        tasks.append(
            {
                "task": task.name,
                "designs": designs,
                "sentence": " ".join(filter(None, _together(designs))),
            }
        )
    return {"version": 1, "seeds": seeds, "tasks": tasks}


def _losses(
    predictions: Sequence[Record], seeds: Sequence[int]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Nats per answer token of every test row at every arm, by task, arm and row: one for each seed that it was tested at."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in predictions:
        if row["seed"] in seeds and row["n_tokens"]:
            own = found.setdefault(row["task"], {}).setdefault(row["arm"], {})
            own.setdefault(row["origin"], []).append(row["nll_sum"] / row["n_tokens"])
    return found


def _design(
    task: str, own: Sequence["Level"], by_arm: Mapping[str, Mapping[int, Record]], seeds: Sequence[int],
    losses: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:  # fmt: skip
    """One design of one task: a test for every metric, the verdict, and the rows that jump."""
    ratios = [level.ratio for level in own]
    named = [score["metric"] for score in by_arm[own[0].arm][seeds[0]]["scores"][task]]
    tests: dict[str, tuple[JumpTest, FloatArray, bool]] = {}
    untold = []  # metrics that have no value in some training
    for metric in named:
        scores = [
            [
                next(s for s in by_arm[level.arm][seed]["scores"][task] if s["metric"] == metric)
                for level in own
            ]
            for seed in seeds
        ]
        values = np.array([[score["value"] for score in row] for row in scores], dtype=np.float64)
        higher = scores[0][0]["higher_is_better"]
        if not np.isfinite(values).all():
            untold.append(summary.label_of(metric))
            continue
        tests[metric] = jumps.jump_test(ratios, values, higher_is_better=higher), values, higher
    word, sentence = jumps.verdict(
        tests[CONTINUOUS][0],
        {name: test for name, (test, _, _) in tests.items() if name in _STEPWISE},
        worth=WORTH,
    )
    if untold:
        sentence += f" Not looked at, for lack of a value in some training: {', '.join(untold)}."
    rows = [
        row for row in losses.get(own[0].arm, ()) if all(row in losses[level.arm] for level in own)
    ]
    table = np.array([[np.mean(losses[level.arm][row]) for row in rows] for level in own])
    return {
        "design": own[0].design, "held": _HELD[own[0].design], "ratios": ratios, "repeats": [level.repeats for level in own],
        "word": word, "sentence": f"{_moved(ratios, tests[CONTINUOUS][1])} {sentence}",
        "metrics": [_metric(name, *found) for name, found in tests.items()],
        "rows": _rows(ratios, table),
    }  # fmt: skip


def _moved(ratios: Sequence[float], losses: FloatArray) -> str:
    """What the most general data made of the loss (seeds, levels), and where it was least."""
    means, change = losses.mean(axis=0), over_seeds(losses[:, -1] - losses[:, 0])
    ends = _ends(change) + (f", {len(losses)} seeds" if len(losses) > 1 else "")
    least = int(means.argmin())
    where = (
        ""
        if least == len(ratios) - 1
        else f" It is least, {means[least]:.3f}, at {ratios[least]:.3g}."
    )
    return (
        f"From none to {ratios[-1]:.3g} general rows for each shown task row the loss goes from {means[0]:.3f} to "
        f"{means[-1]:.3f} nats per token ({change.estimate:+.3f}; {ends}).{where}"
    )


def _metric(name: str, test: JumpTest, values: FloatArray, higher: bool) -> dict[str, Any]:
    """A metric's values, fits and test, as JSON holds them."""
    fine = (np.exp2(np.linspace(0, np.log2(1 + test.ratios[-1]), _FINE)) - 1).tolist()
    forms = {
        form: {
            "parameters": dict(fit.parameters), "k": fit.k, "rss": fit.rss, "aicc": fit.aicc, "refused": fit.refused,
            "fine": [] if fit.refused else curve_fits.at(fit, fine).tolist(),
        }
        for form, fit in test.fits.items()
    }  # fmt: skip
    best = curve_fits.best(test.fits)
    return dict(
        store.plain(
            {
                "metric": name, "higher_is_better": higher, "by_seed": values.tolist(), "fine": fine, "fits": forms,
                "best": None if best is None else best.form, "statistic": test.statistic, "p": test.p,
                "location": test.location, "between": test.between, "rise": test.rise, "size": test.size,
                "halves": test.halves, "replicated": test.replicated, "jump": test.jump, "failed": test.failed,
                "abrupt": test.abrupt, "improves": test.improves, "noise": test.noise, "moves": test.moves, "still": test.still,
            }
        )
    )  # fmt: skip


def _rows(ratios: Sequence[float], table: FloatArray) -> dict[str, Any]:
    """Which test rows jump, (levels, rows) of losses being given."""
    if len(ratios) < LEAST_LEVELS or not table.size:
        why = (
            f"{len(ratios)} amounts are too few"
            if table.size
            else "no predictions are stored with the run"
        )
        return {
            "n": table.shape[-1],
            "places": [],
            "sentence": f"Nothing is said of single rows: {why}.",
        }
    found = row_jumps(ratios, table)
    places = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(ratios)]
    count, n = int(found.jumps.sum()), table.shape[1]
    sentence = (
        f"{count} of {n} test rows jump: their loss falls by half a nat per token or more in one step of at most an octave, "
        "and a step fits better than a line (false discovery rate 10%, Benjamini and Hochberg)."
    )
    if found.unplaced:
        sentence += f" {found.unplaced} more would, between amounts that are over an octave apart."
    counts = [[place, int(number)] for place, number in zip(places, found.by_place, strict=True)]
    return {"n": n, "places": counts, "sentence": sentence, "jumps": count}


def over_seeds(differences: FloatArray) -> Interval:
    """Mean over seeds (seeds,) with its 95% t interval: of no width where seeds agree, nan with one."""
    found = seed_interval(differences.tolist())
    agree = len(differences) > 1 and np.isnan(found.low)
    return Interval(found.estimate, found.estimate, found.estimate) if agree else found


def _ends(interval: Interval) -> str:
    return "one seed" if np.isnan(interval.low) else f"{interval.low:+.3f} to {interval.high:+.3f}"


def _told(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} ({_ends(interval)})"


def _together(designs: Sequence[Record]) -> Iterator[str]:
    """What the designs say of each other."""
    by_name = {one["design"]: one for one in designs}
    if {"exposures", "steps"} <= by_name.keys():
        yield _length_or_share(by_name["exposures"], by_name["steps"])
    if {"exposures", "permuted"} <= by_name.keys():
        yield _transfer(by_name["exposures"], by_name["permuted"])


def _loss(design: Record) -> Record:
    """The continuous metric of a design."""
    found: Record = next(one for one in design["metrics"] if one["metric"] == CONTINUOUS)
    return found


def _length_or_share(exposures: Record, steps: Record) -> str:
    """Whether a jump is there whatever is held fixed."""
    jumping = [one["word"] == "jump" for one in (exposures, steps)]
    if not any(jumping):
        return ""
    if all(jumping):
        one, other = _loss(exposures), _loss(steps)
        apart = abs(np.log2((1 + one["location"]) / (1 + other["location"])))
        if one["improves"] == other["improves"] and apart <= jumps.REPLICATION:
            return "The jump is there with exposures fixed and with steps: neither length nor the task's share explains it."
        return (
            f"Both designs jump, but not alike ({one['size']:+.3g} at ratio {one['location']:.3g} with exposures fixed, "
            f"{other['size']:+.3g} at {other['location']:.3g} with steps): length or the task's share has a part in it."
        )
    where, other_name = (
        ("fixed exposures", "fixed steps") if jumping[0] else ("fixed steps", "fixed exposures")
    )
    if (steps if jumping[0] else exposures)["word"] == "not enough data":
        return f"The jump is there with {where}; whether it is with {other_name} could not be told."
    return (
        f"The jump is there with {where} and not with {other_name}: it may come of "
        f"{'the length of training' if jumping[0] else 'how little of a training is left to the task'}."
    )


def _transfer(exposures: Record, permuted: Record) -> str:
    """What is left of the change at the largest ratio where general rows have each other's answers."""
    true, wrong = (np.array(_loss(one)["by_seed"]) for one in (exposures, permuted))
    gain, left = (over_seeds(losses[:, -1] - losses[:, 0]) for losses in (true, wrong))
    between = over_seeds(wrong[:, -1] - true[:, -1])
    told = (
        f"At ratio {exposures['ratios'][-1]:.3g} general rows change the loss by {_told(gain)}, with each other's answers by "
        f"{_told(left)}; the latter's loss is {_told(between)} beside the former's"
    )
    if len(true) == 1:
        return f"{told}. One seed cannot tell whether the answers matter."
    if not between.low > 0:
        return (
            f"{told}: it is not shown that their answers matter, so the change may be no transfer."
        )
    if left.high < 0:
        return f"{told}: that much is in their answers, the rest is there with wrong ones too (form, words, length)."
    return f"{told}: with wrong answers nothing is gained, so what general rows teach is in their answers."


def sentences(found: Record) -> list[str]:
    """Every task's verdicts, for a terminal."""
    return [
        text
        for task in found["tasks"]
        for text in (
            *(
                f"{task['task']}, {_FIXED[one['design']]}: {one['word']}. {one['sentence']}"
                for one in task["designs"]
            ),
            *([task["sentence"]] if task["sentence"] else []),
        )
    ]


def shown(found: Record) -> list[dict[str, Any]]:
    """The tasks as a page shows them, with their plots."""
    return [
        {
            **task,
            "designs": [
                {
                    **one, "loss": _loss(one), "plot": plot(one), "name": _FIXED[one["design"]],
                    "metrics": [
                        {**own, "label": summary.label_of(own["metric"]), "means": np.mean(own["by_seed"], axis=0).tolist()}
                        for own in one["metrics"]
                    ],
                    "rows": {**one["rows"], "plot": _bars(one["rows"]["places"])},
                }
                for one in task["designs"]
            ],
        }
        for task in found["tasks"]
    ]  # fmt: skip


def _bars(places: Sequence[tuple[str, int]]) -> str:
    if not any(count for _, count in places):
        return ""
    return research_plots.bars(
        [place for place, _ in places],
        [count for _, count in places],
        "between ratios",
        "test rows",
    )


def plot(design: Record) -> str:
    """The SVG of a design's curves: a panel for each metric."""
    panels = []
    for one in design["metrics"]:
        name, direction = one["metric"], "higher" if one["higher_is_better"] else "lower"
        fitted = {
            _NAMES[form]: one["fits"][form]["fine"] for form in _NAMES if one["fits"][form]["fine"]
        }
        label = ",\n".join(filter(None, (summary.UNITS.get(name), f"{direction} is better")))
        jump = one["location"] if one["abrupt"] else None
        title, ratios = summary.label_of(name), design["ratios"]
        panels.append(
            research_plots.Amounts(title, label, ratios, one["by_seed"], one["fine"], fitted, jump)
        )
    return research_plots.scaling(panels)


def write_chapter(folder: Path, results: Record, predictions: Sequence[Record]) -> Chapter:
    """Write ``scaling.json`` into a run folder, and return what the report shows of it."""
    found = analyse(results, predictions)
    store.write_json(folder / store.SCALING, found, indent=None)
    tasks = shown(found)
    parts = certificate_page.environment().get_template("scaling.html.j2").module
    link = '<a href="#amounts">Amounts</a>'
    return Chapter(str(parts.opening(tasks)), link, str(parts.section(tasks, found["seeds"])))


def read_sentences(folder: Path, results: Record) -> list[str]:
    """Return the verdicts that the report of a run folder was written with. Raises StoreError if they cannot be read."""
    return sentences(store.read_json(folder / store.SCALING))


# Warnings about shares are of no use here: the shares are the question itself.
SCALE = RunKind(
    "scale",
    "Amounts of general data",
    selection="none",
    has_mix_advice=False,
    write_chapter=write_chapter,
    sentences=read_sentences,
)
