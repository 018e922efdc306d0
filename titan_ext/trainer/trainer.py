"""A site's trainer: torchtitan's inner step, then the outer loop's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torchtitan import trainer as torchtitan_trainer
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.common.moe import MoE
from torchtitan.tools.logging import logger

from titan_ext.config.changed import settings_changes
from titan_ext.config.sections import DeptConfig, FoMoEConfig, SiteConfig
from titan_ext.data.loader import TextDataLoader
from titan_ext.data.sources import SourcesDataLoader
from titan_ext.errors import RunError, UserError
from titan_ext.export.llama import is_llama, llama_config
from titan_ext.models.capabilities import tell_step
from titan_ext.optim.switch import Switch, SwitchConfig
from titan_ext.regularizers import RegularizerConfig
from titan_ext.replica import ReplicaConfig
from titan_ext.replica.shutdown.graceful_shutdown import GracefulShutdown
from titan_ext.replica.shutdown.process import GracefulExit
from titan_ext.replica.shutdown.replica import StoppableReplica
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.sources.source import Turn
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.trainer.batch_warmup import BatchWarmupConfig
from titan_ext.trainer.checkpoints import CheckpointManager
from titan_ext.trainer.cpu import finish
from titan_ext.trainer.gradient_step import GradientStepTrainer
from titan_ext.trainer.log_mirror import OF_FIRST_RANK, OF_LOGGING_RANK
from titan_ext.trainer.lr_scheduler import LRSchedulersContainer
from titan_ext.trainer.metrics import MetricsProcessor
from titan_ext.trainer.optimizers import OptimizersContainer
from titan_ext.trainer.outer_loop import build_outer_loop
from titan_ext.trainer.routing import RoutingStatistics
from titan_ext.trainer.spikes import SpikesConfig

# On top of the lighthouse's patience: what a heartbeat may take to arrive.
_HEARTBEAT_MARGIN_SECONDS = 1.0


class Trainer(GradientStepTrainer):
    """torchtitan's trainer for one site of several.

    Each inner step is torchtitan's own; after it the outer loop may exchange with the other sites.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_trainer.Trainer.Config):
        site: SiteConfig = field(default_factory=SiteConfig)
        """Who this site is among the sites of the run."""

        semi_sync: SemiSync.Config = field(default_factory=SemiSync.Config)
        """The outer loop: what sites exchange, how often, and how it is applied."""

        dept: DeptConfig = field(default_factory=DeptConfig)
        """Embeddings apart from the body."""

        fomoe: FoMoEConfig = field(default_factory=FoMoEConfig)
        """Experts shared out over the sites."""

        replica: ReplicaConfig = field(default_factory=ReplicaConfig)
        """How the site finds the others, and how long it waits for them."""

        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)
        """What is logged of steps and rounds, and where."""

        checkpoint: CheckpointManager.Config = field(default_factory=CheckpointManager.Config)
        """What is saved and when, and what a run starts from."""

        optimizer: OptimizersContainer.Config = field(default_factory=OptimizersContainer.Config)
        """The inner optimizer."""

        lr_scheduler: LRSchedulersContainer.Config = field(default_factory=LRSchedulersContainer.Config)
        """The learning rate over the steps."""

        optimizer_switch: SwitchConfig = field(default_factory=SwitchConfig)
        """A change of the inner optimizer's settings at one step."""

        spikes: SpikesConfig = field(default_factory=SpikesConfig)
        """Steps whose loss or gradient stands out."""

        batch_warmup: BatchWarmupConfig = field(default_factory=BatchWarmupConfig)
        """A global batch that grows over the first steps."""

        regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
        """What keeps inner steps near the model that the site has received."""

    def __init__(self, config: Config) -> None:
        self.outer: SemiSync | None = None
        self.replica: StoppableReplica | None = None
        self._begun = False
        self._over = False
        self._tokens_reported = 0
        self.settings: dict[str, Any] = {}
        """What the site trains by, by key, for checkpoints and to tell what has changed since; the caller's to set."""
        self._saved_settings: dict[str, Any] = {}
        described = config.checkpoint.enable and config.checkpoint.last_save_in_hf and is_llama(config.model_spec)
        # torchtitan cuts the model's positions down to the run's sequences.
        longest = config.model_spec.model.max_seq_len if described else 0
        routing = RoutingStatistics(lambda: self.metrics_processor.should_log(self.step))
        super().__init__(_observed(config, routing))
        self.metrics_processor.routing = routing.metrics
        self.checkpointer.model_config = self.model_config
        self.checkpointer.heals = config.replica.heal_from_checkpoints
        self.checkpointer.say = self.metrics_processor.log_note
        self.checkpointer.own_logs += OF_FIRST_RANK if torch.distributed.get_rank() == 0 else ()
        self.checkpointer.own_logs += OF_LOGGING_RANK if self.metrics_processor.is_logging_rank else ()
        if described:
            self.checkpointer.description = self._description(longest)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._shutdown = GracefulShutdown(config.site.name, rank, ranks)
        finish(self.model_parts)
        try:
            self._switch = Switch(config.optimizer_switch, self.optimizers.optimizers, self.lr_schedulers.schedulers)
        except ValueError as error:
            raise UserError(f"optimizer_switch.{error}") from error
        if config.checkpoint.enable:
            self.checkpointer.states |= self.state_of_step()
        if config.semi_sync.method != "none" and not config.checkpoint.create_seed_checkpoint:
            self._validate_last_sources()
            self.replica, self.outer = build_outer_loop(
                self, shutdown=self._shutdown, take_step=self._outer_step, serve=self._serve, on_round=self._on_round
            )

    step: int

    def should_continue_training(self) -> bool:
        """torchtitan asks before each step; the first time, after any checkpoint is loaded, the site joins."""
        if not self._begun:
            self._begun = True
            self.metrics_processor.journal.add("start", {"step": self.step})
            self._apply_settings()
            if self.outer is not None:
                self._join()
        going_on = super().should_continue_training() and not self._over
        if going_on and not self._shutdown.steps.advance():
            self._save_and_exit()
        return going_on

    def train_step(self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
        """One inner step, then whatever the outer loop has due."""
        # torchtitan has counted the step that is about to be taken.
        self._switch.before_step(self.step - 1)
        tell_step(self.model_parts, self.step)
        self._follow_clock()
        taken = not (self.outer is not None and self.outer.sits_out) and self._inner_step(data_iterator)
        if self.outer is None:
            return
        if not taken:
            # The sites share the count of inner steps, and the learning rate goes by it; the data waits.
            self.lr_schedulers.step()
        if self.config.semi_sync.sync_point == "after_step" or not taken:
            self._outer_step()
        # A site that fell behind and was healed stands where the others stand; one whose next source has its turn, where
        # the one before began. What is saved and validated is the work of a site's last source of a round.
        self.checkpointer.held = self.outer.more_sources or self.outer.inner_step < self.step
        self._follow_inner_step()
        self.outer.serve_snapshot_requests()
        checkpoint, last = self.config.checkpoint, self.step >= self.config.training.steps or self.outer.run_is_over
        if last and checkpoint.enable and checkpoint.last_save_model_only:
            # What is saved now is the finished model, not a place to go on from.
            self.outer.finish()
        if self.outer.run_is_over:
            self._end_early()

    def share_gradients(self) -> None:
        """With those of the site's region, where that is data parallel."""
        if self.outer is not None:
            self.outer.average_gradients(self._new_tokens())

    def _new_tokens(self) -> int:
        """Of the whole site since the outer loop was last told: others may have more or fewer ranks that read."""
        return (self.ntokens_seen - self._tokens_reported) * self._reading_ranks()

    def _end_early(self) -> None:
        """Save the end of a run that comes before ``training.steps``."""
        self._over = True
        self.checkpointer.save(self.step, last_step=True)

    def _inner_step(self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> bool:
        """torchtitan's step; False where the data does not suffice for it.

        torchtitan ends a run whose loss is not finite; a site of several is left out of a round and comes back.
        """
        try:
            super().train_step(data_iterator)
        except DataloaderExhaustedError:
            self._end_of_data()
            if self.outer is None:
                raise  # ends the run
            return False
        except RuntimeError as error:
            # Raised after all of the step but its report.
            if not str(error).startswith("Loss is not finite"):
                raise
            if self.config.spikes.action == "skip":
                return True  # it came to nothing, and has been logged as a spike
            if self.outer is None:
                problem = f"the loss of step {self.step} is not finite: lower the learning rate, or look at the data"
                raise RunError(problem) from None
            self.metrics_processor.log_not_finite(self.step)
        return True

    def _end_of_data(self) -> None:
        """One pass over finite data is done: save and end, or, at a site of several, see the others to their end."""
        taken = self.step - 1
        if taken == 0:
            raise UserError("data: too little text for one inner step (training.global_batch_size sequences)") from None
        self.metrics_processor.journal.add("data_ended", {"step": taken})
        if self.outer is not None:
            logger.info(
                "site %s: the data ended after step %d; waiting for the other sites", self.config.site.name, taken
            )
            self.outer.end_of_data()
            return
        logger.info("site %s: the data ended after step %d", self.config.site.name, taken)
        self.step = taken  # torchtitan has counted the step that was not taken
        self._end_early()

    def _outer_step(self, *_: object) -> None:
        if self.token_loss is not None and (factor := self.token_loss.outer_weight) is not None:
            self.outer.weight_factor = factor
        self.outer.step(tokens=self._new_tokens())
        self._tokens_reported = self.ntokens_seen

    def train(self) -> None:
        """Train to the last step, settle what is in flight, and write the summary."""
        if self.config.checkpoint.create_seed_checkpoint:
            self._save_seed()
            return
        self._shutdown.start(
            stop_heartbeats=self.replica.stop_heartbeats if self.replica is not None else lambda: None,
            heartbeat_timeout_seconds=self.config.replica.heartbeat_timeout_seconds + _HEARTBEAT_MARGIN_SECONDS,
        )
        super().train()
        self._shutdown.finish()
        digest, apart = "", {}
        if self.outer is not None:
            self.outer.finish()
            digest = self.outer.shared_state_sha256()
            apart = {"own_buffers": self.outer.own_buffers(), "steps_past_shared": self.outer.steps_past_shared()}
        self.metrics_processor.summarize(
            site=self.config.site.name,
            step=self.step,
            ledger=self.outer.ledger if self.outer is not None else None,
            shared_state_sha256=digest,
            not_compared=[scope.name for scope in self.config.semi_sync.scopes if scope.shared != "full"],
            **apart,
        )
        self.checkpointer.mirror_logs()

    def _save_seed(self) -> None:
        """Save the model as it was initialised, unsharded, as step 0; every run that finds it starts from it."""
        self.checkpointer.save(0, last_step=True)
        logger.info("site %s: created the seed checkpoint in %s", self.config.site.name, self.checkpointer.folder)
        self.metrics_processor.summarize(site=self.config.site.name, step=0, ledger=None, shared_state_sha256="")

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
        self.checkpointer.mirror_logs()
        # torchrun ends all ranks when the first has ended.
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            what = f"saved step {self.step}" if saved else f"step {self.step} is not saved (checkpoint.enable is off)"
            logger.info("site %s: asked to leave: %s, leaving", self.config.site.name, what)
        raise GracefulExit(self._shutdown.code)

    def _serve(self, turn: Turn) -> None:
        """A data source is about to train: its batches come next."""
        if not isinstance(self.dataloader, SourcesDataLoader):
            return
        batches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        self.dataloader.serve(turn.source, None if turn.skip_steps is None else turn.skip_steps * batches)
        self.metrics_processor.source = turn.source
        logger.info("site %s: source %s trains next", self.config.site.name, turn.source)

    def _validate_last_sources(self) -> None:
        """Validate after a round's last source alone: a step that several take comes to one validation."""
        data = self.config.dataloader
        if self.config.validator.enable and isinstance(data, TextDataLoader.Config) and data.has_sources:
            due = self.validator.should_validate
            self.validator.should_validate = lambda step: not self.checkpointer.held and due(step)

    def _follow_clock(self) -> None:
        """The learning rate of the next step, where sources have clocks of their own."""
        if self.outer is not None and self.outer.plan.sources.clock != "run":
            self.lr_schedulers.load_state_dict({"last_epoch": self.outer.schedule_step})
            self._set_rates()

    def _on_round(self, record: RoundRecord) -> None:
        self.metrics_processor.log_round(record)
        if self.token_loss is not None and (record.committed or record.healed):
            self.token_loss.after_sync()

    def _description(self, longest: int) -> dict[str, Any]:
        """The ``config.json`` beside the last checkpoint's weights, for positions up to ``longest``."""
        model, dtype = self.config.model_spec.model, TORCH_DTYPE_MAP[self.config.checkpoint.export_dtype]
        return llama_config(model, model.vocab_size, self.tokenizer, dtype) | {"max_position_embeddings": longest}

    def _join(self) -> None:
        paired = "their leaders exchange for all ranks" if self.outer.pairing == "leader" else "rank by rank"
        if self.replica is not None:
            logger.info(
                "site %s: waiting for the quorum at %s (sites paired: %s)",
                self.config.site.name,
                self.replica.lighthouse,
                paired,
            )
        own = self.outer.inner_step = max(self.outer.inner_step, self.step)
        self._tokens_reported = self.ntokens_seen
        self.outer.join()
        self._serve(Turn(source=self.outer.source))  # which the loader knows, unless its place was not loaded
        self._follow_inner_step()
        if self.step > own:
            rest = f"of its own step {own}" if own else "fresh"
            self.metrics_processor.log_note(
                f"joins at step {self.step} with what the sites share; what they do not, such as the place in the data and "
                f"most states of the inner optimizer, is {rest}"
            )
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
        self._set_rates()

    def _set_rates(self) -> None:
        for scheduler in self.lr_schedulers.schedulers:
            # torchtitan leaves this to the optimizer's checkpoint: of other settings, or not read by a healed site.
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _apply_settings(self) -> None:
        """What the configuration says counts, also where the checkpoint was saved with other settings; say what is new."""
        self._set_rates()
        self._switch.before_step(self.step)
        changed = self.optimizers.changed_since_saved() if isinstance(self.optimizers, OptimizersContainer) else []
        settings = settings_changes(self._saved_settings, self.settings)
        passed_over = self.checkpointer.not_gone_on_from(self.config.dump_folder)
        since = [passed_over] if passed_over else []
        if self.step >= self.config.training.steps:
            since.append(
                f"nothing is left to train: step {self.step} is taken, training.steps is {self.config.training.steps}"
            )
        since += [f"settings are not those of the checkpoint: {'; '.join(settings)}"] if settings else []
        for note in getattr(self.dataloader, "notes", ()):  # the loader has logged them
            self.metrics_processor.journal.add("note", {"text": f"data: {note}"})
        for note in [*self.checkpointer.notes, *since, *(f"optimizer: {each}" for each in changed)]:
            self.metrics_processor.log_note(note)

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's, the tokens that the whole site has seen, whatever its layout, and what it trains by."""
        own = {"site_tokens": self.ntokens_seen * self._reading_ranks(), "settings": json.dumps(self.settings)}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts; of the site's tokens each rank of the present layout takes its part."""
        super().load_state_dict(state_dict)
        self._saved_settings = json.loads(state_dict.get("settings", "{}"))
        if state_dict.get("site_tokens"):
            self.ntokens_seen = state_dict["site_tokens"] // self._reading_ranks()

    def _reading_ranks(self) -> int:
        """Ranks of the site that count tokens of their own."""
        mesh = self.parallel_dims.get_optional_mesh("loss") if self.parallel_dims.dp_cp_enabled else None
        return 1 if mesh is None else mesh.size()


def _observed(config: Trainer.Config, routing: RoutingStatistics) -> Trainer.Config:
    """The config with a model whose routers are observed, if it has experts."""
    spec = config.model_spec
    if not any(spec.model.traverse(MoE.Config)):
        return config
    observing = routing.observing(spec.post_optimizer_build_fn)
    whole: Any = config
    return replace(whole, model_spec=replace(spec, post_optimizer_build_fn=observing))
