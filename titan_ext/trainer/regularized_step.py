"""Inner steps that are kept near the model that the site has received."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torchtitan import trainer as torchtitan_trainer
from torchtitan.distributed import utils as dist_utils

from titan_ext.data.dataset import PackedTextDataset
from titan_ext.errors import UserError
from titan_ext.regularizers import Received, Regularizer
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.views import canonical_name, local_tensor
from titan_ext.trainer.token_step import TokenStepTrainer

_Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class RegularizedStepTrainer(TokenStepTrainer):
    """torchtitan's step under the regularisers that the round has; without a phase it is torchtitan's.

    Without an outer loop the model that was received is the one that training starts from.
    """

    outer: Any
    optimizers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._phases = [(phase, phase.build()) for phase in config.regularizer.phases]
        self._active: list[Regularizer] = []
        self._round = -1
        self._received: Received | None = None
        self._start: dict[str, torch.Tensor] | None = None

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """torchtitan's, after what a new round begins with."""
        if self._phases:
            self._enter_round(self.outer.rounds if self.outer is not None else 0)
        super().train_step(data_iterator)

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """torchtitan's; where the round distils, the received model reads the batch first."""
        if self.token_loss is not None and self.token_loss.loss_fn.teaching is not None:
            self._read_as_received(batch["input_dict"], batch["labels"])
        return super().forward_backward_step(**batch)

    def after_backward(self, loss: torch.Tensor) -> None:
        """Adds the penalties' gradients."""
        super().after_backward(loss)
        for regularizer in self._active:
            regularizer.add_gradients(self._received)

    def state_of_regularizer(self) -> dict[str, Any]:
        """What checkpoints keep where no outer loop keeps it, by its name there: the model that training started from."""
        if not self._phases or self.config.semi_sync.method != "none":
            return {}
        return {"regularizer": _Start(self)}

    # -- the received model --------------------------------------------------------------------------

    def _enter_round(self, number: int) -> None:
        if self._received is None:
            self._received = Received(self.model_parts, self._received_values, self._gradients_of_batches)
            self._check_received(self._received)
        if number == self._round:
            return
        self._round, before = number, self._active
        self._active = [regularizer for phase, regularizer in self._phases if phase.has(number)]
        for regularizer in before:
            regularizer.end_round()
        for regularizer in self._active:
            regularizer.begin_round(self._received)
        if self.token_loss is not None:
            teachers = [each.settings for each in self._active if each.teaches]
            self.token_loss.loss_fn.teaching = next(((s["strength"], s["temperature"]) for s in teachers), None)

    def _received_values(self) -> Mapping[str, torch.Tensor]:
        return self.outer.received_parameters() if self.outer is not None else self.start()

    def _check_received(self, received: Received) -> None:
        # A rank of a pipeline or with uneven shards may be without any, as long as the site has some.
        if not any(SiteRanks().gather(bool(received.parameters))):
            method = self.config.semi_sync.method
            raise UserError(f'regularizer.phases: semi_sync.method = "{method}" keeps no copy of what sites receive')

    def start(self) -> dict[str, torch.Tensor]:
        """The parameters that training started from, by name."""
        if self._start is None:
            self._start = {
                canonical_name(name): each.detach().clone()
                for part in self.model_parts
                for name, each in part.named_parameters()
            }
        return self._start

    # -- passes beside the step's ----------------------------------------------------------------------

    @torch.no_grad()
    def _read_as_received(self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Give the loss what the received model makes of a batch."""
        with self._only_looking(), self._received.loaded():
            inputs, _, extra = self.post_dataloading_process(dict(input_dict), labels)
            with self.train_context():
                self.token_loss.learn_from(self.model_parts[0](inputs, **extra))

    def _gradients_of_batches(self, batches: int) -> Iterator[list[torch.Tensor | None]]:
        """As ``Received`` wants them; those of the step that was last are gone afterwards."""
        parameters, count = self._received.parameters, self.num_pipeline_parallel_microbatches
        samples = self._first_batches()
        with self._only_looking():
            for _ in range(batches):
                self._set_gradients_back()
                microbatches = list(islice(samples, count))
                self._run_backward(microbatches)
                yield [None if each.grad is None else local_tensor(each.grad) for each in parameters]
        self._set_gradients_back()

    def _set_gradients_back(self) -> None:
        self.optimizers.zero_grad(set_to_none=True)

    def _run_backward(self, microbatches: list[_Batch]) -> None:
        valid = torch.stack([(labels >= 0).sum() for _, labels in microbatches]).sum().to(self.device)
        if self.parallel_dims.dp_enabled:
            valid = dist_utils.dist_sum_tensor(valid, self.parallel_dims.get_mesh("batch"))
        on_device = [
            ({key: each.to(self.device) for key, each in inputs.items()}, labels.to(self.device))
            for inputs, labels in microbatches
        ]
        input_dicts, labels = map(list, zip(*on_device, strict=True))
        with torch.enable_grad():
            # Beside the step: its count of passes and the hooks after the last of them are not for these.
            torchtitan_trainer.Trainer.forward_backward_step(
                self,
                input_dict=input_dicts if self.parallel_dims.pp_enabled else input_dicts[0],
                labels=labels if self.parallel_dims.pp_enabled else labels[0],
                global_valid_tokens=valid,
            )

    def _first_batches(self) -> Iterator[_Batch]:
        """Batches of the site's first documents, in the order of its first epoch, whatever has been read since."""
        mesh = self.parallel_dims.get_mesh("batch") if self.parallel_dims.dp_enabled else None
        rank, ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        feed, seq_len = self.dataloader.feed, self.config.training.seq_len
        samples = iter(PackedTextDataset(feed, self.tokenizer, seq_len, rank, ranks))
        while True:
            some = list(islice(samples, self._rows()))
            inputs = {key: torch.stack([each[key] for each, _ in some]) for key in some[0][0]}
            yield inputs, torch.stack([labels for _, labels in some])


class _Start:
    """The start of training as a state of checkpoints."""

    def __init__(self, trainer: RegularizedStepTrainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The parameters that training started from; before it starts, those that there are."""
        if self._trainer._start is not None:
            return dict(self._trainer._start)
        found = dict(self._trainer.start())
        self._trainer._start = None
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._trainer._start = {name: value.detach().clone() for name, value in state.items()}
