"""Bags pooled where their rows are: their ids travel to the owners, and a sum per owner and bag comes back.

A bag's ids may lie on several ranks. Each owner adds up its own rows of the bag; the rank of the example adds the
owners' sums in order of rank, and divides a mean by the bag's length. In backward the gradient of each sum travels
to its owner, which hands it on to the bag's rows there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.table_group import TableGroup
from embedtrain.ops.pool_rows import Bags, pool_rows
from embedtrain.ops.row_gradient import Delivery
from embedtrain.ops.sort_unique import order_keys


class PooledAtOwners:
    """This rank's bags whose rows their owners add up, and the bags that it adds up for others.

    `exchange` comes before everything else.

    Args:
        group: the tables.
        bags: the features; there may be none.
        keys: [n] int64; the keys of their rows, feature after feature.

    Attributes:
        id_counts: [world_size] int64; ids for each owner.
        sum_counts: [world_size] int64; bags for each owner, which is how many sums it owes.
        is_weighted: whether ids have factors.
        rows: [n] int64; once exchanged, the local rows that this rank adds up.
    """

    def __init__(self, group: TableGroup, bags: Sequence[Bags], keys: Tensor) -> None:
        self._group, self._bags = group, bags
        self._num_bags = sum(feature.num_bags for feature in bags)
        self.is_weighted = any(feature.weights is not None for feature in bags)
        with stage("unique"):
            lengths = torch.cat([keys.new_zeros(0), *(lengths_of(feature, keys.device) for feature in bags)])
            owner, pairs = owner_and_bag(keys, lengths, group.num_local_rows)
            self._own_rows = torch.sub(keys, owner, alpha=group.num_local_rows)
            bound = group.ranks.size * max(self._num_bags, 1)
            self._by_owner = order_keys(pairs, bound=bound, with_inverse=False)
        firsts = torch.arange(group.ranks.size + 1, device=keys.device) * self._num_bags
        self.sum_counts = self._by_owner.num_below(firsts).diff()
        self.id_counts = self._by_owner.num_keys_below(firsts).diff()

    def exchange(
        self,
        of_ids: tuple[Sequence[int], Sequence[int]],
        of_sums: tuple[Sequence[int], Sequence[int]],
        is_weighted: bool,
    ) -> None:
        """Sends the ids of bags to the owners of their rows. Collective: every rank.

        Args:
            of_ids: how many ids go to each rank, and come from each.
            of_sums: how many sums come from each rank, and go to each.
            is_weighted: whether ids of any rank have factors.
        """
        self._sum_counts = of_sums
        # In order of owner; bags are numbered through all features.
        self._bag_of_sum = self._by_owner.sorted.unique % max(self._num_bags, 1)
        self._sums_of_bags = self._add_up_later()
        payload = self._payload(id_type(self._group), is_weighted)
        owed = self._group.ranks.all_to_all(payload, *of_ids)
        signed = (owed[:, 0] if is_weighted else owed).long()
        weights = owed[:, 1].to(torch.int32).view(torch.float32) if is_weighted else None
        is_first = signed < 0
        self.rows = torch.where(is_first, ~signed, signed)
        lengths = _occurrences(is_first.cumsum(0) - 1, sum(of_sums[1]))
        self._owed = Bags(signed.numel(), lengths, weights)

    def pool(self) -> Tensor:
        """Returns the sums that this rank owes, [num_sums, dim], as they travel."""
        (sums,) = pool_rows(*self._group.access.look_up(self.rows), [self._owed])
        # Sums have no storage to be exact to: they travel as gradients do, in float32 unless chosen otherwise.
        return sums.to(self._group.gradient_wire_dtype)

    def fetch(self, sums: Tensor) -> list[Tensor]:
        """Returns this rank's bags, pooled: per feature [num_bags, dim] float32. Collective: every rank.

        Args:
            sums: what `pool` returned.
        """
        return self._add_up(self._group.ranks.all_to_all(sums, *reversed(self._sum_counts)))

    def send_home(self, grads: Sequence[Tensor | None]) -> Delivery:
        """Sends the gradients of the pooled vectors to the owners; returns those of this rank's rows.

        Collective: every rank.
        """
        group = self._group
        shares = self._share_out(grads, group.weight.shape[1]).to(group.gradient_wire_dtype)
        received = group.ranks.all_to_all(shares, *self._sum_counts)
        return Delivery(self.rows, [self._owed], [received.float()])

    def _payload(self, dtype: torch.dtype, is_weighted: bool) -> Tensor:
        """Returns what travels to the owners: [n] rows, or [n, 2] rows and the bits of their weights.

        The first row of each bag is stored as its complement, a negative number, so that lengths need not travel.
        """
        rows = self._own_rows[self._by_owner.order]
        firsts = self._by_owner.sorted.starts[:-1]
        rows[firsts] = ~rows[firsts]
        if not is_weighted:
            return rows.to(dtype)
        weights = torch.cat(
            [
                rows.new_ones(feature.num_values, dtype=torch.float32) if feature.weights is None else feature.weights
                for feature in self._bags
            ]
            or [rows.new_zeros(0, dtype=torch.float32)]
        )
        return torch.stack([rows.to(dtype), weights[self._by_owner.order].view(torch.int32).to(dtype)], dim=1)

    def _add_up_later(self) -> tuple[Tensor, Bags]:
        """Returns the places of the sums that come, bag after bag and in order of rank, and how they are added."""
        order = order_keys(self._bag_of_sum, bound=max(self._num_bags, 1), with_inverse=False).order
        num_owners = _occurrences(self._bag_of_sum, self._num_bags)
        factors = self._factors()
        weights = None if factors is None else factors[self._bag_of_sum[order]]
        return order, Bags(order.numel(), num_owners, weights)

    def _add_up(self, sums: Tensor) -> list[Tensor]:
        """Returns per feature [num_bags, dim]: the owners' sums added in order of rank, means divided."""
        order, bags = self._sums_of_bags
        (pooled,) = pool_rows(sums, order, [bags])
        # `data` is no view to autograd: the caller may change one feature's vectors in place.
        return [part.data for part in pooled.split([feature.num_bags for feature in self._bags])]

    def _share_out(self, grads: Sequence[Tensor | None], dim: int) -> Tensor:
        """Returns [num_sums, dim] float32; the gradient of each owner's sum, in order of owner."""
        of_bags = torch.cat(
            [
                self._own_rows.new_zeros(feature.num_bags, dim, dtype=torch.float32) if grad is None else grad
                for feature, grad in zip(self._bags, grads, strict=True)
            ]
            or [self._own_rows.new_zeros(0, dim, dtype=torch.float32)]
        )
        factors = self._factors()
        weights = None if factors is None else factors[self._bag_of_sum]
        (shared,) = pool_rows(of_bags, self._bag_of_sum, [Bags(self._bag_of_sum.numel(), None, weights)])
        return shared

    def _factors(self) -> Tensor | None:
        """Returns [num_bags] float32, what a bag's sum is multiplied by; None where it is 1 for all."""
        if not any(feature.is_mean for feature in self._bags):
            return None
        parts = []
        for feature in self._bags:
            lengths = lengths_of(feature, self._own_rows.device)
            parts.append(1.0 / lengths.clamp(min=1).float() if feature.is_mean else torch.ones_like(lengths).float())
        return torch.cat(parts)


def owner_and_bag(keys: Tensor, lengths: Tensor, num_local_rows: int) -> tuple[Tensor, Tensor]:
    """Returns the owner of each value's row, and `owner * number of bags + bag`; bags are numbered through."""
    owner = torch.div(keys, num_local_rows, rounding_mode="floor")
    # In place: fresh memory of this size costs more than the arithmetic.
    bag = torch.repeat_interleave(lengths, output_size=keys.numel())
    return owner, bag.add_(owner, alpha=max(lengths.numel(), 1))


def lengths_of(feature: Bags, device: torch.device) -> Tensor:
    """Returns the lengths of a feature's bags, [num_bags] int64."""
    if feature.lengths is None:
        return torch.ones(feature.num_values, dtype=torch.int64, device=device)
    return feature.lengths


def _occurrences(numbers: Tensor, num_numbers: int) -> Tensor:
    """Returns how often each of the numbers from 0 occurs, [num_numbers] int64; a device is not waited for."""
    counts = torch.zeros(num_numbers, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers))


def id_type(group: TableGroup) -> torch.dtype:
    """Returns in which type local rows travel: half the bytes, where they fit."""
    return torch.int32 if group.num_local_rows < 1 << 31 else torch.int64
