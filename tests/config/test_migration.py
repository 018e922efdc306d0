"""Configurations of torchtitan 0.1 and 0.2: what becomes of them here. The files are ours, in those versions' keys."""

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from titan_ext import cli
from titan_ext.config import load_run
from titan_ext.config.migration.convert import migrate
from titan_ext.config.migration.old_keys import ALIASES, CONVERTED, GONE, KEPT, MOVED, OLD_SECTIONS, find
from titan_ext.config.reference.collect import all_keys, sections
from titan_ext.errors import UserError
from titan_ext.models.llama3 import Sizes

SECOND = """
[job]
dump_folder = "./out"
description = "a run"
print_config = true

[profiling]
enable_profiling = true
profile_freq = 50

[metrics]
log_freq = 5
enable_wandb = true

[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"

[optimizer]
name = "AdamW"
lr = 3e-4
beta2 = 0.99

[lr_scheduler]
warmup_steps = 100
decay_ratio = 0.2
decay_type = "cosine"
min_lr_factor = 0.1

[training]
local_batch_size = 2
global_batch_size = 64
seq_len = 4096
steps = 2000
dataset = "c4"

[training.dataloader]
num_workers = 1

[parallelism]
data_parallel_shard_degree = 4
tensor_parallel_degree = 2
enable_async_tensor_parallel = true

[checkpoint]
enable = true
interval = 250
async_mode = "async"
exclude_from_loading = "dataloader,lr_scheduler"

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[compile]
enable = true

[quantize.linear.float8]
enable_fsdp_float8_all_gather = true

[validation]
enable = true
dataset = "c4_validation"
freq = 500
steps = 20
local_batch_size = 2
seq_len = 4096

[debug]
seed = 42
"""

FIRST = """
[job]
print_args = true
[model]
name = "llama3"
flavor = "70B"
tokenizer_path = "./assets/tokenizer/original/tokenizer.model"
converters = ["float8"]
[optimizer]
lr = 1.5e-4
early_step_in_backward = true
[lr_scheduler]
lr_min = 0.05
[training]
local_batch_size = 2
seq_len = 8192
steps = 1000
compile = true
seed = 7
deterministic = true
dataset = "c4_test"
[parallelism]
tensor_parallel_degree = 8
pipeline_parallel_degree = 2
pipeline_parallel_split_points = ["layers.40"]
[checkpoint]
enable_checkpoint = true
initial_load_path = "/old/step-10"
initial_load_model_weights_only = false
[float8]
recipe_name = "rowwise"
filter_fqns = ["output"]
[activation_checkpoint]
mode = "full"
"""

EARLY = """
[job]
dump_folder = "./outputs"
[profiling]
run_profiler = true
profile_every_x_iter = 5
[metrics]
enable_color_printing = true
rank_0_only = false
[model]
name = "llama2"
flavor = "13B"
norm_type = "rmsnorm"
tokenizer_path = "./tok/original/tokenizer.model"
[optimizer]
name = "AdamW"
lr = 1e-4
[training]
batch_size = 8
seq_len = 4096
warmup_steps = 50
steps = 500
data_parallel_degree = -1
tensor_parallel_degree = 4
dataset = "alpaca"
enable_loss_parallel = false
[experimental]
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "1f1b"
pipeline_parallel_split_points = ["layers.20"]
pipeline_parallel_microbatches = 4
[checkpoint]
enable_checkpoint = true
interval_type = "steps"
interval = 100
model_weights_only = true
[activation_checkpoint]
mode = "selective"
selective_ac_option = "2"
[float8]
enable_float8_linear = false
[memory_estimation]
enabled = false
"""

SITES = """
[model]
name = "llama3"
flavor = "debugmodel"
hf_assets_path = "./tok"
[training]
steps = 100
dataset = "c4"
[fault_tolerance]
enable = true
semi_sync_method = "DiLoCo"
group_size = 3
min_replica_size = 2
sync_steps = 20
num_fragments = 2
fragment_sync_delay = 3
fragment_update_alpha = 0.25
should_quantize = true
process_group = "gloo"
process_group_timeout_ms = 30000
"""


def migrated(text: str) -> Any:
    return migrate(tomllib.loads(text))


def at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


EXPECTED = {
    "0.2": (
        SECOND,
        {
            "dump_folder": "./out",
            "tokenizer": "./assets/hf/Llama-3.1-8B",
            "model": {"name": "llama3", "flavor": "8B", "vocab_size": 128256},
            "data": {"dataset": "hf:c4", "shuffle": False, "num_workers": 1},
            "optimizer": {
                "name": "AdamW",
                "lr": 3e-4,
                "betas": [0.9, 0.99],
                "eps": 1e-8,
                "weight_decay": 0.1,
                "implementation": "fused",
            },
            "lr_scheduler": {"warmup_steps": 100, "decay_ratio": 0.2, "decay_type": "cosine", "min_lr_factor": 0.1},
            "training.local_batch_size": 2,
            "training.global_batch_size": 64,
            "training.seq_len": 4096,
            "training.steps": 2000,
            "training.max_norm": 1.0,
            "training.disable_cuda_graphs": True,
            "parallelism.data_parallel_shard_degree": 4,
            "parallelism.tensor_parallel_degree": 2,
            "compile": {"enable": True, "enable_async_tensor_parallel": True},
            "checkpoint.enable": True,
            "checkpoint.interval": 250,
            "checkpoint.keep_latest_k": 10,
            "checkpoint.last_save_model_only": True,
            "checkpoint.async_mode": "async",
            "checkpoint.exclude_from_loading": ["dataloader", "lr_scheduler"],
            "activation_checkpoint": {"mode": "selective"},
            "validator.enable": True,
            "validator.freq": 500,
            "validator.steps": 20,
            "validator.dataloader": {"dataset": "hf:c4_validation", "shuffle": False, "infinite": False},
            "metrics": {"log_freq": 5, "enable_wandb": True, "enable_tensorboard": False},
            "profiler": {"enable_profiling": True, "profile_freq": 50, "save_traces_folder": "profile_traces"},
            "debug": {"seed": 42, "print_config": True},
            "semi_sync": {"method": "none"},
        },
        {},
    ),
    "0.1": (
        FIRST,
        {
            "model.name": "llama3",
            "model.flavor": "70B",
            "model.rope_scaling": "none",
            "optimizer.lr": 1.5e-4,
            "lr_scheduler": {"warmup_steps": 200, "decay_ratio": None, "decay_type": "linear", "min_lr_factor": 0.05},
            "compile.enable": True,
            "debug": {"seed": 7, "deterministic": True, "print_config": True},
            "parallelism.pipeline_parallel_degree": 2,
            "checkpoint.enable": True,
            "checkpoint.initial_load_model_only": False,
            "checkpoint.last_save_model_only": False,
            "activation_checkpoint": {"mode": "full"},
            "metrics.log_freq": 10,
        },
        {"tokenizer": "tokenizer.model", "data.dataset": "c4_test"},
    ),
    "before 0.1": (
        EARLY,
        {
            "model": {
                "name": "llama3",
                "flavor": "8B",
                "dim": 5120,
                "n_layers": 40,
                "n_heads": 40,
                "n_kv_heads": 40,
                "ffn_dim": 13824,
                "rope_theta": 10000.0,
                "rope_scaling": "none",
            },
            "data": {"dataset": "hf:tatsu-lab/alpaca", "shuffle": False},
            "training.local_batch_size": 8,
            "lr_scheduler.warmup_steps": 50,
            "parallelism.data_parallel_shard_degree": -1,
            "parallelism.data_parallel_replicate_degree": 1,
            "parallelism.tensor_parallel_degree": 4,
            "parallelism.pipeline_parallel_schedule": "1F1B",
            "parallelism.pipeline_parallel_microbatch_size": 2,
            "checkpoint.enable": True,
            "checkpoint.interval": 100,
            "checkpoint.keep_latest_k": 0,
            "checkpoint.last_save_model_only": True,
            "optimizer.implementation": "foreach",
            "profiler": {"enable_profiling": True, "profile_freq": 5, "save_traces_folder": "profile_traces"},
            "metrics.disable_color_printing": False,
            "metrics.save_for_all_ranks": True,
        },
        {"tokenizer": "tokenizer.model"},
    ),
    "torchft": (
        SITES,
        {
            "semi_sync": {
                "method": "diloco",
                "sync_every": 20,
                "num_fragments": 2,
                "fragment_sync_delay": 3,
                "fragment_update_alpha": 0.25,
                "outer_optimizer": "sgd",
                "outer_lr": 0.7,
                "outer_momentum": 0.9,
                "nesterov": True,
            },
            "replica": {"min_sites": 2, "timeout_seconds": 30.0},
        },
        {},
    ),
}


@pytest.mark.parametrize("era", EXPECTED)
def test_what_a_file_meant_is_kept(era: str) -> None:
    text, expected, blanks = EXPECTED[era]
    done = migrated(text)
    assert done.era == era.replace("torchft", "0.2")
    assert {key: at(done.tree, key) for key in expected} == expected
    assert done.blanks.keys() == blanks.keys()
    assert all(blanks[key] in why for key, why in done.blanks.items())


def test_where_a_pipeline_was_cut() -> None:
    (first, second) = migrated(FIRST).tree["parallelism"]["module_fqns_per_model_part"]
    assert first == ["tok_embeddings", *(f"layers.{layer}" for layer in range(40))]
    assert second == [*(f"layers.{layer}" for layer in range(40, 80)), "norm", "lm_head"]


@pytest.mark.parametrize("converter", ["float8", "quantize.linear.float8"])
def test_float8_by_a_recipe_is_a_converter(converter: str) -> None:
    text = FIRST.replace('converters = ["float8"]', f'converters = ["{converter}"]').replace(
        "[float8]", f"[{converter}]"
    )
    table = {"name": "float8", "recipe_name": "rowwise", "filter_fqns": ["lm_head"], "emulate": False}
    assert migrated(text).tree["model"]["converters"] == [table]
    scaled = migrated(text.replace('recipe_name = "rowwise"', "enable_fsdp_float8_all_gather = true"))
    assert "converters" not in scaled.tree["model"]
    told = "\n".join(scaled.homeless)
    assert f'model.converters = ["{converter}"]: set model.converters by hand' in told
    assert (
        f"{converter}.enable_fsdp_float8_all_gather = true: quantized layers are [[model.converters]] tables here"
        in told
    )


def test_what_has_no_home_is_told() -> None:
    done = migrated(FIRST)
    told = "\n".join(done.homeless)
    assert "optimizer.early_step_in_backward = true" in told and "float8" not in told
    # The same keys mean nothing where no converter is asked for.
    assert migrated(SECOND).homeless == []
    assert "quantize.linear.float8.enable_fsdp_float8_all_gather" in migrated(SECOND).harmless
    assert any("initial_load_path" in each for each in done.changed)
    assert migrated(SITES).homeless[0].startswith("fault_tolerance.should_quantize = true")


def test_replica_groups_are_sites() -> None:
    assert migrated(SITES).sites == [{"name": f"site{place}"} for place in range(3)]
    unknown = migrated(SITES.replace("group_size = 3\n", ""))
    assert unknown.sites == [{"name": "site0", "count": 0}] and "count" in unknown.blanks
    per_step = migrated(SITES.replace('semi_sync_method = "DiLoCo"\n', ""))
    assert per_step.tree["semi_sync"]["method"] == "" and "semi_sync.method" in per_step.blanks
    assert migrated(SITES.replace("enable = true", "enable = false")).tree["semi_sync"] == {"method": "none"}


FORK = """
[model]
name = "llama3"
flavor = "debugmodel"
hf_assets_path = "./tok"
[optimizer]
name = "{name}"
lr = 1e-3
betas = [0.9, 0.999]
{more}
[optimizer.desloc]
enabled = true
param_sync_every = 16
optimizer_sync_every = [48, 96]
backup_device = "cpu"
[optimizer.desloc.outer_optimizer]
target = "SGD"
[optimizer.desloc.outer_optimizer.kwargs]
lr = 1.0
momentum = 0.9
nesterov = true
[training]
dataset = "c4"
[fault_tolerance]
enable = true
group_size = 2
sync_steps = 99
semi_sync_method = "desloc"
rank0_synchronization_only = true
manager_hostname = "10.0.0.7"
[s3_store]
a = 1
b = 2
c = 3
d = 4
"""


def test_the_keys_of_forks() -> None:
    done = migrated(FORK.format(name="AdamW", more=""))
    shared = {
        "sync_every": 16,
        "outer_optimizer": "sgd",
        "outer_lr": 1.0,
        "outer_momentum": 0.9,
        "nesterov": True,
        "outer_state_device": "cpu",
        "pairing": "leader",
    }
    moments = {"first_moment_sync_every": 48, "second_moment_sync_every": 96}
    assert done.tree["semi_sync"] == {"method": "des_loc", "des_loc": moments, **shared}
    assert done.tree["optimizer"]["betas"] == [0.9, 0.999] and done.tree["replica"]["hostname"] == "10.0.0.7"
    assert done.homeless == ["s3_store, 4 keys: not a section of torchtitan's"]
    slow = migrated(FORK.format(name="QHAdamW", more="vs = [0.95]"))
    momenta = {"momentum_sync_every": [48], "second_moment_sync_every": 96}
    assert slow.tree["semi_sync"] == {"method": "mt_dao", "mt_dao": momenta, **shared}
    assert slow.tree["optimizer"]["omegas"] == [0.95]


@pytest.mark.parametrize(
    ("name", "path", "written"),
    [
        ("c4", None, "hf:c4"),
        ("c4", "/data/c4", "hf:/data/c4:en:train"),
        ("c4_test", "/data/some", "hf:/data/some::train"),
        ("c4_validation", "/data/c4", "hf:/data/c4:en:validation"),
        ("c4_test", None, None),
        ("c4_mini", None, None),
        ("my_set", None, None),
        ("my_set", "/data/mine", None),
        (None, None, None),
        (None, "/data/mine", None),
    ],
)
def test_a_corpus_is_the_same_or_left_open(name: str | None, path: str | None, written: str | None) -> None:
    training = {key: value for key, value in {"dataset": name, "dataset_path": path}.items() if value is not None}
    done = migrate({"model": {"name": "llama3", "flavor": "8B"}, "training": training})
    assert done.tree["data"]["dataset"] == (written or "")
    assert ("data.dataset" in done.blanks) == (written is None)


@pytest.mark.parametrize(
    ("name", "flavor", "keys", "blanks"),
    [
        ("llama3", "debugmodel", {"name": "llama3", "flavor": "debugmodel", "vocab_size": 2048}, set()),
        ("llama3", "8B_flex", {"name": "llama3", "flavor": "8B", "vocab_size": 128256, "attn_backend": "flex"}, set()),
        ("llama3", "1B", {"name": "llama3", "flavor": ""}, {"model.flavor"}),
        ("qwen3", "0.6B", {"name": "qwen3", "flavor": "0.6B", "vocab_size": 151936}, set()),
        ("deepseek_v3", "16B", {"name": "deepseek_v3", "flavor": "16B", "vocab_size": 102400}, set()),
        ("qwen3", "0.7B", {"name": "qwen3", "flavor": "0.7B"}, {"model.flavor"}),
        ("llama4", "17bx16e", {"name": "", "flavor": "17bx16e"}, {"model.name"}),
        ("flux", "flux-dev", {"name": "", "flavor": "flux-dev"}, {"model.name"}),
    ],
)
def test_a_model_is_the_same_or_left_open(name: str, flavor: str, keys: dict, blanks: set[str]) -> None:
    old = {"model": {"name": name, "flavor": flavor, "hf_assets_path": "x"}, "training": {"dataset": "c4"}}
    done = migrate(old)
    assert done.tree["model"] == keys and done.blanks.keys() == blanks


def test_what_those_versions_did_by_default_is_written_out() -> None:
    """Nothing that is trained is left to a default of ours."""
    tree = migrate({"model": {}, "training": {}}).tree
    for key, value in {
        "optimizer.betas": [0.9, 0.95],
        "optimizer.weight_decay": 0.1,
        "training.steps": 10000,
        "lr_scheduler.warmup_steps": 200,
        "data.shuffle": False,
        "metrics.log_freq": 10,
        "metrics.enable_tensorboard": False,
        "checkpoint.last_save_model_only": True,
    }.items():
        assert at(tree, key) == value


def known(text: str) -> str:
    """The file without keys that this checkout's models do not have."""
    names = {each.name for each in fields(Sizes)}
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if not line.startswith("rope_scaling") or "rope_scaling" in names
    )


@pytest.mark.parametrize("era", EXPECTED)
def test_the_new_file_says_what_the_migration_says(era: str, write: Callable) -> None:
    text, _, blanks = EXPECTED[era]
    done = migrated(text)
    new = tomllib.loads(done.text("old.toml"))
    assert new.pop("site") == done.sites
    schedule = {key: "none" if value is None else value for key, value in done.tree["lr_scheduler"].items()}
    assert new == {**done.tree, "lr_scheduler": schedule}
    # The blanks are refused, and nothing else is.
    if not blanks:
        assert load_run(write(known(done.text("old.toml"))), needs=()).sites
        return
    with pytest.raises(UserError) as caught:
        load_run(write(known(done.text("old.toml"))), needs=())
    lines = [line for line in str(caught.value).splitlines() if "demo.toml: " in line and "mistakes" not in line]
    refused = [line for line in lines if any(key.split(".")[0] in line for key in blanks)]
    assert len(refused) == len(blanks) and all(
        "no such" in line or "torchao" in line for line in lines if line not in refused
    )


def test_nothing_is_overwritten_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text(SECOND)
    assert cli.main(["migrate", "old.toml", "-o", "new.toml"]) == 0
    assert "0 to fill in, 0 without a home" in capsys.readouterr().err
    Path("new.toml").write_text("mine")
    assert cli.main(["migrate", "old.toml", "-o", "new.toml"]) == 2
    assert "new.toml: is there already; give --force" in capsys.readouterr().err
    assert Path("new.toml").read_text() == "mine" and Path("old.toml").read_text() == SECOND
    assert cli.main(["migrate", "old.toml", "-o", "new.toml", "--force"]) == 0
    assert cli.main(["migrate", "new.toml"]) == 2
    assert "no configuration of torchtitan 0.1 or 0.2" in capsys.readouterr().err
    assert cli.main(["migrate", "old.toml"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["training"]["steps"] == 2000


def test_every_key_that_something_became_is_a_key() -> None:
    names = {key.name for key in all_keys()} | {"site", "tokenizer"}
    kept = [f"{section}.{name}" for section, listed in KEPT.items() for name in listed.split()]
    targets = [*kept, *MOVED.values(), *(new for new, _ in CONVERTED.values()), *ALIASES.values()]
    assert [key for key in targets if key not in names] == []
    # What is gone is no key of ours, or its old meaning would be lost unsaid.
    assert [key for key in GONE if key in names] == []
    assert [name for name in OLD_SECTIONS if name in sections()] == []
    assert find("training.batch_size").keys == ("training.local_batch_size",) and find("training.steps") is None
