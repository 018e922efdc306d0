"""One run: a model at each site with its share of the experts, trained by DiLoCo, and the whole model put together."""

import hashlib
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torchtitan.models.common.moe import MoE

from titan_ext.config.fomoe import expert_rows, expert_scopes
from titan_ext.config.sections import FoMoEConfig, SiteConfig
from titan_ext.config.settings import Settings as Complaints
from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.train import rate
from titan_ext.experiments.fomoe.arms import Result, Settings, arms
from titan_ext.experiments.models import finite, initialised, loss_of
from titan_ext.experiments.sites import InnerTraining, SemiSynchronous
from titan_ext.experiments.text import Batch, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.models.held_experts import PATTERN, held_experts, hold
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.trainer.routing import balance

_BETAS = (0.9, 0.99)
_HEAD_DIM = 32
_ROWS_MULTIPLE = 8


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure after the last round.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, copies = time.perf_counter(), arms(settings.sites)[run.method]
    models = [build_model(settings, run.seed, copies, site) for site in range(settings.sites)]
    sites = _build_sites(settings, run, copies, models)
    seen, before = hashlib.sha256(), sites.bytes_sent()
    for step, batches in enumerate(training_text(settings, run.seed), start=1):
        for batch in batches:
            seen.update(batch.inputs.numpy().tobytes())
        sites.step([batch.to(settings.device) for batch in batches])
        if step == settings.steps or sites.diverged:
            break
        if step % settings.sync_every == 0:
            before = sites.bytes_sent()
    sites.close()
    validation = [batch.to(settings.device) for batch in validation_text(settings)]
    whole = assembled(settings, run.seed, copies, models)
    loss, entropy = _measured(whole, validation)
    buffers = sum(layer.moe.expert_bias_E.numel() for layer in whole.layers.values())  # type: ignore[operator]
    named = dict(models[0].named_parameters())
    return Result(
        loss_whole=finite(loss),
        loss_of_sites=[finite(_measured(model, validation)[0]) for model in models],
        bytes_a_round=[after - earlier for after, earlier in zip(sites.bytes_sent(), before, strict=True)],
        parameters_held=sum(each.numel() for each in named.values()),
        body=buffers + sum(each.numel() for name, each in named.items() if not matches(name, [PATTERN])),
        entropy=entropy,
        tokens_sha256=seen.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def build_model(settings: Settings, seed: int, copies: int, site: int) -> nn.Module:
    """A site's model in fp32: Qwen 3 with its share of the experts, all of them where each has a copy everywhere."""
    return initialised(_spec(settings, copies, site).model, seed, settings.device)


def _spec(settings: Settings, copies: int, site: int):
    spec = get_model_spec(
        "qwen3",
        "debugmodel_moe",
        dim=settings.dim,
        n_layers=settings.layers,
        n_heads=max(1, settings.dim // _HEAD_DIM),
        n_kv_heads=max(1, settings.dim // _HEAD_DIM),
        head_dim=_HEAD_DIM,
        num_experts=settings.experts,
        top_k=settings.top_k,
        expert_dim=settings.expert_dim,
        vocab_size=-(-VOCABULARY // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
        max_seq_len=settings.length,
    )
    return spec if copies == settings.sites else hold(spec, copies, site, settings.sites)


def _build_sites(settings: Settings, run: Run, copies: int, models: Sequence[nn.Module]) -> SemiSynchronous:
    fomoe = FoMoEConfig(sites_per_expert=0 if copies == settings.sites else copies)
    scopes = expert_scopes(Complaints(file="fomoe"), fomoe, models[0].config, [])
    options = [
        {"scope_rows": expert_rows(fomoe, SiteConfig(index=site, count=settings.sites), model.config, scopes)}
        for site, model in enumerate(models)
    ]
    outer = SemiSyncConfig(method="diloco", sync_every=settings.sync_every, scopes=scopes, outlier_threshold=0)
    return SemiSynchronous([_inner_training(settings, run, model) for model in models], outer, options)


def _inner_training(settings: Settings, run: Run, model: nn.Module) -> InnerTraining:
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0, fused=True)
    balancing = _spec(settings, settings.sites, 0).post_optimizer_build_fn
    balancing(optimizer, [model], _Alone())
    return InnerTraining(model, optimizer, partial(rate, steps=settings.steps))


class _Alone:
    """What torchtitan's balancing of experts asks of a layout, for one rank."""

    ep_enabled, tp = False, 1

    def get_optional_mesh(self, name: str) -> None:
        """No axis has more than one rank."""


@torch.no_grad()
def assembled(settings: Settings, seed: int, copies: int, models: Sequence[nn.Module]) -> nn.Module:
    """The whole model after a round: what all sites share, and each expert from the first site that holds it."""
    whole = build_model(settings, seed, settings.sites, 0)
    sites = [dict(model.named_parameters()) for model in models]
    for name, parameter in whole.named_parameters():
        if not matches(name, [PATTERN]):
            parameter.copy_(sites[0][name])
            continue
        for site in reversed(range(settings.sites)):
            held = held_experts(settings.experts, copies, site, settings.sites)
            parameter[list(held)] = sites[site][name]
    for name, buffer in whole.named_buffers():
        buffer.copy_(models[0].get_buffer(name))
    return whole


@torch.no_grad()
def _measured(model: nn.Module, validation: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss in nats a token, and the mean entropy of the layers' routing."""
    counts: dict[nn.Module, torch.Tensor] = {}

    def count(router: nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
        chosen = torch.bincount(outputs[1].flatten(), minlength=outputs[2].shape[-1])
        counts[router] = counts.get(router, torch.zeros_like(chosen)) + chosen

    hooks = [each.router.register_forward_hook(count) for each in model.modules() if isinstance(each, MoE)]
    model.eval()
    losses = [loss_of(model, batch).item() * batch.labels.numel() for batch in validation]
    model.train()
    for hook in hooks:
        hook.remove()
    entropies = [balance(each.float())["entropy"] for each in counts.values()]
    return sum(losses) / sum(batch.labels.numel() for batch in validation), sum(entropies) / len(entropies)
