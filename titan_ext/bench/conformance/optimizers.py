"""Inner optimizers of titan_ext beside torch's and pytorch_optimizer's, on fixed gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.bench.conformance.checks import Check, Part, close
from titan_ext.optim import ADOPT, Muon, QHAdamW

_STEPS, _SHAPE = 25, (12, 8)

Make = Callable[[list[nn.Parameter]], Optimizer]


def trained(make: Make, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix after some steps on gradients that are the same for all optimizers.

    Args:
        make: the optimizer of a list of parameters.
        dtype: of the matrix.
    """
    generator = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(_SHAPE, generator=generator, dtype=torch.float64).to(dtype))
    optimizer = make([parameter])
    for step in range(_STEPS):
        size = 1.0 + 0.5 * (step % 3)
        parameter.grad = size * torch.randn(_SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    return parameter.detach()


def _with_torch(part: str) -> Iterator[Check]:
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    ours = trained(lambda each: QHAdamW(each, betas=(0.9, 0.99), omegas=(1.0,), **settings))
    yield close(
        part,
        "QHAdamW, all weight on the momentum: AdamW",
        ours,
        trained(lambda each: torch.optim.AdamW(each, betas=(0.9, 0.99), **settings)),
        1e-10,
    )
    yield _muon(part, "Muon: torch.optim.Muon", lambda each, **own: torch.optim.Muon(each, nesterov=False, **own))


def _muon(part: str, name: str, theirs: Callable[..., Optimizer]) -> Check:
    """One step of both from the same place, as the nearest orthonormal matrix.

    Their iterations and factors of the shape differ, and with them the singular values of a step, which are all near one
    value; its singular vectors are those of the momentum in both.
    """

    def direction(make: Make) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(_SHAPE))
        generator = torch.Generator().manual_seed(6)
        parameter.grad = torch.randn(_SHAPE, generator=generator)
        make([parameter]).step()
        left, _, right = torch.linalg.svd(parameter.detach().double(), full_matrices=False)
        return left @ right

    ours = direction(lambda each: Muon(each, lr=0.1, momentum=0.9, weight_decay=0.0))
    other = direction(lambda each: theirs(each, lr=0.1, momentum=0.9, weight_decay=0.0))
    return close(part, f"{name}, singular vectors of a step", ours, other, 0.05)


def _with_pytorch_optimizer(part: str) -> Iterator[Check]:
    import pytorch_optimizer as theirs  # type: ignore[import-not-found]

    betas, omega = (0.95, 0.99), 0.7
    ours = trained(lambda each: QHAdamW(each, lr=1e-2, betas=betas, omegas=(omega,)))
    other = trained(lambda each: theirs.QHAdam(each, lr=1e-2, betas=betas, nus=(omega, 1.0), weight_decay=0.0))
    yield close(part, "QHAdamW with one momentum: QHAdam", ours, other)
    ours = trained(lambda each: ADOPT(each, lr=1e-2, betas=(0.9, 0.99)))
    # Its bound counts the first step, which only measures; the author's and ours do not.
    other = trained(
        lambda each: theirs.ADOPT(each, lr=1e-2, betas=(0.9, 0.99), clip_lambda=lambda step: (step - 1) ** 0.25)
    )
    yield close(part, "ADOPT", ours, other)

    def muon(each: list[nn.Parameter], **own: Any) -> Optimizer:
        return theirs.Muon([{"params": each, "use_muon": True}], nesterov=False, **own)

    yield _muon(part, "Muon: pytorch_optimizer's", muon)


WITH_TORCH = Part({}, _with_torch)
WITH_PYTORCH_OPTIMIZER = Part({"pytorch_optimizer": "pytorch-optimizer"}, _with_pytorch_optimizer)
