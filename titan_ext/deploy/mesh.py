"""The WireGuard network of ``launch/mesh.sh`` for the pods of Kubernetes: each joins it before it trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.deploy.deployment import Deployment
from titan_ext.errors import UserError

INTERFACE = "wg0"
LIGHTHOUSE = "lighthouse"
"""The line of the file for the pod of that name."""
_FOLDER, _KEYS = "/etc/titan_ext_mesh", "/run/secrets/titan_ext_mesh"
_SCRIPT = "/opt/titan_ext/launch/mesh.sh"


@dataclass(frozen=True, slots=True)
class Peers:
    """The file of peers: a machine's endpoint and its address inside, by name."""

    text: str
    machines: dict[str, tuple[str, str]]

    @property
    def names(self) -> list[str]:
        """Of all machines."""
        return list(self.machines)

    def address(self, machine: str) -> str:
        """Inside the network; an IPv6 address as a URL has it."""
        inside = self.machines[machine][1]
        return f"[{inside}]" if ":" in inside else inside

    def of_site(self, site: str, nodes: int) -> list[str]:
        """The machines of a site, node by node."""
        return [f"{site}-{node}" for node in range(nodes)]

    def ports(self, names: Sequence[str] | None = None) -> list[int]:
        """UDP ports on which machines are called."""
        endpoints = (self.machines[name][0] for name in names or self.names)
        return sorted({int(each.rpartition(":")[2]) for each in endpoints if each != "-"})


def read_peers(file: str, deployment: Deployment) -> Peers:
    """Read a file of peers; it is ``launch/mesh.sh`` that checks it in detail.

    Raises:
        UserError: it cannot be read, or has no line for a node.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--mesh {file}: cannot be read: {error.strerror}") from None
    machines = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words and len(words) != 4:
            raise UserError(f"--mesh {file} line {number}: must be SITE KEY ENDPOINT ADDRESS")
        if words:
            machines[words[0]] = words[2], words[3]
    peers = Peers(text, machines)
    needed = [name for site in deployment.sites for name in peers.of_site(site.name, site.nodes.count)]
    needed += [LIGHTHOUSE] if deployment.lighthouse is None else []
    for name in needed:
        if name not in machines:
            raise UserError(f"--mesh {file}: no line for {name}; it needs {', '.join(needed)}")
    for site in deployment.sites:
        ports = peers.ports(peers.of_site(site.name, site.nodes.count))
        if len(ports) > 1:
            raise UserError(f"--mesh {file}: the endpoints of {site.name}'s nodes must have one port, not {ports}")
    return peers


def join(
    pod: dict[str, Any], peers: Peers, image: str, *, machine: str, names: Sequence[str], run: str, part: str
) -> None:
    """Let a pod join before its containers start, which then need no privilege.

    Args:
        pod: its specification; changed.
        peers: of the network.
        image: with ``launch/mesh.sh``.
        machine: the pod's name in the file of peers, as a shell reads it.
        names: all that it may come to.
        run: name of the run.
        part: the pod's part of it.
    """
    script = f'exec bash {_SCRIPT} up "{machine}" --peers {_FOLDER}/peers --key "{_KEYS}/{machine}"'
    ports = peers.ports(names)
    container = {
        "name": "mesh",
        "image": image,
        "command": ["bash", "-c", script],
        "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}, "runAsUser": 0},
        "volumeMounts": [
            {"name": "mesh", "mountPath": _FOLDER},
            {"name": "mesh-keys", "mountPath": _KEYS, "readOnly": True},
        ],
    }
    pod["initContainers"] = [container]
    pod.setdefault("volumes", []).extend(
        [
            {"name": "mesh", "configMap": {"name": f"{run}-{part}-mesh"}},
            {"name": "mesh-keys", "secret": {"secretName": f"{run}-mesh", "defaultMode": 0o400}},
        ]
    )
    # The endpoint is the machine's; what arrives there is passed on to the pod.
    open_ports = [{"containerPort": port, "hostPort": port, "protocol": "UDP"} for port in ports]
    if open_ports:
        pod["containers"][0].setdefault("ports", []).extend(open_ports)


def config_map(run: str, namespace: str, peers: Peers | None, part: str) -> list[dict[str, Any]]:
    """The file of peers, which holds nothing secret, for the pods of one part of the run."""
    if peers is None:
        return []
    metadata = {"name": f"{run}-{part}-mesh", "namespace": namespace, "labels": {"titan-ext/run": run}}
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"peers": peers.text}}]
