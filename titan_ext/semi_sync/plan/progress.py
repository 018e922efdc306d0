"""Where a site stands between two rounds."""

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Counters that the parts of the outer loop share."""

    clock: int = 0
    """Inner steps of the run so far."""
    launch_clock: int = 0
    """Inner step at which the last round was launched."""
    tokens: int = 0
    """What this site has trained on since its last commit."""
    healed: bool = False
    """Whether the round under way began with a peer's state."""
