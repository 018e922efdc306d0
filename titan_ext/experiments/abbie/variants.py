"""The models that are compared: two baselines, variant C, and every reading of variant D; what a run is given and returns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    sites: ClassVar[int] = 1
    """Nothing is exchanged; text is made for a number of sites."""

    flavor: str
    """One of the AbbIE model, without the ending of a variant."""
    steps: tuple[int, ...]
    """Lengths of training to measure at, ascending: each ends with a decay of the learning rate of its own."""
    batch: int
    """Sequences of a step."""
    length: int
    """Tokens of a sequence."""
    iterations: tuple[int, ...]
    """Numbers of iterations to evaluate at, ascending."""
    corpus: str
    device: str
    compile: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to. What is kept by variant has for each length of training a value for each of
    ``Settings.iterations``; None: no number.
    """

    trained_loss: float | None
    """Validation loss after the whole training at the number of iterations of the training, in nats a token."""
    losses: dict[str, list[list[float | None]]]
    """By variant: validation losses of the model, iterated as this variant is."""
    rescaled: dict[str, list[list[float | None]]]
    """The same beyond the number of iterations of the training, with the tail's input brought, token by token, to its norm
    at that number; None for fewer, and for the standard decoder."""
    cosines: dict[str, list[list[float | None]]]
    """By variant: mean cosine between the tail's input and that at the number of iterations of the training."""
    sizes: dict[str, list[list[float | None]]]
    """By variant: norm of the tail's input as a multiple of that at the number of iterations of the training."""
    parameters: int
    tokens: list[int]
    """Tokens that each length was trained on."""
    tokens_sha256: str
    """Hash of all of them, in order."""
    seconds: float

    @property
    def loss(self) -> float:
        """``trained_loss``; infinite for a run that diverged."""
        return inf if self.trained_loss is None else self.trained_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A model of the comparison, equal to the others in its sizes."""

    label: str
    """Its name for people."""
    suffix: str = ""
    """Ending of its flavor's name."""
    recurrence: Mapping[str, object] = field(default_factory=dict)
    """Keys of ``[model]`` that make it this variant."""
    depth: int = 1
    """Blocks as a multiple of the flavor's, in head, body and tail alike."""
    trained_as: str | None = None
    """The variant whose training is the same, so that they differ in evaluation alone; None: it has its own."""


VARIANTS: dict[str, Variant] = {
    # Iterated more than once it is what variant C is.
    "standard": Variant(label="standard decoder", suffix="-standard", recurrence={"skip": "none"}),
    "depth": Variant(label="depth recurrence", suffix="-depth"),
    "c": Variant(label="C", suffix="-C"),
    "d_prev": Variant(label="D, prev", recurrence={"skip": "prev"}),
    # With 2 iterations the state before the only skip is the head's output.
    "d_input": Variant(label="D, input", recurrence={"skip": "input"}, trained_as="d_prev"),
    "d_prev_final": Variant(label="D, prev, final skip", recurrence={"skip": "prev", "final_skip": True}),
    "d_input_final": Variant(label="D, input, final skip", recurrence={"skip": "input", "final_skip": True}),
    "d_mean": Variant(label="D, prev, mean", recurrence={"skip": "prev", "between": "mean"}),
    "d_norm": Variant(label="D, prev, norm", recurrence={"skip": "prev", "between": "norm"}),
    "d_deep": Variant(label="D, prev, twice the blocks", recurrence={"skip": "prev"}, depth=2),
    # Not the paper's: training at 1 to 3 iterations, as a measure of what a training at 2 alone leaves out.
    "d_sampled": Variant(
        label="D, prev, 1 to 3 in training", recurrence={"skip": "prev", "iteration_sampling": "uniform"}
    ),
}


def training_of(variant: str) -> str:
    """The variant that is trained for this one."""
    return VARIANTS[variant].trained_as or variant


def read_from(training: str) -> list[str]:
    """The variants that one training serves."""
    return [variant for variant in VARIANTS if training_of(variant) == training]


def describe(training: str) -> dict[str, object]:
    """What a training and its evaluations depend on besides sizes, as JSON values."""
    return {variant: asdict(VARIANTS[variant]) for variant in read_from(training)}
