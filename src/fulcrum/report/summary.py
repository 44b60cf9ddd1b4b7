"""What the results say, in numbers and words: intervals over seeds, claims, and small tables of text.

The input is the plain form of `records.Results`, as ``results.json`` holds it. The terminal, the page and the model card are
all fed from here, so they cannot disagree.

Invariants: no score without its interval, n and seeds; what is missing shows as a dash.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulcrum.config.arms import ARMS
from fulcrum.stats.intervals import Interval, seed_interval

Record = Mapping[str, Any]  # one record as JSON holds it
Arms = Mapping[str, Sequence[Record]]  # arm -> its results, one a seed

UNITS = {
    "nll": "nats per answer token",
    "nll_tempered": "nats per answer token",
    "bleu": "BLEU points",
    "chrf": "chrF points",
}
# What a reader should do if TELL does not beat a reference, by its arm.
ADVICE = {arm.name: arm.advice for arm in ARMS.values() if arm.is_reference}
ONE_SEED = "one seed: differences between seeds are not covered"


@dataclass(frozen=True)
class Grid:
    """A table of text. `marks` holds, for each row, ``best``, ``base`` or nothing; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What a task's result says in one sentence; `verdict` is ``better``, ``worse``, ``no difference shown`` or ``scores``."""

    task: str
    verdict: str
    sentence: str


def by_arm(results: Record) -> Arms:
    """Return every arm's results at the size at which arms are compared, one a seed, in the order of the run."""
    arms: dict[str, list[Record]] = {}
    for result in results["arms"]:
        if result["size"] in (0, results["size"]):
            arms.setdefault(result["arm"], []).append(result)
    return arms


def value_of(score: Record | None, key: str = "value") -> float:
    """Read a number, nan where it or the whole score is missing (JSON has no nan)."""
    value = None if score is None else score[key]
    return math.nan if value is None else float(value)


def trainings(arm: Sequence[Record]) -> list[Record]:
    """Return the training of every seed; none for an arm that was not trained."""
    return [result["training"] for result in arm if result["training"] is not None]


def dev_nll(result: Record) -> float:
    """Return the loss on dev rows by which a result's setting was chosen; nan where nothing was tried."""
    return (
        math.nan
        if result["chosen"] is None
        else value_of(result["tried"][result["chosen"]], "dev_nll")
    )


def metrics_of(arms: Arms, task: str) -> list[Record]:
    """Return one score of each metric of a task, for its name, n and direction."""
    return list(
        {s["metric"]: s for arm in arms.values() for s in arm[0]["scores"].get(task, ())}.values()
    )


def scores_of(arm: Sequence[Record], task: str, metric: str) -> list[Record]:
    """Return an arm's scores of one metric, one a seed."""
    return [s for result in arm for s in result["scores"].get(task, ()) if s["metric"] == metric]


def _over_seeds(values: Sequence[float]) -> Interval:
    if not values or not all(math.isfinite(value) for value in values):
        return Interval(math.nan, math.nan, math.nan)
    return seed_interval(values)


def interval_of(scores: Sequence[Record]) -> Interval:
    """Return the mean over seeds with its t interval; for one seed the score with its bootstrap interval over rows."""
    if len(scores) == 1:
        return Interval(
            value_of(scores[0]), value_of(scores[0], "low"), value_of(scores[0], "high")
        )
    return _over_seeds([value_of(score) for score in scores])


def _interval(difference: Record) -> Interval:
    return Interval(*(value_of(difference, key) for key in Interval._fields))


def _best(arms: Arms, task: str) -> str | None:
    """Return the arm with the best mean on the task's first metric."""
    metrics = metrics_of(arms, task)
    if len(arms) < 2 or not metrics:
        return None
    sign = 1 if metrics[0]["higher_is_better"] else -1
    means = {
        name: sign * interval_of(scores_of(arm, task, metrics[0]["metric"])).estimate
        for name, arm in arms.items()
    }
    return max(
        (name for name in means if math.isfinite(means[name])), key=means.__getitem__, default=None
    )


def verdict(low: float, high: float, *, higher_is_better: bool) -> str:
    """Return ``better``, ``worse`` or ``no difference shown`` for a difference's interval; nan bounds show nothing."""
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "no difference shown"


def decimal(value: float) -> str:
    """Show a number with three decimals, from 10 upwards with one; nan as a dash."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}".replace("-", "−") if abs(value) < 10 else f"{value:.1f}".replace("-", "−")


def _show(interval: Interval) -> str:
    if not math.isfinite(interval.low + interval.high):
        return decimal(interval.estimate)
    return f"{decimal(interval.estimate)} [{decimal(interval.low)}, {decimal(interval.high)}]"


def _span(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """Show what differs over seeds as ``low–high``."""
    low, high = (form.format(min(values)), form.format(max(values))) if values else ("–", "–")
    return low if low == high else f"{low}–{high}"


def label_of(metric: str) -> str:
    """Return a metric's name as people write it."""
    known = {"nll": "NLL", "nll_tempered": "NLL at its best temperature"}
    return known.get(metric) or metric.replace("_", " ")


def _unit(metric: str) -> str:
    return UNITS.get(metric, f"in {label_of(metric)}")


def _sample(score: Record, seeds: int) -> str:
    groups = "" if score["n_groups"] == score["n"] else f" in {score['n_groups']} groups"
    return f"n={score['n']} test rows{groups}, {f'{seeds} seeds' if seeds > 1 else ONE_SEED}"


def claims(results: Record) -> list[Claim]:
    """Return one claim a task: TELL (else mix) against what was best on dev without general data, on the first metric."""
    arms = by_arm(results)
    found = []
    for facts in results["tasks"]:
        metrics = metrics_of(arms, facts["name"])
        if metrics:
            compared = _comparison(results, arms, facts["name"], metrics[0])
            found.append(compared or _state_scores(arms, facts["name"], metrics[0]))
    return found


def _comparison(results: Record, arms: Arms, task: str, metric: Record) -> Claim | None:
    sign = 1 if metric["higher_is_better"] else -1
    mixed = "tell" if "tell" in arms else "mix"
    against = {
        d["reference"]: d
        for d in results["differences"]
        if (d["task"], d["metric"], d["arm"]) == (task, metric["metric"], mixed)
        and d["reference"] in ADVICE
    }
    # Picked by dev loss, as a user would: picked by test score it would look better than it is.
    present = [name for name in against if name in arms]
    losses = {
        name: sum(dev_nll(result) for result in arms[name]) / len(arms[name]) for name in present
    }
    if not losses:
        return None
    reference = min(losses, key=losses.__getitem__)
    difference = against[reference]
    gain, bounds = (
        sign * value_of(difference, "estimate"),
        sorted(sign * value_of(difference, key) for key in ("low", "high")),
    )
    word = verdict(*bounds, higher_is_better=True)
    interval = f"{decimal(bounds[0])} to {decimal(bounds[1])}"
    unit, sample, advice = (
        _unit(metric["metric"]),
        _sample(metric, difference["n_seeds"]),
        ADVICE[reference],
    )
    if word == "no difference shown":
        about = f"{mixed}'s advantage over {reference} is {decimal(gain)} {unit}"
        return Claim(
            task, word, f"No gain shown: {about} (95% interval {interval}; {sample}). {advice}."
        )
    text = f"{mixed} is {word} than {reference} by {decimal(abs(gain))} {unit}"
    if word == "better":
        return Claim(task, word, f"{text} (95% interval {interval}; {sample}).")
    interval = f"{decimal(-bounds[1])} to {decimal(-bounds[0])}"
    return Claim(task, word, f"{text} (95% interval {interval}; {sample}). {advice}.")


def _state_scores(arms: Arms, task: str, metric: Record) -> Claim:
    name = metric["metric"]
    scores = "; ".join(
        f"{arm} {_show(interval_of(scores_of(results, task, name)))}"
        for arm, results in arms.items()
    )
    seeds = max(len(results) for results in arms.values())
    unit = f"{label_of(name)} in {UNITS[name]}" if name in UNITS else label_of(name)
    return Claim(task, "scores", f"{unit} [95% interval]: {scores} ({_sample(metric, seeds)}).")


def headline(results: Record) -> str:
    """Return what the run shows in one sentence a task, with interval, n and seeds, and the advice where nothing was gained."""
    found = claims(results)
    if not found:
        return "No task was scored."
    return " ".join(
        f"{claim.task}: {claim.sentence}" if len(found) > 1 else claim.sentence for claim in found
    )


def score_grid(results: Record, task: str) -> Grid:
    """Return a row an arm: every metric of the task with its interval."""
    arms = by_arm(results)
    metrics = metrics_of(arms, task)
    best = _best(arms, task)
    rows = [
        (name, *(_show(interval_of(scores_of(arm, task, metric["metric"]))) for metric in metrics))
        for name, arm in arms.items()
    ]
    head = (
        "arm",
        *(f"{label_of(m['metric'])} {'↑' if m['higher_is_better'] else '↓'}" for m in metrics),
    )
    marks = tuple(
        "best" if name == best else "" if trainings(arm) else "base" for name, arm in arms.items()
    )
    return Grid(task, head, tuple(rows), marks)


def forgetting_grid(results: Record) -> Grid:
    """Return a row an arm: how far its NLL on each held-out general source lies above the untouched model's."""
    found = {(d["arm"], d["task"]): _show(_interval(d)) for d in results["forgetting"]}
    sources = list(dict.fromkeys(source for _, source in found))
    rows = tuple(
        (arm, *(found.get((arm, source), "–") for source in sources))
        for arm in dict.fromkeys(arm for arm, _ in found)
    )
    head = ("arm", *(f"{source}: change of NLL ↓" for source in sources))
    return Grid(
        "Forgetting: general rows held out, nats per answer token above the base model", head, rows
    )


def training_grid(results: Record) -> Grid:
    """Return a row a trained arm: what it saw, and the step whose weights were kept; ``low–high`` where seeds differ."""
    rows = []
    for name, arm in by_arm(results).items():
        if found := trainings(arm):
            shares = [training["share"] for training in found]
            parts = [
                _span([share[key] for share in shares], "{:.1%}").replace(".0%", "%")
                for key in ("examples", "tokens", "loss_tokens")
            ]
            counts = [
                _span([share[key] for share in shares])
                for key in ("task_examples", "general_examples")
            ]
            steps = [
                _span([training[key] for training in found])
                for key in ("repeats", "best_step", "steps", "train_tokens")
            ]
            rows.append((name, *parts, *counts, *steps))
    head = (
        "arm",
        "task share: examples",
        "tokens",
        "loss tokens",
        "task rows shown",
        "general rows",
    )
    return Grid(
        "What each arm was trained on",
        (*head, "repeats", "best step", "steps", "train tokens"),
        tuple(rows),
    )


def cost_grid(results: Record) -> Grid:
    """Return a row an arm: trials, tokens trained on, floating-point operations of that, and seconds, in all trials and
    trainings of all sizes and seeds.

    A token takes about 2 operations for each parameter forwards and 2 backwards, since the base's own gradients are not
    taken (6 in all would be training every weight: Kaplan et al. 2020, 2001.08361, 2.1).
    """
    rows, parameters = [], float(results["environment"].get("parameters", "nan"))
    for name in dict.fromkeys(result["arm"] for result in results["arms"]):
        arm = [result for result in results["arms"] if result["arm"] == name]
        # Where the first seed's trials stand for all seeds, each of them was paid for once.
        tried = {
            (*t["setting"].values(), t["dev_nll"], t["seconds"]): t
            for result in arm
            for t in result["tried"]
        }.values()
        # A training that was watched on dev rows is one of the trials, and its seconds are among those of the arm.
        is_trial = any(training["dev_nll"] for training in trainings(arm))
        tokens = sum(one["train_tokens"] for one in [*tried, *(() if is_trial else trainings(arm))])
        seconds = sum(value_of(one, "seconds") for one in [*arm, *(() if is_trial else tried)])
        operations = decimal(4e-15 * parameters * tokens)
        rows.append(
            (name, f"{len(arm)}", f"{len(tried)}", f"{tokens:,}", operations, f"{seconds:,.0f}")
        )
    head = ("arm", "cells", "trials", "train tokens in all", "PFLOP, about", "seconds in all")
    return Grid("Cost", head, tuple(rows))


def difference_grid(results: Record, *, first_metric_only: bool = False) -> Grid:
    """Return a row a paired difference (arm minus reference, on the same test rows) with its verdict."""
    rows = []
    arms = by_arm(results)
    first = {facts["name"]: metrics_of(arms, facts["name"])[:1] for facts in results["tasks"]}
    for d in results["differences"]:
        if first_metric_only and d["metric"] not in [
            score["metric"] for score in first.get(d["task"], ())
        ]:
            continue
        interval = _interval(d)
        word = verdict(interval.low, interval.high, higher_is_better=d["higher_is_better"])
        pair = f"{d['arm']} − {d['reference']}"
        rows.append(
            (pair, d["task"], label_of(d["metric"]), _show(interval), f"{d['n_seeds']}", word)
        )
    head = ("arm − reference", "task", "metric", "difference [95% interval]", "seeds", "verdict")
    title = "Paired differences" + (
        " (first metric; the others stand in the report)" if first_metric_only else ""
    )
    return Grid(title, head, tuple(rows), tuple(row[-1] for row in rows))
