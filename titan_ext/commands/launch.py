"""``titan-ext launch FILE.toml``: a lighthouse and one torchrun for each site, on this machine."""

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ext.commands.command import Command
from titan_ext.commands.doctor import brief_lines
from titan_ext.errors import UserError
from titan_ext.instruments.serving import ServedSite, serving
from titan_ext.launcher.jobs import NodeOfSite, all_nodes_here, site_jobs
from titan_ext.launcher.lighthouses import Lighthouses, lighthouses, waiting_for_all
from titan_ext.launcher.node import find_node
from titan_ext.launcher.run import LaunchedSite, run_jobs
from titan_ext.launcher.supervisor import Job
from titan_ext.launcher.surroundings import set_aside
from titan_ext.replica.address import check_port

if TYPE_CHECKING:
    from titan_ext.config.load import Site

_LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
_DESCRIPTION = """\
Train: start a lighthouse and every site of the file on this machine, show their progress, restart a site
that dies, and compare the sites' shared state at the end. Ctrl-C lets the sites save (with
--checkpoint.enable) and stops everything; Ctrl-C again does so at once.

Any setting can be overridden for all sites: --training.steps 20, --semi_sync.sync_every=16 …
Give the file before them.
"""

_EPILOG = """\
One site here, the others elsewhere: run `titan-ext lighthouse` on a machine that all sites reach, and at
each site, with the same file, `titan-ext launch FILE.toml --only SITE --lighthouse http://host:29510`.

A site of several nodes (nodes = 4 in its table): the same command on each of them. Slurm, Kubernetes and
SkyPilot tell which node that is and where the first one is; elsewhere --node-rank K --rendezvous HOST does.

Exit codes: 0 trained and all shared state equal, 1 a site failed or the state differs, 2 bad input, 130 stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sites, where they meet, and how patiently."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--only", action="append", metavar="SITE", help="start this site only; can be repeated")
    parser.add_argument(
        "--lighthouse", metavar="URL", help="use the lighthouse at this address instead of starting one"
    )
    parser.add_argument(
        "--lighthouse-port", type=int, metavar="PORT", help="port of the one started; default: a free one"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="restarts of a site (default %(default)s)"
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="what a site that is stopped may take to save and leave (default %(default)s)",
    )
    parser.add_argument("--node-rank", type=int, metavar="K", help="which of the site's nodes this is, from 0")
    parser.add_argument("--rendezvous", metavar="HOST[:PORT]", help="node 0 of the site, as its other nodes reach it")
    parser.add_argument(
        "--rendezvous-seconds",
        type=float,
        default=1800.0,
        metavar="S",
        help="how long the nodes of a site wait for each other (default %(default)s)",
    )
    parser.add_argument("--local-nodes", type=int, metavar="N", help="rehearse: N nodes of every site on this machine")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live table in a terminal")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserError: bad input, found before anything starts.
    """
    _check_numbers(args)
    for note in set_aside():
        print(f"note: {note}")
    overrides = [*args.overrides, *(["--replica.lighthouse", args.lighthouse] if args.lighthouse else [])]
    overrides += ["--nodes", str(args.local_nodes)] if args.local_nodes is not None else []
    sites = _load_sites(args.file, args.only, overrides)
    parts = _parts(args, sites)
    jobs = _plan(args, sites, parts, overrides)
    _announce(sites, parts)
    followed = [part.site for part in parts if part.is_followed]
    for line in brief_lines(sites):
        print(line)
    with serving(_served(sites)) as lines:
        print("\n".join(lines), end="\n" if lines else "")
        return run_jobs(
            jobs,
            [LaunchedSite(site.name, Path(site.config.dump_folder), site.config.training.steps) for site in followed],
            max_restarts=args.max_restarts,
            plain=args.plain,
            grace_seconds=args.grace_seconds,
            complete=len(sites) == sites[0].count,
        )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: must be at least 0")
    for flag, seconds in (("--grace-seconds", args.grace_seconds), ("--rendezvous-seconds", args.rendezvous_seconds)):
        if not seconds > 0:
            raise UserError(f"{flag} {seconds:g}: must be above 0 seconds")
    if not 0 <= (args.lighthouse_port or 0) < 65536:
        raise UserError(f"--lighthouse-port {args.lighthouse_port}: must be a port below 65536, or 0 for a free one")
    if args.local_nodes is not None and args.local_nodes < 1:
        raise UserError(f"--local-nodes {args.local_nodes}: must be at least 1")


def _announce(sites: Sequence["Site"], parts: Sequence[NodeOfSite]) -> None:
    for site in sites:
        print("\n".join(site.data))
        for note in site.notes:
            print(f"{site.name}: note: {note}")
    for part in parts:
        if part.node is not None:
            where = f"node {part.node.rank} of {part.node.count}, which meet at {part.node.host}:{part.node.port}"
            print(f"{part.site.name}: {where}; log: {part.log}")


def _served(sites: Sequence["Site"]) -> list[ServedSite]:
    """Those whose metrics other machines are to see, at the address under which the other sites reach them."""
    from titan_ext.replica.address import interface_address

    return [
        ServedSite(
            name=site.name,
            folder=Path(site.config.dump_folder),
            host=interface_address(replica.interface) if replica.interface is not None else replica.hostname or "",
            port=site.config.metrics.serve_port,
            secret_file=replica.secret_file,
        )
        for site in sites
        for replica in [site.config.replica]
        if site.config.metrics.serve_port
    ]


def _load_sites(file: str, only: Sequence[str] | None, overrides: Sequence[str]) -> list["Site"]:
    from titan_ext.config import load_to_start

    # With --only, the other sites' corpora and tokenizers may exist on their own machines only.
    return load_to_start(file, None if only is None else list(dict.fromkeys(only)), overrides)


def _parts(args: argparse.Namespace, sites: Sequence["Site"]) -> list[NodeOfSite]:
    """What this machine runs of the sites: all their nodes, or one node of one site."""
    spread = [site for site in sites if site.nodes.count > 1]
    if args.local_nodes is not None or not spread:
        for flag, value in (("--node-rank", args.node_rank), ("--rendezvous", args.rendezvous)):
            if value is not None:
                raise UserError(
                    f"{flag} {value}: every site here is on this machine alone (nodes = 1, or --local-nodes)"
                )
        if args.local_nodes is None:
            _check_ports({site.name: site.nodes.port for site in sites if site.nodes.port})
        return all_nodes_here(sites)
    site = spread[0]
    if len(sites) > 1:
        raise UserError(
            f'site "{site.name}" has {site.nodes.count} nodes: start it with --only {site.name} on each of them, or '
            f"rehearse all sites on this machine with --local-nodes {site.nodes.count}"
        )
    node = find_node(
        site.name,
        site.nodes.count,
        site.nodes.port,
        rank=args.node_rank,
        rendezvous=args.rendezvous,
        environment=os.environ,
        own_name=socket.getfqdn,
    )
    if node.rank == 0:
        check_port(f'site "{site.name}": rendezvous_port = {node.port}', node.port)
    return [NodeOfSite(site, node)]


def _check_ports(ports: Mapping[str, int]) -> None:
    """The stores of the sites on this machine, each of one node, can listen on their ports."""
    owners: dict[int, str] = {}
    for name, port in ports.items():
        where = f'site "{name}": rendezvous_port = {port}'
        if port in owners:
            raise UserError(
                f'{where}: site "{owners[port]}" on this machine has it too; give each a port of its own in its '
                "[[site]] table, or leave it out for a free one"
            )
        check_port(where, port)
        owners[port] = name


def _plan(
    args: argparse.Namespace, sites: Sequence["Site"], parts: Sequence[NodeOfSite], overrides: Sequence[str]
) -> list[Job]:
    from titan_ext.config import check_outputs

    for site in sites:
        check_outputs(site.config)
    found = lighthouses(sites, port=args.lighthouse_port) if _needs_lighthouse(args, sites) else Lighthouses()
    for line in found.lines:
        print(line)
    if found.services and (named := os.environ.get(_LIGHTHOUSE)):
        print(f"note: the variable {_LIGHTHOUSE} = {named!r} is not read: --lighthouse URL names another one")
    expected = waiting_for_all(sites)
    return found.services + site_jobs(
        parts,
        lambda name: ("--config", args.file, "--site", name, *expected, *found.flags.get(name, ()), *overrides),
        grace_seconds=args.grace_seconds,
        patience_seconds=args.rendezvous_seconds,
        environment=found.environment,
    )


def _needs_lighthouse(args: argparse.Namespace, sites: Sequence["Site"]) -> bool:
    """Whether one must be started: sites exchange, and no address is given by flag or file."""
    meeting = [site for site in sites if site.config.semi_sync.method != "none"]
    missing = [site for site in meeting if site.config.replica.lighthouse is None]
    if not missing:
        return False
    if args.only and (named := os.environ.get(_LIGHTHOUSE)):
        print(f"lighthouse at {named} ({_LIGHTHOUSE})")
        return False
    if args.local_nodes is None and any(site.nodes.count > 1 for site in missing):
        raise UserError(
            f'site "{missing[0].name}" has several nodes: say where all of them find the other sites with --lighthouse '
            "http://host:port (`titan-ext lighthouse` runs one)"
        )
    needed = max(site.config.replica.min_sites for site in missing)
    if args.only and needed > len(missing):
        raise UserError(
            f"--only {' '.join(args.only)}: replica.min_sites = {needed}, so other sites must join: say where they meet "
            "with --lighthouse http://host:port (`titan-ext lighthouse` runs one)"
        )
    return True


COMMAND = Command(
    name="launch",
    help="train: start the sites of a file on this machine",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
