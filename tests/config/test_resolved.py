"""The resolved configuration: complete, reloadable, and torchtitan's where nobody said otherwise."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_ext.config import check_world_size, dump_resolved, load_run, load_site, save_resolved
from titan_ext.config.defaults import DEFAULTS
from titan_ext.config.settings import Origin
from titan_ext.errors import UserError

from .conftest import GOOD

RICH = GOOD.replace(
    "[[site]]",
    """
[optimizer]
lr = 2e-3
[activation_checkpoint]
mode = "full"
[parallelism]
data_parallel_shard_degree = 2
context_parallel_load_balancer = "none"
[replica]
min_sites = 2
lighthouse = "127.0.0.1:29510"
[[site]]""",
    1,
)


def settings_of(config: object) -> dict:
    """All fields of a trainer config that say something of the settings, as comparable values."""
    found = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    spec = found.pop("model_spec")
    return found | {"model": (spec.name, spec.flavor, spec.model.dim, len(spec.model.layers), spec.model.vocab_size)}


@pytest.mark.parametrize("text", [GOOD, RICH])
def test_it_loads_to_an_equal_site(text: str, write: Callable) -> None:
    site = load_site(write(text), "beta", ["--training.steps", "12"])
    Path("again.json").write_text(json.dumps(dump_resolved(site)))
    again = load_site("again.json")
    assert settings_of(again.config) == settings_of(site.config)
    assert (again.name, again.index, again.count, again.nproc, again.weight) == ("beta", 1, 2, site.nproc, 1.0)
    assert dump_resolved(again) | {"resolved": None} == dump_resolved(site) | {"resolved": None}


def test_it_is_saved_beside_the_run(write: Callable) -> None:
    site = load_site(write(), "alpha")
    Path(site.config.dump_folder).mkdir(parents=True)
    path = save_resolved(site)
    assert path == Path("runs/demo/alpha/config.json")
    assert json.loads(path.read_text())["training"]["seq_len"] == 64


def test_unset_sections_are_torchtitans_but_for_our_listed_defaults(write: Callable) -> None:
    from torchtitan.trainer import Trainer as Upstream

    from titan_ext.config.build import flavor_config, model_module

    site = load_site(write('[[site]]\nname = "alpha"\ndata = "builtin:code"\n'))
    flavor = flavor_config(model_module(site.settings), site.model.flavor) or Upstream.Config()
    ours = {default.key for default in DEFAULTS}
    sections = "training parallelism lr_scheduler checkpoint metrics compile comm debug profiler"
    for section in sections.split():
        for each in dataclasses.fields(getattr(Upstream.Config(), section)):
            key = f"{section}.{each.name}"
            if key not in ours and site.derived.get(key) is not Origin.PLATFORM and not each.name.startswith("_"):
                expected = getattr(getattr(flavor, section), each.name)
                assert getattr(getattr(site.config, section), each.name) == expected, f"{section}.{each.name}"


def test_every_default_of_ours_names_a_key_and_a_reason() -> None:
    from titan_ext.trainer.trainer import Trainer

    plain = Trainer.Config()
    for default in DEFAULTS:
        section, name = default.key.split(".")
        assert hasattr(getattr(plain, section), name) and default.why


def test_what_torchrun_started_must_match(write: Callable) -> None:
    site = load_site(write(RICH), "alpha")
    check_world_size(site.config, 2)
    with pytest.raises(UserError, match='site "alpha": torchrun started 3 rank.*need 2'):
        check_world_size(site.config, 3)
    check_world_size(load_site(write(), "alpha").config, 4)


def test_the_files_that_people_start_from_load() -> None:
    folder = Path(__file__).parents[2] / "train_configs"
    for path in sorted(folder.glob("*.toml")):
        # A tokenizer that people download first, and weights that they make, are not in the repository.
        assert load_run(path, ["--tokenizer", "byte"], needs=()).sites, path
