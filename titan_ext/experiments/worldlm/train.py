"""One run: a language at each site, trained alone, as one model, or with layers of the site's own."""

import time
from functools import partial

import torch

from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.languages import training, validation
from titan_ext.experiments.models import finite, loss_of, small_llama
from titan_ext.experiments.sites import Alone, DataParallel, InnerTraining, SemiSynchronous, Sites, train_to_the_end
from titan_ext.experiments.tuning import Run
from titan_ext.experiments.worldlm.arms import CENTRALISED, LOCAL, Result, Settings, outer_loop, regions

_BETAS = (0.9, 0.99)


def train(settings: Settings, run: Run) -> Result:
    """Train each site from the seed's model on the seed's text; measure each on its own language at the end.

    Raises:
        UserError: a corpus cannot be read, or has too little text.
    """
    started = time.perf_counter()
    texts = [training(settings, language, run.seed) for language in settings.languages]
    sites = _sites(settings, run)
    tokens_sha256 = train_to_the_end(sites, texts, settings.steps, settings.device)
    losses = [
        finite(_measured(settings, model, language))
        for model, language in zip(sites.models, settings.languages, strict=True)
    ]
    return Result(
        losses=losses,
        bytes_sent=sum(sites.bytes_sent()),
        tokens_sha256=tokens_sha256,
        seconds=time.perf_counter() - started,
    )


def _sites(settings: Settings, run: Run) -> Sites:
    count = len(settings.languages)
    inner = [_inner(settings, run) for _ in range(1 if run.method == CENTRALISED else count)]
    if run.method == CENTRALISED:
        return DataParallel(inner[0], count)
    if run.method == LOCAL:
        return Alone(inner)
    options = [
        {"name": f"{place} {language}", "labels": {"region": region}}
        for place, (language, region) in enumerate(zip(settings.languages, regions(run.method, settings), strict=True))
    ]
    return SemiSynchronous(inner, outer_loop(run.method, settings), options)


def _inner(settings: Settings, run: Run) -> InnerTraining:
    model = small_llama(settings, run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0)
    return InnerTraining(model, optimizer, partial(rate, steps=settings.steps))


@torch.no_grad()
def _measured(settings: Settings, model: torch.nn.Module, language: str) -> float:
    losses = [loss_of(model, batch.to(settings.device)).item() for batch in validation(settings, language)]
    return sum(losses) / len(losses)
