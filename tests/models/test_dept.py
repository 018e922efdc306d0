"""The masked head against the plain one and against a table without padding, and the spec around it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.abbie_models import SMALL, SPLIT, VOCABULARY, batch, initialised
from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.dept import decouple, flavors, model_registry
from titan_ext.models.dept.cost import ModelSize, parameters_held

USED, IGNORED = 41, -100
SIZES = {"llama3": SMALL, "abbie": SMALL | SPLIT}
MODELS = [(name, tied) for name in SIZES for tied in (False, True)]


def model(name: str, tied: bool, used: int | None = None, rows: int = VOCABULARY) -> nn.Module:
    spec = get_model_spec(name, "tiny", **SIZES[name] | {"enable_weight_tying": tied, "vocab_size": rows})
    return initialised((spec if used is None else decouple(spec, used)).model)


def inputs(below: int = USED) -> dict[str, torch.Tensor]:
    given = batch()
    return given | {"tokens": given["tokens"] % below}


def labels() -> torch.Tensor:
    found = batch(1)["tokens"] % USED
    found[:, ::7] = IGNORED
    return found


def loss_of(decoder: nn.Module) -> torch.Tensor:
    """The mean loss, after whose backward the gradients are there."""
    loss = F.cross_entropy(decoder(**inputs()).flatten(0, 1), labels().flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.detach()


def gradients(decoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("name, tied", MODELS)
def test_padding_has_no_probability_and_no_gradient(name, tied):
    masked, plain = model(name, tied, USED), model(name, tied)
    logits = masked(**inputs())
    assert torch.equal(logits[..., :USED], plain(**inputs())[..., :USED])
    assert (logits[..., USED:] == float("-inf")).all()
    assert (logits.softmax(-1)[..., USED:] == 0).all()
    loss_of(masked)
    for weight in (masked.lm_head.weight, masked.tok_embeddings.weight):
        assert not weight.grad[USED:].any() and weight.grad[:USED].any()


@pytest.mark.parametrize("name, tied", MODELS)
def test_loss_and_gradients_are_those_of_a_table_without_padding(name, tied):
    padded, short = model(name, tied, USED), model(name, tied, rows=USED)
    tables = ("tok_embeddings.weight", "lm_head.weight")
    weights = padded.state_dict()
    short.load_state_dict({each: value[:USED] if each in tables else value for each, value in weights.items()})
    torch.testing.assert_close(loss_of(padded), loss_of(short), rtol=1e-6, atol=0)
    ours, theirs = gradients(padded), gradients(short)
    for each in theirs:
        mine = ours[each][:USED] if each in tables else ours[each]
        torch.testing.assert_close(mine, theirs[each], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name, tied", MODELS)
def test_without_padding_it_is_the_plain_model_bit_for_bit(name, tied):
    masked, plain = model(name, tied, VOCABULARY), model(name, tied)
    assert torch.equal(loss_of(masked), loss_of(plain))
    ours, theirs = gradients(masked), gradients(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[each], theirs[each]) for each in ours)


def test_the_chunked_loss_gives_the_same():
    """torchtitan's wrapper calls the head itself, on a part of the sequence at a time."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    whole, chunked = model("llama3", True, USED), model("llama3", True, USED)
    loss = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=CrossEntropyLoss.Config()).build(compile_config=None)
    loss.set_lm_head(chunked.lm_head)
    chunked._skip_lm_head = True
    count = (labels() != IGNORED).sum()
    value, _ = loss(chunked(**inputs()), labels(), count)
    value.backward()
    torch.testing.assert_close(value.detach(), loss_of(whole), rtol=1e-6, atol=0)
    ours, theirs = gradients(chunked), gradients(whole)
    for each in theirs:
        torch.testing.assert_close(ours[each], theirs[each], rtol=1e-4, atol=1e-7)


def test_compiles_without_a_break():
    masked = model("llama3", False, USED)
    hidden = torch.randn(2, 8, SMALL["dim"])
    compiled = torch.compile(masked.lm_head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), masked.lm_head(hidden))


def names_and_shapes(spec) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in spec.model.build().state_dict().items()}


def test_any_decoders_checkpoint_stays_what_it_is():
    from torchtitan.models.llama3 import model_registry as torchtitans

    for spec in (torchtitans("debugmodel"), get_model_spec("llama3", "1B"), get_model_spec("abbie", "tiny")):
        decoupled = decouple(spec, 200)
        assert names_and_shapes(decoupled) == names_and_shapes(spec)
        assert replace(decoupled, model=spec.model) == spec
        assert decouple(decoupled, 300).model.lm_head.used == 300


@pytest.mark.parametrize("flavor", flavors)
def test_heads_are_tied_unless_said(flavor):
    with torch.device("meta"):
        tied = model_registry(flavor, used_vocab_size=USED).model.build()
        untied = model_registry(flavor, enable_weight_tying=False).model.build()
    assert tied.lm_head.weight is tied.tok_embeddings.weight and tied.lm_head.used == USED
    assert untied.lm_head.weight is not untied.tok_embeddings.weight


@pytest.mark.parametrize("flavor, body", [("125M", 85e6), ("350M", 302e6), ("1.3B", 1.208e9)])
def test_the_body_is_as_large_as_the_papers(flavor, body):
    """12 d^2 parameters a block, as with its feed-forward layer of two matrices of width 4 d."""
    config = model_registry(flavor).model
    with torch.device("meta"):
        parameters = sum(each.numel() for each in config.build().parameters())
    found = parameters - config.vocab_size * config.dim
    assert found == pytest.approx(body, rel=0.01)
    size = ModelSize(body=found, dim=config.dim, vocabulary=config.vocab_size)
    assert parameters_held("glob", size, 0) == parameters


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(flavor="1.3"), ["model.flavor", "did you mean '1.3B'"]),
        (dict(n_layer=3), ["n_layer", "did you mean 'n_layers'"]),
        (dict(n_heads=5), ["model.n_heads = 5", "model.dim (96)"]),
        (dict(used_vocab_size=0), ["model.used_vocab_size = 0", "from 1", "512"]),
        (dict(used_vocab_size=65, vocab_size=64), ["model.used_vocab_size = 65", "(64)"]),
    ],
)
def test_errors_name_the_key(call, words):
    with pytest.raises(UserError) as caught:
        model_registry(**({"flavor": "tiny"} | call))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_a_model_without_a_head_of_the_vocabulary_is_refused():
    spec = get_model_spec("llama3", "tiny")
    norm = spec.model.norm
    for other in (norm, replace(spec.model, lm_head=norm)):
        with pytest.raises(UserError, match="model.name = 'llama3': has no head"):
            decouple(replace(spec, model=other), 5)


RECIPES = {"125m": (6e-4, 5_000, 256), "350m": (3e-4, 13_500, 256), "1_3b": (2e-4, 7_000, 512)}


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_the_papers(name):
    from torchtitan.config import ConfigManager

    arguments = ["--module", "titan_ext.models.dept", "--config", f"dept_{name}", "--hf_assets_path", "."]
    config = ConfigManager().parse_args(arguments)
    settings = config.optimizer.param_groups[0].optimizer_kwargs
    training, schedule = config.training, config.lr_scheduler
    assert (settings["lr"], training.steps, training.global_batch_size) == RECIPES[name]
    assert (settings["betas"], settings["eps"], settings["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.0)
    assert (training.seq_len, training.max_norm) == (2048, 1.0)
    assert (schedule.warmup_steps, schedule.decay_type, schedule.min_lr_factor) == (100, "cosine", 0.1)
    assert config.loss.loss_fn.global_vocab_size == config.model_spec.model.vocab_size


@pytest.mark.parametrize("flavor", flavors)
def test_every_flavor_has_settings(flavor):
    from titan_ext.config.model import flavor_config
    from titan_ext.models import dept

    assert flavor_config(dept, flavor).model_spec.flavor == flavor
