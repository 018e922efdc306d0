"""Keys and values of earlier versions: refused by naming the new one, which is accepted."""

from collections.abc import Callable

import pytest

from titan_ext.config import load_run
from titan_ext.config.renamed import RENAMED, RENAMED_VALUES
from titan_ext.errors import UserError

from .conftest import GOOD

SCOPE = '[[semi_sync.scopes]]\nname = "tables"\nparameters = ["tok_embeddings.*"]\n'
DEMO = dict(method="demo", sync_every="1", tables='[optimizer]\nname = "DeMo"\n')
SECTIONS = """
[semi_sync]
method = "{method}"
sync_every = {sync_every}
{semi_sync}
{tables}
[replica]
{replica}
"""
# Old key: its value, and the new form in place: method, [semi_sync], further tables, [replica].
CASES = {
    "replica.fetch_ahead": ("false", dict(replica="prefetch_state = false")),
    "replica.roll_back": ("true", dict(replica="allow_rollback = true")),
    "semi_sync.demo_chunk": ("32", DEMO | dict(tables=DEMO["tables"] + "[semi_sync.demo]\ncompression_chunk = 32")),
    "semi_sync.demo_kept": ("16", DEMO | dict(tables=DEMO["tables"] + "[semi_sync.demo]\ncompression_topk = 16")),
    "semi_sync.first_moment_sync_every": (
        "16",
        dict(
            method="des_loc",
            tables="[semi_sync.des_loc]\nfirst_moment_sync_every = 16\nsecond_moment_sync_every = 32",
        ),
    ),
    "semi_sync.global_device": ('"cpu"', dict(semi_sync='outer_state_device = "cpu"')),
    "semi_sync.gossip_gamma": ("0.5", dict(method="noloco", tables="[semi_sync.noloco]\ngossip_gamma = 0.5")),
    "semi_sync.half_life_periods": (
        "true",
        dict(method="des_loc", tables="[semi_sync.des_loc]\nhalf_life_periods = true"),
    ),
    "semi_sync.momentum_sync_every": (
        "[8]",
        dict(method="mt_dao", tables='[semi_sync.mt_dao]\nmomentum_sync_every = [8]\n[optimizer]\nname = "QHAdamW"'),
    ),
    "semi_sync.order": ('"paper"', dict(method="local_sgd", semi_sync='sync_point = "before_step"')),
    "semi_sync.scopes.topk_density": ("0.1", dict(tables=SCOPE + 'codec = "topk"\nsettings.topk.density = 0.1')),
    "semi_sync.second_moment_sync_every": (
        "16",
        dict(
            method="mt_dao", tables='[semi_sync.mt_dao]\nsecond_moment_sync_every = 16\n[optimizer]\nname = "QHAdamW"'
        ),
    ),
    "semi_sync.sparta_share": ("0.01", dict(method="sparta", tables="[semi_sync.sparta]\nsparta_fraction = 0.01")),
    "semi_sync.topk_density": ("0.1", dict(semi_sync='codec = "topk"', tables="[semi_sync.topk]\ndensity = 0.1")),
    "semi_sync.trimmed_sites": (
        "2",
        dict(semi_sync='aggregation = "trimmed_mean"', tables="[semi_sync.trimmed_mean]\nsites = 2"),
    ),
}


def file_with(**places: str) -> str:
    """``GOOD`` with another ``[semi_sync]`` section and what stands in the ``places`` of ``SECTIONS``."""
    own = SECTIONS.format(**dict(method="diloco", sync_every="8", semi_sync="", tables="", replica="") | places)
    return GOOD.replace('[semi_sync]\nmethod = "diloco"\nsync_every = 5\n', own)


def file_with_old(key: str, value: str) -> str:
    section, _, name = key.rpartition(".")
    line = f"{name} = {value}"
    places = {"semi_sync.scopes": dict(tables=SCOPE + line)}
    return file_with(**places.get(section, {section: line}))


def complaint(text: str, write: Callable, flags: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_run(write(text), flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_renamed_key_has_a_case() -> None:
    assert CASES.keys() == RENAMED.keys()


@pytest.mark.parametrize("key", CASES)
def test_an_old_key_is_refused_by_the_new_one(key: str, write: Callable) -> None:
    value, _ = CASES[key]
    shown = key.replace("scopes.", "scopes[0].")
    assert f"{shown}: has been renamed to {RENAMED[key]}" in complaint(file_with_old(key, value), write)


@pytest.mark.parametrize("key", CASES)
def test_the_new_key_is_accepted(key: str, write: Callable) -> None:
    load_run(write(file_with(**CASES[key][1])))


def test_an_old_value_of_an_old_key_is_translated_with_it(write: Callable) -> None:
    said = complaint(file_with(semi_sync='order = "paper"'), write)
    assert 'semi_sync.order: has been renamed to semi_sync.sync_point, and "paper" to "before_step"' in said


def test_an_old_key_as_a_flag(write: Callable) -> None:
    said = complaint(file_with(), write, ("--replica.roll_back", "true"))
    assert "flag --replica.roll_back: has been renamed to replica.allow_rollback" in said


@pytest.mark.parametrize(
    "key, old, new", [(key, *pair) for key, pairs in RENAMED_VALUES.items() for pair in pairs.items()]
)
def test_an_old_value_is_refused_by_the_new_one(key: str, old: str, new: str, write: Callable) -> None:
    shown = key.replace("scopes.", "scopes[0].")
    assert f'{shown} = "{old}": has been renamed to "{new}"' in complaint(file_with_old(key, f'"{old}"'), write)
