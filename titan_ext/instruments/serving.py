"""The launcher's part: each site's files on a port of its own, as long as its job lives, whatever its ranks do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from titan_ext.errors import UserError
from titan_ext.instruments.places import LocalSite, SiteFiles
from titan_ext.instruments.server import RunServer, Served
from titan_ext.replica.membership.shared_secret import load_secret


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSite:
    """A site of this machine that is to be served."""

    name: str
    folder: Path
    host: str
    """Address to listen on; empty for all."""
    port: int
    secret_file: str | None


@contextmanager
def serving(sites: Sequence[ServedSite]) -> Iterator[list[str]]:
    """Serve the sites while entered, those of one port together.

    Yields:
        a line for each server: where it is.

    Raises:
        UserError: a port cannot be listened on, sites of one port have different secrets, or a secret is invalid.
    """
    with ExitStack() as stack:
        lines = []
        for port in dict.fromkeys(site.port for site in sites):
            together = [site for site in sites if site.port == port]
            server = _start(port, together)
            stack.callback(server.stop)
            names = ", ".join(site.name for site in together)
            lines.append(f"metrics of {names} on port {port}: titan-ext watch http://HOST:{port}")
        yield lines


def _start(port: int, sites: Sequence[ServedSite]) -> RunServer:
    setting = f"metrics.serve_port = {port}"
    if len({(site.host, site.secret_file) for site in sites}) > 1:
        raise UserError(f"{setting}: sites that share a port must have one address and one replica.secret_file")
    secret = load_secret(sites[0].secret_file)
    files: Mapping[str, SiteFiles] = {site.name: LocalSite(site.folder) for site in sites}
    try:
        return RunServer(sites[0].host, port, Served(lambda: files), secret)
    except OSError as error:
        raise UserError(f"{setting}: cannot listen there ({error.strerror or error})") from error
