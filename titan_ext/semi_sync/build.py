"""A plan and a rank's tensors, put together to the parts of the engine."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.semi_sync.bind import bind_states, build_reductions
from titan_ext.semi_sync.compat.torchft_manager import adapt_manager
from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.plan.plan import LATE_WORK_NEEDS, SyncPlan, short_hash
from titan_ext.semi_sync.plan.regions import REGION, level_labels
from titan_ext.semi_sync.plan.schedule import Progress, Schedule
from titan_ext.semi_sync.round.agreement import BITS, MOST_GROUPS, MOST_RULES, NAME_BYTES
from titan_ext.semi_sync.round.box import RoundBox
from titan_ext.semi_sync.round.commit import Committer
from titan_ext.semi_sync.round.contributions import ErrorFeedback
from titan_ext.semi_sync.round.differences import InCommon, as_text
from titan_ext.semi_sync.round.exchange import Exchange
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.outer_norms import OuterNorms
from titan_ext.semi_sync.round.participation import Participation
from titan_ext.semi_sync.round.writing import ContributionWriter
from titan_ext.semi_sync.site.by_leader import ByLeader
from titan_ext.semi_sync.site.by_rank import ByRank
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.sources.bank import Bank
from titan_ext.semi_sync.sources.turns import SourceTurns
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.state.untrained import with_buffers
from titan_ext.semi_sync.state.views import ModelView, warn_of_rounding
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device

logger = logging.getLogger(__name__)


def build(
    plan: SyncPlan,
    *,
    model_parts: Iterable[nn.Module],
    optimizers: Any,
    manager: ReplicaManager | None,
    site: SiteOptions,
    outer_optimizers: Sequence[Optimizer] | None = None,
    must_agree: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    keep_local_work: bool = True,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Committer:
    """Put the parts of a rank's outer loop together. A collective over the site.

    Args:
        plan: what the sites exchange.
        model_parts: of this rank.
        optimizers: the inner ones.
        manager: this rank's; None where another rank of the site exchanges for it.
        site: who the site is.
        outer_optimizers: in place of the plan's.
        must_agree: what else has to be equal at sites that exchange, by configuration key.
        settings: those behind the plan, by configuration key, to name a difference by.
        model: those behind the model and its layout.
        keep_local_work: whether a round that was not committed is tried again at the next step, with what was done since.
        on_round: called with the record of every round.

    Returns:
        The end of a round, which holds its other phases.

    Raises:
        ValueError: the site's name or the plan is too long, a scope or fragment does not fit the model, a synced state
            does not exist, or nothing measures the loss that sites are weighed by.
    """
    _check(plan, site)
    ranks = site.ranks
    labels = _labels(plan, site)
    lineage = Lineage(site.name, site.commit_log, ranks, allow_rollback=site.allow_rollback)
    view = ModelView(model_parts, optimizers)
    plan = with_buffers(plan, {name for names in ranks.gather(view.buffers()) for name in names})
    states = bind_states(plan, view, site, outer_optimizers)
    warn_of_rounding(view)
    _warn_of_wide(states)
    pairing = _pair(plan, site, states, view)
    manager = pairing.manager_of_all_ranks(adapt_manager(manager))
    device = _device(site, states)
    # Over a quorum of its own a region sees to its averages itself.
    apart = plan.region_rules if site.region_manager is not None else []
    of_all = [index for index in range(len(plan.rules)) if index not in apart]
    schedule = Schedule(plan, of_all, only_when_due=bool(apart))
    progress = Progress()
    checksum = SharedChecksum(states, ranks, pairing.speaks_for)
    healing = Healing(
        states,
        lineage=lineage,
        schedule=schedule,
        progress=progress,
        checksum=checksum,
        manager=manager,
        site=ranks,
        keeps_late_work=plan.lateness.keeps_work,
    )
    bank = Bank(states, device, ranks)
    sources = SourceTurns(
        plan,
        sources=site.sources,
        name=site.name,
        states=states,
        view=view,
        bank=bank,
        progress=progress,
        serve=site.serve,
    )
    exchange = Exchange(
        manager=manager,
        states=states,
        in_common=InCommon(
            plan=plan.fingerprint(),
            tensors={key: short_hash(value) for key, value in pairing.fingerprint(states).items()},
            settings=as_text(must_agree or {}),
            behind_plan=as_text(settings or {}),
            behind_tensors=as_text(model or {}),
        ),
        lineage=lineage,
        healing=healing,
        writer=ContributionWriter(
            states=states,
            error_feedback=ErrorFeedback(states, device),
            bank=bank,
            guard=plan.outlier_guard,
            site=ranks,
            device=device,
        ),
        reductions=build_reductions(states, plan.topology),
        pairing=pairing,
        site=ranks,
        plan=plan,
        weighting=plan.weighting,
        groups=plan.groups,
        labels=labels,
        wire=wire_device(manager),
        heartbeat_timeout_seconds=site.heartbeat_timeout_seconds,
        clock=site.clock,
    )
    return Committer(
        exchange=exchange,
        schedule=schedule,
        progress=progress,
        checksum=checksum,
        participation=Participation(
            states, plan.sampling, site.name, RoundBox(plan.box, ranks, site.clock, _inner_device(view)), sources
        ),
        view=view,
        norms=OuterNorms(states, ranks, site.norms_every),
        reset_inner_optimizer=plan.reset_inner_optimizer,
        keep_local_work=keep_local_work,
        on_round=on_round,
        grace_seconds=site.grace_seconds,
    )


def _warn_of_wide(states: Sequence[SyncedState]) -> None:
    wide = [state.key for state in states if state.tensors.wide]
    if wide:
        logger.warning("%s: kept in float64, and rounded to float32 at each exchange between sites", ", ".join(wide))


def _check(plan: SyncPlan, site: SiteOptions) -> None:
    if len(site.name.encode()) > NAME_BYTES:
        raise ValueError(f"site name {site.name!r}: must be at most {NAME_BYTES} bytes")
    if plan.weighting.needs_loss and site.measure_loss is None:
        raise ValueError("weighting: sites are weighed by loss; give measure_loss, which measures it")
    if plan.lateness.keeps_work and not site.name:
        raise ValueError(
            'late_work = "keep": what a late site has brought already is known by its name; give site_name'
        )
    if plan.lateness.keeps_work and len(site.sources) > 1:
        raise ValueError(f'late_work = "keep": {LATE_WORK_NEEDS}')
    if plan.lateness.trains_on and site.pairing == "leader":
        raise ValueError('overdue_result = "train_on": must be "wait" with pairing = "leader"')
    if plan.averages_gradients and site.region_manager is None:
        raise ValueError(
            'region_average = "gradients": needs a quorum of each region\'s own (replica.region_lighthouse, or '
            "`titan-ext launch` of all sites)"
        )
    if len(plan.rules) > MOST_RULES:
        raise ValueError(f"{len(plan.rules)} rules in the plan: must be at most {MOST_RULES} (fewer fragments)")


def _labels(plan: SyncPlan, site: SiteOptions) -> tuple[int, ...]:
    """For each of the plan's groups a number of the site's label, equal at sites with an equal label."""
    if len(plan.groups) > MOST_GROUPS:
        raise ValueError(f"scopes: shared by {', '.join(plan.groups)}: must be at most {MOST_GROUPS} labels")
    region = site.labels.get(REGION)
    known = {**site.labels, **(level_labels(region) if region else {})}
    for group in plan.groups:
        if group not in known:
            raise ValueError(f'site "{site.name}" has no label "{group.split("/")[0]}", by which something is shared')
    return tuple(int(short_hash(known[group]), 16) % 2**BITS for group in plan.groups)


def _pair(
    plan: SyncPlan,
    site: SiteOptions,
    states: Sequence[SyncedState],
    view: ModelView,
) -> Pairing:
    """Who exchanges with whom. A collective over the site."""
    if site.pairing != "leader":
        return ByRank(states, site.ranks)
    held = {name: view.tensor(name) for name in [*view.parameters, *view.buffers()]}
    shards = SiteShards(held, site.ranks.group, alone=site.ranks.alone)
    bucket_elements = max(rule.wire.bucket_elements for rule in plan.rules)
    return ByLeader(states, shards, bucket_elements)


def _device(site: SiteOptions, states: Sequence[SyncedState]) -> torch.device:
    if site.outer_state_device == "cpu":
        return torch.device("cpu")
    return next((state.tensors.device for state in states if state.numel), torch.device("cpu"))


def _inner_device(view: ModelView) -> torch.device:
    """Where inner steps run."""
    return next((each.device for each in view.parameters.values()), torch.device("cpu"))
