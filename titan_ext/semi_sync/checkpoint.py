"""The outer loop in a distributed checkpoint."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from titan_ext.semi_sync.build import EngineState
from titan_ext.semi_sync.round.round import RoundResult, describe, in_flight_tensors, restored

logger = logging.getLogger(__name__)


def save(engine: EngineState, unsettled: list[int]) -> dict[str, Any]:
    """Everything the outer loop knows, with global shapes.

    A round in flight is waited for and saved as its reduced buffer, so that it is applied after a
    resume exactly as it would have been.

    Args:
        engine: the parts of this rank's outer loop.
        unsettled: rules to be tried again after a resume if no round is in flight.
    """
    result, states = _exchanged(engine), engine.states
    counters = {
        "step": engine.progress.step,
        "lineage": engine.lineage.state_dict(),
        "tokens": engine.progress.tokens,
        "pending": engine.schedule.keys(engine.schedule.pending if result else unsettled),
        "not_before": engine.schedule.not_before,
        "end_of_data": engine.end_of_data.state_dict(),
        "in_flight": None if result is None else {"apply_at": engine.in_flight.apply_at, **describe(result, states)},
        "manager": engine.manager.state_dict(),
        "ledger": engine.ledger.state_dict(),
    }
    return {
        "counters": json.dumps(counters),
        "states": {state.key: state.checkpoint_state() for state in states},
        "in_flight": in_flight_tensors(result, states),
        "residuals": engine.exchange.error_feedback.checkpoint_state(result),
    }


def load(engine: EngineState, state_dict: Mapping[str, Any]) -> None:
    """Restore what ``save`` returned."""
    counters = json.loads(state_dict["counters"])
    engine.progress.step, engine.progress.tokens = counters["step"], counters["tokens"]
    engine.lineage.load_state_dict(counters["lineage"])
    engine.schedule.pending = engine.schedule.indices(counters["pending"])  # of another plan: what both have
    engine.schedule.not_before = counters["not_before"]
    engine.end_of_data.load_state_dict(counters["end_of_data"])
    engine.manager.load_state_dict(counters["manager"])
    engine.ledger.load_state_dict(counters["ledger"])
    for state in engine.states:
        state.load_checkpoint_state(state_dict["states"].get(state.key, {}))
    engine.exchange.error_feedback.load_checkpoint_state(state_dict.get("residuals", {}))
    in_flight = counters["in_flight"]
    if in_flight is not None and not {*in_flight["rules"]} <= {*state_dict["in_flight"]}:
        logger.warning("the round that was in flight is dropped: its rules are not those of this plan any more")
    elif in_flight is not None:
        result = restored(in_flight, state_dict["in_flight"], engine.states, engine.device)
        engine.in_flight.keep(result, in_flight["apply_at"])


def _exchanged(engine: EngineState) -> RoundResult | None:
    """The round in flight once its reduction is complete; None if there is none or a rank of the site has failed."""
    result = engine.in_flight.peek()
    failed = result is None or result.verdict.problem is not None or engine.manager.errored() is not None
    if not all(engine.site.gather(not failed and result.sum is not None)):
        return None
    engine.exchange.complete(result.sum)
    return result
