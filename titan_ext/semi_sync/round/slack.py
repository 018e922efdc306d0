"""How long a site may hold back for slower ones at no cost: the adaptive grace of Decoupled DiLoCo (arXiv 2604.21428)."""

from titan_ext.semi_sync.round.clock import Clock

_DECAY = 0.9  # of the moving averages; the paper does not say


class Slack:
    """What the inner steps that hide an exchange leave of their time: ``tau xi_step - (xi_quorum + xi_sync)``.

    The three are moving averages of this site's own times, so that sites need not agree on anything: who holds back too long
    is late itself.

    Args:
        share: of the slack that a site holds back (the paper's gamma); 0 never does.
        clock: that passes meanwhile.
    """

    def __init__(self, share: float, clock: Clock) -> None:
        self._share, self._clock = share, clock
        self._step: float | None = None
        self._exchange: float | None = None

    def learn(self, step: float, exchange: float) -> None:
        """Times of a round in seconds.

        Args:
            step: of an inner step; 0 if it is not known.
            exchange: from asking for a quorum to the sum.
        """
        if step > 0:
            self._step = _average(self._step, step)
        self._exchange = _average(self._exchange, exchange)

    def seconds(self, delay: int) -> float:
        """For which a round is held back whose result is due ``delay`` inner steps later; 0 until times are known."""
        if self._step is None or self._exchange is None:
            return 0.0
        return max(0.0, self._share * (delay * self._step - self._exchange))

    def hold_back(self, delay: int) -> None:
        """Let that time pass."""
        seconds = self.seconds(delay)
        if seconds > 0:
            self._clock.sleep(seconds)


def _average(before: float | None, now: float) -> float:
    return now if before is None else _DECAY * before + (1 - _DECAY) * now
