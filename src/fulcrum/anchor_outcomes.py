"""Did the scores of anchors, before training, tell which of them trained best? Read from finished comparisons; no model.

Arms that differ in their anchor and in nothing else are a group: one task of one run. Ranks are compared inside groups, since
tasks differ in their losses.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm, rankdata, spearmanr

from fulcrum import store
from fulcrum.errors import StoreError
from fulcrum.stats import Interval
from fulcrum.summary import Record

if TYPE_CHECKING:
    from fulcrum.config import Arm

FEWEST = 4  # anchors in a group of which anything can be said
_PERMUTATIONS = 20_000


@dataclass(frozen=True)
class TrainedAnchor:
    """An anchor with its scores before training, and the test loss (nats per answer token, mean over seeds) after it."""

    arm: str
    text: str
    tokens: int
    loss: float
    separation: float
    agreement: float | None
    outcome: float


@dataclass(frozen=True)
class Group:
    """Arms of one task and run that differ in their anchor alone."""

    folder: str
    task: str
    seeds: int
    anchors: tuple[TrainedAnchor, ...]


def trained(folder: Path) -> list[Group]:
    """The groups of a run folder of at least two trained anchors. Raises StoreError where it holds no finished comparison."""
    if not (folder / "results.json").exists():
        raise StoreError(f"{folder}: no finished run (no results.json); give the output_dir of `fulcrum compare`")
    if not (folder / store.ANCHORS).exists():
        return []
    return of_results(store.read_json(folder / "results.json"), store.read_json(folder / store.ANCHORS), str(folder))


def of_results(results: Record, anchors: Sequence[Record], folder: str) -> list[Group]:
    """`trained`, of what stands in results.json and anchors.json."""
    scores = {(each["task"], one["placement"], one["text"]): one for each in anchors for one in each["scores"]}
    found = []
    for task in results["settings"]["tasks"] if scores else ():
        alike: dict[str, list[TrainedAnchor]] = {}
        seeds = 0
        for name in dict.fromkeys(arm["arm"] for arm in results["arms"] if arm["training"]):
            arm = _arm(results, name)
            anchor = arm.anchor.model_dump() if arm.anchor is not None else task["anchor"]
            score = scores.get((task["name"], anchor["placement"], anchor["text"])) if arm.anchored and anchor else None
            losses = [
                metric["value"] for one in results["arms"] if one["arm"] == name and one["size"] == results["size"]
                for metric in one["scores"].get(task["name"], ()) if metric["metric"] == "nll"
            ]  # fmt: skip
            if score is None or not losses:
                continue
            seeds = max(seeds, len(losses))
            kind = store.fingerprint(arm.model_dump(mode="json", exclude={"name", "anchor"}))
            alike.setdefault(kind, []).append(
                TrainedAnchor(
                    name, score["text"], score["tokens"], score["loss"], score["separation"], score["agreement"], fmean(losses)
                )
            )
        found += [Group(folder, task["name"], seeds, tuple(group)) for group in alike.values() if len(group) > 1]
    return found


def _arm(results: Record, name: str) -> "Arm":
    from fulcrum.arms import ARMS
    from fulcrum.config import Arm

    own = [arm for arm in results["settings"]["compare"]["arms"] if not isinstance(arm, str) and arm["name"] == name]
    return Arm.model_validate(own[0]) if own else ARMS[name]


def correlation(groups: Sequence[Group], score: str) -> Interval | None:
    """Spearman's correlation of a score with the outcome inside groups, pooled, with its 95% interval; None where no group has
    `FEWEST` anchors.

    Fisher's z of each group with Bonett and Wright's variance (2000, Psychometrika 65, 23-28), averaged by its inverse.
    """
    weighted = []
    for group in groups:
        pairs = _pairs(group, score)
        if len(pairs) < FEWEST or len({x for x, _ in pairs}) < 2 or len({y for _, y in pairs}) < 2:
            continue
        r = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        z = math.atanh(max(-0.999, min(0.999, r)))
        weighted.append((z, (len(pairs) - 3) / (1 + r * r / 2)))
    if not weighted:
        return None
    total = sum(weight for _, weight in weighted)
    mean, half = sum(z * weight for z, weight in weighted) / total, float(norm.ppf(0.975)) / math.sqrt(total)
    return Interval(*(math.tanh(value) for value in (mean, mean - half, mean + half)))


def permutation_p(groups: Sequence[Group], score: str, seed: int = 0) -> float | None:
    """Two-sided p of the pooled rank correlation when outcomes are dealt anew inside groups; exact where that is few enough."""
    ranked = []
    for group in groups:
        pairs = _pairs(group, score)
        if len(pairs) >= FEWEST:
            x, y = (rankdata(side) - (len(pairs) + 1) / 2 for side in zip(*pairs, strict=True))
            size = float(np.linalg.norm(x) * np.linalg.norm(y))
            if size > 0:
                ranked.append((x, y / size))
    if not ranked:
        return None
    observed = sum(float(x @ y) for x, y in ranked)
    if math.prod(math.factorial(len(x)) for x, _ in ranked) <= _PERMUTATIONS:
        dealt = itertools.product(*([float(x @ np.array(p)) for p in itertools.permutations(y)] for x, y in ranked))
        totals = np.array([sum(parts) for parts in dealt])
        return float(np.mean(np.abs(totals) >= abs(observed) - 1e-9))
    rng = np.random.default_rng(seed)
    totals = np.array([sum(float(x @ rng.permutation(y)) for x, y in ranked) for _ in range(_PERMUTATIONS)])
    return float((1 + np.sum(np.abs(totals) >= abs(observed) - 1e-9)) / (1 + _PERMUTATIONS))


def _pairs(group: Group, score: str) -> list[tuple[float, float]]:
    return [(value, one.outcome) for one in group.anchors if (value := getattr(one, score)) is not None]


def verdict(groups: Sequence[Group]) -> str:
    """Whether the selection by loss is proven by these trainings, in a sentence."""
    found = correlation(groups, "loss")
    count = sum(len(group.anchors) for group in groups)
    if found is None:
        return f"Selection unproven: {count} trained anchors, and {FEWEST} of one task are needed to rank them."
    p = permutation_p(groups, "loss")
    told = f"Spearman {found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}]" + (
        "" if p is None else f", permutation p {p:.3f}"
    )
    where = f"over {count} trained anchors in {len(groups)} comparison{'s' if len(groups) != 1 else ''}"
    if found.low > 0:
        return f"Selection supported: a lower loss before training went with a lower test loss after it ({told}, {where})."
    if found.high < 0:
        return f"Selection refuted: a lower loss before training went with a higher test loss after it ({told}, {where})."
    return f"Selection unproven: the loss before training did not tell the test loss after it ({told}, {where})."


def sentences(groups: Sequence[Group]) -> list[str]:
    """How each score went with the test loss after training, over all groups; a dash where too few anchors were trained."""
    found = []
    for score, name in (("loss", "S_loss"), ("separation", "S_sep"), ("agreement", "S_conf")):
        told, p = correlation(groups, score), permutation_p(groups, score)
        ends = "–" if told is None else f"Spearman {told.estimate:+.2f} [{told.low:+.2f}, {told.high:+.2f}]"
        found.append(f"{name} with the test loss after training: {ends}" + ("" if p is None else f", permutation p {p:.3f}"))
    return found


def rows(results: Record, anchors: Sequence[Record]) -> list[dict[str, Any]]:
    """What a report shows: each task's anchors, with the outcomes of the arms that trained with them, and a verdict."""
    groups = of_results(results, anchors, "")
    found = []
    for each in anchors:
        own = [group for group in groups if group.task == each["task"]]
        after = {(one.text, one.arm): one.outcome for group in own for one in group.anchors}
        listed = [
            {**score, "outcomes": [(arm, value) for (text, arm), value in after.items() if text and text == score["text"]]}
            for score in each["scores"]
        ]
        found.append({**each, "scores": listed, "verdict": verdict(own) if own else ""})
    return found
