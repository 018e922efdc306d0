"""Pipeline parallelism for a model whose body is iterated: the whole body is on one stage."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import _get_pipeline_metadata, pipeline_llm

from titan_ext.errors import UserError
from titan_ext.models.abbie.iterations import Iterations


class StagedConfig(Protocol):
    """A model's config that knows where its pipeline may be cut; ``AbbieModel.Config`` describes the fields."""

    layers: Sequence[Any]
    body_layers: int
    iterations: Iterations

    @property
    def body(self) -> range: ...

    @property
    def body_modules(self) -> list[str]: ...

    def pipeline_stages(self, parallelism: Any, parallel_dims: Any) -> list[list[str]]:
        """Module names of each stage."""


def pipeline_abbie(
    model: nn.Module,
    *,
    parallel_dims: ParallelDims,
    parallelism: Any,
    model_config: StagedConfig,
    **kwargs: Any,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """torchtitan's pipeline for a decoder, cut around the body; takes and returns what ``pipeline_llm`` does.

    Raises:
        UserError: the body cannot be on one stage.
    """
    stages = model_config.pipeline_stages(parallelism, parallel_dims)
    return pipeline_llm(
        model,
        parallel_dims=parallel_dims,
        parallelism=replace(parallelism, module_fqns_per_model_part=stages),
        model_config=model_config,
        **kwargs,
    )


def cut(model_config: StagedConfig, parallelism: Any, parallel_dims: Any) -> list[list[str]]:
    """Module names of each stage: the user's, or a cut that makes the slowest stage as fast as can be.

    Args:
        model_config: the whole model's.
        parallelism: torchtitan's ``ParallelismConfig``.
        parallel_dims: read for its ``pp``, the ranks of the pipeline.

    Raises:
        UserError: the user's stages part the body, or there are more stages than parts that can be parted.
    """
    given = parallelism.module_fqns_per_model_part
    if given is not None:
        _check_whole_body(model_config, given)
        return given
    count, _, input_weight, output_weight = _get_pipeline_metadata(parallel_dims, parallelism, model_config)
    parts = _parts(model_config, input_weight, output_weight)
    if count > len(parts):
        raise UserError(
            f"parallelism.pipeline_parallel_degree = {parallelism.pipeline_parallel_degree}: needs {count} stages, but "
            f"this model can be cut into {len(parts)}: its body (model.body_layers = {model_config.body_layers}) is "
            "iterated and stays on one stage"
        )
    bounds = _balanced([cost for _, cost in parts], count)
    return [[name for names, _ in parts[first:end] for name in names] for first, end in pairwise(bounds)]


def _check_whole_body(model_config: StagedConfig, stages: Sequence[Sequence[str]]) -> None:
    homes = {name: place for place, names in enumerate(stages) for name in names}
    first = model_config.body_modules[0]
    for name in model_config.body_modules:
        if name not in homes:
            raise UserError(f"parallelism.module_fqns_per_model_part = {list(stages)}: {name} is on no stage")
        if homes[name] != homes[first]:
            raise UserError(
                f"parallelism.module_fqns_per_model_part = {list(stages)}: the body is iterated and must be on one "
                f"stage, but {first} is on stage {homes[first]} and {name} on stage {homes[name]}"
            )


def _parts(config: StagedConfig, input_weight: float, output_weight: float) -> list[tuple[list[str], float]]:
    """What cannot be parted, in order, with its cost in units of one block."""
    body, blocks = config.body, range(len(config.layers))
    return [
        (["tok_embeddings"], input_weight),
        *(([f"layers.{index}"], 1) for index in blocks[: body.start]),
        (config.body_modules, config.iterations.mean * len(body)),
        *(([f"layers.{index}"], 1) for index in blocks[body.stop :]),
        (["norm", "lm_head"], output_weight),
    ]


def _balanced(costs: Sequence[float], count: int) -> list[int]:
    """Bounds of ``count`` runs of ``costs``, none empty, of which the dearest is as cheap as can be."""

    @cache
    def best(first: int, runs: int) -> tuple[float, list[int]]:
        if runs == 1:
            return sum(costs[first:]), [first, len(costs)]
        rests = ((end, *best(end, runs - 1)) for end in range(first + 1, len(costs) - runs + 2))
        return min((max(sum(costs[first:end]), dearest), [first, *bounds]) for end, dearest, bounds in rests)

    return best(0, count)[1]
