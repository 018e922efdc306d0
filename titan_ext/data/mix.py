"""Several corpora of a site in one stream of sequences, each with its share of the tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader

from titan_ext.data.bad_records import BadRecords
from titan_ext.data.feed import Document, Feed
from titan_ext.data.packing import IDENTITY, Sample
from titan_ext.data.remote.files import names_below
from titan_ext.errors import InvalidValue, UserError, require
from titan_ext.object_store import is_url

_STATE = "mix"
_SHOWN = 8  # names in a message


@dataclass(kw_only=True, slots=True)
class MixChange:
    """Other shares from a step on."""

    step: int
    """Inner steps before them."""

    mix: dict[str, float] = field(default_factory=dict)
    """As ``data.mix``, of the same names; one that is left out has no share any more."""


def check_mix(config: Any) -> None:
    """Refuse shares that cannot be, of a ``TextDataLoader.Config``.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    _check_shares("data.mix", config.mix, config.mix)
    require(
        not config.mix_changes or bool(config.mix), "data.mix_changes", len(config.mix_changes), "left out without mix"
    )
    steps = [0]
    for place, change in enumerate(config.mix_changes if config.mix else ()):
        key = f"mix_changes[{place}]"
        require(change.step > steps[-1], f"{key}.step", change.step, f"above {steps[-1]}, that of the one before")
        require(bool(change.mix), f"{key}.mix", change.mix, "a table of shares, such as {wiki = 0.7, code = 0.3}")
        steps.append(change.step)
        _check_shares(f"{key}.mix", change.mix, config.mix)
    if config.mix:
        require(
            config.infinite, "data.infinite", config.infinite, "true with a mix, whose corpora are read over and over"
        )
        require(config.num_workers == 0, "data.num_workers", config.num_workers, "0 with a mix")
        # A server is asked when the corpora are listed.
        for name in config.mix if not is_url(config.dataset) else ():
            corpus_of(config, name)


def _check_shares(key: str, shares: Mapping[str, float], known: Mapping[str, float]) -> None:
    for name, share in shares.items():
        require(name in known, key, name, f"of names in data.mix ({', '.join(known)})")
        fine = 0 <= share < float("inf")
        require(fine, key, dict(shares), f"shares of at least 0, and finite; that of {name} is {share}")
    require(not shares or sum(shares.values()) > 0, key, dict(shares), "shares that are not all 0")


def corpus_of(config: Any, name: str, retry_seconds: float = 0.0) -> str:
    """The file or folder of a name: directly below ``data.dataset``, with an ending or without.

    Raises:
        UserError: there is none, or more than one.
        ReadError: the server of a URL has been away for so long.
    """
    if is_url(config.dataset):
        below = names_below(config.dataset, retry_seconds)
    else:
        below = [str(path) for path in sorted(Path(config.dataset).expanduser().glob("*"))]
    names = {path: PurePosixPath(path).name for path in below}
    found = [path for path in below if name in (names[path], names[path].partition(".")[0])]
    if len(found) != 1:
        there = sorted({names[path] for path in found or below})
        shown = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "") or "nothing"
        what = "both fit" if found else "it has"
        raise InvalidValue(
            "data.mix",
            dict(config.mix),
            f"{name!r} must be one file or folder in the folder data.dataset = {config.dataset!r}; {what}: {shown}",
        )
    return found[0]


class Turns:
    """Whose turn it is: each name as often as its share says, as evenly spread as whole turns can be.

    After n turns a name has had within one of n times its share, while shares stay as they are.

    Args:
        names: in the order in which ties are settled.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.credit = dict.fromkeys(names, 0.0)

    def next(self, shares: Mapping[str, float]) -> str:
        """The name that is due.

        Args:
            shares: of the names; those that are not there have none.
        """
        total = sum(shares.values())
        for name in self.credit:
            self.credit[name] += shares.get(name, 0.0) / total
        due = max((name for name in self.credit if shares.get(name, 0.0) > 0), key=lambda name: self.credit[name])
        self.credit[due] -= 1.0
        return due


class MixedDataLoader(BaseDataLoader):
    """Batches whose sequences come from several corpora, each in its share of all sequences of the site.

    All sequences have as many tokens, so that shares of sequences are shares of tokens. The corpora are packed apart:
    a sequence has documents of one. Epochs are each corpus's own.

    Args:
        config: a ``TextDataLoader.Config`` with a mix, whose other keys hold for all corpora.
        parts: what a ``TextDataLoader`` takes.

    Raises:
        UserError: as ``TextDataLoader``.
    """

    def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **parts: Any) -> None:
        config.validate()
        self._config = config
        self._readers, self._reader, self._rows = dp_world_size, dp_rank, local_batch_size
        self._loaders = {
            name: replace(config, dataset=corpus_of(config, name, config.retry_seconds), mix={}, mix_changes=[]).build(
                dp_world_size=dp_world_size, dp_rank=dp_rank, local_batch_size=1, **parts
            )
            for name in config.mix
        }
        self._samples: dict[str, Iterator[Sample]] = {}
        self._turns = Turns(list(config.mix))
        self._shares: Mapping[str, float] = config.mix
        self.feed: Feed = MixedFeed({name: loader.feed for name, loader in self._loaders.items()})
        """Documents of all corpora."""
        self._first_source = self.feed.first_sources

    def before_step(self, step: int) -> None:
        """Call before each inner step, counted from 1: its shares are those that hold then."""
        changes = [change.mix for change in self._config.mix_changes if change.step < step]
        self._shares = changes[-1] if changes else self._config.mix

    def identify_tokens(self) -> None:
        """From the next iteration on, batches also say whose their tokens are (``titan_ext.data.packing.IDENTITY``)."""
        for loader in self._loaders.values():
            loader.identify_tokens()

    def __iter__(self) -> Iterator[Sample]:
        """Batches, without end."""
        while True:
            samples = [self._next_sample() for _ in range(self._rows)]
            inputs = {key: torch.cat([each[key] for each, _ in samples]) for key in samples[0][0]}
            yield inputs, torch.cat([labels for _, labels in samples])

    def _next_sample(self) -> Sample:
        # Turns are those of the whole site: its readers take them one after another, and none has them all alike.
        turns = [self._turns.next(self._shares) for _ in range(self._readers)]
        name = turns[self._reader]
        if name not in self._samples:
            self._samples[name] = iter(self._loaders[name])
        inputs, labels = next(self._samples[name])
        if IDENTITY in inputs:
            identity = inputs[IDENTITY].clone()
            identity[..., 0] += self._first_source[name]
            inputs = {**inputs, IDENTITY: identity}
        return inputs, labels

    def state_dict(self) -> dict[str, Any]:
        """The places of all corpora, and whose turn it is. A collective over the site."""
        places = {f"{_STATE}.{name}": loader.state_dict() for name, loader in self._loaders.items()}
        return {**places, _STATE: json.dumps(self._turns.credit)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each corpus goes on at its place, also under other shares; one that was not there begins.

        Raises:
            UserError: the state is of a site without a mix, or a corpus has changed.
        """
        if not state_dict:
            return
        if _STATE not in state_dict:
            raise UserError(
                "data.mix: the checkpoint's place in the corpus is of a site without a mix; start the corpora anew with "
                "checkpoint.exclude_from_loading = ['dataloader']"
            )
        credit = json.loads(state_dict[_STATE])
        self._turns.credit.update({name: value for name, value in credit.items() if name in self._turns.credit})
        self._samples = {}
        for name, loader in self._loaders.items():
            loader.load_state_dict(state_dict.get(f"{_STATE}.{name}", {}))


class MixedFeed:
    """The documents of several corpora, as a loss may look at them: one of each in turn.

    Args:
        feeds: by name.
    """

    def __init__(self, feeds: Mapping[str, Feed]) -> None:
        self._feeds = feeds
        self.name = ", ".join(feeds)
        self.bad_records: BadRecords = next(iter(feeds.values())).bad_records
        self.sources = [f"{name}/{source}" for name, feed in feeds.items() for source in feed.sources]
        self.corpora = [name for name, feed in feeds.items() for _ in feed.sources]
        """The name that each of the ``sources`` belongs to."""
        counts = [len(feed.sources) for feed in feeds.values()]
        self.first_sources = {name: sum(counts[:place]) for place, name in enumerate(feeds)}

    def __str__(self) -> str:
        return "; ".join(f"{name}: {feed}" for name, feed in self._feeds.items())

    def read(self, epoch: int, place: Any, shard: int, shards: int) -> Iterator[Document]:
        """Documents from the start of an epoch, one of each corpus in turn.

        Raises:
            ValueError: a place is given: it would be one of one corpus.
        """
        if place is not None:
            raise ValueError("a mix has no place of its own")
        together = zip_longest(*(feed.read(epoch, None, shard, shards) for feed in self._feeds.values()))
        for documents in together:
            yield from (document for document in documents if document is not None)

    def settings(self) -> dict[str, Any]:
        """Those of all corpora, by name."""
        return {name: feed.settings() for name, feed in self._feeds.items()}

    def check(self, shards: int) -> None:
        """Raises UserError if a part of ``shards`` would be without a document."""
        for feed in self._feeds.values():
            feed.check(shards)
