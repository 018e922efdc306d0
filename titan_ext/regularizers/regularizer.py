"""The base of regularisers, and their registry."""

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from titan_ext.regularizers.received import Received
from titan_ext.semi_sync.registry import Registry

Kind = TypeVar("Kind", bound=type["Regularizer"])


class Regularizer:
    """Keeps the inner steps of a round near the model that the site has received.

    Args:
        settings: values of ``defaults``' keys.
    """

    defaults: ClassVar[Mapping[str, float]] = {}
    """The settings of a phase that mean something, and what holds where the user says nothing."""
    teaches = False
    """Whether the received model reads each batch before the one that is trained, for the loss to compare them."""
    runs_passes = False
    """Whether the model runs passes of its own beside those of the step."""

    def __init__(self, settings: Mapping[str, float]) -> None:
        self.settings = {**self.defaults, **settings}

    def begin_round(self, received: Received) -> None:
        """Called before the first inner step of a round; a collective over the site."""

    def add_gradients(self, received: Received) -> None:
        """Called at each step when the whole gradient is there, before any clipping: adds the penalty's."""

    def end_round(self) -> None:
        """Called when it is not the round's: drops what ``begin_round`` keeps."""


REGULARIZERS: Registry[type[Regularizer]] = Registry("regularizer.phases.name")


def register_regularizer(name: str) -> Callable[[Kind], Kind]:
    """Decorate a ``Regularizer``: a phase's ``name`` selects it.

    Raises:
        ValueError: the name is taken.
    """

    def add(kind: Kind) -> Kind:
        REGULARIZERS.add(name, kind)
        return kind

    return add
