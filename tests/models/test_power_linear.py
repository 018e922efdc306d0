"""Linear layers under a power, against the equations of SparsyFed (arXiv 2504.05153, section 3.2)."""

import math

import pytest
import torch
from torchtitan.models.common import Linear

from titan_ext.models.power_linear import PowerLinear, PowerLinearConverter, power


def layer(exponent: float = 1.25, prune: bool = True, seed: int = 0) -> PowerLinear:
    torch.manual_seed(seed)
    return PowerLinear.Config(
        in_features=12, out_features=8, bias=True, exponent=exponent, prune_activations=prune
    ).build()


def gradients(module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    out.backward(upstream)
    return [out.detach(), x.grad, *(each.grad for each in module.parameters())]


@pytest.mark.parametrize("zeros", [0, 30, 90, 96])
@pytest.mark.parametrize("exponent", [1.0, 1.25, 2.0])
def test_forward_is_exact_and_the_gradient_sees_the_largest_activations(exponent: float, zeros: int) -> None:
    module = layer(exponent)
    with torch.no_grad():
        module.weight.view(-1)[:zeros] = 0.0
    x, upstream = torch.randn(2, 5, 12), torch.randn(2, 5, 8)
    out, dx, dw, db = gradients(module, x, upstream)
    stored = module.weight.detach().double()
    acting = stored.sign() * stored.abs() ** exponent
    torch.testing.assert_close(
        out.double(), x.double() @ acting.T + module.bias.double().detach(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(dx.double(), upstream.double() @ acting, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(db, upstream.sum((0, 1)))
    kept = max(1, math.ceil(max(1 - zeros / 96, 1e-7) * x.numel()))
    least = x.abs().flatten().sort(descending=True).values[kept - 1]
    seen = torch.where(x.abs() >= least, x, 0.0).double()
    outer = torch.einsum("blo,bli->oi", upstream.double(), seen)
    slope = exponent * stored.abs() ** (exponent - 1) if exponent != 1 else torch.ones_like(stored)
    torch.testing.assert_close(dw.double(), outer * slope, rtol=1e-5, atol=1e-5)
    if exponent > 1:
        assert not dw.view(-1)[:zeros].any()


def test_dense_weights_and_evaluation_leave_nothing_out() -> None:
    x, upstream = torch.randn(2, 5, 12), torch.randn(2, 5, 8)
    for pruning, plain in zip(gradients(layer(), x, upstream), gradients(layer(prune=False), x, upstream)):
        torch.testing.assert_close(pruning, plain)
    module = layer()
    with torch.no_grad():
        module.weight.view(-1)[:60] = 0.0
        expected = torch.nn.functional.linear(x, power(module.weight, 1.25), module.bias)
    assert torch.equal(module(x), expected) and torch.equal(module.eval()(x), expected)


def test_an_exponent_of_one_is_an_ordinary_layer() -> None:
    torch.manual_seed(0)
    ordinary = Linear.Config(in_features=12, out_features=8, bias=True).build()
    x, upstream = torch.randn(2, 5, 12), torch.randn(2, 5, 8)
    for found, wanted in zip(gradients(layer(1.0), x, upstream), gradients(ordinary, x, upstream)):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(layer(1.0)(x), ordinary(x))


def test_a_converted_model_begins_with_the_weights_that_act_as_before() -> None:
    from titan_ext.models.llama3 import flavors, model_registry

    assert "tiny" in flavors
    plain, converted = (model_registry("tiny", vocab_size=64).model for _ in range(2))
    converted = PowerLinearConverter.Config(exponent=1.5).build().convert(converted)
    models = []
    for config in (plain, converted):
        torch.manual_seed(0)
        model = config.build()
        model.init_states()
        models.append(dict(model.named_parameters()))
    touched = [name for name in models[0] if not torch.equal(models[0][name], models[1][name])]
    assert touched and all(".attention." in name or ".feed_forward." in name for name in touched)
    for name in touched:
        torch.testing.assert_close(power(models[1][name].detach(), 1.5), models[0][name].detach(), rtol=1e-4, atol=1e-7)
    assert not any("norm" in name or "lm_head" in name or "tok_embeddings" in name for name in touched)


def test_settings_that_cannot_be_are_refused() -> None:
    from titan_ext.models.llama3 import model_registry

    with pytest.raises(ValueError, match="exponent"):
        PowerLinearConverter.Config(exponent=0.5).build()
    with pytest.raises(ValueError, match="no linear layer"):
        PowerLinearConverter.Config(modules=["nothing.*"]).build().convert(model_registry("tiny", vocab_size=64).model)
