"""Configuration keys of torchtitan 0.1 and 0.2, of torchft and of known forks, and what they are here.

Facts of torchtitan's history from February 2024 to February 2026, after which it read no TOML any more; of torchft's outer
loops; of the forks in which DES-LOC and MT-DAO were developed, and DiLoCo between unlike sites. ``migrate`` writes whole
files over by these tables; the loader takes from them what to answer to a single key.
"""

from dataclasses import dataclass
from typing import Any

KEPT = {
    "activation_checkpoint": "debug determinism_check memory_budget mode preserve_rng_state visualize_memory_budget_pareto",
    "checkpoint": "async_mode create_seed_checkpoint enable enable_first_step_checkpoint exclude_from_loading export_dtype"
    " folder initial_load_in_hf initial_load_in_hf_quantized initial_load_model_only initial_load_path interval"
    " keep_latest_k last_save_in_hf last_save_model_only load_only load_step",
    "comm": "init_timeout_seconds mode save_traces_file_prefix save_traces_folder trace_buf_size train_timeout_seconds",
    "compile": "backend components enable",
    "debug": "deterministic deterministic_warn_only moe_force_load_balance seed",
    "lr_scheduler": "decay_ratio decay_type min_lr_factor total_steps warmup_steps",
    "metrics": "disable_color_printing enable_tensorboard enable_wandb log_freq save_for_all_ranks save_tb_folder",
    "model": "flavor name",
    "optimizer": "betas eps implementation lr name weight_decay",
    "parallelism": "context_parallel_degree context_parallel_load_balancer data_parallel_replicate_degree"
    " data_parallel_shard_degree expert_parallel_degree fsdp_reshard_after_forward module_fqns_per_model_part"
    " pipeline_parallel_degree pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers"
    " pipeline_parallel_layers_per_stage pipeline_parallel_microbatch_size pipeline_parallel_schedule"
    " pipeline_parallel_schedule_csv tensor_parallel_degree",
    "training": "dtype enable_cpu_offload gc_debug gc_freq global_batch_size local_batch_size max_norm"
    " mixed_precision_param mixed_precision_reduce seq_len steps",
}
"""Keys that are called and mean the same here, by section."""

MOVED = {
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        "activation_checkpoint.force_recompute_mm_shapes_by_fqns"
    ),
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_in_safetensors_format": "checkpoint.last_save_in_hf",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "comm.timeout_seconds": "comm.train_timeout_seconds",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_schedule_csv": "parallelism.pipeline_parallel_schedule_csv",
    "fault_tolerance.fragment_sync_delay": "semi_sync.fragment_sync_delay",
    "fault_tolerance.fragment_update_alpha": "semi_sync.fragment_update_alpha",
    "fault_tolerance.manager_hostname": "replica.hostname",
    "fault_tolerance.min_replica_size": "replica.min_sites",
    "fault_tolerance.num_fragments": "semi_sync.num_fragments",
    "fault_tolerance.semi_sync_method": "semi_sync.method",
    "fault_tolerance.sync_steps": "semi_sync.sync_every",
    "job.dump_folder": "dump_folder",
    "job.print_args": "debug.print_config",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "optimizer.desloc.outer_optimizer.kwargs.lr": "semi_sync.outer_lr",
    "optimizer.desloc.outer_optimizer.kwargs.momentum": "semi_sync.outer_momentum",
    "optimizer.desloc.outer_optimizer.kwargs.nesterov": "semi_sync.nesterov",
    "optimizer.desloc.param_sync_every": "semi_sync.sync_every",
    "optimizer.vs": "optimizer.omegas",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "profiling.enable_memory_snapshot": "profiler.enable_memory_snapshot",
    "profiling.enable_profiling": "profiler.enable_profiling",
    "profiling.profile_every_x_iter": "profiler.profile_freq",
    "profiling.profile_freq": "profiler.profile_freq",
    "profiling.profiler_active": "profiler.profiler_active",
    "profiling.profiler_warmup": "profiler.profiler_warmup",
    "profiling.run_profiler": "profiler.enable_profiling",
    "profiling.save_memory_snapshot_folder": "profiler.save_memory_snapshot_folder",
    "profiling.save_traces_folder": "profiler.save_traces_folder",
    "training.batch_size": "training.local_batch_size",
    "training.checkpoint_folder": "checkpoint.folder",
    "training.checkpoint_interval": "checkpoint.interval",
    "training.compile": "compile.enable",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.dataloader.num_workers": "data.num_workers",
    "training.dataloader.persistent_workers": "data.persistent_workers",
    "training.dataloader.pin_memory": "data.pin_memory",
    "training.dataloader.prefetch_factor": "data.prefetch_factor",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "training.deterministic": "debug.deterministic",
    "training.fsdp_reshard_after_forward": "parallelism.fsdp_reshard_after_forward",
    "training.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "training.seed": "debug.seed",
    "training.sequence_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "validation.dataloader.num_workers": "validator.dataloader.num_workers",
    "validation.dataloader.persistent_workers": "validator.dataloader.persistent_workers",
    "validation.dataloader.pin_memory": "validator.dataloader.pin_memory",
    "validation.dataloader.prefetch_factor": "validator.dataloader.prefetch_factor",
    "validation.enable": "validator.enable",
    "validation.enabled": "validator.enable",
    "validation.freq": "validator.freq",
    "validation.steps": "validator.steps",
}
"""Keys of another name here, whose values mean the same."""

CONVERTED = {
    "activation_checkpoint.selective_ac_option": ("activation_checkpoint.mode", "only op-wise selection is left"),
    "checkpoint.interval_type": ("checkpoint.interval", "it counts steps"),
    "experimental.pipeline_parallel_microbatches": (
        "parallelism.pipeline_parallel_microbatch_size",
        "local_batch_size divided by that many",
    ),
    "experimental.pipeline_parallel_split_points": (
        "parallelism.module_fqns_per_model_part",
        "the modules of each stage instead of where to cut",
    ),
    "fault_tolerance.enable": ("semi_sync.method", 'sites exchange unless it is "none"'),
    "fault_tolerance.group_size": ("site", "a [[site]] table for each replica group"),
    "fault_tolerance.module_fqns_per_model_fragment": (
        "semi_sync.fragments",
        'the head is "lm_head" here, not "output"',
    ),
    "fault_tolerance.process_group_timeout_ms": ("replica.timeout_seconds", "in seconds"),
    "fault_tolerance.rank0_synchronization_only": ("semi_sync.pairing", '"leader" for true'),
    "fault_tolerance.replica_id": ("site", "each replica group is a [[site]] table; index places it"),
    "fl_metrics.hyperparameter_switch.new_betas": ("optimizer_switch.betas", "the same values"),
    "fl_metrics.hyperparameter_switch.new_vs": ("optimizer_switch.omegas", "the same values"),
    "fl_metrics.hyperparameter_switch.reset_momenta": (
        "optimizer_switch.reset_states",
        "states by name, such as exp_avg_0",
    ),
    "fl_metrics.hyperparameter_switch.steps": ("optimizer_switch.step", "the steps before the one switch"),
    "lr_scheduler.switch_scale": ("optimizer_switch.lr_scale", "the same value"),
    "lr_scheduler.switch_step": ("optimizer_switch.step", "the steps before the one switch"),
    "metrics.enable_color_printing": ("metrics.disable_color_printing", "the opposite"),
    "metrics.rank_0_only": ("metrics.save_for_all_ranks", "the opposite"),
    "model.converters": ("model.converters", 'a [[model.converters]] table for each, such as name = "float8"'),
    "model.hf_assets_path": ("tokenizer", "the folder with tokenizer.json, in a [[site]] table or at the top"),
    "model.tokenizer_path": ("tokenizer", "the folder with tokenizer.json, in a [[site]] table or at the top"),
    "optimizer.beta1": ("optimizer.betas", "a list of both"),
    "optimizer.beta2": ("optimizer.betas", "a list of both"),
    "optimizer.desloc.backup_device": ("semi_sync.outer_state_device", '"cpu" or "same"'),
    "optimizer.desloc.enabled": ("semi_sync.method", '"des_loc", or "mt_dao" with a quasi-hyperbolic optimizer'),
    "optimizer.desloc.optimizer_sync_every": (
        "semi_sync.des_loc.first_moment_sync_every",
        "and second_moment_sync_every; with mt_dao momentum_sync_every and second_moment_sync_every in [semi_sync.mt_dao]",
    ),
    "optimizer.desloc.outer_optimizer.target": ("semi_sync.outer_optimizer", "in small letters"),
    "optimizer.fused": ("optimizer.implementation", '"fused", or "foreach" for false'),
    "parallelism.pipeline_parallel_microbatches": (
        "parallelism.pipeline_parallel_microbatch_size",
        "local_batch_size divided by that many",
    ),
    "parallelism.pipeline_parallel_split_points": (
        "parallelism.module_fqns_per_model_part",
        "the modules of each stage instead of where to cut",
    ),
    "training.checkpoint_interval_type": ("checkpoint.interval", "it counts steps"),
    "training.data_parallel_degree": (
        "parallelism.data_parallel_shard_degree",
        'or data_parallel_replicate_degree where data_parallel_type was "ddp"',
    ),
    "training.data_parallel_type": ("parallelism.data_parallel_shard_degree", "or data_parallel_replicate_degree"),
    "training.dataset": ("data.dataset", 'a path, or "hf:c4" for what torchtitan calls c4'),
    "training.dataset_path": ("data.dataset", 'a path, or "hf:PATH:CONFIG:SPLIT" for what the datasets library reads'),
    "training.gradient_accumulation_steps": (
        "training.global_batch_size",
        "local_batch_size x data-parallel ranks x that many",
    ),
    "validation.dataset": (
        "validator.dataloader.dataset",
        'a path, or "hf:c4_validation" for torchtitan\'s c4_validation',
    ),
    "validation.dataset_path": ("validator.dataloader.dataset", 'a path, or "hf:PATH:CONFIG:SPLIT"'),
    "validation.local_batch_size": ("training.local_batch_size", "validation takes the batches of training"),
    "validation.seq_len": ("training.seq_len", "validation takes the sequences of training"),
}
"""Keys whose values have to be converted: where to, and how."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A key that has no home here."""

    why: str
    harmless: tuple[Any, ...] = ()
    """Values at which leaving it out changes nothing; empty: none does."""

    always: bool = False
    """Nothing depends on it, whatever its value."""


_ANY = "it does nothing here"
_QUANTIZED = "quantized layers are [[model.converters]] tables here, with fewer settings"
_CUSTOM = 'a model of your own is named by its dotted path: model.name = "my_package.my_model"'

GONE = {
    "activation_checkpoint.early_stop": Gone("recomputation never stops early", always=True),
    "checkpoint.enable_ft_dataloader_checkpoints": Gone("each site keeps its own place in its data", (True,)),
    "estimate.": Gone("torchtitan dropped it; titan-ext check tells the memory of a rank", (False, "fake")),
    "experimental.context_parallel_rotate_method": Gone("torchtitan 0.3 does not choose it", ("allgather",)),
    "experimental.custom_args_module": Gone(_CUSTOM, ("",)),
    "experimental.custom_import": Gone(_CUSTOM, ("",)),
    "experimental.custom_model_path": Gone(_CUSTOM, ("",)),
    "experimental.enable_compiled_autograd": Gone("torchtitan dropped it", (False,)),
    "experimental.pipeline_parallel_split_mode": Gone("there is one way", ("manual",)),
    "experimental.torch_spmd": Gone("torchtitan dropped it", (False,)),
    "fault_tolerance.process_group": Gone("sites exchange over connections of titan_ext's own", ("gloo",)),
    "fault_tolerance.use_pg_checkpoint_transport": Gone("state travels over HTTP", (False,)),
    "fault_tolerance.should_quantize": Gone(
        'torchft\'s 8-bit floats are not here, values travel whole; semi_sync.codec = "int8" or "bf16" sends less',
        (False,),
    ),
    "float8.": Gone(_QUANTIZED),
    "job.config_file": Gone(_ANY, always=True),
    "job.custom_config_module": Gone(_CUSTOM, ("",)),
    "job.description": Gone(_ANY, always=True),
    "job.save_config_folder": Gone("every site leaves its config.json", always=True),
    "job.use_for_integration_test": Gone(_ANY, always=True),
    "memory_estimation.": Gone("torchtitan dropped it; titan-ext check tells the memory of a rank", (False,)),
    "optimizer.desloc.pin_memory": Gone(_ANY, always=True),
    "metrics.disable_logging_from_checkpoint": Gone(_ANY, always=True),
    "model.attn_mask_type": Gone("documents that are packed together never see each other", ("block_causal",)),
    "model.norm_type": Gone("Llama's norm is RMSNorm", ("rmsnorm", "fused_rmsnorm", "compiled_rmsnorm")),
    "model.print_after_conversion": Gone(_ANY, always=True),
    "model.use_flex_attn": Gone("model.attn_backend chooses the attention; flex is the default", (True,)),
    "mx.": Gone(_QUANTIZED),
    "optimizer.early_step_in_backward": Gone("torchtitan dropped it", (False,)),
    "parallelism.context_parallel_rotate_method": Gone("torchtitan 0.3 does not choose it", ("allgather",)),
    "parallelism.disable_loss_parallel": Gone("only where the logits are kept depends on it", always=True),
    "parallelism.enable_compiled_autograd": Gone("torchtitan dropped it", (False,)),
    "parallelism.expert_parallel_comm_backend": Gone("the model spec chooses it", ("standard",)),
    "parallelism.expert_tensor_parallel_degree": Gone("torchtitan 0.3 cuts no expert over ranks", (1,)),
    "parallelism.pipeline_parallel_expert_parallel_overlap": Gone("only its speed depends on it", always=True),
    "quantize.": Gone(_QUANTIZED),
    "training.disable_loss_parallel": Gone("only where the logits are kept depends on it", always=True),
    "training.enable_float8_linear": Gone(_QUANTIZED, (False,)),
    "training.enable_fp8_linear": Gone(_QUANTIZED, (False,)),
    "training.enable_fsdp_float8_all_gather": Gone(_QUANTIZED, (False,)),
    "training.enable_fsdp_fp8_all_gather": Gone(_QUANTIZED, (False,)),
    "training.enable_loss_parallel": Gone("only where the logits are kept depends on it", always=True),
    "training.enable_selective_ac": Gone("activation_checkpoint.mode chooses it", (False,)),
    "training.float8_scaling_type_grad_output": Gone(_QUANTIZED, ("dynamic",)),
    "training.float8_scaling_type_input": Gone(_QUANTIZED, ("dynamic",)),
    "training.float8_scaling_type_weight": Gone(_QUANTIZED, ("dynamic",)),
    "training.fp8_linear": Gone(_QUANTIZED, ("", False)),
    "training.precompute_float8_dynamic_scale_for_fsdp": Gone(_QUANTIZED, (False,)),
    "training.warmup_pct": Gone("lr_scheduler.warmup_steps counts steps"),
}
"""Keys without a home; ``section.`` stands for all of a section."""

ALIASES = {
    "backup_device": "semi_sync.outer_state_device",
    "bucket_cap_mb": "semi_sync.bucket_mib",
    "compression": "semi_sync.codec",
    "inner_steps": "semi_sync.sync_every",
    "local_steps": "semi_sync.sync_every",
    "min_replica_size": "replica.min_sites",
    "model_fragments": "semi_sync.fragments",
    "module_fqns_per_model_fragment": "semi_sync.fragments",
    "n_fragments": "semi_sync.num_fragments",
    "num_inner_steps": "semi_sync.sync_every",
    "num_outer_fragments": "semi_sync.num_fragments",
    "outer_learning_rate": "semi_sync.outer_lr",
    "outer_nesterov": "semi_sync.nesterov",
    "outer_optimizer_lr": "semi_sync.outer_lr",
    "outer_optimizer_momentum": "semi_sync.outer_momentum",
    "process_group_timeout_ms": "replica.timeout_seconds",
    "quorum_timeout": "replica.quorum_timeout_seconds",
    "semi_sync_method": "semi_sync.method",
    "should_quantize": "semi_sync.codec",
    "sync_interval": "semi_sync.sync_every",
    "sync_steps": "semi_sync.sync_every",
}
"""Names of torchft and other outer loops, in whatever section of the outer loop they stand."""

LOOP_SECTIONS = ("semi_sync", "fault_tolerance", "replica", "diloco", "local_sgd", "torchft", "ft")

OLD_SECTIONS = tuple(
    "diloco estimate experimental fault_tolerance fl_metrics float8 ft job local_sgd memory_estimation mx profiling"
    " quantize torchft validation".split()
)
"""Sections that only such files have."""


@dataclass(frozen=True, slots=True)
class OldKey:
    """What a key of such a file is here."""

    keys: tuple[str, ...]
    """The keys that took its place; empty where nothing did."""

    advice: str
    """For who wrote it where ours are expected."""

    by_hand: str
    """For who has it written over."""


def find(key: str) -> OldKey | None:
    """What a dotted key of an older torchtitan, or of another outer loop, is here; None for one that was none."""
    section, _, name = key.rpartition(".")
    if key in MOVED:
        return _old_key(MOVED[key], "an older name")
    if key in CONVERTED:
        new, how = CONVERTED[key]
        return _old_key(new, f"an older form; {how}")
    gone = find_gone(key)
    if gone is not None:
        return OldKey((), f"an older torchtitan's, which has no home here: {gone.why}", gone.why)
    if section in LOOP_SECTIONS and name in ALIASES:
        return _old_key(ALIASES[name], "another outer loop's name")
    return None


def _old_key(new: str, how: str) -> OldKey:
    return OldKey((new,), f"did you mean {new}? ({how})", f"set {new} by hand ({how})")


def find_gone(key: str) -> Gone | None:
    """Why a dotted key has no home here; None if it has one, or was never there."""
    return GONE.get(key) or GONE.get(key.split(".")[0] + ".")
