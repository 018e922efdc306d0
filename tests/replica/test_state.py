"""The format and transport of shared state."""

import io
import pickle
import struct
import urllib.request
from datetime import timedelta

import pytest
import torch

from titan_ext.replica.state_format import Message, read_message
from titan_ext.replica.transport import StateTransport

STATE = {
    "rows": {"params/0": {"w": {"global": torch.randn(3, 4), "outer.step": torch.tensor(3.0)}}},
    "empty": torch.empty(0, 4),
    "half": torch.arange(5).bfloat16(),
    "plain": [1, 2.5, "x", None, True, {"deep": [torch.ones(2, dtype=torch.int64)]}],
}


def encoded(state) -> bytes:
    message = Message(state)
    data = b"".join(bytes(chunk) for chunk in message.chunks())
    assert len(data) == message.num_bytes
    return data


def assert_same(left, right) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    else:
        assert left == right


def test_round_trip():
    data = encoded(STATE)
    assert_same(read_message(io.BytesIO(data), len(data)), STATE)


def test_is_a_safetensors_file():
    safetensors = pytest.importorskip("safetensors.torch")
    assert torch.equal(safetensors.load(encoded(STATE))["3"], STATE["half"])


@pytest.mark.parametrize("cut", [0, 4, 8, 50, -1])
def test_cut_short(cut):
    data = encoded(STATE)
    with pytest.raises(ValueError, match="shared state"):
        read_message(io.BytesIO(data[:cut]), len(data))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a peer was run",))


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Bomb()),
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        b"\xff" * 64,
    ],
)
def test_hostile_bytes_are_refused(data):
    with pytest.raises(ValueError, match="shared state"):
        read_message(io.BytesIO(data), len(data))


@pytest.mark.parametrize(
    "before, after",
    [(b"[3, 4]", b"[9, 4]"), (b"[3, 4]", b"[3,-4]"), (b'"F32"', b'"F64"'), (b"[0, 48]", b"[8, 56]")],
)
def test_sizes_that_contradict_are_refused(before, after):
    data = encoded({"w": torch.zeros(3, 4)})
    assert before in data
    with pytest.raises(ValueError, match="shared state"):
        read_message(io.BytesIO(data.replace(before, after)), len(data))


def test_transport_between_two_ranks():
    timeout = timedelta(seconds=20)
    donor = StateTransport("127.0.0.1", 0, timeout)
    receiver = StateTransport("127.0.0.1", 0, timeout)
    try:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=timeout)
        got = receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=timeout)
        assert_same(got, STATE)
        donor.disallow_checkpoint()
    finally:
        donor.shutdown()
        receiver.shutdown()


def test_nothing_is_served_after_the_round():
    transport = StateTransport("127.0.0.1", 0, timedelta(seconds=0.2))
    try:
        transport.send_checkpoint([1], step=7, state_dict=STATE, timeout=timedelta(seconds=1))
        transport.disallow_checkpoint()
        with pytest.raises(urllib.request.HTTPError, match="404"):
            urllib.request.urlopen(transport.metadata() + "7", timeout=20)
    finally:
        transport.shutdown()
