"""One run: a language at each site, of unequal size, trained alone or together."""

import hashlib
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from titan_ext.data import ByteTokenizer, PackedTextDataset, open_corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.models import finite, small_llama
from titan_ext.experiments.pafl.arms import ALONE, Result, Settings, phases
from titan_ext.experiments.sites import Alone, InnerTraining, SemiSynchronous, Sites
from titan_ext.experiments.text import Batch, shuffled, stacked
from titan_ext.experiments.tuning import Run
from titan_ext.losses.vocabulary import softened_divergence
from titan_ext.regularizers import Phase, Received
from titan_ext.semi_sync import SemiSync, SemiSyncConfig

_BETAS = (0.9, 0.99)
_VALIDATION_SEQUENCES, _FIRST_BATCHES = 128, 16
_CLIP_NORM = 1.0


class RegularizedTraining(InnerTraining):
    """The inner training of a site, near the model that it has received in the rounds of its phases.

    Args:
        model: of the site.
        optimizer: over its parameters.
        rate: factor on the learning rate by inner step.
        of_phases: when what is kept near.
        first: batches of the site's text by which EWC goes.
    """

    def __init__(self, model: nn.Module, optimizer: Any, rate: Any, of_phases: list[Phase], first: list[Batch]) -> None:
        super().__init__(model, optimizer, rate)
        self._phases = [(phase, phase.build()) for phase in of_phases]
        self._first, self._round = first, -1
        self._active: list[Any] = []
        self._outer: SemiSync | None = None

    def follow(self, outer: SemiSync) -> None:
        """Go by the rounds of an outer loop."""
        self._outer = outer
        self._received = Received([self.model], outer.received_parameters, self._gradients)

    def step(self, batch: Batch) -> float:
        """One inner step; returns its loss."""
        if self._outer is not None and self._outer.rounds != self._round:
            self._round = self._outer.rounds
            self._active = [each for phase, each in self._phases if phase.has(self._round)]
            for each in self._active:
                each.begin_round(self._received)
        loss = self._loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        for each in self._active:
            each.add_gradients(self._received)
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.rates.step()
        return loss.item()

    def _loss(self, batch: Batch) -> torch.Tensor:
        # The received model first: its values take the place of those that a gradient is computed through.
        teacher = next((each for each in self._active if each.teaches), None)
        wanted = None if teacher is None else self._as_received(batch)
        own = _logits(self.model, batch)
        loss = F.cross_entropy(own, batch.labels.flatten())
        if teacher is None or wanted is None:
            return loss
        share = teacher.settings["strength"]
        divergence = softened_divergence(wanted, own, None, teacher.settings["temperature"]).mean()
        return (1 - share) * loss + share * divergence

    @torch.no_grad()
    def _as_received(self, batch: Batch) -> torch.Tensor:
        with self._received.loaded():
            return _logits(self.model, batch)

    @torch.enable_grad()
    def _gradients(self, batches: int) -> Iterator[list[torch.Tensor | None]]:
        for batch in self._first[:batches]:
            loss = F.cross_entropy(_logits(self.model, batch), batch.labels.flatten())
            yield list(torch.autograd.grad(loss, self._received.parameters))


def train(settings: Settings, run: Run) -> Result:
    """Train each site from the seed's model on the seed's text; measure each on its own language at the end.

    Raises:
        UserError: a corpus cannot be read, or has too little text.
    """
    started, seen = time.perf_counter(), hashlib.sha256()
    names, wanted = settings.names, phases(run.method, settings.rounds)
    texts = [_training(settings, site, run.seed) for site in range(len(names))]
    inner = [
        _inner(settings, run, wanted, list(islice(_training(settings, site, run.seed), _FIRST_BATCHES)))
        for site in range(len(names))
    ]

    def next_batches() -> list[Batch]:
        batches = [next(text) for text in texts]
        for batch in batches:
            seen.update(batch.inputs.cpu().numpy().tobytes())
        return batches

    def measured() -> list[float | None]:
        return [finite(_measured(each.model, settings, name)) for each, name in zip(inner, names, strict=True)]

    sites = _sites(settings, run, inner)
    for _ in range(settings.steps):
        sites.step(next_batches())
        if sites.diverged:
            break
    sites.close()
    losses = measured()
    for _ in range(settings.adapt_steps):
        for each, batch in zip(inner, next_batches(), strict=True):
            each.step(batch)
    return Result(
        losses=losses,
        adapted=measured() if settings.adapt_steps else losses,
        tokens_sha256=seen.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def _sites(settings: Settings, run: Run, inner: list[RegularizedTraining]) -> Sites:
    if run.method == ALONE:
        return Alone(inner)
    sites = SemiSynchronous(inner, _outer_loop(settings))
    for site, each in enumerate(inner):
        each.follow(sites.outer_loop(site))
    return sites


def _inner(settings: Settings, run: Run, wanted: list[Phase], first: list[Batch]) -> RegularizedTraining:
    model = small_llama(settings, run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0)
    return RegularizedTraining(
        model, optimizer, partial(rate, steps=settings.steps + settings.adapt_steps), wanted, first
    )


def _outer_loop(settings: Settings) -> SemiSyncConfig:
    return SemiSyncConfig(method="local_sgd", sync_every=settings.sync_every, outlier_threshold=0)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """``[tokens, vocabulary]``."""
    return model(batch.inputs, batch.positions, model.get_attention_masks(batch.positions)).flatten(0, 1).float()


def _training(settings: Settings, site: int, seed: int) -> Iterator[Batch]:
    """Batches without end of a site's part of its language."""
    dataset = _dataset(settings, settings.names[site], "train*", seed, settings.parts[site])
    samples = shuffled(dataset, seed, site)
    while True:
        yield stacked(list(islice(samples, settings.batch))).to(settings.device)


def _dataset(settings: Settings, name: str, files: str, seed: int, part: int) -> PackedTextDataset:
    selection = Selection(
        seed=seed,
        shuffle=True,
        shuffle_buffer=1000,
        split="all",
        holdout_fraction=0.0,
        share_index=0,
        share_count=part,
    )
    feed = CorpusFeed(open_corpus(str(Path(settings.corpus).expanduser() / name / files)), selection)
    dataset = PackedTextDataset(feed, ByteTokenizer(), settings.length)
    dataset.check(settings.batch, workers=0)
    return dataset


@torch.no_grad()
def _measured(model: nn.Module, settings: Settings, name: str) -> float:
    samples = list(islice(_dataset(settings, name, "valid*", 0, 1), _VALIDATION_SEQUENCES))
    batch = stacked(samples).to(settings.device)
    return F.cross_entropy(_logits(model, batch), batch.labels.flatten()).item()


def check_corpus(settings: Settings) -> None:
    """Raises UserError if a language cannot be read, or its part has too little text."""
    for site, name in enumerate(settings.names):
        next(_training(settings, site, 0))
        _dataset(settings, name, "valid*", 0, 1)
