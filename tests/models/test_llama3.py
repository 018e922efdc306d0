"""The Llama 3 spec against torchtitan's own, and its errors."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.llama3 import flavors


def shapes(spec) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in spec.model.build().state_dict().items()}


@pytest.mark.parametrize("flavor", ["debugmodel", "1B", "3B", "8B", "70B", "405B"])
def test_sizes_are_torchtitans(flavor):
    from torchtitan.models.llama3 import model_registry

    ours, theirs = get_model_spec("llama3", flavor), model_registry(flavor)
    assert shapes(ours) == shapes(theirs)
    # torchtitan turns Llama 3.2's sizes by the factor of 3.1.
    factor = 32.0 if flavor in ("1B", "3B") else 8.0
    assert ours.model.layers[0].attention.rope == replace(theirs.model.layers[0].attention.rope, scaling_factor=factor)
    assert ours.model.enable_weight_tying == theirs.model.enable_weight_tying


def test_same_seed_same_weights_as_torchtitan():
    """The initialisation is torchtitan's, draw for draw."""
    from torchtitan.models.llama3 import model_registry

    def weights(spec):
        with torch.device("meta"):
            model = spec.model.build()
        model.to_empty(device="cpu")
        torch.manual_seed(5)
        with torch.no_grad():
            model.init_weights()
        return model.state_dict()

    ours, theirs = weights(get_model_spec("llama3", "debugmodel")), weights(model_registry("debugmodel"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["llama3", "abbie"])
def test_operations_are_counted_for_any_head_width(name):
    """Heads of twice the width cost attention twice as much beside their matrices, in each iteration."""

    def counted(head_dim: int | None) -> tuple[int, int]:
        config = get_model_spec(name, "tiny", head_dim=head_dim).model
        with torch.device("meta"):
            model = config.build()
        parameters, operations = config.get_nparams_and_flops(model, 128)
        matrices = config.get_nparams_and_flops(model, 0)[1]
        return parameters, operations - matrices

    plain, same, wide = counted(None), counted(24), counted(48)
    assert plain == same and wide[0] > plain[0] and wide[1] == 2 * plain[1] > 0


def test_overrides_reach_every_part():
    spec = get_model_spec(
        "llama3", "tiny", dim=64, n_layers=3, n_heads=8, n_kv_heads=4, ffn_dim=160, vocab_size=300, max_seq_len=512
    )
    found = shapes(spec)
    assert found["tok_embeddings.weight"] == found["lm_head.weight"] == (300, 64)
    assert found["layers.2.feed_forward.w1.weight"] == (160, 64)
    assert "layers.3.attention_norm.weight" not in found
    assert spec.model.layers[0].attention.rope.max_seq_len == 512
    tied = get_model_spec("llama3", "tiny", enable_weight_tying=True).model
    with torch.device("meta"):
        model = tied.build()
    assert model.tok_embeddings.weight is model.lm_head.weight


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(name="lama3", flavor="tiny"), ["model.name", "llama3"]),
        (dict(name="llama3", flavor="tinny"), ["model.flavor", "did you mean 'tiny'"]),
        (dict(name="llama3", flavor="tiny", n_layer=3), ["n_layer", "did you mean 'n_layers'"]),
        (dict(name="llama3", flavor="tiny", n_heads=5), ["model.n_heads = 5", "model.dim (96)"]),
        (dict(name="llama3", flavor="tiny", n_kv_heads=3), ["model.n_kv_heads = 3"]),
        (dict(name="llama3", flavor="tiny", n_layers=0), ["model.n_layers = 0", "above 0"]),
        (dict(name="no.such.package", flavor="tiny"), ["no.such.package", "cannot import"]),
        (dict(name="os.path", flavor="tiny"), ["os.path", "no model_registry"]),
    ],
)
def test_errors_name_the_key_and_the_fix(call, words):
    with pytest.raises(UserError) as caught:
        get_model_spec(**call)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_users_own_package_is_a_model(monkeypatch):
    package = types.ModuleType("users.own")
    package.model_registry = lambda flavor, **overrides: ("spec", flavor, overrides)
    monkeypatch.setitem(sys.modules, "users", types.ModuleType("users"))
    monkeypatch.setitem(sys.modules, "users.own", package)
    assert get_model_spec("users.own", "small", depth=3) == ("spec", "small", {"depth": 3})


@pytest.mark.parametrize("flavor", flavors)
def test_torchtitans_own_entry_point_finds_every_flavor(flavor):
    from torchtitan.config import ConfigManager

    arguments = ["--module", "titan_ext.models.llama3", "--config", f"llama3_{flavor.lower()}", "--training.steps", "7"]
    config = ConfigManager().parse_args([*arguments, "--semi_sync.sync_every", "5", "--hf_assets_path", "."])
    assert config.training.steps == 7
    assert config.semi_sync.sync_every == 5
    assert config.model_spec.flavor == flavor
