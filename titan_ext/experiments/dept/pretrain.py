"""All sites of a pre-training: gradients averaged in every step, or a model at each site and the outer loop between.

Sites take their inner steps one after another and meet in the outer loop of ``titan_ext.semi_sync``, which averages
the parameters that an arm shares: what is exchanged, applied and counted is what a real run does.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from torch import nn

from titan_ext.experiments.convergence.settings import Run
from titan_ext.experiments.convergence.text import Batch
from titan_ext.experiments.dept.arms import ARMS, Arm
from titan_ext.experiments.dept.learner import Learner
from titan_ext.experiments.dept.model import adopt_body, body_of, build_model, table_of
from titan_ext.experiments.dept.settings import Settings
from titan_ext.experiments.dept.text import Texts, joined
from titan_ext.semi_sync import ScopeConfig, SemiSync, SiteOptions, SiteRanks, TokenRowMap
from titan_ext.semi_sync.testing.simulator import InProcessSites
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

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
        self._learner = Learner(model, lr=run.lr, steps=settings.steps)
        self._sync_every = settings.sync_every

    def step(self, batches: Sequence[Batch]) -> None:
        self._learner.step(joined(batches))

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
        self._learners = [Learner(model, lr=run.lr, steps=settings.steps) for model in self.models]
        self._sites = InProcessSites(len(self.models))
        config = _outer(settings, arm)
        sites = zip(self._learners, self._sites.managers(), _row_ids(settings, texts, self.models, arm), strict=True)
        self._outer = [
            config.build(
                model_parts=[learner.model],
                optimizers=learner.optimizer,
                manager=manager,
                site=SiteOptions(ranks=SiteRanks(alone=True), token_rows=token_rows),
            )
            for learner, manager, token_rows in sites
        ]
        self._sites.at_once(lambda site: self._outer[site].join())

    def step(self, batches: Sequence[Batch]) -> None:
        for learner, batch in zip(self._learners, batches, strict=True):
            learner.step(batch)
        self._sites.at_once(lambda site: self._outer[site].step())

    def bytes_a_round(self) -> list[int]:
        """Those of the last one, from the ledger."""
        return [outer.ledger.last.bytes_sent for outer in self._outer]

    def close(self) -> None:
        self._sites.at_once(lambda site: self._outer[site].finish())
        self._sites.close()


def _outer(settings: Settings, arm: Arm) -> SemiSync.Config:
    embeddings = ScopeConfig(name="embeddings", parameters=_EMBEDDINGS, shared=arm.embeddings)
    return SemiSync.Config(
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
