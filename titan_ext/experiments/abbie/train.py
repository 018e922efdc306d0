"""One run: a variant trained from the seed's model on the seed's text, and evaluated at every number of iterations."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.components.optimizer import LRSchedulersContainer

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, read_from
from titan_ext.experiments.models import finite, initialised, train_step
from titan_ext.experiments.text import Batch, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.models.abbie.model import AbbieModel

# AdamW and warm-up, stay, decay as in AbbIE's paper; the fractions, weight decay and clipping are our choice.
_BETAS, _WEIGHT_DECAY = (0.9, 0.95), 0.1
_WARMUP, _DECAY = 0.01, 0.2


def train(settings: Settings, run: Run) -> Result:
    """Train, then evaluate as each variant that this training serves.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started = time.perf_counter()
    model = build_model(settings, run.method, run.seed)
    digest = _fit(model, settings, run)
    return Result(
        **_evaluate(model, settings, run),
        parameters=sum(each.numel() for each in model.parameters()),
        tokens=settings.steps * settings.batch * settings.length,
        tokens_sha256=digest,
        seconds=time.perf_counter() - started,
    )


def _fit(model: AbbieModel, settings: Settings, run: Run) -> str:
    """Train in place; returns the hash of what was trained on."""
    if settings.compile:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)
    warmup = max(1, round(_WARMUP * settings.steps))
    rates = LRSchedulersContainer.Config(warmup_steps=warmup, decay_ratio=_DECAY).build(
        optimizers=[optimizer], training_steps=settings.steps
    )
    seen = hashlib.sha256()
    for step, (batch,) in enumerate(islice(training_text(settings, run.seed), settings.steps)):
        seen.update(batch.inputs.numpy().data)
        model.set_step(step)
        train_step(model, loss_of(model, batch.to(settings.device)), optimizer, rates)
    return seen.hexdigest()


def _evaluate(model: AbbieModel, settings: Settings, run: Run) -> dict[str, Any]:
    """The fields of ``Result`` that are measured on held-out text."""
    validation = [batch.to(settings.device) for batch in validation_text(settings)]
    losses, cosines, sizes = {}, {}, {}
    for variant in read_from(run.method):
        reader = build_model(settings, variant, run.seed)
        reader.load_state_dict(model.state_dict())
        reader.eval()
        losses[variant] = [validation_loss(reader, validation, count) for count in settings.iterations]
        cosines[variant], sizes[variant] = drift(reader, validation[0], settings.iterations)
    trained_loss = validation_loss(model.eval(), validation, model.config.iterations.train)
    return {"trained_loss": trained_loss, "losses": losses, "cosines": cosines, "sizes": sizes}


@torch.no_grad()
def validation_loss(model: AbbieModel, validation: Iterable[Batch], iterations: int) -> float | None:
    """Mean loss of equal batches, in nats a token; None where it is no number."""
    losses = [float(loss_of(model, batch, iterations)) for batch in validation]
    return finite(sum(losses) / len(losses))


@torch.no_grad()
def drift(model: AbbieModel, batch: Batch, iterations: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """How far iterating takes the tail's input from what the tail was trained on.

    Returns:
        For each number of iterations the mean cosine with the tail's input at as many as in training, and the
        norm as a multiple of its norm.
    """
    masks = model.get_attention_masks(batch.positions)
    start = model.head_forward(batch.inputs, batch.positions, masks)
    trained, *others = (
        model.iterate(start, count, batch.positions, masks) for count in (model.config.iterations.train, *iterations)
    )
    cosines = [F.cosine_similarity(other, trained, dim=-1).mean().item() for other in others]
    sizes = [(other.norm() / trained.norm()).item() for other in others]
    return [finite(each) for each in cosines], [finite(each) for each in sizes]


def build_model(settings: Settings, variant: str, seed: int, **sizes: int) -> AbbieModel:
    """A variant in fp32, initialised from the seed, on the settings' device; embedding and head are one matrix.

    Args:
        settings: those of the comparison.
        variant: a key of ``VARIANTS``.
        seed: of the parameters, and of the noise that the depth recurrence starts from.
        **sizes: keys of ``[model]`` that differ from the flavor's.

    Raises:
        UserError: the sizes do not fit each other.
    """
    common = {"vocab_size": VOCABULARY, "enable_weight_tying": True, "max_seq_len": settings.length}
    flavor = settings.flavor + VARIANTS[variant].suffix
    config = get_model_spec("abbie", flavor, **common, **VARIANTS[variant].recurrence, **sizes).model
    config.seed = seed
    return initialised(config, seed, settings.device)


def compile_blocks(model: AbbieModel) -> None:
    """Compile a model block by block, as torchtitan does."""
    for block in model.layers.values():
        block.compile(fullgraph=True)


def loss_of(model: AbbieModel, batch: Batch, iterations: int | None = None) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; on an accelerator its matrix products are in bf16.

    Args:
        model: a variant.
        batch: on the model's device.
        iterations: of the body; None: as the model says.
    """
    device = batch.inputs.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        masks = model.get_attention_masks(batch.positions)
        logits = model(batch.inputs, batch.positions, masks, iterations=iterations)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
