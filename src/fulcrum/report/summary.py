"""Turn the results of a run into claims and small tables of text.

The input is the plain form of `types.Results`, as ``results.json`` holds it. The terminal, the page
and the model card all take their words and numbers from here, so they cannot disagree.

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
LABELS = {"nll": "NLL", "nll_tempered": "NLL at its best temperature"}
# What a reader should do if TELL does not beat a reference, by its arm.
ADVICE = {arm.name: arm.advice for arm in ARMS.values() if arm.is_reference}
ONE_SEED = "one seed: differences between seeds are not covered"


@dataclass(frozen=True)
class Grid:
    """A table of text, whose first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...] = ()  # one a row: `best`, `base`, a verdict or nothing


@dataclass(frozen=True)
class Claim:
    """What a task's result says, in one sentence."""

    task: str
    verdict: str  # `better`, `worse`, `no difference shown` or `scores`
    sentence: str


# ---- read the results


def by_arm(results: Record) -> Arms:
    """Return each arm's results at the size that compares arms, one a seed, in the run's order."""
    arms: dict[str, list[Record]] = {}
    for result in results["arms"]:
        if result["size"] in (0, results["size"]):
            arms.setdefault(result["arm"], []).append(result)
    return arms


def value_of(score: Record | None, key: str = "value") -> float:
    """Return a number; nan if it or the whole score is missing (JSON has no nan)."""
    if score is None or score[key] is None:
        return math.nan
    return float(score[key])


def trainings(arm: Sequence[Record]) -> list[Record]:
    """Return the training of every seed; none for an arm that was not trained."""
    return [result["training"] for result in arm if result["training"] is not None]


def dev_nll(result: Record) -> float:
    """Return the dev loss that chose a result's hyperparameters; nan if nothing was tried."""
    if result["chosen"] is None:
        return math.nan
    return value_of(result["tried"][result["chosen"]], "dev_nll")


def metrics_of(arms: Arms, task: str) -> list[Record]:
    """Return one score of each metric of a task, for its name, n and direction."""
    metrics = {}
    for results in arms.values():
        for score in results[0]["scores"].get(task, ()):
            metrics[score["metric"]] = score
    return list(metrics.values())


def scores_of(arm: Sequence[Record], task: str, metric: str) -> list[Record]:
    """Return an arm's scores of one metric, one a seed."""
    scores = []
    for result in arm:
        for score in result["scores"].get(task, ()):
            if score["metric"] == metric:
                scores.append(score)
    return scores


def interval_of(scores: Sequence[Record]) -> Interval:
    """Return the mean over seeds with its t interval.

    For one seed: the score with its bootstrap interval over rows.
    """
    if len(scores) == 1:
        return _read_interval(scores[0], "value")
    values = [value_of(score) for score in scores]
    if not values or not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    return seed_interval(values)


def _read_interval(record: Record, estimate: str = "estimate") -> Interval:
    return Interval(value_of(record, estimate), value_of(record, "low"), value_of(record, "high"))


# ---- numbers and names as text


def verdict(low: float, high: float, *, higher_is_better: bool) -> str:
    """Return `better`, `worse` or `no difference shown` for a difference with this interval.

    An interval of nan shows no difference.
    """
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher_is_better else "worse"
    return "no difference shown"


def decimal(value: float) -> str:
    """Return a number with three decimals, from 10 upwards with one; nan as a dash."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return text.replace("-", "−")


def label_of(metric: str) -> str:
    """Return a metric's name as people write it."""
    return LABELS.get(metric) or metric.replace("_", " ")


def _show(interval: Interval) -> str:
    estimate = decimal(interval.estimate)
    if not math.isfinite(interval.low + interval.high):
        return estimate
    return f"{estimate} [{decimal(interval.low)}, {decimal(interval.high)}]"


def _show_span(seeds: Sequence[Record], key: str, form: str = "{:,.0f}") -> str:
    """Return one number, or ``low–high`` if seeds differ."""
    values = [seed[key] for seed in seeds]
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _show_sample(score: Record, seeds: int) -> str:
    groups = "" if score["n_groups"] == score["n"] else f" in {score['n_groups']} groups"
    covered = f"{seeds} seeds" if seeds > 1 else ONE_SEED
    return f"n={score['n']} test rows{groups}, {covered}"


# ---- claims


def headline(results: Record) -> str:
    """Return what the run shows in one sentence a task, with advice if nothing was gained."""
    all_claims = claims(results)
    if not all_claims:
        return "No task was scored."
    if len(all_claims) == 1:
        return all_claims[0].sentence
    return " ".join(f"{claim.task}: {claim.sentence}" for claim in all_claims)


def claims(results: Record) -> list[Claim]:
    """Return one claim a task, on its first metric.

    It compares TELL (else mix) with the best reference without general data on dev rows; if these
    were not compared, it states the scores.
    """
    arms = by_arm(results)
    per_task = []
    for facts in results["tasks"]:
        metrics = metrics_of(arms, facts["name"])
        if metrics:
            comparison = _claim_comparison(results, arms, facts["name"], metrics[0])
            per_task.append(comparison or _claim_scores(arms, facts["name"], metrics[0]))
    return per_task


def _claim_comparison(results: Record, arms: Arms, task: str, metric: Record) -> Claim | None:
    mixed = "tell" if "tell" in arms else "mix"
    differences = _differences_to_references(results, task, metric["metric"], mixed)
    references = [name for name in differences if name in arms]
    if not references:
        return None
    # Selected by dev loss, as a user would: selected by test score it would look too good.
    losses = {}
    for name in references:
        losses[name] = sum(map(dev_nll, arms[name])) / len(arms[name])
    reference = min(losses, key=losses.__getitem__)
    difference = differences[reference]

    sign = 1 if metric["higher_is_better"] else -1
    gain = sign * value_of(difference, "estimate")
    low, high = sorted(sign * value_of(difference, key) for key in ("low", "high"))
    word = verdict(low, high, higher_is_better=True)
    interval = f"{decimal(low)} to {decimal(high)}"
    if word == "worse":
        interval = f"{decimal(-high)} to {decimal(-low)}"
    name = metric["metric"]
    unit = UNITS.get(name, f"in {label_of(name)}")
    sample = f"(95% interval {interval}; {_show_sample(metric, difference['n_seeds'])})"
    if word == "better":
        sentence = f"{mixed} is better than {reference} by {decimal(gain)} {unit} {sample}."
    elif word == "worse":
        sentence = f"{mixed} is worse than {reference} by {decimal(abs(gain))} {unit} {sample}."
    else:
        advantage = f"{mixed}'s advantage over {reference} is {decimal(gain)} {unit}"
        sentence = f"No gain shown: {advantage} {sample}."
    if word != "better":
        sentence += f" {ADVICE[reference]}."
    return Claim(task, word, sentence)


def _differences_to_references(
    results: Record, task: str, metric: str, arm: str
) -> dict[str, Record]:
    """Return an arm's differences to the arms without general data, by their name."""
    differences = {}
    for one in results["differences"]:
        is_of_arm = (one["task"], one["metric"], one["arm"]) == (task, metric, arm)
        if is_of_arm and one["reference"] in ADVICE:
            differences[one["reference"]] = one
    return differences


def _claim_scores(arms: Arms, task: str, metric: Record) -> Claim:
    name = metric["metric"]
    scores = []
    for arm, results in arms.items():
        scores.append(f"{arm} {_show(interval_of(scores_of(results, task, name)))}")
    unit = f" in {UNITS[name]}" if name in UNITS else ""
    sample = _show_sample(metric, max(map(len, arms.values())))
    sentence = f"{label_of(name)}{unit} [95% interval]: {'; '.join(scores)} ({sample})."
    return Claim(task, "scores", sentence)


# ---- tables


def score_grid(results: Record, task: str) -> Grid:
    """Return a row an arm: every metric of the task with its interval."""
    arms = by_arm(results)
    metrics = metrics_of(arms, task)
    best = _best_arm(arms, task, metrics)
    head = ["arm"]
    for metric in metrics:
        arrow = "↑" if metric["higher_is_better"] else "↓"
        head.append(f"{label_of(metric['metric'])} {arrow}")
    rows = []
    marks = []
    for name, arm in arms.items():
        cells = [_show(interval_of(scores_of(arm, task, each["metric"]))) for each in metrics]
        rows.append((name, *cells))
        if name == best:
            marks.append("best")
        else:
            marks.append("" if trainings(arm) else "base")
    return Grid(task, tuple(head), tuple(rows), tuple(marks))


def _best_arm(arms: Arms, task: str, metrics: Sequence[Record]) -> str | None:
    """Return the arm with the best mean on the task's first metric."""
    if len(arms) < 2 or not metrics:
        return None
    sign = 1 if metrics[0]["higher_is_better"] else -1
    means = {}
    for name, arm in arms.items():
        mean = sign * interval_of(scores_of(arm, task, metrics[0]["metric"])).estimate
        if math.isfinite(mean):
            means[name] = mean
    return max(means, key=means.__getitem__, default=None)


def forgetting_grid(results: Record) -> Grid:
    """Return a row an arm: the rise of its NLL over the untrained model's, by general source."""
    cells: dict[str, dict[str, str]] = {}
    sources: dict[str, None] = {}
    for rise in results["forgetting"]:
        cells.setdefault(rise["arm"], {})[rise["task"]] = _show(_read_interval(rise))
        sources[rise["task"]] = None
    rows = []
    for arm, by_source in cells.items():
        rows.append((arm, *(by_source.get(source, "–") for source in sources)))
    head = ("arm", *(f"{source}: change of NLL ↓" for source in sources))
    title = "Forgetting: general rows held out, nats per answer token above the base model"
    return Grid(title, head, tuple(rows))


def training_grid(results: Record) -> Grid:
    """Return a row a trained arm: what it saw and which step was kept; ranges if seeds differ."""
    rows = []
    for name, arm in by_arm(results).items():
        runs = trainings(arm)
        if not runs:
            continue
        shares = [run["share"] for run in runs]
        cells = [name]
        for key in ("examples", "tokens", "loss_tokens"):
            cells.append(_show_span(shares, key, "{:.1%}").replace(".0%", "%"))
        for key in ("task_examples", "general_examples"):
            cells.append(_show_span(shares, key))
        for key in ("repeats", "best_step", "steps", "train_tokens"):
            cells.append(_show_span(runs, key))
        rows.append(tuple(cells))
    head = (
        "arm",
        "task share: examples",
        "tokens",
        "loss tokens",
        "task rows shown",
        "general rows",
        "repeats",
        "best step",
        "steps",
        "train tokens",
    )
    return Grid("What each arm was trained on", head, tuple(rows))


def cost_grid(results: Record) -> Grid:
    """Return a row an arm: trials, trained tokens, their operations, and seconds.

    Trials and trainings of all sizes and seeds count. A token takes about 2 operations for each
    parameter forwards and 2 backwards, since the base's own gradients are not taken (6 in all would
    be training every weight: Kaplan et al. 2020, 2001.08361, 2.1).
    """
    parameters = float(results["environment"].get("parameters", "nan"))
    arms: dict[str, list[Record]] = {}
    for result in results["arms"]:
        arms.setdefault(result["arm"], []).append(result)
    rows = []
    for name, arm in arms.items():
        trials = _distinct_trials(arm)
        runs = trainings(arm)
        trained = list(trials)
        timed = list(arm)
        # A training that dev rows watched is one of the trials; its seconds are in the arm's.
        if not any(run["dev_nll"] for run in runs):
            trained += runs
            timed += trials
        tokens = sum(one["train_tokens"] for one in trained)
        seconds = sum(value_of(one, "seconds") for one in timed)
        operations = decimal(4e-15 * parameters * tokens)
        counts = (f"{len(arm)}", f"{len(trials)}", f"{tokens:,}")
        rows.append((name, *counts, operations, f"{seconds:,.0f}"))
    head = ("arm", "cells", "trials", "train tokens in all", "PFLOP, about", "seconds in all")
    return Grid("Cost", head, tuple(rows))


def _distinct_trials(arm: Sequence[Record]) -> list[Record]:
    """Return an arm's trials, once each if the first seed's trials serve all seeds."""
    trials = {}
    for result in arm:
        for trial in result["tried"]:
            key = (*trial["setting"].values(), trial["dev_nll"], trial["seconds"])
            trials[key] = trial
    return list(trials.values())


def difference_grid(results: Record, *, first_metric_only: bool = False) -> Grid:
    """Return a row a paired difference (arm minus reference, same test rows) with its verdict."""
    arms = by_arm(results)
    first_metrics = {}
    for facts in results["tasks"]:
        for metric in metrics_of(arms, facts["name"])[:1]:
            first_metrics[facts["name"]] = metric["metric"]
    rows = []
    marks = []
    for one in results["differences"]:
        if first_metric_only and one["metric"] != first_metrics.get(one["task"]):
            continue
        interval = _read_interval(one)
        word = verdict(interval.low, interval.high, higher_is_better=one["higher_is_better"])
        pair = f"{one['arm']} − {one['reference']}"
        label = label_of(one["metric"])
        rows.append((pair, one["task"], label, _show(interval), f"{one['n_seeds']}", word))
        marks.append(word)
    head = ("arm − reference", "task", "metric", "difference [95% interval]", "seeds", "verdict")
    title = "Paired differences"
    if first_metric_only:
        title += " (first metric; the report has the others)"
    return Grid(title, head, tuple(rows), tuple(marks))
