"""Several data sources of a site, of which one is read at a time."""

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader

from titan_ext.data.corpora.contents import without_cards
from titan_ext.data.feed import Feed
from titan_ext.data.packing import Sample
from titan_ext.data.remote.files import names_that_fit
from titan_ext.errors import UserError, require
from titan_ext.object_store import is_url

# Corpora that are kept open; what is further back is opened again in its next turn, so that memory does not grow.
_OPEN = 4


@dataclass(kw_only=True, slots=True)
class SourceTable:
    """A data source of a site: it trains a model of its own in each round, and the site contributes their mean."""

    name: str
    """Name of the source, under which its place in the data is kept; unique at its site."""

    dataset: str
    """Its corpus, as ``data.dataset``."""

    weight: float = 1.0
    """Its weight in a round's mean under ``semi_sync.weighting = "site"``, times the site's."""


def all_sources(tables: list[SourceTable], pattern: str, retry_seconds: float) -> list[SourceTable]:
    """The sources of the tables, and one for each file or folder that fits the pattern, named as it is without ending.

    Raises:
        UserError: nothing fits the pattern.
        ReadError: the server of a URL has been away for so long.
    """
    if not pattern:
        return tables
    paths, _ = corpora_that_fit(pattern, retry_seconds)
    if not paths:
        raise UserError(f"data.sources = {pattern!r}: no file or folder fits")
    return [*tables, *(SourceTable(name=Path(path).name.partition(".")[0], dataset=path) for path in paths)]


def corpora_that_fit(pattern: str, retry_seconds: float) -> tuple[list[str], list[str]]:
    """Paths or URLs of the corpora that fit a pattern, and of what fits and is only their card, such as a README.

    Raises:
        ReadError: the server of a URL has been away for so long.
    """
    if is_url(pattern):
        paths = list(names_that_fit(pattern, retry_seconds))
    else:
        paths = sorted(glob(str(Path(pattern).expanduser())))
    return without_cards([path for path in paths if not Path(path).name.startswith(".")])


def check_sources(tables: list[SourceTable], config: Any) -> None:
    """Refuse tables that cannot be meant together, or with other keys of [data] (a ``TextDataLoader.Config``).

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    names = [source.name for source in tables]
    for place, source in enumerate(tables):
        key = f"source[{place}]"
        require(bool(source.name), f"{key}.name", source.name, "a name")
        require(names.count(source.name) == 1, f"{key}.name", source.name, "unique among the site's sources")
        require(bool(source.dataset), f"{key}.dataset", source.dataset, "a corpus, as data.dataset")
        require(source.weight > 0, f"{key}.weight", source.weight, "above 0")
    require(not config.mix, "data.mix", config.mix, "left out with data sources, which take turns")
    require(config.infinite, "data.infinite", config.infinite, "true with data sources, which are read over and over")
    require(config.num_workers == 0, "data.num_workers", config.num_workers, "0 with data sources")
    require(not config.dataset, "data.dataset", config.dataset, "left out with data sources, each of which has its own")


class SourcesDataLoader(BaseDataLoader):
    """Batches of one source after the other; each goes on where it stopped.

    Args:
        config: a ``TextDataLoader.Config`` with sources, whose other keys hold for all of them.
        parts: what a ``TextDataLoader`` takes.

    Raises:
        UserError: as ``TextDataLoader``, of the first source.
    """

    def __init__(self, config: Any, **parts: Any) -> None:
        config.validate()
        tables = config.all_sources()
        self._tables = {table.name: table for table in tables}
        self._config, self._parts = config, parts
        self._open: OrderedDict[str, _Reader] = OrderedDict()
        self._saved: dict[str, dict[str, Any]] = {}
        self.current = tables[0].name
        """Name of the source that is read."""
        self.notes: list[str] = []
        """What is to be said of the state that was loaded."""
        self._reader()

    def __iter__(self) -> Iterator[Sample]:
        """Batches of whichever source is served at the moment."""
        while True:
            yield self._reader().next()

    def serve(self, source: str, first: int | None = None) -> None:
        """Read another source from now on. A collective over the site.

        Args:
            source: its name.
            first: batches of its data, from the beginning, that go before; None: it goes on where it stopped.
        """
        self.current = source
        if first is None:
            return
        if self._place(source) > first:
            self._open.pop(source, None)
            self._saved.pop(source, None)
        if self._place(source) < first:
            self._reader().skip(first)

    @property
    def feed(self) -> Feed:
        """The documents of the source that is read."""
        return self._reader().loader.feed

    def identify_tokens(self) -> None:
        """Raises UserError: a loss that asks whose the tokens are keeps statistics of one corpus."""
        raise UserError("loss.name: a loss that sees whose the tokens are cannot be had with data sources")

    def state_dict(self) -> dict[str, Any]:
        """The places of all sources. A collective over the site."""
        places = self._saved | {name: reader.state_dict() for name, reader in self._open.items()}
        return {"sources": pickle.dumps({"current": self.current, "places": places})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each source that there still is goes on at its place.

        Raises:
            UserError: the state is of a site without sources.
        """
        if not state_dict:
            return
        if "sources" not in state_dict:
            raise UserError(
                "data: the checkpoint's place in the corpus is of a site without data sources; start the corpora anew with "
                "checkpoint.exclude_from_loading = ['dataloader']"
            )
        state = pickle.loads(state_dict["sources"])
        self._open.clear()
        self._saved = {name: place for name, place in state["places"].items() if name in self._tables}
        gone = state["places"].keys() - self._saved.keys()
        self.notes = [f"source {name} is no more: its place in the data is dropped" for name in sorted(gone)]
        if state["current"] in self._tables:
            self.current = state["current"]

    def _place(self, source: str) -> int:
        reader = self._open.get(source)
        return reader.taken if reader is not None else self._saved.get(source, {}).get("taken", 0)

    def _reader(self) -> "_Reader":
        name = self.current
        if name not in self._open:
            while len(self._open) >= _OPEN:
                oldest, closed = self._open.popitem(last=False)
                self._saved[oldest] = closed.state_dict()
            one = replace(self._config, dataset=self._tables[name].dataset, source=[], sources="")
            reader = self._open[name] = _Reader(one.build(**self._parts))
            if name in self._saved:
                reader.load_state_dict(self._saved.pop(name))
        self._open.move_to_end(name)
        return self._open[name]


class _Reader:
    """One source that is open, by its ``TextDataLoader``."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.taken = 0
        """Batches since the beginning."""
        self._batches: Iterator[Sample] | None = None

    def next(self) -> Sample:
        self._batches = self._batches or iter(self.loader)
        batch = next(self._batches)
        self.taken += 1
        return batch

    def skip(self, first: int) -> None:
        while self.taken < first:
            self.next()

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.loader.load_state_dict(state["loader"])
