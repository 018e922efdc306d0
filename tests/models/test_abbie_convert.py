"""AbbIE to the standard decoder and back, and the Hugging Face layout."""

import pytest
import torch

from tests.models.abbie_models import batch, build, initialised
from titan_ext.errors import UserError
from titan_ext.models.abbie import model_registry
from titan_ext.models.abbie.convert import decoder_config, to_decoder, unroll


def loaded(config, state) -> torch.nn.Module:
    model = initialised(config, seed=9)
    model.load_state_dict(state)
    return model


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("skip, r", [("prev", 1), ("input", 1), ("none", 1), ("none", 2), ("none", 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_computes_the_same(skip, r, tied):
    ours = build(skip=skip, enable_weight_tying=tied)
    config = ours.config
    decoder = loaded(decoder_config(config, r), to_decoder(ours.state_dict(), config, r))
    assert len(decoder.layers) == 3 + 2 * r
    assert torch.equal(decoder(**batch()), ours(**batch(), iterations=r))


def test_a_trained_standard_decoder_becomes_abbie_and_an_abbie_one():
    standard = build("llama3", seed=4)
    ours = loaded(build().config, standard.state_dict())
    assert torch.equal(ours(**batch(), iterations=1), standard(**batch()))
    assert not torch.equal(ours(**batch(), iterations=2), standard(**batch()))
    assert equal(to_decoder(ours.state_dict(), ours.config), standard.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_unrolled_parameters_are_those_of_the_decoder(tied):
    spec = model_registry("tiny", n_layers=5, head_layers=1, body_layers=2, skip="none", enable_weight_tying=tied)
    ours = initialised(spec.model)
    decoder, deeper = unroll(ours, spec, 3)
    assert equal(decoder.state_dict(), to_decoder(ours.state_dict(), spec.model, 3))
    assert deeper.model == decoder_config(spec.model, 3)


@pytest.mark.parametrize(
    "overrides, r, words",
    [
        ({"skip": "prev"}, 2, ["model.skip", "2 iterations"]),
        ({"skip": "none", "between": "norm"}, 2, ["model.between", "norm"]),
        ({"final_skip": True}, 1, ["model.final_skip", "one iteration"]),
        ({"variant": "depth"}, 1, ["model.variant", "depth"]),
    ],
)
def test_what_is_no_standard_decoder_is_refused(overrides, r, words):
    model = build(**overrides)
    with pytest.raises(UserError) as caught:
        to_decoder(model.state_dict(), model.config, r)
    assert all(word in str(caught.value) for word in words)


def test_hugging_face_layout(tmp_path):
    spec = model_registry("tiny", n_layers=5)
    state = initialised(spec.model).state_dict()
    adapter = spec.state_dict_adapter(spec.model, str(tmp_path))
    exported = adapter.to_hf(state)
    assert exported["model.layers.4.self_attn.q_proj.weight"].shape == (96, 96)
    assert equal(adapter.from_hf(exported), state)
    assert model_registry("tiny-depth").state_dict_adapter is None
