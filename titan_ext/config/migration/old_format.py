"""How torchtitan 0.1 and 0.2 read a file: their defaults, their eras and their ways to write a list."""

from collections.abc import Mapping
from typing import Any

from titan_ext.config.migration.old_models import EARLY, FIRST, SECOND

_EARLY_KEYS = (
    "training.batch_size training.data_parallel_degree training.data_parallel_replicate_degree optimizer.fused"
    " training.data_parallel_shard_degree training.tensor_parallel_degree training.warmup_steps model.norm_type"
    " experimental.pipeline_parallel_degree experimental.context_parallel_degree float8.enable_float8_linear"
    " checkpoint.model_weights_only checkpoint.interval_type metrics.enable_color_printing metrics.rank_0_only"
).split()
_FIRST_KEYS = (
    "checkpoint.enable_checkpoint checkpoint.initial_load_model_weights_only checkpoint.last_save_model_weights_only"
    " lr_scheduler.lr_min training.compile memory_estimation.enabled parallelism.pipeline_parallel_split_points"
).split()
OLD_DEFAULTS: dict[str, Any] = {
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "training.seq_len": 2048,
    "training.steps": 10000,
    "training.max_norm": 1.0,
    "training.dtype": "float32",
    "training.mixed_precision_param": "bfloat16",
    "training.disable_cuda_graphs": True,
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_ratio": None,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.min_lr_factor": 0.0,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
    "parallelism.tensor_parallel_degree": 1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.context_parallel_degree": 1,
    "parallelism.expert_parallel_degree": 1,
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "activation_checkpoint.mode": "selective",
    "compile.enable": False,
    "checkpoint.enable": False,
    "checkpoint.interval": 500,
    "checkpoint.export_dtype": "float32",
    "metrics.log_freq": 10,
    "metrics.enable_tensorboard": False,
    "validator.enable": False,
    "semi_sync.method": "none",
}
"""What those versions did where a file said nothing. ``debug.seed`` is not here: unset, it stood for any seed."""

OF_MODE = {
    "none": (),
    "full": ("preserve_rng_state", "determinism_check", "debug"),
    "selective": ("preserve_rng_state", "determinism_check", "debug", "force_recompute_mm_shapes_by_fqns"),
    "memory_budget": (
        "preserve_rng_state",
        "determinism_check",
        "debug",
        "memory_budget",
        "visualize_memory_budget_pareto",
    ),
}
SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved_1f1b": "Interleaved1F1B"}


def era_of(old: Mapping[str, Any]) -> str:
    """The version that a file is of, by keys that others do not have."""
    if any(key in old for key in _EARLY_KEYS):
        return EARLY
    return FIRST if any(key in old for key in _FIRST_KEYS) else SECOND


def names_in(value: Any) -> list[str]:
    """A list of names, which early versions also took with commas between them."""
    return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else list(value)


def renamed(parts: Any) -> Any:
    """Module names of model parts: the head has another."""
    return [["lm_head" if name == "output" else name for name in part] for part in parts] if parts else parts
