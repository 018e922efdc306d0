"""WorldLM as it is read here: against the equations in plain loops, and what must hold of any reading."""

import math
import zlib
from functools import partial

import pytest
import torch
from torch import nn

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from tests.semi_sync.wire.test_bytes import Counter
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.state import attention
from titan_ext.semi_sync.testing import InProcessSites

TREE = ["eu/de", "eu/de", "eu/fr", "us/ny"]
WEIGHTS = [1.0, 3.0, 2.0, 1.0]
Vector = list[float]


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(4))
        self.lm_head = nn.Linear(4, 5, bias=False)


KEYS = ["layers.3.weight", "layers.3.bias", "lm_head.weight"]  # 30% of four blocks is one


def config_of(own=None, **settings) -> SemiSyncConfig:
    return SemiSyncConfig(
        method="worldlm",
        settings={"worldlm": {"federations": 0, "projection": 32, "routing_share": 0.0, **(own or {})}},
        **settings,
    )


def options_of(regions, weights=None):
    weights = weights or [1.0] * len(regions)
    return [
        {"name": f"site{index}", "labels": {"region": region}, "weight": weight}
        for index, (region, weight) in enumerate(zip(regions, weights, strict=True))
    ]


@torch.no_grad()
def local_step(model, index, step, like=None):
    """Noise of the site's own, or of another's that it is to be like."""
    for place, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + 10 * (index if like is None else like) + place)
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def run(config, regions, steps, *, models=None, weights=None, like=None, before=lambda step, models: None):
    """Outer loops and models after so many inner steps."""
    sites = InProcessSites(len(regions))
    models = models or [Model() for _ in regions]
    outer = sites.outer_loops(config, models, options=options_of(regions, weights))
    for step in range(1, steps + 1):
        for index, model in enumerate(models):
            local_step(model, index, step, like)
        before(step, models)
        sites.at_once(lambda site: outer[site].step())
    sites.close()
    return outer, models


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- the reference, in float64 and plain loops ----------------------------------------------------------


def mixed(place: int, seed: int) -> int:
    """The hash of an element's place, in Python's own integers."""
    one, two, modulus = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 2**64
    value = (place * one + (seed * two) % 2**62) % modulus
    value = (value ^ (value >> 30)) * two % modulus
    value = (value ^ (value >> 27)) * one % modulus
    return (value ^ (value >> 31)) >> 2


def projected(layer: dict[str, Vector], size: int) -> Vector:
    sums = [0.0] * size
    for name, elements in layer.items():
        for place, value in enumerate(elements):
            number = mixed(place, zlib.crc32(name.encode()))
            sums[(number >> 1) % size] += value if number & 1 else -value
    return sums


def length(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector))


def weights_of(node: Vector, constituents: list[Vector], kind: str, temperature: float) -> Vector:
    logits = []
    for each in constituents:
        if kind == "cosine":
            inner = sum(a * b for a, b in zip(node, each))
            lengths = length(node) * length(each)
            logits.append(inner / lengths / temperature if lengths else 0.0)
        else:
            logits.append(length([a - b for a, b in zip(node, each)]) / temperature)
    exponentials = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


class Node:
    """A federation of federations, or of sites."""

    def __init__(self, children, layer, own):
        self.children, self.layer, self.own = children, dict(layer), own
        self.guests = []

    def up(self):
        """The new layer; what goes up is that without guests."""
        theirs = [child.up() if isinstance(child, Node) else child for child in self.children]
        before = self.layer
        plain, self.shares = self.mixed(before, theirs)
        self.layer = self.mixed(before, [*theirs, *self.guests])[0] if self.guests else plain
        return plain

    def mixed(self, layer, theirs):
        size, kind = self.own["projection"], self.own["attention"]
        origin = self.own.get("origin", [0.0] * size)

        def sketch(values):
            return [value - from_ for value, from_ in zip(projected(values, size), origin)]

        sketches = [sketch(each) for each in theirs]
        shares = weights_of(sketch(layer), sketches, kind, self.own["temperature"])
        step = self.own["attention_step"]
        return {
            name: [
                (1 - step) * old + step * sum(a * each[name][i] for a, each in zip(shares, theirs))
                for i, old in enumerate(elements)
            ]
            for name, elements in layer.items()
        }, shares

    def down(self):
        for child in self.children:
            layer = child.layer if isinstance(child, Node) else child
            for name, elements in layer.items():
                layer[name] = [
                    (1 - self.own["pull"]) * mine + self.own["pull"] * above
                    for mine, above in zip(elements, self.layer[name])
                ]
            if isinstance(child, Node):
                child.down()


def tree_of(leaves, regions, federations, start, own):
    """Nested nodes by the first names of the regions."""

    def node(places, level):
        if level == federations:
            return Node([leaves[place] for place in places], start, own)
        groups = {}
        for place in places:
            groups.setdefault("/".join(regions[place].split("/")[: level + 1]), []).append(place)
        return Node([node(each, level + 1) for each in groups.values()], start, own)

    return node(list(range(len(regions))), 0)


@pytest.mark.parametrize("federations", [0, 1, 2])
@pytest.mark.parametrize(
    "own",
    [
        dict(attention="cosine", temperature=0.1, attention_step=1.0, pull=0.5, attention_over="block"),
        dict(attention="cosine", temperature=0.5, attention_step=0.7, pull=0.3, attention_over="parameter"),
        dict(attention="fedatt", temperature=1.0, attention_step=0.6, pull=0.2, attention_over="block"),
        dict(
            attention="cosine",
            temperature=0.3,
            attention_step=0.9,
            pull=0.4,
            attention_over="block",
            compared="differences",
        ),
    ],
    ids=["cosine", "parameters", "fedatt", "differences"],
)
def test_trees_equal_the_equations(own, federations):
    own = own | {"projection": 32}
    topology = "regions" if federations else "flat"
    config = config_of(own | {"federations": federations}, sync_every=2, weighting="site", topology=topology)
    layers = [KEYS[:2], KEYS[2:]] if own["attention_over"] == "block" else [[name] for name in KEYS]
    start = {name: value.double().flatten().tolist() for name, value in values(Model()).items()}
    leaves = [{name: list(start[name]) for name in KEYS} for _ in TREE]
    parts = [[{name: leaf[name] for name in layer} for leaf in leaves] for layer in layers]
    trees = [
        tree_of(part, TREE, federations, {name: start[name] for name in layer}, own)
        for part, layer in zip(parts, layers)
    ]

    def before(step, models):
        for index, model in enumerate(models):
            if step % 2:
                continue
            for name, value in values(model).items():
                for part in parts:
                    if name in part[index]:
                        part[index][name] = value.double().flatten().tolist()
        for tree in trees if step % 2 == 0 else ():
            if "compared" in own:
                own["origin"] = projected(tree.layer, own["projection"])
            tree.up()
            tree.down()

    outer, models = run(config, TREE, 6, weights=WEIGHTS, before=before)
    for part in parts:
        for model, layer in zip(models, part):
            for name, elements in layer.items():
                assert values(model)[name].flatten().tolist() == pytest.approx(elements, abs=2e-6), name
    backbone = [{n: v for n, v in values(model).items() if n not in KEYS} for model in models]
    assert all(torch.equal(backbone[0][name], each[name]) for each in backbone for name in backbone[0])
    nodes = [state for state in outer[0]._states if state.rule.scope]
    assert len(nodes) == 1 + federations
    for tree in trees:
        node = tree
        for state in nodes:
            for name, global_part in zip(state.names, state.global_parts):
                if name in node.layer:
                    assert global_part.flatten().tolist() == pytest.approx(node.layer[name], abs=2e-6)
            node = node.children[0]  # site 0 is in the first federation at each level
    by_label = {region: [i for i, each in enumerate(TREE) if each.startswith(region)] for region in ("eu", "eu/de")}
    for state, region in zip(nodes[1:], ("eu", "eu/de")):
        for index in by_label[region]:
            theirs = next(each for each in outer[index]._states if each.key == state.key)
            assert torch.equal(theirs.global_flat, state.global_flat)


# -- routing ------------------------------------------------------------------------------------------

MISPLACED = ["eu", "eu", "eu", "us", "us", "us"]
KINDS = [0, 0, 1, 1, 1, 0]
"""Of each site what its key layers are like: the third and the last are in the wrong federation."""


def set_keys(step, models):
    """Each site's key layers are near those of its kind, whatever they were pulled to."""
    for index, model in enumerate(models):
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if name in KEYS:
                own = torch.Generator().manual_seed(100 * step + 10 * index + place)
                parameter.data.copy_(of_kind(KINDS[index], place, parameter.shape))
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=own))


def of_kind(kind, place, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(50 + 10 * kind + place))


def between_kinds() -> Model:
    """A model whose key layers are as near to the one kind as to the other."""
    model = Model()
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if name in KEYS:
            parameter.data.copy_(of_kind(0, place, parameter.shape) + of_kind(1, place, parameter.shape)).div_(2)
    return model


def routing_of(**own):
    return config_of(
        {"federations": 1, "routing_share": 0.9, "temperature": 0.5, "projection": 64, **own}, sync_every=1
    )


@pytest.mark.parametrize(
    ("attention_step", "codec", "compared"),
    [(1.0, "fp32", "layers"), (0.6, "fp32", "layers"), (1.0, "int8", "layers"), (1.0, "fp32", "differences")],
    ids=["whole", "part", "int8", "differences"],
)
def test_misplaced_layers_go_to_the_federation_they_resemble(attention_step, codec, compared):
    own = dict(attention="cosine", temperature=0.5, attention_step=attention_step, pull=0.5, projection=64)
    config = routing_of(attention_step=attention_step, compared=compared)
    config.codec = codec
    start = {name: value.double().flatten().tolist() for name, value in values(between_kinds()).items()}
    layers, travelled = [KEYS[:2], KEYS[2:]], []
    tolerance = 2e-6 if codec == "fp32" else 0.1
    parts = [[{} for _ in MISPLACED] for _ in layers]
    trees = [tree_of(part, MISPLACED, 1, {n: start[n] for n in layer}, own) for part, layer in zip(parts, layers)]
    waiting = [None for _ in layers]

    def before(step, models):
        set_keys(step, models)
        for unit, (tree, layer, part) in enumerate(zip(trees, layers, parts)):
            for index, model in enumerate(models):
                part[index].update({name: values(model)[name].double().flatten().tolist() for name in layer})
            if compared == "differences":
                own["origin"] = projected(tree.layer, 64)
            old = [dict(node.layer) for node in tree.children]
            for node in tree.children:
                node.guests = []
            if waiting[unit] is not None:
                place, layer_of_site = waiting[unit]
                tree.children[place].guests = [layer_of_site]
                travelled.append((step, unit, place))
            tree.up()
            waiting[unit] = residual_of(tree, part, old, own.get("origin", [0.0] * 64))
            tree.down()

    outer, models = run(config, MISPLACED, 4, models=[between_kinds() for _ in MISPLACED], before=before)
    # From the second round on the last site fits badly, in both units; one round later its layers arrive.
    assert {unit for step, unit, _ in travelled if step == 4} == {0, 1}
    for tree, part, layer in zip(trees, parts, layers):
        for index, model in enumerate(models):
            for name in layer:
                assert values(model)[name].flatten().tolist() == pytest.approx(part[index][name], abs=tolerance)
            node = tree.children[MISPLACED[index] == "us"]
            state = key_states(outer[index])[1]
            for name, global_part in zip(state.names, state.global_parts):
                if name in layer:
                    assert global_part.flatten().tolist() == pytest.approx(node.layer[name], abs=tolerance)
    for members in ((0, 1, 2), (3, 4, 5)):
        flats = [key_states(outer[index])[1].global_flat for index in members]
        assert all(torch.equal(flats[0], each) for each in flats)
    assert len({key_states(each)[0].global_flat.sum().item() for each in outer}) == 1


def residual_of(tree, part, old, origin):
    """Of the sites' layers that fit worst with less than 0.9 of an equal share, if another federation is more like it."""
    size, found = 64, []
    for place, node in enumerate(tree.children):
        members = [index for index, region in enumerate(MISPLACED) if (region == "us") == bool(place)]
        for index, share in zip(members, node.shares):
            other = 1 - place
            one, two = ([a - b for a, b in zip(projected(each, size), origin)] for each in (part[index], old[other]))
            alike = sum(a * b for a, b in zip(one, two)) / (length(one) * length(two) or 1.0)
            if share * len(members) < 0.9 and alike > 0.2:
                copied = {name: list(elements) for name, elements in part[index].items()}
                found.append((1 - share * len(members), -index, other, copied))
    if not found:
        return None
    _, _, other, layer = max(found, key=lambda each: each[:2])
    return other, layer


def test_where_nothing_is_routed_next_to_nothing_travels():
    outer, _ = run(routing_of(), TREE, 1)
    without, _ = run(config_of(dict(federations=1), sync_every=1), TREE, 1)
    more = outer[0].ledger.last.bytes_sent - without[0].ledger.last.bytes_sent
    assert 0 < more <= 200


def test_what_waits_outlives_a_stop():
    def start():
        return [between_kinds() for _ in MISPLACED]

    straight, models = run(routing_of(), MISPLACED, 4, models=start(), before=set_keys)
    assert any(key_states(straight[2])[2]._waiting.tolist() + key_states(straight[5])[2]._waiting.tolist())
    first = run(routing_of(), MISPLACED, 3, models=start(), before=set_keys)
    resumed(routing_of(), MISPLACED, straight, models, first, stop=3, until=4, before=set_keys)


# -- what must hold of any reading ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(), dict(outer_optimizer="average"), dict(codec="int8")])
def test_without_key_layers_it_is_diloco_bit_for_bit(settings):
    regions = ["a"] * 3
    ours = config_of(dict(key_blocks=0.0, keys=[]), sync_every=2, **settings)
    _, models = run(ours, regions, 6)
    _, theirs = run(SemiSyncConfig(method="diloco", sync_every=2, **settings), regions, 6)
    for one, other in zip(models, theirs):
        assert all(torch.equal(value, values(other)[name]) for name, value in values(one).items())


def test_without_step_and_pull_key_layers_stay_at_their_site():
    alone = [Model() for _ in TREE]
    for step in range(1, 5):
        for index, model in enumerate(alone):
            local_step(model, index, step)
    own = dict(federations=2, attention_step=0.0, pull=0.0)
    outer, models = run(config_of(own, sync_every=2), TREE, 4)
    for index, model in enumerate(models):
        for name in KEYS:
            assert torch.equal(values(model)[name], values(alone[index])[name])
        assert not torch.equal(values(model)["layers.0.weight"], values(alone[index])["layers.0.weight"])
        for state in outer[index]._states:
            for name, part in zip(state.names, state.global_parts):
                assert name not in KEYS or torch.equal(part, values(Model())[name])


def shares_of(sites=5, *, temperature=0.1, score=attention.cosine, contributors=None, order=None, step=0.8):
    generator = torch.Generator().manual_seed(3)
    leaves = torch.randn(sites, 2, 16, generator=generator, dtype=torch.float64)
    root = torch.randn(1, 2, 16, generator=generator, dtype=torch.float64).expand(sites, 2, 16)
    federations = torch.randn(3, 2, 16, generator=generator, dtype=torch.float64)
    labels = torch.tensor([7, 7, 9, 7, 9][:sites])
    nodes = federations[labels - 7]
    order = list(range(sites)) if order is None else order
    return attention.shares(
        leaves[order],
        [root, nodes[order]],
        [[0] * sites, labels[order].tolist()],
        list(range(sites)) if contributors is None else contributors,
        score=score(temperature),
        step=step,
    )


@pytest.mark.parametrize("score", [attention.cosine, attention.distance])
def test_shares_add_up_and_follow_the_sites(score):
    found = shares_of(score=score)
    assert (found >= 0).all()
    assert torch.allclose(found[0].sum(0), torch.ones(2).double())
    for members in ([0, 1, 3], [2, 4]):
        assert torch.allclose(found[1, members].sum(0), torch.ones(2).double())
    order = [4, 0, 3, 2, 1]
    assert torch.allclose(shares_of(score=score, order=order), found[:, order])
    without = shares_of(score=score, contributors=[0, 2, 3])
    assert torch.allclose(without[0].sum(0), torch.ones(2).double()) and not without[:, [1, 4]].any()
    assert torch.equal(without[1, 2], torch.ones(2).double())  # alone in its federation


def test_at_a_high_temperature_all_count_alike():
    """Hierarchical averaging: each federation of the two counts half, and each site in it alike."""
    found = shares_of(temperature=1e9)
    assert torch.allclose(found[0, :, 0], torch.tensor([1 / 6, 1 / 6, 1 / 4, 1 / 6, 1 / 4]).double())
    assert torch.allclose(found[1, :, 1], torch.tensor([1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2]).double())


def test_of_equal_constituents_the_node_takes_their_value():
    outer, models = run(config_of(dict(federations=2), sync_every=1), TREE, 1, like=0)
    alone = Model()
    local_step(alone, 0, 1)
    for state in outer[3]._states:
        for name, part in zip(state.names, state.global_parts):
            assert name not in KEYS or torch.allclose(part, values(alone)[name], atol=1e-6)
    for model in models:
        assert all(torch.allclose(values(model)[name], values(alone)[name], atol=1e-6) for name in KEYS)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_siblings_keep_their_differences_and_share_the_backbone(codec):
    outer, models = run(config_of(dict(federations=1), sync_every=2, codec=codec, topology="regions"), TREE, 4)
    first, second, third = (values(model) for model in models[:3])
    assert all(torch.equal(first[name], third[name]) for name in first if name not in KEYS)
    assert all(not torch.equal(first[name], second[name]) for name in KEYS)
    assert len({each.shared_state_sha256() for each in outer}) == 1
    exact = run(config_of(dict(federations=1), sync_every=2, topology="regions"), TREE, 4)[1]
    for mine, theirs in zip(models, exact):
        error = max((values(mine)[name] - values(theirs)[name]).abs().max().item() for name in KEYS)
        assert (error == 0) is (codec == "fp32") and error < {"bf16": 0.01, "int8": 0.02, "int4": 0.3}.get(codec, 1)


@pytest.mark.parametrize(("topology", "federations"), [("flat", 0), ("regions", 1)])
def test_a_site_that_is_not_finite_is_no_constituent(topology, federations):
    """The others' layers are as if it were not there; it goes on from its federation's."""
    regions = ["eu/de", "eu/de", "us/ny", "us/ny"]
    config = config_of(dict(federations=federations), sync_every=1, topology=topology)

    def spoil(step, models):
        if step == 1:
            models[3].lm_head.weight.data[0, 0] = math.nan

    outer, models = run(config, regions, 1, before=spoil)
    _, without = run(config, regions[:3], 1)
    for model, other in zip(models, without):
        assert all(torch.allclose(value, values(other)[name], atol=1e-6) for name, value in values(model).items())
    keys = next(state for state in reversed(outer[3]._states) if state.rule.scope)
    for name, part in zip(keys.names, keys.global_parts):
        assert torch.equal(values(models[3])[name], part)


def test_between_regions_travels_what_one_site_sends():
    """Of key layers, too: one copy each way, whatever the number of sites; a federation's own values stay in it."""
    regions = ["eu", "eu", "eu", "us", "us"]
    sites = InProcessSites(len(regions))
    managers, counters = sites.managers(), {}
    for index, manager in enumerate(managers):
        counters[index] = manager._process_group = Across(manager._process_group, regions, regions[index])
    sites.managers = lambda: managers
    models = [Model() for _ in regions]
    config = config_of(dict(federations=1), sync_every=1, topology="regions")
    outer = sites.outer_loops(config, models, options=options_of(regions))
    for counter in counters.values():
        counter.across = 0
    for index, model in enumerate(models):
        local_step(model, index, 1)
    sites.at_once(lambda site: outer[site].step())
    whole = 4 * sum(parameter.numel() for parameter in models[0].parameters())
    assert [counters[index].across for index in range(5)] == [whole, 0, 0, whole, 0]
    sites.close()


class Across(Counter):
    def __init__(self, group, regions, own):
        super().__init__(group)
        self.regions, self.own, self.across = regions, own, 0

    def send(self, tensors, dst_rank, tag):
        self.across += tensors[0].nbytes if self.regions[dst_rank] != self.own else 0
        return super().send(tensors, dst_rank, tag)


# -- late sites, sites that come back, checkpoints --------------------------------------------------------


def test_stop_and_resume_equals_never_stopped():
    config = config_of(dict(federations=1), sync_every=2)
    resumed(config, TREE, *run(config, TREE, 6), run(config, TREE, 3), stop=3, until=6)


def resumed(config, regions, straight, models, stopped, *, stop, until, before=lambda step, models: None):
    """Stops, goes on with fresh objects, and comes to the same bits as outer loops and models that never did."""
    first, halfway = stopped
    saved = [each.state_dict() for each in first]
    sites, fresh = InProcessSites(len(regions)), [Model(seed=1) for _ in regions]
    for model, old in zip(fresh, halfway):
        model.load_state_dict(old.state_dict())

    def load(site, loop):
        loop.load_state_dict(saved[site])

    outer = sites.outer_loops(config, fresh, options=options_of(regions), before_join=load)
    for step in range(stop + 1, until + 1):
        for index, model in enumerate(fresh):
            local_step(model, index, step)
        before(step, fresh)
        sites.at_once(lambda site: outer[site].step())
    sites.close()
    for one, other in zip(models, fresh):
        assert all(torch.equal(value, values(other)[name]) for name, value in values(one).items())
    for one, other in zip(straight, outer):
        for mine, theirs in zip(one._states, other._states):
            assert torch.equal(
                getattr(mine, "global_flat", torch.empty(0)), getattr(theirs, "global_flat", torch.empty(0))
            )


def key_states(outer):
    return [state for state in outer._states if state.rule.scope]


def test_sites_that_begin_together_begin_alike():
    """Whatever they were initialised with; the federations' layers are the root's."""

    def body(index, own):
        model = Model(seed=index)
        settings = vars(config_of(dict(federations=1), sync_every=2))
        outer = outer_loop(model, torch.optim.SGD(model.parameters()), own, **started(settings, index, REGIONS))
        outer.join()
        return values(model), [state.global_flat.clone() for state in key_states(outer)]

    results = run_sites(3, body)
    for found, nodes in results:
        assert all(torch.equal(value, results[0][0][name]) for name, value in found.items())
        assert all(torch.equal(node, results[0][1][0]) for node in nodes)


REGIONS = ["eu", "us", "us"]


def started(settings, index, regions):
    return settings | {"name": f"site{index}", "labels": {"region": regions[index]}}


def test_through_leaders_it_comes_to_the_same_bits():
    """Whole tensors that rank 0 of each site exchanges; two federations, and layers that are routed."""

    def body(index, own, pairing, models):
        model = models[index]
        settings = vars(routing_of()) | {"pairing": pairing}
        regions = {"name": f"site{index}", "labels": {"region": ["eu", "eu", "us"][index]}}
        outer = outer_loop(model, torch.optim.SGD(model.parameters()), own, **settings, **regions)
        outer.join()
        for step in range(1, 4):
            local_step(model, index, step)
            outer.step()
        outer.finish()
        return values(model)

    # Not in the threads: they share torch's generator.
    models = {each: [between_kinds() for _ in range(3)] for each in ("rank", "leader")}
    ranks, leaders = (run_sites(3, partial(body, pairing=each, models=models[each])) for each in models)
    for one, other in zip(ranks, leaders):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_newcomer_in_a_running_federation_holds_what_its_neighbour_does():
    """With real managers: the round that takes it in, and those in which it then contributes."""
    newcomer_may_come = Meeting()
    settings = vars(config_of(dict(federations=1, routing_share=0.9), sync_every=2))

    def before(index):
        if index == 2:
            newcomer_may_come.wait()

    def body(index, own):
        model = Model(seed=index)
        outer = outer_loop(model, torch.optim.SGD(model.parameters()), own, **started(settings, index, REGIONS))
        outer.join()
        joined_at = outer.inner_step
        while outer.inner_step < 8:
            if index == 0 and outer.inner_step == 4:
                newcomer_may_come.arrive()
            if index < 2 and outer.inner_step == 4:
                wait_for_requests(own.lighthouse, 1)
            local_step(model, index, outer.inner_step)
            outer.step()
        outer.finish()
        nodes = [state.global_flat.clone() for state in key_states(outer)[:2]]
        return joined_at, nodes, outer.shared_state_sha256(), values(model)

    results = run_sites(3, body, min_sites=2, before=before)
    assert results[2][0] > 4
    assert len({digest for *_, digest, _ in results}) == 1
    (_, alone, *_), (_, nodes, _, mine), (_, nodes_of_late, _, late) = results
    assert all(map(torch.equal, nodes, nodes_of_late))
    assert torch.equal(alone[0], nodes[0]) and not torch.equal(alone[1], nodes[1])
    assert all(not torch.equal(mine[name], late[name]) for name in KEYS)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_late_site_takes_its_federations_layers_and_one_that_comes_back_keeps_its_own(comes_back):
    """Read off one site's parts alone, in the order in which a newcomer takes them over."""
    config = config_of(dict(federations=1), sync_every=1)
    outer, models = run(config, REGIONS, 2)
    member, member_model = outer[1], models[1]
    late, late_model = outer[2], models[2]
    if not comes_back:
        late_model.load_state_dict(Model(seed=9).state_dict())
        key_states(late)[0].tree.trained.zero_()
    before = values(late_model)
    root, federation = key_states(late)
    for state in late._states:
        theirs = next(each for each in member._states if each.key == state.key)
        state.load_shared_state(
            {n: {k: v.clone() for k, v in each.items()} for n, each in theirs.shared_state().items()}
        )
    federation.take_over(key_states(member)[1].offered())
    assert torch.equal(federation.global_flat, key_states(member)[1].global_flat)
    assert torch.equal(root.global_flat, key_states(member)[0].global_flat)
    for place, name in enumerate(federation.names):
        expected = before[name] if comes_back else federation.global_parts[place]
        assert torch.equal(values(late_model)[name], expected)
    assert torch.equal(values(late_model)["layers.0.weight"], values(member_model)["layers.0.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(own=dict(key_blocks=1.0)), "key_blocks = 1.0"),
        (dict(own=dict(federations=4)), "federations = 4"),
        (dict(own=dict(attention="dot")), "attention = 'dot'"),
        (dict(own=dict(attention_over="model")), "attention_over = 'model'"),
        (dict(own=dict(temperature=0.0)), "temperature = 0.0"),
        (dict(own=dict(attention_step=1.5)), "attention_step = 1.5"),
        (dict(own=dict(pull=-0.1)), "pull = -0.1"),
        (dict(own=dict(projection=0)), "projection = 0"),
        (dict(own=dict(routing_share=1.5)), "routing_share = 1.5"),
        (dict(own=dict(routing_share=0.5)), "routing_share = 0.5"),
        (dict(own=dict(routing_share=0.5, federations=1, attention="fedatt")), "routing_share = 0.5"),
        (dict(own=dict(routing_similarity=2.0)), "routing_similarity = 2.0"),
        (dict(codec="topk"), "codec"),
        (dict(num_fragments=2), "num_fragments = 2"),
        (dict(fragment_sync_delay=1), "fragment_sync_delay = 1"),
        (dict(aggregation="median"), "aggregation = 'median'"),
        (dict(region_sync_every=1), "region_sync_every = 1"),
        (dict(weighting="q_fair"), "weighting = 'q_fair'"),
        (dict(sites_per_round=1), "sites_per_round = 1"),
        (dict(own=dict(federations=1)), 'no label "region"'),
        (dict(own=dict(keys=["no_such.*"], key_blocks=0.0)), "fit no parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, words):
    settings = {"sync_every": 4, **settings}
    model, build = Model(), partial(config_of, settings.pop("own", None), **settings)
    with pytest.raises(ValueError, match=words):
        InProcessSites(1).outer_loops(build(), [model], options=[{"name": "a"}])
