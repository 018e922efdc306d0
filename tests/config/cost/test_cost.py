"""The costs that ``titan-ext check`` prints, against written-out arithmetic."""

import json
from collections import Counter
from collections.abc import Callable

import pytest

from tests.config.conftest import GOOD
from tests.config.test_bad_input import checked
from titan_ext.config import load_site, site_cost
from titan_ext.config.cost.outer_cost import rules_by_launch
from titan_ext.config.model import parameter_shapes
from titan_ext.errors import UserError
from titan_ext.semi_sync import Average, SyncRule, method_names


def numel(site: object) -> int:
    return sum(shape.numel() for shape in parameter_shapes(site.config).values())


def test_one_rank_with_diloco(write: Callable) -> None:
    site = load_site(write(), "alpha")
    cost, count = site_cost(site), numel(site)
    assert cost.parameters == count
    # fp32 parameters, gradients, two Adam states, the global copy, outer momentum, the send buffer and what the other site sends.
    assert cost.memory_bytes == 4 * count * (1 + 1 + 2 + 1 + 1 + 2)
    assert cost.rounds == 4  # every 5 of 20 steps
    assert cost.round_bytes == 4 * count  # a ring over two sites sends 2 x (n - 1) / n = 1 time the payload
    assert cost.run_bytes == 4 * cost.round_bytes and cost.bytes_per_step == cost.round_bytes / 5
    assert cost.every_step_bytes == 4 * count


def test_a_ring_over_three_sites(write: Callable) -> None:
    site = load_site(write(GOOD + '[[site]]\nname = "gamma"\ndata = "builtin:docs"\n'), "gamma")
    assert site_cost(site).round_bytes == round(4 * numel(site) * 4 / 3)


def test_averaging_needs_no_outer_optimizer(write: Callable) -> None:
    cost = site_cost(load_site(write(), "alpha", ["--semi_sync.method=local_sgd"]))
    assert cost.outer_optimizer_bytes == 0 and cost.global_copy_bytes > 0


def test_the_global_copy_may_live_in_host_memory(write: Callable) -> None:
    site = load_site(write(), "alpha", ["--semi_sync.outer_state_device=cpu"])
    cost, count = site_cost(site), numel(site)
    assert (cost.memory_bytes, cost.host_bytes) == (4 * count * 4, 4 * count * 4)


@pytest.mark.parametrize("method", [name for name in method_names() if name != "none"])
def test_every_method_has_a_cost(method: str, write: Callable) -> None:
    fixed = {
        "demo": ["--optimizer.name=DeMo", "--semi_sync.sync_every=1"],
        "mt_dao": ["--optimizer.name=QHAdamW"],
        "lordo": ["--optimizer.name=LowRankAdamW", "--optimizer.rank=8", "--optimizer.basis_from=outer"],
        "worldlm": ["--semi_sync.worldlm.federations=0"],  # more need regions
    }.get(method, [])
    plain = GOOD.replace('method = "diloco"\n', "")
    cost = site_cost(load_site(write(plain), "alpha", [f"--semi_sync.method={method}", *fixed]))
    assert cost.run_bytes > 0 and cost.rounds > 0 and cost.send_buffer_bytes > 0


def test_without_a_method_nothing_travels(write: Callable) -> None:
    cost = site_cost(load_site(write(), "alpha", ["--semi_sync.method=none"]))
    assert cost.rounds == cost.run_bytes == cost.global_copy_bytes == cost.send_buffer_bytes == 0


def test_fragments_travel_in_turn(write: Callable) -> None:
    site = load_site(write(), "alpha", ["--semi_sync.sync_every=4", "--semi_sync.num_fragments=2"])
    cost = site_cost(site)
    assert cost.rounds == 10 and cost.round_bytes < 4 * numel(site)
    assert cost.run_bytes == 5 * 4 * numel(site)


@pytest.mark.parametrize("key", ["data_parallel_shard_degree", "tensor_parallel_degree", "pipeline_parallel_degree"])
def test_parallel_ranks_share_the_memory(key: str, write: Callable) -> None:
    file = write()
    alone, split = (
        site_cost(load_site(file, "alpha", [f"--parallelism.{key}={degree}", "--model.n_layers=4"]))
        for degree in (1, 2)
    )
    assert 0.45 < split.memory_bytes / alone.memory_bytes < 0.65
    # Norms live on every tensor-parallel rank and travel from each.
    assert alone.round_bytes <= split.round_bytes < 1.01 * alone.round_bytes


def test_replicas_share_what_travels(write: Callable) -> None:
    file = write()
    key = "--parallelism.data_parallel_replicate_degree"
    alone, twice = (site_cost(load_site(file, "alpha", [f"{key}={degree}"])) for degree in (1, 2))
    assert twice.round_bytes == alone.round_bytes and twice.memory_bytes == alone.memory_bytes


def test_the_command_prints_settings_and_costs(write: Callable, capsys: pytest.CaptureFixture) -> None:
    from titan_ext import cli

    file = write()
    assert not cli.main(["check", file, "--training.steps", "30"])
    text = capsys.readouterr().out
    settings = ('site "beta" (2 of 2)', "seq_len = 64", "# file", "# flag", "outer_lr = 0.7", "# method")
    for fragment in (*settings, "cost of alpha, beta", "6 round(s) in 30 steps"):
        assert fragment in text


def test_the_command_prints_json(write: Callable, capsys: pytest.CaptureFixture) -> None:
    from titan_ext import cli

    assert not cli.main(["check", write(), "--site", "beta", "--json"])
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert site["name"] == "beta" and site["config"]["training"]["steps"] == 20 and site["cost"]["rounds"] == 4


def test_it_says_so_when_all_is_well(write: Callable, capsys: pytest.CaptureFixture) -> None:
    assert checked([write()], capsys) == (0, "")


@pytest.mark.parametrize("steps", [1, 5, 11, 12, 13, 50, 10**15])
def test_rounds_of_any_number_of_steps_are_counted(steps: int) -> None:
    """As by going through the schedule; at once also where that would take years."""
    rules = [
        SyncRule(name="a", period=4, apply=Average()),
        SyncRule(name="b", period=6, offset=2, apply=Average()),
        SyncRule(name="c", period=1, final=True, apply=Average()),
    ]
    found = rules_by_launch(rules, steps)
    if steps > 50:
        whole, rest = divmod(steps, 12)
        one, more = rules_by_launch(rules[:2], 12), rules_by_launch(rules[:2], rest)
        assert found == {key: whole * times + more.get(key, 0) for key, times in one.items()} | {(2,): 1}
        return
    due = [tuple(i for i, rule in enumerate(rules) if rule.due(step)) for step in range(1, steps + 1)]
    assert found == Counter([each for each in due if each]) + Counter([(2,)])


def test_a_group_of_sites_sends_among_itself(write: Callable) -> None:
    """Of three sites two share the embeddings; the third has nobody to send its own to."""
    scope = (
        '[[semi_sync.scopes]]\nname = "tables"\nparameters = ["tok_embeddings.*", "lm_head.*"]\nshared = "group"\n'
        'group = "language"\n'
    )
    text = GOOD + '[[site]]\nname = "gamma"\ndata = "builtin:docs"\n' + scope
    for name, language in (("alpha", "de"), ("beta", "de"), ("gamma", "en")):
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\nlabels = {{ language = "{language}" }}\n')
    path = write(text)
    for name, peers in (("alpha", 1), ("gamma", 0)):
        site = load_site(path, name)
        tables = sum(
            shape.numel()
            for name, shape in parameter_shapes(site.config).items()
            if name.split(".")[0] in ("tok_embeddings", "lm_head")
        )
        assert site_cost(site).round_bytes == round(4 * (numel(site) - tables) * 4 / 3) + peers * 4 * tables


def test_a_site_without_the_label_of_a_scope_is_refused(write: Callable) -> None:
    scope = '[[semi_sync.scopes]]\nname = "a"\nparameters = ["norm.*"]\nshared = "group"\ngroup = "language"\n'
    with pytest.raises(UserError, match=r'labels.*has no "language"'):
        load_site(write(GOOD + scope), "alpha")
