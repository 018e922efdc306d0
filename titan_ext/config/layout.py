"""A site's parallel layout: ranks, degrees, and whether they divide what they must."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titan_ext.config.findings import SettingError
from titan_ext.config.settings import Settings, hint
from titan_ext.errors import UserError
from titan_ext.models.capabilities import capabilities

_DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "context": "context_parallel_degree",
    "tensor": "tensor_parallel_degree",
    "pipeline": "pipeline_parallel_degree",
}
_LAYERS_OF_STAGES = {
    "pipeline_parallel_layers_per_stage": 1,
    "pipeline_parallel_first_stage_less_layers": 0,
    "pipeline_parallel_last_stage_less_layers": 0,
}
"""Keys that say how a model is cut, and their least values."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of a site, the leftover one resolved."""

    replicate: int
    shard: int
    context: int
    tensor: int
    pipeline: int

    @classmethod
    def alone(cls) -> "Layout":
        """A single rank."""
        return cls(1, 1, 1, 1, 1)

    @property
    def ranks(self) -> int:
        """Ranks of the site."""
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def batch(self) -> int:
        """Ranks that read different data."""
        return self.replicate * self.shard


def resolve_layout(settings: Settings, config: Any, nproc: int | None, devices: int) -> Layout:
    """The layout of a site.

    ``data_parallel_shard_degree = -1`` takes the ranks that are left: of ``nproc`` where that is
    given, else of ``devices``.

    Args:
        settings: for the wording of errors.
        config: the site's ``Trainer.Config``.
        nproc: ranks that the user gave the site.
        devices: accelerators that this site may have on this machine; 0 without any.

    Raises:
        UserError: a degree is out of range, or the degrees do not divide ``nproc``.
    """
    degrees = {axis: getattr(config.parallelism, key) for axis, key in _DEGREES.items()}
    for axis, key in _DEGREES.items():
        if degrees[axis] < 1 and not (axis == "shard" and degrees[axis] == -1):
            allowed = "-1 (what is left) or at least 1" if axis == "shard" else "at least 1"
            raise settings.error(f"parallelism.{key}", f"must be {allowed}", degrees[axis])
    if nproc is not None and nproc < 1:
        raise settings.error("nproc", "must be at least 1", nproc)
    rest = math.prod(degree for axis, degree in degrees.items() if axis != "shard")
    if degrees["shard"] == -1:
        if nproc is not None and nproc % rest:
            raise _ranks_error(settings, nproc, f"must be a multiple of the other parallel degrees' product ({rest})")
        degrees["shard"] = (nproc or max(devices, rest)) // rest
    layout = Layout(**degrees)
    if nproc is not None and layout.ranks != nproc:
        product = " x ".join(f"{_DEGREES[axis]} {degree}" for axis, degree in degrees.items() if degree > 1) or "1"
        raise _ranks_error(settings, nproc, f"must be {layout.ranks}, the product of the parallel degrees ({product})")
    return layout


def _ranks_error(settings: Settings, nproc: int, problem: str) -> SettingError:
    """A complaint about the number of ranks, under the key that the user has given for it."""
    each = settings.get("nproc_per_node")
    if each is None or settings.get("nproc") is not None:
        return settings.error("nproc", problem, nproc)
    return settings.error("nproc_per_node", f"makes {nproc} ranks, which {problem}", int(each))


def degrees_in(table: Mapping[str, Any], nproc: int | None) -> dict[str, Any]:
    """The degrees of a ``[parallelism]`` table, with the leftover one resolved where ``nproc`` tells it."""
    degrees = {key: table[key] for key in _DEGREES.values()}
    shard = _DEGREES["shard"]
    if degrees[shard] == -1 and nproc is not None:
        rest = math.prod(degree for key, degree in degrees.items() if key != shard)
        degrees[shard] = nproc // rest if rest > 0 else -1
    return degrees


def check_layout(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        UserError: naming the key to change.
    """
    _check_tensor_parallel(settings, config, layout)
    pipeline_stages(settings, config)


def check_batch(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse a layout that does not divide the batch or the sequence.

    Raises:
        UserError: naming the key to change.
    """
    training, parallelism = config.training, config.parallelism
    step = training.local_batch_size * layout.batch
    if training.global_batch_size > 0 and training.global_batch_size % step:
        factors = f"{training.local_batch_size} x {layout.batch} = {step}"
        problem = f"must be a multiple of local_batch_size x data-parallel ranks ({factors})"
        raise settings.error("training.global_batch_size", problem, training.global_batch_size)
    divisor = (layout.tensor if parallelism.enable_sequence_parallel else 1) * (
        2 * layout.context if layout.context > 1 else 1
    )
    if training.seq_len % divisor:
        problem = f"must be a multiple of {divisor} for the sequence and context parallelism of this layout"
        raise settings.error("training.seq_len", problem, training.seq_len)


def check_world_size(config: Any, world_size: int) -> None:
    """Compare what torchrun started with the layout.

    Raises:
        UserError: the degrees do not multiply to ``world_size``.
    """
    settings = Settings(file=f'site "{config.site.name}"')
    layout = resolve_layout(settings, config, None, world_size)
    if layout.ranks != world_size:
        raise UserError(
            f'site "{config.site.name}": torchrun started {world_size} rank(s), but the parallel degrees'
            f" of [parallelism] need {layout.ranks}"
        )


def pipeline_stages(settings: Settings, config: Any) -> list[list[str]]:
    """Module names of each pipeline stage, as torchtitan will cut the model; one stage without a pipeline.

    Raises:
        UserError: unknown schedule, or more stages than layers.
    """
    from torch.distributed.pipelining import schedules
    from torchtitan.distributed import pipeline_parallel

    parallelism, model = config.parallelism, config.model_spec.model
    layers = len(getattr(model, "layers", []))
    if parallelism.pipeline_parallel_degree == 1:
        return [["tok_embeddings", *(f"layers.{index}" for index in range(layers)), "norm", "lm_head"]]
    for key, least in _LAYERS_OF_STAGES.items():
        value = getattr(parallelism, key)
        if value is not None and value < least:
            raise settings.error(f"parallelism.{key}", f"must be at least {least}", value)
    schedule = parallelism.pipeline_parallel_schedule
    try:
        schedules.get_schedule_class(schedule)
    except ValueError:
        names = [name for name in vars(schedules) if name.startswith("Schedule")]
        problem = f"unknown schedule; {hint(schedule, [name.removeprefix('Schedule') for name in names])}"
        raise settings.error("parallelism.pipeline_parallel_schedule", problem, schedule) from None
    answers = capabilities(model)
    if answers.cut is not None and not answers.ties:
        return answers.cut(parallelism, _PipelineOnly(parallelism.pipeline_parallel_degree))
    if parallelism.module_fqns_per_model_part is not None:
        return parallelism.module_fqns_per_model_part
    if answers.ties:
        problem = "the model ties its embedding to its output, which cannot be cut into a pipeline"
        raise settings.error("parallelism.pipeline_parallel_degree", problem, parallelism.pipeline_parallel_degree)
    dims = _PipelineOnly(parallelism.pipeline_parallel_degree)
    try:
        metadata = pipeline_parallel._get_pipeline_metadata(dims, parallelism, model)
        stages = pipeline_parallel._generate_llm_fqn_per_model_part(*metadata)
    except ValueError as error:
        problem = f"does not fit a model of {layers} layers: {error}"
        raise settings.error(
            "parallelism.pipeline_parallel_degree", problem, parallelism.pipeline_parallel_degree
        ) from None
    return stages


@dataclass(frozen=True, slots=True)
class _PipelineOnly:
    """The one property of torchtitan's ``ParallelDims`` that cutting a model reads."""

    pp: int


def _check_tensor_parallel(settings: Settings, config: Any, layout: Layout) -> None:
    attention = getattr(config.model_spec.model, "first_attention", None)
    if layout.tensor == 1 or attention is None:
        return
    heads = attention.n_heads
    for name, count in (("heads", heads), ("key-value heads", getattr(attention, "n_kv_heads", None) or heads)):
        if count % layout.tensor:
            problem = f"must divide the model's {count} attention {name}"
            raise settings.error("parallelism.tensor_parallel_degree", problem, layout.tensor)
    rows = getattr(config.model_spec.model, "vocab_size", 0)
    if rows % layout.tensor:
        above = -(-rows // layout.tensor) * layout.tensor
        problem = f"must be a multiple of parallelism.tensor_parallel_degree ({layout.tensor}), such as {above}"
        raise settings.error("model.vocab_size", problem, rows)
