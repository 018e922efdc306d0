"""What the shaper makes of bytes, against arithmetic, on a clock that is no more than a number."""

import heapq

import pytest

from titan_ext.lab.real_time.shaping import Flow, Shaper
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import FIRST_WINDOW, PAYLOAD_SHARE, Transport, cold_seconds, connection_rate


def shaper(*links: Link, **options: object) -> Shaper:
    """Two sites, or three whose first one has a link of its own to each other."""
    if len(links) == 1:
        return Shaper(Links.alike(["east", "west"], links[0]), **options)
    pairs = {frozenset(("east", name)): link for name, link in zip(("west", "north"), links, strict=True)}
    return Shaper(Links(["east", "west", "north"], pairs, links[0]), **options)


def push(flows: list[Flow], sizes: list[int], now: float = 0.0) -> list[float]:
    """Send as fast as the flows allow; when the last byte of each is there, with a receiver that takes all at once."""
    left, arrived = list(sizes), [now] * len(flows)
    events = [(now, place, 0) for place in range(len(flows))]
    while events:
        now, place, size = heapq.heappop(events)
        flow = flows[place]
        if size:
            flow.acknowledged(size, now)
        while left[place] and (room := min(left[place], flow.room(now))):
            left[place] -= room
            arrived[place] = flow.send(room, now)
            heapq.heappush(events, (arrived[place] + flow.link.rtt / 2, place, room))
        if left[place] and (queued := flow.seconds_to_room(now)):
            heapq.heappush(events, (now + queued, place, 0))
    return arrived


@pytest.mark.parametrize("rtt", [0.0, 0.04, 0.2])
def test_a_message_that_fits_into_a_packet_takes_its_bytes_and_half_a_round_trip(rtt: float) -> None:
    (arrived,) = push([shaper(Link(10e6, rtt)).flow(0, 1)], [1000])
    assert arrived == pytest.approx(1000 * 8 / 10e6 / PAYLOAD_SHARE + rtt / 2)


@pytest.mark.parametrize("rate", [10e6, 200e6, 1e9])
@pytest.mark.parametrize("rtt", [0.0, 0.04, 0.2])
def test_a_cold_connection_takes_as_long_as_by_the_formula(rate: float, rtt: float) -> None:
    link, size = Link(rate, rtt), 5_000_000
    (arrived,) = push([shaper(link).flow(0, 1)], [size])
    transport = Transport(streams=1)
    assert 0.999 * size / connection_rate(link, transport) < arrived
    assert arrived - rtt / 2 == pytest.approx(cold_seconds(size, link, transport), rel=0.15)


def test_connections_share_a_link_and_a_control_message_waits_for_little_more_than_the_queue() -> None:
    link = Link(10e6, 0.1)
    lines = shaper(link)
    bulk = [lines.flow(0, 1) for _ in range(4)]
    arrived = push(bulk, [1_000_000] * 4)
    assert 4e6 * 8 / 10e6 / PAYLOAD_SHARE < max(arrived) < 1.3 * 4e6 * 8 / 10e6 / PAYLOAD_SHARE
    again = push(bulk, [1_000_000] * 4, now=60.0)
    assert max(again) > 60 + min(arrived)
    lines = shaper(link)
    for _ in range(100):
        flow = lines.flow(0, 1)
        if room := flow.room(0.0):
            flow.send(room, 0.0)
    assert lines.queued_seconds(0, 1, 0.0) < 0.12


def test_a_slow_or_broken_link_does_not_hold_up_the_interface_for_another_one() -> None:
    lines = shaper(Link(1e6, 0.01), Link(100e6, 0.01))
    slow, fast = push([lines.flow(0, 1), lines.flow(0, 2)], [1_000_000, 1_000_000])
    assert slow > 8.0 and fast < 0.5
    lines.partition((0, 1), until=1000.0)
    held, fast = push([lines.flow(0, 1), lines.flow(0, 2)], [1000, 1_000_000], now=900.0)
    assert 1000 < held < 1200 and fast < 900.5


def test_a_pause_makes_the_window_small_again_and_a_window_limits_the_rate() -> None:
    link = Link(1e9, 0.1)
    flow = shaper(link, transport=Transport(window_bytes=500_000)).flow(0, 1)
    (arrived,) = push([flow], [20_000_000])
    assert arrived > 20e6 / (500_000 / 0.1)
    assert flow.window == 500_000
    assert flow.room(arrived + 0.01) > FIRST_WINDOW
    flow.room(arrived + 1.0)  # three time-outs of 0.3 s after the last byte has left
    assert flow.window == 500_000 / 8
    flow.room(arrived + 60.0)
    assert flow.window == FIRST_WINDOW


def test_a_pause_is_long_by_the_round_trip_that_waiting_before_the_link_makes_longer() -> None:
    """As of TCP's own time-out, which is of the smoothed round trip."""
    windows = []
    for rate in (1e9, 50e6):  # on the slow link bytes wait for 0.1 s
        flow = shaper(Link(rate, 0.1), transport=Transport(window_bytes=2_000_000)).flow(0, 1)
        (arrived,) = push([flow], [20_000_000])
        before = flow.window
        flow.room(arrived - 0.05 + 0.34)  # after the last byte has left
        windows.append(flow.window / before)
    assert windows == [0.5, 1.0]


def test_loss_holds_a_connection_to_about_cubics_window_and_a_seed_gives_one_run() -> None:
    link, size = Link(1e9, 0.04, 0.01), 10_000_000
    (one,), (same,), (other,) = (push([shaper(link, seed=seed).flow(0, 1)], [size]) for seed in (1, 1, 2))
    assert one == same != other
    usual = size / connection_rate(link, Transport(streams=1))
    assert usual / 2.5 < one < usual * 2.5


def test_the_lighthouse_is_as_far_as_the_nearest_site() -> None:
    lines = shaper(Link(1e6, 0.2), Link(100e6, 0.01))
    assert lines.link(0, lines.lighthouse) == Link(100e6, 0.01)
    assert lines.link(lines.lighthouse, 1) == Link(1e6, 0.2)
