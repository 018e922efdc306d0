"""What faults of sites cost: their work since the last round, their return, and the others' broken rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from titan_ext.links.link import parse_seconds
from titan_ext.planner.by_site import seconds_by_site


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often sites fail, and for how long they are gone."""

    between: Mapping[str, float] = field(default_factory=dict)
    """Mean seconds between two faults of a site, by its name; a site that is not there never fails."""
    recovery_seconds: float = 300.0
    """From a fault until the site trains again: restart, loading, joining."""

    def availability(self, site: str, round_seconds: float) -> float:
        """Share of its time in which a site does work that counts.

        A fault loses half a round on average, and the site waits for the end of the round that it joins.
        """
        between = self.between.get(site)
        return 1.0 if between is None else between / (between + self.recovery_seconds + round_seconds)

    def participation(self, sites: Sequence[str], round_seconds: float) -> float:
        """Mean availability of the sites."""
        return sum(self.availability(site, round_seconds) for site in sites) / len(sites)

    def stall_share(self, sync: float, round_seconds: float, regroup: float) -> float:
        """Seconds that the others lose to faults, for each second of the run.

        Args:
            sync: seconds of an exchange; a site that dies during one breaks it.
            round_seconds: from one round to the next.
            regroup: seconds in which the sites connect anew, once after the fault and once at the return.
        """
        often = sum(1 / seconds for seconds in self.between.values())
        return often * (2 * regroup + sync * min(1.0, sync / round_seconds) if round_seconds > 0 else 0.0)


def parse_faults(texts: Sequence[str], recovery: str, sites: Sequence[str]) -> Faults:
    """The faults that ``--mtbf`` flags give: ``12h`` for all sites, ``east=12h`` for one.

    Raises:
        UserError: a flag cannot be read or names no site.
    """
    between = seconds_by_site("--mtbf", texts, sites)
    return Faults(between=between, recovery_seconds=parse_seconds(recovery, f"--recovery {recovery}"))
