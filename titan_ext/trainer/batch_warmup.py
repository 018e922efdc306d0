"""A batch that grows over the first steps: fewer passes of gradient accumulation at first."""

from dataclasses import dataclass

from titan_ext.errors import require


@dataclass(kw_only=True, slots=True)
class BatchWarmupConfig:
    """A global batch that grows over the first steps."""

    steps: int = 0
    """Inner steps until the batch is ``training.global_batch_size``; 0: it is so from the start. Tokens, not steps, are
    what it saves: the first steps take less text and time."""

    start_batch_size: int = 0
    """Sequences of the first step's batch at the whole site, from which it grows evenly, by whole passes of gradient
    accumulation; 0: one pass."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", self.steps, "at least 0")
        require(self.start_batch_size >= 0, "start_batch_size", self.start_batch_size, "at least 0")


def passes_at(step: int, config: BatchWarmupConfig, full: int, sequences: int) -> int:
    """Passes of gradient accumulation at an inner step.

    Args:
        step: counted from 1.
        config: how the batch grows.
        full: passes of the whole batch.
        sequences: of the site in one pass.
    """
    if step > config.steps:
        return full
    first = max(1, min(full, config.start_batch_size // sequences))
    return first + (full - first) * (step - 1) // config.steps
