"""How a rank that fails says so: of the ranks of a site one speaks, the one that failed by itself and first."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import NoReturn

import torch
from torch.distributed import DistError, TCPStore

from titan_ext.error_text import path_error
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.log import ERROR_PREFIX
from titan_ext.replica.shutdown.process import GracefulExit, exit_at_once

_REPORTED = "titan_ext/reported"
FAILURE_KEY = "titan_ext/failure"
"""Where the rank that speaks leaves its node, its exit code and its line, as JSON, for the agents of other nodes."""
_PATIENCE = timedelta(seconds=5)
# What Gloo, NCCL and torch's store say when another rank of the site has gone.
_LOST = re.compile(
    r"gloo/transport|connectFullMesh|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|Socket Timeout"
    r"|Timed out waiting \d+ ?ms|nccl(Remote|System)Error|NCCL communicator was aborted|[Nn]etwork has been shut"
)


def end_with(error: BaseException) -> NoReturn:
    """End the process as ``error`` asks for: with a line that says why, or in silence where another rank is the cause."""
    rank = os.environ.get("RANK", "0")
    match error:
        case GracefulExit():
            exit_at_once(int(error.code))
        case KeyboardInterrupt():
            exit_at_once(128 + signal.SIGINT)
        case UserError() | RunError():
            message, code = str(error), error.exit_code
        case OSError() if (known := path_error(error)) is not None:
            message, code = str(known), known.exit_code
        case _:
            sys.excepthook(type(error), error, error.__traceback__)
            message, code = f"rank {rank}: {type(error).__name__}: {_first_line(error)}", RunError.exit_code
            if lost_another_rank(error):
                print(f"titan-ext: rank {rank} has lost another rank of its site", file=sys.stderr, flush=True)
                exit_at_once(code)
    if _speaks_first(rank, message, code):
        with contextlib.suppress(OSError):
            print(f"{ERROR_PREFIX} {message}", file=sys.stderr, flush=True)
    exit_at_once(code)


def lost_another_rank(error: BaseException) -> bool:
    """Whether an error only says that another process has gone."""
    return any(
        (isinstance(each, DistError | ConnectionError) or _LOST.search(str(each))) and "EADDRINUSE" not in str(each)
        for each in _chain(error)
    )


def killed(exit_codes: Mapping[int, int]) -> str | None:
    """The line on ranks that a signal ended, which cannot speak for themselves; None if there are none.

    Args:
        exit_codes: of ranks that failed, by rank; torchrun ends all others with SIGTERM.
    """
    for rank, code in sorted(exit_codes.items()):
        if code < 0 and -code != signal.SIGTERM:
            memory = ", maybe for want of memory" if -code == signal.SIGKILL else ""
            return f"rank {rank} was ended by {signal.Signals(-code).name}{memory}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _speaks_first(rank: str, message: str, code: int) -> bool:
    """Whether no rank of the site has spoken before; all may come to the same end, or one alone."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent or torch.distributed.is_initialized():
        with contextlib.suppress(DistError):
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
            if store.add(_REPORTED, 1) > 1:
                return False
            store.set(
                FAILURE_KEY, json.dumps({"node": int(os.environ.get("GROUP_RANK", 0)), "code": code, "reason": message})
            )
            return True
    return rank == "0"
