"""Plans, schedules and fragments: pure functions."""

import itertools

import pytest

from titan_ext.semi_sync import SemiSyncConfig, SyncPlan, SyncRow, method_names, register_method
from titan_ext.semi_sync.plan.fragments import deal_by_bytes, deal_by_modules, layer_of


def overlaps(rows, horizon=400) -> bool:
    """Written out: does any row start while another is in flight, or together with another landing elsewhere?"""
    launches = [(t, t + row.delay) for t in range(1, horizon) for row in rows if row.due(t)]
    return any(
        (a < c < b) or (a == c and b != d) for (a, b), (c, d) in itertools.permutations(launches, 2)
    )


@pytest.mark.parametrize("seed", range(60))
def test_overlap_rule_equals_brute_force(seed):
    import random

    draw = random.Random(seed)
    rows = []
    for index in range(draw.randint(1, 3)):
        period = draw.choice([2, 3, 4, 6, 8, 12])
        rows.append(
            SyncRow(period=period, offset=draw.randrange(period), delay=draw.randrange(min(period, 4)), fragment=index)
        )
    try:
        SyncPlan(tuple(rows))
        refused = False
    except ValueError:
        refused = True
    assert refused == overlaps(rows)


def test_every_fragment_is_launched_once_a_period():
    plan = SemiSyncConfig(method="diloco", sync_every=12, num_fragments=3, fragment_sync_delay=2).plan()
    launches = [(clock, index) for clock in range(1, 25) for index in plan.due(clock)]
    assert launches == [(2, 0), (6, 1), (10, 2), (14, 0), (18, 1), (22, 2)]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(method="dilocoo"), ["method", "dilocoo", "did you mean 'diloco'"]),
        (dict(sync_every=0), ["sync_every = 0", "at least 1"]),
        (dict(sync_every=10, num_fragments=3), ["num_fragments = 3", "divisor of sync_every (10)"]),
        (dict(sync_every=4, num_fragments=2, fragment_sync_delay=2), ["fragment_sync_delay = 2", "0 to 1"]),
        (dict(fragment_update_alpha=1.5), ["fragment_update_alpha = 1.5"]),
        (dict(outer_optimizer="sdg"), ["outer_optimizer", "did you mean 'sgd'"]),
        (dict(outer_momentum=1.0), ["outer_momentum = 1.0"]),
        (dict(bucket_mib=0), ["bucket_mib = 0"]),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError) as caught:
        SemiSyncConfig(**settings).validate()
    assert all(word in str(caught.value) for word in words)


def test_methods_bring_their_own_defaults_and_the_user_wins():
    assert SemiSyncConfig(method="diloco").resolved().outer_lr == 0.7
    assert SemiSyncConfig(method="diloco", outer_lr=0.4).resolved().outer_lr == 0.4
    assert SemiSyncConfig(method="local_sgd").resolved().outer_optimizer == "average"


def test_a_method_is_one_registered_function():
    @register_method("every_third_for_test", sync_every=3, outer_optimizer="average")
    def every_third(config):
        return SyncPlan((SyncRow(period=config.sync_every),))

    assert "every_third_for_test" in method_names()
    assert SemiSyncConfig(method="every_third_for_test").plan().due(6) == [0]
    with pytest.raises(ValueError, match="already registered"):
        register_method("every_third_for_test")


def test_layers_are_dealt_evenly_and_whole():
    sizes = {"tok_embeddings.weight": 500}
    for layer in range(8):
        sizes |= {f"layers.{layer}.attention.wq.weight": 60, f"layers.{layer}.ffn.w1.weight": 40}
    sizes["norm.weight"] = 4
    home = deal_by_bytes(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if home[name] == fragment) for fragment in range(3)]
    assert max(loads) - min(loads) <= 100
    for layer in range(8):
        assert home[f"layers.{layer}.attention.wq.weight"] == home[f"layers.{layer}.ffn.w1.weight"]
    assert layer_of("layers.11.ffn.w1.weight") == "layers.11"
    with pytest.raises(ValueError, match="between 1 and the number of layers"):
        deal_by_bytes(sizes, 11)


def test_fragments_by_module_name():
    sizes = {"layers.1.w": 1, "layers.10.w": 1, "norm.weight": 1}
    assert deal_by_modules(sizes, [["layers.1"], ["layers.10", "norm"]]) == {
        "layers.1.w": 0,
        "layers.10.w": 1,
        "norm.weight": 1,
    }
    with pytest.raises(ValueError, match="matches no parameter"):
        deal_by_modules(sizes, [["layers.2"]])
    with pytest.raises(ValueError, match="in no fragment"):
        deal_by_modules(sizes, [["layers.1"]])
    with pytest.raises(ValueError, match="in fragment 0 and in 1"):
        deal_by_modules(sizes, [["layers.1", "layers.10", "norm"], ["norm"]])
