"""One run at a time at a site's part of an object store, where there are no locks: the run that begins last has it."""

import json
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from titan_ext.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FILE_NAME = "owner.json"


class TakenOver(UserError):
    """Another run has begun where this one saves."""


class Ownership:
    """A run's hold of a site's part of a store.

    Whether an earlier run still lives the store cannot tell. So a run that begins takes the part over, and one that has
    lost it ends before it would save.

    Args:
        part: URL of the site's part.
        dump_folder: the site's, to tell people who has it.
    """

    def __init__(self, part: str, dump_folder: str) -> None:
        self._part, self._file = part, f"{part}/{FILE_NAME}"
        self._who = {"host": socket.gethostname(), "folder": os.path.abspath(dump_folder)}
        self._id, self._taken = secrets.token_hex(8), False

    def take(self, files: "AbstractFileSystem") -> str | None:
        """Take the part over; returns what is to be said of who had it, None where that was a run in the same folder."""
        before, self._taken = self._read(files), True
        files.pipe_file(self._file, json.dumps({"id": self._id, **self._who, "since": _now()}).encode())
        if before is None or {key: before.get(key) for key in self._who} == self._who:
            return None
        return (
            f"{self._part}: a run in {_where(before)} saved here before; this one goes on from there, and that one ends at "
            "its next checkpoint if it still trains"
        )

    def check(self, files: "AbstractFileSystem") -> None:
        """Look whether the part is still this run's; of a run that has never taken it, take it.

        Raises:
            TakenOver: it is not.
        """
        if not self._taken:
            self.take(files)
        found = self._read(files)
        if found is not None and found.get("id") != self._id:
            raise TakenOver(
                f"checkpoint.folder {self._part}: a run in {_where(found)} has begun here and saves here now; this one ends"
            )

    def _read(self, files: "AbstractFileSystem") -> dict[str, Any] | None:
        try:
            return dict(json.loads(files.cat_file(self._file)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return {}


def _where(owner: dict[str, Any]) -> str:
    return f"{owner.get('folder')} on {owner.get('host')}, begun {owner.get('since')},"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
