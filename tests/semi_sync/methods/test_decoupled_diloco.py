"""The merge of Decoupled DiLoCo (arXiv 2604.21428): directions and lengths apart, sites by tokens times batch."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.methods.decoupled_diloco import RadialStep
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.plan.rule import SyncRule
from titan_ext.semi_sync.state.synced_state import BindOptions
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.testing import InProcessSites

Vector = list[float]


class Model(torch.nn.Module):
    """Two layers of a matrix and a bias, and an embedding, which takes the mean."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = torch.nn.Embedding(3, 2)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 3) for _ in range(2))


def length(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector))


def merged(deltas: list[Vector], weights: list[float], radial: bool) -> Vector:
    """The paper's equation, in float64."""
    total = sum(weights)
    if not radial:
        return [sum(w * d[i] for w, d in zip(weights, deltas)) / total for i in range(len(deltas[0]))]
    radius = sum(w * length(d) for w, d in zip(weights, deltas)) / total
    units = [[value / length(d) if length(d) else 0.0 for value in d] for d in deltas]
    direction = [sum(w * u[i] for w, u in zip(weights, units)) / total for i in range(len(deltas[0]))]
    size = length(direction)
    return [radius * value / size if size >= 1e-12 else 0.0 for value in direction]


def run(settings: dict, steps: int, *, seed: int = 0, tokens=(4, 2), stop: int | None = None) -> list[dict]:
    """Parameters of each site by step; sites add noise of their own in each inner step. Resumed after ``stop``."""
    config = SemiSyncConfig(**settings)
    models = [Model(seed) for _ in tokens]
    sites = InProcessSites(len(tokens))
    outer = sites.outer_loops(config, models)
    seen = []
    for step in range(1, steps + 1):
        for site, model in enumerate(models):
            for place, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(1000 * step + 10 * site + place)
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        sites.at_once(lambda site: outer[site].step(tokens=tokens[site]))
        seen.append([{n: p.detach().clone() for n, p in model.named_parameters()} for model in models])
        if step == stop:
            saved = [each.state_dict() for each in outer]
            fresh = [Model(seed + 1) for _ in tokens]
            for model, old in zip(fresh, models, strict=True):
                model.load_state_dict(old.state_dict())
            sites.close()
            sites, models = InProcessSites(len(tokens)), fresh
            # A fresh loop joins, and then takes over what was saved.
            for model in fresh:
                model.load_state_dict(fresh[0].state_dict())
            outer = sites.outer_loops(config, models)
            for each, state, model, values in zip(outer, saved, models, seen[-1], strict=True):
                each.load_state_dict(state)
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(values[name])
    sites.at_once(lambda site: outer[site].finish())
    sites.close()
    return seen


def equal(first: list, second: list) -> bool:
    return all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_the_vectors():
    """Deltas (3, 4) and (0, 10); tokens and steps (8, 2) and (4, 2): weights 32 and 8."""
    assert merged([[3.0, 4.0], [0.0, 10.0]], [32.0, 8.0], True) == pytest.approx([2.976834, 5.209459], abs=1e-6)
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    for model in models:
        model.weight.data.zero_()
    sites = InProcessSites(2)
    outer = sites.outer_loops(
        SemiSyncConfig(method="decoupled_diloco", sync_every=2, outer_optimizer="average"), models
    )
    for model, delta in zip(models, ([3.0, 4.0], [0.0, 10.0]), strict=True):
        model.weight.data -= torch.tensor([delta])
    for _ in range(2):
        sites.at_once(lambda site: outer[site].step(tokens=(4, 2)[site]))
    for model in models:
        assert (-model.weight[0]).tolist() == pytest.approx([2.976834, 5.209459], abs=1e-5)
    sites.close()


@pytest.mark.parametrize("delay", [0, 1])
def test_fragments_against_the_equations(delay):
    """Two fragments in turn, outer SGD with Nesterov momentum, overwritten; all in float64 and plain loops."""
    settings = dict(method="decoupled_diloco", sync_every=4, num_fragments=2, fragment_sync_delay=delay)
    seen = run(settings, 12)
    plan = resolve(SemiSyncConfig(**settings))
    home = {
        "tok_embeddings.weight": 0,
        **{f"layers.{layer}.{kind}": layer for layer in (0, 1) for kind in ("weight", "bias")},
    }
    found = {name: _fragment_of(name, seen, plan) for name in home}
    names = list(home)
    start = {name: parameter.double().flatten().tolist() for name, parameter in Model(0).named_parameters()}
    values = [dict(start) for _ in range(2)]
    anchors, momentum = dict(start), {name: [0.0] * len(start[name]) for name in names}
    in_flight: list[tuple[int, int, dict[str, Vector]]] = []
    for step in range(1, 13):
        for site in range(2):
            for place, name in enumerate(names):
                noise = torch.randn(
                    torch.Size([len(start[name])]),
                    generator=torch.Generator().manual_seed(1000 * step + 10 * site + place),
                ).double()
                values[site][name] = [v + 0.1 * n for v, n in zip(values[site][name], noise.tolist())]
        for due, fragment, updates in [each for each in in_flight if each[0] == step]:
            for name, delta in updates.items():
                momentum[name] = [0.9 * m + d for m, d in zip(momentum[name], delta)]
                anchors[name] = [a - 0.7 * (d + 0.9 * m) for a, d, m in zip(anchors[name], delta, momentum[name])]
                for site in range(2):
                    values[site][name] = list(anchors[name])
        in_flight = [each for each in in_flight if each[0] > step]
        for rule in plan.rules:
            if not rule.due(step):
                continue
            # Tokens 4 and 2 in each step: weights 16 s and 4 s, whatever the steps s.
            updates = {
                name: merged(
                    [[a - v for a, v in zip(anchors[name], values[site][name])] for site in range(2)],
                    [16.0, 4.0],
                    not name.startswith("tok_embeddings"),
                )
                for name in names
                if found[name] == rule.fragment
            }
            if rule.delay:
                in_flight.append((step + rule.delay, rule.fragment, updates))
                continue
            for name, delta in updates.items():
                momentum[name] = [0.9 * m + d for m, d in zip(momentum[name], delta)]
                anchors[name] = [a - 0.7 * (d + 0.9 * m) for a, d, m in zip(anchors[name], delta, momentum[name])]
                for site in range(2):
                    values[site][name] = list(anchors[name])
        for site in range(2):
            for name in names:
                assert seen[step - 1][site][name].flatten().tolist() == pytest.approx(values[site][name], abs=2e-5), (
                    step,
                    name,
                )


def _fragment_of(name: str, seen: list, plan) -> int:
    """The fragment after whose rounds both sites hold the same of a parameter."""
    for rule in plan.rules:
        steps = [step for step in range(1, 13) if step > rule.delay and rule.due(step - rule.delay)]
        if all(torch.equal(*(site[name] for site in seen[step - 1])) for step in steps):
            return rule.fragment
    raise AssertionError(name)


def test_averaging_of_all_sites_is_streaming_diloco_bit_for_bit():
    shared = dict(sync_every=4, num_fragments=2, fragment_sync_delay=1, weighting="uniform")
    decoupled = run(dict(method="decoupled_diloco", settings={"decoupled_diloco": {"mean": ["*"]}}, **shared), 12)
    streaming = run(dict(method="diloco", **shared), 12)
    assert all(equal(a, b) for a, b in zip(decoupled, streaming, strict=True))


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_a_resume_changes_nothing_even_in_flight(stop):
    settings = dict(method="decoupled_diloco", sync_every=4, num_fragments=2, fragment_sync_delay=1)
    whole, resumed = run(settings, 12), run(settings, 12, stop=stop)
    assert all(equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_length_of_a_merged_update_is_the_mean_of_the_lengths(seed):
    """Of many nearly orthogonal updates the mean shrinks as 1 / sqrt(M); this does not."""
    generator = random.Random(seed)
    deltas = [[generator.gauss(0, 1) for _ in range(200)] for _ in range(8)]
    weights = [1.0] * 8
    mean_length = sum(map(length, deltas)) / 8
    assert length(merged(deltas, weights, True)) == pytest.approx(mean_length)
    assert length(merged(deltas, weights, False)) < 0.5 * mean_length


def test_opposite_directions_move_nothing_and_a_lossy_codec_is_refused():
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    sites = InProcessSites(2)
    for model in models:
        model.weight.data.fill_(1.0)
    config = SemiSyncConfig(method="decoupled_diloco", sync_every=1, weighting="uniform")
    outer = sites.outer_loops(config, models)
    models[0].weight.data += 2.0
    models[1].weight.data -= 0.5
    sites.at_once(lambda site: outer[site].step())
    assert [model.weight.tolist() for model in models] == [[[1.0, 1.0]]] * 2
    sites.close()
    with pytest.raises(ValueError, match="must lose nothing"):
        resolve(SemiSyncConfig(method="decoupled_diloco", codec="int8"))


class Ranks:
    """Two ranks of a site as threads, which meet where they gather."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=60), [None, None]

    def rank(self, index: int) -> SimpleNamespace:
        def gather(value: object) -> list:
            self.values[index] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return SimpleNamespace(gather=gather)


def test_shards_have_the_length_of_the_whole_bit_for_bit():
    """A tensor cut over two ranks, in the middle of values of very different size."""
    torch.manual_seed(3)
    update, start = torch.randn(6, 5) * torch.logspace(-4, 3, 6)[:, None], torch.randn(6, 5)
    rule = SyncRule(period=1, apply=RadialStep(optimizer=None, mixing=0.0, mean=()))

    def written(cut: slice, ranks: SimpleNamespace) -> torch.Tensor:
        module = torch.nn.Linear(5, len(start[cut]), bias=False)
        module.weight.data.copy_(start[cut])
        state = rule.apply.bind(
            rule, BoundTensors(ModelView([module], []), "params", ["weight"]), BindOptions(site=ranks)
        )
        module.weight.data.sub_(update[cut])
        out = torch.empty(state.numel)
        state.write(out, 1)
        return out

    whole = written(slice(0, 6), SimpleNamespace(gather=lambda value: [value]))
    site = Ranks()
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda index: written(slice(3 * index, 3 * index + 3), site.rank(index)), range(2)))
    assert torch.equal(torch.cat([part[:-1] for part in parts]), whole[:-1])
    assert parts[0][-1] == parts[1][-1] == whole[-1]
    assert whole[-1].item() == pytest.approx(update.norm().item(), rel=1e-4)
