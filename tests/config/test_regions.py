"""``[[region]]`` tables and the tree that ``titan-ext check`` draws."""

from collections.abc import Callable

import pytest

from tests.config.conftest import GOOD
from titan_ext.config import load_run, load_site, site_cost
from titan_ext.config.model import parameter_shapes
from titan_ext.config.tree import render_tree
from titan_ext.errors import UserError

REGIONS = """
[[region]]
name = "eu"
[region.replica]
quorum_timeout_seconds = 77
[[region]]
name = "de"
parent = "eu"
[region.training]
local_batch_size = 4
[[region]]
name = "us"
"""
SITES = {"alpha": "eu/de", "beta": "eu/de", "gamma": "eu", "delta": "us"}


def tree_text(semi_sync: str = "", regions: str = REGIONS) -> str:
    text = GOOD.replace("sync_every = 5\n", f"sync_every = 5\n{semi_sync}\n")
    text += "".join(f'[[site]]\nname = "{name}"\ndata = "builtin:docs"\n' for name in ("gamma", "delta"))
    for name, region in SITES.items():
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\nregion = "{region}"\n')
    return text + regions


def test_sites_have_the_settings_of_their_regions(write: Callable) -> None:
    sites = {site.name: site.config for site in load_run(write(tree_text())).sites}
    assert [config.replica.quorum_timeout_seconds for config in sites.values()][:3] == [77, 77, 77]
    assert sites["delta"].replica.quorum_timeout_seconds != 77
    assert [config.training.local_batch_size for config in sites.values()] == [4, 4, 2, 2]
    assert sites["alpha"].site.labels == {"region": "eu/de"}
    assert {name: config.site.nearest for name, config in sites.items()} == {
        "alpha": ["beta", "gamma"], "beta": ["alpha", "gamma"], "gamma": ["alpha", "beta"], "delta": [],
    }  # fmt: skip


def test_costs_are_those_of_the_tree_and_check_draws_it(write: Callable) -> None:
    path = write(tree_text('topology = "regions"\nregion_sync_every = 2'))
    run = load_run(path)
    values = 4 * sum(shape.numel() for shape in parameter_shapes(run.sites[0].config).values())
    # In the order of names alpha speaks for eu/de and for eu, delta for us; two regions send each other one copy. alpha
    # gives the result to beta and gamma, who gave it theirs.
    rounds_of_all = {"alpha": values * 3, "beta": values, "gamma": values, "delta": values}
    for site in run.sites:
        # 20 steps: 4 rounds of all; a region averages at each second step, but for those of a round of all (10, 20).
        own = 8 * values if SITES[site.name] == "eu/de" else 0
        assert site_cost(site).run_bytes == 4 * rounds_of_all[site.name] + own
    text = render_tree(run.sites)
    assert text is not None and "tree of 4 site(s) in 2 region(s)" in text
    assert "between all: diloco every 5 steps" in text and "in a region: average of parameters every 2 steps" in text
    lines = [line.strip(" │├└") for line in text.splitlines()[3:]]
    assert [" ".join(line.split(":")[0].split()[:2]) for line in lines] == [
        "region eu", "region eu/de", "site alpha", "site beta", "site gamma", "region us", "site delta",
    ]  # fmt: skip


def test_key_layers_of_federations_cost_a_sum_in_each_and_are_drawn(write: Callable) -> None:
    """Of the four sites alpha, beta and gamma are in eu, alpha and beta in eu/de: three levels with the root."""
    own = "[semi_sync.worldlm]\nfederations = 2\nkey_blocks = 0.0\nrouting_share = 0.0\n"
    run = load_run(write(tree_text(f'topology = "regions"\n{own}').replace('method = "diloco"', 'method = "worldlm"')))
    shapes = parameter_shapes(run.sites[0].config)
    values = 4 * sum(shape.numel() for shape in shapes.values())
    keys = 4 * sum(shape.numel() for name, shape in shapes.items() if name.startswith("lm_head."))
    root = {"alpha": values * 3, "beta": values, "gamma": values, "delta": values}
    # A mean takes a shard to each owner and the sum back; two sites send each other all.
    of_eu, of_de = 2 * keys * 2 // 3, keys
    federations = {"alpha": of_eu + of_de, "beta": of_eu + of_de, "gamma": of_eu, "delta": 0}
    for site in run.sites:
        sent = site_cost(site).run_bytes / 4
        assert sent == pytest.approx(root[site.name] + federations[site.name], abs=8)
    text = render_tree(run.sites)
    assert text is not None and "among sites of 2 name(s) in common: worldlm.keys/level 2/0 every 5 steps" in text


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("pull = 2.0", "semi_sync.worldlm.pull = 2.0"),
        ("nonsense = 1", "semi_sync.worldlm.nonsense"),
        ("federations = 0\nrouting_share = 0.5", "routing_share = 0.5"),
    ],
)
def test_what_is_wrong_with_federations_is_named(own: str, words: str, write: Callable) -> None:
    text = tree_text(f"[semi_sync.worldlm]\n{own}").replace('method = "diloco"', 'method = "worldlm"')
    with pytest.raises(UserError, match=words):
        load_run(write(text))


def test_without_regions_no_tree_is_drawn(write: Callable) -> None:
    assert render_tree(load_run(write()).sites) is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('region = "us"', 'region = "u"', r'region = "u".*no \[\[region\]\] has this path'),
        ('region = "us"\n', "", "region.*is missing"),
        ('parent = "eu"', 'parent = "asia"', r"region\[1\]\.parent"),
        ('name = "us"\n', 'name = "eu"\n', "two regions have this path"),
        ('name = "us"\n', 'name = "u s"\n', r"region\[2\]\.name"),
        ("[region.replica]\nquorum_timeout_seconds", "[region.nonsense]\nquorum_timeout_seconds", "nonsense"),
        ('region = "us"', 'region = "us"\nlabels = { region = "us" }', "labels.region"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, words: str, write: Callable) -> None:
    text = tree_text('topology = "regions"')
    assert old in text
    with pytest.raises(UserError, match=words):
        load_run(write(text.replace(old, new)))


@pytest.mark.parametrize("region", ["a/b/c/d", "a//b", "a b", ""])
def test_a_region_is_a_path(region: str, write: Callable) -> None:
    with pytest.raises(UserError, match="region"):
        load_site(write(GOOD.replace('name = "alpha"\n', f'name = "alpha"\nregion = "{region}"\n')), "alpha")
