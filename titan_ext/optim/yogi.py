"""Yogi without bias correction, the adaptive step of FedYogi (arXiv 2003.00295, algorithm 2)."""

import torch

from titan_ext.optim.exact import FedOpt


class Yogi(FedOpt):
    """Like Adam, but the second moment moves by an amount that does not depend on its own size.

    ``v = v - (1 - b2) g^2 sign(v - g^2)``; arguments and the rest are those of :class:`FedOpt`.
    """

    def _follow(self, second: torch.Tensor, squares: torch.Tensor, beta: float) -> None:
        signs = (second - squares).sign_()
        second.sub_(squares.mul_(1 - beta).mul_(signs))
