"""A wide-area network on one machine: network namespaces behind links of a limited rate (Linux, root).

No namespace has a name. Each lives as long as the process that holds it, which ends with this one, and
the kernel takes the links along: nothing is left behind, however a benchmark ends.
"""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from titan_ext.errors import RunError
from titan_ext.launcher.processes import die_with_parent

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_TOOLS = ("ip", "tc", "unshare", "nsenter")
_LINK = "wan0"
HUB = "10.77.0.254"


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
        rate_mbit: each site's rate of sending, in 10**6 bits a second, counted from the Ethernet header on.

    Raises:
        RunError: the system refuses a part of it.
    """

    hub_address = HUB
    """Numeric address of the hub, for a lighthouse."""

    def __init__(self, sites: int, rate_mbit: float) -> None:
        self._holders: list[subprocess.Popen] = []
        try:
            self.hub = self._hold()
            self._inside(self.hub, "ip", "link", "add", "bridge0", "type", "bridge")
            self._inside(self.hub, "ip", "address", "add", f"{HUB}/24", "dev", "bridge0")
            self._inside(self.hub, "ip", "link", "set", "bridge0", "up")
            self.sites = [self._connect(index, rate_mbit) for index in range(sites)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Wan":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bytes_sent(self) -> list[int]:
        """What each site's interface has sent so far, in bytes, headers included."""
        return [_bytes_sent(pid) for pid in self.sites]

    def close(self) -> None:
        """Take it down."""
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.wait()
        self._holders = []

    def _connect(self, index: int, rate_mbit: float) -> int:
        site = self._hold()
        port = f"site{index}"
        self._inside(self.hub, "ip", "link", "add", port, "type", "veth", "peer", "name", _LINK, "netns", str(site))
        self._inside(self.hub, "ip", "link", "set", port, "master", "bridge0", "up")
        self._inside(site, "ip", "address", "add", f"{address_of(index)}/24", "dev", _LINK)
        self._inside(site, "ip", "link", "set", _LINK, "up")
        # The burst has room for the largest packet that segmentation offload hands over (64 KiB).
        limit = ["rate", f"{rate_mbit}mbit", "burst", "128kb", "latency", "100ms"]
        self._inside(site, "tc", "qdisc", "add", "dev", _LINK, "root", "tbf", *limit)
        return site

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
    return f"10.77.0.{site + 1}"


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
        if name.strip() == _LINK:
            return int(numbers.split()[8])
    raise RunError(f"process {pid} has no interface {_LINK}")


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"{' '.join(command[2:])}: {result.stderr.strip()}")
