"""The trainings that are compared: DEPT's variants, and centralised training; what a run is given and returns."""

from dataclasses import dataclass
from math import inf
from statistics import mean
from typing import Literal, TypedDict

Vocabulary = Literal["joint", "trimmed", "own"]
"""The joint tokenizer, the part of it that a language's text holds, or a tokenizer of the language's own."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the comparison."""

    label: str
    vocabulary: Vocabulary
    embeddings: Literal["full", "sparse_rows", "local"] | None
    """How the sites share embedding and head; None: there are no sites, gradients are averaged in every step."""


# Keys are those of titan_ext.models.dept.cost.
ARMS: dict[str, Arm] = {
    "std": Arm("STD", "joint", None),
    "glob": Arm("GLOB", "joint", "full"),
    "trim": Arm("TRIM", "trimmed", "sparse_rows"),
    "spec": Arm("SPEC", "trimmed", "local"),
    "spec-opt": Arm("SPEC-OPT", "own", "local"),
}
STANDARD = "std"
"""What the others are compared with."""


def describe(arm: str) -> list[str | None]:
    """What a run of an arm depends on besides sizes, as JSON values."""
    return [ARMS[arm].vocabulary, ARMS[arm].embeddings]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    corpus: str
    """A folder with one folder a language, in which files ``train*`` and ``valid*`` lie."""
    languages: tuple[str, ...]
    """One for each site."""
    unseen: str
    """The language that the bodies adapt to in the end."""
    dim: int
    layers: int
    vocab_size: int
    """Tokens of a language's own tokenizer."""
    joint_vocab_size: int
    """Tokens of the tokenizer of all languages of the sites."""
    steps: int
    """Inner steps of the pre-training (N), a multiple of ``sync_every``."""
    sync_every: int
    """Inner steps of a round (N_local)."""
    keep_inner_state: bool
    """Whether the inner optimizer goes on with its moments after a round; the paper's starts anew."""
    batch: int
    """Sequences that a site trains on in a step."""
    length: int
    """Tokens of a sequence."""
    continued_steps: int
    """Steps of the continued pre-training (N_CT)."""
    adapt_steps: int
    """Steps of the adaptation to the unseen language."""
    adapt_lr: float
    """Learning rate of both, for all arms."""
    device: str


class Measured(TypedDict):
    """Validation losses of one training."""

    steps: list[int]
    """Those after which it was measured."""
    losses: dict[str, list[float | None]]
    """By language: cross-entropy in nats a token at each of the steps; None where it is no number."""
    unigram: dict[str, float]
    """By language: cross-entropy of the unigram model of its training text on the same tokens (UNIGRAM-CE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    pretrained: Measured
    """Each site's language after the last round, with the embedding that it was trained with."""
    continued: Measured
    """The languages of the sites during the continued pre-training."""
    adapted: Measured
    """The unseen language during the adaptation."""
    body: int
    """Parameters besides embedding and head."""
    joint_vocabulary: int
    """Tokens of the joint tokenizer."""
    vocabularies: list[int]
    """Tokens of each site's vocabulary, without padding."""
    embeddings: list[int]
    """Parameters of each site's embedding (and head, which is the same matrix), with padding."""
    bytes_a_round: list[int]
    """Bytes that each site sends in the steps of a round of the pre-training."""
    tokens_sha256: str
    """Hash of what continued pre-training and adaptation trained on, in order."""
    seconds: float
    cpu_seconds: float

    @property
    def loss(self) -> float:
        """Mean unigram-normalised validation loss after the continued pre-training; infinite if it diverged."""
        return mean_normalised(self.continued)[-1]


def normalised(measured: Measured, language: str) -> list[float]:
    """Unigram-normalised loss of a language at each step, in nats a token; infinite where it is no number."""
    unigram = measured["unigram"][language]
    return [inf if loss is None else loss - unigram for loss in measured["losses"][language]]


def mean_normalised(measured: Measured) -> list[float]:
    """Its mean over the languages at each step."""
    return [mean(each) for each in zip(*(normalised(measured, language) for language in measured["losses"]))]
