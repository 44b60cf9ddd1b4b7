"""Tell whether the loss of anchors before training told which of them trained best; needs no model.

Read from finished comparisons. Arms that differ in their anchor and in nothing else are a group:
one task of one run. Ranks are compared within groups, since tasks differ in their losses.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata, spearmanr

from fulcrum.config.arms import ARMS
from fulcrum.config.experiments import Arm
from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import FloatArray
from fulcrum.report.summary import Record
from fulcrum.stats.intervals import Interval

FEWEST = 4  # anchors in a group that can be ranked
_PERMUTATIONS = 20_000


@dataclass(frozen=True)
class TrainedAnchor:
    """An anchor, scored before training and measured after it.

    loss: nats per answer token before training (S_loss)
    outcome: nats per answer token of the test rows after training, mean over seeds
    """

    arm: str
    text: str
    tokens: int
    loss: float
    outcome: float


@dataclass(frozen=True)
class Group:
    """Arms of one task and run that differ in their anchor alone."""

    folder: str
    task: str
    seeds: int
    anchors: tuple[TrainedAnchor, ...]


def read_groups(folder: Path) -> list[Group]:
    """Return the groups of a run folder. Raise StoreError if it holds no finished comparison."""
    if not (folder / "results.json").exists():
        raise StoreError(
            f"{folder}: no finished run (no results.json); give the output_dir of `fulcrum compare`"
        )
    if not (folder / store.ANCHORS).exists():
        return []
    results = store.read_json(folder / "results.json")
    return find_groups(results, store.read_json(folder / store.ANCHORS), str(folder))


def find_groups(results: Record, anchors: Sequence[Record], folder: str) -> list[Group]:
    """Return the groups of at least two trained anchors in a results.json and its anchors.json."""
    scores = {}
    for each in anchors:
        for score in each["scores"]:
            scores[each["task"], score["placement"], score["text"]] = score
    groups = []
    for task in results["settings"]["tasks"] if scores else ():
        alike: dict[str, list[TrainedAnchor]] = {}
        seeds = 0
        for name in dict.fromkeys(arm["arm"] for arm in results["arms"] if arm["training"]):
            arm = _find_arm(results, name)
            anchor = task["anchor"] if arm.anchor is None else arm.anchor.model_dump()
            if not arm.anchored or not anchor:
                continue
            score = scores.get((task["name"], anchor["placement"], anchor["text"]))
            losses = _test_losses(results, name, task["name"])
            if score is None or not losses:
                continue
            seeds = max(seeds, len(losses))
            rest = arm.model_dump(mode="json", exclude={"name", "anchor"})
            alike.setdefault(store.fingerprint(rest), []).append(
                TrainedAnchor(name, score["text"], score["tokens"], score["loss"], fmean(losses))
            )
        for members in alike.values():
            if len(members) > 1:
                groups.append(Group(folder, task["name"], seeds, tuple(members)))
    return groups


def _test_losses(results: Record, arm: str, task: str) -> list[float]:
    """Return an arm's test loss at the size at which arms are compared, for each seed."""
    losses = []
    for one in results["arms"]:
        if one["arm"] == arm and one["size"] == results["size"]:
            scores = one["scores"].get(task, ())
            losses += [metric["value"] for metric in scores if metric["metric"] == "nll"]
    return losses


def _find_arm(results: Record, name: str) -> Arm:
    for arm in results["settings"]["compare"]["arms"]:
        if not isinstance(arm, str) and arm["name"] == name:
            return Arm.model_validate(arm)
    return ARMS[name]


def correlation(groups: Sequence[Group]) -> Interval | None:
    """Return Spearman's correlation of loss and outcome within groups, with its 95% interval.

    None if no group has `FEWEST` anchors. Fisher's z of each group, with Bonett and Wright's
    variance (2000, Psychometrika 65, 23-28), is averaged by inverse variance.
    """
    total = weighted = 0.0
    for group in groups:
        losses, outcomes = _pairs(group)
        if len(losses) < FEWEST or len(set(losses)) < 2 or len(set(outcomes)) < 2:
            continue
        r = float(spearmanr(losses, outcomes).statistic)
        weight = (len(losses) - 3) / (1 + r * r / 2)
        weighted += weight * math.atanh(max(-0.999, min(0.999, r)))
        total += weight
    if total == 0:
        return None
    mean = weighted / total
    half = float(norm.ppf(0.975)) / math.sqrt(total)
    return Interval(math.tanh(mean), math.tanh(mean - half), math.tanh(mean + half))


def permutation_p(groups: Sequence[Group], seed: int = 0) -> float | None:
    """Return the two-sided p of the pooled rank correlation, permuting outcomes within groups.

    It is exact if there are few enough permutations. None if no group can be ranked.
    """
    ranked: list[tuple[FloatArray, FloatArray]] = []
    for group in groups:
        losses, outcomes = _pairs(group)
        if len(losses) < FEWEST:
            continue
        x = rankdata(losses) - (len(losses) + 1) / 2
        y = rankdata(outcomes) - (len(outcomes) + 1) / 2
        size = float(np.linalg.norm(x) * np.linalg.norm(y))
        if size > 0:
            ranked.append((x, y / size))
    if not ranked:
        return None
    observed = abs(sum(float(x @ y) for x, y in ranked)) - 1e-9
    if math.prod(math.factorial(len(x)) for x, _ in ranked) <= _PERMUTATIONS:
        parts = [[float(x @ np.array(p)) for p in itertools.permutations(y)] for x, y in ranked]
        totals = np.array([sum(part) for part in itertools.product(*parts)])
        return float(np.mean(np.abs(totals) >= observed))
    rng = np.random.default_rng(seed)
    totals = np.zeros(_PERMUTATIONS)
    for draw in range(_PERMUTATIONS):
        totals[draw] = sum(float(x @ rng.permutation(y)) for x, y in ranked)
    return float((1 + np.sum(np.abs(totals) >= observed)) / (1 + _PERMUTATIONS))


def _pairs(group: Group) -> tuple[list[float], list[float]]:
    """Return the losses before training and the outcomes after it."""
    return [one.loss for one in group.anchors], [one.outcome for one in group.anchors]


def verdict(groups: Sequence[Group]) -> str:
    """Say whether these trainings support the selection by loss, in a sentence."""
    found = correlation(groups)
    count = sum(len(group.anchors) for group in groups)
    if found is None:
        return f"Selection unproven: {count} trained anchors, and {FEWEST} of one task are needed to rank them."
    rank = f"Spearman {found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    p = permutation_p(groups)
    if p is not None:
        rank += f", permutation p {p:.3f}"
    comparisons = f"{len(groups)} comparison{'s' if len(groups) != 1 else ''}"
    basis = f"({rank}, over {count} trained anchors in {comparisons})"
    if found.low > 0:
        return f"Selection supported: a lower loss before training went with a lower test loss after it {basis}."
    if found.high < 0:
        return f"Selection refuted: a lower loss before training went with a higher test loss after it {basis}."
    return (
        f"Selection unproven: the loss before training did not tell the test loss after it {basis}."
    )


def rows(results: Record, anchors: Sequence[Record]) -> list[dict[str, Any]]:
    """Return for a report each task's anchors, what training with them gave, and a verdict."""
    groups = find_groups(results, anchors, "")
    shown = []
    for each in anchors:
        own = [group for group in groups if group.task == each["task"]]
        outcomes: dict[str, list[tuple[str, float]]] = {}
        for group in own:
            for one in group.anchors:
                outcomes.setdefault(one.text, []).append((one.arm, one.outcome))
        scores = []
        for score in each["scores"]:
            # The control without an anchor has no text, and is no trained anchor.
            scores.append({**score, "outcomes": outcomes.get(score["text"], [])})
        shown.append({**each, "scores": scores, "verdict": verdict(own) if own else ""})
    return shown
