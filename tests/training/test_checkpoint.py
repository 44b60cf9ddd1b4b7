"""A killed training goes on to the same bits: from the newest checkpoint that is whole, after
signals, on full disks."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fulcrum.core import store
from fulcrum.core.errors import DivergedError, StoreError
from fulcrum.core.processes import Stopped, deferred
from fulcrum.core.types import TrainingRun, TrainPoint
from fulcrum.model.adapter import State
from fulcrum.training import loop
from helpers.training import same, stream, train


class Killed(BaseException):
    pass


def killed_at(step: int) -> loop.Progress:
    def progress(point: TrainPoint, steps: int, dev: float | None) -> None:
        if point.step == step:
            raise Killed

    return progress


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, 4),
        ({"save_every": 2}, 6),  # killed after step 6, before its checkpoint: goes on from step 4
        ({"lora_dropout": 0.3}, 3),
        ({"kind": "lfm2", "weight_decay": 0.1}, 4),
        ({"early_stopping_patience": 1, "evaluations": 6}, 3),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, options: dict, at: int) -> None:
    whole, expected = train(tmp_path, batch_size=3, **options)
    with pytest.raises(Killed):
        train(tmp_path, batch_size=3, checkpoint=tmp_path / "c", progress=killed_at(at), **options)
    assert len(list((tmp_path / "c").glob("checkpoint-*"))) == min(
        2, (at - 1) // options.get("save_every", 1)
    )
    steps: list[int] = []
    torch.manual_seed(12345)  # whatever else drew random numbers
    resumed, found = train(
        tmp_path,
        batch_size=3,
        checkpoint=tmp_path / "c",
        progress=lambda p, *_: steps.append(p.step),
        **options,
    )
    assert steps[0] > 1
    assert same(whole, resumed)
    timeless = [replace(point, seconds=0) for point in expected.history]
    assert [replace(point, seconds=0) for point in found.history] == timeless
    assert replace(found, history=(), seconds=0) == replace(expected, history=(), seconds=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_every": 50},
        {"save_every": 50, "evaluations": 6, "early_stopping_patience": 1, "learning_rate": 1.0},
    ],
)
def test_a_finished_run_is_not_trained_again(tmp_path: Path, options: dict) -> None:
    """Also where no step of it is a multiple of `save_every`, and where it stopped early."""
    whole, expected = train(tmp_path, checkpoint=tmp_path / "c", **options)
    assert (expected.steps < 6) == ("early_stopping_patience" in options)
    steps: list[int] = []
    again, found = train(
        tmp_path, checkpoint=tmp_path / "c", progress=lambda p, *_: steps.append(p.step), **options
    )
    assert steps == []
    assert same(whole, again)
    assert found.dev_nll == expected.dev_nll


def test_a_half_written_checkpoint_is_not_read(tmp_path: Path) -> None:
    whole, _ = train(tmp_path)
    with pytest.raises(Killed):
        train(tmp_path, checkpoint=tmp_path / "c", progress=killed_at(4))
    half = tmp_path / "c" / ".checkpoint-5.partial"
    half.mkdir()
    (half / "state.json").write_text('{"identity": ')
    resumed, _ = train(tmp_path, checkpoint=tmp_path / "c")
    assert same(whole, resumed)


def killed_checkpoint(folder: Path) -> Path:
    with pytest.raises(Killed):
        train(folder, checkpoint=folder / "c", progress=killed_at(4))
    return max((folder / "c").glob("checkpoint-*"))


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"seed": 7}, {"rows": stream(seed=9)}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict) -> None:
    killed_checkpoint(tmp_path)
    with pytest.raises(
        StoreError,
        match=r"checkpoint-3: made with other settings, data or model; choose another output_dir",
    ):
        train(tmp_path, checkpoint=tmp_path / "c", **change)


@pytest.mark.parametrize("asked", [{"device": "auto"}, {"compile": "never"}])
def test_what_auto_became_is_what_a_checkpoint_belongs_to(tmp_path: Path, asked: dict) -> None:
    """A worker is told what the first process found out, and goes on with what that one began."""
    with pytest.raises(Killed):
        train(tmp_path, checkpoint=tmp_path / "c", progress=killed_at(4), **asked)
    resumed, _ = train(tmp_path, checkpoint=tmp_path / "c")
    whole, _ = train(tmp_path)
    assert same(resumed, whole)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    train(tmp_path, checkpoint=tmp_path / "c")
    assert numbers(tmp_path / "c") == [5, 6]


def test_what_somebody_copied_beside_checkpoints_is_none(tmp_path: Path) -> None:
    whole, _ = train(tmp_path)
    shutil.copytree(killed_checkpoint(tmp_path), tmp_path / "c" / "checkpoint-3 (copy)")
    resumed, _ = train(tmp_path, checkpoint=tmp_path / "c")
    assert same(whole, resumed)
    assert (tmp_path / "c" / "checkpoint-3 (copy)").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, TrainingRun]:
    """The weights and the result of a training that nothing killed."""
    return train(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model beside `c`, the checkpoints of a training killed at step 4."""
    folder = tmp_path_factory.mktemp("killed")
    killed_checkpoint(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "best.safetensors", "optimizer.pt", "state.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "emptied", "one bit"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path,
    uninterrupted: tuple[State, TrainingRun],
    killed: Path,
    name: str,
    damage: str,
) -> None:
    whole, expected = uninterrupted
    shutil.copytree(killed / "c", tmp_path / "c")
    file = max((tmp_path / "c").glob("checkpoint-*")) / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage != "missing":
        content[len(content) // 2] ^= 1
        file.write_bytes(
            {"one bit": content, "cut": content[: len(content) // 2], "emptied": b""}[damage]
        )
    said: list[str] = []
    steps: list[int] = []
    resumed, found = train(
        killed,
        checkpoint=tmp_path / "c",
        say=said.append,
        progress=lambda point, *_: steps.append(point.step),
    )
    assert steps == [3, 4, 5, 6]
    assert same(whole, resumed)
    assert found.dev_nll == expected.dev_nll
    assert len(said) == 1
    assert f"checkpoint-3: not used: {name} damaged or missing" in said[0] or name == "SHA256SUMS"


def test_where_none_is_whole_training_begins_anew(tmp_path: Path) -> None:
    whole, _ = train(tmp_path)
    killed_checkpoint(tmp_path)
    for file in (tmp_path / "c").glob("checkpoint-*/optimizer.pt"):
        file.write_bytes(b"")
    said: list[str] = []
    steps: list[int] = []
    resumed, _ = train(
        tmp_path,
        checkpoint=tmp_path / "c",
        say=said.append,
        progress=lambda p, *_: steps.append(p.step),
    )
    assert (len(said), steps[0]) == (2, 1)
    assert same(whole, resumed)


def test_a_full_disk_says_so_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path)
    flushed = store._flush

    def full(path: Path) -> None:
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device")
        flushed(path)

    monkeypatch.setattr(store, "_flush", full)
    with pytest.raises(
        StoreError,
        match=r"checkpoint-3: cannot write: No space left on device; free some space or set",
    ):
        train(tmp_path, checkpoint=tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    monkeypatch.undo()
    resumed, _ = train(tmp_path, checkpoint=tmp_path / "c")
    assert same(whole, resumed)


# Signals.


def signalled(at: int, *numbers: int) -> loop.Progress:
    def progress(point: TrainPoint, steps: int, dev: float | None) -> None:
        for number in numbers if point.step == at else ():
            os.kill(os.getpid(), number)

    return progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train(tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, checkpoint=tmp_path / "c", save_every=50, progress=signalled(3, number))
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    assert (
        "stopping after this step, which is then saved; once more: at once"
        in capfd.readouterr().err
    )
    (last,) = numbers(tmp_path / "c")
    assert last in (
        3,
        4,
    )  # the handler runs when Python next looks: in this step, or as the next begins
    steps: list[int] = []
    resumed, _ = train(
        tmp_path,
        checkpoint=tmp_path / "c",
        save_every=50,
        progress=lambda p, *_: steps.append(p.step),
    )
    assert steps[0] == last + 1
    assert same(whole, resumed)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(
            tmp_path,
            checkpoint=tmp_path / "c",
            save_every=50,
            progress=signalled(3, signal.SIGINT, signal.SIGINT),
        )
    assert numbers(tmp_path / "c") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_stops_what_comes_after_it(tmp_path: Path, number: int) -> None:
    """A run has more trainings and tests than this one; its last step is saved, and is not done
    again."""
    whole, _ = train(tmp_path)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, checkpoint=tmp_path / "c", progress=signalled(6, number))
    assert stopped.value.number == number
    steps: list[int] = []
    ended, _ = train(
        tmp_path, checkpoint=tmp_path / "c", progress=lambda p, *_: steps.append(p.step)
    )
    assert steps == []
    assert same(whole, ended)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    from threading import Thread

    seen: list[int] = []

    def work() -> None:
        with deferred() as asked:
            seen.append(asked())

    before = signal.getsignal(signal.SIGINT)
    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]
    assert signal.getsignal(signal.SIGINT) is before


# Numbers that are none.


def test_a_gradient_that_is_no_number_stops_before_the_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path)
    row_loss, calls = loop.row_loss, iter(range(99))
    poisoned = {3 * 2}  # the fourth step's first row: two rows a step (pack_tokens)
    monkeypatch.setattr(
        loop,
        "row_loss",
        lambda *given, **how: (
            (row_loss(*given, **how)[0] * float("nan"), row_loss(*given, **how)[1])
            if next(calls) in poisoned
            else row_loss(*given, **how)
        ),
    )
    with pytest.raises(DivergedError) as error:
        train(tmp_path, checkpoint=tmp_path / "c", pack_tokens=60)
    said = str(error.value)
    step = int(said.partition("at step ")[2].partition(" ")[0])
    rows = stream()
    assert said.startswith(f"training diverged at step {step} of 6: task loss ")
    assert (
        f"gradient norm nan; rows of this step: {', '.join(rows.origins(step - 1, 4))}; the "
        "step was not taken" in said
    )
    assert numbers(tmp_path / "c")[-1] == step - 1
    monkeypatch.undo()
    resumed, _ = train(tmp_path, checkpoint=tmp_path / "c", pack_tokens=60)
    whole, _ = train(tmp_path, pack_tokens=60)
    assert same(whole, resumed)


# Long trainings.


def test_what_is_written_down_of_a_training_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(loop.is_shown(step, 10**6) for step in range(1, 10**6 + 1)) == 501  # and the first
    assert all(loop.is_shown(step, 500) for step in range(1, 501))
    monkeypatch.setattr(loop, "POINTS", 2)
    whole, expected = train(tmp_path)
    assert [point.step for point in expected.history] == [1, 3, 6]
    with pytest.raises(Killed):
        train(tmp_path, checkpoint=tmp_path / "c", progress=killed_at(5))
    resumed, found = train(tmp_path, checkpoint=tmp_path / "c")
    assert same(whole, resumed)
    assert [(point.step, point.task_loss) for point in found.history] == [
        (p.step, p.task_loss) for p in expected.history
    ]
