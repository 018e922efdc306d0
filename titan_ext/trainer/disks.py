"""Which ranks of a site see each other's files: its nodes may share a file system, or have disks of their own."""

import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_ext.semi_sync.site.ranks import SiteRanks

_PATIENCE_SECONDS = 15.0  # what a network file system may take to show a file to another node
_POLL_SECONDS = 0.2
# Kinds of file system that no other machine sees: what is not there at once will not come.
_OF_ONE_MACHINE = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True, slots=True)
class Disks:
    """Who can read whose files."""

    first_ranks: tuple[int, ...] = (0,)
    """By rank: the lowest rank that sees the same files, which keeps them in order."""

    @property
    def are_one(self) -> bool:
        """Whether all ranks see the same files."""
        return len(set(self.first_ranks)) == 1

    def keeps_order(self, rank: int) -> bool:
        """Whether a rank is the one to remove files on its disk."""
        return rank == 0 if self.are_one else self.first_ranks[rank] == rank


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file on some disk of the site."""

    size: int
    """In bytes."""
    rank: int
    """One that reads it."""


def find_disks(folder: str) -> Disks:
    """Try out which ranks see each other's files in a folder, which is made where it is missing. A collective."""
    ranks = torch.distributed.get_world_size()
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) >= ranks:
        return Disks((0,) * ranks)
    rank, site, place = torch.distributed.get_rank(), SiteRanks(), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    word = site.gather(secrets.token_hex(8))[0]
    names = [f".seen_{word}_{each}" for each in range(ranks)]
    own = place / names[rank]
    own.touch()
    site.gather(None)
    seen = _seen(place, set(names))
    found = site.gather(min(index for index, name in enumerate(names) if name in seen))
    own.unlink()
    return Disks(tuple(found))


def stored_files(folder: str, disks: Disks) -> dict[str, StoredFile]:
    """The files below a folder on all disks of the site, by their path in it. A collective."""
    own: dict[str, int] = {}
    if disks.first_ranks[rank := torch.distributed.get_rank()] == rank:
        own = dict(_sizes(Path(folder)))
    found: dict[str, StoredFile] = {}
    for rank, sizes in enumerate(SiteRanks().gather(own)):
        for path, size in sizes.items():
            found.setdefault(path, StoredFile(size, rank))
    return found


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)), path.stat().st_size


def _seen(folder: Path, names: set[str]) -> set[str]:
    deadline = time.monotonic() + (0 if _file_system(folder) in _OF_ONE_MACHINE else _PATIENCE_SECONDS)
    # The list, not each file: a network file system may remember for long that a file was not there.
    while len(seen := names & {*os.listdir(folder)}) < len(names) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return seen


def _file_system(folder: Path) -> str:
    """Its kind; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    whole = folder.resolve()
    mounts = [
        (Path(fields[4].encode().decode("unicode_escape")), fields[fields.index("-") + 1])
        for fields in map(str.split, lines)
    ]
    inside = [(len(place.parts), kind) for place, kind in mounts if whole.is_relative_to(place)]
    return max(inside, key=lambda each: each[0], default=(0, ""))[1]
