"""One run: a site for each target, trained with weights on mixed text, alone or under DiLoCo."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.data import ByteTokenizer
from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.adapt.arms import ADAPT, ARMS, ORACLE, SOURCES, UNIFORM, Arm, Result, Settings
from titan_ext.experiments.adapt.text import anchors, evaluation, mixture, texts_of
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.models import finite, small_llama, train_step
from titan_ext.experiments.sites import Alone, InnerTraining, SemiSynchronous, Sites, train_to_the_end
from titan_ext.experiments.text import Batch
from titan_ext.experiments.tuning import Run
from titan_ext.losses import InnerStep, TokenLoss, Tokens
from titan_ext.losses.adapt import Adapt
from titan_ext.semi_sync import SemiSyncConfig

_BETAS = (0.9, 0.99)
_ROWS = 32


class FirstSources(TokenLoss):
    """Tokens of the first sources count, others do not."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenLoss.Config):
        sources: int = len(SOURCES)

    def __init__(self, config: Config, **parts: Any) -> None:
        super().__init__(config, **parts)
        self._sources = config.sources

    def weights(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        return (tokens.source < self._sources).float()


class WeightedTraining(InnerTraining):
    """The inner training of a site under a loss of ``titan_ext.losses``.

    Args:
        model: of the site; its head is the loss's from now on.
        optimizer: over its parameters.
        rate: factor on the learning rate by inner step.
        loss: of the site.
        documents: the site's texts, from the first on.
        settings: of all runs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rate: Callable[[int], float],
        loss: TokenLoss,
        documents: Callable[[], Iterator[str]],
        settings: Settings,
    ) -> None:
        super().__init__(model, optimizer, rate)
        self._loss, self._device, self._steps = loss, settings.device, 0
        self.weights: list[dict[str, float]] = []
        """Mean weight by source of each step, of the sources that were in it."""
        module: Any = model
        module._skip_lm_head = True
        loss.set_lm_head(module.lm_head)
        loss.attach(
            InnerStep(
                device=torch.device(settings.device),
                width=settings.dim,
                vocabulary=VOCABULARY,
                seq_len=settings.length,
                tokenizer=ByteTokenizer(),
                sources=SOURCES,
                documents=documents,
                reader=0,
                readers=1,
                rows=1,
                read=self._read,
                sum_over_site=torch.clone,
            )
        )

    def step(self, batch: Batch) -> float:
        """One inner step; returns its loss."""
        self._steps += 1
        # The step after a round is one at which the anchors are read anew: no need to tell of the round.
        self._loss.before_step(self._steps)
        loss = self.loss_of(batch)
        train_step(self.model, loss, self.optimizer, self.rates)
        self._loss.after_step()
        report = self._loss.report()
        self.weights.append({name: report[key] for name in SOURCES if (key := f"weight/{name}") in report})
        return loss.item()

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """Under weights where the labels are packed ``Tokens``, plain otherwise."""
        module: Any = self.model
        hidden = module(batch.inputs, batch.positions, module.get_attention_masks(batch.positions))
        return self._loss(hidden, batch.labels, torch.tensor(batch.inputs.numel(), device=hidden.device))[0]

    @torch.no_grad()
    def _read(self, tokens: Tokens) -> None:
        for first in range(0, len(tokens.inputs), _ROWS):
            part = Tokens(*(getattr(tokens, each.name)[first : first + _ROWS] for each in fields(tokens)))
            batch = Batch(part.inputs, part.pack(), part.positions)
            self.loss_of(batch.to(self._device))


def train(settings: Settings, run: Run) -> Result:
    """Train each site from the seed's model on the seed's mixture; measure each on its target at the end.

    Raises:
        UserError: a corpus cannot be read, or has too little text.
    """
    started = time.perf_counter()
    arm, count = ARMS[run.method], len(settings.names)
    inner = [_inner(settings, arm, run, site) for site in range(count)]
    sites: Sites = SemiSynchronous(inner, _diloco(settings)) if arm.together else Alone(inner)
    texts = [mixture(settings, site, run.seed) for site in range(count)]
    tokens_sha256 = train_to_the_end(sites, texts, settings.steps, settings.device)
    return Result(
        losses=[finite(_measured(settings, each, name)) for each, name in zip(inner, settings.names, strict=True)],
        weights=_weights(settings, inner) if arm.weighting in ADAPT else [],
        tokens_sha256=tokens_sha256,
        seconds=time.perf_counter() - started,
    )


def build_loss(settings: Settings, arm: Arm, site: int, folder: Path) -> TokenLoss:
    """The loss of a site, whose anchors are written to the folder."""
    if arm.weighting == UNIFORM:
        return FirstSources.Config(num_chunks=1).build(compile_config=None)
    if arm.weighting == ORACLE:
        return FirstSources.Config(num_chunks=1, sources=1 + arm.shared).build(compile_config=None)
    names = settings.names if arm.shared else [settings.names[site]]
    path = folder / "anchors.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for name in names for text in anchors(settings, name)]
    path.write_text("".join(lines), encoding="utf-8")
    own: dict[str, Any] = {"refresh_every": settings.refresh_every(arm.weighting), **ADAPT[arm.weighting]}
    return Adapt.Config(anchors=str(path), num_chunks=1, **own).build(compile_config=None)


def _inner(settings: Settings, arm: Arm, run: Run, site: int) -> WeightedTraining:
    model = small_llama(settings, run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0)

    def documents() -> Iterator[str]:
        return texts_of(mixture(settings, site, run.seed))

    with TemporaryDirectory() as folder:
        loss = build_loss(settings, arm, site, Path(folder))
        return WeightedTraining(model, optimizer, partial(rate, steps=settings.steps), loss, documents, settings)


def _diloco(settings: Settings) -> SemiSyncConfig:
    return SemiSyncConfig(method="diloco", sync_every=settings.sync_every, outlier_threshold=0.0)


@torch.no_grad()
def _measured(settings: Settings, site: WeightedTraining, name: str) -> float:
    return mean(site.loss_of(batch.to(settings.device)).item() for batch in evaluation(settings, name))


def _weights(settings: Settings, inner: Sequence[WeightedTraining]) -> list[list[float | None]]:
    """Means over ``sync_every`` steps and over the sites, by source."""
    found = []
    for first in range(0, settings.steps, settings.sync_every):
        steps = [step for site in inner for step in site.weights[first : first + settings.sync_every]]
        by_source = [[step[name] for step in steps if name in step] for name in SOURCES]
        found.append([finite(mean(each)) if each else None for each in by_source])
    return found
