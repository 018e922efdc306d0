"""The trainings that are compared: DEPT's variants, and centralised training on the mixture."""

from dataclasses import dataclass
from typing import Literal

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
