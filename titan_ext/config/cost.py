"""What a site's configuration will cost: parameters, memory of a rank, bytes between sites.

By formula, from the model's shapes on the meta device and the layout; activations are not included.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.config.layout import Layout, pipeline_stages
from titan_ext.semi_sync.fragments import deal_by_bytes, deal_by_modules
from titan_ext.semi_sync.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.reduction import build_reduction

_FP32 = 4
# State tensors of the size of the parameter, by optimizer; others are taken to keep two as Adam does.
_STATES = {"Adam": 2, "AdamW": 2, "DistMuon": 1, "SGD": 0}
_OUTER_STATES = {"average": 0, "adam": 2, "adagrad": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCost:
    """Costs of one site; memory is that of its fullest rank, in bytes."""

    parameters: int
    """Parameters of the model, shared ones once."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    global_copy_bytes: int
    """fp32 copy of the last committed global parameters."""
    outer_optimizer_bytes: int
    send_buffer_bytes: int
    """fp32 buffer of the largest round."""
    memory_bytes: int
    """Sum of what lies with the parameters, without activations."""
    host_bytes: int
    """What ``semi_sync.global_device = "cpu"`` puts into host memory instead: global copy, outer optimizer, buffer."""
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


def parameter_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each parameter of the whole model by name, without memory; tied ones once."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def site_cost(site: Any) -> SiteCost:
    """Cost of a ``Site``."""
    config, layout = site.config, site.layout
    shapes = parameter_shapes(config)
    local = {name: _local_elements(shape, layout) for name, shape in shapes.items()}
    on_site = {name: _site_elements(shape, layout) for name, shape in shapes.items()}
    fullest = max(_pipeline_ranks(site, list(shapes)), key=lambda names: sum(local[name] for name in names))
    held = sum(local[name] for name in fullest)
    width = 2 if config.training.dtype == "bfloat16" else _FP32
    outer = _outer_costs(site, shapes, on_site, {name: local[name] for name in fullest})
    inner = {
        "parameter_bytes": held * width,
        "gradient_bytes": held * width,
        "optimizer_bytes": _optimizer_bytes(config, {name: local[name] for name in fullest}, width),
    }
    between = outer["global_copy_bytes"] + outer["outer_optimizer_bytes"] + outer["send_buffer_bytes"]
    on_host = config.semi_sync.global_device == "cpu"
    return SiteCost(
        parameters=sum(shape.numel() for shape in shapes.values()),
        **inner,
        memory_bytes=sum(inner.values()) + (0 if on_host else between),
        host_bytes=between if on_host else 0,
        every_step_bytes=ring_all_reduce_bytes(_FP32 * sum(on_site.values()), site.count),
        bytes_per_step=outer["run_bytes"] / config.training.steps,
        **outer,
    )


def _local_elements(shape: torch.Size, layout: Layout) -> int:
    """Elements on one rank: matrices are cut by tensor parallelism, then rows by FSDP, unevenly if they must."""
    tensor = layout.tensor if len(shape) > 1 else 1
    shards = layout.shard * layout.context
    if not shape:
        return 1
    rows = math.ceil(shape[0] / shards)
    return math.ceil(rows * math.prod(shape[1:]) / tensor)


def _site_elements(shape: torch.Size, layout: Layout) -> int:
    """Elements on all ranks of a site: every rank exchanges what it holds, copies included."""
    copies = layout.replicate * (1 if len(shape) > 1 else layout.tensor)
    return shape.numel() * copies


def _pipeline_ranks(site: Any, names: list[str]) -> list[list[str]]:
    """Names of the parameters on each rank of the pipeline."""
    stages = pipeline_stages(site.settings, site.config)
    ranks: list[list[str]] = [[] for _ in range(site.layout.pipeline)]
    from_both_ends = site.config.parallelism.pipeline_parallel_schedule in ("ZBVZeroBubble", "DualPipeV")
    for name in names:
        stage = next((place for place, modules in enumerate(stages) if _within(name, modules)), 0)
        turn, rank = divmod(stage, len(ranks))
        ranks[len(ranks) - 1 - rank if from_both_ends and turn % 2 else rank].append(name)
    return ranks


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _optimizer_bytes(config: Any, elements: Mapping[str, int], width: int) -> int:
    if config.optimizer.implementation == "fused_opt_states_bf16":
        width = 2
    total = 0
    for name, count in elements.items():
        group = next((each for each in config.optimizer.param_groups if re.search(each.pattern, name)), None)
        if group is not None:
            states = _STATES.get(group.optimizer_name, 2)
            if group.optimizer_name == "SGD" and group.optimizer_kwargs.get("momentum"):
                states = 1
            total += states * count * width
    return total


def _outer_costs(site: Any, shapes: Mapping, on_site: Mapping[str, int], held: Mapping[str, int]) -> dict[str, int]:
    names = ("global_copy_bytes", "outer_optimizer_bytes", "send_buffer_bytes", "round_bytes", "rounds", "run_bytes")
    if site.config.semi_sync.method == "none":
        return dict.fromkeys(names, 0)
    outer, rows = site.config.semi_sync.resolved(), site.config.semi_sync.plan().rows
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    home = deal_by_modules(sizes, outer.fragments) if outer.fragments else deal_by_bytes(sizes, outer.num_fragments)
    payload = [_FP32 * sum(on_site[name] for name in sizes if home[name] == row.fragment) for row in rows]
    buffer = [_FP32 * sum(count for name, count in held.items() if home[name] == row.fragment) for row in rows]
    steps = site.config.training.steps
    groups = _rows_by_launch(rows, steps)
    sent = {launched: ring_all_reduce_bytes(sum(payload[row] for row in launched), site.count) for launched in groups}
    if outer.codec != "fp32":
        # A message's size follows from what one rank holds; ranks of uneven shards count as the fullest.
        reduction = build_reduction(outer.build_codec(), int(outer.bucket_mib * 2**20))
        on_rank = [sum(count for name, count in held.items() if home[name] == row.fragment) for row in rows]
        sent = {
            launched: site.layout.ranks
            * sum(reduction.wire_bytes(on_rank[row], site.count) for row in launched)
            for launched in groups
        }
    copied = sum(size for row, size in zip(rows, buffer) if row.state == "params")
    stepped = sum(size for row, size in zip(rows, buffer) if row.outer_optimizer)
    states = _OUTER_STATES.get(outer.outer_optimizer, 1 if outer.outer_momentum else 0)
    largest = max((sum(buffer[row] for row in launched) for launched in groups), default=0)
    return {
        "global_copy_bytes": copied,
        "outer_optimizer_bytes": states * stepped,
        "send_buffer_bytes": largest,
        "round_bytes": max(sent.values(), default=0),
        "rounds": sum(groups.values()),
        "run_bytes": sum(sent[launched] * times for launched, times in groups.items()),
    }


def _rows_by_launch(rows: Any, steps: int) -> dict[tuple[int, ...], int]:
    """Rounds of a run: which rows travel together, and how often."""
    launched: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        for step in range((row.offset - 1) % row.period + 1, steps + 1, row.period):
            launched.setdefault(step, []).append(index)
    groups: dict[tuple[int, ...], int] = {}
    for together in launched.values():
        groups[tuple(together)] = groups.get(tuple(together), 0) + 1
    return groups

