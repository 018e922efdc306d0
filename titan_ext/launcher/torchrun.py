"""torchrun that passes on how a rank ended, where torchrun itself exits with 1, and at a site of several nodes on which."""

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from ipaddress import ip_address

from titan_ext.error_text import print_anything
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.log import ERROR_PREFIX
from titan_ext.launcher.node import Node
from titan_ext.launcher.site_nodes import End, SiteNodes
from titan_ext.launcher.surroundings import GLOO_INTERFACE, check_variables
from titan_ext.replica.address import interface_with

_NCCL = "NCCL_SOCKET_IFNAME"
_MARGIN_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 2 if a rank of the site reported bad input, else the exit code of what failed first."""
    from torch.distributed.run import parse_args

    print_anything()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_args(words)
    return _run_agent(words)[0] if options.nnodes in ("1", "1:1") else _run_with_others(words, options)


def _run_with_others(words: Sequence[str], options: Namespace) -> int:
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    own = options.node_rank
    node = Node(own, int(options.nnodes), options.master_addr, options.master_port)
    nodes = SiteNodes(node, float(_parse_rendezvous_config(options.rdzv_conf)["timeout"]))
    try:
        if own == 0:
            print(f"titan-ext: node 0 waits for {node.count - 1} other(s) at {node.host}:{node.port}", flush=True)
        addresses = nodes.meet()
        choose_interfaces(addresses, own)
    except (UserError, RunError) as error:
        print(f"{ERROR_PREFIX} node {own}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"titan-ext: node {own} of {node.count} ({addresses[own]}) begins with {', '.join(addresses)}", flush=True)
    limits: list[threading.Timer] = []
    nodes.watch(lambda: limits.append(_end_agent(nodes, own, options.shutdown_timeout or 0)))
    code, reason = _run_agent(words)
    for limit in limits:
        limit.cancel()
    return _told(nodes.finish(code, reason), own)


def _told(end: End, node: int) -> int:
    """Say why the attempt has ended, unless it is in this node's log; returns the exit code."""
    if end.reason and end.node != node:
        print(f"{ERROR_PREFIX} {end.reason}", file=sys.stderr, flush=True)
    return end.code


def choose_interfaces(addresses: Sequence[str], node: int) -> None:
    """Let the ranks of this node talk to those of the others through the interface that leads to node 0.

    Args:
        addresses: of each node, towards node 0.
        node: which one this is.

    Raises:
        UserError: node 0 takes its own name for that of its loopback interface, and the others do not; the user names
            an interface that is not there.
    """
    loopback = [ip_address(each.partition("%")[0]).is_loopback for each in addresses]
    if any(loopback) and not all(loopback):
        raise UserError(
            f"node 0 finds itself at {addresses[0]}, where the other nodes do not reach it: give all nodes --rendezvous with "
            "an address that they reach"
        )
    check_variables()
    found = interface_with(addresses[node])
    if found is not None:
        for variable in (GLOO_INTERFACE, _NCCL):
            os.environ.setdefault(variable, found)


def _run_agent(words: Sequence[str]) -> tuple[int, str]:
    """Run torchrun's agent; returns an exit code, and why it is not 0 where no rank could say so."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from titan_ext.replica.shutdown.failure import killed

    try:
        torchrun(list(words))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        reason = killed(codes) or ""
        if reason:
            print(f"{ERROR_PREFIX} {reason}", file=sys.stderr, flush=True)
        first = error.get_first_failure()[1].exitcode
        code = UserError.exit_code if UserError.exit_code in codes.values() else first
        return 128 - code if code < 0 else code, reason
    except SignalException as error:
        return 128 + error.sigval, ""
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's handler raises
    return 0, ""


def _end_agent(nodes: SiteNodes, node: int, grace_seconds: float) -> threading.Timer:
    """End the agent, which tells its ranks; returns what ends the process where it does not come to that."""
    end = nodes.end

    def give_up() -> None:
        os._exit(_told(end, node))  # the guard ends the ranks

    timer = threading.Timer(grace_seconds + _MARGIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)
    return timer


if __name__ == "__main__":
    sys.exit(main())
