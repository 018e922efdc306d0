"""What is compared: in how many places each expert is; what a run is given and returns, and what it must send."""

from dataclasses import dataclass
from math import inf

_FP32 = 4
_WORD_BITS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    dim: int
    """Width of the model."""
    layers: int
    """Transformer blocks, each with a mixture of experts."""
    experts: int
    """Experts of a layer; a multiple of ``sites``."""
    top_k: int
    """Experts that a token is routed to."""
    expert_dim: int
    """Hidden width of an expert."""
    steps: int
    """Inner steps of a run; a multiple of ``sync_every``."""
    sites: int
    batch: int
    """Sequences that a site trains on in a step."""
    length: int
    """Tokens of a sequence."""
    sync_every: int
    """Inner steps between two rounds."""
    corpus: str
    device: str

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert of every layer: three matrices each."""
        return 3 * self.dim * self.expert_dim * self.layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    loss_whole: float | None
    """Validation loss, in nats a token, of the model with every expert; None where it is no number."""
    loss_of_sites: list[float | None]
    """Of each site's model, which skips the experts that it does not hold."""
    bytes_a_round: list[int]
    """That each site sent in the last round."""
    parameters_held: int
    """Of a site's model."""
    body: int
    """Elements that travel beside experts: other parameters, and the routers' biases."""
    entropy: float
    """How evenly the whole model's routers use the experts on the validation text: 1 where all are used alike."""
    tokens_sha256: str
    """Hash of all that the sites trained on, in order."""
    seconds: float

    @property
    def loss(self) -> float:
        """Of the whole model; infinite for a run that diverged."""
        return inf if self.loss_whole is None else self.loss_whole


def arms(sites: int) -> dict[str, int]:
    """Sites that hold each expert, by the arm's name."""
    return {f"copies_{copies}": copies for copies in range(1, sites)} | {"full": sites}


def expected_bytes(settings: Settings, copies: int, body: int) -> int:
    """Bytes that a site sends in a round.

    Beside the body's ring all-reduce, of each of its experts (``copies / sites`` of all) the site sends the owner its
    contribution, unless it is the owner, and owners send each other holder the sum; with each row goes its weight, and
    with the whole a bit for each expert to every other site.

    Args:
        settings: of the runs.
        copies: sites that hold each expert.
        body: elements that travel beside experts.
    """
    from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

    sites = settings.sites
    if copies == sites:
        return ring_all_reduce_bytes(_FP32 * (body + settings.experts * settings.expert_parameters), sites)
    rows = 2 * (copies - 1) * settings.experts // sites
    bits = (sites - 1) * -(-settings.experts // _WORD_BITS) * _FP32
    return ring_all_reduce_bytes(_FP32 * body, sites) + rows * _FP32 * (settings.expert_parameters + 1) + bits
