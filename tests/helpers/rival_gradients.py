"""Compare gradients of two ways to train."""

from typing import Any

import numpy as np
import torch

from fulcrum.model import loss
from fulcrum.model.base_model import LoadedModel
from helpers.gradients import same_gradients, shaken_adapter, sharing_examples
from helpers.tiny import tiny_settings


def logits_of(loaded: LoadedModel, ids: np.ndarray) -> torch.Tensor:
    return loaded.causal(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]


def compare_gradients(loaded: LoadedModel, targets: Any) -> None:
    shaken_adapter(loaded, tiny_settings(lora_target_modules=targets))
    examples = sharing_examples()
    weights = [0.1 + 0.05 * k for k in range(len(examples))]

    loaded.peft.zero_grad()
    cross = torch.zeros(())
    for example, weight in zip(examples, weights, strict=True):
        with torch.no_grad(), loaded.peft.disable_adapter():
            base = logits_of(loaded, example.ids)[:-1].softmax(-1)
        tuned = logits_of(loaded, example.ids)[:-1].log_softmax(-1)
        kept = torch.as_tensor(example.loss_mask[1:])
        nats = -tuned[kept, torch.as_tensor(example.ids[1:])[kept]]
        apart = (base * (base.log() - tuned)).sum(-1)[kept]
        (weight * (nats + 0.7 * apart).sum()).backward()
        cross += weight * nats.detach().sum()
    expected = {
        name: p.grad.clone() for name, p in loaded.peft.named_parameters() if p.requires_grad
    }

    loaded.peft.zero_grad()
    total = torch.zeros(())
    for packed in loss.rows(examples, loaded, 1000):
        value, _ = loss.row_loss(loaded, packed, torch.tensor(weights)[packed.owner], kl=0.7)
        value.backward()
        total += value.detach()
    found = {name: p.grad for name, p in loaded.peft.named_parameters() if p.requires_grad}
    torch.testing.assert_close(
        total, cross, rtol=1e-5, atol=0
    )  # what is logged is the cross entropy alone
    same_gradients(found, expected, 1e-4)
