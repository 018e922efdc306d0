"""Checks of this machine for one site."""

import resource
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

from titan_ext.doctor.finding import Finding, Level, ok
from titan_ext.errors import UserError
from titan_ext.object_store import is_url
from titan_ext.replica.address import check_port
from titan_ext.replica.membership.shared_secret import load_secret

_SLOW_LOOKUP_SECONDS = 1.0
_PATIENCE_SECONDS = 6.0
_LEAST_MTU = 1280
_LONG_TRIP_SECONDS = 0.005
_KERNEL = Path("/proc/sys/net/ipv4")


def check_machine(site: Any) -> list[Finding]:
    """What costs next to nothing to look at: ports, open files, room on the disk, the secret."""
    return [*_ports(site), *_open_files(site), *_disk(site), *_secret(site)]


def _ports(site: Any) -> list[Finding]:
    replica, found = site.config.replica, []
    wanted = {"metrics.serve_port": site.config.metrics.serve_port, "replica.manager_port": replica.manager_port}
    if replica.state_port:
        wanted |= {f"replica.state_port (rank {rank})": replica.state_port + rank for rank in range(site.nproc)}
    for key, port in wanted.items():
        try:
            check_port(f"{key} = {port}", port)
        except UserError as error:
            why = "the site cannot start while something else listens there"
            found.append(Finding("ports", Level.PROBLEM, str(error), why, f"{key.split(' ')[0]} = another port, or 0"))
    fixed = [port for port in wanted.values() if port]
    return found or [
        ok("ports", f"{', '.join(map(str, fixed))} free" if fixed else "none is fixed; free ones are taken")
    ]


def _open_files(site: Any) -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each rank: torch and its libraries, workers, and Gloo's connections to each other site in two groups.
    needed = 256 + 32 * site.count
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return [ok("open files", f"{soft} for a process")]
    why = "connections to other sites fail once a process has so many files open"
    what = f"{soft} for a process, {needed} wanted with {site.count} sites"
    return [Finding("open files", Level.WARNING, what, why, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")]


def _disk(site: Any) -> list[Finding]:
    folder = Path(site.config.dump_folder)
    there = next(each for each in [folder, *folder.absolute().parents] if each.exists())
    free = shutil.disk_usage(there).free
    checkpoint = site.config.checkpoint
    if not checkpoint.enable or is_url(checkpoint.folder):
        return [ok("disk", f"{free / 1e9:.3g} GB free")]
    from titan_ext.config.cost.cost import site_cost

    cost = site_cost(site)
    one = site.nproc * (
        cost.parameter_bytes + cost.optimizer_bytes + cost.global_copy_bytes + cost.outer_optimizer_bytes
    )
    kept = checkpoint.keep_latest_k or max(1, site.config.training.steps // max(1, checkpoint.interval))
    needed = (kept + 1) * one  # one more is written before the oldest goes
    text = f"{free / 1e9:.3g} GB free, {kept} checkpoints of {one / 1e9:.3g} GB and one being written"
    if free >= needed:
        return [ok("disk", text)]
    fits = max(2, int(free / one) - 1) if one else kept
    mend = f"[checkpoint] keep_latest_k = {fits}, or another dump_folder"
    level = Level.PROBLEM if free < 2 * one else Level.WARNING
    return [Finding("disk", level, text, "saving fails, and what was trained since the last checkpoint is lost", mend)]


def _secret(site: Any) -> list[Finding]:
    path = site.config.replica.secret_file
    if path is None:
        return []
    try:
        load_secret(path)
    except UserError as error:
        why, mend = (
            "the site cannot start without it",
            "[replica] secret_file = a file with the run's secret, chmod 600",
        )
        return [Finding("secret", Level.PROBLEM, str(error), why, mend)]
    return [ok("secret", f"read from {path}")]


def check_memory(site: Any) -> list[Finding]:
    """What a sync takes, against what this machine has."""
    from titan_ext.config.checks.capacity import lacking_capacity
    from titan_ext.config.cost.cost import site_cost

    cost = site_cost(site)
    lacking = lacking_capacity("memory", {site.name: (site, cost)})
    text = f"{(cost.memory_bytes + cost.host_bytes) / 2**30:.3g} GiB a rank at a sync, activations aside"
    why = "a rank ends for want of memory at the first sync"
    mend = '[semi_sync] outer_state_device = "cpu", more fragments, or more ranks'
    return [Finding("memory", Level.PROBLEM, str(each), why, mend) for each in lacking] or [ok("memory", text)]


def check_pauses(round_trip_seconds: float | None) -> list[Finding]:
    """Whether connections to far sites forget between two rounds how fast they may send (RFC 2861, Linux's default)."""
    if round_trip_seconds is None or round_trip_seconds < _LONG_TRIP_SECONDS:
        return []
    try:
        forgets = (_KERNEL / "tcp_slow_start_after_idle").read_text().strip() != "0"
        control = (_KERNEL / "tcp_congestion_control").read_text().strip()
    except OSError:
        return []  # not Linux
    if not forgets or control == "bbr":
        return [ok("pauses", f"connections keep their speed between rounds ({control})")]
    return [
        Finding(
            "pauses",
            Level.NOTE,
            f"{control} begins anew after a pause (net.ipv4.tcp_slow_start_after_idle = 1)",
            f"each round takes some round trips of {1000 * round_trip_seconds:.0f} ms longer until its connections are up to "
            "speed",
            "sysctl -w net.ipv4.tcp_slow_start_after_idle=0, or net.ipv4.tcp_congestion_control=bbr",
        )
    ]


def check_address(address: str, lighthouse_host: str) -> list[Finding]:
    """The address that the site advertises, and how long its name takes to be looked up."""
    found = []
    if address.startswith("127.") or address == "::1":
        local = lighthouse_host in ("localhost", "127.0.0.1", "::1")
        level = Level.NOTE if local else Level.PROBLEM
        why = "" if local else "no other machine reaches this site"
        found.append(
            Finding("address", level, f"advertises {address}", why, "" if local else '[replica] interface = "eth1"')
        )
    else:
        found.append(ok("address", f"advertises {address}"))
    seconds = _lookup_seconds(address)
    if seconds >= _SLOW_LOOKUP_SECONDS:
        found.append(
            Finding(
                "reverse DNS",
                Level.WARNING,
                f"looking up the name of {address} takes {seconds:.1f} s"
                + (" or more" if seconds >= _PATIENCE_SECONDS else ""),
                "torch's store looks up every address that connects: a start or a new quorum takes so much longer",
                'export RES_OPTIONS="timeout:1 attempts:1", or name the sites in /etc/hosts',
            )
        )
    return found + _interface(address)


def _interface(address: str) -> list[Finding]:
    name = next((each for each in _interfaces() if address in each[1]), None)
    if name is None:
        return []
    mtu = int(Path(f"/sys/class/net/{name[0]}/mtu").read_text())
    if mtu >= _LEAST_MTU:
        return [ok("interface", f"{name[0]}, MTU {mtu}")]
    why = "every packet carries little, and some networks drop larger ones without a word"
    return [
        Finding("interface", Level.WARNING, f"{name[0]} has MTU {mtu}", why, f"ip link set {name[0]} mtu {_LEAST_MTU}")
    ]


def _interfaces() -> list[tuple[str, set[str]]]:
    from titan_ext.replica.address import interface_address

    found = []
    for _, name in socket.if_nameindex():
        try:
            found.append((name, {interface_address(name)}))
        except UserError:
            continue
    return found


def _lookup_seconds(address: str) -> float:
    started = time.monotonic()
    thread = threading.Thread(target=_look_up, args=[address], daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    return time.monotonic() - started


def _look_up(address: str) -> None:
    try:
        socket.gethostbyaddr(address)
    except OSError:
        pass  # that there is no name is no fault; that it takes long to find out is


def versions() -> dict[str, str]:
    """Of what has to be equal at all sites, or nearly."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    found = {"python": python_version()}
    for name in ("titan_ext", "torch", "torchtitan", "torchft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found
