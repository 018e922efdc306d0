"""Sketches of tensors: however they are cut, and what their inner products say."""

import torch

from titan_ext.semi_sync.site.shards import Piece
from titan_ext.semi_sync.state.sketches import sketch

ROWS, COLUMNS, SIZE = 12, 10, 64
WHOLE = Piece((ROWS, COLUMNS), (((0, ROWS),), ((0, COLUMNS),)))


def of(tensor: torch.Tensor, seed: int = 1, size: int = SIZE) -> torch.Tensor:
    return sketch(tensor, Piece(tuple(tensor.shape), tuple(((0, each),) for each in tensor.shape)), seed, size)


def test_parts_add_up_to_the_whole_however_it_is_cut():
    whole = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    rows = (((0, 5),), ((5, 12),))
    strided = (((0, 3), (6, 9)), ((3, 6), (9, 12)))  # FSDP over tensor parallelism
    columns = (((0, 4),), ((4, 10),))
    for first in (rows, strided, (((0, 12),),)):
        for second in (columns, (((0, 10),),)):
            total = torch.zeros(SIZE, dtype=torch.float64)
            for runs in ((one, other) for one in first for other in second):
                piece = Piece((ROWS, COLUMNS), runs)
                total += sketch(piece.take(whole).contiguous(), piece, 1, SIZE)
            assert torch.allclose(total, sketch(whole, WHOLE, 1, SIZE), atol=1e-12)


def test_a_large_tensor_is_taken_in_pieces():
    wide = torch.randn(3, 2**18 + 5, generator=torch.Generator().manual_seed(0))
    halves = [wide[:, : 2**17], wide[:, 2**17 :]]
    pieces = [Piece(tuple(wide.shape), (((0, 3),), (run,))) for run in ((0, 2**17), (2**17, 2**18 + 5))]
    total = sum(sketch(half.contiguous(), piece, 5, 16) for half, piece in zip(halves, pieces))
    assert torch.allclose(total, of(wide, 5, 16), atol=1e-9)


def test_shapes_without_dimensions_and_without_elements():
    assert sketch(torch.tensor(2.0), Piece((), ()), 1, 8).abs().sum() == 2.0
    empty = Piece((4, 3), ((), ((0, 3),)))
    assert not sketch(torch.empty(0, 3), empty, 1, 8).any()


def test_inner_products_and_distances_are_kept():
    """Within five of the standard deviations of a random projection, ``|a| |b| sqrt(2 / size)`` at most."""
    generator = torch.Generator().manual_seed(0)
    size = 1024
    for _ in range(5):
        one, other = torch.randn(2, 300, 40, generator=generator).double()
        other = 0.6 * one + 0.8 * other
        first, second = of(one, size=size), of(other, size=size)
        bound = 5 * one.norm() * other.norm() * (2 / size) ** 0.5
        assert (first @ second - (one * other).sum()).abs() < bound
        assert (first - second).norm() / (one - other).norm() - 1 < 0.15
    assert torch.allclose(of(one + 3 * other), of(one) + 3 * of(other), atol=1e-9)
    assert not torch.equal(of(one, seed=1), of(one, seed=2))
