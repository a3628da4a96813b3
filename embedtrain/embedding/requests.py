"""What a batch looks up in one table group: which rows or sums it wants, and how they come and gradients go."""

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
    """What a rank owes others of one table group.

    Attributes:
        source: [n, dim]; what holds the rows asked for: they are copied when they travel, once.
        places: [num_rows] int64; the place of each row asked for.
        of_sums: what holds the rows of the bags that this rank pools, and the place of each: they are added up when
            their sums travel. None if no rank wants any.
    """

    source: Tensor
    places: Tensor
    of_sums: tuple[Tensor, Tensor] | None


class GroupRequest(ABC):
    """What a batch looks up in one table group, and what the ranks settled about it.

    Attributes:
        group: the tables.
        route: the features, in order of their tables.
        bags: per feature how its vectors are pooled.
        weights: per feature the weights as the caller gave them, for their own gradient.
        at_owner: per feature whether the owners of its rows pool its bags.
        sums: those that owners make; None if no rank wants any.
        rows: [n] int64; the local rows that this rank reads and that travel to the examples, if vectors are pooled;
            they may repeat.
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
    """The local rows of all gradients that one backward brings, and the same in order, if they were sorted ahead."""

    @property
    @abstractmethod
    def distinct(self) -> SortedKeys:
        """The distinct keys of the rows that this rank wants; sorted by the first call."""

    @property
    @abstractmethod
    def inverse(self) -> Tensor:
        """[num_values] int64; where each value's row lies among the distinct ones."""

    @abstractmethod
    def sort_ahead(self, *, is_counted: bool) -> None:
        """Sorts the rows that the update will need. Native updates sort for themselves, and quicker.

        Args:
            is_counted: see `OrderedKeys`.
        """

    @abstractmethod
    def fetch(self, found: Found) -> tuple[Tensor, Tensor]:
        """Returns rows, and the place of each value's row in them, for pooling. Collective: every rank.

        Args:
            found: `rows` as this rank, who owns them, reads them.
        """

    @abstractmethod
    def fetch_distinct(self) -> Tensor:
        """Returns the distinct rows wanted, [num_distinct, dim] float32. Collective: every rank."""

    @abstractmethod
    def send_home(self, grads: Sequence[Tensor | None], bags: Sequence[Bags]) -> Delivery | None:
        """Sends the gradients of pooled vectors, per feature, to the rows' owners; returns those of this rank's rows.

        Collective: every rank.

        Returns:
            None if no rank has any.
        """

    @abstractmethod
    def send_distinct_home(self, grad: Tensor, counts: Tensor | None = None) -> Delivery | None:
        """Sends the gradient of the distinct rows to their owners; as `send_home`. Collective: every rank.

        Args:
            grad: [num_distinct, dim] float32.
            counts: [num_distinct] float32, which travels along; on every rank or on none. See `Delivery`.
        """

    @property
    def home_keys(self) -> OrderedKeys | None:
        """The local rows of all gradients that one backward brings, if they were sorted ahead."""
        return None if self._home is None else self._home[1]

    def bring_rows(self) -> None:
        """Copies the rows that this rank reads and updates to the device, if they live in host memory."""
        if not self.group.access.is_on_host:
            return
        rows, on_host = self._rows_on_host or self._rows_to_host()
        parts = [self.rows, *([] if self.sums is None else [self.sums.rows])]
        self.group.access.bring_ahead(rows, on_host, parts, self._distinct_rows())

    def _distinct_rows(self) -> Tensor | None:
        """Returns the distinct rows, ascending, if they may be looked up instead of all; they are sorted by then."""
        return None

    def _rows_to_host(self) -> tuple[Tensor, HostCopy]:
        """Begins to copy the rows that gradients will have, in order of delivery, to the host."""
        if self._home is not None:
            rows = self._home[0]
        else:
            rows = self.rows if self.sums is None else torch.cat([self.rows, self.sums.rows])
        return rows, HostCopy(rows)

    def deliver(self, *deliveries: Delivery | None) -> None:
        """Has gradients of this rank's rows wait for the optimizer: all that one backward brings, in order."""
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
    """The request of a process that has all rows: a key is the local row, and nothing travels.

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
        """See `GroupRequest`; a pooled look-up never asks for it."""
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
        """Returns what was found: one rank pools straight from the table."""
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
    """What one of several ranks looks up in a table group, before the ranks know of each other.

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
        """Returns the keys of the features that are pooled on one side, feature after feature."""
        if self.at_owner.count(at_owner) == len(self.bags):
            return self.keys
        parts = self.keys.split([feature.num_values for feature in self.bags])
        chosen = [part for part, is_there in zip(parts, self.at_owner, strict=True) if is_there == at_owner]
        return torch.cat([self.keys.new_zeros(0), *chosen])

    def pooled_at_owners(self, group: TableGroup) -> PooledAtOwners | None:
        """Returns the bags whose rows their owners add up; None if there is none."""
        if not any(self.at_owner):
            return None
        bags = [feature for feature, is_there in zip(self.bags, self.at_owner, strict=True) if is_there]
        return PooledAtOwners(group, bags, self.keys_pooled(at_owner=True))


class RemoteRequest(GroupRequest):
    """The request of one of several ranks: each distinct row is asked for once.

    Args:
        group: the tables.
        wanted: what this rank looks up.
        ordered: the keys of the rows that travel here, in order.
        counts: distinct rows that this rank wants of each rank, and that each rank wants of this one. None if no rank
            wants any, as if owners pool all bags: then no row and no gradient of one travels.
        rows: [n] int64; the local rows that the ranks want of this one, by asking rank.
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
        """See `GroupRequest`; gradients are summed by row before they travel."""
        dim = self.group.weight.shape[1]
        no_rows = torch.zeros(0, dim, dtype=torch.float32, device=self.group.device)
        return self.send_distinct_home(pool_rows_backward(grads, bags, self.distinct, dim) if bags else no_rows)

    def send_distinct_home(self, grad: Tensor, counts: Tensor | None = None) -> Delivery | None:
        """See `GroupRequest`."""
        if self._counts is None:
            return None
        counted = None if counts is None else self.group.ranks.all_to_all(counts, *self._counts)
        wired = grad.to(self.group.gradient_wire_dtype)
        grads = self.group.ranks.all_to_all_split(wired, *self._counts, torch.float32)
        # Rows of one rank are distinct; several ranks may ask for the same.
        bags = [Bags(len(part)) for part in grads]
        return Delivery(self.rows, bags, grads, counts=counted)

    def _fetch(self, source: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        if self._counts is None:
            return torch.zeros(0, source.shape[1], dtype=torch.float32, device=source.device)
        ask_counts, owe_counts = self._counts
        wire_dtype = self.group.vector_wire_dtype
        return self.group.ranks.all_to_all_gather(source, places, owe_counts, ask_counts, wire_dtype, dtype)
