"""Phases of a round in a profiler's trace, and nothing of them without one."""

import threading

from torch.profiler import ProfilerActivity, profile

from titan_ext.semi_sync.round.spans import span


def test_a_phase_is_in_the_trace_of_a_profiler():
    with profile(activities=[ProfilerActivity.CPU]) as found, span("quorum"):
        pass
    assert "titan_ext::quorum" in {event.key for event in found.key_averages()}


def test_without_a_profiler_there_is_none_and_threads_may_share_it():
    first, second = span("quorum"), span("reduce")
    assert first is second
    thread = threading.Thread(target=lambda: second.__enter__())
    with first:
        thread.start()
        thread.join()
        with second:
            pass
