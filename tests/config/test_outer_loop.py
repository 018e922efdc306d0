"""``[semi_sync.NAME]``: settings that belong to one method, codec, aggregation or outer optimizer."""

import json

import pytest

from titan_ext.config import load_site
from titan_ext.config.outer_loop import plan_of
from titan_ext.config.resolved import dump_resolved
from titan_ext.errors import UserError
from titan_ext.semi_sync.wire.codecs import TopK

RUN = """
[model]
flavor = "tiny"
[training]
seq_len = 64
steps = 40
{outer}
[[site]]
name = "a"
data = "builtin:code"
[[site]]
name = "b"
data = "builtin:docs"
"""


@pytest.fixture
def load(tmp_path):
    def load(outer, *flags):
        path = tmp_path / "run.toml"
        path.write_text(RUN.format(outer=outer))
        return load_site(path, "a", list(flags))

    return load


def test_a_table_reaches_what_it_is_named_after(load, tmp_path):
    outer = '[semi_sync]\nmethod = "sparta"\ncodec = "topk"\n[semi_sync.sparta]\nsparta_fraction = 0.5\n[semi_sync.topk]\ndensity = 0.25'
    site = load(outer)
    plan = plan_of(site.config)
    assert plan.rules[0].apply.fraction == 0.5
    assert plan.rules[1].wire.codec == TopK(0.25)
    resolved = dump_resolved(site)
    assert resolved["semi_sync"]["sparta"] == {"sparta_fraction": 0.5} and "settings" not in resolved["semi_sync"]
    (tmp_path / "again.json").write_text(json.dumps(resolved))
    assert plan_of(load_site(tmp_path / "again.json").config) == plan


def test_flags_reach_it_too(load):
    flags = ["--semi_sync.method=mt_dao", "--optimizer.name=QHAdamW", "--semi_sync.mt_dao.second_moment_sync_every=7"]
    assert plan_of(load("", *flags).config).rules[-1].period == 7


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        ('[semi_sync]\nmethod = "diloco"\n[semi_sync.sparta]\nsparta_fraction = 0.5', ["sparta", 'method = "sparta"']),
        (
            '[semi_sync]\nmethod = "sparta"\n[semi_sync.sparta]\nsparta_fraction = 2',
            ["semi_sync.sparta.sparta_fraction = 2"],
        ),
        (
            '[semi_sync]\nmethod = "sparta"\n[semi_sync.sparta]\nfraction = 0.1',
            ["semi_sync.sparta.fraction", "sparta_fraction"],
        ),
        ('[semi_sync]\nmethod = "diloco"\n[semi_sync.diloco]\nx = 1', ["semi_sync.diloco", "no settings of its own"]),
        ('[semi_sync]\ncodec = "topk"\n[semi_sync.topk]\ndensity = 0', ["semi_sync.topk.density = 0"]),
        ("[semi_sync.settings.topk]\ndensity = 0.1", ["semi_sync.settings", "[semi_sync.NAME]"]),
        ('[semi_sync]\nouter_optimizer = "adam"\nouter_momentum = 0.9', ["outer_momentum = 0.9", "does not take it"]),
        ('[semi_sync]\nmethod = "no_package.mine"', ["no_package.mine", "no module"]),
        ('[semi_sync]\nmethod = "json.mine"', ["json.mine", "registers no method"]),
        ('[semi_sync]\ncodec = "int9"', ["codec", "int9", "bf16"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(load, outer, words):
    with pytest.raises(UserError) as caught:
        load(outer)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outer", "flags", "note"),
    [
        ("", ["--semi_sync.method=diloco"], None),
        ("", ["--semi_sync.method=diloco", "--semi_sync.sites_per_round=1"], None),
        ("", ["--semi_sync.method=diloco", "--semi_sync.sites_per_round=2"], "sites_per_round = 2 of 2 sites"),
        ("", ["--semi_sync.method=diloco", "--semi_sync.aggregation=median"], '"median" needs 3 sites'),
        (
            '[semi_sync]\naggregation = "trimmed_mean"\n[semi_sync.trimmed_mean]\nsites = 3',
            ["--semi_sync.method=diloco"],
            '"trimmed_mean" needs 7 sites',
        ),
        ("", ["--semi_sync.method=muloco", "--optimizer.name=AdamW"], 'is made for optimizer.name = "Muon", not AdamW'),
        (
            "[optimizer_switch]\nstep = 40\nlr_scale = 2.0",
            ["--semi_sync.method=none"],
            "before optimizer_switch.step (40)",
        ),
        ("[optimizer_switch]\nstep = 39\nlr_scale = 2.0", ["--semi_sync.method=none"], None),
        ("[optimizer_switch]\nstep = 39", ["--semi_sync.method=none"], "optimizer_switch.step = 39 changes nothing"),
    ],
)
def test_what_comes_to_nothing_is_said(load, outer, flags, note):
    notes = load(outer, *flags).notes
    assert any(note in each for each in notes) if note else not notes
