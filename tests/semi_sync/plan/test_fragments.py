"""Fragments: which parameters sync together."""

import random

import pytest

from titan_ext.semi_sync.plan.fragments import assign_by_bytes, assign_by_modules, layer_of


def test_layers_are_assigned_evenly_and_whole():
    sizes = {"tok_embeddings.weight": 500}
    for layer in range(8):
        sizes |= {f"layers.{layer}.attention.wq.weight": 60, f"layers.{layer}.ffn.w1.weight": 40}
    sizes["norm.weight"] = 4
    home = assign_by_bytes(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if home[name] == fragment) for fragment in range(3)]
    assert max(loads) - min(loads) <= 100
    for layer in range(8):
        assert home[f"layers.{layer}.attention.wq.weight"] == home[f"layers.{layer}.ffn.w1.weight"]
    assert layer_of("layers.11.ffn.w1.weight") == "layers.11"
    with pytest.raises(ValueError, match="between 1 and the number of layers"):
        assign_by_bytes(sizes, 11)


def test_fragments_by_module_name():
    sizes = {"layers.1.w": 1, "layers.10.w": 1, "norm.weight": 1}
    assert assign_by_modules(sizes, [["layers.1"], ["layers.10", "norm"]]) == {
        "layers.1.w": 0,
        "layers.10.w": 1,
        "norm.weight": 1,
    }
    with pytest.raises(ValueError, match="matches no parameter"):
        assign_by_modules(sizes, [["layers.2"]])
    with pytest.raises(ValueError, match="in no fragment"):
        assign_by_modules(sizes, [["layers.1"]])
    with pytest.raises(ValueError, match="in fragment 0 and in 1"):
        assign_by_modules(sizes, [["layers.1", "layers.10", "norm"], ["norm"]])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_fragments", [1, 2, 5])
def test_no_fragment_is_more_than_the_largest_layer_heavier_than_another(seed, num_fragments):
    generator = random.Random(seed)
    sizes = {f"layers.{layer}.{name}": generator.randint(1, 1000) for layer in range(6) for name in ("a", "b")}
    home = assign_by_bytes(sizes, num_fragments)
    assert list(home) == list(sizes) and set(home.values()) == set(range(num_fragments))
    layers = {layer_of(name): 0 for name in sizes}
    loads = [0] * num_fragments
    for name, size in sizes.items():
        layers[layer_of(name)] += size
        loads[home[name]] += size
    assert max(loads) - min(loads) <= max(layers.values())


def test_equal_layers_are_strided():
    """Streaming DiLoCo's pattern (arXiv 2501.18512, section 2.2): fragment p holds layers p, p + P, p + 2 P …"""
    home = assign_by_bytes({f"layers.{layer}.w": 10 for layer in range(8)}, 3)
    assert list(home.values()) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_what_is_a_fragment_by_itself_is_the_last_one():
    sizes = {"tok_embeddings.weight": 90, **{f"layers.{layer}.w": 10 for layer in range(4)}, "lm_head.weight": 90}
    own = ["tok_embeddings.*", "lm_head.*"]
    assert list(assign_by_bytes(sizes, 3, own).values()) == [2, 0, 1, 0, 1, 2]
    assert set(assign_by_bytes(sizes, 1, own).values()) == {0}, "there is one fragment"
    assert assign_by_bytes(sizes, 3, ["*"]) == assign_by_bytes(sizes, 3), "nothing is left for the others"
    assert assign_by_bytes(sizes, 3, ["no_such.*"]) == assign_by_bytes(sizes, 3)
    with pytest.raises(ValueError, match="num_fragments = 6: .* layers.3 …, and one for tok_embeddings"):
        assign_by_bytes(sizes, 6, own)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.3.attention.wo.weight", "layers.3"),
        ("model.layers.12.w", "model.layers.12"),
        ("layers.0.experts.5.w1", "layers.0"),
        ("tok_embeddings.weight", "tok_embeddings"),
        ("weight", "weight"),
    ],
)
def test_the_layer_of_a_parameter(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize("num_fragments", [0, -1, 3])
def test_more_fragments_than_layers_are_refused(num_fragments):
    with pytest.raises(ValueError, match=f"num_fragments = {num_fragments}: must be between 1 and .* layers.0, norm"):
        assign_by_bytes({"layers.0.w": 1, "norm.weight": 1}, num_fragments)
