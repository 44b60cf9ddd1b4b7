"""The positive control of quanta discovery: multitask sparse parity, whose quanta are planted.

    python validation/parity.py --out /tmp/parity   # 20 tasks, seeds 0 to 2, some minutes
    python validation/parity.py --out /tmp/parity --seeds 5

The toy of Michaud et al. 2023 (arXiv 2303.13506): an input is a one-hot task and random bits, the
answer the parity of the k bits that are the task's; tasks have frequencies i^-(alpha + 1). A ReLU
network of one hidden layer learns from fresh samples. Every task's loss falls in a step of its own,
the mean loss as a power law. Then samples are drawn as in training, those that are not learned (a
loss of 0.1 nats and more, as in the paper's code) are skipped and counted, and `clusters.find` is
given their gradients: it has to find the tasks, and how many they are.

What differs from the paper, which has 500 tasks, 100 bits and hours on a GPU, and why:
- Control bits are 8 high, not 1, and data bits are -1 and 1: hidden units are then gated by the
  task within a minute. It takes that: at 5, 14 clusters are found (adjusted Rand index 0.995,
  seed 0), and at 3 only 2 (0.46), as gradients of different tasks have so much in common, though
  19 tasks are learned. So the control says how the tool does if tasks use different units.
- The gradient of a sample is that of its log-odds of answer 1. The loss's own is the same times
  p - y: two samples of one task with different answers pull opposite ways, so that their affinity
  is near 0 and each task is two clusters, one an answer. Both are reported. Tokens of a large
  vocabulary are not each other's negation, so that this is a trait of two answers.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy, one_hot

from fulcrum.core.types import FloatArray, IntArray
from fulcrum.mechanism import clusters
from fulcrum.mechanism.clusters import Clusters

LEARNED = 0.1  # nats, below which a sample is learned
HELD_OUT = 256  # samples of each task on which its loss is measured


@dataclass(frozen=True)
class Toy:
    """Settings of the task family and of the training."""

    tasks: int = 20
    bits: int = 12
    k: int = 3
    alpha: float = 0.4
    control: float = 8.0
    hidden: int = 256
    batch: int = 2048
    steps: int = 6000
    learning_rate: float = 0.003
    seed: int = 0

    @property
    def frequencies(self) -> FloatArray:
        """How often each task is drawn: (tasks,), falling."""
        weights = np.arange(1, self.tasks + 1) ** -(self.alpha + 1.0)
        found: FloatArray = weights / weights.sum()
        return found


class Source:
    """Draws samples; a task's bits are drawn once, by the seed, and no two tasks have the same."""

    def __init__(self, toy: Toy) -> None:
        rng = np.random.default_rng(toy.seed)
        subsets: list[tuple[int, ...]] = []
        while len(subsets) < toy.tasks:
            one = tuple(sorted(rng.choice(toy.bits, toy.k, replace=False).tolist()))
            subsets += [one] * (one not in subsets)
        self.toy, self.subsets = toy, torch.tensor(subsets)
        self.random = torch.Generator().manual_seed(toy.seed)

    def tasks(self, n: int) -> Tensor:
        """Tasks of n samples, drawn by frequency: (n,)."""
        return torch.multinomial(
            torch.from_numpy(self.toy.frequencies), n, replacement=True, generator=self.random
        )

    def samples(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh samples of the tasks: inputs (n, tasks + bits) and answers (n,), 0 or 1."""
        bits = torch.randint(0, 2, (len(tasks), self.toy.bits), generator=self.random)
        answers = bits.gather(1, self.subsets[tasks]).sum(dim=1) % 2
        control = self.toy.control * one_hot(tasks, self.toy.tasks)
        return torch.cat([control, 2 * bits - 1], dim=1).float(), answers


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network, and every task's held-out loss (tasks, points) at `steps` (points,)."""

    network: Sequential
    source: Source
    steps: IntArray
    losses: FloatArray


def train(toy: Toy) -> Trained:
    """Train on fresh samples with Adam; losses are measured at up to 120 steps, evenly spaced in
    their logarithm."""
    source = Source(toy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(toy.seed)
        network = Sequential(
            Linear(toy.tasks + toy.bits, toy.hidden), ReLU(), Linear(toy.hidden, 2)
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=toy.learning_rate)
    held_inputs, held_answers = source.samples(torch.arange(toy.tasks).repeat_interleave(HELD_OUT))
    marks = np.unique(np.geomspace(1, toy.steps, 120).round().astype(np.int64))
    losses = []
    for step in range(1, toy.steps + 1):
        inputs, answers = source.samples(source.tasks(toy.batch))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(network(inputs), answers))
        optimizer.step()
        if step in marks:
            with torch.no_grad():
                each = cross_entropy(network(held_inputs), held_answers, reduction="none")
            losses.append(each.view(toy.tasks, HELD_OUT).mean(dim=1).double().numpy())
    return Trained(network, source, marks, np.array(losses).T)


@dataclass(frozen=True, slots=True)
class Items:
    """Learned samples: gradients (n, d) of the log-odds, tasks and answers (n,), and how many were
    drawn."""

    gradients: npt.NDArray[np.float32]
    tasks: IntArray
    answers: IntArray
    drawn: int

    @property
    def of_loss(self) -> npt.NDArray[np.float32]:
        """Directions of the loss's own gradients (n, d): against the log-odds where the answer is
        1."""
        found: npt.NDArray[np.float32] = self.gradients * (1 - 2 * self.answers[:, None]).astype(
            np.float32
        )
        return found


def items(trained: Trained, n: int) -> Items:
    """Draw n samples by frequency and take the learned ones' gradients with respect to all
    parameters, whole."""
    first, _, last = trained.network
    assert isinstance(first, Linear)
    assert isinstance(last, Linear)
    tasks = trained.source.tasks(n)
    inputs, answers = trained.source.samples(tasks)
    with torch.no_grad():
        before = first(inputs)
        hidden = before.relu()
        learned = cross_entropy(last(hidden), answers, reduction="none") < LEARNED
        inputs, before, hidden = inputs[learned], before[learned], hidden[learned]
        ones = torch.ones(len(inputs), 1)
        odds = torch.tensor([-1.0, 1.0])  # log-odds of answer 1: its logit less that of answer 0
        back = (odds @ last.weight) * (before > 0)
        parts = [
            torch.einsum("nh,ni->nhi", back, torch.cat([inputs, ones], dim=1)).flatten(1),
            torch.einsum("o,nh->noh", odds, torch.cat([hidden, ones], dim=1)).flatten(1),
        ]
    return Items(
        torch.cat(parts, dim=1).numpy(), tasks[learned].numpy(), answers[learned].numpy(), n
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How step-like learning was.

    `octaves` (tasks,): doublings of the step from 90% to 10% of chance, nan where a task did not
    get there; `octaves_mean` is that of the mean loss. `halves` (tasks,): the step at which a
    task's loss is halved. `exponent`, `r2`: of the power law of the mean loss between `start` and
    `end`, the steps by which the first task and half the tasks are learned: of a finite number of
    tasks the rest of the curve has to fall faster.
    """

    octaves: FloatArray
    octaves_mean: float
    halves: FloatArray
    exponent: float
    r2: float
    start: float
    end: float
    line: FloatArray


def shape(trained: Trained) -> Shape:
    """Steps of the tasks, and the power law of their mean, weighted by frequency."""
    mean = trained.source.toy.frequencies @ trained.losses
    learned = np.array([_crossing(trained.steps, losses, 0.1) for losses in trained.losses])
    octaves = np.array([_octaves(trained.steps, losses) for losses in trained.losses])
    halves = np.array([_crossing(trained.steps, losses, 0.5) for losses in trained.losses])
    reached = np.sort(np.where(np.isnan(learned), float(trained.steps[-1]), learned))
    start, end = float(reached[0]), float(reached[len(reached) // 2])
    inside = (trained.steps >= start) & (trained.steps <= end)
    x, y = np.log(trained.steps[inside]), np.log(mean[inside])
    slope, level = np.polyfit(x, y, 1)
    r2 = 1 - float(((y - level - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    line = np.exp(level + slope * np.log(trained.steps))
    return Shape(
        octaves, _octaves(trained.steps, mean), halves, -float(slope), r2, start, end, line
    )


def _crossing(steps: IntArray, losses: FloatArray, share: float) -> float:
    """The step, interpolated in its logarithm, at which a loss first falls below a share of chance;
    nan if it never does."""
    below = losses <= share * np.log(2)
    place = int(np.argmax(below))
    if not below.any() or place == 0:
        return float(steps[0]) if below.any() else np.nan
    high, low = losses[place - 1], losses[place]
    weight = (high - share * np.log(2)) / (high - low)
    return float(np.exp((1 - weight) * np.log(steps[place - 1]) + weight * np.log(steps[place])))


def _octaves(steps: IntArray, losses: FloatArray) -> float:
    """Doublings of the step from the last time a loss is at 90% of chance to the first time that it
    is at 10%."""
    end = _crossing(steps, losses, 0.1)
    above = np.flatnonzero((losses >= 0.9 * np.log(2)) & (steps < end))
    return float(np.log2(end / steps[above[-1]])) if len(above) else np.nan


def agreement(found: Clusters, planted: IntArray) -> float:
    """Adjusted Rand index with planted groups; 0 where no clusters are stable."""
    from sklearn.metrics import adjusted_rand_score

    return 0.0 if found.labels is None else float(adjusted_rand_score(planted, found.labels))


def draw_losses(trained: Trained, found: Shape, path: Path) -> None:
    """Loss by step: of each task, coloured by its frequency, and of all, with the power law."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    frequencies = trained.source.toy.frequencies
    colours = ScalarMappable(LogNorm(frequencies.min(), frequencies.max()), "viridis_r")
    for frequency, losses in zip(frequencies, trained.losses, strict=True):
        left.plot(trained.steps, losses, color=colours.to_rgba(frequency), linewidth=1.2)
    left.axhline(np.log(2), color="#999999", linewidth=0.8, linestyle=":")
    left.text(11, np.log(2) * 0.96, "chance, ln 2", color="#555555", fontsize=8, va="top")
    left.set(
        xscale="log",
        xlim=(10, trained.steps[-1]),
        ylim=(0, 1.1),
        xlabel="step",
        ylabel="held-out loss, nats",
        title="Each task is learned in a step",
    )
    figure.colorbar(colours, ax=left, label="frequency of the task")
    mean = frequencies @ trained.losses
    inside = (trained.steps >= found.start) & (trained.steps <= found.end)
    right.plot(trained.steps, mean, color="#0072B2", label="mean over tasks, by frequency")
    right.plot(
        trained.steps[inside],
        found.line[inside],
        color="#D55E00",
        linestyle="--",
        linewidth=2,
        label=f"step^-{found.exponent:.2f} (R² {found.r2:.3f}), from the first to half the tasks",
    )
    right.set(
        xscale="log",
        xlim=(10, trained.steps[-1]),
        yscale="log",
        xlabel="step",
        ylabel="mean loss, nats",
        title="Their mean falls as a power law, until few are left",
    )
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


def draw_affinity(taken: Items, found: Clusters, path: Path, most: int = 800) -> None:
    """Affinities sorted by found clusters, with the planted tasks beside them; of every item or an
    even share of them."""
    from matplotlib.figure import Figure

    labels = np.zeros(len(taken.tasks), np.int64) if found.labels is None else found.labels
    order = np.lexsort((taken.tasks, labels))
    order = order[np.linspace(0, len(order) - 1, min(most, len(order))).astype(np.int64)]
    figure = Figure(figsize=(7.4, 6.4), layout="constrained")
    side, main = figure.subplots(1, 2, width_ratios=(0.6, 12))
    side.imshow(
        taken.tasks[order, None] % 20,
        aspect="auto",
        cmap="tab20",
        interpolation="nearest",
        vmin=0,
        vmax=19,
    )
    side.set(xticks=[], yticks=[], ylabel="items, sorted by found cluster", xlabel="task")
    shown = main.imshow(
        clusters.affinity(taken.gradients[order]),
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        vmin=0.45,
        vmax=0.8,
    )
    for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
        main.axhline(edge, color="white", linewidth=0.35)
        main.axvline(edge, color="white", linewidth=0.35)
    title = (
        f"{found.k} clusters found, adjusted Rand index with {len(np.unique(taken.tasks))} planted "
        "tasks: "
    )
    main.set(xticks=[], yticks=[], title=title + f"{agreement(found, taken.tasks):.3f}")
    main.title.set_fontsize(10)
    figure.colorbar(
        shown, ax=main, label="affinity, 1 - arccos(cosine) / pi; 0.5: nothing in common"
    )
    figure.savefig(path, dpi=130)


def run(toy: Toy, n: int, out: Path | None = None) -> dict[str, Any]:
    """One network: train, take n samples' gradients, find clusters; the numbers, and with `out` the
    plots."""
    trained = train(toy)
    form, taken = shape(trained), items(trained, n)
    found = clusters.find(taken.gradients, seed=toy.seed)
    own = clusters.find(taken.of_loss, seed=toy.seed)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw_losses(trained, form, out / f"losses-{toy.seed}.png")
        draw_affinity(taken, found, out / f"affinity-{toy.seed}.png")
    return {
        "seed": toy.seed,
        "learned_tasks": int((trained.losses[:, -1] < LEARNED).sum()),
        "items": len(taken.tasks),
        "not_learned": taken.drawn - len(taken.tasks),
        "planted": len(np.unique(taken.tasks)),
        "k": found.k,
        "ari": agreement(found, taken.tasks),
        "stability": found.stability,
        "k_of_loss": own.k,
        "ari_of_loss": agreement(own, taken.tasks),
        "ari_of_loss_with_answers": agreement(own, 2 * taken.tasks + taken.answers),
        "octaves": float(np.nanmedian(form.octaves)),
        "octaves_mean": form.octaves_mean,
        "exponent": form.exponent,
        "r2": form.r2,
        "order": _order(form.halves),
    }


def _order(halves: FloatArray) -> float:
    """Return Spearman's correlation of tasks' ranks by frequency with the steps that learn them."""
    from scipy.stats import spearmanr

    reached = ~np.isnan(halves)
    return float(spearmanr(np.flatnonzero(reached), halves[reached]).statistic)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the numbers of every seed and draw its plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the plots")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=Toy.tasks)
    parser.add_argument("--k", type=int, default=Toy.k)
    parser.add_argument("--bits", type=int, default=Toy.bits)
    parser.add_argument("--control", type=float, default=Toy.control)
    parser.add_argument("--hidden", type=int, default=Toy.hidden)
    parser.add_argument("--steps", type=int, default=Toy.steps)
    parser.add_argument("--items", type=int, default=2000)
    args = parser.parse_args(arguments)
    for seed in range(args.seeds):
        toy = Toy(
            args.tasks,
            args.bits,
            args.k,
            0.4,
            args.control,
            args.hidden,
            steps=args.steps,
            seed=seed,
        )
        numbers = run(toy, args.items, args.out)
        print(
            ", ".join(
                f"{name} {value:.3g}" for name, value in numbers.items() if value is not None
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
