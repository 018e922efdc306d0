"""Weight files: the safetensors of a folder, looked at before any of them is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from titan_ext.error_text import reason
from titan_ext.errors import UserError

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
# What stands in a folder in place of safetensors, and what to do about it.
_INSTEAD = {
    ".metadata": "which is of a checkpoint of torch's, not of Hugging Face's: leave checkpoint.initial_load_in_hf out",
    "*.bin": "not safetensors: load it with transformers and save it with save_pretrained",
    "*.pth": "not safetensors: convert it with transformers' convert_llama_weights_to_hf.py",
    "*.gguf": "not safetensors: take the model it was made from",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: "F32", "BF16" …"""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name, from the files' headers.

    Raises:
        UserError: no safetensors, a damaged or missing file, a name in two files, or an index that says otherwise.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = _read_index(folder)
    for name in sorted(set(index.values()) - {file.name for file in files}):
        raise UserError(f"{folder / INDEX}: names {name}, which is not in the folder")
    if not files:
        raise UserError(f"{folder}: {what_instead(folder) or 'holds no *.safetensors'}")
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in found:
                first = found[name].file.name
                raise UserError(f"{folder}: {name} is in {first} and in {file.name}: remove one of them")
            found[name] = tensor
    if index:
        _check_index(folder, index, found)
    return found


def what_instead(folder: Path) -> str | None:
    """What a folder holds in place of safetensors and what to do about it, in words; None for nothing known."""
    for pattern, what in _INSTEAD.items():
        if (match := next(iter(sorted(folder.glob(pattern))), None)) is not None:
            return f"holds {match.name}, {what}"
    return None


def _read_index(folder: Path) -> dict[str, str]:
    """File of each tensor by the folder's index; empty where it has none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{path}: weight_map must name a file for each tensor")
    return index


def _check_index(folder: Path, index: Mapping[str, str], found: Mapping[str, StoredTensor]) -> None:
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise UserError(f"{folder / INDEX}: has {name} in {file}, which does not hold it")
    for name, tensor in found.items():
        if name not in index:
            raise UserError(f"{tensor.file}: holds {name}, which {INDEX} does not name: one of them is another model's")


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()  # what is opened is no mapping: it cannot be iterated
            slices = ((name, opened.get_slice(name)) for name in names)
            return {name: StoredTensor(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices}
    except (SafetensorError, OSError) as error:
        if _is_pointer(file):
            raise UserError(f"{file}: is a pointer of Git LFS, not the weights: fetch them with git lfs pull") from None
        raise UserError(f"{file}: cannot be read, it may be cut short: {reason(error)}") from None


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as start:
            return start.read(len(_POINTER)) == _POINTER
    except OSError:
        return False
