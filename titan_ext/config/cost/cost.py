"""What a site's configuration will cost: parameters, memory of a rank, bytes between sites.

By formula, from the model's shapes on the meta device and the layout; activations are not included.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.config.cost.outer_cost import OuterRounds, outer_costs
from titan_ext.config.cost.shapes import parameter_shapes
from titan_ext.config.layout import Layout, pipeline_stages
from titan_ext.config.optimizer import hyper_parameters
from titan_ext.config.pipeline import is_v_shaped
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

_FP32 = 4
# State tensors of the size of the parameter, by optimizer; others are taken to keep two as Adam does.
# Quasi-hyperbolic ones have a momentum for each of their omegas besides.
_STATES = {
    "Adam": 2,
    "AdamW": 2,
    "DistMuon": 1,
    "SGD": 0,
    "ADOPT": 2,
    "QHAdamW": 1,
    "QHADOPT": 1,
    "QHSGDM": 0,
    "Muon": 1,
    "DeMo": 1,
}


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
    width = 2 if config.training.dtype == "bfloat16" else _FP32
    held = sum(local[name] for name in stages[fullest])
    outer = outer_costs(outer_rounds(site))
    inner = {
        "parameter_bytes": held * width,
        "gradient_bytes": held * width,
        "optimizer_bytes": _optimizer_bytes(config, {name: local[name] for name in stages[fullest]}, width),
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
    if site.config.semi_sync.method == "none":
        return None
    shapes = parameter_shapes(site.config)
    on_site = {name: _site_elements(shape, site.layout) for name, shape in shapes.items()}
    local = {name: _local_shape(shape, site.layout) for name, shape in shapes.items()}
    stages, fullest = _pipeline_ranks(site, {name: shape.numel() for name, shape in local.items()})
    return OuterRounds(site, shapes, on_site, [{name: local[name] for name in names} for names in stages], fullest)


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
    """Elements on all ranks of a site: every rank exchanges what it holds, copies included."""
    copies = layout.replicate * (1 if len(shape) > 1 else layout.tensor)
    return shape.numel() * copies


def _pipeline_ranks(site: Any, local: Mapping[str, int]) -> tuple[list[list[str]], int]:
    """Names of the parameters on each rank of the pipeline, and the place of the rank with the most ``local`` elements."""
    stages = pipeline_stages(site.settings, site.config)
    ranks: list[list[str]] = [[] for _ in range(site.layout.pipeline)]
    from_both_ends = is_v_shaped(site.config.parallelism.pipeline_parallel_schedule)
    for name in local:
        stage = next((place for place, modules in enumerate(stages) if _within(name, modules)), 0)
        turn, rank = divmod(stage, len(ranks))
        ranks[len(ranks) - 1 - rank if from_both_ends and turn % 2 else rank].append(name)
    return ranks, max(range(len(ranks)), key=lambda place: sum(local[name] for name in ranks[place]))


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _optimizer_bytes(config: Any, elements: Mapping[str, int], width: int) -> int:
    groups, total = config.optimizer.param_groups, 0
    defaults = {each.optimizer_name: hyper_parameters(config.optimizer, each.optimizer_name) or {} for each in groups}
    shapes = parameter_shapes(config) if {"Muon", "LowRankAdamW"} & defaults.keys() else {}
    for name, count in elements.items():
        group = next((each for each in groups if re.search(each.pattern, name)), None)
        if group is not None:
            chosen = defaults[group.optimizer_name] | group.optimizer_kwargs
            states = _states(group.optimizer_name, chosen, name, shapes.get(name))
            total += states * count * _state_width(config, group.optimizer_name, chosen, width)
    return round(total)


def _states(optimizer: str, chosen: Mapping[str, Any], name: str, shape: torch.Size | None) -> float:
    """States of a parameter, in units of its size, under an optimizer with the ``chosen`` hyper-parameters."""
    if optimizer == "SGD" and chosen.get("momentum"):
        return 1
    if optimizer == "Muon" and (len(shape) != 2 or any(word in name for word in chosen["adamw_names"])):
        return _STATES["AdamW"]
    if optimizer == "LowRankAdamW" and shape is not None and _is_low_rank(name, shape, chosen):
        rank, short, long = chosen["rank"], min(shape), max(shape)
        return (rank * short + 2 * rank * long) / shape.numel() + bool(chosen["error_feedback"])
    return _STATES.get(optimizer, 2) + len(chosen.get("omegas", ()))


def _is_low_rank(name: str, shape: torch.Size, chosen: Mapping[str, Any]) -> bool:
    return len(shape) == 2 and min(shape) > chosen["rank"] and not any(word in name for word in chosen["adamw_names"])


def _state_width(config: Any, optimizer: str, chosen: Mapping[str, Any], width: int) -> int:
    if chosen.get("state_dtype"):
        return getattr(torch, chosen["state_dtype"]).itemsize
    kind = config.optimizer._owner._resolve_optimizer_factory(optimizer)
    if getattr(kind, "rounds_at_random", False) and "state_dtype" not in chosen:
        return max(width, 4)  # moments in fp32
    halved = config.optimizer.implementation == "fused_opt_states_bf16" and optimizer in ("Adam", "AdamW")
    return 2 if halved else width
