"""muP: standard deviations, learning rates and attention scale by the table, and changes that do not grow with the width."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchtitan.components.optimizer import ParamGroupConfig

from titan_ext.experiments.models import initialised, loss_of, small_sizes
from titan_ext.experiments.mup.arms import Settings
from titan_ext.experiments.mup.train import build_optimizer, coordinates, growth
from titan_ext.experiments.text import Batch
from titan_ext.models import get_model_spec
from titan_ext.models.mup import MupConverter
from titan_ext.trainer.optimizers import OptimizersContainer

SETTINGS = Settings(base_dim=32, layers=2, steps=10, batch=4, length=32, corpus="builtin:docs", device="cpu")


def build(dim: int, layers: int = 2, **settings: float) -> torch.nn.Module:
    sizes = small_sizes(dim, layers, 32)
    spec = get_model_spec("llama3", "tiny", vocab_size=264, enable_weight_tying=False, **sizes)
    return initialised(MupConverter.Config(**settings).build().convert(spec.model), 0, "cpu")


@pytest.mark.parametrize(("dim", "base"), [(128, 128), (256, 64)])
def test_matrices_start_as_the_table_says(dim: int, base: int) -> None:
    model, times = build(dim, base_dim=base, init_std=0.05), dim / base
    cut = 0.98658  # what is left of a normal distribution's deviation that is cut at three of them
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.startswith("tok_embeddings"):
            continue
        wanted = base**-0.5 / times if name.startswith("lm_head") else 0.05 / math.sqrt(times)
        assert parameter.std().item() == pytest.approx(cut * wanted, rel=0.03), name
    assert model.tok_embeddings.weight.std().item() == pytest.approx(1.0, rel=0.03)


def test_learning_rates_are_divided_by_how_much_wider_the_model_is_and_by_the_users_groups() -> None:
    model = build(128, layers=4, base_dim=32, base_layers=2)
    groups = [
        ParamGroupConfig(pattern="norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1.0, "weight_decay": 0.0}),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.8}),
    ]
    container = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(model_parts=[model])
    rates = {
        name: group["lr"]
        for optimizer in container.optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        wanted = 0.8 / 4
        if "norm" in name:
            wanted = 1.0
        elif name.startswith("tok_embeddings"):
            wanted = 0.8
        elif ".wo." in name or ".w2." in name:
            wanted = 0.8 / 4 * 2 / 4
        assert rate == pytest.approx(wanted), name


def test_a_model_without_rules_keeps_its_groups() -> None:
    model = initialised(get_model_spec("llama3", "tiny", vocab_size=64, **small_sizes(32, 1, 32)).model, 0, "cpu")
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.8})
    container = OptimizersContainer.Config(param_groups=[group], implementation="for-loop").build(model_parts=[model])
    assert [len(each.param_groups) for each in container.optimizers] == [1]


def test_a_branchs_factor_is_one_of_its_matrix_and_its_rate() -> None:
    """A branch times 1/2 trains as a matrix half as large at half the rate: Adam does not see the gradient's scale."""
    torch.manual_seed(0)
    whole, half = torch.randn(8, 8, requires_grad=True), None
    half = (whole.detach() / 2).requires_grad_()
    inputs, wanted = torch.randn(32, 8), torch.randn(32, 8)
    runs = [
        (whole, 0.5, torch.optim.Adam([whole], lr=1e-2, eps=0)),
        (half, 1.0, torch.optim.Adam([half], lr=5e-3, eps=0)),
    ]
    for _ in range(20):
        for weight, factor, optimizer in runs:
            optimizer.zero_grad()
            (factor * (inputs @ weight) - wanted).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(0.5 * whole, half)


def test_logits_are_scaled_by_the_width_of_heads() -> None:
    plain, scaled = build(64, base_dim=64), build(64, base_dim=64, base_head_dim=8)
    inputs = torch.randint(0, 264, (1, 32), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs, inputs.roll(-1, 1), torch.arange(32).expand(1, 32))
    assert scaled.layers["0"].attention.scaling == pytest.approx(8**0.5 / 32)
    scaled.load_state_dict(plain.state_dict())
    assert loss_of(scaled, batch).item() != loss_of(plain, batch).item()
    for layer in scaled.layers.values():
        layer.attention.scaling = 32**-0.5
    assert loss_of(scaled, batch).item() == pytest.approx(loss_of(plain, batch).item(), rel=1e-6)


def test_changes_do_not_grow_with_the_width_under_mup_and_do_without() -> None:
    powers = {
        arm: growth(coordinates(SETTINGS, arm, [32, 64, 128, 256], lr=1e-2, steps=3, seed=0))
        for arm in ("mup", "standard")
    }
    assert max(powers["mup"].values()) < 0.25, powers
    assert powers["standard"]["lm_head"] > 0.4, powers


def test_the_experiments_optimizer_has_the_same_rates() -> None:
    model = build(64, base_dim=32)
    rates = {id(each): group["lr"] for group in build_optimizer(model, 1.0).param_groups for each in group["params"]}
    assert rates[id(model.lm_head.weight)] == 0.5 and rates[id(model.tok_embeddings.weight)] == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"base_dim": 0}, "base_dim = 0"), ({"base_layers": -1}, "base_layers"), ({"init_std": 0.0}, "init_std")],
)
def test_settings_out_of_range_are_named(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MupConverter.Config(**settings).build()


def test_models_without_rules_are_refused() -> None:
    convert = MupConverter.Config(base_dim=32).build().convert
    tied = get_model_spec("llama3", "tiny", vocab_size=64, enable_weight_tying=True, **small_sizes(32, 1, 32))
    with pytest.raises(ValueError, match="head of its own"):
        convert(tied.model)
    with pytest.raises(ValueError, match="experts"):
        convert(get_model_spec("qwen3", "debugmodel_moe").model)
    with pytest.raises(ValueError, match="layers"):
        convert(SimpleNamespace(_owner=SimpleNamespace))
