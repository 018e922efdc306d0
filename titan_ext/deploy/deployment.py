"""What there is to deploy: a run's sites with their nodes, GPUs, ports, secrets and commands."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ext.config.nodes import Nodes
from titan_ext.errors import UserError

LIGHTHOUSE_PORT = 29510
_SECRETS = ("secret_file", "tls_certificate", "tls_key", "tls_authority")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedSite:
    """A site as a scheduler sees it."""

    name: str
    nodes: Nodes
    gpus: int
    """At each node."""
    secrets: Mapping[str, str]
    """Key of ``[replica]`` -> path of a file that only its owner may read."""
    ports: Sequence[int]
    """What the file fixes of the ports that other sites connect to."""
    dump_folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A run as a scheduler sees it."""

    name: str
    """In the names of jobs: lower-case letters, digits and "-"."""
    file: str
    """The run's file, as the user gave its path."""
    sites: Sequence[DeployedSite]
    lighthouse: str | None
    """Its URL, where the user runs one or will."""
    lighthouse_flags: Sequence[str]
    """For one that fits the file."""
    flags: Sequence[str] = field(default_factory=tuple)
    """Of every site's ``titan-ext launch``: overrides and how failures are met."""
    grace_seconds: int = 60
    """What a site may take to save and leave when it is told to."""

    def launch_arguments(self, site: DeployedSite, file: str, lighthouse: str, *more: str) -> list[str]:
        """Arguments of ``launch/site.sh`` and, with ``--only`` and ``--lighthouse``, of ``titan-ext launch``."""
        return [file, site.name, lighthouse, *more, *self.flags]


def deployment(
    sites: Sequence[Any],
    *,
    file: str,
    name: str | None,
    lighthouse: str | None,
    cpu: bool,
    flags: Sequence[str],
    grace_seconds: int,
) -> Deployment:
    """Describe the sites of a run.

    Args:
        sites: each a ``Site``; all of the run.
        file: path of the run's file.
        name: of the run; None takes the file's.
        lighthouse: its URL, if there is to be one apart from what is written.
        cpu: the nodes have no GPUs.
        flags: for every site.
        grace_seconds: what a site may take to save and leave.

    Raises:
        UserError: the ranks of a site hang on the machine that starts it, or a name cannot be used.
    """
    for site in sites:
        _check_ranks(site)
    settings = [site.config.replica for site in sites]
    found = Deployment(
        name=label(name or Path(file).stem, "--name"),
        file=file,
        sites=[_deployed(site, cpu) for site in sites],
        lighthouse=lighthouse,
        lighthouse_flags=(
            *("--min-sites", str(max(each.min_sites for each in settings))),
            *("--join-timeout-seconds", f"{max(each.join_timeout_seconds for each in settings):g}"),
            *("--heartbeat-timeout-seconds", f"{max(each.heartbeat_timeout_seconds for each in settings):g}"),
        ),
        grace_seconds=grace_seconds,
        flags=("--replica.expected_sites", str(len(sites)), *flags) if _waits_for_all(sites) else tuple(flags),
    )
    labels = [label(site.name, "name") for site in found.sites]
    for place, each in enumerate(labels):
        if each in labels[:place]:
            raise UserError(
                f'{file}: site "{found.sites[place].name}": another site is called {each!r} in names of jobs'
            )
    return found


def label(name: str, key: str) -> str:
    """A name as schedulers allow it: ``My_Run.8b`` becomes ``my-run-8b``.

    Raises:
        UserError: nothing is left of it, or it is too long.
    """
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not found or len(found) > 30 or not found[0].isalpha():
        raise UserError(
            f"{key} {name!r}: must begin with a letter and have at most 30 letters and digits for names of jobs"
        )
    return found


def shell(words: Sequence[str]) -> str:
    """A command line for a shell."""
    return " ".join(shlex.quote(word) for word in words)


def _deployed(site: Any, cpu: bool) -> DeployedSite:
    replica = site.config.replica
    ports = [site.nodes.port, replica.manager_port]
    if replica.state_port:
        ports += range(replica.state_port, replica.state_port + site.nproc)
    return DeployedSite(
        name=site.name,
        nodes=site.nodes,
        gpus=0 if cpu else site.nodes.ranks_per_node,
        secrets={key: getattr(replica, key) for key in _SECRETS if getattr(replica, key) is not None},
        ports=[port for port in ports if port],
        dump_folder=site.dump_root,
    )


def _waits_for_all(sites: Sequence[Any]) -> bool:
    return len(sites) > 1 and all(site.config.replica.expected_sites == 0 for site in sites)


def _check_ranks(site: Any) -> None:
    given = [site.settings.get(key) for key in ("nproc", "nproc_per_node")]
    if site.config.parallelism.data_parallel_shard_degree == -1 and given == [None, None]:
        raise UserError(
            f'{site.settings.file}: site "{site.name}": nproc_per_node is missing: without it '
            "parallelism.data_parallel_shard_degree = -1 takes what the machine has, and this one is not of the cluster"
        )
