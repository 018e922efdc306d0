"""Messages over an emulated long link that loses packets (root)."""

from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from titan_ext.bench.workers import WorkerGroup
from titan_ext.links.namespaces import Wan, address_of, missing
from titan_ext.replica.streams.distance import round_trip_seconds
from titan_ext.replica.streams.group import StreamGroup

RTT_MS, LOSS, SIZE, PORT = 60.0, 0.02, 3_000_000, 29_811


class End:
    """A site's end of an exchange."""

    def __init__(self, site: int) -> None:
        self._site = site
        self._store = TCPStore(address_of(0), PORT, is_master=site == 0, wait_for_workers=False)
        self._group = StreamGroup(address_of(site), timedelta(seconds=60))
        self._group.configure(f"{address_of(0)}:{PORT}/wan", "", site, 2)

    def exchange(self) -> dict[str, float]:
        contents = [torch.arange(site, site + SIZE) % 251 for site in range(2)]
        place = torch.empty_like(contents[0])
        works = [
            self._group.send([contents[self._site]], 1 - self._site, 0),
            self._group.recv([place], 1 - self._site, 0),
        ]
        for work in works:
            work.wait()
        (peer,) = self._group.connections._mover._peers.values()
        return {
            "whole": torch.equal(place, contents[1 - self._site]),
            "streams": len(peer.all_streams),
            "round_trip": min(round_trip_seconds(stream.socket) for stream in peer.all_streams),
            "sent": self._group.bytes_sent,
        }


@pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")
def test_messages_cross_a_long_link_that_loses_packets() -> None:
    with Wan(2, 1000.0, rtt_ms=RTT_MS, loss=LOSS) as wan, WorkerGroup(End, [(0,), (1,)], wan.sites) as ends:
        results = ends.call("exchange")
        carried = wan.bytes_sent()
    for result, frames in zip(results, carried, strict=True):
        assert result["whole"]
        assert result["streams"] > 2, "the distance asks for more"
        assert result["round_trip"] >= RTT_MS / 1000
        # The rest is the store's and the first packets of each connection.
        assert 0.97 * frames < result["sent"] <= frames
