"""``titan-ext lighthouse``: where the sites of a run find each other."""

import argparse
import signal
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from titan_ext.commands.command import Command
from titan_ext.errors import UserError

_DESCRIPTION = """\
Run a torchft lighthouse until Ctrl-C or SIGTERM. It decides which sites take part in a round; parameters
never pass through it. Every site must reach it, and the sites must reach each other. Without
replica.secret_file whoever reaches it can join the run, and in any case can hold it up: keep it inside a
private network.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and when a round may begin."""
    parser.add_argument("--bind", default="[::]:29510", metavar="ADDRESS:PORT", help="default %(default)s")
    parser.add_argument("--min-sites", type=int, default=1, metavar="N", help="sites that a round needs (default 1)")
    parser.add_argument(
        "--join-timeout-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="how long a round waits for a site that lives but is late (default %(default)s)",
    )
    parser.add_argument(
        "--heartbeat-timeout-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="silence after which a site counts as dead (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns 0.

    Raises:
        UserError: an argument that cannot work, or an address that cannot be listened on.
    """
    _check(args)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stops.append(received))
    server = _start(args)
    port = urlsplit(server.address()).port
    host = _bound_host(args.bind)
    print(f"lighthouse: listening on {args.bind}, rounds need {args.min_sites} site(s)")
    print(f"  each site:  titan-ext launch FILE.toml --only SITE --lighthouse http://{host}:{port}")
    print(f"  dashboard:  http://{host}:{port}", flush=True)
    while not stops:
        time.sleep(0.1)
    server.shutdown()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.min_sites < 1:
        raise UserError(f"--min-sites {args.min_sites}: must be at least 1")
    for key in ("join_timeout_seconds", "heartbeat_timeout_seconds"):
        if not getattr(args, key) > 0:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)}: must be above 0 seconds")
    host, _, port = args.bind.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--bind {args.bind}: must be ADDRESS:PORT, such as [::]:29510 or 0.0.0.0:29510")


def _start(args: argparse.Namespace) -> Any:
    from torchft.coordination import LighthouseServer

    try:
        return LighthouseServer(
            args.bind,
            args.min_sites,
            join_timeout_ms=round(args.join_timeout_seconds * 1000),
            heartbeat_timeout_ms=round(args.heartbeat_timeout_seconds * 1000),
        )
    except RuntimeError as error:
        # Bad input also in that trying again is no use: sites must not meet at whatever else listens there.
        raise UserError(f"--bind {args.bind}: the lighthouse cannot listen there: {error}") from None


def _bound_host(bind: str) -> str:
    """The host of the address, or this machine's name where it listens on every interface."""
    host = bind.rpartition(":")[0]
    return socket.gethostname() if host in ("[::]", "0.0.0.0") else host


def command(
    *, address: str, min_sites: int, join_timeout_seconds: float, heartbeat_timeout_seconds: float
) -> list[str]:
    """The command line of a lighthouse at an address (``host:port``) of this machine."""
    return [
        *(sys.executable, "-m", "titan_ext", "lighthouse"),
        *("--bind", address),
        *("--min-sites", str(min_sites)),
        *("--join-timeout-seconds", str(join_timeout_seconds)),
        *("--heartbeat-timeout-seconds", str(heartbeat_timeout_seconds)),
    ]


COMMAND = Command(
    name="lighthouse",
    help="run the lighthouse at which sites find each other",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
