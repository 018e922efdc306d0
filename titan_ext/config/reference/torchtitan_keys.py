"""What torchtitan's keys do, in our words: one sentence for each of torchtitan 0.3's that a file may set."""

TEXTS = {
    "activation_checkpoint.debug": "Record what each recomputation ran, to explain a mismatch; slow.",
    "activation_checkpoint.determinism_check": "How torch compares a recomputation with the first pass.",
    "activation_checkpoint.force_recompute_mm_shapes_by_fqns": (
        'Linear layers by name; products of their shape are always recomputed under "selective".'
    ),
    "activation_checkpoint.memory_budget": "Activations that the compiler may keep, from 0 (least) to 1 (all).",
    "activation_checkpoint.preserve_rng_state": "Recompute with the random state of the first pass.",
    "activation_checkpoint.visualize_memory_budget_pareto": (
        "Draw time against memory for all budgets into the site's folder."
    ),
    "checkpoint.async_mode": "Write in the background: by a thread, or by a process from pinned memory (GPUs only).",
    "checkpoint.create_seed_checkpoint": "Save the freshly initialised model instead of training.",
    "checkpoint.enable": "Save checkpoints, and go on from the last one when the run is started again.",
    "checkpoint.enable_first_step_checkpoint": "Also save after the first step, to see early that saving works.",
    "checkpoint.exclude_from_loading": (
        'Parts that are not taken from a checkpoint, such as "optimizer" or "dataloader".'
    ),
    "checkpoint.export_dtype": "Type of the values in a checkpoint of the model alone.",
    "checkpoint.folder": "Folder of the checkpoints, below the site's own; or the URL of a place on an object store "
    "(``s3://BUCKET/RUN``), below which each site has a part of its own, with its checkpoints and copies of its logs.",
    "checkpoint.initial_load_in_hf": "What is loaded at the start is in Hugging Face's format.",
    "checkpoint.initial_load_in_hf_quantized": "It is quantized, and dequantized as it is read.",
    "checkpoint.initial_load_model_only": (
        "Take only the model from what is loaded at the start, not the optimizer or the step."
    ),
    "checkpoint.initial_load_path": "Checkpoint that a new run starts from; a run that goes on takes its own.",
    "checkpoint.interval": "Steps between checkpoints.",
    "checkpoint.keep_latest_k": "Checkpoints that are kept, at least 2; 0 keeps all.",
    "checkpoint.last_save_in_hf": "Write the last checkpoint in Hugging Face's format.",
    "checkpoint.last_save_model_only": "Let the last checkpoint hold only the model; a run cannot go on from it.",
    "checkpoint.load_only": "Load checkpoints and save none.",
    "checkpoint.load_step": "Step to go on from; -1 takes the last.",
    "comm.init_timeout_seconds": "Patience of collectives inside the site until the first step is done.",
    "comm.mode": '"default", or "torchcomms" with that package; torchtitan\'s dry runs are refused.',
    "comm.save_traces_file_prefix": "First part of the flight recorder's file names.",
    "comm.save_traces_folder": "Folder of the flight recorder's files.",
    "comm.trace_buf_size": "Entries of NCCL's flight recorder; 0 turns it off.",
    "comm.train_timeout_seconds": "Patience of collectives inside the site from the second step on.",
    "compile.backend": "torch.compile's backend.",
    "compile.components": 'What is compiled: "model", "loss".',
    "compile.enable": "Compile with torch.compile.",
    "compile.enable_async_tensor_parallel": "Overlap tensor parallelism's messages with products (compiled models).",
    "data.num_workers": "Processes that read ahead; 0 reads in the rank itself.",
    "data.persistent_workers": "Keep those processes between epochs.",
    "data.pin_memory": "Copy batches into pinned memory.",
    "data.prefetch_factor": "Batches that each process reads ahead.",
    "debug.batch_invariant": "Kernels whose results do not depend on the batch; refused in training.",
    "debug.detect_anomaly": "Let autograd name the forward operation behind a NaN; slow.",
    "debug.deterministic": "Only deterministic kernels.",
    "debug.deterministic_warn_only": "Warn of other kernels instead of failing.",
    "debug.enable_structured_logging": "Keep torchtitan's structured log in the site's folder.",
    "debug.moe_force_load_balance": "Deal tokens to experts in turn, whatever the router says.",
    "debug.print_config": "Print the site's whole configuration at its start.",
    "debug.save_config_file": (
        "Name of a file for torchtitan's own record of the configuration, beside our config.json."
    ),
    "debug.seed": 'Seed of the parameters and of everything random; "none" draws one.',
    "debug.spmd_typechecking": "Check at run time how tensors are laid out over ranks.",
    "lr_scheduler.decay_ratio": (
        'Last part of the steps, from 0 to 1, in which the rate falls; "none": from the warm-up on.'
    ),
    "lr_scheduler.decay_type": "Shape of the fall.",
    "lr_scheduler.min_lr_factor": "What the rate falls to, as a part of its maximum.",
    "lr_scheduler.total_steps": 'Steps that the schedule is for; "none": training.steps.',
    "lr_scheduler.warmup_steps": "Steps in which the rate rises from 0.",
    "metrics.disable_color_printing": "No colours in the console.",
    "metrics.enable_tensorboard": "Leave TensorBoard events.",
    "metrics.enable_wandb": "Log to Weights & Biases (the package wandb).",
    "metrics.log_freq": "Steps between two lines of the log and of metrics.jsonl.",
    "metrics.save_for_all_ranks": "Let every rank leave metrics, not only the one that knows the loss.",
    "metrics.save_tb_folder": "Folder of the TensorBoard events, below the site's.",
    "optimizer.implementation": 'Kernel of the step; "fused_opt_states_bf16" also keeps Adam\'s moments in bfloat16.',
    "optimizer.optimizer_factory_kwargs_by_name": "Arguments of an optimizer's constructor that are not a group's.",
    "optimizer.param_groups": "[[optimizer.param_groups]] tables, instead of the short form.",
    "optimizer.param_groups.optimizer_kwargs": "Its hyper-parameters.",
    "optimizer.param_groups.optimizer_name": "The optimizer of the group.",
    "optimizer.param_groups.pattern": (
        "Regular expression over parameter names; the first group that fits takes a parameter."
    ),
    "override.imports": "Overrides of torchtitan's parts: dotted paths of functions, or [path, {arguments}].",
    "parallelism.context_parallel_degree": "Ranks that share a sequence (GPUs only).",
    "parallelism.context_parallel_load_balancer": ('How positions are dealt to those ranks; "none" in one piece each.'),
    "parallelism.context_parallel_ptrr_mask_key": (
        'Which mask the balancer "ptrr" goes by, where a model has several.'
    ),
    "parallelism.data_parallel_replicate_degree": "Whole copies of the model within the site (HSDP).",
    "parallelism.data_parallel_shard_degree": (
        "Ranks that share the parameters (FSDP); -1 takes what is left of nproc, or of the GPUs."
    ),
    "parallelism.enable_fsdp_symm_mem": "FSDP over symmetric memory (GPUs of capability 9.0 on).",
    "parallelism.enable_sequence_parallel": "Tensor parallelism also cuts activations along the sequence.",
    "parallelism.expert_parallel_degree": "Ranks that share the experts of a mixture; 1 for other models.",
    "parallelism.fsdp_reshard_after_forward": (
        "Whether FSDP frees gathered parameters between forward and backward pass."
    ),
    "parallelism.module_fqns_per_model_part": (
        'Names of the modules of each pipeline stage; "none" deals layers evenly.'
    ),
    "parallelism.pipeline_parallel_degree": "Ranks of the pipeline.",
    "parallelism.pipeline_parallel_first_stage_less_layers": (
        "Layers that the first stage has fewer, for the embedding."
    ),
    "parallelism.pipeline_parallel_last_stage_less_layers": "Layers that the last stage has fewer, for the head.",
    "parallelism.pipeline_parallel_layers_per_stage": 'Layers of a stage; "none" follows from schedule and degree.',
    "parallelism.pipeline_parallel_microbatch_size": (
        "Sequences of a microbatch; it divides training.local_batch_size."
    ),
    "parallelism.pipeline_parallel_schedule": "torch's pipeline schedule.",
    "parallelism.pipeline_parallel_schedule_csv": "File of a schedule, for the schedules that read one.",
    "parallelism.spmd_backend": "How torchtitan lays tensors out over ranks.",
    "parallelism.tensor_parallel_degree": "Ranks that share each matrix.",
    "profiler.enable_memory_snapshot": "Record allocations for torch's memory viewer (GPUs only).",
    "profiler.enable_profiling": "Record profiler traces.",
    "profiler.memory_snapshot_freq": 'Steps between memory snapshots; "none": profile_freq.',
    "profiler.memory_snapshot_max_entries": "Events that a snapshot keeps.",
    "profiler.profile_freq": "Steps between traces.",
    "profiler.profiler_active": "Steps that a trace covers.",
    "profiler.profiler_repeat": 'Traces in all; "none": to the end.',
    "profiler.profiler_skip_first": "Steps before the first cycle.",
    "profiler.profiler_skip_first_wait": "Cycles that begin without waiting.",
    "profiler.profiler_warmup": "Steps before each trace that are thrown away.",
    "profiler.save_memory_snapshot_folder": "Folder of the snapshots, below the site's.",
    "profiler.save_traces_folder": "Folder of the traces, below the site's.",
    "training.disable_cuda_graphs": "Launch kernels one by one; true where there is no GPU, and with pipelines.",
    "training.dtype": "Type of parameters, gradients and optimizer states.",
    "training.enable_cpu_offload": "Keep parameters and optimizer states in host memory (GPUs only).",
    "training.gc_debug": "Collect garbage at every step, to find cycles that hold tensors.",
    "training.gc_freq": "Steps between garbage collections.",
    "training.global_batch_size": (
        "Sequences of the site's step, a multiple of local_batch_size x data-parallel ranks; -1: one local batch a rank."
    ),
    "training.local_batch_size": "Sequences that a data-parallel rank computes at a time.",
    "training.max_norm": "Gradients of a larger norm are scaled down to it; inf does not.",
    "training.mixed_precision_param": "Type that parameters are computed with (float32 where there is no GPU).",
    "training.mixed_precision_reduce": "Type that gradients are reduced in.",
    "training.seq_len": "Tokens of a sequence.",
    "training.steps": "Inner steps of the run.",
    "validator.enable": "Compute the loss on the validator's data now and then.",
    "validator.freq": "Steps between validations.",
    "validator.steps": "Batches of a validation; -1 reads all of its data.",
}

OPTIMIZER_TEXTS = {
    "amsgrad": "Divide by the largest second moment so far.",
    "basis_from": '"gradient": bases of the site\'s own; "outer": those of the averaged pseudo-gradient.',
    "betas": "Decay rates of the moments.",
    "clip_exponent": "The update is clipped at this power of the step; inf does not clip.",
    "decoupled_weight_decay": "Decay the weights as AdamW does.",
    "dampening": "What the gradient is weakened by in the momentum.",
    "eps": "Added to the root of the second moment.",
    "lr": "Learning rate at its maximum.",
    "maximize": "Climb instead of descending.",
    "momentum": "Decay rate of the momentum.",
    "nesterov": "Nesterov's form of the momentum.",
    "state_dtype": 'Type of the moments; "none": the parameters\' own.',
    "weight_decay": "Weight decay.",
}
"""Hyper-parameters of optimizers, where no docstring of ours says it better."""
