"""Every inner optimizer from a configuration file: it loads, costs what it keeps, trains and resumes in torchtitan."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from titan_ext.config import dump_resolved, load_run, load_site, site_cost
from titan_ext.config.binder import Binder
from titan_ext.config.model import parameter_shapes
from titan_ext.config.optimizer import bind_optimizer
from titan_ext.config.outer_loop import plan_of
from titan_ext.config.settings import Origin, Settings
from titan_ext.trainer.optimizers import OptimizersContainer

from .conftest import GOOD
from .test_bad_input import checked

# Name -> settings that are not the defaults, as TOML, and what the optimizer must get.
SETTINGS = {
    "ADOPT": (
        'lr = 1\nbetas = [0.9, 0.99]\nclip_exponent = inf\nstate_dtype = "bfloat16"',
        {"lr": 1.0, "betas": (0.9, 0.99), "clip_exponent": float("inf"), "state_dtype": torch.bfloat16},
    ),
    "QHAdamW": (
        "lr = 2e-3\nbetas = [0.9, 0.999, 0.95]\nomegas = [0.2, 0.5]\nweight_decay = 0.1\neps = 1e-6",
        {"lr": 2e-3, "betas": (0.9, 0.999, 0.95), "omegas": (0.2, 0.5), "weight_decay": 0.1, "eps": 1e-6},
    ),
    "QHADOPT": (
        'betas = [0, 0.9, 0.999, 0.95]\nomegas = [0.2, 0.3, 0.5]\nstate_dtype = "float32"',
        {"betas": (0.0, 0.9, 0.999, 0.95), "omegas": (0.2, 0.3, 0.5), "state_dtype": torch.float32},
    ),
    "QHSGDM": ("betas = [0.9, 0.999]\nomegas = [0.2, 0.5]", {"betas": (0.9, 0.999), "omegas": (0.2, 0.5)}),
    "Muon": (
        'lr = 1e-2\nmomentum = 0.9\nadamw_lr = 0.1\nadamw_names = ["embed", "w1"]',
        {"lr": 1e-2, "momentum": 0.9, "adamw_lr": 0.1, "adamw_names": ("embed", "w1")},
    ),
    "DeMo": ("lr = 1e-2\nbeta = 0.99", {"lr": 1e-2, "beta": 0.99}),
    "SGD": ("lr = 0.1\nmomentum = 0.9\nnesterov = true", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def written(name: str, settings: str = "") -> str:
    """``GOOD`` with an ``[optimizer]``, under the one method that DeMo has."""
    text = GOOD.replace('method = "diloco"\nsync_every = 5', 'method = "demo"') if name == "DeMo" else GOOD
    return text.replace("[[site]]", f'[optimizer]\nname = "{name}"\n{settings}\n[[site]]', 1)


class Small(nn.Module):
    """Parameters of every kind that optimizers tell apart."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(8, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.wq = nn.Linear(6, 4, dtype=dtype)


def built(name: str, settings: str, write: Callable, model: nn.Module, **changes: Any) -> OptimizersContainer:
    config = load_site(write(written(name, settings)), "alpha").config.optimizer
    return replace(config, **changes).build(model_parts=[model])


def step(optimizers: OptimizersContainer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizers.model_parts[0].parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizers.step()
    optimizers.zero_grad()


def test_every_optimizer_of_ours_is_here() -> None:
    from titan_ext.optim import LowRankAdamW

    own = OptimizersContainer.own_optimizers()
    assert {name for name, factory in own.items() if factory is not LowRankAdamW} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_optimizer(name: str, write: Callable) -> None:
    settings, wanted = SETTINGS[name]
    (optimizer,) = built(name, settings, write, Small()).optimizers
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == name
    found = {key: group[key] for key in wanted}
    assert found == wanted and {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in wanted.items()
    }


@pytest.mark.parametrize("settings", ["defaults", "others"])
@pytest.mark.parametrize("name", SETTINGS)
def test_check_prints_it(name: str, settings: str, write: Callable, capsys: pytest.CaptureFixture) -> None:
    from titan_ext import cli

    file = write(written(name, SETTINGS[name][0] if settings == "others" else ""))
    assert cli.main(["check", file]) == 0
    assert f'optimizer_name = "{name}"' in capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS)
def test_the_resolved_configuration_is_json_and_loads_again(name: str, write: Callable) -> None:
    site = load_site(write(written(name, SETTINGS[name][0])), "alpha")
    text = json.dumps(dump_resolved(site), allow_nan=False)
    # torchtitan prints its own with debug.print_config.
    json.dumps(site.config.optimizer.to_dict())
    Path("again.json").write_text(text)
    again = load_site("again.json")
    assert again.config.optimizer == site.config.optimizer
    assert json.dumps(dump_resolved(again)["optimizer"]) == json.dumps(dump_resolved(site)["optimizer"])


def test_flags_set_hyper_parameters(write: Callable) -> None:
    flags = ["--optimizer.name=QHADOPT", "--optimizer.betas=[0.9, 0.99, 0.999]", "--optimizer.omegas=[0.5, 0.4]"]
    flags += ["--optimizer.state_dtype=bfloat16", "--optimizer.clip_exponent=inf", "--optimizer.lr=1"]
    (group,) = load_site(write(), "alpha", flags).config.optimizer.param_groups
    assert group.optimizer_kwargs == {
        "betas": (0.9, 0.99, 0.999),
        "omegas": (0.5, 0.4),
        "state_dtype": "bfloat16",
        "clip_exponent": float("inf"),
        "lr": 1.0,
    }


def test_no_state_dtype_is_the_parameters(write: Callable) -> None:
    optimizers = built("ADOPT", 'state_dtype = "none"', write, Small())
    assert optimizers.optimizers[0].param_groups[0]["state_dtype"] is None


def test_a_flavor_may_give_a_dtype_as_torch_has_it(write: Callable) -> None:
    base = load_site(write(written("ADOPT")), "alpha").config.optimizer
    base.param_groups[0].optimizer_kwargs["state_dtype"] = torch.bfloat16
    settings = Settings("demo.toml")
    (group,) = bind_optimizer(settings, Binder(settings), base).param_groups
    assert group.optimizer_kwargs == {"state_dtype": "bfloat16"}


def test_torchtitans_own_flavors_have_our_optimizers() -> None:
    from torchtitan.components.optimizer import default_adamw

    settings = Settings("demo.toml").merge({"optimizer": {"name": "QHSGDM"}}, Origin.FILE)
    found = bind_optimizer(settings, Binder(settings), default_adamw())
    assert type(found.build(model_parts=[Small()]).optimizers[0]).__name__ == "QHSGDM"


GROUPS = '[[optimizer.param_groups]]\npattern = "%s"\noptimizer_name = "%s"\noptimizer_kwargs = {%s}\n'

CASES = {
    "too few betas": (
        "QHAdamW",
        "omegas = [0.2, 0.5]\nbetas = [0.9, 0.99]",
        ["optimizer.betas = [0.9, 0.99]: must be 3 numbers in [0, 1)", "last for the second moment"],
    ),
    "betas of the default": (
        "QHADOPT",
        "omegas = [0.2, 0.5]",
        ["optimizer.betas = [0.999, 0.9999]: must be 3 numbers in [0, 1)"],
    ),
    "a beta of 1": ("ADOPT", "betas = [0.9, 1]", ["optimizer.betas = [0.9, 1.0]: must be 2 numbers in [0, 1)"]),
    "one beta of Muon": ("Muon", "betas = [0.9]", ["optimizer.betas = [0.9]: must be two numbers"]),
    "three betas of AdamW": ("AdamW", "betas = [0.9, 0.9, 0.9]", ["optimizer.betas = [0.9, 0.9, 0.9]", "two numbers"]),
    "no list": ("QHSGDM", "betas = 0.9", ["optimizer.betas = 0.9: must be a list of number", "got a float"]),
    "no number": ("QHSGDM", 'betas = ["x"]', ['optimizer.betas[0] = "x": must be a number']),
    "omegas above 1": ("QHSGDM", "omegas = [1.5]", ["optimizer.omegas = [1.5]: must be one number", "at most 1"]),
    "no omegas": ("QHSGDM", "omegas = []", ["optimizer.omegas = []: must be one number"]),
    "omegas of ADOPT": ("ADOPT", "omegas = [1.0]", ["optimizer.omegas: unknown key", "betas"]),
    "dtype": (
        "QHAdamW",
        'state_dtype = "float16"',
        ['optimizer.state_dtype = "float16"', "did you mean", "(allowed: bfloat16, float32, float64)"],
    ),
    "exponent": ("ADOPT", "clip_exponent = -1", ["optimizer.clip_exponent = -1.0: must be at least 0, inf"]),
    "exponent of a string": ("ADOPT", 'clip_exponent = "x"', ['optimizer.clip_exponent = "x": must be a number']),
    "eps": ("QHAdamW", "eps = 0", ["optimizer.eps = 0.0: must be above 0"]),
    "eps of Muon": ("Muon", "eps = -1", ["optimizer.eps = -1.0: must be at least 0"]),
    "lr": ("DeMo", "lr = -1", ["optimizer.lr = -1.0: must be at least 0"]),
    "lr nan": ("ADOPT", "lr = nan", ["optimizer.lr: must be a number, got nan"]),
    "beta": ("DeMo", "beta = 1", ["optimizer.beta = 1.0: must be from 0 to below 1"]),
    "momentum": ("Muon", "momentum = 1", ["optimizer.momentum = 1.0: must be from 0 to below 1"]),
    "learning rate of the rest": ("Muon", "adamw_lr = -0.1", ["optimizer.adamw_lr = -0.1: must be at least 0"]),
    "names": ("Muon", 'adamw_names = "embed"', ['optimizer.adamw_names = "embed": must be a list of strings']),
    "nesterov": ("SGD", "nesterov = true", ["optimizer.nesterov = true", "requires a momentum"]),
    "unknown key": ("Muon", "betta = 1", ["optimizer.betta: unknown key; did you mean betas?"]),
    "unknown name": ("Adopt", "", ['optimizer.name = "Adopt": unknown optimizer; did you mean ADOPT?']),
}


def refused(text: str, write: Callable, capsys: pytest.CaptureFixture) -> str:
    code, output = checked([write(text)], capsys)
    assert code == 2
    (line,) = output.strip().splitlines()
    assert line.startswith("titan-ext: error: demo.toml: ")
    return line


@pytest.mark.parametrize("case", CASES)
def test_wrong_values_end_in_one_clear_line(case: str, write: Callable, capsys: pytest.CaptureFixture) -> None:
    name, settings, fragments = CASES[case]
    line = refused(written(name, settings), write, capsys)
    for fragment in fragments:
        assert fragment in line


def test_a_wrong_value_in_a_group_is_named(write: Callable, capsys: pytest.CaptureFixture) -> None:
    groups = GROUPS % ("norm", "QHSGDM", "lr = 1") + GROUPS % (".*", "ADOPT", "betas = [0.9]")
    line = refused(GOOD.replace("[[site]]", f"{groups}[[site]]", 1), write, capsys)
    assert "optimizer.param_groups[1].optimizer_kwargs.betas = [0.9]: must be 2 numbers" in line


@pytest.mark.parametrize("method", ["diloco", "none"])
def test_demo_alone_would_not_train(method: str, write: Callable, capsys: pytest.CaptureFixture) -> None:
    text = written("ADOPT").replace('"ADOPT"', '"DeMo"').replace('"diloco"', f'"{method}"')
    line = refused(text, write, capsys)
    assert f'optimizer.name = "DeMo": needs semi_sync.method = "demo", not "{method}"' in line


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("settings", ["defaults", "others"])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_resumes_bitwise_in_torchtitans_container(
    name: str, settings: str, implementation: str, write: Callable
) -> None:
    text = SETTINGS[name][0] if settings == "others" else ""
    first, started = Small(), Small().state_dict()
    going = built(name, text, write, first, implementation=implementation)
    step(going, 1), step(going, 2)
    saved, second = copy.deepcopy(going.state_dict()), copy.deepcopy(first)
    resumed = built(name, text, write, second, implementation=implementation)
    resumed.load_state_dict(saved)
    step(going, 3), step(resumed, 3)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
        # DeMo's parameters move at the exchange.
        assert name == "DeMo" or not torch.equal(value, started[key])
    assert same(going.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_resumes_from_a_checkpoint_on_disk(name: str, write: Callable, tmp_path: Path) -> None:
    first = Small(torch.bfloat16)
    going = built(name, SETTINGS[name][0], write, first)
    step(going, 1), step(going, 2)
    checkpoint.save({"optimizer": going}, checkpoint_id=tmp_path / "step-2", no_dist=True)
    resumed = built(name, SETTINGS[name][0], write, copy.deepcopy(first))
    checkpoint.load({"optimizer": resumed}, checkpoint_id=tmp_path / "step-2", no_dist=True)
    step(going, 3), step(resumed, 3)
    assert same(going.state_dict(), resumed.state_dict())


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key
    return True


@pytest.mark.parametrize(
    ("name", "settings", "bytes_each"),
    [
        ("ADOPT", "", 8),
        ("ADOPT", 'state_dtype = "bfloat16"', 4),
        ("QHAdamW", "", 8),
        ("QHAdamW", "betas = [0.9, 0.99, 0.999]\nomegas = [0.2, 0.5]", 12),
        ("QHADOPT", 'state_dtype = "float64"', 16),
        ("QHSGDM", "", 4),
        ("QHSGDM", 'betas = [0.9, 0.99]\nomegas = [0.2, 0.5]\nstate_dtype = "bfloat16"', 4),
        ("DeMo", "", 4),
        ("SGD", "", 0),
        ("SGD", "momentum = 0.9", 4),
        ("AdamW", 'implementation = "fused_opt_states_bf16"', 4),
        ("Adam", "", 8),
    ],
)
def test_cost_of_the_state(name: str, settings: str, bytes_each: int, write: Callable) -> None:
    site = load_site(write(written(name, settings)), "alpha")
    count = sum(shape.numel() for shape in parameter_shapes(site.config).values())
    assert site_cost(site).optimizer_bytes == bytes_each * count


@pytest.mark.parametrize("settings", ["", 'adamw_names = ["w1", "embed"]'])
def test_cost_of_muon_is_what_it_keeps(settings: str, write: Callable) -> None:
    site = load_site(write(written("Muon", settings)), "alpha")
    model = site.config.model_spec.model.build()
    optimizers = site.config.optimizer.build(model_parts=[model])
    kept = [value for key, value in optimizers.state_dict().items() if key.startswith("state.")]
    assert site_cost(site).optimizer_bytes == sum(each.nbytes for each in kept if each.dim())


@pytest.mark.parametrize(
    "name, settings, periods",
    [
        # Multiples of 5 nearest to ln 2 / (1 - decay).
        ("AdamW", "betas = [0.95, 0.999]", (15, 695)),
        ("SGD", "lr = 0.1\nmomentum = 0.98", (35, 30)),
        ("Muon", "momentum = 0.95\nbetas = [0.8, 0.99]", (15, 70)),
        ("ADOPT", "betas = [0.9, 0.9999]", (5, 6930)),
    ],
)
def test_half_lives_are_those_of_the_optimizer(write, name, settings, periods):
    text = (
        written(name, settings)
        .replace('"diloco"', '"des_loc"')
        .replace("[[site]]", "[semi_sync.des_loc]\nhalf_life_periods = true\n[[site]]", 1)
    )
    rules = plan_of(load_site(write(text), "alpha").config).rules
    assert tuple(rule.period for rule in rules[1:]) == periods


@pytest.mark.parametrize(
    "name, reset, words",
    [
        ("AdamW", '["exp_avg_sq"]', "must name 'exp_avg' too"),
        ("QHADOPT", '["exp_avg_sq"]', "must name 'exp_avg_0' too"),
        ("Muon", '["exp_avg_sq", "momentum_buffer"]', "must name 'exp_avg' too"),
        ("AdamW", '["exp_avg_0"]', "'exp_avg_0' must be one of exp_avg, exp_avg_sq"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_with_its_key(write, capsys, name, reset, words):
    text = written(name).replace("[[site]]", f"[optimizer_switch]\nstep = 5\nreset_states = {reset}\n[[site]]", 1)
    code, message = checked([write(text)], capsys)
    assert code == 2 and "optimizer_switch.reset_states" in message and words in message


@pytest.mark.parametrize("name", SETTINGS)
def test_moments_known_before_there_is_a_tensor_are_those_that_are_kept(write, name):
    from titan_ext.config.cost.inner_states import InnerStates
    from titan_ext.optim.moments import moments_by_parameter
    from titan_ext.semi_sync.state.views import materialize_state

    config = load_site(write(written(name, SETTINGS[name][0])), "alpha").config.optimizer
    model = Small()
    names = {parameter: each for each, parameter in model.named_parameters()}
    for optimizer in config.build(model_parts=[model]).optimizers:
        materialize_state(optimizer)
        for parameter, found in moments_by_parameter(optimizer):
            assert found == InnerStates(config).moments(names[parameter], parameter.shape)
            kept = {key for key, value in optimizer.state[parameter].items() if value.shape == parameter.shape}
            assert {*found} == kept or not parameter.dim()


@pytest.mark.parametrize(
    "name, settings, method, state",
    [
        ("AdamW", "amsgrad = true", "local_adam", "max_exp_avg_sq"),
        ("LowRankAdamW", "rank = 4", "des_loc", "low_exp_avg"),
        ("QHAdamW", "betas = [0.9, 0.99, 0.999]\nomegas = [0.3, 0.3]", "mt_dao", "exp_avg_1"),
    ],
)
def test_a_method_that_would_leave_a_state_out_is_refused(write, capsys, name, settings, method, state):
    text = written(name, settings).replace('"diloco"', f'"{method}"')
    if method == "mt_dao":
        text = text.replace("[[site]]", "[semi_sync.mt_dao]\nmomentum_sync_every = [5]\n[[site]]", 1)
    code, message = checked([write(text)], capsys)
    assert code == 2 and "semi_sync.method" in message and f"knows nothing of '{state}'" in message


def test_every_momentum_has_a_period_where_none_is_given(write):
    text = written("QHADOPT", "betas = [0.9, 0.99, 0.999]\nomegas = [0.3, 0.3]").replace('"diloco"', '"mt_dao"')
    periods = {rule.state: rule.period for rule in plan_of(load_site(write(text), "alpha").config).rules}
    assert periods == {"params": 5, "exp_avg_0": 5, "exp_avg_1": 5, "exp_avg_sq": 5}


@pytest.mark.parametrize(("basis_from", "told"), [("gradient", True), ("outer", False), (None, False)])
def test_bases_that_are_no_shared_state_are_told(write, basis_from, told):
    given = f'basis_from = "{basis_from}"' if basis_from else ""
    text = written("LowRankAdamW", f"rank = 4\n{given}").replace('"diloco"', '"lordo"')
    assert any("LoRDO-Local" in note for note in load_run(write(text)).sites[0].notes) is told
