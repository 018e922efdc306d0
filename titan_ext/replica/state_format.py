"""Shared state as bytes that cannot run code: the safetensors layout with a JSON description.

A stream is an 8-byte little-endian length, a JSON header and the raw tensors. Everything that is
not a tensor travels as JSON inside the header's ``__metadata__``.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_TENSOR = "__tensor__"
_MAX_HEADER = 64 * 2**20


class Message:
    """State ready to be written: its size is known before the first byte.

    Args:
        state: nested dicts and lists of tensors and JSON values. Tensors are not copied until written.
    """

    def __init__(self, state: Any) -> None:
        self._tensors: list[torch.Tensor] = []
        structure = json.dumps(self._describe(state))
        entries: dict[str, Any] = {"__metadata__": {"structure": structure}}
        end = 0
        for index, tensor in enumerate(self._tensors):
            start, end = end, end + tensor.numel() * tensor.element_size()
            entries[str(index)] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        self._header = json.dumps(entries).encode()
        self.num_bytes = 8 + len(self._header) + end

    def chunks(self) -> Iterator[memoryview | bytes]:
        """The bytes, tensor by tensor."""
        yield len(self._header).to_bytes(8, "little")
        yield self._header
        for tensor in self._tensors:
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                yield memoryview(flat.view(torch.uint8).numpy())

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
            return {_TENSOR: len(self._tensors) - 1}
        if isinstance(value, dict):
            return {key: self._describe(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._describe(each) for each in value]
        return value


def read_message(stream: BinaryIO, num_bytes: int) -> Any:
    """Read what ``Message`` wrote.

    Args:
        stream: positioned at the first byte.
        num_bytes: the size announced by the sender; nothing beyond it is allocated.

    Raises:
        ValueError: the bytes are not such a message or contradict their own sizes.
    """
    length = int.from_bytes(_read(stream, 8), "little")
    if not 2 <= length <= min(_MAX_HEADER, num_bytes - 8):
        raise ValueError(f"shared state: a header of {length} bytes cannot be right")
    try:
        entries = json.loads(_read(stream, length))
        structure = json.loads(entries.pop("__metadata__")["structure"])
        tensors = [_read_tensor(stream, entries[str(index)]) for index in _checked(entries, num_bytes - 8 - length)]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"shared state: malformed header ({error!r})") from error
    return _restore(structure, tensors)


def _checked(entries: dict[str, Any], num_bytes: int) -> range:
    """Sizes are compared with the announced ones before anything is allocated."""
    end = 0
    for index in range(len(entries)):
        entry = entries[str(index)]
        count = 1
        for size in entry["shape"]:
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"shared state: tensor {index} has shape {entry['shape']}")
            count *= size
        start, stop = entry["data_offsets"]
        if start != end or stop - start != count * _DTYPES[entry["dtype"]].itemsize:
            raise ValueError(f"shared state: tensor {index} contradicts its own size")
        end = stop
    if end != num_bytes:
        raise ValueError(f"shared state: tensors of {end} bytes in a body of {num_bytes}")
    return range(len(entries))


def _read_tensor(stream: BinaryIO, entry: dict[str, Any]) -> torch.Tensor:
    tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
    if tensor.numel():
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        while view:
            count = stream.readinto(view)
            if not count:
                raise ValueError("shared state: the stream ended early")
            view = view[count:]
    return tensor


def _read(stream: BinaryIO, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise ValueError("shared state: the stream ended early")
        data += more
    return data


def _restore(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _restore(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_restore(each, tensors) for each in value]
    return value
