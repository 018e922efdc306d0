"""What becomes of documents that cannot be used."""

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from titan_ext.errors import BadRecord

OnBadRecord = Literal["error", "skip"]


class BadRecords:
    """Reads documents, and leaves out or refuses those that cannot be used.

    Args:
        action: "error" refuses, "skip" leaves out and counts.
        tell: is given the count so far and what is wrong, for each that is left out.

    Attributes:
        count: documents that were left out.
        empty: records without a text, which are no documents.
    """

    def __init__(self, action: OnBadRecord, tell: Callable[[int, str], None] | None = None) -> None:
        self._action = action
        self._tell = tell or _log
        self.count = 0
        self.empty = 0

    def text(self, read: Callable[[], str], where: str = "a record", may_be_empty: bool = False) -> str:
        """What ``read`` returns; empty, which is no document, where it is left out.

        Args:
            read: raises BadRecord for what cannot be used.
            where: which document it is, for a text in which no format finds anything wrong.
            may_be_empty: a text that is empty is nothing to tell of.

        Raises:
            BadRecord: it cannot be used, and is not to be left out.
        """
        try:
            text = read()
            if "\0" in text:
                raise BadRecord(f"data: {where}: its text has NUL characters, as binary data has")
            if not text and not may_be_empty:
                self._pass_over(where)
            return text
        except BadRecord as error:
            if self._action == "error":
                raise BadRecord(f"{error}; data.on_bad_record = 'skip' leaves such documents out") from None
            self.leave_out([str(error)])
            return ""

    def _pass_over(self, where: str) -> None:
        self.empty += 1
        if _is_told(self.empty):
            logging.getLogger().warning(
                "data: %s has no text (it is empty, or null) and is passed over, %d so far", where, self.empty
            )

    def leave_out(self, problems: Iterable[str]) -> None:
        """Counts and tells documents that are left out, by what is wrong with each."""
        for problem in problems:
            self.count += 1
            self._tell(self.count, problem)


def _log(count: int, problem: str) -> None:
    if _is_told(count):
        logging.getLogger().warning("%s: left out (data.on_bad_record), %d so far", problem, count)


def _is_told(count: int) -> bool:
    """The first few, then ever fewer: each power of two."""
    return count & (count - 1) == 0
