"""What a check has found."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much it matters."""

    OK = "ok"
    NOTE = "note"
    """Nothing is wrong, or it could not be told."""
    WARNING = "warning"
    """It will hurt under circumstances that come."""
    PROBLEM = "problem"
    """The run will not work."""


SERIOUS = (Level.WARNING, Level.PROBLEM)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at, in a word or two."""
    level: Level
    what: str
    """What was found, with numbers."""
    why: str = ""
    """Why it will hurt."""
    mend: str = ""
    """The line of TOML, or the command, that mends it."""


def ok(check: str, what: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, what)
