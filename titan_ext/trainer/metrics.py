"""torchtitan's metrics, also as lines of ``metrics.jsonl`` and with the outer loop's rounds."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components import metrics as torchtitan_metrics
from torchtitan.components.metrics import _get_metrics_rank

from titan_ext.config.pipeline import is_v_shaped
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord
from titan_ext.trainer.journal import RunJournal
from titan_ext.trainer.loggers import keep_going
from titan_ext.trainer.spikes import Spike
from titan_ext.trainer.wandb import name_wandb_run

# The only one of these schedules by whose name torchtitan knows that the first rank has the loss.
_V_SHAPED = "ZBVZeroBubble"


class MetricsProcessor(torchtitan_metrics.MetricsProcessor):
    """Logs each step and round of a site to the console, TensorBoard and ``metrics.jsonl``."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_metrics.MetricsProcessor.Config):
        serve_port: int = 0
        """Port from which the launcher of this site serves its metrics, read-only, for `titan-ext watch`; 0: none. Sites
        of one machine with the same port share it. With ``replica.secret_file`` only holders of the secret are served."""

        outer_norms_every: int = 10
        """Inner steps from one round whose norms are measured to the next, at least: those of the mean pseudo-gradient, of
        the outer optimizer's state and of the model, in all and by layer, the cosine between the sites' updates and
        their noise scale. 0: none is."""

        parameter_norms_every: int = 0
        """Inner steps from one line of the kind "norms" in metrics.jsonl to the next, with the norms of parameters, of what
        the step added to them and of gradients, by layer; such a step holds a second copy of the parameters. 0: none."""

        activation_norms_every: int = 0
        """As ``parameter_norms_every``, with the root mean square of what each layer puts out and each layer's largest
        attention logit in the batch's first sequence. Needs a model that is neither compiled nor in a CUDA graph."""

    def __init__(
        self, config: Config, *, dump_folder: str = "./outputs", pp_schedule: str = "1F1B", **options: Any
    ) -> None:
        if is_v_shaped(pp_schedule):
            pp_schedule = _V_SHAPED
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        logging_rank = _get_metrics_rank(parallel_dims=options["parallel_dims"], pp_schedule=pp_schedule)
        self.is_logging_rank = rank == logging_rank
        if config.enable_wandb and self.is_logging_rank:
            name_wandb_run(dump_folder)
        super().__init__(config, dump_folder=dump_folder, pp_schedule=pp_schedule, **options)
        keep_going(self.logger)
        self.journal = RunJournal(dump_folder, enabled=self.is_logging_rank)
        self._started = time.perf_counter()
        self._first_loss: float | None = None
        self._last: dict[str, Any] = {}
        self.routing: Callable[[], dict[str, float]] = dict
        """What is known of the routers at the step that is logged; the trainer's to set."""
        self.source: str | None = None
        """Data source that takes the step, where the site has several; the trainer's to set."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """As torchtitan's, and a line of ``metrics.jsonl``; throughput is that of the whole site."""
        seconds = time.perf_counter() - self.time_last_log
        ranks = self.parallel_dims.world_size / self.parallel_dims.non_data_parallel_size
        rates = [value for key, value in (extra_metrics or {}).items() if "lr" in key]
        self._first_loss = global_avg_loss if self._first_loss is None else self._first_loss
        self._last = {
            "step": step,
            "loss": global_avg_loss,
            "tokens": int((extra_metrics or {}).get("n_tokens_seen", 0)),
            "tokens_per_second": self.ntokens_since_last_log * ranks / seconds,
            "lr": float(rates[0]) if rates else None,
            "grad_norm": grad_norm,
            **({"source": self.source} if self.source is not None else {}),
            **self.routing(),
        }
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **self.routing()})
        self.journal.add("step", self._last)

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """As torchtitan's, and a line of ``metrics.jsonl``."""
        super().log_validation(loss, step, extra_metrics)
        self.journal.add("validation", {"step": step, "loss": loss})

    def log_loss(self, step: int, values: dict[str, float]) -> None:
        """Log what a loss reports of its own."""
        if self.is_logging_rank:
            self.logger.log({f"loss/{name}": value for name, value in values.items()}, step)
            self.journal.add("loss", {"step": step, **values})

    def log_norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Log the norms of a step by what is measured and by layer."""
        if self.is_logging_rank:
            numbers = {f"{what}/{layer}": each for what, layers in norms.items() for layer, each in layers.items()}
            self.logger.log({f"norms/{name}": each for name, each in numbers.items()}, step)
            self.journal.add("norms", {"step": step, **norms})

    def log_spike(self, step: int, spike: Spike, action: str) -> None:
        """Log a step that stands out, and what becomes of it."""
        if not self.is_logging_rank:
            return
        limits = {f"{signal}_limit": limit for signal, limit in spike.limits.items()}
        self.journal.add(
            "spike", {"step": step, "action": action, "loss": spike.loss, "grad_norm": spike.grad_norm, **limits}
        )
        torchtitan_metrics.logger.warning(
            "step %d stands out (loss %.4f, gradient norm %.4f): %s",
            step,
            spike.loss,
            spike.grad_norm,
            "left out" if action == "skip" else "gradient clipped",
        )

    def log_not_finite(self, step: int) -> None:
        """Log a step whose loss is a NaN or an infinity, of which torchtitan reports nothing else."""
        if self.is_logging_rank:
            torchtitan_metrics.logger.warning(
                "the loss of step %d is not finite: the next round leaves this site out and it goes on from what all share",
                step,
            )
        self._last |= {"step": step, "loss": math.nan}
        self.journal.add("step", self._last)

    def log_note(self, text: str) -> None:
        """Say something once, also where a launcher shows it."""
        if self.is_logging_rank:
            torchtitan_metrics.logger.info("%s", text)
            self.journal.add("note", {"text": text})

    def log_round(self, record: RoundRecord) -> None:
        """Log one round of the outer loop."""
        if not self.is_logging_rank:
            return
        values = record.as_dict()
        self.journal.add("round", values)
        values |= {f"norm/{what}": value for what, value in (record.norms or {}).items()}
        values |= record.measures
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        self.logger.log({f"semi_sync/{key}": value for key, value in numbers.items()}, record.step)
        torchtitan_metrics.logger.info(
            "%s after step %d: %d site(s) averaged, %.2f MB sent, %.2f s quorum, %.2f s reduce, %.2f s apply%s",
            f"round {record.round}" if record.level == "all" else "the region's round",
            record.step,
            record.participants,
            record.bytes_sent / 1e6,
            record.seconds_quorum,
            record.seconds_reduce,
            record.seconds_apply,
            "" if record.committed else f" - NOT COMMITTED: {record.error}",
        )

    def summarize(
        self,
        *,
        site: str,
        step: int,
        ledger: Ledger | None,
        shared_state_sha256: str,
        not_compared: Sequence[str] = (),
        own_buffers: Sequence[str] = (),
        steps_past_shared: int = 0,
    ) -> None:
        """Write ``summary.json``.

        Args:
            not_compared: scopes that the checksum leaves out, for sites need not hold the same of them.
            own_buffers: buffers that it leaves out, for they have no mean.
            steps_past_shared: inner steps that the site's model is past what the checksum is of.
        """
        ledger = ledger or Ledger()
        self.journal.summarize(
            {
                "site": site,
                "first_loss": self._first_loss,
                "final_loss": self._last.get("loss"),
                "steps": step,
                "tokens": self._last.get("tokens", 0),
                "rounds": ledger.rounds,
                "failed_rounds": ledger.failed,
                "bytes_sent": ledger.bytes_sent,
                "bytes_received": ledger.bytes_received,
                "control_bytes_sent": ledger.control_bytes_sent,
                "wire_bytes_sent": ledger.wire_bytes_sent,
                "healing_bytes_sent": ledger.healing_bytes_sent,
                "seconds_syncing": round(ledger.seconds, 3),
                "seconds": round(time.perf_counter() - self._started, 3),
                "shared_state_sha256": shared_state_sha256,
                "scopes_not_compared": list(not_compared),
                "buffers_not_compared": list(own_buffers),
                "steps_past_shared_state": steps_past_shared,
            }
        )
