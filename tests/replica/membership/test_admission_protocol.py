"""Which sites authenticate each other over a store that anybody may write to."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from titan_ext.replica.membership.admission_protocol import AdmissionProtocol, MemberInfo, MembershipDecision
from titan_ext.replica.membership.shared_secret import NO_SECRET, Secret, fresh_nonce

OURS, THEIRS = Secret(b"the secret of this run"), Secret(b"the secret of another")
NAMES = ["a:1", "b:2", "c:3"]
LONG = 20.0
"""Seconds that no site waits for, since all answer."""


def info(rank: int, **changes) -> MemberInfo:
    values = dict(
        nonce=fresh_nonce(), replica_id=NAMES[rank], step=3, store="a:1", manager="http://a:2", was_admitted=False
    )
    return MemberInfo(**values | changes)


@contextmanager
def store():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield lambda: PrefixStore("quorum", TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=30)))


def run_one(
    rank: int, at: TCPStore, secret: Secret, seconds: float = LONG, own: MemberInfo | None = None
) -> MembershipDecision:
    return AdmissionProtocol(at, own or info(rank), NAMES, secret).run(seconds)


def run_all(at, secrets: dict[int, Secret], seconds: dict[int, float] | None = None) -> dict[int, MembershipDecision]:
    """The decision that each site comes to, by its rank, all at once."""
    stores = {rank: at() for rank in secrets}  # before the clock runs: connecting can take seconds
    with ThreadPoolExecutor(len(secrets)) as pool:
        running = {
            rank: pool.submit(run_one, rank, stores[rank], secret, (seconds or {}).get(rank, LONG))
            for rank, secret in secrets.items()
        }
        return {rank: each.result(60) for rank, each in running.items()}


@pytest.mark.parametrize("secret", [OURS, NO_SECRET])
def test_holders_of_one_secret_make_one_group(secret):
    with store() as at:
        decisions = run_all(at, dict.fromkeys(range(3), secret))
    assert decisions[0] == decisions[1] == decisions[2]
    assert list(decisions[0].members) == [0, 1, 2]


@pytest.mark.parametrize("outsider", range(3))
@pytest.mark.parametrize("other", [THEIRS, NO_SECRET])
def test_the_holder_of_another_secret_is_left_out_without_waiting(outsider, other):
    with store() as at:
        decisions = run_all(at, {rank: other if rank == outsider else OURS for rank in range(3)})
    members = sorted(set(range(3)) - {outsider})
    assert decisions[members[0]] == decisions[members[1]]
    assert list(decisions[members[0]].members) == members
    assert list(decisions[outsider].members) == [outsider]


def test_the_silent_are_left_out_after_a_while():
    with store() as at:
        decisions = run_all(at, {0: OURS, 2: OURS}, {0: 1.0, 2: 1.0})
    assert decisions[0] == decisions[2]
    assert list(decisions[0].members) == [0, 2]


def test_those_silent_before_are_not_waited_for_as_long():
    with store() as at:
        started = time.monotonic()
        assert list(AdmissionProtocol(at(), info(0), NAMES[:2], OURS, NAMES[1:]).run(10.0).members) == [0]
        assert time.monotonic() - started >= 1.0


def test_groups_have_numbers_of_their_own():
    """Also where everything else repeats, and what the last quorum left is still there."""
    with store() as at:
        groups = [run_all(at, dict.fromkeys(range(3), OURS))[0].group_id for _ in range(5)]
    assert len(set(groups)) == 5


def test_who_comes_when_all_is_decided_gets_no_group_of_its_own():
    with store() as at:
        run_all(at, {0: OURS, 1: OURS}, {0: 0.5, 1: 0.5})
        with pytest.raises(RuntimeError, match="decided"):
            run_one(2, at(), OURS, 0.5)


def test_what_was_recorded_in_a_quorum_proves_nothing_in_the_next():
    with store() as at:
        run_all(at, dict.fromkeys(range(3), OURS))
        recorded = {key: at().get(key) for key in ("member/0", "member/1", "member/2")}
        for key in at().list_keys():
            at().delete_key(key)
        at().set("member/2", recorded["member/2"])
        decision = run_all(at, {0: OURS, 1: OURS}, {0: 1.0, 1: 1.0})[0]
    assert list(decision.members) == [0, 1]


def test_own_words_prove_nothing_when_they_come_back():
    """A site that answers with what it is sent: the proof covers the info of the site that gives it."""
    with store() as at, ThreadPoolExecutor(1) as pool:
        mirror = at()
        running = pool.submit(AdmissionProtocol(at(), info(0), NAMES[:2], OURS).run, LONG)
        mirror.wait(["member/0"])
        mine = info(1)
        mirror.set("member/1", json.dumps({"member": mine.to_json(), "proofs": {}}))
        while not (given := json.loads(mirror.get("member/0"))["proofs"]):
            pass
        nonce = json.loads(json.loads(mirror.get("member/0"))["member"])["nonce"]
        mirror.set("member/1", json.dumps({"member": mine.to_json(), "proofs": {"0": [nonce, given["1"][1]]}}))
        assert list(running.result(60).members) == [0]


def test_an_info_changed_on_the_way_does_not_authenticate():
    with store() as at:
        server = at()
        own = info(1)
        honest = AdmissionProtocol(server, own, NAMES[:2], OURS)
        honest._publish()
        victim = info(0)
        server.set("member/0", json.dumps({"member": victim.to_json(), "proofs": {}}))
        honest._read_members()
        entry = json.loads(server.get("member/1"))
        entry["member"] = json.dumps(json.loads(entry["member"]) | {"manager": "http://elsewhere:1"}, sort_keys=True)
        server.set("member/1", json.dumps(entry))
        protocol = AdmissionProtocol(server, victim, NAMES[:2], OURS)
        assert list(protocol.run(0.5).members) == [0]
        assert list(protocol.unauthenticated) == [1]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        "\x00\ufffd".encode(),
        b"null",
        b"[]",
        b'{"member": 1, "proofs": {}}',
        b'{"member": "{}", "proofs": []}',
        b'{"member": "{}", "proofs": {}, "members": 3, "proof": []}',
        json.dumps(
            {"member": info(1, nonce="\ud800", store="\ud800").to_json(), "proofs": {"0": ["", "\ud800"]}}
        ).encode(),
        b"[" * 100_000,
        b"x" * 2**21,
    ],
    ids=lambda junk: str(junk[:30]),
)
def test_junk_is_neither_an_info_nor_a_decision(junk):
    with store() as at:
        protocol = AdmissionProtocol(at(), info(0), NAMES, OURS)
        at().set("member/1", junk)
        at().set(protocol._decision_key, junk)
        assert 0 in protocol.run(0.3).members
