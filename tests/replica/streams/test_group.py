"""Messages between sites over several connections, on real sockets."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp, TCPStore
from torch.distributed.distributed_c10d import AllreduceOptions

from titan_ext.replica.streams.distance import streams_for
from titan_ext.replica.streams.group import StreamGroup
from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.streams.transfer import CHUNK_BYTES, SMALL_BYTES

TIMEOUT = timedelta(seconds=20)


class Sites:
    """Groups of some sites, each on a thread of its own."""

    def __init__(self, count: int, **options: Any) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.groups = [StreamGroup("127.0.0.1", TIMEOUT, **options) for _ in range(count)]
        self.formed = 0

    def form(self, count: int | None = None) -> None:
        """The first ``count`` sites meet."""
        self.formed += 1
        address, count = f"127.0.0.1:{self.store.port}/group{self.formed}", count or len(self.groups)
        self.at_once(lambda site: self.groups[site].configure(address, f"site{site}", site, count), count)

    def at_once(self, action: Callable[[int], Any], count: int | None = None) -> list[Any]:
        with ThreadPoolExecutor(len(self.groups)) as pool:
            return list(pool.map(action, range(count or len(self.groups))))


@contextmanager
def sites(count: int, **options: Any) -> Iterator[Sites]:
    made = Sites(count, **options)
    try:
        made.form()
        yield made
    finally:
        for group in made.groups:
            group.abort()


def connections(group: StreamGroup) -> list[int]:
    return [len(peer.all_streams) for peer in group.connections._mover._peers.values()]


SIZES = [0, 1, SMALL_BYTES, SMALL_BYTES + 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17, 2_000_003]


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_messages_of_every_size_arrive_whole_whatever_their_order(streams: int) -> None:
    def content(sender: int, receiver: int, tag: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * sender + 10 * receiver + tag)
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)

    def act(site: int) -> None:
        group, others = made.groups[site], [other for other in range(3) if other != site]
        sent = [
            group.send([content(site, other, tag, size)], other, tag)
            for other in others
            for tag, size in enumerate(SIZES)
        ]
        received = {}
        for tag in reversed(range(len(SIZES))):  # not in the order in which they were sent
            for other in others:
                received[other, tag] = torch.empty(SIZES[tag], dtype=torch.uint8)
                sent.append(group.recv([received[other, tag]], other, tag))
        for work in sent:
            work.wait()
        for (other, tag), place in received.items():
            assert torch.equal(place, content(other, site, tag, SIZES[tag])), (site, other, tag)

    with sites(3, streams=streams) as made:
        assert connections(made.groups[0]) == [streams, streams]
        made.at_once(act)


def test_messages_of_one_tag_keep_their_order() -> None:
    with sites(2, streams=3) as made:
        first, second = made.groups
        works = [first.send([torch.full((50_000,), float(index))], 1, 7) for index in range(5)]
        for index in range(5):
            place = torch.empty(50_000)
            second.recv([place], 0, 7).wait()
            assert place.unique().tolist() == [index]
        for work in works:
            work.wait()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_sum_over_the_sites_has_the_same_bits_everywhere(count: int) -> None:
    def act(site: int) -> torch.Tensor:
        values = torch.randn(1000, generator=torch.Generator().manual_seed(site))
        made.groups[site].allreduce([values], AllreduceOptions()).wait()
        return values

    with sites(count) as made:
        found = made.at_once(act)
        assert all(torch.equal(each, found[0]) for each in found)
        want = sum(torch.randn(1000, generator=torch.Generator().manual_seed(site)) for site in range(count))
        torch.testing.assert_close(found[0], want)
        options = AllreduceOptions()
        options.reduceOp = ReduceOp.MAX
        with pytest.raises(RuntimeError, match="only sums"):
            made.groups[0].allreduce([torch.zeros(1)], options)


def test_a_site_that_ends_costs_the_others_what_waits_for_it_and_they_meet_again() -> None:
    def act(site: int) -> str:
        group, places = made.groups[site], [torch.empty(100_000) for _ in range(2)]
        if site == 2:
            group.send([places[0]], 0, 0).wait()  # but nothing to the other one
            group.abort()
            return ""
        works = [group.recv([place], peer, 0) for peer, place in zip((2, 1 - site), places)]
        with pytest.raises(RuntimeError) as caught:
            for work in works:  # the one of the two that 2 sent something waits for the other one in vain
                work.wait()
        return str(caught.value)

    with sites(3) as made:
        errors = made.at_once(act)
        assert "the connection to site #2 ended" in errors[1]
        assert "the connection to site #" in errors[0]
        with pytest.raises(RuntimeError, match="ended"):
            made.groups[0].send([torch.zeros(1)], 1, 0).wait()
        made.form(2)
        sums = made.at_once(lambda site: _sum(made.groups[site], site + 1.0), 2)
        assert sums == [3.0, 3.0]


def test_what_was_sent_before_the_end_is_still_read() -> None:
    with sites(2, streams=4) as made:
        content = torch.arange(500_000)
        place = torch.empty_like(content)
        receiving = made.groups[1].recv([place], 0, 0)
        made.groups[0].send([content], 1, 0).wait()
        receiving.wait()
        made.groups[0].abort()
        assert torch.equal(place, content)


def test_a_message_of_another_size_is_an_error() -> None:
    with sites(2) as made:
        made.groups[0].send([torch.zeros(10)], 1, 3)
        with pytest.raises(RuntimeError, match="site #0 sent a message of 40 bytes where 44 were expected"):
            made.groups[1].recv([torch.zeros(11)], 0, 3).wait()


def test_a_message_that_takes_too_long_is_an_error_at_both() -> None:
    with sites(2) as made:
        waiting = made.groups[0].recv([torch.zeros(1)], 1, 1)
        with pytest.raises(RuntimeError, match=r"took more than 0\.01 s"):
            made.groups[1].recv([torch.zeros(1)], 0, 0).wait(timedelta(seconds=0.01))
        with pytest.raises(RuntimeError, match="ended"):
            waiting.wait()


def test_control_does_not_wait_for_bulk_nor_for_the_rate() -> None:
    with sites(2, streams=1, pace=Pace(200_000.0)) as made:
        bulk = torch.zeros(2_000_000, dtype=torch.uint8)
        sending = made.groups[0].send([bulk], 1, 0)
        receiving = made.groups[1].recv([torch.empty_like(bulk)], 0, 0)
        assert made.at_once(lambda site: _sum(made.groups[site], 1.0)) == [2.0, 2.0]
        assert not sending.is_completed() and not receiving.is_completed()


def test_the_larger_of_two_numbers_of_connections_counts() -> None:
    with sites(2) as made:
        made.groups[0]._streams, made.groups[1]._streams = 3, 5
        made.form()
        assert [connections(group) for group in made.groups] == [[5], [5]]


def test_strangers_are_not_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_ext.replica.streams import rendezvous

    listen = rendezvous._listen

    def listen_with_strangers(hostname: str) -> socket.socket:
        server = listen(hostname)
        for said in (b"GET / HTTP/1.1\r\n\r\n".ljust(28), b""):
            stranger = socket.create_connection(server.getsockname()[:2])
            stranger.sendall(said)
            threading.Timer(0.2, stranger.close).start()
        return server

    monkeypatch.setattr(rendezvous, "_listen", listen_with_strangers)
    with sites(2, streams=2) as made:
        assert made.at_once(lambda site: _sum(made.groups[site], 1.0)) == [2.0, 2.0]
        assert connections(made.groups[0]) == [2]


def test_the_kernel_tells_the_bytes_on_the_wire() -> None:
    with sites(2) as made:
        before = made.groups[0].bytes_sent
        content = torch.zeros(1_000_000, dtype=torch.uint8)
        sending = made.groups[0].send([content], 1, 0)
        made.groups[1].recv([torch.empty_like(content)], 0, 0).wait()
        sending.wait()
        assert 1_000_000 < made.groups[0].bytes_sent - before < 1_200_000


def test_more_connections_for_more_distance() -> None:
    counts = [streams_for(seconds) for seconds in (0.0, 0.001, 0.02, 0.04, 0.08, 0.15, 1.0)]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == 16
    assert [streams_for(0.08, peers) for peers in (1, 3, 9)] == [10, 4, 2], "the link is shared by all of them"
    assert counts[4] * 2**20 >= 0.08 * 125e6, "enough under way for 1 Gbit/s at 80 ms"


def test_a_pace_lets_a_rate_through() -> None:
    now = [0.0]
    pace = Pace(1000.0, burst_seconds=0.1, clock=lambda: now[0])
    sent = 0
    while now[0] < 10.0:
        wait = pace.seconds_to_wait()
        if wait:
            now[0] += wait
        else:
            pace.spend(128)
            sent += 128
    assert sent == pytest.approx(10_000 + 100, abs=256)
    assert Pace(0.0).seconds_to_wait() == 0.0


def _sum(group: StreamGroup, value: float) -> float:
    values = torch.tensor([value])
    group.allreduce([values], AllreduceOptions()).wait()
    return values.item()
