"""What a site does between torchtitan's backward pass and its optimizer: spikes, a growing batch, norms."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torchtitan.distributed import utils as dist_utils

from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.batch_warmup import passes_at
from titan_ext.trainer.norms import ActivationNorms, ParameterNorms
from titan_ext.trainer.regularized_step import RegularizedStepTrainer
from titan_ext.trainer.spikes import Spike, SpikeDetector


class GradientStepTrainer(RegularizedStepTrainer):
    """torchtitan's step, in which a gradient may be looked at, clipped or left aside before the optimizer takes it."""

    metrics_processor: Any
    optimizers: Any
    gradient_accumulation_steps: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._whole_batch_passes = self.gradient_accumulation_steps
        self._spikes = SpikeDetector(config.spikes) if config.spikes.action != "none" else None
        self._parameter_norms = ParameterNorms(self.model_parts, SiteRanks())
        self._activation_norms = ActivationNorms(self.model_parts, SiteRanks())

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """torchtitan's, with the batch and the measurements of the step."""
        warmup, passes = self.config.batch_warmup, self._whole_batch_passes
        sequences = self.config.training.local_batch_size * self._readers()
        self.gradient_accumulation_steps = passes_at(self.step, warmup, passes, sequences)
        listening = self._is_due("activation_norms_every")
        if listening:
            self._activation_norms.listen()
        try:
            super().train_step(data_iterator)
        finally:
            # No collective here: where this rank alone has failed, the others would never meet it.
            self._activation_norms.stop_listening()
        found = self._activation_norms.take() if listening else {}
        if self._is_due("parameter_norms_every"):
            found |= self._parameter_norms.after_step()
        if found:
            self.metrics_processor.log_norms(self.step, found)

    def after_backward(self, loss: torch.Tensor) -> None:
        """Called once a step, when the whole gradient is there."""
        super().after_backward(loss)
        self.share_gradients()
        if self._is_due("parameter_norms_every"):
            self._parameter_norms.before_step()
        if self._spikes is not None:
            self._look_for_spike(self._spikes, loss)

    def share_gradients(self) -> None:
        """Called with the site's whole gradient, before it is judged and clipped."""

    def state_of_step(self) -> dict[str, Any]:
        """What checkpoints keep of loss, regularisers and spikes, by its name there."""
        spikes = {"spikes": self._spikes} if self._spikes is not None else {}
        return self.state_of_loss() | self.state_of_regularizer() | spikes

    def _look_for_spike(self, detector: SpikeDetector, loss: torch.Tensor) -> None:
        has_loss = not self.parallel_dims.pp_enabled or self.pp_has_last_stage
        own = loss.detach().double().sum() if has_loss else torch.zeros((), dtype=torch.float64, device=self.device)
        values = torch.stack([self._sum_over_site(own), self._clip(math.inf).double().to(own.device)])
        # All ranks judge by the same bits, whatever their libraries add up; a maximum knows no NaN.
        values = values.nan_to_num(nan=math.inf)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        spike = detector.judge(*values.tolist())
        if spike is not None:
            self._treat(spike)

    def _treat(self, spike: Spike) -> None:
        action = self.config.spikes.action
        self.metrics_processor.log_spike(self.step, spike, action)
        if action == "skip":
            self.optimizers.leave_out_next_step = True
        elif math.isfinite(spike.grad_norm):
            self._clip(spike.limits["grad_norm"])

    def _clip(self, limit: float) -> torch.Tensor:
        """Clip the gradient's norm; returns what it was. A collective over the site."""
        return dist_utils.clip_grad_norm_(
            [parameter for part in self.model_parts for parameter in part.parameters()],
            limit,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
            ep_enabled=self.parallel_dims.ep_enabled,
        )

    def _is_due(self, key: str) -> bool:
        every = getattr(self.config.metrics, key)
        return every > 0 and self.step % every == 0

    def _readers(self) -> int:
        return self.parallel_dims.get_mesh("batch").size() if self.parallel_dims.dp_enabled else 1
