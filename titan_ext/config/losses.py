"""Losses by the names of ``loss.name``, and their ``[loss.NAME]`` tables."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from titan_ext.config.binder import Binder
from titan_ext.config.layout import Layout
from titan_ext.config.settings import Settings
from titan_ext.config.unknown import unknown_key
from titan_ext.errors import InvalidValue, one_of


def registered_loss(settings: Settings, binder: Binder) -> tuple[str, Any]:
    """Name and class of the loss that ``loss.name`` selects; the class is None for torchtitan's.

    Raises:
        UserError: there is none of that name.
    """
    losses, plain = _losses()
    name = binder.value(str, settings.table("loss").get("name", plain), "loss.name")
    if name == plain:
        return plain, None
    try:
        return losses.resolve(name), losses.get(name)
    except InvalidValue as error:
        problem = error.problem if "." in name else one_of(name, [plain, *losses.names()])
        raise settings.error("loss.name", problem, name) from None


def name_of(config: Any) -> str | None:
    """The name of a loss that sees tokens; None for any other."""
    from titan_ext.losses import TokenLoss

    losses, plain = _losses()
    if config._owner is TokenLoss:
        return plain
    return next((name for name in losses if losses.get(name) is config._owner), None)


def name_in_file(config: Any, name: str) -> str:
    """What a file writes for a registered loss: with its module in front where that is not ours."""
    module = config._owner.__module__
    return name if module.startswith("titan_ext.") else f"{module}.{name}"


def loss_tables() -> dict[str, Any]:
    """The losses that have settings of their own, by name: the default config of each."""
    losses, _ = _losses()
    found = {name: losses.get(name).Config for name in losses}
    return {name: config() for name, config in found.items() if own_fields(config)}


def own_fields(config: type) -> list[str]:
    """Keys of a loss's table: the fields that its config adds to those of every ``TokenLoss``."""
    from titan_ext.losses.token_loss import TokenLoss

    common = {each.name for each in fields(TokenLoss.Config)}
    return [each.name for each in fields(config) if each.name not in common]


def outside_tables(settings: Settings, name: str) -> dict[str, Any]:
    """The keys of ``[loss]`` itself; tables of other losses than ``name`` are refused."""
    table = settings.table("loss")
    for key, value in table.items():
        if isinstance(value, Mapping) and key != name:
            settings.refuse(settings.error(f"loss.{key}", f'is read only with loss.name = "{key}"; it is "{name}"'))
    return {key: value for key, value in table.items() if not isinstance(value, Mapping)}


def own_table(settings: Settings, config: type, key: str) -> dict[str, Any]:
    """What is set of a loss's own; other keys are refused."""
    table, allowed = dict(settings.table(key)), own_fields(config)
    for name in [name for name in table if name not in allowed]:
        settings.refuse(unknown_key(settings, key, name, allowed, {}, table.pop(name)))
    return table


def check_loss(settings: Settings, config: Any, layout: Layout) -> None:
    """Refuse what a loss that sees hidden states cannot do.

    Raises:
        UserError: naming the key to change.
    """
    name = name_of(config.loss)
    if name is None:
        return
    because = f'has no loss.name = "{name}"'
    if layout.context > 1:
        raise settings.error("parallelism.context_parallel_degree", f"{because}: must be 1", layout.context)
    backend = config.parallelism.spmd_backend
    if backend == "full_dtensor":
        raise settings.error("parallelism.spmd_backend", because, backend)
    if config.debug.spmd_typechecking:
        raise settings.error("debug.spmd_typechecking", because, True)
    for field, corpus in config.loss.corpora().items():
        if not corpus.dataset:
            raise settings.error(f"loss.{name}.{field}", "is missing: name a corpus, as in data.dataset")


def notes_on_loss(config: Any) -> list[str]:
    """What the user should know of a loss that sees hidden states, under the outer loop of a ``Trainer.Config``."""
    notes = getattr(config.loss, "notes", None)
    outer = config.semi_sync
    return notes(None if outer.method == "none" else outer.sync_every) if notes is not None else []


def _losses() -> tuple[Any, str]:
    # It imports torchtitan, which the command line must not wait for.
    from titan_ext.losses import LOSSES
    from titan_ext.losses.registry import PLAIN

    return LOSSES, PLAIN
