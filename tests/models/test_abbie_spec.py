"""AbbIE's flavors, settings, pipeline cuts, and what is refused before training."""

from types import SimpleNamespace

import pytest
from torchtitan.config import ParallelismConfig
from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part

from titan_ext.config import load_site
from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.abbie import flavors, model_registry


@pytest.mark.parametrize(
    "overrides, split",
    [
        ({"n_layers": 24}, (6, 12, 6)),
        ({"n_layers": 24, "body_layers": 8}, (8, 8, 8)),
        ({"n_layers": 24, "body_layers": 16, "head_layers": 2}, (2, 16, 6)),
        ({"n_layers": 1}, (0, 1, 0)),
        ({"n_layers": 5}, (1, 2, 2)),
    ],
)
def test_split(overrides, split):
    config = model_registry("tiny", **overrides).model
    assert (config.head_layers, config.body_layers, len(config.layers) - config.body.stop) == split


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(flavor="tinny"), ["model.flavor", "did you mean 'tiny'"]),
        (dict(iteration=3), ["iteration", "did you mean 'iterations'"]),
        (dict(n_heads=5), ["model.n_heads = 5"]),
        (dict(iterations=0), ["model.iterations = 0", "at least 1"]),
        (dict(eval_iterations=-1), ["model.eval_iterations = -1"]),
        (dict(body_layers=5), ["model.body_layers = 5", "model.n_layers (4)"]),
        (dict(body_layers=0), ["model.body_layers = 0"]),
        (dict(head_layers=3), ["model.head_layers = 3", "2 blocks"]),
        (dict(max_iterations=4), ["model.max_iterations = 4", "model.iteration_sampling"]),
        (dict(skip="none", final_skip=True), ["model.final_skip = True", "model.skip"]),
        (dict(skip="none", between="mean"), ["model.between = 'mean'", "model.skip"]),
        (dict(backprop_iterations=1), ["model.backprop_iterations = 1", "model.skip = 'input'"]),
        (dict(variant="depth", skip="input"), ["model.skip = 'input'", "depth"]),
    ],
)
def test_errors_name_the_key(call, words):
    with pytest.raises(UserError) as caught:
        get_model_spec("abbie", **({"flavor": "tiny"} | call))
    assert all(word in str(caught.value) for word in words)


def write(folder, text: str = ""):
    path = folder / "run.toml"
    path.write_text(f'[model]\nname = "abbie"\nflavor = "tiny"\n{text}\n[[site]]\nname = "a"\ndata = "builtin:code"\n')
    return path


def test_settings_reach_the_model_from_the_file(tmp_path):
    text = 'iterations = 3\nskip = "input"\niteration_sampling = "uniform"\nbody_layers = 1\n[debug]\nseed = 5'
    site = load_site(write(tmp_path, text))
    config = site.config.model_spec.model
    assert (config.iterations.train, config.iterations.most, config.recurrence.skip) == (3, 5, "input")
    assert config.body == range(1, 2)
    config.update_from_config(config=site.config)
    assert config.seed == 5
    with pytest.raises(UserError, match="model.skip.*prev, input, none"):
        load_site(write(tmp_path, 'skip = "previous"'))


@pytest.mark.parametrize("text", ['iteration_sampling = "poisson"', 'variant = "depth"'])
def test_cuda_graphs_are_refused_where_steps_differ(tmp_path, text):
    config = load_site(write(tmp_path, text)).config
    config.training.disable_cuda_graphs = False
    with pytest.raises(UserError, match="training.disable_cuda_graphs"):
        config.model_spec.model.update_from_config(config=config)


def stages(degree: int, schedule: str = "1F1B", modules=None, flavor: str = "tiny", **overrides):
    config = model_registry(flavor, **overrides).model
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule, module_fqns_per_model_part=modules
    )
    return config, config.pipeline_stages(parallelism, SimpleNamespace(pp=degree))


@pytest.mark.parametrize(
    "degree, schedule, overrides",
    [
        (2, "1F1B", {}),
        (3, "1F1B", {"n_layers": 9}),
        (4, "GPipe", {"n_layers": 24}),
        (2, "Interleaved1F1B", {"n_layers": 8}),
    ],
)
@pytest.mark.parametrize("flavor", ["tiny", "tiny-depth"])
def test_the_body_is_on_one_stage(degree, schedule, overrides, flavor):
    config, found = stages(degree, schedule, flavor=flavor, **overrides)
    assert len(found) == degree * (2 if "Interleaved" in schedule else 1) and all(found)
    home = next(names for names in found if config.body_modules[0] in names)
    assert set(config.body_modules) <= set(home)
    everything = [name for names in found for name in names if name not in ("state_noise", "adapter", "state_norm")]
    (one,) = _generate_llm_fqn_per_model_part(1, len(config.layers))
    assert everything == one


def test_the_cut_balances_what_is_computed():
    """24 blocks of which 4 run 5 times: the body's 20 stand against 10 on either side."""
    _, found = stages(3, n_layers=24, body_layers=4, iterations=5)
    assert [len([name for name in names if name.startswith("layers")]) for names in found] == [10, 4, 10]


@pytest.mark.parametrize(
    "degree, modules, words",
    [
        (6, None, ["parallelism.pipeline_parallel_degree = 6", "6 stages", "into 5", "model.body_layers = 2"]),
        (2, [["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "layers.3", "norm", "lm_head"]],
         ["parallelism.module_fqns_per_model_part", "layers.1 is on stage 0", "layers.2 on stage 1"]),
        (2, [["tok_embeddings", "layers.0", "layers.1"], ["layers.3", "norm", "lm_head"]], ["layers.2 is on no stage"]),
    ],
)  # fmt: skip
def test_a_cut_through_the_body_is_refused(degree, modules, words):
    with pytest.raises(UserError) as caught:
        stages(degree, modules=modules)
    assert all(word in str(caught.value) for word in words)


def test_a_users_cut_around_the_body_is_taken():
    modules = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "lm_head"]]
    assert stages(2, modules=modules)[1] == modules


@pytest.mark.parametrize("flavor", flavors)
def test_torchtitans_own_entry_point_finds_every_flavor(flavor):
    from torchtitan.config import ConfigManager

    name = f"abbie_{flavor.lower().replace('-', '_')}"
    arguments = ["--module", "titan_ext.models.abbie", "--config", name, "--training.steps", "7"]
    config = ConfigManager().parse_args([*arguments, "--hf_assets_path", "."])
    assert (config.training.steps, config.model_spec.flavor) == (7, flavor)
    assert config.lr_scheduler.decay_ratio == 0.2
    assert config.loss.loss_fn.global_vocab_size == config.model_spec.model.vocab_size
