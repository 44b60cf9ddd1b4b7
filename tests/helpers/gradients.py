"""Compute losses and gradients our way and as plain Transformers do."""

import numpy as np
import torch
import torch.nn.functional as functional
from peft import get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fulcrum.core.types import Tokens
from fulcrum.model import adapter, base_model, loss
from fulcrum.model.packing import BLOCK
from helpers.tiny import WINDOW


def tokens(length: int, seed: int, supervised: float = 0.6) -> Tokens:
    """Random ids; about `supervised` of them are targets, the last one always."""
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < supervised
    mask[-1] = True
    return Tokens(rng.integers(4, 360, length), mask)


def shaken_adapter(loaded: base_model.LoadedModel, settings) -> None:
    """A LoRA adapter whose B matrices are not zero, so that every adapter weight has a gradient."""
    adapter.new_adapter(loaded, settings, 0)
    generator = torch.Generator().manual_seed(1)
    state = adapter.adapter_state(loaded)
    adapter.set_adapter_state(
        loaded, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    )


def stock_losses_and_gradients(
    loaded: base_model.LoadedModel, settings, examples: list[Tokens], dtype: str = "float32"
):
    """The same adapter on the model as Transformers loads it, eager attention, one example at a
    time, no code of ours."""
    causal = AutoModelForCausalLM.from_pretrained(
        loaded.path, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    peft = get_peft_model(causal, adapter.lora_config(loaded, settings))
    set_peft_model_state_dict(peft, adapter.adapter_state(loaded))
    peft.eval()
    total = sum(int(e.loss_mask[1:].sum()) for e in examples)
    nats = []
    for example in examples:
        ids = torch.as_tensor(example.ids)[None]
        labels = torch.where(torch.as_tensor(example.loss_mask), ids[0], -100)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = peft(input_ids=ids).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, labels[1:], reduction="sum")
        (losses / total).backward()
        nats.append(float(losses.detach()))
    return nats, {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}


def our_losses_and_gradients(loaded: base_model.LoadedModel, examples: list[Tokens], budget: int):
    rows = loss.rows(examples, loaded, budget)
    total = sum(len(row.labels) for row in rows)
    nats = np.zeros(len(examples))
    loaded.peft.zero_grad()
    for row in rows:
        value, each = loss.row_loss(loaded, row, torch.full((len(row.labels),), 1 / total))
        value.backward()
        np.add.at(nats, row.owner.numpy(), each.numpy())
    return (
        nats,
        {n: p.grad.clone() for n, p in loaded.peft.named_parameters() if p.requires_grad},
        len(rows),
    )


def same_gradients(found, expected, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        # Of the tensor's largest entry: its smallest ones are sums in which larger ones cancel.
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def sharing_examples(longest: int = 5 * WINDOW) -> list[Tokens]:
    """A header that all but one share, an anchor that three share, one example twice; targets in
    shared tokens too."""
    header, anchor = tokens(BLOCK + 1, 90), tokens(2 * BLOCK + 4, 91)
    own = [tokens(length, seed) for seed, length in enumerate((5, longest, 2, 3 * WINDOW))]
    parts = [
        [header, own[0]],
        [header, anchor, own[1]],
        [header, anchor, own[2]],
        [own[3]],
        [header, anchor, own[3]],
        [own[3]],
    ]
    return [
        Tokens(np.concatenate([p.ids for p in row]), np.concatenate([p.loss_mask for p in row]))
        for row in parts
    ]
