"""Settings that bind without complaint and that a run would stumble over: refused before it starts."""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from titan_ext.config.checks.words import check_recomputed, check_words
from titan_ext.config.layout import Layout, pipeline_stages
from titan_ext.config.losses import check_loss
from titan_ext.config.pipeline import check_schedule, trained_parameters, within
from titan_ext.config.settings import Settings, hint
from titan_ext.models.mup import ScaledLinear
from titan_ext.object_store import is_url
from titan_ext.optim.moments import moments_by_parameter
from titan_ext.trainer.optimizers import as_arguments
from titan_ext.trainer.resuming import STATES

# What has no meaning where no checkpoint is read or written, and would be passed over in silence.
_OF_CHECKPOINTS = {"initial_load_in_hf": False, "load_step": -1, "create_seed_checkpoint": False, "load_only": False}
_COMPILED = ("model", "loss")
BF16_STATES = "fused_opt_states_bf16"


def run_checks(settings: Settings, config: Any, layout: Layout) -> list[Callable[[], None]]:
    """Checks of a site's ``Trainer.Config``, whose model may not be known; each raises a ``UserError`` or returns."""
    return [
        lambda: check_checkpoints(settings, config, layout),
        lambda: check_profiler(settings, config),
        lambda: check_loss(settings, config, layout),
        lambda: check_rates(settings, config),
        lambda: check_compile(settings, config),
        lambda: check_words(settings, config),
        lambda: check_optimizers(settings, config),
        lambda: check_batch_warmup(settings, config, layout),
        lambda: check_norms(settings, config),
        lambda: check_regularizer(settings, config, layout),
    ]


def model_checks(settings: Settings, config: Any) -> list[Callable[[], None]]:
    """As ``run_checks``, of what depends on the model."""
    return [
        lambda: check_schedule(settings, config, len(pipeline_stages(settings, config))),
        lambda: check_groups(settings, config),
        lambda: check_scaled_rates(settings, config),
        lambda: check_recomputed(settings, config),
    ]


def check_checkpoints(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse what checkpoints cannot do.

    Raises:
        UserError: naming the key to change.
    """
    checkpoint = config.checkpoint
    for key, default in _OF_CHECKPOINTS.items():
        value = getattr(checkpoint, key)
        if value != default and not checkpoint.enable:
            raise settings.error(f"checkpoint.{key}", "is not read without checkpoint.enable = true", value)
    if config.replica.heal_from_checkpoints and not checkpoint.enable:
        raise settings.error("replica.heal_from_checkpoints", "is not read without checkpoint.enable = true", True)
    if checkpoint.enable and is_url(checkpoint.folder):
        _check_store(settings, checkpoint)
    if checkpoint.create_seed_checkpoint and layout.ranks > 1:
        problem = f"must be false with {layout.ranks} ranks: one rank makes it (nproc = 1, parallel degrees 1)"
        raise settings.error("checkpoint.create_seed_checkpoint", problem, True)
    absent = {
        "semi_sync": config.semi_sync.method == "none",
        "loss": not hasattr(config.loss, "corpora"),
        "spikes": config.spikes.action == "none",
        "regularizer": not config.regularizer.phases or config.semi_sync.method != "none",
    }
    known = [name for name in STATES if not absent.get(name, False)]
    for name in checkpoint.exclude_from_loading:
        if name not in known:
            raise settings.error(
                "checkpoint.exclude_from_loading", f"{name!r} is no part of a checkpoint; {hint(name, known)}"
            )


def _check_store(settings: Settings, checkpoint: Any) -> None:
    """Refuse a URL to which no checkpoint can go."""
    scheme, _, place = checkpoint.folder.partition("://")
    if scheme.lower() in ("http", "https"):
        raise settings.error(
            "checkpoint.folder",
            "a web server takes no files: a folder, or an object store (s3://, gs://)",
            checkpoint.folder,
        )
    if not place.strip("/"):
        raise settings.error("checkpoint.folder", f"names no bucket: {scheme}://BUCKET/…", checkpoint.folder)
    if checkpoint.async_mode == "async_with_pinned_mem":
        problem = f'must be "async" or "disabled" where checkpoint.folder is a URL ({checkpoint.folder})'
        raise settings.error("checkpoint.async_mode", problem, checkpoint.async_mode)


def check_rates(settings: Settings, config: Any) -> None:
    """Refuse a schedule of the learning rate that would turn negative, and validation that never or always comes.

    Raises:
        UserError: naming the key to change.
    """
    scheduler, steps = config.lr_scheduler, config.training.steps
    if scheduler.total_steps is not None and round(scheduler.total_steps * scheduler.stretch) < steps:
        times = "" if scheduler.stretch == 1 else ", after lr_scheduler.stretch"
        problem = f"must be at least training.steps ({steps}){times}: beyond it the learning rate would be negative"
        raise settings.error("lr_scheduler.total_steps", problem, scheduler.total_steps)
    for key in ("decay_ratio", "min_lr_factor"):
        value = getattr(scheduler, key)
        if value is not None and not 0 <= value <= 1:
            raise settings.error(f"lr_scheduler.{key}", "must be from 0 to 1", value)
    if config.validator.enable and config.validator.freq < 1:
        raise settings.error("validator.freq", "must be at least 1", config.validator.freq)


def check_profiler(settings: Settings, config: Any) -> None:
    """Refuse a profile that is longer than the steps between two.

    Raises:
        UserError: naming the key to change.
    """
    profiler = config.profiler
    needed = profiler.profiler_warmup + profiler.profiler_active
    if profiler.enable_profiling and profiler.profile_freq < needed:
        problem = f"must be at least {needed}, profiler_warmup + profiler_active"
        raise settings.error("profiler.profile_freq", problem, profiler.profile_freq)


def check_compile(settings: Settings, config: Any) -> None:
    """Refuse to compile parts that there are not, which would compile nothing, by what is not there, or on no budget.

    Raises:
        UserError: naming the key to change.
    """
    section, budget = config.compile, getattr(config.activation_checkpoint, "memory_budget", None)
    if budget is not None and not 0 <= budget <= 1:
        raise settings.error("activation_checkpoint.memory_budget", "must be from 0 to 1", budget)
    if not section.enable:
        return
    for name in section.components:
        if name not in _COMPILED:
            raise settings.error("compile.components", f"{name!r} is no part to compile; {hint(name, _COMPILED)}")
    backends = torch.compiler.list_backends(exclude_tags=())
    if section.backend not in backends:
        raise settings.error("compile.backend", f"unknown; {hint(section.backend, backends)}", section.backend)


def check_batch_warmup(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse a batch that cannot grow.

    Raises:
        UserError: naming the key to change.
    """
    warmup, training = config.batch_warmup, config.training
    start, key = warmup.start_batch_size, "batch_warmup.start_batch_size"
    if warmup.steps == 0:
        if start:
            raise settings.error(key, "is not read without batch_warmup.steps", start)
        return
    a_pass = training.local_batch_size * layout.batch
    if training.global_batch_size <= a_pass:
        problem = f"needs training.global_batch_size above {a_pass}, the sequences of one pass: it is what grows"
        raise settings.error("batch_warmup.steps", problem, warmup.steps)
    if start and (start % a_pass or start >= training.global_batch_size):
        problem = f"must be a multiple of {a_pass}, the sequences of one pass, below training.global_batch_size"
        raise settings.error(key, problem, start)


def check_norms(settings: Settings, config: Any) -> None:
    """Refuse to look at activations of a model that is not run eagerly.

    Raises:
        UserError: naming the key to change.
    """
    key = "metrics.activation_norms_every"
    if not config.metrics.activation_norms_every:
        return
    if not config.training.disable_cuda_graphs:
        raise settings.error(key, "needs training.disable_cuda_graphs = true", config.metrics.activation_norms_every)
    if config.compile.enable and "model" in config.compile.components:
        problem = 'needs a model that is not compiled: compile.components without "model"'
        raise settings.error(key, problem, config.metrics.activation_norms_every)


def check_regularizer(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse passes beside the step's where there can be none.

    Raises:
        UserError: naming the key to change.
    """
    regularizer = config.regularizer
    if regularizer.runs_passes and not config.training.disable_cuda_graphs:
        raise settings.error("regularizer.phases", "ewc and distillation need training.disable_cuda_graphs = true")
    if not regularizer.teaches:
        return
    if layout.pipeline > 1:
        key = "parallelism.pipeline_parallel_degree"
        raise settings.error(key, "must be 1 with distillation in regularizer.phases", layout.pipeline)
    rounds = [phase for phase in regularizer.phases if phase.kind() is not None and phase.kind().teaches]
    for one, other in itertools.combinations(rounds, 2):
        ends = [math.inf if each.until_round == -1 else each.until_round for each in (one, other)]
        if max(one.from_round, other.from_round) < min(ends):
            raise settings.error("regularizer.phases", "two that distil overlap: one until_round must come first")


def check_optimizers(settings: Settings, config: Any) -> None:
    """Refuse optimizers that a configuration file cannot build, or whose implementation they do not have.

    Raises:
        UserError: naming the key to change.
    """
    optimizer = config.optimizer
    for group in optimizer.param_groups:
        name = group.optimizer_name
        factory = optimizer._owner._resolve_optimizer_factory(name)
        given = {"params", *group.optimizer_kwargs, *optimizer.optimizer_factory_kwargs_by_name.get(name, {})}
        missing = [each.name for each in _without_default(factory) if each.name not in given]
        if missing:
            problem = f"cannot be set up in a configuration file: it needs {', '.join(missing)} (Muon needs nothing)"
            raise settings.error(_name_key(settings), problem, name)
        if optimizer.implementation == BF16_STATES and name not in ("Adam", "AdamW"):
            raise settings.error("optimizer.implementation", f"is for Adam and AdamW, not {name}", BF16_STATES)


def check_groups(settings: Settings, config: Any) -> None:
    """Refuse groups of parameters that leave some out, or that a stage of the pipeline has nothing for.

    Raises:
        UserError: naming the group.
    """
    patterns = [group.pattern for group in config.optimizer.param_groups]
    if patterns == [".*"]:
        return
    for place, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except re.error as error:
            key, problem = f"optimizer.param_groups[{place}].pattern", f"no regular expression: {error}"
            raise settings.error(key, problem, pattern) from None
    groups = {name: _first_match(patterns, name) for name in trained_parameters(config)}
    for name, group in groups.items():
        if group is None:
            raise settings.error("optimizer.param_groups", f'no pattern matches {name}; end with a group for ".*"')
    for stage, modules in enumerate(pipeline_stages(settings, config)):
        here = {group for name, group in groups.items() if within(name, modules)}
        for place in sorted({*range(len(patterns))} - here):
            of = f"of pipeline stage {stage}" if config.parallelism.pipeline_parallel_degree > 1 else "of the model"
            problem = f"matches no parameter {of} that none before it does"
            raise settings.error(f"optimizer.param_groups[{place}].pattern", problem, patterns[place])


def check_scaled_rates(settings: Settings, config: Any) -> None:
    """Refuse layers whose learning rates follow muP's rules for Adam under an optimizer of another kind.

    Raises:
        UserError: naming the optimizer.
    """
    if not any(config.model_spec.model.traverse(ScaledLinear.Config)):
        return
    for group in config.optimizer.param_groups:
        factory = config.optimizer._owner._resolve_optimizer_factory(group.optimizer_name)
        optimizer = factory([torch.nn.Parameter(torch.zeros(2, 2))], **as_arguments(group.optimizer_kwargs))
        kept = [moment.order for _, each in moments_by_parameter(optimizer) for moment in each.values()]
        if 2 not in kept:
            problem = (
                f"{group.optimizer_name} has no second moment, and muP's learning rates are for those that have one"
            )
            raise settings.error(_name_key(settings), problem)


def _first_match(patterns: Sequence[str], name: str) -> int | None:
    return next((place for place, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def _without_default(factory: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(factory).parameters.values())[1:]  # the first are the groups of parameters
    return [each for each in parameters if each.kind in kinds and each.default is each.empty]


def _name_key(settings: Settings) -> str:
    return "optimizer.param_groups" if settings.get("optimizer.param_groups") else "optimizer.name"
