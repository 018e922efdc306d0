"""Plans: what their rules say, and what is refused."""

import itertools

import pytest

from titan_ext.semi_sync import (
    Average,
    SemiSyncConfig,
    SyncPlan,
    SyncRule,
    fill_defaults,
    method_names,
    register_method,
    resolve,
)
from titan_ext.semi_sync.methods.registry import METHODS


def overlaps(rules, horizon=400) -> bool:
    """Written out: does any rule start while another is in flight, or together with another that is applied elsewhere?"""
    launches = [(t, t + rule.delay) for t in range(1, horizon) for rule in rules if rule.due(t)]
    return any((a < c < b) or (a == c and b != d) for (a, b), (c, d) in itertools.permutations(launches, 2))


@pytest.mark.parametrize("seed", range(60))
def test_overlap_rule_equals_brute_force(seed):
    import random

    draw = random.Random(seed)
    rules = []
    for index in range(draw.randint(1, 3)):
        period = draw.choice([2, 3, 4, 6, 8, 12])
        rules.append(
            SyncRule(
                period=period,
                offset=draw.randrange(period),
                delay=draw.randrange(min(period, 4)),
                fragment=index,
                apply=Average(),
            )
        )
    try:
        SyncPlan(rules=tuple(rules))
        refused = False
    except ValueError:
        refused = True
    assert refused == overlaps(rules)


def test_every_fragment_is_launched_once_a_period():
    plan = resolve(SemiSyncConfig(method="diloco", sync_every=12, num_fragments=3, fragment_sync_delay=2))
    launches = [(step, index) for step in range(1, 25) for index in plan.due(step)]
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
        resolve(SemiSyncConfig(**settings))
    assert all(word in str(caught.value) for word in words)


def test_methods_bring_their_own_defaults_and_the_user_wins():
    assert fill_defaults(SemiSyncConfig(method="diloco")).outer_lr == 0.7
    assert fill_defaults(SemiSyncConfig(method="diloco", outer_lr=0.4)).outer_lr == 0.4
    assert fill_defaults(SemiSyncConfig(method="local_sgd")).outer_optimizer == "average"


def test_a_method_is_one_registered_function():
    with METHODS.isolated():

        @register_method("every_third_for_test", sync_every=3, outer_optimizer="average")
        def every_third(context):
            return [SyncRule(period=context.sync_every, apply=Average())]

        assert "every_third_for_test" in method_names()
        assert resolve(SemiSyncConfig(method="every_third_for_test")).due(6) == [0]
        with pytest.raises(ValueError, match="already registered"):
            register_method("every_third_for_test")(every_third)
    assert "every_third_for_test" not in method_names()
