"""All that is wrong with a file, and what this machine lacks for it, gathered before anybody is told."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from titan_ext.errors import UserError


class Need(StrEnum):
    """What a run takes from the machine that it runs on."""

    TOKENIZER = "tokenizer"
    VOCABULARY = "vocabulary"
    DATA = "data"
    WEIGHTS = "weights"
    MODEL = "model"
    DEVICE = "device"
    PACKAGE = "package"
    FILE = "file"
    STORE = "store"


TO_BUILD = frozenset({Need.TOKENIZER, Need.VOCABULARY, Need.MODEL})
"""Without these a site's model has no known size: commands that only load a model ask for no more."""

TO_TRAIN = frozenset(Need) - {Need.STORE}
"""A store that is away when a site starts is waited for."""

TO_START = frozenset(Need) - {Need.VOCABULARY}
"""What a user must bring; a vocabulary is found when a site first starts."""


class SettingError(UserError):
    """A complaint about one key.

    Args:
        text: the whole line.
        key: dotted; empty where it is about the file.
        everywhere: the line without the site's name.
    """

    def __init__(self, text: str, key: str = "", everywhere: str = "") -> None:
        super().__init__(text)
        self.key = key
        self.everywhere = everywhere or text
        self.of_older_torchtitan = False

    def of_all_sites(self) -> "SettingError":
        """The complaint where every site has it."""
        self.args = (self.everywhere,)
        return self


class Missing(SettingError):
    """The file may be right, but this machine lacks what it names."""

    def __init__(self, text: str, key: str, need: Need, everywhere: str = "") -> None:
        super().__init__(text, key, everywhere)
        self.need = need


class Mistakes(UserError):
    """Several complaints as one error: a headline and a line for each."""


@dataclass(slots=True)
class Findings:
    """Complaints, each once, in the order in which they were found."""

    mistakes: dict[str, UserError] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)

    doubtful: set[str] = field(default_factory=set)
    """Keys, or ``section.``, that do not hold what the user meant to set."""

    _consequences: bool = False

    def add(self, error: UserError) -> None:
        """Note a complaint, unless it may only follow from one that was noted."""
        if isinstance(error, Mistakes):
            return  # a list of what has been noted
        text = str(error)
        if self._consequences and self._may_follow(text, getattr(error, "key", "")):
            return
        if isinstance(error, Missing):
            self.missing.setdefault(text, error)
        else:
            self.mistakes.setdefault(text, error)
            self.doubt(getattr(error, "key", ""))

    def _may_follow(self, text: str, key: str) -> bool:
        return key in self.doubtful or any("." in each and each in text for each in self.doubtful)

    def doubt(self, *keys: str) -> None:
        """Say that keys do not hold what the user meant: what is found of them later is not news."""
        self.doubtful.update(key for key in keys if key)

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Note the complaint that ends the block early."""
        try:
            yield
        except UserError as error:
            self.add(error)

    @contextmanager
    def check(self) -> Iterator[None]:
        """As ``catch``, for a check over values that are bound: it may stumble over a doubtful one in any way."""
        before, self._consequences = self._consequences, True
        try:
            with self.catch():
                yield
        except Exception:
            if not self.mistakes:
                raise
        finally:
            self._consequences = before

    def take(self, sites: Sequence["Findings"]) -> None:
        """Add what each site has found; a complaint that all of them have is told once, without their names."""
        every = [error for site in sites for error in (*site.mistakes.values(), *site.missing.values())]
        shared = Counter(error.everywhere for error in every if isinstance(error, SettingError))
        for error in every:
            if isinstance(error, SettingError) and shared[error.everywhere] == len(sites) > 1:
                error = error.of_all_sites()
            self.add(error)

    def lacking(self, needs: Collection[Need]) -> list[Missing]:
        """What is missing of these needs."""
        return [each for each in self.missing.values() if each.need in needs]

    def enforce(self, file: str, needs: Collection[Need] = ()) -> None:
        """Raise whatever stands in the way.

        Args:
            file: for the headline.
            needs: what must be there; beside mistakes all that the user must bring is listed.

        Raises:
            UserError: there are mistakes, or one of the needs is missing.
        """
        if not self.mistakes and not self.lacking(needs):
            return
        missing = self.lacking(TO_START if self.mistakes else needs)
        every = [*self.mistakes.values(), *missing]
        if len(every) == 1:
            raise every[0]
        headline = f"{file}: {_headline(len(self.mistakes), len(missing))}{self._advice(file)}"
        raise Mistakes("\n".join([headline, *self._lines(missing)]))

    def _advice(self, file: str) -> str:
        if sum(getattr(each, "of_older_torchtitan", False) for each in self.mistakes.values()) < 2:
            return ""
        return f" (for a file of torchtitan 0.1 or 0.2: titan-ext migrate {file} -o NEW.toml)"

    def _lines(self, missing: list[Missing]) -> list[str]:
        lines = [f"  {text}" for text in self.mistakes]
        return lines + missing_lines(missing) if lines else missing_lines(missing)[1:]


def missing_lines(missing: Collection[Missing]) -> list[str]:
    """The list of what this machine lacks; empty for nothing."""
    return ["missing on this machine:", *(f"  {each}" for each in missing)] if missing else []


def counted(count: int, word: str) -> str:
    """``1 mistake``, ``2 mistakes``."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def _headline(mistakes: int, missing: int) -> str:
    lacking = f"{counted(missing, 'thing')} missing on this machine"
    if not mistakes:
        return lacking
    return counted(mistakes, "mistake") + (f", {lacking}" if missing else "")
