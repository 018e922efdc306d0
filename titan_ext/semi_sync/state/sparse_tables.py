"""Tables of which each site holds some rows: the mean of a row is over the sites that hold it.

DEPT's TRIM (arXiv 2410.05021, section 2.2): contributions are scattered to the whole table and averaged
without the zeros of sites that do not have the row. A row that nobody contributes stays as it is, and so does
all that an outer optimizer keeps of it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from titan_ext.semi_sync.plan.plan import SyncRow
from titan_ext.semi_sync.site.shards import Piece, piece_of
from titan_ext.semi_sync.state.outer_optimizers import build_outer_optimizer
from titan_ext.semi_sync.state.synced_parameters import GlobalRow
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow
from titan_ext.semi_sync.state.token_row_map import RowIds
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.wire.sparse_reductions import RowAdoption, RowReduction

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig


class ByRow(SyncedRow):
    """What rows of a plan have in common that are shared by row; the message ends with each row's weight.

    Args:
        row: the plan's row.
        names: the tables of the row's scope that this rank holds, in an order equal at all sites.
        view: this rank's tensors.
        config: resolved settings of the scope.
        device: where the row's own memory lies; None is where the parameters are.
        row_ids: the global row of each row of the site's tables; None takes tables that are whole everywhere.
    """

    agrees = False
    by_row = True

    def __init__(
        self,
        row: SyncRow,
        names: Sequence[str],
        view: ModelView,
        config: "SemiSyncConfig",
        device: torch.device | None = None,
        *,
        row_ids: RowIds | None = None,
    ) -> None:
        super().__init__(row, names, view, config, device)
        self.codec, self.bucket_elements = config.build_codec(), max(1, int(config.bucket_mib * 2**18))
        self._outer_name, self._outer_settings = config.outer_optimizer, config.outer_settings()
        self.row_ids = row_ids or RowIds.all(max((shape[0] for shape in self._shapes), default=0))
        self.plain_numbers = self.row_ids.rows
        self._pieces: list[Piece] | None = None

    @property
    def feeds_back(self) -> bool:
        """As the settings say: its reduction has the configured codec."""
        return self._error_feedback

    def agreed_shape(self, shape: Sequence[int]) -> tuple[object, ...]:
        """Of the whole run's table, and what its rows stand for."""
        return (self.row_ids.of, self.row_ids.total, *shape[1:])

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """The values, and 1 for each row that the site shares."""
        values, numbers = self._halves(out)
        super().write(values, clock)
        numbers.copy_(self.row_ids.ids >= 0)

    def named_parts(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A message by parameter, and the weights of the rows under a name of their own."""
        values, numbers = self._halves(flat)
        parts = {name: self.with_global_shape(name, part) for name, part in zip(self.names, self.split(values))}
        return parts | {_WEIGHTS: numbers}

    @torch.no_grad()
    def fill_from_parts(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_parts``, into ``flat``."""
        values, numbers = self._halves(flat)
        super().fill_from_parts(values, parts)
        numbers.copy_(parts[_WEIGHTS])

    def _halves(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """Values ``[elements]`` and numbers ``[rows]`` of a message."""
        return flat.split([self.elements, self.plain_numbers])

    def _mean(self, total: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each local tensor the mean over the holders, in place of the sum, and the rows that have one, as bool."""
        values, numbers = self._halves(total)
        parts, has = self.split(values), []
        for part, weights in zip(parts, self._local_rows(numbers)):
            has.append(weights > 0)
            part.div_(weights.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (part.dim() - 1)))
        return parts, has

    def _local_rows(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """A number for each row of the table as numbers for the rows of each local tensor."""
        if self._pieces is None:
            self._pieces = [piece_of(self.view.parameters[name]) for name in self.names]
        return [Piece((self.row_ids.rows,), piece.runs[:1]).take(numbers) for piece in self._pieces]


_WEIGHTS = "weights of the rows"


class StateByRow(ByRow):
    """An optimizer's state; a row that nobody contributed keeps this site's own."""

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """The mean of each row over the sites that hold it."""
        for local, part, has in zip(self.locals(), *self._mean(total)):
            local[has] = part[has].to(local)


class ParametersByRow(ByRow, GlobalRow):
    """Parameters with a global copy of the site's own rows.

    A newcomer cannot take rows from one member: each holds others. It adopts them in a round, every row from the
    site that is furthest among those that hold it.
    """

    adopts = True

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """Move the rows that have a mean; the local parameters follow the global copy."""
        if not self.elements:
            return
        _, has = self._mean(total)
        kept = [
            (tensor, ~rows, tensor[~rows])
            for part, rows in zip(self.global_parts, has)
            if not rows.all()
            for tensor in (part, *self._outer_tensors(part).values())
        ]
        self.move_global(self._halves(total)[0])
        for tensor, rows, values in kept:
            tensor[rows] = values
        self._mix_into_local()

    def update_norm(self, contribution: torch.Tensor) -> float:
        return super().update_norm(self._halves(contribution)[0])

    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        super().damp(self._halves(contribution)[0], factor, weight)

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """What the outer optimizer keeps beside tensors: the rows themselves are no one site's to give."""
        return {
            name: {key: value for key, value in self._outer_state(part).items() if not _of_rows(value, part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    def private_state(self) -> dict[str, dict[str, Any]]:
        """The global values of the rows this site holds, and the outer optimizer's tensors."""
        return {
            name: {"global": part, **self._outer_tensors(part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    @torch.no_grad()
    def offered(self) -> list[torch.Tensor]:
        """Messages (fp32 ``[numel]``) with all that a newcomer adopts: the values, then each outer state."""
        messages = []
        for tensors in self._adoptable():
            message = torch.empty(self.numel, dtype=torch.float32, device=self.device)
            values, numbers = self._halves(message)
            if self.elements:
                torch._foreach_copy_(self.split(values), tensors)
            numbers.copy_(self.row_ids.ids >= 0)
            messages.append(message)
        return messages

    @torch.no_grad()
    def adopt(self, messages: Sequence[torch.Tensor]) -> None:
        """Take rows as other sites have them, and drop local work."""
        for tensors, message in zip(self._adoptable(), messages, strict=True):
            values, numbers = self._halves(message)
            for tensor, part, held in zip(tensors, self.split(values), self._local_rows(numbers)):
                tensor[held > 0] = part[held > 0].to(tensor)
        self.reset_local_to_global()

    def _adoptable(self) -> list[list[torch.Tensor]]:
        states = [self._outer_tensors(part) for part in self.global_parts]
        return [list(self.global_parts), *([state[key] for state in states] for key in self._outer_keys())]

    def _outer_keys(self) -> list[str]:
        """Tensors of the outer optimizer's state; known also to a rank that has none of the tables."""
        if not self.row.outer_optimizer:
            return []
        probe = torch.zeros(1, 1)
        state = build_outer_optimizer(self._outer_name, [probe], self._outer_settings).state[probe]
        return sorted(f"outer.{key}" for key, value in state.items() if _of_rows(value, probe))

    def _outer_tensors(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self._outer_state(part).items() if _of_rows(value, part)}


def _of_rows(value: Any, part: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == part.shape


def reduce_by_row(row: ByRow, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Give a row the reductions by which its tables travel.

    Args:
        row: bound to this rank.
        names: the tables of its scope, on whatever rank.
        sizes: elements of each whole parameter.

    Raises:
        ValueError: a table of the scope has other rows than the site's vocabulary, or another width.
    """
    rows = row.row_ids.rows
    widths = {name: sizes[name] / rows if rows else 0.0 for name in names}
    for name, width in widths.items():
        if not rows or width != int(width):
            raise ValueError(
                f'scopes ({row.row.scope}): {name} ({sizes[name]} elements) is shared by row, but the site has {rows} row ids'
            )
        if width != widths[names[0]]:
            raise ValueError(f"scopes ({row.row.scope}): {name} and {names[0]} differ in width; give each a scope")
    width = int(widths[names[0]])
    row.reduction = RowReduction(row.row_ids, width, row.codec, row.bucket_elements)
    row.adoption = RowAdoption(row.row_ids, width, None, row.bucket_elements)
