"""How a command ends badly without it being a bug of ours, and the words of what is refused.

Importable without torch: the outer loop's settings use it where torchtitan is not installed.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user gave cannot work: reported as one line, exit code 2, which the launcher does not restart."""

    exit_code = 2


class BadRecord(UserError):
    """A document of a corpus cannot be used. The rank that reads it meets it alone, and would again after a restart."""


class RunError(RuntimeError):
    """The world outside failed (a lighthouse, a disk, a peer): reported as one line, exit code 1; may be restarted."""

    exit_code = 1


class ReadError(RunError):
    """A corpus cannot be read at the moment: the disk or the network failed, and a restart may find it well again."""


class InvalidValue(UserError):
    """A setting outside of what is allowed, as a dataclass's own ``validate`` finds it.

    Args:
        key: the field, with or without its section.
        value: what it holds.
        problem: what is wrong: ``must be at least 1``.
    """

    def __init__(self, key: str, value: object, problem: str) -> None:
        super().__init__(f"{key} = {value!r}: {problem}")
        self.key = key
        self.value = value
        self.problem = problem


_gathered: ContextVar[list[InvalidValue] | None] = ContextVar("gathered", default=None)


@contextmanager
def gather_invalid() -> Iterator[list[InvalidValue]]:
    """Let ``require`` and ``require_one_of`` note what they refuse, and go on; one that is raised is noted too.

    Checks that follow a note may fail for its sake: what else they raise is dropped.
    """
    found: list[InvalidValue] = []
    token = _gathered.set(found)
    try:
        yield found
    except InvalidValue as error:
        found.append(error)
    except Exception:
        if not found:
            raise
    finally:
        _gathered.reset(token)


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Refuse a value.

    Args:
        holds: whether it is allowed.
        key: the field.
        value: what it holds.
        allowed: completes "must be".

    Raises:
        InvalidValue: it is not, unless ``gather_invalid`` notes it.
    """
    if not holds:
        refuse(InvalidValue(key, value, f"must be {allowed}"))


def require_one_of(key: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value that is none of those allowed, with the nearest of them; raises as ``require``."""
    names = [str(each) for each in allowed]
    if str(value) not in names:
        refuse(InvalidValue(key, value, one_of(value, names)))


def one_of(value: object, allowed: Iterable[object]) -> str:
    """The complaint about a value that is none of those allowed."""
    names = [str(each) for each in allowed]
    close = nearest(str(value), names)
    return f"must be one of {', '.join(names)}" + (f" (did you mean {close!r}?)" if close else "")


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that a user most likely meant, if any is near.

    Case does not count. Numbers do: "7B" is not a misspelt "70B", nor "int4" an "int8".
    """
    folded = {each.lower(): each for each in allowed if _numbers(each) == _numbers(name)}
    close = get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def refuse(invalid: InvalidValue) -> None:
    """Raise it, unless ``gather_invalid`` notes it."""
    found = _gathered.get()
    if found is None:
        raise invalid
    found.append(invalid)
