"""Assigns this machine's cores, GPUs and ports to the sites."""

import math
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence

from titan_ext.errors import UserError
from titan_ext.launcher.node import Node


def torchrun_command(
    nproc: int,
    grace_seconds: float,
    *arguments: str,
    node: Node | None = None,
    port: int | None = None,
    patience_seconds: float = 600.0,
) -> list[str]:
    """The command line of the torchrun of a site, or of one of its nodes.

    Args:
        nproc: ranks to start.
        grace_seconds: how long ranks that are told to leave may take.
        *arguments: of the ranks' program.
        node: which of several nodes this is; None for a site of one.
        port: of the store of a site of one node; None takes a free one.
        patience_seconds: how long the nodes wait for each other.
    """
    return [
        *(sys.executable, "-m", "titan_ext.launcher.torchrun", *_rendezvous(node, port, patience_seconds)),
        *("--nproc-per-node", str(nproc), "--shutdown-timeout", str(math.ceil(grace_seconds))),
        *("-m", "titan_ext.train", *arguments),
    ]


def _rendezvous(node: Node | None, port: int | None, patience_seconds: float) -> list[str]:
    if node is None and port is None:
        return ["--standalone", "--local-addr", "127.0.0.1"]
    if node is None:
        return ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [
        *("--nnodes", str(node.count), "--node-rank", str(node.rank)),
        *("--master-addr", node.host, "--master-port", str(node.port)),
        *("--rdzv-conf", f"timeout={math.ceil(patience_seconds)}"),
    ]


def assign_resources(
    ranks: Mapping[str, int], *, cores: int, gpus: Sequence[str], environment: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The environment variables of each site on top of ``environment``.

    Args:
        ranks: name of the site, or of its part on a node -> processes it starts.
        cores: processor cores to share out.
        gpus: the GPUs' ids as in CUDA_VISIBLE_DEVICES, one for each rank; empty: none on this machine.
        environment: the launcher's own; a thread count set there is kept.

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    total = sum(ranks.values())
    if gpus and total > len(gpus):
        wanted = ", ".join(f"{name} {count}" for name, count in ranks.items())
        raise UserError(
            f"the sites take {total} GPUs ({wanted}) and this machine shows {len(gpus)}: "
            "lower their parallel degrees or nproc, or start some elsewhere with --only SITE"
        )
    assigned, first = {}, 0
    for name, count in ranks.items():
        assigned[name] = {
            "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, cores // total))),
            "PYTHONUNBUFFERED": "1",
        }
        if gpus:
            assigned[name]["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + count])
        first += count
    return assigned


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES spells them."""
    import torch

    count = torch.cuda.device_count()
    listed = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return listed[:count] if listed else [str(index) for index in range(count)]


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A free TCP port on the loopback interface, outside the range from which Linux serves outgoing connections.

    Raises:
        UserError: none was found.
    """
    for _ in range(100):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError("no free TCP port between 20000 and 32000: name one with --lighthouse-port")
