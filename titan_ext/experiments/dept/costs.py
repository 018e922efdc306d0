"""What an arm's sites hold and send, counted in its run and by the paper's formulas."""

from dataclasses import dataclass
from statistics import mean

from titan_ext.experiments.dept.arms import STANDARD
from titan_ext.experiments.dept.outcome import Outcome
from titan_ext.experiments.dept.settings import Settings
from titan_ext.models.dept.cost import ModelSize, parameters_held, payload
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Means over the sites."""

    vocabulary: float
    """Tokens of a site's vocabulary."""
    embedding: float
    """Parameters of a site's embedding, padding included."""
    parameters: float
    """Those of its whole model."""
    parameters_by_formula: float
    bytes_a_round: float
    """Bytes that a site sends in as many steps as a round has."""
    bytes_a_round_by_formula: float


def costs(outcome: Outcome, settings: Settings) -> Costs:
    """An arm's costs in its runs, which are equal in them."""
    run = outcome.runs[0]
    size = ModelSize(body=run.body, dim=settings.dim, vocabulary=run.joint_vocabulary)
    held = [parameters_held(outcome.arm, size, own) for own in run.vocabularies]
    sent = [_FP32 * payload(outcome.arm, size, own) for own in run.vocabularies]
    exchanges = settings.sync_every if outcome.arm == STANDARD else 1
    return Costs(
        vocabulary=mean(run.vocabularies),
        embedding=mean(run.embeddings),
        parameters=run.body + mean(run.embeddings),
        parameters_by_formula=mean(held),
        bytes_a_round=mean(run.bytes_a_round),
        bytes_a_round_by_formula=exchanges * mean(ring_all_reduce_bytes(each, len(sent)) for each in sent),
    )
