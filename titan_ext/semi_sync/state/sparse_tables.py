"""Tables of which each site holds some rows: the mean of a row is over the sites that hold it.

DEPT's TRIM (arXiv 2410.05021, section 2.2): contributions are scattered to the whole table and averaged
without the zeros of sites that do not have the row. A row that nobody contributes stays as it is, and so does
all that an outer optimizer keeps of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule
from titan_ext.semi_sync.site.shards import Piece, piece_of
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState, TakenFromPeers
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.codecs import Float32
from titan_ext.semi_sync.wire.sparse_reductions import SparseReduction, SparseTransfer
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseRows(Apply):
    """Each row of a table is averaged over the sites that hold it, and then applied as ``inner`` says."""

    inner: Apply

    @property
    def optimizer(self) -> Any:
        """The outer optimizer of ``inner``; None where the mean is the value."""
        return getattr(self.inner, "optimizer", None)

    @property
    def mixing(self) -> float:
        """That of ``inner``."""
        return getattr(self.inner, "mixing", 0.0)

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """A table of parameters, or of an optimizer's state."""
        kind = SparseParameters if rule.state == PARAMETERS else SparseState
        return kind(rule, tensors, options)


class SparseTable(SyncedState):
    """A table's state of which each site shares the rows that it holds; the message ends with each row's weight.

    Args:
        rule: the plan's rule.
        tensors: the tables of its scope that this rank holds.
        options: the global row of each row of the site's tables.
    """

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self.token_rows = options.token_rows or TokenRowMap.all(max((shape[0] for shape in tensors.shapes), default=0))
        self.plain_numbers = self.token_rows.rows
        self._pieces: list[Piece] | None = None

    @property
    def feeds_back(self) -> bool:
        """As the rule says: its reduction has the rule's codec."""
        return self.rule.wire.error_feedback

    def agreed_shape(self, shape: Sequence[int]) -> tuple[object, ...]:
        """Of the whole run's table, and what its rows stand for."""
        return (self.token_rows.of, self.token_rows.total, *shape[1:])

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The values, and 1 for each row that the site shares."""
        values, numbers = self._halves(out)
        super().write(values, step)
        numbers.copy_(self.token_rows.ids >= 0)

    def named_message(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A message by parameter, and the weights of the rows under a name of their own."""
        values, numbers = self._halves(flat)
        return self.tensors.named(values) | {_WEIGHTS: numbers}

    @torch.no_grad()
    def fill_message(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_message``, into ``flat``."""
        values, numbers = self._halves(flat)
        self.tensors.fill_from_named(values, parts)
        numbers.copy_(parts[_WEIGHTS])

    def _halves(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """Values ``[elements]`` and numbers ``[rows]`` of a message."""
        return flat.split([self.elements, self.plain_numbers])

    def _mean(self, total: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each local tensor the mean over the holders, in place of the sum, and the rows that have one, as bool."""
        values, numbers = self._halves(total)
        parts, has = self.tensors.split(values), []
        for part, weights in zip(parts, self._local_rows(numbers), strict=True):
            has.append(weights > 0)
            part.div_(weights.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (part.dim() - 1)))
        return parts, has

    def _local_rows(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """A number for each row of the table as numbers for the rows of each local tensor."""
        if self._pieces is None:
            self._pieces = [piece_of(self.tensors.view.parameters[name]) for name in self.names]
        return [Piece((self.token_rows.rows,), piece.runs[:1]).take(numbers) for piece in self._pieces]


_WEIGHTS = "weights of the rows"


class SparseState(SparseTable):
    """An optimizer's state; a row that nobody contributed keeps this site's own."""

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """The mean of each row over the sites that hold it."""
        means, has = self._mean(total)
        for local, mean, rows in zip(self.tensors.locals(), self.of_age(means, of), has, strict=True):
            mean[~rows] = local[~rows].to(mean)
        self.put(means, of.step)


class SparseParameters(SparseTable, SyncedParameters, TakenFromPeers):
    """Parameters with a global copy of the site's own rows.

    A newcomer cannot take rows from one member: each holds others. It takes them over in a round, every row from the
    site that is furthest among those that hold it.
    """

    facts = StateFacts(copies=1)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Move the rows that have a mean; the local parameters follow the global copy."""
        if not self.elements:
            return
        _, has = self._mean(total)
        kept = [
            (tensor, ~rows, tensor[~rows])
            for part, rows in zip(self.global_parts, has, strict=True)
            if not rows.all()
            for tensor in (part, *self._outer_tensors(part).values())
        ]
        self.move_global(self._halves(total)[0])
        for tensor, rows, values in kept:
            tensor[rows] = values
        self.mix_into_local(of.step)

    def update_norm(self, contribution: torch.Tensor) -> float:
        """Of the values; the rows' weights are no update."""
        return super().update_norm(self._halves(contribution)[0])

    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """Of the values."""
        super().damp(self._halves(contribution)[0], factor, weight)

    def shared_state(self) -> NamedState:
        """What the outer optimizer keeps beside tensors: the rows themselves are no one site's to give."""
        return {
            name: {key: value for key, value in self.outer_state(part).items() if not _of_rows(value, part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    def private_state(self) -> NamedState:
        """The global values of the rows this site holds, and the outer optimizer's tensors."""
        return {
            name: {"global": part, **self._outer_tensors(part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    @torch.no_grad()
    def offered(self) -> list[torch.Tensor]:
        """Messages (fp32 ``[numel]``) with all that a newcomer takes over: the values, then each outer state."""
        messages = []
        for tensors in self._transferred():
            message = torch.empty(self.numel, dtype=torch.float32, device=self.tensors.device)
            values, numbers = self._halves(message)
            if self.elements:
                torch._foreach_copy_(self.tensors.split(values), tensors)
            numbers.copy_(self.token_rows.ids >= 0)
            messages.append(message)
        return messages

    @torch.no_grad()
    def take_over(self, messages: Sequence[torch.Tensor]) -> None:
        """Take rows as other sites have them, and drop local work."""
        for tensors, message in zip(self._transferred(), messages, strict=True):
            values, numbers = self._halves(message)
            for tensor, part, held in zip(tensors, self.tensors.split(values), self._local_rows(numbers), strict=True):
                tensor[held > 0] = part[held > 0].to(tensor)
        self.reset_local_to_global()

    def _transferred(self) -> list[list[torch.Tensor]]:
        states = [self._outer_tensors(part) for part in self.global_parts]
        return [list(self.global_parts), *([state[key] for state in states] for key in self._outer_keys())]

    def _outer_keys(self) -> list[str]:
        """Tensors of the outer optimizer's state; known also to a rank that has none of the tables."""
        optimizer = self.rule.apply.optimizer  # type: ignore[attr-defined]
        if optimizer is None:
            return []
        probe = torch.zeros(1, 1)
        state = optimizer.build([probe]).state[probe]
        return sorted(f"outer.{key}" for key, value in state.items() if _of_rows(value, probe))

    def _outer_tensors(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.outer_state(part).items() if _of_rows(value, part)}


def _of_rows(value: Any, part: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == part.shape


def reduce_by_row(state: SparseTable, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Give a sparse table the reductions by which its rows travel.

    Args:
        state: bound to this rank.
        names: the tables of its scope, on whatever rank.
        sizes: elements of each whole parameter.

    Raises:
        ValueError: a table of the scope has other rows than the site's vocabulary, or another width.
    """
    rows, scope = state.token_rows.rows, state.rule.scope
    widths = {name: sizes[name] / rows if rows else 0.0 for name in names}
    for name, width in widths.items():
        if not rows or width != int(width):
            raise ValueError(
                f"scopes ({scope}): {name} ({sizes[name]} elements) is shared by row, but the site has {rows} token rows"
            )
        if width != widths[names[0]]:
            raise ValueError(f"scopes ({scope}): {name} and {names[0]} differ in width; give each a scope")
    width, wire = int(widths[names[0]]), state.rule.wire
    state.reduction = SparseReduction(state.token_rows, width, wire.codec, wire.bucket_elements)
    if isinstance(state, TakenFromPeers):
        state.transfer = SparseTransfer(state.token_rows, width, Float32(), wire.bucket_elements)
