"""One cell: nested rows, folds that leak nothing, settings that are tried without a test row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulcrum.config.arms import ARMS
from fulcrum.config.settings import settings_from_dict
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Hyperparameters, Task, Tokens, Trial
from fulcrum.data import encode, run_data
from fulcrum.data.run_data import RunData
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import resolve
from fulcrum.experiments.cell import Cell
from fulcrum.model import adapter, generate
from helpers.cells import COLOURS, chosen, made, row, rows
from helpers.tiny import CONTEXT, load_tiny, session, tiny_settings, tiny_tokenizer, write_rows

SFT = ARMS["sft"]


# Nested sizes.


def test_smaller_sizes_are_the_beginning_of_larger_ones() -> None:
    """40 rows, of which 32 are in the largest mixture: the cap and the general rows follow the rows
    in proportion."""
    whole = made(task_rows=40, general_for=32)
    assert len(whole.general) == 128  # 2 repeats x 32 rows x 2
    own = {size: whole.at(size).tasks[0].train for size in (16, 32)}
    assert own[32][:16] == own[16]
    assert [len(part) for part in own.values()] == [16, 32]
    assert whole.at(16).at(8) == whole.at(8)
    assert [whole.at(size).general_count(2) for size in (8, 16, 32)] == [32, 64, 128]
    assert [whole.at(size).general_count(1) for size in (8, 16, 32)] == [16, 32, 64]
    assert [whole.at(size).step_cap for size in (8, 10, 16, 32)] == [
        12,
        15,
        24,
        48,
    ]  # size x 2 x (1 + 2), 4 a step
    for size in (8, 16, 32):
        stream = resolve(ARMS["tell"], whole.at(size), chosen()).stream(tiny_tokenizer(), 2, 0)
        assert (stream.share().task_examples, stream.share().general_examples) == (
            2 * size,
            4 * size,
        )
        assert stream.steps(4) == whole.at(size).step_cap
        # The general rows are nested too.
        form = encode.make_format(tiny_tokenizer(), None)
        expected = [
            encode.encode(example, form).ids.tolist() for example in whole.general[: 4 * size]
        ]
        assert [tokens.ids.tolist() for tokens in stream.general] == expected


def test_dev_rows_are_task_rows_in_an_order_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    parts = {
        part: write_rows(
            tmp_path / f"{part}.jsonl", [(f"{part} {k}", COLOURS[k % 3]) for k in range(number)]
        )
        for part, number in (("train", 12), ("dev", 8), ("test", 4), ("pool", 200))
    }
    task = {part: parts[part] for part in ("train", "dev", "test")}
    settings = settings_from_dict(
        {
            "task": task,
            "general": parts["pool"],
            "mix": {"general_per_task": 2, "repeats": 1},
            "eval": {"general_rows": 0},
        }
    )
    found = [
        run_data.prepare(settings, tiny_tokenizer(), CONTEXT, seed, dev_apart=False)
        for seed in (0, 1, 0)
    ]
    every = {f"{part} {k}" for part, number in (("train", 12), ("dev", 8)) for k in range(number)}
    for each in found:
        (own,) = each.tasks
        assert (len(own.train), own.dev, len(own.test)) == (20, (), 4)
        assert {example.question for example in own.train} == every
    assert found[0].tasks == found[2].tasks != found[1].tasks
    first = {example.question.split()[0] for example in found[0].at(10).tasks[0].train}
    assert first == {"train", "dev"}  # mixed: no size is of training rows alone


# Folds.


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(2, 5), st.integers(0, 9))
@settings(max_examples=60)
def test_every_row_is_a_dev_row_once_and_no_group_is_split(
    groups: list[int], count: int, seed: int
) -> None:
    task = Task(
        "task",
        tuple(row("own", k, group=f"g{group}") for k, group in enumerate(groups)),
        (),
        rows("test", 1),
    )
    whole = RunData((task,), (), {}, {}, (1,), len(groups), 4)
    if len(set(groups)) < 2:
        with pytest.raises(
            DataError,
            match=r"^task: its \d+ rows are one content group \('g\d'\).*name another column in",
        ):
            whole.folds(count, seed)
        return
    folds = whole.folds(count, seed)
    assert len(folds) == min(count, len(set(groups)))
    for fold in folds:
        (own,) = fold.tasks
        assert own.train
        assert own.dev
        assert {example.group for example in own.train}.isdisjoint(
            {example.group for example in own.dev}
        )
        assert sorted(e.origin for e in (*own.train, *own.dev)) == sorted(
            e.origin for e in task.train
        )
        assert own.test == task.test
    assert sorted(e.origin for fold in folds for e in fold.tasks[0].dev) == sorted(
        e.origin for e in task.train
    )
    assert folds == whole.folds(count, seed)


def test_folds_are_the_seeds() -> None:
    whole = made(task_rows=12)
    parts = [[fold.tasks[0].dev for fold in whole.folds(3, seed)] for seed in (0, 1)]
    assert parts[0] != parts[1]
    assert [[len(dev) for dev in part] for part in parts] == [[4, 4, 4]] * 2


def test_a_fold_is_trained_with_its_part_of_the_steps() -> None:
    """4 of 6 rows, and two general rows for each of them."""
    for fold in made().folds(3, 0):
        assert (fold.general_count(2), fold.step_cap) == (16, 6)


# What is tried sees no test row.


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("base", Hyperparameters()),
        ("kshot", Hyperparameters(shots=2)),
        ("tfidf", Hyperparameters()),
        ("sft_kl", Hyperparameters(2, kl=0.1)),
        ("tell", Hyperparameters(2)),
    ],
)
def test_no_test_row_is_seen_before_the_end(
    tmp_path: Path, name: str, setting: Hyperparameters
) -> None:
    """Garbage in test and held-out rows changes nothing that is tried; other task rows do."""
    whole = made()
    garbage = tuple(row("garbage", k, answer="zzz " * 20) for k in range(50))
    other = replace(
        whole, tasks=(replace(whole.tasks[0], test=garbage),), held_out={"pool": garbage}
    )
    changed = replace(
        whole,
        tasks=(
            replace(whole.tasks[0], train=tuple(row("own", k, COLOURS[k % 2]) for k in range(6))),
        ),
    )
    found = [
        cell.tune(
            session(load_tiny(tmp_path), chosen()),
            resolve(ARMS[name], each, chosen()),
            Cell(ARMS[name], 0, 0),
            setting,
        )
        for each in (whole, other, changed)
    ]
    assert replace(found[0], seconds=0) == replace(found[1], seconds=0)
    assert found[0].dev_nll != found[2].dev_nll
    assert found[0].setting == setting
    assert (found[0].train_tokens > 0) == ARMS[name].trained


def test_a_training_that_diverges_gives_way_to_the_next_best_setting(tmp_path: Path) -> None:
    """A learning rate of 1e30 makes weights that are no numbers; test rows are scored with the next
    best setting alone."""
    loaded, whole = load_tiny(tmp_path), made()
    tried = [
        Trial(Hyperparameters(repeats, learning_rate=rate), nll, 5, 0.1)
        for repeats, rate, nll in ((2, 1e-2, 1.5), (2, 1e30, 0.5))
    ]
    found = cell.final(
        session(loaded, chosen(), tmp_path), resolve(SFT, whole, chosen()), Cell(SFT, 6, 3), tried
    )
    alone = cell.final(
        session(loaded, chosen()), resolve(SFT, whole, chosen()), Cell(SFT, 6, 3), tried[:1]
    )
    assert (found.chosen, found.setting, found.predictions) == (
        0,
        tried[0].setting,
        alone.predictions,
    )
    with pytest.raises(ConfigError, match=r"sft-6-seed3: training diverged with every setting"):
        cell.final(
            session(loaded, chosen()), resolve(SFT, whole, chosen()), Cell(SFT, 6, 3), tried[1:]
        )


def test_the_best_of_what_was_tried_is_trained_on_all_rows(tmp_path: Path) -> None:
    tried = [
        Trial(Hyperparameters(repeats), nll, 5, 0.1)
        for repeats, nll in ((1, 2.0), (2, float("inf")), (3, 1.5), (4, 1.5))
    ]
    loaded = load_tiny(tmp_path)
    found = cell.final(
        session(loaded, chosen()), resolve(SFT, made(), chosen()), Cell(SFT, 6, 3), tried
    )
    assert (found.size, found.seed, found.chosen, found.setting) == (
        6,
        3,
        2,
        Hyperparameters(3),
    )  # of two equals the first
    assert found.tried == tuple(tried)
    assert found.training is not None
    assert (found.training.repeats, found.training.steps, found.training.best_step) == (
        3,
        5,
        5,
    )  # 18 rows, 4 a step
    assert found.training.dev_nll == ()
    assert found.training.share.task_examples == 18
    with pytest.raises(
        ConfigError, match=r"sft-6-seed3: .* every setting; lower train\.learning_rate \(0\.01\)"
    ):
        cell.final(
            session(loaded, chosen()), resolve(SFT, made(), chosen()), Cell(SFT, 6, 3), tried[1:2]
        )


# Drift from the base model.


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_drift_is_the_divergence_from_the_base_models_distribution(
    tmp_path: Path, kind: str
) -> None:
    loaded = load_tiny(tmp_path, kind)
    adapter.new_adapter(loaded, tiny_settings(), 0)
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(5, 100, n), np.arange(n) >= 4) for n in (9, 14)]
    nats, counts = generate.divergence(loaded, examples)
    assert np.allclose(nats, 0, atol=1e-5)  # a fresh adapter changes nothing
    state = {
        name: tensor + 0.1 * torch.randn_like(tensor)
        for name, tensor in adapter.adapter_state(loaded).items()
    }
    adapter.set_adapter_state(loaded, state)
    nats, counts = generate.divergence(loaded, examples)
    for example, found in zip(examples, nats, strict=True):
        ids = torch.tensor(example.ids)[None]
        with torch.no_grad():
            own = loaded.causal(input_ids=ids).logits[0, 3:-1].double().log_softmax(-1)
            with adapter.without(loaded):
                base = loaded.causal(input_ids=ids).logits[0, 3:-1].double().log_softmax(-1)
        expected = float((base.exp() * (base - own)).sum())
        assert expected > 0.01
        assert found == pytest.approx(expected, rel=1e-3)
    assert counts.tolist() == [5, 10]


def test_drift_is_measured_on_the_same_texts_for_every_adapter(tmp_path: Path) -> None:
    loaded, general = load_tiny(tmp_path), rows("held", 5)
    found = []
    for seed in (0, 1):
        adapter.new_adapter(loaded, tiny_settings(), seed)
        moved = {name: tensor + 0.2 for name, tensor in adapter.adapter_state(loaded).items()}
        adapter.set_adapter_state(loaded, moved)
        found.append(cell.drift(loaded, general, 512))
    first, second = ([(row.origin, row.output, row.n_tokens) for row in part] for part in found)
    assert first == second
    assert len(first) > 0
    assert [row.nll_sum for row in found[0]] != [row.nll_sum for row in found[1]]
