"""A wide-area network on one machine: network namespaces behind links of a limited rate, as long as one wants (Linux, root).

No namespace has a name. Each lives as long as the process that holds it, which ends with this one, and
the kernel takes the links along: nothing is left behind, however a benchmark ends.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from titan_ext.errors import RunError
from titan_ext.launcher.processes import die_with_parent
from titan_ext.links.link import Link

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_TOOLS = ("ip", "tc", "unshare", "nsenter")
LINK = "wan0"
SUBNET = "10.77.0"
_HUB_HOST = 254
HUB = f"{SUBNET}.{_HUB_HOST}"
HUB_PLACE = -1
"""The hub among the places of sites."""


@cache
def missing() -> str | None:
    """Why there can be no such network here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} here (ip and tc are in iproute2, the others in util-linux)"
    try:
        with Wan(1, 100.0):
            return None
    except RunError as error:
        return str(error)


class Wan:
    """Sites in namespaces of their own, joined by a bridge; what each sends is held to a rate.

    Args:
        sites: how many.
        rate_mbit: each site's rate of sending, in 10**6 bits a second, counted from the Ethernet header on (from the
            Internet header on where there is distance or loss).
        rtt_ms: round-trip time between two sites, and between a site and the hub.
        loss: share of the segments that never arrive.
        down_mbit: each site's rate of receiving; 0: no limit.
        rates_mbit: rates of sending that differ from ``rate_mbit``, by site.
        congestion_control: of the sites' TCP, such as ``reno``; None: this machine's.
        links: what lies between two sites, or a site and the ``HUB_PLACE``, where that is something else.

    Raises:
        RunError: the system refuses a part of it.
    """

    hub_address = HUB
    """Numeric address of the hub, for a lighthouse."""

    def __init__(
        self,
        sites: int,
        rate_mbit: float,
        *,
        rtt_ms: float = 0.0,
        loss: float = 0.0,
        down_mbit: float = 0.0,
        rates_mbit: Mapping[int, float] | None = None,
        congestion_control: str | None = None,
        links: Mapping[tuple[int, int], Link] | None = None,
    ) -> None:
        self._holders: list[subprocess.Popen] = []
        self._router: subprocess.Popen | None = None
        self._asking = threading.Lock()
        try:
            self.hub = self._hold()
            self.sites = [self._hold() for _ in range(sites)]
            if rtt_ms or loss or down_mbit or links:
                self._route(rtt_ms, loss, down_mbit, links or {})
            else:
                self._bridge()
            for index, site in enumerate(self.sites):
                if congestion_control is not None:
                    setting = f"echo {congestion_control} > /proc/sys/net/ipv4/tcp_congestion_control"
                    self._inside(site, "sh", "-c", setting)
                self._limit(site, (rates_mbit or {}).get(index, rate_mbit))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Wan":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bytes_sent(self) -> list[int]:
        """What each site has put on its link so far, in bytes of frames, headers included."""
        if self._router is None:
            return [_bytes_sent(pid) for pid in self.sites]
        sent = self._ask_router("")
        return [sent[str(_host(index))] for index in range(len(self.sites))]

    def cut(self, pair: Sequence[int], seconds: float) -> None:
        """Nothing passes between two sites for so long; there must be distance, loss or links."""
        self._ask_router(json.dumps({"ends": [_host(place) for place in pair], "seconds": seconds}))

    def _ask_router(self, line: str) -> dict[str, int]:
        with self._asking:
            self._router.stdin.write(f"{line}\n")
            self._router.stdin.flush()
            answer: dict[str, int] = json.loads(self._router.stdout.readline())
        return answer

    def close(self) -> None:
        """Take it down."""
        started = [*self._holders, *([self._router] if self._router is not None else [])]
        for process in started:
            process.kill()
        for process in started:
            process.wait()
        self._holders, self._router = [], None

    def _bridge(self) -> None:
        """Join the sites in the kernel: no distance."""
        self._inside(self.hub, "ip", "link", "add", "bridge0", "type", "bridge")
        self._inside(self.hub, "ip", "address", "add", f"{HUB}/24", "dev", "bridge0")
        self._inside(self.hub, "ip", "link", "set", "bridge0", "up")
        for index, site in enumerate(self.sites):
            port = f"site{index}"
            self._inside(self.hub, "ip", "link", "add", port, "type", "veth", "peer", "name", LINK, "netns", str(site))
            self._inside(self.hub, "ip", "link", "set", port, "master", "bridge0", "up")
            self._bring_up(site, address_of(index))

    def _route(self, rtt_ms: float, loss: float, down_mbit: float, links: Mapping[tuple[int, int], Link]) -> None:
        """Join them by a process that holds packets back and loses some: the kernel need not have netem."""
        sites = [(_host(index), site, down_mbit) for index, site in enumerate(self.sites)]
        hosts = [(_host(HUB_PLACE), self.hub, 0.0), *sites]
        ports = [{"host": host, "process": pid, "delay_ms": rtt_ms / 4, "down_mbit": down} for host, pid, down in hosts]
        ways = [
            [_host(one), _host(other), {"delay_ms": 500 * link.rtt, "mbit": link.rate / 1e6, "loss": link.loss}]
            for (one, other), link in links.items()
        ]
        described = {"ports": ports, "loss": loss, "ways": ways}
        self._router = subprocess.Popen(
            [sys.executable, "-m", "titan_ext.links.router", json.dumps(described)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self._router.stdout.readline() != "ready\n":
            raise RunError("no router: the system refuses TUN devices (/dev/net/tun)")
        for host, pid, _ in hosts:
            self._bring_up(pid, f"{SUBNET}.{host}")

    def _bring_up(self, pid: int, address: str) -> None:
        self._inside(pid, "ip", "address", "add", f"{address}/24", "dev", LINK)
        # The router may have to wait for a processor: what the device cannot hold meanwhile would be lost.
        self._inside(pid, "ip", "link", "set", LINK, "txqueuelen", "20000", "up")

    def _limit(self, site: int, rate_mbit: float) -> None:
        if self._router is None:
            # Segments as they would be on a cable: the device counts what offload puts together with the headers of one,
            # where the router counts each.
            self._inside(site, "ip", "link", "set", LINK, "gso_max_segs", "1")
        limit = ["rate", f"{rate_mbit}mbit", "burst", "128kb", "latency", "100ms"]
        self._inside(site, "tc", "qdisc", "add", "dev", LINK, "root", "tbf", *limit)

    def _hold(self) -> int:
        """Process id of a process in a fresh network namespace that has nothing but loopback."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C is the benchmark's to handle
        )
        self._holders.append(holder)
        own = os.readlink("/proc/self/ns/net")
        while holder.poll() is None and os.readlink(f"/proc/{holder.pid}/ns/net") == own:
            time.sleep(0.01)
        if holder.poll() is not None:
            raise RunError(f"no network namespace: {holder.stderr.read().decode().strip()}")
        self._inside(holder.pid, "ip", "link", "set", "lo", "up")
        return holder.pid

    def _inside(self, pid: int, *command: str) -> None:
        _run(["nsenter", f"--net=/proc/{pid}/ns/net", *command])


def address_of(site: int) -> str:
    """Address of a site's interface."""
    return f"{SUBNET}.{_host(site)}"


def _host(place: int) -> int:
    """Last number of the address of a site, or of the hub."""
    return _HUB_HOST if place == HUB_PLACE else place + 1


def enter_network(pid: int) -> None:
    """Move the calling thread, and those it will start, into the network of another process.

    Raises:
        RunError: the kernel refuses.
    """
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK) != 0:
            raise RunError(f"cannot enter the network of process {pid}: {os.strerror(ctypes.get_errno())}")


def _bytes_sent(pid: int) -> int:
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == LINK:
            return int(numbers.split()[8])
    raise RunError(f"process {pid} has no interface {LINK}")


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"{' '.join(command[2:])}: {result.stderr.strip()}")
