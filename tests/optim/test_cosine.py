"""The inverse cosine transform in whole numbers: its signs are right, and no order of summation changes a bit."""

import math

import pytest
import torch

from titan_ext.optim.cosine import inverse_in_whole_numbers, whole_basis


def exact_basis(size: int) -> torch.Tensor:
    rows = [
        [math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (2 * i + 1) * k / (2 * size)) for i in range(size)]
        for k in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 64])
def test_the_basis_is_the_orthonormal_one_to_its_last_digit(size):
    got = whole_basis(size)
    assert torch.equal(got, got.round()) and (got / 2**22 - exact_basis(size)).abs().max() <= 0.5001 * 2**-22


def tiles_of(kind: str, high: int, wide: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(high * wide)
    tiles = torch.randn(5, high, wide, generator=generator)
    if kind == "few":
        tiles *= torch.rand(tiles.shape, generator=generator) < 0.03
        tiles[:, 0, 0] = 1.0
    if kind == "uneven":
        tiles *= 10.0 ** torch.randint(-12, 3, tiles.shape, generator=generator)
    if kind == "tiny":
        tiles *= 1e-30
    if kind == "equal":
        tiles = torch.ones_like(tiles)  # sums are as large as they can be
    return tiles


@pytest.mark.parametrize("kind", ["dense", "few", "uneven", "tiny", "equal"])
@pytest.mark.parametrize("high, wide", [(64, 64), (1, 64), (64, 3), (7, 5), (1, 1)])
def test_signs_are_those_of_the_transform(kind, high, wide):
    tiles = tiles_of(kind, high, wide)
    got = inverse_in_whole_numbers(tiles, whole_basis(high), whole_basis(wide))
    exact = exact_basis(high).mT @ tiles.double() @ exact_basis(wide)
    norms = torch.linalg.vector_norm(tiles.double(), dim=(1, 2), keepdim=True)
    clear = exact.abs() > 2.0**-20 * norms
    assert torch.equal(got.sign()[clear], exact.sign()[clear])
    assert clear.float().mean() > 0.95 or kind == "equal"
    scale = got.abs().amax(dim=(1, 2), keepdim=True) / exact.abs().amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(got / scale, exact, rtol=0, atol=(2.0**-20 * norms).max().item())


@pytest.mark.parametrize("kind", ["dense", "uneven", "equal"])
def test_the_order_of_summation_does_not_matter(kind):
    """Every partial sum is a whole number that float64 has, so any kernel, thread count or device comes to the same."""
    tiles, rows, columns = tiles_of(kind, 64, 64), whole_basis(64), whole_basis(64)
    want = inverse_in_whole_numbers(tiles, rows, columns)
    for seed in range(3):
        by = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        mixed = inverse_in_whole_numbers(tiles[:, by][:, :, by], rows[by], columns[by])
        assert torch.equal(mixed, want)
    assert want.abs().max() < 2**53 and torch.equal(want, want.round())
    zero = inverse_in_whole_numbers(torch.zeros(2, 64, 64), rows, columns)
    assert not zero.any()
