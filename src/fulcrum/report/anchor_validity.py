"""Say whether an anchor's loss before training predicts its loss after it; needs no model.

The data are finished comparisons. Arms of one task and run that differ only in their anchor form a
group. Ranks are compared within groups, since tasks differ in their losses.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.stats import norm, rankdata, spearmanr

from fulcrum.config import parsing
from fulcrum.config.arms import ARMS
from fulcrum.config.experiments import Arm
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, StoreError
from fulcrum.core.types import FloatArray
from fulcrum.report.summary import Record
from fulcrum.stats.intervals import Interval

FEWEST = 4  # anchors in a group that can be ranked
_PERMUTATIONS = 20_000


@dataclass(frozen=True)
class TrainedAnchor:
    """An anchor, scored before training and measured after it."""

    arm: str
    text: str
    tokens: int
    loss: float  # before training (S_loss), nats per answer token
    outcome: float  # of the test rows after training, mean over seeds, nats per answer token


@dataclass(frozen=True)
class Group:
    """Arms of one task and run that differ only in their anchor."""

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
    scores: dict[str, dict[tuple[str, str], Record]] = {}  # task -> (placement, text) -> score
    for each in anchors:
        by_anchor = scores.setdefault(each["task"], {})
        for score in each["scores"]:
            by_anchor[score["placement"], score["text"]] = score
    groups = []
    for task in results["settings"]["tasks"] if scores else ():
        groups += _groups_of_task(results, task, scores.get(task["name"], {}), folder)
    return groups


def _groups_of_task(
    results: Record, task: Record, scores: Mapping[tuple[str, str], Record], folder: str
) -> list[Group]:
    alike: dict[str, list[TrainedAnchor]] = {}  # hash of all settings but the anchor -> anchors
    seeds = 0
    trained = dict.fromkeys(result["arm"] for result in results["arms"] if result["training"])
    for name in trained:
        arm = _find_arm(results, name)
        anchor = task["anchor"] if arm.anchor is None else arm.anchor.model_dump()
        if not arm.anchored or not anchor:
            continue
        score = scores.get((anchor["placement"], anchor["text"]))
        losses = _test_losses(results, name, task["name"])
        if score is None or not losses:
            continue
        seeds = max(seeds, len(losses))
        rest = arm.model_dump(mode="json", exclude={"name", "anchor"})
        alike.setdefault(store.fingerprint(rest), []).append(
            TrainedAnchor(name, score["text"], score["tokens"], score["loss"], fmean(losses))
        )
    groups = []
    for members in alike.values():
        if len(members) > 1:
            groups.append(Group(folder, task["name"], seeds, tuple(members)))
    return groups


def _test_losses(results: Record, arm: str, task: str) -> list[float]:
    """Return an arm's test loss for each seed, at the size at which arms are compared."""
    losses = []
    for result in results["arms"]:
        if result["arm"] == arm and result["size"] == results["size"]:
            for score in result["scores"].get(task, ()):
                if score["metric"] == "nll":
                    losses.append(score["value"])
    return losses


def _find_arm(results: Record, name: str) -> Arm:
    for arm in results["settings"]["compare"]["arms"]:
        if not isinstance(arm, str) and arm["name"] == name:
            try:
                return Arm.model_validate(arm)
            except ValidationError as error:
                raise parsing.explain(error, Arm, f"arm {name!r} of a run", {}) from None
    if name not in ARMS:
        raise ConfigError(f"arm {name!r} of a run is not built in any more, nor described there")
    return ARMS[name]


def correlation(groups: Sequence[Group]) -> Interval | None:
    """Return Spearman's correlation of loss and outcome within groups, with its 95% interval.

    None if no group has `FEWEST` anchors. Fisher's z of each group, with Bonett and Wright's
    variance (2000, Psychometrika 65, 23-28), is averaged by inverse variance.
    """
    total = weighted = 0.0
    for group in groups:
        losses, outcomes = losses_and_outcomes(group)
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
    orders = 1
    observed = 0.0
    for group in groups:
        losses, outcomes = losses_and_outcomes(group)
        if len(losses) < FEWEST:
            continue
        x = rankdata(losses) - (len(losses) + 1) / 2
        y = rankdata(outcomes) - (len(outcomes) + 1) / 2
        size = float(np.linalg.norm(x) * np.linalg.norm(y))
        if size > 0:
            y = y / size
            ranked.append((x, y))
            orders *= math.factorial(len(x))
            observed += float(x @ y)
    if not ranked:
        return None
    least = abs(observed) - 1e-9  # rounding must not exclude the observed order itself
    if orders <= _PERMUTATIONS:
        totals = np.zeros(1)
        for x, y in ranked:
            sums = np.array(list(itertools.permutations(y))) @ x
            totals = np.add.outer(totals, sums).ravel()
        return float(np.mean(np.abs(totals) >= least))
    rng = np.random.default_rng(seed)
    totals = np.zeros(_PERMUTATIONS)
    for draw in range(_PERMUTATIONS):
        totals[draw] = sum(float(x @ rng.permutation(y)) for x, y in ranked)
    return float((1 + np.sum(np.abs(totals) >= least)) / (1 + _PERMUTATIONS))


def losses_and_outcomes(group: Group) -> tuple[list[float], list[float]]:
    """Return the anchors' losses before training and after it."""
    return [one.loss for one in group.anchors], [one.outcome for one in group.anchors]


def verdict(groups: Sequence[Group]) -> str:
    """Say whether these trainings support the selection by loss, in a sentence."""
    rho = correlation(groups)
    count = sum(len(group.anchors) for group in groups)
    if rho is None:
        return (
            f"Selection unproven: {count} trained anchors, and {FEWEST} of one task are needed to "
            "rank them."
        )
    rank = f"Spearman {rho.estimate:+.2f} [{rho.low:+.2f}, {rho.high:+.2f}]"
    p = permutation_p(groups)
    if p is not None:
        rank += f", permutation p {p:.3f}"
    comparisons = "1 comparison" if len(groups) == 1 else f"{len(groups)} comparisons"
    basis = f"({rank}, over {count} trained anchors in {comparisons})"
    if rho.low > 0:
        return (
            "Selection supported: a lower loss before training went with a lower test loss after "
            f"it {basis}."
        )
    if rho.high < 0:
        return (
            "Selection refuted: a lower loss before training went with a higher test loss after "
            f"it {basis}."
        )
    return (
        f"Selection unproven: the loss before training did not tell the test loss after it {basis}."
    )


def rows(results: Record, anchors: Sequence[Record]) -> list[dict[str, Any]]:
    """Return each task's anchors for a report: their scores, outcomes of training, a verdict."""
    groups = find_groups(results, anchors, "")
    tasks = []
    for each in anchors:
        own = [group for group in groups if group.task == each["task"]]
        outcomes: dict[str, list[tuple[str, float]]] = {}  # text -> (arm, test loss)
        for group in own:
            for one in group.anchors:
                outcomes.setdefault(one.text, []).append((one.arm, one.outcome))
        scores = []
        for score in each["scores"]:
            # The control without an anchor has no text, and no outcomes.
            scores.append({**score, "outcomes": outcomes.get(score["text"], [])})
        tasks.append({**each, "scores": scores, "verdict": verdict(own) if own else ""})
    return tasks
