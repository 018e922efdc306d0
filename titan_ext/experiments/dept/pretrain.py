"""The pre-training of an arm: gradients averaged in every step, or parameters averaged in rounds, as far as it shares them."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from titan_ext.dept.plasticity import learning_rate_factor
from titan_ext.dept.tables import tables_of
from titan_ext.experiments.dept.arms import ARMS, Arm, Settings
from titan_ext.experiments.dept.text import Texts
from titan_ext.experiments.models import initialised, small_sizes
from titan_ext.experiments.sites import DataParallel, InnerTraining, SemiSynchronous, Sites
from titan_ext.experiments.tuning import Run
from titan_ext.models.dept import model_registry
from titan_ext.semi_sync import ScopeConfig, SemiSyncConfig, TokenRowMap

_BETAS = (0.9, 0.95)
_ROWS_MULTIPLE = 64
_EMBEDDINGS = ["tok_embeddings.*", "lm_head.*"]
_SITE_SEEDS = 1000  # more than there are sites: no two embeddings have one seed


class Pretraining(NamedTuple):
    """What all sites came to."""

    models: list[nn.Module]
    """One for each site's language; the same one where there is but one. Their bodies are equal after a round."""
    bytes_a_round: list[int]
    """Bytes that each site sent in the steps of the last round."""


def pretrain(settings: Settings, texts: Texts, run: Run) -> Pretraining:
    """Train all sites to the end, or to that of the round in which they diverge."""
    arm = ARMS[run.method]
    sites = _build_sites(settings, texts, run, arm)
    batches = zip(
        *(
            texts.training(arm.vocabulary, language, (run.seed, 0, site), settings.batch)
            for site, language in enumerate(settings.languages)
        )
    )
    before = sites.bytes_sent()
    for step, of_sites in enumerate(islice(batches, settings.steps)):
        if step % settings.sync_every == 0:
            if sites.diverged:
                break
            before = sites.bytes_sent()
        sites.step(of_sites)
    sites.close()
    sent = [after - earlier for after, earlier in zip(sites.bytes_sent(), before, strict=True)]
    return Pretraining(sites.models, sent)


def _build_sites(settings: Settings, texts: Texts, run: Run, arm: Arm) -> Sites:
    if arm.embeddings is None:
        model = build_model(settings, texts.tokens("joint", settings.languages[0]), run.seed)
        return DataParallel(_inner_training(settings, run, model), len(settings.languages))
    models = _site_models(settings, texts, run, arm)
    options = [{"token_rows": rows} for rows in _row_ids(settings, texts, models, arm)]
    return SemiSynchronous([_inner_training(settings, run, model) for model in models], _outer(settings, arm), options)


def _inner_training(settings: Settings, run: Run, model: nn.Module) -> InnerTraining:
    """DEPT's inner optimizer: AdamW under one cosine over all steps, whatever becomes of its moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=0.0, fused=True)
    return InnerTraining(model, optimizer, partial(learning_rate_factor, steps=settings.steps))


def _outer(settings: Settings, arm: Arm) -> SemiSyncConfig:
    embeddings = ScopeConfig(name="embeddings", parameters=_EMBEDDINGS, shared=arm.embeddings)
    return SemiSyncConfig(
        method="local_sgd",
        sync_every=settings.sync_every,
        scopes=[embeddings],
        reset_inner_optimizer=not settings.keep_inner_state,
        outlier_threshold=0,
    )


def _row_ids(settings: Settings, texts: Texts, models: Sequence[nn.Module], arm: Arm) -> list[TokenRowMap | None]:
    """Which rows of the joint vocabulary's table each site has, where they are shared."""
    return [
        texts.row_ids(language, len(table_of(model))) if arm.embeddings == "sparse_rows" else None
        for language, model in zip(settings.languages, models, strict=True)
    ]


def _site_models(settings: Settings, texts: Texts, run: Run, arm: Arm) -> list[nn.Module]:
    """A model for each site, with one body; embeddings are equal where they are shared."""
    joint = build_model(settings, texts.tokens("joint", settings.languages[0]), run.seed)
    models = []
    for site, language in enumerate(settings.languages):
        own_seed = run.seed if arm.embeddings == "full" else _SITE_SEEDS * (run.seed + 1) + site
        models.append(build_model(settings, texts.tokens(arm.vocabulary, language), own_seed))
        adopt_body(models[-1], body_of(joint))
    for model, row_ids in zip(models, _row_ids(settings, texts, models, arm)):
        if row_ids is not None:
            table_of(model)[row_ids.ids >= 0] = table_of(joint)[row_ids.held]
    return models


def build_model(settings: Settings, tokens: int, seed: int) -> nn.Module:
    """A decoder in fp32 for a vocabulary of ``tokens``, initialised from the seed, on the settings' device.

    Embedding and head are one table, of rows up to a multiple of 64; those behind the vocabulary are masked.

    Raises:
        UserError: the sizes do not fit each other.
    """
    config = model_registry(
        "tiny",
        vocab_size=-(-tokens // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
        used_vocab_size=tokens,
        **small_sizes(settings.dim, settings.layers, settings.length),
    ).model
    return initialised(config, seed, settings.device)


def body_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters besides embedding and head, by name; not copied."""
    tables = tables_of(model)
    return {name: each.detach() for name, each in model.named_parameters() if name not in tables}


def table_of(model: nn.Module) -> torch.Tensor:
    """The table that is embedding and head, ``[rows, dim]``; not copied."""
    (table,) = tables_of(model).values()
    return table.detach()


def adopt_body(model: nn.Module, body: Mapping[str, torch.Tensor]) -> None:
    """Overwrite a model's body."""
    for name, parameter in body_of(model).items():
        parameter.copy_(body[name])
