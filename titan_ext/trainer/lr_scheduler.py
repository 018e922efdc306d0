"""torchtitan's learning rate schedule, stretched for local batches smaller than the recipe's."""

from dataclasses import dataclass, replace
from typing import Any

from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer as _TorchtitanContainer

from titan_ext.errors import require


class LRSchedulersContainer(_TorchtitanContainer):
    """torchtitan's, whose steps may be a recipe's of larger batches."""

    @dataclass(kw_only=True, slots=True)
    class Config(_TorchtitanContainer.Config):
        stretch: float = 1.0
        """What ``warmup_steps`` and ``total_steps`` are multiplied by: the recipe's batch divided by a site's own. A site with
        a small batch keeps the large one's peak rate and takes so many more steps (Photon, arXiv 2411.02908); without
        ``total_steps`` the schedule is for ``training.steps``, which are not multiplied."""

        def validate(self) -> None:
            """Raises UserError, naming the key, for a value outside its range."""
            require(self.stretch > 0, "stretch", self.stretch, "above 0")

        def build(self, *, optimizers: Any, training_steps: int) -> _TorchtitanContainer:
            """As torchtitan's, over so many more steps."""
            recipe: Any = self
            longer = replace(
                recipe,
                warmup_steps=round(self.warmup_steps * self.stretch),
                total_steps=None if self.total_steps is None else round(self.total_steps * self.stretch),
            )
            return _TorchtitanContainer.Config.build(longer, optimizers=optimizers, training_steps=training_steps)
