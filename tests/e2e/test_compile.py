"""Compiled layers: the same gradients, in training only, and only where a run is long enough to pay
for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Example, Message
from fulcrum.model import loss
from fulcrum.training import compile
from helpers.gradients import (
    our_losses_and_gradients,
    same_gradients,
    shaken_adapter,
    sharing_examples,
    stock_losses_and_gradients,
)
from helpers.tiny import load_tiny, tiny_settings

EXAMPLE = Example((Message("user", "colour ant"), Message("assistant", "red")), "e", "e:1")
needs_compiler = pytest.mark.skipif(compile._compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_compiled_layers_give_the_gradients_of_the_stock_model(tmp_path: Path) -> None:
    loaded, chosen = load_tiny(tmp_path, "gemma3"), tiny_settings()
    compile.switch_on(loaded, chosen, EXAMPLE)
    assert loaded.facts[-1] == "layers are compiled for training"
    assert len(loaded.compiled) == loaded.causal.config.num_hidden_layers - 1
    shaken_adapter(loaded, chosen)
    examples = sharing_examples()
    counted = torch._dynamo.utils.counters["stats"]["calls_captured"]
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    assert loaded.causal._compiled_call_impl is None
    assert all(layer._compiled_call_impl is None for layer, _ in loaded.compiled)
    # Rows of new lengths meet the compiled code as it is.
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == counted
    expected_nats, expected = stock_losses_and_gradients(loaded, chosen, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


@needs_compiler
def test_compiled_layers_in_bf16_are_as_near_to_fp32_as_those_that_are_not(tmp_path: Path) -> None:
    loaded, chosen = load_tiny(tmp_path, dtype="bfloat16"), tiny_settings(dtype="bfloat16")
    compile.switch_on(loaded, chosen, EXAMPLE)
    shaken_adapter(loaded, chosen)
    examples = sharing_examples()
    _, exact = stock_losses_and_gradients(loaded, chosen, examples)
    _, fast, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    loaded.compiled.clear()
    _, plain, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    ours, theirs = (
        sum(float(((found[n] - exact[n]) ** 2).sum()) for n in exact) for found in (fast, plain)
    )
    assert 0 < ours < 1.5 * theirs
    assert any(not torch.equal(fast[n], plain[n]) for n in exact)  # so it was the compiled code


def test_layers_that_do_not_compile_run_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, chosen = load_tiny(tmp_path), tiny_settings()

    def fails(*_: object) -> None:
        raise RuntimeError("no header files\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(loss, "row_loss", fails)
        compile.switch_on(loaded, chosen, EXAMPLE)
        with pytest.raises(
            ConfigError, match=r"train\.compile is always, but RuntimeError: no header files"
        ):
            compile.switch_on(loaded, tiny_settings(compile="always"), EXAMPLE)
        compile.switch_on(loaded, chosen, EXAMPLE)
    assert (loaded.compiled, loaded.peft) == ([], None)
    assert loaded.facts[-1] == "layers could not be compiled: RuntimeError: no header files"
    shaken_adapter(loaded, chosen)
    _, gradients, _ = our_losses_and_gradients(loaded, sharing_examples(), budget=1000)
    same_gradients(gradients, stock_losses_and_gradients(loaded, chosen, sharing_examples())[1])


def test_only_long_training_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny(tmp_path)
    size = loaded.causal.config.hidden_size * loaded.causal.config.num_hidden_layers
    monkeypatch.setattr(compile, "_compiler", lambda: "/usr/bin/g++")
    assert not compile.wanted(loaded, tiny_settings(), int(compile.PAYS_FROM / size) - 1)
    assert compile.wanted(loaded, tiny_settings(), int(compile.PAYS_FROM / size) + 1)
    assert compile.wanted(loaded, tiny_settings(compile="always"), 1)
    assert not compile.wanted(loaded, tiny_settings(compile="never"), 10**12)
    assert not compile.wanted(loaded, tiny_settings(compile="always"), 0)  # nothing is trained
    monkeypatch.setattr(compile, "_compiler", lambda: None)
    assert not compile.wanted(loaded, tiny_settings(), 10**12)
    with pytest.raises(
        ConfigError, match=r"train.compile is always, but no C\+\+ compiler is installed"
    ):
        compile.wanted(loaded, tiny_settings(compile="always"), 1)
    monkeypatch.undo()
    loaded.packed = False
    with pytest.raises(ConfigError, match="trains one example per row"):
        compile.wanted(loaded, tiny_settings(compile="always"), 1)
