"""Names of models: ours, torchtitan's, the user's own; what this machine cannot train is one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.conftest import GOOD
from tests.config.test_bad_input import ONE_SITE
from titan_ext.config import load_run, load_site, site_cost
from titan_ext.errors import UserError
from titan_ext.trainer.cpu import on_cpu

SITE = '[[site]]\nname = "a"\ndata = "builtin:code"\n'
NO_GPU = pytest.mark.skipif(not on_cpu(), reason="this machine has an accelerator")


def model(name: str, flavor: str = "debugmodel", keys: str = "") -> str:
    head = ONE_SITE.replace('"llama3"', f'"{name}"').replace('flavor = "debugmodel"', f'flavor = "{flavor}"')
    return head.replace("n_layers = 2", f"n_layers = 2\n{keys}") + SITE


@pytest.mark.parametrize(
    "name, flavor, keys, expected",
    [
        ("qwen3", "debugmodel", "", {"vocab_size": 264}),
        ("torchtitan.models.qwen3", "debugmodel_moe", "num_experts = 4\ntop_k = 2", {"num_experts": 4, "top_k": 2}),
        ("deepseek_v3", "debugmodel", "expert_dim = 32", {"expert_dim": 32, "num_experts": 8}),
        ("gpt_oss", "debugmodel", "vocab_size = 512", {"vocab_size": 512}),
        ("torchtitan.models.llama3", "debugmodel", "dim = 64\nn_heads = 4\nffn_dim = 96", {"dim": 64}),
    ],
)
def test_torchtitans_models_have_sizes_and_costs(write: Callable, name, flavor, keys, expected) -> None:
    from titan_ext.config.resolved import known_sizes

    site = load_site(write(model(name, flavor, keys)), "a")
    sizes = known_sizes(site.config.model_spec.model)
    assert expected.items() <= sizes.items() and sizes["n_layers"] == 2
    assert site_cost(site).memory_bytes > 4 * site_cost(site).parameters


@pytest.mark.parametrize(
    "text, said",
    [
        (model("qwem3"), ['model.name = "qwem3"', "unknown model", "did you mean qwen3?", "abbie"]),
        (model("qwen3", "30B-A3"), ['model.flavor = "30B-A3"', "unknown flavor", "did you mean 30B-A3B?"]),
        (model("qwen3", keys="n_layer = 3"), ["model.n_layer: unknown key", "did you mean n_layers?"]),
        (model("qwen3", keys="num_experts = 3"), ["model.num_experts = 3", "no part of that size"]),
        (model("gpt_oss", keys="top_k = 9"), ["model.top_k = 9", "9 of 8 experts"]),
        (
            model("deepseek_v3", keys="[parallelism]\nexpert_parallel_degree = 2"),
            ["parallelism.expert_parallel_degree = 2", "must divide the 1 ranks"],
        ),
        (
            model("gpt_oss", keys="[parallelism]\ndata_parallel_shard_degree = 3\nexpert_parallel_degree = 3"),
            ["parallelism.expert_parallel_degree = 3", "must divide the 8 experts of a layer"],
        ),
        (
            model("qwen3", keys="[parallelism]\ndata_parallel_shard_degree = 2\nexpert_parallel_degree = 2"),
            ["parallelism.expert_parallel_degree = 2", "must be 1: the model has no experts"],
        ),
        (
            model("qwen3", keys="[fomoe]\nsites_per_expert = 1"),
            ["fomoe.sites_per_expert = 1", "must be 0: the model has no"],
        ),
        (
            model(
                "gpt_oss",
                keys="[parallelism]\ndata_parallel_shard_degree = 2\nexpert_parallel_degree = 2\n[fomoe]\nsites_per_expert = 1",
            ),
            ["parallelism.expert_parallel_degree = 2", "must be 1 with fomoe.sites_per_expert"],
        ),
        (
            model("gpt_oss", keys="[fomoe]\nsites_per_expert = 3"),
            ["fomoe.sites_per_expert = 3", "must be from 1 to the 1 sites of the run, or 0"],
        ),
        (model("mine.plain"), ['model.name = "mine.plain"', "no function model_registry"]),
        (model("mine.no"), ['model.name = "mine.no"', "no module 'mine.no'"]),
        pytest.param(
            model("muse_glimmer"), ['model.name = "muse_glimmer"', "needs a GPU", "attention masks"], marks=NO_GPU
        ),
        pytest.param(
            model("flux", "flux-debug").replace("n_layers = 2\n", ""),
            ['model.name = "flux"', "needs a GPU", "no decoder of text"],
            marks=NO_GPU,
        ),
        pytest.param(
            model("qwen3", "debugmodel_moe", 'moe_comm_backend = "minimal_async_ep"'),
            ['model.name = "qwen3"', "needs a GPU", 'moe_comm_backend = "standard"'],
            marks=NO_GPU,
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_what_cannot_be_had_is_one_line(write: Callable, monkeypatch, tmp_path: Path, text, said) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "plain.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_run(write(text))
    lines = [line for line in str(caught.value).splitlines() if all(word in line for word in said)]
    assert len(lines) == 1, str(caught.value)


def test_a_module_of_the_users_that_is_no_package(write: Callable, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "plain_model.py").write_text("from titan_ext.models.llama3 import flavors, model_registry\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("plain_model", "titan_ext.models.llama3"):
        assert load_run(write(GOOD.replace('"llama3"', f'"{name}"'))).sites[0].config.model_spec.name == "llama3"
