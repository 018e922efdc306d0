"""Values that a key allows although its type does not say so: names that are registered elsewhere."""

from collections.abc import Callable, Iterable


def choices(key: str) -> str:
    """The names that a dotted key accepts, in a line; empty where its type says it all."""
    listed = _LISTS.get(key)
    return ", ".join(listed()) if listed is not None else ""


def _methods() -> Iterable[str]:
    from titan_ext.semi_sync.plan.components import method_names

    return method_names()


def _outer_optimizers() -> Iterable[str]:
    from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS

    return ["average", *OUTER_OPTIMIZERS]


def _codecs() -> Iterable[str]:
    from titan_ext.semi_sync.wire.codecs import CODECS

    return CODECS


def _aggregations() -> Iterable[str]:
    from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS

    return AGGREGATIONS


def _weightings() -> Iterable[str]:
    from titan_ext.semi_sync.plan.weighting import WEIGHTINGS

    return WEIGHTINGS


def _losses() -> Iterable[str]:
    from titan_ext.losses import LOSSES
    from titan_ext.losses.registry import PLAIN

    return [PLAIN, *LOSSES]


def _models() -> Iterable[str]:
    from titan_ext.models import own_names
    from titan_ext.models.upstream import upstream_names

    theirs = (name for name in upstream_names() if name not in own_names())
    return [*own_names(), *theirs, "or a dotted path, such as torchtitan.models.llama3"]


def _flavors() -> Iterable[str]:
    from importlib import import_module

    from titan_ext.models import own_names

    return [f"{model}: {' '.join(import_module(f'titan_ext.models.{model}').flavors)}" for model in own_names()]


def _schedules() -> Iterable[str]:
    from torch.distributed.pipelining import schedules

    return [name.removeprefix("Schedule") for name in vars(schedules) if name.startswith("Schedule")]


_LISTS: dict[str, Callable[[], Iterable[str]]] = {
    "loss.name": _losses,
    "model.flavor": _flavors,
    "model.name": _models,
    "parallelism.pipeline_parallel_schedule": _schedules,
    "semi_sync.aggregation": _aggregations,
    "semi_sync.codec": _codecs,
    "semi_sync.method": _methods,
    "semi_sync.outer_optimizer": _outer_optimizers,
    "semi_sync.weighting": _weightings,
}
