"""The format of shared state."""

import pickle
import struct

import pytest
import torch

from tests.replica.state_transfer.states import STATE, assert_same
from titan_ext.replica.state_transfer.state_format import IncomingMessage, OutgoingMessage, header_end


def encoded(state) -> bytes:
    message = OutgoingMessage(state)
    data = b"".join(message.pieces(0, message.num_bytes))
    assert len(data) == message.num_bytes
    return data


def decoded(data: bytes):
    end = header_end(data, len(data))
    incoming = IncomingMessage(data[:end], len(data))
    for buffer in incoming.buffers(end, len(data)):
        buffer[:] = data[end : end + len(buffer)]
        end += len(buffer)
    return incoming.state()


def refuse_to_allocate(*args, **kwargs):
    pytest.fail("memory was allocated for what contradicts itself")


def test_round_trip():
    assert_same(decoded(encoded(STATE)), STATE)


@pytest.mark.parametrize("state", [{}, [], None, torch.tensor(1.5), {"e": torch.empty(0)}])
def test_round_trip_of_little(state):
    assert_same(decoded(encoded(state)), state)


def test_any_range_is_read_and_filled_alone():
    state = {"a": torch.randn(700_001), "empty": torch.empty(0), "b": torch.arange(5).bfloat16(), "c": torch.tensor(2)}
    message, data = OutgoingMessage(state), encoded(state)
    end = header_end(data, len(data))
    incoming = IncomingMessage(data[:end], len(data))
    step = 99_991
    for start in reversed(range(end, len(data), step)):
        stop = min(start + step, len(data))
        assert b"".join(message.pieces(start, stop)) == data[start:stop]
        for buffer in incoming.buffers(start, stop):
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)
        assert start == stop
    assert_same(incoming.state(), state)


def test_tensors_are_read_where_they_lie():
    tensor = torch.zeros(3)
    message = OutgoingMessage({"w": tensor})
    tensor.fill_(7.0)
    assert torch.equal(decoded(b"".join(message.pieces(0, message.num_bytes)))["w"], tensor)


def test_is_a_safetensors_file():
    safetensors = pytest.importorskip("safetensors.torch")
    assert torch.equal(safetensors.load(encoded(STATE))["3"], STATE["half"])


def test_dict_that_looks_like_a_tensor_is_refused():
    with pytest.raises(ValueError, match="__tensor__"):
        OutgoingMessage({"x": {"__tensor__": 0}})


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a peer was run",))


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02",
        pickle.dumps(Bomb()),
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 65 * 2**20) + bytes(66 * 2**20),
        with_header(b"{}"),
        with_header(b"null"),
        with_header(b"[" * 100_000),
        with_header(b'{"__metadata__": {"structure": "{\\"__tensor__\\": 5}"}}'),
        with_header(b'{"__metadata__": {"structure": "1"}, "0": {"dtype": "U8", "shape": "", "data_offsets": [0, 1]}}'),
        b"\xff" * 64,
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
def test_hostile_bytes_are_refused(data, monkeypatch):
    monkeypatch.setattr(torch, "empty", refuse_to_allocate)
    with pytest.raises(ValueError, match="shared state"):
        decoded(data)


@pytest.mark.parametrize(
    "before, after",
    [
        (b"[3, 4]", b"[9, 4]"),
        (b"[3, 4]", b"[3,-4]"),
        (b"[3, 4]", b"[2.0,6]"),
        (b'"F32"', b'"F64"'),
        (b'"F32"', b'"X99"'),
        (b"[0, 48]", b"[8, 56]"),
        (b"[0, 48]", b"[0, 4e9]"),
    ],
)
def test_sizes_that_contradict_are_refused(before, after, monkeypatch):
    data = encoded({"w": torch.zeros(3, 4)})
    assert before in data
    header = data[8:-48].replace(before, after)
    monkeypatch.setattr(torch, "empty", refuse_to_allocate)
    with pytest.raises(ValueError, match="shared state"):
        decoded(with_header(header) + data[-48:])


def test_more_than_the_machine_has_is_refused():
    size = 2**58
    header = (
        b'{"__metadata__": {"structure": "{\\"__tensor__\\": 0}"}, '
        b'"0": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (size, size)
    )
    head = with_header(header)
    with pytest.raises(ValueError, match="no room"):
        IncomingMessage(head, len(head) + size)
