"""A newcomer that fetches the shared state before its first quorum."""

import re
import socket
import threading
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from torch.distributed import TCPStore
from torchft.manager import Manager

from tests.lighthouse_page import PATIENCE_SECONDS, page, wait_for_requests, wait_until
from tests.semi_sync.sites import in_background, lighthouse
from titan_ext.replica.membership.lighthouse_page import LighthousePage, Member
from titan_ext.replica.state_transfer.chunks import LATEST
from titan_ext.replica.state_transfer.prefetch_state import prefetch_state
from titan_ext.replica.state_transfer.transport import StateTransport
from titan_ext.replica.streams.group import StreamGroup
from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks

SECONDS = timedelta(seconds=20)


class Counting(StateTransport):
    """Counts what is fetched in quorums."""

    fetched = 0

    def _fetch(self, metadata, step, seconds):
        self.fetched += step != LATEST
        return super()._fetch(metadata, step, seconds)


@contextmanager
def site(url, name, transport=None):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = Manager(
        pg=StreamGroup("127.0.0.1", SECONDS),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=1,
        use_async_quorum=False,
        timeout=SECONDS,
        quorum_timeout=SECONDS,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=url,
        replica_id=name,
        hostname="127.0.0.1",
        checkpoint_transport=transport or Counting("127.0.0.1", 0, SECONDS),
    )
    try:
        yield own
    finally:
        own.shutdown(wait=False)


@contextmanager
def serving(content, port):
    """A web server on a port of one's choice that always answers the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = in_background(server.serve_forever)
        yield
        server.shutdown()
        thread.result(PATIENCE_SECONDS)


def outer_loop(own, value, name):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    outer = SemiSync.Config(method="diloco", sync_every=4).build(
        model_parts=[model], optimizers=[], manager=own, site=SiteOptions(name=name, ranks=SiteRanks(alone=True))
    )
    return model, outer


def step(own, model, outer):
    model.weight.data += 0.5
    outer.step()
    own._checkpoint_transport.offers.serve_snapshot_requests(own.current_step(), own._manager_state_dict)


@pytest.mark.parametrize("outdated", [False, True], ids=["still the latest", "outdated"])
def test_a_newcomer_needs_no_transfer_in_its_quorum_unless_the_member_moved_on(outdated):
    with lighthouse(1) as url, site(url, "site0") as member:
        model, outer = outer_loop(member, 1.0, "site0")
        outer.join()
        for _ in range(4):
            step(member, model, outer)
        transport = Counting("127.0.0.1", 0, SECONDS)
        asking = in_background(lambda: prefetch_state(url, site="site1", rank=0, fetch=transport.prefetch))
        while not asking.done():
            # The member is between two inner steps again and again; no round is due meanwhile.
            member._checkpoint_transport.offers.serve_snapshot_requests(
                member.current_step(), member._manager_state_dict
            )
        assert asking.result()
        if outdated:
            for _ in range(4):
                step(member, model, outer)
        with site(url, "site1", transport) as newcomer:
            results = {}

            def train(name, own, value):
                mine = (model, outer) if name == "site0" else outer_loop(own, value, name)
                if name == "site1":
                    mine[1].join()
                    results["step"] = mine[1].inner_step
                while mine[1].inner_step < 12:
                    step(own, *mine)
                results[name] = mine[1].shared_state_sha256()

            joining = in_background(train, "site1", newcomer, 9.0)
            wait_for_requests(url, 1)
            train("site0", member, 0.0)
            joining.result(PATIENCE_SECONDS)
    assert results["site0"] == results["site1"]
    assert results["step"] == (12 if outdated else 8)
    assert transport.fetched == outdated


def test_a_snapshot_is_not_what_the_member_goes_on_changing():
    with lighthouse(1) as url, site(url, "site0") as member:
        model, outer = outer_loop(member, 1.0, "site0")
        outer.join()
        step(member, model, outer)
        transport = Counting("127.0.0.1", 0, SECONDS)
        asking = in_background(transport.prefetch, member._checkpoint_transport.metadata())
        while not asking.done():
            member._checkpoint_transport.offers.serve_snapshot_requests(
                member.current_step(), member._manager_state_dict
            )
        asking.result()
        before = transport._prefetched["user"]["titan_ext"]["states"]["params/0"]["weight"]["global"].clone()
        for _ in range(3):
            step(member, model, outer)
        after = outer.global_parameters()["weight"]
        assert torch.equal(transport._prefetched["user"]["titan_ext"]["states"]["params/0"]["weight"]["global"], before)
        assert not torch.equal(after, before)
        assert member._checkpoint_transport.offers._snapshot is None  # forgotten at the commit
        transport.shutdown()


def test_without_anybody_who_trains_a_site_just_starts(caplog):
    def never(_):
        raise AssertionError("nobody to fetch from")

    with lighthouse(1) as url:
        assert not prefetch_state(url, site="site0", rank=0, fetch=never)
        with site(url, "site0") as member:
            _, outer = outer_loop(member, 1.0, "site0")
            outer.join()
            assert not prefetch_state(url, site="site0", rank=0, fetch=never)  # that was this site itself
            transport = Counting("127.0.0.1", 0, SECONDS)
            caplog.set_level("INFO")
            # A member that never stands between two inner steps, such as one that leads others, refuses at once.
            assert not prefetch_state(url, site="site1", rank=0, fetch=transport.prefetch)
            assert "no snapshot of the shared state from site site0" in caplog.text
            transport.shutdown()


def test_a_site_that_the_last_quorum_was_with_fetches_nothing():
    with lighthouse(1) as url, site(url, "site0") as member:
        _, outer = outer_loop(member, 1.0, "site0")
        outer.join()
        (identity,) = re.findall(r"<b>(site0:[0-9a-f-]{36})</b>", page(url))
        addresses = []
        # Whoever was not there fetches, also a process that has been in an earlier one.
        assert not prefetch_state(url, site="site1", rank=0, fetch=addresses.append, replica_id=identity)
        assert addresses == []
        assert prefetch_state(url, site="site1", rank=0, fetch=addresses.append, replica_id="site1:" + identity[6:])
        assert len(addresses) == 1


def test_the_nearest_are_asked_first(monkeypatch):
    members = [
        Member(name=name, identity="x", step=1, manager=f"at {name}", store="") for name in ("far", "near", "next")
    ]
    alive = LighthousePage(members, {f"{each.name}:x": 0.0 for each in members})
    monkeypatch.setattr("titan_ext.replica.state_transfer.prefetch_state.read_lighthouse_page", lambda _: alive)
    monkeypatch.setattr(
        "titan_ext.replica.state_transfer.prefetch_state.state_address", lambda manager, *_: manager.removeprefix("at ")
    )
    asked = []

    def refuse(name):
        asked.append(name)
        raise OSError("has none")

    assert not prefetch_state("", site="own", rank=0, fetch=refuse, nearest=["next", "near"])
    assert asked == ["next", "near", "far"]


def test_a_lighthouse_that_is_away_is_waited_for():
    with lighthouse(1) as url, site(url, "site0") as member:
        _, outer = outer_loop(member, 1.0, "site0")
        outer.join()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        away = f"http://127.0.0.1:{port}"
        assert not prefetch_state(away, site="site1", rank=0, fetch=lambda _: None)
        asking = in_background(
            lambda: prefetch_state(away, site="site1", rank=0, fetch=lambda _: None, seconds=PATIENCE_SECONDS)
        )
        with serving(page(url).encode(), port):
            assert asking.result(PATIENCE_SECONDS)


@pytest.mark.parametrize("asked_first", [True, False])
def test_a_member_in_a_quorum_keeps_nobody_waiting(asked_first):
    """Maybe it waits there for the very site that asks."""
    member, newcomer = (StateTransport("127.0.0.1", 0, SECONDS) for _ in range(2))
    member.offers.serve_snapshot_requests(3, dict)  # it does make snapshots
    if asked_first:
        asking = in_background(newcomer.prefetch, member.metadata())
        wait_until(lambda: member.offers._snapshot_wanted, "the request")
    with member.offers.in_quorum():
        if not asked_first:
            asking = in_background(newcomer.prefetch, member.metadata())
        with pytest.raises(OSError, match="404"):
            asking.result(PATIENCE_SECONDS)
    asking = in_background(newcomer.prefetch, member.metadata())
    while not asking.done():
        member.offers.serve_snapshot_requests(3, lambda: {"torchft": {"step": 3}})
    assert newcomer.recv_checkpoint(0, "nowhere", 3, SECONDS) == {"torchft": {"step": 3}}
    for each in (member, newcomer):
        each.shutdown()


def test_a_site_that_fell_behind_goes_on_from_the_members_step_not_from_that_of_its_snapshot():
    """The snapshot is some inner steps old when the round begins."""
    with lighthouse(2) as url, site(url, "site0") as ahead, site(url, "site1") as behind:
        meeting = threading.Barrier(2, timeout=PATIENCE_SECONDS)
        steps = []

        def one_step_after_a_round(own, name):
            model, outer = outer_loop(own, 1.0, name)
            outer.join()
            for _ in range(5):
                step(own, model, outer)
            meeting.wait()
            return model, outer

        def member():
            model, outer = one_step_after_a_round(ahead, "site0")
            while not fetched.is_set():
                ahead._checkpoint_transport.offers.serve_snapshot_requests(
                    ahead.current_step(), ahead._manager_state_dict
                )
            while outer.inner_step < 16:
                step(ahead, model, outer)
            return outer.shared_state_sha256()

        def straggler():
            model, outer = one_step_after_a_round(behind, "site1")
            # As if it had missed the last round.
            behind.load_state_dict(behind.state_dict() | {"step": behind.current_step() - 1})
            behind._checkpoint_transport.prefetch(ahead._checkpoint_transport.metadata())
            fetched.set()
            before = behind._checkpoint_transport.fetched
            while outer.inner_step < 16:
                step(behind, model, outer)
                steps.append(outer.inner_step)
            assert behind._checkpoint_transport.fetched == before, "it had a snapshot"
            return outer.shared_state_sha256()

        fetched = threading.Event()
        digests = [each.result(PATIENCE_SECONDS) for each in (in_background(member), in_background(straggler))]
    assert digests[0] == digests[1]
    assert steps == [*range(6, 17)]
