"""The fused LoRA layer gives what PEFT's gives: values, gradients, merged weights; special cases go
PEFT's own way."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from fulcrum.model import adapter
from fulcrum.model.adapter import LoraLinear


def pair(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, **options
) -> tuple[nn.Module, nn.Module]:
    """One layer with one adapter, as PEFT makes it and as we do."""
    made = []
    for ours in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False, **options
        )
        if ours:
            config._register_custom_module({nn.Linear: LoraLinear})
        made.append(
            get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype)), config).eval()
        )
    layers = [model.base_model.model[0] for model in made]
    assert [type(layer) for layer in layers] == [Linear, LoraLinear]
    return made[0], made[1]


def values_and_gradients(
    model: nn.Module, x: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """`dtype`: in which autocast lets products run, as in training."""
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = model(x)
    model.zero_grad()
    (y.float() ** 2).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"bias": False}])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24)])
def test_values_and_gradients_are_pefts(options: dict, shape: tuple[int, ...]) -> None:
    peft, ours = pair(**options)
    x = torch.randn(shape)
    expected = values_and_gradients(peft, x, torch.float32)
    for name, tensor in values_and_gradients(ours, x, torch.float32).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max())
        )


def test_in_bfloat16_it_is_as_near_to_float32_as_peft() -> None:
    x = torch.randn(300, 24).bfloat16()
    exact = values_and_gradients(pair(torch.bfloat16)[0].float(), x.float(), torch.float32)
    peft, ours = (values_and_gradients(model, x, torch.bfloat16) for model in pair(torch.bfloat16))
    for name, value in exact.items():
        distance = [
            float((found[name].float() - value).norm() / value.norm()) for found in (peft, ours)
        ]
        assert distance[0] < 0.02
        assert distance[1] < 1.2 * distance[0], name


def test_an_input_without_gradient_gets_none() -> None:
    _, ours = pair()
    ours(torch.randn(3, 24)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}]
)
def test_special_cases_are_left_to_peft(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, ours = pair(**options)
    monkeypatch.setattr(
        adapter._Product, "apply", lambda *_: pytest.fail("the fused product was used")
    )
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), peft(x))


def test_an_adapter_that_is_off_or_merged_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    peft, ours = pair()
    x = torch.randn(5, 24)
    adapted = ours(x)
    with ours.disable_adapter(), peft.disable_adapter():
        torch.testing.assert_close(ours(x), peft(x))
        assert not torch.allclose(ours(x), adapted)
    ours.merge_adapter()
    monkeypatch.setattr(
        adapter._Product, "apply", lambda *_: pytest.fail("the adapter would be added twice")
    )
    torch.testing.assert_close(ours(x), adapted, rtol=1e-5, atol=1e-5)


class Halved(nn.Linear):
    """A layer whose output is not the plain product of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_layers_that_are_more_than_a_product_keep_their_own_forward() -> None:
    config = LoraConfig(r=4, target_modules=["0", "1"])
    config._register_custom_module({nn.Linear: LoraLinear})
    base = nn.Sequential(Halved(8, 8), nn.Linear(8, 8))
    calls: list[int] = []
    base[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 8)
    expected = base(x)
    torch.testing.assert_close(
        get_peft_model(base, config)(x), expected
    )  # a fresh adapter adds nothing
    assert calls == [1, 1]


def test_a_layer_kept_in_float32_works_under_autocast() -> None:
    peft, ours = pair(torch.float32)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), peft(x))
