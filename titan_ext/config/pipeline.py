"""Pipeline schedules: what each of them asks of a configuration, and where its loss comes out."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from titan_ext.config.settings import Settings
from titan_ext.semi_sync.plan.resolve import resolve

_KEY = "parallelism.pipeline_parallel_schedule"
_V_SHAPED = ("zbvzerobubble", "dualpipev")
_SPLIT_BACKWARD = ("interleavedzerobubble", *_V_SHAPED)


def is_v_shaped(schedule: str) -> bool:
    """Whether the first and the last stage are on the first rank, which then has the loss."""
    return schedule.lower() in _V_SHAPED


def check_schedule(settings: Settings, config: Any, stages: int) -> None:
    """Refuse a schedule that torch could not run, or that ends in a traceback at the first step.

    Args:
        settings: for the wording of errors.
        config: the site's ``Trainer.Config``.
        stages: of the whole pipeline.

    Raises:
        UserError: naming the key to change.
    """
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        return
    _check_parts(settings, config)
    csv = parallelism.pipeline_parallel_schedule_csv
    if csv and not os.path.isfile(csv):
        raise settings.error("parallelism.pipeline_parallel_schedule_csv", "no such file", csv)
    schedule, ranks = parallelism.pipeline_parallel_schedule.lower(), parallelism.pipeline_parallel_degree
    if schedule in _SPLIT_BACKWARD:
        _check_split_backward(settings, config)
    if schedule in _V_SHAPED and stages != 2 * ranks:
        problem = f"needs two stages a rank, and the model is cut into {stages} for {ranks} ranks"
        raise settings.error(_KEY, problem, parallelism.pipeline_parallel_schedule)
    outer = config.semi_sync
    if schedule in _V_SHAPED and outer.method != "none" and resolve(outer).weighting.needs_loss:
        problem = (
            f"cannot be weights by loss with {_KEY} = {parallelism.pipeline_parallel_schedule!r}: torch cannot evaluate"
        )
        raise settings.error("semi_sync.weighting", problem, outer.weighting)
    if schedule in _V_SHAPED and config.validator.enable:
        problem = (
            f"must be false with {_KEY} = {parallelism.pipeline_parallel_schedule!r}: torch cannot evaluate with it"
        )
        raise settings.error("validator.enable", problem, True)
    _check_microbatches(settings, config, schedule, stages)


def trained_parameters(config: Any) -> list[str]:
    """Names of the model's parameters that have gradients, in the model's order; built without memory."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter is of one of the modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _check_parts(settings: Settings, config: Any) -> None:
    """Refuse parts that the user cut by hand and that do not make up the model."""
    parts, key = config.parallelism.module_fqns_per_model_part, "parallelism.module_fqns_per_model_part"
    if parts is None:
        return
    ranks = config.parallelism.pipeline_parallel_degree
    if not parts or len(parts) % ranks:
        raise settings.error(key, f"must be as many parts for each of the {ranks} ranks of the pipeline", parts)
    for name in trained_parameters(config):
        holders = [place for place, modules in enumerate(parts) if within(name, modules)]
        if len(holders) != 1:
            told = f"stand in parts {holders}" if holders else "are in no part"
            module = name.rpartition(".")[0]
            raise settings.error(key, f"every module belongs in one part; the parameters of {module} {told}")
    if "lm_head" not in parts[-1] or "tok_embeddings" not in parts[0]:
        raise settings.error(key, "tok_embeddings belong in the first part, lm_head in the last", parts)


def _check_split_backward(settings: Settings, config: Any) -> None:
    """These schedules take the gradients of inputs and of weights apart, in two passes over what a forward left."""
    from torchtitan.distributed.activation_checkpoint import SelectiveAC

    schedule = config.parallelism.pipeline_parallel_schedule
    if isinstance(config.activation_checkpoint, SelectiveAC.Config):
        problem = f'must be "full" or "none" with {_KEY} = "{schedule}", which goes backward twice'
        raise settings.error("activation_checkpoint.mode", problem, "selective")
    if config.compile.enable and "model" in config.compile.components:
        problem = f'must be without "model" with {_KEY} = "{schedule}", which goes backward twice'
        raise settings.error("compile.components", problem, config.compile.components)


def _check_microbatches(settings: Settings, config: Any, schedule: str, stages: int) -> None:
    batch, size = config.training.local_batch_size, config.parallelism.pipeline_parallel_microbatch_size
    ranks, count = config.parallelism.pipeline_parallel_degree, batch // size
    told = f"({count} microbatches of {size} with {_KEY} = {config.parallelism.pipeline_parallel_schedule!r})"
    if schedule in ("1f1b", "dualpipev") and count < stages:
        problem = f"must be at least {stages * size}: as many microbatches as the pipeline has stages {told}"
        raise settings.error("training.local_batch_size", problem, batch)
    rounds = max(1, count // ranks)
    if schedule in ("interleaved1f1b", "interleavedzerobubble") and count % rounds:
        problem = f"must make a multiple of {rounds} microbatches {told}"
        raise settings.error("training.local_batch_size", problem, batch)
