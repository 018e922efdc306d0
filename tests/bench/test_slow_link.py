"""A link so slow that one exchange outlasts the lighthouse's patience several times: the run goes on."""

import pytest

from titan_ext.bench.sync_sites import Lighthouse, SyncSite
from titan_ext.bench.workers import WorkerGroup
from titan_ext.links.namespaces import Wan, missing

SITES = 2
PARAMETERS = 7e6
HEARTBEAT_TIMEOUT_SECONDS = 5.0
"""torchft's own, which the lighthouse has."""


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")
def test_a_slow_exchange_starves_neither_heartbeats_nor_quorum() -> None:
    with Wan(SITES, 10.0) as wan, WorkerGroup(Lighthouse, [(SITES,)], [wan.hub]) as lighthouse:
        url = f"http://{wan.hub_address}:{lighthouse.call('port')[0]}"
        arguments = [("fp32", site, SITES, url, PARAMETERS, 1) for site in range(SITES)]
        with WorkerGroup(SyncSite, arguments, wan.sites) as workers:
            # A round that is not committed at once is an error of the site.
            rounds = [workers.call("round") for _ in range(2)]
    for results in rounds:
        assert len({result["checksum"] for result in results}) == 1
        for result in results:
            assert result["bytes"] > 4 * 0.9 * PARAMETERS, "a site was alone"
            assert result["reduce"] > 2 * HEARTBEAT_TIMEOUT_SECONDS, "the link is not slow"
