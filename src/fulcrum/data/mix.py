"""Plan a training stream: which row comes at which position.

A stream holds each of T task rows R times and G general rows once: N = RT + G positions. Nothing of
size N is stored: a position is computed from (sizes, order, seed) alone, so a stream of a billion
rows opens at once and resuming needs one integer.

A position is resolved in two steps. The order gives it a *draw*: task draw k in [0, RT) or general
draw g in [0, G). The draw gives the row: g through one seeded permutation of the pool (so all
orders of a seed use the same G rows, and a longer stream keeps the rows of a shorter one), k
through its epoch, k // T.

All orders are one mechanism: the stream is cut into *segments*, each holding fixed ranges of task
and general draws, permuted inside; they differ only in where they cut (`Plan._cuts`).

Invariant: over the whole stream every task row appears exactly R times and no general row twice.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fulcrum.core.errors import ConfigError, DataError, nearest
from fulcrum.core.types import BoolArray, FloatArray, IntArray, Share, SourceKind

Words = npt.NDArray[np.uint64]

ORDERS = ("random", "epoch_stratified", "general_then_task", "task_then_general")

_TABLE_LIMIT = 65_536  # items up to which a permutation is a stored table of uint16
_ROUNDS = 8  # Feistel rounds
_WORD = 2**64 - 1
_BLOCK = 16_384  # items a Feistel pass works on: 128 KiB of uint64 stay in the cache

_MOST_GENERAL = 1e9  # general rows for each task row
# Passes over the task rows beyond which a warning is due. Advice, never a limit: in long-CoT SFT
# 128 epochs won.
_MANY_REPEATS_MIXED = 20
_MANY_REPEATS_UNMIXED = 8


@dataclass(frozen=True)
class Plan:
    """The order of one training stream: a pure function of these fields, which `plan` checks."""

    n_task: int  # unique task rows
    n_general: int  # rows of the pool
    repeats: int  # times each task row is shown
    general_used: int  # rows of the pool that are shown, once each
    order: str  # one of `ORDERS`
    seed: int

    def __len__(self) -> int:
        return self.task_positions + self.general_used

    def __getitem__(self, position: int) -> tuple[SourceKind, int]:
        """Return source and row id at `position`; IndexError outside [0, len)."""
        is_task, rows = self.slice(position, position + 1)
        return ("task" if is_task[0] else "general"), int(rows[0])

    @property
    def task_positions(self) -> int:
        """Return how many positions hold a task row: n_task * repeats."""
        return self.n_task * self.repeats

    @property
    def task_share(self) -> float:
        """Return the task's part of the stream in examples: q = RT / N."""
        return self.task_positions / len(self)

    @property
    def mixed(self) -> bool:
        """Return whether task and general rows alternate."""
        alternates = self.order not in ("general_then_task", "task_then_general")
        return self.general_used > 0 and alternates

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of the fields."""
        fields = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(fields.encode()).hexdigest()

    def slice(self, start: int, stop: int) -> tuple[BoolArray, IntArray]:
        """Return `(is_task, rows)` of positions start..stop-1, both of shape (stop - start,).

        `rows` are ids in [0, n_task) for task rows, else in [0, n_general). Costs O(stop - start)
        time and memory. Raises IndexError unless 0 <= start <= stop <= len.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"positions {start:,} to {stop:,} are not inside a plan of {len(self):,} positions"
            )
        is_task, draws = self._draws(start, stop)
        rows = np.empty(stop - start, dtype=np.int64)
        rows[is_task] = draws[is_task] % self.n_task  # segments hold whole epochs, permuted already
        rows[~is_task] = _permute(draws[~is_task], self.n_general, self.seed, "general", 0)
        return is_task, rows

    @cached_property
    def _cuts(self) -> tuple[IntArray, IntArray]:
        """Task and general draws before each segment and before the end; both (segments + 1,)."""
        task = self.task_positions
        general = self.general_used
        if self.order == "random":
            return np.array([0, task]), np.array([0, general])
        epochs = np.arange(self.repeats + 1, dtype=np.int64)
        if self.order == "epoch_stratified":
            return epochs * self.n_task, epochs * general // self.repeats
        if self.order == "general_then_task":
            return np.append(0, epochs * self.n_task), np.append(0, np.full_like(epochs, general))
        return np.append(epochs * self.n_task, task), np.append(np.zeros_like(epochs), general)

    def _draws(self, start: int, stop: int) -> tuple[BoolArray, IntArray]:
        """Return whether each position holds a task row, and its task or general draw."""
        tasks, generals = self._cuts
        ends = tasks + generals
        is_task = np.empty(stop - start, dtype=np.bool_)
        draws = np.empty(stop - start, dtype=np.int64)
        first_segment = int(np.searchsorted(ends, start, side="right")) - 1
        end_segment = int(np.searchsorted(ends, stop))
        for j in range(first_segment, end_segment):
            first = max(start, int(ends[j]))
            last = min(stop, int(ends[j + 1]))
            inside = np.arange(first, last, dtype=np.int64) - ends[j]
            size = int(ends[j + 1] - ends[j])
            item = _permute(inside, size, self.seed, f"order/{self.order}", j)
            n_task = tasks[j + 1] - tasks[j]
            here = slice(first - start, last - start)
            is_task[here] = item < n_task
            draws[here] = item + np.where(item < n_task, tasks[j], generals[j] - n_task)
        return is_task, draws


def plan(
    n_task: int, n_general: int, *, repeats: int, general_per_task: float, order: str, seed: int
) -> Plan:
    """Return the plan of a stream: `n_task` rows shown `repeats` times, G general rows shown once.

    G = round(general_per_task * repeats * n_task), of `n_general` rows; `general_per_task` 0 is
    plain SFT. `order` is one of `ORDERS`: `random` shuffles everything (leverage learning as
    published, arXiv 2404.00914); `epoch_stratified` shuffles within R segments that hold the whole
    task set once; the other two train one source after the other.

    Raises DataError without task rows; ConfigError for a setting out of range or G > n_general (no
    row is shown twice).
    """
    if n_task < 1:
        raise DataError(
            f"mix: a plan needs at least 1 task row, got {n_task}; check the train file and its "
            "rejects"
        )
    if order not in ORDERS:
        raise ConfigError(f"mix: unknown order {order!r}{nearest(order, ORDERS)}")
    if repeats < 1:
        raise ConfigError(f"mix: repeats must be at least 1, got {repeats}")
    if not 0 <= general_per_task <= _MOST_GENERAL:  # catches NaN too
        raise ConfigError(
            "mix: general_per_task must be 0 (plain SFT) or a positive number up to "
            f"{_MOST_GENERAL:g}, got {general_per_task}"
        )
    task_positions = n_task * repeats
    general_used = round(general_per_task * task_positions)
    if general_used > n_general:
        raise ConfigError(
            _pool_too_small(n_task, n_general, repeats, general_per_task, general_used)
        )
    n = task_positions + general_used
    if n * (task_positions + 1) >= 2**63:
        raise ConfigError(
            f"mix: {task_positions:,} of {n:,} positions exceed 64-bit arithmetic; lower repeats "
            "or general_per_task"
        )
    return Plan(int(n_task), int(n_general), int(repeats), general_used, order, int(seed))


def _pool_too_small(
    n_task: int, n_general: int, repeats: int, general_per_task: float, asked: int
) -> str:
    """Say what was asked, what is possible, and the nearest settings that work."""
    possible = math.floor(1000 * n_general / (n_task * repeats)) / 1000
    remedies = f"general_per_task to {possible:g}"
    if not possible:
        remedies += " (plain SFT)"
    fewer = math.floor(n_general / (general_per_task * n_task))
    if fewer >= 1:
        remedies += f", or repeats to {fewer}"
    return (
        f"mix: general_per_task {general_per_task:g} × repeats {repeats} × {n_task:,} task rows = "
        f"{asked:,} general rows, but the pool has {n_general:,} and none is shown twice. "
        f"Set {remedies}, or add {asked - n_general:,} general rows."
    )


def chances(start: int, stop: int, seed: int, stream: str) -> FloatArray:
    """Return a number in [0, 1) for each position in [start, stop): (stop - start,).

    A position always has the same number, whatever part of the stream is asked for.
    """
    positions = np.arange(start, stop, dtype=np.uint64) + np.uint64(_key(seed, stream, 0) & _WORD)
    bits = _splitmix64(positions) >> np.uint64(11)  # 53, as many as a float has
    return bits.astype(np.float64) / 2.0**53


def share(is_task: BoolArray, n_tokens: IntArray, n_loss: IntArray) -> Share:
    """Return the task's part of a stream in examples, tokens and loss tokens.

    All arguments have one value per position, shape (N,): whether it is a task row, its tokens, its
    supervised tokens. Raises DataError if the shapes differ or the stream has no supervised token.
    """
    if not len(is_task) == len(n_tokens) == len(n_loss):
        raise DataError(
            f"mix: share needs equal lengths, got {len(is_task):,}, {len(n_tokens):,} and "
            f"{len(n_loss):,}"
        )
    total = int(np.sum(n_tokens))
    total_loss = int(np.sum(n_loss))
    if total_loss == 0:
        raise DataError(
            f"mix: {len(is_task):,} rows of {total:,} tokens hold no supervised token; check the "
            "template"
        )
    task_examples = int(np.sum(is_task))
    return Share(
        examples=task_examples / len(is_task),
        tokens=int(np.sum(n_tokens[is_task])) / total,
        loss_tokens=int(np.sum(n_loss[is_task])) / total_loss,
        task_examples=task_examples,
        general_examples=len(is_task) - task_examples,
        total_tokens=total,
        total_loss_tokens=total_loss,
    )


def warnings(plan: Plan, batch_size: int) -> list[str]:
    """Return advice on a plan that can be trained but is rarely meant.

    A step has `batch_size` rows.
    """
    advice = []
    q = plan.task_share
    if plan.mixed and 0 < batch_size * q < 1:
        empty = (1 - q) ** batch_size
        advice.append(
            f"mix: a step of {batch_size} rows holds {batch_size * q:.2g} task rows on average; "
            f"about {empty:.0%} of the steps hold none. Raise batch_size to {math.ceil(1 / q)}, or "
            f"lower general_per_task to {batch_size - 1}."
        )
    if plan.mixed:
        limit = _MANY_REPEATS_MIXED
        kind = "mixed"
    else:
        limit = _MANY_REPEATS_UNMIXED
        kind = "unmixed"
    if plan.repeats > limit:
        advice.append(
            f"mix: each of {plan.n_task:,} task rows is shown {plan.repeats} times; beyond {limit} "
            f"({kind} data) a small model often overfits. Watch the dev loss, or set repeats to "
            f"{limit}."
        )
    return advice


def _key(seed: int, stream: str, epoch: int) -> int:
    """Hash what names a permutation, so that no two of them share random numbers."""
    name = json.dumps([seed, stream, epoch])
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def _permute(index: IntArray, n: int, seed: int, stream: str, epoch: int) -> IntArray:
    """Return the images of `index`, in [0, n), under the permutation of (seed, stream, epoch)."""
    if n <= _TABLE_LIMIT:
        return _fisher_yates(n, seed, stream, epoch)[index].astype(np.int64)
    return _feistel(index, n, seed, stream, epoch)


@lru_cache(maxsize=64)  # tables of 128 KiB at most: 8 MiB
def _fisher_yates(n: int, seed: int, stream: str, epoch: int) -> npt.NDArray[np.uint16]:
    """Return a uniformly shuffled [0, n) as a table.

    It uses PCG64's raw stream, which NumPy promises to keep; `Generator.permutation` may change
    with a release (NEP 19), and a run must resume to the same bits. The remainder's bias is below
    n / 2**64.
    """
    raw = np.random.PCG64(_key(seed, stream, epoch)).random_raw(n)
    partners = (raw % np.arange(1, n + 1, dtype=np.uint64)).tolist()
    table = list(range(n))
    for i in range(n - 1, 0, -1):
        j = partners[i]
        table[i], table[j] = table[j], table[i]
    return np.array(table, dtype=np.uint16)


def _feistel(index: IntArray, n: int, seed: int, stream: str, epoch: int) -> IntArray:
    """Permute [0, n) without a table: an alternating unbalanced Feistel network, cycle walking.

    The network permutes 2**bits >= n numbers; an image outside [0, n) is permuted again until it
    falls inside (Black and Rogaway 2002), after fewer than 2 passes on average.
    """
    bits = max(2, (n - 1).bit_length())
    keys = _round_keys(seed, stream, epoch)
    images = np.empty(len(index), dtype=np.int64)
    if len(index) == 1:  # setting up arrays would cost ten times the arithmetic
        image = _feistel_one(int(index[0]), bits, keys)
        while image >= n:
            image = _feistel_one(image, bits, keys)
        images[0] = image
        return images
    for start in range(0, len(index), _BLOCK):
        block = _feistel_pass(index[start : start + _BLOCK].astype(np.uint64), bits, keys)
        outside = np.flatnonzero(block >= n)
        while outside.size:
            block[outside] = _feistel_pass(block[outside], bits, keys)
            outside = outside[block[outside] >= n]
        images[start : start + _BLOCK] = block
    return images


@lru_cache(maxsize=256)
def _round_keys(seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    """Return one 64-bit key for each Feistel round."""
    return tuple(_key(seed, f"{stream}/round {r}", epoch) & _WORD for r in range(_ROUNDS))


def _feistel_pass(x: Words, bits: int, keys: Sequence[int]) -> Words:
    """Permute [0, 2**bits).

    Each round XORs a function of one half onto the other, which undoes itself: a bijection.
    """
    widths = (bits - bits // 2, bits // 2)
    masks = [np.uint64((1 << width) - 1) for width in widths]
    halves = [x >> np.uint64(widths[1]), x & masks[1]]
    for r, key in enumerate(keys):
        halves[r % 2] ^= _splitmix64(halves[(r + 1) % 2] ^ np.uint64(key)) & masks[r % 2]
    return (halves[0] << np.uint64(widths[1])) | halves[1]


def _feistel_one(x: int, bits: int, keys: Sequence[int]) -> int:
    """Do what `_feistel_pass` does for one number, in Python's integers."""
    low = bits // 2
    own_mask = (1 << (bits - low)) - 1
    other_mask = (1 << low) - 1
    own = x >> low
    other = x & other_mask
    # The halves change places each round; after an even number of rounds they are back.
    for key in keys:
        z = ((other ^ key) + 0x9E3779B97F4A7C15) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        own, other = other, own ^ ((z ^ (z >> 31)) & own_mask)
        own_mask, other_mask = other_mask, own_mask
    return own << low | other


def _splitmix64(state: Words) -> Words:
    """Return one output of SplitMix64 (Steele, Lea and Flood 2014) for each state."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
