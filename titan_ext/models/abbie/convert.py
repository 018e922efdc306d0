"""An AbbIE model as the standard decoder that computes the same, where there is one.

One iteration is the standard decoder of as many blocks, unless the last iteration adds a skip too: its parameters have
the same names and shapes, so that either state loads into the other. Without any skip (variant C) r iterations are the
deeper decoder whose blocks are head, r times the body, and tail. Under variant D more than one iteration is no standard
decoder.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import UserError
from titan_ext.models.abbie.depth import RecurrentDepthModel
from titan_ext.models.abbie.model import AbbieModel
from titan_ext.models.llama3.model import Llama3Model

_LAYER = re.compile(r"(?<=^layers\.)\d+")


def decoder_config(config: AbbieModel.Config, iterations: int = 1) -> Llama3Model.Config:
    """The standard decoder that an AbbIE model with so many iterations is.

    Raises:
        UserError: it is none.
    """
    settings = {each.name: getattr(config, each.name) for each in fields(Llama3Model.Config)}
    settings["layers"] = [config.layers[layer] for layer in _unrolled(config, iterations)]
    return Llama3Model.Config(**settings)


def to_decoder(
    state: Mapping[str, torch.Tensor], config: AbbieModel.Config, iterations: int = 1
) -> dict[str, torch.Tensor]:
    """The state of ``decoder_config(config, iterations)``; copies of a block share their tensors.

    Args:
        state: of the AbbIE model, by the names of its ``state_dict``.
        config: the AbbIE model's.
        iterations: of the body.

    Raises:
        UserError: the model is no standard decoder.
    """
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(_unrolled(config, iterations)):
        places.setdefault(layer, []).append(place)
    decoder = {}
    for name, value in state.items():
        match = _LAYER.search(name)
        for place in places[int(match.group())] if match else [None]:
            decoder[name if place is None else _LAYER.sub(str(place), name)] = value
    return decoder


def unroll(model: AbbieModel, spec: ModelSpec, iterations: int) -> tuple[Llama3Model, ModelSpec]:
    """The decoder of ``decoder_config(spec.model, iterations)`` with the model's parameters, and its spec.

    Only its parameters are there: it cannot be run.

    Raises:
        UserError: the model is no standard decoder.
    """
    config = decoder_config(spec.model, iterations)
    state = to_decoder(ModelWrapper(model).state_dict(), spec.model, iterations)
    with torch.device("meta"):
        decoder = config.build()
    decoder.load_state_dict(state, assign=True)
    return decoder, replace(spec, model=config)


def _unrolled(config: AbbieModel.Config, iterations: int) -> list[int]:
    """The model's own block at each place of the decoder."""
    recurrence = config.recurrence
    if isinstance(config, RecurrentDepthModel.Config):
        raise UserError("model.variant = 'depth': no standard decoder computes the same, with any number of iterations")
    if recurrence.final_skip:
        raise UserError("model.final_skip = true: no standard decoder computes the same, even with one iteration")
    if iterations > 1 and (recurrence.skip != "none" or recurrence.between != "none"):
        raise UserError(
            f"model.skip = {recurrence.skip!r}, model.between = {recurrence.between!r}: with {iterations} iterations "
            "no standard decoder computes the same; one iteration, or 'none' for both, does"
        )
    blocks, body = range(len(config.layers)), config.body
    return [*blocks[: body.start], *iterations * list(body), *blocks[body.stop :]]
