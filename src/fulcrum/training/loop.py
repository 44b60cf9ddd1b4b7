"""A stream of examples -> an adapter: one plain loop, in as many processes as a launcher started.

An optimizer step is `batch_size` consecutive plan positions. The loss is the mean over all supervised tokens of the step,
weighted by source, whatever rows and processes the step is cut into. At equal spacing the dev loss is measured, and the best
adapter is what the run returns; in a comparison, where dev rows are task rows, the last step's.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fulcrum.config.settings import TrainSettings
from fulcrum.core import processes
from fulcrum.core.errors import DivergedError
from fulcrum.core.store import fingerprint
from fulcrum.core.types import TrainingRun, TrainPoint
from fulcrum.data.token_stream import Stream
from fulcrum.model import distributed
from fulcrum.model.adapter import State, adapter_state, new_adapter, set_adapter_state, set_dropout
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.loss import Row, row_loss, rows
from fulcrum.training import checkpoint as checkpoints

Progress = Callable[[TrainPoint, int, float | None], None]  # log line, total steps, newest dev loss
POINTS = 500  # of a training's steps that are written down, evenly spaced: files stay small however long it is
_NAMED = 8  # rows of a step that an error names


def learning_rate(step: int, phases: Sequence[int], settings: TrainSettings) -> float:
    """Linear warm-up, then linear decay that ends at `final_lr` of the peak on a phase's last step (steps count from 0).

    Each phase begins anew: where general rows come first, the task rows after them meet a full learning rate.
    """
    for steps in phases[:-1]:
        if step < steps:
            break
        step -= steps
    else:
        steps = phases[-1]
    warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
    warmup = min(max(round(warmup), 1), steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    decay = (step - warmup + 1) / max(steps - warmup, 1)
    return settings.learning_rate * (1 - (1 - settings.final_lr) * decay)


def train(
    loaded: LoadedModel,
    stream: Stream,
    dev_loss: Callable[[], float] | None,
    settings: TrainSettings,
    *,
    seed: int,
    repeats: int,
    kl: float = 0.0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[State, TrainingRun]:
    """Train a fresh adapter on the stream; returns the weights that were best on dev, and the run's record.

    `dev_loss` gives nats per token on the dev rows with the present adapter; without it the last step's weights are kept. `kl`
    weighs the divergence from the base model (KL of it to the adapted one, nats per supervised token) in the loss. With a
    `checkpoint` folder the run saves itself every `save_every` steps, and goes on from the newest whole checkpoint found there:
    the result is the same, bit for bit. `say` is told of damaged ones.
    Raises StoreError where a checkpoint belongs to other settings or another stream, DivergedError where the loss or its
    gradient is no longer a number (the last checkpoint is of a step before), and Stopped where a signal asked for it, once the
    step is finished and saved.
    """
    # What `auto` became, and not how it was asked for: a worker is told, and goes on with what this process began.
    settled = {
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "compile": bool(loaded.compiled),
    }
    identity = fingerprint(
        [
            {**settings.model_dump(mode="json"), **settled},
            stream.plan.fingerprint,
            seed,
            loaded.name,
            kl,
        ]
    )
    new_adapter(loaded, settings, seed)
    parameters = [p for p in loaded.peft.parameters() if p.requires_grad]
    optimizer = _adamw(parameters, settings, loaded)
    torch.manual_seed(seed)  # adapter dropout
    steps, phases = stream.steps(settings.batch_size), stream.phases(settings.batch_size)
    state, best = _begun(checkpoint, identity, loaded, optimizer, say)
    evaluations = settings.evaluations if dev_loss is not None else 0
    measured = {max(1, round(steps * k / evaluations)) for k in range(1, evaluations + 1)}
    before, started = state.seconds, time.perf_counter()
    batches = _batches(loaded, stream, settings, state.done, steps)
    with processes.deferred() as asked:
        for step, batch in zip(range(state.done, steps), batches, strict=True):
            if _stop_early(state, settings):
                break
            rate = learning_rate(step, phases, settings)
            taken = _step(optimizer, parameters, loaded, batch, settings, rate, kl, asked)
            if not taken.is_finite:
                raise _diverged(taken, stream, step, steps, settings)
            state.tokens += batch.tokens
            state.seconds = before + time.perf_counter() - started
            point = TrainPoint(
                step + 1, taken.task_loss, taken.general_loss, rate, state.tokens, state.seconds
            )
            state.done = step + 1
            newest = None
            if dev_loss is not None and step + 1 in measured:
                newest = dev_loss()
                if _note_dev(state, newest, steps, settings):
                    best = adapter_state(loaded)
            if progress is not None:
                progress(point, steps, newest)
            ends = step + 1 == steps or _stop_early(state, settings)
            if ends or is_shown(step + 1, steps):
                state.history.append(point)
            due = ends or taken.stop or (step + 1) % settings.save_every == 0
            if checkpoint is not None and distributed.writes() and due:
                now = checkpoints.Checkpoint(
                    adapter_state(loaded), best, optimizer.state_dict(), state
                )
                checkpoints.write(checkpoint, identity, now)
            if taken.stop:
                raise processes.Stopped(taken.stop)
        if asked():  # it came after the last step was asked: other trainings and tests would follow
            raise processes.Stopped(asked())
    if dev_loss is None:
        best, state.best_step = adapter_state(loaded), state.done
    set_adapter_state(loaded, best)
    return best, TrainingRun(
        repeats=repeats, steps=state.done, best_step=state.best_step, dev_nll=tuple(state.dev), history=tuple(state.history),
        share=stream.share(state.done * settings.batch_size),
        train_tokens=state.tokens, seconds=state.seconds,
    )  # fmt: skip


def is_shown(step: int, steps: int) -> bool:
    """Whether step `step` (from 1) of `steps` is one of those that are written down."""
    return step in (1, steps) or step % math.ceil(steps / POINTS) == 0


def _adamw(
    parameters: list[nn.Parameter], settings: TrainSettings, loaded: LoadedModel
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay,
        fused=loaded.device.type in ("cpu", "cuda"),
    )  # fmt: skip


def _begun(
    folder: Path | None,
    identity: str,
    loaded: LoadedModel,
    optimizer: Any,
    say: Callable[[str], None],
) -> tuple[checkpoints.Progress, State]:
    """How far a training is, and its best weights so far; a checkpoint is put on the model and the optimizer."""
    found = None if folder is None else checkpoints.newest(folder, identity, say)
    if found is None:
        return checkpoints.Progress(), adapter_state(loaded)
    set_adapter_state(loaded, found.adapter)
    optimizer.load_state_dict(found.optimizer)
    return found.progress, found.best


def _note_dev(
    state: checkpoints.Progress, newest: float, steps: int, settings: TrainSettings
) -> bool:
    """Write a dev loss down; returns whether it is the best so far. Raises DivergedError where it is no number."""
    if not math.isfinite(newest):
        raise DivergedError(
            f"training diverged: the dev loss is {newest} after step {state.done} of {steps}; "
            f"lower train.learning_rate ({settings.learning_rate:g})"
        )
    state.dev.append((state.done, newest))
    state.stale += 1
    if newest >= state.best_dev:
        return False
    state.best_step, state.best_dev, state.stale = state.done, newest, 0
    return True


def _stop_early(state: checkpoints.Progress, settings: TrainSettings) -> bool:
    return (
        settings.early_stopping_patience is not None
        and state.stale >= settings.early_stopping_patience
    )


@dataclass(frozen=True)
class _Batch:
    """One optimizer step as one process trains it: its rows, the weight of each of its examples, and which are task rows.

    `own` of the packed rows count: none where a process has no example of its own, whose one row is then another's.
    """

    packed: list[Row]
    weight_of: Tensor
    task_of: Tensor
    divisor: float
    tokens: int
    own: int


def _batch(loaded: LoadedModel, stream: Stream, settings: TrainSettings, step: int) -> _Batch:
    """Every process knows the whole step, so the divisor needs no communication."""
    examples, is_task = stream.step(step, settings.batch_size)
    weight = np.where(is_task, settings.task_weight, 1.0)
    total = float(sum(w * example.n_loss for w, example in zip(weight, examples, strict=True)))
    mine = list(
        range(
            distributed.processes().process_index,
            len(examples),
            distributed.processes().num_processes,
        )
    )
    has_own, mine = bool(mine), mine or [0]
    share = settings.share_prefixes and settings.lora_dropout == 0
    packed = rows([examples[i] for i in mine], loaded, settings.pack_tokens, share=share)
    return _Batch(
        packed,
        torch.as_tensor(weight[mine], dtype=torch.float32, device=loaded.device),
        torch.as_tensor(is_task[mine], device=loaded.device),
        total,
        sum(len(example) for example in examples),
        len(packed) * has_own,
    )


def _batches(
    loaded: LoadedModel, stream: Stream, settings: TrainSettings, first: int, steps: int
) -> Iterator[_Batch]:
    """The batches of steps `first` to `steps`; the next one is laid out while this one trains."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        upcoming = ahead.submit(_batch, loaded, stream, settings, min(first, steps - 1))
        for step in range(first, steps):
            batch = upcoming.result()
            upcoming = ahead.submit(_batch, loaded, stream, settings, min(step + 1, steps - 1))
            yield batch


@dataclass(frozen=True)
class _Taken:
    """What a step measured over all processes: mean nats per supervised token by source (None: it had none), the gradient's
    norm before clipping, and the signal that asked any process to stop (0: none)."""

    task_loss: float | None
    general_loss: float | None
    norm: float
    stop: int

    @property
    def is_finite(self) -> bool:
        return all(
            math.isfinite(value)
            for value in (self.task_loss or 0.0, self.general_loss or 0.0, self.norm)
        )


def _step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loaded: LoadedModel, batch: _Batch,
    settings: TrainSettings, rate: float, kl: float, asked: Callable[[], int],
) -> _Taken:  # fmt: skip
    """One optimizer step; it is not taken where what it measured is not finite."""
    sums = torch.zeros(
        5, dtype=torch.float64
    )  # task nats, task targets, general nats, general targets, signal
    set_dropout(loaded, True)
    for place in range(_passes(loaded, batch)):
        row, counts = batch.packed[min(place, len(batch.packed) - 1)], float(place < batch.own)
        weights = counts * batch.weight_of[row.owner] / batch.divisor
        with torch.enable_grad():
            loss, nats = row_loss(loaded, row, weights, kl=kl)
            torch.autograd.backward(loss)
        own, nats = batch.task_of[row.owner].cpu(), nats.cpu()  # not every device has float64
        for kind, chosen in enumerate((own, ~own)):
            sums[2 * kind] += counts * float(nats[chosen].sum(dtype=torch.float64))
            sums[2 * kind + 1] += counts * int(chosen.sum())
    set_dropout(loaded, False)
    distributed.share_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
    sums[4] = bool(asked())  # one process may know of it before the others do
    sums = distributed.total(sums, loaded.device)
    task = float(sums[0] / sums[1]) if sums[1] else None
    general = float(sums[2] / sums[3]) if sums[3] else None
    taken = _Taken(task, general, norm, (asked() or signal.SIGTERM) if sums[4] else 0)
    if taken.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return taken


def _passes(loaded: LoadedModel, batch: _Batch) -> int:
    """How many rows this process runs: its own, and under FSDP as many as any has, since all gather each layer together."""
    if not loaded.sharded:
        return batch.own
    each = torch.zeros(distributed.processes().num_processes)
    each[distributed.processes().process_index] = batch.own
    return int(distributed.total(each, loaded.device).max())


def _diverged(
    taken: _Taken, stream: Stream, step: int, steps: int, settings: TrainSettings
) -> DivergedError:
    rows = stream.origins(step, settings.batch_size)
    named = ", ".join(rows[:_NAMED]) + (
        f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    )
    losses = ", ".join(
        f"{name} {value:g}"
        for name, value in (
            ("task loss", taken.task_loss),
            ("general loss", taken.general_loss),
            ("gradient norm", taken.norm),
        )
        if value is not None
    )
    return DivergedError(
        f"training diverged at step {step + 1} of {steps}: {losses}; rows of this step: {named}; the step was not taken, and "
        f"the last checkpoint stands; lower train.learning_rate ({settings.learning_rate:g}), or look at these rows"
    )
