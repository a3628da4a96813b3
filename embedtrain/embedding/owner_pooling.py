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
from embedtrain.ops.owner_bags import add_sums, join_bags, share_out, split_bags
from embedtrain.ops.pool_rows import Bags, pool_rows
from embedtrain.ops.row_gradient import Delivery


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
        with stage("unique"):
            self._split = split_bags(
                keys,
                bags,
                num_owners=group.ranks.size,
                num_local_rows=group.num_local_rows,
                dtype=id_type(group),
            )
        self.id_counts, self.sum_counts = self._split.id_counts, self._split.sum_counts
        self.is_weighted = self._split.weights is not None

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
        self._bag_of_sum = self._split.bag_of_sum[: sum(of_sums[0])]
        owed = self._group.ranks.all_to_all(self._payload(is_weighted), *of_ids)
        weights = owed[:, 1].to(torch.int32).view(torch.float32) if is_weighted else None
        self.rows, lengths = join_bags(owed[:, 0] if is_weighted else owed, sum(of_sums[1]))
        parts = zip(of_ids[1], lengths.split(list(of_sums[1])), strict=True)
        of_ranks = [None] * len(of_ids[1]) if weights is None else weights.split(list(of_ids[1]))
        self._owed = [Bags(count, own, factors) for (count, own), factors in zip(parts, of_ranks, strict=True)]

    def fetch(self, source: Tensor, places: Tensor) -> list[Tensor]:
        """Returns this rank's bags, pooled: per feature [num_bags, dim] float32. Collective: every rank.

        Args:
            source: [n, dim]; what holds the rows that this rank adds up.
            places: [num_rows] int64; the place of each of `rows` in it.
        """
        group = self._group
        # Sums have no storage to be exact to: they travel as gradients do, in float32 unless chosen otherwise.
        like = torch.empty(0, source.shape[1], dtype=group.gradient_wire_dtype, device=source.device)
        sums = group.ranks.all_to_all_written(
            lambda rooms: pool_rows(source, places, self._owed, out=rooms),
            like,
            *reversed(self._sum_counts),
            is_kept=False,
        )
        return add_sums(sums, self._bag_of_sum, self._bags)

    def send_home(self, grads: Sequence[Tensor | None]) -> Delivery:
        """Sends the gradients of the pooled vectors to the owners; returns those of this rank's rows.

        Collective: every rank.
        """
        group = self._group
        like = torch.empty(0, group.weight.shape[1], dtype=group.gradient_wire_dtype, device=group.device)
        shares = group.ranks.all_to_all_written(
            lambda rooms: share_out(grads, self._bags, self._bag_of_sum, rooms),
            like,
            *self._sum_counts,
            is_kept=True,
        )
        return Delivery(self.rows, self._owed, [share.float() for share in shares])

    def _payload(self, is_weighted: bool) -> Tensor:
        """Returns what travels to the owners: [n] rows, or [n, 2] rows and the bits of their weights."""
        rows, weights = self._split.rows, self._split.weights
        if not is_weighted:
            return rows
        weights = rows.new_ones(rows.numel(), dtype=torch.float32) if weights is None else weights
        return torch.stack([rows, weights.view(torch.int32).to(rows.dtype)], dim=1)


def id_type(group: TableGroup) -> torch.dtype:
    """Returns in which type local rows travel: half the bytes, where they fit."""
    return torch.int32 if group.num_local_rows < 1 << 31 else torch.int64
