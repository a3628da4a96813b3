"""Rows that travel to the examples: which ones one look-up wants of one group of tables, and how they come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.table_group import TableGroup
from embedtrain.ops._backend import dispatch
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.pool_rows import Bags, pool_rows_backward
from embedtrain.ops.row_gradient import Delivery, Run
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys, order_keys, sort_unique


class Vectors(NamedTuple):
    """Rows where they can be pooled.

    Attributes:
        source: [n, dim]; tables, or copies of rows.
        places: [num_values] int64; the place of each value's row.
    """

    source: Tensor
    places: Tensor


class RowRequest(Protocol):
    """What one rank wants and owes of one group's rows.

    Attributes:
        rows: [n] int64; the local rows that this rank reads, if vectors are pooled; they may repeat.
    """

    rows: Tensor

    @property
    def distinct(self) -> SortedKeys:
        """The distinct keys of the rows that this rank wants; sorted by the first call."""

    @property
    def inverse(self) -> Tensor:
        """[num_values] int64; where each value's row lies among the distinct ones."""

    def sort_ahead(self) -> None:
        """Sorts what the update will need, if that is not part of the update."""

    def fetch(self, found: Vectors) -> Vectors:
        """Returns the rows wanted, for pooling. Collective: every rank.

        Args:
            found: `rows` as this rank, who owns them, reads them.
        """

    def fetch_distinct(self) -> Tensor:
        """Returns the distinct rows wanted, [num_distinct, dim] float32. Collective: every rank."""

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> None:
        """Delivers the gradients of pooled vectors, per feature, to the rows' owners. Collective: every rank."""

    def send_distinct_home(self, grad: Tensor) -> None:
        """Delivers the gradient of the distinct rows to their owners. Collective: every rank."""


class LocalRows:
    """Rows of a process that has all of them: a key is the local row, and nothing travels.

    Args:
        group: the tables.
        keys: [num_values] int64.
        runs: of the keys.
    """

    def __init__(self, group: TableGroup, keys: Tensor, runs: Sequence[Run]) -> None:
        self.rows = keys
        self._group, self._runs = group, runs
        self._ordered: OrderedKeys | SortedKeys | None = None

    @property
    def distinct(self) -> SortedKeys:
        """See `RowRequest`; a pooled look-up never asks for it."""
        if self._ordered is None:
            with stage("unique"):
                self._ordered = sort_unique(self.rows, bound=self._group.num_local_rows, with_inverse=False)
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """See `RowRequest`."""
        if self._ordered is None or self._ordered.inverse is None:
            with stage("unique"):
                self._ordered = order_keys(self.rows, bound=self._group.num_local_rows)
        assert self._ordered.inverse is not None
        return self._ordered.inverse

    def sort_ahead(self) -> None:
        """Does nothing: the update sorts by runs."""

    def fetch(self, found: Vectors) -> Vectors:
        """Returns what was found: one rank pools straight from the table."""
        return found

    def fetch_distinct(self) -> Tensor:
        """See `RowRequest`."""
        return gather_rows(*self._group.access.look_up(self.distinct.unique), torch.float32)

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> None:
        """See `RowRequest`."""
        self._group.gradients.deliver(Delivery(self.rows, bags, grads, runs=self._runs))

    def send_distinct_home(self, grad: Tensor) -> None:
        """See `RowRequest`."""
        rows = self.distinct.unique
        self._group.gradients.deliver(Delivery(rows, [Bags(len(rows))], [grad], is_unique=True))


class RemoteRows:
    """Rows of several ranks, each distinct one asked for once.

    Args:
        group: the tables.
        ordered: the keys of this rank, in order.
        ask_counts: distinct rows that this rank wants of each rank.
        owe_counts: rows that each rank wants of this one.
        rows: [sum(owe_counts)] int64; these local rows, by asking rank.
    """

    def __init__(
        self,
        group: TableGroup,
        ordered: OrderedKeys | SortedKeys,
        ask_counts: Sequence[int],
        owe_counts: Sequence[int],
        rows: Tensor,
    ) -> None:
        self.rows = rows
        self._group, self._ordered = group, ordered
        self._ask_counts, self._owe_counts = ask_counts, owe_counts
        self._ordered_rows: OrderedKeys | None = None

    @property
    def distinct(self) -> SortedKeys:
        """See `RowRequest`."""
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """See `RowRequest`."""
        assert self._ordered.inverse is not None
        return self._ordered.inverse

    def sort_ahead(self) -> None:
        """See `RowRequest`."""
        if not dispatch.uses_native(self.rows):
            self._ordered_rows = OrderedKeys(self.rows)

    def fetch(self, found: Vectors) -> Vectors:
        """See `RowRequest`."""
        return Vectors(self._fetch(found, self._group.vector_wire_dtype), self.inverse)

    def fetch_distinct(self) -> Tensor:
        """See `RowRequest`."""
        return self._fetch(Vectors(*self._group.access.look_up(self.rows)), torch.float32)

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> None:
        """See `RowRequest`; gradients are summed by row before they travel."""
        dim = self._group.weight.shape[1]
        no_rows = torch.zeros(0, dim, dtype=torch.float32, device=self._group.device)
        self.send_distinct_home(pool_rows_backward(grads, bags, self.distinct, dim) if bags else no_rows)

    def send_distinct_home(self, grad: Tensor) -> None:
        """See `RowRequest`."""
        wired = grad.to(self._group.gradient_wire_dtype)
        grads = self._group.ranks.all_to_all_split(wired, self._ask_counts, self._owe_counts, torch.float32)
        # Rows of one rank are distinct; several ranks may ask for the same.
        bags = [Bags(len(part)) for part in grads]
        self._group.gradients.deliver(Delivery(self.rows, bags, grads, ordered=self._ordered_rows))

    def _fetch(self, found: Vectors, dtype: torch.dtype) -> Tensor:
        wire_dtype = self._group.vector_wire_dtype
        return self._group.ranks.all_to_all_gather(*found, self._owe_counts, self._ask_counts, wire_dtype, dtype)


class NoRows:
    """Of several ranks none of which wants a row, as when owners pool all bags: nothing travels.

    Args:
        group: the tables.
        ordered: the keys, of which there are none.
    """

    def __init__(self, group: TableGroup, ordered: OrderedKeys | SortedKeys) -> None:
        self.rows = ordered.sorted.unique
        self._group, self._ordered = group, ordered

    @property
    def distinct(self) -> SortedKeys:
        """See `RowRequest`."""
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """See `RowRequest`."""
        return self.rows

    def sort_ahead(self) -> None:
        """Does nothing."""

    def fetch(self, found: Vectors) -> Vectors:
        """Returns no vectors."""
        return Vectors(self.fetch_distinct(), self.rows)

    def fetch_distinct(self) -> Tensor:
        """Returns no rows."""
        return torch.zeros(0, self._group.weight.shape[1], dtype=torch.float32, device=self._group.device)

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> None:
        """Delivers nothing."""

    def send_distinct_home(self, grad: Tensor) -> None:
        """Delivers nothing."""
