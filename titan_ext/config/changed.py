"""Settings by which a run trains, kept in its checkpoints, and in what those of now differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from titan_ext import __version__
from titan_ext.config.resolved import dump_resolved
from titan_ext.config.settings import show

_SECTIONS = (
    "model",
    "optimizer",
    "lr_scheduler",
    "training",
    "parallelism",
    "semi_sync",
    "loss",
    "optimizer_switch",
    "spikes",
    "batch_warmup",
    "regularizer",
    "dept",
    "fomoe",
)
_OTHERS = ("debug.seed", "debug.moe_force_load_balance", "site[0].weight", "site[0].region", "site[0].count")
# By its place in a layout, what a degree of parallelism is called; in a file it may be left to the number of ranks.
_DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "context": "context_parallel_degree",
    "tensor": "tensor_parallel_degree",
    "pipeline": "pipeline_parallel_degree",
}
_VERSION = "version"
_STEPS, _SCHEDULE = "training.steps", "lr_scheduler.total_steps"
# The optimizer's own checkpoint tells of these.
_HYPER_PARAMETERS = ".optimizer_kwargs."


def training_settings(site: Any) -> dict[str, Any]:
    """What a ``Site`` trains by, flat and ready for JSON; where and how it saves and reports is left out.

    What corpus and tokenizer it reads, the data's own state tells.
    """
    resolved = dump_resolved(site)
    chosen = {name: resolved[name] for name in _SECTIONS}
    flat = dict(_leaves("", chosen))
    everything = dict(_leaves("", {"debug": resolved["debug"], "site": resolved["site"]}))
    flat |= {key.replace("[0]", ""): everything[key] for key in _OTHERS if key in everything}
    layout = resolved["resolved"]["layout"]
    flat |= {f"parallelism.{name}": layout[axis] for axis, name in _DEGREES.items()}
    if flat["training.global_batch_size"] == -1:
        flat["training.global_batch_size"] = flat["training.local_batch_size"] * site.layout.batch
    return {_VERSION: __version__} | flat


def settings_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what of ``training_settings`` is not as it was; a setting that one version does not have is left out.

    Args:
        then: those in the checkpoint.
        now: those of the run.
    """
    if not then or not now:
        return []
    same_version = then.get(_VERSION) == now.get(_VERSION)
    known = dict.fromkeys([*now, *then]) if same_version else [key for key in now if key in then]
    keys = [key for key in known if _shown(then, key) != _shown(now, key)]
    keys = [key for key in keys if key != _VERSION and _HYPER_PARAMETERS not in key]
    if now.get(_SCHEDULE) is not None and then.get(_SCHEDULE) is not None:
        keys = [key for key in keys if key != _STEPS]
    return [f"{key} was {_shown(then, key)}, is {_shown(now, key)}{_consequence(key)}" for key in keys]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return show(settings[key]) if key in settings else "not set"


def _consequence(key: str) -> str:
    return " (the end of the learning rate's schedule)" if key == _STEPS else ""


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, each)
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for place, each in enumerate(value):
            yield from _leaves(f"{prefix}[{place}]", each)
    else:
        yield prefix, value
