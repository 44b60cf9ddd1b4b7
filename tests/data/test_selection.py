"""Which general rows are taken: orders hold every candidate once; what is planted comes first;
gradients are the true ones."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fulcrum.config.arms import ARMS, chosen_arms
from fulcrum.core.errors import ConfigError, ModelError
from fulcrum.core.progress import Silent
from fulcrum.core.types import Example, Message
from fulcrum.data import encode, run_data, selection
from fulcrum.experiments import made_rows
from fulcrum.experiments.arm_data import resolve, rows_to_probe
from fulcrum.experiments.cell import Session
from fulcrum.experiments.compare import run_comparison
from fulcrum.model import adapter, base_model, loss
from fulcrum.model.adapter import LoraLinear
from fulcrum.training import gradients as gradient_sketches
from fulcrum.training.gradients import SketchOptions
from helpers.tiny import (
    CONTEXT,
    arm_named,
    comparison_settings,
    load_tiny,
    save_task,
    tiny_settings,
    tiny_tokenizer,
)


def row(question: str, answer: str, place: int) -> Example:
    return Example(
        (Message("user", question), Message("assistant", answer)), f"g{place}", f"f:{place}"
    )


def texts(rng: np.random.Generator, words: list[str], count: int, start: int = 0) -> list[Example]:
    return [
        row(" ".join(rng.choice(words, 12)), " ".join(rng.choice(words, 6)), start + k)
        for k in range(count)
    ]


WEATHER = [f"cloud{k}" for k in range(40)]
COOKING = [f"spoon{k}" for k in range(40)]
MUSIC = [f"chord{k}" for k in range(40)]


def test_similar_takes_the_tasks_kind_first_and_every_candidate_once() -> None:
    rng = np.random.default_rng(0)
    candidates = [
        *texts(rng, COOKING, 300),
        *texts(rng, WEATHER, 60, 300),
        *texts(rng, MUSIC, 300, 360),
    ]
    order = selection.similar(candidates, texts(rng, WEATHER, 8), seed=0)
    assert sorted(order) == list(range(660))
    assert set(order[:60]) == set(range(300, 360))
    assert (
        selection.similar(candidates, texts(rng, WEATHER, 8), seed=0).tolist() != order.tolist()
    )  # other task rows
    # With a task that is like all candidates there is nothing to prefer: close to a random order.
    even = selection.similar(candidates, [*texts(rng, COOKING, 30), *texts(rng, MUSIC, 30)], seed=1)
    assert 20 < np.mean(np.isin(even[:200], range(300))) * 100 < 80


def test_similar_reads_scripts_without_spaces(tmp_path: Path) -> None:
    """No text repeats another as a whole: their letters tell which are of the task's kind."""
    rng = np.random.default_rng(0)

    def written(letters: str, count: int, start: int) -> list[Example]:
        return [
            row(
                "".join(rng.choice(list(letters), 20)),
                "".join(rng.choice(list(letters), 8)),
                start + k,
            )
            for k in range(count)
        ]

    weather, food = "雨雪風雲晴曇嵐霧雷空", "米魚肉茶塩油卵豆酒麺"
    candidates = [*written(food, 60, 0), *written(weather, 40, 60)]
    order = selection.similar(candidates, written(weather, 8, 100), seed=0)
    assert sum(k >= 60 for k in order[:40]) >= 38


def test_similar_is_no_choice_of_short_rows() -> None:
    """Of rows of 6 and of 60 other words the first half holds both (a fourth of the short share a
    hashed pair by chance)."""
    rng = np.random.default_rng(0)
    words = [*COOKING, *MUSIC]
    short = [
        row(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, 2)), k) for k in range(300)
    ]
    long = [
        row(" ".join(rng.choice(words, 40)), " ".join(rng.choice(words, 20)), 300 + k)
        for k in range(300)
    ]
    order = selection.similar([*short, *long], texts(rng, WEATHER, 8), seed=0)
    assert 60 <= np.sum(order[:300] < 300) <= 240
    # Rows without words say nothing of which rows are like them.
    silent = selection.similar([*short, *long], [row("!", "?", 0)], seed=0)
    assert sorted(silent) == list(range(600))


def test_diverse_takes_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    candidates = [
        *texts(rng, COOKING, 900),
        *texts(rng, WEATHER, 64, 900),
        *texts(rng, MUSIC, 64, 964),
    ]
    order = selection.diverse(candidates, seed=0)
    assert sorted(order) == list(range(1028))
    kinds = Counter("cooking" if k < 900 else "weather" if k < 964 else "music" for k in order[:96])
    assert (
        min(kinds["weather"], kinds["music"]) >= 6
    )  # one in sixteen of the candidates each: at random there would be 6
    assert (
        selection.diverse(candidates[:100], seed=0).tolist()
        == np.random.default_rng(0).permutation(100).tolist()
    )


def test_turns_are_taken_cluster_by_cluster() -> None:
    order = selection.by_turns(np.array([0, 0, 0, 1, 1, 2]), np.array([10, 11, 12, 13, 14, 15]))
    assert order.tolist() == [10, 13, 15, 11, 14, 12]


def test_by_gradient_goes_by_direction_alone() -> None:
    task = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = selection.by_gradient(
        np.array([[-1.0, 0.0], [100.0, 0.0], [0.1, 0.1], [0.0, 0.0]]), task
    )
    assert found.tolist() == [2, 1, 3, 0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> base_model.LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("model"))


def test_sketches_are_those_of_each_rows_own_gradient(loaded: base_model.LoadedModel) -> None:
    """Packed with others or alone, the sketch of a row is that of PyTorch's gradient of its mean
    loss."""
    adapter.new_adapter(loaded, tiny_settings(lora_r=4), 0)
    with torch.no_grad():
        for module in loaded.peft.modules():
            if isinstance(module, LoraLinear):
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    form = encode.make_format(loaded.tokenizer, None)
    examples = [
        encode.encode(row("say one two " * k, "three four " * (k + 1), k), form)
        for k in range(1, 6)
    ]
    packed = gradient_sketches.sketch(loaded, examples, SketchOptions())
    layers = [module for module in loaded.peft.modules() if isinstance(module, LoraLinear)]
    for place, example in enumerate(examples):
        loaded.peft.zero_grad()
        (only,) = loss.rows([example], loaded, 10_000)
        loss.row_loss(loaded, only, torch.full((example.n_loss,), 1 / example.n_loss))[0].backward()
        expected = torch.zeros(gradient_sketches.DIMENSIONS)
        for number, layer in enumerate(layers):
            gradient = layer.lora_B["default"].weight.grad / layer.scaling["default"]  # (out, r)
            projection, buckets, signs = gradient_sketches._random(0, number, *gradient.shape)
            expected.index_add_(0, buckets, (projection.t() @ gradient).reshape(-1) * signs)
        torch.testing.assert_close(
            torch.tensor(packed[place]).float(), expected, rtol=1e-3, atol=1e-5
        )
    adapter.drop_adapter(loaded)


def test_sketches_keep_cosines(loaded: base_model.LoadedModel) -> None:
    """Cosines of sketches are those of whole gradients, off by little and in no direction (over
    seeds)."""
    adapter.new_adapter(loaded, tiny_settings(lora_r=4), 0)
    with torch.no_grad():
        for module in loaded.peft.modules():
            if isinstance(module, LoraLinear):
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    form = encode.make_format(loaded.tokenizer, None)
    rng = np.random.default_rng(0)
    examples = [
        encode.encode(one, form)
        for one in texts(rng, ["one", "two", "say", "red", "cat", "far"], 12)
    ]
    layers = [module for module in loaded.peft.modules() if isinstance(module, LoraLinear)]
    whole = []
    for example in examples:
        loaded.peft.zero_grad()
        (only,) = loss.rows([example], loaded, 10_000)
        loss.row_loss(loaded, only, torch.full((example.n_loss,), 1 / example.n_loss))[0].backward()
        parts = [
            layer.lora_B["default"].weight.grad.reshape(-1) / layer.scaling["default"]
            for layer in layers
        ]
        whole.append(torch.cat(parts).numpy().copy())

    def cosines(rows: np.ndarray) -> np.ndarray:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return (unit @ unit.T)[np.triu_indices(len(rows), 1)]

    off = [
        cosines(gradient_sketches.sketch(loaded, examples, SketchOptions(seed=seed)))
        - cosines(np.array(whole))
        for seed in range(8)
    ]
    assert np.sqrt(np.mean(np.square(off))) < 0.1
    assert np.abs(np.mean(off, axis=0)).mean() < 0.05
    assert not np.allclose(off[0], off[1])
    adapter.drop_adapter(loaded)


def test_models_without_layers_to_sketch_are_refused(tmp_path: Path) -> None:
    other = load_tiny(tmp_path, "gpt2")
    adapter.new_adapter(other, tiny_settings(), 0)
    example = encode.encode(row("a", "b", 0), encode.make_format(other.tokenizer, None))
    with pytest.raises(
        ModelError, match=r"none of its adapted layers is one whose gradients can be sketched"
    ):
        gradient_sketches.sketch(other, [example], SketchOptions())


def test_a_row_with_an_anchor_has_another_gradient_than_without(tmp_path: Path) -> None:
    save_task(tmp_path, 12, 4)
    settings = comparison_settings(
        tmp_path, tmp_path / "out", mix={"select": "gradient", "choose_from": 60, "repeats": 1}
    )
    rows = run_data.prepare(settings, tiny_tokenizer(), CONTEXT, 0, dev_apart=False, choose_from=60)
    plain, anchored = (
        rows_to_probe(resolve(ARMS[name], rows, settings)) for name in ("mix", "tell")
    )
    assert len(plain) == len(anchored) == 12 + 192
    assert len({*plain} & {*anchored}) == 192  # the general rows


def test_gradients_are_gone_on_with_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are done are not taken again; a damaged one is; all is as if nothing had
    happened."""
    monkeypatch.setattr(gradient_sketches, "_BLOCK", 30)
    save_task(tmp_path, 12, 4)
    settings = comparison_settings(
        tmp_path, tmp_path / "out", mix={"select": "gradient", "choose_from": 60, "repeats": 1}
    )
    loaded = load_tiny(tmp_path)
    rows = run_data.prepare(settings, loaded.tokenizer, CONTEXT, 0, dev_apart=False, choose_from=60)
    take, taken, told = gradient_sketches.sketch, list[int](), list[tuple[int, int]]()

    class Told(Silent):
        def count(self, label: str, done: int, total: int) -> None:
            told.append((done, total))

    def sketch(loaded, examples, *how):
        if len(taken) == stop:
            raise KeyboardInterrupt
        taken.append(len(examples))
        return take(loaded, examples, *how)

    def found(folder: Path):
        kept = Session(loaded, settings, folder, Told())
        return made_rows.with_gradients(kept, rows, [resolve(ARMS["tell"], rows, settings)])

    monkeypatch.setattr(gradient_sketches, "sketch", sketch)
    stop = 99
    whole = found(tmp_path / "whole")
    assert taken == [30] * 6 + [24]
    assert told[-1] == (204, 204)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    taken, stop = [], 2
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path / "killed")
    (tmp_path / "killed" / "general" / "gradients-seed0" / "0001.npz").write_bytes(b"half")
    taken, stop = [], 99
    again = found(tmp_path / "killed")
    assert taken == [30] * 5 + [24]
    assert list(again.gradients) == list(whole.gradients)
    assert all(
        np.array_equal(again.gradients[key], whole.gradients[key]) for key in whole.gradients
    )
    taken = []
    assert found(tmp_path / "killed").notes == again.notes
    assert taken == []


def test_own_answers_are_to_rows_as_drawn(tmp_path: Path) -> None:
    save_task(tmp_path, 12, 4)
    compare = {"arms": ["sft", "tell", "placebo_own_answers"]}
    settings = comparison_settings(
        tmp_path, tmp_path / "out", mix={"select": "similar"}, compare=compare
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"placebo_own_answers answers rows of the pool as they are drawn, and mix.select: "
            r"similar"
        ),
    ):
        chosen_arms(settings)


def test_a_pool_that_leaves_no_choice_says_so(tmp_path: Path) -> None:
    save_task(tmp_path, 12, 4)
    settings = comparison_settings(
        tmp_path, tmp_path / "out", mix={"select": "similar", "general_per_task": 16, "repeats": 1}
    )
    rows = run_data.prepare(settings, tiny_tokenizer(), CONTEXT, 0, dev_apart=False, choose_from=10)
    assert len(rows.general) == 192
    assert (
        len(rows.candidates) == 254
    )  # all of 256 but those held out, since ten would be no choice
    assert any(
        "among 254 that are usable, for mixtures of up to 192: that is hardly a choice" in note
        for note in rows.notes
    )


@pytest.mark.e2e
def test_arms_choose_by_the_task_rows_they_train_on_alone(tmp_path: Path) -> None:
    """Every view (size, fold) chooses anew, by its own rows; what was chosen by gradient is the
    same when resumed."""
    save_task(tmp_path, 12, 4)
    names = ["sft", "tell", "tell_similar", "tell_gradient", "tell_diverse"]
    settings = comparison_settings(
        tmp_path,
        tmp_path / "out",
        compare={"sizes": [4, 8], "folds": 2, "arms": [*names[:2], *map(arm_named, names[2:])]},
        mix={"general_per_task": 2, "repeats": 1, "choose_from": 60},
    )
    results = run_comparison(settings)
    assert {arm.arm for arm in results.arms} == set(names)
    (note,) = (note for note in results.notes if "to choose general rows" in note)
    assert note.startswith(
        "seed 0: to choose general rows the gradients of 72 rows were taken, "
    )  # 64 of 4 x 16 candidates, 8 task rows
    before = (tmp_path / "out" / "certificate.json").read_bytes()
    for cell in (tmp_path / "out" / "cells").glob("tell_gradient-*"):
        cell.unlink()
    run_comparison(settings, resume=True)
    assert (tmp_path / "out" / "certificate.json").read_bytes() == before
    tokenizer = tiny_tokenizer()
    rows = run_data.prepare(settings, tokenizer, CONTEXT, 0, dev_apart=False, choose_from=60)
    similar = arm_named("tell_similar")
    assert rows.candidates[: len(rows.general)] == rows.general
    chosen = {size: resolve(similar, rows.at(size), settings).general_rows for size in (4, 8)}
    assert all(len(own) == len(rows.general) for own in chosen.values())
    first, *_ = rows.at(8).folds(2, 0)
    assert resolve(similar, first, settings).general_rows != chosen[8]
