"""One run: equal models at all sites, pruned before each round or not, and the model that they share at the end."""

import hashlib
import time
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.models import finite, initialised, loss_of, small_sizes
from titan_ext.experiments.sites import InnerTraining, SemiSynchronous
from titan_ext.experiments.sparsity.arms import DENSE, POWER, Result, Settings, kind_and_sparsity
from titan_ext.experiments.text import training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.models.power_linear import PowerLinearConverter
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.methods.sparsyfed import SparsyFedSettings

_BETAS = (0.9, 0.99)


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure after the last round.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, seen = time.perf_counter(), hashlib.sha256()
    kind, sparsity = kind_and_sparsity(run.method)
    models = [build_model(settings, kind, run.seed) for _ in range(settings.sites)]
    inner = [
        InnerTraining(
            model,
            torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0),
            partial(rate, steps=settings.steps),
        )
        for model in models
    ]
    sites = SemiSynchronous(inner, outer_loop(settings, kind, sparsity))
    regrown, before, sent = [], 0, 0
    for step, batches in enumerate(training_text(settings, run.seed), start=1):
        for batch in batches:
            seen.update(batch.inputs.numpy().tobytes())
        sites.step([batch.to(settings.device) for batch in batches])
        if step % settings.sync_every == 0:
            before, sent = sent, sites.bytes_sent()[0]
            last = sites.last_round()
            regrown.append(last.measures.get("regrown", 0.0) if last is not None else 0.0)
        if step == settings.steps or sites.diverged:
            break
    sites.close()
    return Result(
        loss_whole=finite(_measured(models[0], settings)),
        bytes_sent=sent,
        bytes_last_round=sent - before,
        density=density(models[0]),
        regrown=sum(regrown[1:]) / max(1, len(regrown) - 1),
        tokens_sha256=seen.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def build_model(settings: Settings, kind: str, seed: int) -> nn.Module:
    """A Llama, for SparsyFed with its matrices under a power."""
    sizes = small_sizes(settings.dim, settings.layers, settings.length)
    model = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **sizes).model
    if kind == POWER:
        model = PowerLinearConverter.Config(exponent=settings.exponent).build().convert(model)
    return initialised(model, seed, settings.device)


def outer_loop(settings: Settings, kind: str, sparsity: float) -> SemiSyncConfig:
    """Averaging, of pruned parameters unless the arm is dense."""
    if kind == DENSE:
        return SemiSyncConfig(method="local_sgd", sync_every=settings.sync_every, outlier_threshold=0)
    own = {"sparsity": sparsity}
    return SemiSyncConfig(
        method="sparsyfed", sync_every=settings.sync_every, outlier_threshold=0, settings={"sparsyfed": own}
    )


def density(model: nn.Module) -> float:
    """Share of the weights of the pruned matrices that are not zero."""
    patterns = SparsyFedSettings().parameters
    chosen = [
        each.detach()
        for name, each in model.named_parameters()
        if each.dim() == 2 and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return sum(int((each != 0).sum()) for each in chosen) / sum(each.numel() for each in chosen)


@torch.no_grad()
def _measured(model: nn.Module, settings: Settings) -> float:
    batches = [batch.to(settings.device) for batch in validation_text(settings)]
    total = sum(loss_of(model, batch).item() * batch.labels.numel() for batch in batches)
    return total / sum(batch.labels.numel() for batch in batches)
