"""How a low-rank basis, and what stands in it, are cut when the matrix is a DTensor.

A matrix ``W [rows, columns]`` is projected on its shorter side. With rows >= columns the basis is
``Q [columns, rank]`` and what stands in it is ``W Q [rows, rank]`` (right); else it is ``Q [rows, rank]``
and ``Q^T W [rank, columns]`` (left). Each is cut as the matrix's side that it shares, and whole along
the other, so that one sum over the ranks that cut the projected side makes a projection exact.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from titan_ext.optim.wide import working_dtype


def projected_dim(shape: Sequence[int]) -> int:
    """The dimension of a matrix that its basis spans: 1 (right) if rows >= columns, else 0 (left)."""
    return 1 if shape[0] >= shape[1] else 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing storage; the tensor itself if it is not a DTensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered if it is a DTensor: all ranks of its mesh must ask."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()  # type: ignore[attr-defined]


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of the gradient, cut as the parameter is."""
    gradient = parameter.grad
    # Under sequence parallelism a replicated parameter's gradient is a sum still to be done.
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def like_matrix(parameter: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """``shard`` as a tensor of the parameter's global shape and placements, sharing storage."""
    return _wrapped(parameter, shard, getattr(parameter, "placements", None), parameter.shape)


def zero_basis(parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """Zeros ``[side, rank]``, cut as the side of ``parameter`` that is projected."""
    dim = projected_dim(parameter.shape)
    zeros = local(parameter).new_zeros(local(parameter).shape[dim], rank, dtype=working_dtype(parameter))
    return _wrapped(parameter, zeros, _basis_placements(parameter), (parameter.shape[dim], rank))


def like_basis(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A basis, whole on every rank, cut as that of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, _basis_placements(parameter))


def zero_moment(parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """Zeros ``[rows, rank]`` (right) or ``[rank, columns]`` (left), cut as the side that is not projected."""
    dim = projected_dim(parameter.shape)
    mine, shape = list(local(parameter).shape), list(parameter.shape)
    mine[dim] = shape[dim] = rank
    zeros = local(parameter).new_zeros(mine, dtype=working_dtype(parameter))
    return _wrapped(parameter, zeros, _moment_placements(parameter), shape)


def write_whole(stored: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value``, whole, into ``stored``, however that is cut."""
    if isinstance(stored, DTensor):
        mesh = stored.device_mesh
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = value.redistribute(mesh, stored.placements)
    local(stored).copy_(local(value))


def sum_over_shards(tensors: Iterable[torch.Tensor], parameters: Iterable[torch.Tensor], *dims: Iterable[int]) -> None:
    """Sum each tensor, in place, over the ranks that cut its parameter along one of its ``dims``.

    ``dims`` are rows of dimensions, each with one for every tensor. Tensors that are summed over the same
    ranks go in one all-reduce; every rank must give the same parameters in the same order.
    """
    buckets = defaultdict(list)
    for tensor, parameter, *cut in zip(tensors, parameters, *dims, strict=True):
        for mesh_dim, placement in enumerate(getattr(parameter, "placements", ())):
            if getattr(placement, "dim", None) in cut:
                buckets[parameter.device_mesh, mesh_dim, tensor.dtype].append(tensor)
    for (mesh, mesh_dim, _), alike in buckets.items():
        flat = torch.cat([each.flatten() for each in alike])
        dist.all_reduce(flat, group=mesh.get_group(mesh_dim))
        for each, part in zip(alike, flat.split([each.numel() for each in alike]), strict=True):
            each.copy_(part.view_as(each))


def _basis_placements(parameter: torch.Tensor) -> list[Placement] | None:
    dim = projected_dim(parameter.shape)
    return _shared(parameter, dim, becomes=0)


def _moment_placements(parameter: torch.Tensor) -> list[Placement] | None:
    kept = 1 - projected_dim(parameter.shape)
    return _shared(parameter, kept, becomes=kept)


def _shared(parameter: torch.Tensor, dim: int, becomes: int) -> list[Placement] | None:
    """The placements of what has dimension ``dim`` of ``parameter`` as its dimension ``becomes``."""
    if not isinstance(parameter, DTensor):
        return None
    cuts = [getattr(each, "dim", None) == dim for each in parameter.placements]
    return [_moved(each, becomes) if cut else Replicate() for each, cut in zip(parameter.placements, cuts, strict=True)]


def _moved(placement: Placement, dim: int) -> Placement:
    # FSDP over tensor parallelism along the same dimension is a _StridedShard, which has a factor to keep.
    factor = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **factor)  # type: ignore[call-arg]


def _wrapped(
    parameter: torch.Tensor, shard: torch.Tensor, placements: Sequence[Placement] | None, shape: Sequence[int]
) -> torch.Tensor:
    if placements is None or not isinstance(parameter, DTensor):
        return shard
    size = torch.Size(shape)
    return DTensor.from_local(
        shard, parameter.device_mesh, placements, run_check=False, shape=size, stride=(size[1], 1)
    )
