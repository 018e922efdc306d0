"""A resolved configuration and its cost as text for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from titan_ext.config.cost.cost import SiteCost
from titan_ext.config.dept import describe_dept
from titan_ext.config.fomoe import describe_fomoe
from titan_ext.config.resolved import dump_resolved, origin_of
from titan_ext.config.settings import Origin
from titan_ext.config.toml_text import toml_value
from titan_ext.launcher.text import bytes_text

_WIDTH = 58


def render_site(site: Any, *, everything: bool = False) -> str:
    """The settings of a ``Site`` as TOML with the layer of each value.

    Args:
        everything: also those that are torchtitan's own defaults.
    """
    resolved = dump_resolved(site)
    lines = [
        f'site "{site.name}" ({site.index + 1} of {site.count}): {_ranks(site)}, weight {site.weight:g}',
        _line(site, "dump_folder", resolved.pop("dump_folder")),
        _line(site, "tokenizer", site.tokenizer),
        *([_line(site, "vocabulary", site.vocabulary)] if site.vocabulary else []),
    ]
    resolved.pop("site"), resolved.pop("resolved")
    hidden = 0
    for section, table in resolved.items():
        shown, left = _section(site, section, table, everything)
        hidden += left
        if shown:
            lines += [f"[{section}]", *shown]
    if hidden:
        lines.append(f"# {hidden} more settings are torchtitan's defaults; --all shows them")
    return "\n".join([*lines, *(f"note: {note}" for note in site.notes)])


def _ranks(site: Any) -> str:
    nodes = site.nodes
    return f"{site.nproc} rank(s)" + (f" on {nodes.count} nodes of {nodes.ranks_per_node}" if nodes.count > 1 else "")


def render_cost(sites: list, cost: SiteCost) -> str:
    """The ``SiteCost`` that these sites have in common, in a few lines."""
    site = sites[0]
    inner = [
        ("parameters", cost.parameter_bytes),
        ("gradients", cost.gradient_bytes),
        ("optimizer", cost.optimizer_bytes),
    ]
    between = [
        ("global copy", cost.global_copy_bytes),
        ("outer optimizer", cost.outer_optimizer_bytes),
        ("send buffer", cost.send_buffer_bytes),
    ]
    held = inner if cost.host_bytes else inner + between
    lines = [
        f"cost of {', '.join(each.name for each in sites)}",
        f"  parameters       {cost.parameters:,}",
        f"  memory of a rank {bytes_text(cost.memory_bytes)} without activations ({_parts(held)})",
    ]
    lines += describe_dept(site) + describe_fomoe(site)
    if cost.host_bytes:
        lines.append(f"  host memory      {bytes_text(cost.host_bytes)} a rank ({_parts(between)})")
    if site.config.semi_sync.method == "none":
        return "\n".join([*lines, "  between sites    nothing: semi_sync.method is none"])
    steps = site.config.training.steps
    saving = f" ({cost.every_step_bytes / cost.bytes_per_step:.3g} times as much)" if cost.bytes_per_step else ""
    return "\n".join(
        [
            *lines,
            f"  a round          {bytes_text(cost.round_bytes)} sent and received; {cost.rounds} round(s) in {steps} steps,"
            f" {bytes_text(cost.run_bytes)} in all",
            f"  per step         {bytes_text(cost.bytes_per_step)} on average;"
            f" data parallelism at every step: {bytes_text(cost.every_step_bytes)}{saving}",
        ]
    )


def _parts(sizes: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {bytes_text(size)}" for name, size in sizes if size)


def _section(site: Any, section: str, table: Any, everything: bool) -> tuple[list[str], int]:
    shown, hidden = [], 0
    for key, value in _leaves(section, table):
        if everything or origin_of(site, key) is not Origin.TORCHTITAN:
            shown.append(_line(site, key, value, section))
        else:
            hidden += 1
    return shown, hidden


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def _line(site: Any, key: str, value: Any, section: str = "") -> str:
    name = key.removeprefix(section + ".") if section else key
    return f"{name} = {toml_value(value)}".ljust(_WIDTH) + f"  # {origin_of(site, key)}"
