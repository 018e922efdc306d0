"""``launch/mesh.sh``: its peers file, and a network between two namespaces that really is one."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.distributed_c10d import AllreduceOptions

from titan_ext.bench.workers import WorkerGroup
from titan_ext.links.namespaces import Wan, address_of, missing
from titan_ext.replica.streams.group import StreamGroup

SCRIPT = Path(__file__).parents[2] / "launch" / "mesh.sh"
KEY = "A" * 43 + "="
INSIDE = ("10.88.0.1", "10.88.0.2")


def mesh(*arguments: str, network: int | None = None) -> subprocess.CompletedProcess[str]:
    """The script, where ``network`` is given in the network of that process."""
    prefix = [] if network is None else ["nsenter", f"--net=/proc/{network}/ns/net"]
    return subprocess.run([*prefix, "bash", str(SCRIPT), *arguments], capture_output=True, text=True)


def peers(folder: Path, *lines: str) -> str:
    path = folder / "mesh.conf"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_help_shows_a_peers_file() -> None:
    result = mesh("--help")
    assert result.returncode == 0
    assert "east    -           east.example:51820       10.88.0.1" in result.stdout


def test_dry_run_prints_what_up_would_do(tmp_path: Path) -> None:
    file = peers(
        tmp_path,
        "# site, key, endpoint, address",
        "east  -  east.example:7000  10.88.0.1\r",
        f"west  {KEY}  [2001:db8::2]:7001  fd00::2  # behind a comment",
        "",
        "north -  -  10.88.0.3",
    )
    result = mesh("up", "east", "--peers", file, "--key", f"{tmp_path}/key", "--interface", "mesh7", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"# a private key would be made in {tmp_path}/key",
        "ip link add dev mesh7 type wireguard  # or, where the kernel has none: wireguard-go mesh7",
        "wg syncconf mesh7 /dev/stdin <<END",
        "[Interface]",
        f"PrivateKey = (the content of {tmp_path}/key)",
        "ListenPort = 7000",
        "",
        "[Peer]",
        "# west",
        f"PublicKey = {KEY}",
        "AllowedIPs = fd00::2/128",
        "Endpoint = [2001:db8::2]:7001",
        "PersistentKeepalive = 25",
        "END",
        "ip address replace 10.88.0.1/32 dev mesh7",
        "ip link set dev mesh7 mtu 1420 up",
        "ip route replace fd00::2/128 dev mesh7",
        "ip route replace 10.88.0.3/32 dev mesh7",
    ]
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    "line, problem",
    [
        ("west - west:7000", "must be SITE KEY ENDPOINT ADDRESS, and has 3 word(s)"),
        ("west abc west:7000 10.88.0.2", 'abc is not a WireGuard public key (44 characters, the last "=") and not "-"'),
        ("west - west 10.88.0.2", 'endpoint west must be HOST:PORT or "-"'),
        ("west - west:70000 10.88.0.2", 'endpoint west:70000 must be HOST:PORT or "-"'),
        ("west - west:7000 10.88.0.256", "10.88.0.256 is not an IP address (without a prefix length)"),
        ("west - west:7000 10.88.0.2/24", "10.88.0.2/24 is not an IP address (without a prefix length)"),
        ("east - west:7000 10.88.0.2", "site east has a line already"),
        ("west - west:7000 10.88.0.1", "10.88.0.1 is east's already"),
        (f"west {KEY} west:7000 10.88.0.2", "this key is east's already"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = peers(tmp_path, f"east {KEY} east:7000 10.88.0.1", "# a comment", line)
    result = mesh("up", "east", "--peers", file, "--key", f"{tmp_path}/key", "--dry-run")
    assert result.returncode == 2
    assert result.stderr == f"titan-ext: error: {file} line 3: {problem}\n"


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["up"], "up needs the name of this site, as it stands in the peers file"),
        (["up", "east"], "--peers FILE is missing; --help shows such a file"),
        (["up", "east", "--peers", "/absent"], "--peers /absent: no such file, or not readable"),
        (["up", "--mtu", "12"], "--mtu 12: must be a number of at least 576"),
        (["up", "--interface", "a/b"], "--interface a/b: must be at most 15 letters, digits, '_', '.' or '-'"),
        (["up", "--port", "1"], "--port: no such option; --help lists them"),
        (["up", "--peers"], "--peers needs a value"),
        (["rise"], "rise: must be up, status or down; --help explains them"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], problem: str) -> None:
    result = mesh(*arguments, "--dry-run") if arguments[-1] != "--peers" else mesh(*arguments)
    assert result.returncode == 2
    assert result.stderr == f"titan-ext: error: {problem}\n"


def test_a_site_without_a_line_is_told_what_to_add(tmp_path: Path) -> None:
    result = mesh("up", "west", "--peers", peers(tmp_path, "east - - 10.88.0.1"), "--dry-run")
    assert result.returncode == 2
    assert 'has no line for west: add one, such as "west - HOST:51820 10.88.0.9"' in result.stderr


def _no_wireguard() -> str | None:
    if missing() is not None:
        return missing()
    if shutil.which("wg") is None:
        return "no wg here (wireguard-tools)"
    if shutil.which("wireguard-go") is not None:
        return None
    probe = ["unshare", "--net", "ip", "link", "add", "wg0", "type", "wireguard"]
    return "neither the kernel nor wireguard-go" if subprocess.run(probe, capture_output=True).returncode else None


class Reducer:
    """A site's end of an all-reduce over the addresses inside the network.

    Args:
        rank: index of the site.
        port: on which the first site serves the rendezvous.
    """

    def __init__(self, rank: int, port: int) -> None:
        self._store = TCPStore(INSIDE[0], port, is_master=rank == 0, wait_for_workers=False)
        self._group = StreamGroup(INSIDE[rank], timedelta(seconds=30))
        self._rank, self._address = rank, f"{INSIDE[0]}:{port}/mesh"

    def reduce(self, numel: int) -> float:
        """The sum over the sites of a vector that holds each site's rank plus one."""
        self._group.configure(self._address, f"site{self._rank}", self._rank, 2)
        values = torch.full((numel,), float(self._rank + 1))
        self._group.allreduce([values], AllreduceOptions()).wait()
        return float(values.unique())


@contextmanager
def two_sites(folder: Path) -> Iterator[list[tuple[int, tuple[str, ...]]]]:
    """Networks of two sites with the arguments that each gives to the script; taken down at the end."""
    with Wan(2, 1000) as wan:
        # The userspace daemon's sockets share one folder, so the names differ.
        sites = [
            (network, ("--interface", f"mesh-test{index}", "--key", f"{folder}/keys{index}/private"))
            for index, network in enumerate(wan.sites)
        ]
        try:
            yield sites
        finally:
            for network, options in sites:
                mesh("down", *options, network=network)


@pytest.mark.skipif(_no_wireguard() is not None, reason=f"WireGuard: {_no_wireguard()}")
def test_two_sites_reduce_through_the_mesh(tmp_path: Path) -> None:
    names = ("east", "west")
    lines = [f"{name} - {address_of(index)}:51820 {INSIDE[index]}" for index, name in enumerate(names)]
    with two_sites(tmp_path) as sites:
        announced = []
        for (network, options), name, line in zip(sites, names, lines, strict=True):
            result = mesh("up", name, "--peers", peers(tmp_path, *lines), *options, network=network)
            assert result.returncode == 0, result.stderr
            announced += [each.strip() for each in result.stdout.splitlines() if each.startswith(f"  {name} ")]
        assert [line.split()[0] for line in announced] == list(names)
        assert all((tmp_path / f"keys{index}" / "private").stat().st_mode & 0o077 == 0 for index in range(2))
        file = peers(tmp_path, *announced)
        for (network, options), name in zip(sites, names, strict=True):
            result = mesh("up", name, "--peers", file, *options, network=network)
            assert result.returncode == 0 and "line for everyone's" not in result.stdout, result.stderr
        with WorkerGroup(Reducer, [(rank, 29600) for rank in range(2)], [network for network, _ in sites]) as workers:
            assert workers.call("reduce", 1_000_000) == [3.0, 3.0]
        report = mesh("status", "--peers", file, *sites[0][1], network=sites[0][0]).stdout.splitlines()
        assert report[1].split()[:2] == ["west", INSIDE[1]]
        assert int(report[1].split()[-1]) > 4_000_000, "the vector went another way"
        # A name that is another network's is left alone.
        other = mesh("up", "west", "--peers", file, *sites[0][1][:2], *sites[1][1][2:], network=sites[0][0])
        assert "is there already and is not this network's" in other.stderr
    assert not (Path("/var/run/wireguard") / "mesh-test0.sock").exists()
