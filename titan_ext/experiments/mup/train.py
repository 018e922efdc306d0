"""Small Llamas of any width, with muP's rules and without: trained, or looked at step by step."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.models import finite, initialised, loss_of, small_sizes, train_step
from titan_ext.experiments.mup.arms import Result, Settings, arm_and_dim
from titan_ext.experiments.text import Batch, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.models.mup import MupConverter, lr_multipliers

_BETAS = (0.9, 0.95)
_ROWS = -(-VOCABULARY // 8) * 8


def build_model(settings: Settings, arm: str, dim: int, seed: int) -> nn.Module:
    """A model of this width; under "mup" by its rules, with the base's width of heads."""
    sizes = small_sizes(dim, settings.layers, settings.length)
    model = get_model_spec("llama3", "tiny", vocab_size=_ROWS, enable_weight_tying=False, **sizes).model
    if arm == "mup":
        model = MupConverter.Config(base_dim=settings.base_dim).build().convert(model)
    return initialised(model, seed, settings.device)


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, with the learning rate of each layer."""
    multipliers = lr_multipliers(model)
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_rate.setdefault(multipliers.get(id(parameter), 1.0), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": each, "lr": lr * times} for times, each in by_rate.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=_BETAS, weight_decay=0.0)


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure at the end.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, seen = time.perf_counter(), hashlib.sha256()
    model = build_model(settings, *arm_and_dim(run.method), run.seed)
    optimizer = build_optimizer(model, run.lr)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, steps=settings.steps))
    for (batch,) in islice(training_text(settings, run.seed), settings.steps):
        seen.update(batch.inputs.numpy().tobytes())
        loss = loss_of(model, batch.to(settings.device))
        train_step(model, loss, optimizer, rates)
        if not math.isfinite(loss.item()):
            break
    return Result(finite(_measured(model, settings)), seen.hexdigest(), time.perf_counter() - started)


@torch.no_grad()
def _measured(model: nn.Module, settings: Settings) -> float:
    batches = [batch.to(settings.device) for batch in validation_text(settings)]
    total = sum(loss_of(model, batch).item() * batch.labels.numel() for batch in batches)
    return total / sum(batch.labels.numel() for batch in batches)


def coordinates(
    settings: Settings, arm: str, dims: Sequence[int], lr: float, steps: int, seed: int
) -> dict[int, dict[str, float]]:
    """How much a few steps change what each part puts out: mean absolute change of an element, by width and part.

    The inputs are those of the first batch, before and after the steps.
    """
    return {dim: _change(settings, build_model(settings, arm, dim, seed), lr, steps, seed) for dim in dims}


def _change(settings: Settings, model: nn.Module, lr: float, steps: int, seed: int) -> dict[str, float]:
    batches = [batch.to(settings.device) for (batch,) in islice(training_text(settings, seed), steps)]
    before = outputs(model, batches[0])
    optimizer = build_optimizer(model, lr)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for batch in batches:
        train_step(model, loss_of(model, batch), optimizer, rates)
    after = outputs(model, batches[0])
    return {name: (after[name] - before[name]).abs().mean().item() for name in before}


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """What embedding, each layer and head put out."""
    found: dict[str, torch.Tensor] = {}
    whole: Any = model
    parts: dict[str, nn.Module] = {"tok_embeddings": whole.tok_embeddings, "lm_head": whole.lm_head}
    layers = whole.layers
    parts |= {f"layers.{number}": layer for number, layer in layers.items()}
    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output.float()))
        for name, part in parts.items()
    ]
    loss_of(model, batch)
    for hook in hooks:
        hook.remove()
    return found


def growth(changes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """By part the power of the width that the change grows by: the slope of a line through their logarithms."""
    dims = list(changes)
    x = [math.log(dim) for dim in dims]
    middle = sum(x) / len(x)
    square = sum((each - middle) ** 2 for each in x)
    return {
        name: sum((each - middle) * math.log(changes[dim][name]) for each, dim in zip(x, dims, strict=True)) / square
        for name in changes[dims[0]]
    }
