"""Which general rows are taken: orders hold every candidate once; what is planted comes first; gradients are the true ones."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fulcrum import adapter, arms, choose, encode, loss, material, model, probe
from fulcrum.comparison import compare
from fulcrum.lora import LoraLinear
from fulcrum.records import Example, Message
from tiny import CONTEXT, comparison_settings, load_tiny, save_task, tiny_settings, tiny_tokenizer


def row(question: str, answer: str, place: int) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"g{place}", f"f:{place}")


def texts(rng: np.random.Generator, words: list[str], count: int, start: int = 0) -> list[Example]:
    return [row(" ".join(rng.choice(words, 12)), " ".join(rng.choice(words, 6)), start + k) for k in range(count)]


WEATHER = [f"cloud{k}" for k in range(40)]
COOKING = [f"spoon{k}" for k in range(40)]
MUSIC = [f"chord{k}" for k in range(40)]


def test_similar_takes_the_tasks_kind_first_and_every_candidate_once() -> None:
    rng = np.random.default_rng(0)
    candidates = [*texts(rng, COOKING, 300), *texts(rng, WEATHER, 60, 300), *texts(rng, MUSIC, 300, 360)]
    order = choose.similar(candidates, texts(rng, WEATHER, 8), seed=0)
    assert sorted(order) == list(range(660))
    assert set(order[:60]) == set(range(300, 360))
    assert choose.similar(candidates, texts(rng, WEATHER, 8), seed=0).tolist() != order.tolist()  # other task rows
    # With a task that is like all candidates there is nothing to prefer: close to a random order.
    even = choose.similar(candidates, [*texts(rng, COOKING, 30), *texts(rng, MUSIC, 30)], seed=1)
    assert 20 < np.mean(np.isin(even[:200], range(300))) * 100 < 80


def test_diverse_takes_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    candidates = [*texts(rng, COOKING, 900), *texts(rng, WEATHER, 64, 900), *texts(rng, MUSIC, 64, 964)]
    order = choose.diverse(candidates, seed=0)
    assert sorted(order) == list(range(1028))
    kinds = Counter("cooking" if k < 900 else "weather" if k < 964 else "music" for k in order[:96])
    assert min(kinds["weather"], kinds["music"]) >= 6  # one in sixteen of the candidates each: at random there would be 6
    assert choose.diverse(candidates[:100], seed=0).tolist() == np.random.default_rng(0).permutation(100).tolist()


def test_turns_are_taken_cluster_by_cluster() -> None:
    order = choose.by_turns(np.array([0, 0, 0, 1, 1, 2]), np.array([10, 11, 12, 13, 14, 15]))
    assert order.tolist() == [10, 13, 15, 11, 14, 12]


def test_by_gradient_goes_by_direction_alone() -> None:
    task = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = choose.by_gradient(np.array([[-1.0, 0.0], [100.0, 0.0], [0.1, 0.1], [0.0, 0.0]]), task)
    assert found.tolist() == [2, 1, 3, 0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> model.LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("model"))


def test_sketches_are_those_of_each_rows_own_gradient(loaded: model.LoadedModel) -> None:
    """Packed with others or alone, the sketch of a row is that of PyTorch's gradient of its mean loss."""
    adapter.new_adapter(loaded, tiny_settings(lora_r=4), 0)
    with torch.no_grad():
        for module in loaded.peft.modules():
            if isinstance(module, LoraLinear):
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    form = encode.make_format(loaded.tokenizer, None)
    examples = [encode.encode(row("say one two " * k, "three four " * (k + 1), k), form) for k in range(1, 6)]
    packed = probe.gradients(loaded, examples)
    layers = [module for module in loaded.peft.modules() if isinstance(module, LoraLinear)]
    for place, example in enumerate(examples):
        loaded.peft.zero_grad()
        (only,) = loss.rows([example], loaded, 10_000)
        loss.row_loss(loaded, only, torch.full((example.n_loss,), 1 / example.n_loss))[0].backward()
        expected = torch.zeros(probe.DIMENSIONS)
        for number, layer in enumerate(layers):
            gradient = layer.lora_B["default"].weight.grad / layer.scaling["default"]  # (out, r)
            projection, buckets, signs = probe._random(0, number, *gradient.shape)
            expected.index_add_(0, buckets, (projection.t() @ gradient).reshape(-1) * signs)
        torch.testing.assert_close(torch.tensor(packed[place]).float(), expected, rtol=1e-3, atol=1e-5)
    adapter.drop_adapter(loaded)


def test_arms_choose_by_the_task_rows_they_train_on_alone(tmp_path: Path) -> None:
    """Every view (size, fold) chooses anew, by its own rows; what was chosen by gradient is the same when resumed."""
    save_task(tmp_path, 12, 4)
    names = ["sft", "tell", "tell_similar", "tell_gradient", "tell_diverse"]
    settings = comparison_settings(
        tmp_path, tmp_path / "out", compare={"sizes": [4, 8], "folds": 2, "arms": names},
        mix={"general_per_task": 2, "repeats": 1, "choose_from": 60},
    )  # fmt: skip
    results = compare(settings)
    assert {arm.arm for arm in results.arms} == set(names)
    (note,) = (note for note in results.notes if "to choose general rows" in note)
    assert note.startswith("seed 0: to choose general rows the gradients of 68 rows were taken, ")
    before = (tmp_path / "out" / "certificate.json").read_bytes()
    for cell in (tmp_path / "out" / "cells").glob("tell_gradient-*"):
        cell.unlink()
    compare(settings, resume=True)
    assert (tmp_path / "out" / "certificate.json").read_bytes() == before
    tokenizer = tiny_tokenizer()
    rows = material.prepare(settings, tokenizer, CONTEXT, 0, dev_apart=False, choose_from=60)
    arm = arms.ARMS["tell_similar"]
    assert rows.candidates[: len(rows.general)] == rows.general
    chosen = {size: arms.general_rows(rows.at(size), arm, settings) for size in (4, 8)}
    assert all(len(own) == len(rows.general) for own in chosen.values())
    first, *_ = rows.at(8).folds(2, 0)
    assert arms.general_rows(first, arm, settings) != chosen[8]
