"""What of a checkpoint a run takes up, and what starts fresh because the checkpoint does not hold it.

A run goes on with another outer loop, another inner optimizer, or from the weights alone wherever that can mean
something. A model is taken whole or not at all.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from titan_ext.checkpoint_place import reader

Shapes = Mapping[str, tuple[int, ...] | None]
"""By key; None for what is no tensor."""

_RULE = re.compile(r"^semi_sync\.states\.[^.]+\.(.+)$")
# Without these a state is not the one that was saved; the rest of it may start fresh by itself. Of the outer loop they
# are its copies of the parameters, whatever its method calls them.
_NEEDED = {
    "optimizer": re.compile(r"^optimizer\.state\."),
    "dataloader": re.compile(r"^dataloader\.(ranks|mix)$"),
    "train_state": re.compile(r"^train_state\.step$"),
    "semi_sync": re.compile(r"^semi_sync\.counters$|^semi_sync\.states\..*\.(global|slow)$"),
}
STATES = {
    "optimizer": "the inner optimizer",
    "lr_scheduler": "the learning rate's schedule",
    "dataloader": "the place in the data",
    "train_state": "the count of steps and tokens",
    "semi_sync": "the outer loop",
    "loss": "the loss's state",
    "regularizer": "the model that training started from",
    "spikes": "the losses and norms that spikes are known by",
}
"""What a run keeps in checkpoints beside its model, by name, in words."""


def fresh_words(name: str, known: bool = False) -> str:
    """What is to be said of a state that starts fresh.

    Args:
        name: of the state in checkpoints.
        known: the checkpoint holds another one of that name.
    """
    return f"{STATES.get(name, name)} ({'of another kind' if known else 'none'} in the checkpoint)"


def stored_shapes(checkpoint: str) -> Shapes:
    """Read what a checkpoint in torch's distributed format holds."""
    entries = reader(checkpoint).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) if hasattr(entry, "size") else None for key, entry in entries.items()}


class Stored:
    """The contents of a checkpoint, compared with what a run wants of it.

    Args:
        shapes: what it holds.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        rules = ((_RULE.match(key), key) for key in shapes)
        self._by_parameter = {match[1]: key for match, key in rules if match}

    def lacks(self, name: str, wanted: Shapes) -> str | None:
        """What is to be said of a state that the checkpoint does not hold; None where it does.

        Args:
            name: of the state in checkpoints.
            wanted: what it consists of, as ``flattened`` gives it.
        """
        needed = _NEEDED.get(name, re.compile(""))
        if all(self._shapes.get(self._place(key), "nothing") == wanted[key] for key in wanted if needed.search(key)):
            return None
        return fresh_words(name, known=any(key.startswith(f"{name}.") for key in self._shapes))

    def lacks_parts(self, wanted: Shapes) -> set[str]:
        """Names of what the outer loop keeps of a parameter and the checkpoint does not hold."""
        states = (key for key in wanted if _RULE.match(key) and self._place(key) not in self._shapes)
        return {f"{STATES['semi_sync']}'s {key.rpartition('.')[2]} (none in the checkpoint)" for key in states}

    def moved(self, wanted: Shapes) -> dict[str, str]:
        """Keys of a state for what the checkpoint holds under another key, and that key.

        The outer loop names its rules by method and fragment; what it knows of a parameter outlives a change of those.
        """
        return {key: place for key in wanted if (place := self._place(key)) != key}

    def _place(self, key: str) -> str:
        match = None if key in self._shapes else _RULE.match(key)
        return key if match is None else self._by_parameter.get(match[1], key)


class PartialLoadPlanner(DefaultLoadPlanner):
    """Loads what a checkpoint holds and leaves the rest as it is.

    Args:
        moved: keys of what is to be loaded that the checkpoint has under another key.
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        super().__init__(allow_partial_load=True)
        self._moved = moved

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """As torch's. The reader takes the same metadata, after this."""
        new_keys: dict[str, list[str]] = {}
        for new, old in self._moved.items():
            metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
            new_keys.setdefault(old, []).append(new)
        for index, storage in list(metadata.storage_data.items()) if new_keys else ():
            for new in new_keys.get(index.fqn, ()):
                metadata.storage_data[replace(index, fqn=new)] = storage
        super().set_up_planner(state_dict, metadata, is_coordinator)


def flattened(prefix: str, value: Any) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Keys and shapes of a state as a checkpoint has them."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flattened(f"{prefix}.{key}", each)
    else:
        yield prefix, tuple(value.shape) if isinstance(value, torch.Tensor) else None
