"""Keys that a user has set and that come to nothing, because of another key: each is said."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from titan_ext.config.checks.words import reads_assets
from titan_ext.config.settings import Settings, show


@dataclass(frozen=True, slots=True)
class Gate:
    """A key without which others are not read."""

    key: str
    reads: Callable[[Any], bool]
    """Whether at a value of the key the others are read."""
    others: tuple[str, ...]
    """Their full names, or prefixes that end in ``*``."""


def _above(least: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > least


def _is_true(value: Any) -> bool:
    return bool(value)


def _is_named(value: Any) -> bool:
    return value != "none"


GATES = (
    Gate("semi_sync.method", _is_named, ("semi_sync.*", "replica.*")),
    Gate(
        "parallelism.pipeline_parallel_degree",
        _above(1),
        ("parallelism.pipeline_parallel_*", "parallelism.module_fqns_per_model_part"),
    ),
    Gate("parallelism.context_parallel_degree", _above(1), ("parallelism.context_parallel_*",)),
    Gate("profiler.enable_profiling", _is_true, ("profiler.profile*", "profiler.save_traces_folder")),
    Gate(
        "profiler.enable_memory_snapshot",
        _is_true,
        ("profiler.memory_snapshot_*", "profiler.save_memory_snapshot_folder"),
    ),
    Gate("comm.trace_buf_size", _above(0), ("comm.save_traces_*",)),
    Gate("debug.deterministic", _is_true, ("debug.deterministic_warn_only",)),
    Gate("metrics.enable_tensorboard", _is_true, ("metrics.save_tb_folder",)),
    Gate("checkpoint.enable", _is_true, ("checkpoint.*",)),
    Gate("validator.enable", _is_true, ("validator.*",)),
    Gate("compile.enable", _is_true, ("compile.*",)),
    Gate("optimizer_switch.step", _above(0), ("optimizer_switch.*",)),
    Gate("spikes.action", _is_named, ("spikes.*",)),
    Gate("dept.variant", _is_named, ("dept.*",)),
    Gate("semi_sync.outlier_threshold", _above(0), ("semi_sync.outlier_action",)),
    Gate("semi_sync.region_sync_every", lambda every: every is not None, ("replica.region_lighthouse",)),
    Gate("semi_sync.round_box", lambda box: box != "steps", ("semi_sync.round_box_grace",)),
)
"""Where a key is wrong without another, it is refused elsewhere; these are harmless, and may be kept for another run."""


def notes_on_unread(settings: Settings, config: Any) -> list[str]:
    """A note for each key by which others that the user has set come to nothing.

    Args:
        settings: the site's.
        config: its ``Trainer.Config``.
    """
    notes = []
    for gate in GATES:
        value = _value(config, gate.key)
        unread = [] if gate.reads(value) else [key for key in _set_keys(settings, gate) if key != gate.key]
        if unread:
            notes.append(f"without effect, because {gate.key} is {show(value)}: {', '.join(unread)}")
    if settings.get("hf_assets_path") is not None and not reads_assets(config):
        notes.append("without effect, because checkpoint.initial_load_in_hf is false: hf_assets_path")
    return notes


def _set_keys(settings: Settings, gate: Gate) -> Iterator[str]:
    for other in gate.others:
        section, _, name = other.partition(".")
        given = settings.tree.get(section)
        for key in given if isinstance(given, dict) else ():
            if key == name or (name.endswith("*") and key.startswith(name[:-1])):
                yield f"{section}.{key}"


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
