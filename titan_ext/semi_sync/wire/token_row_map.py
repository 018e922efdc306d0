"""Which row of the run's table each row of a site's own table is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class TokenRowMap:
    """The rows that a site holds of a table which all sites share by row.

    Raises:
        ValueError: an id out of range, or twice.
    """

    ids: torch.Tensor
    """int64 ``[rows]`` on the CPU: the global row of each own row; -1 for one that is this site's alone."""

    total: int
    """Rows of the whole table."""

    of: str = ""
    """What the global rows stand for, equal at all sites: such as the hash of a tokenizer."""

    def __post_init__(self) -> None:
        held = self.held
        if held.numel() and not (0 <= int(held.min()) and int(held.max()) < self.total):
            raise ValueError(f"row ids from {int(held.min())} to {int(held.max())}: must be from 0 to {self.total - 1}")
        if held.unique().numel() != held.numel():
            raise ValueError("row ids: two rows of a table are the same global row")

    @classmethod
    def all(cls, rows: int) -> "TokenRowMap":
        """Of a site that holds every row."""
        return cls(torch.arange(rows), rows)

    @property
    def held(self) -> torch.Tensor:
        """Global rows that the site shares, in the order of its own table."""
        return self.ids[self.ids >= 0]

    @property
    def rows(self) -> int:
        """Rows of the site's own table."""
        return self.ids.numel()
