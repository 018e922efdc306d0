"""Shared state as bytes that cannot run code: the safetensors layout with a JSON description.

A message is an 8-byte little-endian length, a JSON header and the raw tensors. Everything that is
not a tensor travels as JSON inside the header's ``__metadata__``.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

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
_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MAX_HEADER = 64 * 2**20
# What is hashed or sent at once: it bounds the host copy of a tensor on an accelerator.
_PIECE_BYTES = 2**20
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError)


class OutgoingMessage:
    """State ready to be read in pieces: its size is known before the first byte.

    Tensors are read where they lie, so they must not change as long as the message is in use. Only
    those that are not contiguous are copied.

    Args:
        state: nested dicts and lists of tensors and JSON values.

    Raises:
        ValueError: the state has a dict that would read as a tensor.
    """

    def __init__(self, state: Any) -> None:
        tensors: list[torch.Tensor] = []
        structure = json.dumps(_describe(state, tensors))
        entries: dict[str, Any] = {"__metadata__": {"structure": structure}}
        end = 0
        for index, tensor in enumerate(tensors):
            start, end = end, end + tensor.numel() * tensor.element_size()
            entries[str(index)] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        header = json.dumps(entries).encode()
        head = bytearray(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        self.num_bytes = len(head) + end
        self._bytes = _Bytes([torch.frombuffer(head, dtype=torch.uint8), *map(_flat, tensors)])

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``stop``, at most 1 MiB at a time."""
        for piece in self._bytes.between(start, stop):
            yield memoryview(piece.cpu().numpy().data)


class IncomingMessage:
    """A message that is being received: the tensors that its header describes, to be filled in any order.

    Args:
        header: the message's first ``header_end`` bytes.
        num_bytes: the size announced by the sender; nothing beyond it is allocated.

    Raises:
        ValueError: the header is malformed, contradicts the size, or asks for more than this machine has.
    """

    def __init__(self, header: bytes, num_bytes: int) -> None:
        self._header_bytes = len(header)
        try:
            entries = json.loads(header[_LENGTH_BYTES:])
            structure = json.loads(entries.pop("__metadata__")["structure"])
            kinds = _checked(entries, num_bytes - self._header_bytes)
            tensors = _allocated(kinds)
            self._state = _restore(structure, tensors)
        except _MALFORMED as error:
            raise ValueError(f"shared state: malformed header ({error!r})") from error
        except RuntimeError as error:
            raise ValueError(f"shared state: no room for {num_bytes} bytes ({error})") from error
        self._bytes = _Bytes(map(_flat, tensors))

    def buffers(self, start: int, stop: int) -> Iterator[memoryview]:
        """Where to write the message's bytes from ``start`` to ``stop``; ``start`` lies behind the header."""
        # They alias the state's tensors. Connections fill disjoint ranges at the same time, without a lock.
        for buffer in self._bytes.between(start - self._header_bytes, stop - self._header_bytes):
            yield memoryview(buffer.numpy().data)

    def state(self) -> Any:
        """The state; its tensors hold what was written into ``buffers``."""
        return self._state


def _allocated(kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """Tensors in one block of memory, which goes back to the system as a whole when the last of them is freed."""
    if not kinds:
        return []
    starts, end = [], 0
    for shape, dtype in kinds:
        starts.append(end)
        end += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8, device="cpu")
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kinds]
    return [
        block[start : start + size].view(dtype).view(torch.Size(shape))
        for start, size, (shape, dtype) in zip(starts, sizes, kinds, strict=True)
    ]


def header_end(start: bytes | bytearray, num_bytes: int) -> int:
    """The end of a message's header, in bytes from its beginning.

    Args:
        start: at least the first 8 bytes, or all if there are fewer.
        num_bytes: the size announced by the sender.

    Raises:
        ValueError: no header can have that length.
    """
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(_MAX_HEADER, num_bytes - _LENGTH_BYTES):
        raise ValueError(f"shared state: a header of {length} bytes cannot be right in a message of {num_bytes}")
    return _LENGTH_BYTES + length


class _Bytes:
    """Flat tensors of bytes, one behind the other, addressed as one sequence."""

    def __init__(self, parts: Iterable[torch.Tensor]) -> None:
        self._parts = [part for part in parts if part.numel()]
        self._ends = list(accumulate(part.numel() for part in self._parts))

    def between(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        index = bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[index], self._ends[index]
            begin = end - part.numel()
            piece = part[start - begin : min(stop, start + _PIECE_BYTES) - begin]
            yield piece
            start += piece.numel()
            index += start == end


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            raise ValueError(f'shared state: a dict whose only key is "{_TENSOR}" cannot be told from a tensor')
        return {key: _describe(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item, tensors) for item in value]
    return value


def _restore(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _restore(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    return value


def _checked(entries: dict[str, Any], num_bytes: int) -> list[tuple[list[int], torch.dtype]]:
    """Shapes and dtypes; sizes are compared with the announced ones before anything is allocated."""
    kinds = []
    end = 0
    for index in range(len(entries)):
        entry = entries[str(index)]
        shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"shared state: tensor {index} has no possible shape")
        count = dtype.itemsize
        for size in shape:
            count *= size
        start, stop = entry["data_offsets"]
        if start != end or stop != end + count:
            raise ValueError(f"shared state: tensor {index} contradicts its own size")
        end += count
        kinds.append((shape, dtype))
    if end != num_bytes:
        raise ValueError(f"shared state: tensors of {end} bytes in a body of {num_bytes}")
    return kinds
