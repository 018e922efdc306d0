"""What a run would stumble over after its start is refused by ``check``, in one line that says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titan_ext.config import load_run, load_to_start
from titan_ext.errors import UserError

from .conftest import GOOD

V_SHAPED, SPLIT = ("ZBVZeroBubble", "DualPipeV"), ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def pipelined(schedule: str, mode: str = "none", batch: int = 4, layers: int = 4, ranks: int = 2) -> list[str]:
    return [
        f"--parallelism.pipeline_parallel_degree={ranks}",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--parallelism.pipeline_parallel_microbatch_size=1",
        f"--activation_checkpoint.mode={mode}",
        f"--training.local_batch_size={batch}",
        f"--model.n_layers={layers}",
    ]


CASES = [
    *((pipelined(each, "selective"), ["activation_checkpoint.mode", '"full" or "none"', each]) for each in SPLIT),
    *(([*pipelined(each), "--compile.enable"], ["compile.components", 'without "model"', each]) for each in SPLIT),
    *(
        (
            [*pipelined(each), "--validator.enable", '--validator.dataloader={dataset="builtin:docs"}'],
            ["validator.enable", each],
        )
        for each in V_SHAPED
    ),
    (pipelined("1F1B", batch=1), ["training.local_batch_size = 1", "at least 2", "1 microbatches"]),
    (pipelined("1F1B", batch=3, ranks=4), ["training.local_batch_size = 3", "at least 4"]),
    (pipelined("DualPipeV", batch=3), ["training.local_batch_size = 3", "at least 4", "stages"]),
    (pipelined("dualpipev", "full", batch=2), ["training.local_batch_size = 2", "at least 4"]),
    (pipelined("Interleaved1F1B", batch=7, layers=8, ranks=2), ["training.local_batch_size = 7", "multiple of 3"]),
    (pipelined("InterleavedZeroBubble", batch=5), ["training.local_batch_size = 5", "multiple of 2"]),
    (
        ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_model_only=true"],
        ["initial_load_in_hf", "enable = true"],
    ),
    (["--batch_warmup.steps=10"], ["batch_warmup.steps = 10", "global_batch_size above"]),
    (["--batch_warmup.start_batch_size=4"], ["batch_warmup.start_batch_size = 4", "batch_warmup.steps"]),
    (
        ["--training.global_batch_size=4", "--batch_warmup.steps=2", "--batch_warmup.start_batch_size=4"],
        ["batch_warmup.start_batch_size = 4", "below training.global_batch_size"],
    ),
    (["--spikes.action=stop"], ["spikes.action", "skip"]),
    (["--spikes.window=2"], ["spikes.window", "at least 4"]),
    (["--metrics.parameter_norms_every=-1"], ["metrics.parameter_norms_every = -1", "at least 0"]),
    (
        ["--metrics.activation_norms_every=5", "--compile.enable"],
        ["metrics.activation_norms_every = 5", 'without "model"'],
    ),
    (["--dump_folder=s3://bucket/run"], ["dump_folder", "folder of this machine", "checkpoint.folder"]),
    (["--checkpoint.enable", "--checkpoint.folder=s5://bucket/run"], ["checkpoint.folder", "is known for s5://"]),
    (["--checkpoint.enable", "--checkpoint.retry_seconds=-1"], ["checkpoint.retry_seconds = -1", "at least 0 seconds"]),
    (
        ["--checkpoint.enable", "--checkpoint.folder=memory://run", "--checkpoint.async_mode=async_with_pinned_mem"],
        ["checkpoint.async_mode", '"async" or "disabled"', "memory://run"],
    ),
    (
        ["--checkpoint.enable", "--checkpoint.folder=memory://run", "--checkpoint.last_save_in_hf"],
        ["last_save_in_hf", "memory://run"],
    ),
    (["--checkpoint.enable", "--checkpoint.folder=http://127.0.0.1:1/run"], ["checkpoint.folder", "takes no files"]),
    (["--checkpoint.enable", "--checkpoint.folder=s3://"], ["checkpoint.folder", "names no bucket"]),
    (["--checkpoint.load_step=3"], ["checkpoint.load_step = 3", "enable = true"]),
    (["--checkpoint.load_only"], ["checkpoint.load_only", "enable = true"]),
    (["--checkpoint.create_seed_checkpoint"], ["checkpoint.create_seed_checkpoint", "enable = true"]),
    (
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--parallelism.data_parallel_shard_degree=2"],
        ["checkpoint.create_seed_checkpoint", "2 ranks", "nproc = 1"],
    ),
    (
        ["--checkpoint.enable", '--checkpoint.exclude_from_loading=["dataloader", "optimiser"]'],
        ["checkpoint.exclude_from_loading", "'optimiser'", "did you mean optimizer?"],
    ),
    (
        [
            "--checkpoint.enable",
            '--checkpoint.exclude_from_loading=["semi_sync"]',
            "--semi_sync.method=none",
            "--semi_sync.sync_every=none",
        ],
        ["checkpoint.exclude_from_loading", "'semi_sync'", "dataloader"],
    ),
    *(
        (
            ["--parallelism.pipeline_parallel_degree=2", f"--parallelism.pipeline_parallel_{key}"],
            [key.replace("=", " = ")],
        )
        for key in ("layers_per_stage=0", "first_stage_less_layers=-1", "last_stage_less_layers=-2")
    ),
    (["--compile.enable", '--compile.components=["mdel"]'], ["compile.components", "did you mean model?"]),
    (["--compile.enable", "--compile.backend=inductr"], ["compile.backend", "did you mean inductor?"]),
    (
        ["--compile.enable", "--activation_checkpoint.mode=memory_budget", "--activation_checkpoint.memory_budget=1.5"],
        ["activation_checkpoint.memory_budget = 1.5", "from 0 to 1"],
    ),
    *(([f"--optimizer.{key}=inf"], [f"optimizer.{key} = ", "finite"]) for key in ("lr", "weight_decay", "eps")),
    (["--optimizer.name=DistMuon"], ["optimizer.name", "configuration file", "Muon"]),
    (
        ["--optimizer.name=SGD", "--optimizer.implementation=fused_opt_states_bf16"],
        ["optimizer.implementation", "not SGD"],
    ),
    (["--lr_scheduler.total_steps=19"], ["lr_scheduler.total_steps = 19", "at least training.steps (20)", "negative"]),
    (["--lr_scheduler.decay_ratio=-0.1"], ["lr_scheduler.decay_ratio = -0.1", "from 0 to 1"]),
    (["--lr_scheduler.min_lr_factor=1.5"], ["lr_scheduler.min_lr_factor = 1.5", "from 0 to 1"]),
    (
        [
            "--validator.enable",
            "--validator.steps=1",
            "--validator.freq=0",
            '--validator.dataloader={dataset="builtin:docs"}',
        ],
        ["validator.freq = 0", "at least 1"],
    ),
    (["--profiler.enable_profiling", "--profiler.profile_freq=3"], ["profiler.profile_freq = 3", "at least 4"]),
]


def group(pattern: str) -> str:
    return f"[[optimizer.param_groups]]\npattern = '{pattern}'\noptimizer_name = 'AdamW'\noptimizer_kwargs = {{lr = 0.1}}\n"


def parts(*each: list[str]) -> list[str]:
    cut = f"--parallelism.module_fqns_per_model_part={[*each]}".replace("'", '"')
    return ["--parallelism.pipeline_parallel_degree=2", cut]


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (group("(norm") + group(".*"), [], ["optimizer.param_groups[0].pattern", "no regular expression"]),
        (group("nosuch") + group(".*"), [], ["optimizer.param_groups[0].pattern", "matches no parameter of the model"]),
        (group(".*") + group("norm"), [], ["optimizer.param_groups[1].pattern", "that none before it does"]),
        (group("norm"), [], ["optimizer.param_groups", "no pattern matches tok_embeddings.weight"]),
        (
            group("tok_embeddings") + group(".*"),
            pipelined("1F1B"),
            ["optimizer.param_groups[0].pattern", "no parameter of pipeline stage 1"],
        ),
        ("", parts(["tok_embeddings"], ["layers.0"]), ["module_fqns_per_model_part", "layers.1", "in no part"]),
        (
            "",
            parts(["tok_embeddings", "layers.0", "layers.1"], ["layers.1", "norm", "lm_head"]),
            ["module_fqns_per_model_part", "layers.1", "stand in parts [0, 1]"],
        ),
        (
            "",
            parts(["layers.0", "layers.1", "norm", "lm_head"], ["tok_embeddings"]),
            ["module_fqns_per_model_part", "tok_embeddings belong in the first"],
        ),
        (
            "",
            parts(["tok_embeddings", "layers.0", "layers.1", "norm", "lm_head"]),
            ["module_fqns_per_model_part", "2 ranks"],
        ),
        (
            "",
            [*pipelined("1F1B"), "--parallelism.pipeline_parallel_schedule_csv=no/such.csv"],
            ["pipeline_parallel_schedule_csv", "no such file"],
        ),
    ],
)
def test_groups_and_parts_that_do_not_make_up_the_model_are_refused(
    text: str, flags: list[str], words: list[str], write: Callable
) -> None:
    with pytest.raises(UserError) as refusal:
        load_run(write(GOOD.replace("[[site]]", f"{text}[[site]]", 1)), flags)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("flags", "words"), CASES, ids=lambda value: " ".join(value)[:60])
def test_refused_before_it_starts(flags: list[str], words: list[str], write: Callable) -> None:
    with pytest.raises(UserError) as refusal:
        load_run(write(), flags)
    line = str(refusal.value)
    assert line.startswith("demo.toml: ") and "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is missing on a machine with a GPU")
@pytest.mark.parametrize(
    "flag",
    [
        "training.gc_debug=true",
        "training.enable_cpu_offload=true",
        "optimizer.implementation=fused_opt_states_bf16",
        "parallelism.spmd_backend=full_dtensor",
    ],
)
def test_what_only_a_gpu_can_do_is_missing_and_no_mistake(flag: str, write: Callable) -> None:
    assert load_run(write(), [f"--{flag}"]).sites[0].missing
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]} = .*: needs a GPU"):
        load_to_start("demo.toml", None, [f"--{flag}"])


def test_a_model_whose_registry_wants_what_is_not_installed_is_one_line(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "models_of_mine" / "rich"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("from titan_ext.models.llama3 import flavors, model_registry\n")
    (package / "config_registry.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="model.name = .models_of_mine.rich.: .*a_package_that_is_not_here"):
        load_run(write(), ["--model.name=models_of_mine.rich"])


@pytest.mark.parametrize(
    "flags",
    [
        *(pipelined(each, mode) for each in SPLIT for mode in ("none", "full")),
        *(pipelined(each, "selective") for each in ("1F1B", "GPipe", "LoopedBFS")),
        pipelined("Interleaved1F1B", batch=6),
        pipelined("ZBVZeroBubble", batch=1),
        ["--checkpoint.enable", '--checkpoint.exclude_from_loading=["semi_sync", "lr_scheduler"]'],
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"],
        ["--lr_scheduler.total_steps=20", "--lr_scheduler.decay_ratio=1.0", "--lr_scheduler.min_lr_factor=0.1"],
        ["--optimizer.name=SGD", "--optimizer.momentum=0.9"],
        ["--profiler.enable_profiling", "--profiler.profile_freq=4"],
        parts(["tok_embeddings", "layers.0"], ["layers.1", "norm", "lm_head"]),
    ],
    ids=lambda flags: " ".join(flags)[:60],
)
def test_what_can_run_is_not_refused(flags: list[str], write: Callable) -> None:
    assert len(load_run(write(), flags).sites) == 2
