"""Local adaptation of a trained model: a site goes on alone from a checkpoint, near it or not (PaFL, arXiv 2305.02728)."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import ParamGroupConfig

from titan_ext.checkpoint_place import CHECKPOINTS
from titan_ext.errors import InvalidValue, UserError
from titan_ext.launcher.placement import free_port
from titan_ext.losses import TokenLoss
from titan_ext.object_store import is_url
from titan_ext.optim.switch import SwitchConfig
from titan_ext.regularizers import Phase, RegularizerConfig
from titan_ext.trainer.batch_warmup import BatchWarmupConfig
from titan_ext.trainer.spikes import SpikesConfig
from titan_ext.trainer.trainer import Trainer

_HEAD = r"^lm_head\."


@dataclass(frozen=True, slots=True)
class Way:
    """A way of adapting: what trains, and what keeps it near the checkpoint."""

    regularizer: str | None = None
    head_alone: bool = False


WAYS = {
    "fine-tune": Way(),
    "freeze": Way(head_alone=True),
    "proximal": Way("proximal"),
    "ewc": Way("ewc"),
    "distillation": Way("distillation"),
}
"""By name; ``freeze`` trains the head alone."""


def adapted_config(
    config: Trainer.Config,
    checkpoint: Path | str,
    folder: Path,
    way: Way,
    *,
    steps: int,
    lr: float,
    strength: float | None,
) -> Trainer.Config:
    """A site's config as that of one process that goes on from a checkpoint by itself, at a constant learning rate.

    Args:
        config: of the site, as it is trained with the others.
        checkpoint: what training starts from: weights alone.
        folder: what it leaves goes there.
        way: what trains.
        steps: inner steps.
        lr: of all that trains.
        strength: of the regulariser; None: its default.

    Raises:
        UserError: the head cannot train alone, the strength is none of the way's, or the site has data sources.
    """
    if getattr(config.dataloader, "has_sources", False):
        raise UserError(
            "data.source: a site is adapted to one corpus, and this one has data sources; name the corpus with "
            "--data.source=[] --data.sources= --data.dataset=PATH"
        )
    try:
        phases = [] if way.regularizer is None else [Phase(name=way.regularizer, strength=strength)]
    except InvalidValue as error:
        raise UserError(f"--strength {strength:g} of {way.regularizer}: {error.problem}") from None
    regularizer = RegularizerConfig(phases=phases)
    # mypy knows no fields of configs that torchtitan's __init_subclass__ makes.
    whole: Any = config
    optimizer: Any = config.optimizer
    checkpoints: Any = config.checkpoint
    rates: Any = config.lr_scheduler
    return replace(
        whole,
        dump_folder=str(folder),
        semi_sync=type(config.semi_sync)(method="none"),
        training=replace(config.training, steps=steps, disable_cuda_graphs=True),
        parallelism=replace(
            config.parallelism,
            data_parallel_replicate_degree=1,
            data_parallel_shard_degree=1,
            tensor_parallel_degree=1,
            pipeline_parallel_degree=1,
            context_parallel_degree=1,
            expert_parallel_degree=1,
        ),
        lr_scheduler=replace(rates, warmup_steps=0, total_steps=None, decay_ratio=0.0),
        optimizer=replace(optimizer, param_groups=_groups(config, way, lr)),
        optimizer_switch=SwitchConfig(),
        spikes=SpikesConfig(),
        batch_warmup=BatchWarmupConfig(),
        regularizer=regularizer,
        loss=_seeing_tokens(config.loss) if regularizer.teaches else config.loss,
        validator=replace(config.validator, enable=False),
        checkpoint=replace(
            checkpoints,
            enable=True,
            folder=CHECKPOINTS,
            interval=steps,
            # torchtitan takes no relative path.
            initial_load_path=str(checkpoint if is_url(checkpoint) else Path(checkpoint).absolute()),
            initial_load_model_only=True,
            initial_load_in_hf=False,
            last_save_model_only=True,
            last_save_in_hf=False,
            create_seed_checkpoint=False,
            load_step=-1,
            exclude_from_loading=[],
        ),
    )


def _groups(config: Trainer.Config, way: Way, lr: float) -> list[ParamGroupConfig]:
    def at(group: ParamGroupConfig, rate: float, **changes: Any) -> ParamGroupConfig:
        return replace(group, optimizer_kwargs={**group.optimizer_kwargs, "lr": rate}, **changes)

    groups = config.optimizer.param_groups
    if not way.head_alone:
        return [at(group, lr) for group in groups]
    if getattr(config.model_spec.model, "enable_weight_tying", False):
        raise UserError("--by freeze: the head is the embedding's matrix; use another way")
    # With a rate of 0 a parameter stays as it is, decoupled weight decay included.
    return [at(groups[-1], lr, pattern=_HEAD), at(groups[-1], 0.0, pattern=".*")]


def _seeing_tokens(loss: Any) -> Any:
    if isinstance(loss, TokenLoss.Config):
        return loss
    if isinstance(loss, ChunkedLossWrapper.Config):
        return TokenLoss.Config(num_chunks=loss.num_chunks, loss_fn=loss.loss_fn)
    inner = loss if isinstance(loss, CrossEntropyLoss.Config) else CrossEntropyLoss.Config()
    return TokenLoss.Config(num_chunks=1, loss_fn=inner)


def train_alone(config: Trainer.Config) -> None:
    """Train in this process as the only rank of a site."""
    import torch

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    Path(config.dump_folder).mkdir(parents=True, exist_ok=True)
    trainer: Any = config.build()
    try:
        trainer.train()
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()
