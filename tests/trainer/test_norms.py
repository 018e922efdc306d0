"""Norms of a step against sums written out."""

import math

import torch

from titan_ext.experiments.models import initialised, loss_of, small_sizes
from titan_ext.experiments.text import Batch
from titan_ext.models import get_model_spec
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.norms import ActivationNorms, ParameterNorms, max_logit


def build() -> torch.nn.Module:
    return initialised(get_model_spec("llama3", "tiny", vocab_size=64, **small_sizes(32, 2, 16)).model, 0, "cpu")


def batch() -> Batch:
    inputs = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    return Batch(inputs, inputs.roll(-1, 1), torch.arange(16).expand(2, 16))


def test_parameters_updates_and_gradients_are_measured_by_layer() -> None:
    model = build()
    norms = ParameterNorms([model], SiteRanks(alone=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model, batch()).backward()
    norms.before_step()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer.step()
    found = norms.after_step()
    for layer in ("tok_embeddings", "layers.0", "layers.1", "norm", "lm_head"):
        mine = [name for name in before if name.startswith(layer + ".")]
        after = dict(model.named_parameters())
        for what, tensors in {
            "parameters": [after[name] for name in mine],
            "updates": [after[name] - before[name] for name in mine],
            "gradients": [after[name].grad for name in mine],
        }.items():
            wanted = math.sqrt(sum(each.detach().double().square().sum().item() for each in tensors))
            assert math.isclose(found[what][layer], wanted, rel_tol=1e-5), (what, layer)
    assert norms.after_step() == {}


def test_activations_and_logits_are_those_of_the_passes_while_listening() -> None:
    model, some = build(), batch()
    norms = ActivationNorms([model], SiteRanks(alone=True))
    outputs: dict[str, list[torch.Tensor]] = {"layers.0": [], "layers.1": []}
    for number, layer in model.layers.items():
        layer.register_forward_hook(lambda _, __, out, n=number: outputs[f"layers.{n}"].append(out.detach().double()))
    norms.listen()
    for _ in range(2):
        loss_of(model, some)
    norms.stop_listening()
    loss_of(model, Batch(some.inputs.flip(0), some.labels, some.positions))
    found = norms.take()
    for layer, seen in outputs.items():
        wanted = torch.cat(seen[:2]).square().mean().sqrt().item()
        assert math.isclose(found["activations"][layer], wanted, rel_tol=1e-5)
    assert list(found["attention_logits"]) == ["layers.0", "layers.1"]


def test_the_largest_logit_is_that_of_a_loop_over_queries_and_keys() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(300, 4, 8), torch.randn(300, 2, 8)
    wanted = max(
        (query[i, n] @ key[: i + 1, n // 2].T).max().item() / math.sqrt(8) for i in range(300) for n in range(4)
    )
    assert math.isclose(max_logit(query, key, None).item(), wanted, rel_tol=1e-5)
    assert math.isclose(max_logit(query, key, 0.5).item(), wanted * math.sqrt(8) / 2, rel_tol=1e-5)
