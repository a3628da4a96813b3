"""The request of a batch to one table group: fetches rows or sums from owners, and sends gradients back to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.features import Route
from embedtrain.embedding.owner_pooling import PooledAtOwners
from embedtrain.embedding.table_group import TableGroup
from embedtrain.ops._backend import dispatch
from embedtrain.ops._backend.transfer import HostCopy
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.pool_rows import Bags, pool_rows_backward
from embedtrain.ops.row_gradient import Delivery
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys, order_keys, sort_unique


class Found(NamedTuple):
    """Holds the rows that a rank owes to other ranks for one table group.

    Attributes:
        source: [n, dim]; weights that contain the requested rows, which are copied only once, when they are sent.
        places: [num_rows] int64; index in `source` of each requested row.
        of_sums: source and indices of the rows of the bags that this rank pools, which are added up when the sums are
            sent. None if no rank wants sums.
    """

    source: Tensor
    places: Tensor
    of_sums: tuple[Tensor, Tensor] | None


class GroupRequest(ABC):
    """Holds what a batch looks up in one table group, after the ranks have exchanged ids.

    Attributes:
        group: the tables.
        route: the features, in the order of their tables.
        bags: per feature, how its vectors are pooled.
        weights: per feature, the weights that the caller gave, for their gradient.
        at_owner: per feature, whether the owners of its rows pool its bags.
        sums: the bags that owners pool; None if no rank has any.
        rows: [n] int64; local rows that this rank reads and sends to the ranks of the examples; may repeat.
    """

    group: TableGroup
    route: Route
    bags: Sequence[Bags]
    weights: Sequence[Tensor | None]
    at_owner: Sequence[bool]
    sums: PooledAtOwners | None
    rows: Tensor
    _rows_on_host: tuple[Tensor, HostCopy] | None = None
    _home: tuple[Tensor, OrderedKeys] | None = None
    """Local rows of all gradients of one backward, unsorted and sorted; None if they were not sorted ahead."""

    @property
    @abstractmethod
    def distinct(self) -> SortedKeys:
        """The distinct keys of the rows that this rank wants; the first access sorts them."""

    @property
    @abstractmethod
    def inverse(self) -> Tensor:
        """[num_values] int64; index of each value's row among the distinct rows."""

    @abstractmethod
    def sort_ahead(self, *, is_counted: bool) -> None:
        """Sorts the rows that the update needs. No-op for native updates, which sort faster themselves.

        Args:
            is_counted: see `OrderedKeys`.
        """

    @abstractmethod
    def fetch(self, found: Found) -> tuple[Tensor, Tensor]:
        """Returns rows for pooling, and the index of each value's row among them. Collective: every rank.

        Args:
            found: the weights and indices of `rows` on this rank.
        """

    @abstractmethod
    def fetch_distinct(self) -> Tensor:
        """Returns the distinct rows wanted, [num_distinct, dim] float32. Collective: every rank."""

    @abstractmethod
    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> Delivery | None:
        """Sends the gradients of pooled vectors to the rows' owners, and returns the gradients of this rank's rows.

        Collective: every rank.

        Args:
            grads: gradient per feature, [num_bags, dim]; None for a feature without gradient.
            bags: per feature, how its vectors were pooled.

        Returns:
            The gradients of this rank's rows; None if no rank sends any.
        """

    @abstractmethod
    def send_distinct_home(self, grad: Tensor, counts: Tensor | None = None) -> Delivery | None:
        """Sends the gradient of the distinct rows to their owners; returns what `send_home` returns.

        Collective: every rank. `counts` must be given on every rank or on none.

        Args:
            grad: [num_distinct, dim] float32.
            counts: [num_distinct] float32; sent with the gradient, see `Delivery`.
        """

    @property
    def home_keys(self) -> OrderedKeys | None:
        """Sorted local rows of all gradients of one backward; None if they were not sorted ahead."""
        return None if self._home is None else self._home[1]

    def bring_rows(self) -> None:
        """Copies the rows that this rank reads and updates to the device, if they are stored in host memory."""
        if not self.group.access.is_on_host:
            return
        rows, on_host = self._rows_on_host or self._rows_to_host()
        parts = [self.rows, *([] if self.sums is None else [self.sums.rows])]
        self.group.access.bring_ahead(rows, on_host, parts, self._distinct_rows())

    def _distinct_rows(self) -> Tensor | None:
        """Returns the distinct rows, ascending, if `look_up` may get them instead of `rows`; else None."""
        return None

    def _rows_to_host(self) -> tuple[Tensor, HostCopy]:
        """Starts to copy the row numbers of the coming gradients, in the order of delivery, to the host."""
        if self._home is not None:
            rows = self._home[0]
        else:
            rows = self.rows if self.sums is None else torch.cat([self.rows, self.sums.rows])
        return rows, HostCopy(rows)

    def deliver(self, *deliveries: Delivery | None) -> None:
        """Delivers all gradients of one backward for this rank's rows, in order, to the group's mailbox."""
        if self._home is not None and not any(delivery is not None and delivery.is_unique for delivery in deliveries):
            rows, ordered = self._home
            there = [delivery for delivery in deliveries if delivery is not None]
            bags = [feature for delivery in there for feature in delivery.bags]
            grads = [grad for delivery in there for grad in delivery.grads]
            counted = [delivery.counts for delivery in there if delivery.counts is not None]
            counts = torch.cat(counted) if there and len(counted) == len(there) else None
            deliveries = (Delivery(rows, bags, grads, ordered=ordered, counts=counts),) if there else ()
        for delivery in deliveries:
            if delivery is not None:
                self.group.gradients.deliver(delivery)


class LocalRequest(GroupRequest):
    """Implements the request in a process that owns all rows: keys are local rows, and nothing is sent.

    Args:
        group, route, bags, weights: see `GroupRequest`.
        keys: [num_values] int64; see `TableGroup.keys_of`.
    """

    sums = None

    def __init__(
        self, group: TableGroup, route: Route, bags: Sequence[Bags], weights: Sequence[Tensor | None], keys: Tensor
    ) -> None:
        self.group, self.route, self.bags, self.weights, self.rows = group, route, bags, weights, keys
        self.at_owner = [False] * len(bags)
        self._ordered: OrderedKeys | SortedKeys | None = None

    @property
    def distinct(self) -> SortedKeys:
        """See `GroupRequest`; pooled look-ups do not need it."""
        if self._ordered is None:
            with stage("unique"):
                self._ordered = sort_unique(self.rows, bound=self.group.num_local_rows, with_inverse=False)
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """See `GroupRequest`."""
        if self._ordered is None or self._ordered.inverse is None:
            with stage("unique"):
                self._ordered = order_keys(self.rows, bound=self.group.num_local_rows)
        assert self._ordered.inverse is not None
        return self._ordered.inverse

    def sort_ahead(self, *, is_counted: bool) -> None:
        """See `GroupRequest`."""
        if not dispatch.uses_native(self.rows):
            ordered = self._ordered if isinstance(self._ordered, OrderedKeys) else OrderedKeys(self.rows)
            ordered.is_counted = is_counted
            self._ordered, self._home = ordered, (self.rows, ordered)
        if self.group.access.is_on_host:
            self._rows_on_host = self._rows_to_host()

    def _distinct_rows(self) -> Tensor | None:
        """See `GroupRequest`."""
        return None if self._ordered is None else self.distinct.unique

    def fetch(self, found: Found) -> tuple[Tensor, Tensor]:
        """Returns the found rows without a copy, because one rank pools directly from the table."""
        return found.source, found.places

    def fetch_distinct(self) -> Tensor:
        """See `GroupRequest`."""
        return gather_rows(*self.group.access.look_up(self.distinct.unique), torch.float32)

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> Delivery:
        """See `GroupRequest`."""
        runs = self.group.runs_of(self.route.tables, [feature.num_values for feature in bags])
        return Delivery(self.rows, bags, grads, runs=runs)

    def send_distinct_home(self, grad: Tensor, counts: Tensor | None = None) -> Delivery:
        """See `GroupRequest`."""
        return Delivery.of_rows(self.distinct.unique, grad, counts)


class Wanted(NamedTuple):
    """Holds what one of several ranks looks up in a table group, before the ranks exchange ids.

    Attributes:
        route, bags, weights, at_owner: see `GroupRequest`.
        keys: [num_values] int64; see `TableGroup.keys_of`.
    """

    route: Route
    bags: Sequence[Bags]
    weights: Sequence[Tensor | None]
    at_owner: Sequence[bool]
    keys: Tensor

    def keys_pooled(self, *, at_owner: bool) -> Tensor:
        """Returns the keys of the features whose `at_owner` is the given value, feature after feature."""
        if self.at_owner.count(at_owner) == len(self.bags):
            return self.keys
        parts = self.keys.split([feature.num_values for feature in self.bags])
        chosen = [part for part, is_there in zip(parts, self.at_owner, strict=True) if is_there == at_owner]
        return torch.cat([self.keys.new_zeros(0), *chosen])

    def pooled_at_owners(self, group: TableGroup) -> PooledAtOwners | None:
        """Returns the bags that owners pool; None if there are none."""
        if not any(self.at_owner):
            return None
        bags = [feature for feature, is_there in zip(self.bags, self.at_owner, strict=True) if is_there]
        return PooledAtOwners(group, bags, self.keys_pooled(at_owner=True))


class RemoteRequest(GroupRequest):
    """Implements the request of one of several ranks, which asks for each distinct row once.

    Args:
        group: the tables.
        wanted: what this rank looks up.
        ordered: sorted keys of the rows that are sent to this rank.
        counts: number of distinct rows that this rank wants from each rank, and number that each rank wants from this
            rank. None if no rank wants rows, for example because owners pool all bags: then neither rows nor their
            gradients are sent.
        rows: [n] int64; local rows that other ranks want from this rank, grouped by asking rank.
        sums: see `GroupRequest`.
    """

    def __init__(
        self,
        group: TableGroup,
        wanted: Wanted,
        ordered: OrderedKeys | SortedKeys,
        counts: tuple[Sequence[int], Sequence[int]] | None,
        rows: Tensor,
        sums: PooledAtOwners | None,
    ) -> None:
        self.group, self.rows, self.sums = group, rows, sums
        self.route, self.bags, self.weights, self.at_owner, _ = wanted
        self._ordered, self._counts = ordered, counts

    @property
    def distinct(self) -> SortedKeys:
        """See `GroupRequest`."""
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """See `GroupRequest`."""
        if self._counts is None:
            return self.rows
        assert self._ordered.inverse is not None
        return self._ordered.inverse

    def sort_ahead(self, *, is_counted: bool) -> None:
        """See `GroupRequest`."""
        if not dispatch.uses_native(self.rows):
            rows = self.rows if self.sums is None else torch.cat([self.rows, self.sums.rows])
            self._home = rows, OrderedKeys(rows, is_counted=is_counted)
        if self.group.access.is_on_host:
            self._rows_on_host = self._rows_to_host()

    def fetch(self, found: Found) -> tuple[Tensor, Tensor]:
        """See `GroupRequest`."""
        return self._fetch(found.source, found.places, self.group.vector_wire_dtype), self.inverse

    def fetch_distinct(self) -> Tensor:
        """See `GroupRequest`."""
        return self._fetch(*self.group.access.look_up(self.rows), torch.float32)

    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> Delivery | None:
        """See `GroupRequest`; gradients are summed by row before they are sent."""
        dim = self.group.weight.shape[1]
        if not bags:
            return self.send_distinct_home(torch.zeros(0, dim, dtype=torch.float32, device=self.group.device))
        keys = self.distinct
        buffer = self.group.gradient_buffer(keys.unique.numel())
        return self.send_distinct_home(pool_rows_backward(grads, bags, keys, dim, buffer=buffer))

    def send_distinct_home(self, grad: Tensor, counts: Tensor | None = None) -> Delivery | None:
        """See `GroupRequest`."""
        if self._counts is None:
            return None
        grads, counted = self.group.ranks.all_to_all_split(
            grad.to(self.group.gradient_wire_dtype), *self._counts, torch.float32, counts, self.group.gradients.keep
        )
        # The rows from one rank are distinct, but several ranks may ask for the same row.
        bags = [Bags(len(part)) for part in grads]
        return Delivery(self.rows, bags, grads, counts=counted)

    def _fetch(self, source: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        if self._counts is None:
            return torch.zeros(0, source.shape[1], dtype=torch.float32, device=source.device)
        ask_counts, owe_counts = self._counts
        wire_dtype = self.group.vector_wire_dtype
        return self.group.ranks.all_to_all_gather(source, places, owe_counts, ask_counts, wire_dtype, dtype)
