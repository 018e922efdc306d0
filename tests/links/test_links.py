"""Links as users write them, and what TCP makes of them."""

from dataclasses import replace

import pytest

from titan_ext.errors import UserError
from titan_ext.links.link import Link, Links, parse_link, parse_links
from titan_ext.links.tcp import Connection, Transport, cold_seconds, connection_rate

PAYLOAD = 1448 / 1514


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("1gbit,80ms", Link(1e9, 0.08)),
        ("200mbit,40ms,0.1%", Link(2e8, 0.04, 0.001)),
        ("2.5Gbit", Link(2.5e9)),
        (" 50mbit , 0.1s ", Link(5e7, 0.1)),
    ],
)
def test_a_link(text: str, link: Link) -> None:
    assert parse_link(text) == link


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "''"),
        ("1", "'1': must be a rate"),
        ("1gb,80ms", "did you mean 'gbit'"),
        ("0mbit", "above 0"),
        ("1gbit,80", "'80': must be a time"),
        ("1gbit,80ms,0.1", "'0.1': must be a loss"),
        ("1gbit,80ms,100%", "below 100%"),
        ("1gbit,80ms,0%,1", "RATE"),
        ("-1gbit", "'-1gbit': must be a rate"),
    ],
)
def test_what_is_no_link(text: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_link(text)
    assert told in str(refused.value) and "--link" in str(refused.value)


def test_pairs_of_sites_whose_names_have_hyphens() -> None:
    links = parse_links(["us-east-eu=1gbit", "100mbit,50ms"], ["us-east", "eu", "asia"])
    assert links.between(0, 1) == links.between(1, 0) == Link(1e9)
    assert links.between(0, 2) == links.between(1, 2) == Link(1e8, 0.05)
    assert links.port_rate(2) == 1e8 and links.port_rate(0) == 1e9
    assert links.all() == [Link(1e9), Link(1e8, 0.05), Link(1e8, 0.05)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["a-b=1gbit"], "none for a-c"),
        (["a-d=1gbit"], "a, b, c"),
        (["a-a=1gbit"], "a, b, c"),
        (["1gbit", "2gbit"], "already"),
        (["a-b=1gbit", "b-a=2gbit", "1gbit"], "already"),
    ],
)
def test_flags_that_do_not_give_every_pair_one_link(flags: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_links(flags, ["a", "b", "c"])


def test_a_connection_carries_what_link_window_and_loss_allow() -> None:
    one = Transport(window_bytes=2**20, streams=1)
    assert connection_rate(Link(8e6), one) == pytest.approx(1e6 * PAYLOAD)
    assert connection_rate(Link(8e9, 0.1), one) == pytest.approx(2**20 / 0.1)
    assert connection_rate(Link(8e9, 0.1), Transport(window_bytes=2**20, streams=4)) == pytest.approx(4 * 2**20 / 0.1)
    assert connection_rate(Link(8e9, 0.1), one, connections=3) == pytest.approx(3 * 2**20 / 0.1)
    assert connection_rate(Link(8e9, 0.1), replace(one, max_rate=1e6)) == 1e6
    # By distance, as the sites' connections: one for each MiB under way at 1 Gbit/s, shared among the peers.
    by_distance = [connection_rate(Link(8e9, 0.08), replace(one, streams=0, peers=peers)) for peers in (1, 2)]
    assert by_distance == pytest.approx([10 * 2**20 / 0.08, 5 * 2**20 / 0.08])
    # Reno's sqrt(3 / 2p) segments a round trip, where that is more than CUBIC's.
    assert connection_rate(Link(8e9, 0.01, 0.01), one) == pytest.approx(1448 * (1.5 / 0.01) ** 0.5 / 0.01)


def test_slow_start_doubles_a_window_each_round_trip_and_is_over_while_the_connection_is_used() -> None:
    link, ten = Link(8e8, 0.1), Transport(window_bytes=2**30, streams=1)
    connection = Connection(link, ten)
    # 10, 20, 40 segments in three round trips, the last 10 at the link's rate.
    assert connection.seconds_to_send(80 * 1448, 0.0) == pytest.approx(0.3 + 10 * 1448 / (1e8 * PAYLOAD))
    full = 50e6
    slow = connection.seconds_to_send(full, 0.4)
    fast = connection.seconds_to_send(full, 0.4 + slow)
    assert fast == pytest.approx(full / (1e8 * PAYLOAD)) and slow > fast
    assert connection.seconds_to_send(full, 100.0) == pytest.approx(cold_seconds(full, link, ten))


def test_one_link_for_all() -> None:
    links = Links.alike(["a", "b"], Link(1e9, 0.01))
    assert links.describe() == "1 Gbit/s, 10 ms between all sites"
