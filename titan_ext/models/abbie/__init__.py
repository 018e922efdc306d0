"""AbbIE: a decoder whose body is iterated in latent space, and the baselines it is compared with."""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torchtitan.models.common import Linear, RMSNorm
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import InvalidValue
from titan_ext.models import llama3, unknown
from titan_ext.models.abbie.depth import RecurrentDepthModel, StateNoise
from titan_ext.models.abbie.iterations import Iterations, Sampling
from titan_ext.models.abbie.model import AbbieModel
from titan_ext.models.abbie.norm import use_fp32_stream
from titan_ext.models.abbie.pipeline import pipeline_abbie
from titan_ext.models.abbie.recurrence import Between, Recurrence, Skip
from titan_ext.models.llama3 import from_huggingface as from_huggingface


@dataclass(frozen=True, kw_only=True)
class Sizes(llama3.Sizes):
    """Sizes and recurrence of an AbbIE model; each is a key of ``[model]``."""

    body_layers: int | None = None
    """Blocks that are iterated; None: half of ``n_layers``. (The paper's split is not known.)"""
    head_layers: int | None = None
    """Blocks before the body; None: half of what the body leaves. The rest is the tail."""
    variant: Literal["abbie", "depth"] = "abbie"
    """"depth" is the recurrent-depth baseline, with an adapter and a norm of its own."""
    iterations: int = 2
    """Applications of the body in training; the mean under ``iteration_sampling = "poisson"``."""
    eval_iterations: int | None = None
    """Applications of the body at evaluation; None: as many as ``iterations``."""
    iteration_sampling: Sampling = "fixed"
    """Whether each training step draws its number: "fixed", "uniform" from 1, or the recurrent-depth "poisson"."""
    max_iterations: int | None = None
    """Largest number that is drawn; None: 2 x ``iterations`` - 1, with which "uniform" has ``iterations`` as mean."""
    skip: Skip = "prev"
    """What is added between iterations: the state before ("prev") or the head's output ("input"), which is variant
    D; "none" is variant C."""
    final_skip: bool = False
    """Whether it is added after the last iteration too: the literal formula, with which 1 iteration is no longer
    the standard decoder."""
    between: Between = "none"
    """Ablations: "mean" halves the sum between iterations, "norm" divides it by its root mean square."""
    backprop_iterations: int | None = None
    """Gradients flow through so many last iterations; None: through all."""
    fp32_residual: bool = False
    """The residual stream stays in fp32 (its norm doubles with each iteration under "prev")."""


# The paper names 200M and 350M parameters and tied embeddings; widths and depth are our choice.
_SIZES = {
    "micro": Sizes(dim=32, n_layers=4, n_heads=1, ffn_dim=88, vocab_size=264),
    "tiny": Sizes(**asdict(llama3.flavors["tiny"])),
    "debugmodel": Sizes(**asdict(llama3.flavors["debugmodel"])),
    "200M": Sizes(dim=768, n_layers=24, n_heads=12, ffn_dim=2048, vocab_size=50432, enable_weight_tying=True),
    "350M": Sizes(dim=1024, n_layers=24, n_heads=16, ffn_dim=2816, vocab_size=50432, enable_weight_tying=True),
}
# Feed-forward width that the depth baseline gives up for its adapter, to be as large as the others.
_ADAPTER_PAID_BY = {"micro": 5, "tiny": 16, "debugmodel": 32, "200M": 16, "350M": 32}


def _variants(name: str, sizes: Sizes) -> dict[str, Sizes]:
    return {
        name: sizes,
        f"{name}-C": replace(sizes, skip="none"),
        f"{name}-standard": replace(sizes, iterations=1),
        f"{name}-depth": replace(sizes, variant="depth", ffn_dim=sizes.ffn_dim - _ADAPTER_PAID_BY[name]),
    }


flavors: dict[str, Sizes] = {
    flavor: variant for name, sizes in _SIZES.items() for flavor, variant in _variants(name, sizes).items()
}


def model_registry(flavor: str, *, attn_backend: str = "flex", **overrides: Any) -> ModelSpec:
    """torchtitan's spec of a flavor.

    Args:
        flavor: a key of ``flavors``.
        attn_backend: torchtitan's name of the attention: "flex", "flex_flash" or "varlen".
        **overrides: fields of ``Sizes``.

    Raises:
        UserError: no such flavor, field or size.
    """
    if flavor not in flavors:
        raise unknown("model.flavor", flavor, flavors)
    known = [field.name for field in fields(Sizes)]
    for key in overrides:
        if key not in known:
            raise unknown("model", key, [*known, "attn_backend"])
    sizes = replace(flavors[flavor], **overrides)
    model = _model_config(sizes, attn_backend)
    return ModelSpec(
        name="abbie",
        flavor=flavor,
        model=model,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_abbie,
        post_optimizer_build_fn=None,
        # Names and shapes are a Llama's, which computes one iteration of them; it has no place for an adapter.
        state_dict_adapter=None if sizes.variant == "depth" else Llama3StateDictAdapter,
    )


def _model_config(sizes: Sizes, attn_backend: str) -> AbbieModel.Config:
    decoder_sizes = {field.name: getattr(sizes, field.name) for field in fields(llama3.Sizes)}
    decoder = llama3.model_registry("tiny", attn_backend=attn_backend, **decoder_sizes).model
    head_layers, body_layers = _split(sizes)
    _check(sizes)
    settings: dict[str, Any] = {field.name: getattr(decoder, field.name) for field in fields(decoder)} | {
        "head_layers": head_layers,
        "body_layers": body_layers,
        "recurrence": Recurrence(**{field.name: getattr(sizes, field.name) for field in fields(Recurrence)}),
        "iterations": _iterations(sizes),
        "fp32_residual": sizes.fp32_residual,
    }
    config = _depth_config(settings) if sizes.variant == "depth" else AbbieModel.Config(**settings)
    if sizes.fp32_residual:
        use_fp32_stream(config)
    return config


def _iterations(sizes: Sizes) -> Iterations:
    return Iterations(
        train=sizes.iterations,
        evaluate=sizes.eval_iterations or sizes.iterations,
        sampling=sizes.iteration_sampling,
        most=sizes.max_iterations or 2 * sizes.iterations - 1,
    )


def _depth_config(settings: dict[str, Any]) -> RecurrentDepthModel.Config:
    dim = settings["dim"]
    return RecurrentDepthModel.Config(
        **settings,
        state_noise=StateNoise.Config(dim=dim),
        adapter=Linear.Config(
            in_features=2 * dim, out_features=dim, param_init={"weight": partial(nn.init.trunc_normal_, std=0.02)}
        ),
        state_norm=RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_}),
    )


def _split(sizes: Sizes) -> tuple[int, int]:
    """Blocks of head and body."""
    body = max(1, sizes.n_layers // 2) if sizes.body_layers is None else sizes.body_layers
    if not 1 <= body <= sizes.n_layers:
        raise InvalidValue("model.body_layers", body, f"must be from 1 to model.n_layers ({sizes.n_layers})")
    head = (sizes.n_layers - body) // 2 if sizes.head_layers is None else sizes.head_layers
    if not 0 <= head <= sizes.n_layers - body:
        raise InvalidValue(
            "model.head_layers",
            head,
            f"must be from 0 to what the body ({body} blocks) leaves of model.n_layers ({sizes.n_layers})",
        )
    return head, body


def _check(sizes: Sizes) -> None:
    for key in ("iterations", "eval_iterations", "max_iterations", "backprop_iterations"):
        value = getattr(sizes, key)
        if value is not None and value < 1:
            raise InvalidValue(f"model.{key}", value, "must be at least 1")
    if sizes.max_iterations is not None and sizes.iteration_sampling == "fixed":
        raise InvalidValue("model.max_iterations", sizes.max_iterations, "needs model.iteration_sampling, which draws")
    if sizes.variant == "depth":
        for key in ("skip", "final_skip", "between", "fp32_residual"):
            if getattr(sizes, key) != getattr(Sizes, key):
                raise InvalidValue(f"model.{key}", getattr(sizes, key), "not with model.variant = 'depth'")
    elif sizes.skip == "none" and (sizes.final_skip or sizes.between == "mean"):
        key = "final_skip" if sizes.final_skip else "between"
        raise InvalidValue(f"model.{key}", getattr(sizes, key), "needs a model.skip other than 'none'")
    elif sizes.backprop_iterations is not None and sizes.skip != "input":
        raise InvalidValue(
            "model.backprop_iterations",
            sizes.backprop_iterations,
            "needs model.skip = 'input' (or the variant 'depth'), or the head would get no gradient",
        )
