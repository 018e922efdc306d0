"""Whom a round serves: how much each site counts in its mean.

A policy is a frozen dataclass whose fields are its settings: ``[semi_sync.NAME]`` in a configuration, where NAME is
what it is registered under. It is a pure function of what the sites tell each other, so that all come to one answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from titan_ext.errors import require, require_one_of
from titan_ext.semi_sync.registry import Registry

WEIGHTINGS: "Registry[type[SiteWeighting]]" = Registry("weighting")
"""Policies by the name that ``weighting`` accepts: ``@register_weighting("name")`` adds one."""

register_weighting = WEIGHTINGS.register
"""Decorate a frozen dataclass that is a ``SiteWeighting``, so that ``weighting = "name"`` selects it."""

UNKNOWN = -1.0
"""In the place of a loss or a share that a site cannot tell."""

# Whose exponential is no infinity in float64.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWork:
    """What a site knows of itself when it contributes."""

    fixed: float = 1.0
    """Its ``[[site]] weight``."""
    tokens: int = 0
    """What it has trained on since the last commit of what travels."""
    steps: int = 0
    """Inner steps that it has taken since then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a site tells of how the model serves it."""

    loss: float = UNKNOWN
    """Mean loss, in nats a token, of the model as the site received it on its own held-out text."""
    merit: float = UNKNOWN
    """What the policy made of the loss (``SiteWeighting.merit``)."""
    share: float = UNKNOWN
    """What the policy had it remember of the last round (``Shares.remembered``)."""
    norm: float = 0.0
    """Euclidean norm of its update."""


NO_STANDING = Standing()
"""Of a site that tells nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a policy makes of the standing of the sites that contribute, in their order."""

    factors: tuple[float, ...]
    """What each site's own weight is multiplied by; only their proportion counts."""
    step: float = 1.0
    """What the mean update is multiplied by."""
    remembered: tuple[float, ...] = ()
    """For each site a number that it tells in the next round; none: nothing is remembered."""


@dataclass(frozen=True)
class SiteWeighting:
    """How much each site counts.

    Hazard: ``shares`` is computed at every site and must give the same bits at all. Functions of a math library (``exp``,
    ``pow``) may differ between machines: they belong into ``merit``, which a site computes for itself and sends. Sums,
    products and quotients of Python numbers, and ``math.fsum``, do not.
    """

    unequal: ClassVar[bool] = True
    """Whether sites may come to differ in weight."""
    needs_loss: ClassVar[bool] = False
    """Whether the received model's loss on the site's own held-out text is to be measured after each round."""
    averages_model: ClassVar[bool] = False
    """Whether the running average of the global model over the rounds is what is to be evaluated."""

    @property
    def needs_norms(self) -> bool:
        """Whether ``shares`` looks at the norms of the updates."""
        return False

    @property
    def loss_tokens(self) -> int:
        """Tokens of held-out text on which the loss is measured, where it is."""
        return 2**14

    def own_weight(self, work: OwnWork) -> float:
        """What of its weight a site knows by itself, at least 0; with 0 it contributes nothing."""
        return 1.0

    def merit(self, loss: float) -> float:
        """What the site sends of its loss, finite and at least 0."""
        return UNKNOWN

    def shares(self, sites: Sequence[Standing]) -> Shares | None:
        """What the own weights of the sites that contribute are multiplied by; None leaves them as they are."""
        return None


@register_weighting("uniform")
@dataclass(frozen=True)
class Uniform(SiteWeighting):
    """All sites count alike."""

    unequal = False


@register_weighting("site")
@dataclass(frozen=True)
class Fixed(SiteWeighting):
    """By ``[[site]] weight``."""

    def own_weight(self, work: OwnWork) -> float:
        """As the file says."""
        return work.fixed


@register_weighting("tokens")
@dataclass(frozen=True)
class ByTokens(SiteWeighting):
    """By the tokens that a site has trained on since the last commit of what travels (FedAvg, arXiv 1602.05629)."""

    def own_weight(self, work: OwnWork) -> float:
        """Those tokens."""
        return float(work.tokens)


@register_weighting("tokens_times_batch")
@dataclass(frozen=True)
class ByTokensAndBatch(SiteWeighting):
    """By tokens times tokens of a step (Decoupled DiLoCo, arXiv 2604.21428): large batches bear less noise."""

    def own_weight(self, work: OwnWork) -> float:
        """tokens * (tokens / steps), 0 without a step."""
        return work.tokens * (work.tokens / work.steps) if work.steps else 0.0


@dataclass(frozen=True)
class ByLoss(SiteWeighting):
    """A policy by the loss of the received model on each site's own held-out text."""

    needs_loss = True

    base: Literal["uniform", "site", "tokens"] = "uniform"
    """What the share that follows from a site's loss is multiplied by: nothing, ``[[site]] weight``, or its tokens."""
    held_out_tokens: int = 2**14
    """Tokens of held-out text on which the loss is measured after each round; rounded up to whole batches."""

    def __post_init__(self) -> None:
        require_one_of("base", self.base, ("uniform", "site", "tokens"))
        require(self.held_out_tokens >= 1, "held_out_tokens", self.held_out_tokens, "at least 1")

    @property
    def loss_tokens(self) -> int:
        """``held_out_tokens``."""
        return self.held_out_tokens

    def own_weight(self, work: OwnWork) -> float:
        """That of ``base``."""
        return WEIGHTINGS.get(self.base)().own_weight(work)


@register_weighting("q_fair")
@dataclass(frozen=True)
class QFair(ByLoss):
    """q-FedAvg (arXiv 1905.10497): sites count by the q-th power of their loss."""

    q: float = 1.0
    """0 is uniform; the larger, the more a site counts whose loss is high. The paper's examples have 0.1 to 5."""
    inner_lr: float = 0.0
    """The paper's step of the mean: learning rate of plain SGD at the sites, whose inverse stands for the smoothness L.
    0: the mean of the updates by weight, whose step the outer optimizer chooses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.q <= 32, "q", self.q, "from 0 to 32")
        require(self.inner_lr >= 0, "inner_lr", self.inner_lr, "at least 0")

    @property
    def needs_norms(self) -> bool:
        """For the paper's step."""
        return self.inner_lr > 0

    def merit(self, loss: float) -> float:
        """loss ** q."""
        return min(max(loss, _SMALLEST_LOSS), _LARGEST_LOSS) ** self.q

    def shares(self, sites: Sequence[Standing]) -> Shares | None:
        """The powers; with ``inner_lr`` the step that algorithm 2 takes: L * sum of powers / sum of the estimates h."""
        powers = _known([site.merit for site in sites])
        largest = max(powers) or 1.0
        factors = tuple(power / largest for power in powers)
        if not self.inner_lr:
            return Shares(factors=factors)
        smoothness = 1.0 / self.inner_lr
        losses = _known([site.loss for site in sites])
        estimates = []
        for power, loss, site in zip(powers, losses, sites, strict=True):
            gradient = smoothness * site.norm
            # q F^(q-1) |d|^2 + L F^q, where F^(q-1) = F^q / F needs no function of a math library.
            estimates.append(self.q * (power / max(loss, _SMALLEST_LOSS)) * gradient * gradient + smoothness * power)
        return Shares(factors=factors, step=smoothness * math.fsum(powers) / math.fsum(estimates))


@register_weighting("agnostic")
@dataclass(frozen=True)
class Agnostic(ByLoss):
    """Agnostic federated learning (arXiv 1902.00146): shares rise with the loss, for the worst mixture of the sites.

    The model to evaluate is the running average of the global one over the rounds (``titan-ext eval --weights average``).
    """

    averages_model = True

    share_lr: float = 0.1
    """Step of the shares along the losses; the authors' examples have 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.share_lr >= 0, "share_lr", self.share_lr, "at least 0")

    def shares(self, sites: Sequence[Standing]) -> Shares | None:
        """The shares remembered from the last round, and those that the losses make of them."""
        count = len(sites)
        before = project_on_simplex([1.0 / count if site.share < 0 else site.share for site in sites])
        losses = _known([site.loss for site in sites])
        after = project_on_simplex([share + self.share_lr * loss for share, loss in zip(before, losses, strict=True)])
        return Shares(factors=tuple(before), remembered=tuple(after))


@register_weighting("tilted")
@dataclass(frozen=True)
class Tilted(ByLoss):
    """TERM (arXiv 2007.01162): sites count by exp(tilt * loss), between the mean and the maximum of the losses."""

    tilt: float = 1.0
    """t; 0 is uniform, and the larger, the nearer to the site of the highest loss alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.tilt <= 32, "tilt", self.tilt, "from 0 to 32")

    def merit(self, loss: float) -> float:
        """exp(tilt * loss)."""
        return math.exp(min(self.tilt * loss, _LARGEST_EXPONENT))

    def shares(self, sites: Sequence[Standing]) -> Shares | None:
        """The softmax of the losses."""
        merits = _known([site.merit for site in sites])
        largest = max(merits)
        scaled = [merit / largest for merit in merits]
        total = math.fsum(scaled)
        return Shares(factors=tuple(each / total for each in scaled))


# As the authors of q-FedAvg add to losses of 0.
_SMALLEST_LOSS = 1e-10
# Whose 32nd power is still a number.
_LARGEST_LOSS = 1e9


def _known(values: Sequence[float]) -> tuple[float, ...]:
    """The values, with their mean in the place of those that are unknown; ones if none is known."""
    known = [value for value in values if value >= 0]
    usual = math.fsum(known) / len(known) if known else 1.0
    return tuple(value if value >= 0 else usual for value in values)


def project_on_simplex(values: Sequence[float]) -> list[float]:
    """The nearest point, in Euclidean distance, whose coordinates are at least 0 and sum to 1."""
    ordered = sorted(values, reverse=True)
    lift = 0.0
    for count in range(1, len(ordered) + 1):
        candidate = (1.0 - math.fsum(ordered[:count])) / count
        if ordered[count - 1] + candidate > 0:
            lift = candidate
    return [max(0.0, value + lift) for value in values]
