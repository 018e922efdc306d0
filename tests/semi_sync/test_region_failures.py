"""Sites of a tree that die: real processes, real kills, a real lighthouse. Two regions of two sites."""

import os
import signal
import time

import pytest
import torch

from tests.forkserver import forking
from tests.lighthouse_page import members, wait_for_heartbeats, wait_for_requests, wait_until
from tests.semi_sync.sites import lighthouse, outer_loop
from tests.semi_sync.test_failures import Treacherous, treacherous

_context = forking("tests.semi_sync.test_region_failures")

REGIONS = ["eu", "eu", "us", "us"]
RATES = (1.0, 10.0, 100.0, 1000.0)
"""What an inner step adds to every parameter, by site."""
STEPS = 28
_SECONDS = 2.0


class Faulty(Treacherous):
    """Kills itself when it has sent so many messages in its second round of all sites."""

    dies_at_message: int | None = None
    round_of_all = 0

    def sends(self) -> None:
        if self.dies_at_message is not None and self.round_of_all == 2 and self.messages >= self.dies_at_message:
            os.kill(os.getpid(), signal.SIGKILL)
        super().sends()


def site(index: int, address: str, dies: dict[int, int], results) -> None:
    """A site; ``dies`` says by site the message of its second round of all at which it dies."""
    torch.set_num_threads(1)
    own = treacherous(Faulty, f"site{index}", address, _SECONDS)
    wait_for_heartbeats(address, 2 if not dies else len(RATES))
    own.dies_at_message = dies.get(index)
    model = torch.nn.Linear(7, 5, bias=False)
    model.weight.data.zero_()
    records = []
    outer = outer_loop(
        model, [], own, method="diloco", sync_every=4, region_sync_every=2, topology="regions", on_round=records.append,
        name=f"site{index}", labels={"region": REGIONS[index]}, outlier_threshold=0.0,
    )  # fmt: skip
    outer.join()
    while outer.inner_step < STEPS:
        model.weight.data += RATES[index]
        if dies and outer.inner_step == 19:
            wait_for_requests(address, len(dies))
        own.round_of_all = outer.inner_step // 4 + 1 if outer.inner_step % 4 == 3 else 0
        outer.step()
        time.sleep(0.05)
    outer.finish()
    results.put(
        {
            "site": index,
            "values": sorted(set(model.weight.detach().flatten().tolist())),
            "sha256": outer.shared_state_sha256(),
            "rounds": [(each.step, each.sites, each.committed, each.healed) for each in records],
        }
    )
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize(
    ("dies", "healed"),
    [
        pytest.param({0: 6}, {0}, id="the site that speaks, before the other region has its sum"),
        pytest.param({0: 7}, {0, 1}, id="the site that speaks, before its own region has the result"),
    ],
)
def test_the_others_go_on_and_who_died_comes_back(dies, healed):
    """After three statuses and three lines of weights the seventh message of site 0 is its region's sum, to site 2, and the
    eighth the result, to site 1, which has nobody left to take it from: the other region is a round further then."""
    results = _context.Queue()
    with lighthouse(2, heartbeat_timeout_ms=1000) as address:
        sites = [_context.Process(target=site, args=(index, address, dies, results)) for index in range(len(RATES))]
        for each in sites:
            each.start()
        try:
            for index in dies:
                sites[index].join(120)
                assert sites[index].exitcode == -signal.SIGKILL
            left = sorted(f"site{index}" for index in range(len(RATES)) if index not in dies)
            wait_until(lambda: members(address) == left, "the others to give it up")
            for index in dies:
                sites.append(_context.Process(target=site, args=(index, address, {}, results)))
                sites[-1].start()
            found = {}
            for _ in RATES:
                result = results.get(timeout=120)
                found[result["site"]] = result
        finally:
            for each in sites:
                each.kill()
                each.join()
    assert len({result["sha256"] for result in found.values()}) == 1
    for index, result in found.items():
        assert len(result["values"]) == 1, "a round is applied whole or not at all"
        last = result["rounds"][-1]
        assert last == (STEPS, 4, True, False), result["rounds"]
        assert any(each for *_, each in result["rounds"]) is (index in healed), result["rounds"]
    for index in set(found) - set(dies):
        of_all = [step for step, sites, committed, _ in found[index]["rounds"] if committed and sites < 4]
        assert of_all, "nobody waited for the dead"
        # Whoever lives loses no inner step: every step is in some committed round, at the latest the next one.
        assert {step for step, *_ in found[index]["rounds"]} >= set(range(20, STEPS + 1, 4))
    assert found[0]["values"] == found[1]["values"] == found[2]["values"] == found[3]["values"]
