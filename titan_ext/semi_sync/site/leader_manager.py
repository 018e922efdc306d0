"""A manager for every rank of a site that its leader speaks for: what the leader learns, all learn."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work
from torch.futures import Future

from titan_ext.errors import RunError
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.wire.manager import ReduceOperation, ReplicaManager, SentBytes, wire_device


class LeaderManager:
    """A ``ReplicaManager`` whose leader alone talks to the other sites.

    Each method is a collective over the site; all ranks call them in one order. Errors become known
    with the next call, so that the ranks never disagree on whether to go on. A peer's state arrives
    whole at the leader and is cut up for the ranks; ours is made whole when a peer asks for it.

    Args:
        leading: the leader's manager of a replica group of one rank; None on the other ranks.
        shards: the shards of the site's parameters.
    """

    def __init__(self, leading: ReplicaManager | None, shards: SiteShards) -> None:
        self.leading = leading
        self._shards = shards
        self._beside = shards.beside()  # an exchange in flight uses the other one
        self._error: object | None = None
        self._own_error: Exception | None = None
        self._participants = self._rank = 0
        self._counters: dict[str, int] = leading.state_dict() if leading is not None else {}
        self._counters = shards.share(self._counters)
        self._states: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {}

    @property
    def process_group(self) -> ProcessGroup | None:
        """The leader's; the other ranks have none."""
        return self.leading.process_group if self.leading is not None else None

    @property
    def bytes_sent(self) -> SentBytes:
        """The leader's; the other ranks send nothing."""
        return self.leading.bytes_sent if self.leading is not None else SentBytes()

    def start_quorum(self) -> None:
        """Agree on who takes part; the other ranks help their leader to give and take state meanwhile."""
        self._error = self._own_error = None
        if self.leading is None:
            self._learn(self._follow(self._shards))
            return
        try:
            self.leading.start_quorum()
            outcome = {
                "participants": self.leading.num_participants(),
                "rank": self.leading.participating_rank(),
                "counters": self.leading.state_dict(),
            }
        except Exception as error:
            self._shards.share({"failed": f"{type(error).__name__}: {error}"})
            raise
        self._shards.share({"done": outcome})
        self._learn(outcome)

    def standing_quorum(self) -> None:
        """None: the ranks help their leader in the quorum, and could not in a round at the same time."""

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> Work:
        """Reduce the leader's ``tensor`` over the sites, for all ranks of this one; done when it returns."""
        summed = tensor.detach().cpu()
        if self.leading is not None:
            wire = summed.to(wire_device(self.leading))
            self.leading.allreduce(wire, reduce_op=reduce_op).wait()
            summed = wire.cpu()
        self._shards.share_tensor(summed)
        self._share_error()
        tensor.copy_(summed)
        return _Done()

    def should_commit(self) -> bool:
        """The vote of all ranks of the site, given by the leader."""
        errors = [error for error in self._shards.gather(_text(self._own_error)) if error is not None]
        verdict: dict[str, Any] = {}
        if self.leading is not None:
            if errors:
                self.leading.report_error(RuntimeError(errors[0]))
            error = _text(self.leading.errored())
            verdict = {"commit": self.leading.should_commit(), "error": error, "counters": self.leading.state_dict()}
        verdict = self._shards.share(verdict)
        self._error, self._counters = verdict["error"], verdict["counters"]
        return verdict["commit"]

    def num_participants(self) -> int:
        """Sites in the current quorum."""
        return self._participants

    def participating_rank(self) -> int:
        """The site's place among them."""
        return self._rank

    def report_error(self, error: Exception) -> None:
        """Make the next vote a no."""
        self._own_error = error

    def errored(self) -> object | None:
        """The error that all ranks know of, or this rank's own."""
        return self._error or self._own_error

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Name the shared state of this rank's shards."""
        self._states[key] = (load_state_dict, state_dict)
        if self.leading is not None:
            self.leading.register_state_dict_fn(
                key, lambda state: self._give(key, state), lambda: self._collect(key, self._shards)
            )

    def state_dict(self) -> dict[str, int]:
        """The leader's counters."""
        return dict(self._counters)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore them."""
        self._counters = dict(state_dict)
        if self.leading is not None:
            self.leading.load_state_dict(state_dict)

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """All ranks help their leader to the copy that a newcomer has asked it for, if one has."""
        if self.leading is None:
            self._follow(self._beside)
            return
        self.leading.serve_snapshot_requests(
            lambda: {
                "user": {key: self._collect(key, self._beside) for key in self._states},
                "torchft": self.leading.state_dict(),
            }
        )
        self._beside.share({"done": None})

    # -- what the leader has the others do -------------------------------------------------------

    def _follow(self, shards: SiteShards) -> Any:
        """Do what the leader asks for, until it is done; returns what came of it."""
        while True:
            order = shards.share(None)
            if "collect" in order:
                self._whole(self._states[order["collect"]][1](), shards)
            elif "give" in order:
                self._take(order["give"], order["plain"])
            elif "failed" in order:
                raise RunError(f"the site's leader found no quorum: {order['failed']}")
            else:
                return order["done"]

    def _learn(self, outcome: Mapping[str, Any]) -> None:
        self._participants, self._rank, self._counters = outcome["participants"], outcome["rank"], outcome["counters"]

    def _share_error(self) -> None:
        error = _text(self.leading.errored()) if self.leading is not None else None
        self._error = self._shards.share(error) or self._error

    def _collect(self, key: str, shards: SiteShards) -> Any:
        """The site's whole state, for a peer."""
        shards.share({"collect": key})
        return self._whole(self._states[key][1](), shards)

    def _give(self, key: str, state: Any) -> None:
        """A peer's whole state, to all ranks."""
        plain = {name: value for name, value in state.items() if name != "states"}
        plain["states"] = {
            rule: {name: {key: _plain(value) for key, value in values.items()} for name, values in names.items()}
            for rule, names in state["states"].items()
        }
        self._shards.share({"give": key, "plain": plain})
        self._take(key, plain, state["states"])

    def _take(self, key: str, plain: dict[str, Any], states: Mapping[str, Any] | None = None) -> None:
        """This rank's part of a state whose plain values all know and whose tensors the leader has."""
        own: dict[str, dict[str, dict[str, Any]]] = {}
        for rule, names in plain["states"].items():
            own[rule] = {}
            for name, values in names.items():
                taken = dict(values)
                for each, value in values.items():
                    if isinstance(value, str) and value == _WHOLE:
                        whole = states[rule][name][each].reshape(-1).float() if states is not None else None
                        taken[each] = self._shards.scatter([name], whole).get(name)
                if all(value is not None for value in taken.values()):
                    own[rule][name] = taken
        self._states[key][0]({**plain, "states": own})

    def _whole(self, state: dict[str, Any], shards: SiteShards) -> dict[str, Any]:
        """The leader's view of a state with every shard made whole."""
        described = [
            {rule: {name: _shardwise(values) for name, values in names.items()} for rule, names in each.items()}
            for each in shards.gather(_kinds(state["states"]))
        ]
        keys: dict[str, dict[str, list[str]]] = {}
        for states in described:
            for rule, names in states.items():
                keys.setdefault(rule, {}).update(names)
        whole: dict[str, dict[str, dict[str, Any]]] = {}
        plain = self._plain_of_all(state["states"], shards)
        for rule in sorted(keys):
            whole[rule] = {}
            for name in sorted(keys[rule]):
                held = state["states"].get(rule, {}).get(name, {})
                whole[rule][name] = dict(plain[rule].get(name, {}))
                for each in keys[rule][name]:
                    parts = {name: held[each]} if each in held else {}
                    made = shards.collect([name], parts)
                    if made is not None:
                        whole[rule][name][each] = made.view(shards.shape(name))
        return {**state, "states": whole}

    def _plain_of_all(self, states: Mapping[str, Any], shards: SiteShards) -> dict[str, dict[str, dict[str, Any]]]:
        """Values that are not shards, such as step counts, of all ranks' parameters."""
        own = {
            rule: {
                name: {key: value for key, value in values.items() if not _is_shard(value)}
                for name, values in names.items()
            }
            for rule, names in states.items()
        }
        merged: dict[str, dict[str, dict[str, Any]]] = {}
        for each in shards.gather(own):
            for rule, names in each.items():
                merged.setdefault(rule, {}).update(names)
        return merged


_WHOLE = "\0whole"


def _is_shard(value: Any) -> bool:
    """Tensors with dimensions are cut as their parameter is; those of one number are not."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _plain(value: Any) -> Any:
    return _WHOLE if _is_shard(value) else value


def _kinds(states: Mapping[str, Any]) -> dict[str, dict[str, dict[str, bool]]]:
    return {
        rule: {name: {key: _is_shard(value) for key, value in values.items()} for name, values in names.items()}
        for rule, names in states.items()
    }


def _shardwise(values: Mapping[str, bool]) -> list[str]:
    return [key for key, shard in values.items() if shard]


def _text(error: object | None) -> str | None:
    return None if error is None else str(error)


class _Done(Work):
    """Work that is over."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Future:
        future: Future = Future()
        future.set_result(None)
        return future
