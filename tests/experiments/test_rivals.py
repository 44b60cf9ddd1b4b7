"""What rivals of TELL do to the training: averaged adapters, a distance to the base model, one
source after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fulcrum.config.arms import ARMS
from fulcrum.core.types import Anchor, Hyperparameters
from fulcrum.data import encode
from fulcrum.experiments import cell
from fulcrum.experiments.arm_data import resolve
from fulcrum.model import adapter
from fulcrum.model.adapter import State
from fulcrum.model.base_model import LoadedModel
from fulcrum.training import loop
from helpers.cells import chosen, made
from helpers.rival_gradients import compare_gradients, logits_of
from helpers.tiny import arm_named, load_tiny, session, tiny_settings, tiny_tokenizer


def fitted(loaded: LoadedModel, name: str, setting: Hyperparameters, **train: Any) -> State:
    """The adapter of an arm on all rows, in Fulcrum's own way."""
    arm = ARMS[name].model_copy(update={"train": train})
    cell.fit(session(loaded, chosen()), resolve(arm, made(), chosen()), setting, 0, name)
    return adapter.adapter_state(loaded)


# Averaged adapters.


def deltas(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, by PEFT's own account."""
    return {
        name: module.get_delta_weight("default").detach().clone()
        for name, module in loaded.peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_soup_is_the_mean_of_its_members_times_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, rank_stabilised: bool
) -> None:
    members: list[dict[str, torch.Tensor]] = []
    known = loop.train

    def watched(loaded: LoadedModel, *args: Any, **options: Any) -> Any:
        found = known(loaded, *args, **options)
        members.append(deltas(loaded))
        return found

    monkeypatch.setattr(loop, "train", watched)
    loaded = load_tiny(tmp_path)
    state = fitted(loaded, "soup", Hyperparameters(1, scale=scale), use_rslora=rank_stabilised)
    merged = deltas(loaded)
    assert len(members) == 3
    assert len(merged) == 14  # seven matrices in each of two layers
    for name, found in merged.items():
        parts = [member[name] for member in members]
        assert not torch.equal(parts[0], parts[1])
        assert not torch.equal(parts[1], parts[2])
        torch.testing.assert_close(found, scale * sum(parts) / 3, rtol=0, atol=1e-6)
        assert float(found.abs().max()) > 1e-4
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name} == {
        12
    }  # three of rank 4


# The distance to the base model.


def test_without_weight_the_distance_changes_no_bit(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    plain, zero, some = (
        fitted(loaded, name, Hyperparameters(2, kl=kl))
        for name, kl in (("sft_anchor", 0.0), ("sft_kl", 0.0), ("sft_kl", 0.5))
    )
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert not all(torch.equal(plain[name], some[name]) for name in plain)


@pytest.mark.parametrize("head", ["apart", "everywhere"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_gradient_with_the_distance_is_autograds(tmp_path: Path, kind: str, head: str) -> None:
    loaded = load_tiny(tmp_path, kind)
    loaded.split_head = loaded.split_head and head != "everywhere"
    compare_gradients(loaded, "all-linear")


def test_a_heavy_distance_keeps_the_adapter_near_the_base(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    form = encode.make_format(loaded.tokenizer, Anchor("Name it."))
    examples = [encode.encode(example, form) for example in made().tasks[0].train]
    apart = []
    for weight in (0.0, 1.0, 30.0):
        fitted(loaded, "sft_kl", Hyperparameters(6, kl=weight))
        total = 0.0
        for example in examples:
            with torch.no_grad():
                tuned = logits_of(loaded, example.ids).log_softmax(-1)
                with loaded.peft.disable_adapter():
                    base = logits_of(loaded, example.ids).log_softmax(-1)
            total += float(
                (base.exp() * (base - tuned)).sum(-1)[:-1][example.loss_mask[1:]].sum()
            )  # where it is weighed
        apart.append(total)
    assert apart[0] > apart[1] > apart[2] > 0
    assert apart[2] < apart[0] / 2


# One source after the other.


def test_each_phase_has_its_own_schedule() -> None:
    rates = [
        loop.learning_rate(step, (4, 10), tiny_settings(learning_rate=1.0, warmup=0.2))
        for step in range(14)
    ]
    np.testing.assert_allclose(rates[:4], [1.0, 0.7, 0.4, 0.1])
    np.testing.assert_allclose(rates[4:], [0.5, 1.0, *(1 - 0.9 * k / 8 for k in range(1, 9))])


@pytest.mark.parametrize(
    ("name", "phases"),
    [("general_then_task", (6, 3)), ("task_then_general", (3, 6)), ("tell", (9,))],
)
def test_training_starts_anew_where_the_source_changes(
    tmp_path: Path, name: str, phases: tuple[int, ...]
) -> None:
    """12 task positions and 24 general ones, 4 a step."""
    (result,) = cell.fit(
        session(load_tiny(tmp_path), chosen()),
        resolve(arm_named(name), made(), chosen()),
        Hyperparameters(2),
        0,
        name,
    )
    decays = {
        3: (1, 0.55, 0.1),
        6: (1, 0.82, 0.64, 0.46, 0.28, 0.1),
        9: (1, *(1 - 0.9 * k / 8 for k in range(1, 9))),
    }
    expected = [0.01 * rate for steps in phases for rate in decays[steps]]  # a step of warm-up each
    np.testing.assert_allclose([point.learning_rate for point in result.history], expected)
    if len(phases) == 2:
        ahead = [
            (point.task_loss, point.general_loss)[name == "task_then_general"]
            for point in result.history[: phases[0]]
        ]
        assert ahead == [None] * phases[0]


def test_general_rows_alone_are_no_task_row(tmp_path: Path) -> None:
    alone = arm_named("general_only")
    stream = resolve(alone, made(), chosen()).stream(tiny_tokenizer(), 2, 0)
    assert list(stream.task) == []
    assert (stream.share().task_examples, stream.share().general_examples) == (0, 24)
    _, ids = stream.plan.slice(0, 24)
    assert sorted(ids) == list(range(24))
    (result,) = cell.fit(
        session(load_tiny(tmp_path), chosen()),
        resolve(alone, made(), chosen()),
        Hyperparameters(2),
        0,
        "x",
    )
    assert (result.steps, {point.task_loss for point in result.history}) == (6, {None})
