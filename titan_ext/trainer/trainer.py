"""A site's trainer: torchtitan's inner step, then the outer loop's."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from titan_ext.trainer.cpu import finish, prepare

prepare()

from torchtitan import trainer as torchtitan_trainer  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

from titan_ext.config.sections import DeptConfig, SiteConfig  # noqa: E402
from titan_ext.data.tokenizers.traits import fingerprint, row_count  # noqa: E402
from titan_ext.errors import UserError  # noqa: E402
from titan_ext.optim.switch import Switch, SwitchConfig  # noqa: E402
from titan_ext.replica import ReplicaConfig  # noqa: E402
from titan_ext.replica.shutdown.graceful_shutdown import GracefulShutdown  # noqa: E402
from titan_ext.replica.shutdown.process import GracefulExit  # noqa: E402
from titan_ext.replica.shutdown.replica import StoppableReplica  # noqa: E402
from titan_ext.semi_sync import CommitLog, SemiSync, SiteOptions, TokenRowMap  # noqa: E402
from titan_ext.semi_sync.plan.resolve import shares_sparse_rows  # noqa: E402
from titan_ext.trainer.checkpoints import CheckpointManager  # noqa: E402
from titan_ext.trainer.metrics import MetricsProcessor  # noqa: E402
from titan_ext.trainer.optimizers import OptimizersContainer  # noqa: E402

# On top of the lighthouse's patience: what a heartbeat may take to arrive.
_HEARTBEAT_MARGIN_SECONDS = 1.0


class Trainer(torchtitan_trainer.Trainer):
    """torchtitan's trainer for one site of several.

    Each inner step is torchtitan's own; after it the outer loop may exchange with the other sites.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_trainer.Trainer.Config):
        site: SiteConfig = field(default_factory=SiteConfig)
        semi_sync: SemiSync.Config = field(default_factory=SemiSync.Config)
        dept: DeptConfig = field(default_factory=DeptConfig)
        replica: ReplicaConfig = field(default_factory=ReplicaConfig)
        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)
        checkpoint: CheckpointManager.Config = field(default_factory=CheckpointManager.Config)
        optimizer: OptimizersContainer.Config = field(default_factory=OptimizersContainer.Config)
        optimizer_switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __init__(self, config: Config) -> None:
        self.outer: SemiSync | None = None
        self.replica: StoppableReplica | None = None
        self._joined = False
        self._tokens_told = 0
        super().__init__(config)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._shutdown = GracefulShutdown(config.site.name, rank, ranks)
        finish(self.model_parts)
        try:
            self._switch = Switch(config.optimizer_switch, self.optimizers.optimizers, self.lr_schedulers.schedulers)
        except ValueError as error:
            raise UserError(f"optimizer_switch.{error}") from error
        if config.semi_sync.method != "none":
            self._build_outer_loop(config)

    def should_continue_training(self) -> bool:
        """torchtitan asks before each step; the first time, after any checkpoint is loaded, the site joins."""
        if self.outer is not None and not self._joined:
            self._join()
        going_on = super().should_continue_training()
        if going_on and not self._shutdown.steps.advance():
            self._save_and_exit()
        return going_on

    def train_step(self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
        """One inner step, then whatever the outer loop has due."""
        # torchtitan has counted the step that is about to be taken.
        self._switch.before_step(self.step - 1)
        for part in self.model_parts:
            if hasattr(part, "set_step"):
                part.set_step(self.step)
        if self.outer is not None and self.outer.sits_out:
            # The sites share the count of inner steps, and the learning rate goes by it; the data waits.
            self.lr_schedulers.step()
        else:
            super().train_step(data_iterator)
        if self.outer is not None:
            if self.config.semi_sync.sync_point == "after_step":
                self._outer_step()
            # A site that fell behind and was healed stands where the others stand.
            self._follow_inner_step()
            self.outer.serve_snapshot_requests()
            checkpoint = self.config.checkpoint
            if self.step >= self.config.training.steps and checkpoint.enable and checkpoint.last_save_model_only:
                # What is saved now is the finished model, not a place to go on from.
                self.outer.finish()

    def _outer_step(self, *_: object) -> None:
        self.outer.step(tokens=self.ntokens_seen - self._tokens_told)
        self._tokens_told = self.ntokens_seen

    def train(self) -> None:
        """Train to the last step, settle what is in flight, and write the summary."""
        self._shutdown.start(
            stop_heartbeats=self.replica.stop_heartbeats if self.replica is not None else lambda: None,
            heartbeat_timeout_seconds=self.config.replica.heartbeat_timeout_seconds + _HEARTBEAT_MARGIN_SECONDS,
        )
        super().train()
        self._shutdown.finish()
        digest = ""
        if self.outer is not None:
            self.outer.finish()
            digest = self.outer.shared_state_sha256()
        self.metrics_processor.summarize(
            site=self.config.site.name,
            step=self.step,
            ledger=self.outer.ledger if self.outer is not None else None,
            shared_state_sha256=digest,
        )

    def close(self) -> None:
        """Leave the run and release everything."""
        super().close()
        self._shutdown.stop()
        if self.replica is not None:
            self.replica.shutdown(wait=False)

    def _save_and_exit(self) -> NoReturn:
        """Save what was done since the last checkpoint and exit; the other sites do not wait for that."""
        if self.outer is not None:
            self.outer.state_dict()  # waits for a round in flight, in which the others need this site
        torch.distributed.barrier()
        if self.replica is not None:
            self.replica.stop_heartbeats()
        saved = self.checkpointer.save_now(self.step)
        self.metrics_processor.journal.add("left", {"step": self.step, "saved": saved})
        # torchrun ends all ranks when the first has ended.
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            what = f"saved step {self.step}" if saved else f"step {self.step} is not saved (checkpoint.enable is off)"
            logger.info("site %s: asked to leave: %s, leaving", self.config.site.name, what)
        raise GracefulExit(self._shutdown.code)

    def _build_outer_loop(self, config: Config) -> None:
        _quiet_torchft()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if config.semi_sync.pairing == "leader":
            # The other ranks have no replica group: their leader speaks for them.
            ranks = 1
        if rank < ranks:
            self.replica = StoppableReplica(
                config.replica, site=config.site.name, rank=rank, world_size=ranks, shutdown=self._shutdown
            )
        self.outer = config.semi_sync.build(
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            manager=self.replica,
            site=SiteOptions(
                name=config.site.name,
                weight=config.site.weight,
                commit_log=CommitLog(Path(config.dump_folder) / "commits.jsonl"),
                allow_rollback=config.replica.allow_rollback,
                token_rows=self._token_rows(),
                heartbeat_timeout_seconds=config.replica.heartbeat_timeout_seconds,
            ),
            on_round=self.metrics_processor.log_round,
        )
        if config.semi_sync.sync_point == "before_step":
            self.optimizers.register_step_pre_hook(self._outer_step)
        if config.checkpoint.enable:
            self.checkpointer.states["semi_sync"] = self.outer

    def _token_rows(self) -> TokenRowMap | None:
        """Which tokens the rows of this site's tables stand for, where tables are shared by row."""
        if not shares_sparse_rows(self.config.semi_sync):
            return None
        vocabulary = getattr(self.tokenizer, "vocabulary", None)
        rows = self.config.model_spec.model.vocab_size
        if vocabulary is not None:
            return TokenRowMap(vocabulary.row_ids(rows), vocabulary.total, vocabulary.tokenizer)
        total = row_count(self.tokenizer)
        places = torch.arange(rows)
        return TokenRowMap(torch.where(places < total, places, -1), total, fingerprint(self.tokenizer))

    def _join(self) -> None:
        paired = "their leaders exchange for all ranks" if self.outer.pairing == "leader" else "rank by rank"
        if self.replica is not None:
            logger.info(
                "site %s: waiting for the quorum at %s (sites paired: %s)",
                self.config.site.name,
                self.replica.lighthouse,
                paired,
            )
        self.outer.inner_step = max(self.outer.inner_step, self.step)
        self._tokens_told = self.ntokens_seen
        self.outer.join()
        self._joined = True
        self._follow_inner_step()
        logger.info(
            "site %s: joined a quorum of %d site(s) at step %d",
            self.config.site.name,
            self.outer.sites,
            self.step,
        )

    def _follow_inner_step(self) -> None:
        """All sites share the count of inner steps: it sets the learning rate and the end of the run."""
        if self.step == self.outer.inner_step:
            return
        self.step = self.outer.inner_step
        self.lr_schedulers.load_state_dict({"last_epoch": self.step})
        for scheduler in self.lr_schedulers.schedulers:
            # torchtitan leaves this to the optimizer's checkpoint, which a healed site has not read.
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate


def _quiet_torchft() -> None:
    """torchft reports every quorum and vote of every rank; the outer loop's own line says it all."""
    for name in ("torchft", "torchft_quorums", "torchft_commits"):
        logging.getLogger(name).setLevel(logging.WARNING)
