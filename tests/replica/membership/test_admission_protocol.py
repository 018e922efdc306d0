"""Who admits whom over a store that anybody may write to."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from titan_ext.replica.membership.admission_protocol import Card, Meeting, Verdict
from titan_ext.replica.membership.shared_secret import NO_SECRET, Secret, fresh_nonce

OURS, THEIRS = Secret(b"the secret of this run"), Secret(b"the secret of another")
NAMES = ["a:1", "b:2", "c:3"]
LONG = 20.0
"""Seconds that no site waits for, since all answer."""


def card(place: int, **changes) -> Card:
    values = dict(nonce=fresh_nonce(), replica_id=NAMES[place], step=3, store="a:1", manager="http://a:2", met=False)
    return Card(**values | changes)


@contextmanager
def store():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield lambda: PrefixStore("meeting", TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=30)))


def attend(place: int, at: TCPStore, secret: Secret, seconds: float = LONG, own: Card | None = None) -> Verdict:
    return Meeting(at, own or card(place), NAMES, secret).hold(seconds)


def meet(at, secrets: dict[int, Secret], seconds: dict[int, float] | None = None) -> dict[int, Verdict]:
    """The verdict of each site by its place, all at once."""
    stores = {place: at() for place in secrets}  # before the clock runs: connecting can take seconds
    with ThreadPoolExecutor(len(secrets)) as pool:
        running = {
            place: pool.submit(attend, place, stores[place], secret, (seconds or {}).get(place, LONG))
            for place, secret in secrets.items()
        }
        return {place: each.result(60) for place, each in running.items()}


@pytest.mark.parametrize("secret", [OURS, NO_SECRET])
def test_holders_of_one_secret_make_one_group(secret):
    with store() as at:
        verdicts = meet(at, dict.fromkeys(range(3), secret))
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert list(verdicts[0].cards) == [0, 1, 2]


@pytest.mark.parametrize("stranger", range(3))
@pytest.mark.parametrize("other", [THEIRS, NO_SECRET])
def test_a_stranger_is_left_out_without_waiting(stranger, other):
    with store() as at:
        verdicts = meet(at, {place: other if place == stranger else OURS for place in range(3)})
    members = sorted(set(range(3)) - {stranger})
    assert verdicts[members[0]] == verdicts[members[1]]
    assert list(verdicts[members[0]].cards) == members
    assert list(verdicts[stranger].cards) == [stranger]


def test_the_silent_are_left_out_after_a_while():
    with store() as at:
        verdicts = meet(at, {0: OURS, 2: OURS}, {0: 1.0, 2: 1.0})
    assert verdicts[0] == verdicts[2]
    assert list(verdicts[0].cards) == [0, 2]


def test_those_silent_before_are_not_waited_for_as_long():
    with store() as at:
        started = time.monotonic()
        assert list(Meeting(at(), card(0), NAMES[:2], OURS, NAMES[1:]).hold(10.0).cards) == [0]
        assert time.monotonic() - started >= 1.0


def test_groups_have_numbers_of_their_own():
    """Also where everything else repeats, and what the last meeting left is still there."""
    with store() as at:
        groups = [meet(at, dict.fromkeys(range(3), OURS))[0].group for _ in range(5)]
    assert len(set(groups)) == 5


def test_who_comes_when_all_is_decided_gets_no_group_of_its_own():
    with store() as at:
        meet(at, {0: OURS, 1: OURS}, {0: 0.5, 1: 0.5})
        with pytest.raises(RuntimeError, match="decided"):
            attend(2, at(), OURS, 0.5)


def test_what_was_recorded_at_a_meeting_proves_nothing_at_the_next():
    with store() as at:
        meet(at, dict.fromkeys(range(3), OURS))
        recorded = {key: at().get(key) for key in ("card/0", "card/1", "card/2")}
        for key in at().list_keys():
            at().delete_key(key)
        at().set("card/2", recorded["card/2"])
        verdict = meet(at, {0: OURS, 1: OURS}, {0: 1.0, 1: 1.0})[0]
    assert list(verdict.cards) == [0, 1]


def test_own_words_prove_nothing_when_they_come_back():
    """A site that answers with what it is sent: the proof is about the card of who gives it."""
    with store() as at, ThreadPoolExecutor(1) as pool:
        mirror = at()
        running = pool.submit(Meeting(at(), card(0), NAMES[:2], OURS).hold, LONG)
        mirror.wait(["card/0"])
        mine = card(1)
        mirror.set("card/1", json.dumps({"card": mine.text(), "answers": {}}))
        while not (given := json.loads(mirror.get("card/0"))["answers"]):
            pass
        nonce = json.loads(json.loads(mirror.get("card/0"))["card"])["nonce"]
        mirror.set("card/1", json.dumps({"card": mine.text(), "answers": {"0": [nonce, given["1"][1]]}}))
        assert list(running.result(60).cards) == [0]


def test_a_card_changed_on_the_way_is_that_of_a_stranger():
    with store() as at:
        server = at()
        own = card(1)
        honest = Meeting(server, own, NAMES[:2], OURS)
        honest._post()
        victim = card(0)
        server.set("card/0", json.dumps({"card": victim.text(), "answers": {}}))
        honest._hear()
        posted = json.loads(server.get("card/1"))
        posted["card"] = json.dumps(json.loads(posted["card"]) | {"manager": "http://elsewhere:1"}, sort_keys=True)
        server.set("card/1", json.dumps(posted))
        verdict = Meeting(server, victim, NAMES[:2], OURS)
        assert list(verdict.hold(0.5).cards) == [0]
        assert list(verdict.strangers) == [1]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        "\x00\ufffd".encode(),
        b"null",
        b"[]",
        b'{"card": 1, "answers": {}}',
        b'{"card": "{}", "answers": []}',
        b'{"card": "{}", "answers": {}, "cards": 3, "proof": []}',
        json.dumps({"card": card(1, nonce="\ud800", store="\ud800").text(), "answers": {"0": ["", "\ud800"]}}).encode(),
        b"[" * 100_000,
        b"x" * 2**21,
    ],
    ids=lambda junk: str(junk[:30]),
)
def test_junk_is_no_card_and_no_verdict(junk):
    with store() as at:
        meeting = Meeting(at(), card(0), NAMES, OURS)
        at().set("card/1", junk)
        at().set(meeting._verdict_key, junk)
        assert 0 in meeting.hold(0.3).cards
