"""Whether the weights of a folder are those of a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.tools.logging import logger

from titan_ext.errors import UserError
from titan_ext.huggingface.description import FILE_NAME, read_description
from titan_ext.huggingface.weights import StoredTensor, stored_tensors
from titan_ext.models.fit import check_tensors, model_tensors
from titan_ext.models.llama3.huggingface import from_huggingface, sizes_of, told_apart

if TYPE_CHECKING:
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

_FLOATING = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_weights(
    folder: Path, config: "BaseModel.Config", adapter: "type[BaseStateDictAdapter]", *, quantised: bool = False
) -> None:
    """Refuse a folder that holds another model, from its ``config.json`` and the headers of its weight files.

    Args:
        folder: the model's.
        config: of the model that is to be loaded.
        adapter: the model's names and shapes in Hugging Face's files.
        quantised: the weights are in another form that torchtitan reads, of other names, shapes and types.

    Raises:
        UserError: a file is damaged or missing, the description is of another model, a tensor is missing, beyond the
            model, of another size or quantised, or a head that is to be the embedding is not.
    """
    stored = stored_tensors(folder)
    if quantised:
        return
    wanted, is_llama = model_tensors(config, adapter), issubclass(adapter, Llama3StateDictAdapter)
    described = is_llama and _check_description(folder, config)
    cure = f"{FILE_NAME} and the weights do not belong together" if described else None
    if not is_llama:
        # torchtitan leaves parts of some models out, such as the layers that predict further tokens.
        beyond = [name for name in stored if name not in wanted]
        stored = {name: each for name, each in stored.items() if name in wanted}
        if beyond:
            logger.warning("%s: %d tensors are not read, such as %s", folder, len(beyond), beyond[0])
    shapes = {name: torch.Size(each.shape) for name, each in stored.items()}
    files = {name: each.file.name for name, each in stored.items()}
    check_tensors(wanted, shapes, f"checkpoint {folder}", files=files, cure=cure)
    _check_types(wanted, stored)
    if _EMBEDDING in wanted and _HEAD in stored and _HEAD not in wanted:
        _check_tied(stored[_EMBEDDING], stored[_HEAD])


def _check_description(folder: Path, config: "BaseModel.Config") -> bool:
    """Whether a Llama's folder says what it is."""
    description = read_description(folder)
    if description is None:
        return False
    file = str(folder / FILE_NAME)
    if differences := told_apart(from_huggingface(description, file), sizes_of(config)):
        raise UserError(f"{file} says {differences}; [model] must be the same")
    return True


def _check_types(wanted: Iterable[str], stored: Mapping[str, StoredTensor]) -> None:
    for name in wanted:
        if stored[name].dtype not in _FLOATING:
            raise UserError(
                f"{stored[name].file}: {name} is of type {stored[name].dtype}: quantised weights are not read; "
                f"types that are: {', '.join(_FLOATING)}"
            )


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    """A tied model reads the embedding alone; versions of transformers differ in which they take where both differ."""
    with safe_open(embedding.file, framework="pt") as one, safe_open(head.file, framework="pt") as other:
        if not torch.equal(one.get_tensor(_EMBEDDING), other.get_tensor(_HEAD)):
            raise UserError(
                f"{head.file}: {_HEAD} is not {_EMBEDDING}, though the two are to be one matrix: "
                "set tie_word_embeddings to false, or remove the head"
            )
