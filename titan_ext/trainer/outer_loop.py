"""Builds a site's replica and outer loop around torchtitan's trainer."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from titan_ext.config.common import behind_model, beside_outer_loop, has_region_quorum, shared_tokens
from titan_ext.config.fomoe import expert_rows
from titan_ext.data.loader import TextDataLoader
from titan_ext.data.tokenizers.traits import fingerprint, row_count
from titan_ext.replica import ReplicaConfig
from titan_ext.replica.shutdown.graceful_shutdown import GracefulShutdown
from titan_ext.replica.shutdown.replica import StoppableReplica
from titan_ext.semi_sync import CommitLog, SemiSync, SiteOptions, SiteRanks, TokenRowMap
from titan_ext.semi_sync.plan.components import shares_sparse_rows
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.sources.source import Source, Turn
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.semi_sync.wire.link import bytes_per_second, number_of_streams
from titan_ext.trainer.gradient_step import GradientStepTrainer
from titan_ext.trainer.held_out import HeldOutLoss


def build_outer_loop(
    trainer: GradientStepTrainer,
    *,
    shutdown: GracefulShutdown,
    take_step: Callable[..., None],
    serve: Callable[[Turn], None],
    on_round: Callable[[RoundRecord], None],
) -> tuple[StoppableReplica | None, SemiSync]:
    """What a site needs to exchange with the others; joins none of them yet.

    Args:
        trainer: with its model, optimizers and data; its checkpoints keep the outer loop's state from now on.
        shutdown: tells the replica how the site leaves.
        take_step: takes the outer step, where that comes before the inner optimizer's.
        serve: called when a data source is about to train.
        on_round: called after each round.

    Returns:
        the replica, None at a rank whose leader speaks for it; and the outer loop.
    """
    config, data = trainer.config, trainer.config.dataloader
    _quiet_torchft()
    sources = data.all_sources() if isinstance(data, TextDataLoader.Config) else []
    replica = _build_replica(config, shutdown)
    outer = config.semi_sync.build(
        model_parts=trainer.model_parts,
        optimizers=trainer.optimizers,
        manager=replica,
        site=SiteOptions(
            name=config.site.name,
            weight=config.site.weight,
            labels=config.site.labels,
            commit_log=CommitLog(Path(config.dump_folder) / "commits.jsonl")
            if torch.distributed.get_rank() == 0
            else None,
            allow_rollback=config.replica.allow_rollback,
            token_rows=_token_rows(trainer),
            scope_rows=expert_rows(config.fomoe, config.site, config.model_spec.model, config.semi_sync.scopes),
            heartbeat_timeout_seconds=config.replica.heartbeat_timeout_seconds,
            grace_seconds=config.replica.join_timeout_seconds,
            norms_every=config.metrics.outer_norms_every,
            measure_loss=_measure_of_loss(trainer),
            sources=[Source(name=each.name, weight=each.weight) for each in sources],
            serve=serve,
            region_manager=_region_manager(config, replica, shutdown),
        ),
        on_round=on_round,
        must_agree=beside_outer_loop(config) | shared_tokens(config, trainer.tokenizer),
        described=behind_model(config),
    )
    if config.semi_sync.sync_point == "before_step":
        trainer.optimizers.register_step_pre_hook(take_step)
    if config.checkpoint.enable:
        trainer.checkpointer.states["semi_sync"] = outer
    return replica, outer


def _build_replica(
    config: Any, shutdown: GracefulShutdown, *, settings: ReplicaConfig | None = None, store_port: int | None = None
) -> StoppableReplica | None:
    """This rank's replica by the site's ``[replica]`` section, or by other settings; None where a leader speaks for it."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if config.semi_sync.pairing == "leader":
        # The other ranks have no replica group: their leader speaks for them.
        ranks = 1
    if rank >= ranks:
        return None
    return StoppableReplica(
        settings or config.replica,
        site=config.site.name,
        region=config.site.labels.get(REGION, ""),
        nearest=config.site.nearest,
        rank=rank,
        world_size=ranks,
        shutdown=shutdown,
        streams=number_of_streams(config.semi_sync.streams),
        max_rate=bytes_per_second(config.semi_sync.max_rate) / ranks if settings is None else 0.0,
        store_port=store_port,
    )


def _region_manager(
    config: Any, replica: StoppableReplica | None, shutdown: GracefulShutdown
) -> Callable[[int], StoppableReplica | None] | None:
    """What makes this rank's replica in the quorum of the site's region, if that has one; see ``SiteOptions``."""
    if not has_region_quorum(config):
        return None
    ranks = SiteRanks()
    stores: list[torch.distributed.TCPStore] = []

    def make(sites: int) -> StoppableReplica | None:
        if ranks.rank == 0:
            stores.append(torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        port = ranks.gather(stores[0].port if stores else None)[0]
        settings = dataclasses.replace(
            config.replica,
            lighthouse=config.replica.region_lighthouse,
            # One that is left alone in its region trains on.
            min_sites=1,
            expected_sites=sites,
            prefetch_state=False,
            # Those are of the quorum of all sites.
            manager_port=0,
            state_port=0,
        )
        made = _build_replica(config, shutdown, settings=settings, store_port=port)
        if replica is not None:
            replica.in_region = made
        return made

    return make


def _measure_of_loss(trainer: GradientStepTrainer) -> Callable[[], float] | None:
    """What measures the received model on the site's held-out text, where sites are weighed by that loss."""
    weighting = resolve(trainer.config.semi_sync).weighting
    return HeldOutLoss(trainer, weighting.loss_tokens).measure if weighting.needs_loss else None


def _token_rows(trainer: GradientStepTrainer) -> TokenRowMap | None:
    """Which tokens the rows of this site's tables stand for, where tables are shared by row."""
    config, tokenizer = trainer.config, trainer.tokenizer
    if not shares_sparse_rows(config.semi_sync):
        return None
    vocabulary = getattr(tokenizer, "vocabulary", None)
    rows = config.model_spec.model.vocab_size
    if vocabulary is not None:
        return TokenRowMap(vocabulary.row_ids(rows), vocabulary.total, vocabulary.tokenizer)
    total = row_count(tokenizer)
    places = torch.arange(rows)
    return TokenRowMap(torch.where(places < total, places, -1), total, fingerprint(tokenizer))


def _quiet_torchft() -> None:
    """torchft reports every quorum and vote of every rank; the outer loop's own line says it all."""
    for name in ("torchft", "torchft_quorums", "torchft_commits"):
        logging.getLogger(name).setLevel(logging.WARNING)
