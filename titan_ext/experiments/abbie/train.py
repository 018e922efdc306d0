"""One run: a variant trained from the seed's model on the seed's text, and evaluated at every number of iterations.

All lengths of training are one run, as its schedule allows: warm up, stay, and from the point where a length's last part
begins a copy goes on with a learning rate that falls to 0, while the run itself stays.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, tee
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, read_from
from titan_ext.experiments.models import finite, initialised, train_step
from titan_ext.experiments.text import Batch, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.models.abbie import flavors
from titan_ext.models.abbie.model import AbbieModel

# AdamW and warm-up, stay, decay as in AbbIE's paper; the fractions, weight decay and clipping are our choice.
_BETAS, _WEIGHT_DECAY = (0.9, 0.95), 0.1
_WARMUP, _DECAY = 0.01, 0.2

_BY_ITERATIONS = ("losses", "rescaled", "cosines", "sizes")


def train(settings: Settings, run: Run) -> Result:
    """Train, and after each length evaluate as each variant that this training serves.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started = time.perf_counter()
    digest = hashlib.sha256()
    found = [_evaluate(model, settings, run) for model in _trained(settings, run, digest.update)]
    return Result(
        **{
            key: {variant: [each[key][variant] for each in found] for variant in read_from(run.method)}
            for key in _BY_ITERATIONS
        },
        trained_loss=found[-1]["trained_loss"],
        parameters=found[-1]["parameters"],
        tokens=[steps * settings.batch * settings.length for steps in settings.steps],
        tokens_sha256=digest.hexdigest(),
        seconds=time.perf_counter() - started,
    )


def _trained(settings: Settings, run: Run, seen: Callable[[Any], object]) -> Iterator[AbbieModel]:
    """The model after each length of training; ``seen`` is given all that the longest one was trained on."""
    model = build_model(settings, run.method, run.seed)
    if settings.compile:
        compile_blocks(model)
    fit = _Fit(model, run.lr, warmup=max(1, round(_WARMUP * settings.steps[0])))
    text: Iterator[Batch] = (batch for (batch,) in training_text(settings, run.seed))
    at = 0
    for steps in settings.steps:
        stay = steps - max(1, round(_DECAY * steps))
        for batch in islice(text, stay - at):
            seen(batch.inputs.numpy().data)
            fit.step(batch.to(settings.device))
        at = stay
        text, ahead = tee(text)
        branch = fit.decaying(steps)
        for batch in islice(ahead, steps - stay):
            if steps == settings.steps[-1]:
                seen(batch.inputs.numpy().data)
            branch.step(batch.to(settings.device))
        yield branch.model


class _Fit:
    """A model in training: warm-up, then a learning rate that stays, or from now on falls to 0 at step ``end``."""

    def __init__(self, model: AbbieModel, lr: float, warmup: int) -> None:
        self.model = model
        self._optimizer = AdamW(model.parameters(), lr=lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True)
        self._rates = LambdaLR(self._optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self._step = 0

    def decaying(self, end: int) -> "_Fit":
        """A copy that takes the last steps of a training of ``end``."""
        first = self._step
        fit = copy.copy(self)
        fit.model = copy.deepcopy(self.model)
        fit._optimizer = AdamW(fit.model.parameters())
        # A state that is loaded is not copied: the run's own moments would take the copy's steps.
        fit._optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        fit._rates = LambdaLR(fit._optimizer, lambda step: (end - first - step) / (end - first))
        return fit

    def step(self, batch: Batch) -> None:
        """One training step."""
        self.model.set_step(self._step)
        train_step(self.model, loss_of(self.model, batch), self._optimizer, self._rates)
        self._step += 1


def _evaluate(model: AbbieModel, settings: Settings, run: Run) -> dict[str, Any]:
    """The fields of ``Result`` that are measured on held-out text, of one length."""
    validation = [batch.to(settings.device) for batch in validation_text(settings)]
    found: dict[str, Any] = {key: {} for key in _BY_ITERATIONS}
    for variant in read_from(run.method):
        reader = build_model(settings, variant, run.seed)
        reader.load_state_dict(model.state_dict())
        reader.eval()
        found["losses"][variant] = [validation_loss(reader, validation, count) for count in settings.iterations]
        found["rescaled"][variant] = [
            rescaled_loss(reader, validation, count) if count > reader.config.iterations.train > 1 else None
            for count in settings.iterations
        ]
        found["cosines"][variant], found["sizes"][variant] = drift(reader, validation[0], settings.iterations)
    found["trained_loss"] = validation_loss(model.eval(), validation, model.config.iterations.train)
    return found | {"parameters": sum(each.numel() for each in model.parameters())}


@torch.no_grad()
def validation_loss(model: AbbieModel, validation: Iterable[Batch], iterations: int) -> float | None:
    """Mean loss of equal batches, in nats a token; None where it is no number."""
    losses = [float(loss_of(model, batch, iterations)) for batch in validation]
    return finite(sum(losses) / len(losses))


@torch.no_grad()
def rescaled_loss(model: AbbieModel, validation: Iterable[Batch], iterations: int) -> float | None:
    """As ``validation_loss``, with each token's latent brought to its norm at the training's number of iterations.

    If the loss grows with more iterations because the tail gets longer vectors than it has learned on, this takes
    the growth away.
    """
    losses = [float(_rescaled_loss_of(model, batch, iterations)) for batch in validation]
    return finite(sum(losses) / len(losses))


def _rescaled_loss_of(model: AbbieModel, batch: Batch, iterations: int) -> torch.Tensor:
    with _precision(batch):
        masks = model.get_attention_masks(batch.positions)
        start = model.head_forward(batch.inputs, batch.positions, masks)
        trained, state = (
            model.iterate(start, count, batch.positions, masks) for count in (model.config.iterations.train, iterations)
        )
        state = state * (trained.norm(dim=-1, keepdim=True) / state.norm(dim=-1, keepdim=True))
        return _cross_entropy(model.tail_forward(state, batch.positions, masks), batch)


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
    blocks = {"n_layers": VARIANTS[variant].depth * flavors[flavor].n_layers}
    own: dict[str, Any] = {**common, **blocks, **VARIANTS[variant].recurrence, **sizes}
    config = get_model_spec("abbie", flavor, **own).model
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
    with _precision(batch):
        masks = model.get_attention_masks(batch.positions)
        return _cross_entropy(model(batch.inputs, batch.positions, masks, iterations=iterations), batch)


def _precision(batch: Batch) -> torch.autocast:
    device = batch.inputs.device.type
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


def _cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
