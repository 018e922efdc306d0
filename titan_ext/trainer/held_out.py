"""The loss of a site's model on text that its training leaves out, in any parallel layout."""

from typing import Any

import torch
from torchtitan.components.validate import Validator
from torchtitan.distributed.utils import dist_max

from titan_ext.errors import UserError


class HeldOutLoss:
    """torchtitan's validation on the documents that ``data.split = "train"`` leaves out, the same each time.

    Args:
        trainer: the site's ``Trainer``, with its model.
        tokens: to measure on, of the whole site; rounded up to whole batches.

    Raises:
        UserError: the site's training leaves out no text.
    """

    def __init__(self, trainer: Any, tokens: int) -> None:
        self._trainer = trainer
        config, dims = trainer.config, trainer.parallel_dims
        text = config.dataloader.held_out()
        if text is None:
            raise UserError(f"data: the site trains on all documents of {config.dataloader.dataset}; hold some out")
        mesh = dims.get_mesh("batch") if dims.dp_enabled else None
        readers = 1 if mesh is None else mesh.size()
        training = config.training
        steps = -(-tokens // (training.seq_len * training.local_batch_size * readers))
        self._found = _Found()
        self._validator = Validator.Config(enable=True, steps=steps, dataloader=text).build(
            parallelism=config.parallelism,
            dp_world_size=readers,
            dp_rank=0 if mesh is None else mesh.get_local_rank(),
            tokenizer=trainer.tokenizer,
            parallel_dims=dims,
            loss_fn=trainer.loss_fn,
            validation_context=trainer.train_context,
            metrics_processor=self._found,
            seq_len=training.seq_len,
            local_batch_size=training.local_batch_size,
            **_pipeline(trainer),
        )

    def measure(self) -> float:
        """Mean loss, in nats a token, of the parameters as they are; equal on all ranks. A collective over the site."""
        modes = [part.training for part in self._trainer.model_parts]
        self._validator.validate(self._trainer.model_parts, self._trainer.step)
        for part, training in zip(self._trainer.model_parts, modes, strict=True):
            part.train(training)
        dims = self._trainer.parallel_dims
        if not dims.pp_enabled:
            return self._found.loss
        # Pipeline stages other than the last report something negative.
        found = torch.tensor(self._found.loss, dtype=torch.float64, device=self._trainer.device)
        return dist_max(found, dims.get_mesh("pp"))


class _Found:
    """In the place of the metrics: keeps the loss instead of reporting it."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.ntokens_since_last_log = 0

    def log_validation(self, loss: float, step: int) -> None:
        """Keep it."""
        self.loss = loss


def _pipeline(trainer: Any) -> dict[str, Any]:
    if not trainer.parallel_dims.pp_enabled:
        return {}
    return {
        "pp_schedule": trainer.pp_schedule,
        "pp_has_first_stage": trainer.pp_has_first_stage,
        "pp_has_last_stage": trainer.pp_has_last_stage,
    }
