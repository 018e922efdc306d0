"""Which of a site's nodes this machine is, and where they meet: by flags, or as the cluster's scheduler says."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from titan_ext.errors import UserError


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a site."""

    rank: int
    """Place among the site's nodes, from 0."""
    count: int
    """Nodes of the site."""
    host: str
    """Name or address of node 0, as the other nodes reach it."""
    port: int
    """Where it keeps the store of the site."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a scheduler says; None for what it does not tell."""

    scheduler: str
    rank: int
    count: int | None
    host: str | None


def find_node(
    site: str,
    count: int,
    port: int,
    *,
    rank: int | None,
    rendezvous: str | None,
    environment: Mapping[str, str],
    own_name: Callable[[], str],
) -> Node:
    """This machine's place among the nodes of a site.

    Args:
        site: its name.
        count: its nodes.
        port: of its store, unless ``rendezvous`` names one.
        rank: what the user says, before any scheduler.
        rendezvous: HOST or HOST:PORT of node 0, likewise.
        environment: with the variables of Slurm, a Kubernetes Indexed Job or SkyPilot.
        own_name: gives the full name of this machine.

    Raises:
        UserError: neither the user nor a scheduler says which node this is, or what is said cannot be.
    """
    found = _scheduler(site, environment, own_name)
    host = None
    if rendezvous is not None:
        host, port = _parse(rendezvous, port)
    if found is not None and found.count not in (None, count):
        raise UserError(
            f'site "{site}": nodes = {count}, but {found.scheduler} runs this on {found.count} node(s): '
            "make the two agree"
        )
    if rank is None and found is not None:
        rank = found.rank
    if host is None and found is not None:
        host = found.host
    if rank is None or host is None:
        missing = [flag for flag, value in (("--node-rank K", rank), ("--rendezvous HOST", host)) if value is None]
        raise UserError(
            f'site "{site}" has {count} nodes: start each with {" and ".join(missing)} (Slurm, Kubernetes and SkyPilot tell '
            "these in the environment), or rehearse all on this machine with --local-nodes"
        )
    if not 0 <= rank < count:
        raise UserError(f'--node-rank {rank}: must be from 0 to {count - 1}: site "{site}" has {count} node(s)')
    return Node(rank, count, host, port)


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it: ``gpu[003-010,12],login1`` begins with ``gpu003``."""
    name = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    return "".join(part or "" for part in name.groups()) if name else nodes


def _scheduler(site: str, environment: Mapping[str, str], own_name: Callable[[], str]) -> _Found | None:
    if "SLURM_NODEID" in environment:
        return _slurm(site, environment)
    if "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes(_number(environment, "JOB_COMPLETION_INDEX"), own_name())
    if "SKYPILOT_NODE_RANK" in environment:
        addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
        count = _number(environment, "SKYPILOT_NUM_NODES") if "SKYPILOT_NUM_NODES" in environment else None
        return _Found("SkyPilot", _number(environment, "SKYPILOT_NODE_RANK"), count, next(iter(addresses), None))
    return None


def _slurm(site: str, environment: Mapping[str, str]) -> _Found:
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise UserError(f'site "{site}": Slurm runs this more than once on a node: give srun --ntasks-per-node=1')
    # A step may have fewer nodes than the job.
    names = [each for each in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES") if each in environment]
    lists = [each for each in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if each in environment]
    return _Found(
        "Slurm",
        _number(environment, "SLURM_NODEID"),
        _number(environment, names[0]) if names else None,
        first_host(environment[lists[0]]) if lists else None,
    )


def _kubernetes(index: int, own_name: str) -> _Found:
    """The pods of an Indexed Job are called by their index, and have a domain where the Job has a headless Service."""
    name, _, domain = own_name.partition(".")
    ending = f"-{index}"
    known = domain and name.endswith(ending)
    return _Found("Kubernetes", index, None, f"{name.removesuffix(ending)}-0.{domain}" if known else None)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"{name} = {environment[name]!r} in the environment: must be a number") from None


def _parse(rendezvous: str, port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\]/\s]+)(?::(\d{1,5}))?", rendezvous)
    if match is None or not 0 < int(match[2] or port) < 65536:
        raise UserError(f"--rendezvous {rendezvous}: must be HOST or HOST:PORT of the site's first node")
    return match[1].strip("[]"), int(match[2] or port)
