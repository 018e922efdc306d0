"""One run: sources on virtual sites, in turn under the real outer loop, of which some train in each round."""

import hashlib
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.models import finite, initialised, loss_of, small_sizes
from titan_ext.experiments.participation.arms import Result, Settings, parse_arm
from titan_ext.experiments.text import Batch, text_of_folder, text_of_share, validation_of_folder, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.semi_sync import SemiSync, SemiSyncConfig
from titan_ext.semi_sync.sources.source import Source
from titan_ext.semi_sync.testing import InProcessSites

_BETAS = (0.9, 0.95)
_CLIP_NORM = 1.0
_SEQUENCES_OF_LANGUAGE = 32


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model; measure after each round, when all sites are equal.

    Raises:
        UserError: the text cannot be read, or sizes do not fit.
    """
    started = time.perf_counter()
    drawn, population = parse_arm(run.method)
    networks = InProcessSites(settings.sites)
    sites = [_Site(settings, run, population) for _ in range(settings.sites)]
    config = SemiSyncConfig(
        method="local_sgd",
        sync_every=settings.sync_every,
        sources_per_round=drawn,
        sampling_seed=run.seed,
        source_optimizer=settings.source_optimizer,  # type: ignore[arg-type]
    )
    options = [
        {"name": f"site{at}", "sources": [Source(name=str(each)) for each in range(at, population, settings.sites)]}
        for at in range(settings.sites)
    ]
    loops = networks.outer_loops(config, [site.model for site in sites], [[site.optimizer] for site in sites], options)
    held_out = validation(settings)
    measured: list[tuple[int, float, int]] = []
    for step in range(settings.sync_every, settings.steps + 1, settings.sync_every):
        networks.at_once(partial(_train_to, sites, loops, step))
        trained = sum(site.taken for site in sites) * settings.batch * settings.length
        loss = math.nan if any(site.diverged for site in sites) else _mean_loss(sites[0].model, held_out)
        measured.append((step, loss, trained))
        if not math.isfinite(loss):
            break
    networks.close()
    steps, losses, tokens = zip(*measured, strict=True)
    turns = [sum(site.turns.get(str(source), 0) for site in sites) for source in range(population)]
    return Result(
        steps=list(steps),
        losses=[finite(loss) for loss in losses],
        tokens=list(tokens),
        turns=[each // settings.sync_every for each in turns],
        tokens_sha256=_text_hash(held_out),
        seconds=time.perf_counter() - started,
    )


def _train_to(sites: "list[_Site]", loops: list[SemiSync], last: int, at: int) -> None:
    sites[at].train_to(loops[at], last)


class _Site:
    """A virtual site: one model, and the text of each of its sources."""

    def __init__(self, settings: Settings, run: Run, population: int) -> None:
        sizes = small_sizes(settings.dim, settings.layers, settings.length)
        config = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **sizes).model
        self.model: nn.Module = initialised(config, run.seed, settings.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=run.lr, betas=_BETAS)
        self._text = partial(source_text, settings, run.seed, population)
        self._rate = partial(rate, steps=settings.steps)
        self._device, self._lr = settings.device, run.lr
        self._batches: dict[str, Iterator[Batch]] = {}
        self.taken = 0
        self.turns: dict[str, int] = {}
        """Inner steps of each source."""
        self.diverged = False

    def train_to(self, outer: SemiSync, last: int) -> None:
        """Inner steps of all sources whose turn it is, and the round after them."""
        while outer.inner_step < last:
            if not outer.sits_out:
                self._inner_step(outer.source, outer.schedule_step)
            outer.step()

    def _inner_step(self, source: str, step: int) -> None:
        if source not in self._batches:
            self._batches[source] = self._text(int(source))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * self._rate(step)
        loss = loss_of(self.model, next(self._batches[source]).to(self._device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.diverged = self.diverged or not math.isfinite(loss.item())
        self.taken += 1
        self.turns[source] = self.turns.get(source, 0) + 1


def source_text(settings: Settings, seed: int, population: int, source: int) -> Iterator[Batch]:
    """Batches without end of one source: its share of the corpus, or of one language.

    Raises:
        UserError: the text cannot be read, or is too little.
    """
    if not settings.languages:
        return text_of_share(settings, seed, source, population)
    folders = language_folders(settings.languages)
    language, share = source % len(folders), source // len(folders)
    shares = len(range(language, population, len(folders)))
    return text_of_folder(settings, seed, str(folders[language]), share, shares)


def language_folders(folder: str) -> list[Path]:
    """The folders of the languages, by name."""
    return sorted(each for each in Path(folder).expanduser().iterdir() if each.is_dir())


def validation(settings: Settings) -> list[Batch]:
    """Text that no source trains on: of all languages alike, or of the corpus."""
    if not settings.languages:
        found = validation_text(settings)
    else:
        folders = language_folders(settings.languages)
        found = [
            batch for each in folders for batch in validation_of_folder(settings, str(each), _SEQUENCES_OF_LANGUAGE)
        ]
    return [batch.to(settings.device) for batch in found]


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: list[Batch]) -> float:
    losses = [loss_of(model, batch) * batch.labels.numel() for batch in batches]
    return float(sum(losses)) / sum(batch.labels.numel() for batch in batches)


def _text_hash(batches: list[Batch]) -> str:
    seen = hashlib.sha256()
    for batch in batches:
        seen.update(batch.inputs.cpu().numpy().tobytes())
    return seen.hexdigest()
