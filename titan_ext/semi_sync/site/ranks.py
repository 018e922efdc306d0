"""The ranks of one site, as far as the outer loop needs them to talk to each other."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from titan_ext.errors import RunError, UserError

_Found = TypeVar("_Found")


class SiteRanks:
    """The ranks of this site; a site of one process needs no process group.

    Args:
        group: the process group of the site; None takes the default one if there is any.
        alone: never communicate, for several sites in the threads of one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        self._alone = alone

    @property
    def alone(self) -> bool:
        """Whether there is no other rank. Looked up each time: an instance may be older than the process group."""
        return self._alone or not dist.is_initialized() or dist.get_world_size(self.group) == 1

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return 0 if self.alone else dist.get_rank(self.group)

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. A collective."""
        if self.alone:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def first(self, find: Callable[[], _Found]) -> _Found:
        """What rank 0 finds, at every rank: a disk that all share may show them different things for a moment.
        A collective.

        Raises:
            UserError, RunError, OSError: as ``find`` at rank 0.
        """
        found: Any = None
        if self.rank == 0:
            try:
                found = find()
            except (UserError, RunError, OSError) as error:
                found = error
        found = self.gather(found)[0]
        if isinstance(found, Exception):
            raise found
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor's sum over the ranks, in rank order, so that all of them have the same bits. A collective."""
        return torch.stack([each.to(tensor) for each in self.gather(tensor.detach().cpu())]).sum(0)


def tensors_sha256(tensors: Iterable[tuple[str, torch.Tensor]], site: SiteRanks) -> str:
    """Hash of named tensors that does not depend on how a site shards or pipelines them.

    Each tensor is made whole in turn (a collective over its mesh, in the given order) and hashed as
    little-endian bytes with its name, dtype and shape; the digests of all pipeline stages are
    hashed in the order of their names.

    Args:
        tensors: name and tensor (or DTensor) pairs that this rank holds.
        site: the ranks whose tensors make up the model.
    """
    digests: dict[str, str] = {}
    for name, tensor in tensors:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole = whole.detach().cpu().contiguous()
        content = hashlib.sha256(f"{name}|{whole.dtype}|{tuple(whole.shape)}|".encode())
        content.update(whole.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        digests[name] = content.hexdigest()
    for others in site.gather(digests):
        digests.update(others)
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()
