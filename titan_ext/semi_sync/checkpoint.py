"""The outer loop in a distributed checkpoint."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.semi_sync.plan.weighting import UNKNOWN
from titan_ext.semi_sync.round.agreement import SiteStatus, Verdict
from titan_ext.semi_sync.round.commit import Committer
from titan_ext.semi_sync.round.contributions import Contributions, Sum, new_buffer
from titan_ext.semi_sync.round.round import InFlightRound, Launch, Role, RoundResult
from titan_ext.semi_sync.state.synced_state import SyncedState, TakenFromPeers

logger = logging.getLogger(__name__)


def save(committer: Committer, in_flight: InFlightRound) -> dict[str, Any]:
    """Everything the outer loop knows, with global shapes.

    A round in flight is waited for and saved as its reduced buffer, so that it is applied after a
    resume exactly as it would have been. What a failed one had is tried again after the resume.
    """
    exchange, schedule = committer.exchange, committer.schedule
    result, states = _exchanged(committer, in_flight), exchange.states
    counters = {
        "step": committer.progress.step,
        "lineage": exchange.lineage.state_dict(),
        "tokens": committer.progress.tokens,
        "work": {states[index].key: done for index, done in committer.progress.work.items()},
        "staleness": {states[index].key: missed for index, missed in committer.progress.staleness.items()},
        "loss": committer.progress.loss,
        "share": committer.progress.share,
        "pending": schedule.keys(schedule.pending if result else exchange.healing.unsettled),
        "not_before": schedule.not_before,
        "end_of_data": committer.participation.state_dict(),
        "in_flight": None if result is None else {"apply_at": in_flight.apply_at, **_describe(result, states)},
        "manager": exchange.healing.manager_state(),
        "sources": committer.participation.sources.state_dict(),
        "ledger": committer.ledger.state_dict(),
    }
    return {
        "counters": json.dumps(counters),
        "states": {state.key: state.checkpoint_state() for state in states},
        "in_flight": _in_flight_tensors(result, states),
        "residuals": exchange.writer.error_feedback.checkpoint_state(result.sum if result is not None else None),
        "sources": committer.participation.sources.tensors(),
    }


def load(committer: Committer, in_flight: InFlightRound, state_dict: Mapping[str, Any]) -> None:
    """Restore what ``save`` returned."""
    counters, exchange, schedule = json.loads(state_dict["counters"]), committer.exchange, committer.schedule
    committer.progress.step, committer.progress.tokens = counters["step"], counters["tokens"]
    # Checkpoints did not always count these.
    everything = dict.fromkeys((state.key for state in exchange.states), (counters["tokens"], 0))
    committer.progress.work = {
        index: (tokens, steps)
        for key, (tokens, steps) in counters.get("work", everything).items()
        for index in schedule.indices([key])
    }
    committer.progress.staleness = {
        index: missed for key, missed in counters.get("staleness", {}).items() for index in schedule.indices([key])
    }
    committer.progress.loss, committer.progress.share = counters.get("loss", UNKNOWN), counters.get("share", UNKNOWN)
    exchange.lineage.load_state_dict(counters["lineage"])
    schedule.pending = schedule.indices(counters["pending"])  # of another plan: what both have
    schedule.not_before = counters["not_before"]
    committer.participation.load_state_dict(counters["end_of_data"])
    exchange.manager.load_state_dict(counters["manager"])
    if "sources" in counters:  # not in checkpoints of before there were any
        committer.participation.sources.load_state_dict(counters["sources"], state_dict.get("sources", {}))
    committer.ledger.load_state_dict(counters["ledger"])
    for state in exchange.states:
        state.load_checkpoint_state(state_dict["states"].get(state.key, {}))
    exchange.writer.error_feedback.load_checkpoint_state(state_dict.get("residuals", {}))
    saved = counters["in_flight"]
    if saved is not None and not {*saved["rules"]} <= {*state_dict["in_flight"]}:
        logger.warning("the round that was in flight is dropped: its rules are not those of this plan any more")
    elif saved is not None:
        result = _restored(saved, state_dict["in_flight"], exchange.states, exchange.writer.device)
        in_flight.keep(result, saved["apply_at"])


def shared(committer: Committer) -> tuple[dict[str, Any], list[str]]:
    """What of ``save`` a joining site would receive, to load another site's checkpoint into, and the names of the
    parameters and buffers that are shared as the model's own checkpoint has them.

    Raises:
        ValueError: a part of it is no one site's to give, or in no checkpoint of the outer loop's.
    """
    parts, own = {}, []
    for state in committer.exchange.states:
        wanted, kept = state.shared_state(), state.checkpoint_state()
        if isinstance(state, TakenFromPeers):
            raise ValueError(f"{state.key} comes from live sites alone")
        own += [name for name in wanted if name not in kept]
        parts[state.key] = {name: values for name, values in kept.items() if name in wanted}
        if any(wanted[name].keys() - values.keys() for name, values in parts[state.key].items()):
            raise ValueError(f"{state.key} shares what the inner optimizer keeps")
    return {"counters": "", "states": parts}, own


def take_shared(committer: Committer, state_dict: Mapping[str, Any]) -> None:
    """Stand where the site stood whose checkpoint was loaded into ``shared``, with the model's own tensors in place."""
    counters, exchange, schedule = json.loads(state_dict["counters"]), committer.exchange, committer.schedule
    for state in exchange.states:
        state.load_shared_state(state_dict["states"][state.key] or state.shared_state())
    committer.progress.step = counters["step"]
    exchange.lineage.load_state_dict(counters["lineage"])
    exchange.manager.load_state_dict(counters["manager"])
    schedule.replace(schedule.indices(counters["pending"]))
    schedule.not_before = counters["not_before"]


def _exchanged(committer: Committer, in_flight: InFlightRound) -> RoundResult | None:
    """The round in flight once its reduction is complete; None if there is none or a rank of the site has failed."""
    exchange, result = committer.exchange, in_flight.peek()
    failed = result is None or result.verdict.problem is not None or exchange.manager.errored() is not None
    failed = failed or result.role is Role.LATE  # a sum on top of a state that is yet to be taken in
    if not all(exchange.site.gather(not failed and result.sum is not None)):
        return None
    exchange.complete(result.sum)
    return result


def _describe(result: RoundResult, states: Sequence[SyncedState]) -> dict[str, Any]:
    """A reduced round without its tensors, as JSON values."""
    return {
        "rules": [states[index].key for index in result.rules],
        "step": result.launch.step,
        "weight": result.sum.weight,
        "tokens": result.launch.tokens,
        "work": {states[index].key: done for index, done in result.launch.work.items()},
        "remembered": result.sum.remembered,
        "update_factor": result.sum.contributions.step,
        "weights": result.sum.contributions.weights,
        "rank": result.sum.contributions.rank,
        "labels": result.sum.contributions.labels,
        "table": [(site.name, site.tokens) for site in result.verdict.table],
    }


def _in_flight_tensors(result: RoundResult | None, states: Sequence[SyncedState]) -> dict[str, dict[str, torch.Tensor]]:
    """Reduced values of every rule that can be in flight, zeros where nothing is, for a checkpoint.

    It is loaded into the tensors of a fresh object, so the keys may not depend on the moment.
    """
    parts = result.sum.parts if result is not None else {}
    return {
        state.key: state.named_message(parts.get(index, torch.zeros(state.numel, device=state.tensors.device)))
        for index, state in enumerate(states)
        if state.rule.delay
    }


def _restored(
    description: Mapping[str, Any], tensors: Mapping[str, Any], states: Sequence[SyncedState], device: torch.device
) -> RoundResult:
    """The round that ``_describe`` and ``_in_flight_tensors`` told of."""
    keys = [state.key for state in states]
    rules = tuple(keys.index(key) for key in description["rules"])
    step, weights = description["step"], description["weights"]
    table = [
        SiteStatus(name=name, tokens=tokens, fingerprint=0, step=step, rules=list(rules))
        for name, tokens in description["table"]
    ]
    _, parts = new_buffer(rules, states, device)
    for index, part in parts.items():
        states[index].fill_message(part, tensors[keys[index]])
    weight, tokens = description["weight"], description["tokens"]
    work = {keys.index(key): (done[0], done[1]) for key, done in description.get("work", {}).items()}
    norms: list[list[float]] = [[] for _ in weights]
    contributions = Contributions(
        weights,
        norms,
        step=description.get("update_factor", 1.0),
        rank=description.get("rank", 0),
        labels=description.get("labels", {}),
    )
    return RoundResult(
        launch=Launch(role=Role.MEMBER, rules=rules, step=step, weight=weight, tokens=tokens, work=work),
        role=Role.MEMBER,
        sites=len(table),
        verdict=Verdict(table, list(rules), step),
        sum=Sum(parts, weight, True, contributions, remembered=description.get("remembered")),
    )
