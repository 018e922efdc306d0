"""A site's replica manager in a rehearsal: quorums, messages and healing in virtual time, with torchft's counters."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ReduceOp

from titan_ext.errors import RunError
from titan_ext.lab.lighthouse import QUORUM_BYTES, Lighthouse, Member
from titan_ext.lab.messages import Group, Message
from titan_ext.lab.network import Network
from titan_ext.lab.simulation import Simulation
from titan_ext.semi_sync.wire.manager import ReduceOperation, ReplicaManager, SentBytes

State = Mapping[str, Any]
_REDUCE_TAG = 2**31


class LabManager(ReplicaManager):
    """The manager of one life of a site.

    Args:
        simulation: whose time passes.
        network: between the sites.
        lighthouse: that brings quorums about.
        member: this life.
        min_sites: that a commit needs.
        scale: bytes of the run for one of the stand-in's.
    """

    def __init__(
        self,
        simulation: Simulation,
        network: Network,
        lighthouse: Lighthouse,
        member: Member,
        *,
        min_sites: int,
        scale: float,
    ) -> None:
        self.step = 0
        """Commits, as torchft counts them."""
        self.group: Group | None = None
        self.prefetched_step: int | None = None
        """Commits in the snapshot that it fetched before it asked for a quorum."""
        self.member = member
        self._simulation, self._network, self._lighthouse = simulation, network, lighthouse
        self._min_sites, self._scale = min_sites, scale
        self._error: Exception | None = None
        self._last_vote = False
        self._sent_before = self._sent()
        """In earlier lives."""
        self._control = 0
        self._messages: Counter[tuple[int, int, int]] = Counter()
        self._arrived: tuple[int, int, State] | None = None
        self._load: Callable[[Any], None] | None = None
        self._save: Callable[[], Any] | None = None
        self._process_group = _LabGroup(self)

    # -- quorums -------------------------------------------------------------------------------------

    def start_quorum(self) -> None:
        """Ask the lighthouse, connect to the others if they are new, and fetch their state if this site is behind."""
        there, back = self._ways()
        self._error = None
        self._simulation.sleep(there)
        self._simulation.wait(self._lighthouse.ask(self.member))
        self._connect(back)

    def standing_quorum(self) -> "_LastQuorum | None":
        """The last one, if its round was committed and had other sites."""
        return _LastQuorum(self, self._simulation) if self._last_vote and self.num_participants() > 1 else None

    def ask_beside_round(self) -> float | None:
        """Ask the lighthouse: when its answer comes, if the quorum is the last one; None if it is new, and there."""
        there, back = self._ways()
        self._error = None
        self._simulation.wait(self._lighthouse.ask(self.member))
        assert self.member.quorum is not None
        if not self.member.quorum.is_new:
            return self._simulation.now + there + back
        self._simulation.sleep(there)
        self._connect(back)
        return None

    def _ways(self) -> tuple[float, float]:
        """Seconds of a call to the lighthouse and of its answer."""
        rtt, trips = self._network.links.lighthouse_rtt(self.member.site), self._network.transport.quorum_trips
        asked = self._network.seconds_to_lighthouse(self.member.site, QUORUM_BYTES)
        return asked + rtt * (trips - 1) / 2, rtt * trips / 2

    def _connect(self, back: float) -> None:
        assert self.member.quorum is not None
        trips = self._network.transport.regroup_trips if self.member.quorum.is_new else 0.0
        self._simulation.sleep(back + trips * self._network.links.lighthouse_rtt(self.member.site))
        if self._arrived is not None:
            self._take_over(*self._arrived)

    def enter(self, group: Group) -> None:
        """The lighthouse has put this site into a group."""
        self.group, self._arrived = group, None
        self._messages.clear()

    def is_sent(self, source: int, step: int, state: State) -> None:
        """A member's shared state is on its way: of the site at ``source``, after ``step`` commits."""
        self._arrived = (source, step, state)

    def shared_state(self) -> State:
        """A copy of what this site would send to one that is behind."""
        assert self._save is not None
        return copy.deepcopy(self._save())

    def prefetch(self, source: "LabManager") -> None:
        """Fetch a snapshot while the others train on."""
        step = source.step
        self._simulation.sleep(self._seconds_to_fetch(source.member.site, source.shared_state()))
        self.prefetched_step = step

    def _take_over(self, source: int, step: int, state: State) -> None:
        if step != self.prefetched_step:
            self._simulation.sleep(self._seconds_to_fetch(source, state))
        assert self._load is not None
        self._load(state)
        self.step, self._arrived, self.prefetched_step = step, None, None

    def _seconds_to_fetch(self, source: int, state: State) -> float:
        return self._network.seconds_to_fetch(source, self.member.site, self._scale * _bytes_of(state))

    # -- what the outer loop asks for ------------------------------------------------------------------

    @property
    def process_group(self) -> Any:
        """What carries the messages."""
        return self._process_group

    @property
    def bytes_sent(self) -> SentBytes:
        """Of frames the payload."""
        frames, healing = (now - before for now, before in zip(self._sent(), self._sent_before, strict=True))
        return SentBytes(frames=round(frames), control=self._control, healing=round(healing))

    def _sent(self) -> tuple[float, float]:
        """Bytes that the site has sent to others in rounds, and for healing."""
        network, site = self._network, self.member.site
        return network.sent[site] - network.told[site] - network.fetched[site], network.fetched[site]

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> Any:
        """Sum ``tensor`` in place over the sites, each of which sends it to each other one; an error is kept until the
        vote."""
        assert reduce_op == ReduceOp.SUM, reduce_op
        if self._error is not None:
            return _Work([])
        group, rank = self._process_group, self.participating_rank()
        rows = [tensor.clone() if site == rank else torch.empty_like(tensor) for site in range(self.num_participants())]
        others = [site for site in range(len(rows)) if site != rank]
        self._control += tensor.nbytes * len(others)
        works = [group.send([rows[rank]], site, _REDUCE_TAG) for site in others]
        works += [group.recv([rows[site]], site, _REDUCE_TAG) for site in others]

        def finish() -> None:
            try:
                for work in works:
                    work.wait()
                tensor.copy_(torch.stack(rows).sum(0))
            except RuntimeError as error:
                self.report_error(error)

        return _Work([message for work in works for message in work.messages], finish)

    def count_message(self, source: int, target: int, tag: int) -> int:
        """Which message of a tag between two ranks this site comes to."""
        self._messages[source, target, tag] += 1
        return self._messages[source, target, tag]

    def should_commit(self) -> bool:
        """Whether the round was without error and had enough sites."""
        assert self.group is not None
        if self._error is not None:
            self._lighthouse.connect_anew()
        committed = self._last_vote = self._error is None and len(self.group.sites) >= self._min_sites
        self.step += committed
        return committed

    def num_participants(self) -> int:
        """Sites of the quorum."""
        return len(self.group.sites) if self.group is not None else 0

    def participating_rank(self) -> int:
        """The site's rank among them."""
        assert self.group is not None
        return self.group.sites.index(self.member.site)

    def report_error(self, error: Exception) -> None:
        """Make the next vote a no."""
        self._error = self._error or error

    def errored(self) -> Exception | None:
        """The error kept since the quorum."""
        return self._error

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """The outer loop's shared state."""
        if self._save is not None:
            raise RunError(f"{key}: there is one shared state in a rehearsal")
        self._load, self._save = load_state_dict, state_dict

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Nothing: snapshots are made when they are asked for."""

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore them."""
        self.step = state_dict["step"]


class _LastQuorum:
    """A ``StandingQuorum``. Nothing is sent before it is known whether the next quorum is this one; but the time that the
    answer takes passes beside the round."""

    stands = True
    """Otherwise the round was not exchanged."""

    def __init__(self, manager: LabManager, simulation: Simulation) -> None:
        self._manager, self._simulation = manager, simulation
        self._comes_at: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def ask(self, now: Callable[[], float]) -> bool:
        """Whether the next quorum is the last one."""
        self._comes_at = self._manager.ask_beside_round()
        return self._comes_at is not None

    def wait(self) -> float:
        """Until the lighthouse's answer is there; returns when that was."""
        assert self._comes_at is not None
        self._simulation.sleep(max(0.0, self._comes_at - self._simulation.now))
        return self._comes_at


class _LabGroup:
    """What the outer loop uses of a process group: messages between two sites."""

    def __init__(self, manager: LabManager) -> None:
        self._manager = manager

    def getBackendName(self) -> str:
        return "lab"

    def send(self, tensors: Sequence[torch.Tensor], target: int, tag: int) -> "_Work":
        group, rank = self._manager.group, self._manager.participating_rank()
        assert group is not None
        return _Work([group.send(self._manager.count_message(rank, target, tag), rank, target, tag, tensors[0])])

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int) -> "_Work":
        group, rank = self._manager.group, self._manager.participating_rank()
        assert group is not None
        message = group.receive(self._manager.count_message(source, rank, tag), rank, source, tag)

        def finish() -> None:
            message.wait()
            assert message.content is not None
            tensors[0].copy_(message.content)
            message.content = None

        return _Work([message], finish)


class _Work:
    """Messages under way.

    Args:
        messages: all of them.
        finish: waits for them and does something with them; by default it waits.
    """

    def __init__(self, messages: Sequence[Message], finish: Callable[[], None] | None = None) -> None:
        self.messages, self._finish = messages, finish

    def is_completed(self) -> bool:
        return all(message.arrived.is_set for message in self.messages)

    def wait(self) -> bool:
        if self._finish is not None:
            self._finish()
        else:
            for message in self.messages:
                message.wait()
        return True


def _bytes_of(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(_bytes_of, state.values()))
    return sum(map(_bytes_of, state)) if isinstance(state, (list, tuple)) else 0
