"""A run whose sites read their data once ends when none of them has anything to contribute any more."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from titan_ext.semi_sync.plan.plan import PARAMETERS
from titan_ext.semi_sync.round.round import RoundResult
from titan_ext.semi_sync.state.synced_state import SyncedState


class EndOfData:
    """Whether this site's data has ended, what of its work it has not contributed yet, and whether all are so far.

    A site without data takes no more inner steps; it counts them and stays in the rounds, so that the others need not
    do without it. It contributes what it has done since the last round of each part of the model, then nothing.

    Args:
        states: the plan's rules bound to this rank.
    """

    def __init__(self, states: Sequence[SyncedState]) -> None:
        self._keys = [state.key for state in states]
        self._final = {index for index, state in enumerate(states) if state.rule.final}
        self._parameters = {index for index, state in enumerate(states) if state.rule.state == PARAMETERS} - self._final
        self._unsent: set[int] = set()
        self.reached = False
        """Whether this site takes no more inner steps."""
        self.run_is_over = False
        """Whether the last round found no site that had anything to contribute."""

    @property
    def all_sent(self) -> bool:
        """Whether this site has nothing to contribute any more."""
        return self.reached and not self._unsent

    def step_taken(self) -> None:
        """An inner step has been taken: every part of the model has changed."""
        self._unsent = set(self._parameters)

    def contributes(self, rules: Collection[int]) -> bool:
        """Whether a round of these rules has something of this site's to bring; a mean at the end takes in everybody."""
        return not self.reached or not (self._unsent | self._final).isdisjoint(rules)

    def launch(self, rules: Collection[int]) -> None:
        """A round takes these rules along."""
        self._unsent -= set(rules)

    def settle(self, result: RoundResult, committed: bool) -> None:
        """A round has ended; all its sites come to the same answer on whether the run is over.

        Args:
            result: with the statuses of its sites.
            committed: otherwise what it took along is to be sent again.
        """
        if result.healed:
            self._unsent.clear()  # local work was dropped for a peer's state
        elif not committed:
            self._unsent |= self._parameters & set(result.launch.rules)
        self.run_is_over = committed and bool(result.rules) and all(site.done for site in result.verdict.table)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"reached": self.reached, "unsent": [self._keys[index] for index in sorted(self._unsent)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        unsent = set(state["unsent"])
        self.reached = state["reached"]
        self._unsent = {index for index, key in enumerate(self._keys) if key in unsent}
