"""AbbIE to the standard decoder and back, and the Hugging Face layout."""

import pytest
import torch

from tests.models.abbie_models import batch, build, initialised
from titan_ext.errors import UserError
from titan_ext.models.abbie import model_registry
from titan_ext.models.abbie.convert import decoder_config, from_decoder, to_decoder


def loaded(config, state) -> torch.nn.Module:
    model = initialised(config, seed=9)
    model.load_state_dict(state)
    return model


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("skip, r", [("prev", 1), ("input", 1), ("none", 1), ("none", 2), ("none", 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(skip, r, tied):
    ours = build(skip=skip, enable_weight_tying=tied)
    config = ours.config
    decoder = loaded(decoder_config(config, r), to_decoder(ours.state_dict(), config, r))
    assert len(decoder.layers) == 3 + 2 * r
    assert torch.equal(decoder(**batch()), ours(**batch(), iterations=r))
    assert equal(from_decoder(decoder.state_dict(), config, r), ours.state_dict())


def test_a_trained_standard_decoder_becomes_abbie():
    standard = build("llama3", seed=4)
    ours = loaded(build().config, from_decoder(standard.state_dict(), build().config))
    assert torch.equal(ours(**batch(), iterations=1), standard(**batch()))
    assert not torch.equal(ours(**batch(), iterations=2), standard(**batch()))


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
    for convert in (to_decoder, from_decoder):
        with pytest.raises(UserError) as caught:
            convert(model.state_dict(), model.config, r)
        assert all(word in str(caught.value) for word in words)


def test_a_decoder_that_iterates_nothing_is_refused():
    config = build(skip="none").config
    deeper = initialised(decoder_config(config, 2)).state_dict()
    with pytest.raises(UserError, match="first copy"):
        from_decoder(deeper, config, 2)
    with pytest.raises(UserError, match="decoder of 5 blocks"):
        from_decoder(deeper, config, 1)


def test_hugging_face_layout(tmp_path):
    spec = model_registry("tiny", n_layers=5)
    state = initialised(spec.model).state_dict()
    adapter = spec.state_dict_adapter(spec.model, str(tmp_path))
    exported = adapter.to_hf(state)
    assert exported["model.layers.4.self_attn.q_proj.weight"].shape == (96, 96)
    assert equal(adapter.from_hf(exported), state)
    assert model_registry("tiny-depth").state_dict_adapter is None
