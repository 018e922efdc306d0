"""The ledger: what every round cost and what came of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True, slots=True)
class RoundRecord:
    """One round as one rank saw it; bytes are those of the whole site."""

    level: Literal["all", "region"] = "all"
    """Whose round it was: that of all sites, or of a region over a quorum of its own, which is no commit of the run."""
    round: int
    """Committed rounds of all sites so far, this one included if it was."""
    step: int
    """Inner step after which the round was applied or given up."""
    rules: list[str]
    """Keys of the rules it carried."""
    participants: int
    """Sites whose values were averaged; a site that only joins is not counted."""
    contributors: list[str] = field(default_factory=list)
    """Their names, or ``#`` and the place in the quorum where sites have none."""
    tokens: int = 0
    """What they had trained on since each one's last commit."""
    sites: int
    """Sites in the quorum."""
    bytes_sent: int
    """Bytes of messages that this site gave to the wire, all its ranks together, counted there."""
    bytes_received: int
    """Bytes of the others' messages that it took from the wire, counted as they came."""
    control_bytes_sent: int = 0
    """Bytes of messages beside those: tables of statuses and weights."""
    wire_bytes_sent: int = 0
    """Bytes of all frames that it has sent to the other sites since the round before: control, headers and repetitions
    included, as the kernel tells; 0 where it does not."""
    healing_bytes_sent: int = 0
    """Of those the ones that gave another site the shared state."""
    seconds_quorum: float
    """Waiting for the other sites and agreeing on the round."""
    seconds_waiting: float | None = None
    """Of those the ones until the lighthouse told who takes part: the others were not there yet."""
    seconds_reduce: float
    """Reducing the buckets: coding what is sent, transfer, and summing what came; not what passed in ``seconds_quorum``."""
    seconds_transfer: float | None = None
    """Of the reduction those in which it waited for messages, also while the lighthouse was asked; coding and summing took the
    rest."""
    seconds_apply: float
    """Voting, the outer step and writing the parameters."""
    committed: bool
    """Whether the result was applied."""
    measures: dict[str, float] = field(default_factory=dict)
    """Figures of a method's own, by name: of ``sparsyfed`` the density of what arrived and was sent, and regrowth."""
    healed: bool = False
    """Whether this site took another's shared state in the round."""
    error: str | None = None
    """Why it was not committed."""
    missing: dict[str, str] = field(default_factory=dict)
    """Sites that have been in a quorum before and did not contribute, and why, as far as a site can tell of another."""
    staleness: dict[str, int] = field(default_factory=dict)
    """By contributor with work that rounds before had not waited for: commits of the same part of the model that had gone
    by since that work began, but for the last one."""
    seconds_stalled: float | None = None
    """For which this site's inner steps stood still."""
    seconds_hidden: float | None = None
    """Of the exchange, beside which they went on."""
    norms: dict[str, float] | None = None
    """Of the mean pseudo-gradient, the outer optimizer's states and the global parameters. None, as what follows,
    where the round was not measured (``SiteOptions.norms_every``)."""
    norms_by_layer: dict[str, dict[str, float]] | None = None
    """The same by layer."""
    cosine: float | None = None
    """Between the updates of two sites, over all pairs; see ``outer_norms.mean_cosine``."""
    noise_scale: float | None = None
    """How many sites' updates make a mean half of which is noise; see ``outer_norms.noise_and_signal``."""

    def as_dict(self) -> dict[str, Any]:
        """The record as plain values, ready for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Ledger:
    """Totals over the rounds of a run, those before a resume included."""

    rounds: int = 0
    failed: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    control_bytes_sent: int = 0
    wire_bytes_sent: int = 0
    healing_bytes_sent: int = 0
    stale: int = 0
    """Contributions with work that rounds before had not waited for."""
    most_stale: int = 0
    """The largest staleness of them."""
    seconds: float = 0.0
    last: RoundRecord | None = field(default=None)
    """Of all sites."""

    def add(self, record: RoundRecord) -> None:
        """Count a round."""
        self.rounds += record.committed
        self.failed += not record.committed
        self.bytes_sent += record.bytes_sent
        self.bytes_received += record.bytes_received
        self.control_bytes_sent += record.control_bytes_sent
        self.wire_bytes_sent += record.wire_bytes_sent
        self.healing_bytes_sent += record.healing_bytes_sent
        self.stale += len(record.staleness)
        self.most_stale = max([self.most_stale, *record.staleness.values()])
        self.seconds += record.seconds_quorum + record.seconds_reduce + record.seconds_apply
        if record.level == "all":
            self.last = record

    def state_dict(self) -> dict[str, Any]:
        """The totals, as plain values."""
        return {name: getattr(self, name) for name in _TOTALS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from totals that were saved."""
        for name in _TOTALS:
            setattr(self, name, state.get(name, 0))


_TOTALS = (
    "rounds",
    "failed",
    "bytes_sent",
    "bytes_received",
    "control_bytes_sent",
    "wire_bytes_sent",
    "healing_bytes_sent",
    "stale",
    "most_stale",
    "seconds",
)


def ring_all_reduce_bytes(payload: int, sites: int) -> int:
    """Bytes each of ``sites`` sends (and receives) when ``payload`` bytes are all-reduced over a ring."""
    return round(2 * payload * (sites - 1) / sites) if sites > 1 else 0
