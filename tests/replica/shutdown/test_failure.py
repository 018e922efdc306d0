"""Which rank of a site speaks when it fails, and what it says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, DistNetworkError, TCPStore

from titan_ext.replica.shutdown.failure import killed, lost_another_rank

ROOT = Path(__file__).parents[2]
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError(
            "[/x/gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 100000ms for recv operation to complete"
        ),
        DistNetworkError("failed to recv, got 0 bytes"),
        DistBackendError("NCCL communicator was aborted on rank 1."),
        ConnectionResetError("reset"),
    ],
    ids=str,
)
def test_the_loss_of_another_rank_is_a_consequence(error):
    assert lost_another_rank(error)
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert lost_another_rank(wrapped)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), RuntimeError("CUDA error: out of memory"), KeyError(1)]
)
def test_anything_else_is_a_cause(error):
    assert not lost_another_rank(error)


def test_a_rank_that_a_signal_ended_is_named():
    assert killed({0: 1, 1: -signal.SIGKILL}) == "rank 1 was ended by SIGKILL, maybe for want of memory"
    assert killed({0: -signal.SIGSEGV}) == "rank 0 was ended by SIGSEGV"
    assert killed({0: 1, 1: -signal.SIGTERM, 2: 143}) is None


_RANK = """
import sys
from titan_ext.errors import UserError
from titan_ext.replica.shutdown.failure import end_with
error = eval(sys.argv[1])
try:
    raise error
except Exception as caught:
    end_with(caught)
"""


def speak(*ranks: tuple[int, str]) -> list[tuple[int, str]]:
    """Exit code and standard error of ranks that fail one after the other."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = []
    for rank, error in ranks:
        environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _RANK, error]
        ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        found.append((ended.returncode, ended.stderr))
    return found


def test_the_rank_that_caused_the_end_speaks_whichever_it_is():
    (code, first), (after, second) = speak((1, "ZeroDivisionError('no warmth')"), (0, f"RuntimeError({GLOO!r})"))
    assert (code, after) == (1, 1)
    assert first.splitlines()[-1] == "titan-ext: error: rank 1: ZeroDivisionError: no warmth" and "Traceback" in first
    assert "titan-ext: error:" not in second and "lost another rank" in second


def test_where_all_ranks_come_to_one_end_one_speaks():
    answers = speak((1, "UserError('data: no text')"), (0, "UserError('data: no text')"))
    assert answers == [(2, "titan-ext: error: data: no text\n"), (2, "")]


def test_a_path_that_cannot_be_had_is_one_line(tmp_path):
    folder = str(tmp_path)
    answers = speak((0, f"IsADirectoryError(21, 'Is a directory', {folder!r})"), (0, "KeyError('metrics')"))
    assert answers[0] == (2, f"titan-ext: error: {folder}: cannot be read or written: Is a directory\n")
    assert answers[1][0] == 1 and "Traceback" in answers[1][1]
