"""``titan-ext watch``: all sites of a run, live, in a terminal or as a web page."""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from titan_ext.instruments.alerts import AlertRule
    from titan_ext.instruments.reader import RunReader
    from titan_ext.instruments.server import RunServer

_DESCRIPTION = """\
Show the sites of a run: what each does, who took part in which round and why another did not, losses,
bytes, stall, and alerts. Works while the run goes on and afterwards. A TARGET is a configuration file
(its dump_folder on this machine), a run's or a site's folder, or a URL: of a site (metrics.serve_port)
or of another `titan-ext watch --web`. Several make one picture.

Keys in the terminal: x changes what the loss is drawn over (steps, seconds, tokens, bytes), q or Ctrl-C ends.
"""

_EPILOG = """\
examples:
  titan-ext watch train_configs/demo.toml
  titan-ext watch runs/demo --web                              a page at http://127.0.0.1:29530
  titan-ext watch http://east:29520 http://west:29520 --secret-file run.secret
  titan-ext watch runs/demo --once                             print and end; exit code 1 if an alert is critical
"""

_PORT = 29530


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to watch, and where to show it."""
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="FILE.toml, a folder, or http://host:port")
    parser.add_argument(
        "--web",
        nargs="?",
        const=f"127.0.0.1:{_PORT}",
        metavar="HOST:PORT",
        help=f"serve a page instead, and OpenMetrics at /metrics (default 127.0.0.1:{_PORT}: this machine alone)",
    )
    parser.add_argument(
        "--alerts", metavar="FILE.toml", help="alerts of your own, see titan_ext/instruments/alerts.toml"
    )
    parser.add_argument("--secret-file", metavar="FILE", help="the run's replica.secret_file, for sites behind a URL")
    parser.add_argument("--once", action="store_true", help="print once and end, as without a terminal")
    parser.add_argument("--json", action="store_true", help="print the picture once, as JSON")
    parser.add_argument("--measures", action="store_true", help="list what alerts can compare")
    parser.add_argument(
        "--refresh-seconds", type=float, default=1.0, metavar="S", help="between two looks (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Show the run until told to stop.

    Returns:
        0; with ``--once``, 1 where an alert is critical or a site cannot be read.

    Raises:
        UserError: a target or flag that cannot work.
    """
    if args.measures:
        _print_measures()
        return 0
    if not args.targets:
        raise UserError("watch: name a FILE.toml, a folder or a URL")
    if not args.refresh_seconds > 0:
        raise UserError(f"--refresh-seconds {args.refresh_seconds:g}: must be above 0 seconds")
    from titan_ext.instruments.alerts import load_rules

    rules = load_rules(args.alerts)
    reader = open_reader(args.targets, args.secret_file)
    if args.web is not None:
        return _serve(args, reader, rules)
    if args.json:
        reader.refresh()
        print(json.dumps(_shot(reader, rules), indent=2))
        return 0
    if find_spec("rich") is None:
        raise UserError("watch: needs rich for the terminal: pip install 'titan_ext[watch]', or use --web")
    return _once(reader, rules) if args.once or not sys.stdout.isatty() else _live(args, reader, rules)


def open_reader(targets: Sequence[str], secret_file: str | None) -> "RunReader":
    """The reader of what stands on the command line.

    Raises:
        UserError: there is no such thing.
    """
    from titan_ext.instruments.places import LocalSites, local_place
    from titan_ext.instruments.reader import RunReader
    from titan_ext.instruments.remote import RemoteSites
    from titan_ext.replica.membership.shared_secret import load_secret

    secret = load_secret(secret_file, flag="--secret-file {path}")
    places = [RemoteSites(each, secret) if "://" in each else local_place(each) for each in targets]
    for each in places:
        if isinstance(each, LocalSites) and not each.sites_have_written():
            print(f"note: no site has written into {each.folder} yet; is it the run's dump_folder?", file=sys.stderr)
    return RunReader(", ".join(_title(each) for each in targets), places)


def _title(target: str) -> str:
    return target if "://" in target else Path(target).resolve().name.removesuffix(".toml")


def _shot(reader: "RunReader", rules: "Sequence[AlertRule]", **size: int) -> dict[str, Any]:
    from titan_ext.instruments.snapshot import snapshot

    return reader.view(lambda run: snapshot(run, rules, time.time(), problems=reader.problems, **size))


def _once(reader: "RunReader", rules: "Sequence[AlertRule]") -> int:
    from rich.console import Console

    from titan_ext.instruments.terminal import draw

    reader.refresh()
    shot, console = _shot(reader, rules), Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=130, height=60, highlight=False)
    console.print(draw(shot, console))
    return int(any(each["severity"] == "critical" for each in shot["alerts"]) or _unread(reader))


def _unread(reader: "RunReader") -> bool:
    return bool(reader.problems) or reader.view(lambda run: any(site.problem for site in run.sites.values()))


def _live(args: argparse.Namespace, reader: "RunReader", rules: "Sequence[AlertRule]") -> int:
    from titan_ext.instruments.live import show

    # SIGTERM must leave the terminal as it was, too; and where a shell ignores Ctrl-C for what it starts, so does Python.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    reader.refresh()
    reader.start(args.refresh_seconds)
    try:
        show(lambda: _shot(reader, rules), args.refresh_seconds)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        reader.stop()
    return 0


def page_server(reader: "RunReader", rules: "Sequence[AlertRule]", host: str, port: int) -> "RunServer":
    """A server of the page with what the reader reads; stop it in the end.

    Raises:
        OSError: it cannot listen there.
    """
    from titan_ext.instruments.openmetrics import openmetrics
    from titan_ext.instruments.server import RunServer, Served

    served = Served(
        lambda: reader.files,
        snapshots=lambda: _shot(reader, rules),
        version=lambda: reader.version,
        openmetrics=lambda: openmetrics(_shot(reader, rules, points=2)),
    )
    return RunServer(host, port, served)


def _serve(args: argparse.Namespace, reader: "RunReader", rules: "Sequence[AlertRule]") -> int:
    host, port = _address(args.web)
    stop = _stop_signals()
    reader.refresh()
    try:
        server = page_server(reader, rules, host, port)
    except OSError as error:
        raise UserError(f"--web {args.web}: cannot listen there: {error.strerror or error}") from error
    reader.start(args.refresh_seconds)
    shown = f"http://{f'[{host}]' if ':' in host else host or '127.0.0.1'}:{server.port}"
    print(f"page:         {shown}/\nOpenMetrics:  {shown}/metrics", flush=True)
    _warn_of_others(host)
    try:
        stop.wait()
    finally:
        reader.stop()
        server.stop()
    return 0


def _stop_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    stop = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: stop.set())
    return stop


def _warn_of_others(host: str) -> None:
    from titan_ext.instruments.places import is_loopback

    if not host or not is_loopback(host):
        print("note: whoever reaches this address can read the run's metrics and configuration", file=sys.stderr)


def _address(setting: str) -> tuple[str, int]:
    host, _, port = setting.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--web {setting}: must be HOST:PORT, such as 127.0.0.1:{_PORT}")
    return host.strip("[]"), int(port)


def _print_measures() -> None:
    from titan_ext.instruments.measures import MEASURES

    width = max(map(len, MEASURES))
    print("\n".join(f"{name:<{width}}  {text}" for name, (_, text) in MEASURES.items()))


COMMAND = Command(
    name="watch",
    help="all sites of a run, live: in this terminal or as a web page",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
)
