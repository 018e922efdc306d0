"""The questions, each with the arms whose comparison answers it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from titan_ext.experiments.tiny.arms import FAST, Arm, LowRank, ddp, double, local_adam, single

EVERY, BETA, OMEGA = 32, 0.999, 0.95
"""K, and decay and weight of the slow momentum, as in the author's runs."""
_LORDO_OMEGA = 0.97


@dataclass(frozen=True, slots=True)
class Part:
    """One question.

    Args:
        hypothesis: what is thought, and what would speak against it.
        arms: by name; each is trained with every batch and decay.
        batches: windows of a site and step, relative to the default.
        decays: shares of the steps in which the learning rate falls to 0.
        length: steps, relative to the default.
    """

    hypothesis: str
    arms: Mapping[str, Arm]
    batches: tuple[float, ...] = (1.0,)
    decays: tuple[float, ...] = (0.0,)
    length: float = 1.0


def _cause() -> dict[str, Arm]:
    return {
        "ddp": ddp(),
        "ddp_single": single(BETA, OMEGA, None, "ddp_single"),
        "ddp_double": double(BETA, OMEGA, None, "ddp_double"),
        f"local_adam_k{EVERY}": local_adam(EVERY),
        f"mt_dao_single_k{EVERY}": single(BETA, OMEGA, EVERY, "ddp_single"),
        f"mt_dao_double_k{EVERY}": double(BETA, OMEGA, EVERY, "ddp_double"),
        f"mt_dao_scratch_k{EVERY}": single(BETA, OMEGA, EVERY, "ddp_single", from_scratch=True),
    }


def _ratio() -> dict[str, Arm]:
    arms = {"ddp": ddp()}
    owns = {beta: _with_beta("ddp_single", beta) for beta in (0.99, BETA)}
    for beta, own in owns.items():
        arms[own] = single(beta, OMEGA, None, own)
    for every in (EVERY, EVERY * 4):
        arms[f"local_adam_k{every}"] = local_adam(every)
        for beta, own in owns.items():
            arms[_with_beta(f"mt_dao_single_k{every}", beta)] = single(beta, OMEGA, every, own)
    return arms


def _few() -> dict[str, Arm]:
    chosen = ("ddp", "ddp_single", f"local_adam_k{EVERY}", f"mt_dao_single_k{EVERY}")
    return {name: arm for name, arm in _cause().items() if name in chosen}


def _methods(*chosen: str) -> dict[str, Arm]:
    """Data parallelism, Local Adam and methods whose sites train with Adam."""
    labels = {"des_loc": "DES-LOC", "diloco": "DiLoCo", "local_sgd": "FedAvg, local states"}
    return {"ddp": ddp(), f"local_adam_k{EVERY}": local_adam(EVERY)} | {
        f"{method}_k{EVERY}": _between(labels[method], method) for method in chosen
    }


def _short() -> dict[str, Arm]:
    """DiLoCo and the plain mean by the inner steps of a round."""
    arms = {"ddp": ddp()}
    for every in (2, 4, 8, EVERY):
        arms[f"local_sgd_k{every}"] = _between("FedAvg, local states", "local_sgd", every)
        arms[f"diloco_k{every}"] = _between("DiLoCo", "diloco", every)
    return arms


def _others() -> dict[str, Arm]:
    """Methods that hide or thin out the exchange, or have an optimizer of their own, beside DiLoCo."""
    streaming = {"num_fragments": 4, "fragment_sync_delay": 2}
    plain = {"decoupled_diloco": {"mean": ["embed", "output"]}}
    muon, share = "ddp_muon", {"sparta": {"sparta_fraction": 0.005}}
    return _methods("diloco") | {
        f"streaming_k{EVERY}": _between("Streaming DiLoCo, 4 fragments, delay 2", "diloco", outer=streaming),
        f"decoupled_k{EVERY}": _between(
            "Decoupled DiLoCo, 4 fragments, delay 2", "decoupled_diloco", outer=streaming | {"settings": plain}
        ),
        f"eager_k{EVERY}": _between("eager DiLoCo", "eager_diloco"),
        f"eager_slow_k{EVERY}": _between("eager DiLoCo, outer lr 0.35", "eager_diloco", outer={"outer_lr": 0.35}),
        f"noloco_k{EVERY}": _between("NoLoCo", "noloco"),
        f"sparta_k{EVERY * 2}": _between("SPARTA, 0.5% a step", "sparta", EVERY * 2, outer={"settings": share}),
        muon: Arm(label="DDP, Muon", inner="Muon", own=muon),
        f"muloco_k{EVERY}": _between("MuLoCo, int4", "muloco", inner="Muon", own=muon, outer={"codec": "int4"}),
        "demo": Arm(label="DeMo", sync_every=1, method="demo", inner="DeMo"),
    }


def _between(label: str, method: str, every: int = EVERY, **settings: Any) -> Arm:
    return Arm(label=f"{label}, K {every}", sync_every=every, method=method, **settings)


def _low_rank(rank: int) -> dict[str, Arm]:
    """LoRDO and low-rank data parallelism, each with a fast and with LoRDO's slow momentum."""
    own = f"low_rank_ddp_r{rank}"
    plain = LowRank(rank=rank, beta=FAST, omega=1.0)
    slow = replace(plain, beta=BETA, omega=_LORDO_OMEGA)
    return {
        "ddp": ddp(),
        own: Arm(label=f"low-rank DDP, rank {rank}", low_rank=plain, own=own),
        f"low_rank_ddp_slow_r{rank}": Arm(
            label=f"low-rank DDP, LoRDO's optimizer, rank {rank}", low_rank=slow, own=own
        ),
        f"lordo_r{rank}_k{EVERY}": _lordo(own, slow),
        f"lordo_fast_r{rank}_k{EVERY}": _lordo(own, replace(slow, beta=FAST), f"beta {FAST:g}"),
    }


def _bases() -> dict[str, Arm]:
    own = "low_rank_ddp_r4"
    slow = LowRank(rank=4, beta=BETA, omega=_LORDO_OMEGA)
    few = (own, f"lordo_r4_k{EVERY}", "low_rank_ddp_r16", f"lordo_r16_k{EVERY}")
    both = _low_rank(4) | _low_rank(16)
    return {
        "ddp": ddp(),
        **{name: both[name] for name in few},
        f"lordo_no_feedback_r4_k{EVERY}": _lordo(own, replace(slow, error_feedback=False), "no error feedback"),
        f"lordo_coordinates_r4_k{EVERY}": _lordo(
            own, replace(slow, first_basis="coordinates"), "first bases coordinates"
        ),
        f"lordo_r4_k{EVERY // 4}": _lordo(own, slow, every=EVERY // 4),
    }


def _lordo(own: str, low_rank: LowRank, what: str = "", every: int = EVERY) -> Arm:
    label = f"LoRDO, rank {low_rank.rank}, K {every}{what and f', {what}'}"
    return Arm(label=label, sync_every=every, method="lordo", low_rank=low_rank, own=own)


def _with_beta(name: str, beta: float) -> str:
    return name if beta == BETA else f"{name}_beta{beta:g}"


PARTS = {
    "cause": Part(
        "MT-DAO's distance to data parallelism is (a) the price of averaging rarely, or (b) that of its momenta, "
        "which data parallelism with the same optimizer pays as well; it goes away (c) with the warm-up and the switch, "
        "or (d) with a fast momentum beside the slow one. Against it: MT-DAO stays above data parallelism with its own "
        "optimizer by as much as Local Adam above Adam.",
        _cause(),
    ),
    "constant": Part(
        "A slow momentum averages noise out, as a decay of the learning rate does: at a constant rate, as in the author's "
        "runs, MT-DAO is not above data parallelism with Adam, and below Local Adam. Against it: it is above, as in "
        "part decay.",
        _few(),
    ),
    "decay": Part(
        "A learning rate that falls to 0 over the last tenth gives Adam what the momentum has already, and a decay shorter "
        "than the half-life leaves the momentum with stale directions: MT-DAO's distance to data parallelism with Adam "
        "grows by what that with its own momenta does. Against it: the distances are those of part constant.",
        _few(),
        decays=(0.1,),
    ),
    "ratio": Part(
        "The momentum carries the sites' common direction through a round if its half-life is well above K: the "
        "distance to data parallelism with the same optimizer falls with K over half-life. Against it: it depends on K "
        "alone, as Local Adam's does.",
        _ratio(),
    ),
    "noise": Part(
        "Local momenta go astray by gradient noise, which a slow momentum averages out: the smaller the batch, the more "
        "MT-DAO gains on Local Adam. Against it: the order is the same at each batch.",
        _few(),
        batches=(0.25, 4.0),
        length=0.5,
    ),
    "des_loc": Part(
        "DES-LOC is within noise of Local Adam at half its bytes, or less. Against it: it is above by more than the interval.",
        _methods("des_loc"),
    ),
    "methods": Part(
        "Sites that keep their moments to themselves train worse than with averaged ones. Against it: they are level.",
        _methods("diloco", "local_sgd"),
    ),
    "short": Part(
        "DiLoCo's outer step, with its momentum, is made for tens of inner steps: with few it overshoots, and its distance to "
        "the plain mean grows. Against it: they are level at each K.",
        _short(),
        length=0.25,
    ),
    "others": Part(
        "Hiding the exchange, thinning it out, few bits or pairs of sites cost little beside DiLoCo, and MuLoCo little beside "
        "data parallelism with Muon. Against it: they are above by more than the interval.",
        _others(),
        length=0.5,
    ),
    "low_rank": Part(
        "LoRDO's distance to low-rank data parallelism is that of its slow momentum, which data parallelism with LoRDO's "
        "optimizer pays as well. Against it: data parallelism with LoRDO's optimizer is level, and LoRDO with a fast "
        "momentum is no nearer.",
        _low_rank(4),
        length=0.5,
    ),
    "bases": Part(
        "LoRDO's distance to low-rank data parallelism comes of bases that are renewed too rarely, of the first bases or of "
        "the rank, and is less with error feedback. Against it: none of these changes the distance.",
        _bases(),
        length=0.5,
    ),
}
