"""All sites of a pre-training: gradients averaged in every step, or a model at each site and the outer loop between.

Sites take their inner steps one after another and meet in the outer loop of ``titan_ext.semi_sync``, which averages
the parameters that an arm shares: what is exchanged, applied and counted is what a real run does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from titan_ext.dept.plasticity import learning_rate_factor
from titan_ext.dept.tables import tables_of
from titan_ext.experiments.dept.arms import ARMS, Arm, Settings
from titan_ext.experiments.dept.text import Texts
from titan_ext.experiments.models import initialised, loss_of, small_sizes, train_step
from titan_ext.experiments.text import Batch, joined
from titan_ext.experiments.tuning import Run
from titan_ext.models.dept import model_registry
from titan_ext.semi_sync import ScopeConfig, SemiSyncConfig, TokenRowMap
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

_BETAS = (0.9, 0.95)
_ROWS_MULTIPLE = 64
_EMBEDDINGS = ["tok_embeddings.*", "lm_head.*"]
_FP32 = 4
_SITE_SEEDS = 1000  # more than there are sites: no two embeddings have one seed


class Pretraining(Protocol):
    """All sites of a run."""

    models: list[nn.Module]
    """One for each site's language; the same one where there is but one. Their bodies are equal after a round."""

    def step(self, batches: Sequence[Batch]) -> None:
        """One inner step of every site on its batch, and the exchange that is due."""

    def bytes_a_round(self) -> list[int]:
        """Bytes that each site sends in the steps of a round."""

    def close(self) -> None:
        """After the last step."""


def pretrain(settings: Settings, texts: Texts, run: Run) -> Pretraining:
    """Train all sites to the end; gives them back closed."""
    arm = ARMS[run.method]
    training = Central(settings, texts, run) if arm.embeddings is None else Federated(settings, texts, run, arm)
    batches = zip(
        *(
            texts.training(arm.vocabulary, language, (run.seed, 0, site), settings.batch)
            for site, language in enumerate(settings.languages)
        )
    )
    for of_sites in islice(batches, settings.steps):
        training.step(of_sites)
    training.close()
    return training


class Central:
    """One model on the batches of all languages."""

    def __init__(self, settings: Settings, texts: Texts, run: Run) -> None:
        model = build_model(settings, texts.tokens("joint", settings.languages[0]), run.seed)
        self.models = [model] * len(settings.languages)
        self._inner = InnerTraining(model, lr=run.lr, steps=settings.steps)
        self._sync_every = settings.sync_every

    def step(self, batches: Sequence[Batch]) -> None:
        self._inner.step(joined(batches))

    def bytes_a_round(self) -> list[int]:
        """Those of a ring all-reduce of fp32 gradients in every step."""
        gradients, sites = _FP32 * sum(each.numel() for each in self.models[0].parameters()), len(self.models)
        return [self._sync_every * ring_all_reduce_bytes(gradients, sites)] * sites

    def close(self) -> None:
        pass


class Federated:
    """A model at each site, and rounds of parameter averaging."""

    def __init__(self, settings: Settings, texts: Texts, run: Run, arm: Arm) -> None:
        self.models = _site_models(settings, texts, run, arm)
        self._inner = [InnerTraining(model, lr=run.lr, steps=settings.steps) for model in self.models]
        self._sites = InProcessSites(len(self.models))
        rows = _row_ids(settings, texts, self.models, arm)
        optimizers = [inner.optimizer for inner in self._inner]
        options = [{"token_rows": each} for each in rows]
        self._outer = self._sites.outer_loops(_outer(settings, arm), self.models, optimizers, options)

    def step(self, batches: Sequence[Batch]) -> None:
        for inner, batch in zip(self._inner, batches, strict=True):
            inner.step(batch)
        self._sites.at_once(lambda site: self._outer[site].step())

    def bytes_a_round(self) -> list[int]:
        """Those of the last one, from the ledger."""
        return [outer.ledger.last.bytes_sent for outer in self._outer]

    def close(self) -> None:
        self._sites.at_once(lambda site: self._outer[site].finish())
        self._sites.close()


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


class InnerTraining:
    """A site's model under DEPT's inner optimizer: AdamW, one cosine over the whole training, clipped gradients.

    Args:
        model: on the device that its batches come to.
        lr: the highest learning rate.
        steps: of the whole training, which the learning rate follows whatever becomes of the optimizer's moments.
    """

    def __init__(self, model: nn.Module, *, lr: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=_BETAS, weight_decay=0.0, fused=True)
        self._rates = LambdaLR(self.optimizer, partial(learning_rate_factor, steps=steps))

    def step(self, batch: Batch) -> None:
        """One inner step."""
        train_step(self.model, loss_of(self.model, batch), self.optimizer, self._rates)


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
