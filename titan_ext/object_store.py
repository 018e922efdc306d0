"""Files behind URLs, on object stores and web servers: their file systems by fsspec, and patience with servers.

Credentials and endpoints are those of fsspec's file systems: of the environment, of their own files of settings, and of
fsspec's configuration (``FSSPEC_S3_ENDPOINT_URL``, ``~/.config/fsspec``).
"""

import logging
import math
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from titan_ext.error_text import may_pass, reason
from titan_ext.errors import ReadError, RunError, UserError, nearest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

RETRY_SECONDS = 600.0
"""How long a server may be away before what needs it fails."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://[^/]*")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
}
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
_CONNECT_SECONDS, _SILENCE_SECONDS = 10.0, 60.0

_Result = TypeVar("_Result")


def is_url(place: object) -> bool:
    """Whether a place is named as a URL, ``SCHEME://…``, not as a path of this machine."""
    return _URL.match(str(place)) is not None


def file_system(url: str) -> "AbstractFileSystem":
    """The file system of a URL, which takes the URL itself as a path; ask for it anew in a forked process.

    Raises:
        UserError: no file system is known for its scheme, a package is missing, or its settings cannot be used.
    """
    import fsspec
    from fsspec.config import apply_config

    scheme = _scheme(url)
    if scheme in ("s3", "s3a"):
        _limit_silence()
    try:
        kind = fsspec.get_filesystem_class(scheme)
        settings = apply_config(kind, _settings(scheme))
        # What was listed once may have changed since.
        return fsspec.filesystem(scheme, **{"use_listings_cache": False, **settings})
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        cure = f"pip install {package}" if package else reason(error)
        raise UserError(f"{url!r}: a package for {scheme}:// is not installed: {cure}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{url!r}: {_unknown(scheme) or reason(error)}") from error


class Patience:
    """How long to go on trying what a server fails at.

    That it went away, and that it is back, is logged once a process, however many threads wait for it.

    Args:
        url: of what is tried; what messages name.
        retry_seconds: how long to try again, from the first failure on; 0: not at all.
    """

    def __init__(self, url: str, retry_seconds: float = RETRY_SECONDS) -> None:
        self._url, self._server, self._retry_seconds = url, _URL.match(url)[0], retry_seconds
        self._end, self._wait = math.inf, _FIRST_WAIT

    def pause(self, error: Exception) -> float:
        """Seconds to wait before the next attempt, after one that failed.

        Raises:
            UserError: the server's answer is final: no such bucket or file, no access.
            ReadError: it has been away for so long.
            RunError: it is one, which is final as well.
        """
        if isinstance(error, UserError | RunError):
            raise error
        if not may_pass(error):
            raise UserError(f"{self._url!r}: {_refusal(error, self._url)}") from error
        now = time.monotonic()
        self._end = min(self._end, now + self._retry_seconds)
        left = self._end - now
        if left <= 0:
            tried = f", tried again for {self._retry_seconds:.0f} s" if self._retry_seconds else ""
            raise ReadError(f"{self._url!r}: the server cannot be reached{tried}: {_words(error)}") from error
        _away.note(self._server, error, left)
        pause, self._wait = self._wait * random.uniform(0.5, 1.0), min(2 * self._wait, _LONGEST_WAIT)
        return min(pause, left)

    def answered(self) -> None:
        """An attempt has succeeded."""
        _away.clear(self._server)


def patiently(
    url: str, operation: "Callable[[AbstractFileSystem], _Result]", retry_seconds: float = RETRY_SECONDS
) -> _Result:
    """What ``operation`` returns, which is tried again while the server is away.

    Args:
        url: whose file system it is given; what messages name.
        operation: may be called several times.
        retry_seconds: as in ``Patience``.

    Raises:
        UserError, RunError: as ``Patience.pause``, or as ``file_system``.
    """
    patience = Patience(url, retry_seconds)
    while True:
        try:
            result = operation(file_system(url))
        except Exception as error:  # noqa: BLE001 - whatever the many libraries below fsspec raise
            time.sleep(patience.pause(error))
        else:
            patience.answered()
            return result


class _Away:
    """Which servers do not answer. Without a lock: a fork might copy it held."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def note(self, server: str, error: Exception, left: float) -> None:
        now = time.monotonic()
        if self._since.setdefault(server, now) is now:
            logging.getLogger().warning("%s is away (%s); trying again for %.0f s", server, _words(error), left)

    def clear(self, server: str) -> None:
        since = self._since.pop(server, None)
        if since is not None:
            logging.getLogger().warning("%s is back after %.0f s", server, time.monotonic() - since)


_away = _Away()


def _scheme(url: str) -> str:
    found = _URL.match(url)
    if found is None:
        raise UserError(f"{url!r}: not a URL")
    return found[1].lower()


def _settings(scheme: str) -> dict[str, Any]:
    """Settings that fsspec's defaults are too short for: of a web server, no limit for a whole file but for silence."""
    if scheme not in ("http", "https"):
        return {}
    import aiohttp
    from fsspec.config import conf

    own = (conf.get("http", {}) | conf.get("https", {})).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, **own}}


def _limit_silence() -> None:
    """Give a store that does not answer less time than botocore's minutes, also in what torch and torchtitan open."""
    from fsspec.config import conf

    own = conf.setdefault("s3", {})
    limits = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS, "retries": {"max_attempts": 1}}
    own["config_kwargs"] = limits | own.get("config_kwargs", {})


def _unknown(scheme: str) -> str | None:
    """The complaint about a scheme without a file system; None for one that has one."""
    from fsspec import available_protocols

    if scheme in available_protocols():
        return None
    close = nearest(scheme, available_protocols())
    hint = f"; did you mean {close}://?" if close else ""
    return f"no file system is known for {scheme}://, as s3://, gs:// and https:// have one{hint}"


def _refusal(error: Exception, url: str) -> str:
    if isinstance(error, PermissionError):
        return f"no access ({reason(error)})"
    if isinstance(error, FileNotFoundError):
        words = _words(error)
        return "not there" if words in url else f"not there ({words})"
    return _words(error)


def _words(error: Exception) -> str:
    hidden = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return reason(hidden or error)
