"""Sites of one process in virtual time, with the lab's lighthouse and network: who is how late is exact, and costs nothing."""

from collections.abc import Callable
from typing import Any

import torch

from titan_ext.lab.lighthouse import Lighthouse, Member, Quorum
from titan_ext.lab.manager import LabManager
from titan_ext.lab.messages import Group
from titan_ext.lab.network import Network
from titan_ext.lab.rehearsal import _InFlight
from titan_ext.lab.simulation import Simulation
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import Transport
from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks
from titan_ext.semi_sync.round.clock import Clock


class TwoLayers(torch.nn.Module):
    """Two fragments' worth of parameters, all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(2))
        for each in self.parameters():
            each.data.zero_()


class VirtualSites:
    """Sites that act one after the other, each on a thread of its own.

    Args:
        count: how many they are.
        min_sites: that a round needs.
        join_seconds: for which a round waits for one that is alive.
        heartbeat_seconds: after which one that is gone is forgotten.
    """

    def __init__(self, count: int, *, min_sites: int, join_seconds: float, heartbeat_seconds: float = 5.0) -> None:
        self.simulation, self.join_seconds = Simulation(), join_seconds
        names = [f"site{site}" for site in range(count)]
        self.network = Network(self.simulation, Links.alike(names, Link(1e12)), Transport())
        self.lighthouse = Lighthouse(
            self.simulation,
            self.network,
            min_sites=min_sites,
            expected_sites=count,
            heartbeat_interval_seconds=heartbeat_seconds / 10,
            heartbeat_timeout_seconds=heartbeat_seconds,
            join_timeout_seconds=join_seconds,
            formed=self._formed,
        )
        self.managers = [
            LabManager(
                self.simulation, self.network, self.lighthouse, Member(site, name), min_sites=min_sites, scale=1.0
            )
            for site, name in enumerate(names)
        ]

    def sleep(self, seconds: float) -> None:
        """Let the calling site's time pass."""
        self.simulation.sleep(seconds)

    def outer_loop(
        self, site: int, model: Any, *, optimizer: Any = (), on_round: Any = None, **settings: Any
    ) -> SemiSync:
        """The outer loop of a site."""
        options = SiteOptions(
            name=f"site{site}",
            ranks=SiteRanks(alone=True),
            clock=Clock(lambda: self.simulation.now, self.simulation.sleep),
            make_in_flight=lambda: _InFlight(self.simulation, []),
            heartbeat_timeout_seconds=5.0,
            grace_seconds=self.join_seconds,
        )
        return SemiSync.Config(**settings).build(
            model_parts=[model], optimizers=optimizer, manager=self.managers[site], site=options, on_round=on_round
        )

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        """What ``body(site)`` returned at each site; one that has ended sends no heartbeats any more."""
        found: dict[int, Any] = {}

        def live(site: int) -> None:
            member = self.managers[site].member
            self.lighthouse.hear(member)
            found[site] = body(site)
            self.lighthouse.lose(member)

        for site in range(len(self.managers)):
            self.simulation.spawn(lambda site=site: live(site))
        self.simulation.run()
        self.simulation.close()
        return [found[site] for site in range(len(self.managers))]

    def _formed(self, quorum: Quorum) -> None:
        managers = [manager for member in quorum.members for manager in self.managers if manager.member is member]
        group = Group(self.simulation, self.network, [member.site for member in quorum.members], 1.0, 600.0)
        for manager in managers:
            manager.enter(group)
        furthest = max(managers, key=lambda manager: manager.step)
        for manager in managers:
            if manager.step < furthest.step:
                manager.is_sent(furthest.member.site, furthest.step, furthest.shared_state())
