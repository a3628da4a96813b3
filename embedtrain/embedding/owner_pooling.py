"""Pooling at owners: ids are sent to the owners of their rows, which return one sum per bag.

The rows of a bag may have several owners. Each owner sums its rows of the bag. The rank of the example adds the owners'
sums in order of rank, and for a mean divides by the bag's length. In backward, the gradient of each sum is sent to the
owner, which passes it to its rows of the bag.
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
    """Holds this rank's bags that owners pool, and the bags of other ranks that this rank pools.

    `exchange` must be called first.

    Args:
        group: the tables.
        bags: bags per feature; may be empty.
        keys: [n] int64; keys of the bags' rows, feature after feature.

    Attributes:
        id_counts: [world_size] int64; number of ids for each owner.
        sum_counts: [world_size] int64; number of bags for each owner, and so of sums that it returns.
        is_weighted: whether ids have weights.
        rows: [n] int64; local rows that this rank sums, known after `exchange`.
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
            of_ids: number of ids to each rank, and from each rank.
            of_sums: number of sums from each rank, and to each rank.
            is_weighted: whether ids of any rank have weights.
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
        """Returns the pooled vectors of this rank's bags, per feature [num_bags, dim] float32. Collective: every rank.

        Args:
            source: [n, dim]; weights that contain the rows that this rank sums.
            places: [num_rows] int64; index in `source` of each of `rows`.
        """
        group = self._group
        # Sums are sent in the dtype of gradients, float32 by default: the dtype of the weights would round them.
        like = torch.empty(0, source.shape[1], dtype=group.gradient_wire_dtype, device=source.device)
        sums = group.ranks.all_to_all_written(
            lambda rooms: pool_rows(source, places, self._owed, out=rooms),
            like,
            *reversed(self._sum_counts),
            is_kept=False,
        )
        return add_sums(sums, self._bag_of_sum, self._bags)

    def send_home(self, grads: Sequence[Tensor | None]) -> Delivery:
        """Sends the gradients of the pooled vectors to the owners, and returns the gradients of this rank's rows.

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
        """Returns the tensor to send to the owners: [n] rows, or [n, 2] rows and the bits of their weights."""
        rows, weights = self._split.rows, self._split.weights
        if not is_weighted:
            return rows
        weights = rows.new_ones(rows.numel(), dtype=torch.float32) if weights is None else weights
        return torch.stack([rows, weights.view(torch.int32).to(rows.dtype)], dim=1)


def id_type(group: TableGroup) -> torch.dtype:
    """Returns the dtype in which local rows are sent: int32 if they fit, else int64."""
    return torch.int32 if group.num_local_rows < 1 << 31 else torch.int64
