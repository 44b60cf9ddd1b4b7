"""Say what the curves of a scaling run show: fits, jumps and verdicts.

Everything is computed from results.json and predictions.jsonl, so an old run can be judged anew.
Other trainers' numbers can be judged by the same functions (`fulcrum.mechanism.jumps`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulcrum.config.settings import settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.core.types import FloatArray
from fulcrum.mechanism import curve_fits, jumps
from fulcrum.mechanism.jumps import LEAST_LEVELS, JumpTest
from fulcrum.mechanism.row_jumps import row_jumps
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
_PLOTTED = {"power": "power law", "sigmoid": "sigmoid"}
# What a design holds fixed, and its name.
_HELD = {
    "exposures": "each task row shown as often, trainings grow",
    "steps": "trainings equally long, task rows shown less often",
    "permuted": "as exposures, general rows with each other's answers",
}
_FIXED = {"exposures": "exposures fixed", "steps": "steps fixed", "permuted": "answers permuted"}
# Metrics by which a row is right or wrong.
_STEPWISE = {"exact_match", "accuracy", "balanced_accuracy", "mcc", "json_valid", "json_fields"}

ByArm = Mapping[str, Mapping[int, Record]]  # results by arm and seed
RowLosses = Mapping[str, Mapping[str, Sequence[float]]]  # by arm and row, one for each seed


def analyse(results: Record, predictions: Sequence[Record]) -> dict[str, Any]:
    """Return every task's curves in every design: what `scaling.json` holds.

    Seeds that a budget cut short are skipped. Raises DataError if no seed is whole.
    """
    from fulcrum.mechanism.scale_arms import levels

    settings = settings_from_dict(results["settings"], "results.json")
    ladder = levels(settings)
    by_arm: dict[str, dict[int, Record]] = {}
    for arm in results["arms"]:
        by_arm.setdefault(arm["arm"], {})[arm["seed"]] = arm
    seeds = _whole_seeds(ladder, by_arm)
    losses = _losses(predictions, seeds)
    tasks = []
    for task in settings.tasks:
        designs = []
        for name in settings.scale.designs:
            own = [level for level in ladder if level.design == name]
            measured = _Measured(task.name, own, by_arm, seeds)
            designs.append(_design(measured, losses.get(task.name, {})))
        together = " ".join(sentence for sentence in _together(designs) if sentence)
        tasks.append({"task": task.name, "designs": designs, "sentence": together})
    return {"version": 1, "seeds": seeds, "tasks": tasks}


def over_seeds(differences: FloatArray) -> Interval:
    """Return the mean over seeds (seeds,) with its 95% t interval.

    The interval has no width if all seeds agree, and is nan with one seed.
    """
    interval = seed_interval(differences.tolist())
    if len(differences) > 1 and np.isnan(interval.low):
        return Interval(interval.estimate, interval.estimate, interval.estimate)
    return interval


def sentences(analysis: Record) -> list[str]:
    """Return every task's verdicts, for a terminal."""
    lines = []
    for task in analysis["tasks"]:
        for design in task["designs"]:
            name = _FIXED[design["design"]]
            lines.append(f"{task['task']}, {name}: {design['word']}. {design['sentence']}")
        if task["sentence"]:
            lines.append(task["sentence"])
    return lines


def shown(analysis: Record) -> list[dict[str, Any]]:
    """Return the tasks as a page shows them, with their plots."""
    tasks = []
    for task in analysis["tasks"]:
        designs = [_shown_design(design) for design in task["designs"]]
        tasks.append({**task, "designs": designs})
    return tasks


def plot(design: Record) -> str:
    """Return the SVG of a design's curves: a panel for each metric."""
    panels = []
    for metric in design["metrics"]:
        fitted = {}
        for form, name in _PLOTTED.items():
            if metric["fits"][form]["fine"]:
                fitted[name] = metric["fits"][form]["fine"]
        unit = summary.UNITS.get(metric["metric"])
        direction = "higher is better" if metric["higher_is_better"] else "lower is better"
        panels.append(
            research_plots.Amounts(
                summary.label_of(metric["metric"]),
                f"{unit},\n{direction}" if unit else direction,
                design["ratios"],
                metric["by_seed"],
                metric["fine"],
                fitted,
                metric["location"] if metric["abrupt"] else None,
            )
        )
    return research_plots.scaling(panels)


def write_chapter(folder: Path, results: Record, predictions: Sequence[Record]) -> Chapter:
    """Write ``scaling.json`` into a run folder, and return what the report shows of it."""
    analysis = analyse(results, predictions)
    store.write_json(folder / store.SCALING, analysis, indent=None)
    tasks = shown(analysis)
    parts = certificate_page.environment().get_template("scaling.html.j2").module
    link = '<a href="#amounts">Amounts</a>'
    return Chapter(str(parts.opening(tasks)), link, str(parts.section(tasks, analysis["seeds"])))


def read_sentences(folder: Path, results: Record) -> list[str]:
    """Return the verdicts that a run folder's report was written with.

    Raises StoreError if they cannot be read.
    """
    return sentences(store.read_json(folder / store.SCALING))


# One design of one task


@dataclass(frozen=True)
class _Measured:
    """The trainings of one design, and the task that is scored."""

    task: str
    levels: Sequence["Level"]  # ascending
    by_arm: ByArm
    seeds: Sequence[int]

    @property
    def ratios(self) -> list[float]:
        return [level.ratio for level in self.levels]

    @property
    def metrics(self) -> list[str]:
        first = self.by_arm[self.levels[0].arm][self.seeds[0]]
        return [score["metric"] for score in first["scores"][self.task]]

    def score(self, metric: str, level: "Level", seed: int) -> Record:
        scores: Sequence[Record] = self.by_arm[level.arm][seed]["scores"][self.task]
        return next(score for score in scores if score["metric"] == metric)

    def values(self, metric: str) -> FloatArray:
        """Return a metric's values (seeds, levels); nan if a training has none."""
        rows = []
        for seed in self.seeds:
            rows.append([self.score(metric, level, seed)["value"] for level in self.levels])
        return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class _Curve:
    """A metric of a design, and its test."""

    metric: str
    values: FloatArray  # (seeds, levels)
    higher_is_better: bool
    test: JumpTest


def _whole_seeds(ladder: Sequence["Level"], by_arm: ByArm) -> list[int]:
    """Return the seeds that have all of their trainings. Raise DataError if none has."""
    trained = [set(by_arm.get(level.arm, {})) for level in ladder]
    seeds = sorted(set.intersection(*trained))
    if not seeds:
        raise DataError(
            "scale: no seed has all of its trainings, so that there is no curve; finish the run "
            "with --resume"
        )
    return seeds


def _losses(predictions: Sequence[Record], seeds: Sequence[int]) -> Mapping[str, RowLosses]:
    """Return the losses of test rows in nats per answer token, by task."""
    losses: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in predictions:
        if row["seed"] in seeds and row["n_tokens"]:
            of_arm = losses.setdefault(row["task"], {}).setdefault(row["arm"], {})
            of_arm.setdefault(row["origin"], []).append(row["nll_sum"] / row["n_tokens"])
    return losses


def _design(measured: _Measured, losses: RowLosses) -> dict[str, Any]:
    """Return a test for every metric, the verdict, and the rows that jump."""
    curves: dict[str, _Curve] = {}
    without_value = []
    for metric in measured.metrics:
        values = measured.values(metric)
        if not np.isfinite(values).all():
            without_value.append(summary.label_of(metric))
            continue
        first = measured.score(metric, measured.levels[0], measured.seeds[0])
        higher = first["higher_is_better"]
        test = jumps.jump_test(measured.ratios, values, higher_is_better=higher)
        curves[metric] = _Curve(metric, values, higher, test)
    hard = {name: curve.test for name, curve in curves.items() if name in _STEPWISE}
    word, sentence = jumps.verdict(curves[CONTINUOUS].test, hard, worth=WORTH)
    if without_value:
        missing = ", ".join(without_value)
        sentence += f" Not looked at, for lack of a value in some training: {missing}."
    name = measured.levels[0].design
    return {
        "design": name,
        "held": _HELD[name],
        "ratios": measured.ratios,
        "repeats": [level.repeats for level in measured.levels],
        "word": word,
        "sentence": f"{_change(measured.ratios, curves[CONTINUOUS].values)} {sentence}",
        "metrics": [_metric(curve) for curve in curves.values()],
        "rows": _rows(measured.ratios, _row_table(measured.levels, losses)),
    }


def _change(ratios: Sequence[float], losses: FloatArray) -> str:
    """Say how the most general data changed the loss (seeds, levels), and where it was least."""
    means = losses.mean(axis=0)
    change = over_seeds(losses[:, -1] - losses[:, 0])
    ends = _ends(change)
    if len(losses) > 1:
        ends += f", {len(losses)} seeds"
    sentence = (
        f"From none to {ratios[-1]:.3g} general rows for each shown task row the loss goes from "
        f"{means[0]:.3f} to {means[-1]:.3f} nats per token ({change.estimate:+.3f}; {ends})."
    )
    least = int(means.argmin())
    if least != len(ratios) - 1:
        sentence += f" It is least, {means[least]:.3f}, at {ratios[least]:.3g}."
    return sentence


def _metric(curve: _Curve) -> dict[str, Any]:
    """Return a metric's values, fits and test, as JSON holds them."""
    test = curve.test
    fine = (np.exp2(np.linspace(0, np.log2(1 + test.ratios[-1]), _FINE)) - 1).tolist()
    forms = {}
    for form, fit in test.fits.items():
        forms[form] = {
            "parameters": dict(fit.parameters),
            "k": fit.k,
            "rss": fit.rss,
            "aicc": fit.aicc,
            "refused": fit.refused,
            "fine": [] if fit.refused else curve_fits.evaluate(fit, fine).tolist(),
        }
    best = curve_fits.best_fit(test.fits)
    content = {
        "metric": curve.metric,
        "higher_is_better": curve.higher_is_better,
        "by_seed": curve.values.tolist(),
        "fine": fine,
        "fits": forms,
        "best": None if best is None else best.form,
        "statistic": test.statistic,
        "p": test.p,
        "location": test.location,
        "between": test.between,
        "rise": test.rise,
        "size": test.size,
        "halves": test.halves,
        "replicated": test.replicated,
        "jump": test.jump,
        "failed": test.failed,
        "abrupt": test.abrupt,
        "improves": test.improves,
        "noise": test.noise,
        "moves": test.moves,
        "still": test.still,
    }
    return dict(store.plain(content))


def _row_table(levels: Sequence["Level"], losses: RowLosses) -> FloatArray:
    """Return the mean losses (levels, rows) of the rows that were tested at every level."""
    by_level = [losses.get(level.arm, {}) for level in levels]
    rows = list(by_level[0])
    for tested in by_level:
        rows = [row for row in rows if row in tested]
    table = np.empty((len(levels), len(rows)))
    for place, tested in enumerate(by_level):
        for column, row in enumerate(rows):
            table[place, column] = np.mean(tested[row])
    return table


def _rows(ratios: Sequence[float], table: FloatArray) -> dict[str, Any]:
    """Return which test rows jump, by their losses (levels, rows)."""
    n = table.shape[-1]
    why_not = ""
    if not table.size:
        why_not = "no predictions are stored with the run"
    elif len(ratios) < LEAST_LEVELS:
        why_not = f"{len(ratios)} amounts are too few"
    if why_not:
        return {"n": n, "places": [], "sentence": f"Nothing is said of single rows: {why_not}."}
    tested = row_jumps(ratios, table)
    count = int(tested.jumps.sum())
    sentence = (
        f"{count} of {n} test rows jump: their loss falls by half a nat per token or more in one "
        "step of at most an octave, and a step fits better than a line (false discovery rate 10%, "
        "Benjamini and Hochberg)."
    )
    if tested.unplaced:
        sentence += f" {tested.unplaced} more would, between amounts that are over an octave apart."
    places = []
    for (low, high), number in zip(pairwise(ratios), tested.by_place, strict=True):
        places.append([f"{low:.3g} to {high:.3g}", int(number)])
    return {"n": n, "places": places, "sentence": sentence, "jumps": count}


# What the designs say of each other


def _together(designs: Sequence[Record]) -> Iterator[str]:
    """Yield what the designs say of each other; a sentence may be empty."""
    by_name = {design["design"]: design for design in designs}
    if {"exposures", "steps"} <= by_name.keys():
        yield _length_or_share(by_name["exposures"], by_name["steps"])
    if {"exposures", "permuted"} <= by_name.keys():
        yield _transfer(by_name["exposures"], by_name["permuted"])


def _length_or_share(exposures: Record, steps: Record) -> str:
    """Say whether a jump is there whatever is held fixed."""
    if exposures["word"] == steps["word"] == "jump":
        return _both_jump(_loss(exposures), _loss(steps))
    if exposures["word"] == "jump":
        one, other, other_word = "fixed exposures", "fixed steps", steps["word"]
        cause = "the length of training"
    elif steps["word"] == "jump":
        one, other, other_word = "fixed steps", "fixed exposures", exposures["word"]
        cause = "how little of a training is left to the task"
    else:
        return ""
    if other_word == "not enough data":
        return f"The jump is there with {one}; whether it is with {other} could not be told."
    return f"The jump is there with {one} and not with {other}: it may come of {cause}."


def _both_jump(exposures: Record, steps: Record) -> str:
    """Say whether the losses of both designs jump alike."""
    apart = abs(np.log2((1 + exposures["location"]) / (1 + steps["location"])))
    if exposures["improves"] == steps["improves"] and apart <= jumps.REPLICATION:
        return (
            "The jump is there with exposures fixed and with steps: neither length nor the task's "
            "share explains it."
        )
    return (
        f"Both designs jump, but not alike ({exposures['size']:+.3g} at ratio "
        f"{exposures['location']:.3g} with exposures fixed, {steps['size']:+.3g} at "
        f"{steps['location']:.3g} with steps): length or the task's share has a part in it."
    )


def _transfer(exposures: Record, permuted: Record) -> str:
    """Say what is left of the change at the largest ratio if general rows swap their answers."""
    true = np.array(_loss(exposures)["by_seed"])
    wrong = np.array(_loss(permuted)["by_seed"])
    gain = over_seeds(true[:, -1] - true[:, 0])
    left = over_seeds(wrong[:, -1] - wrong[:, 0])
    between = over_seeds(wrong[:, -1] - true[:, -1])
    changes = (
        f"At ratio {exposures['ratios'][-1]:.3g} general rows change the loss by "
        f"{_with_ends(gain)}, with each other's answers by {_with_ends(left)}; the latter's loss "
        f"is {_with_ends(between)} beside the former's"
    )
    if len(true) == 1:
        return f"{changes}. One seed cannot tell whether the answers matter."
    if not between.low > 0:
        return (
            f"{changes}: it is not shown that their answers matter, so the change may be no "
            "transfer."
        )
    if left.high < 0:
        return (
            f"{changes}: that much is in their answers, the rest is there with wrong ones too "
            "(form, words, length)."
        )
    return (
        f"{changes}: with wrong answers nothing is gained, so what general rows teach is in their "
        "answers."
    )


def _loss(design: Record) -> Record:
    """Return the continuous metric of a design."""
    metrics: Sequence[Record] = design["metrics"]
    return next(metric for metric in metrics if metric["metric"] == CONTINUOUS)


def _ends(interval: Interval) -> str:
    return "one seed" if np.isnan(interval.low) else f"{interval.low:+.3f} to {interval.high:+.3f}"


def _with_ends(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} ({_ends(interval)})"


# The page


def _shown_design(design: Record) -> dict[str, Any]:
    metrics = []
    for metric in design["metrics"]:
        means = np.mean(metric["by_seed"], axis=0).tolist()
        metrics.append({**metric, "label": summary.label_of(metric["metric"]), "means": means})
    return {
        **design,
        "loss": _loss(design),
        "plot": plot(design),
        "name": _FIXED[design["design"]],
        "metrics": metrics,
        "rows": {**design["rows"], "plot": _bars(design["rows"]["places"])},
    }


def _bars(places: Sequence[tuple[str, int]]) -> str:
    labels = [place for place, _ in places]
    counts = [count for _, count in places]
    if not any(counts):
        return ""
    return research_plots.bars(labels, counts, "between ratios", "test rows")


# Warnings about shares are of no use here: the shares are the question itself.
SCALE = RunKind(
    "scale",
    "Amounts of general data",
    selection="none",
    has_mix_advice=False,
    write_chapter=write_chapter,
    sentences=read_sentences,
)
