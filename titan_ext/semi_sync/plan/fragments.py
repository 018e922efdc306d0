"""How a model is cut into fragments that sync in turn."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

_LAYER = re.compile(r"^(.*?\.\d+)\.")


def layer_of(name: str) -> str:
    """The unit that is never cut: ``layers.3`` for ``layers.3.attention.wo.weight``, else the first name."""
    match = _LAYER.match(name)
    return match.group(1) if match else name.split(".", 1)[0]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits a parameter's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def assign_by_bytes(sizes: Mapping[str, int], num_fragments: int, own: Sequence[str] = ()) -> dict[str, int]:
    """Assign whole layers to fragments so that their sizes are as even as possible.

    The largest layer goes to the lightest fragment first. Equal layers are therefore assigned in
    turn (the strided pattern of Streaming DiLoCo, arXiv 2501.18512, section 2.2).

    Args:
        sizes: elements by parameter name, of the whole model (every pipeline stage), in model order.
        num_fragments: how many fragments, at least 1.
        own: patterns of parameters that make up the last fragment by themselves, where there are several fragments and
            the patterns leave something for the others.

    Returns:
        fragment index by parameter name.

    Raises:
        ValueError: more fragments than layers.
    """
    named = {name for name in sizes if matches(name, own)}
    alone = named if num_fragments > 1 and len(named) < len(sizes) else set()
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        if name not in alone:
            layers[layer_of(name)] = layers.get(layer_of(name), 0) + size
    others = num_fragments - bool(alone)
    if not 1 <= others <= len(layers):
        beside = f", and one for {', '.join(own)}" if alone else ""
        raise ValueError(
            f"num_fragments = {num_fragments}: must be between 1 and the number of layers ({len(layers)}: "
            f"{', '.join(list(layers)[:4])} …{beside})"
        )
    loads = [0] * others
    home: dict[str, int] = {}
    for layer in sorted(layers, key=lambda each: -layers[each]):
        lightest = loads.index(min(loads))
        home[layer] = lightest
        loads[lightest] += layers[layer]
    return {name: others if name in alone else home[layer_of(name)] for name in sizes}


def assign_by_modules(sizes: Mapping[str, int], fragments: Sequence[Sequence[str]]) -> dict[str, int]:
    """Assign every parameter to the fragment that lists its module.

    Args:
        sizes: elements by parameter name, of the whole model.
        fragments: for each fragment the module names it holds, such as ``["tok_embeddings", "layers.0"]``.

    Raises:
        ValueError: a parameter in no fragment or in two, or a module name that matches nothing.
    """
    home: dict[str, int] = {}
    for index, modules in enumerate(fragments):
        for module in modules:
            matched = [name for name in sizes if name == module or name.startswith(module + ".")]
            if not matched:
                raise ValueError(f"fragments[{index}]: {module!r} matches no parameter of the model")
            for name in matched:
                if home.setdefault(name, index) != index:
                    raise ValueError(f"fragments: {name} is in fragment {home[name]} and in {index}")
    left = [name for name in sizes if name not in home]
    if left:
        raise ValueError(f"fragments: {left[0]} (and {len(left) - 1} more parameters) are in no fragment")
    return home
