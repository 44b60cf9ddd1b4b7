"""Compute the verdicts of stored results that have no certificate again, and compare them.

    python scripts/recompute.py results

- `scale/*`: curves, jumps and verdicts from the outcomes of every test row, against `scaling.json`.
  (Of fitted curves what they are judged by is compared, not their parameters: the data hardly
  determine some of them, and the last digits of a sum move them.)
- `quanta/*`: the number of clusters and the test of the hypothesis from `quanta.json.gz`. (The
  clusters themselves are of gradients, which are not stored.)
- `auto/*`: the amount of general data from the pilot's losses, against `pilot.json`.
- `anchors`: whether scores before training tell which anchor trains best, from certificates and
  `anchors.json`, against `verdict.json`.

Prints a row for each verdict, and ends with 1 if one is not as it was stored.
"""

import argparse
import gzip
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulcrum.config.settings import load_settings
from fulcrum.core import store
from fulcrum.experiments import pilot
from fulcrum.mechanism import cluster_gains, clusters, scale_report
from fulcrum.report import anchor_validity
from fulcrum.stats import certificate, outcomes
from fulcrum.stats.certificate import Certificate
from fulcrum.stats.outcomes import Outcomes

QUANTA = f"{store.QUANTA}.gz"
VERDICT = "verdict.json"
_TOLERANCE = 1e-6  # relative: sums over stored outcomes are added in another order


class Verdict(NamedTuple):
    """A verdict as it was stored and as it is computed again, in codes and numbers."""

    result: str
    stored: Any
    computed: Any

    @property
    def is_equal(self) -> bool:
        """Return whether both are equal, rounding aside."""
        return _are_equal(self.stored, self.computed)


def main() -> None:
    """Print every verdict, stored and computed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    found = list(verdicts(parser.parse_args().results))
    print("| result | stored | computed again | equal |\n|---|---|---|---|")
    for one in found:
        is_equal = "yes" if one.is_equal else "no"
        print(f"| {one.result} | {_brief(one.stored)} | {_brief(one.computed)} | {is_equal} |")
    sys.exit(not all(one.is_equal for one in found))


def verdicts(results: Path) -> Iterator[Verdict]:
    """Compute every verdict of a folder of results."""
    for file in sorted(results.glob(f"scale/*/{store.SCALING}")):
        yield from scale(file.parent)
    for file in sorted(results.glob(f"quanta/*/{QUANTA}")):
        yield from quanta(file)
    for file in sorted(results.glob(f"auto/*/{store.PILOT}")):
        yield auto(file)
    if (results / "anchors" / VERDICT).exists():
        yield anchors(results / "anchors")


def scale(folder: Path) -> Iterator[Verdict]:
    """Judge the curves of a scaling run by its outcomes."""
    settings = load_settings(folder / "run.yaml")
    task = settings.tasks[0].name
    found = outcomes.read(outcomes.file_in(folder))
    results = {"settings": settings.model_dump(mode="json"), "arms": list(_arms(found, task))}
    stored = store.read_json(folder / store.SCALING)
    analysed = scale_report.analyse(results, list(_predictions(found, task)))
    computed = json.loads(json.dumps(analysed))
    name = f"scale/{folder.name}"
    for before, after in zip(stored["tasks"], computed["tasks"], strict=True):
        for one, other in zip(before["designs"], after["designs"], strict=True):
            yield Verdict(f"{name}, {one['design']}", one["word"], other["word"])
            yield Verdict(f"{name}, {one['design']}, sentence", one["sentence"], other["sentence"])
            for metric, again in zip(one["metrics"], other["metrics"], strict=True):
                judged_by = [_judged_by(metric), _judged_by(again)]
                yield Verdict(f"{name}, {one['design']}, {metric['metric']}", *judged_by)
            yield Verdict(f"{name}, {one['design']}, rows", one["rows"], other["rows"])
        yield Verdict(f"{name}, together", before["sentence"], after["sentence"])


def _judged_by(metric: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric's test, with the number of parameters and the error of every fitted curve."""
    fits = {}
    for form, fit in metric["fits"].items():
        fits[form] = {key: fit[key] for key in ("k", "rss", "aicc", "refused")}
    return {**metric, "fits": fits}


def _arms(found: Outcomes, task: str) -> Iterator[dict[str, Any]]:
    """List the scores of every training, as `results.json` has them."""
    for arm, _, seed in next(iter(found.values.values())):
        scores = []
        for metric, cells in found.values.items():
            values = next(values for cell, values in cells.items() if cell[::2] == (arm, seed))
            value = float(values.sum() / found.weights[metric].sum())
            is_higher_better = metric != scale_report.CONTINUOUS
            scores.append({"metric": metric, "value": value, "higher_is_better": is_higher_better})
        yield {"arm": arm, "seed": seed, "scores": {task: scores}}


def _predictions(found: Outcomes, task: str) -> Iterator[dict[str, Any]]:
    """List the loss of every test row at every training."""
    metric = scale_report.CONTINUOUS
    for (arm, _, seed), values in found.values[metric].items():
        rows = zip(found.rows[metric], values, found.weights[metric], strict=True)
        for row, nats, tokens in rows:
            loss = {"nll_sum": float(nats), "n_tokens": float(tokens)}
            yield {"task": task, "arm": arm, "seed": seed, "origin": row, **loss}


def quanta(file: Path) -> Iterator[Verdict]:
    """Judge the clusters of a quanta run by the losses of their items."""
    record = json.loads(gzip.decompress(file.read_bytes()))
    name, stored = f"quanta/{file.parent.name}", record["clusters"]
    chosen = clusters.choose([clusters.Candidate(**one) for one in stored["candidates"]])
    yield Verdict(f"{name}, clusters", stored["k"], None if chosen is None else chosen.k)
    items = record["items"]
    general = np.array([item["general"] for item in items])
    plain, mixed = (np.array([item["losses"][arm][-1] for item in items]) for arm in record["arms"])
    described = cluster_gains.summarise(
        [item["cluster"] for item in items],
        general,
        ~general,
        plain - mixed,
        weights=np.where(general, 1 / general.sum(), 1 / (~general).sum()),
        before=[item["untrained"] for item in items],
    )
    test = cluster_gains.density_test(described, seed=record["seed"])
    yield Verdict(f"{name}, test", record["test"]["verdict"], test.verdict)
    yield Verdict(f"{name}, all of the test", record["test"], store.plain(test))


def auto(file: Path) -> Verdict:
    """Choose the amount of general data by a pilot's losses."""
    known = store.read_json(file)
    losses, errors = np.array(known["losses"]), np.array(known["errors"])
    chosen = pilot.choose(known["ratios"], losses, errors)
    return Verdict(f"auto/{file.parent.name}, general rows a task row", known["chosen"], chosen)


def anchors(folder: Path) -> Verdict:
    """Rank anchors by their loss before training, and by the loss after it, inside each task."""
    groups = []
    for file in sorted(folder.glob(f"*/{certificate.FILE}")):
        known = Certificate.read(file)
        scores = store.read_json(file.parent / store.ANCHORS)
        groups += anchor_validity.find_groups(_results(known), scores, file.parent.name)
    stored = store.read_json(folder / VERDICT)
    return Verdict("anchors, loss before and after training", stored, judged(groups))


def judged(groups: list[anchor_validity.Group]) -> dict[str, Any]:
    """Return the pooled rank correlation of the loss before training with that after it."""
    rho = anchor_validity.correlation(groups)
    trained = sum(len(group.anchors) for group in groups)
    ends = {} if rho is None else rho._asdict()
    return {"trained": trained, **ends, "p": anchor_validity.permutation_p(groups)}


def _results(known: Certificate) -> dict[str, Any]:
    """Return the losses of every arm and seed, as `results.json` has them."""
    answer = next(answer for answer in known.answers if answer.metric == "nll")
    arms = []
    settings = known.inputs.settings
    names = [arm if isinstance(arm, str) else arm["name"] for arm in settings["compare"]["arms"]]
    # In the order of the run: permutations are drawn by it.
    for point in sorted(answer.points, key=lambda point: names.index(point.arm)):
        for loss in point.by_seed:
            score = {"metric": "nll", "value": loss}
            training = {"size": point.size} if point.size else None
            arms.append(
                {
                    "arm": point.arm,
                    "size": point.size,
                    "training": training,
                    "scores": {known.question.task: [score]},
                }
            )
    return {"settings": settings, "size": answer.rows, "arms": arms}


def _are_equal(stored: Any, computed: Any) -> bool:
    if isinstance(stored, Mapping) and isinstance(computed, Mapping):
        if stored.keys() != computed.keys():
            return False
        return all(_are_equal(stored[key], computed[key]) for key in stored)
    if isinstance(stored, list | tuple) and isinstance(computed, list | tuple):
        return len(stored) == len(computed) and all(map(_are_equal, stored, computed))
    if isinstance(stored, float | int) and isinstance(computed, float | int):
        return math.isclose(stored, computed, rel_tol=_TOLERANCE, abs_tol=1e-9)
    return bool(stored == computed)


def _brief(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


if __name__ == "__main__":
    main()
