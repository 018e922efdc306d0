"""A trained body, a tokenizer and a corpus that it has not seen: the data and measures of a plasticity curve."""

from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader

from titan_ext.config.load import Site
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.loader import open_feed
from titan_ext.data.tokenizers.tokenizer import build_tokenizer, resolve_tokenizer
from titan_ext.data.tokenizers.traits import row_count
from titan_ext.dept.measures import frequencies, labels_of
from titan_ext.dept.plasticity import adapt
from titan_ext.dept.tables import renew_tables
from titan_ext.export.trained import trained_model
from titan_ext.inference.checkpoint import Weights
from titan_ext.inference.model import default_iterations
from titan_ext.inference.perplexity import measure
from titan_ext.inference.text import evaluation_text

EVALUATIONS = 10
"""Points of the curve after the first."""

HOLDOUT_FRACTION = 0.1
"""Of the corpus's documents, where the run itself holds none out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """What a body is adapted to, and how."""

    corpus: str
    """As in ``data``."""
    tokenizer: str
    """As in ``tokenizer``."""
    steps: int
    lr: float
    """The schedule's peak."""
    seed: int
    """Of the random embedding and of the order of documents."""
    tokens: int
    """Held-out ones to measure on."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses in nats a token, on documents of the corpus that are held out."""

    unigram: float
    """UNIGRAM-CE of those documents."""
    points: list[tuple[int, float]]
    """Steps and loss."""


def plasticity(site: Site, adaptation: Adaptation, *, step: int | None = None, weights: Weights = "global") -> Curve:
    """Adapt the body of a site's checkpoint.

    Args:
        site: whose body, sequence length and batch size are taken.
        adaptation: to what.
        step: of the checkpoint; None: the latest.
        weights: whose they are.

    Raises:
        UserError: the checkpoint, tokenizer or corpus cannot be used.
        RunError: the checkpoint cannot be read.
    """
    there = _moved(site, adaptation)
    training, data = there.config.training, there.config.dataloader
    tokenizer = build_tokenizer(there.tokenizer)
    held_out = evaluation_text(there, None, adaptation.tokens, training.local_batch_size).batches
    unigram = frequencies(data, tokenizer)
    dataset = PackedTextDataset(open_feed(data), tokenizer, training.seq_len)
    dataset.check(training.local_batch_size, workers=0)
    model = trained_model(site, step, weights)
    renew_tables(model, row_count(tokenizer), seed=adaptation.seed)
    points = adapt(
        model,
        DataLoader(dataset, batch_size=training.local_batch_size),
        steps=adaptation.steps,
        lr=adaptation.lr,
        evaluate=lambda: measure(model, held_out, default_iterations(site)).loss,
        every=max(1, adaptation.steps // EVALUATIONS),
    )
    return Curve(unigram.cross_entropy(labels_of(held_out)), points)


def _moved(site: Site, adaptation: Adaptation) -> Site:
    """The site, as if its corpus and tokenizer were the adaptation's."""
    own = site.config.dataloader
    data = replace(
        own,
        dataset=adaptation.corpus,
        split="train",
        holdout_fraction=own.holdout_fraction or HOLDOUT_FRACTION,
        seed=adaptation.seed,
        share_index=0,
        share_count=1,
    )
    tokenizer, assets = resolve_tokenizer(adaptation.tokenizer)
    config: Any = site.config
    validator = replace(config.validator, enable=False)
    config = replace(config, dataloader=data, tokenizer=tokenizer, hf_assets_path=assets, validator=validator)
    return replace(site, tokenizer=adaptation.tokenizer, vocabulary="", config=config)
