"""Settings of the regularisers, and which of them a round has."""

import math
from dataclasses import dataclass, field

from titan_ext.errors import InvalidValue, refuse, require
from titan_ext.regularizers.regularizer import REGULARIZERS, Regularizer

_SETTINGS = ("strength", "temperature", "fisher_batches")


@dataclass(kw_only=True, slots=True)
class Phase:
    """Rounds in which inner steps are kept near the received model."""

    name: str = ""
    """"proximal" (FedProx), "ewc" (elastic weight consolidation), "distillation", or one of your own by its dotted path."""

    from_round: int = 0
    """Rounds of the run before the first one of the phase."""

    until_round: int = -1
    """Rounds of the run before the first one after the phase; -1: it does not end."""

    every: int = 1
    """Of the rounds from ``from_round`` on, only every so many-th has it."""

    strength: float | None = None
    """What the penalty counts: mu of "proximal" (0.01), lambda of "ewc" (5000), the divergence's share of the loss from 0 to
    1 in "distillation" (0.95)."""

    temperature: float | None = None
    """What logits are divided by in "distillation" (6)."""

    fisher_batches: int | None = None
    """Batches of the site's first documents, once a round, that say how important each parameter is in "ewc" (8)."""

    def __post_init__(self) -> None:
        kind = self.kind()
        require(self.from_round >= 0, "from_round", self.from_round, "at least 0")
        fine = self.until_round == -1 or self.until_round > self.from_round
        require(fine, "until_round", self.until_round, f"-1, or above from_round ({self.from_round})")
        require(self.every >= 1, "every", self.every, "at least 1")
        for key in _SETTINGS if kind is not None else ():
            value = getattr(self, key)
            require(value is None or key in kind.defaults, key, value, f'left out: "{self.name}" does not read it')
        if self.strength is not None:
            most = 1 if kind is not None and kind.teaches else math.inf
            fine = 0 <= self.strength <= most and self.strength < math.inf
            require(fine, "strength", self.strength, f"from 0 to {most}" if most == 1 else "at least 0, and finite")
        require(self.temperature is None or 0 < self.temperature < math.inf, "temperature", self.temperature, "above 0")
        require(
            self.fisher_batches is None or self.fisher_batches >= 1, "fisher_batches", self.fisher_batches, "at least 1"
        )

    def kind(self) -> type[Regularizer] | None:
        """The class that ``name`` selects; None where there is none, which is refused."""
        try:
            return REGULARIZERS.get(REGULARIZERS.resolve(self.name))
        except InvalidValue as error:
            refuse(InvalidValue("name", self.name, error.problem))
            return None

    def build(self) -> Regularizer:
        """The regulariser."""
        kind = self.kind()
        assert kind is not None
        return kind({key: value for key in _SETTINGS if (value := getattr(self, key)) is not None})

    def has(self, round_number: int) -> bool:
        """Whether a round, counted from 0, is one of the phase's."""
        after_start = round_number - self.from_round
        before_end = self.until_round == -1 or round_number < self.until_round
        return after_start >= 0 and before_end and after_start % self.every == 0


@dataclass(kw_only=True, slots=True)
class RegularizerConfig:
    """What keeps inner steps near the model that the site has received."""

    phases: list[Phase] = field(default_factory=list)
    """[[regularizer.phases]] tables; where several have the same round, all of them count."""

    @property
    def teaches(self) -> bool:
        """Whether the received model reads each batch in some round."""
        return any(kind is not None and kind.teaches for kind in self._kinds())

    @property
    def runs_passes(self) -> bool:
        """Whether there are passes beside the step's in some round."""
        return any(kind is not None and kind.runs_passes for kind in self._kinds())

    def _kinds(self) -> list[type[Regularizer] | None]:
        return [phase.kind() for phase in self.phases]
