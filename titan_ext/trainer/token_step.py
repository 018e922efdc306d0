"""torchtitan's inner step with a loss that sees tokens, documents and hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import spmd_types as spmd
import torch
from torchtitan import trainer as torchtitan_trainer

from titan_ext.data.mix import MixedDataLoader
from titan_ext.data.packing import IDENTITY
from titan_ext.losses import InnerStep, TokenLoss, Tokens

_Batch = dict[str, torch.Tensor]
_Prepared = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]


def _leave_out_rehearsals(schedule: Any, loss: TokenLoss) -> None:
    """A pipeline that changes between training and evaluation finds out shapes by calling the loss on empty tensors;
    only what goes through ``_compute_loss`` is a batch."""
    compute = schedule._compute_loss
    loss.active = False

    def of_a_batch(*arguments: Any) -> torch.Tensor:
        loss.active = True
        try:
            return compute(*arguments)
        finally:
            loss.active = False

    schedule._compute_loss = of_a_batch


class TokenStepTrainer(torchtitan_trainer.Trainer):
    """torchtitan's trainer; a ``TokenLoss`` gets packed ``Tokens`` in the place of the labels, and its hooks are called.

    Under any other loss it is torchtitan's.
    """

    ntokens_seen: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.token_loss = self.loss_fn if isinstance(self.loss_fn, TokenLoss) else None
        self._passes = 0
        self._loss_so_far: torch.Tensor | float = 0.0
        if self.token_loss is not None:
            self.dataloader.identify_tokens()
            if self.parallel_dims.pp_enabled:
                _leave_out_rehearsals(self.pp_schedule, self.token_loss)
            self.token_loss.attach(self._inner_step_of_loss())

    def train_step(self, data_iterator: Iterator[tuple[_Batch, torch.Tensor]]) -> None:
        """torchtitan's, between the loss's hooks."""
        self._passes, self._loss_so_far = 0, 0.0
        if isinstance(self.dataloader, MixedDataLoader):
            self.dataloader.before_step(self.step)
        if self.token_loss is None:
            super().train_step(data_iterator)
            return
        self.token_loss.before_step(self.step)
        try:
            super().train_step(data_iterator)
        except Exception:
            # No collective here: where this rank alone has failed, the others would never meet it.
            self.token_loss.forget()
            raise
        self.token_loss.after_step()
        if self.metrics_processor.should_log(self.step):
            self.metrics_processor.log_loss(self.step, self.token_loss.report())

    def post_dataloading_process(self, input_dict: _Batch, labels: torch.Tensor) -> _Prepared:
        """As torchtitan's; what tells whose the tokens are goes to the loss, not to the model."""
        identity = input_dict.get(IDENTITY)
        known = {key: value for key, value in input_dict.items() if key != IDENTITY}
        inputs, labels, extra = super().post_dataloading_process(known, labels)
        if identity is not None:
            with spmd.no_typecheck():
                labels = Tokens(labels, inputs, extra["positions"], *identity.unbind(-1)).pack()
        return inputs, labels, extra

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """As torchtitan's; after the last of a step loss and gradients are as the loss adds up its tokens."""
        loss = super().forward_backward_step(**batch)
        self._passes += 1
        if self._passes < self.gradient_accumulation_steps:
            self._loss_so_far = self._loss_so_far + loss.detach()
            return loss
        before = self._loss_so_far
        factor = None if self.token_loss is None else self.token_loss.rescale(batch["global_valid_tokens"])
        if factor is not None:
            self._multiply_gradients(factor)
            loss = (before + loss.detach()) * factor - before
        self.after_backward(before + loss.detach())
        return loss

    def after_backward(self, loss: torch.Tensor) -> None:
        """Called once a step, when the whole gradient is there.

        Args:
            loss: this rank's part of the step's.
        """

    def _multiply_gradients(self, factor: float) -> None:
        for part in self.model_parts:
            for parameter in part.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def state_of_loss(self) -> dict[str, Any]:
        """What of the loss belongs into checkpoints, by its name there; empty where it keeps nothing."""
        return {"loss": self.token_loss} if self.token_loss is not None and self.token_loss.state_dict() else {}

    @torch.no_grad()
    def read_tokens(self, tokens: Tokens) -> None:
        """Run the model forward over sequences ``[n rows, L]`` in evaluation mode, and call the loss with them.

        A collective over the site, as ``InnerStep.read`` says.
        """
        rows = self._rows()
        with self._only_looking():
            batches = [self._prepared(tokens, first, rows) for first in range(0, len(tokens.inputs), rows)]
            if self.parallel_dims.pp_enabled:
                count = self.num_pipeline_parallel_microbatches
                for first in range(0, len(batches), count):
                    self._through_pipeline(batches[first : first + count])
                return
            for inputs, labels, extra in batches:
                with self.train_context():
                    self.loss_fn(self.model_parts[0](inputs, **extra), labels)

    def _prepared(self, tokens: Tokens, first: int, rows: int) -> _Prepared:
        part = Tokens(*(getattr(tokens, each.name)[first : first + rows].to(self.device) for each in fields(tokens)))
        identity = torch.stack([part.source, part.document, part.place], dim=-1)
        batch = {"input": part.inputs, "positions": part.positions, IDENTITY: identity}
        return self.post_dataloading_process(batch, part.labels)

    def _through_pipeline(self, microbatches: list[_Prepared]) -> None:
        with self.train_context():
            self.pp_schedule.eval(
                arg_mbs=[(inputs,) for inputs, _, _ in microbatches] if self.pp_has_first_stage else None,
                kwarg_mbs=[extra for _, _, extra in microbatches],
                target_mbs=[labels for _, labels, _ in microbatches] if self.pp_has_last_stage else None,
                losses=[] if self.pp_has_last_stage else None,
            )

    @contextmanager
    def _only_looking(self) -> Iterator[None]:
        """Evaluation mode; the tokens that are read do not count as trained on."""
        seen, modes = self.ntokens_seen, [part.training for part in self.model_parts]
        for part in self.model_parts:
            part.eval()
        try:
            yield
        finally:
            self.ntokens_seen = seen
            for part, training in zip(self.model_parts, modes, strict=True):
                part.train(training)

    def _rows(self) -> int:
        """Sequences of one pass, or of one microbatch of a pipeline."""
        if self.parallel_dims.pp_enabled:
            return self.config.parallelism.pipeline_parallel_microbatch_size
        return self.config.training.local_batch_size

    def _inner_step_of_loss(self) -> InnerStep:
        dims = self.parallel_dims
        mesh = dims.get_mesh("batch") if dims.dp_enabled else None
        return InnerStep(
            device=self.device,
            width=self.model_config.dim,
            vocabulary=self.model_config.vocab_size,
            seq_len=self.config.training.seq_len,
            tokenizer=self.tokenizer,
            sources=self.dataloader.feed.sources,
            corpora=getattr(self.dataloader.feed, "corpora", ()),
            documents=self._documents,
            reader=0 if mesh is None else mesh.get_local_rank(),
            readers=1 if mesh is None else mesh.size(),
            rows=self._rows() * self.num_pipeline_parallel_microbatches,
            read=self.read_tokens,
            sum_over_site=self._sum_over_site,
        )

    def _documents(self) -> Iterator[str]:
        return (document.text for document in self.dataloader.feed.read(0, None, 0, 1) if document.text)

    def _sum_over_site(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks with different data; of a pipeline only the last stage has counted anything."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.parallel_dims.tp
