"""Who heals whom among the admitted sites, and what is left in a site's store."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer, ManagerClient, ManagerServer

from titan_ext.replica.membership.admission import Admission, AdmissionResult
from titan_ext.replica.membership.admission_protocol import MemberInfo
from titan_ext.replica.membership.quorum import AdmittedQuorumClient, restrict_to_members
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.torchft_internals import QuorumResult

SECONDS = timedelta(seconds=20)
FIELDS = [name for name in dir(QuorumResult) if not name.startswith("_") and name != "quorum_id"]


def by_torchft(steps: list[int], ranks: int) -> dict[tuple[int, int], QuorumResult]:
    """What torchft's servers say to each rank of sites at ``steps``."""
    lighthouse = LighthouseServer("127.0.0.1:0", len(steps), join_timeout_ms=20_000, quorum_tick_ms=20)
    with ExitStack() as stack, ThreadPoolExecutor(len(steps) * ranks) as pool:
        stack.callback(lighthouse.shutdown)
        asked = {}
        for site, step in enumerate(steps):
            server = ManagerServer(
                replica_id=f"{site}",
                lighthouse_addr=lighthouse.address(),
                hostname="127.0.0.1",
                bind="127.0.0.1:0",
                store_addr=f"store{site}",
                world_size=ranks,
                heartbeat_interval=timedelta(milliseconds=100),
                connect_timeout=SECONDS,
                quorum_retries=0,
            )
            stack.callback(server.shutdown)
            for rank in range(ranks):
                request = dict(group_rank=rank, step=step, checkpoint_metadata="", shrink_only=False, init_sync=True)
                client = ManagerClient(server.address(), connect_timeout=SECONDS)
                asked[site, rank] = pool.submit(client._quorum, **request, timeout=SECONDS, commit_failures=0)
        return {key: each.result(60) for key, each in asked.items()}


@pytest.mark.parametrize("steps", [[0], [0, 0, 0], [4, 4], [4, 2, 4], [1, 7, 3, 7, 1]])
def test_with_everybody_admitted_all_is_as_torchft_has_it(steps):
    ranks = 2
    theirs = by_torchft(steps, ranks)
    managers = manager_addresses(theirs)
    members = [
        MemberInfo(
            nonce="",
            replica_id=str(site),
            step=step,
            store=f"store{site}",
            manager=managers.get(site, ""),
            was_admitted=True,
        )
        for site, step in enumerate(steps)
    ]
    for (site, rank), wanted in theirs.items():
        restricted = QuorumResult()
        restrict_to_members(restricted, members, site, rank, init_sync=True)
        assert {name: getattr(restricted, name) for name in FIELDS} == {name: getattr(wanted, name) for name in FIELDS}


def test_whoever_is_behind_takes_the_state_from_the_nearest():
    regions = ["us/tx", "eu/de", "eu/fr", "eu/de", "us/ny", ""]
    steps = [4, 4, 4, 2, 2, 2]
    members = [
        MemberInfo(
            nonce="", replica_id=str(site), step=step, store="s", manager=f"m{site}", was_admitted=True, region=region
        )
        for site, (step, region) in enumerate(zip(steps, regions, strict=True))
    ]
    found, given = {}, {}
    for site in range(len(members)):
        quorum = QuorumResult()
        restrict_to_members(quorum, members, site, 0, init_sync=True)
        found[site] = quorum.recover_src_replica_rank
        given[site] = quorum.recover_dst_replica_ranks
    assert [found[site] for site in (3, 4)] == [1, 0]
    assert found[5] in (0, 1, 2) and 3 in given[1] and 4 in given[0] and 5 in given[found[5]]


def manager_addresses(results: dict[tuple[int, int], QuorumResult]) -> dict[int, str]:
    return {each.recover_src_replica_rank: each.recover_src_manager_address for each in results.values() if each.heal}


def quorum_of(sites: list[Admission], number: int, own: int, store: str) -> QuorumResult:
    quorum = QuorumResult()
    quorum.quorum_id, quorum.replica_rank = number, own
    quorum.replica_ids = [f"{site}:x" for site in range(len(sites))]
    quorum.store_address = store
    return quorum


def test_stores_do_not_fill_up_over_many_quorums():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("of somebody else", "1")
    address = f"127.0.0.1:{store.port}"
    admissions = [
        Admission(
            TCPStore("127.0.0.1", store.port),
            store_address=address,
            manager_address="",
            secret=Secret(b"the secret of this run"),
            min_sites=2,
            seconds=60.0,
        )
        for _ in range(2)
    ]
    counts = []
    with ThreadPoolExecutor(2) as pool:
        for number in range(12):
            quorums = [quorum_of(admissions, number, own, address) for own in range(2)]
            asked = [
                pool.submit(admission.decide, quorum, 3) for admission, quorum in zip(admissions, quorums, strict=True)
            ]
            first, second = (each.result(60) for each in asked)
            assert first.group_id == second.group_id and (first.own_rank, second.own_rank) == (0, 1)
            store.set(f"torchft/{first.group_id}/0/0/rank", "an address")
            counts.append(len(store.list_keys()))
    assert max(counts[2:]) == counts[2]
    assert store.check(["of somebody else"])


def test_results_reach_the_other_ranks_whole():
    info = MemberInfo(nonce="n", replica_id="a:1", step=2**40, store="a:1", manager="http://a:2", was_admitted=True)
    result = AdmissionResult(members=[info, info], group_id=2**55, own_rank=1, problem="p", is_final=True)
    assert AdmissionResult.from_json(result.to_json()) == result


class Server:
    """A client of a manager server that finds one quorum and votes as it is asked to."""

    def quorum(self, **request):
        quorum = QuorumResult()
        quorum.quorum_id, quorum.replica_rank, quorum.replica_ids = 5, 1, ["east:x", "west:y"]
        return quorum

    def should_commit(self, group_rank, step, should_commit, timeout):
        return should_commit


class Admitting:
    def decide(self, quorum, step):
        members = [
            MemberInfo(nonce="", replica_id=each, step=step, store="s", manager="m", was_admitted=True)
            for each in quorum.replica_ids
        ]
        return AdmissionResult(members=members, group_id=9, own_rank=quorum.replica_rank)


def test_a_site_prefetches_where_the_others_may_have_gone_on_without_it(monkeypatch):
    asked = []
    quorums = AdmittedQuorumClient(
        Server(),
        ranks=1,
        store=None,
        admission=Admitting(),
        min_sites=1,
        abort_group=lambda: None,
        prefetch=lambda **given: asked.append(given),
    )

    def quorum_and_vote(vote):
        quorums.quorum(group_rank=0, step=3, timeout=SECONDS, init_sync=True)
        quorums.should_commit(0, 3, vote, SECONDS)
        return len(asked)

    assert [quorum_and_vote(vote) for vote in (True, False, False, True, True)] == [0, 0, 1, 2, 2]
    assert asked == [{"replica_id": "west:y", "seconds": 20.0}] * 2
    now = time.monotonic()
    # The second pause of 35 s is as usual; one of more than twice as long is not; pauses may be shorter.
    for pause, after in [(25, 2), (0, 2), (35, 3), (35, 3), (75, 4), (35, 4), (1, 4)]:
        now += pause
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        assert quorum_and_vote(True) == after
