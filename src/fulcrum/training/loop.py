"""A stream of examples -> an adapter: one plain loop, in as many processes as a launcher started.

An optimizer step is `batch_size` consecutive positions of the stream. Its loss is the mean over all
supervised tokens of the step, weighted by source, however the step is cut into rows and processes.
The dev loss is measured at equal spacing and the best adapter is returned; without a dev loss (as
in a comparison, whose dev rows are task rows) it is the adapter after the last step.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulcrum.config.sections import TrainSettings
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
POINTS = 500  # steps that are logged, evenly spaced, so that files of a long training stay small
_NAMED = 8  # rows of a step that an error names


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained on a stream."""

    settings: TrainSettings
    seed: int  # of the adapter's first weights and of its dropout
    repeats: int  # times the stream shows each task row; kept in the training's record
    kl: float = 0.0  # weight of KL(base || adapted), nats per supervised token, in the loss


def learning_rate(step: int, phases: Sequence[int], settings: TrainSettings) -> float:
    """Return the learning rate of a step (counted from 0).

    It rises linearly in the warm-up, then falls linearly to `final_lr` of the peak on a phase's
    last step. Each phase starts again: if general rows come first, the task rows after them meet a
    full learning rate.
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


def is_shown(step: int, steps: int) -> bool:
    """Return whether step `step` (from 1) of `steps` is logged."""
    return step in (1, steps) or step % math.ceil(steps / POINTS) == 0


def train(
    loaded: LoadedModel,
    stream: Stream,
    recipe: Recipe,
    *,
    dev_loss: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[State, TrainingRun]:
    """Train a fresh adapter; return the weights that were best on dev rows, and the run's record.

    `dev_loss` measures the present adapter, in nats per token; without it the last step's weights
    are returned. Given a `checkpoint` folder, the run saves itself every `save_every` steps, and
    resumes from the newest whole checkpoint there; the result is the same, bit for bit. Damaged
    checkpoints are reported to `say`.

    Raises StoreError if a checkpoint belongs to other settings or another stream; DivergedError if
    the loss or its gradient is no longer finite (the last checkpoint is from an earlier step); and
    Stopped if a signal asked for it, once the step is finished and saved.
    """
    settings = recipe.settings
    training = _Training(loaded, stream, recipe)
    if checkpoint is not None:
        training.resume(checkpoint, say)
    state = training.state
    steps = training.steps
    measured = _evaluated_steps(steps, settings.evaluations) if dev_loss is not None else set()
    seconds_before = state.seconds
    started = time.perf_counter()
    batches = _batches(loaded, stream, settings, state.done, steps)
    with processes.deferred() as stop_signal:
        for step, batch in zip(range(state.done, steps), batches, strict=True):
            if training.is_stale:
                break
            rate = learning_rate(step, training.phases, settings)
            result = training.take_step(batch, rate, stop_signal)
            if not result.is_finite:
                raise training.divergence(result, step)
            state.tokens += batch.tokens
            state.seconds = seconds_before + time.perf_counter() - started
            point = TrainPoint(
                step + 1, result.task_loss, result.general_loss, rate, state.tokens, state.seconds
            )
            state.done = step + 1
            newest = None
            if dev_loss is not None and state.done in measured:
                newest = dev_loss()
                training.note_dev_loss(newest)
            if progress is not None:
                progress(point, steps, newest)
            ends = state.done == steps or training.is_stale
            if ends or is_shown(state.done, steps):
                state.history.append(point)
            is_due = ends or result.stop or state.done % settings.save_every == 0
            if checkpoint is not None and is_due:
                training.save(checkpoint)
            if result.stop:
                raise processes.Stopped(result.stop)
        if stop_signal():  # after the last step looked: what follows must not begin
            raise processes.Stopped(stop_signal())
    if dev_loss is None:
        training.keep_last()
    set_adapter_state(loaded, training.best)
    return training.best, training.record()


def _evaluated_steps(steps: int, evaluations: int) -> set[int]:
    return {max(1, round(steps * k / evaluations)) for k in range(1, evaluations + 1)}


@dataclass(frozen=True)
class _Batch:
    """One optimizer step as one process trains it.

    A process without an example of its own holds a row of another's, which does not count.
    """

    packed: list[Row]
    weights: Tensor  # (examples,), float32
    is_task: Tensor  # (examples,), bool
    divisor: float  # weighted supervised tokens of the whole step
    tokens: int  # of the whole step
    own: int  # packed rows that count


@dataclass(frozen=True)
class _StepResult:
    """What a step measured over all processes."""

    task_loss: float | None  # nats per supervised token; None without task rows
    general_loss: float | None  # the same of general rows
    norm: float  # of the gradient, before clipping
    stop: int  # signal that asked a process to stop, 0 if none did

    @property
    def is_finite(self) -> bool:
        losses = (self.task_loss or 0.0, self.general_loss or 0.0)
        return math.isfinite(losses[0]) and math.isfinite(losses[1]) and math.isfinite(self.norm)


class _Training:
    """A fresh adapter on the model, its optimizer, and how far its training is."""

    def __init__(self, loaded: LoadedModel, stream: Stream, recipe: Recipe) -> None:
        self.loaded = loaded
        self.stream = stream
        self.recipe = recipe
        settings = recipe.settings
        new_adapter(loaded, settings, recipe.seed)
        self.parameters = [one for one in loaded.peft.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=loaded.device.type in ("cpu", "cuda"),
        )
        torch.manual_seed(recipe.seed)  # adapter dropout
        self.steps = stream.steps(settings.batch_size)
        self.phases = stream.phases(settings.batch_size)
        self.state = checkpoints.Progress()
        self.best = adapter_state(loaded)

    @property
    def identity(self) -> str:
        """Hash of all that the result depends on."""
        # What `auto` resolved to, not `auto`: a worker is told it, and resumes this process's work.
        resolved = {
            "dtype": str(self.loaded.dtype),
            "device": self.loaded.device.type,
            "compile": bool(self.loaded.compiled),
        }
        settings = {**self.recipe.settings.model_dump(mode="json"), **resolved}
        plan = self.stream.plan.fingerprint
        return fingerprint([settings, plan, self.recipe.seed, self.loaded.name, self.recipe.kl])

    @property
    def is_stale(self) -> bool:
        """Return whether early stopping ends the training."""
        patience = self.recipe.settings.early_stopping_patience
        return patience is not None and self.state.stale >= patience

    def resume(self, folder: Path, say: Callable[[str], None]) -> None:
        """Continue from the newest whole checkpoint of a folder, if there is one."""
        saved = checkpoints.newest(folder, self.identity, say)
        if saved is None:
            return
        set_adapter_state(self.loaded, saved.adapter)
        self.optimizer.load_state_dict(saved.optimizer)
        self.state = saved.progress
        self.best = saved.best

    def save(self, folder: Path) -> None:
        if not distributed.writes():
            return
        now = checkpoints.Checkpoint(
            adapter_state(self.loaded), self.best, self.optimizer.state_dict(), self.state
        )
        checkpoints.write(folder, self.identity, now)

    def take_step(self, batch: _Batch, rate: float, stop_signal: Callable[[], int]) -> _StepResult:
        """Take one optimizer step; it is skipped if what it measured is not finite."""
        loaded = self.loaded
        set_dropout(loaded, True)
        sums = torch.zeros(5, dtype=torch.float64)
        for index in range(_passes(loaded, batch)):
            row = batch.packed[min(index, len(batch.packed) - 1)]
            sums[:4] += self._backward(row, batch, counts=float(index < batch.own))
        set_dropout(loaded, False)
        distributed.share_gradients(self.parameters)
        clip = self.recipe.settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        sums[4] = bool(stop_signal())  # one process may get it before the others do
        sums = distributed.total(sums, loaded.device)
        result = _StepResult(
            task_loss=float(sums[0] / sums[1]) if sums[1] else None,
            general_loss=float(sums[2] / sums[3]) if sums[3] else None,
            norm=norm,
            stop=(stop_signal() or signal.SIGTERM) if sums[4] else 0,
        )
        if result.is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def _backward(self, row: Row, batch: _Batch, counts: float) -> Tensor:
        """Add a row's gradient; return its task nats, task targets, general nats, general targets.

        `counts` is 0 for a row that only keeps processes in step, else 1.
        """
        weights = counts * batch.weights[row.owner] / batch.divisor
        with torch.enable_grad():
            loss, nats = row_loss(self.loaded, row, weights, kl=self.recipe.kl)
            torch.autograd.backward(loss)
        is_task = batch.is_task[row.owner].cpu()
        nats = nats.cpu()  # not every device has float64
        sums = torch.zeros(4, dtype=torch.float64)
        for kind, chosen in enumerate((is_task, ~is_task)):
            sums[2 * kind] = counts * float(nats[chosen].sum(dtype=torch.float64))
            sums[2 * kind + 1] = counts * int(chosen.sum())
        return sums

    def note_dev_loss(self, loss: float) -> None:
        """Record a dev loss, and keep the adapter if it is the best so far."""
        state = self.state
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the dev loss is {loss} after step {state.done} of "
                f"{self.steps}; lower train.learning_rate ({self.recipe.settings.learning_rate:g})"
            )
        state.dev.append((state.done, loss))
        state.stale += 1
        if loss < state.best_dev:
            state.best_step = state.done
            state.best_dev = loss
            state.stale = 0
            self.best = adapter_state(self.loaded)

    def keep_last(self) -> None:
        """Make the present adapter the one that is returned."""
        self.best = adapter_state(self.loaded)
        self.state.best_step = self.state.done

    def record(self) -> TrainingRun:
        state = self.state
        return TrainingRun(
            repeats=self.recipe.repeats,
            steps=state.done,
            best_step=state.best_step,
            dev_nll=tuple(state.dev),
            history=tuple(state.history),
            share=self.stream.share(state.done * self.recipe.settings.batch_size),
            train_tokens=state.tokens,
            seconds=state.seconds,
        )

    def divergence(self, result: _StepResult, step: int) -> DivergedError:
        """Return the error that names a step's losses and rows."""
        settings = self.recipe.settings
        origins = self.stream.origins(step, settings.batch_size)
        named = ", ".join(origins[:_NAMED])
        if len(origins) > _NAMED:
            named += f" and {len(origins) - _NAMED} more"
        measured = [f"gradient norm {result.norm:g}"]
        if result.general_loss is not None:
            measured.insert(0, f"general loss {result.general_loss:g}")
        if result.task_loss is not None:
            measured.insert(0, f"task loss {result.task_loss:g}")
        return DivergedError(
            f"training diverged at step {step + 1} of {self.steps}: {', '.join(measured)}; rows of "
            f"this step: {named}; the step was not taken, and the last checkpoint stands; lower "
            f"train.learning_rate ({settings.learning_rate:g}), or look at these rows"
        )


def _batches(
    loaded: LoadedModel, stream: Stream, settings: TrainSettings, first: int, steps: int
) -> Iterator[_Batch]:
    """Yield the batches of steps `first` to `steps`; the next one is laid out while one trains."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        upcoming = ahead.submit(_batch, loaded, stream, settings, min(first, steps - 1))
        for step in range(first, steps):
            batch = upcoming.result()
            upcoming = ahead.submit(_batch, loaded, stream, settings, min(step + 1, steps - 1))
            yield batch


def _batch(loaded: LoadedModel, stream: Stream, settings: TrainSettings, step: int) -> _Batch:
    """Lay out a step. Every process knows the whole of it, so the divisor needs no message."""
    examples, is_task = stream.step(step, settings.batch_size)
    weights = np.where(is_task, settings.task_weight, 1.0)
    divisor = 0.0
    tokens = 0
    for weight, example in zip(weights, examples, strict=True):
        divisor += float(weight * example.n_loss)
        tokens += len(example)
    launched = distributed.processes()
    mine = list(range(launched.process_index, len(examples), launched.num_processes))
    has_own = bool(mine)
    if not has_own:
        mine = [0]
    share = settings.share_prefixes and settings.lora_dropout == 0
    own_examples = [examples[k] for k in mine]
    packed = rows(own_examples, loaded, settings.pack_tokens, share=share)
    return _Batch(
        packed=packed,
        weights=torch.as_tensor(weights[mine], dtype=torch.float32, device=loaded.device),
        is_task=torch.as_tensor(is_task[mine], device=loaded.device),
        divisor=divisor,
        tokens=tokens,
        own=len(packed) if has_own else 0,
    )


def _passes(loaded: LoadedModel, batch: _Batch) -> int:
    """Return how many rows this process runs.

    They are its own; under FSDP as many as any process has, since all gather each layer together.
    """
    if not loaded.sharded:
        return batch.own
    launched = distributed.processes()
    own = torch.zeros(launched.num_processes)
    own[launched.process_index] = batch.own
    return int(distributed.total(own, loaded.device).max())
