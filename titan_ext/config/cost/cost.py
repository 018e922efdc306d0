"""What a site's configuration will cost: parameters, memory of a rank, bytes between sites.

By formula, from the model's shapes on the meta device and the layout; activations are not included.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.config.checks.run import BF16_STATES
from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.config.cost.outer_cost import OuterRounds, outer_costs
from titan_ext.config.layout import Layout, pipeline_stages
from titan_ext.config.model import buffer_shapes, parameter_shapes
from titan_ext.config.pipeline import is_v_shaped, within
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCost:
    """Costs of one site; memory is that of its fullest rank, in bytes."""

    parameters: int
    """Parameters of the model, shared ones once."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    global_copy_bytes: int
    """fp32 copy of the last committed global parameters, and what else the method keeps of their size."""
    outer_optimizer_bytes: int
    send_buffer_bytes: int
    """fp32 buffer of the largest round, and what its reduction takes beside it."""
    memory_bytes: int
    """Sum of what lies with the parameters, without activations."""
    host_bytes: int
    """What ``semi_sync.outer_state_device = "cpu"`` puts into host memory instead: global copy, outer optimizer, buffer."""
    round_bytes: int
    """What the site sends (and receives) in its largest round, all ranks together."""
    rounds: int
    """Rounds in the run."""
    run_bytes: int
    """What the site sends (and receives) in the run."""
    bytes_per_step: float
    """Average over the steps of the run."""
    every_step_bytes: int
    """What data parallelism over all sites would send for each step (fp32 gradients, ring all-reduce)."""


def site_cost(site: Any) -> SiteCost:
    """Cost of a ``Site``."""
    config, layout = site.config, site.layout
    shapes = parameter_shapes(config)
    local = {name: _local_shape(shape, layout).numel() for name, shape in shapes.items()}
    stages, fullest = _pipeline_ranks(site, local)
    held = {name: _local_shape(shapes[name], layout) for name in stages[fullest]}
    elements = sum(local[name] for name in held)
    width = 2 if config.training.dtype == "bfloat16" else _FP32
    outer = outer_costs(outer_rounds(site))
    inner = {
        "parameter_bytes": elements * width,
        "gradient_bytes": elements * width,
        "optimizer_bytes": _optimizer_bytes(config, shapes, held, width),
    }
    between = outer["global_copy_bytes"] + outer["outer_optimizer_bytes"] + outer["send_buffer_bytes"]
    on_host = config.semi_sync.outer_state_device == "cpu"
    on_site = sum(_site_elements(shape, layout) for shape in shapes.values())
    return SiteCost(
        parameters=sum(shape.numel() for shape in shapes.values()),
        **inner,
        memory_bytes=sum(inner.values()) + (0 if on_host else between),
        host_bytes=between if on_host else 0,
        every_step_bytes=ring_all_reduce_bytes(_FP32 * on_site, site.count),
        bytes_per_step=outer["run_bytes"] / config.training.steps,
        **outer,
    )


def outer_rounds(site: Any) -> OuterRounds | None:
    """The rounds of a ``Site``; None without an outer loop."""
    config, layout = site.config, site.layout
    if config.semi_sync.method == "none":
        return None
    shapes, buffers = parameter_shapes(config), buffer_shapes(config)
    local = {name: _local_shape(shape, layout) for name, shape in shapes.items()}
    stages, fullest = _pipeline_ranks(site, {name: shape.numel() for name, shape in local.items()})
    of_buffers, _ = _pipeline_ranks(site, {name: shape.numel() for name, shape in buffers.items()})
    return OuterRounds(
        site,
        shapes,
        {name: _site_elements(shape, layout) for name, shape in shapes.items()},
        [{name: local[name] for name in names} for names in stages],
        [{name: buffers[name] for name in names} for names in of_buffers],
        fullest,
    )


def _local_shape(shape: torch.Size, layout: Layout) -> torch.Size:
    """Shape on one rank: matrices are cut by tensor parallelism, then rows by FSDP, unevenly if they must."""
    if not shape:
        return shape
    shards = layout.shard * layout.context
    if len(shape) == 1:
        return torch.Size([math.ceil(shape[0] / shards)])
    rows = math.ceil(shape[0] / shards)
    rest = math.prod(shape[1:])
    return torch.Size([rows, math.ceil(rest / layout.tensor)])


def _site_elements(shape: torch.Size, layout: Layout) -> int:
    """Elements on all ranks of a site, copies included."""
    copies = layout.replicate * (1 if len(shape) > 1 else layout.tensor)
    return shape.numel() * copies


def _pipeline_ranks(site: Any, local: Mapping[str, int]) -> tuple[list[list[str]], int]:
    """Names of the tensors on each rank of the pipeline, and the place of the rank with the most ``local`` elements."""
    stages = pipeline_stages(site.settings, site.config)
    ranks: list[list[str]] = [[] for _ in range(site.layout.pipeline)]
    from_both_ends = is_v_shaped(site.config.parallelism.pipeline_parallel_schedule)
    for name in local:
        stage = next((place for place, modules in enumerate(stages) if within(name, modules)), 0)
        turn, rank = divmod(stage, len(ranks))
        ranks[len(ranks) - 1 - rank if from_both_ends and turn % 2 else rank].append(name)
    return ranks, max(range(len(ranks)), key=lambda place: sum(local[name] for name in ranks[place]))


def _optimizer_bytes(config: Any, shapes: Mapping[str, torch.Size], held: Mapping[str, torch.Size], width: int) -> int:
    states, total = InnerStates(config.optimizer), 0
    for name, shape in held.items():
        elements = sum(each.numel() for each in states.shapes(name, shapes[name], shape).values())
        total += elements * _state_width(config, *states.optimizer(name), width)
    return total


def _state_width(config: Any, kind: Any, settings: Mapping[str, Any], width: int) -> int:
    """Bytes of an element of an optimizer's state, where parameters have ``width``."""
    if settings.get("state_dtype"):
        return getattr(torch, settings["state_dtype"]).itemsize
    if getattr(kind, "rounds_at_random", False) and "state_dtype" not in settings:
        return max(width, 4)  # moments in fp32
    return 2 if config.optimizer.implementation == BF16_STATES else width
