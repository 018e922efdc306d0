"""The tiny language model: the next character from the last few, by a small residual network.

Embeddings side by side and a projection (the neural n-gram model of Bengio et al., 2003), one feed-forward block, an
output layer. Many replicas, those of all sites and of several runs, are computed at once by batched products.

Legend: R replicas, B windows of a replica, C characters of context, V characters known, D width, F feed-forward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_FEED_FORWARD = 2


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Shapes of the model; its parameters are given to each call, those of all replicas stacked.

    Args:
        vocabulary: characters known.
        dim: width of the residual stream.
        context: characters that the next one is told from.
        embedding: numbers of a character.
    """

    vocabulary: int
    dim: int
    context: int = 6
    embedding: int = 16

    def shapes(self) -> dict[str, tuple[int, int]]:
        """By name the shape of each parameter of a replica."""
        return {
            "embed": (self.vocabulary, self.embedding),
            "project": (self.context * self.embedding, self.dim),
            "up": (self.dim, _FEED_FORWARD * self.dim),
            "down": (_FEED_FORWARD * self.dim, self.dim),
            "output": (self.dim, self.vocabulary),
        }

    @property
    def parameters(self) -> int:
        """Of a replica."""
        return sum(rows * columns for rows, columns in self.shapes().values())

    def initial(self, seed: int) -> torch.Tensor:
        """Parameters of a replica from a seed, flat ``[parameters]``: normal, a deviation of one over the root of inputs."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randn(shape, generator=generator) / (1 if name == "embed" else math.sqrt(shape[0]))
            for name, shape in self.shapes().items()
        ]
        return torch.cat([each.flatten() for each in drawn])

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of flat parameters ``[..., parameters]`` by name, each ``[..., *shape]``."""
        sizes = [rows * columns for rows, columns in self.shapes().values()]
        parts = flat.split(sizes, dim=-1)
        return {
            name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes().items(), parts, strict=True)
        }

    def losses(
        self, parameters: Mapping[str, torch.Tensor], context_RBC: torch.Tensor, next_RB: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of each replica's windows with its own parameters, ``[R]``, in nats.

        Args:
            parameters: by name ``[R, *shape]``.
            context_RBC: int64 characters.
            next_RB: int64, the character after each.
        """
        replicas, windows, _ = context_RBC.shape
        device = context_RBC.device
        first_R11 = torch.arange(0, replicas * self.vocabulary, self.vocabulary, device=device).view(-1, 1, 1)
        embedded = F.embedding(context_RBC + first_R11, parameters["embed"].flatten(0, 1))
        x_RBD = torch.bmm(embedded.view(replicas, windows, -1), parameters["project"])
        inner_RBF = torch.bmm(self._normed(x_RBD), parameters["up"]).relu()
        x_RBD = torch.baddbmm(x_RBD, inner_RBF, parameters["down"])
        logits_RBV = torch.bmm(self._normed(x_RBD), parameters["output"])
        flat = F.cross_entropy(logits_RBV.flatten(0, 1), next_RB.flatten(), reduction="none")
        return flat.view(replicas, windows).mean(1)

    def _normed(self, x_RBD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_RBD, (self.dim,))
