"""Where the data of sites lies: folders of this machine, or servers of others."""

import shutil
import socket
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from titan_ext.errors import UserError
from titan_ext.instruments.lines import LocalFile, Source

METRICS, COMMITS, EVENTS, CONFIG, SUMMARY = FILES = (
    "metrics.jsonl",
    "commits.jsonl",
    "events.jsonl",
    "config.json",
    "summary.json",
)
"""Of a site: all that is read of it, and all that is served."""

_ANY_OF = (METRICS, COMMITS, EVENTS, CONFIG)


class SiteFiles(Protocol):
    """The files of a site."""

    def open(self, name: str) -> Source:
        """One of ``FILES``."""

    def disk(self) -> dict[str, float] | None:
        """Bytes ``free`` and ``total`` where the site writes; None where that is not known."""


class Place(Protocol):
    """Where one or several sites are found."""

    def sites(self) -> Mapping[str, SiteFiles]:
        """The sites that are there now, by name.

        Raises:
            OSError: the place cannot be reached; says why in a line.
        """


class LocalSite:
    """The folder of a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str) -> Source:
        """As ``SiteFiles.open``."""
        return LocalFile(self.folder / name)

    def disk(self) -> dict[str, float] | None:
        """As ``SiteFiles.disk``."""
        try:
            found = shutil.disk_usage(self.folder)
        except OSError:
            return None
        return {"free": found.free, "total": found.total}


class LocalSites:
    """Folders of this machine, those of sites and those with sites in them; new ones are found as they appear.

    Args:
        folders: of one run.
        expected: names of sites that are to come; of folder, site.
    """

    def __init__(self, folders: Sequence[Path], expected: Mapping[str, Path] | None = None) -> None:
        self._folders = folders
        self._expected = expected or {}

    @property
    def folder(self) -> Path:
        """The first of the folders."""
        return self._folders[0]

    def sites_have_written(self) -> bool:
        """Whether any has."""
        return any(is_site(each.folder) for each in self.sites().values())

    def sites(self) -> Mapping[str, LocalSite]:
        """As ``Place.sites``."""
        found = {name: LocalSite(folder) for name, folder in self._expected.items()}
        for folder in self._folders:
            for each in [folder] if is_site(folder) else sorted(_subfolders(folder)):
                if is_site(each):
                    found.setdefault(each.name, LocalSite(each))
        return found


def is_site(folder: Path) -> bool:
    """Whether a site has written here."""
    return any((folder / name).is_file() for name in _ANY_OF)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if each.is_dir()]
    except OSError:
        return []  # it is to come, or has gone


def local_place(argument: str) -> LocalSites:
    """What a folder or a configuration file on the command line stands for.

    Raises:
        UserError: there is no such file or folder, or no site in it.
    """
    path = Path(argument).expanduser()
    if path.suffix == ".toml":
        return _of_file(path)
    if not path.is_dir():
        raise UserError(f"{argument}: no such folder; give a run's dump_folder, a site's, a FILE.toml or a URL")
    place = LocalSites([path.resolve()])
    if not place.sites():
        raise UserError(f"{argument}: no site has written here (there is no {METRICS} in it or in a folder of it)")
    return place


def _of_file(path: Path) -> LocalSites:
    """The folder of a file's run; the file is not checked, for it may be made for other machines."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    folder = found.get("dump_folder", f"runs/{path.stem}")
    sites = found.get("site", [])
    if not isinstance(folder, str) or not isinstance(sites, list):
        raise UserError(
            f"{path}: see `titan-ext check {path}`: dump_folder must be a folder and [[site]] a list of tables"
        )
    root = Path(folder).expanduser().resolve()
    names = [each.get("name") for each in sites if isinstance(each, dict)]
    return LocalSites([root], {name: root / name for name in names if isinstance(name, str)})


def host_and_port(url: str) -> tuple[str, int]:
    """The two of ``http://host:port``.

    Raises:
        UserError: it is no such address.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise UserError(f"{url}: must be http://host:port, as metrics.serve_port and `titan-ext watch --web` serve it")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return all(str(each[4][0]).startswith("127.") or each[4][0] == "::1" for each in socket.getaddrinfo(host, 0))
    except OSError:
        return False
