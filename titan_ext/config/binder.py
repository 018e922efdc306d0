"""Strict binding of tables onto dataclasses, by their type hints."""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from titan_ext.config.findings import SettingError
from titan_ext.config.flags import FlagText
from titan_ext.config.renamed import renamed_value
from titan_ext.config.settings import UNSET, Settings, hint, one_line
from titan_ext.config.unknown import unknown_key
from titan_ext.errors import InvalidValue, UserError, gather_invalid

_COMPLAINT = re.compile(r"^(?:\w+\.)?(\w+) = .*?: (.*)$", re.DOTALL)
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_INTEGERS, _FLOATS = 2**63, (1e-38, 1e38)
# Where infinity turns something off; an optimizer judges its own.
_INFINITE = ("training.max_norm", "optimizer.")
_GIVEN = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", dict: "a table"}


class Binder:
    """Binds the settings of one site; every refusal is one line that names the key.

    Where the settings gather complaints, the rest of a table is still bound.

    Args:
        settings: where values come from and how errors are worded.
        elsewhere: keys of all sections by name, to point at the right section for a misplaced key.
    """

    def __init__(self, settings: Settings, elsewhere: Mapping[str, list[str]] | None = None) -> None:
        self._settings = settings
        self._elsewhere = elsewhere or {}

    def section(self, key: str, base: Any) -> Any:
        """``base`` (an instance, or a class) with what is set under the dotted ``key``."""
        table = self._settings.table(key)
        return self.table(base, table, key) if table or isinstance(base, type) else base

    def table(self, base: Any, table: Mapping[str, Any], key: str) -> Any:
        """A dataclass instance from ``base`` (an instance, or a class) and a table.

        Raises:
            UserError: an unknown key, a wrong type or value, or the dataclass's own check.
        """
        owner = base if isinstance(base, type) else type(base)
        hints = field_types(owner)
        values: dict[str, Any] = {}
        refused: dict[str, UserError] = {}
        for name, given in table.items():
            try:
                if name not in hints:
                    raise unknown_key(self._settings, key, name, hints, self._elsewhere, given)
                values[name] = self.value(hints[name], given, f"{key}.{name}", getattr(base, name, UNSET))
            except UserError as error:
                refused[name] = error
                self._settings.refuse(error)
        required = _required(owner) if base is owner else []
        for name in [name for name in required if name not in table]:
            refused[name] = self._settings.error(f"{key}.{name}", "is missing")
            self._settings.refuse(refused[name])
        for name in [name for name in required if name in refused]:
            raise refused[name]  # without it nothing can be built, and Python's words of that are not news

        def build(names: Iterable[str]) -> Any:
            chosen = {name: values[name] for name in names}
            return owner(**chosen) if base is owner else dataclasses.replace(base, **chosen)

        while True:
            try:
                return self.guard(key, owner, lambda: build(values), lambda: _culprit(build, values))
            except SettingError as error:
                blamed = error.key.removeprefix(f"{key}.")
                if self._settings.findings is None or blamed not in values or blamed in required:
                    raise
                # Its dataclass stops at the first: without it, the next one shows.
                self._settings.refuse(error)
                del values[blamed]
                try:
                    with self._settings.raising():
                        self.guard(key, owner, lambda: build(values))
                except SettingError as again:
                    if again.key == error.key:  # it cannot do without: what it says of its default is not news
                        raise error from None

    def guard(
        self, key: str, owner: Any, build: Callable[[], Any], culprit: Callable[[], str | None] = lambda: None
    ) -> Any:
        """``build()``, with the complaint of a dataclass's own check as our one line.

        Args:
            key: the section that is built.
            owner: its class.
            build: what may raise ``ValueError`` and the like.
            culprit: finds the field that is to blame, if only one can be.
        """
        try:
            with gather_invalid() as invalid:
                built = build()
        except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
            raise self._complaint(key, owner, str(error), culprit()) from None
        if not invalid:
            return built
        for place, each in enumerate(invalid):
            # What is said next of values that the user did not set follows from the first.
            if place == 0 or "[" in each.key or self._settings.get(_dotted(key, each), UNSET) is not UNSET:
                self._settings.refuse(self._invalid(key, each))
        raise self._invalid(key, invalid[0])

    def _invalid(self, section: str, invalid: InvalidValue) -> UserError:
        dotted = _dotted(section, invalid)
        given = self._settings.get(dotted, invalid.value if "[" in dotted else UNSET)
        return self._settings.error(dotted, invalid.problem, given)

    def _complaint(self, key: str, owner: Any, message: str, culprit: str | None) -> UserError:
        """Somebody else's message about a section, placed at the key that it speaks of."""
        message = one_line(message)
        names = list(field_types(owner)) if dataclasses.is_dataclass(owner) else []
        match = _COMPLAINT.match(message)
        if match and match.group(1) in names:
            name, message = match.groups()
        elif culprit is not None:
            name = culprit
        else:
            spoken = [name for name in names if re.search(rf"(?<!\w){name}(?!\w)", message, re.IGNORECASE)]
            chosen = [name for name in spoken if self._settings.get(f"{key}.{name}", UNSET) is not UNSET]
            name = next(iter(chosen or spoken), None)
        if name is None:
            return self._settings.error(key, message)
        dotted = f"{key}.{name}"
        return self._settings.error(dotted, message, self._settings.get(dotted, UNSET))

    def value(self, expected: Any, given: Any, key: str, base: Any = UNSET) -> Any:
        """``given`` as the type ``expected``; a table lands on ``base`` where that is a dataclass."""
        origin, arguments = get_origin(expected), get_args(expected)
        if origin is Annotated:
            return self.value(arguments[0], given, key, base)
        if isinstance(given, FlagText):
            return self._flag(expected, given, key, base)
        if dataclasses.is_dataclass(base) and isinstance(given, Mapping):
            return self.table(base, given, key)
        if expected is Any or expected is object:
            return given
        if origin in (Union, types.UnionType):
            return self._union(arguments, given, key, base)
        if origin is Literal:
            return self._literal(arguments, given, key)
        if expected in _KINDS:
            return self._scalar(expected, given, key)
        if dataclasses.is_dataclass(expected):
            if not isinstance(given, Mapping):
                raise self._wrong(expected, given, key)
            return self.table(expected, given, key)
        if isinstance(expected, type) and issubclass(expected, Enum):
            return self._enum(expected, given, key)
        return self._container(expected, origin or expected, arguments, given, key)

    def _scalar(self, expected: type, given: Any, key: str) -> Any:
        if expected is float and isinstance(given, int) and not isinstance(given, bool):
            return float(given)
        if not isinstance(given, expected) or (expected is int and isinstance(given, bool)):
            raise self._wrong(expected, given, key)
        self._check_value(expected, given, key)
        return given

    def _check_value(self, expected: type, given: Any, key: str) -> None:
        """Refuse a value of the right type that is none that anything can be set to."""
        if isinstance(given, float) and math.isnan(given):
            raise self._settings.error(key, "must be a number, got nan")
        if (problem := _no_value(expected, given, key)) is not None:
            raise self._settings.error(key, problem, given)

    def _literal(self, allowed: tuple, given: Any, key: str) -> Any:
        for each in allowed:
            if each == given and type(each) is type(given):
                return each
        problem = renamed_value(key, given) or f"not one of the values; {hint(str(given), map(str, allowed))}"
        raise self._settings.error(key, problem, given)

    def _enum(self, expected: type[Enum], given: Any, key: str) -> Any:
        for member in expected:
            if given in (member.value, member.name):
                return member
        names = [str(member.value) for member in expected]
        raise self._settings.error(key, f"not one of the values; {hint(str(given), names)}", given)

    def _union(self, arms: tuple, given: Any, key: str, base: Any) -> Any:
        if type(None) in arms and (given is None or given == "none"):
            return None
        arms = tuple(arm for arm in arms if arm is not type(None))
        if len(arms) == 1:
            return self.value(arms[0], given, key, base)
        if isinstance(given, float):
            self._check_value(float, given, key)
        for arm in arms:
            with contextlib.suppress(UserError), self._settings.raising():
                return self.value(arm, given, key, base)
        raise self._wrong(Union[arms], given, key)  # noqa: UP007 — of a tuple

    def _container(self, expected: Any, kind: Any, arguments: tuple, given: Any, key: str) -> Any:
        if kind is dict and isinstance(given, Mapping):
            inner = arguments[1] if arguments else Any
            return {name: self.value(inner, each, f"{key}.{name}") for name, each in given.items()}
        if kind in (list, tuple, typing.Sequence, Iterable) and isinstance(given, (list, tuple)):
            return self._sequence(expected, kind, arguments, given, key)
        if kind not in (dict, list, tuple):
            raise self._settings.error(key, "cannot be set from a configuration file")
        raise self._wrong(expected, given, key)

    def _sequence(self, expected: Any, kind: Any, arguments: tuple, given: list | tuple, key: str) -> Any:
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(arguments) != len(given):
                raise self._wrong(expected, given, key)
            inner = list(arguments)
        else:
            inner = [arguments[0] if arguments else Any] * len(given)
        pairs = enumerate(zip(inner, given, strict=True))
        values = [self.value(kind_, each, f"{key}[{place}]") for place, (kind_, each) in pairs]
        return tuple(values) if kind is tuple else values

    def _flag(self, expected: Any, text: FlagText, key: str, base: Any) -> Any:
        if text.bare and not _accepts(expected, bool):
            raise self._settings.error(key, f"needs a value: {describe(expected)}")
        literal = text.literal()
        if _accepts(expected, str) and not isinstance(literal, str):
            strings = [arm for arm in _arms(expected) if arm is str or get_origin(arm) is Literal]
            if len(strings) == len([arm for arm in _arms(expected) if arm is not type(None)]):
                literal = str(text)
        if _accepts(expected, bool) and text.lower() in ("true", "false"):
            literal = text.lower() == "true"
        if isinstance(literal, str) and _accepts(expected, float):
            try:
                literal = float(literal)
            except ValueError:
                pass
        return self.value(expected, literal, key, base)

    def _wrong(self, expected: Any, given: Any, key: str) -> UserError:
        kind = next((name for type_, name in _GIVEN.items() if type(given) is type_), type(given).__name__)
        return self._settings.error(key, f"must be {describe(expected)}, got {kind}", given)


def _no_value(expected: type, given: Any, key: str) -> str | None:
    """Why a value that is of the right type, and no NaN, cannot be; None if it can."""
    if isinstance(given, str):
        return "must be without the character NUL" if "\0" in given else None
    if expected is int:
        return None if -_INTEGERS <= given < _INTEGERS else "must be from -2**63 to below 2**63"
    if not isinstance(given, float):
        return None
    if math.isinf(given):
        return None if key.startswith(_INFINITE) else "must be finite"
    # Where it is used it is a number of 32 bits: infinite if larger, zero if smaller.
    smallest, largest = _FLOATS
    return None if given == 0 or smallest <= abs(given) <= largest else f"must be 0 or from {smallest} to {largest}"


def _field_types(owner: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(owner, include_extras=True)
    except NameError:  # a name that exists only for type checkers
        hints = {}
    return {
        each.name: hints.get(each.name, each.type)
        for each in dataclasses.fields(owner)
        if each.init and not each.name.startswith("_")
    }


field_types: Callable[[Any], dict[str, Any]] = cache(_field_types)
"""Types of a dataclass's public fields by name, in order; takes the class."""


def describe(expected: Any) -> str:
    """A type in words: ``a list of strings``."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return describe(arguments[0])
    if expected in _KINDS:
        return _KINDS[expected]
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join('"none"' if arm is type(None) else describe(arm) for arm in arguments)
    if (origin or expected) in (list, tuple):
        inner = [describe(each) for each in arguments if each is not Ellipsis]
        return f"a list of {_plural(inner[0])}" if inner else "a list"
    return "a table" if (origin or expected) is dict or dataclasses.is_dataclass(expected) else str(expected)


def _dotted(section: str, invalid: InvalidValue) -> str:
    # A place in a list of tables belongs to the key; the name of a section may be another one's of its kind.
    key = invalid.key if "[" in invalid.key else invalid.key.rpartition(".")[2]
    return f"{section}.{key}"


def _plural(kind: str) -> str:
    first, _, rest = kind.removeprefix("a ").removeprefix("an ").partition(" ")
    return f"{first}s {rest}".strip() if kind.startswith("a") else f"values, each {kind}"


def _arms(expected: Any) -> tuple:
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def _accepts(expected: Any, kind: type) -> bool:
    arms = _arms(expected)
    return kind in arms or any(
        get_origin(arm) is Literal and any(type(each) is kind for each in get_args(arm)) for arm in arms
    )


def _culprit(build: Callable[[Iterable[str]], Any], names: Iterable[str]) -> str | None:
    """The one name without which ``build`` succeeds; None if there are several or none."""
    guilty = []
    for name in names:
        try:
            build([other for other in names if other != name])
        except (ValueError, AssertionError, TypeError, NotImplementedError):
            continue
        guilty.append(name)
    return guilty[0] if len(guilty) == 1 else None


def _required(owner: type) -> list[str]:
    return [
        each.name
        for each in dataclasses.fields(owner)
        if each.init and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
