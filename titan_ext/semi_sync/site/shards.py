"""Making tensors whole on one rank of a site, and cutting them up again, over a group of its own.

FSDP's and tensor parallelism's own collectives cannot serve: an exchange in flight runs on its own
thread beside the inner step's, and only the leader needs what is whole.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_ext.semi_sync.site.ranks import SiteRanks

LEADER = 0
"""Rank within the site that speaks for it."""

# A rank may wait here for as long as its leader waits for other sites. One that died closes its
# connections, which ends the wait at once.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Piece:
    """Where a rank's part of a tensor lies in the whole one."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    runs: tuple[tuple[tuple[int, int], ...], ...]
    """For each dimension the stretches ``[start, stop)`` that the rank holds, in its order."""

    @property
    def local_shape(self) -> torch.Size:
        """Shape of the part."""
        return torch.Size(sum(stop - start for start, stop in stretches) for stretches in self.runs)

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return self.local_shape.numel()

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole tensor; a view where it is one stretch in each dimension."""
        for dim, stretches in enumerate(self.runs):
            if len(stretches) == 1:
                whole = whole.narrow(dim, stretches[0][0], stretches[0][1] - stretches[0][0])
            else:
                whole = whole.index_select(dim, _indices(stretches).to(whole.device))
        return whole

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write the part to its place in a whole tensor."""
        split = next((dim for dim, stretches in enumerate(self.runs) if len(stretches) != 1), None)
        if split is None:
            self.take(whole).copy_(part)
            return
        done = 0
        for start, stop in self.runs[split]:
            one = Piece(self.shape, (*self.runs[:split], ((start, stop),), *self.runs[split + 1 :]))
            one.put(whole, part.narrow(split, done, stop - start))
            done += stop - start


def piece_of(tensor: torch.Tensor) -> Piece:
    """Where this rank's part of ``tensor`` lies; without communication.

    Each dimension is cut on its own, so a row of indices, cut as that dimension is, tells all.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(shape, tuple(((0, size),) for size in shape))
    return Piece(shape, tuple(_runs(_held(tensor, dim)) for dim in range(tensor.dim())))


def counted_once(names: Sequence[str], tensor_of: Callable[[str], torch.Tensor], site: SiteRanks) -> list[bool]:
    """Whether this rank's part of each tensor is the first of equal ones, so that sums over ranks count it once.

    A collective over the site.

    Args:
        names: of the tensors that this rank has a part of.
        tensor_of: by name.
        site: the ranks.
    """
    own = {name: piece_of(tensor_of(name)) for name in names}
    before = site.gather(own)[: site.rank]
    return [not any(pieces.get(name) == piece for pieces in before) for name, piece in own.items()]


def gloo_group(members: list[int], *, among_themselves: bool = False) -> Any:
    """A group of some ranks whose collectives may take as long as another site does.

    Args:
        members: ranks of the default group.
        among_themselves: they alone call this, not all ranks of the default group.
    """
    return dist.new_group(members, timeout=_PATIENCE, backend="gloo", use_local_synchronization=among_themselves)


def _held(tensor: DTensor, dim: int) -> list[int]:
    mesh = tensor.device_mesh
    placements: list[Placement] = []
    for placement in tensor.placements:
        if getattr(placement, "dim", None) != dim:
            placements.append(Replicate())
        elif hasattr(placement, "split_factor"):  # FSDP over tensor parallelism cuts the same dimension twice
            placements.append(type(placement)(0, split_factor=placement.split_factor))  # type: ignore[call-arg]
        else:
            placements.append(Shard(0))
    indices = torch.arange(tensor.shape[dim], device=mesh.device_type)
    whole = DTensor.from_local(indices, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements).to_local().tolist()


def _runs(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return tuple(runs)


def _indices(stretches: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in stretches] or [torch.empty(0, dtype=torch.int64)])


def batches_of(sizes: Mapping[str, int], elements: int) -> list[list[str]]:
    """Names in stretches of about ``elements`` together, at least one each; ``sizes`` is by name, in order."""
    batches: list[list[str]] = []
    filled = 0
    for name, numel in sizes.items():
        if not batches or filled + numel > elements:
            batches.append([])
            filled = 0
        batches[-1].append(name)
        filled += numel
    return batches


class SiteShards:
    """The shards of a site's parameters, of all its ranks. Building it is a collective over the site.

    Args:
        parameters: those this rank holds, by name.
        group: the ranks of the site; None takes the default process group.
        alone: a site of one rank, whatever process group there is.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None, *, alone: bool = False
    ) -> None:
        alone = alone or not dist.is_initialized()
        members = [0] if alone else dist.get_process_group_ranks(group or dist.group.WORLD)
        self._members = members
        self.rank = 0 if alone else members.index(dist.get_rank())
        self._group = gloo_group(members) if len(members) > 1 else None
        own = {name: piece_of(parameter) for name, parameter in parameters.items()}
        self._pieces: list[dict[str, Piece]] = [{} for _ in members]
        if self._group is None:
            self._pieces[0] = own
        else:
            dist.all_gather_object(self._pieces, own, group=self._group)

    def beside(self) -> "SiteShards":
        """The same over a group of its own, for use while another thread uses this one. A collective over the site."""
        twin = copy.copy(self)
        if self._group is not None:
            twin._group = gloo_group(self._members)
        return twin

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for the site."""
        return self.rank == LEADER

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter."""
        return next(pieces[name].shape for pieces in self._pieces if name in pieces)

    def batches(self, names: Sequence[str], elements: int) -> list[list[str]]:
        """``names`` in stretches whose whole tensors have about ``elements`` together, at least one each."""
        return batches_of({name: torch.Size(self.shape(name)).numel() for name in names}, elements)

    def collect(self, names: Sequence[str], parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Whole tensors of ``names``, one after the other: fp32 ``[numel]`` on the leader, None elsewhere.

        A part that several ranks hold is sent by the first of them.
        """
        if not self.is_leader:
            wanted = [name for name in names if name in self._pieces[self.rank] and self.sends(self.rank, name)]
            self._send(_flat([parts[name] for name in wanted]), LEADER)
            return None
        whole = torch.zeros(sum(torch.Size(self.shape(name)).numel() for name in names))
        places = dict(zip(names, self._split(whole, names), strict=True))
        for rank, pieces in enumerate(self._pieces):
            wanted = [name for name in names if name in pieces and self.sends(rank, name)]
            sizes = [pieces[name].numel for name in wanted]
            arrived = _flat([parts[name] for name in wanted]) if rank == LEADER else self._receive(sum(sizes), rank)
            for name, part in zip(wanted, arrived.split(sizes), strict=True):
                pieces[name].put(places[name], part.view(pieces[name].local_shape))
        return whole

    def scatter(self, names: Sequence[str], whole: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The inverse: every rank gets its parts of ``names``, fp32, by name.

        Args:
            names: as in ``collect``.
            whole: fp32 ``[numel]`` on the leader, None elsewhere.
        """
        own = self._pieces[self.rank]
        mine = [name for name in names if name in own]
        if self.is_leader:
            places = dict(zip(names, self._split(whole, names), strict=True))
            for rank, pieces in enumerate(self._pieces):
                if rank != LEADER:
                    held = [name for name in names if name in pieces]
                    self._send(_flat([pieces[name].take(places[name]) for name in held]), rank)
            return {name: own[name].take(places[name]) for name in mine}
        sizes = [own[name].numel for name in mine]
        arrived = self._receive(sum(sizes), LEADER).split(sizes)
        return {name: part.view(own[name].local_shape) for name, part in zip(mine, arrived, strict=True)}

    def share(self, value: Any) -> Any:
        """The leader's ``value`` on every rank; any object that pickles (the site's ranks trust each other)."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._members[LEADER], group=self._group)
        return box[0]

    def share_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor in host memory with the leader's."""
        if self._group is not None and tensor.numel():
            dist.broadcast(tensor, src=self._members[LEADER], group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * len(self._members)
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def sends(self, rank: int, name: str) -> bool:
        """Whether a rank gives its shard of a parameter to the leader: the first of those that hold it."""
        piece = self._pieces[rank][name]
        return not any(pieces.get(name) == piece for pieces in self._pieces[:rank])

    def _split(self, whole: torch.Tensor, names: Sequence[str]) -> list[torch.Tensor]:
        shapes = [torch.Size(self.shape(name)) for name in names]
        parts = whole.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _send(self, flat: torch.Tensor, rank: int) -> None:
        if flat.numel():
            dist.send(flat, self._members[rank], group=self._group)

    def _receive(self, numel: int, rank: int) -> torch.Tensor:
        flat = torch.empty(numel)
        if numel:
            dist.recv(flat, self._members[rank], group=self._group)
        return flat


def _flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts one after the other, fp32 in host memory."""
    if not parts:
        return torch.empty(0)
    return torch.cat([part.detach().reshape(-1).to("cpu", torch.float32) for part in parts])
