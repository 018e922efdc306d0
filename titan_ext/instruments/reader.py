"""The one reader of runs: keeps a ``SiteHistory`` of every site up to date, wherever its files are."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from titan_ext.instruments.lines import LineFollower, Source, read_table
from titan_ext.instruments.places import COMMITS, CONFIG, EVENTS, METRICS, SUMMARY, Place, SiteFiles
from titan_ext.instruments.run import Run
from titan_ext.instruments.site import SiteHistory

T = TypeVar("T")

_FOLD: dict[str, Callable[[SiteHistory, dict[str, Any]], None]] = {
    # What the launcher says is read first: it explains the lines that follow it.
    EVENTS: SiteHistory.add_event,
    METRICS: SiteHistory.add_metrics,
    COMMITS: SiteHistory.add_commit,
}


class SiteReader:
    """Follows the files of one site.

    Args:
        name: of the site.
        files: where they are.
        lock: held while the history changes, and never while something is waited for.
    """

    def __init__(self, name: str, files: SiteFiles, lock: threading.Lock) -> None:
        self._name, self._files, self._lock = name, files, lock
        self._begin()

    def refresh(self) -> bool:
        """Read what is new; whether there was anything. What cannot be read is told in the history's ``problem``."""
        try:
            changed = self._read_lines()
            whole = {file: each.read() for file, each in self._whole.items()}
            disk = self._files.disk()
        except OSError as error:
            place = f"{os.path.basename(error.filename)}: " if isinstance(error.filename, str) else ""
            return self.fail(f"{place}{error.strerror or error}")
        history = self.history
        changed |= history.problem is not None or (history.config, history.summary) != (whole[CONFIG], whole[SUMMARY])
        history.config, history.summary, history.disk, history.problem = whole[CONFIG], whole[SUMMARY], disk, None
        return changed

    def fail(self, problem: str) -> bool:
        """Keep why nothing can be read; whether that is new."""
        changed, self.history.problem = self.history.problem != problem, problem
        return changed

    def _read_lines(self) -> bool:
        changed = False
        for file, follower in self._followers.items():
            lines = follower.poll()
            if follower.begun_anew:
                # Another run has taken the place of the one that was read.
                self._begin()
                return self._read_lines() or True
            with self._lock:
                for record in lines:
                    _FOLD[file](self.history, record)
            changed |= bool(lines)
        return changed

    def _begin(self) -> None:
        self.history = SiteHistory(self._name)
        self._followers = {file: LineFollower(self._files.open(file)) for file in _FOLD}
        self._whole = {file: _WholeFile(self._files.open(file)) for file in (CONFIG, SUMMARY)}


class RunReader:
    """Follows all sites of a run.

    Args:
        name: of the run, for a title.
        places: where its sites are.
    """

    def __init__(self, name: str, places: Sequence[Place]) -> None:
        self._name, self._places = name, places
        self._lock = threading.Lock()
        self._readers: dict[str, SiteReader] = {}
        self._problems: dict[Place, str] = {}
        self._found: dict[Place, set[str]] = {}
        self._owners: dict[str, Place] = {}
        self._twice: set[str] = set()
        self._stopped = threading.Event()
        self.files: dict[str, SiteFiles] = {}
        """Of each site that was found."""
        self.version = 0
        """Grows whenever something is new."""

    def refresh(self) -> None:
        """Read what is new everywhere, and wait for it."""
        for place in self._places:
            self._refresh(place)

    def start(self, seconds: float) -> None:
        """Read every so many seconds, each place on a thread of its own: one that does not answer delays no other."""
        for place in self._places:
            threading.Thread(target=self._follow, args=[place, seconds], daemon=True, name="titan_ext-reader").start()

    def stop(self) -> None:
        """Begin no more reading."""
        self._stopped.set()

    def view(self, make: Callable[[Run], T]) -> T:
        """What ``make`` says of the run as far as it has been read, which stands still meanwhile."""
        with self._lock:
            return make(Run(self._name, {name: reader.history for name, reader in self._readers.items()}))

    @property
    def problems(self) -> list[str]:
        """Places that cannot be reached at the moment, and why; sites that two places have."""
        twice = [f"two targets have a site {name}: the first one is shown" for name in sorted(self._twice)]
        return [*self._problems.values(), *twice]

    def _follow(self, place: Place, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            self._refresh(place)

    def _refresh(self, place: Place) -> None:
        try:
            found = place.sites()
            self._problems.pop(place, None)
        except OSError as error:
            self._problems[place] = error.strerror or str(error)
            for name in self._found.get(place, ()):
                self.version += self._readers[name].fail(self._problems[place])
            return
        with self._lock:
            self._twice.update(name for name in found if self._owners.setdefault(name, place) is not place)
        found = {name: files for name, files in found.items() if self._owners[name] is place}
        self._found[place] = set(found)
        for name, files in found.items():
            with self._lock:
                self.files.setdefault(name, files)
                known = self._readers.setdefault(name, SiteReader(name, files, self._lock))
            self.version += known.refresh()


class _WholeFile:
    """A small JSON file that is replaced as a whole."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._identity: str | None = None
        self._size = 0
        self._value: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """What it holds; None where there is none."""
        chunk = self._source.read(self._identity, self._size)
        if chunk is None:
            self._identity, self._size, self._value = None, 0, None
        elif chunk.data:
            whole = chunk if chunk.start == 0 else self._source.read(None, 0)
            if whole is not None:
                self._identity, self._size, self._value = whole.identity, len(whole.data), read_table(whole.data)
        return self._value
