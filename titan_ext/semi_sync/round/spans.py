"""The phases of a round in a profiler's trace."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """``titan_ext::<name>`` in the trace; without a profiler nothing, where torch's own span would cost a round 5%."""
    # Of the process, not of the thread: rounds that overlap inner steps run on another one.
    return record_function(f"titan_ext::{name}") if torch.autograd.profiler._is_profiler_enabled else _NOTHING
